"""The grids on which `regress` starts: fine points, and coarse grids of them."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from diffsamp import schedules
from diffsamp._core.checks import expect_int
from diffsamp.processes import Process
from diffsamp.search.dynamic import Costs, pair_costs

__all__ = ["Recorded", "fine_times", "start_grids"]

_WEIGHTS = (0.8, 1.0, 1.2)  # of the steps of least-cost paths: early or late ones count more


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A network's own trajectory on a fine grid.

    Attributes:
      times, alpha, sigma: (M + 1,) of the points.
      states: (M + 1, n, ...) float32 on the host; the last is where samplers should end.
      answers: (M, n, ...) data predictions there.
    """

    times: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    states: np.ndarray
    answers: np.ndarray


def fine_times(process: Process, points: int = 95) -> np.ndarray:
    """A grid that is fine wherever any schedule puts points: (M + 1,) falling times, M <= points.

    Three parts in five uniform in log-SNR, two in t, without pairs closer than 0.02 in log-SNR.

    Args:
      process: the noise process.
      points: how many at most, at least 4.
    """
    points = expect_int(points, "points", at_least=4)
    one = schedules.logsnr(process, max(2, 3 * points // 5))
    two = schedules.uniform(process, max(2, points - len(one) + 1))
    times = np.unique(np.concatenate([one, two]))[::-1]
    with np.errstate(divide="ignore"):
        log_snr = np.log(process.alpha(times)) - np.log(process.sigma(times))
    kept = [0]
    for i in range(1, len(times) - 1):
        if log_snr[i] - log_snr[kept[-1]] >= 0.02:
            kept.append(i)
    return times[[*kept, len(times) - 1]]


def start_grids(
    process: Process, record: Recorded, fit: int, nfe: int
) -> dict[str, tuple[int, ...]]:
    """Every fixed schedule that fits and the paths of least cost, as indices of fine points.

    Args:
      process: the noise process.
      record: the network's own trajectory on the fine grid.
      fit: how many of its starts may be looked at.
      nfe: the budget.
    """
    last = len(record.times) - 1
    with np.errstate(divide="ignore"):
        log_snr = np.log(record.alpha[:-1]) - np.log(record.sigma[:-1])
    finite = np.where(np.isfinite(log_snr), log_snr, log_snr[np.isfinite(log_snr)].min() - 1.0)
    grids: dict[str, tuple[int, ...]] = {}
    for name in schedules.names(process):
        try:
            times = np.asarray(schedules.get(name)(process, nfe))
        except ValueError:
            continue  # it does not fit this process or budget
        if len(times) != nfe + 1:
            continue
        with np.errstate(divide="ignore"):
            own = np.log(process.alpha(times[:-1])) - np.log(process.sigma(times[:-1]))
        near = [int(np.argmin(np.abs(finite - max(v, finite[0])))) for v in own]
        grids[name] = (*near, last)
    batch = max(1, min(fit, 64))
    arguments = [jnp.asarray(v, jnp.float32) for v in (record.alpha, record.sigma)]
    for kind in ("local", "distance"):
        cost = np.asarray(
            pair_costs(
                jnp.asarray(record.states[:, :batch]),
                jnp.asarray(record.answers[:, :batch]),
                *arguments,
                kind=kind,
            ),
            np.float64,
        )
        costs = Costs(record.times, np.triu(cost / batch, 1))
        for weight in _WEIGHTS:
            label = f"the path of least {kind} cost, weight {weight:g}"
            grids[label] = tuple(costs.path(nfe, weight=weight))
    unique: dict[tuple[int, ...], str] = {}
    for name, grid in grids.items():
        if np.all(np.diff(grid) > 0):
            unique.setdefault(grid, name)
    return {name: grid for grid, name in unique.items()}
