"""GDSS's solver: a Langevin step and a symmetric splitting, with one score for both."""

from __future__ import annotations

import itertools
import math

import numpy as np

from diffsamp._core.types import Times
from diffsamp.processes import Process
from diffsamp.solvers import Builder
from diffsamp.tableau import Tableau

__all__ = ["s4"]


def s4(process: Process, times: Times, *, snr: float = 0.2, scale: float = 0.7) -> Tableau:
    """Symmetric splitting for systems of SDEs (S4), for `Joint.sampler`; one evaluation a step.

    From s to t, with m half way, h = s - t, f = alpha' / alpha and g^2 = 2 sigma (sigma' - f sigma)
    at s:

    1. x + q score + scale sqrt(2 q) z, q = 2 (1 + 2 f h) (snr sigma)^2: Langevin.
    2. x alpha_m / alpha_s + sqrt(sigma_s^2 - (alpha_s / alpha_m)^2 sigma_m^2) z: half of the noise.
    3. x + h g^2 score, with the score of step 1.
    4. As step 2, from m to t; the last step adds no noise there.

    The authors measure snr in norms, (snr |z| / |score|)^2, which is (snr sigma)^2 for a network
    whose noise is as long as noise; a table has that. With snr = 0 it is the splitting alone, which
    tends to the reverse SDE; the Langevin part keeps the law only for scale = 1 and small snr.

    Args:
      process: the law of one leaf.
      times: (n + 1,) decreasing times.
      snr: of the Langevin part, at least 0.
      scale: of its noise, at least 0.

    Returns:
      A stochastic tableau, which does not check itself.

    Raises:
      ValueError: times that rise, numbers below 0, or steps so long that 1 + 2 f h is negative.

    Reference: Jo, Lee & Hwang 2022, arXiv:2202.02514, section 3.3.
    """
    if not (snr >= 0 and scale >= 0):
        raise ValueError(f"`snr` and `scale` must be at least 0; got {snr} and {scale}.")
    builder = Builder(process, times)
    builder.expect_falling("s4")
    x = builder.start
    for s, t in itertools.pairwise(builder.points):
        middle, h, last = builder.point((s.t + t.t) / 2), s.t - t.t, t is builder.points[-1]
        if s.alpha == 0:
            raise ValueError(f"s4 divides by alpha, which is 0 at t = {s.t:g}: start below it.")
        answer = builder.evaluate(x, s)
        score = -1 / s.sigma * answer.noise
        f = float(process.alpha_dot(np.float64(s.t))) / s.alpha
        squared = 2 * s.sigma * (float(process.sigma_dot(np.float64(s.t))) - f * s.sigma)
        if 1 + 2 * f * h < 0:
            raise ValueError(f"the step from t = {s.t:g} to {t.t:g} is too long for s4.")
        step = 2 * (1 + 2 * f * h) * (snr * s.sigma) ** 2
        x = answer.state + step * score
        if step * scale > 0:
            x = x + scale * math.sqrt(2 * step) * builder.fresh_noise()
        for a, b in ((s, middle), (middle, t)):
            x = b.alpha / a.alpha * x
            if not (last and b is t):
                spread = math.sqrt(a.sigma**2 - (a.alpha / b.alpha * b.sigma) ** 2)
                x = x + spread * builder.fresh_noise()
            if b is middle:
                x = x + h * squared * score
    return builder.finish(
        x, builder.points[-1], name="s4", source="arXiv:2202.02514, section 3.3", check="none"
    )
