"""Keys: one per sample and row, so that a sample depends on nothing but its own key.

The rule, used by the prior and by the executor alike: sample i of a batch drawn with one key uses
`fold_in(key, i)`; row n of a sampling run then uses `fold_in(sample_key, n)`. Batch size, sharding
and the step counts of other samples do not enter. An array of keys, one per sample, is used as it
is, which is how one sample of a batch is drawn again alone. A `Brownian` in their place draws a
row's noise from one path per sample key, which runs of other step counts share.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from diffsamp._core.numeric import working_dtype
from diffsamp._core.types import Array, Key, PyTree

__all__ = ["Brownian", "normal_like", "sample_keys", "typed"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Brownian:
    """Keys whose noise is that of a Brownian path; made by `diffsamp.brownian_key`.

    The path W runs in e^(2 log-SNR), where the reverse SDE's noise over a step is one increment
    of it. It is known on 2^16 log-SNRs from -12 to 12, equally spaced, by halving: the middle of an
    interval is normal given its ends. Increments are exactly normal and independent.

    Attributes:
      keys: a key, or one per sample.
      start: (N,) int32, where each row's increment starts, on that grid.
      end: (N,) int32, where it ends; rows whose `end` is not above `start` draw by themselves.
    """

    keys: Key
    start: PyTree
    end: PyTree

    LEVELS = 16
    REACH = 12.0  # log-SNR, nats
    _BRANCH = 2**31 - 1  # what the path's keys are folded with; no row has that number

    def normal_like(self, row: Array, tree: PyTree) -> PyTree:
        """The row's increment over the root of its length, like `tree`."""
        row = jnp.asarray(row, jnp.int32)
        at = jnp.minimum(row, self.start.shape[0] - 1)
        start, end = self.start[at], self.end[at]

        def shared() -> PyTree:
            ends = jax.vmap(lambda index: self._path(index, tree))(jnp.stack([start, end]))
            scale = 1 / jnp.sqrt(self._clock(end) - self._clock(start))
            return jax.tree.map(
                lambda w, like: (scale.astype(w.dtype) * (w[1] - w[0])).astype(like.dtype),
                ends,
                tree,
            )

        own = functools.partial(normal_like, self.keys, row, tree)
        return lax.cond((row < self.start.shape[0]) & (start < end), shared, own)

    @property
    def spacing(self) -> float:
        """The log-SNR from one point of the grid to the next."""
        return 2 * self.REACH / 2**self.LEVELS

    def _clock(self, index: Array) -> PyTree:
        return jnp.exp(2 * (jnp.asarray(index, jnp.result_type(float)) * self.spacing - self.REACH))

    def _path(self, index: Array, tree: PyTree) -> PyTree:
        """W at a point of the grid: LEVELS halvings towards it."""
        wide = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, working_dtype(leaf.dtype)), tree)
        fold = functools.partial(jax.random.fold_in, data=self._BRANCH)
        keys = jax.vmap(fold)(self.keys) if self.keys.ndim else fold(self.keys)

        def halve(level: PyTree, ends: PyTree) -> PyTree:
            low, high = ends
            first = (index >> (self.LEVELS - level)) << (self.LEVELS - level)
            half = self.REACH * 0.5 ** jnp.asarray(level, jnp.result_type(float))  # in log-SNR
            near = 1 / (jnp.exp(2 * half) + 1)  # how far the middle is, in the path's time
            std = jnp.sqrt(self._clock(first) * jnp.exp(2 * half) * jnp.tanh(half))
            drawn = normal_like(keys, (1 << level) + (index >> (self.LEVELS - level)), wide)

            def between(a: jax.Array, b: jax.Array, z: jax.Array) -> jax.Array:
                return a + near.astype(a.dtype) * (b - a) + std.astype(a.dtype) * z

            middle = jax.tree.map(between, low, high, drawn)
            right = (index >> (self.LEVELS - 1 - level)) & 1 == 1
            keep = functools.partial(jax.tree.map, functools.partial(jnp.where, right))
            return keep(middle, low), keep(high, middle)

        last = jax.tree.map(
            lambda z: z * jnp.sqrt(self._clock(2**self.LEVELS) - self._clock(0)).astype(z.dtype),
            normal_like(keys, 0, wide),
        )
        return lax.fori_loop(0, self.LEVELS, halve, (wide, last))[0]


def typed(key: Key) -> jax.Array:
    """`key` as typed key(s); raw uint32 keys of `jax.random.PRNGKey` are wrapped.

    Args:
      key: one key or an array of them.

    Raises:
      TypeError: not a key.
    """
    if not hasattr(key, "dtype"):
        raise TypeError(
            f"`key` must be a JAX random key, such as jax.random.key(0); got {type(key).__name__}."
        )
    if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    if key.dtype == jnp.uint32 and key.ndim >= 1:
        return jax.random.wrap_key_data(key)
    raise TypeError(
        "`key` must be a JAX random key, such as jax.random.key(0); got an array of dtype "
        f"{key.dtype} and shape {key.shape}."
    )


def sample_keys(key: Key, batch: int | None) -> PyTree:
    """Keys of shape (batch,), or one key of shape () when there is no batch axis.

    Args:
      key: a key, or an array of `batch` keys, one per sample.
      batch: number of samples, or None for a state without a batch axis.

    A `Brownian` keeps its rows and gets keys in their place.

    Raises:
      TypeError: not a key.
      ValueError: as many keys as neither 1 nor `batch`.
    """
    if isinstance(key, Brownian):
        return dataclasses.replace(key, keys=sample_keys(key.keys, batch))
    key = typed(key)
    if batch is None:
        if key.ndim:
            raise ValueError(
                f"`key` must be one key for a state without a batch axis; got {key.shape} keys."
            )
        return key
    if key.ndim == 0:
        return _spread(key, batch)
    if key.shape != (batch,):
        raise ValueError(
            f"`key` must be one key or one per sample, shape ({batch},); got shape {key.shape}."
        )
    return key


@functools.partial(jax.jit, static_argnums=1)  # operation by operation it takes a millisecond
def _spread(key: jax.Array, batch: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch))


def normal_like(keys: Key, row: Array, tree: PyTree) -> PyTree:
    """Standard normal noise for one row of a run.

    Args:
      keys: what `sample_keys` gave, (batch,) or (), or a `Brownian` of such.
      row: the row's number, an int or a traced int32.
      tree: the state whose shapes and dtypes the noise takes.

    Returns:
      A pytree like `tree`.
    """
    if isinstance(keys, Brownian):
        return keys.normal_like(row, tree)
    leaves, treedef = jax.tree.flatten(tree)

    def draw(key: jax.Array) -> list[jax.Array]:
        key = jax.random.fold_in(key, row)
        drop = keys.ndim  # the batch axis, when there is one
        return [
            jax.random.normal(jax.random.fold_in(key, i), leaf.shape[drop:], leaf.dtype)
            for i, leaf in enumerate(leaves)
        ]

    drawn = jax.vmap(draw)(keys) if keys.ndim else draw(keys)
    return jax.tree.unflatten(treedef, drawn)
