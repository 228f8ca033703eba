"""DPM-Solver and DPM-Solver++ in their single-step form, and exponential Runge-Kutta (RES).

With P the prediction the form uses, D (or E), k = alpha_t (or sigma_t), ratio = sigma_t / sigma_s
(or alpha_t / alpha_s), H = h (or -h) and phi_k as in `_weights.phis`, a step from s to t is

    x_t = ratio x_s + k [phi_1(H) P_s + phi_2(H) h P' + phi_3(H) h^2 P'' + ..]

with the derivatives estimated from stages inside the step. The two forms are mirror images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from diffsamp._core.checks import expect_choice, expect_int
from diffsamp._core.types import Array, Times
from diffsamp.processes import Process
from diffsamp.schedules.stages import expect_orders, step_orders
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
from diffsamp.solvers._charts import Chart, runge_kutta_step
from diffsamp.solvers._weights import phis
from diffsamp.tableau import Tableau

__all__ = ["dpm_solver", "exponential_rk"]


@dataclasses.dataclass(frozen=True)
class _Form:
    """Data or noise form of an exponential integrator in log-SNR."""

    prediction: str

    def of(self, answer: Answer) -> Combination:
        return answer.data if self.prediction == "data" else answer.noise

    def step(
        self, start: Answer, to: Point, weights: Array, parts: list[Combination]
    ) -> Combination:
        """ratio x + k sum_j weights[j] parts[j], from the start's state."""
        s = start.point
        if self.prediction == "data":
            return (to.sigma / s.sigma) * start.state + to.alpha * total(weights, parts)
        return (to.alpha / s.alpha) * start.state + to.sigma * total(weights, parts)

    def phis(self, h: float) -> tuple[float, float, float]:
        return phis(h if self.prediction == "data" else -h)


def dpm_solver(
    process: Process,
    times: Times,
    *,
    order: int = 3,
    orders: Sequence[int] | None = None,
    prediction: str = "noise",
    variant: str = "dpmsolver",
) -> Tableau:
    """DPM-Solver (noise) or DPM-Solver++ (data), single-step: 2S, 3S.

    The times are those of *all* evaluations: consecutive intervals are grouped into steps of the
    order's number of stages, whose inner times are where the stages lie. So any n evaluations are
    met exactly, with the authors' rule for the orders of the steps (`step_orders`), and user times
    are used verbatim. Order 1 is DDIM. Orders 2 and 3 converge as named. The authors' own times in
    log-SNR, which make all steps equally long whatever their order, are `schedules.dpm_fast`.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times of the n evaluations and of the sample.
      order: 1, 2 or 3.
      orders: the orders of the steps, one after another, in place of the rule; they must add up to
        n ([3, 3, 3] is the authors' "singlestep_fixed" of 9 evaluations). A step to sigma = 0 or
        from alpha = 0 is of order 1.
      prediction: "noise" is DPM-Solver, "data" DPM-Solver++. From alpha = 0 the first step is of
        order 1, where the noise form is infinite.
      variant: "dpmsolver" or "taylor", how the second-order term is weighted.

    Returns:
      A deterministic tableau of n evaluations.

    Raises:
      ValueError: times not sorted, another order, form or variant, `orders` that do not fit.

    Reference: Lu et al. 2022, arXiv:2206.00927, algorithms 1 and 2; arXiv:2211.01095, algorithm 1.
    """
    expect_int(order, "order", 1, 3)
    expect_choice(prediction, "prediction", ("data", "noise"))
    expect_choice(variant, "variant", ("dpmsolver", "taylor"))
    form = _Form(prediction)
    builder = Builder(process, times, DATA if prediction == "data" else NOISE)
    points = builder.points
    n = len(points) - 1
    # a step out of alpha = 0 has infinite length in log-SNR, like a step to sigma = 0
    long = points[0].alpha == 0 or (
        prediction == "noise" and orders is None and builder.is_long(*points[:2])
    )
    ahead = 1 if long else 0
    closed = points[-1].sigma == 0
    if orders is None:
        orders = [1] * ahead
        if n > ahead:
            orders += step_orders(n - ahead, order, closed=closed)
        name = f"{order}s"
    else:
        orders = expect_orders(orders, n)
        name = "s({})".format(",".join(map(str, orders)))
        if (ahead and orders[0] != 1) or (closed and orders[-1] != 1):
            where = "first" if ahead and orders[0] != 1 else "last"
            raise ValueError(
                f"the {where} of `orders` must be 1 here: a step "
                f"{'from alpha = 0' if where == 'first' else 'to sigma = 0'} is infinitely long in "
                f"log-SNR; got {orders}."
            )
    x, at = builder.start, 0
    for stages in orders:
        inner, t = points[at : at + stages], points[at + stages]
        at += stages
        start = builder.evaluate(x, inner[0])
        if stages == 1:
            x = transfer(start, t)
            continue
        # a step too long for noise form is made in data form, of the same order
        own = _Form("data") if prediction == "noise" and builder.is_long(inner[0], t) else form
        x = _step(builder, own, start, inner[1:], t, variant)
    name = f"dpm_solver{'++' if prediction == 'data' else ''}_{name}"
    return builder.finish(x, points[-1], name=name, source="arXiv:2206.00927, algorithms 1, 2")


def _step(
    builder: Builder, form: _Form, start: Answer, inner: list[Point], t: Point, variant: str
) -> Combination:
    """One step of order 2 or 3, with its stages at `inner`."""
    first = form.of(start)
    h = t.log_snr - start.point.log_snr
    r = [(p.log_snr - start.point.log_snr) / h for p in inner]
    second = form.of(builder.evaluate(transfer(start, inner[0]), inner[0]))
    phi_1, phi_2, phi_3 = form.phis(h)
    if len(inner) == 1:
        slope = (phi_1 / 2 if variant == "dpmsolver" else phi_2) / r[0]
        return form.step(start, t, [phi_1 - slope, slope], [first, second])
    stage_1, stage_2, _ = form.phis(r[1] * h)
    bent = r[1] / r[0] * stage_2
    u_2 = form.step(start, inner[1], [stage_1 - bent, bent], [first, second])
    third = form.of(builder.evaluate(u_2, inner[1]))
    if variant == "dpmsolver":
        slope = phi_2 / r[1]
        return form.step(start, t, [phi_1 - slope, slope], [first, third])
    # both derivatives from the two stages: slopes d_i = (P_i - P_s) / r_i
    on_second = np.array([r[1] / (r[1] - r[0]), -2 / (r[1] - r[0])]) / r[0]
    on_third = np.array([-r[0] / (r[1] - r[0]), 2 / (r[1] - r[0])]) / r[1]
    w_2, w_3 = on_second @ [phi_2, phi_3], on_third @ [phi_2, phi_3]
    return form.step(start, t, [phi_1 - w_2 - w_3, w_2, w_3], [first, second, third])


def exponential_rk(
    process: Process, times: Times, *, stages: int = 3, c_2: float = 0.5, c_3: float = 1.0
) -> Tableau:
    """RES: exponential Runge-Kutta methods that meet the stiff order conditions.

    In log-SNR and data prediction, with H_i = c_i h and phi_1(H) = 1 - exp(-H), phi_2 = 1 -
    phi_1 / H (the step's length multiplied in), two stages are order 2,

        u_2 = .. + alpha_2 phi_1(H_2) D_1,     weights (phi_1 - phi_2 / c_2, phi_2 / c_2),

    and three are order 3: with g = (3 c_3^2 - 2 c_3) / (c_2 (2 - 3 c_2)),

        u_3 = .. + alpha_3 [(phi_1(H_3) - e) D_1 + e D_2],  e = g phi_2(H_2) + (c_3/c_2) phi_2(H_3),
        weights (phi_1 - (1 + g) w, g w, w),                w = phi_2 / (g c_2 + c_3).

    Two stages with c_2 = 1/2 are DPM-Solver++ 2S ("taylor"). A step to sigma = 0 takes one
    evaluation; one from alpha = 0, of infinite length in log-SNR, is a classical Runge-Kutta step
    in flow coordinates with as many.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times of the steps.
      stages: 2 or 3.
      c_2: where the second stage lies, as a fraction of the log-SNR step, in (0, 1], not 2/3 for
        three stages.
      c_3: where the third lies, in (0, 1].

    Returns:
      A deterministic tableau of `stages` evaluations a step, in data prediction.

    Raises:
      ValueError: times not sorted, another number of stages, a fraction out of range.

    Reference: Zhang et al. 2023 (RES), arXiv:2308.02157; Hochbruck & Ostermann 2005, SIAM J. Numer.
    Anal. 43, the methods of orders 2 and 3.
    """
    expect_int(stages, "stages", 2, 3)
    fractions = [c_2] if stages == 2 else [c_2, c_3]
    if not all(0 < c <= 1 for c in fractions) or (stages == 3 and abs(c_2 - 2 / 3) < 1e-9):
        raise ValueError(
            "`c_2` and `c_3` must lie in (0, 1], `c_2` not at 2/3 if there are three stages; got "
            f"{fractions}."
        )
    form = _Form("data")
    builder = Builder(process, times)
    x = builder.start
    for s, t in zip(builder.points, builder.points[1:], strict=False):
        start = builder.evaluate(x, s)
        if t.sigma == 0:
            x = transfer(start, t)
            continue
        if s.alpha == 0:
            method = "midpoint2" if stages == 2 else "kutta3"
            x = runge_kutta_step(builder, Chart("flow", builder), start, t, method)
            continue
        h = t.log_snr - s.log_snr
        inner = [t if c == 1 else builder.point_at(s.log_snr + c * h) for c in fractions]
        phi_1, phi_2, _ = phis(h)
        first, second = start.data, builder.evaluate(transfer(start, inner[0]), inner[0]).data
        if stages == 2:
            x = form.step(start, t, [phi_1 - phi_2 / c_2, phi_2 / c_2], [first, second])
            continue
        g = (3 * c_3**2 - 2 * c_3) / (c_2 * (2 - 3 * c_2))
        stage_1, stage_2, _ = phis(c_3 * h)
        bent = g * phis(c_2 * h)[1] + c_3 / c_2 * stage_2
        u_3 = form.step(start, inner[1], [stage_1 - bent, bent], [first, second])
        third = builder.evaluate(u_3, inner[1]).data
        w = phi_2 / (g * c_2 + c_3)
        x = form.step(start, t, [phi_1 - (1 + g) * w, g * w, w], [first, second, third])
    name = f"res_{stages}s"
    return builder.finish(x, builder.points[-1], name=name, source="arXiv:2308.02157")
