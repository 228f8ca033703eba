"""Grids that minimise a bound which needs no network."""

from __future__ import annotations

import functools

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
    their weighted sum, `dmn_bound`, needs no network. It is minimised by sequential quadratic
    programming on the logarithms of the steps; 10 times take a tenth of a second, 50 some.

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
    """(steps + 1,) log-SNR from low to high with the smallest bound found.

    The bound has kinks where a sum of weights changes its sign, and its minimum is at some of them.
    So the sums' absolute values are variables of their own, s_j >= |c_j|, and all is smooth.
    """

    def log_snr(z: np.ndarray) -> np.ndarray:
        share = np.exp(z - z.max(axis=-1, keepdims=True))
        reached = np.cumsum(share, axis=-1) / share.sum(axis=-1, keepdims=True)
        lam = low + (high - low) * reached
        return np.concatenate([np.full((*z.shape[:-1], 1), low), lam], axis=-1)

    @functools.lru_cache(maxsize=2)
    def terms(z: tuple[float, ...]) -> tuple[np.ndarray, ...]:
        """Both parts of the bound, and their slopes."""
        shift = 1e-6 * np.eye(steps)
        lam = log_snr(np.concatenate([np.array([z]), z + shift, z - shift]))
        parts = [np.asarray(part) / unit for part in _weights(lam, order)]
        slopes = [(part[1 : steps + 1] - part[steps + 1 :]).T / 2e-6 for part in parts]
        return parts[0][0], parts[1][0], slopes[0], slopes[1]

    def at(v: np.ndarray) -> tuple[np.ndarray, ...]:
        return terms(tuple(v[:steps]))

    def both(v: np.ndarray) -> np.ndarray:
        return np.concatenate([v[steps:] - at(v)[1], v[steps:] + at(v)[1]])

    def both_slopes(v: np.ndarray) -> np.ndarray:
        slope, one = at(v)[3], np.eye(steps + 1)
        return np.block([[-slope, one], [slope, one]])

    start = np.zeros(steps)
    unit = dmn_bound(log_snr(start), order)
    found = minimize(
        lambda v: at(v)[0] + v[steps:].sum(),
        np.concatenate([start, np.abs(terms(tuple(start))[1])]),
        jac=lambda v: np.concatenate([at(v)[2], np.ones(steps + 1)]),
        method="SLSQP",
        # no step is shorter than exp(-10) of another: a line search may try any
        bounds=[(-5.0, 5.0)] * steps + [(0.0, None)] * (steps + 1),
        constraints={"type": "ineq", "fun": both, "jac": both_slopes},
        options={"maxiter": 200, "ftol": 1e-10},
    )
    return log_snr(found.x[:steps])


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
    alone, together = _weights(np.asarray(log_snr, np.float64), order)
    return alone + np.abs(together).sum(axis=-1)


def _weights(lam: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """(...) what counts by itself in the bound, and (..., N + 1) each answer's sum of weights."""
    steps = lam.shape[-1] - 1
    err = np.exp(-np.logaddexp(0, 2 * lam) + np.logaddexp(0, -2 * lam) / 2)
    top = lam[..., -1:]  # weights relative to exp of the last, which overflows nothing
    alone = np.zeros(lam.shape[:-1])
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
    return alone, together
