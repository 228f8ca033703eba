"""Grids that are laws: uniform in t, in a power of it, in log-SNR, in sigma^(1/rho), .."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from diffsamp._core.checks import expect_choice, expect_int, expect_times
from diffsamp._core.numeric import is_concrete
from diffsamp._core.types import Array
from diffsamp.processes import Process

__all__ = [
    "exponential",
    "karras",
    "kl_optimal",
    "logsnr",
    "polynomial",
    "quadratic",
    "uniform",
]


def checked_ends(
    process: Process, n: int, t_max: float | None, t_min: float | None, final: str
) -> tuple[float, float, int]:
    """(first time, last time of the spaced part, number of its points), checked."""
    expect_int(n, "n", at_least=1)
    expect_choice(final, "final", ("clean", "t_min"))
    if not is_concrete(process):
        raise TypeError("schedules are host functions: call them outside `jit`.")
    first = float(process.t_max if t_max is None else t_max)
    last = float(process.t_min if t_min is None else t_min)
    if not first > last:
        raise ValueError(f"`t_max` must exceed `t_min`; got t_max = {first}, t_min = {last}.")
    if last < process.t_clean or first > process.t_max:
        raise ValueError(
            f"times must lie between t_clean = {process.t_clean} and t_max = {process.t_max} of "
            f"the process; got t_max = {first}, t_min = {last}."
        )
    return first, last, n if final == "clean" else n + 1


def with_end(process: Process, times: np.ndarray, final: str) -> np.ndarray:
    """Times of evaluations, and the end.

    Args:
      process: the noise process.
      times: (n,) of the evaluations.
      final: "clean" or "t_min".

    Raises:
      ValueError: evaluations that go down to t_min already, with final="t_min".
    """
    expect_choice(final, "final", ("clean", "t_min"))
    if final == "clean":
        return expect_times(np.append(times, process.t_clean))
    if times[-1] <= process.t_min:
        raise ValueError(
            f"the last evaluation of this grid is at t = {times[-1]:g}, not above t_min = "
            f'{process.t_min:g}: it cannot end there. Use final="clean", or a grid such as karras.'
        )
    return expect_times(np.append(times, process.t_min))


def _spaced(
    process: Process,
    n: int,
    t_max: float | None,
    t_min: float | None,
    final: str,
    to_grid: Callable[[Array], Array],
    from_grid: Callable[[Array], Array],
) -> np.ndarray:
    """Points uniform in `to_grid(t)` from t_max to t_min, then t_clean if `final` asks for it."""
    first, last, points = checked_ends(process, n, t_max, t_min, final)
    ends = to_grid(np.array([first, last]))
    if not np.all(np.isfinite(ends)):
        bad = first if not np.isfinite(ends[0]) else last
        raise ValueError(
            f"this grid's spacing is infinite at t = {bad:g}, where alpha or sigma is 0; give a "
            "`t_max` or `t_min` away from it."
        )
    fraction = np.arange(points) / max(points - 1, 1)
    times = from_grid(ends[0] + fraction * (ends[1] - ends[0]))
    times[0] = first  # verbatim, not through the inverse
    if points > 1:
        times[-1] = last
    if final == "clean":
        times = np.append(times, process.t_clean)
    return expect_times(times)


def polynomial(
    process: Process,
    n: int,
    *,
    power: float = 3.0,
    t_max: float | None = None,
    t_min: float | None = None,
    final: str = "clean",
) -> np.ndarray:
    """Uniform in t^(1/power): the larger the power, the denser near the data.

    With final="clean" the grid runs through to t_clean with its own spacing; `t_min` is then not
    used and must be left out. With final="t_min" it ends at t_min. On a discrete process, powers
    count from the clean end at -1. DEIS uses power 2 (Zhang & Chen 2023, arXiv:2204.13902).

    Args:
      process: the noise process.
      n: number of evaluations of a one-evaluation method, at least 1.
      power: spacing exponent, positive; 1 is uniform.
      t_max: first time; None: the process's.
      t_min: last time with final="t_min"; None: the process's.
      final: "clean" or "t_min".

    Returns:
      float64 times, shape (n + 1,), decreasing.
    """
    if not 0 < power < np.inf:
        raise ValueError(f"`power` must be positive and finite; got {power}.")
    clean = process.t_clean
    if final == "clean":
        if t_min is not None:
            raise ValueError(
                '`t_min` has no effect with final="clean", where this grid runs through to the '
                'clean end; use final="t_min".'
            )
        t_min, end = clean, "t_min"
    else:
        end = final
    first, last, points = checked_ends(process, n, t_max, t_min, end)
    top, bottom = (first - clean) ** (1 / power), (last - clean) ** (1 / power)
    fraction = np.arange(points) / n
    times = clean + (top + fraction * (bottom - top)) ** power
    # a process may prefer another measure of "uniform" (the resolution shift of flow models)
    span = process.t_max - clean
    if power == 1:
        times = np.asarray(process.uniform_time((times - clean) / span), np.float64)
    times[0], times[-1] = first, last
    return expect_times(times)


def uniform(
    process: Process,
    n: int,
    *,
    t_max: float | None = None,
    t_min: float | None = None,
    final: str = "clean",
) -> np.ndarray:
    """Uniform in t, or in the process's own warp of it (a flow's resolution shift).

    On a discrete process of T levels with final="clean" these are the "trailing" times
    T - 1 - i T / n, up to rounding (Lin et al. 2023, arXiv:2305.08891, table 2). Arguments and
    result as `polynomial`.
    """
    return polynomial(process, n, power=1.0, t_max=t_max, t_min=t_min, final=final)


def quadratic(
    process: Process,
    n: int,
    *,
    t_max: float | None = None,
    t_min: float | None = None,
    final: str = "clean",
) -> np.ndarray:
    """Uniform in sqrt(t), `polynomial` with power 2 (DDIM's "quad", DEIS's default).

    Arguments and result as `polynomial`.
    """
    return polynomial(process, n, power=2.0, t_max=t_max, t_min=t_min, final=final)


def logsnr(
    process: Process,
    n: int,
    *,
    t_max: float | None = None,
    t_min: float | None = None,
    final: str = "clean",
) -> np.ndarray:
    """Uniform in log-SNR (Lu et al. 2022, DPM-Solver, arXiv:2206.00927).

    Args:
      process: the noise process.
      n: number of evaluations of a one-evaluation method, at least 1.
      t_max: first time; None: the process's, or for a process whose log-SNR is -inf there (flow)
        the time where it is -5.1.
      t_min: last spaced time; None: the process's.
      final: "clean": n spaced times, then t_clean; "t_min": n + 1 spaced times.

    Returns:
      float64 times, shape (n + 1,), decreasing.
    """
    t_max = finite_start(process, t_max)
    return _spaced(process, n, t_max, t_min, final, process.log_snr, process.time)


def karras(
    process: Process,
    n: int,
    *,
    rho: float = 7.0,
    t_max: float | None = None,
    t_min: float | None = None,
    final: str = "clean",
) -> np.ndarray:
    """Uniform in (sigma / alpha)^(1/rho) (Karras et al. 2022, EDM, arXiv:2206.00364, eq. 5).

    For the EDM process with final="clean" these are EDM's n noise levels and the 0 after them.
    Arguments and result as `logsnr`, with `rho` the exponent.
    """
    if not 0 < rho < np.inf:
        raise ValueError(f"`rho` must be positive and finite; got {rho}.")
    t_max = finite_start(process, t_max)

    def to_grid(t: np.ndarray) -> np.ndarray:
        return np.exp(-process.log_snr(t) / rho)

    def from_grid(level: np.ndarray) -> np.ndarray:
        return process.time(-rho * np.log(level))

    return _spaced(process, n, t_max, t_min, final, to_grid, from_grid)


# DPM-Solver's clip of the cosine schedule; used wherever a process starts at alpha = 0.
_SMALLEST_LOG_SNR = -5.1


def finite_start(process: Process, t_max: float | None) -> float | None:
    if t_max is None and is_concrete(process) and np.isneginf(process.log_snr(process.t_max)):
        return float(process.time(_SMALLEST_LOG_SNR))
    return t_max


def exponential(
    process: Process,
    n: int,
    *,
    t_max: float | None = None,
    t_min: float | None = None,
    final: str = "clean",
) -> np.ndarray:
    """Uniform in log(sigma / alpha), which is `logsnr` under k-diffusion's name.

    Arguments and result as `logsnr`.
    """
    return logsnr(process, n, t_max=t_max, t_min=t_min, final=final)


def kl_optimal(
    process: Process,
    n: int,
    *,
    t_max: float | None = None,
    t_min: float | None = None,
    final: str = "clean",
) -> np.ndarray:
    """Uniform in arctan(sigma / alpha), "kl_optimal" in ComfyUI (Sabour et al. 2024, AYS, app. B).

    The steps that minimise the bound of Align Your Steps for a Gaussian of unit variance
    (arXiv:2404.14507); also v-diffusion's cosine spacing, alpha = cos(angle). Arguments and result
    as `logsnr`; a process may start at alpha = 0.
    """

    def to_grid(t: np.ndarray) -> np.ndarray:
        return np.arctan2(process.sigma(t), process.alpha(t))

    def from_grid(angle: np.ndarray) -> np.ndarray:
        return np.asarray(process.time(np.log(np.cos(angle)) - np.log(np.sin(angle))))

    return _spaced(process, n, t_max, t_min, final, to_grid, from_grid)
