"""UniPC and DC-Solver: predictor and corrector of any order at one evaluation a step.

UniP-p extrapolates the data predictions over the last p evaluations in log-SNR; UniC-p interpolates
over those and the one just made, and moves the state without a new evaluation:

    x^c = x^p + alpha_t sum_j (W^C_j - W^P_j) D_j

with W the exponential weights. The function B(h) of the paper cancels wherever its linear system
is solved; it enters only through the two places where the authors fix a coefficient at 1/2 (UniP-2
and UniC-1), which is what `variant` selects.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from diffsamp._core.checks import expect_choice, expect_int, expect_times, lowers
from diffsamp._core.types import Array, Times
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
from diffsamp.solvers._weights import exponential_weights, lagrange
from diffsamp.tableau import Tableau

__all__ = ["dc_solver", "unipc"]


def unipc(
    process: Process,
    times: Times,
    *,
    order: int = 3,
    variant: str = "bh2",
    corrector: bool = True,
    lower_order_final: bool | int = True,
    prediction: str = "data",
) -> Tableau:
    """UniPC of any order: one evaluation a step, order + 1 with the corrector.

    Without the corrector it is UniP: UniP-1 is DDIM, UniP-2 (bh2) is DPM-Solver++ 2M midpoint,
    UniP-3 is DPM-Solver++ 3M. The corrected state's own evaluation is not repeated (the authors'
    PEC mode), and the last state is not corrected.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.
      order: order p of the predictor, at least 1; the authors take 3, with guidance 2.
      variant: "bh1" or "bh2".
      corrector: apply UniC after each evaluation.
      lower_order_final: lower the order over the last steps; a number: only if there are fewer
        steps than that (the authors' 10, diffusers' 15). A step to sigma = 0 is of order 1.
      prediction: "data", or "noise": the same method on noise predictions, where a step out of
        alpha = 0 or to sigma = 0 is DDIM's.

    Returns:
      A deterministic tableau of n evaluations, in that prediction.

    Raises:
      ValueError: times not sorted, another order, variant or prediction.

    Reference: Zhao et al. 2023, arXiv:2302.04867, algorithms 1 and 2.
    """
    times = expect_times(times, may_rise=True)
    label = f"unipc{order}_{variant}" if corrector else f"unip{order}_{variant}"
    rate = -1.0 if expect_choice(prediction, "prediction", ("data", "noise")) == "noise" else 1.0
    label += "_noise" if rate < 0 else ""
    builder, x = _multistep(
        process, times, order, variant, lower_order_final, [corrector] * (len(times) - 1), rate=rate
    )
    return builder.finish(x, builder.points[-1], name=label, source="arXiv:2302.04867, algorithm 1")


def dc_solver(
    process: Process,
    times: Times,
    *,
    ratios: Array,
    order: int = 2,
    variant: str = "bh2",
    lower_order_final: bool | int = True,
    correct_first: bool = True,
    stop: int | None = None,
) -> Tableau:
    """DC-Solver: UniPC whose newest output is moved to a fitted time before it is used.

    Before the predictor of step n, D_n is replaced by the parabola through the last three
    (replaced) outputs, as a function of t, at t_{n-1} + ratio_n (t_n - t_{n-1}): by dynamic
    compensation of the misalignment between predictor and corrector. Ratio 1 leaves it as it is.
    The replaced outputs are combinations of all earlier ones, so rows are dense. The ratios depend
    on network, guidance, grid and order: `diffsamp.search.fit_dc` finds them.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.
      ratios: (n,) one per step; those of the first two are not used.
      order: of UniPC, at least 1.
      variant: "bh1" or "bh2".
      lower_order_final: as for `unipc`.
      correct_first: correct the state after the first step; the authors do not, with guidance.
      stop: take only the first `stop` steps, and correct the state there with one evaluation more
        unless it is the last; what the fit of the ratios looks at.

    Returns:
      A deterministic tableau of n evaluations, in data prediction.

    Raises:
      ValueError: as for `unipc`, or another number of ratios.

    Reference: Zhao et al. 2024, arXiv:2409.03755.
    """
    times, ratios = expect_times(times, may_rise=True), np.asarray(ratios, np.float64)
    if ratios.shape != (len(times) - 1,) or not np.all(np.isfinite(ratios)):
        raise ValueError(
            f"`ratios` must be {len(times) - 1} finite numbers, one per step; got {ratios}."
        )
    corrected = [False, correct_first] + [True] * (len(times) - 3)
    builder, x = _multistep(
        process, times, order, variant, lower_order_final, corrected, ratios, stop
    )
    return builder.finish(
        x, builder.points[stop or -1], name=f"dc_solver{order}", source="arXiv:2409.03755"
    )


def _multistep(
    process: Process,
    times: Times,
    order: int,
    variant: str,
    lower_order_final: bool | int,
    corrected: Sequence[bool],
    ratios: np.ndarray | None = None,
    stop: int | None = None,
    rate: float = 1.0,
) -> tuple[Builder, Combination]:
    """The builder after all steps, and the sample; rate -1 is the noise form."""
    expect_int(order, "order", at_least=1)
    expect_choice(variant, "variant", ("bh1", "bh2"))
    builder = Builder(process, times, DATA if rate > 0 else NOISE)
    points = builder.points
    steps = len(points) - 1
    x, history, used = builder.start, list[Answer](), list[Answer]()
    for n in range(steps if stop is None else expect_int(stop, "stop", 1, steps)):
        s, t = points[n], points[n + 1]
        answer = builder.evaluate(x, s)
        x = answer.state
        if n > 0 and corrected[n] and math.isfinite(used[0].point.log_snr):
            x = _correct(x, answer, used, variant, rate)
        if ratios is not None and n >= 2:
            answer = _compensate([answer, *history[:2]], float(ratios[n]))
        history = [answer, *history[: max(order - 1, 2)]]
        now = 1 if t.sigma == 0 else order
        if lowers(lower_order_final, steps):
            now = min(now, steps - n)
        finite = [a for a in history if math.isfinite(a.point.log_snr)] or history[:1]
        used = finite[:now]
        if rate < 0 and (t.sigma == 0 or s.alpha == 0):
            x = transfer(answer, t)
            continue
        weights = _predictor_weights(used, t, variant, rate)
        kept = t.sigma / s.sigma if rate > 0 else t.alpha / s.alpha
        x = kept * x + _scale(t, rate) * total(weights, _said(used, rate))
    if stop is not None and stop < steps:
        answer = builder.evaluate(x, points[stop])
        x = answer.state
        if corrected[stop] and math.isfinite(used[0].point.log_snr):
            x = _correct(x, answer, used, variant, rate)
    return builder, x


def _compensate(history: list[Answer], ratio: float) -> Answer:
    """The newest answer with its data prediction taken at the compensated time."""
    now, before = history[0].point.t, history[1].point.t
    at = np.array([before + ratio * (now - before)])
    weights = lagrange([a.point.t for a in history], at)[:, 0]
    return dataclasses.replace(history[0], data=total(weights, [a.data for a in history]))


def _said(answers: list[Answer], rate: float) -> list[Combination]:
    return [a.data if rate > 0 else a.noise for a in answers]


def _scale(t: Point, rate: float) -> float:
    """What weights are multiplied by in a step to t."""
    return t.alpha if rate > 0 else t.sigma


def _half_weight(h: float, variant: str, rate: float) -> float:
    """B / 2 per unit slope, where the authors fix the coefficient at 1/2."""
    return (rate * h if variant == "bh1" else -math.expm1(-rate * h)) / 2


def _predictor_weights(used: list[Answer], t: Point, variant: str, rate: float) -> np.ndarray:
    present = used[0].point.log_snr
    h = t.log_snr - present
    if len(used) == 2:
        slope = _half_weight(h, variant, rate) * h / (present - used[1].point.log_snr)
        return np.array([-math.expm1(-rate * h) + slope, -slope])
    return exponential_weights([a.point.log_snr - present for a in used], h, rate)


def _correct(
    x: Combination, answer: Answer, used: list[Answer], variant: str, rate: float
) -> Combination:
    """The state x at the answer's point, corrected for the step that led there."""
    t = answer.point
    present = used[0].point.log_snr
    h = t.log_snr - present
    predictor = _predictor_weights(used, t, variant, rate)
    if len(used) == 1:
        half = _half_weight(h, variant, rate)
        corrected = np.array([-math.expm1(-rate * h) - half, half])
    else:
        nodes = [a.point.log_snr - present for a in used]
        corrected = exponential_weights([*nodes, h], h, rate)
    change = corrected - np.append(predictor, 0.0)
    return x + _scale(t, rate) * total(change, _said([*used, answer], rate))
