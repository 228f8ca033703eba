"""Range-null-space projection for measurements with noise."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from diffsamp import guidance, solvers
from diffsamp._core.types import Array, PyTree, Times
from diffsamp.guidance import Fresh, Transform
from diffsamp.score import ScoreFn, scale_rows
from diffsamp.tableau import Tableau

__all__ = ["ddnm_plus"]


def ddnm_plus(
    score_fn: ScoreFn | Transform,
    operator: PyTree,
    y: PyTree,
    noise: float,
    times: Times,
    key: jax.Array,
    *,
    singular: float = 1.0,
) -> tuple[Transform, Tableau]:
    """DDNM+: the projection as far as the measurement's noise allows, and that much less new noise.

    D' = D - l A^+ (A D - y) with l = min(1, sigma' s / (alpha' noise)), and x' = alpha' D' + fresh
    noise, of variance sigma'^2 outside of what A sees and sigma'^2 - (l alpha' noise / s)^2 inside:
    the measurement's own noise makes up for the rest. For operators whose singular values other
    than 0 are all s.

    Args:
      score_fn: a network or transform.
      operator: with `pinv`, such as `mask` (s = 1) or `downsample(k)` of images (s = 1 / k).
      y: the measurement, or the name of an entry of `cond`.
      noise: its standard deviation, positive.
      times: (n + 1,) decreasing times.
      key: one, or one per sample.
      singular: s.

    Returns:
      (transform, tableau), to be sampled together, without a key.

    Raises:
      ValueError: a noise or a singular value that is not positive.

    Reference: Wang, Yu & Zhang 2023, arXiv:2212.00490, section 3.3, with eta = 1.
    """
    for name, value in (("noise", noise), ("singular", singular)):
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"`{name}` must be positive; got {value}.")
    rows = solvers.renoise(score_fn.process, times, share=1.0)
    alpha, sigma = (np.asarray(v)[1:] for v in (rows.alpha, rows.sigma))
    own = alpha * noise / singular  # the measurement's noise in the state
    share = np.minimum(1.0, sigma / own)
    inside = np.sqrt(np.maximum(sigma**2 - (share * own) ** 2, 0.0))
    ratio = inside / np.where(sigma > 0, sigma, 1.0)
    projected = guidance.ddnm(score_fn, operator, y, rows)
    partly = dataclasses.replace(projected, gain=projected.gain * share)
    return guidance.redraw(partly, rows, Partial(_split, operator, ratio), key)


def _split(operator: PyTree, ratio: Array, z: PyTree, told: Fresh) -> PyTree:
    seen = operator.pinv(operator(z))
    less = jnp.asarray(ratio)[told.row] - 1

    def one(e: jax.Array, inside: jax.Array) -> jax.Array:
        return e + scale_rows(less, e) * inside.astype(e.dtype)

    return jax.tree.map(one, z, seen)
