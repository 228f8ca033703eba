"""Improved DDPM's sampler: noise with a variance that the network says."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core import random
from diffsamp._core.numeric import working_dtype
from diffsamp._core.types import Array, Bound, Conditions, Key, Network, PyTree
from diffsamp.guidance.transform import Transform, per_row
from diffsamp.predictions import Level
from diffsamp.score import ScoreFn, ask, scale_rows
from diffsamp.tableau import Tableau

__all__ = ["LearnedRange", "learned_range"]


class _RangeBound(NamedTuple):
    inner: Bound
    row: Array
    low: PyTree
    spread: Array
    per_output: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LearnedRange(Transform):
    """DDPM's noise with a learned variance; made by `learned_range`."""

    score_fn: Network
    key: Key
    low: PyTree
    spread: Array
    per_output: Array

    def for_samples(self, numbers: Array) -> LearnedRange:
        """With the keys of these samples, so that their noise does not depend on the batch."""
        key = random.typed(self.key)
        keys = key[numbers] if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
        return dataclasses.replace(self, key=keys)

    def bind(self, level: Level, target: tuple[Array, Array]) -> _RangeBound:
        """As `ScoreFn.bind`, with the numbers of each row's noise."""
        numbers = per_row(level, "learned_range", self.low, self.spread, self.per_output)
        rows = np.arange(np.shape(level.t)[0], dtype=np.int32)
        return _RangeBound(self.score_fn.bind(level, target), rows, *numbers)

    def __call__(
        self,
        x: PyTree,
        t: Array,
        *,
        prediction: str | None = None,
        cond: Conditions | None = None,
    ) -> PyTree:
        """As for a `ScoreFn`: the prediction of the first head, without noise."""

        def first(*arguments: PyTree, **more: PyTree) -> PyTree:
            return self.score_fn.apply(*arguments, **more)[0]

        return ask(dataclasses.replace(self.score_fn, apply=first), x, t, prediction, cond)

    def predict(self, x: PyTree, bound: _RangeBound, cond: Conditions | None = None) -> PyTree:
        """The prediction, with this row's noise in it."""
        heads: list[PyTree] = []

        def first(*arguments: PyTree, **more: PyTree) -> PyTree:
            output, second = self.score_fn.apply(*arguments, **more)
            heads.append(second)
            return output

        output = dataclasses.replace(self.score_fn, apply=first).predict(x, bound.inner, cond)
        batch = jax.tree.leaves(x)[0].shape[0] if self.batched else None
        noise = random.normal_like(random.sample_keys(self.key, batch), bound.row, x)

        def add(m: jax.Array, v: jax.Array, z: jax.Array) -> jax.Array:
            share = (v.astype(working_dtype(m.dtype)) + 1) / 2
            std = jnp.exp(scale_rows(bound.low, m) + share * scale_rows(bound.spread, m))
            return (m + std * scale_rows(bound.per_output, m) * z).astype(m.dtype)

        return jax.tree.map(add, output, heads.pop(), noise)


def learned_range(score_fn: ScoreFn, tableau: Tableau, key: Key) -> LearnedRange:
    """Improved DDPM's sampler: the noise's variance from the network's second head.

    log variance = f log(beta) + (1 - f) log(beta~), elementwise, with f = (v + 1) / 2 and v the
    second head; beta~ is DDPM's "small" and beta its "large" variance. The noise depends on the
    network's output and so is drawn here, into the prediction, while the tableau
    (`solvers.ddpm(.., variance="learned")`) holds the mean.

    Examples:
      >>> import jax, diffsamp as ds
      >>> process = ds.processes.vp_linear()
      >>> def apply(params, x, t):
      ...     return 0.1 * x, 0.0 * x  # the noise prediction, and v in [-1, 1]
      >>> network = ds.ScoreFn(apply, None, process, prediction="noise")
      >>> tableau = ds.solvers.ddpm(
      ...     process, ds.schedules.uniform(process, 10), variance="learned"
      ... )
      >>> ranged = ds.guidance.learned_range(network, tableau, jax.random.key(0))
      >>> x_T = process.prior_sample(jax.random.key(1), (4, 3))
      >>> ds.sample(ranged, tableau, x_T).shape
      (4, 3)

    Args:
      score_fn: a network whose `apply` returns a pair, prediction and v, each shaped like x.
      tableau: from `solvers.ddpm(process, times, variance="learned")`; sample with the same one
        (padded or not).
      key: one key, or one per sample; row n of sample i draws as `ds.sample` would with this key.

    Raises:
      ValueError: a tableau of another kind.

    Reference: Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15.
    """
    alpha, sigma = np.asarray(tableau.alpha), np.asarray(tableau.sigma)
    rows = tableau.nfe
    if tableau.stochastic or (tableau.p, tableau.q) != (1, 1) or rows != tableau.rows:
        raise ValueError(
            'learned_range needs the tableau of solvers.ddpm(process, times, variance="learned"); '
            f"got {tableau.name!r}."
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        large = np.sqrt(sigma[:-1] ** 2 - (alpha[:-1] / alpha[1:] * sigma[1:]) ** 2)
        small = large * sigma[1:] / sigma[:-1]
        noisy = small > 0
        low = np.where(noisy, np.log(np.where(noisy, small, 1)), 0)
        spread = np.where(noisy, np.log(large) - low, 0)
    per_output = np.where(noisy, 1 / np.asarray(tableau.b)[:, 0], 0)
    return LearnedRange(score_fn, key, low, spread, per_output)
