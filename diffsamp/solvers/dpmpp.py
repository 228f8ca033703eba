"""DPM-Solver++ multistep: exponential integrators in log-SNR, in data prediction.

With h the coming log-SNR step, r_0 = h_{n-1} / h, r_1 = h_{n-2} / h, and
phi_1 = 1 - exp(-h), phi_2 = 1 - phi_1 / h, phi_3 = 1/2 - phi_2 / h (each positive, for this sign of
h), D0 = (D_n - D_{n-1}) / r_0, D1 = (D_{n-1} - D_{n-2}) / r_1:

    order 1           x' = (sigma'/sigma) x + alpha' phi_1 D_n
    order 2 midpoint  .. + alpha' phi_1 D0 / 2
    order 2 heun      .. + alpha' phi_2 D0
    order 3           .. + alpha' phi_2 (D0 + r_0 B) + alpha' phi_3 kappa B,
                      B = (D0 - D1) / (r_0 + r_1)
"""

from __future__ import annotations

import math
from typing import Any

from diffsamp._checks import expect_choice, expect_int
from diffsamp.processes import Process
from diffsamp.solvers._builder import Answer, Builder, total
from diffsamp.tableau import Tableau

__all__ = ["dpmpp"]


def dpmpp(
    process: Process,
    times: Any,
    *,
    order: int = 2,
    variant: str = "midpoint",
    lower_order_final: bool = True,
    compatible: bool = False,
) -> Tableau:
    """DPM-Solver++ of order 1, 2M or 3M: one evaluation a step.

    Order 1 is DDIM. 2M "midpoint" equals UniP-2 (bh2); 3M equals UniP-3. The first steps ramp the
    order up, so from a cold start a third-order run converges at order 2.

    The third-order correction carries a factor kappa = 2, since (D0 - D1) / (r_0 + r_1) estimates
    half the second derivative. The authors' code, diffusers and k-diffusion use kappa = 1, which
    is a method of order 2; `compatible` selects it, to reproduce their samples.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.
      order: 1, 2 or 3.
      variant: "midpoint" or "heun", the second-order formula.
      lower_order_final: lower the order over the last steps (3 to 2 to 1), which is more robust
        for few evaluations. A step to sigma = 0 is always of order 1.
      compatible: kappa = 1 in third-order steps.

    Returns:
      A deterministic tableau of n evaluations, in data prediction.

    Raises:
      ValueError: times that do not decrease, another order or variant.

    Reference: Lu et al. 2022, arXiv:2211.01095, algorithm 2 and appendix B.
    """
    expect_int(order, "order", 1, 3)
    expect_choice(variant, "variant", ("midpoint", "heun"))
    builder = Builder(process, times)
    points = builder.points
    steps = len(points) - 1
    x, history = builder.start, list[Answer]()
    for n in range(steps):
        s, t = points[n], points[n + 1]
        history = [builder.evaluate(x, s), *history[:2]]
        now = 1 if t.sigma == 0 else order
        if lower_order_final:
            now = min(now, steps - n)
        now = min(now, sum(math.isfinite(a.point.log_snr) for a in history) or 1)
        weights = _weights(history[:now], t.log_snr - s.log_snr, variant, 1 if compatible else 2)
        change = total(weights, [a.data for a in history[:now]])
        x = (t.sigma / s.sigma) * history[0].state + t.alpha * change
    label = f"dpmpp_{order}m" if order > 1 else "dpmpp_1"
    label += "_heun" if order == 2 and variant == "heun" else ""
    label += "_compatible" if order == 3 and compatible else ""
    return builder.finish(x, points[-1], name=label, source="arXiv:2211.01095, algorithm 2")


def _weights(history: list[Answer], h: float, variant: str, kappa: float) -> list[float]:
    """Weights of the data predictions, newest first, in the step over log-SNR h."""
    phi_1 = -math.expm1(-h)
    if len(history) == 1:
        return [phi_1]
    lam = [answer.point.log_snr for answer in history]
    r_0 = (lam[0] - lam[1]) / h
    phi_2 = _phi_2(h)
    if len(history) == 2:
        slope = phi_1 / 2 if variant == "midpoint" else phi_2
        return [phi_1 + slope / r_0, -slope / r_0]
    r_1 = (lam[1] - lam[2]) / h
    # D0 and D1 as weights on (D_n, D_{n-1}, D_{n-2})
    d_0 = (1 / r_0, -1 / r_0, 0.0)
    d_1 = (0.0, 1 / r_1, -1 / r_1)
    first, second = phi_2, kappa * _phi_3(h)
    weights = []
    for j in range(3):
        bend = d_0[j] - d_1[j]
        weights.append(
            (phi_1 if j == 0 else 0.0)
            + first * (d_0[j] + r_0 / (r_0 + r_1) * bend)
            + second * bend / (r_0 + r_1)
        )
    return weights


def _phi_2(h: float) -> float:
    """1 - (1 - exp(-h)) / h = h/2 - h^2/6 + ..; by its series where it would cancel."""
    if h < 0.5:
        return -math.fsum((-h) ** k / math.factorial(k + 1) for k in range(1, 16))
    return 1 + math.expm1(-h) / h


def _phi_3(h: float) -> float:
    """1/2 - phi_2 / h = h/6 - h^2/24 + ..; by its series where it would cancel."""
    if h < 0.5:
        return -math.fsum((-h) ** k / math.factorial(k + 2) for k in range(1, 16))
    return 0.5 - _phi_2(h) / h
