"""Coordinates in which the ODE has no linear part.

- "edm": state x / alpha, variable rho = sigma / alpha, dx/drho = E. EDM's own for alpha = 1.
- "flow": state x / (alpha + sigma), variable sigma / (alpha + sigma), dx/dt = E - D. The flow
  models' own, and finite where alpha = 0.

A constant (D, E) is integrated exactly in either, so Euler's method is one and the same (DDIM);
methods of higher order differ.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from diffsamp._checks import expect_choice
from diffsamp.processes import Flow
from diffsamp.solvers._builder import FLOW, NOISE, Answer, Builder, Combination, Point

__all__ = ["Chart"]


@dataclasses.dataclass(frozen=True)
class Chart:
    """One of the two coordinates, "edm" or "flow"."""

    name: str
    builder: Builder

    @classmethod
    def choose(cls, builder: Builder, name: str | None) -> Chart:
        """The chart called `name`, whose slope becomes the builder's prediction.

        None is "flow" for the flow process and for times that start at alpha = 0, else "edm".

        Raises:
          ValueError: an unknown name, or "edm" from a time where alpha = 0.
        """
        start = builder.points[0]
        if name is None:
            name = "flow" if isinstance(builder.process, Flow) or start.alpha == 0 else "edm"
        expect_choice(name, "coordinates", ("edm", "flow"))
        if name == "edm" and start.alpha == 0:
            raise ValueError(
                f"alpha = 0 at the first time, {start.t:g}, where EDM's coordinates are infinite; "
                'start later, or use coordinates="flow".'
            )
        builder.target = NOISE if name == "edm" else FLOW
        return cls(name, builder)

    def scale(self, point: Point) -> float:
        """What the state is divided by."""
        return point.alpha if self.name == "edm" else point.alpha + point.sigma

    def variable(self, point: Point) -> float:
        """The independent variable."""
        return point.sigma / self.scale(point)

    def slope(self, answer: Answer) -> Combination:
        """The derivative of the scaled state."""
        return answer.noise if self.name == "edm" else answer.noise - answer.data

    def between(self, s: Point, t: Point, fraction: float) -> Point:
        """The point at a fraction of the way from s to t in the variable; s and t themselves."""
        if fraction in (0.0, 1.0):
            return t if fraction else s
        v = self.variable(s) + fraction * (self.variable(t) - self.variable(s))
        rho = v if self.name == "edm" else v / (1 - v)
        return self.builder.point_at(-np.log(rho))

    def step(self, x: Combination, slope: Combination, s: Point, t: Point) -> Combination:
        """The state at t from state x at s along a constant slope."""
        change = self.variable(t) - self.variable(s)
        return self.scale(t) * (x / self.scale(s) + change * slope)
