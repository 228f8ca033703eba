"""Small numerical helpers shared by the whole package.

Everything here works on host NumPy arrays (in float64) and on JAX arrays and tracers (in the dtype
they have) through one code path: `namespace` picks the module from the arguments.
"""

from __future__ import annotations

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core.types import Array, DType, PyTree, Value

__all__ = ["as_float", "is_concrete", "namespace", "silence", "to_host", "working_dtype"]


def namespace(*values: Value) -> ModuleType:
    """`jax.numpy` when any value is a JAX array or tracer, else `numpy` (float64 on the host)."""
    return jnp if any(isinstance(v, jax.Array) for v in values) else np


def as_float(value: Value, like: PyTree = None) -> Array:
    """`value` as a floating array: float64 on the host, the dtype of `like` (or its own) in JAX."""
    xp = namespace(value, like)
    if xp is np:
        return np.asarray(value, np.float64)
    if like is not None and isinstance(like, jax.Array):
        return jnp.asarray(value, like.dtype)
    array = jnp.asarray(value)
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(jnp.float32)


def is_concrete(*trees: PyTree) -> bool:
    """True when no leaf is a tracer, so that values can be read on the host."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def to_host(value: Value) -> np.ndarray:
    """A concrete array as float64 NumPy."""
    return np.asarray(value, np.float64)


def working_dtype(dtype: DType) -> Array:
    """The dtype in which states of `dtype` are combined: float64 for float64, else float32."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def silence(function):
    """Let a formula pass through its limits (log 0, 1/inf) without NumPy's warnings.

    Used only where the limit is the wanted value, such as log-SNR = inf at sigma = 0.
    """

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            return function(*args, **kwargs)

    return wrapped
