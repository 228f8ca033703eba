"""Dual-Solver: predictor-correctors whose prediction, variable and residual are numbers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from diffsamp._core.checks import expect_int, expect_times, lowers
from diffsamp._core.types import Array, Times
from diffsamp.processes import Process
from diffsamp.solvers._builder import (
    DATA,
    NOISE,
    Answer,
    Builder,
    Combination,
    Point,
    transfer,
)
from diffsamp.tableau import Tableau

__all__ = ["dual_solver"]


def dual_solver(
    process: Process,
    times: Times,
    *,
    gamma: Array = 0.5,
    tau: Array = 1.0,
    kappa: Array = 0.0,
    order: int = 2,
    corrector: bool = True,
    lower_order_final: bool | int = True,
) -> Tableau:
    """Dual-Solver: data and noise predictions at once, in a variable of choice for each.

    With N = sigma^gamma (gamma >= 0) or alpha^-gamma, y = alpha / N and w = sigma / N, the ODE is
    d(x / N) = D dy + E dw exactly. A step of the predictor of order 2, for D (and the same for E),

        D_n Dy + (1/2) (D_n - D_{n-1}) / r (Dy + kappa DL^2),     L = tau log y + (1 - tau) y,

    with Dy and DL the changes over the step and r that of L over the step before by this one's. The
    corrector has D_{n+1} - D_n for (D_n - D_{n-1}) / r. Any numbers give a method of order 2 (with
    order=1 the corrector makes it 2). Known ones, uncorrected: gamma = 1, tau = 1 DPM-Solver++ 2M;
    -1, 1 DPM-Solver's in noise form; -1, 0 deis of order 1 in rho; on the flow process 0, 0 is
    Adams-Bashforth in t. The authors learn ten numbers a step with a classifier for a loss. Of
    those that are the same in all steps 0, 0 (corrected) does best on variance-preserving and flow
    processes; where alpha is constant that is noise form, and the default is the safe choice.

    A first step is of order 1, and so is one to sigma = 0, or from alpha = 0, or after that.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.
      gamma: what is integrated, -1 the noise, 0 the velocity, 1 the data, and between: a number,
        or what broadcasts to (n, 2), by step, for its predictor and its corrector.
      tau: from 0 to 1, the variable in which an answer is taken as linear: broadcasts to (n, 2, 2),
        the last axis for D and E.
      kappa: of the residual: as `tau`, any size.
      order: of the predictor, 1 or 2.
      corrector: correct each state with the answer that was made there.
      lower_order_final: order 1 in the last step; a number: only if there are fewer steps than
        that.

    Returns:
      A deterministic tableau of n evaluations.

    Raises:
      ValueError: times not sorted, numbers out of range or of another shape, another order.

    Reference: Park & Lee 2026, arXiv:2603.03973.
    """
    expect_int(order, "order", 1, 2)
    times = expect_times(times, may_rise=True)
    steps = len(times) - 1
    gammas = _numbers(gamma, "gamma", (steps, 2), -1.0, 1.0)
    taus = _numbers(tau, "tau", (steps, 2, 2), 0.0, 1.0)
    kappas = _numbers(kappa, "kappa", (steps, 2, 2), -math.inf, math.inf)
    # a form near the noise is written in noise predictions, whose rounding the builder knows of
    builder = Builder(process, times, NOISE if gammas.max() < 0 else DATA)
    points = builder.points
    x, last, moved = builder.start, list[Answer](), Combination({})
    for n in range(steps):
        s, t = points[n], points[n + 1]
        answer = builder.evaluate(x, s)
        x = answer.state
        if corrector and n > 0 and last[0].point.alpha > 0:
            before = _Form(gammas[n - 1, 0], taus[n - 1, 0], kappas[n - 1, 0])
            form = _Form(gammas[n - 1, 1], taus[n - 1, 1], kappas[n - 1, 1])
            start = before.back(x, moved, last[0].point, s)
            x = form.forth(start, form.corrected(last[0], answer), last[0].point, s)
        last = [answer, *last[:1]]
        if t.sigma == 0:
            x = t.alpha * answer.data
        elif s.alpha == 0:
            x = transfer(answer, t)
        else:
            form = _Form(gammas[n, 0], taus[n, 0], kappas[n, 0])
            final = lowers(lower_order_final, steps) and n == steps - 1
            two = order == 2 and not final and len(last) == 2 and last[1].point.alpha > 0
            moved = form.predicted(last if two else last[:1], t)
            x = form.forth(x, moved, s, t)
    return builder.finish(x, points[-1], name="dual_solver", source="arXiv:2603.03973")


def _numbers(value: Array, name: str, shape: tuple[int, ...], low: float, high: float) -> Array:
    """`value` broadcast to `shape`, all of it finite and within bounds."""
    try:
        numbers = np.broadcast_to(np.asarray(value, np.float64), shape)
    except ValueError:
        raise ValueError(
            f"`{name}` must broadcast to {shape}; got shape {np.shape(value)}."
        ) from None
    if not np.all(np.isfinite(numbers) & (low <= numbers) & (numbers <= high)):
        bounds = "" if math.isinf(low) else f" from {low:g} to {high:g}"
        raise ValueError(f"`{name}` must be finite numbers{bounds}; got {value}.")
    return numbers


@dataclasses.dataclass(frozen=True)
class _Form:
    """The numbers of one step: gamma, and tau and kappa for (D, E)."""

    gamma: float
    tau: Array
    kappa: Array

    def scale(self, point: Point) -> float:
        """N: what the state is divided by."""
        return point.sigma**self.gamma if self.gamma >= 0 else point.alpha**-self.gamma

    def forth(self, x: Combination, moved: Combination, s: Point, t: Point) -> Combination:
        """The state at t from x at s, and the change of x / N."""
        return self.scale(t) * (x / self.scale(s) + moved)

    def back(self, x: Combination, moved: Combination, s: Point, t: Point) -> Combination:
        """The state at s from x at t: the inverse of `forth`."""
        return self.scale(s) * (x / self.scale(t) - moved)

    def _variables(self, point: Point) -> np.ndarray:
        """(2, 2): y and L, each for D and E."""
        logs = np.log([point.alpha, point.sigma]) - math.log(self.scale(point))
        y = np.exp(logs)
        return np.array([y, self.tau * logs + (1 - self.tau) * y])

    def predicted(self, last: list[Answer], t: Point) -> Combination:
        """The change of x / N from the newest answer's point to t, by one or two answers."""
        now = self._variables(last[0].point)
        change, in_l = self._variables(t) - now
        moved = change[0] * last[0].data + change[1] * last[0].noise
        if len(last) == 2:
            earlier = (now - self._variables(last[1].point))[1]
            # a side that is the same everywhere (data form's w = 1) has nothing to extrapolate
            ratio = np.divide(in_l, earlier, out=np.zeros(2), where=earlier != 0)
            residual = (change + self.kappa * in_l**2) * ratio / 2
            moved = moved + residual[0] * (last[0].data - last[1].data)
            moved = moved + residual[1] * (last[0].noise - last[1].noise)
        return moved

    def corrected(self, last: Answer, answer: Answer) -> Combination:
        """The change of x / N between two answers, by both."""
        change, in_l = self._variables(answer.point) - self._variables(last.point)
        half = (change + self.kappa * in_l**2) / 2
        moved = (change[0] - half[0]) * last.data + (change[1] - half[1]) * last.noise
        return moved + half[0] * answer.data + half[1] * answer.noise
