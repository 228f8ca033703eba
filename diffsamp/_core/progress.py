"""A progress bar for long jobs."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["ProgressBar"]


class ProgressBar:
    """A bar on standard error with what is done, the rate and the time left (needs tqdm).

    Pass it as `progress` to `diffsamp.generate` and to the searches; anything else that is called
    with (what, done, total) will do as well.
    """

    def __init__(self) -> None:
        from tqdm import tqdm  # says by itself that it is missing

        self._make, self._what, self._bar = tqdm, "", None

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` units of `what` are done; the first call sets the start."""
        if what != self._what:
            self.close()
            self._what = what
            self._bar = self._make(
                total=total, initial=done, desc=what, leave=False, file=sys.stderr
            )
        bar: Any = self._bar
        bar.update(done - bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
        self._what, self._bar = "", None
