"""What a search costs: said before it starts, and kept within a limit."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from diffsamp._core.checks import expect_int
from diffsamp._core.sharding import put
from diffsamp._core.types import Bound, Conditions, Key, Network, PyTree, Sharding, Value
from diffsamp.predictions import level_at
from diffsamp.search.running import run, slice_batch
from diffsamp.tableau import Tableau

__all__ = ["Estimate", "affordable", "announce", "ask_data", "at_row", "expect_limit"]

logger = logging.getLogger("diffsamp.search")


class Estimate(NamedTuple):
    """What a search will take.

    Attributes:
      evaluations: of the network, per sample and call; a gradient counts as two.
      seconds: by the time that one batch took; None where no single one can be asked for.
      megabytes: of the states that it keeps.
    """

    evaluations: int
    seconds: float | None
    megabytes: float

    def __str__(self) -> str:
        count = f"{self.evaluations:,}".replace(",", " ")
        time_text = "" if self.seconds is None else f", about {self.seconds:.3g} s"
        return f"{count} evaluations{time_text}, {self.megabytes:.3g} MB of states"

    @property
    def settings(self) -> dict[str, Value]:
        """As a plan keeps it."""
        return {key: value for key, value in self._asdict().items() if value is not None}


@jax.jit
def ask_data(score_fn: Network, x: PyTree, bound: Bound, cond: Conditions | None) -> PyTree:
    """What is bound, at one level: the program of every search that asks single evaluations."""
    return score_fn.predict(x, bound, cond)


def at_row(bound: Bound, i: int) -> Bound:
    """One row of bound numbers that were made for several, in the precision of a program."""

    def one(values: np.ndarray) -> np.ndarray:
        value = np.asarray(values)[i]
        return value.astype(jax.dtypes.canonicalize_dtype(value.dtype))

    return jax.tree.map(one, bound)


def expect_limit(evaluations: int | None) -> float:
    """The limit of a search as a number; infinity for none.

    Raises:
      ValueError: below 1.
    """
    return np.inf if evaluations is None else expect_int(evaluations, "evaluations", at_least=1)


def affordable(what: str, size: int, each: float, limit: float) -> int:
    """How many of the starts a search may use that spends `each` evaluations on one.

    Raises:
      ValueError: not even one.
    """
    if limit < each:
        raise ValueError(
            f"`evaluations` is too low: {what} takes {each:.0f} for one start; give more, or fewer "
            "points."
        )
    return min(size, int(limit // each)) if np.isfinite(limit) else size


def announce(
    what: str,
    score_fn: Network,
    x_T: PyTree,
    cond: Conditions | None,
    *,
    evaluations: float,
    batch: int,
    states: float = 1.0,
    sharding: Sharding = None,
    tableau: Tableau | None = None,
    key: Key = None,
) -> tuple[Estimate, float]:
    """Say what a search will cost, by a timed batch; logged as INFO to "diffsamp.search".

    Args:
      what: the search.
      score_fn: the network.
      x_T: its starts.
      cond: keyword arguments for the network.
      evaluations: how many it will make, or at most makes.
      batch: samples at a time.
      states: how many states of every start it keeps.
      sharding: over the batch axis.
      tableau: a sampler to time, where the search compiles no single evaluations; None: time one.
      key: for it, one per start.

    Returns:
      (the estimate, evaluations that were spent on it).
    """
    size = int(jax.tree.leaves(x_T)[0].shape[0])
    batch = min(batch, size)
    megabytes = states * sum(leaf.nbytes for leaf in jax.tree.leaves(x_T)) / 1e6
    seconds, spent = None, 0.0
    process = score_fn.process
    middle = np.clip(float(process.time(0.0)), float(process.t_min), float(process.t_max))
    level = level_at(process, np.array([middle]))  # as much signal as noise: no known answer
    x, own = (put(slice_batch(v, 0, batch), sharding) for v in (x_T, cond))
    once: Callable[[], PyTree] | None = None
    if tableau is not None:
        cost = score_fn.nfe(tableau)
        keys = None if key is None else key[:batch]
        named = {"key": keys, "cond": own, "sharding": sharding}
        once = functools.partial(run, score_fn, tableau, x, **named)
    else:
        cost = score_fn.nfe_factor
        # a transform that follows the rows of a tableau cannot be asked at one level
        with contextlib.suppress(ValueError):
            bound = at_row(score_fn.bind(level, (np.ones(1), np.zeros(1))), 0)
            once = functools.partial(ask_data, score_fn, x, bound, own)
    if once is not None and cost > 0:
        jax.block_until_ready(once())
        began = time.perf_counter()
        jax.block_until_ready(once())
        seconds = (time.perf_counter() - began) / (batch * cost) * evaluations
        spent = 2 * batch * cost
    estimate = Estimate(int(evaluations), seconds, megabytes)
    logger.info("%s: %s", what, estimate)
    return estimate, spent
