"""Two-step methods that can be run backwards exactly: BDIA and O-BELM.

u_{n+1} is a combination of u_n, u_{n-1} and the output at u_n; solved for u_{n-1}, the same row
runs the other way without a new approximation.
"""

from __future__ import annotations

from diffsamp._core.checks import expect_choice
from diffsamp._core.types import Times
from diffsamp.processes import Process
from diffsamp.solvers._builder import NOISE, Answer, Builder, Combination, Point, transfer
from diffsamp.tableau import Tableau

__all__ = ["bdia", "belm"]


def bdia(process: Process, times: Times, *, gamma: float = 1.0, base: str = "ddim") -> Tableau:
    """BDIA: u_{n+1} = gamma (u_{n-1} - f(u_n; n -> n-1)) + f(u_n; n -> n+1), f a one-step method.

    "ddim": f the DDIM step, one evaluation a step. Order 2 for gamma = 1, 1 below; gamma = 0 is
    DDIM. Running it backwards multiplies rounding errors by 1 / gamma a step: use gamma in
    [0.92, 1] for that. "heun" (BDIA around EDM's sampler): f Heun's step both ways, three
    evaluations a step and two on the first, of order 2 for any gamma; gamma = 0 is Heun's method.
    With Euler's step for the way back instead it would be of order 1.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.
      gamma: in [0, 1].
      base: "ddim" or "heun". Around "heun" a step to sigma = 0 or from alpha = 0 is DDIM's.

    Returns:
      A deterministic tableau with p = 2 around "ddim", of n evaluations, in noise prediction.

    Raises:
      ValueError: times not sorted, gamma outside [0, 1], another base.

    Reference: Zhang, Lewis & Kleijn 2023, arXiv:2307.10829.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"`gamma` must lie in [0, 1]; got {gamma}.")
    expect_choice(base, "base", ("ddim", "heun"))
    builder = Builder(process, times, NOISE, reduce=False)
    points = builder.points
    x, states = builder.start, list[Combination]()
    for n in range(len(points) - 1):
        answer = builder.evaluate(x, points[n])
        states.append(answer.state)
        step = _heun if base == "heun" else _ddim
        x = step(builder, answer, points[n + 1])
        if n > 0 and gamma > 0 and (base == "ddim" or points[n + 1].sigma > 0):
            x = x + gamma * (states[n - 1] - step(builder, answer, points[n - 1]))
    name = f"bdia{'_heun' if base == 'heun' else ''}(gamma={gamma:g})"
    return builder.finish(x, points[-1], name=name, source="arXiv:2307.10829")


def _ddim(builder: Builder, answer: Answer, t: Point) -> Combination:
    return transfer(answer, t)


def _heun(builder: Builder, answer: Answer, t: Point) -> Combination:
    s = answer.point
    if t.sigma == 0 or s.alpha == 0 or t.alpha == 0:
        return transfer(answer, t)
    end = builder.evaluate(transfer(answer, t), t)
    slope = (answer.noise + end.noise) / 2
    return t.alpha * (answer.state / s.alpha + (t.rho - s.rho) * slope)


def belm(process: Process, times: Times) -> Tableau:
    """O-BELM: the two-step bidirectional method with the smallest local error.

    In x' = x / alpha and rho = sigma / alpha, with d_1 the last step of rho and d_2 the coming one:

        x'_{n+1} = (d_2/d_1)^2 x'_{n-1} + (d_1^2 - d_2^2)/d_1^2 x'_n + d_2 (d_1 + d_2)/d_1 E_n

    One evaluation a step, order 2. The first step, and one out of alpha = 0, is DDIM's.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.

    Returns:
      A deterministic tableau of n evaluations with p = 2, in noise prediction.

    Raises:
      ValueError: times not sorted.

    Reference: Wang et al. 2024, arXiv:2410.07273.
    """
    builder = Builder(process, times, NOISE, reduce=False)
    points = builder.points
    x = builder.start
    for n in range(len(points) - 1):
        answer = builder.evaluate(x, points[n])
        x = transfer(answer, points[n + 1])
        if n > 0 and points[n - 1].alpha > 0:
            before, now, after = points[n - 1 : n + 2]
            d_1, d_2 = now.rho - before.rho, after.rho - now.rho
            scaled = (d_2 / d_1) ** 2 * (builder.symbol(n - 1) / before.alpha)
            scaled = scaled + (1 - (d_2 / d_1) ** 2) * (answer.state / now.alpha)
            x = after.alpha * (scaled + d_2 * (d_1 + d_2) / d_1 * answer.noise)
    return builder.finish(x, points[-1], name="belm", source="arXiv:2410.07273")
