"""Consistency models: from data alone, from a teacher, and in continuous time."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core.checks import expect_int, expect_times
from diffsamp._core.numeric import as_float
from diffsamp._core.types import Array, Conditions, Key, PyTree, Times
from diffsamp.processes import Process, Trig
from diffsamp.score import ScoreFn, scale_rows
from diffsamp.students.target import Target, ddim_step, drawn, noised, uniform, window

__all__ = ["consistency_distillation", "ect", "ict", "lognormal_times", "scm"]


def lognormal_times(
    process: Process, keys: Key, number: int, mean: float = -1.1, std: float = 2.0
) -> jax.Array:
    """(batch,) times whose sigma / alpha is log-normal, within the process's range.

    Args:
      process: the noise process.
      keys: one per sample.
      number: which draw.
      mean: of log(sigma / alpha).
      std: of it.
    """
    folded = jax.vmap(lambda k: jax.random.fold_in(k, number))(keys)
    z = jax.vmap(lambda k: jax.random.normal(k, dtype=jnp.float32))(folded)
    t = as_float(process.time(-(mean + std * z)))
    return jnp.clip(t, jnp.float32(float(process.t_min)), jnp.float32(float(process.t_max)))


def _rho(process: Process, t: Array) -> Array:
    return as_float(process.sigma(t)) / as_float(process.alpha(t))


def _answer(network: ScoreFn, x: PyTree, t: Array, cond: Conditions | None, x_0: PyTree) -> PyTree:
    """What the student says at t; the data itself where there is no noise."""
    clean = as_float(network.process.t_clean, t)
    low = jnp.maximum(t, as_float(network.process.t_min, t))
    said = network(x, low, prediction="data", cond=cond)
    return jax.tree.map(
        lambda s, v: jnp.where((t <= clean).reshape((-1,) + (1,) * (v.ndim - 1)), v, s), said, x_0
    )


def ict(
    network: ScoreFn,
    key: Key,
    x_0: PyTree,
    cond: Conditions | None = None,
    *,
    times: Times,
    mean: float = -1.1,
    std: float = 2.0,
) -> Target:
    """Improved consistency training: neighbouring levels of a grid, the same noise at both.

    Args:
      network: the student itself, no running mean; its data prediction is the consistency function.
      key: random key, or one per sample.
      x_0: (batch, ...) data.
      cond: conditions, (batch, ...).
      times: (N + 1,) falling, the grid of this stage of training; its last may be the clean end,
        where the target is the data. The authors double N from 10 to 1280.
      mean: of log(sigma / alpha), from whose normal law the upper level is drawn.
      std: of it.

    Returns:
      A `Target` in data, of weight 1 / (rho' - rho), rho = sigma / alpha; use `pseudo_huber`.

    Reference: Song & Dhariwal 2023, arXiv:2310.14189, algorithm 1 and table 1.
    """
    keys, noise = drawn(network, key, x_0)
    process = network.process
    grid = expect_times(times)
    rho = np.asarray(process.sigma(grid), np.float64) / np.maximum(process.alpha(grid), 1e-30)
    with np.errstate(divide="ignore"):
        edges = (np.log(rho) - mean) / (np.sqrt(2) * std)
    # the probability of each interval under the normal law
    law = np.array([math.erf(edges[i]) - math.erf(edges[i + 1]) for i in range(len(grid) - 1)])
    law = np.maximum(law, 0)
    index = jnp.searchsorted(jnp.asarray(np.cumsum(law / law.sum()), jnp.float32), uniform(keys, 1))
    index = jnp.clip(index, 0, len(grid) - 2)
    levels = jnp.asarray(grid, jnp.float32)
    t, r = levels[index], levels[index + 1]
    x = noised(process, t, x_0, noise)
    target = _answer(network, noised(process, r, x_0, noise), r, cond, x_0)
    weight = 1 / (_rho(process, t) - _rho(process, r))
    return jax.lax.stop_gradient(Target(x, t, dict(cond or {}), target, weight, "data"))


def ect(
    network: ScoreFn,
    key: Key,
    x_0: PyTree,
    cond: Conditions | None = None,
    *,
    stage: int = 0,
    factor: float = 2.0,
    mean: float = -1.1,
    std: float = 2.0,
) -> Target:
    """Easy consistency tuning: from a diffusion model, the second level ever closer.

    r = max(0, t (1 - (1 + 8 sigmoid(-t)) / q^(stage + 1))), t = sigma / alpha; where r is 0, which
    at the first stage is all t below 2, the target is the data: diffusion training.

    Args:
      network: the student itself.
      key: random key, or one per sample.
      x_0: (batch, ...) data.
      cond: conditions, (batch, ...).
      stage: of the schedule, from 0.
      factor: q.
      mean: of log(sigma / alpha) in the law of t.
      std: of it.

    Returns:
      A `Target` in data, of weight 1 / (t - r).

    Reference: Geng et al. 2024, arXiv:2406.14548, section 3.
    """
    keys, noise = drawn(network, key, x_0)
    process, stage = network.process, expect_int(stage, "stage", at_least=0)
    t = lognormal_times(process, keys, 1, mean, std)
    rho = _rho(process, t)
    closer = (1 + 8 * jax.nn.sigmoid(-rho)) / factor ** (stage + 1)
    low = jnp.maximum(0.0, rho * (1 - closer))
    r = as_float(process.time(-jnp.log(jnp.maximum(low, 1e-12))), t)
    r = jnp.where(low > 0, r, as_float(process.t_clean, t))
    x = noised(process, t, x_0, noise)
    target = _answer(network, noised(process, r, x_0, noise), r, cond, x_0)
    weight = 1 / (rho - low)
    return jax.lax.stop_gradient(Target(x, t, dict(cond or {}), target, weight, "data"))


def consistency_distillation(
    network: ScoreFn,
    key: Key,
    x_0: PyTree,
    cond: Conditions | None = None,
    *,
    teacher: ScoreFn,
    times: Times,
    heun: bool = True,
    eta: float = 0.0,
) -> Target:
    """Consistency distillation: the lower state by one step of a teacher.

    Args:
      network: the student, or a running mean of it.
      key: random key, or one per sample.
      x_0: (batch, ...) data.
      cond: conditions, (batch, ...), of both.
      teacher: a diffusion model of the same process, guided if wanted.
      times: (N + 1,) falling; t and the next one are drawn uniformly.
      heun: Heun's step in place of DDIM's.
      eta: fresh noise in the step, 1 for DDPM's (stochastic consistency distillation).

    Returns:
      A `Target` in data, of weight 1.

    Raises:
      ValueError: noise in Heun's step.

    Reference: Song et al. 2023, arXiv:2303.01469, algorithm 2; Liu et al. 2024 (SCott),
    arXiv:2403.01505, for the noise.
    """
    if eta and heun:
        raise ValueError("fresh noise needs heun=False.")
    keys, noise = drawn(network, key, x_0)
    process = network.process
    _, t, r = window(times, keys)
    x = noised(process, t, x_0, noise)
    data = teacher(x, t, prediction="data", cond=cond)
    if heun:
        low = jnp.maximum(r, as_float(process.t_min, t))
        there = teacher(ddim_step(process, data, x, t, r), low, prediction="data", cond=cond)
        # the trapezium in data prediction; at the clean end Euler's step, as EDM's sampler
        inner = (r > as_float(process.t_clean, t)).astype(jnp.float32) / 2
        data = jax.tree.map(lambda a, b: a + scale_rows(inner, a) * (b - a), data, there)
    lower = ddim_step(process, data, x, t, r)
    if eta:
        lower = _with_noise(process, data, x, lower, (t, r), eta, keys)
    target = _answer(network, lower, r, cond, data)
    return jax.lax.stop_gradient(Target(x, t, dict(cond or {}), target, jnp.ones(t.shape), "data"))


def _with_noise(
    process: Process,
    data: PyTree,
    x: PyTree,
    lower: PyTree,
    ends: tuple[Array, Array],
    eta: float,
    keys: Key,
) -> PyTree:
    """DDIM's step with eta times DDPM's noise: part of the old noise is exchanged for fresh."""
    t, r = ends
    alpha_t, sigma_t, alpha_r, sigma_r = (
        as_float(f(v)) for v in (t, r) for f in (process.alpha, process.sigma)
    )
    ratio = alpha_t * sigma_r / (jnp.maximum(alpha_r, 1e-30) * sigma_t)
    c = eta * sigma_r * jnp.sqrt(jnp.maximum(1 - ratio**2, 0))
    kept = jnp.sqrt(jnp.maximum(sigma_r**2 - c**2, 0))
    folded = jax.vmap(lambda k: jax.random.fold_in(k, 9))(keys)

    def one(low: jax.Array, v: jax.Array, d: jax.Array, key_leaf: int) -> jax.Array:
        z = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, key_leaf), v.shape[1:]))(
            folded
        )
        eps = (v - scale_rows(alpha_t, v) * d) / scale_rows(sigma_t, v)
        return low + scale_rows(kept - sigma_r, v) * eps + scale_rows(c, v) * z.astype(v.dtype)

    leaves, tree = jax.tree.flatten(lower)
    others = jax.tree.leaves(x), jax.tree.leaves(data)
    made = [one(a, b, d, i) for i, (a, b, d) in enumerate(zip(leaves, *others, strict=True))]
    return jax.tree.unflatten(tree, made)


def scm(
    network: ScoreFn,
    key: Key,
    x_0: PyTree,
    cond: Conditions | None = None,
    *,
    teacher: ScoreFn | None = None,
    warmup: float = 1.0,
    normalise: float | None = 0.1,
    mean: float = -1.0,
    std: float = 1.4,
) -> Target:
    """Continuous-time consistency: the tangent of f(x, t) = cos t x - sin t F along the ODE is 0.

    With F the student's velocity on TrigFlow, x = cos t x_0 + sin t z,

        g = -cos^2 t (F - dx/dt) - w cos t sin t (x + dF/dt),    target = F + g / (|g| + c).

    Args:
      network: the student, on `processes.trig(sigma_data, end=pi / 2)`, whose time is the angle.
      key: random key, or one per sample.
      x_0: (batch, ...) data, of standard deviation sigma_data.
      cond: conditions, (batch, ...).
      teacher: gives dx/dt; None: the data's own, -sin t x_0 + cos t z (consistency training).
      warmup: w, which rises from 0 to 1 over the first 10 thousand steps.
      normalise: c; None for g itself.
      mean: of log tan t.
      std: of it.

    Returns:
      A `Target` in velocity, of weight 1; the authors add an adaptive weight, which the student
      learns.

    Raises:
      ValueError: another process.

    Reference: Lu & Song 2024, arXiv:2410.11081, algorithm 1.
    """
    process = network.process
    if not isinstance(process, Trig) or abs(float(process.end) - np.pi / 2) > 1e-6:
        raise ValueError("sCM is defined on processes.trig(sigma_data, end=pi / 2).")
    keys, noise = drawn(network, key, x_0)
    t = lognormal_times(process, keys, 1, mean, std)
    x = noised(process, t, x_0, noise)
    cos, sin = jnp.cos(t), jnp.sin(t)
    scale = as_float(process.sigma_data, t)
    slope: PyTree = jax.tree.map(
        lambda v, e: scale_rows(scale * cos, v) * e - scale_rows(sin, v) * v, x_0, noise
    )
    if teacher is not None:
        slope = teacher(x, t, prediction="velocity", cond=cond)

    def ask(x: PyTree, t: jax.Array) -> PyTree:
        return network(x, t, prediction="velocity", cond=cond)

    # the tangent is scaled beforehand, so that it stays finite where sin t is small
    along = jax.tree.map(lambda v: scale_rows(cos * sin, v) * v, slope)
    said, change = jax.jvp(ask, (x, t), (along, cos * sin))

    def tangent(f: jax.Array, d: jax.Array, v: jax.Array, df: jax.Array) -> jax.Array:
        return -scale_rows(cos**2, v) * (f - d) - warmup * (scale_rows(cos * sin, v) * v + df)

    g = jax.tree.map(tangent, said, slope, x, change)
    if normalise is not None:
        squares = jax.tree.leaves(
            jax.tree.map(lambda v: jnp.sum(jnp.square(v), axis=tuple(range(1, v.ndim))), g)
        )
        size = jnp.sqrt(sum(squares[1:], squares[0])) + normalise
        g = jax.tree.map(lambda v: v / scale_rows(size, v), g)
    target = jax.tree.map(jnp.add, said, g)
    return jax.lax.stop_gradient(
        Target(x, t, dict(cond or {}), target, jnp.ones(t.shape), "velocity")
    )
