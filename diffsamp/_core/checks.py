"""The one place that words errors about host arrays and arguments."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from diffsamp._core.types import Conditions, PyTree, Times, Value

__all__ = ["expect_choice", "expect_cond", "expect_int", "expect_state", "expect_times"]


def expect_times(times: Times, name: str = "times", *, may_rise: bool = False) -> np.ndarray:
    """`times` as a float64 array of shape (n + 1,), n >= 1, strictly decreasing.

    Args:
      times: what the caller passed.
      name: what the caller calls it.
      may_rise: also accept strictly increasing times, as encoding takes them.
    """
    if isinstance(times, jax.core.Tracer):
        raise TypeError(
            f"`{name}` must be a host array: solvers build their coefficients in NumPy before "
            "`jit`. Build the tableau outside and pass it in."
        )
    try:
        array = np.asarray(times, np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"`{name}` must be an array of numbers; got {times!r}.") from None
    if array.ndim != 1 or array.shape[0] < 2:
        raise ValueError(
            f"`{name}` must have shape (n + 1,) with n >= 1 evaluations: at least a first and a "
            f"last time; got shape {array.shape}."
        )
    if not np.all(np.isfinite(array)):
        bad = int(np.argmin(np.isfinite(array)))
        raise ValueError(f"`{name}` must be finite; got {name}[{bad}] = {array[bad]}.")
    step = np.diff(array)
    if may_rise and step[0] > 0:
        step = -step
    if not np.all(step < 0):
        bad = int(np.argmax(step >= 0))
        raise ValueError(
            f"`{name}` must decrease from noise to data; got {name}[{bad}] = {array[bad]} and then "
            f"{name}[{bad + 1}] = {array[bad + 1]}. Pass them sorted from noise to data, without "
            "repeats" + (" (or from data to noise, to encode)." if may_rise else ".")
        )
    return array


def lowers(lower_order_final: bool | int, steps: int) -> bool:
    """Whether a solver of so many steps lowers its order over the last of them.

    A number means: only if there are fewer steps than that (the authors' codes: 10; diffusers: 15).
    """
    if isinstance(lower_order_final, bool | np.bool_):
        return bool(lower_order_final)
    return steps < expect_int(lower_order_final, "lower_order_final", 0)


def expect_int(value: Value, name: str, at_least: int, at_most: int | None = None) -> int:
    """`value` as an int within bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"`{name}` must be an integer; got {value!r}.")
    if value < at_least or (at_most is not None and value > at_most):
        bound = f"at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
        raise ValueError(f"`{name}` must be {bound}; got {value}.")
    return int(value)


def expect_choice(value: Value, name: str, choices: tuple[str, ...]) -> str:
    """`value` as one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}; got {value!r}.")
    return value


def expect_cond(cond: Conditions | None, size: int | None) -> Value:
    """`cond` after checking that it is a mapping whose every array has `size` entries."""
    if cond is not None and not isinstance(cond, Mapping):
        raise TypeError(
            '`cond` must be keyword arguments for the network, such as {"label": labels}; got '
            f"{type(cond).__name__}."
        )
    for path, leaf in jax.tree_util.tree_flatten_with_path(cond)[0]:
        if np.shape(leaf)[:1] != (size,):
            raise ValueError(
                f"cond{jax.tree_util.keystr(path)} must have one entry per sample, {size}; got "
                f"shape {np.shape(leaf)}."
            )
    return cond


def expect_state(x: PyTree, name: str, batched: bool) -> int | None:
    """Check that x is a pytree of floating arrays; returns its batch size (None if not batched)."""
    leaves = jax.tree.leaves(x)
    if not leaves:
        raise ValueError(f"`{name}` must hold at least one array; got {x!r}.")
    for leaf in leaves:
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jax.dtypes.issubdtype(dtype, np.floating):
            raise TypeError(
                f"`{name}` must be an array, or a pytree of arrays, of a floating dtype; got "
                f"{type(leaf).__name__}" + (f" of dtype {dtype}." if dtype is not None else ".")
            )
    if not batched:
        return None
    sizes = {np.shape(leaf)[:1] for leaf in leaves}
    if len(sizes) != 1 or sizes == {()}:
        shapes = ", ".join(str(np.shape(leaf)) for leaf in leaves)
        raise ValueError(
            f"`{name}` must have one leading batch axis, the same in every array; got shapes "
            f"{shapes}. For a network without a batch axis, build ScoreFn(..., batched=False)."
        )
    return sizes.pop()[0]
