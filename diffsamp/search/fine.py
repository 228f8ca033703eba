"""The grids on which `regress` starts: fine points, and coarse grids of them."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from diffsamp import schedules, solvers
from diffsamp._core.checks import expect_int, expect_times
from diffsamp._core.types import Times
from diffsamp.processes import Process
from diffsamp.score import ScoreFn
from diffsamp.search._tails import run_table
from diffsamp.search.dynamic import Costs, pair_costs
from diffsamp.search.explicit import Explicit
from diffsamp.search.objective import first_time, teacher
from diffsamp.search.running import Progress
from diffsamp.search.starts import Starts
from diffsamp.tableau import Tableau

__all__ = ["Recorded", "fine_tableau", "fine_times", "start_grids"]

_LEAST, _EACH = 64, 6  # points at least, and per evaluation of the largest budget
_DENSE = 2000  # points of the curve that is inverted
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

    @classmethod
    def make(cls, starts: Starts, tableau: Tableau, progress: Progress | None) -> Recorded:
        """Record it on the starts that fit; on all, if where it ends is to be their reference.

        Args:
          starts: of the search.
          tableau: of `fine_tableau`.
          progress: as for `run`.

        Raises:
          ValueError: a trajectory that is not finite.
        """
        table = Explicit.of(tableau)
        whole = starts.reference is None
        # as the search asks: those that fit at once, in the program that all its grids share
        spans = [(0, starts.fit), (starts.fit, starts.size)][: 1 + whole]
        paths = []
        for low, high in spans:
            paths.append(run_table(starts, table, low, high, network=teacher(starts.score_fn)))
            if progress is not None:
                progress("recording the trajectory", high, spans[-1][1])
        states, answers = (
            np.concatenate([np.asarray(getattr(path, name), np.float32) for path in paths], axis=1)
            for name in ("states", "answers")
        )
        if not np.all(np.isfinite(states)):
            raise ValueError(
                "the fine trajectory is not finite: the network returned NaN or inf. Look at its "
                "samples with a fine solver first."
            )
        if whole:
            starts.reference = jnp.asarray(states[-1], starts.x_T.dtype)
        else:
            states[-1] = np.asarray(starts.reference[: starts.fit], np.float32)
        return cls(tableau.times, tableau.alpha, tableau.sigma, states, answers)

    def step(self, i: int, j: int) -> tuple[float, float]:
        """(sigma'/sigma, kappa) of a step from point i to point j."""
        ratio = self.sigma[j] / self.sigma[i]
        return ratio, self.alpha[j] - self.alpha[i] * ratio


def fine_tableau(score_fn: ScoreFn, points: int | Times | None, nfe: int) -> Tableau:
    """The sampler whose points are those among which `regress` chooses.

    Args:
      score_fn: the network.
      points: M, or (M + 1,) falling times; None: enough for a budget.
      nfe: the largest budget.

    Raises:
      ValueError: fewer points than evaluations, or no times.
    """
    if points is None:
        points = max(_LEAST, _EACH * nfe)
    if np.ndim(points) == 0:
        times = fine_times(score_fn.process, int(points), first=first_time(score_fn))
    else:
        times = expect_times(points)
    if nfe >= len(times):
        raise ValueError(
            f"{nfe} evaluations need as many points; the fine grid has {len(times) - 1}."
        )
    return solvers.unipc(score_fn.process, times, order=3)


def fine_times(process: Process, points: int = _LEAST, *, first: float | None = None) -> np.ndarray:
    """A grid that is fine wherever any schedule puts points: (M + 1,) falling times.

    Three parts in five uniform in log-SNR, two in t, mixed smoothly: UniPC of order 3 is 80 to
    86 dB from the solution with 64 points and 88 to 98 with 95, on four networks.

    Args:
      process: the noise process.
      points: M, at least 4.
      first: where it begins; None: at t_max.
    """
    points = expect_int(points, "points", at_least=4)
    first = float(process.t_max) if first is None else first
    even = schedules.logsnr(process, _DENSE)
    last, end = even[-2:]
    times = np.unique(np.concatenate([even, np.linspace(last, first, _DENSE)]))
    times = times[(times >= last) & (times <= first)][::-1]
    with np.errstate(divide="ignore"):
        log_snr = np.log(process.alpha(times)) - np.log(process.sigma(times))
    log_snr = np.maximum(log_snr, log_snr[np.isfinite(log_snr)].min())
    level, time = ((v - v[0]) / (v[-1] - v[0]) for v in (log_snr, times))
    found = np.interp(np.linspace(0, 1, points), 0.6 * level + 0.4 * time, times)
    found[0], found[-1] = first, last
    return np.append(found, end)


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
