"""The laws of blurring diffusion, one per frequency."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np

from diffsamp._core.numeric import as_float, namespace
from diffsamp._core.types import Array
from diffsamp.processes import Process, time_by_bisection, vp_cosine

__all__ = ["Blurred", "blurring"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blurred(Process):
    """One frequency of blurring diffusion, whose signal also fades by heat; see `blurring`.

    alpha(t) = base.alpha(t) ((1 - least) exp(-rate sin(pi t / 2)^4) + least), sigma = base.sigma,
    with t from 0 to 1.
    """

    base: Process
    rate: Array
    least: Array

    def _fade(self, t: Array) -> tuple[Array, Array]:
        """The factor and its derivative."""
        t = as_float(t)
        xp = namespace(t)
        rate, least = as_float(self.rate, t), as_float(self.least, t)
        sine, cosine = xp.sin(math.pi / 2 * t), xp.cos(math.pi / 2 * t)
        left = (1 - least) * xp.exp(-rate * sine**4)
        return left + least, -left * rate * 4 * sine**3 * cosine * (math.pi / 2)

    def alpha(self, t: Array) -> Array:
        # 1 at the clean end exactly, which (1 - least) + least need not be
        return self.base.alpha(t) * namespace(t).minimum(self._fade(t)[0], 1.0)

    def sigma(self, t: Array) -> Array:
        return self.base.sigma(t)

    def alpha_dot(self, t: Array) -> Array:
        fade, slope = self._fade(t)
        return self.base.alpha_dot(t) * fade + self.base.alpha(t) * slope

    def sigma_dot(self, t: Array) -> Array:
        return self.base.sigma_dot(t)

    def time(self, log_snr: Array) -> Array:
        return time_by_bisection(self, log_snr)

    @property
    def t_max(self) -> float:
        return self.base.t_max

    @property
    def t_min(self) -> float:
        return self.base.t_min

    @property
    def prior_std(self) -> float:
        return self.base.prior_std


def blurring(
    height: int,
    width: int,
    *,
    blur: float = 20.0,
    least: float = 1e-3,
    base: Process | None = None,
) -> tuple[tuple[Blurred, ...], np.ndarray]:
    """The laws of blurring diffusion: every frequency fades by heat besides the base's own fading.

    exp(-lambda tau) with lambda = pi^2 (i^2 / height^2 + j^2 / width^2) and tau = (blur sin(pi t /
    2)^2)^2 / 2.

    Args:
      height: rows of pixels.
      width: columns.
      blur: standard deviation of the blur at t = 1, pixels.
      least: what a frequency keeps in any case.
      base: a process with t from 0 to 1; None: `vp_cosine()`.

    Returns:
      (laws, index) for `per_frequency`: one law per distinct lambda, index (height, width, 1).

    Raises:
      ValueError: numbers out of range, or a base with other times.

    Reference: Hoogeboom & Salimans 2022, arXiv:2209.05557, section 4.
    """
    base = vp_cosine() if base is None else base
    if not (blur >= 0 and 0 < least <= 1):
        raise ValueError(f"`blur` must be at least 0 and `least` in (0, 1]; got {blur}, {least}.")
    if base.t_clean != 0 or base.t_max > 1:
        raise ValueError("`base` must have times from 0 to at most 1.")
    i, j = (np.arange(n) / n for n in (height, width))
    squares = np.pi**2 * (i[:, None] ** 2 + j[None] ** 2)
    rates, index = np.unique(np.round(squares * blur**2 / 2, 12), return_inverse=True)
    laws = tuple(Blurred(base, float(rate), float(least)) for rate in rates)
    return laws, index.reshape(height, width, 1)
