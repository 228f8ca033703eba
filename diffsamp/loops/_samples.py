"""What the adaptive solvers share: one sample at a time, with its own steps."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffsamp._core.types import PyTree, Value

__all__ = ["OdeSolution", "each", "number"]


class OdeSolution(NamedTuple):
    """What `ode_solution` returns.

    Attributes:
      x: the state at `t_end`, like the given one.
      nfe: (batch,) int32, calls of `score_fn` that each sample needed, rejected steps included.
      points: like x with len(save_at) in front, the states there; None without `save_at`.
    """

    x: PyTree
    nfe: PyTree
    points: PyTree


def each(function, x, cond, keys, batch, out_axes):
    """`function(x, cond, key)` of each sample."""
    if batch is None:
        return function(x, cond, keys)
    mapped = jax.tree.map(lambda leaf: jnp.shape(leaf)[:1] == (batch,), cond)

    def one(x, cond, key):
        return function(x, jax.tree.map(lambda m, v: v[None] if m else v, mapped, cond), key)

    in_axes = (0, jax.tree.map(lambda m: 0 if m else None, mapped), 0)
    return jax.vmap(one, in_axes, out_axes)(x, cond, keys)


def number(value: Value, name: str, low: float, high: float) -> float:
    """`value` as a number in [low, high], known outside `jit`."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError(f"`{name}` must be known outside `jit`; got a traced value.")
    if not low <= float(value) <= high:
        raise ValueError(f"`{name}` must lie in [{low:g}, {high:g}]; got {float(value):g}.")
    return float(value)
