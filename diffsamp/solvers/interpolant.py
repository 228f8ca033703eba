"""Stochastic interpolants: the reverse SDE with any diffusion coefficient.

For every w(t) >= 0 the SDE (time running down from noise to data)

    dx = (alpha' D + sigma' E) dt + w E / sigma dt + sqrt(2 w) dW

has the same marginals: w = 0 is the probability-flow ODE, w = g^2 / 2 the reverse of the forward
process. Which w is best depends on where the network is good.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from diffsamp._core.checks import expect_choice
from diffsamp._core.numeric import silence
from diffsamp._core.types import Times
from diffsamp.processes import Process
from diffsamp.solvers._builder import Answer, Builder, Combination, Point, transfer
from diffsamp.solvers._charts import Chart
from diffsamp.tableau import Tableau

__all__ = ["DIFFUSIONS", "interpolant"]


def _forward(builder: Builder, point: Point, t: float) -> float:
    """g^2 / 2 of the forward process: sigma sigma' - (alpha' / alpha) sigma^2."""
    process, sigma = builder.process, point.sigma
    change = sigma * process.sigma_dot(point.t)
    change = change - process.alpha_dot(point.t) / point.alpha * sigma**2
    return float(change * (process.t_max - process.t_clean))


# w at a point and a unit time, by name
DIFFUSIONS: dict[str, Callable[[Builder, Point, float], float]] = {
    "sigma": lambda builder, point, t: point.sigma,
    "constant": lambda builder, point, t: 1.0,
    "forward": _forward,
    "decreasing": lambda builder, point, t: (1 + math.cos(math.pi * (1 - t))) ** 2 / 4,
    "increasing-decreasing": lambda builder, point, t: math.sin(math.pi * t) ** 2,
}


def interpolant(
    process: Process,
    times: Times,
    *,
    method: str = "euler",
    diffusion: str | Callable[[float], float] = "sigma",
    scale: float = 1.0,
) -> Tableau:
    """The SDE of stochastic interpolants with a free diffusion coefficient; SiT's samplers.

    The ODE part of a step is exact for a constant (D, E), so "euler" on the flow process is SiT's
    Euler-Maruyama; "heun" adds the step's noise first and takes the mean of the drifts at both
    ends. Weak order 1 and, in the drift, 2. One or two evaluations a step; a step to sigma = 0 is
    one evaluation and the data prediction. No noise where w is infinite ("forward" at alpha = 0).

    Args:
      process: the noise process, such as `processes.flow()`.
      times: (n + 1,) decreasing times, used verbatim. SiT stops at t = 0.04 and takes one step
        from there.
      method: "euler" or "heun".
      diffusion: w(t): "sigma" (SiT's default), "constant", "forward" (SBDM: g^2 / 2),
        "decreasing" ((1 + cos(pi (1 - t)))^2 / 4), "increasing-decreasing" (sin^2 pi t), or a
        function. t here, and the unit of w, is time scaled to 0 at the data and 1 at the noise.
      scale: multiplies w; 0 is the ODE.

    Returns:
      A tableau, stochastic unless w is 0, in data (euler) or velocity-like (heun) prediction.

    Raises:
      ValueError: times that do not decrease, an unknown name, a negative w.

    Reference: Albergo, Boffi & Vanden-Eijnden 2023, arXiv:2303.08797; Ma et al. 2024 (SiT),
    arXiv:2401.08740.
    """
    expect_choice(method, "method", ("euler", "heun"))
    if not callable(diffusion):
        expect_choice(diffusion, "diffusion", tuple(DIFFUSIONS))
    builder = Builder(process, times)
    chart = Chart("flow", builder)

    @silence
    def strength(point: Point) -> float:
        if point.alpha == 0 and diffusion == "forward":
            return 0.0
        t = builder.unit_time(point.t)
        w = diffusion(t) if callable(diffusion) else DIFFUSIONS[diffusion](builder, point, t)
        if not (math.isfinite(w) and w * scale >= 0):
            raise ValueError(
                f"`diffusion` times `scale` must be at least 0 and finite; got {w} times {scale} "
                f"at t = {point.t:g}."
            )
        return scale * float(w)

    def length(s: Point, t: Point) -> float:
        return builder.unit_time(s.t) - builder.unit_time(t.t)

    def kick(answer: Answer, s: Point, t: Point) -> Combination:
        """The change of x along the score."""
        return -length(s, t) * strength(answer.point) / answer.point.sigma * answer.noise

    x, noisy = builder.start, False
    for s, t in zip(builder.points, builder.points[1:], strict=False):
        if t.sigma == 0:
            x = transfer(builder.evaluate(x, s), t)
            continue
        w = strength(s)
        noise = Combination({})
        if w > 0:
            builder.expect_falling("interpolant with a positive diffusion coefficient")
            noise, noisy = math.sqrt(2 * w * length(s, t)) * builder.fresh_noise(), True
        if method == "euler":
            answer = builder.evaluate(x, s)
            x = transfer(answer, t) + kick(answer, s, t) + noise
            continue
        first = builder.evaluate(x + noise, s)
        # from units of the state at s to those at t
        carried = chart.scale(t) / chart.scale(s)
        second = builder.evaluate(transfer(first, t) + carried * kick(first, s, t), t)
        slope = (chart.slope(first) + chart.slope(second)) / 2
        x = chart.step(first.state, slope, s, t)
        x = x + (carried * kick(first, s, t) + kick(second, s, t)) / 2
    label = "" if callable(diffusion) else f"({diffusion})"
    return builder.finish(
        x,
        builder.points[-1],
        name=f"interpolant_{method}{label}",
        source="arXiv:2303.08797; arXiv:2401.08740",
        check="mean" if noisy else "full",
    )
