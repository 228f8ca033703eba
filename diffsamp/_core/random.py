"""Keys: one per sample and row, so that a sample depends on nothing but its own key.

The rule, used by the prior and by the executor alike: sample i of a batch drawn with one key uses
`fold_in(key, i)`; row n of a sampling run then uses `fold_in(sample_key, n)`. Batch size, sharding
and the step counts of other samples do not enter. An array of keys, one per sample, is used as it
is, which is how one sample of a batch is drawn again alone.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["normal_like", "sample_keys", "typed"]


def typed(key: Any) -> jax.Array:
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


def sample_keys(key: Any, batch: int | None) -> jax.Array:
    """Keys of shape (batch,), or one key of shape () when there is no batch axis.

    Args:
      key: a key, or an array of `batch` keys, one per sample.
      batch: number of samples, or None for a state without a batch axis.

    Raises:
      TypeError: not a key.
      ValueError: as many keys as neither 1 nor `batch`.
    """
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


def normal_like(keys: jax.Array, row: Any, tree: Any) -> Any:
    """Standard normal noise for one row of a run.

    Args:
      keys: what `sample_keys` gave, (batch,) or ().
      row: the row's number, an int or a traced int32.
      tree: the state whose shapes and dtypes the noise takes.

    Returns:
      A pytree like `tree`.
    """
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
