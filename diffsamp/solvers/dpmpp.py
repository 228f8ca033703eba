"""DPM-Solver++ multistep: exponential integrators in log-SNR, in data prediction.

With h the coming log-SNR step, r_0 = h_{n-1} / h, r_1 = h_{n-2} / h, H = (1 + eta) h,
phi_1 = 1 - exp(-H), phi_2 = 1 - phi_1 / H, phi_3 = 1/2 - phi_2 / H (each positive),
D0 = (D_n - D_{n-1}) / r_0, D1 = (D_{n-1} - D_{n-2}) / r_1:

    order 1           x' = (sigma'/sigma) exp(-eta h) x + alpha' phi_1 D_n
                           + sigma' sqrt(1 - exp(-2 eta h)) z
    order 2 midpoint  .. + alpha' phi_1 D0 / 2
    order 2 heun      .. + alpha' phi_2 D0
    order 3           .. + alpha' phi_2 (D0 + r_0 B) + alpha' phi_3 kappa B,
                      B = (D0 - D1) / (r_0 + r_1)
"""

from __future__ import annotations

import math

from diffsamp._core.checks import expect_choice, expect_int, lowers
from diffsamp._core.types import Times
from diffsamp.processes import Process
from diffsamp.solvers._builder import DATA, NOISE, Answer, Builder, Combination, total, transfer
from diffsamp.solvers._weights import phis, spread
from diffsamp.tableau import Tableau

__all__ = ["dpmpp", "multistep_weights"]


def dpmpp(
    process: Process,
    times: Times,
    *,
    order: int = 2,
    variant: str = "midpoint",
    eta: float = 0.0,
    lower_order_final: bool | int | str = True,
    compatible: bool = False,
    beta: float = 1.0,
    prediction: str = "data",
) -> Tableau:
    """DPM-Solver++ of order 1, 2M or 3M, and its SDE forms: one evaluation a step.

    With `prediction` "noise" it is DPM-Solver's multistep method, the same formulas on the noise
    prediction, where a step out of alpha = 0 or to sigma = 0 is DDIM's.

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
      eta: how much of the reverse SDE's noise, at least 0: 0 is the ODE, 1 SDE-DPM-Solver++ (whose
        order 1 is DDPM's posterior), between them as k-diffusion's `eta`. The drift keeps its
        order, the noise is of weak order 1.
      lower_order_final: lower the order over the last steps (3 to 2 to 1), which is more robust
        for few evaluations; a number: only if there are fewer steps than that (the authors' 10,
        diffusers' 15). "last": the last step alone, to 1, as DBIM does. A step to sigma = 0 is
        always of order 1.
      compatible: kappa = 1 in third-order steps.
      beta: heavy-ball momentum on steps of order 2, in (0, 1]; 1 is none. 0.8 to 0.9 is what its
        authors take (2M-HB, arXiv:2307.11118). They take D itself in steps of order 1, and begin
        the velocity with the first step of order 2, where `solvers.heavy_ball` has it run through
        all steps.
      prediction: "data", or "noise", which takes no eta.

    Returns:
      A tableau of n evaluations, in that prediction; stochastic if `eta` is positive.

    Raises:
      ValueError: times not sorted, another order or variant, a negative eta, a beta out of range
        or with another order.

    Reference: Lu et al. 2022, arXiv:2211.01095, algorithm 2.
    """
    expect_int(order, "order", 1, 3)
    if not eta >= 0:
        raise ValueError(f"`eta` must not be negative; got {eta}.")
    expect_choice(variant, "variant", ("midpoint", "heun"))
    if not 0 < beta <= 1 or (beta < 1 and (order != 2 or eta > 0)):
        raise ValueError(
            "`beta` must lie in (0, 1], and below 1 it needs order=2 and eta=0; got beta = "
            f"{beta}, order = {order}, eta = {eta}."
        )
    if isinstance(lower_order_final, str):
        expect_choice(lower_order_final, "lower_order_final", ("last",))
    noisy = expect_choice(prediction, "prediction", ("data", "noise")) == "noise"
    if noisy and eta > 0:
        raise ValueError('prediction="noise" is of the ODE alone; leave `eta` at 0.')
    builder = Builder(process, times, NOISE if noisy else DATA)
    if eta > 0:
        builder.expect_falling("dpmpp with eta > 0")
    points = builder.points
    steps = len(points) - 1
    x, history = builder.start, list[Answer]()
    velocity: Combination | None = None
    for n in range(steps):
        s, t = points[n], points[n + 1]
        history = [builder.evaluate(x, s), *history[:2]]
        now = 1 if t.sigma == 0 else order
        if isinstance(lower_order_final, str):
            now = now if n < steps - 1 else 1
        elif lowers(lower_order_final, steps):
            now = min(now, steps - n)
        now = min(now, sum(math.isfinite(a.point.log_snr) for a in history) or 1)
        if noisy and (t.sigma == 0 or s.alpha == 0):
            x = transfer(history[0], t)
            continue
        h = t.log_snr - s.log_snr
        rate = -1.0 if noisy else 1 + eta
        weights = multistep_weights(history[:now], h, variant, 1 if compatible else 2, rate)
        kept = math.exp(-eta * h) if eta > 0 else 1.0
        ratio = t.alpha / s.alpha if noisy else t.sigma / s.sigma * kept
        x = ratio * history[0].state
        change = total(weights, [a.noise if noisy else a.data for a in history[:now]])
        if beta < 1 and now == 2:
            direction = change / sum(weights)
            before = direction if velocity is None else velocity
            velocity = (1 - beta) * before + beta * direction
            change = sum(weights) * velocity
        x = x + (t.sigma if noisy else t.alpha) * change
        if eta > 0 and t.sigma > 0:
            x = x + t.sigma * spread(eta * h) * builder.fresh_noise()
    family = "dpm_solver" if noisy else "dpmpp"
    label = f"{family}_{order}m" if order > 1 else f"{family}_1"
    label += "" if eta == 0 else "_sde" if eta == 1 else f"_sde(eta={eta:g})"
    label += "_heun" if order == 2 and variant == "heun" else ""
    label += f"_hb({beta:g})" if beta < 1 else ""
    label += "_compatible" if order == 3 and compatible else ""
    return builder.finish(x, points[-1], name=label, source="arXiv:2211.01095, algorithm 2")


def multistep_weights(
    history: list[Answer], h: float, variant: str = "midpoint", kappa: float = 2, rate: float = 1
) -> list[float]:
    """Weights of the data predictions in a step of the multistep method, divided by alpha_t.

    Args:
      history: one to three answers, newest first, at the step's start and before.
      h: the step in log-SNR, nats.
      variant: "midpoint" or "heun", the second-order formula.
      kappa: factor of the third-order correction.
      rate: of the exponential; 1 is the ODE, -1 the ODE in noise form, divided by sigma_t.

    Returns:
      As many numbers as answers.
    """
    phi_1, phi_2, phi_3 = phis(rate * h)
    if len(history) == 1:
        return [phi_1]
    lam = [answer.point.log_snr for answer in history]
    r_0 = (lam[0] - lam[1]) / h
    if len(history) == 2:
        slope = phi_1 / 2 if variant == "midpoint" else phi_2
        return [phi_1 + slope / r_0, -slope / r_0]
    r_1 = (lam[1] - lam[2]) / h
    # D0 and D1 as weights on (D_n, D_{n-1}, D_{n-2})
    d_0 = (1 / r_0, -1 / r_0, 0.0)
    d_1 = (0.0, 1 / r_1, -1 / r_1)
    weights = []
    for j in range(3):
        bend = (d_0[j] - d_1[j]) / (r_0 + r_1)
        first = phi_1 if j == 0 else 0.0
        weights.append(first + phi_2 * (d_0[j] + r_0 * bend) + kappa * phi_3 * bend)
    return weights
