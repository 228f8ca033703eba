"""Transforms of the data prediction: thresholding."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core.numeric import as_float, namespace, silence, working_dtype
from diffsamp.guidance.transform import Transform
from diffsamp.predictions import Level
from diffsamp.score import ScoreFn, scale_rows

__all__ = ["Thresholded", "dynamic_thresholding", "static_thresholding"]


class _ThresholdedBound(NamedTuple):
    inner: Any
    on_state: Any
    on_data: Any


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Thresholded(Transform):
    """Thresholded data prediction; made by `static_thresholding` and `dynamic_thresholding`."""

    score_fn: Any
    low: Any
    high: Any
    quantile: float | None

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        return (self.score_fn, self.low, self.high), self.quantile

    @classmethod
    def tree_unflatten(cls, quantile: Any, children: tuple[Any, ...]) -> Thresholded:
        new = object.__new__(cls)
        for name, value in zip(("score_fn", "low", "high"), children, strict=True):
            object.__setattr__(new, name, value)
        object.__setattr__(new, "quantile", quantile)
        return new

    @silence
    def bind(self, level: Level, target: tuple[Any, Any]) -> _ThresholdedBound:
        """The network's data prediction, and how the row's own follows from it and the state."""
        xp = namespace(level.alpha, level.sigma)
        one, zero = xp.ones_like(level.alpha), xp.zeros_like(level.alpha)
        w0, w1 = (as_float(w, level.alpha) for w in target)
        # eps is re-derived from the clipped data: (x - alpha D) / sigma
        on_state = xp.where(w1 == 0, zero, w1 / level.sigma)
        on_data = w0 - on_state * level.alpha
        return _ThresholdedBound(self.score_fn.bind(level, (one, zero)), on_state, on_data)

    def predict(
        self, x: Any, bound: _ThresholdedBound, cond: Mapping[str, Any] | None = None
    ) -> Any:
        """The row's prediction from the clipped data prediction."""
        data = self.score_fn.predict(x, bound.inner, cond)

        def convert(leaf: jax.Array, state: jax.Array) -> jax.Array:
            clipped = self._clip(leaf.astype(working_dtype(leaf.dtype)))
            state = state.astype(clipped.dtype)
            value = scale_rows(bound.on_state, state) * state
            return (value + scale_rows(bound.on_data, clipped) * clipped).astype(leaf.dtype)

        return jax.tree.map(convert, data, x)

    def _clip(self, data: jax.Array) -> jax.Array:
        low, high = (jnp.asarray(v, data.dtype) for v in (self.low, self.high))
        if self.quantile is None:
            return jnp.clip(data, low, high)
        axes = tuple(range(1 if self.batched else 0, data.ndim))
        size = jnp.quantile(jnp.abs(data), self.quantile, axis=axes, keepdims=True)
        size = jnp.maximum(size, jnp.broadcast_to(high, size.shape))
        return jnp.clip(data, -size, size) * (high / size)


def static_thresholding(
    score_fn: ScoreFn | Transform, *, low: float = -1.0, high: float = 1.0
) -> Thresholded:
    """Clip the data prediction to [low, high] before it is used.

    For models of pixels. The noise is re-derived from the clipped data.

    Args:
      score_fn: a network or transform; put thresholding outside guidance.
      low: smallest value of the data.
      high: largest.

    Raises:
      ValueError: low is not below high.
    """
    if not low < high:
        raise ValueError(f"`low` must be below `high`; got {low} and {high}.")
    return Thresholded(score_fn, float(low), float(high), None)


def dynamic_thresholding(
    score_fn: ScoreFn | Transform, *, quantile: float = 0.995, bound: float = 1.0
) -> Thresholded:
    """Clip each sample's data prediction to its own quantile and scale it back to the bound.

    s = max(quantile of |D| over the sample, bound), D <- clip(D, -s, s) bound / s. Keeps strong
    guidance of pixel models from saturating. (The authors' and diffusers' code leave out the
    factor `bound`, which is 1 there; diffusers moreover clips s at 1 by default, which makes it
    static.)

    Args:
      score_fn: a network or transform; put thresholding outside guidance.
      quantile: in (0, 1].
      bound: largest absolute value of the data, positive.

    Raises:
      ValueError: a quantile outside (0, 1], a bound that is not positive.

    Reference: Saharia et al. 2022 (Imagen), arXiv:2205.11487, section 2.3.
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"`quantile` must lie in (0, 1]; got {quantile}.")
    if not (np.isfinite(bound) and bound > 0):
        raise ValueError(f"`bound` must be positive; got {bound}.")
    return Thresholded(score_fn, -float(bound), float(bound), float(quantile))
