"""A sampler without recursion, and a network asked about several of its rows at once.

    u_n = A_n x_T + sum_{j<n} B_{nj} D_j + sum_{j<n} C_{nj} z_j,      D_j = D(u_j, t_j)

Only rows that evaluate are kept, and the end.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from diffsamp._core import random
from diffsamp._core.checks import expect_state
from diffsamp._core.numeric import working_dtype
from diffsamp._core.types import Array, Bound, Conditions, Key, PyTree
from diffsamp.sampling import expect_key, row_levels
from diffsamp.score import ScoreFn
from diffsamp.tableau import Tableau

__all__ = ["Prepared", "Unrolled"]


class Prepared(NamedTuple):
    """A sampler, unrolled on the host for one network and start.

    Attributes:
      bound: what the network needs to know of the rows that evaluate, n of them.
      on_start: (n + 1,) weights of x_T in their states and in the sample.
      on_data: (n + 1, n) of their data predictions.
      on_noise: (n + 1, m) of the noises.
      noisy: (m,) which rows of the tableau draw them.
      x_T: the start.
      keys: of every sample, or None.
      cond: keyword arguments for the network.
    """

    bound: Bound
    on_start: Array
    on_data: Array
    on_noise: Array
    noisy: Array
    x_T: PyTree
    keys: Key
    cond: Conditions

    @classmethod
    def of(
        cls,
        score_fn: ScoreFn,
        tableau: Tableau,
        x_T: PyTree,
        key: Key,
        cond: Conditions | None,
    ) -> tuple[Prepared, int | None]:
        """It, and the size of the batch or None.

        Raises:
          TypeError: x_T not floating, a traced tableau.
          ValueError: a stacked tableau or one whose coefficients have axes of the data; and as
            `sample`.
        """
        on_start, on_data, on_noise = tableau.unroll(prediction="data")
        batch = expect_state(x_T, "x_T", score_fn.batched)
        expect_key(tableau, key)
        live = np.flatnonzero(np.asarray(tableau.evaluates))
        rows = np.append(live, tableau.rows)  # the states that matter
        level = jax.tree.map(lambda v: v[live], row_levels(tableau))
        ones = np.ones(live.size)
        bound = score_fn.bind(level, (ones, 0 * ones))
        score_fn.check_bound(bound, level, ones.astype(bool))
        noisy = np.flatnonzero(tableau.c)
        keys = random.sample_keys(key, batch) if noisy.size else None
        weights = on_start[rows], on_data[rows][:, live], on_noise[rows][:, noisy]
        x_T = jax.tree.map(jnp.asarray, x_T)
        return cls(bound, *weights, noisy, x_T, keys, dict(cond or {})), batch


@dataclasses.dataclass(frozen=True)
class Unrolled:
    """The same within a program, where every sample has a batch axis of its own.

    Attributes:
      score_fn: the network.
      bound: as of `Prepared`.
      on_data: likewise.
      fixed: (sample, n + 1, ...) what start and noises give to every state.
      x_T: (sample, ...).
      cond: keyword arguments for the network.
      batch: the size of the caller's batch, or None for no batch axis.
    """

    score_fn: ScoreFn
    bound: Bound
    on_data: Array
    fixed: PyTree
    x_T: PyTree
    cond: Conditions
    batch: int | None

    @classmethod
    def start(cls, score_fn: ScoreFn, prepared: Prepared, batch: int | None) -> Unrolled:
        """Draw all noises."""
        x_T, keys = prepared.x_T, prepared.keys
        if batch is None:
            x_T = jax.tree.map(lambda x: x[None], x_T)
            keys = None if keys is None else keys[None]
        bound = jax.tree.map(jnp.asarray, prepared.bound)
        on_data = jnp.asarray(prepared.on_data, working_dtype(jax.tree.leaves(x_T)[0].dtype))
        fixed = _combine(prepared.on_start[:, None], jax.tree.map(lambda x: x[:, None], x_T))
        if keys is not None:
            drawn = jax.vmap(lambda row: random.normal_like(keys, row, x_T), out_axes=1)
            noise = _combine(prepared.on_noise, drawn(prepared.noisy))
            fixed = jax.tree.map(jnp.add, fixed, noise)
        return cls(score_fn, bound, on_data, fixed, x_T, prepared.cond, batch)

    @property
    def size(self) -> int:
        """How many samples."""
        return int(jax.tree.leaves(self.x_T)[0].shape[0])

    @property
    def count(self) -> int:
        """n: how many rows evaluate."""
        return int(self.on_data.shape[1])

    def states(self, rows: Array, data: PyTree) -> PyTree:
        """u at `rows` (sample, k) of each sample, from the data predictions (sample, n, ...)."""
        part = jax.tree.map(lambda leaf: jax.vmap(lambda v, r: v[r])(leaf, rows), self.fixed)
        return jax.tree.map(jnp.add, part, _combine(self.on_data[rows], data))

    def ask(self, rows: Array, u: PyTree) -> PyTree:
        """D at `rows` (sample, k), all in one call."""
        k = rows.shape[1]
        flat = jax.tree.map(
            lambda leaf, x: leaf.reshape(-1, *leaf.shape[2:]).astype(x.dtype), u, self.x_T
        )
        here = jax.tree.map(lambda v: v[rows.reshape(-1)], self.bound)
        if self.batch is None:
            predict = self.score_fn.predict
            out = jax.vmap(lambda x, b: predict(x, b, self.cond))(flat, here)
        else:
            own = (self.batch,)
            repeated = jax.tree.map(
                lambda v: jnp.repeat(v, k, axis=0) if jnp.shape(v)[:1] == own else v, self.cond
            )
            out = self.score_fn.predict(flat, here, repeated)
        return jax.tree.map(lambda leaf: leaf.reshape(self.size, k, *leaf.shape[1:]), out)

    def end(self, data: PyTree) -> PyTree:
        """The samples, with a batch axis, in the dtype of the start."""
        last = self.states(jnp.full((self.size, 1), self.count, jnp.int32), data)
        return jax.tree.map(lambda leaf, old: leaf[:, 0].astype(old.dtype), last, self.x_T)


def _combine(matrix: Array, stack: PyTree) -> PyTree:
    """sum_j matrix[.., row, j] stack[sample, j]: (sample, row, ...), in at least float32."""

    def one(leaf):
        dtype, size = working_dtype(leaf.dtype), leaf.shape[0]
        weights = jnp.broadcast_to(jnp.asarray(matrix, dtype), (size, *matrix.shape[-2:]))
        leaf, precision = leaf.astype(dtype), lax.Precision.HIGHEST
        return jnp.einsum("srj,sj...->sr...", weights, leaf, precision=precision)

    return jax.tree.map(one, stack)
