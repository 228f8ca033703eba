"""Adaptive solutions of the probability-flow ODE and log-likelihoods (extra "adaptive").

With y = x / (alpha + sigma) and v = sigma / (alpha + sigma) the probability-flow ODE is

    dy/dv = E - D        (noise prediction minus data prediction),

without a linear part and finite from v = 0 (clean) to v = 1 (no signal), for every process. diffrax
integrates it with steps that follow from a tolerance; the number of evaluations is then an outcome.
For a budget take a tableau. Each sample takes its own steps, so it does not depend on its batch; a
batch runs until its slowest sample is done. `dpm_solver`, which needs no diffrax, is DPM-Solver's
own adaptive method.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from diffsamp._core import random
from diffsamp._core.checks import expect_choice, expect_int, expect_state
from diffsamp._core.numeric import is_concrete
from diffsamp._core.types import Conditions, Key, Network, PyTree, Times, Value
from diffsamp.loops._dpm_adaptive import dpm_solver
from diffsamp.loops._samples import OdeSolution, each, number
from diffsamp.predictions import level_at
from diffsamp.score import scale_rows

__all__ = ["LogLikelihood", "OdeSolution", "dpm_solver", "log_likelihood", "ode_solution"]


class LogLikelihood(NamedTuple):
    """What `log_likelihood` returns.

    Attributes:
      log_prob: (batch,) log density of the given states, in nats.
      x_T: the states at `process.t_max` to which the ODE takes them.
      nfe: as in `OdeSolution`; Jacobian-vector products are not counted.
    """

    log_prob: PyTree
    x_T: PyTree
    nfe: PyTree


def ode_solution(
    score_fn: Network,
    x: PyTree,
    t_start: float,
    t_end: float,
    *,
    cond: Conditions | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    save_at: Times | None = None,
    max_steps: int = 4096,
    solver: Value = None,
) -> OdeSolution:
    """Solve the probability-flow ODE from `t_start` to `t_end`; up in time is encoding.

    To `process.t_clean` the ODE is solved until `process.t_min`, the last time at which the network
    is asked, and the result is its data prediction there: an error that no tolerance reduces.

    Args:
      score_fn: a ScoreFn or a transform of one. Functions in it (`time`, a guidance scale) get a
        traced `Level` and must use jax.numpy.
      x: the state at `t_start`, (batch, ...) or a pytree of such; without the batch axis if
        `score_fn.batched` is False.
      t_start: a time of the process, in (t_clean, t_max].
      t_end: likewise, in [t_clean, t_max].
      cond: keyword arguments for the network. An array whose first axis is as long as the batch
        holds one entry per sample; others are shared.
      rtol: relative tolerance of a step's error in x / (alpha + sigma), root mean square over the
        sample. float32 cannot meet less than about 1e-6.
      atol: absolute tolerance of the same.
      save_at: times within the solve, in any order, whose states are returned as well. They are
        interpolated: no further evaluations, a little less accurate.
      max_steps: most steps of one sample, rejected ones included.
      solver: an explicit Runge-Kutta method of diffrax; None is `diffrax.Tsit5()`.

    Returns:
      An `OdeSolution`. A sample that needs more than `max_steps`, or steps too small for its dtype,
      is NaN throughout; the others are not touched. `nfe` is exact, for Tsit5 1 + 6 per step. With
      guidance each costs `score_fn.nfe_factor` network evaluations.

    Raises:
      ModuleNotFoundError: diffrax is not installed.
      TypeError: x not floating, a time or process that is traced, a solver of another kind.
      ValueError: times outside the process or equal, a start at the clean end, `save_at` outside
        the solve, a tolerance out of range, a prediction not determined at an end.

    Reference: Song et al. 2021, arXiv:2011.13456, section 4.3.
    """
    diffrax = _diffrax()
    solver = diffrax.Tsit5() if solver is None else solver
    if not isinstance(solver, diffrax.AbstractERK):
        raise TypeError(
            "`solver` must be an explicit Runge-Kutta method of diffrax with an error estimate, "
            f"such as diffrax.Dopri8(); got {solver!r}."
        )
    batch = expect_state(x, "x", score_fn.batched)
    numbers, to_clean = _prepare(score_fn, x, t_start, t_end, save_at, rtol, atol)
    return _solve(
        score_fn,
        x,
        numbers,
        dict(cond or {}),
        solver=solver,
        batch=batch,
        max_steps=expect_int(max_steps, "max_steps", 1),
        to_clean=to_clean,
    )


def log_likelihood(
    score_fn: Network,
    x_0: PyTree,
    *,
    key: Key = None,
    cond: Conditions | None = None,
    t_start: float | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    trace: str = "exact",
    probes: int = 1,
    max_steps: int = 4096,
) -> LogLikelihood:
    """Log density of states under the model, by the instantaneous change of variables.

    With scale = alpha + sigma, and x_T ~ N(0, prior_std^2 I) where the ODE takes x_0,

        log p(x_0) = log p(x_T) + dim log(scale_T / scale_0) + int div(E - D) dv.

    This is the density of what the ODE makes of the prior: the data's as far as the network is
    perfect, and as N(0, prior_std^2 I) is right, which neglects the data's shape at t_max.

    Args:
      score_fn: as for `ode_solution`, of a network with Jacobian-vector products.
      x_0: the states, taken to be those at `t_start`.
      key: for "hutchinson", a random key, or one per sample; sample i uses `fold_in(key, i)`.
      cond: as for `ode_solution`.
      t_start: the time at which the density is wanted; None: `process.t_min`.
      rtol: as for `ode_solution`; the integral of the divergence meets it too.
      atol: likewise, in nats for the integral.
      trace: "exact": dim Jacobian-vector products per evaluation, for small states. "hutchinson":
        the mean of e . J e over random signs e, drawn once per sample; unbiased, and exact only
        where J is diagonal.
      probes: how many e.
      max_steps: as for `ode_solution`.

    Returns:
      A `LogLikelihood`; NaN for a sample that fails, as in `ode_solution`.

    Raises:
      ValueError: an unknown `trace`, or "hutchinson" without a key; else as `ode_solution`.

    Reference: Chen et al. 2018, arXiv:1806.07366; Grathwohl et al. 2019, arXiv:1810.01367 (one e
    per solve); Song et al. 2021, arXiv:2011.13456, appendix D.2.
    """
    solver = _diffrax().Tsit5()
    batch, process = expect_state(x_0, "x_0", score_fn.batched), score_fn.process
    t_start = process.t_min if t_start is None else t_start
    numbers, _ = _prepare(score_fn, x_0, t_start, process.t_max, None, rtol, atol)
    probes, keys = expect_int(probes, "probes", 1), None
    if expect_choice(trace, "trace", ("exact", "hutchinson")) == "hutchinson":
        if key is None:
            raise ValueError(
                'trace="hutchinson" draws random signs: pass `key`, such as jax.random.key(0).'
            )
        keys = random.sample_keys(key, batch)
    return _change_of_variables(
        score_fn,
        x_0,
        numbers,
        keys,
        dict(cond or {}),
        solver=solver,
        batch=batch,
        probes=probes,
        max_steps=expect_int(max_steps, "max_steps", 1),
    )


@functools.partial(jax.jit, static_argnames=("solver", "batch", "max_steps", "to_clean"))
def _solve(score_fn, x, numbers, cond, *, solver, batch, max_steps, to_clean):
    (v, scale), saved, tolerances, _ = numbers

    def one(x, cond, _):
        slope = functools.partial(_slope, score_fn, cond)
        y = jax.tree.map(lambda leaf: leaf.astype(scale.dtype) / scale[0], x)
        at = None if saved is None else saved[0]
        y, points, nfe = _integrate(slope, y, v[0], v[1], at, tolerances, solver, max_steps)
        if to_clean:  # Euler's step, which ends at x = D: the slope's noise drops out
            y, nfe = jax.tree.map(lambda a, m: a + (v[2] - v[1]) * m, y, slope(v[1], y)), nfe + 1
        y = jax.tree.map(lambda a, like: (scale[2] * a).astype(like.dtype), y, x)
        if saved is not None:
            points = jax.tree.map(
                lambda p, like: jax.vmap(jnp.multiply)(saved[1], p).astype(like.dtype), points, x
            )
        return y, nfe, points

    return OdeSolution(*each(one, x, cond, None, batch, (0, 0, 1)))


@functools.partial(jax.jit, static_argnames=("solver", "batch", "probes", "max_steps"))
def _change_of_variables(score_fn, x, numbers, keys, cond, *, solver, batch, probes, max_steps):
    (v, scale), _, tolerances, prior_std = numbers

    def one(x, cond, key):
        flat, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(scale.dtype), x))
        dim, dtype = flat.size, flat.dtype
        vectors, weight = jnp.eye(dim, dtype=dtype), 1.0
        if key is not None:
            vectors, weight = jax.random.rademacher(key, (probes, dim), dtype), 1 / probes

        def slope(v, state):
            value, jvp = jax.linearize(
                lambda y: ravel_pytree(_slope(score_fn, cond, v, unravel(y)))[0], state[0]
            )
            return value, weight * jnp.sum(vectors * jax.vmap(jvp)(vectors))

        state = (flat / scale[0], jnp.zeros((), dtype))
        end, _, nfe = _integrate(slope, state, v[0], v[1], None, tolerances, solver, max_steps)
        x_T, change = scale[1] * end[0], end[1]
        log_prob = -jnp.sum((x_T / prior_std) ** 2 + math.log(2 * math.pi)) / 2
        log_prob = log_prob + dim * jnp.log(scale[1] / scale[0] / prior_std)
        x_T = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), unravel(x_T), x)
        return log_prob + change, x_T, nfe

    return LogLikelihood(*each(one, x, cond, keys, batch, 0))


def _slope(score_fn: Network, cond: Conditions | None, v: PyTree, y: PyTree) -> PyTree:
    """dy/dv = E - D of one sample; a network with a batch axis is given a batch of 1."""
    t = score_fn.process.time(jnp.log1p(-v) - jnp.log(v))
    level = level_at(score_fn.process, t)
    one = jnp.ones_like(level.alpha)
    bound = score_fn.bind(level, (-one, one))
    x = jax.tree.map(lambda leaf: scale_rows(level.alpha + level.sigma, leaf) * leaf, y)
    if not score_fn.batched:
        return score_fn.predict(x, bound, cond)
    out = score_fn.predict(jax.tree.map(lambda leaf: leaf[None], x), bound, cond)
    return jax.tree.map(lambda leaf: leaf[0], out)


def _integrate(slope, y, v_start, v_end, saved, tolerances, solver, max_steps):
    """(y at v_end, y at each of `saved` or None, calls of `slope`)."""
    diffrax = _diffrax()
    subs = [diffrax.SubSaveAt(t1=True)]
    if saved is not None:
        order = jnp.argsort(jnp.where(v_start < v_end, saved, -saved))
        subs.append(diffrax.SubSaveAt(ts=saved[order]))
    # A first-same-as-last method is given its first slope. It would else evaluate it in each
    # attempt at the first step, and the number of steps could not say how often. That step is what
    # a method of order 5 may make on a smooth problem, with a margin.
    known = int(solver.tableau.fsal)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda v, y, _: slope(v, y)),
        solver,
        v_start,
        v_end,
        0.1 * tolerances[0] ** 0.2 * (v_end - v_start),
        y,
        saveat=diffrax.SaveAt(subs=subs),
        solver_state=(jnp.asarray(False), slope(v_start, y)) if known else None,
        stepsize_controller=diffrax.PIDController(
            *tolerances, norm=_norm, dtmin=float(jnp.finfo(v_start.dtype).eps), force_dtmin=False
        ),
        max_steps=max_steps,
        throw=False,
    )
    good = solution.result == diffrax.RESULTS.successful
    ys = jax.tree.map(lambda leaf: jnp.where(good, leaf, jnp.nan), solution.ys)
    end, points = jax.tree.map(lambda leaf: leaf[0], ys[0]), None
    if saved is not None:
        points = jax.tree.map(lambda leaf: leaf[jnp.argsort(order)], ys[1])
    nfe = solution.stats["num_steps"] * (solver.tableau.num_stages - known) + known
    return end, points, nfe


def _norm(tree: PyTree) -> PyTree:
    """The largest root mean square of an array; in a common mean an integral would not count."""
    squares = jnp.stack([jnp.mean(leaf * leaf) for leaf in jax.tree.leaves(tree)])
    # NaN as an infinite error, for which steps shrink until the solve gives up
    return jnp.sqrt(jnp.max(jnp.where(jnp.isnan(squares), jnp.inf, squares)))


def _diffrax() -> PyTree:
    try:
        import diffrax
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'adaptive solutions need diffrax: pip install "diffsamp[adaptive]"', name="diffrax"
        ) from error
    return diffrax


def _prepare(score_fn, x, t_start, t_end, save_at, rtol, atol):
    """The numbers of a solve in the dtype of x, and whether it ends at the clean end; checked."""
    process = score_fn.process
    if not is_concrete(process):
        raise TypeError("`score_fn.process` must be known outside `jit`: close over it.")
    clean, low, high = process.t_clean, process.t_min, process.t_max
    t_start = number(t_start, "t_start", clean, high)
    t_end = number(t_end, "t_end", clean, high)
    t_stop = low if t_end == clean else t_end
    if t_start == clean:
        raise ValueError(
            f"`t_start` is the clean end, {clean:g}, where the network is not asked; take "
            f"process.t_min, {low:g}."
        )
    if t_stop == t_start or (t_end == clean and t_start < low):
        raise ValueError(
            f"from `t_start` = {t_start:g} to {t_stop:g} there is nothing to solve: take another "
            f"`t_end` than {t_end:g}."
        )
    for t in (t_start, t_stop):
        level, one = level_at(process, t), np.ones(())
        score_fn.check_bound(score_fn.bind(level, (-one, one)), level, one)

    def coordinates(times: Times) -> PyTree:
        level = level_at(process, times)
        return level.sigma / (level.alpha + level.sigma), level.alpha + level.sigma

    within = sorted((t_start, t_stop))
    saved = None
    if save_at is not None:
        saved = coordinates([number(t, "save_at", *within) for t in np.atleast_1d(save_at)])
    tolerances = number(rtol, "rtol", 1e-15, 1), number(atol, "atol", 1e-15, 1)
    numbers = coordinates([t_start, t_stop, t_end]), saved, tolerances, process.prior_std
    wide = any(leaf.dtype == np.float64 for leaf in jax.tree.leaves(x))
    dtype = jax.dtypes.canonicalize_dtype(np.float64 if wide else np.float32)
    return jax.tree.map(lambda v: jnp.asarray(v, dtype), numbers), t_end == clean
