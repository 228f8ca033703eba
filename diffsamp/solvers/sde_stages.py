"""Stochastic samplers of several stages a step: SEEDS, DPM++ SDE, DPM2-ancestral.

The reverse SDE over a log-SNR step h, with D frozen, is

    x_t = (sigma_t/sigma_s) exp(-h) x_s + alpha_t (1 - exp(-2 h)) D + sigma_t G(h),

where G is an Ornstein-Uhlenbeck path, G(h') = exp(-(h' - h)) G(h) + sqrt(1 - exp(-2 (h' - h))) z,
G(0) = 0. Stages inside the step follow one path, or (DPM++ SDE) draw anew.
"""

from __future__ import annotations

import itertools
import math

from diffsamp._core.checks import expect_choice, expect_int
from diffsamp._core.types import Times
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
from diffsamp.solvers._charts import Chart, runge_kutta_step
from diffsamp.solvers._weights import phis, spread
from diffsamp.tableau import Tableau

__all__ = ["dpm2_ancestral", "dpmpp_sde", "seeds"]


def seeds(
    process: Process,
    times: Times,
    *,
    order: int = 2,
    nodes: tuple[float, ...] | None = None,
    prediction: str = "data",
) -> Tableau:
    """SEEDS-1, 2 or 3: exponential methods of as many stages for the reverse SDE.

    The drift's rule is DPM-Solver++'s of that order at rate 2, or DPM-Solver's with twice the
    noise; the stages and the step share one noise path. SEEDS-1 of the data is DDPM's posterior.
    `order` evaluations a step, one on a step to sigma = 0.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times of the steps.
      order: 1, 2 or 3.
      nodes: where the stages lie, as fractions of the log-SNR step: order - 1 rising numbers in
        (0, 1). None: equally spaced.
      prediction: "data" or "noise", what is taken as constant over a stage; "noise" is of use with
        short steps only. A step that multiplies alpha by more than 200 takes the data form.

    Returns:
      A stochastic tableau.

    Raises:
      ValueError: times that do not decrease, another order, nodes of another number or range.

    Reference: Gonzalez et al. 2023, arXiv:2305.14267. The authors' code differs from it, and from
    this, in four places: noises for other `nodes` than 1/2; in SEEDS-3 of the data the weight of
    the second stage in the third (phi_23, taken at c_2 in place of c_3, and half its argument); in
    SEEDS-3 of the noise the third stage's noise, scaled with sigma of the step's end, and the
    step's, with the first two normals exchanged.
    """
    expect_int(order, "order", 1, 3)
    expect_choice(prediction, "prediction", ("data", "noise"))
    nodes = tuple(k / order for k in range(1, order)) if nodes is None else tuple(nodes)
    edges = (0.0, *nodes, 1.0)
    if len(nodes) != order - 1 or any(a >= b for a, b in itertools.pairwise(edges)):
        raise ValueError(
            f"`nodes` must be {order - 1} rising fractions between 0 and 1; got {nodes}."
        )
    name = f"seeds{order}" + ("" if prediction == "data" else "(noise)")
    return _staged(
        process, times, nodes, shared=True, name=name, source="arXiv:2305.14267", form=prediction
    )


def dpmpp_sde(process: Process, times: Times, *, stage: float = 0.5) -> Tableau:
    """DPM-Solver++ (SDE) of k-diffusion: two stages with independent noises; weak order 1.

    Two evaluations a step, one on a step to sigma = 0.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times of the steps.
      stage: where the stage lies, as a fraction of the log-SNR step, in (0, 1).

    Returns:
      A stochastic tableau.

    Raises:
      ValueError: times that do not decrease, a stage outside (0, 1).

    Reference: Lu et al. 2022, arXiv:2211.01095, as in k-diffusion's `sample_dpmpp_sde`, eta = 1.
    """
    if not 0 < stage < 1:
        raise ValueError(f"`stage` must lie in (0, 1); got {stage}.")
    return _staged(
        process, times, (stage,), shared=False, name="dpmpp_sde", source="arXiv:2211.01095"
    )


def dpm2_ancestral(process: Process, times: Times, *, eta: float = 1.0) -> Tableau:
    """DPM-2 with ancestral noise: the midpoint method down to rho_down, then noise up to rho_t.

    rho_up = min(rho_t, eta rho_t sqrt(1 - rho_t^2 / rho_s^2)), rho_down^2 = rho_t^2 - rho_up^2, and
    the midpoint at the geometric mean of rho_s and rho_down. Two evaluations a step, one on a step
    to sigma = 0. eta = 0 is `dpm2`.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times of the steps.
      eta: noise scale in [0, 1].

    Returns:
      A tableau, stochastic if `eta` is positive.

    Raises:
      ValueError: times that do not decrease, eta outside [0, 1].

    Reference: Lu et al. 2022, arXiv:2206.00927, as in k-diffusion's `sample_dpm_2_ancestral`.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"`eta` must lie in [0, 1]; got {eta}.")
    builder = Builder(process, times, NOISE)
    if eta:
        builder.expect_falling("dpm2_ancestral with eta > 0")
    x = builder.start
    for s, t in zip(builder.points, builder.points[1:], strict=False):
        first = builder.evaluate(x, s)
        if t.sigma == 0:
            x = transfer(first, t)
            continue
        if builder.is_long(s, t):
            if eta:
                x = _renew(builder, first, t)
            else:
                x = runge_kutta_step(builder, Chart("flow", builder), first, t, "midpoint2")
            continue
        ratio = math.exp(-2 * (t.log_snr - s.log_snr))
        up = eta * t.rho * math.sqrt(1 - ratio)
        down = t.rho * math.sqrt((1 - eta**2) + eta**2 * ratio)
        middle = builder.point_at(-(math.log(s.rho) + math.log(down)) / 2)
        second = builder.evaluate(transfer(first, middle), middle)
        x = (1 / s.alpha) * first.state + (down - s.rho) * second.noise
        x = t.alpha * (x + up * builder.fresh_noise() if up else x)
    name = f"dpm2_ancestral(eta={eta:g})"
    return builder.finish(x, builder.points[-1], name=name, source="arXiv:2206.00927")


def _staged(
    process: Process,
    times: Times,
    nodes: tuple[float, ...],
    *,
    shared: bool,
    name: str,
    source: str,
    form: str = "data",
) -> Tableau:
    builder = Builder(process, times, NOISE if form == "noise" else DATA)
    builder.expect_falling(name)
    x = builder.start
    for s, t in zip(builder.points, builder.points[1:], strict=False):
        first = builder.evaluate(x, s)
        if t.sigma == 0:
            x = transfer(first, t)
            continue
        if s.alpha == 0:
            x = _renew(builder, first, t, len(nodes))
            continue
        noisy = form == "noise" and not builder.is_long(s, t)
        h, said = t.log_snr - s.log_snr, [first.noise if noisy else first.data]
        noise, reached = Combination({}), 0.0  # the path G at the last stage
        for node in nodes:
            point = builder.point_at(s.log_snr + node * h)
            drift = _drift(first, point, node, nodes, h, said, noisy)
            noise = _onward(builder, noise, (node - reached) * h, noisy)
            answer = builder.evaluate(drift + point.sigma * noise, point)
            said.append(answer.noise if noisy else answer.data)
            # the same path, written with the stage's state: a fresh noise enters one row only
            noise, reached = (answer.state - drift) / point.sigma, node
        x = _drift(first, t, 1.0, nodes, h, said, noisy)
        if shared:
            noise = _onward(builder, noise, (1 - reached) * h, noisy)
        else:
            noise = spread(h) * builder.fresh_noise()
        x = x + t.sigma * noise
    # with the noise frozen, the variance of a step is right in the limit only
    check = "mean" if form == "noise" else "full"
    return builder.finish(x, builder.points[-1], name=name, source=source, check=check)


def _drift(
    first: Answer,
    to: Point,
    node: float,
    nodes: tuple[float, ...],
    h: float,
    said: list[Combination],
    noisy: bool,
) -> Combination:
    """The state at fraction `node` of the step, by DPM-Solver++'s rule at rate 2 or DPM-Solver's.

    The latter, `noisy`, with twice the noise: (alpha_t/alpha_s) x - 2 sigma_t (exp(h) - 1) E.
    """
    if noisy:
        phi_1, phi_2, _ = phis(-node * h)
        x, scale = (to.alpha / first.point.alpha) * first.state, 2 * to.sigma
    else:
        phi_1, phi_2, _ = phis(2 * node * h)
        x = (to.sigma / first.point.sigma) * math.exp(-node * h) * first.state
        scale = to.alpha
    if len(said) == 1:
        return x + scale * phi_1 * said[0]
    # the slope from the newest stage, over its distance in units of this stage's own step
    if len(nodes) == 1:
        slope = phi_1 / 2 / nodes[0]
    else:
        slope = phi_2 * node / nodes[len(said) - 2]
    return x + scale * total([phi_1 - slope, slope], [said[0], said[-1]])


def _onward(builder: Builder, noise: Combination, part: float, noisy: bool) -> Combination:
    """The path of the noise, in units of sigma, a fraction `part` of log-SNR later."""
    fresh = spread(part) * builder.fresh_noise()
    return math.exp(part) * (noise + fresh) if noisy else math.exp(-part) * noise + fresh


def _renew(builder: Builder, first: Answer, t: Point, stages: int = 1) -> Combination:
    """A step out of alpha = 0, infinite in log-SNR: full renewals at `stages` points on the way.

    They are equally spaced in sigma / (alpha + sigma).
    """
    answer, end = first, t.sigma / (t.alpha + t.sigma)
    for k in range(stages):
        v = 1 + (end - 1) * (k + 1) / (stages + 1)
        middle = builder.point_at(-math.log(v / (1 - v)))
        u = middle.alpha * answer.data + middle.sigma * builder.fresh_noise()
        answer = builder.evaluate(u, middle)
    return t.alpha * answer.data + t.sigma * builder.fresh_noise()
