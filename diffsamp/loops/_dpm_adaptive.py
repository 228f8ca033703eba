"""DPM-Solver-12 and -23: single-step DPM-Solver with steps that follow from a tolerance."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from diffsamp._core.checks import expect_choice, expect_int, expect_state
from diffsamp._core.numeric import is_concrete
from diffsamp._core.types import Conditions, Network, PyTree
from diffsamp.loops._samples import OdeSolution, each, number
from diffsamp.predictions import level_at

__all__ = ["dpm_solver"]

_NEAR = 1e-5  # log-SNR that is left when the end is reached


def dpm_solver(
    score_fn: Network,
    x: PyTree,
    t_start: float,
    t_end: float,
    *,
    order: int = 3,
    prediction: str = "noise",
    cond: Conditions | None = None,
    rtol: float = 0.05,
    atol: float = 0.0078,
    first_step: float = 0.05,
    safety: float = 0.9,
    max_steps: int = 4096,
) -> OdeSolution:
    """DPM-Solver-12 (`order` 2) or -23 (3): the authors' adaptive step size, for each sample.

    A step over log-SNR h is made by the single-step methods of two orders, which share their
    evaluations; with their difference in units of max(atol, rtol max(|lower|, |lower before|)),
    root mean square over the sample, as E, it is taken if E <= 1, and the next h is safety h
    E^(-1 / order). A batch of one is the authors' loop; they take the batch's largest E for all.

    Args:
      score_fn: a ScoreFn or a transform of one; functions in it get a traced `Level`.
      x: the state at `t_start`, (batch, ...) or a pytree of such; without the batch axis if
        `score_fn.batched` is False.
      t_start: a time of the process at which something is left of the data.
      t_end: a lower time. To t_clean the ODE is solved until t_min, and the result is the data
        prediction there.
      order: 2 or 3, evaluations a step.
      prediction: "noise", DPM-Solver, or "data", DPM-Solver++.
      cond: keyword arguments for the network; arrays as long as the batch hold one entry each.
      rtol: relative tolerance of a step's error, relative to the state with its noise: made for VP
        processes; where x starts at 80 (EDM) take a smaller one.
      atol: absolute tolerance; the default is 1/128, for images in [-1, 1].
      first_step: log-SNR of the first attempt.
      safety: what the next step is multiplied by.
      max_steps: most attempts of one sample.

    Returns:
      An `OdeSolution` without points; its `nfe` counts rejected steps. A sample that needs more
      than `max_steps` is NaN throughout.

    Raises:
      TypeError: x not floating, a time or process that is traced.
      ValueError: times that do not fall or are outside the process, a start at alpha = 0, a
        number out of range, an unknown prediction.

    Reference: Lu et al. 2022, arXiv:2206.00927, algorithm 4 (appendix C); the rule of E:
    Jolicoeur-Martineau et al. 2021, arXiv:2105.14080.
    """
    process = score_fn.process
    if not is_concrete(process):
        raise TypeError("`score_fn.process` must be known outside `jit`: close over it.")
    expect_int(order, "order", 2, 3)
    expect_choice(prediction, "prediction", ("noise", "data"))
    clean, high = process.t_clean, process.t_max
    t_start, t_end = number(t_start, "t_start", clean, high), number(t_end, "t_end", clean, high)
    stop = process.t_min if t_end == clean else t_end
    ends = np.asarray(process.log_snr(np.array([t_start, stop])), np.float64)
    if not ends[0] < ends[1]:
        raise ValueError(
            f"`t_start` must be above `t_end`; got {t_start:g} and {t_end:g}. To encode take "
            "`ode_solution`."
        )
    if not np.isfinite(ends[0]):
        raise ValueError(
            f"at `t_start` = {t_start:g} alpha = 0 and log-SNR is infinite; start below it, or "
            "take `ode_solution`."
        )
    target = (0.0, 1.0) if prediction == "noise" else (1.0, 0.0)
    for t in (t_start, stop):
        level = level_at(process, t)
        score_fn.check_bound(score_fn.bind(level, target), level, np.ones(()))
    settings = tuple(
        number(value, name, *limits)
        for name, value, limits in (
            ("rtol", rtol, (1e-15, 1)),
            ("atol", atol, (1e-15, np.inf)),
            ("first_step", first_step, (1e-6, np.inf)),
            ("safety", safety, (0.1, 1)),
        )
    )
    batch = expect_state(x, "x", score_fn.batched)
    wide = any(leaf.dtype == np.float64 for leaf in jax.tree.leaves(x))
    dtype = jax.dtypes.canonicalize_dtype(np.float64 if wide else np.float32)
    numbers = jax.tree.map(lambda v: jnp.asarray(v, dtype), (ends, settings))
    return _solve(
        score_fn,
        x,
        numbers,
        dict(cond or {}),
        order=order,
        noise=prediction == "noise",
        batch=batch,
        max_steps=expect_int(max_steps, "max_steps", 1),
        to_clean=t_end == clean,
    )


@functools.partial(jax.jit, static_argnames=("order", "noise", "batch", "max_steps", "to_clean"))
def _solve(score_fn, x, numbers, cond, *, order, noise, batch, max_steps, to_clean):
    ends, (rtol, atol, first_step, safety) = numbers

    def one(x, cond, _):
        flat, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(ends.dtype), x))

        def said(x, lam, noise):
            """The prediction of one sample; a network with a batch axis gets a batch of 1."""
            level = level_at(score_fn.process, score_fn.process.time(lam))
            here = jnp.ones_like(level.alpha)
            bound = score_fn.bind(level, (0 * here, here) if noise else (here, 0 * here))
            state = unravel(x)
            if not score_fn.batched:
                return ravel_pytree(score_fn.predict(state, bound, cond))[0]
            state = jax.tree.map(lambda leaf: leaf[None], state)
            return ravel_pytree(score_fn.predict(state, bound, cond))[0]

        def attempt(x, lam, h):
            """The lower and the higher order's state."""
            sign = 1 if noise else -1

            def scales(part):
                level = level_at(score_fn.process, score_fn.process.time(lam + part))
                pair = level.alpha, level.sigma
                return pair if noise else pair[::-1]

            def bend(part):  # (exp(+-part) - 1) / part -+ 1, whose numerator cancels
                return (jnp.expm1(sign * part) - sign * part) / part

            first, kept = said(x, lam, noise), scales(0.0)[0]

            def plain(part):
                own, other = scales(part)
                return own / kept * x - other * jnp.expm1(sign * part) * first

            node, end = h / order, scales(h)[1]
            second = said(plain(node), lam + node, noise)
            # the second order with its stage at h / order
            two = plain(h) - order / 2 * end * jnp.expm1(sign * h) * (second - first)
            if order == 2:
                return plain(h), two
            stage = plain(2 * node) - sign * 2 * scales(2 * node)[1] * bend(2 * node) * (
                second - first
            )
            third = said(stage, lam + 2 * node, noise)
            return two, plain(h) - sign * 1.5 * end * bend(h) * (third - first)

        def advance(state):
            x, before, lam, h, steps = state
            lower, higher = attempt(x, lam, h)
            unit = jnp.maximum(atol, rtol * jnp.maximum(jnp.abs(lower), jnp.abs(before)))
            error = jnp.sqrt(jnp.mean(((higher - lower) / unit) ** 2))
            good = error <= 1
            x, before = (jnp.where(good, a, b) for a, b in ((higher, x), (lower, before)))
            lam = jnp.where(good, lam + h, lam)
            # an error that is no number shrinks the steps until there are none left
            error = jnp.where(jnp.isnan(error), 2.0**order, jnp.maximum(error, 1e-10))
            h = jnp.minimum(safety * h * error ** (-1 / order), ends[1] - lam)
            return x, before, lam, h, steps + 1

        def unfinished(state):
            return (ends[1] - state[2] > _NEAR) & (state[4] < max_steps)

        start = jnp.minimum(first_step, ends[1] - ends[0])
        state = (flat, flat, ends[0], start, jnp.zeros((), jnp.int32))
        out, _, lam, _, steps = lax.while_loop(unfinished, advance, state)
        nfe = steps * order
        if to_clean:
            out, nfe = said(out, ends[1], False), nfe + 1
        out = jnp.where(ends[1] - lam > _NEAR, jnp.nan, out)
        return jax.tree.map(lambda a, like: a.astype(like.dtype), unravel(out), x), nfe

    found, nfe = each(one, x, cond, None, batch, (0, 0))
    return OdeSolution(found, nfe, None)
