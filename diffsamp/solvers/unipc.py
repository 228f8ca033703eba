"""UniPC: predictor and corrector of any order at one evaluation a step.

UniP-p extrapolates the data predictions over the last p evaluations in log-SNR; UniC-p interpolates
over those and the one just made, and moves the state without a new evaluation:

    x^c = x^p + alpha_t sum_j (W^C_j - W^P_j) D_j

with W the exponential weights. The function B(h) of the paper cancels wherever its linear system
is solved; it enters only through the two places where the authors fix a coefficient at 1/2 (UniP-2
and UniC-1), which is what `variant` selects.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from diffsamp._checks import expect_choice, expect_int
from diffsamp.processes import Process
from diffsamp.solvers._builder import Answer, Builder, Point, total
from diffsamp.solvers._weights import exponential_weights
from diffsamp.tableau import Tableau

__all__ = ["unipc"]


def unipc(
    process: Process,
    times: Any,
    *,
    order: int = 3,
    variant: str = "bh2",
    corrector: bool = True,
    lower_order_final: bool = True,
) -> Tableau:
    """UniPC of order 1 to 4: one evaluation a step, order + 1 with the corrector.

    Without the corrector it is UniP: UniP-1 is DDIM, UniP-2 (bh2) is DPM-Solver++ 2M midpoint,
    UniP-3 is DPM-Solver++ 3M. The corrected state's own evaluation is not repeated (the authors'
    PEC mode), and the last state is not corrected.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.
      order: order p of the predictor, 1 to 4; 3 is the authors' choice without guidance, 2 with.
      variant: "bh1" or "bh2".
      corrector: apply UniC after each evaluation.
      lower_order_final: lower the order over the last steps. A step to sigma = 0 is always of
        order 1.

    Returns:
      A deterministic tableau of n evaluations, in data prediction.

    Raises:
      ValueError: times that do not decrease, another order or variant.

    Reference: Zhao et al. 2023, arXiv:2302.04867, algorithms 1 and 2.
    """
    expect_int(order, "order", 1, 4)
    expect_choice(variant, "variant", ("bh1", "bh2"))
    builder = Builder(process, times)
    points = builder.points
    steps = len(points) - 1
    x, history, used = builder.start, list[Answer](), list[Answer]()
    for n in range(steps):
        s, t = points[n], points[n + 1]
        answer = builder.evaluate(x, s)
        x = answer.state
        if corrector and n > 0 and math.isfinite(used[0].point.log_snr):
            x = _correct(x, answer, used, variant)
        history = [answer, *history[: order - 1]]
        now = 1 if t.sigma == 0 else order
        if lower_order_final:
            now = min(now, steps - n)
        finite = [a for a in history if math.isfinite(a.point.log_snr)] or history[:1]
        used = finite[:now]
        weights = _predictor_weights(used, t, variant)
        x = (t.sigma / s.sigma) * x + t.alpha * total(weights, [a.data for a in used])
    label = f"unipc{order}_{variant}" if corrector else f"unip{order}_{variant}"
    return builder.finish(x, points[-1], name=label, source="arXiv:2302.04867, algorithm 1")


def _half_weight(h: float, variant: str) -> float:
    """alpha_t B / 2 per unit slope, where the authors fix the coefficient at 1/2."""
    return (h if variant == "bh1" else -math.expm1(-h)) / 2


def _predictor_weights(used: list[Answer], t: Point, variant: str) -> np.ndarray:
    present = used[0].point.log_snr
    h = t.log_snr - present
    if len(used) == 2:
        slope = _half_weight(h, variant) * h / (present - used[1].point.log_snr)
        return np.array([-math.expm1(-h) + slope, -slope])
    return exponential_weights([a.point.log_snr - present for a in used], h)


def _correct(x: Any, answer: Answer, used: list[Answer], variant: str) -> Any:
    """The state x at the answer's point, corrected for the step that led there."""
    t = answer.point
    present = used[0].point.log_snr
    h = t.log_snr - present
    predictor = _predictor_weights(used, t, variant)
    if len(used) == 1:
        half = _half_weight(h, variant)
        corrected = np.array([-math.expm1(-h) - half, half])
    else:
        nodes = [a.point.log_snr - present for a in used]
        corrected = exponential_weights([*nodes, h], h)
    change = corrected - np.append(predictor, 0.0)
    return x + t.alpha * total(change, [*(a.data for a in used), answer.data])
