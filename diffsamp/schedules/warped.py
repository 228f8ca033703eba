"""Grids that are a warp of uniform steps in time: progress f(i / n), f rising from 0 to 1."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.stats import beta as beta_distribution

from diffsamp._core.checks import expect_int, expect_times
from diffsamp._core.types import Array
from diffsamp.processes import Process
from diffsamp.schedules.grids import checked_ends

__all__ = [
    "beta",
    "bong_tangent",
    "cosine",
    "flow_shift",
    "linear_quadratic",
    "resolution_shift",
    "shifted",
]


def _warped(
    process: Process,
    n: int,
    t_max: float | None,
    t_min: float | None,
    final: str,
    warp: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """first + warp(i / n) (last - first): `warp` rises from 0 to 1, in the process's time."""
    if final == "clean":
        if t_min is not None:
            raise ValueError(
                '`t_min` has no effect with final="clean", where this grid runs through to the '
                'clean end; use final="t_min".'
            )
        first, _, _ = checked_ends(process, n, t_max, None, final)
        last = process.t_clean
    else:
        first, last, _ = checked_ends(process, n, t_max, t_min, final)
    times = first + warp(np.arange(n + 1) / n) * (last - first)
    times[0], times[-1] = first, last
    return expect_times(times)


def beta(
    process: Process,
    n: int,
    *,
    a: float = 0.6,
    b: float = 0.6,
    t_max: float | None = None,
    t_min: float | None = None,
    final: str = "clean",
) -> np.ndarray:
    """Quantiles of a Beta(a, b) distribution of t (Lee et al. 2024, arXiv:2407.12173).

    a = b = 0.6 is dense at both ends. ComfyUI's "beta" is this, rounded to labels (`rounded`), with
    repeats dropped; diffusers' `use_beta_sigmas` takes quantiles of sigma instead.

    Args:
      process: the noise process.
      n: number of evaluations of a one-evaluation method, at least 1.
      a: weight at the clean end, positive; smaller is denser there.
      b: weight at the noise end, likewise.
      t_max: first time; None: the process's.
      t_min: last time with final="t_min"; None: the process's.
      final: "clean" or "t_min".

    Returns:
      float64 times, shape (n + 1,), decreasing.
    """
    if not (0 < a < np.inf and 0 < b < np.inf):
        raise ValueError(f"`a` and `b` must be positive and finite; got {a} and {b}.")
    return _warped(
        process, n, t_max, t_min, final, lambda u: 1 - beta_distribution.ppf(1 - u, a, b)
    )


def bong_tangent(
    process: Process,
    n: int,
    *,
    start: float = 1.0,
    middle: float = 0.5,
    end: float = 0.0,
    pivots: tuple[float, float] = (0.6, 0.6),
    slopes: tuple[float, float] = (0.2, 0.2),
    t_max: float | None = None,
    t_min: float | None = None,
    final: str = "clean",
) -> np.ndarray:
    """RES4LYF's "bong_tangent": two falling arctangents, joined at the middle of the time.

    With m = n + 2, the first has int(m pivot) points from `start` to `middle` and the second the
    rest, down to `end`; each is arctan(-slope (x - int(m pivot)) 40 / m) in the number x of the
    point, stretched to its ends. The time is the process's, 1 at t_max and 0 at the end; for flow
    models that is theirs.

    Args:
      process: the noise process.
      n: number of evaluations of a one-evaluation method, at least 1. n = 1 is one step.
      start: where the first curve begins; between the first and the last time these and the other
        heights only count relative to `start` and `end`.
      middle: where the curves meet, between `start` and `end`.
      end: where the second ends, below `start`.
      pivots: where the curves are steepest, as fractions of the points, between 0 and 1.
      slopes: how steep they are, positive.
      t_max: first time; None: the process's.
      t_min: last time with final="t_min"; None: the process's.
      final: "clean" or "t_min".

    Returns:
      float64 times, shape (n + 1,), decreasing.

    Raises:
      ValueError: numbers out of range; so few steps that the pivots leave a curve without points.

    Reference: ClownsharkBatwing's RES4LYF, `sigmas.py`; also in stable-diffusion.cpp.
    """
    if not start > middle > end:
        raise ValueError(f"`start`, `middle` and `end` must fall; got {start}, {middle} and {end}.")
    if not (all(0 < pivot < 1 for pivot in pivots) and all(0 < s < np.inf for s in slopes)):
        raise ValueError(
            "`pivots` must lie between 0 and 1, and `slopes` be positive; got "
            f"{pivots} and {slopes}."
        )
    points = expect_int(n, "n", at_least=1) + 2

    def curve(size: int, pivot: float, slope: float, top: float, bottom: float) -> np.ndarray:
        heights = -np.arctan(40 / points * slope * (np.arange(size) - pivot))
        return bottom + (heights - heights[-1]) / (heights[0] - heights[-1]) * (top - bottom)

    def warp(u: np.ndarray) -> np.ndarray:
        if n == 1:
            return u
        first = int(points * (pivots[0] + pivots[1]) / 2)
        if first < 2 or points - first < 2:
            raise ValueError(f"`pivots` {pivots} leave one of the curves of {n} steps no points.")
        at = [int(points * pivot) for pivot in pivots]
        upper = curve(first, at[0], slopes[0], start, middle)
        lower = curve(points - first, at[1] - first, slopes[1], middle, end)
        heights = np.concatenate([upper[:-1], lower])
        return (start - heights) / (start - end)

    return _warped(process, n, t_max, t_min, final, warp)


def cosine(
    process: Process,
    n: int,
    *,
    sway: float = -1.0,
    t_max: float | None = None,
    t_min: float | None = None,
    final: str = "clean",
) -> np.ndarray:
    """Progress u + sway (cos(pi u / 2) - 1 + u): F5-TTS's sway sampling (arXiv:2410.06885, eq. 7).

    sway = -1 is t = cos(pi u / 2), dense at the noise; positive values are dense at the data.

    Args:
      process: the noise process.
      n: number of evaluations of a one-evaluation method, at least 1.
      sway: from -1 to 2 / (pi - 2), beyond which times would not decrease.
      t_max: first time; None: the process's.
      t_min: last time with final="t_min"; None: the process's.
      final: "clean" or "t_min".

    Returns:
      float64 times, shape (n + 1,), decreasing.
    """
    if not -1 <= sway <= 2 / (np.pi - 2):
        raise ValueError(f"`sway` must lie between -1 and {2 / (np.pi - 2):.3f}; got {sway}.")
    return _warped(
        process, n, t_max, t_min, final, lambda u: u + sway * (np.cos(np.pi * u / 2) - 1 + u)
    )


def linear_quadratic(
    process: Process,
    n: int,
    *,
    threshold: float = 0.025,
    linear_steps: int | None = None,
    t_max: float | None = None,
    t_min: float | None = None,
    final: str = "clean",
) -> np.ndarray:
    """Small equal steps, then a parabola that goes on at their speed (Mochi 1, Movie Gen).

    The first `linear_steps` cover the part `threshold` of the way, in steps of `threshold /
    linear_steps`; the rest follows the parabola that leaves that point with that slope and ends at
    the data (Polyak et al. 2024, arXiv:2410.13720, sec. 3.4.2; the formula is Mochi's).

    Args:
      process: the noise process.
      n: number of evaluations of a one-evaluation method, at least 1.
      threshold: part of the time axis that the linear steps cover, between 0 and 1.
      linear_steps: how many they are, from 1 to n - 1; None: n // 2.
      t_max: first time; None: the process's.
      t_min: last time with final="t_min"; None: the process's.
      final: "clean" or "t_min".

    Returns:
      float64 times, shape (n + 1,), decreasing.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"`threshold` must lie between 0 and 1; got {threshold}.")
    if linear_steps is None:
        linear_steps = n // 2
    elif n > 1:
        expect_int(linear_steps, "linear_steps", at_least=1, at_most=n - 1)

    def warp(u: np.ndarray) -> np.ndarray:
        if n == 1:
            return u
        i, m, rest = np.arange(n + 1), linear_steps, n - linear_steps
        # f(m) = threshold, f(n) = 1, and the linear part's slope at m
        slope = threshold / m
        bend = (1 - threshold - slope * rest) / rest**2
        return np.where(i <= m, slope * i, threshold + slope * (i - m) + bend * (i - m) ** 2)

    return _warped(process, n, t_max, t_min, final, warp)


def shifted(t: Array, shift: float) -> Array:
    """The resolution shift t' = shift t / (1 + (shift - 1) t) of times in [0, 1].

    Esser et al. 2024 (SD3, arXiv:2403.03206, eq. 23).
    """
    if not 0 < shift < np.inf:
        raise ValueError(f"`shift` must be positive and finite; got {shift}.")
    return shift * t / (1 + (shift - 1) * t)


def resolution_shift(
    tokens: float,
    *,
    base_tokens: float = 256,
    max_tokens: float = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """The shift for a number of image tokens, exp(mu) with mu linear in it (FLUX's numbers).

    Args:
      tokens: length of the image's sequence.
      base_tokens: where mu is `base_shift`.
      max_tokens: where mu is `max_shift`.
      base_shift: see there.
      max_shift: see there.
    """
    if base_tokens == max_tokens:
        raise ValueError(f"`base_tokens` and `max_tokens` must differ; got {base_tokens} twice.")
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return float(np.exp(base_shift + slope * (tokens - base_tokens)))


def flow_shift(
    process: Process,
    n: int,
    *,
    shift: float = 3.0,
    t_max: float | None = None,
    t_min: float | None = None,
    final: str = "clean",
) -> np.ndarray:
    """Uniform in t, then moved towards the noise by `shifted`; 3 is SD3's at 1024 pixels.

    For a shift by resolution pass `shift=resolution_shift(tokens)`. `processes.flow(shift=...)`
    makes it what "uniform" means, for every use of the process.

    Args:
      process: the noise process.
      n: number of evaluations of a one-evaluation method, at least 1.
      shift: positive; 1 is uniform.
      t_max: first time; None: the process's.
      t_min: last time with final="t_min"; None: the process's.
      final: "clean" or "t_min".

    Returns:
      float64 times, shape (n + 1,), decreasing.
    """
    return _warped(process, n, t_max, t_min, final, lambda u: 1 - shifted(1 - u, shift))
