"""EDM's churn."""

from __future__ import annotations

import math

from diffsamp.solvers._builder import Builder, Combination, Point

__all__ = ["Churn"]


class Churn:
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
        if self.churn > 0:
            builder.expect_falling("churn")
        gamma = min(self.churn / (len(builder.points) - 1), math.sqrt(2) - 1)
        if gamma == 0 or s.alpha == 0 or not self.low <= s.rho <= self.high:
            return x, s
        # above t_max, as EDM's own code; where the process has no such level it is the highest
        lifted = builder.point_at(-math.log(s.rho * (1 + gamma)))
        if not s.rho < lifted.rho < math.inf:
            return x, s
        added = math.sqrt(lifted.rho**2 - s.rho**2) * self.noise_scale
        return lifted.alpha * (x / s.alpha + added * builder.fresh_noise()), lifted
