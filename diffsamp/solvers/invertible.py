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


def bdia(
    process: Process, times: Times, *, gamma: float = 1.0, method: str = "ddim", back: str = "heun"
) -> Tableau:
    """BDIA-DDIM: u_{n+1} = gamma (u_{n-1} - f(u_n; n -> n-1)) + f(u_n; n -> n+1), f the DDIM step.

    One evaluation a step. Order 2 for gamma = 1, 1 below; gamma = 0 is DDIM. Running it backwards
    multiplies rounding errors by 1 / gamma a step: use gamma in [0.92, 1] for that.

    BDIA-EDM, `method` "heun", is the same around EDM's sampler: f is Heun's step, u the state over
    alpha; gamma = 0 is `heun`. The integral back over the last step, from u_n, is Heun's too, for
    three evaluations a step and order 2, or Euler's with the evaluation there is, for two a step
    and order 1.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.
      gamma: in [0, 1].
      method: "ddim" or "heun".
      back: "heun" or "euler", the integral back of `method` "heun".

    Returns:
      A deterministic tableau, of n evaluations with p = 2 for "ddim", in noise prediction. Only
      that one is run backwards by `diffsamp.inversion`.

    Raises:
      ValueError: times not sorted, gamma outside [0, 1], another method, "heun" from alpha = 0.

    Reference: Zhang, Lewis & Kleijn 2023, arXiv:2307.10829. Of BDIA-EDM the authors published no
    code, and `back` is not known.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"`gamma` must lie in [0, 1]; got {gamma}.")
    expect_choice(method, "method", ("ddim", "heun"))
    if method == "heun":
        return _bdia_heun(process, times, gamma, expect_choice(back, "back", ("heun", "euler")))
    builder = Builder(process, times, NOISE, reduce=False)
    points = builder.points
    x = builder.start
    for n in range(len(points) - 1):
        answer = builder.evaluate(x, points[n])
        x = transfer(answer, points[n + 1])
        if n > 0 and gamma > 0:
            x = x + gamma * (builder.symbol(n - 1) - transfer(answer, points[n - 1]))
    name = f"bdia(gamma={gamma:g})"
    return builder.finish(x, points[-1], name=name, source="arXiv:2307.10829")


def _bdia_heun(process: Process, times: Times, gamma: float, back: str) -> Tableau:
    builder = Builder(process, times, NOISE, reduce=False)
    points = builder.points
    if points[0].alpha == 0:
        raise ValueError(
            f'method="heun" steps in x / alpha, which is infinite at the first time, t = '
            f"{points[0].t:g}; start below it, or take method="
            '"ddim".'
        )

    def heun(first: Answer, to: Point) -> Combination:
        """Heun's increment of u / alpha, from where the answer was given."""
        span = to.rho - first.point.rho
        if to.sigma == 0:
            return span * first.noise
        end = builder.evaluate(transfer(first, to), to)
        return span / 2 * (first.noise + end.noise)

    x = builder.start
    before = Combination({})
    for n in range(len(points) - 1):
        s, t = points[n], points[n + 1]
        first = builder.evaluate(x, s)
        scaled = first.state / s.alpha
        new = scaled + heun(first, t)
        if n > 0 and gamma > 0:
            last = points[n - 1]
            euler = (last.rho - s.rho) * first.noise
            new = new + gamma * (
                before - scaled - (euler if back == "euler" else heun(first, last))
            )
        before, x = scaled, t.alpha * new
    name = f"bdia_heun(gamma={gamma:g})"
    return builder.finish(x, points[-1], name=name, source="arXiv:2307.10829")


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
