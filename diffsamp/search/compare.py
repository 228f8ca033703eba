"""`compare`: every solver on every schedule at every budget, one compiled program.

With a limit it is successive halving (Jamieson & Talwalkar 2016, arXiv:1502.07943): all on a few
starts, the better half of each budget on twice as many, and so on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from diffsamp import schedules, solvers
from diffsamp._core import random
from diffsamp._core.checks import expect_choice, expect_int
from diffsamp._core.sharding import pieces_of
from diffsamp._core.types import Conditions, Key, PyTree, Sharding
from diffsamp.score import ScoreFn
from diffsamp.search._cost import Estimate, announce, expect_limit
from diffsamp.search._halving import first_round, price, rounds_of
from diffsamp.search.canonical import can_distill
from diffsamp.search.explicit import from_largest_level
from diffsamp.search.objective import cost_of_reference, finite_psnr, make_reference
from diffsamp.search.plan import Plan
from diffsamp.search.running import (
    Progress,
    expect_asked,
    expect_batch,
    run_many,
    slice_batch,
)
from diffsamp.tableau import Tableau

__all__ = ["Comparison", "Entry", "LeftOut", "candidates", "compare"]

# (samples, reference) -> a number
Score = Callable[[PyTree, PyTree], float]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One sampler, measured.

    Attributes:
      solver: the registry's name.
      schedule: the schedule's name.
      nfe: evaluations, as the tableau counts them.
      tableau: the sampler.
      psnr: dB to the reference at equal noise, mean over samples; -inf if a sample is not finite.
      scores: the caller's further scores, by name; NaN if a sample is not finite.
      starts: how many starts it was measured on; 0 for all. Successive halving measures the worse
        ones on a few.
    """

    solver: str
    schedule: str
    nfe: int
    tableau: Tableau
    psnr: float
    scores: dict[str, float]
    starts: int = 0


class LeftOut(NamedTuple):
    """A combination that could not be built, and why."""

    solver: str
    schedule: str
    nfe: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The result of `compare`.

    Attributes:
      entries: one per solver, schedule and budget that the solver can meet exactly.
      reference: the samples compared with.
      left_out: what could not be built, and why: a schedule that does not fit the budget, a solver
        that does not fit the times.
      evaluations: of the network, per sample and call, the reference included.
      estimate: what was said of the cost before it began.
    """

    entries: tuple[Entry, ...]
    reference: PyTree
    left_out: tuple[LeftOut, ...] = ()
    evaluations: float = 0
    estimate: Estimate | None = None

    @property
    def discarded(self) -> int:
        """How many samplers gave a sample that is not finite; they are listed last, never best."""
        return sum(not math.isfinite(entry.psnr) for entry in self.entries)

    def best(
        self, nfe: int, *, by: str = "psnr", where: Callable[[Entry], bool] | None = None
    ) -> Entry:
        """The best entry at a budget.

        Args:
          nfe: the budget.
          by: "psnr", which is maximised, or the name of a further score, which is minimised.
          where: consider only entries for which this is true. Those that successive halving
            dropped are not considered.

        Raises:
          ValueError: nothing was measured at this budget, or under this name, or every sampler
            there gave samples that are not finite.
        """
        found = [e for e in self.entries if e.nfe == nfe and (where is None or where(e))]
        if not found:
            have = sorted({e.nfe for e in self.entries})
            raise ValueError(f"nothing was measured at nfe = {nfe}; there is {have}.")
        most = max(e.starts or math.inf for e in found)
        found = [e for e in found if (e.starts or math.inf) == most]
        if not any(math.isfinite(e.psnr) for e in found):
            raise ValueError(
                f"all {len(found)} samplers of {nfe} evaluations gave samples that are not finite; "
                "look at the network first."
            )
        if by == "psnr":
            return max(found, key=lambda e: e.psnr)
        if by not in found[0].scores:
            raise ValueError(f"`by` must be 'psnr' or one of {list(found[0].scores)}; got {by!r}.")
        return min(found, key=lambda e: math.inf if math.isnan(e.scores[by]) else e.scores[by])

    def plan(self, score_fn: ScoreFn, nfe: int, *, by: str = "psnr") -> Plan:
        """The best entry at a budget, as a file that can be run elsewhere.

        Args:
          score_fn: the network that was compared on.
          nfe: the budget.
          by: as for `best`.

        Raises:
          ValueError: as for `best`.
        """
        entry = self.best(nfe, by=by)
        values = {"psnr": entry.psnr, **entry.scores}
        scores = {name: {"compared": {"start": v, "found": v}} for name, v in values.items()}
        return dataclasses.replace(
            Plan.of(entry.tableau, score_fn, x_T=self.reference),
            method="compare",
            start=f"{entry.solver} on {entry.schedule}",
            scores=scores,
        )

    def table(self, *, score: str | None = None, rows: int | None = None) -> str:
        """A text table: a line per solver and schedule, a column per budget.

        Args:
          score: also show this score, after the PSNR.
          rows: only the lines with the highest mean PSNR; None: all.
        """
        budgets = sorted({e.nfe for e in self.entries})
        lines: dict[tuple[str, str], dict[int, Entry]] = {}
        for entry in self.entries:
            lines.setdefault((entry.solver, entry.schedule), {})[entry.nfe] = entry

        def mean_psnr(line: tuple[str, str]) -> float:
            values = [lines[line][n].psnr for n in budgets if n in lines[line]]
            # a line that lacks budgets is compared with the others on those it has
            others = [
                np.mean([other[n].psnr for other in lines.values() if n in other])
                for n in budgets
                if n in lines[line]
            ]
            return float(np.mean(values) - np.mean(others))

        order = sorted(lines, key=mean_psnr, reverse=True)[:rows]
        best = {n: max(e.psnr for e in self.entries if e.nfe == n) for n in budgets}

        def cell(entry: Entry | None) -> str:
            if entry is None:
                return "-"
            mark = "*" if entry.psnr == best[entry.nfe] else ""
            text = f"{entry.psnr:.1f}{mark}"
            return text if score is None else f"{text} / {entry.scores[score]:.2f}"

        head = ["solver", "schedule", *(f"NFE {n}" for n in budgets)]
        body = [[*line, *(cell(lines[line].get(n)) for n in budgets)] for line in order]
        widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
        text = [
            "  ".join(
                part.ljust(width) if i < 2 else part.rjust(width)
                for i, (part, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in [head, *body]
        ]
        lines_of_text = [text[0], "-" * len(text[0]), *text[1:]]
        if self.left_out:
            names = sorted({f"{one.solver} on {one.schedule}" for one in self.left_out})
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            lines_of_text.append(
                f"left out, {len(self.left_out)} that cannot be built: {', '.join(names[:6])}{more}"
            )
        return "\n".join(lines_of_text)


def compare(
    score_fn: ScoreFn,
    x_T: PyTree,
    *,
    nfe: Sequence[int] = (4, 5, 6, 8, 10),
    solver: Sequence[str] | None = None,
    schedule: Sequence[str] | Mapping[str, Callable[..., PyTree]] | None = None,
    key: Key = None,
    cond: Conditions | None = None,
    reference: Tableau | PyTree = None,
    scores: Mapping[str, Score] | None = None,
    data_range: float = 2.0,
    batch: int | None = None,
    population: int = 1,
    halving: int | None = None,
    by: str = "psnr",
    evaluations: int | None = None,
    sharding: Sharding = None,
    progress: Progress | None = None,
) -> Comparison:
    """Measure solvers x schedules x budgets on a network.

    Every tableau is padded to one shape, so the network is compiled once for all of them.

    Args:
      score_fn: the network.
      x_T: (n, ...) starts at the process's t_max, an array; see `process.prior_sample`.
      nfe: budgets. A solver that cannot meet one exactly (Heun's method an even one) has no entry
        there.
      solver: registry names; None: all deterministic ones, and the stochastic ones if `key` is
        given.
      schedule: schedule names, or {name: function (process, n) -> times}, such as an optimised
        one; None: all that fit the process, `schedules.names(process)`, and a solver's own.
      key: random key for stochastic solvers.
      cond: keyword arguments for the network, every array with the leading axis n.
      reference: samples to compare with, shaped like x_T, or the tableau that makes them; None:
        `reference_tableau`.
      scores: further functions (samples, reference) -> number, smaller is better; for instance a
        distance to real data that ignores the reference.
      data_range: largest minus smallest value of the data, for the PSNR.
      batch: samples at a time; None: all.
      population: samplers at a time, in one batch of `batch` x `population`; more fill a GPU.
      halving: measure all on so many starts first, then the better half of each budget on twice as
        many, until all starts are used. None: all on all, unless `evaluations` says otherwise.
        Under `sharding` it is rounded up to a multiple of the devices.
      by: what halving goes by: "psnr", or the name of one of `scores`.
      evaluations: spend at most so many network evaluations, the reference included, by halving
        from as many starts as that allows.
      sharding: over the batch axis, as for `run`.
      progress: called with (what, done, total).

    Returns:
      A `Comparison`. What cannot be built is left out, counted and named there. A sampler whose
      schedule begins below t_max gets a first row that scales the start and asks nothing.

    Raises:
      ValueError: an unknown name, an empty choice, a budget below 1 or that no solver can meet,
        nothing that can be built, a reference that is not finite, or a limit that is too low.
    """
    if score_fn.batched is False:
        raise ValueError("`compare` needs a network with a batch axis, ScoreFn(batched=True).")
    process = score_fn.process
    budgets = [expect_int(n, "nfe", at_least=1) for n in nfe]
    if solver is None:
        chosen = [s for s in solvers.SOLVERS.values() if key is not None or not s.stochastic]
    else:
        chosen = [solvers.get(name) for name in solver]
    grids = schedules.names(process) if schedule is None else tuple(schedule)
    spacing = schedule if isinstance(schedule, Mapping) else {g: schedules.get(g) for g in grids}
    population = expect_int(population, "population", at_least=1)
    expect_choice(by, "by", ("psnr", *(scores or {})))
    if not (budgets and chosen and grids):
        raise ValueError("`nfe`, `solver` and `schedule` must each name at least one choice.")

    todo: list[tuple[str, str, Tableau]] = []
    left_out: list[LeftOut] = []
    for s in chosen:
        own = () if schedule is not None or s.schedule in grids else (s.schedule,)
        for grid in (*grids, *own):
            for budget in budgets:
                steps = s.steps(budget)
                if steps is None:
                    continue
                try:
                    times = spacing.get(grid, schedules.get(s.schedule))(process, steps)
                    tableau = from_largest_level(s(process, times), process)
                    expect_asked(score_fn, tableau)
                    todo.append((s.name, grid, tableau))
                except ValueError as error:
                    left_out.append(LeftOut(s.name, grid, budget, str(error)))
    if not todo and left_out:
        raise ValueError(
            f"none of the {len(left_out)} samplers can be built; {left_out[0].solver} on "
            f"{left_out[0].schedule}: {left_out[0].reason}"
        )
    if not todo:
        raise ValueError(
            f"none of {[s.name for s in chosen]} can make exactly {budgets} evaluations."
        )
    size = expect_batch(x_T, cond)
    keys = None if key is None else random.sample_keys(key, size)
    tableaux = [tableau for _, _, tableau in todo]
    padded = Tableau.pad_together(tableaux)
    costs = [score_fn.nfe(tableau) for tableau in tableaux]
    first = cost_of_reference(score_fn, reference) * size
    halving = size if halving is None else expect_int(halving, "halving", at_least=1)
    # a round of fewer starts than the mesh has devices would save nothing
    pieces = pieces_of(sharding)
    halving = min(-(-halving // pieces) * pieces, size)
    width = min(batch or size, size)
    prices = {n: [c for c, t in zip(costs, tableaux, strict=True) if t.nfe == n] for n in budgets}
    if evaluations is not None:
        spare = expect_limit(evaluations) - first - 2 * width * costs[0]
        halving = first_round(prices, size, halving, spare, pieces)
    plan = rounds_of(size, halving)
    likely = first + price(prices, plan)
    estimate, spent = announce(
        f"compare, {len(todo)} samplers",
        score_fn,
        x_T,
        cond,
        evaluations=likely,
        batch=min(width, halving),
        states=2.0,
        sharding=sharding,
        tableau=padded[0],
        key=keys,
    )
    reference = make_reference(
        score_fn,
        reference,
        x_T,
        key=key,
        cond=cond,
        batch=batch,
        sharding=sharding,
        progress=progress,
    )
    entries: dict[int, Entry] = {}
    alive = list(range(len(todo)))
    for count in plan:
        few = slice_batch(reference, 0, count)
        samples = run_many(
            score_fn,
            [padded[i] for i in alive],
            slice_batch(x_T, 0, count),
            key=None if keys is None else keys[:count],
            cond=slice_batch(cond, 0, count),
            batch=min(width, halving),
            population=population,
            sharding=sharding,
        )
        for done, (i, x) in enumerate(zip(alive, samples, strict=True)):
            finite = bool(jnp.all(jnp.isfinite(x)))
            name, grid, tableau = todo[i]
            judged = {
                label: float(score(x, few)) if finite else math.nan
                for label, score in (scores or {}).items()
            }
            psnr = finite_psnr(x, few, data_range)
            measured = 0 if count == size else count
            entries[i] = Entry(name, grid, tableau.nfe, tableau, psnr, judged, measured)
            if progress is not None:
                progress("comparing", done + 1, len(alive))
        spent += count * sum(costs[i] for i in alive)
        alive = _better_half(alive, entries, by)
    return Comparison(
        tuple(entries[i] for i in range(len(todo))),
        reference,
        tuple(left_out),
        spent + first,
        estimate,
    )


def _better_half(alive: Sequence[int], entries: Mapping[int, Entry], by: str) -> list[int]:
    """The half of every budget that goes on, at least one."""

    def error(i: int) -> float:
        value = -entries[i].psnr if by == "psnr" else entries[i].scores[by]
        return math.inf if math.isnan(value) else value

    kept: list[int] = []
    for nfe in sorted({entries[i].nfe for i in alive}):
        own = sorted((i for i in alive if entries[i].nfe == nfe), key=error)
        kept += own[: -(-len(own) // 2)]
    return sorted(kept)


def candidates(found: Comparison, nfe: int, *, most: int = 4) -> list[Tableau]:
    """Samplers to `start` from: the best at a budget, no two of one family of solvers.

    Args:
      found: what `compare` returned.
      nfe: the budget.
      most: how many.

    Raises:
      ValueError: nothing of this budget can be distilled.
    """
    starts: dict[PyTree, Tableau] = {}
    for entry in sorted(found.entries, key=lambda e: -e.psnr):
        family = solvers.get(entry.solver).function
        if entry.nfe == nfe and family not in starts and can_distill(entry.tableau):
            starts[family] = entry.tableau
    if not starts:
        raise ValueError(f"no sampler of {nfe} evaluations can be distilled; give a `start`.")
    return list(starts.values())[:most]
