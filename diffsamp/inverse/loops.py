"""Methods for inverse problems that are loops around a network: DAPS, RED-diff, RePaint."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from diffsamp import guidance, sampling, schedules, solvers
from diffsamp._core import random
from diffsamp._core.checks import expect_int, expect_times
from diffsamp._core.numeric import namespace
from diffsamp._core.types import Array, Conditions, Key, Network, PyTree, Times, Value
from diffsamp.guidance import Rule, Transform, measurement
from diffsamp.predictions import Level
from diffsamp.processes import Process
from diffsamp.score import ScoreFn, scale_rows
from diffsamp.steering import mala
from diffsamp.tableau import Tableau

__all__ = ["daps", "ddnm", "diffpir", "red_diff", "repaint"]


def ddnm(
    score_fn: ScoreFn | Transform, operator: PyTree, y: PyTree, times: Times, *, share: float = 0.85
) -> tuple[Rule, Tableau]:
    """DDNM as its paper runs it: projected data on rows that re-noise a constant share.

    Args:
      score_fn: a network or transform.
      operator: with `pinv`, such as those of this package.
      y: the measurement, without noise, or the name of an entry of `cond`.
      times: (n + 1,) decreasing times.
      share: the paper's eta.

    Returns:
      (transform, tableau), to be sampled together.

    Reference: Wang, Yu & Zhang 2023, arXiv:2212.00490, algorithm 1.
    """
    tableau = solvers.renoise(score_fn.process, times, share=share)
    return guidance.ddnm(score_fn, operator, y, tableau), tableau


def diffpir(
    score_fn: ScoreFn | Transform,
    operator: PyTree,
    y: PyTree,
    noise: float,
    times: Times,
    *,
    weight: float = 8.0,
    zeta: float = 0.3,
) -> tuple[Transform, Tableau]:
    """DiffPIR: a proximal point of the measurement for the data, the noise derived again.

    D' = argmin |A x - y|^2 + weight noise^2 (alpha / sigma)^2 |x - D|^2, then a row that re-noises
    the share sqrt(zeta).

    Args:
      score_fn: a network or transform.
      operator: A, linear.
      y: the measurement, or the name of an entry of `cond`.
      noise: its standard deviation, positive.
      times: (n + 1,) decreasing times.
      weight: the paper's lambda, 1 to 35.
      zeta: 0.1 to 0.35.

    Returns:
      (transform, tableau), to be sampled together.

    Reference: Zhu et al. 2023, arXiv:2305.08995, algorithm 1.
    """
    tableau = solvers.renoise(score_fn.process, times, share=np.sqrt(zeta))
    spread = Partial(_diffpir_spread, float(weight))
    known = measurement(score_fn, operator, y, noise, covariance="scalar", spread=spread)
    return known, tableau


def _diffpir_spread(weight: PyTree, level: Level) -> PyTree:
    xp = namespace(level.alpha, level.sigma, weight)
    # at alpha = 0 the network says nothing yet; a large number stands for none
    return level.sigma / (xp.maximum(level.alpha, 1e-3) * xp.sqrt(xp.asarray(weight * 1.0)))


def daps(
    score_fn: ScoreFn | Transform,
    operator: Callable[[PyTree], PyTree],
    y: PyTree,
    noise: float,
    x_T: PyTree,
    times: Times,
    *,
    key: jax.Array,
    ode_steps: int = 5,
    chain: int = 50,
    step: float = 0.3,
    spread: Callable[[Level], Array] | None = None,
    cond: Conditions | None = None,
) -> PyTree:
    """DAPS: at every level a guess of the sample, a chain towards the measurement, new noise.

    x^ is where `ode_steps` DDIM rows lead from x; a chain on exp(-|A x - y|^2 / (2 noise^2)
    - |x - x^|^2 / (2 r^2)) moves it; and x' = alpha' x + sigma' z. The chain accepts and rejects
    per sample, so its law is that density for every step size. With x^ = D (`ode_steps=1`) and r^2
    the variance of x_0 given x it samples the posterior of Gaussian data; with the paper's r =
    sigma / alpha it does not.

    Args:
      score_fn: a network or transform with a batch axis.
      operator: A, any differentiable function of a batch.
      y: the measurement, (batch, ...).
      noise: its standard deviation, positive.
      x_T: starts, (batch, ...), at times[0].
      times: (n + 1,) decreasing levels, the last one clean or nearly.
      key: one, or one per sample.
      ode_steps: evaluations per level; n * ode_steps in all.
      chain: steps of the chain per level, one gradient of the operator each.
      step: their size, in units of 1 / (1 / noise^2 + 1 / r^2); for operators of norm 1.
      spread: r as a function of the `Level`; None: sigma / alpha.
      cond: keyword arguments for the network.

    Returns:
      Samples, (batch, ...).

    Reference: Zhang et al. 2024, arXiv:2407.01521, algorithm 1.
    """
    process, times = score_fn.process, expect_times(times)
    expect_int(ode_steps, "ode_steps", at_least=1)
    ways = [solvers.ddim(process, _way(process, float(t), ode_steps)) for t in times[:-1]]
    alpha, sigma = process.alpha(times), process.sigma(times)
    level = Level(times[:-1], alpha[:-1], sigma[:-1])
    with np.errstate(divide="ignore"):
        r = np.asarray(sigma[:-1] / alpha[:-1] if spread is None else spread(level), np.float64)
    if not np.all(np.isfinite(r) & (r > 0)):
        raise ValueError("`spread` must be positive and finite at every level; begin at alpha > 0.")
    stacked = jax.tree.map(lambda *v: jnp.asarray(np.stack(v)), *ways)
    numbers = tuple(
        jnp.asarray(v, jax.dtypes.canonicalize_dtype(np.float64)) for v in (r, alpha[1:], sigma[1:])
    )
    keys = random.sample_keys(key, jax.tree.leaves(x_T)[0].shape[0])
    operator = operator if _is_tree(operator) else Partial(operator)
    return _daps(score_fn, operator, y, noise, x_T, keys, stacked, numbers, step, cond, chain=chain)


def _is_tree(operator: PyTree) -> bool:
    return not any(leaf is operator for leaf in jax.tree.leaves(operator))


def _way(process: Process, t: float, steps: int) -> np.ndarray:
    """Times from t to the clean end, uniform in log-SNR down to the process's smallest time."""
    if steps == 1 or t <= process.t_min:
        low = t * np.linspace(1, 0.5, steps) if steps > 1 else np.array([t])
        return np.append(low, process.t_clean)
    return schedules.logsnr(process, steps, t_max=t)


@functools.partial(jax.jit, static_argnames=("chain",))
def _daps(
    score_fn: Network,
    operator: PyTree,
    y: PyTree,
    noise: PyTree,
    x_T: PyTree,
    keys: Key,
    ways: PyTree,
    numbers: Array,
    step: PyTree,
    cond: Conditions | None,
    *,
    chain: int,
) -> PyTree:
    def body(carry: PyTree, given: PyTree) -> PyTree:
        x, n = carry
        way, (r, alpha, sigma) = given
        guess = sampling.sample(score_fn, way, x, cond=cond)

        def log_prob(v: PyTree) -> PyTree:
            misfit = _square(jax.tree.map(jnp.subtract, operator(v), y))
            away = _square(jax.tree.map(jnp.subtract, v, guess))
            return -0.5 * (misfit / noise**2 + away / r**2)

        size = step / (1 / noise**2 + 1 / r**2)
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, n)
        moved, _ = mala(log_prob, guess, key=own, step=size, steps=chain)
        z = random.normal_like(own, chain + 1, x)
        x = jax.tree.map(
            lambda v, e: (scale_rows(alpha, v) * v + scale_rows(sigma, v) * e).astype(v.dtype),
            moved,
            z,
        )
        return (x, n + 1), None

    (x, _), _ = jax.lax.scan(body, (x_T, jnp.zeros((), jnp.int32)), (ways, numbers))
    return x


def _square(tree: PyTree) -> PyTree:
    parts: list[jax.Array] = [
        jnp.sum((v * v).reshape(v.shape[0], -1), axis=1) for v in jax.tree.leaves(tree)
    ]
    return functools.reduce(jnp.add, parts)


def red_diff(
    score_fn: ScoreFn | Transform,
    operator: Callable[[PyTree], PyTree],
    y: PyTree,
    x_0: PyTree,
    times: Times,
    *,
    key: jax.Array,
    weight: float = 0.25,
    rate: float = 0.1,
    cond: Conditions | None = None,
) -> PyTree:
    """RED-diff: a sample that fits the measurement and that the network would not change.

    Adam steps, one draw of noise each, on |y - A mu|^2 / 2 + weight (sigma / alpha)
    <stop(E(alpha mu + sigma eps) - eps), mu>. A most likely sample, not a draw of the posterior.

    Args:
      score_fn: a network or transform with a batch axis.
      operator: A, any differentiable function of a batch.
      y: the measurement.
      x_0: where to begin, (batch, ...), such as `operator.pinv(y)`.
      times: (n,) levels, one step and one evaluation each, with alpha > 0 and sigma > 0; falling in
        the paper.
      key: one, or one per sample.
      weight: of the network's term.
      rate: of Adam, with betas 0.9 and 0.99.
      cond: keyword arguments for the network.

    Returns:
      (batch, ...).

    Reference: Mardani et al. 2024, arXiv:2305.04391, algorithm 1.
    """
    process, times = score_fn.process, np.asarray(times, np.float64)
    alpha, sigma = (np.asarray(f(times)) for f in (process.alpha, process.sigma))
    if times.ndim != 1 or not np.all((alpha > 0) & (sigma > 0)):
        raise ValueError("`times` must be (n,), with signal and noise at every level.")
    network: Network = score_fn
    bound = network.bind(Level(times, alpha, sigma), (np.zeros(len(times)), np.ones(len(times))))
    dtype = jax.dtypes.canonicalize_dtype(np.float64)
    rows = jax.tree.map(
        lambda v: jnp.asarray(v, dtype if np.asarray(v).dtype == np.float64 else None),
        (bound, alpha, sigma),
    )
    keys = random.sample_keys(key, jax.tree.leaves(x_0)[0].shape[0])
    operator = operator if _is_tree(operator) else Partial(operator)
    return _red_diff(score_fn, operator, y, x_0, keys, rows, weight, rate, cond)


@jax.jit
def _red_diff(
    score_fn: Network,
    operator: PyTree,
    y: PyTree,
    x_0: PyTree,
    keys: Key,
    rows: Array,
    weight: PyTree,
    rate: PyTree,
    cond: Conditions | None,
) -> PyTree:
    def body(carry: PyTree, row: Array) -> PyTree:
        mu, first, second, n = carry
        bound, alpha, sigma = row
        eps = random.normal_like(keys, n, mu)
        x = jax.tree.map(lambda v, e: scale_rows(alpha, v) * v + scale_rows(sigma, v) * e, mu, eps)
        noise = score_fn.predict(x, bound, cond)
        misfit = lambda v: 0.5 * jnp.sum(_square(jax.tree.map(jnp.subtract, operator(v), y)))  # noqa: E731
        slope = jax.tree.map(
            lambda g, e, z: g + scale_rows(weight * sigma / alpha, g) * (e - z),
            jax.grad(misfit)(mu),
            noise,
            eps,
        )
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, slope)
        second = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, second, slope)
        turn = (n + 1).astype(jax.tree.leaves(mu)[0].dtype)
        mu = jax.tree.map(
            lambda v, m, s: (
                v
                - scale_rows(rate, v)
                * (m / (1 - 0.9**turn))
                / (jnp.sqrt(s / (1 - 0.99**turn)) + 1e-8)
            ),
            mu,
            first,
            second,
        )
        return (mu, first, second, n + 1), None

    zero = jax.tree.map(jnp.zeros_like, x_0)
    (mu, *_), _ = jax.lax.scan(body, (x_0, zero, zero, jnp.zeros((), jnp.int32)), rows)
    return mu


def repaint(
    score_fn: ScoreFn | Transform,
    known: PyTree,
    mask: PyTree,
    x_T: PyTree,
    times: Times,
    *,
    key: jax.Array,
    repeats: Array = 10,
    cond: Conditions | None = None,
) -> PyTree:
    """RePaint: put the noised known elements into the state, step, go back up, again.

    Before every ancestral row the known elements of x become alpha known + sigma z; each row is
    made `repeats` times, with forward noise between. Exact as they become many; `guidance.inpaint`
    with the noise kept comes as near in one pass.

    Args:
      score_fn: a network or transform with a batch axis.
      known: values, broadcasting to the state.
      mask: 1 where they are known.
      x_T: starts, (batch, ...).
      times: (n + 1,) decreasing times.
      key: one, or one per sample.
      repeats: evaluations per row, a number or (n,); the way back is `solvers.travel`.
      cond: keyword arguments for the network.

    Returns:
      Samples, (batch, ...), after n * repeats evaluations.

    Reference: Lugmayr et al. 2022, arXiv:2201.09865, algorithm 1.
    """
    rows = solvers.travel(solvers.ddpm(score_fn.process, expect_times(times)), repeats)
    keys = random.sample_keys(key, jax.tree.leaves(x_T)[0].shape[0])
    return _repaint(score_fn, rows, known, mask, x_T, keys, cond)


@jax.jit
def _repaint(
    score_fn: Network,
    rows: PyTree,
    known: PyTree,
    mask: PyTree,
    x_T: PyTree,
    keys: Key,
    cond: Conditions | None,
) -> PyTree:
    def body(n: Array, state: PyTree) -> PyTree:
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, 0x9A17)
        z = random.normal_like(own, n, state.x)
        alpha, sigma = (jnp.asarray(v)[n] for v in (rows.alpha, rows.sigma))

        def put(x: jax.Array, value: Value, where: PyTree, e: jax.Array) -> jax.Array:
            value, where = (
                jnp.broadcast_to(jnp.asarray(v, x.dtype), x.shape) for v in (value, where)
            )
            noised = scale_rows(alpha, x) * value + scale_rows(sigma, x) * e
            return where * noised + (1 - where) * x

        x = jax.tree.map(put, state.x, known, mask, z)
        evaluates = jnp.asarray(rows.evaluates)[n]
        x = jax.tree.map(lambda new, old: jnp.where(evaluates, new, old), x, state.x)
        return sampling.step(score_fn, rows, state._replace(x=x), cond=cond)

    state = sampling.init(rows, x_T, keys)
    state = jax.lax.fori_loop(0, np.shape(rows.a)[0], body, state)
    where = jax.tree.map(
        lambda x, m: jnp.broadcast_to(jnp.asarray(m, x.dtype), x.shape), state.x, mask
    )
    return jax.tree.map(
        lambda x, v, w: w * jnp.broadcast_to(jnp.asarray(v, x.dtype), x.shape) + (1 - w) * x,
        state.x,
        known,
        where,
    )
