"""What a network says at the highest noise, where it hardly looks at the state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core.checks import expect_int
from diffsamp._core.types import Conditions, PyTree
from diffsamp.score import ScoreFn
from diffsamp.search.running import expect_batch, slice_batch

__all__ = ["first_answers"]


@jax.jit
def _data(score_fn: ScoreFn, x: PyTree, t: jax.Array, cond: Conditions | None) -> PyTree:
    return score_fn(x, t, prediction="data", cond=cond)


def first_answers(
    score_fn: ScoreFn,
    x_T: PyTree,
    *,
    cond: Conditions | None = None,
    by: str | None = None,
    groups: int | None = None,
    batch: int = 64,
) -> PyTree:
    """The network's data prediction at t_max, its mean over starts: one evaluation of each.

    For `guidance.first_answer` and, of all together, `solvers.cached_first_answer`.

    Args:
      score_fn: the network.
      x_T: (n, ...) starts at t_max.
      cond: keyword arguments for the network, every array with the leading axis n.
      by: name of an integer condition, (n,): a mean for each of its values.
      groups: how many values it has; None: the largest one and those below it.
      batch: samples at a time.

    Returns:
      Shaped like a sample, (...); with `by`, (groups, ...), in which a value that no start has gets
      the mean over all.

    Raises:
      ValueError: a `by` that `cond` does not have as integers (n,), or answers that are not finite.
    """
    size = expect_batch(x_T, cond)
    values = None
    if by is not None:
        given = None if cond is None else cond.get(by)
        values = None if given is None else np.asarray(given)
        if values is None or values.shape != (size,) or values.dtype.kind not in "iu":
            raise ValueError(f"`cond` must have {by!r} as integers of shape ({size},).")
        most = int(values.max()) + 1
        groups = most if groups is None else expect_int(groups, "groups", at_least=most)
    of = range(groups or 0)
    t = jnp.asarray(float(score_fn.process.t_max), jnp.float32)
    answers = []
    for low in range(0, size, batch):
        x, own = (slice_batch(v, low, min(low + batch, size)) for v in (x_T, cond))
        answers.append(jax.tree.map(np.asarray, _data(score_fn, x, t, own)))

    def mean(*parts: np.ndarray) -> np.ndarray:
        told = np.concatenate(parts).astype(np.float64)
        if not np.all(np.isfinite(told)):
            raise ValueError("the network's answer at t_max is not finite.")
        of_all = told.mean(axis=0)
        if values is None:
            return of_all
        return np.stack(
            [told[values == g].mean(axis=0) if np.any(values == g) else of_all for g in of]
        )

    return jax.tree.map(mean, *answers)
