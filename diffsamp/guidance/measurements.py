"""The posterior mean given a measurement: exact for Gaussians, by conjugate gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import predictions
from diffsamp._core.checks import expect_choice, expect_int
from diffsamp._core.numeric import as_float, is_concrete, namespace, silence, working_dtype
from diffsamp._core.types import Array, Bound, Conditions, Network, PyTree, Value
from diffsamp.guidance._numbers import Numbers, scale_numbers
from diffsamp.guidance._terms import without
from diffsamp.guidance.losses import posterior_std
from diffsamp.guidance.transform import Transform, per_row
from diffsamp.predictions import Level
from diffsamp.score import ScoreFn, scale_rows

__all__ = ["Measurement", "measurement"]

_COVARIANCES = ("jacobian", "isotropic", "scalar")


class _MeasurementBound(NamedTuple):
    inner: Bound
    spread: Array
    per_slope: PyTree
    gain: PyTree
    r: Array
    s: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Measurement(Transform):
    """A network that knows a measurement; made by `measurement`."""

    score_fn: Network
    operator: PyTree
    y: PyTree
    noise: PyTree
    spread: Numbers
    gain: PyTree
    covariance: str = dataclasses.field(metadata={"static": True})
    iterations: int = dataclasses.field(metadata={"static": True})
    name: str | None = dataclasses.field(metadata={"static": True})

    @property
    def gradients_per_call(self) -> float:
        """Vector-Jacobian products of the network per call."""
        own = {"jacobian": self.iterations + 1, "isotropic": 1, "scalar": 0}[self.covariance]
        return getattr(self.score_fn, "gradients_per_call", 0) + own * self.score_fn.nfe_factor

    @silence
    def bind(self, level: Level, target: tuple[Array, Array]) -> _MeasurementBound:
        """The data prediction, the numbers of its covariance, and the way back."""
        xp = namespace(level.alpha, level.sigma)
        zero, one = xp.zeros_like(level.alpha), xp.ones_like(level.alpha)
        w0, w1 = (as_float(w, level.alpha) for w in target)
        r, s = predictions.conversion((one, zero, one), (w0, w1, one), level.alpha, level.sigma)
        # cov(x_0 | x) = sigma^2 / alpha dD/dx; where alpha = 0 that is 0 / 0, and left out
        per_slope = xp.where(level.alpha == 0, zero, level.sigma**2)
        per_slope = per_slope / xp.where(level.alpha == 0, one, level.alpha)
        gain = None if self.gain is None else per_row(level, "a gain by row", self.gain)[0]
        at = jax.tree.map(lambda v: as_float(v, level.alpha), level)
        spread = self.spread.bind(at)
        inner = self.score_fn.bind(level, (one, zero))
        return _MeasurementBound(inner, (spread or (one,))[0], per_slope, gain, r, s)

    def check_bound(self, bound: _MeasurementBound, level: Level, evaluates: Array) -> None:
        """As `ScoreFn.check_bound`."""
        self.score_fn.check_bound(bound.inner, level, evaluates)
        if is_concrete(bound.r, evaluates):
            bad = ~np.isfinite(np.asarray(bound.r)) & np.asarray(evaluates, bool)
            if np.any(bad):
                raise ValueError("a measurement cannot enter at sigma = 0.")

    def predict(
        self, x: PyTree, bound: _MeasurementBound, cond: Conditions | None = None
    ) -> PyTree:
        """The row's prediction from the posterior mean given x and y."""
        return self.with_plain(x, bound, cond)[0]

    def with_plain(
        self, x: PyTree, bound: _MeasurementBound, cond: Conditions | None = None
    ) -> tuple[PyTree, PyTree]:
        """The same, and the network's own prediction, from one call."""
        own = without(cond, () if self.name is None else (self.name,))
        wide = jax.tree.map(lambda v: v.astype(working_dtype(v.dtype)), x)

        def ask(state: PyTree) -> PyTree:
            narrow = jax.tree.map(lambda v, like: v.astype(like.dtype), state, x)
            said = self.score_fn.predict(narrow, bound.inner, own)
            return jax.tree.map(lambda v, like: v.astype(like.dtype), said, state)

        def scaled(number: Value, tree: PyTree) -> PyTree:
            return jax.tree.map(lambda v: v * scale_rows(number, v), tree)

        square = bound.spread**2
        if self.covariance == "scalar":
            data = ask(wide)
            posterior = inside = lambda v: scaled(square, v)
        else:
            data, back = jax.vjp(ask, wide)

            def posterior(v: PyTree) -> PyTree:
                return scaled(bound.per_slope, back(v)[0])

            inside = posterior if self.covariance == "jacobian" else lambda v: scaled(square, v)
        measured, forward = jax.linearize(self.operator, data)
        adjoint = jax.linear_transpose(forward, data)
        y = self.y if self.name is None else (cond or {})[self.name]
        missing = jax.tree.map(lambda v, got: _like(v, got) - got, y, measured)

        def system(u: PyTree) -> PyTree:
            return jax.tree.map(
                lambda v, w: v + _like(self.noise, w) ** 2 * w, forward(inside(adjoint(u)[0])), u
            )

        weights = solve(system, missing, self.iterations, batched=self.score_fn.batched)
        change = posterior(adjoint(weights)[0])

        def convert(d: jax.Array, state: jax.Array, delta: jax.Array, like: jax.Array) -> jax.Array:
            if bound.gain is not None:
                delta = delta * scale_rows(bound.gain, d)
            value = scale_rows(bound.s, d) * (d + delta) + scale_rows(bound.r, d) * state
            return value.astype(like.dtype)

        return jax.tree.map(convert, data, wide, change, x), jax.tree.map(
            lambda d, v, delta, like: convert(d, v, jnp.zeros_like(delta), like),
            data,
            wide,
            change,
            x,
        )


def _like(value: Value, like: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(value).astype(like.dtype), like.shape)


def solve(
    system: Callable[[PyTree], PyTree], right: PyTree, iterations: int, *, batched: bool = True
) -> PyTree:
    """Conjugate gradients, for every sample on its own: u with system(u) = right, from 0.

    A sample whose residual is 0, or that meets a direction without positive curvature, stays where
    it is; so no sample's result depends on another's. Of all iterates the one with the smallest
    residual is taken, which matters where the system is not quite symmetric.

    Args:
      system: a symmetric, positive semidefinite linear map of pytrees like `right`.
      right: the right side.
      iterations: how many products with the system.
      batched: whether the leading axis is one of samples.
    """

    def dot(a: Array, b: Array) -> jax.Array:
        first = 1 if batched else 0
        parts = [
            jnp.sum(v * w, axis=tuple(range(first, v.ndim)))
            for v, w in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        ]
        return sum(parts[1:], parts[0])

    def add(a: Array, number: Value, b: Array) -> PyTree:
        return jax.tree.map(lambda v, w: v + scale_rows(number, w) * w, a, b)

    def body(_: PyTree, state: PyTree) -> PyTree:
        u, residual, direction, size, best, least = state
        image = system(direction)
        curvature = dot(direction, image)
        go = (size > floor) & (curvature > 0)
        step = jnp.where(go, size / jnp.where(go, curvature, 1), 0)
        u, residual = add(u, step, direction), add(residual, -step, image)
        new = dot(residual, residual)
        turn = jnp.where(go, new / jnp.where(go, size, 1), 0)
        better = go & (new < least)
        best = jax.tree.map(lambda v, w: _where(better, v, w), u, best)
        least = jnp.where(better, new, least)
        return u, residual, add(residual, turn, direction), jnp.where(go, new, 0), best, least

    size = dot(right, right)
    floor = size * jnp.finfo(size.dtype).eps ** 2
    zero = jax.tree.map(jnp.zeros_like, right)
    return jax.lax.fori_loop(0, iterations, body, (zero, right, right, size, zero, size))[4]


def _where(pick: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(pick.reshape(pick.shape + (1,) * (a.ndim - pick.ndim)), a, b)


def measurement(
    score_fn: ScoreFn | Transform,
    operator: Callable[[PyTree], PyTree],
    y: PyTree,
    noise: PyTree,
    *,
    covariance: str = "jacobian",
    spread: float | Callable[[Level], Array] = 1.0,
    iterations: int = 8,
    gain: PyTree = None,
) -> Measurement:
    """The network that knows y = A x_0 + noise z: its data prediction becomes E[x_0 | x, y].

    D_y = D + V A^T (A V A^T + noise^2)^{-1} (y - A D) with V = (sigma^2 / alpha) dD/dx, which is
    Cov(x_0 | x) of a perfect network; so this is exact for Gaussian data, with every process and
    solver. The system is solved by conjugate gradients, each product one vector-Jacobian product of
    the network. A row with alpha = 0 is left as it is.

    Args:
      score_fn: a network or transform.
      operator: A, a pytree that is called with the data (`diffsamp.inverse` has some) or a function
        (wrap arrays with `jax.tree_util.Partial`); linearised at D if it is not linear. Its
        adjoint is derived.
      y: what was measured, shaped like operator(x), or the name of an entry of `cond`.
      noise: its standard deviation, a number or one that broadcasts to y; 0 is allowed.
      covariance: "jacobian" is the formula; "isotropic" puts r^2 for V into the inverse (PiGDM),
        one vector-Jacobian product a call; "scalar" puts r^2 for V everywhere, no gradient at all
        (the proximal point that DiffPIR takes).
      spread: r, as for `loss`: a function of the `Level`, or the data's standard deviation.
      iterations: of conjugate gradients; as many as y has elements is exact. The Jacobian of a real
        network is not quite symmetric: the iterate with the smallest residual is taken.
      gain: (rows,), such as `keep_noise(tableau)`; None: 1.

    Raises:
      ValueError: an unknown covariance, an operator whose result does not fit y (at trace time).

    Reference: Song et al. 2023 (PiGDM), ICLR; Zhu et al. 2023 (DiffPIR), arXiv:2305.08995.
    """
    expect_choice(covariance, "covariance", _COVARIANCES)
    expect_int(iterations, "iterations", at_least=1)
    wide = spread if callable(spread) else jax.tree_util.Partial(posterior_std, std=spread)
    leaves = jax.tree.leaves(operator)
    if any(leaf is operator for leaf in leaves):  # a plain function
        operator = jax.tree_util.Partial(operator)
    name = y if isinstance(y, str) else None
    return Measurement(
        score_fn,
        operator,
        None if name else y,
        noise,
        scale_numbers(wide, "spread"),
        gain,
        covariance,
        iterations,
        name,
    )
