"""Steps of diffusers' schedulers that no function of `ds.solvers` makes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from diffsamp._core.types import Times
from diffsamp.processes import Process
from diffsamp.solvers._builder import (
    DATA,
    NOISE,
    Answer,
    Builder,
    Combination,
    Point,
    total,
    transfer,
)
from diffsamp.solvers._weights import phis, spread
from diffsamp.tableau import Tableau

__all__ = [
    "adams_prk",
    "ancestral_flow",
    "ddim_forward",
    "ddim_strided",
    "dpm_multistep",
    "dpm_singlestep",
    "ipndm",
    "jumps",
    "tcd",
    "with_rows",
]

_ADAMS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def with_rows(tableau: Tableau, other: Tableau, rows: list[int]) -> Tableau:
    """`tableau` with some rows of `other`, on the same times: a row holds all of its history."""
    if not rows:
        return tableau
    a, b = tableau.a.copy(), np.zeros((tableau.rows, max(tableau.q, other.q)))
    c = tableau.c.copy()
    b[:, : tableau.q] = tableau.b
    for n in rows:
        a[n], b[n], c[n] = other.a[n], 0.0, other.c[n]
        b[n, : other.q] = other.b[n]
    return dataclasses.replace(tableau, a=a, b=b, c=c)


# -- DDIM with diffusers' own intervals ---------------------------------------------------------


def ddim_strided(process: Process, times: Times, *, stride: int, end: float) -> Tableau:
    """DDIMScheduler as it is: a step ends at t - stride, wherever the next one begins."""
    builder = Builder(process, times)
    x = builder.start
    to = builder.points[-1]
    for s in builder.points[:-1]:
        answer = builder.evaluate(x, s)
        to = builder.point(s.t - stride if s.t >= stride else end)
        x = transfer(answer, to)
    return builder.finish(x, to, name="ddim(strided)", source="diffusers 0.42.1", check="none")


def ddim_forward(process: Process, times: Times, *, prediction: str) -> Tableau:
    """DDIMInverseScheduler: up to the noise, the network asked at the time where a step ends."""
    builder = Builder(process, times, NOISE)
    x, points = builder.start, builder.points
    for s, t in itertools.pairwise(points):
        # the state lives at s, so what the network says at t is taken as an answer at s
        answer = builder.evaluate(x, t, target=_own_target(prediction, t))
        said = Combination({("m", builder.rows): 1.0})
        if prediction == "sample":
            data, noise = said, _noise_from_data(answer.state, said, s)
        elif prediction == "v_prediction":
            data = s.alpha * answer.state - s.sigma * said
            noise = s.alpha * said + s.sigma * answer.state
        else:
            data, noise = (answer.state - s.sigma * said) / s.alpha, said
        x = t.alpha * data + t.sigma * noise
    return builder.finish(
        x, points[-1], name="ddim_inverse", source="diffusers 0.42.1", check="none"
    )


def _own_target(prediction: str, point: Point) -> tuple[float, float]:
    """The network's own prediction as weights of (x_0, eps)."""
    if prediction == "v_prediction":
        return (-point.sigma, point.alpha)
    return DATA if prediction == "sample" else NOISE


def _noise_from_data(state: Combination, data: Combination, s: Point) -> Combination:
    if s.sigma == 0:
        return Combination({})
    return (state - s.alpha * data) / s.sigma


# -- PNDM ---------------------------------------------------------------------------------------


def adams_prk(process: Process, times: Times, *, prediction: str, skip_prk: bool) -> Tableau:
    """PNDMScheduler: fourth-order Adams-Bashforth behind a start of Heun's or of Runge-Kutta's.

    `skip_prk`: the first step is taken twice, n + 1 evaluations; else three Runge-Kutta steps,
    n + 9. What is averaged is the network's own output, noise or v.
    """
    builder = Builder(process, times, NOISE)
    points = builder.points
    steps = len(points) - 1
    if not skip_prk and steps < 4:
        raise ValueError(
            f"PNDMScheduler's Runge-Kutta start needs n of 4 or more; got {steps}. With "
            "'skip_prk_steps' = True any n will do."
        )
    velocity = prediction == "v_prediction"

    def ask(x: Combination, at: Point) -> tuple[Combination, Combination]:
        """(state, the network's own output)."""
        answer = builder.evaluate(x, at, target=_own_target(prediction, at))
        said = at.alpha * answer.noise - at.sigma * answer.data if velocity else answer.noise
        return answer.state, said

    def move(x: Combination, said: Combination, s: Point, t: Point) -> Combination:
        noise = s.alpha * said + s.sigma * x if velocity else said
        return (t.alpha / s.alpha) * x + (t.sigma - t.alpha / s.alpha * s.sigma) * noise

    x, history, exact = builder.start, list[Combination](), True
    for k, (s, t) in enumerate(itertools.pairwise(points)):
        state, said = ask(x, s)
        history = [said, *history[:3]]
        if skip_prk and k == 0 and steps > 1:
            _, again = ask(move(state, said, s, t), t)
            x = move(state, (said + again) / 2, s, t)
        elif not skip_prk and k < 3:
            half = (s.t - t.t) / 2
            half = math.floor(half) if float(s.t - t.t).is_integer() else half
            middle = builder.point(t.t + half)
            # for an odd stride the first stage ends half a label away from where it is asked
            first_end = builder.point(s.t - half)
            exact = exact and first_end.t == middle.t
            _, second = ask(move(state, said, s, first_end), middle)
            _, third = ask(move(state, second, s, middle), middle)
            _, fourth = ask(move(state, third, s, t), t)
            x = move(
                state, total([1 / 6, 1 / 3, 1 / 3, 1 / 6], [said, second, third, fourth]), s, t
            )
        else:
            x = move(state, total(_ADAMS[len(history) - 1], history), s, t)
    return builder.finish(
        x,
        points[-1],
        name="plms" if skip_prk else "pndm",
        source="arXiv:2202.09778",
        check="full" if exact and not velocity else "none",
    )


def ipndm(process: Process, times: Times) -> Tableau:
    """IPNDMScheduler: as `ds.solvers.ipndm`, but its first step takes the data to be 0.

    It starts at alpha = 0, where it takes the state for the noise and divides nothing by nothing.
    """
    builder = Builder(process, times, NOISE)
    points = builder.points
    x, history, blind = builder.start, list[Combination](), False
    for s, t in itertools.pairwise(points):
        answer = builder.evaluate(x, s)
        if s.alpha == 0:
            history, blind = [answer.state / s.sigma], True
            x = t.sigma * history[0]
            continue
        history = [answer.noise, *history[:3]]
        mean = total(_ADAMS[len(history) - 1], history)
        x = (t.alpha / s.alpha) * (answer.state - s.sigma * mean) + t.sigma * mean
    return builder.finish(
        x,
        points[-1],
        name="ipndm4",
        source="arXiv:2202.09778",
        check="none" if blind else "full",
    )


# -- DPM-Solver ---------------------------------------------------------------------------------


def _dpm_step(
    builder: Builder,
    algorithm: str,
    start: Answer,
    t: Point,
    value: Combination,
    slope: Combination | None = None,
    bend: Combination | None = None,
    *,
    halved: bool = True,
) -> Combination:
    """One step of DPM-Solver (++) or its SDE from value, slope and bend in units of the step."""
    s, data, sde = start.point, algorithm.endswith("++"), algorithm.startswith("sde")
    h = t.log_snr - s.log_snr
    phi_1, phi_2, phi_3 = phis((2 * h if sde else h) if data else -h)
    said = phi_1 * value
    if slope is not None:
        said = said + (phi_1 / 2 if halved else phi_2) * slope
    if bend is not None:
        said = said + phi_3 * bend
    if data:
        x = (t.sigma / s.sigma) * (math.exp(-h) if sde else 1.0) * start.state + t.alpha * said
    else:
        x = (t.alpha / s.alpha) * start.state + (2 if sde else 1) * t.sigma * said
    if sde and t.sigma > 0:
        std = spread(h) if data else math.sqrt(math.expm1(2 * h))
        x = x + t.sigma * std * builder.fresh_noise()
    return x


def dpm_multistep(
    process: Process, times: Times, *, orders: Sequence[int], algorithm: str, variant: str
) -> Tableau:
    """DPM-Solver multistep of noise predictions, with the order of every step.

    The third order has half of its correction, as `compatible` in `ds.solvers.dpmpp`.
    """
    builder = Builder(process, times, NOISE)
    points = builder.points
    x, past = builder.start, list[Answer]()
    for n, (s, t) in enumerate(itertools.pairwise(points)):
        past = [builder.evaluate(x, s), *past[:2]]
        said, at = [a.noise for a in past], [a.point.log_snr for a in past]
        order, h = min(orders[n], len(past)), t.log_snr - s.log_snr
        slope = bend = None
        if order > 1:
            r_0 = (at[0] - at[1]) / h
            slope = (said[0] - said[1]) / r_0
        if order > 2 and slope is not None:
            r_1 = (at[1] - at[2]) / h
            bend = (slope - (said[1] - said[2]) / r_1) / (r_0 + r_1)
            slope = slope + r_0 * bend
        halved = variant == "midpoint" and order == 2
        x = _dpm_step(builder, algorithm, past[0], t, said[0], slope, bend, halved=halved)
    return builder.finish(
        x,
        points[-1],
        name=f"{algorithm}_{max(orders)}m",
        source="arXiv:2206.00927",
        check="mean" if algorithm.startswith("sde") else "full",
    )


def dpm_singlestep(
    process: Process, times: Times, *, orders: Sequence[int], algorithm: str, variant: str
) -> Tableau:
    """DPMSolverSinglestepScheduler: evaluation n is stage `orders[n]` of a step that began before.

    Its third-order step reaches its second stage by the second-order formula, not by the paper's.
    """
    data = algorithm.endswith("++")
    builder = Builder(process, times, DATA if data else NOISE)
    points = builder.points
    x, stages = builder.start, list[Answer]()
    for n, (s, t) in enumerate(itertools.pairwise(points)):
        answer = builder.evaluate(x, s)
        stages = [answer] if orders[n] == 1 else [*stages, answer]
        start = stages[0]
        said = [a.data if data else a.noise for a in stages]
        h = t.log_snr - start.point.log_snr
        r = [(a.point.log_snr - start.point.log_snr) / h for a in stages]
        slope = bend = None
        halved = False
        if len(stages) == 2:
            slope, halved = (said[1] - said[0]) / r[1], variant == "midpoint"
        elif len(stages) == 3:
            slope = (said[2] - said[0]) / r[2]
            if variant == "heun":
                inner = (said[1] - said[0]) / r[1]
                bend = (2 / (r[2] - r[1])) * (slope - inner)
                slope = (r[2] * inner - r[1] * slope) / (r[2] - r[1])
        x = _dpm_step(builder, algorithm, start, t, said[0], slope, bend, halved=halved)
    return builder.finish(
        x,
        points[-1],
        name=f"{algorithm}_{max(orders)}s",
        source="arXiv:2206.00927; arXiv:2211.01095",
    )


# -- few-step networks and flows with noise -----------------------------------------------------


def jumps(
    process: Process,
    times: Times,
    *,
    boundary: Callable[[Point], tuple[float, float]],
    floor: float = 0.0,
    noise_scale: float = 1.0,
) -> Tableau:
    """Consistency sampling with the boundary condition that the scheduler applies.

    The network's jump is out D + skip x, with (skip, out) = `boundary` of the level. Noise of
    variance rho^2 - floor^2 (in sigma / alpha) is added, but not after the last jump.
    """
    builder = Builder(process, times)
    x, points = builder.start, builder.points
    for n, (s, t) in enumerate(itertools.pairwise(points)):
        answer = builder.evaluate(x, s)
        skip, out = boundary(s)
        x = out * answer.data + skip * answer.state
        if n < len(points) - 2:
            std = math.sqrt(max(t.sigma**2 - (t.alpha * floor) ** 2, 0.0))
            x = t.alpha * x + noise_scale * std * builder.fresh_noise()
    return builder.finish(
        x, points[-1], name="consistency", source="arXiv:2303.01469", check="none"
    )


def tcd(process: Process, times: Times, *, eta: float = 0.3) -> Tableau:
    """TCDScheduler: DDIM down to (1 - eta) of the next label, then noise up to it.

    `eta` is the paper's gamma: 0 is deterministic. (arXiv:2402.19159, algorithm 3.)
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"`eta` must lie in [0, 1]; got {eta}.")
    builder = Builder(process, times)
    x, points = builder.start, builder.points
    for n, (s, t) in enumerate(itertools.pairwise(points)):
        answer = builder.evaluate(x, s)
        if n == len(points) - 2 or t.sigma == 0 or eta == 0:
            x = transfer(answer, t)
            continue
        low = builder.point(math.floor((1 - eta) * t.t))
        ratio = t.alpha / low.alpha
        std = math.sqrt(max(t.sigma**2 - (ratio * low.sigma) ** 2, 0.0))
        x = ratio * transfer(answer, low)
        if std > 0:
            x = x + std * builder.fresh_noise()
    return builder.finish(x, points[-1], name=f"tcd(eta={eta:g})", source="arXiv:2402.19159")


def ancestral_flow(
    process: Process, times: Times, *, eta: float = 1.0, noise_scale: float = 1.0
) -> Tableau:
    """LTXEulerAncestralRFScheduler: Euler to sigma' (1 + (sigma' / sigma - 1) eta), then noise."""
    builder = Builder(process, times)
    x, points = builder.start, builder.points
    for s, t in itertools.pairwise(points):
        answer = builder.evaluate(x, s)
        if t.sigma == 0:
            x = transfer(answer, t)
            continue
        low = builder.point(t.t * (1 + (t.t / s.t - 1) * eta))
        ratio = t.alpha / low.alpha
        std = math.sqrt(max(t.sigma**2 - (ratio * low.sigma) ** 2, 0.0)) * noise_scale
        x = ratio * transfer(answer, low)
        if std > 0:
            x = x + std * builder.fresh_noise()
    return builder.finish(
        x,
        points[-1],
        name=f"euler_ancestral(eta={eta:g})",
        source="diffusers 0.42.1",
        check="full" if noise_scale == 1 else "mean",
    )
