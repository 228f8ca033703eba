"""The stages of `best`: each looks for samplers of every budget, and adds them to the pools.

A stage is a function of the `Search` that all share. What it finds it gives to `Search.folder`,
from which a resumed run reads it back.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from diffsamp import schedules, solvers
from diffsamp._core.types import Array, Conditions, Key, PyTree, Sharding, Value
from diffsamp.score import ScoreFn
from diffsamp.search._folder import Folder
from diffsamp.search._network import describe_network
from diffsamp.search.canonical import can_distill
from diffsamp.search.compare import Comparison, Entry, LeftOut, compare
from diffsamp.search.distill import distill
from diffsamp.search.dynamic import step_costs
from diffsamp.search.evolve import evolve
from diffsamp.search.explicit import from_largest_level
from diffsamp.search.objective import Objective, Progress, finite_psnr, run_many, slice_batch
from diffsamp.search.plan import Plan
from diffsamp.search.refine import refine
from diffsamp.search.regress import regress
from diffsamp.tableau import Tableau

__all__ = ["RUN", "Search"]

_WEIGHTS = (1.0, 1.2, 1.4)  # of the later steps, in the dynamic programs
# without the stage "compare" the start of a plan is the best of these
_USUAL = {
    "solver": ("ddim", "dpmpp_2m", "unipc2", "ipndm3"),
    "schedule": ("logsnr", "uniform", "karras", "quadratic", "trailing"),
}
_KEPT = 16  # samplers a budget that "compare" measures on all starts


@dataclasses.dataclass(frozen=True)
class Running:
    """How all searches run.

    Attributes:
      batch: samples of one candidate at a time.
      together: candidates at a time.
      sharding: over the batch axis.
      data_range: largest minus smallest value of the data.
      progress: called with (what, done, total).
    """

    batch: int
    together: int
    sharding: Sharding
    data_range: float
    progress: Progress | None

    @property
    def options(self) -> dict[str, Value]:
        """What every search takes by these names."""
        return {"batch": self.batch, "sharding": self.sharding, "progress": self.progress}


@dataclasses.dataclass
class Search:
    """What the stages share, and what they have found.

    Attributes:
      score_fn: the network.
      x_T: the starts; [0, fit) fit, [fit, stop) decide, [stop, size) report.
      cond: keyword arguments for the network.
      reference: where samplers should end.
      objective: what is minimised.
      budgets: numbers of evaluations.
      key: random key.
      spans: fit, stop, size.
      running: how searches run.
      effort: numbers of the stages: screen, solver, schedule, population, rounds, steps, distill.
      settings: what the plans say of the search.
      folder: of finished stages.
      pools: {budget: [(objective on the starts that fit, sampler)]}.
      fixed: {budget: the best fixed sampler}.
      tables: {budget: what was compared}.
      discarded: samplers that gave something not finite.
      left_out: what could not be built.
      spent: network evaluations so far, one per sample and call.
    """

    score_fn: ScoreFn
    x_T: PyTree
    cond: Conditions | None
    reference: PyTree
    objective: Objective
    budgets: list[int]
    key: Key
    spans: tuple[int, int, int]
    running: Running
    effort: Mapping[str, Value]
    settings: Mapping[str, Value]
    folder: Folder
    pools: dict[int, list[tuple[float, Tableau]]] = dataclasses.field(default_factory=dict)
    fixed: dict[int, Tableau] = dataclasses.field(default_factory=dict)
    tables: dict[int, Comparison] = dataclasses.field(default_factory=dict)
    discarded: int = 0
    left_out: list[LeftOut] = dataclasses.field(default_factory=list)
    spent: int = 0

    def part(self, first: int, last: int) -> dict[str, PyTree]:
        """Arguments of a search on samples first .. last - 1."""
        return {
            name: slice_batch(getattr(self, name), first, last)
            for name in ("x_T", "cond", "reference")
        }

    def measure(self, tableaux: Sequence[Tableau], first: int, last: int) -> list[dict[str, float]]:
        """The objective and the PSNR of each on samples first .. last - 1."""
        own = self.part(first, last)
        samples = run_many(
            self.score_fn,
            tableaux,
            own["x_T"],
            cond=own["cond"],
            population=self.running.together,
            batch=self.running.batch,
            sharding=self.running.sharding,
        )
        self.spent += sum(t.nfe for t in tableaux) * (last - first)
        found = []
        for x in samples:
            value = self.objective(x, own["reference"])
            psnr = finite_psnr(x, own["reference"], self.running.data_range)
            found.append({self.objective.name: value, "psnr": psnr})
        return found

    def add(self, nfe: int, tableau: Tableau, name: str) -> None:
        """Put a sampler into the pool of a budget, by what it is on the starts that fit."""
        named = dataclasses.replace(tableau, name=name)
        value = self.measure([named], 0, self.spans[0])[0][self.objective.name]
        if math.isfinite(value):
            self.pools[nfe].append((value, named))
        else:
            self.discarded += 1

    def best(self, nfe: int) -> Tableau:
        """The best of a pool so far."""
        return min(self.pools[nfe], key=lambda row: row[0])[1]

    def plan(self, nfe: int, seconds: float) -> Plan:
        """The best few of the pool on the deciding samples, as a plan."""
        fit, stop, size = self.spans
        objective, pool = self.objective.name, sorted(self.pools[nfe], key=lambda row: row[0])
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
        settings = {**self.settings, "evaluations": self.spent}
        key = list(self.settings["key"])
        network = describe_network(
            self.score_fn, tableau, x_T=self.x_T, data_range=self.running.data_range
        )
        return Plan(
            tableau, tableau.name, fixed.name, scores, (), seconds, settings, key, network=network
        )


def run_compare(search: Search, usual: bool = False) -> None:
    """All solvers x schedules on a few starts, the best of them on all; `usual`: a few of them."""
    effort, objective = search.effort, search.objective
    chosen = {name: effort[name] for name in ("solver", "schedule")}
    if usual:
        fitting = schedules.names(search.score_fn.process)
        grids = [name for name in _USUAL["schedule"] if name in fitting]
        chosen = {"solver": _USUAL["solver"], "schedule": grids or None}

    def screening() -> dict[str, PyTree]:
        few = min(effort["screen"], search.spans[0])
        table = compare(
            search.score_fn,
            **search.part(0, few),
            **chosen,
            nfe=search.budgets,
            data_range=search.running.data_range,
            scores={objective.name: objective},
            population=search.running.together,
            **search.running.options,
        )
        search.spent += few * sum(e.nfe for e in table.entries)
        kept: dict[str, PyTree] = {}
        for n in search.budgets:
            table.best(n)  # raises if nothing of this budget is finite
            entries = [e for e in table.entries if e.nfe == n and math.isfinite(e.psnr)]
            entries = sorted(entries, key=lambda e: e.scores[objective.name])[:_KEPT]
            values = search.measure([e.tableau for e in entries], 0, search.spans[0])
            rows = [
                [e.solver, e.schedule, v, e.tableau.to_dict()]
                for e, v in zip(entries, values, strict=True)
            ]
            kept[str(n)] = sorted(rows, key=lambda row: row[2][objective.name])
        return {
            "entries": kept,
            "discarded": table.discarded,
            "compared": len(table.entries),
            "left_out": [list(one) for one in table.left_out],
        }

    screened = search.folder.stage("compare", screening)
    search.discarded += screened["discarded"]
    # a folder of an earlier version does not say
    search.left_out += [LeftOut(*one) for one in screened.get("left_out", [])]
    for n in search.budgets:
        search.tables[n] = Comparison(_entries(screened["entries"][str(n)], n), search.reference)
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
    process, objective = search.score_fn.process, search.objective

    def programming() -> dict[str, PyTree]:
        own = search.part(0, min(search.effort["screen"], search.spans[0]))
        made: dict[str, PyTree] = {}
        unfit: list[LeftOut] = []
        lost = 0
        costs = {
            kind: step_costs(
                search.score_fn, own["x_T"], cond=own["cond"], kind=kind, **search.running.options
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
            values = search.measure(tableaux, 0, search.spans[0])
            lost += sum(not math.isfinite(v["psnr"]) for v in values)
            made[str(n)] = [
                [*names, v, t.to_dict()]
                for names, v, t in zip(used, values, tableaux, strict=True)
                if math.isfinite(v["psnr"])
            ]
        return {"entries": made, "discarded": lost, "left_out": [list(one) for one in unfit]}

    programmed = search.folder.stage("dynamic", programming)
    search.discarded += programmed["discarded"]
    search.left_out += [LeftOut(*one) for one in programmed.get("left_out", [])]
    for n in search.budgets:
        entries = _entries(programmed["entries"][str(n)], n)
        search.pools[n] += [(e.scores[objective.name], e.tableau) for e in entries]
        both = search.tables[n].entries + entries
        search.tables[n] = Comparison(both, search.reference)


def run_regress(search: Search) -> None:
    """Least squares for each budget, on the starts that fit."""
    for n in search.budgets:

        def regression(n: int = n) -> Value:
            return regress(
                search.score_fn,
                **search.part(0, search.spans[0]),
                nfe=n,
                key=jax.random.fold_in(search.key, n),
                data_range=search.running.data_range,
                **search.running.options,
            ).to_dict()

        plan = Plan.from_dict(search.folder.stage(f"regress-{n}", regression))
        search.spent += plan.settings["evaluations"]
        search.add(n, plan.tableau, f"{plan.start}, regress")


def run_refine(search: Search) -> None:
    """Gauss-Newton steps from the best sampler so far of each budget."""
    for n in search.budgets:
        start = search.best(n)

        def refinement(n: int = n, start: Tableau = start) -> Value:
            return refine(
                search.score_fn,
                start,
                **search.part(0, search.spans[0]),
                key=jax.random.fold_in(search.key, n),
                together=search.running.together,
                numbers=search.effort["numbers"],
                data_range=search.running.data_range,
                **search.running.options,
            ).to_dict()

        plan = Plan.from_dict(search.folder.stage(f"refine-{n}", refinement))
        search.spent += plan.settings["evaluations"]
        search.add(n, plan.tableau, f"{start.name}, refine")


def run_evolve(search: Search) -> None:
    """Solvers mixed step by step, from what was compared."""
    for n in search.budgets:
        evolution = evolve(
            search.score_fn,
            **search.part(0, search.spans[0]),
            nfe=n,
            key=jax.random.fold_in(search.key, n),
            start=search.tables[n],
            objective=search.objective,
            population=search.effort["population"],
            rounds=search.effort["rounds"],
            together=search.running.together,
            state=search.folder.path(f"evolve-{n}"),
            **search.running.options,
        )
        search.discarded += evolution.discarded
        found = zip(evolution.genomes, evolution.values, strict=True)
        search.pools[n] += [
            (value, dataclasses.replace(g.tableau(search.score_fn.process), name=f"evolve ({i})"))
            for i, (g, value) in enumerate(found, 1)
            if i <= 4 and math.isfinite(value)
        ]


def run_distill(search: Search) -> None:
    """Gradient descent from the best sampler of each stage."""
    if search.objective.loss is None:
        return
    for n in search.budgets:
        starts = _starts(sorted(search.pools[n], key=lambda row: row[0]))
        if not starts:
            continue

        def learning(n: int = n, starts: list[Tableau] = starts) -> Value:
            return distill(
                search.score_fn,
                search.x_T,
                cond=search.cond,
                reference=search.reference,
                nfe=n,
                key=jax.random.fold_in(search.key, n),
                start=starts,
                objective=search.objective,
                steps=search.effort["steps"],
                held_out=search.spans[2] - search.spans[0],
                data_range=search.running.data_range,
                **search.running.options,
                **search.effort["distill"],
            ).to_dict()

        learned = Plan.from_dict(search.folder.stage(f"distill-{n}", learning))
        search.spent += 2 * search.effort["steps"] * search.running.batch * n
        search.add(n, learned.tableau, f"{learned.start}, distill")


# in the order in which they are run
RUN = {
    "compare": run_compare,
    "dynamic": run_dynamic,
    "regress": run_regress,
    "refine": run_refine,
    "evolve": run_evolve,
    "distill": run_distill,
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
