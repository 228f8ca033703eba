"""The stages of `best`: each looks for samplers of every budget, and adds them to the pools.

A stage is a function of the `Search` that all share. What it finds it gives to `Search.folder`,
from which a resumed run reads it back.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from diffsamp import solvers
from diffsamp._core.types import Array, Key, PyTree, Value
from diffsamp.search._folder import Folder, Running
from diffsamp.search._network import describe_network
from diffsamp.search.canonical import can_distill
from diffsamp.search.compare import Comparison, Entry, LeftOut, compare
from diffsamp.search.distill import distill
from diffsamp.search.dynamic import step_costs
from diffsamp.search.evolve import evolve
from diffsamp.search.explicit import from_largest_level
from diffsamp.search.objective import finite_psnr
from diffsamp.search.plan import Plan
from diffsamp.search.refine import NUMBERS, refine_on
from diffsamp.search.regress import Regression
from diffsamp.search.running import slice_batch
from diffsamp.search.starts import Starts
from diffsamp.tableau import Tableau

__all__ = ["RUN", "Search", "begin"]

_WEIGHTS = (1.0, 1.2, 1.4)  # of the later steps, in the dynamic programs
_KEPT = 16  # samplers a budget that go on from "compare"


@dataclasses.dataclass
class Search:
    """What the stages share, and what they have found.

    Attributes:
      starts: the network, its starts, what is minimised, and the evaluations so far.
      budgets: numbers of evaluations.
      key: random key.
      running: how searches run.
      effort: numbers of the stages: screen, solver, schedule, population, rounds, steps, distill.
      settings: what the plans say of the search.
      folder: of finished stages.
      pools: {budget: [(objective on the starts that fit, sampler)]}.
      fixed: {budget: the best fixed sampler}.
      tables: {budget: what was compared}.
      discarded: samplers that gave something not finite.
      left_out: what could not be built.
      limit: of these.
      tasks: stages times budgets that are still to come, which share what is left.
      own: samplers should end where the trajectory of "regress" does.
    """

    starts: Starts
    budgets: list[int]
    key: Key
    running: Running
    effort: Mapping[str, Value]
    settings: Mapping[str, Value]
    folder: Folder
    pools: dict[int, list[tuple[float, Tableau]]] = dataclasses.field(default_factory=dict)
    fixed: dict[int, Tableau] = dataclasses.field(default_factory=dict)
    tables: dict[int, Comparison] = dataclasses.field(default_factory=dict)
    discarded: int = 0
    left_out: list[LeftOut] = dataclasses.field(default_factory=list)
    limit: float = np.inf
    tasks: int = 1
    own: bool = False
    _recorded: Regression | None = None

    def record(self) -> Regression:
        """The trajectory from which all budgets are regressed, made once."""
        if self._recorded is None:
            before, resumed = self.starts.spent, self.starts.reference is not None
            self._recorded = Regression.on(
                self.starts,
                self.budgets,
                evaluations=None if np.isinf(self.limit) else int(self.limit),
                progress=self.running.progress,
            )
            if self.own and resumed:
                self.starts.spent = before  # it was counted when the reference was made
        return self._recorded

    def part(self, first: int, last: int) -> dict[str, PyTree]:
        """Arguments of a search on samples first .. last - 1."""
        return {
            name: slice_batch(getattr(self.starts, name), first, last)
            for name in ("x_T", "cond", "reference")
        }

    def share(self) -> int | None:
        """The limit of the next of the tasks that are left; None for none."""
        judging = 8 * self.starts.size * sum(self.budgets)  # what the plans themselves will take
        left = (self.limit - judging - self.starts.spent) / max(self.tasks, 1)
        self.tasks -= 1
        return max(1, int(left)) if np.isfinite(left) else None

    def measure(self, tableaux: Sequence[Tableau], first: int, last: int) -> list[dict[str, float]]:
        """The objective and the PSNR of each on samples first .. last - 1."""
        reference = slice_batch(self.starts.reference, first, last)
        found = []
        for x in self.starts.many(tableaux, first, last, together=self.running.together):
            value = self.starts.judge(x, first, last)
            psnr = finite_psnr(x, reference, self.running.data_range)
            found.append({self.starts.objective.name: value, "psnr": psnr})
        return found

    def stage(self, name: str, search: Callable[[], Plan]) -> Plan:
        """The plan of a search on these starts, from the folder if it was made before."""
        before = self.starts.spent
        self.starts.begin()
        plan = Plan.from_dict(self.folder.stage(name, lambda: search().to_dict()))
        self.starts.spent = before + plan.settings["evaluations"]
        return plan

    def add(self, nfe: int, tableau: Tableau, name: str) -> None:
        """Put a sampler into the pool of a budget, by what it is on the starts that fit."""
        named = dataclasses.replace(tableau, name=name)
        value = self.measure([named], 0, self.starts.fit)[0][self.starts.objective.name]
        if math.isfinite(value):
            self.pools[nfe].append((value, named))
        else:
            self.discarded += 1

    def best(self, nfe: int) -> Tableau:
        """The best of a pool so far."""
        return min(self.pools[nfe], key=lambda row: row[0])[1]

    def plan(self, nfe: int, seconds: float) -> Plan:
        """The best few of the pool on the deciding samples, as a plan."""
        fit, stop, size = self.starts.fit, self.starts.stop, self.starts.size
        objective, pool = (
            self.starts.objective.name,
            sorted(self.pools[nfe], key=lambda row: row[0]),
        )
        # what is learned from all starts that fit may be best of all, or fitted to them
        learned = [t for _, t in pool[4:] if t.name.endswith(("distill", "refine", "regress"))]
        shortlist = [t for _, t in pool[:4]] + learned
        values = self.measure(shortlist, fit, stop)
        tableau = shortlist[int(np.nanargmin([v[objective] for v in values]))]
        fixed = self.fixed[nfe]
        scores: dict[str, dict[str, dict[str, float]]] = {objective: {}, "psnr": {}}
        spans = {"fit": (0, fit), "chosen_on": (fit, stop), "held_out": (stop, size)}
        for span, ends in spans.items():
            both = self.measure([fixed, tableau], *ends)
            for sampler, one in zip(("start", "found"), both, strict=True):
                for name, value in one.items():
                    scores[name].setdefault(span, {})[sampler] = value
        settings = {**self.settings, "evaluations": self.starts.spent}
        key = list(self.settings["key"])
        network = describe_network(
            self.starts.score_fn, tableau, x_T=self.starts.x_T, data_range=self.running.data_range
        )
        return Plan(
            tableau, tableau.name, fixed.name, scores, (), seconds, settings, key, network=network
        )


def run_compare(search: Search) -> None:
    """All solvers x schedules on a few starts, the best of them on all."""
    effort, objective, fit = search.effort, search.starts.objective, search.starts.fit
    chosen = {name: effort[name] for name in ("solver", "schedule")}

    def screening() -> dict[str, PyTree]:
        table = compare(
            search.starts.score_fn,
            **search.part(0, fit),
            **chosen,
            nfe=search.budgets,
            data_range=search.running.data_range,
            scores={objective.name: objective},
            by=objective.name,
            halving=min(effort["screen"], fit),
            population=search.running.together,
            **search.running.options,
        )
        kept: dict[str, PyTree] = {}
        for n in search.budgets:
            table.best(n)  # raises if nothing of this budget is finite
            whole = [e for e in table.entries if e.nfe == n and e.starts == 0]
            rows: list[list[PyTree]] = [
                [e.solver, e.schedule, {**e.scores, "psnr": e.psnr}, e.tableau.to_dict()]
                for e in whole
                if math.isfinite(e.psnr)
            ]
            kept[str(n)] = sorted(rows, key=lambda row: row[2][objective.name])[:_KEPT]
        return {
            "entries": kept,
            "discarded": table.discarded,
            "compared": len(table.entries),
            "evaluations": table.evaluations,
            "left_out": [list(one) for one in table.left_out],
        }

    begin(search, search.folder.stage("compare", screening))


def begin(search: Search, screened: dict[str, PyTree]) -> None:
    """What was compared begins the pools."""
    objective = search.starts.objective
    search.starts.spent += screened.get("evaluations", 0)
    search.discarded += screened["discarded"]
    # a folder of an earlier version does not say
    search.left_out += [LeftOut(*one) for one in screened.get("left_out", [])]
    for n in search.budgets:
        search.tables[n] = Comparison(
            _entries(screened["entries"][str(n)], n), search.starts.reference
        )
        search.pools[n] = [
            (
                e.scores[objective.name],
                dataclasses.replace(e.tableau, name=f"compare ({e.solver} on {e.schedule})"),
            )
            for e in search.tables[n].entries
        ]
        search.fixed[n] = search.pools[n][0][1]


def run_dynamic(search: Search) -> None:
    """Dynamic programming: the schedules of two costs, for the best solvers."""
    process, fit = search.starts.score_fn.process, search.starts.fit
    objective = search.starts.objective

    def programming() -> dict[str, PyTree]:
        own = search.part(0, min(search.effort["screen"], fit))
        made: dict[str, PyTree] = {}
        unfit: list[LeftOut] = []
        lost, measured = 0, 0.0
        costs = {
            kind: step_costs(
                search.starts.score_fn,
                own["x_T"],
                cond=own["cond"],
                kind=kind,
                **search.running.options,
            )
            for kind in ("local", "distance")
        }
        choices = [(kind, w, False) for kind in costs for w in _WEIGHTS]
        choices += [("local", w, True) for w in _WEIGHTS]  # what may begin later, too
        for n in search.budgets:
            names = list(dict.fromkeys(e.solver for e in search.tables[n].entries))[:4]
            used, tableaux = [], []
            for name, (kind, weight, free) in itertools.product(names, choices):
                count = solvers.get(name).steps(n)
                assert count is not None  # it met this budget before
                times = costs[kind].schedule(count, weight=weight, free=free)
                if free and times[0] == costs[kind].times[0]:
                    continue  # the same path
                try:
                    tableau = from_largest_level(solvers.get(name)(process, times), process)
                except ValueError as error:
                    unfit.append(LeftOut(name, f"{kind} cost, weight {weight:g}", n, str(error)))
                    continue
                later = ", later start" if free else ""
                label = f"dynamic ({name}, {kind} cost{later}, weight {weight:g})"
                used.append((name, kind))
                tableaux.append(dataclasses.replace(tableau, name=label))
            before = search.starts.spent
            values = search.measure(tableaux, 0, fit)
            measured += search.starts.spent - before
            lost += sum(not math.isfinite(v["psnr"]) for v in values)
            made[str(n)] = [
                [*names, v, t.to_dict()]
                for names, v, t in zip(used, values, tableaux, strict=True)
                if math.isfinite(v["psnr"])
            ]
        return {
            "entries": made,
            "discarded": lost,
            "left_out": [list(one) for one in unfit],
            "evaluations": sum(one.evaluations for one in costs.values()) + measured,
        }

    before = search.starts.spent
    programmed = search.folder.stage("dynamic", programming)
    search.discarded += programmed["discarded"]
    search.starts.spent = before + programmed.get("evaluations", 0)
    search.left_out += [LeftOut(*one) for one in programmed.get("left_out", [])]
    for n in search.budgets:
        entries = _entries(programmed["entries"][str(n)], n)
        search.pools[n] += [(e.scores[objective.name], e.tableau) for e in entries]
        both = search.tables[n].entries + entries
        search.tables[n] = Comparison(both, search.starts.reference)


def run_regress(search: Search) -> None:
    """Least squares for each budget, on the starts that fit; one trajectory for all of them."""
    for n in search.budgets:
        limit = search.share()

        def regression(n: int = n, limit: int | None = limit) -> Plan:
            return search.record().plan(
                n,
                evaluations=limit,
                data_range=search.running.data_range,
                progress=search.running.progress,
            )

        plan = search.stage(f"regress-{n}", regression)
        search.add(n, plan.tableau, f"{plan.start}, regress")


_SUMS_PAY = 6  # evaluations: 0.3 to 2.7 dB at 3 and 4, little at 5 and 6, nothing from 8 on


def run_refine(search: Search) -> None:
    """Gauss-Newton steps from the best sampler so far of each budget."""
    for n in search.budgets:
        start = search.best(n)

        def refinement(n: int = n, start: Tableau = start) -> Plan:
            return refine_on(
                search.starts,
                start,
                numbers=search.effort["numbers"] or NUMBERS[: 4 if n <= _SUMS_PAY else 3],
                evaluations=search.share(),
                together=search.running.together,
                data_range=search.running.data_range,
                progress=search.running.progress,
            )

        plan = search.stage(f"refine-{n}", refinement)
        search.add(n, plan.tableau, f"{start.name}, refine")


def run_evolve(search: Search) -> None:
    """Solvers mixed step by step, from what was compared."""
    process = search.starts.score_fn.process
    for n in search.budgets:
        evolution = evolve(
            search.starts.score_fn,
            **search.part(0, search.starts.fit),
            nfe=n,
            key=jax.random.fold_in(search.key, n),
            start=search.tables[n],
            objective=search.starts.objective,
            population=search.effort["population"],
            rounds=search.effort["rounds"],
            together=search.running.together,
            state=search.folder.path(f"evolve-{n}"),
            evaluations=search.share(),
            **search.running.options,
        )
        search.discarded += evolution.discarded
        search.starts.spent += evolution.evaluations
        found = zip(evolution.genomes, evolution.values, strict=True)
        search.pools[n] += [
            (value, dataclasses.replace(g.tableau(process), name=f"evolve ({i})"))
            for i, (g, value) in enumerate(found, 1)
            if i <= 4 and math.isfinite(value)
        ]


def run_distill(search: Search) -> None:
    """Gradient descent from the best sampler of each stage."""
    if search.starts.objective.loss is None:
        return
    for n in search.budgets:
        starts = _starts(sorted(search.pools[n], key=lambda row: row[0]))
        if not starts:
            continue

        def learning(n: int = n, starts: list[Tableau] = starts) -> Value:
            return distill(
                search.starts.score_fn,
                **search.part(0, search.starts.size),
                nfe=n,
                key=jax.random.fold_in(search.key, n),
                start=starts,
                objective=search.starts.objective,
                steps=search.effort["steps"],
                held_out=search.starts.size - search.starts.fit,
                data_range=search.running.data_range,
                **search.running.options,
                **search.effort["distill"],
            ).to_dict()

        learned = Plan.from_dict(search.folder.stage(f"distill-{n}", learning))
        search.starts.spent += learned.settings["evaluations"]
        search.add(n, learned.tableau, f"{learned.start}, distill")


# in the order in which they are run
RUN = {
    run.__name__.removeprefix("run_"): run
    for run in (run_compare, run_dynamic, run_regress, run_refine, run_evolve, run_distill)
}


def _entries(rows: Sequence[Array], nfe: int) -> tuple[Entry, ...]:
    return tuple(Entry(s, g, nfe, Tableau.from_dict(t), v["psnr"], v) for s, g, v, t in rows)


def _starts(pool: Sequence[tuple[float, Tableau]]) -> list[Tableau]:
    """What to distill from: the best of each stage, at most three."""
    chosen: dict[str, Tableau] = {}
    for _, tableau in pool:
        stage = tableau.name.split()[-1] if "," in tableau.name else tableau.name.split()[0]
        if stage not in chosen and can_distill(tableau):
            chosen[stage] = tableau
    return list(chosen.values())[:3]
