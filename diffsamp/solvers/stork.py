"""STORK: stabilised Runge-Kutta stages on an extrapolated slope, one evaluation a step."""

from __future__ import annotations

import numpy as np

from diffsamp._core.checks import expect_choice, expect_int
from diffsamp._core.types import Times
from diffsamp.processes import Process
from diffsamp.solvers._builder import Answer, Builder, total
from diffsamp.solvers._charts import Chart
from diffsamp.tableau import Tableau

__all__ = ["stork"]


def stork(
    process: Process,
    times: Times,
    *,
    order: int = 4,
    derivatives: int = 2,
    stages: int = 50,
    coordinates: str | None = None,
    compatible: bool = False,
) -> Tableau:
    """STORK-2 and STORK-4: many stages a step, on a Taylor polynomial of the slope.

    In coordinates without a linear part the slope at a stage is extrapolated from the last
    `derivatives` + 1 answers (the paper's virtual evaluations), so the stages are a quadrature of
    that polynomial, and a step is one row:

    - order 4: ROCK4 is exact for polynomials of degree 3, so whatever the stages are, a step is the
      exact integral: Adams-Bashforth with `derivatives` + 1 answers, of that order.
    - order 2: Runge-Kutta-Gegenbauer, whose quadrature with s stages is exact to degree 1: with one
      derivative Adams-Bashforth 2, with more of them another method of order 2.

    The authors' code and diffusers' have the abscissae of the Legendre method with Gegenbauer's
    weights: the integral of the slope's change is .4896 for .5 with 50 stages, which is a method of
    order 1. `compatible` selects them. Derivatives are those of the polynomial through the answers;
    the authors' formulas are these on a uniform grid.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.
      order: 2 or 4, of the stages' method.
      derivatives: 1 to 3; the first steps have fewer.
      stages: s of order 2, at least 3; the authors take 50.
      coordinates: "flow", in which the authors' flow models are, "edm", or None, as for `heun`.
      compatible: the authors' abscissae (order 2 only).

    Returns:
      A deterministic tableau of n evaluations.

    Raises:
      ValueError: times not sorted, another order, number of derivatives, stages or coordinates.

    Reference: Tan, Wang, Bertozzi & Ryu 2026, arXiv:2505.24210; Skaras, Saxton, Meyer & Aslam 2021,
    J. Comput. Phys. 425 (Runge-Kutta-Gegenbauer).
    """
    if order not in (2, 4):
        raise ValueError(f"`order` must be 2 or 4; got {order}.")
    expect_int(derivatives, "derivatives", 1, 3)
    expect_int(stages, "stages", at_least=3)
    if coordinates is not None:
        expect_choice(coordinates, "coordinates", ("edm", "flow"))
    if compatible and order == 4:
        raise ValueError("`compatible` is a matter of order=2; order 4 has no such abscissae.")
    moments = [1 / (k + 1) for k in range(4)] if order == 4 else _gegenbauer(stages, compatible)
    builder = Builder(process, times)
    chart = Chart.choose(builder, coordinates)
    x, history = builder.start, list[Answer]()
    for s, t in zip(builder.points, builder.points[1:], strict=False):
        history = [builder.evaluate(x, s), *history[:derivatives]]
        now, then = chart.variable(s), chart.variable(t)
        nodes = np.array([(chart.variable(a.point) - now) / (then - now) for a in history])
        # sum_k w_k nodes^k = the quadrature of u^k, u from 0 to 1 over the step
        powers = np.vander(nodes, len(nodes), increasing=True).T
        weights = np.linalg.solve(powers, moments[: len(nodes)])
        slopes = [chart.slope(a) for a in history]
        x = chart.scale(t) * (
            history[0].state / chart.scale(s) + (then - now) * total(weights, slopes)
        )
    name = f"stork{order}({derivatives})" + ("_compatible" if compatible else "")
    return builder.finish(x, builder.points[-1], name=name, source="arXiv:2505.24210")


def _gegenbauer(s: int, compatible: bool) -> list[float]:
    """What the Runge-Kutta-Gegenbauer method of s stages makes of int_0^1 u^k du, k = 0 .. 3."""

    def b(j: int) -> float:
        if j < 2:
            return 1 / 3 if j else 1.0
        return 4 * (j - 1) * (j + 4) / (3 * j * (j + 1) * (j + 2) * (j + 3))

    def abscissa(j: int) -> float:
        if compatible:
            return (4 / 3 if j == 1 else j * j + j - 2) / (s * s + s - 2)
        return first if j == 1 else (j * j + 3 * j - 4) / (s * s + 3 * s - 4)

    first = 6 / ((s + 4) * (s - 1))
    before, now = np.zeros(4), first * np.array([1.0, 0, 0, 0])
    at_start = np.array([1.0, 0, 0, 0])
    for j in range(2, s + 1):
        mu = (2 * j + 1) * b(j) / (j * b(j - 1))
        nu = -(j + 1) * b(j) / (j * b(j - 2))
        gamma = -mu * first * (1 - j * (j + 1) * b(j - 1) / 2)
        slope = abscissa(j - 1) ** np.arange(4.0)
        before, now = now, mu * now + nu * before + mu * first * slope + gamma * at_start
    return [float(moment) for moment in now]
