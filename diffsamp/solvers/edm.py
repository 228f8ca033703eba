"""Runge-Kutta methods in the coordinates of `_charts`, with EDM's churn: Euler, Heun and others."""

from __future__ import annotations

import math

from diffsamp._core.checks import expect_choice
from diffsamp._core.types import Times
from diffsamp.processes import Flow, Process
from diffsamp.solvers._builder import (
    NOISE,
    Builder,
    transfer,
)
from diffsamp.solvers._charts import BUTCHER, Chart, runge_kutta_step
from diffsamp.solvers._churn import Churn
from diffsamp.tableau import Tableau

__all__ = ["dpm2", "euler", "heun", "runge_kutta"]


def euler(
    process: Process,
    times: Times,
    *,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    noise_scale: float = 1.0,
) -> Tableau:
    """Euler's method, with EDM's churn (algorithm 2 without its second-order correction).

    Order 1, one evaluation a step. Without churn it equals DDIM. Before each evaluation at a level
    rho = sigma / alpha in [churn_min, churn_max], noise is added up to rho (1 + gamma), gamma =
    min(churn / n, sqrt(2) - 1), n the number of steps.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.
      churn: EDM's S_churn, at least 0; 0 is deterministic.
      churn_min: EDM's S_min, a value of sigma / alpha.
      churn_max: EDM's S_max. A level near t_max is raised above t_max, as in EDM's code; processes
        that are a table have none higher than their last.
      noise_scale: EDM's S_noise, the standard deviation of the added noise.

    Returns:
      A tableau of n evaluations, in noise prediction.

    Raises:
      ValueError: times not sorted, negative churn.

    Reference: Karras et al. 2022, arXiv:2206.00364, algorithm 2.
    """
    churning = Churn(churn, churn_min, churn_max, noise_scale)
    builder = Builder(process, times, NOISE)
    x = builder.start
    for s, t in zip(builder.points, builder.points[1:], strict=False):
        x, s = churning.lift(builder, x, s)
        x = transfer(builder.evaluate(x, s), t)
    return builder.finish(
        x,
        builder.points[-1],
        name=churning.label("euler"),
        source="arXiv:2206.00364, algorithm 2",
        check=churning.check,
    )


def heun(
    process: Process,
    times: Times,
    *,
    coordinates: str | None = None,
    clean_end: str | None = None,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    noise_scale: float = 1.0,
) -> Tableau:
    """Heun's method (EDM): order 2, two evaluations a step.

    A step to sigma = 0 takes one (`clean_end`): n steps then cost 2 n - 1 evaluations when the
    times end at the clean end, else 2 n. In "edm" coordinates it equals the rho-2Heun method of
    DEIS; for flow models the "flow" ones are usual.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.
      coordinates: "edm", "flow", or "time": the process's own time, without its linear part taken
        out, as the VP sampler that EDM compares with; its step to sigma = 0 is Euler's in t.
        None: "flow" for the flow process and for times that start at alpha = 0, else "edm".
      clean_end: the step to sigma = 0. "euler": one evaluation, at its start, as EDM's. "full": all
        stages, the last at t = 0, which keeps the order; for a velocity network on the flow
        process, which is defined there (one of data or noise says nothing of the velocity at sigma
        = 0, and is refused where it is sampled). None: "full" on the flow process, else "euler".
      churn: EDM's S_churn, at least 0; 0 is deterministic.
      churn_min: EDM's S_min, a value of sigma / alpha.
      churn_max: EDM's S_max. A level near t_max is raised above t_max, as in EDM's code; processes
        that are a table have none higher than their last.
      noise_scale: EDM's S_noise, the standard deviation of the added noise.

    Returns:
      A tableau of one row per evaluation; deterministic unless `churn` is positive.

    Raises:
      ValueError: times not sorted, negative churn, or "edm" coordinates from a time
        where alpha = 0.

    Reference: Karras et al. 2022, arXiv:2206.00364, algorithms 1 and 2.
    """
    churning = Churn(churn, churn_min, churn_max, noise_scale)
    return _runge_kutta(
        process,
        times,
        "heun2",
        coordinates,
        clean_end,
        churning,
        "heun",
        "arXiv:2206.00364, algorithm 1",
    )


def runge_kutta(
    process: Process,
    times: Times,
    *,
    method: str = "rk4",
    coordinates: str | None = None,
    clean_end: str | None = None,
) -> Tableau:
    """Explicit Runge-Kutta methods on the ODE without its linear part: DEIS's rhoRK.

    One row per stage: n steps of s stages cost s n evaluations, or s (n - 1) + 1 where the step to
    sigma = 0 takes one (`clean_end`).

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times of the steps; stages lie between them.
      method: "heun2", "midpoint2", "ralston2" (order 2), "kutta3", "heun3", "ralston3", "ssprk3"
        (order 3) or "rk4" (order 4).
      coordinates: as for `heun`.
      clean_end: as for `heun`.

    Returns:
      A deterministic tableau.

    Raises:
      ValueError: times not sorted, an unknown method, or "edm" coordinates from a time
        where alpha = 0.

    Reference: Zhang & Chen 2023, arXiv:2204.13902.
    """
    expect_choice(method, "method", tuple(BUTCHER))
    still = Churn(0.0, 0.0, math.inf, 1.0)
    return _runge_kutta(
        process,
        times,
        method,
        coordinates,
        clean_end,
        still,
        f"rho_{method}",
        "arXiv:2204.13902",
    )


def dpm2(process: Process, times: Times) -> Tableau:
    """k-diffusion's DPM-2: the midpoint method with its midpoint at the geometric mean of rho.

    Order 2, two evaluations a step, one on a step to sigma = 0. From alpha = 0, where that mean is
    infinite, the midpoint of the first step is taken in flow coordinates.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times of the steps.

    Returns:
      A deterministic tableau.

    Raises:
      ValueError: times not sorted.

    Reference: Lu et al. 2022, arXiv:2206.00927; Karras et al. 2022, arXiv:2206.00364.
    """
    builder = Builder(process, times, NOISE)
    edm = Chart("edm", builder)
    x = builder.start
    for s, t in zip(builder.points, builder.points[1:], strict=False):
        first = builder.evaluate(x, s)
        if t.sigma == 0:
            x = transfer(first, t)
        elif builder.is_long(s, t):
            x = runge_kutta_step(builder, Chart("flow", builder), first, t, "midpoint2")
        else:
            middle = builder.point_at((s.log_snr + t.log_snr) / 2)
            second = builder.evaluate(transfer(first, middle), middle)
            x = edm.step(first.state, edm.slope(second), s, t)
    return builder.finish(x, builder.points[-1], name="dpm2", source="arXiv:2206.00364")


def _runge_kutta(
    process: Process,
    times: Times,
    method: str,
    coordinates: str | None,
    clean_end: str | None,
    churning: Churn,
    name: str,
    source: str,
) -> Tableau:
    builder = Builder(process, times)
    chart = Chart.choose(builder, coordinates)
    full = _expect_clean_end(clean_end, process, chart) == "full"
    x = builder.start
    for s, t in zip(builder.points, builder.points[1:], strict=False):
        x, s = churning.lift(builder, x, s)
        first = builder.evaluate(x, s)
        if t.sigma == 0 and not full:
            timed = chart.name == "time"
            x = chart.step(first.state, chart.slope(first), s, t) if timed else transfer(first, t)
            continue
        x = runge_kutta_step(builder, chart, first, t, method)
    return builder.finish(
        x,
        builder.points[-1],
        name=churning.label(name),
        source=source,
        check="none" if chart.name == "time" else churning.check,
    )


def _expect_clean_end(clean_end: str | None, process: Process, chart: Chart) -> str:
    flows = isinstance(process, Flow) and chart.name == "flow"
    if clean_end is None:
        return "full" if flows else "euler"
    expect_choice(clean_end, "clean_end", ("euler", "full"))
    if clean_end == "full" and not flows:
        raise ValueError(
            'clean_end="full" is for the flow process in flow coordinates, whose velocity is '
            f"defined at sigma = 0; got {type(process).__name__} in {chart.name!r} coordinates. "
            'Use clean_end="euler".'
        )
    return clean_end
