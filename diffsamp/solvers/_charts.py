"""Coordinates in which the ODE has no linear part, and Runge-Kutta steps in them.

- "edm": state x / alpha, variable rho = sigma / alpha, dx/drho = E. EDM's own for alpha = 1.
- "flow": state x / (alpha + sigma), variable sigma / (alpha + sigma), dx/dt = E - D. The flow
  models' own, and finite where alpha = 0.

A constant (D, E) is integrated exactly in either, so Euler's method is one and the same (DDIM);
methods of higher order differ.

- "time": the state and the time as they are, dx/dt = alpha' D + sigma' E, as samplers of the first
  VP models had it. Its linear part is integrated by the method, and Euler's method is not DDIM.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from diffsamp._core.checks import expect_choice
from diffsamp.processes import Flow
from diffsamp.solvers._builder import (
    DATA,
    FLOW,
    NOISE,
    Answer,
    Builder,
    Combination,
    Point,
    total,
)

__all__ = ["BUTCHER", "Butcher", "Chart", "runge_kutta_step"]

# stage fractions, rows of the lower triangle, weights
Butcher = tuple[tuple[float, ...], tuple[tuple[float, ...], ...], tuple[float, ...]]
BUTCHER: dict[str, Butcher] = {
    "heun2": ((0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "midpoint2": ((0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "ralston2": ((0, 2 / 3), ((), (2 / 3,)), (1 / 4, 3 / 4)),
    "kutta3": ((0, 1 / 2, 1), ((), (1 / 2,), (-1, 2)), (1 / 6, 4 / 6, 1 / 6)),
    "heun3": ((0, 1 / 3, 2 / 3), ((), (1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4)),
    "ralston3": ((0, 1 / 2, 3 / 4), ((), (1 / 2,), (0, 3 / 4)), (2 / 9, 3 / 9, 4 / 9)),
    "ssprk3": ((0, 1, 1 / 2), ((), (1,), (1 / 4, 1 / 4)), (1 / 6, 1 / 6, 4 / 6)),
    "rk4": (
        (0, 1 / 2, 1 / 2, 1),
        ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)),
        (1 / 6, 2 / 6, 2 / 6, 1 / 6),
    ),
}


@dataclasses.dataclass(frozen=True)
class Chart:
    """One of the three coordinates, "edm", "flow" or "time"."""

    name: str
    builder: Builder

    @classmethod
    def choose(cls, builder: Builder, name: str | None) -> Chart:
        """The chart called `name`, whose slope becomes the builder's prediction.

        None is "flow" for the flow process and where a step is too long for rho (see
        `Builder.is_long`), such as one from alpha = 0; else "edm".

        Raises:
          ValueError: an unknown name, or "edm" from a time where alpha = 0.
        """
        start = builder.points[0]
        if name is None:
            inner = [p for p in builder.points if p.sigma > 0]
            long = any(builder.is_long(s, t) for s, t in itertools.pairwise(inner))
            own = isinstance(builder.process, Flow) or start.alpha == 0
            name = "flow" if own or long else "edm"
        expect_choice(name, "coordinates", ("edm", "flow", "time"))
        if name == "edm" and start.alpha == 0:
            raise ValueError(
                f"alpha = 0 at the first time, {start.t:g}, where EDM's coordinates are infinite; "
                'start later, or use coordinates="flow".'
            )
        builder.target = {"edm": NOISE, "flow": FLOW, "time": DATA}[name]
        return cls(name, builder)

    def scale(self, point: Point) -> float:
        """What the state is divided by."""
        if self.name == "time":
            return 1.0
        return point.alpha if self.name == "edm" else point.alpha + point.sigma

    def variable(self, point: Point) -> float:
        """The independent variable."""
        return point.t if self.name == "time" else point.sigma / self.scale(point)

    def slope(self, answer: Answer) -> Combination:
        """The derivative of the scaled state."""
        if self.name == "time":
            process, t = self.builder.process, np.float64(answer.point.t)
            return process.alpha_dot(t) * answer.data + process.sigma_dot(t) * answer.noise
        return answer.noise if self.name == "edm" else answer.noise - answer.data

    def between(self, s: Point, t: Point, fraction: float) -> Point:
        """The point at a fraction of the way from s to t in the variable; s and t themselves."""
        if fraction in (0.0, 1.0):
            return t if fraction else s
        v = self.variable(s) + fraction * (self.variable(t) - self.variable(s))
        if self.name == "time":
            return self.builder.point(v)
        rho = v if self.name == "edm" else v / (1 - v)
        return self.builder.point_at(-np.log(rho))

    def step(self, x: Combination, slope: Combination, s: Point, t: Point) -> Combination:
        """The state at t from state x at s along a constant slope."""
        change = self.variable(t) - self.variable(s)
        return self.scale(t) * (x / self.scale(s) + change * slope)


def runge_kutta_step(
    builder: Builder, chart: Chart, first: Answer, t: Point, method: str | Butcher
) -> Combination:
    """The state at t by one step of a Runge-Kutta method from the answer `first`."""
    fractions, lower, weights = BUTCHER[method] if isinstance(method, str) else method
    s, slopes = first.point, [chart.slope(first)]
    for fraction, row in zip(fractions[1:], lower[1:], strict=True):
        stage = chart.between(s, t, fraction)
        # sum_j a_ij slope_j (t - s) is a step of `fraction` along the mean slope
        mean = total([a / fraction for a in row], slopes)
        slopes.append(chart.slope(builder.evaluate(chart.step(first.state, mean, s, stage), stage)))
    return chart.step(first.state, total(weights, slopes), s, t)
