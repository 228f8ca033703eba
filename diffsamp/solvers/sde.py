"""Stochastic multistep samplers: SA-Solver and ER-SDE.

With noise strength tau and rate c = 1 + tau^2 the reverse SDE's solution over a log-SNR step h is

    x_t = (sigma_t/sigma_s) exp(-tau^2 h) x_s + alpha_t int_0^h c exp(-c (h - u)) D du
          + sigma_t sqrt(1 - exp(-2 tau^2 h)) z

tau = 0 is the ODE, tau = 1 the usual reverse SDE.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from diffsamp._core.checks import expect_choice, expect_int
from diffsamp.processes import Process
from diffsamp.solvers._builder import Answer, Builder, Point, total, transfer
from diffsamp.solvers._weights import exponential_weights, phis, spread
from diffsamp.tableau import Tableau

__all__ = ["er_sde", "sa_solver"]


def sa_solver(
    process: Process,
    times: Any,
    *,
    order: int = 3,
    corrector: bool = True,
    corrector_order: int | None = None,
    tau: float | Callable[[float], float] = 1.0,
    few_steps: bool = False,
    mode: str = "PEC",
    lower_order_final: bool = True,
) -> Tableau:
    """SA-Solver: stochastic Adams predictor and corrector at one evaluation a step.

    The corrector keeps the predictor's noise. tau = 0 and no corrector is UniP with all systems
    solved (order 2 excepted); tau = 1 and order 1 is DDPM's posterior. Weak order 1 in the noise.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.
      order: evaluations the predictor uses, 1 to 4.
      corrector: correct each state with the evaluation made there.
      corrector_order: evaluations the corrector uses, the one made there included, 1 to 5; None:
        one more than `order`. The authors take (order, corrector_order) = (3, 4) without guidance
        and (2, 2) with it.
      tau: noise strength, a number or a function of the time a step ends at (the authors' reading;
        diffusers takes the time it starts at). At least 0.
      few_steps: the mode that the authors recommend. Where two evaluations are used, the weight of
        their slope, (c h - 1 + exp(-c h)) / c with c = 1 + tau^2, is its leading term c h^2 / 2;
        and the last step adds no noise, its tau is 0.
      mode: "PEC", or "PECE": the network is asked again at the corrected state, for two evaluations
        a step, one on the last.
      lower_order_final: lower the order over the last steps. A step to sigma = 0 has order 1.

    Returns:
      A tableau of n evaluations, 2 n - 1 in mode "PECE", in data prediction.

    Raises:
      ValueError: times that do not decrease, another order or mode, a negative tau, "PECE" without
        a corrector.

    Reference: Xue et al. 2023, arXiv:2309.05019, algorithm 1; few_steps: appendix D.
    """
    expect_int(order, "order", 1, 4)
    correcting = order + 1 if corrector_order is None else corrector_order
    expect_int(correcting, "corrector_order", 1, 5)
    expect_choice(mode, "mode", ("PEC", "PECE"))
    if mode == "PECE" and not corrector:
        raise ValueError('mode="PECE" asks at corrected states: it needs corrector=True.')
    builder = Builder(process, times)
    points = builder.points
    steps = len(points) - 1
    x, history, used = builder.start, list[Answer](), list[Answer]()
    weights, rate = np.zeros(0), 1.0
    for n in range(steps):
        s, t = points[n], points[n + 1]
        answer = builder.evaluate(x, s)
        x = answer.state
        if corrector and n > 0 and math.isfinite(history[0].point.log_snr):
            start, finite = history[0].point, _finite(history)
            # the order of the step that led here, lowered as the predictor's was
            now = min(correcting, n + 1, steps - n + 2 if lower_order_final else correcting)
            nodes = [answer, *finite[: now - 1]]
            corrected = _adams(nodes, start, s.log_snr - start.log_snr, rate, few_steps)
            x = x + s.alpha * total(corrected, [a.data for a in nodes])
            x = x - s.alpha * total(weights, [a.data for a in used])
            if mode == "PECE":
                answer = builder.evaluate(x, s)
                x = answer.state
        strength = float(tau(t.t) if callable(tau) else tau)
        if not strength >= 0:
            raise ValueError(f"`tau` must not be negative; got {strength}.")
        if few_steps and n == steps - 1:
            strength = 0.0
        if strength:
            builder.expect_falling("sa_solver with tau > 0")
        history = [answer, *history[: max(order, correcting) - 1]]
        now = 1 if t.sigma == 0 else min(order, steps - n) if lower_order_final else order
        used = (_finite(history) or history[:1])[:now]
        h, rate = t.log_snr - s.log_snr, 1 + strength**2
        weights = _adams(used, s, h, rate, few_steps)
        kept = math.exp(-(strength**2) * h) if strength else 1.0
        x = (t.sigma / s.sigma) * kept * x + t.alpha * total(weights, [a.data for a in used])
        if strength and t.sigma:
            x = x + t.sigma * spread(strength**2 * h) * builder.fresh_noise()
    name = f"sa_solver{order}" + ("" if callable(tau) else f"(tau={tau:g})")
    return builder.finish(x, points[-1], name=name, source="arXiv:2309.05019, algorithm 1")


def _finite(history: list[Answer]) -> list[Answer]:
    return [a for a in history if math.isfinite(a.point.log_snr)]


def _adams(nodes: list[Answer], s: Point, h: float, rate: float, rescale: bool) -> np.ndarray:
    """The weights of the nodes' data in a step from s; `rescale` those of two nodes."""
    levels = [a.point.log_snr - s.log_snr for a in nodes]
    weights = exponential_weights(levels, h, rate)
    if rescale and len(nodes) == 2:
        slope = rate * h**2 / 2 - (rate * h - phis(rate * h)[0]) / rate
        weights = weights + slope / (levels[0] - levels[1]) * np.array([1.0, -1.0])
    return weights


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
    times: Any,
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
