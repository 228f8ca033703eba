"""Stochastic multistep samplers: SA-Solver and ER-SDE.

With noise strength tau and rate c = 1 + tau^2 the reverse SDE's solution over a log-SNR step h is

    x_t = (sigma_t/sigma_s) exp(-tau^2 h) x_s + alpha_t int_0^h c exp(-c (h - u)) D du
          + sigma_t sqrt(1 - exp(-2 tau^2 h)) z

tau = 0 is the ODE, tau = 1 the usual reverse SDE.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from diffsamp._core.checks import expect_choice, expect_int, lowers
from diffsamp._core.types import Times
from diffsamp.processes import Process
from diffsamp.solvers._builder import Answer, Builder, total, transfer
from diffsamp.solvers._weights import exponential_weights, spread
from diffsamp.tableau import Tableau

__all__ = ["er_sde", "sa_solver"]


def sa_solver(
    process: Process,
    times: Times,
    *,
    order: int = 3,
    corrector: bool | int = True,
    tau: float | Callable[[float], float] = 1.0,
    lower_order_final: bool | int = True,
    rescale: bool = False,
    mode: str = "PEC",
    tau_at: str = "end",
) -> Tableau:
    """SA-Solver: stochastic Adams predictor and corrector at one evaluation a step.

    The corrector keeps the predictor's noise. tau = 0 and no corrector is UniP with all systems
    solved (order 2 excepted); tau = 1 and order 1 is DDPM's posterior. Weak order 1 in the noise.
    For few steps the authors recommend `order=2, corrector=2, rescale=True` and a tau that is 0 at
    the end of the last step; diffusers' class does so, with `tau_at="start"`.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.
      order: evaluations the predictor uses, 1 to 4.
      corrector: correct each state with the evaluation made there: how many evaluations that
        uses, itself included, 1 to 5; True: one more than the predictor. False: no corrector.
      tau: noise strength, a number or a function of a time. At least 0.
      lower_order_final: lower the order over the last steps; a number: only if there are fewer
        steps than that. A step to sigma = 0 has order 1.
      rescale: where two evaluations are used, weight the slope of the data prediction by c h^2 / 2,
        c = 1 + tau^2, in place of the integral h - (1 - exp(-c h)) / c: a change of order h^3, like
        UniPC's fixed coefficient.
      mode: "PEC", or "PECE": evaluate again at each corrected state; 2 n - 1 evaluations.
      tau_at: the "end" (the authors' code) or "start" (diffusers) of a step gives its tau.

    Returns:
      A tableau of n evaluations ("PECE": 2 n - 1), in data prediction.

    Raises:
      ValueError: times that do not decrease, another order or mode, a negative tau.

    Reference: Xue et al. 2023, arXiv:2309.05019, algorithm 1.
    """
    expect_int(order, "order", 1, 4)
    expect_choice(mode, "mode", ("PEC", "PECE"))
    expect_choice(tau_at, "tau_at", ("end", "start"))
    # a bool is an int, and True would be order 1
    most = order + 1 if corrector is True else expect_int(int(corrector), "corrector", 0, 5)
    if mode == "PECE" and not most:
        raise ValueError('mode="PECE" evaluates at corrected states; it needs a corrector.')
    builder = Builder(process, times)
    points = builder.points
    steps = len(points) - 1
    x, history, used = builder.start, list[Answer](), list[Answer]()
    predicted, rate, correct = np.zeros(0), 1.0, 0
    for n in range(steps):
        s, t = points[n], points[n + 1]
        answer = builder.evaluate(x, s)
        x = answer.state
        if most and n > 0 and math.isfinite(used[0].point.log_snr):
            present = used[0].point.log_snr
            nodes = [answer, *history[: correct - 1]]
            nodes = [a for a in nodes if math.isfinite(a.point.log_snr)]
            corrected = _sa_weights(nodes, present, s.log_snr - present, rate, rescale)
            x = x + s.alpha * total(corrected, [a.data for a in nodes])
            x = x - s.alpha * total(predicted, [a.data for a in used])
            if mode == "PECE":
                answer = builder.evaluate(x, s)
                x = answer.state
        strength = float(tau(t.t if tau_at == "end" else s.t) if callable(tau) else tau)
        if not strength >= 0:
            raise ValueError(f"`tau` must not be negative; got {strength}.")
        if strength:
            builder.expect_falling("sa_solver with tau > 0")
        history = [answer, *history[: max(order, most - 1) - 1]]
        left = steps - n if lowers(lower_order_final, steps) else steps
        now, correct = min(order, left), min(most, left + 1)
        now = 1 if t.sigma == 0 else now
        used = ([a for a in history if math.isfinite(a.point.log_snr)] or history[:1])[:now]
        h, rate = t.log_snr - s.log_snr, 1 + strength**2
        predicted = _sa_weights(used, s.log_snr, h, rate, rescale)
        kept = math.exp(-(strength**2) * h) if strength else 1.0
        x = (t.sigma / s.sigma) * kept * x + t.alpha * total(predicted, [a.data for a in used])
        if strength and t.sigma:
            x = x + t.sigma * spread(strength**2 * h) * builder.fresh_noise()
    name = f"sa_solver{order}" + ("" if callable(tau) else f"(tau={tau:g})")
    name += "_pece" if mode == "PECE" else ""
    return builder.finish(x, points[-1], name=name, source="arXiv:2309.05019, algorithm 1")


def _sa_weights(
    used: list[Answer], present: float, h: float, rate: float, rescale: bool
) -> np.ndarray:
    """Weights of the answers over a step from the log-SNR `present`, h long."""
    if len(used) == 1:
        return exponential_weights([0.0], h, rate)
    nodes = [a.point.log_snr - present for a in used]
    if not rescale or len(used) != 2:
        return exponential_weights(nodes, h, rate)
    at_start = int(np.argmin(np.abs(nodes)))
    slope = rate * h**2 / 2 / nodes[1 - at_start]
    found = np.full(2, slope)
    found[at_start] = -math.expm1(-rate * h) - slope
    return found


# the noise scale phi(rho) of ER-SDE
_SCALES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ode": lambda rho: rho,
    "sde": lambda rho: rho**2,
    "er_sde": lambda rho: rho * (np.exp(rho**0.3) + 10),
    "sde_1": lambda rho: rho * (np.exp(-1 / rho) + 10),
    "sde_2": lambda rho: rho**1.5,
    "sde_3": lambda rho: rho**2.5,
    "sde_4": lambda rho: rho**0.9 * np.log10(1 + 100 * rho**1.5),
}


def er_sde(
    process: Process,
    times: Times,
    *,
    order: int = 3,
    scale: str | Callable[[np.ndarray], np.ndarray] = "er_sde",
) -> Tableau:
    """ER-SDE-Solver: the reverse SDE with noise scale phi(rho), rho = sigma / alpha.

    scale "ode" is DDIM at order 1, "sde" DDPM's posterior; "er_sde", phi = rho (exp(rho^0.3) + 10),
    is the authors' choice between them. Weak order 1; the drift's correction terms are of the named
    order except that the third does not shift its difference to the present point, which limits
    it to order 2 in the ODE limit, as published. One evaluation a step.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.
      order: 1, 2 or 3. A step to sigma = 0 is of order 1.
      scale: "ode"; "sde"; "er_sde", the authors' fifth; "sde_1" to "sde_4", their others:
        rho (exp(-1 / rho) + 10), rho^1.5, rho^2.5 and rho^0.9 log10(1 + 100 rho^1.5). Or a function
        phi of an array of rho, such that phi / rho does not fall.

    Returns:
      A tableau of n evaluations, in data prediction.

    Raises:
      ValueError: times that do not decrease, another order or scale, a scale that would need noise
        of negative variance ("sde_4" from rho of about 1000).

    Reference: Cui et al. 2023, arXiv:2309.06169, algorithms 1 to 3. The authors' code integrates by
    100 rectangles, here exact, and leaves out any noise of variance below 1e-6 alpha^2: all of it
    where rho is below 0.001.
    """
    expect_int(order, "order", 1, 3)
    label = "phi" if callable(scale) else expect_choice(scale, "scale", tuple(_SCALES))
    phi = scale if callable(scale) else _SCALES[label]
    nodes, quadrature = np.polynomial.legendre.leggauss(64)
    builder = Builder(process, times)
    if scale != "ode":
        builder.expect_falling("er_sde")
    x, history = builder.start, list[Answer]()
    for s, t in zip(builder.points, builder.points[1:], strict=False):
        history = [builder.evaluate(x, s), *history[:2]]
        answer = history[0]
        if t.sigma == 0:
            x = transfer(answer, t)
            continue
        if s.alpha == 0:  # the limit rho -> inf: no memory of the state, unless the ODE's
            x = transfer(answer, t)
            if scale != "ode":
                x = t.alpha * answer.data + t.sigma * builder.fresh_noise()
            continue
        at_end = float(phi(np.array(t.rho)))
        kept = at_end / float(phi(np.array(s.rho)))
        x = (t.alpha / s.alpha) * kept * answer.state + t.alpha * (1 - kept) * answer.data
        past = [a for a in history if a.point.alpha > 0][:order]
        # int d rho / phi and int (rho - rho_s) d rho / phi over the step, in log rho
        log_rho = (math.log(t.rho) + math.log(s.rho)) / 2 + (
            math.log(s.rho) - math.log(t.rho)
        ) / 2 * nodes
        rho = np.exp(log_rho)
        measure = (math.log(s.rho) - math.log(t.rho)) / 2 * quadrature * rho / phi(rho)
        if len(past) >= 2:
            slope = (past[0].data - past[1].data) / (past[0].point.rho - past[1].point.rho)
            x = x + t.alpha * (t.rho - s.rho + at_end * measure.sum()) * slope
        if len(past) == 3:
            before = (past[1].data - past[2].data) / (past[1].point.rho - past[2].point.rho)
            bend = 2 * (slope - before) / (past[0].point.rho - past[2].point.rho)
            weight = (t.rho - s.rho) ** 2 / 2 + at_end * float(measure @ (rho - s.rho))
            x = x + t.alpha * weight * bend
        if s.rho * kept > t.rho * (1 + 1e-9):
            raise ValueError(
                f"with `scale` = {label!r} phi(rho) / rho falls from {t.rho:g} to {s.rho:g}, which "
                "is noise of negative variance; take another scale, or times that start later."
            )
        std = math.sqrt(max(t.rho**2 - (s.rho * kept) ** 2, 0.0))
        if std > 1e-6 * t.rho:  # the ODE's is 0 up to rounding
            x = x + t.alpha * std * builder.fresh_noise()
    name = f"er_sde{order}" + ("" if label == "er_sde" else f"({label})")
    return builder.finish(x, builder.points[-1], name=name, source="arXiv:2309.06169")
