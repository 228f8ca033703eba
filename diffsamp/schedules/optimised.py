"""Grids that minimise a bound which needs no network."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize

from diffsamp._core.checks import expect_int, expect_times
from diffsamp.processes import Process
from diffsamp.schedules.grids import checked_ends, finite_start

__all__ = ["dmn", "dmn_bound"]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(32)


def dmn(
    process: Process,
    n: int,
    *,
    order: int = 3,
    t_max: float | None = None,
    t_min: float | None = None,
    final: str = "clean",
) -> np.ndarray:
    """DM-NonUniform: times that minimise a bound on what a network's errors add up to.

    A multistep method in log-SNR and data prediction is assumed (DPM-Solver++, UniPC), and errors
    of its data predictions in proportion to sigma^2 / alpha, variance-preserving; the bound on
    their weighted sum, `dmn_bound`, needs no network. It is minimised by L-BFGS on the logarithms
    of the steps, from equal ones and Karras's; 5 times take a quarter of a second, 50 some.

    Args:
      process: the noise process.
      n: number of evaluations of a one-evaluation method, at least 1.
      order: of the method whose weights count, 1 to 3; the first and last steps have less.
      t_max: first time; None: as for `logsnr`.
      t_min: last spaced time; None: the process's.
      final: "clean": n spaced times, then t_clean; "t_min": n + 1 spaced times.

    Returns:
      float64 times, shape (n + 1,), decreasing.

    Raises:
      ValueError: another order, times out of range.

    Reference: Xue, Liu, Chen et al. 2024, arXiv:2402.17376.
    """
    expect_int(order, "order", 1, 3)
    t_max = finite_start(process, t_max)
    first, last, points = checked_ends(process, n, t_max, t_min, final)
    low, high = (float(v) for v in process.log_snr(np.array([first, last])))
    if points > 2:
        lam = _minimised(low, high, points - 1, order)
        inner = np.asarray(process.time(lam[1:-1]), np.float64)
    else:
        inner = np.empty(0)
    ends = [first, last][: min(points, 2)]
    times = np.concatenate([ends[:1], inner, ends[1:]])
    return expect_times(np.append(times, process.t_clean) if final == "clean" else times)


def _minimised(low: float, high: float, steps: int, order: int) -> np.ndarray:
    """(steps + 1,) log-SNR from low to high with the smallest bound found."""

    def log_snr(z: np.ndarray) -> np.ndarray:
        share = np.exp(z - z.max(axis=-1, keepdims=True))
        reached = np.cumsum(share, axis=-1) / share.sum(axis=-1, keepdims=True)
        lam = low + (high - low) * reached
        return np.concatenate([np.full((*z.shape[:-1], 1), low), lam], axis=-1)

    def value_and_slope(z: np.ndarray) -> tuple[float, np.ndarray]:
        shift = 1e-6 * np.eye(steps)
        values = np.log(dmn_bound(log_snr(np.concatenate([z[None], z + shift, z - shift])), order))
        return float(values[0]), (values[1 : steps + 1] - values[steps + 1 :]) / 2e-6

    rho = np.linspace(np.exp(-low / 7), np.exp(-high / 7), steps + 1)
    starts = [np.zeros(steps), np.log(np.diff(-7 * np.log(rho)))]
    # no step is shorter than exp(-10) of another: a line search may try any
    bounds = [(-5.0, 5.0)] * steps
    found = [
        minimize(value_and_slope, z - z.mean(), jac=True, method="L-BFGS-B", bounds=bounds)
        for z in starts
    ]
    return log_snr(min(found, key=lambda result: result.fun).x)


def dmn_bound(log_snr: np.ndarray, order: int = 3) -> np.ndarray:
    """The bound that `dmn` minimises, up to a factor.

    sum over the answers of err |sum over the steps of their weights|, err = sigma^2 / alpha; an
    answer's weight in a step is int exp(lambda) l_j d lambda, l_j Lagrange's polynomial. Of the
    first three steps, and of those of order 1, each counts by itself, by the root of the sum of
    squares.

    Args:
      log_snr: (..., N + 1) rising log-SNR of the steps' ends.
      order: of the method, 1 to 3; step s of N has min(s + 1, N - s, order).

    Returns:
      (...) positive numbers.
    """
    lam = np.asarray(log_snr, np.float64)
    steps = lam.shape[-1] - 1
    err = np.exp(-np.logaddexp(0, 2 * lam) + np.logaddexp(0, -2 * lam) / 2)
    top, alone = lam[..., -1:], 0.0  # weights relative to exp of the last, which overflows nothing
    together = np.zeros(lam.shape)
    for s in range(steps):
        size = min(s + 1, steps - s, order)
        half = (lam[..., s + 1, None] - lam[..., s, None]) / 2
        u = lam[..., s, None] + half * (_NODES + 1)
        measure = half * _WEIGHTS * np.exp(u - top)
        used = range(s - size + 1, s + 1)
        parts = []
        for j in used:
            basis = np.ones(u.shape)
            for i in (i for i in used if i != j):
                gap = lam[..., j, None] - lam[..., i, None]
                basis = basis * (u - lam[..., i, None]) / gap
            parts.append(err[..., j] * np.sum(measure * basis, axis=-1))
        if s < 3 or size == 1:
            alone = alone + np.sqrt(sum(part**2 for part in parts))
        else:
            for j, part in zip(used, parts, strict=True):
                together[..., j] += part
    return alone + np.abs(together).sum(axis=-1)
