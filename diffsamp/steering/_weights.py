"""What particles of any kind of state share: their keys, weights and resampling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core.types import Array, Key, PyTree

__all__ = ["normalised", "particle_keys", "resample", "spread", "take"]

_RESAMPLING = 0x5EED  # the stream of the resampling's draws, beside the rows' noise


def spread(tree: PyTree, batch: int, particles: int) -> PyTree:
    """Leaves with an entry per sample, (batch, ...), repeated for each of its particles.

    Args:
      tree: None, or a pytree; other leaves stay.
      batch: samples.
      particles: of each.
    """

    def one(leaf: PyTree) -> PyTree:
        own = np.shape(leaf)[:1] == (batch,)
        return jnp.repeat(jnp.asarray(leaf), particles, axis=0) if own else leaf

    return jax.tree.map(one, tree)


def particle_keys(keys: Key, particles: int) -> tuple[Key, Key]:
    """(a key per particle, (batch * particles,); one per sample for resampling, (batch,)).

    Args:
      keys: one per sample.
      particles: of each.
    """
    numbered = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    own = numbered(keys, jnp.arange(particles)).reshape(-1)
    return own, jax.vmap(jax.random.fold_in, (0, None))(keys, _RESAMPLING)


def take(index: jax.Array, leaf: jax.Array) -> jax.Array:
    """Every sample's particles in the order of `index`; no sample reads another's.

    Args:
      index: (batch, particles).
      leaf: (batch * particles, ...).
    """
    split = leaf.reshape(*index.shape, *leaf.shape[1:])
    return jax.vmap(lambda v, i: v[i])(split, index).reshape(leaf.shape)


def resample(
    log_w: jax.Array,
    log_Z: jax.Array,
    draws: Key,
    row: Array,
    asked: Array,
    threshold: Array,
    particles: int,
    select_one: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Systematic resampling where the weights differ too much; else they are kept.

    Args:
      log_w: (batch * particles,).
      log_Z: (batch,), the estimate so far.
      draws: a key per sample.
      row: number of the row, for its draw.
      asked: (batch,) or one for all, whether the network was; where it was not there is nothing new
        to resample for.
      threshold: share of the particles below which the effective number must be.
      particles: of each sample.
      select_one: copies of one particle, drawn by its weight.

    Returns:
      Weights, the estimate and which particle each place takes, (batch, particles).
    """
    log_w = log_w.reshape(-1, particles)
    total = jax.nn.logsumexp(log_w, axis=1, keepdims=True)
    share = jnp.exp(log_w - total)
    ess = 1 / jnp.sum(share * share, axis=1)
    # equal weights need no resampling, whatever the threshold; one draw then is one draw still
    low = (ess < jnp.asarray(threshold, ess.dtype) * particles) | (
        jnp.full(ess.shape, select_one) & (jnp.asarray(threshold, ess.dtype) >= 1)
    )
    low &= asked

    def pick(key: Key, share: jax.Array) -> jax.Array:
        u = jax.random.uniform(jax.random.fold_in(key, row), dtype=share.dtype)
        places = jnp.arange(particles, dtype=share.dtype)
        places = jnp.full(particles, u) if select_one else (u + places) / particles
        edges = jnp.cumsum(share)
        return jnp.minimum(jnp.searchsorted(edges / edges[-1], places), particles - 1)

    stay = jnp.arange(particles, dtype=jnp.int32)[None]
    index = jnp.where(low[:, None], jax.vmap(pick)(draws, share).astype(jnp.int32), stay)
    mean = total[:, 0] - jnp.log(jnp.asarray(particles, total.dtype))
    log_Z = jnp.where(low, log_Z + mean, log_Z)
    log_w = jnp.where(low[:, None], 0, log_w)
    return log_w.reshape(-1), log_Z, index


def normalised(log_w: jax.Array, log_Z: jax.Array, particles: int) -> tuple[jax.Array, jax.Array]:
    """(batch, particles) log-weights that sum to 1, and the estimate with their mean.

    Args:
      log_w: (batch * particles,).
      log_Z: (batch,).
      particles: of each sample.
    """
    log_w = log_w.reshape(-1, particles)
    total = jax.nn.logsumexp(log_w, axis=1)
    log_Z = log_Z + total - jnp.log(jnp.asarray(particles, total.dtype))
    return log_w - total[:, None], log_Z
