"""Restart sampling: go back up to a higher noise level, several times, and down again.

The noise of each return contracts the error that has accumulated, while the way down is a
deterministic solver's; so a large budget gains where an ODE solver has long converged.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from diffsamp import schedules
from diffsamp._core.checks import expect_int, expect_times
from diffsamp._core.numeric import is_concrete
from diffsamp._core.types import Array, Times, Value
from diffsamp.processes import Process
from diffsamp.solvers._builder import Builder
from diffsamp.solvers.edm import heun
from diffsamp.tableau import Tableau

__all__ = ["PUBLISHED", "RestartInterval", "restart", "travel"]


class RestartInterval(NamedTuple):
    """One interval of a Restart configuration.

    Attributes:
      points: noise levels of the way down, ends included (the authors' N_Restart).
      repeats: how often (K).
      low: sigma / alpha at its bottom; the nearest point of the main grid is taken.
      high: sigma / alpha at its top.
    """

    points: int
    repeats: int
    low: float
    high: float


_LOW = (0.06, 0.30)
_LEVELS = ((19.35, 40.79), (1.09, 1.92), (0.59, 1.09), (0.30, 0.59), _LOW)


def _configuration(
    steps: int, *intervals: tuple[int, int, tuple[float, float]]
) -> tuple[int, tuple[RestartInterval, ...]]:
    return steps, tuple(RestartInterval(points, k, *ends) for points, k, ends in intervals)


def _imagenet(steps: int, *counts: tuple[int, int]) -> tuple[int, tuple[RestartInterval, ...]]:
    return _configuration(
        steps, *((points, k, ends) for (points, k), ends in zip(counts, _LEVELS, strict=True))
    )


# main Heun steps and intervals of the paper's tables 3 and 5, by model and network evaluations:
# EDM's (and PFGM++'s) CIFAR-10 model, the VP one of the same, and EDM's ImageNet-64 model
PUBLISHED: dict[str, tuple[int, tuple[RestartInterval, ...]]] = {
    "cifar10-43": _configuration(18, (3, 2, (0.14, 0.30))),
    "cifar10_vp-43": _configuration(18, (3, 2, _LOW)),
    "cifar10_vp-55": _configuration(18, (3, 5, _LOW)),
    "cifar10_vp-75": _configuration(18, (3, 10, _LOW)),
    "cifar10_vp-115": _configuration(18, (3, 20, _LOW)),
    "cifar10_vp-519": _configuration(20, (9, 30, (0.06, 0.20))),
    "imagenet64-39": _configuration(14, *((3, 1, _LEVELS[i]) for i in (0, 1, 4))),
    "imagenet64-67": _configuration(18, *((5, 1, _LEVELS[i]) for i in (0, 1, 2, 4))),
    "imagenet64-99": _imagenet(18, (3, 1), (4, 1), (4, 4), (4, 1), (4, 4)),
    "imagenet64-165": _imagenet(18, (3, 1), (4, 1), (4, 5), (4, 5), (4, 10)),
    "imagenet64-203": _imagenet(36, (4, 1), (4, 1), (4, 5), (4, 5), (6, 6)),
    "imagenet64-385": _imagenet(36, (3, 1), (6, 1), (6, 5), (6, 5), (6, 20)),
    "imagenet64-535": _imagenet(36, (6, 1), (6, 1), (7, 6), (7, 6), (7, 25)),
    "imagenet64-623": _imagenet(36, (10, 3), (10, 3), (7, 6), (7, 6), (7, 25)),
}


_HEUN = functools.partial(heun, clean_end="euler")


def restart(
    process: Process,
    times: Times,
    *,
    intervals: Sequence[tuple[int, int, float, float]] = PUBLISHED["cifar10-43"][1],
    solver: Callable[[Process, Value], Tableau] = _HEUN,
    down: Callable[[Process, Array], Tableau] | None = None,
    noise_scale: float = 1.0,
) -> Tableau:
    """Restart around any deterministic solver.

    After the main grid has come down to an interval's lowest level, repeat: add noise up to its
    highest, and come down again on Karras's grid (rho 7) of the interval's points with the same
    solver. Each piece starts without history. With Heun's method and n main steps to sigma = 0 the
    evaluations are 2 n - 1 + sum 2 (points - 1) repeats. No intervals, or none repeated, give the
    solver's own tableau.

    The authors' code also has EDM's churn within restarts (gamma = 0.05 by default), which their
    paper's algorithm has not; pass a `down` with churn for it.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times of the main grid.
      intervals: (points, repeats, low, high) each, as `RestartInterval`. Two that fall on one point
        of the grid are both carried out, in the order given.
      solver: (process, times) -> Tableau; Heun's method, which ends with one evaluation.
      down: the solver within restarts; None: the same.
      noise_scale: standard deviation of the added noise, the authors' S_noise.

    Returns:
      A tableau whose noise rows make no evaluation.

    Raises:
      ValueError: an interval that is empty, outside the grid, or at its clean end.

    Reference: Xu et al. 2023, arXiv:2306.14878, algorithm 1.
    """
    times = expect_times(times)
    main = solver(process, times)
    plans: dict[int, list[RestartInterval]] = {}
    rho = np.exp(-process.log_snr(times))
    for interval in intervals:
        one = RestartInterval(*interval)
        expect_int(one.points, "points", at_least=2)
        expect_int(one.repeats, "repeats", at_least=0)
        at = int(np.argmin(np.abs(rho - one.low)))
        if rho[at] == 0 or not rho[at] < one.high <= rho[0]:
            raise ValueError(
                f"restart interval {tuple(one)} must lie within the grid, above its clean end: its "
                f"lowest level falls on sigma / alpha = {rho[at]:g}, the grid starts at {rho[0]:g}."
            )
        if one.repeats:
            plans.setdefault(at, []).append(one)
    if not plans:
        return main
    pieces, done = list[Tableau](), 0
    for at in sorted(plans):
        if at > done:
            pieces.append(solver(process, times[done : at + 1]))
        for one in plans[at]:
            low, high = float(times[at]), float(process.time(-np.log(one.high)))
            grid = schedules.karras(process, one.points - 1, t_max=high, t_min=low, final="t_min")
            up = _renoise(process, low, high, noise_scale)
            pieces.extend([up, (down or solver)(process, grid)] * one.repeats)
        done = at
    if done < len(times) - 1:
        pieces.append(solver(process, times[done:]))
    joined = pieces[0]
    for piece in pieces[1:]:
        joined = joined.then(piece)
    source = "; ".join(filter(None, ["arXiv:2306.14878, algorithm 1", main.source]))
    return dataclasses.replace(joined, name=f"restart({main.name})", source=source)


def _renoise(process: Process, low: float, high: float, noise_scale: float) -> Tableau:
    """One row without evaluation: x / alpha + sqrt(rho_high^2 - rho_low^2) z."""
    builder = Builder(process, [high, low])
    top, bottom = builder.points
    added = np.sqrt(top.rho**2 - bottom.rho**2)
    return Tableau.create(
        times=[low, high],
        alpha=[bottom.alpha, top.alpha],
        sigma=[bottom.sigma, top.sigma],
        target=[[1.0, 0.0]],
        a=[[top.alpha / bottom.alpha]],
        b=[[0.0]],
        c=[top.alpha * added * noise_scale],
        evaluates=[False],
        check="full" if noise_scale == 1 else "mean",
    )


def travel(tableau: Tableau, repeats: Array) -> Tableau:
    """Every row several times, with the forward process back up between: time travel.

    Between two passes of a row the state goes back to where it began, x <- (alpha / alpha') x'
    + sqrt(sigma^2 - (alpha sigma' / alpha')^2) z, without evaluation. RePaint, FreeDoM, universal
    and training-free guidance travel so, over one row.

    Args:
      tableau: a sampler of one state and one output a row, towards less noise.
      repeats: passes of each row, a number or (rows,); 1 leaves a row as it is.

    Returns:
      A stochastic tableau of sum repeats evaluations, if every row makes one.

    Raises:
      ValueError: repeats below 1, rows that use earlier states or outputs or go towards more noise.

    Reference: Lugmayr et al. 2022, arXiv:2201.09865, algorithm 1; Yu et al. 2023, arXiv:2303.09833.
    """
    if not is_concrete(tableau):
        raise TypeError("travel is a host function: build the tableau outside `jit`.")
    if np.ndim(tableau.times) != 1 or np.ndim(tableau.a) != 2:
        raise ValueError("travel takes a tableau of plain numbers, before stacking.")
    if np.any(np.asarray(tableau.a)[:, 1:] != 0) or np.any(np.asarray(tableau.b)[:, 1:] != 0):
        raise ValueError(
            f"travel needs rows of one state and one output; {tableau.name!r} combines several, of "
            "points that are drawn anew. Take solvers.ddim, ddpm or renoise, or solvers.restart."
        )
    counts = np.asarray(repeats)
    if counts.shape not in ((), (tableau.rows,)) or counts.dtype.kind not in "iu":
        raise ValueError(
            f"`repeats` must be an integer, or one per row, shape ({tableau.rows},); got {repeats}."
        )
    if np.any(counts < 1):
        raise ValueError(f"`repeats` must be at least 1; got {repeats}.")
    passes = 2 * np.broadcast_to(counts, (tableau.rows,)) - 1
    row = np.repeat(np.arange(tableau.rows), passes)
    back = np.concatenate([np.arange(k) % 2 for k in passes]) == 1
    alpha, sigma = (np.asarray(v) for v in (tableau.alpha, tableau.sigma))
    ratio = alpha[:-1] / alpha[1:]
    room = sigma[:-1] ** 2 - (ratio * sigma[1:]) ** 2
    if np.any(room[row[back]] < 0):
        raise ValueError("travel needs rows towards less noise: the way back adds what they took.")
    levels = np.append(row + back, tableau.rows)  # a way back begins where its row ends

    def mixed(own: Array, way_back: Array) -> np.ndarray:
        return np.where(back, way_back, np.asarray(own)[row])

    return dataclasses.replace(
        tableau,
        times=np.asarray(tableau.times)[levels],
        alpha=alpha[levels],
        sigma=sigma[levels],
        target=np.asarray(tableau.target)[row],
        a=mixed(tableau.a[:, 0], ratio[row])[:, None],
        b=mixed(tableau.b[:, 0], 0.0)[:, None],
        c=mixed(tableau.c, np.sqrt(np.maximum(room, 0))[row]),
        evaluates=np.asarray(tableau.evaluates)[row] & ~back,
        name=f"travel({tableau.name})",
        source="; ".join(filter(None, ["arXiv:2201.09865, algorithm 1", tableau.source])),
        d=None if tableau.d is None else mixed(tableau.d, 0.0),
        asked=None if tableau.asked is None else np.asarray(tableau.asked)[row],
    )
