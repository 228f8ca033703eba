"""Convolutions that are in XLA's fast form, on every core of a CPU.

XLA (0.10) gives a convolution in two dimensions to a library (YNNPACK) that computes it on one core
unless its kernel is large. Its other one (Eigen) uses them all. The first takes nothing that is
larger than its input along an axis, and nothing in one dimension. So where there are several cores:

- A convolution that keeps the number of rows computes one more, which is cut off; for a kernel's
  gradient, where the kernel has as many rows as the input, the kernel gets one more, of zeros.
- One with a stride, or the gradient of its kernel, becomes one over the columns, with the rows of
  the kernel among the inputs.

A kernel of one element is a matrix product, on any number of cores, and so is its gradient.
Measured in docs/performance.md. Everything here is channels last: (batch, space, channels), kernels
(space, inputs, outputs).
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from diffsamp._core.types import Array, PyTree

__all__ = ["Rule", "convolve", "form_of"]

SMALL = 4_000_000  # multiplications for which a second core does not pay
SHORT = 64  # numbers in a sum of products, likewise: what is around them takes the time
PART = 65_536  # numbers of a kernel, and
PART_OUTPUTS = 64  # outputs, for which YNNPACK uses one core more
COPIES = 2  # at most, of the input, where rows become inputs
UNKNOWN = 8  # what a batch is taken for whose size is a symbol of an export

Rule = Callable[..., Array]


def form_of(lhs: Array, rhs: Array, out: Array, params: dict[str, PyTree]) -> Rule | None:
    """The function (lhs, rhs) that computes a convolution faster, or None for XLA's own way.

    Args:
      lhs: the input's shape and dtype (its batch may be a symbol), likewise
      rhs: the kernel's, and
      out: the output's.
      params: of `lax.conv_general_dilated_p`.
    """
    space, kernel, made = list(lhs.shape[1:-1]), list(rhs.shape[:-2]), list(out.shape[1:-1])
    if params["batch_group_count"] > 1 or any(v > 1 for v in params["lhs_dilation"]):
        return None
    if params["feature_group_count"] == 1 and _is_product(space, kernel, params):
        return functools.partial(_product, params)
    outputs, terms = rhs.shape[-1], math.prod(rhs.shape[:-1])
    batch = out.shape[0] if isinstance(out.shape[0], int) else UNKNOWN
    parts = max(min(outputs // PART_OUTPUTS, terms * outputs // PART), 1)
    edges = [edge for pad in params["padding"] for edge in pad]
    if (
        len(space) != 2
        or max(lhs.shape[-1], outputs) <= 16  # which YNNPACK does not take
        or any(n > size for n, size in zip((*kernel, *made), (*space, *space), strict=True))
        or parts >= _cores()
        or terms < SHORT
        or terms * outputs * batch * math.prod(made) < SMALL
        or min(edges) < 0
    ):
        return None
    if params["window_strides"][0] == 1:
        if made[0] == space[0]:
            return functools.partial(_row_made, params)
        # XLA would exchange input and kernel if the kernel were the larger one
        larger = (kernel[0] + 1) * kernel[1] > space[0] * (space[1] + sum(params["padding"][1]))
        if kernel[0] == space[0] and not larger:
            return functools.partial(_row_of_zeros, params)
    if params["feature_group_count"] == 1 and made[0] * kernel[0] <= COPIES * space[0]:
        return functools.partial(_rows_as_inputs, params)
    return None


def _cores() -> int:
    """How many the process may use."""
    own = getattr(os, "sched_getaffinity", None)
    return len(own(0)) if own else os.cpu_count() or 1


def _is_product(space: list[int], kernel: list[int], params: dict[str, PyTree]) -> bool:
    """Whether every output is one product: of a pixel, or of a whole input with the kernel."""
    ones = (1,) * len(kernel)
    unpadded = all(tuple(pad) == (0, 0) for pad in params["padding"])
    whole = kernel == space and tuple(params["rhs_dilation"]) == ones
    return (
        unpadded and tuple(params["window_strides"]) == ones and (math.prod(kernel) == 1 or whole)
    )


def _product(params: dict[str, PyTree], lhs: Array, rhs: Array) -> Array:
    pixel = math.prod(rhs.shape[:-2]) == 1
    kept = lhs.shape[:-1] if pixel else lhs.shape[:1]
    size = math.prod(rhs.shape[:-1])
    out = lax.dot_general(
        lhs.reshape(*kept, size),
        rhs.reshape(size, -1),
        (((len(kept),), (0,)), ((), ())),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    return out if pixel else out.reshape(*kept, *[1] * (lhs.ndim - 2), -1)


def _row_made(params: dict[str, PyTree], lhs: Array, rhs: Array) -> Array:
    (low, high), columns = params["padding"]
    out = convolve(lhs, rhs, params | {"padding": ((low, high + 1), columns)})
    return lax.slice_in_dim(out, 0, lhs.shape[1], axis=1)


def _row_of_zeros(params: dict[str, PyTree], lhs: Array, rhs: Array) -> Array:
    (low, high), columns = params["padding"]
    none, zero = (0, 0, 0), jnp.zeros((), lhs.dtype)
    lhs = lax.pad(lhs, zero, (none, none, (*columns, 0), none))
    lhs = lax.optimization_barrier(lhs)  # or the padding becomes the convolution's own again
    rhs = lax.pad(rhs, zero, ((0, 1, 0), none, none, none))
    below = high + params["rhs_dilation"][0]
    return convolve(lhs, rhs, params | {"padding": ((low, below), (0, 0))})


def _rows_as_inputs(params: dict[str, PyTree], lhs: Array, rhs: Array) -> Array:
    edges, columns = params["padding"]
    (stride, across), (step, apart) = params["window_strides"], params["rhs_dilation"]
    none = (0, 0, 0)
    lhs = lax.pad(lhs, jnp.zeros((), lhs.dtype), (none, (*edges, 0), none, none))
    high, wide, inputs, outputs = rhs.shape
    batch, size, width, _ = lhs.shape
    made = (size - step * (high - 1) - 1) // stride + 1
    rows = [
        lax.slice_in_dim(lhs, k * step, k * step + (made - 1) * stride + 1, stride, axis=1)
        for k in range(high)
    ]
    lhs = lax.concatenate(rows, 3).reshape(batch * made, width, high * inputs)
    rhs = lax.transpose(rhs, (1, 0, 2, 3)).reshape(wide, high * inputs, outputs)
    layout = lax.ConvDimensionNumbers((0, 2, 1), (2, 1, 0), (0, 2, 1))
    one = {"window_strides": (across,), "padding": (columns,), "dimension_numbers": layout}
    one |= {"lhs_dilation": (1,), "rhs_dilation": (apart,)}
    out = convolve(lhs, rhs, params | one)
    return out.reshape(batch, made, *out.shape[1:])


def convolve(lhs: Array, rhs: Array, params: dict[str, PyTree]) -> Array:
    """JAX's own operation, all of whose parameters are given."""
    # `bind`, not the function: the numbers are checked, and every one of them is passed on
    return lax.conv_general_dilated_p.bind(lhs, rhs, **params)
