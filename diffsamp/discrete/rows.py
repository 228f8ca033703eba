"""`Rows`: a sampler of discrete models as arrays, built and checked on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from diffsamp._core.checks import expect_int
from diffsamp._core.numeric import is_concrete
from diffsamp._core.types import Array

__all__ = ["SCHEDULES", "Rows", "levels"]

Schedule = Callable[[np.ndarray], np.ndarray]
# share of unmasked tokens at time t, which falls from 1 to 0
SCHEDULES: Mapping[str, Schedule] = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: 1 - np.sin(np.pi / 2 * t),
    "quadratic": lambda t: 1 - t**2,
}
_ARRAYS = ("times", "alpha", "unmask", "remask", "count", "threshold", "bound", "noise", "block")
_FLAGS = ("hitting", "confident", "uniform")


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """N rows, each one call of the network; built by the functions of `diffsamp.discrete`.

    A row unmasks, among the masked positions of its block, every one that any of these says: a coin
    of its own (`unmask`), a place among the first `count` in the sampler's order, a probability of
    its likeliest token of at least `threshold`, or a place before the sum of entropies exceeds
    `bound`. Neutral numbers say none.

    Attributes:
      times: (N + 1,) what the network is told, falling: the time of the process.
      alpha: (N + 1,) expected share of unmasked tokens, from 0 to 1, where that is fixed; for
        uniform noise the share that is the data's.
      unmask: (N,) probability of each masked token; 0 for none.
      remask: (N,) probability with which each token that was sampled earlier is masked again.
      count: (N,) so many are unmasked; 0 for none.
      threshold: (N,) inf for none.
      bound: (N,) on the sum of entropies less the largest, nats; -inf for none.
      noise: (N,) Gumbel noise on the confidences, in their units (log-probability).
      block: (N, 2) first position and the one after the last.
      hitting: (N,) bool, whether the time is each sample's own first-hitting time.
      confident: (N,) bool, whether remasking prefers tokens that were unlikely when sampled.
      uniform: (N,) bool, whether every token is drawn anew from the posterior of uniform noise.
      name: for people.
    """

    times: Array
    alpha: Array
    unmask: Array
    remask: Array
    count: Array
    threshold: Array
    bound: Array
    noise: Array
    block: Array
    hitting: Array
    confident: Array
    uniform: Array
    name: str = ""

    @classmethod
    def create(cls, *, times: Array, alpha: Array, name: str = "", **arrays: Array) -> Rows:
        """Rows from host arrays; what is left out is neutral.

        Args:
          times: (N + 1,).
          alpha: (N + 1,).
          name: for people.
          **arrays: any of the others.

        Raises:
          ValueError: shapes that do not agree, probabilities outside [0, 1], or rows that do not
            lead to `alpha`.
        """
        times, alpha = np.asarray(times, np.float64), np.asarray(alpha, np.float64)
        rows = len(times) - 1
        expect_int(rows, "the number of rows", at_least=1)
        whole = np.tile(np.array([0, np.iinfo(np.int32).max]), (rows, 1))
        neutral = {
            "unmask": np.zeros(rows),
            "remask": np.zeros(rows),
            "count": np.zeros(rows, np.int64),
            "threshold": np.full(rows, np.inf),
            "bound": np.full(rows, -np.inf),
            "noise": np.zeros(rows),
            "block": whole,
            **{flag: np.zeros(rows, bool) for flag in _FLAGS},
        }
        unknown = set(arrays) - set(neutral)
        if unknown:
            raise TypeError(f"rows have no {sorted(unknown)}.")
        made = {k: np.asarray(arrays.get(k, v), v.dtype) for k, v in neutral.items()}
        for key, value in {"alpha": alpha[:-1], **made}.items():
            expected = (rows, 2) if key == "block" else (rows,)
            if value.shape != expected:
                raise ValueError(f"`{key}` must have shape {expected}; got {value.shape}.")
        built = cls(times, alpha, name=name, **made)
        built.check()
        return built

    @property
    def rows(self) -> int:
        """N."""
        return int(np.shape(self.unmask)[0])

    def check(self) -> None:
        """Check that Bernoulli rows make the shares that they say.

        With a share alpha_n unmasked before it, a row leaves (1 - remask) alpha_n + unmask
        (1 - alpha_n), which must be alpha_{n+1}.

        Raises:
          ValueError: naming the first row that fails.
        """
        if not is_concrete(self):
            raise TypeError("rows are checked on the host.")
        for key in ("unmask", "remask", "alpha"):
            value = np.asarray(getattr(self, key))
            if np.any((value < 0) | (value > 1 + 1e-12)) or not np.all(np.isfinite(value)):
                raise ValueError(f"`{key}` must lie in [0, 1]; got {value}.")
        if np.any(np.asarray(self.count) < 0):
            raise ValueError("`count` must not be negative.")
        alpha = np.asarray(self.alpha)
        coins = np.asarray(self.count) == 0
        coins &= np.isinf(np.asarray(self.threshold)) & np.isinf(np.asarray(self.bound))
        coins &= ~np.asarray(self.uniform) & ~np.asarray(self.confident)
        made = (1 - self.remask) * alpha[:-1] + self.unmask * (1 - alpha[:-1])
        wrong = coins & (np.abs(made - alpha[1:]) > 1e-9)
        if np.any(wrong):
            n = int(np.argmax(wrong))
            raise ValueError(
                f"row {n} of {self.name!r} leaves a share of {made[n]:.9g} unmasked, not the "
                f"{alpha[n + 1]:.9g} that it says."
            )

    def pad(self, rows: int) -> Rows:
        """With rows that do nothing at the end, so that several samplers share one program.

        Args:
          rows: how many, at least the present ones.
        """
        extra = expect_int(rows, "rows", at_least=self.rows) - self.rows

        def more(key: str) -> np.ndarray:
            value = np.asarray(getattr(self, key))
            fill = {"threshold": np.inf, "bound": -np.inf}.get(key, 0)
            end = (
                value[-1:] if key in ("times", "alpha", "block") else np.full_like(value[:1], fill)
            )
            return np.concatenate([value, np.repeat(end, extra, axis=0)])

        padded = {key: more(key) for key in (*_ARRAYS, *_FLAGS)}
        return Rows(**padded, name=self.name)

    @staticmethod
    def pad_together(several: Sequence[Rows]) -> list[Rows]:
        """Several samplers padded to the longest."""
        most = max(rows.rows for rows in several)
        return [rows.pad(most) for rows in several]

    def __repr__(self) -> str:
        return f"<{self.name or 'Rows'}: {self.rows} rows>"


jax.tree_util.register_dataclass(
    Rows, data_fields=[*_ARRAYS, *_FLAGS], meta_fields=[], drop_fields=["name"]
)


def levels(schedule: str | Schedule, n: int) -> tuple[np.ndarray, np.ndarray]:
    """n + 1 times from 1 to 0 and the shares unmasked there.

    Args:
      schedule: of `SCHEDULES`, or a function of t.
      n: rows.

    Raises:
      ValueError: an unknown name, or a function that does not rise from 0 to 1 as t falls.
    """
    n = expect_int(n, "n", at_least=1)
    if not callable(schedule) and schedule not in SCHEDULES:
        raise ValueError(f"`schedule` must be one of {tuple(SCHEDULES)}; got {schedule!r}.")
    function = schedule if callable(schedule) else SCHEDULES[schedule]
    times = np.linspace(1, 0, n + 1)
    alpha = np.asarray(function(times), np.float64)
    if alpha.shape != times.shape or np.any(np.diff(alpha) < 0):
        raise ValueError("the schedule must give one share per time, rising as t falls.")
    if abs(alpha[0]) > 1e-6 or abs(alpha[-1] - 1) > 1e-6:
        raise ValueError(
            f"the schedule must go from 0 to 1; it goes from {alpha[0]} to {alpha[-1]}."
        )
    alpha[0], alpha[-1] = 0.0, 1.0
    return times, alpha
