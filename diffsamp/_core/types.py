"""What the annotations of this library mean by an array, a pytree, a key.

Most functions take NumPy arrays, JAX arrays and tracers alike, and give back what they were given;
no type says that. The names here do, for readers; a type checker takes them for Any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

__all__ = [
    "Apply",
    "Array",
    "Bound",
    "Conditions",
    "DType",
    "Key",
    "Network",
    "PyTree",
    "Sharding",
    "Times",
    "Value",
]

# a network's function, (params, x, t, **cond) -> its output, shaped like x
Apply: TypeAlias = Callable[..., Any]
Array: TypeAlias = Any  # a number, a NumPy array or a JAX array
PyTree: TypeAlias = Any  # an array, or dicts, lists, tuples, dataclasses of arrays
Times: TypeAlias = Any  # (n + 1,) numbers: a sequence, a NumPy array or a JAX array
Key: TypeAlias = Any  # a random key of JAX, or an array of them, one per sample
DType: TypeAlias = Any  # a NumPy or JAX dtype, or what makes one
Sharding: TypeAlias = Any  # a jax.sharding.Sharding, or None
Network: TypeAlias = Any  # a ScoreFn, or a transform of one
Bound: TypeAlias = Any  # what a network's `bind` returns
Value: TypeAlias = Any  # of an option or a file; of whatever type, and checked
# keyword arguments for the network, such as {"label": (batch,) integers}
Conditions: TypeAlias = Mapping[str, Any]
