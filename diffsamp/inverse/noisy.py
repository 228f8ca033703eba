"""Measurements with noise, in the basis in which the operator is diagonal: DDNM+ and DDRM.

Both keep the data prediction where nothing is measured, move it towards the measurement as far as
the measurement's own noise allows, and draw the less new noise the more of that noise is taken in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from diffsamp import guidance, solvers
from diffsamp._core.types import Array, PyTree, Times
from diffsamp.guidance import Fresh, Transform
from diffsamp.score import ScoreFn, scale_rows
from diffsamp.tableau import Tableau

__all__ = ["ddnm_plus", "ddrm"]


def ddnm_plus(
    score_fn: ScoreFn | Transform,
    operator: PyTree,
    y: PyTree,
    noise: float,
    times: Times,
    key: jax.Array,
) -> tuple[Transform, Tableau]:
    """DDNM+: the projection as far as the measurement's noise allows, and that much less new noise.

    For a singular value s, with l = min(1, sigma' s / (alpha' noise)): D' = D - l A^+ (A D - y)
    and x' = alpha' D' + fresh noise of variance sigma'^2 - (l alpha' noise / s)^2, as the
    measurement's own noise makes up for the rest. Where s = 0, D and sigma'^2.

    Args:
      score_fn: a network or transform.
      operator: linear, with `pinv` and `filter`, such as those of this package.
      y: the measurement, or the name of an entry of `cond` that holds one per sample.
      noise: its standard deviation, positive.
      times: (n + 1,) decreasing times.
      key: one, or one per sample.

    Returns:
      (transform, tableau), to be sampled together, without a key.

    Raises:
      ValueError: a noise that is not positive.

    Reference: Wang, Yu & Zhang 2023, arXiv:2212.00490, section 3.3, with eta = 1.
    """
    return _redrawn(score_fn, operator, y, noise, times, key, _ddnm_plus)


def ddrm(
    score_fn: ScoreFn | Transform,
    operator: PyTree,
    y: PyTree,
    noise: float,
    times: Times,
    key: jax.Array,
    *,
    eta: float = 0.85,
    eta_b: float = 1.0,
) -> tuple[Transform, Tableau]:
    """DDRM: a variational chain of its own for every singular value of the operator.

    With ybar = A^+ y, E the noise prediction and rho' = sigma' / alpha', the next x / alpha is

    - where s = 0: D + sqrt(1 - eta^2) rho' E + eta rho' z,
    - where rho' < noise / s: D + sqrt(1 - eta^2) rho' (ybar - D) s / noise + eta rho' z,
    - else: D + eta_b (ybar - D) + sqrt(rho'^2 - eta_b^2 noise^2 / s^2) z.

    The start is the process's own; the paper's is drawn around ybar, which is the same to
    1 / rho_max.

    Args:
      score_fn: a network or transform.
      operator: linear, with `pinv` and `filter`, such as those of this package.
      y: the measurement, or the name of an entry of `cond` that holds one per sample.
      noise: its standard deviation, positive.
      times: (n + 1,) decreasing times.
      key: one, or one per sample.
      eta: share of new noise, in [0, 1].
      eta_b: weight of the measurement, in [0, 1].

    Returns:
      (transform, tableau), to be sampled together, without a key.

    Raises:
      ValueError: a noise that is not positive, a share outside [0, 1].

    Reference: Kawar et al. 2022, arXiv:2201.11793, equations 7 and 8.
    """
    for name, value in (("eta", eta), ("eta_b", eta_b)):
        if not 0 <= value <= 1:
            raise ValueError(f"`{name}` must lie in [0, 1]; got {value}.")
    shares = (float(eta), float(eta_b))
    return _redrawn(score_fn, operator, y, noise, times, key, _ddrm, *shares)


class _Measured(NamedTuple):
    """What is known: y = A x_0 + noise, and sigma / alpha after every row."""

    operator: PyTree
    y: PyTree
    noise: Array
    rho: Array

    def missing(self, data: PyTree) -> PyTree:
        """A^+ (y - A D)."""
        measured = self.operator(data)
        less = jax.tree.map(lambda v, got: jnp.asarray(v, got.dtype) - got, self.y, measured)
        return self.operator.pinv(less)

    def own(self, s: jax.Array) -> jax.Array:
        """The measurement's noise in a direction of singular value s, where s > 0."""
        return jnp.asarray(self.noise, s.dtype) / jnp.where(s > 0, s, 1)

    def level(self, told: Fresh) -> tuple[jax.Array, jax.Array]:
        """sigma / alpha after this row, and a number to divide by in its place."""
        now = jnp.asarray(self.rho, jax.tree.leaves(told.data)[0].dtype)[told.row]
        return now, jnp.where(now > 0, now, 1)


def _redrawn(
    score_fn: ScoreFn | Transform,
    operator: PyTree,
    y: PyTree,
    noise: float,
    times: Times,
    key: jax.Array,
    f: Callable[..., PyTree],
    *shares: float,
) -> tuple[Transform, Tableau]:
    """Rows x' = alpha' D + sigma' f; what f adds to noise is divided by sigma'."""
    if not (np.isfinite(noise) and noise > 0):
        raise ValueError(
            f"`noise` must be positive; got {noise}. Without noise take `ddnm` or `guidance.ddnm`."
        )
    if not callable(getattr(operator, "filter", None)):
        raise TypeError(
            "this method weighs singular values: it needs an operator with `filter(h, x)`, as "
            f"those of `diffsamp.inverse` have; got {type(operator).__name__}."
        )
    rows = solvers.renoise(score_fn.process, times, share=1.0)
    rho = np.asarray(rows.sigma)[1:] / np.asarray(rows.alpha)[1:]
    name = y if isinstance(y, str) else None
    known = _Measured(operator, None if name else y, float(noise), rho)
    f = _named(f, name) if name else f
    names = (name,) if name else ()
    return guidance.redraw(score_fn, rows, Partial(f, known, *shares), key, names=names)


@functools.cache
def _named(f: Callable[..., PyTree], name: str) -> Callable[..., PyTree]:
    """f with an entry of the conditions as its measurement."""

    def g(known: _Measured, *rest: PyTree) -> PyTree:
        return f(known._replace(y=rest[-1].cond[name]), *rest)

    return g


def _ddnm_plus(known: _Measured, z: PyTree, told: Fresh) -> PyTree:
    now, by = known.level(told)

    def share(s: jax.Array) -> jax.Array:
        return jnp.where(s > 0, jnp.minimum(1, now / known.own(s)), 0)

    def left(s: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.maximum(1 - (share(s) * known.own(s) / by) ** 2, 0))

    towards = known.operator.filter(lambda s: share(s) / by, known.missing(told.data))
    return jax.tree.map(jnp.add, towards, known.operator.filter(left, z))


def _ddrm(known: _Measured, eta: Array, eta_b: Array, z: PyTree, told: Fresh) -> PyTree:
    now, by = known.level(told)
    eta, eta_b = (jnp.asarray(v, now.dtype) for v in (eta, eta_b))
    kept = jnp.sqrt(1 - eta**2)

    def towards(s: jax.Array) -> jax.Array:
        own = known.own(s)
        return jnp.where(s > 0, jnp.where(now < own, kept / own, eta_b / by), 0)

    def fresh(s: jax.Array) -> jax.Array:
        left = jnp.sqrt(jnp.maximum(1 - (eta_b * known.own(s) / by) ** 2, 0))
        return jnp.where((s > 0) & (now >= known.own(s)), left, eta)

    def noise_of(x: jax.Array, d: jax.Array) -> jax.Array:
        at = told.level
        return (x - scale_rows(at.alpha, d) * d) / scale_rows(at.sigma, d)

    noise = jax.tree.map(noise_of, told.x, told.data)
    terms = (
        known.operator.filter(lambda s: jnp.where(s > 0, 0, kept), noise),
        known.operator.filter(towards, known.missing(told.data)),
        known.operator.filter(fresh, z),
    )
    return jax.tree.map(lambda *v: sum(v[1:], v[0]), *terms)
