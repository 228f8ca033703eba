"""A progress bar for long jobs."""

from __future__ import annotations

import sys

from diffsamp._core.types import Value

__all__ = ["ProgressBar"]


class ProgressBar:
    """What is done, the rate and the time left, on standard error.

    On a terminal a bar (needs tqdm); elsewhere, as in a log, a line for every ten percent. Pass it
    as `progress` to `diffsamp.generate` and to the searches; anything else that is called with
    (what, done, total) will do as well.
    """

    def __init__(self) -> None:
        from tqdm import tqdm  # says by itself that it is missing

        self._make, self._what, self._bar = tqdm, "", None
        self._tenth = -1

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` units of `what` are done; the first call sets the start."""
        terminal = sys.stderr.isatty()
        if what != self._what:
            self.close()
            self._what, self._tenth = what, -1
            # without a terminal it only keeps the time
            self._bar = self._make(
                total=total,
                initial=done,
                desc=what,
                leave=False,
                file=sys.stderr,
                **({} if terminal else {"mininterval": float("inf"), "delay": float("inf")}),
            )
        bar: Value = self._bar
        bar.update(done - bar.n)
        if not terminal:
            self._line(bar, done, total)
        if done >= total:
            self.close()

    def _line(self, bar: Value, done: int, total: int) -> None:
        """A line, where another tenth is done."""
        tenth = 10 * done // max(total, 1)
        if tenth > self._tenth:
            self._tenth = tenth
            print(bar, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
        self._what, self._bar = "", None
