"""First-order steps made better by where, or how often, the network is asked.

All move along a slope F of the ODE in coordinates without a linear part (`_charts`), y = x / scale
as a function of v:

    PFDiff     y_a = y_s + (v_a - v_s) F_past,   y_t = y_s + (v_t - v_s) F(y_a)
    F-DDIM     the same with a = t: the slope at the step's end
    RX         k Euler steps and one of their whole length, extrapolated to second order
"""

from __future__ import annotations

import itertools

from diffsamp._core.checks import expect_int
from diffsamp._core.types import Times
from diffsamp.processes import Process
from diffsamp.solvers._builder import Answer, Builder, Combination, total
from diffsamp.solvers._charts import Chart
from diffsamp.tableau import Tableau

__all__ = ["forward_ddim", "pfdiff", "richardson"]


def pfdiff(
    process: Process,
    times: Times,
    *,
    skip: int = 1,
    ahead: int = 1,
    coordinates: str | None = None,
) -> Tableau:
    """PFDiff-skip_ahead: ask the network inside the step, where its last answer leads.

    A step is skip + 1 of DDIM's. Its start and the last answer, made before it, give the state
    after `ahead` of them (the springboard); the answer there, ahead / (skip + 1) of the way in
    time, moves the start over the whole step. One evaluation a step. Order 2 where it is asked in
    the middle (1_1, 3_2) and the steps vary smoothly, else 1.

    The first step is DDIM's, and short in the authors' grids: of a uniform grid of fine times they
    take `fine[[0, 1, 1 + (skip + 1), 1 + 2 (skip + 1), ..]]`. A springboard below the process's
    t_min, where networks are not trained, is not used: the last step to sigma = 0 is then DDIM's.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times of the states, used verbatim.
      skip: the paper's k, DDIM steps that are left out, at least 1; the authors take 1 to 3.
      ahead: the paper's h, from 1 to `skip`: how many of them the springboard lies ahead.
      coordinates: "edm", "flow" or None, as for `heun`: whether the noise prediction, as in the
        paper, or the velocity, as its authors do for FLUX, is what the last answer stands for.

    Returns:
      A deterministic tableau of n evaluations.

    Raises:
      ValueError: times not sorted, `skip` or `ahead` out of range.

    Reference: Wang, Cai, Li, Peng & Su 2025, arXiv:2408.08822.
    """
    expect_int(skip, "skip", at_least=1)
    expect_int(ahead, "ahead", 1, skip)
    fraction = ahead / (skip + 1)
    builder = Builder(process, times)
    chart = Chart.choose(builder, coordinates)
    x, past = builder.start, None
    for s, t in zip(builder.points, builder.points[1:], strict=False):
        inner = builder.point(s.t + fraction * (t.t - s.t))
        if past is None or inner.t < process.t_min:
            answer = builder.evaluate(x, s)
            past = chart.slope(answer)
            x = chart.step(x, past, s, t)
            continue
        answer = builder.evaluate(chart.step(x, past, s, inner), inner)
        slope = chart.slope(answer)
        # the start of the step in terms of the springboard, which is what the row holds
        back = (chart.variable(s) - chart.variable(inner)) * past
        whole = (chart.variable(t) - chart.variable(s)) * slope
        x = chart.scale(t) * (answer.state / chart.scale(inner) + back + whole)
        past = slope
    name = f"pfdiff{skip}_{ahead}"
    return builder.finish(x, builder.points[-1], name=name, source="arXiv:2408.08822")


def forward_ddim(process: Process, times: Times, *, coordinates: str | None = None) -> Tableau:
    """F-DDIM, or F-DPM-Solver: DDIM with the network's answer at the end of each step.

    The state at the step's end is predicted along the last answer, the network is asked there, and
    the step is made again with what it says. The error is DDIM's to leading order with the opposite
    sign. The answer at the end also begins the next step, so a step makes one evaluation; the last
    step is made with the answer before it, so that n steps make n evaluations.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.
      coordinates: "edm", "flow" or None, as for `heun`; the prediction that is carried on.

    Returns:
      A deterministic tableau of n evaluations, of order 1.

    Raises:
      ValueError: times not sorted.

    Reference: Jiao, Li, Cai & Li 2025, arXiv:2512.24927.
    """
    builder = Builder(process, times)
    chart = Chart.choose(builder, coordinates)
    *points, end = builder.points
    x = builder.start
    slope = chart.slope(builder.evaluate(x, points[0]))
    for s, t in itertools.pairwise(points):
        answer = builder.evaluate(chart.step(x, slope, s, t), t)
        last, slope = slope, chart.slope(answer)
        change = (chart.variable(t) - chart.variable(s)) * (slope - last)
        x = answer.state + chart.scale(t) * change
    x = chart.step(x, slope, points[-1], end)
    return builder.finish(x, end, name="forward_ddim", source="arXiv:2512.24927")


def richardson(
    process: Process, times: Times, *, steps: int = 2, coordinates: str | None = None
) -> Tableau:
    """RX-DDIM: Richardson's extrapolation of DDIM from k steps and one of their length.

    The long step uses the first answer again and costs nothing. With h_i the short steps in the
    coordinates' variable, H their sum and r = sum (h_i / H)^2, the ratio of the two leading errors,

        y = (y_short - r y_long) / (1 - r).

    Order 2. For k = 2 it is the Runge-Kutta method of two stages with the second at h_1 / H of the
    way: midpoint for equal steps. The times are those of all evaluations, grouped by k; what is
    left over makes a group of its own, and a step to sigma = 0 is DDIM's.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.
      steps: k, at least 2; the authors take 2.
      coordinates: "edm", "flow" or None, as for `heun`.

    Returns:
      A deterministic tableau of n evaluations.

    Raises:
      ValueError: times not sorted, another number of steps.

    Reference: Choi, Kang & Han 2025 (RX-DPM), arXiv:2504.01855.
    """
    expect_int(steps, "steps", at_least=2)
    builder = Builder(process, times)
    chart = Chart.choose(builder, coordinates)
    points = builder.points
    n = len(points) - 1
    grouped = n - 1 if points[-1].sigma == 0 else n
    starts = [*range(0, grouped, steps), *([grouped] if grouped < n else [])]
    x = builder.start
    for start, end in zip(starts, [*starts[1:], n], strict=True):
        x = _extrapolated(builder, chart, x, start, end)
    name = f"rx_ddim{steps}"
    return builder.finish(x, points[-1], name=name, source="arXiv:2504.01855")


def _extrapolated(
    builder: Builder, chart: Chart, x: Combination, start: int, end: int
) -> Combination:
    """The state at point `end` from x at point `start`, by the points between them."""
    points = builder.points[start : end + 1]
    lengths = [chart.variable(t) - chart.variable(s) for s, t in itertools.pairwise(points)]
    answers = list[Answer]()
    for s, t in itertools.pairwise(points):
        answers.append(builder.evaluate(x, s))
        x = chart.step(answers[-1].state, chart.slope(answers[-1]), s, t)
    if len(answers) == 1:
        return x
    slopes = [chart.slope(answer) for answer in answers]
    r = sum(h * h for h in lengths) / sum(lengths) ** 2
    # the long step, too, from the state before the last short one
    short = lengths[-1] * slopes[-1]
    long = sum(lengths) * slopes[0] - total(lengths[:-1], slopes[:-1])
    before = answers[-1].state / chart.scale(points[-2])
    return chart.scale(points[-1]) * (before + (short - r * long) / (1 - r))
