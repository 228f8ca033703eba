"""Convolutions at full speed inside loops, on CPU.

XLA's fast convolution on a CPU takes one form only: channels last, the kernel's axes in the order
space, input, output. XLA brings every other convolution into that form, but only at the top level
of a program. In the body of a loop or a branch it writes plain loops instead, which are up to 60
times slower (https://github.com/jax-ml/jax/issues/12868; a small case is in docs/performance.md).
A sampler is a loop; whatever comes from PyTorch has channels first; and the gradient of any
convolution has its axes swapped.

So the rule by which JAX writes a convolution for the CPU is replaced here by one that brings it
into the fast form itself, with explicit transposes. JAX's own rule still does what is in form
already, and whatever has no fast form. It acts when a program is compiled, below differentiation
and vectorisation, and on nothing but the CPU; only speed changes.

What is in form goes on to `every_core`, which sees to it that more than one core is at work. Three
more forms, each chosen by measurement:

- Few inputs per group (depthwise convolutions): XLA's grouped convolution takes 5 to 50 times as
  long as the sum of products written out, tap by tap.
- Groups over the batch (the kernel's gradient of a grouped convolution) are made groups over the
  channels; XLA computes all pairs of groups, and keeps the diagonal. With one input a group (a
  depthwise convolution's) they are sums over all pixels, one for every element of the kernel.
- Zeros are written out before a dilated convolution in three dimensions (a transposed one), and
  where the kernel is larger than its input: XLA would exchange the two, and leave the fast form.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import warnings
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import mlir

from diffsamp._core import every_core
from diffsamp._core.every_core import Rule
from diffsamp._core.types import Array, PyTree

__all__ = ["fast_convolutions"]

SWITCH = "DIFFSAMP_FAST_CONVOLUTIONS"
# what JAX 0.10 passes to a lowering rule; with others the meaning may have moved
PARAMETERS = {
    "window_strides",
    "padding",
    "lhs_dilation",
    "rhs_dilation",
    "dimension_numbers",
    "feature_group_count",
    "batch_group_count",
    "precision",
    "preferred_element_type",
    "out_sharding",
}
TERMS = 49  # at most, in a sum of products written out: 7 x 7, one input
FEW = 4  # inputs per group with which XLA's plain loops are faster than its grouped convolution


def fast_convolutions(enabled: bool) -> bool:
    """Switch the rule for convolutions on CPU on or off, for what is compiled from now on.

    It is on wherever `ScoreFn` is imported, by whatever module, unless the environment has
    `DIFFSAMP_FAST_CONVOLUTIONS=0`.
    Programs that are compiled already stay as they are (`jax.clear_caches()` drops them). The
    rule changes the speed of convolutions in loops and branches on CPU, and nothing else:
    docs/performance.md.

    Returns:
      Whether it is on now: False also where this version of JAX has moved what it rests on; its
      own rule is then in place.
    """
    try:
        rules = mlir._platform_specific_lowerings["cpu"]
        present: Array = rules[lax.conv_general_dilated_p].rule
        on = isinstance(present, functools.partial) and present.func is _lower
        if enabled and not on:
            rule = functools.partial(_lower, present)
            mlir.register_lowering(lax.conv_general_dilated_p, rule, platform="cpu")
        elif on and not enabled:
            own = present.args[0]
            mlir.register_lowering(lax.conv_general_dilated_p, own, platform="cpu")
    except (AttributeError, KeyError, TypeError, NotImplementedError):
        return False
    return enabled


def _lower(own: Rule, ctx: Array, lhs: Array, rhs: Array, **params: PyTree) -> Array:
    """The rule: `own` is JAX's."""
    try:
        (left, right), (out,) = ctx.avals_in, ctx.avals_out
        form = _form(left, right, out, params)
        if form is not None:
            return mlir.lower_fun(form, multiple_results=False)(ctx, lhs, rhs)
    except Exception as error:  # whatever moved inside JAX: its own rule is right, and slow
        warnings.warn(
            f"diffsamp could not bring a convolution into its fast form ({error!r}). JAX's own "
            f"rule is used, which is slow in loops on CPU; {SWITCH}=0 switches this off.",
            stacklevel=2,
        )
    return own(ctx, lhs, rhs, **params)


def _form(lhs: Array, rhs: Array, out: Array, params: dict[str, PyTree]) -> Rule | None:
    """The function that computes a convolution fast, or None for JAX's own rule."""
    sizes = (*lhs.shape, *rhs.shape, *out.shape)
    dims = lhs.ndim - 2
    if (
        set(params) != PARAMETERS
        or params["out_sharding"] is not None  # the layout of shards is JAX's own matter
        or not jnp.issubdtype(lhs.dtype, jnp.floating)
        or not 1 <= dims <= 3
        or any(isinstance(size, int) and size == 0 for size in sizes)
    ):
        return None
    spec, groups = params["dimension_numbers"], params["feature_group_count"]
    known = all(isinstance(size, int) for size in sizes)  # else they are symbols of an export
    kernel = [rhs.shape[axis] for axis in spec.rhs_spec[2:]]
    batch, outputs = lhs.shape[spec.lhs_spec[0]], rhs.shape[spec.rhs_spec[0]]
    inputs = rhs.shape[spec.rhs_spec[1]]
    if groups > 1 and inputs <= FEW and known and math.prod(kernel) <= TERMS:
        if inputs * math.prod(kernel) <= TERMS:
            return functools.partial(_sum_of_products, out, params)
        return _unless(spec, _first(dims), params)
    batch_groups = params["batch_group_count"]
    if batch_groups > 1:
        made = [out.shape[axis] for axis in spec.out_spec[2:]]
        if batch_groups == batch and outputs <= FEW * batch and known and math.prod(made) <= TERMS:
            return functools.partial(_sums_over_pixels, out, params)
        return functools.partial(_channel_groups, params)
    if known and groups == 1:
        space = [lhs.shape[axis] for axis in spec.lhs_spec[2:]]
        dilated = any(dilation > 1 for dilation in params["lhs_dilation"])
        if math.prod(kernel) > math.prod(space) or (dims == 3 and dilated):
            return functools.partial(_filled, params)
    if spec == _last(dims):  # whether it was so, or has come back from another form
        plain = out.dtype in (np.float32, np.float64) and out.dtype == lhs.dtype
        sized = all(isinstance(v, int) for v in (*lhs.shape[1:], *rhs.shape, *out.shape[1:]))
        return every_core.form_of(lhs, rhs, out, params) if plain and sized else None
    return functools.partial(_in_layout, _last(dims), params)


def _last(dims: int) -> lax.ConvDimensionNumbers:
    """The fast form: batch, space, channels; the kernel's space, input, output."""
    ends = (0, dims + 1, *range(1, dims + 1))
    return lax.ConvDimensionNumbers(ends, (dims + 1, dims, *range(dims)), ends)


def _first(dims: int) -> lax.ConvDimensionNumbers:
    """Batch, channels, space; the kernel's output, input, space."""
    return lax.ConvDimensionNumbers(*[tuple(range(dims + 2))] * 3)


def _unless(spec: Array, layout: Array, params: dict[str, PyTree]) -> Rule | None:
    """The convolution in another layout, or None if it is in that one."""
    return None if spec == layout else functools.partial(_in_layout, layout, params)


def _in_layout(layout: Array, params: dict[str, PyTree], lhs: Array, rhs: Array) -> Array:
    spec = params["dimension_numbers"]
    lhs = lax.transpose(lhs, _order(spec.lhs_spec, layout.lhs_spec))
    rhs = lax.transpose(rhs, _order(spec.rhs_spec, layout.rhs_spec))
    out = every_core.convolve(lhs, rhs, params | {"dimension_numbers": layout})
    return lax.transpose(out, _order(layout.out_spec, spec.out_spec))


def _order(source: Sequence[int], target: Sequence[int]) -> tuple[int, ...]:
    """The transposition that puts the axes named by `source` to where `target` has them."""
    return tuple(source[i] for i in np.argsort(target))


def _channel_groups(params: dict[str, PyTree], lhs: Array, rhs: Array) -> Array:
    """Groups of the batch side by side in the channels: (g, n), c to n, (g, c)."""
    spec, groups = params["dimension_numbers"], params["batch_group_count"]
    layout = _last(lhs.ndim - 2)
    lhs = lax.transpose(lhs, _order(spec.lhs_spec, layout.lhs_spec))
    batch, *space, channels = lhs.shape
    lhs = jnp.moveaxis(lhs.reshape(groups, batch // groups, *space, channels), 0, -2)
    lhs = lhs.reshape(batch // groups, *space, groups * channels)
    spec = spec._replace(lhs_spec=layout.lhs_spec)
    changed = {"dimension_numbers": spec, "batch_group_count": 1, "feature_group_count": groups}
    return _in_layout(layout, params | changed, lhs, rhs)


def _sums_over_pixels(result: Array, params: dict[str, PyTree], lhs: Array, rhs: Array) -> Array:
    """One batch entry in every group: the kernel's gradient of a depthwise convolution."""
    spec = params["dimension_numbers"]
    wide = np.float64 if result.dtype == np.float64 else np.float32  # as XLA adds up itself
    # inputs, space, groups: so they were before the gradient named them anew
    lhs = lax.transpose(lhs, (*spec.lhs_spec[1:], spec.lhs_spec[0])).astype(wide)
    rhs = lax.transpose(rhs, (*spec.rhs_spec[1:], spec.rhs_spec[0])).astype(wide)
    edges = zip(params["padding"], params["lhs_dilation"], strict=True)
    widths = [(0, 0, 0), *((*pad, dilation - 1) for pad, dilation in edges), (0, 0, 0)]
    lhs = lax.pad(lhs, jnp.zeros((), wide), widths)[..., None]
    inputs, *kernel, outputs = rhs.shape
    groups = lhs.shape[-2]
    rhs = rhs.reshape(inputs, *kernel, groups, outputs // groups)
    made = [result.shape[axis] for axis in spec.out_spec[2:]]
    steps = list(zip(kernel, params["window_strides"], params["rhs_dilation"], strict=True))
    summed = tuple(range(len(made) + 1))

    def one(place: Sequence[int]) -> Array:
        window = tuple(
            slice(k * stride, k * stride + (size - 1) * dilation + 1, dilation)
            for k, (size, stride, dilation) in zip(place, steps, strict=True)
        )
        return jnp.sum(lhs[(slice(None), *window)] * rhs, summed).reshape(outputs)

    out = jnp.stack([one(place) for place in itertools.product(*map(range, made))])
    out = out.reshape(1, *made, outputs).astype(result.dtype)
    return lax.transpose(out, _order(_last(len(made)).out_spec, spec.out_spec))


def _filled(params: dict[str, PyTree], lhs: Array, rhs: Array) -> Array:
    """The zeros of a dilated input and of the padding written out."""
    spec, none = params["dimension_numbers"], (0, 0, 0)
    widths = [none] * lhs.ndim
    for axis, pad, dilation in zip(
        spec.lhs_spec[2:], params["padding"], params["lhs_dilation"], strict=True
    ):
        widths[axis] = (*pad, dilation - 1)
    lhs = lax.optimization_barrier(lax.pad(lhs, jnp.zeros((), lhs.dtype), widths))
    dims = lhs.ndim - 2
    changed = {"padding": ((0, 0),) * dims, "lhs_dilation": (1,) * dims}
    return _in_layout(_last(dims), params | changed, lhs, rhs)


def _sum_of_products(result: Array, params: dict[str, PyTree], lhs: Array, rhs: Array) -> Array:
    """Channels first: the space is long, and the innermost loop runs over it."""
    spec, groups = params["dimension_numbers"], params["feature_group_count"]
    layout = _first(lhs.ndim - 2)
    wide = np.float64 if result.dtype == np.float64 else np.float32  # as XLA adds up itself
    lhs = lax.transpose(lhs, _order(spec.lhs_spec, layout.lhs_spec)).astype(wide)
    rhs = lax.transpose(rhs, _order(spec.rhs_spec, layout.rhs_spec)).astype(wide)
    edges = zip(params["padding"], params["lhs_dilation"], strict=True)
    widths = [(0, 0, 0), (0, 0, 0), *((*pad, dilation - 1) for pad, dilation in edges)]
    lhs = lax.pad(lhs, jnp.zeros((), wide), widths)
    outputs, inputs, *kernel = rhs.shape
    lhs = lhs.reshape(lhs.shape[0], groups, inputs, *lhs.shape[2:])
    rhs = rhs.reshape(groups, outputs // groups, inputs, *kernel)
    space = [result.shape[axis] for axis in spec.out_spec[2:]]
    steps = list(zip(space, params["window_strides"], params["rhs_dilation"], strict=True))

    def products(lhs: Array, rhs: Array) -> Array:
        terms = []
        for i, *tap in itertools.product(range(inputs), *map(range, kernel)):
            window = tuple(
                slice(k * dilation, k * dilation + (size - 1) * stride + 1, stride)
                for k, (size, stride, dilation) in zip(tap, steps, strict=True)
            )
            weight = rhs[(slice(None), slice(None), i, *tap)]
            weight = weight.reshape(1, *weight.shape, *[1] * len(space))
            terms.append(lhs[(slice(None), slice(None), i, None, *window)] * weight)
        return functools.reduce(lax.add, terms)

    # In two rounds or a few: what a loop gives is computed once, while XLA computes a sum again
    # for every value that is made from it, and its inputs again for every term.
    pieces = next(n for n in range(2, groups + 1) if groups % n == 0)
    some = groups // pieces

    def piece(k: Array, out: Array) -> Array:
        part = lax.dynamic_slice_in_dim(lhs, k * some, some, 1)
        made = products(part, lax.dynamic_slice_in_dim(rhs, k * some, some, 0))
        return lax.dynamic_update_slice_in_dim(out, made, k * some, 1)

    total = jnp.zeros((lhs.shape[0], groups, outputs // groups, *space), wide)
    total = lax.fori_loop(0, pieces, piece, total)
    out = total.reshape(-1, outputs, *space).astype(result.dtype)
    return lax.transpose(out, _order(layout.out_spec, spec.out_spec))


if os.environ.get(SWITCH, "1").strip().lower() not in ("0", "false", "off", "no"):
    fast_convolutions(True)
