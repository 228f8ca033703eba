"""Chains with an accept step, for networks that are energies: every sample on its own."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffsamp._core import random
from diffsamp._core.checks import expect_int
from diffsamp._core.types import Array, Bound, DType, Key, PyTree
from diffsamp.score import scale_rows

__all__ = ["hmc", "mala"]


def mala(
    log_prob: Callable[[PyTree], PyTree], x: PyTree, *, key: jax.Array, step: float, steps: int
) -> tuple[PyTree, jax.Array]:
    """Metropolis-adjusted Langevin: exact for every step size.

    Proposal x' = x + step score + sqrt(2 step) z; accepted, per sample, with the ratio of densities
    times that of the proposals, N(. ; x + step score, 2 step).

    Args:
      log_prob: (batch, ...) -> (batch,), up to a constant; differentiable.
      x: starts, (batch, ...).
      key: one, or one per sample.
      step: step size, in units of the variance.
      steps: how many, one gradient each.

    Returns:
      (x, accepted): the last states, and (batch,) the share of accepted proposals.

    Reference: Roberts & Tweedie 1996; Du et al. 2023, arXiv:2302.11552, appendix.
    """
    expect_int(steps, "steps", at_least=1)
    keys = random.sample_keys(key, jax.tree.leaves(x)[0].shape[0])

    def drift(v: jax.Array, g: jax.Array) -> jax.Array:
        return v + scale_rows(step, v) * g

    def body(n: Array, carry: PyTree) -> PyTree:
        x, value, slope, accepted = carry
        z = random.normal_like(keys, n, x)
        mean = jax.tree.map(drift, x, slope)
        new = jax.tree.map(lambda m, e: m + scale_rows(jnp.sqrt(2.0 * step), e) * e, mean, z)
        new_value, new_slope = _value_and_slope(log_prob, new)
        back = jax.tree.map(jnp.subtract, x, jax.tree.map(drift, new, new_slope))
        # log q(x | x') - log q(x' | x); the proposal's variance is 2 step
        ratio = new_value - value - _square(back) / (4 * step) + 0.5 * _square(z)
        go = jnp.log(_uniform(keys, n, ratio.dtype)) < ratio
        x, slope = _choose(go, (new, new_slope), (x, slope))
        return x, jnp.where(go, new_value, value), slope, accepted + go.astype(accepted.dtype)

    value, slope = _value_and_slope(log_prob, x)
    start = (x, value, slope, jnp.zeros_like(value))
    x, _, _, accepted = jax.lax.fori_loop(0, steps, body, start)
    return x, accepted / steps


def hmc(
    log_prob: Callable[[PyTree], PyTree],
    x: PyTree,
    *,
    key: jax.Array,
    step: float,
    leaps: int,
    steps: int,
    keep: float = 0.0,
) -> tuple[PyTree, jax.Array]:
    """Hamiltonian Monte Carlo with partly kept velocities; a rejection turns the velocity round.

    Args:
      log_prob: as for `mala`.
      x: starts, (batch, ...).
      key: one, or one per sample.
      step: of the leapfrog, in units of the standard deviation.
      leaps: leapfrog steps per proposal.
      steps: proposals; steps * leaps gradients.
      keep: share of the velocity that is kept, in [0, 1).

    Returns:
      (x, accepted), as `mala`.

    Reference: Horowitz 1991; Du et al. 2023, arXiv:2302.11552, appendix.
    """
    expect_int(steps, "steps", at_least=1)
    expect_int(leaps, "leaps", at_least=1)
    keys = random.sample_keys(key, jax.tree.leaves(x)[0].shape[0])

    def move(v: jax.Array, d: jax.Array, size: float) -> jax.Array:
        return v + scale_rows(size, v) * d

    def body(n: Array, carry: PyTree) -> PyTree:
        x, velocity, value, slope, accepted = carry
        z = random.normal_like(keys, n + 1, x)
        velocity = jax.tree.map(
            lambda v, e: scale_rows(keep, v) * v + scale_rows((1 - keep**2) ** 0.5, v) * e,
            velocity,
            z,
        )

        def leap(_: PyTree, inner: Bound) -> PyTree:
            x, v, _, slope = inner
            v = jax.tree.map(lambda a, g: move(a, g, step / 2), v, slope)
            x = jax.tree.map(lambda a, d: move(a, d, step), x, v)
            value, slope = _value_and_slope(log_prob, x)
            return x, jax.tree.map(lambda a, g: move(a, g, step / 2), v, slope), value, slope

        new, turned, new_value, new_slope = jax.lax.fori_loop(
            0, leaps, leap, (x, velocity, value, slope)
        )
        ratio = new_value - value - 0.5 * (_square(turned) - _square(velocity))
        go = jnp.log(_uniform(keys, n, ratio.dtype)) < ratio
        back = jax.tree.map(jnp.negative, velocity)
        x, velocity, slope = _choose(go, (new, turned, new_slope), (x, back, slope))
        return (
            x,
            velocity,
            jnp.where(go, new_value, value),
            slope,
            accepted + go.astype(accepted.dtype),
        )

    value, slope = _value_and_slope(log_prob, x)
    velocity = random.normal_like(keys, 0, x)
    start = (x, velocity, value, slope, jnp.zeros_like(value))
    x, _, _, _, accepted = jax.lax.fori_loop(0, steps, body, start)
    return x, accepted / steps


def _value_and_slope(log_prob: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
    def total(v: PyTree) -> PyTree:
        value = log_prob(v)
        return jnp.sum(value), value

    slope, value = jax.grad(total, has_aux=True)(x)
    return value, slope


def _square(tree: PyTree) -> PyTree:
    parts: list[jax.Array] = [
        jnp.sum((v * v).reshape(v.shape[0], -1), axis=1) for v in jax.tree.leaves(tree)
    ]
    return sum(parts[1:], parts[0])


def _uniform(keys: Key, n: Array, dtype: DType) -> PyTree:
    own = jax.vmap(lambda k: jax.random.fold_in(jax.random.fold_in(k, n), 0xACC))(keys)
    return jax.vmap(lambda k: jax.random.uniform(k, dtype=dtype, minval=1e-30))(own)


def _choose(go: PyTree, new: PyTree, old: PyTree) -> PyTree:
    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(go.reshape(go.shape + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, new, old)
