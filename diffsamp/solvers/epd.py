"""EPD: a step along the mean of several slopes, all asked at once.

In coordinates without a linear part (`_charts`), y as a function of v with slope F,

    v_k = v_t^{r_k} v_s^{1 - r_k},   y_k = y_s + (v_k - v_s) F(y_s),   k = 1 .. K
    y_t = y_s + (v_t - v_s) sum_k w_k F(y_k),                          w on the simplex

The K inner points need the step's first answer and nothing of each other: K + 1 evaluations, two
calls in sequence (`Tableau.waves`).
"""

from __future__ import annotations

import itertools

import numpy as np

from diffsamp._core.checks import expect_int
from diffsamp._core.types import Array, Times
from diffsamp.processes import Process
from diffsamp.solvers._builder import Answer, Builder, Combination, Point, total, transfer
from diffsamp.solvers._charts import Chart
from diffsamp.tableau import Tableau

__all__ = ["epd"]


def epd(
    process: Process,
    times: Times,
    *,
    points: int = 2,
    positions: Array = None,
    weights: Array = None,
    coordinates: str | None = None,
) -> Tableau:
    """EPD-Solver: `points` parallel evaluations inside each step, and their weighted mean.

    Of order 2 if sum_k w_k r_k = 1/2, as the defaults are, else 1. With one point in the middle it
    is `dpm2`. The authors learn positions and weights, and two numbers more for each point: a scale
    of the time that the network is told and one of its slope. Here they are the conditioning times
    and the sums of the table, which `search.refine(.., numbers=("times", "labels", "weights",
    "sums"), keep_waves=True)` learns with all else that keeps the waves.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times of the steps.
      points: K, at least 1; the authors take 2.
      positions: r, (K,) or (n, K), a row for each step: where the points lie, 0 at the step's start
        and 1 at its end, in the logarithm of sigma / alpha (or of flow time); None: k / (K + 1).
      weights: w, shaped likewise, not negative, of sum 1; None: 1 / K.
      coordinates: "edm" as in the paper, "flow" as its authors do for FLUX and SD3, or None, as for
        `heun`.

    Returns:
      A deterministic tableau of K + 1 evaluations a step, one on a step to sigma = 0.

    Raises:
      ValueError: times not sorted, positions outside (0, 1], or weights off the simplex.

    Reference: Zhu et al. 2025, arXiv:2507.14797; and its code.
    """
    points = expect_int(points, "points", at_least=1)
    builder = Builder(process, times)
    chart = Chart.choose(builder, coordinates)
    steps = len(builder.points) - 1
    places = _rows("positions", positions, np.arange(1, points + 1) / (points + 1), steps)
    shares = _rows("weights", weights, np.full(points, 1 / points), steps)
    if not np.all((places > 0) & (places <= 1)):
        raise ValueError("`positions` must lie above 0 (the step's start) and up to 1 (its end).")
    if np.any(shares < 0) or np.any(np.abs(shares.sum(axis=1) - 1) > 1e-9):
        raise ValueError("`weights` must not be negative and must sum to 1 in every step.")
    x = builder.start
    for n, (s, t) in enumerate(itertools.pairwise(builder.points)):
        first = builder.evaluate(x, s)
        if t.sigma == 0:
            x = transfer(first, t)
        else:
            x = _step(builder, chart, first, t, places[n], shares[n])
    name = f"epd{points}"
    return builder.finish(x, builder.points[-1], name=name, source="arXiv:2507.14797")


def _rows(name: str, given: Array, default: np.ndarray, steps: int) -> np.ndarray:
    """(steps, K) numbers of every step."""
    array = default if given is None else np.asarray(given, np.float64)
    points = default.size
    if array.shape not in ((points,), (steps, points)):
        raise ValueError(
            f"`{name}` must have shape ({points},), or ({steps}, {points}) with a row for each "
            f"step; got {array.shape}."
        )
    return np.broadcast_to(array, (steps, points))


def _step(
    builder: Builder,
    chart: Chart,
    first: Answer,
    t: Point,
    places: np.ndarray,
    shares: np.ndarray,
) -> Combination:
    """The state at t: every point is reached from the step's start, none from another."""
    s, slope = first.point, chart.slope(first)
    inner = [_between(chart, s, t, float(r)) for r in places]
    answers = [builder.evaluate(chart.step(first.state, slope, s, p), p) for p in inner]
    return chart.step(first.state, total(shares, [chart.slope(a) for a in answers]), s, t)


def _between(chart: Chart, s: Point, t: Point, r: float) -> Point:
    """The geometric mean of the variable at s and t; the linear one from sigma = 0."""
    start, end = chart.variable(s), chart.variable(t)
    if start == 0:
        return chart.between(s, t, r)
    return chart.between(s, t, (end**r * start ** (1 - r) - start) / (end - start))
