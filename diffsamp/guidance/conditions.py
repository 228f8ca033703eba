"""Conditions that change along the way: CADS."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core import random
from diffsamp._core.numeric import namespace, working_dtype
from diffsamp._core.types import Array, Bound, Conditions, Key, Network, PyTree
from diffsamp.guidance.transform import Transform, per_row
from diffsamp.predictions import Level
from diffsamp.score import ScoreFn, scale_rows

__all__ = ["Annealed", "anneal_condition"]

_STREAM = 0xCAD5  # its own noise, should the caller give the sampler's key here as well


class _AnnealedBound(NamedTuple):
    inner: Bound
    row: Array
    share: PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Annealed(Transform):
    """A network whose conditions are noised at high noise levels; made by `anneal_condition`."""

    score_fn: Network
    key: Key
    scale: Array
    mix: PyTree
    tau: tuple[float, float] = dataclasses.field(metadata={"static": True})
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def for_samples(self, numbers: Array) -> Annealed:
        """As `Transform.for_samples`, with the keys of these samples."""
        new: Annealed = super().for_samples(numbers)
        key = random.typed(self.key)
        keys = key[numbers] if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
        return dataclasses.replace(new, key=keys)

    def bind(self, level: Level, target: tuple[Array, Array]) -> _AnnealedBound:
        """As `ScoreFn.bind`, and how much of the condition each row keeps."""
        per_row(level, "anneal_condition")
        rows = np.arange(np.shape(level.t)[0], dtype=np.int32)
        xp = namespace(level.t, *jax.tree.leaves(self.process))
        grid = np.linspace(0, 1, 4097)
        # the fraction of the process's own time, which `uniform_time` maps to t
        u = xp.interp(xp.asarray(level.t), xp.asarray(self.process.uniform_time(grid)), grid)
        low, high = self.tau
        share = xp.clip((high - u) / (high - low), 0, 1)
        return _AnnealedBound(self.score_fn.bind(level, target), rows, share)

    def predict(self, x: PyTree, bound: _AnnealedBound, cond: Conditions | None = None) -> PyTree:
        """The prediction under this row's conditions."""
        given = dict(cond or {})
        missing = [name for name in self.names if name not in given]
        if missing:
            raise ValueError(f"`cond` lacks {missing}, which anneal_condition is to noise.")
        own = {name: given[name] for name in self.names}
        batch = jax.tree.leaves(x)[0].shape[0]
        for path, leaf in jax.tree_util.tree_leaves_with_path(own):
            if not jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating):
                raise TypeError(
                    f"cond{jax.tree_util.keystr(path)} is of dtype {jnp.asarray(leaf).dtype} and "
                    "cannot be noised: noise its embedding, a condition of floating dtype."
                )
            if jnp.shape(leaf)[:1] != (batch,):
                raise ValueError(
                    f"cond{jax.tree_util.keystr(path)} must have one entry per sample, {batch}, to "
                    f"be noised for each; got shape {jnp.shape(leaf)}."
                )
        keys = jax.vmap(jax.random.fold_in, (0, None))(random.sample_keys(self.key, batch), _STREAM)
        noise = random.normal_like(keys, bound.row, own)
        noised = jax.tree.map(lambda c, n: self._noised(jnp.asarray(c), n, bound.share), own, noise)
        return self.score_fn.predict(x, bound.inner, {**given, **noised})

    def _noised(self, c: jax.Array, n: jax.Array, share: PyTree) -> jax.Array:
        wide, n = (v.astype(working_dtype(c.dtype)) for v in (c, n))
        kept, added = (scale_rows(v, wide) for v in (jnp.sqrt(share), jnp.sqrt(1 - share)))
        new = kept * wide + added * jnp.asarray(self.scale, wide.dtype) * n
        axes = tuple(range(1, wide.ndim))

        def moments(v: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jnp.mean(v, axis=axes, keepdims=True), jnp.std(v, axis=axes, keepdims=True)

        (mean, std), (own_mean, own_std) = moments(new), moments(wide)
        flat = std == 0
        like = (new - mean) / jnp.where(flat, 1, std) * own_std + own_mean
        mix = jnp.asarray(self.mix, wide.dtype)
        mixed = jnp.where(flat, new, mix * like + (1 - mix) * new)
        # a row that keeps all keeps it to the bit
        return jnp.where(scale_rows(share, wide) == 1, wide, mixed).astype(c.dtype)


def anneal_condition(
    score_fn: ScoreFn | Transform,
    names: str | Sequence[str],
    key: jax.Array,
    *,
    tau: tuple[float, float] = (0.6, 0.9),
    scale: float = 0.1,
    mix: float = 1.0,
) -> Annealed:
    """CADS: noise the condition while there is much noise in the state, for more diverse samples.

    c' = sqrt(g) c + scale sqrt(1 - g) n, brought back to the mean and standard deviation of c and
    mixed with c' itself by `mix`; g falls from 1 at the fraction tau[0] of the process's time to 0
    at tau[1] and above. Costs no evaluation.

    Args:
      score_fn: a conditional network; put this around guidance, so that its null half stays as is.
      names: of the conditions to be noised: floating, with one entry per sample.
      key: one, or one per sample: every sample and row draws its own noise.
      tau: where annealing ends and begins, fractions of the time from data (0) to noise (1).
      scale: of the noise; 0.025 to 0.25.
      mix: the paper's psi, 1 keeps mean and deviation of each sample's condition.

    Returns:
      A transform to sample with, following the rows of a tableau.

    Raises:
      ValueError: tau not rising within [0, 1], a network without a batch axis.

    Reference: Sadat et al. 2024, arXiv:2310.17347, algorithm 1.
    """
    low, high = (float(v) for v in tau)
    if not 0 <= low < high <= 1:
        raise ValueError(f"`tau` must rise within [0, 1]; got {tau}.")
    if not score_fn.batched:
        raise ValueError("anneal_condition needs a network with a batch axis.")
    chosen = (names,) if isinstance(names, str) else tuple(names)
    return Annealed(score_fn, random.typed(key), scale, mix, (low, high), chosen)
