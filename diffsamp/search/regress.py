"""`regress`: a sampler by stagewise least squares, from forward evaluations alone.

The network's own trajectory is recorded once on a fine grid. On a coarse grid of it, the weights of
each row are then the solution of a linear least squares problem: to reach the recorded state at the
next point from what *this* sampler has reached and been told so far, so that a later row corrects
what an earlier one missed. The times, the first one too, are all that is left to search: of all
fixed grids and paths of least cost the best few go on, one point is moved at a time and the weights
are solved anew (variable projection, Golub & Pereyra 1973, doi:10.1137/0710036). The free numbers
are those of bespoke non-stationary solvers (Shaul et al. 2024, arXiv:2403.01329); nothing is
differentiated.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from diffsamp import solvers
from diffsamp._core.checks import expect_int
from diffsamp._core.types import Conditions, Key, PyTree, Sharding, Times
from diffsamp.predictions import level_at
from diffsamp.score import ScoreFn
from diffsamp.search._cost import at_row, expect_limit
from diffsamp.search.explicit import Explicit
from diffsamp.search.fine import Recorded, fine_tableau, start_grids
from diffsamp.search.objective import cost_of_reference, teacher
from diffsamp.search.plan import Plan
from diffsamp.search.running import Progress
from diffsamp.search.starts import Starts
from diffsamp.tableau import Tableau

__all__ = ["Regression", "likely", "regress"]

_MOVES = (8, 4, 2, 1)
_BEGUN = 12  # evaluations of all grids together that are moved: short samplers have many valleys
_WALKS = 100  # grids that are solved, as a rule: for the estimate


def likely(fit: int, held_out: int, budgets: Sequence[int], points: int = 0) -> int:
    """Evaluations of a regression on networks that count one a call, as a rule.

    Args:
      fit: starts that fit.
      held_out: starts that do not.
      budgets: evaluations of the samplers.
      points: of the fine trajectory; 0: it is there.
    """
    return (fit + held_out) * points + fit * sum(budgets) * _WALKS


def regress(
    score_fn: ScoreFn,
    x_T: PyTree,
    *,
    nfe: int,
    key: Key,
    cond: Conditions | None = None,
    reference: Tableau | PyTree = None,
    points: int | Times | None = None,
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
      points: of the fine grid, or its times, (M + 1,) falling; None: 64, or 6 per evaluation.
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
    starts = Starts.split(score_fn, x_T, cond, key, held_out, batch, sharding)
    regression = Regression.on(
        starts,
        [expect_int(nfe, "nfe", at_least=1)],
        reference=reference,
        points=points,
        evaluations=evaluations,
        progress=progress,
    )
    return regression.plan(
        nfe, ridge=ridge, evaluations=evaluations, data_range=data_range, progress=progress
    )


@dataclasses.dataclass
class Regression:
    """A recorded trajectory from which samplers of several budgets are regressed.

    Attributes:
      starts: where it began.
      record: the trajectory.
    """

    starts: Starts
    record: Recorded

    @classmethod
    def on(
        cls,
        starts: Starts,
        budgets: Sequence[int],
        *,
        reference: Tableau | PyTree = None,
        points: int | Times | None = None,
        evaluations: int | None,
        progress: Progress | None,
    ) -> Regression:
        """Record the trajectory on starts that are split, with a reference of their own or None."""
        score_fn = starts.score_fn
        tableau = fine_tableau(score_fn, points, max(budgets))
        fine = tableau.rows
        limit = expect_limit(evaluations)
        recorded = starts.size
        if reference is not None or starts.reference is not None:
            recorded = starts.fit
        before: float = recorded * fine
        if reference is not None:
            before += starts.size * cost_of_reference(score_fn, reference)
        if limit < before:
            raise ValueError(
                f"`evaluations` is too low: trajectory and reference alone take {before:.0f}; give "
                "more, or fewer starts or points."
            )
        expected = before + likely(starts.fit, 0, budgets)
        starts.widen(max(budgets))
        what = f"regress, {', '.join(map(str, budgets))} NFE"
        starts.announce(what, min(expected, limit), 2 * (fine + 1) * recorded / starts.size)
        if reference is not None:
            starts.expect_reference(reference, progress)
        record = Recorded.make(starts, tableau, progress)
        return cls(starts, record)

    def plan(
        self,
        nfe: int,
        *,
        ridge: float = 1e-6,
        evaluations: int | None,
        data_range: float,
        progress: Progress | None,
    ) -> Plan:
        """The plan of one budget; arguments as for `regress`.

        Args:
          nfe: the budget.
          ridge: as there.
          evaluations: as there.
          data_range: as there.
          progress: as there.
        """
        starts, record = self.starts, self.record
        process = starts.score_fn.process
        search = _Walker(starts, record, ridge, starts.counted + expect_limit(evaluations))
        grids = start_grids(process, record, starts.fit, nfe)
        # where known answers replace some, no grid may ask more than one that begins at t_max
        search.budget = max(
            search.cost(grid) for grid in [range(nfe + 1), *grids.values()] if grid[0] == 0
        )
        grids = {name: grid for name, grid in grids.items() if search.cost(grid) <= search.budget}
        walked = []
        for i, (name, grid) in enumerate(grids.items()):
            walked.append((search(grid), name))
            if progress is not None:
                progress("fixed grids", i + 1, len(grids))
            if starts.spent >= search.limit:
                break
        walked = [(walk, name) for walk, name in walked if np.isfinite(walk.error)]
        if not walked:
            raise ValueError(
                "every grid gave samples that are not finite: look at the network first, with a "
                "fine solver."
            )
        walked.sort(key=lambda pair: pair[0].error)
        name = walked[0][1]
        begun = [walk for walk, _ in walked[: max(1, _BEGUN // nfe)]]
        found = search.descend(begun, progress)
        tableaux = [
            _table(record, walk).tableau(
                process,
                name=f"regressed, {nfe} NFE",
                source="diffsamp.search.regress (after arXiv:2403.01329)",
            )
            for walk in found
        ]
        # every grid kept on the way, and only those, asks the deciding starts
        decided = [starts.decide(tableau) for tableau in tableaux]
        best = tableaux[int(np.argmin(decided))]
        settings = {
            "points": len(record.times) - 1,
            "ridge": ridge,
            "grids": search.walks,
            "discarded": search.discarded,
        }
        return starts.plan(
            "regress",
            best,
            tableaux[0],
            settings=settings,
            history=[(i, walk.error, decided[i]) for i, walk in enumerate(found)],
            data_range=data_range,
            start=f"least squares on {name}",
        )


def _table(record: Recorded, walk: _Walk) -> Explicit:
    """The sampler of a walk."""
    grid = np.array(walk.grid)
    weights = np.zeros((len(walk.rows), len(walk.rows)))
    for n, row in enumerate(walk.rows):
        weights[n, : n + 1] = row * record.step(grid[n], grid[n + 1])[1]
    return Explicit(record.times[grid], record.alpha[grid], record.sigma[grid], weights)


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

    def __init__(self, starts: Starts, record: Recorded, ridge: float, limit: float) -> None:
        self.starts, self.record, self.fit = starts, record, starts.fit
        self.ridge, self.limit = ridge, limit
        self.walks = self.discarded = 0
        self.budget = np.inf  # network evaluations of a sampler, at most
        self._firsts: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        level = level_at(starts.score_fn.process, record.times[:-1])
        ones = np.ones(len(level.t))
        self.bound = starts.score_fn.bind(level, (ones, 0 * ones))
        starts.score_fn.check_bound(self.bound, level, ones.astype(bool))
        # what the network counts at each fine point: guidance twice, say, a known answer nothing
        one = solvers.ddim(starts.score_fn.process, record.times)
        asks = np.eye(one.rows, dtype=bool)
        self.costs = [starts.cost(dataclasses.replace(one, evaluates=row)) for row in asks]

    def ask(self, x: np.ndarray, i: int) -> np.ndarray:
        """What the network says about the data at state x and fine point i."""
        self.starts.spent += self.fit * self.costs[i]
        return self.starts.ask(x, at_row(self.bound, i), 0, self.fit)

    def cost(self, grid: Sequence[int]) -> float:
        """Network evaluations of a sampler on a grid, per sample."""
        return sum(self.costs[i] for i in grid[:-1])

    def first(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """The state and the answer of a sampler that starts at fine point i."""
        if i not in self._firsts:
            x_T = self.record.states[0, : self.fit]
            if i == 0 and teacher(self.starts.score_fn) is self.starts.score_fn:
                self._firsts[i] = x_T, self.record.answers[0, : self.fit]
            else:
                x = x_T if i == 0 else np.float32(self.record.sigma[i] / self.record.sigma[0]) * x_T
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

    def descend(self, begun: Sequence[_Walk], progress: Progress | None) -> list[_Walk]:
        """Move one point at a time while that helps; what was kept, a walk per round.

        From each of several walks, the best first, by the largest moves, then from where the best
        of them led by all.
        """
        tried = {walk.grid for walk in begun}
        ends = itertools.chain(*(self._move(walk, _MOVES[0], tried)[-1:] for walk in begun))
        best = min(ends, key=lambda walk: walk.error, default=begun[0])
        kept = [begun[0]] if best.error >= begun[0].error else [begun[0], best]
        for stage, step in enumerate(_MOVES):
            kept += self._move(kept[-1], step, tried)
            if progress is not None:
                progress("moving times", stage + 1, len(_MOVES))
        return kept

    def _move(self, best: _Walk, step: int, tried: set[tuple[int, ...]]) -> list[_Walk]:
        """From one walk, by moves of so many points; `tried` are grids that need not be tried."""
        kept, moved = [], True
        while moved and self.starts.spent < self.limit:
            moved = False
            # late points first: what lies before them need not be asked again
            for i in reversed(range(len(best.grid) - 1)):
                for shift in (-step, step):
                    trial = list(best.grid)
                    trial[i] += shift
                    if trial[0] < 0 or np.any(np.diff(trial) <= 0):
                        continue
                    if tuple(trial) in tried or self.cost(trial) > self.budget:
                        continue
                    if self.starts.spent >= self.limit:
                        break
                    tried.add(tuple(trial))
                    walk = self(trial, best)
                    if walk.error < best.error:
                        best, moved = walk, True
            if moved:
                kept.append(best)
        return kept
