"""Euler's and Heun's methods with EDM's churn.

With coordinates "edm" the state is x / alpha and the variable rho = sigma / alpha, where the ODE
is dx/drho = E: EDM's own for alpha = 1. With "flow" the state is x / (alpha + sigma) and the
variable sigma / (alpha + sigma), where it is dx/dt = E - D: the flow models' own, and finite where
alpha = 0. Euler's method is the same in both (it is DDIM); Heun's is not.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from diffsamp._checks import expect_choice
from diffsamp.processes import Flow, Process
from diffsamp.solvers._builder import FLOW, NOISE, Answer, Builder, Combination, Point, transfer
from diffsamp.tableau import Tableau

__all__ = ["euler", "heun"]


def euler(
    process: Process,
    times: Any,
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
      churn_max: EDM's S_max. Churned levels are also kept at or below t_max.
      noise_scale: EDM's S_noise, the standard deviation of the added noise.

    Returns:
      A tableau of n evaluations, in noise prediction.

    Raises:
      ValueError: times that do not decrease, negative churn.

    Reference: Karras et al. 2022, arXiv:2206.00364, algorithm 2.
    """
    churning = _Churn(churn, churn_min, churn_max, noise_scale)
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
    times: Any,
    *,
    coordinates: str | None = None,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    noise_scale: float = 1.0,
) -> Tableau:
    """Heun's method (EDM): order 2, two evaluations a step, one on a step to sigma = 0.

    So n steps cost 2 n - 1 evaluations when the times end at the clean end, else 2 n. In "edm"
    coordinates it equals the rho-2Heun method of DEIS.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.
      coordinates: "edm" or "flow" (see the module); None: "flow" for the flow process and for
        times that start at alpha = 0, else "edm".
      churn: EDM's S_churn, at least 0; 0 is deterministic.
      churn_min: EDM's S_min, a value of sigma / alpha.
      churn_max: EDM's S_max. Churned levels are also kept at or below t_max.
      noise_scale: EDM's S_noise, the standard deviation of the added noise.

    Returns:
      A tableau of one row per evaluation; deterministic unless `churn` is positive.

    Raises:
      ValueError: times that do not decrease, negative churn, or "edm" coordinates from a time
        where alpha = 0.

    Reference: Karras et al. 2022, arXiv:2206.00364, algorithms 1 and 2.
    """
    churning = _Churn(churn, churn_min, churn_max, noise_scale)
    builder = Builder(process, times)
    if coordinates is None:
        flowing = isinstance(process, Flow) or builder.points[0].alpha == 0
        coordinates = "flow" if flowing else "edm"
    expect_choice(coordinates, "coordinates", ("edm", "flow"))
    builder.target = NOISE if coordinates == "edm" else FLOW
    if coordinates == "edm" and builder.points[0].alpha == 0:
        raise ValueError(
            f"alpha = 0 at the first time, {builder.points[0].t:g}, where EDM's coordinates are "
            'infinite; start later, or use coordinates="flow".'
        )
    x = builder.start
    for s, t in zip(builder.points, builder.points[1:], strict=False):
        x, s = churning.lift(builder, x, s)
        first = builder.evaluate(x, s)
        predicted = transfer(first, t)
        if t.sigma == 0:
            x = predicted
            continue
        second = builder.evaluate(predicted, t)
        slope = 0.5 * (_slope(first, coordinates) + _slope(second, coordinates))
        (scale_s, v_s), (scale_t, v_t) = _chart(s, coordinates), _chart(t, coordinates)
        x = (scale_t / scale_s) * first.state + scale_t * (v_t - v_s) * slope
    return builder.finish(
        x,
        builder.points[-1],
        name=churning.label("heun"),
        source="arXiv:2206.00364, algorithm 1",
        check=churning.check,
    )


def _chart(point: Point, coordinates: str) -> tuple[float, float]:
    """(scale, variable) of the coordinates at a point."""
    scale = point.alpha if coordinates == "edm" else point.alpha + point.sigma
    return scale, point.sigma / scale


def _slope(answer: Answer, coordinates: str) -> Combination:
    return answer.noise if coordinates == "edm" else answer.noise - answer.data


class _Churn:
    """EDM's temporary raise of the noise level before an evaluation."""

    def __init__(self, churn: float, low: float, high: float, noise_scale: float) -> None:
        if not (churn >= 0 and noise_scale >= 0):
            raise ValueError(
                f"`churn` and `noise_scale` must not be negative; got {churn}, {noise_scale}."
            )
        self.churn, self.low, self.high, self.noise_scale = churn, low, high, noise_scale
        # noise of another scale changes the variance on purpose
        self.check = "full" if churn == 0 or noise_scale == 1 else "mean"

    def label(self, name: str) -> str:
        return f"{name}(churn={self.churn:g})" if self.churn > 0 else name

    def lift(self, builder: Builder, x: Combination, s: Point) -> tuple[Combination, Point]:
        """The state and point at which the network is asked."""
        gamma = min(self.churn / (len(builder.points) - 1), math.sqrt(2) - 1)
        if gamma == 0 or s.alpha == 0 or not self.low <= s.rho <= self.high:
            return x, s
        top = builder.point(builder.process.t_max)
        rho = min(s.rho * (1 + gamma), top.rho)
        if not rho > s.rho:
            return x, s
        lifted = builder.point_at(-np.log(rho))
        added = math.sqrt(max(lifted.rho**2 - s.rho**2, 0.0)) * self.noise_scale
        return lifted.alpha * (x / s.alpha + added * builder.fresh_noise()), lifted
