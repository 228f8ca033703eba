"""`regress`: a sampler by stagewise least squares, from forward evaluations alone.

The network's own trajectory is recorded once on a fine grid. On a coarse grid of it, the weights of
each row are then the solution of a linear least squares problem: to reach the recorded state at the
next point from what *this* sampler has reached and been told so far, so that a later row corrects
what an earlier one missed. The times, the first one too, are all that is left to search: from every
fixed grid, and every path of least cost, one point is moved at a time and the weights are solved
anew (variable projection, Golub & Pereyra 1973, doi:10.1137/0710036). The free numbers are those of
bespoke non-stationary solvers (Shaul et al. 2024, arXiv:2403.01329); nothing is differentiated.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import schedules, solvers
from diffsamp._core.checks import expect_int, expect_times
from diffsamp._core.digest import seed_of
from diffsamp._core.sharding import put
from diffsamp._core.types import Bound, Conditions, Key, Network, PyTree, Sharding
from diffsamp.predictions import level_at
from diffsamp.processes import Process
from diffsamp.sampling import trajectory
from diffsamp.score import ScoreFn
from diffsamp.search._network import describe_network
from diffsamp.search.dynamic import Costs, pair_costs
from diffsamp.search.explicit import Explicit
from diffsamp.search.objective import Progress, slice_batch
from diffsamp.search.plan import Plan
from diffsamp.search.starts import Starts
from diffsamp.tableau import Tableau

__all__ = ["fine_times", "regress"]

_WEIGHTS = (0.8, 1.0, 1.2)  # of the steps of least-cost paths: early or late ones count more
_MOVES = (8, 4, 2, 1)


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


def regress(
    score_fn: ScoreFn,
    x_T: PyTree,
    *,
    nfe: int,
    key: Key,
    cond: Conditions | None = None,
    reference: Tableau | PyTree = None,
    points: int | PyTree = 95,
    held_out: int | None = None,
    batch: int = 64,
    ridge: float = 1e-6,
    evaluations: int | None = None,
    data_range: float = 2.0,
    sharding: Sharding = None,
    progress: Progress | None = None,
) -> Plan:
    """Find a sampler of `nfe` evaluations for this network by least squares.

    Args:
      score_fn: the network, batched; only ever called forward.
      x_T: (n, ...) starts at the process's t_max, an array. 32 that fit are enough.
      nfe: the budget.
      key: random key for which of the starts fit, decide and report.
      cond: keyword arguments for the network, every array with the leading axis n.
      reference: the samples to come close to, shaped like x_T, or the tableau that makes them;
        None: where the fine trajectory ends.
      points: of the fine grid, or its times, (M + 1,) falling; see `fine_times`.
      held_out: how many of the n starts are kept from fitting, half of them to decide between
        grids and half to report; at least 2. None: a quarter.
      batch: samples at a time; the states and answers of all are on the host.
      ridge: added to the normal equations, in units of their mean diagonal.
      evaluations: stop the search of times once so many network evaluations were spent on it, the
        reference included; None: when no move helps.
      data_range: largest minus smallest value of the data, for the PSNR.
      sharding: over the batch axis, as for `run`.
      progress: called with (what, done, total).

    Returns:
      A `Plan` for starts at t_max; its `start` is the best fixed grid with weights of its own. Its
      settings say how many evaluations were spent.

    Raises:
      ValueError: too few starts, no grid that gives finite samples, or a trajectory that is not
        finite.
    """
    began = time.perf_counter()
    nfe = expect_int(nfe, "nfe", at_least=1)
    starts = Starts.split(score_fn, x_T, cond, key, held_out, batch, sharding)
    if reference is not None:
        starts.expect_reference(reference, progress)
    times = fine_times(score_fn.process, points) if np.ndim(points) == 0 else expect_times(points)
    if nfe > len(times) - 1:
        raise ValueError(f"{nfe} evaluations need as many points; the fine grid has {len(times)}.")
    limit = np.inf if evaluations is None else expect_int(evaluations, "evaluations", at_least=1)
    record = _Record.make(starts, times, progress)
    search = _Walker(starts, record, ridge, limit)

    walked = []
    grids = _start_grids(score_fn.process, record, starts.fit, nfe)
    for i, (name, grid) in enumerate(grids.items()):
        walked.append((search(grid), name))
        if progress is not None:
            progress("fixed grids", i + 1, len(grids))
        if starts.spent >= limit:
            break
    walked = [(walk, name) for walk, name in walked if np.isfinite(walk.error)]
    if not walked:
        raise ValueError(
            "every grid gave samples that are not finite: look at the network first, with a fine "
            "solver."
        )
    first, name = min(walked, key=lambda pair: pair[0].error)
    found = [first, *search.descend(first, progress)]
    tableaux = [
        record.table(walk).tableau(
            score_fn.process,
            name=f"regressed, {nfe} NFE",
            source="diffsamp.search.regress (after arXiv:2403.01329)",
        )
        for walk in found
    ]
    # every grid kept on the way, and only those, asks the deciding starts
    decided = [starts.decide(tableau) for tableau in tableaux]
    best = tableaux[int(np.argmin(decided))]
    scores = starts.scores(tableaux[0], best, data_range)
    settings = {
        "nfe": nfe,
        "starts": starts.size,
        "held_out": starts.size - starts.fit,
        "points": len(times) - 1,
        "ridge": ridge,
        "grids": search.walks,
        "discarded": search.discarded,
        "evaluations": starts.spent,
    }
    return Plan(
        best,
        "regress",
        f"least squares on {name}",
        scores,
        tuple((i, w.error, decided[i]) for i, w in enumerate(found)),
        time.perf_counter() - began,
        settings,
        seed_of(key),
        network=describe_network(score_fn, best, x_T=x_T, data_range=data_range),
    )


@dataclasses.dataclass(frozen=True)
class _Record:
    """The network's own trajectory on the fine grid.

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
    def make(cls, starts: Starts, times: np.ndarray, progress: Progress | None) -> _Record:
        tableau = solvers.unipc(starts.score_fn.process, times, order=3)
        states, answers = [], []
        for low in range(0, starts.size, starts.batch):
            high = min(low + starts.batch, starts.size)
            x, cond = (
                put(slice_batch(v, low, high), starts.sharding) for v in (starts.x_T, starts.cond)
            )
            path = trajectory(starts.score_fn, tableau, x, cond=cond)
            states.append(np.asarray(path.points, np.float32))
            answers.append(np.asarray(path.outputs, np.float32))
            if progress is not None:
                progress("recording the trajectory", high, starts.size)
        starts.spent += starts.size * tableau.nfe
        joined = np.concatenate(states, axis=1)
        if not np.all(np.isfinite(joined)):
            raise ValueError(
                "the fine trajectory is not finite: the network returned NaN or inf. Look at its "
                "samples with a fine solver first."
            )
        if starts.reference is None:
            starts.reference = jnp.asarray(joined[-1], starts.x_T.dtype)
        else:
            joined[-1] = np.asarray(starts.reference, np.float32)
        levels = tableau.times, tableau.alpha, tableau.sigma
        return cls(*levels, joined, np.concatenate(answers, axis=1))

    def step(self, i: int, j: int) -> tuple[float, float]:
        """(sigma'/sigma, kappa) of a step from point i to point j."""
        ratio = self.sigma[j] / self.sigma[i]
        return ratio, self.alpha[j] - self.alpha[i] * ratio

    def table(self, walk: _Walk) -> Explicit:
        """The sampler of a walk."""
        grid = np.array(walk.grid)
        weights = np.zeros((len(walk.rows), len(walk.rows)))
        for n, row in enumerate(walk.rows):
            weights[n, : n + 1] = row * self.step(grid[n], grid[n + 1])[1]
        return Explicit(self.times[grid], self.alpha[grid], self.sigma[grid], weights)


@dataclasses.dataclass(frozen=True)
class _Walk:
    """A grid, the weights solved on it, what was reached and told, and the error at the end.

    Attributes:
      grid: (N + 1,) indices of fine points, the last the end.
      rows: row n, (n + 1,), sums to 1.
      states: u_0 .. u_{N-1} of the fitting starts.
      answers: D_0 .. D_{N-1}.
      error: mean log squared error of u_N over them; inf if anything is not finite.
    """

    grid: tuple[int, ...]
    rows: tuple[np.ndarray, ...]
    states: tuple[np.ndarray, ...]
    answers: tuple[np.ndarray, ...]
    error: float


class _Walker:
    """Solves grids, and counts what that costs."""

    def __init__(self, starts: Starts, record: _Record, ridge: float, limit: float) -> None:
        self.starts, self.record, self.fit = starts, record, starts.fit
        self.cond = slice_batch(starts.cond, 0, starts.fit)
        self.ridge, self.limit = ridge, limit
        self.walks = self.discarded = 0
        self._firsts: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        level = level_at(starts.score_fn.process, record.times[:-1])
        ones = np.ones(len(level.t))
        self.bound = starts.score_fn.bind(level, (ones, 0 * ones))
        starts.score_fn.check_bound(self.bound, level, ones.astype(bool))

    def ask(self, x: np.ndarray, i: int) -> np.ndarray:
        """What the network says about the data at state x and fine point i."""
        bound = jax.tree.map(lambda array: np.float32(array[i]), self.bound)
        batch, sharding, answers = self.starts.batch, self.starts.sharding, []
        for low in range(0, self.fit, batch):
            high = min(low + batch, self.fit)
            own = put(slice_batch(self.cond, low, high), sharding)
            answers.append(_ask(self.starts.score_fn, put(x[low:high], sharding), bound, own))
        self.starts.spent += self.fit
        return np.concatenate([np.asarray(a, np.float32) for a in answers])

    def first(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """The state and the answer of a sampler that starts at fine point i."""
        if i not in self._firsts:
            x_T = self.record.states[0, : self.fit]
            if i == 0:
                self._firsts[i] = x_T, self.record.answers[0, : self.fit]
            else:
                x = np.float32(self.record.sigma[i] / self.record.sigma[0]) * x_T
                self._firsts[i] = x, self.ask(x, i)
        return self._firsts[i]

    def __call__(self, grid: Sequence[int], near: _Walk | None = None) -> _Walk:
        """Solve a grid; what `near` has in common with it is taken over."""
        grid, record = tuple(int(i) for i in grid), self.record
        known = 0
        if near is not None:
            same = [a == b for a, b in zip(grid, near.grid, strict=True)]
            known = same.index(False) if False in same else len(grid)
        states = list(near.states[:known]) if near else []
        answers = list(near.answers[:known]) if near else []
        rows = list(near.rows[: max(known - 1, 0)]) if near else []
        if not states:
            x, told = self.first(grid[0])
            states, answers = [x], [told]
        x = states[-1]
        for n in range(len(rows), len(grid) - 1):
            row, x = self.row(states[n], answers[: n + 1], grid[n], grid[n + 1])
            rows.append(row)
            if n + 1 < len(grid) - 1:
                if not np.all(np.isfinite(x)):
                    break
                states.append(x)
                answers.append(self.ask(x, grid[n + 1]))
        self.walks += 1
        end = record.states[-1, : self.fit]
        axes = tuple(range(1, end.ndim))
        with np.errstate(all="ignore"):
            squared = np.mean(np.square(x - end, dtype=np.float64), axis=axes)
            error = float(np.mean(np.log(np.maximum(squared, np.finfo(np.float32).tiny))))
        if len(rows) < len(grid) - 1 or not np.isfinite(error):
            self.discarded += 1
            error = np.inf
        return _Walk(grid, tuple(rows), tuple(states), tuple(answers), error)

    def row(
        self, x: np.ndarray, answers: Sequence[np.ndarray], i: int, j: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The weights of the step from point i to j, which sum to 1, and the state it reaches."""
        ratio, kappa = self.record.step(i, j)
        latest = answers[-1].astype(np.float64)
        base = ratio * x + kappa * latest
        if len(answers) == 1:
            return np.ones(1), base.astype(np.float32)
        others = np.stack([a - latest for a in answers[:-1]]).reshape(len(answers) - 1, -1)
        wanted = ((self.record.states[j, : self.fit] - base) / kappa).reshape(-1)
        normal = others @ others.T
        normal[np.diag_indices_from(normal)] += self.ridge * np.trace(normal) / len(normal)
        if not np.all(np.isfinite(normal)) or not np.trace(normal) > 0:
            weights: np.ndarray = np.zeros(len(normal))
        else:
            weights = np.linalg.solve(normal, others @ wanted)
        new = base + kappa * (weights @ others).reshape(base.shape)
        return np.append(weights, 1 - weights.sum()), new.astype(np.float32)

    def descend(self, start: _Walk, progress: Progress | None) -> list[_Walk]:
        """Move one point at a time while that helps; what was kept, a walk per round."""
        best, kept = start, []
        for stage, step in enumerate(_MOVES):
            moved = True
            while moved and self.starts.spent < self.limit:
                moved = False
                # late points first: what lies before them need not be asked again
                for i in reversed(range(len(best.grid) - 1)):
                    for shift in (-step, step):
                        trial = list(best.grid)
                        trial[i] += shift
                        if trial[0] < 0 or np.any(np.diff(trial) <= 0):
                            continue
                        if self.starts.spent >= self.limit:
                            break
                        walk = self(trial, best)
                        if walk.error < best.error:
                            best, moved = walk, True
                if moved:
                    kept.append(best)
            if progress is not None:
                progress("moving times", stage + 1, len(_MOVES))
        return kept


@jax.jit
def _ask(score_fn: Network, x: PyTree, bound: Bound, cond: Conditions | None) -> PyTree:
    return score_fn.predict(x, bound, cond)


def _start_grids(
    process: Process, record: _Record, fit: int, nfe: int
) -> dict[str, tuple[int, ...]]:
    """Every fixed schedule that fits and the paths of least cost, as indices of fine points."""
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
