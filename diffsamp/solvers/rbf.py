"""RBF-Solver: answers interpolated by Gaussian bumps of a fitted width instead of a polynomial."""

from __future__ import annotations

import math

import numpy as np

from diffsamp._core.checks import expect_int, expect_times, lowers
from diffsamp._core.types import Array, Times
from diffsamp.processes import Process
from diffsamp.solvers._builder import Answer, Builder, total
from diffsamp.solvers._weights import exponential_weights
from diffsamp.tableau import Tableau

__all__ = ["rbf_solver"]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)
# The equations of wider bumps are so close to singular that rounding shows (1e-8 at 3, 1e-3 at 5).
_WIDEST = 3.0


def rbf_solver(
    process: Process,
    times: Times,
    *,
    shapes: Array,
    order: int = 3,
    corrector: bool = True,
    lower_order_final: bool | int = True,
) -> Tableau:
    """RBF-Solver: the data prediction through the last answers by Gaussians in log-SNR.

    Over a step of log-SNR length h the interpolant is sum_j w_j exp(-((u - u_j) / (e^s h))^2) + w,
    the w_j summing to 0, integrated against exp(-(h - u)). A constant is exact, so each row is
    consistent; s = inf, the flat limit, is the polynomial: `abnorsett`, with the corrector UniPC
    ("vary"). For any other s the method is of order 1, with a small constant: its worth lies in s
    fitted to a network, one number a step for the predictor and one for the corrector.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.
      shapes: s, the authors' log shapes, which they search from -2 to 2: (n, 2), by step, for its
        predictor and its corrector, or what broadcasts to that: at most 3, or inf, the polynomial,
        which their code takes in place of 2.
      order: answers that the predictor interpolates, at least 1; the corrector's are one more.
      corrector: correct each state with the answer that was made there.
      lower_order_final: lower the order over the last steps; a number: only if there are fewer
        steps than that. A step to sigma = 0 is of order 1.

    Returns:
      A deterministic tableau of n evaluations, in data prediction.

    Raises:
      ValueError: times not sorted, shapes of another shape, not numbers, or wide but not inf.

    Reference: Park, Lee, Yoon et al. 2026, arXiv:2603.13330.
    """
    expect_int(order, "order", at_least=1)
    times = expect_times(times, may_rise=True)
    steps = len(times) - 1
    try:
        numbers = np.broadcast_to(np.asarray(shapes, np.float64), (steps, 2))
    except ValueError:
        numbers = np.full(1, np.nan)
    if not np.all(np.isposinf(numbers) | (np.isfinite(numbers) & (numbers <= _WIDEST))):
        raise ValueError(
            f"`shapes` must broadcast to {(steps, 2)}, by step for predictor and corrector, "
            f"each at most {_WIDEST:g} or inf; got {shapes}."
        )
    builder = Builder(process, times)
    points = builder.points
    x, history, used = builder.start, list[Answer](), list[Answer]()
    for n in range(steps):
        s, t = points[n], points[n + 1]
        answer = builder.evaluate(x, s)
        x = answer.state
        if corrector and n > 0 and math.isfinite(used[0].point.log_snr):
            x = _corrected(answer, used, numbers[n - 1])
        history = [answer, *history[: order - 1]]
        now = 1 if t.sigma == 0 else order
        if lowers(lower_order_final, steps):
            now = min(now, steps - n)
        used = ([a for a in history if math.isfinite(a.point.log_snr)] or history[:1])[:now]
        present = used[0].point.log_snr
        weights = _weights(_nodes(used, present), t.log_snr - present, numbers[n, 0])
        x = (t.sigma / s.sigma) * x + t.alpha * total(weights, [a.data for a in used])
    name = f"rbf_solver{order}"
    return builder.finish(x, points[-1], name=name, source="arXiv:2603.13330")


def _nodes(answers: list[Answer], present: float) -> list[float]:
    return [a.point.log_snr - present for a in answers]


def _corrected(answer: Answer, used: list[Answer], shapes: Array) -> Array:
    """The state of the answer, with that answer in the step that led there."""
    present, t = used[0].point.log_snr, answer.point
    h = t.log_snr - present
    before = _weights(_nodes(used, present), h, shapes[0])
    change = _weights([*_nodes(used, present), h], h, shapes[1]) - np.append(before, 0.0)
    return answer.state + t.alpha * total(change, [a.data for a in [*used, answer]])


def _weights(nodes: list[float], h: float, shape: float) -> np.ndarray:
    """int_0^h exp(-(h - u)) of the interpolant that is 1 at one node and 0 at the others."""
    if len(nodes) == 1 or math.isinf(shape):
        return exponential_weights(nodes, h)
    width, centres = math.exp(shape) * abs(h), np.array(nodes)

    def bumps(u: np.ndarray) -> np.ndarray:
        return np.exp(-(((u[:, None] - centres) / width) ** 2))

    u = h * (_NODES + 1) / 2
    integral = (h / 2 * _WEIGHTS * np.exp(-(h - u))) @ bumps(u)
    size = len(nodes)
    equations = np.ones((size + 1, size + 1))
    equations[:size, :size] = bumps(centres)
    equations[size, size] = 0.0
    return np.linalg.solve(equations, np.append(integral, -math.expm1(-h)))[:size]
