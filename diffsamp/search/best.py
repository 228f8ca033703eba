"""`best`: all searches one after another under one budget, a plan per number of evaluations.

compare -> dynamic programming -> evolve -> distill. Every stage hands its best candidates to the
next, and what is returned is the best of all of them on noise that no stage was fitted to. With
`state`, every finished stage is a file: a run that was killed goes on where it stopped and returns
what the uninterrupted one would have.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import solvers
from diffsamp._core.checks import expect_int
from diffsamp._core.digest import digest, fingerprint, seed_of
from diffsamp._core.files import read_json, write_atomically
from diffsamp._core.sharding import on_mesh
from diffsamp._core.types import Array, Conditions, Key, PyTree, Sharding, Value
from diffsamp.score import ScoreFn
from diffsamp.search.canonical import can_distill
from diffsamp.search.compare import Comparison, Entry, LeftOut, compare
from diffsamp.search.distill import distill
from diffsamp.search.dynamic import step_costs
from diffsamp.search.evolve import evolve
from diffsamp.search.explicit import from_largest_level
from diffsamp.search.objective import (
    Objective,
    Progress,
    expect_batch,
    finite_psnr,
    log_mse,
    make_reference,
    run_many,
    slice_batch,
)
from diffsamp.search.plan import Front, Plan, decoded, encoded
from diffsamp.tableau import Tableau

__all__ = ["STAGES", "best"]

STAGES = ("compare", "dynamic", "evolve", "distill")
_WEIGHTS = (1.0, 1.2, 1.4)  # of the later steps, in the dynamic programs


def best(
    score_fn: ScoreFn,
    x_T: PyTree,
    *,
    nfe: Sequence[int] = (4, 5, 6, 8, 10),
    key: Key,
    cond: Conditions | None = None,
    reference: PyTree = None,
    objective: Objective | None = None,
    stages: Sequence[str] = STAGES,
    solver: Sequence[str] | None = None,
    schedule: Sequence[str] | None = None,
    screen: int = 64,
    population: int = 32,
    rounds: int = 8,
    steps: int = 400,
    held_out: int | None = None,
    batch: int = 64,
    together: int = 1,
    seconds: float | None = None,
    data_range: float = 2.0,
    sharding: Sharding = None,
    state: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **distill_options: PyTree,
) -> Front:
    """The best sampler that the searches find, for each budget.

    Args:
      score_fn: the network, batched.
      x_T: (n, ...) starts at t_max, an array. A quarter is held out: half of that decides between
        candidates, half only reports.
      nfe: budgets.
      key: random key of everything that is drawn.
      cond: keyword arguments for the network, every array with the leading axis n.
      reference: samples to come close to, the tableau that makes them, or None.
      objective: what is minimised. None: `log_mse`. One without a `loss` skips "distill".
      stages: which to run, of `STAGES`, in that order; "compare" must be one.
      solver: registry names; None: all deterministic ones.
      schedule: schedule names; None: all that fit the process.
      screen: starts on which all solvers x schedules are first compared; the best 16 a budget are
        then measured on all starts to fit.
      population: candidates a round of `evolve`.
      rounds: of `evolve`.
      steps: gradient steps of `distill`.
      held_out: starts kept from fitting; None: a quarter.
      batch: samples of one candidate at a time, and of a gradient step.
      together: candidates at a time.
      seconds: stop before a stage that would begin after this time, and return what there is. The
        result then depends on the machine's speed. None: no limit.
      data_range: largest minus smallest value of the data, for the PSNR.
      sharding: over the batch axis, as for `run`.
      state: folder, made if needed, in which every finished stage is kept; for one process. It
        belongs to these arguments and weights: give another when the code of the network changes.
      progress: called with (what, done, total).
      **distill_options: further options of `distill`, such as learning_rate.

    Returns:
      A `Front`; `front.plans[6].tableau` is the sampler of 6 evaluations.

    Raises:
      ValueError: an unknown stage or name, a budget that no solver meets, too few starts, a network
        that is not finite, or a state of another search.
    """
    began = time.perf_counter()
    budgets = sorted({expect_int(n, "nfe", at_least=1) for n in nfe})
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown or "compare" not in stages:
        raise ValueError(
            f"`stages` must be of {STAGES}, 'compare' among them; got {tuple(stages)}."
        )
    objective = log_mse() if objective is None else objective
    size = expect_batch(x_T, cond)
    held = max(2, size // 4) if held_out is None else expect_int(held_out, "held_out", at_least=2)
    fit, stop = size - held, size - held + held // 2
    if fit < 2:
        raise ValueError(
            f"`x_T` has {size} starts, of which {held} are held out: too few are left."
        )
    if state is not None and jax.process_count() > 1:
        raise ValueError("`state` is for a search by one process; leave it out on several.")
    settings = {
        "nfe": budgets, "key": seed_of(key), "stages": list(stages), "objective": objective.name,
        "solver": solver and list(solver), "schedule": schedule and list(schedule),
        "screen": screen, "population": population, "rounds": rounds, "steps": steps,
        "held_out": held, "batch": batch,
        "distill": {k: str(v) for k, v in distill_options.items()},
    }  # fmt: skip
    job = {}  # to which a folder belongs; arrays of several processes have no digest
    if state is not None:
        job = {"starts": digest(x_T, cond), "reference": digest(reference)}
        job["network"] = fingerprint(score_fn)
    score_fn = on_mesh(score_fn, sharding)
    folder = _Folder(state, {**settings, **job})
    options: dict[str, Value] = {"batch": batch, "sharding": sharding}
    given = reference

    def make() -> PyTree:
        return make_reference(score_fn, given, x_T, cond=cond, progress=progress, **options)

    reference = folder.array("reference", make)

    def part(first: int, last: int) -> dict[str, PyTree]:
        return {
            "x_T": slice_batch(x_T, first, last), "cond": slice_batch(cond, first, last),
            "reference": slice_batch(reference, first, last),
        }  # fmt: skip

    def measure(tableaux: Sequence[Tableau], first: int, last: int) -> list[dict[str, float]]:
        """The objective and the PSNR of each on samples first .. last - 1."""
        own = part(first, last)
        samples = run_many(
            score_fn, tableaux, own["x_T"], cond=own["cond"], population=together, **options
        )
        found = []
        for x in samples:
            value = objective(x, own["reference"])
            psnr = finite_psnr(x, own["reference"], data_range)
            found.append({objective.name: value, "psnr": psnr})
        return found

    def in_time() -> bool:
        return seconds is None or time.perf_counter() - began < seconds

    # -- compare: all on a few starts, the best of them on all ------------------------------------
    def screening() -> dict[str, PyTree]:
        few = part(0, min(screen, fit))
        table = compare(
            score_fn, **few, nfe=budgets, solver=solver, schedule=schedule, data_range=data_range,
            scores={objective.name: objective}, population=together, progress=progress, **options,
        )  # fmt: skip
        kept: dict[str, PyTree] = {}
        for n in budgets:
            table.best(n)  # raises if nothing of this budget is finite
            entries = [e for e in table.entries if e.nfe == n and math.isfinite(e.psnr)]
            entries = sorted(entries, key=lambda e: e.scores[objective.name])[:16]
            values = measure([e.tableau for e in entries], 0, fit)
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

    screened = folder.stage("compare", screening)
    discarded = screened["discarded"]
    # a folder of an earlier version does not say
    left_out = [LeftOut(*one) for one in screened.get("left_out", [])]
    pools: dict[int, list[tuple[float, Tableau]]] = {}
    fixed: dict[int, Tableau] = {}
    tables: dict[int, Comparison] = {}
    for n in budgets:
        rows = screened["entries"][str(n)]
        tables[n] = Comparison(_entries(rows, n), reference)
        pools[n] = [
            (
                e.scores[objective.name],
                dataclasses.replace(e.tableau, name=f"compare ({e.solver} on {e.schedule})"),
            )
            for e in tables[n].entries
        ]
        fixed[n] = pools[n][0][1]

    # -- dynamic programming: the schedules of two costs, for the best solvers ---------------------
    def programming() -> dict[str, PyTree]:
        own = part(0, min(screen, fit))
        made: dict[str, PyTree] = {}
        unfit: list[LeftOut] = []
        lost = 0
        costs = {
            kind: step_costs(
                score_fn, own["x_T"], cond=own["cond"], kind=kind, progress=progress, **options
            )
            for kind in ("local", "distance")
        }
        for n in budgets:
            names = list(dict.fromkeys(e.solver for e in tables[n].entries))[:4]
            used, tableaux = [], []
            choices = [(kind, w, False) for kind in costs for w in _WEIGHTS]
            choices += [("local", w, True) for w in _WEIGHTS]  # what may begin later, too
            for name, (kind, weight, free) in itertools.product(names, choices):
                count = solvers.get(name).steps(n)
                assert count is not None  # it met this budget before
                times = costs[kind].schedule(count, weight=weight, free=free)
                if free and times[0] == costs[kind].times[0]:
                    continue  # the same path
                try:
                    tableau = solvers.get(name)(score_fn.process, times)
                    tableau = from_largest_level(tableau, score_fn.process)
                except ValueError as error:
                    unfit.append(LeftOut(name, f"{kind} cost, weight {weight:g}", n, str(error)))
                    continue
                later = ", later start" if free else ""
                label = f"dynamic ({name}, {kind} cost{later}, weight {weight:g})"
                used.append((name, kind))
                tableaux.append(dataclasses.replace(tableau, name=label))
            values = measure(tableaux, 0, fit)
            lost += sum(not math.isfinite(v["psnr"]) for v in values)
            made[str(n)] = [
                [*names, v, t.to_dict()]
                for names, v, t in zip(used, values, tableaux, strict=True)
                if math.isfinite(v["psnr"])
            ]
        return {"entries": made, "discarded": lost, "left_out": [list(one) for one in unfit]}

    if "dynamic" in stages and in_time():
        programmed = folder.stage("dynamic", programming)
        discarded += programmed["discarded"]
        left_out += [LeftOut(*one) for one in programmed.get("left_out", [])]
        for n in budgets:
            entries = _entries(programmed["entries"][str(n)], n)
            pools[n] += [(e.scores[objective.name], e.tableau) for e in entries]
            tables[n] = Comparison(tables[n].entries + entries, reference)

    plans = {}
    for n in budgets:
        own_key = jax.random.fold_in(key, n)
        if "evolve" in stages and in_time():
            own = part(0, fit)
            evolution = evolve(
                score_fn, **own, nfe=n, key=own_key, start=tables[n], objective=objective,
                population=population, rounds=rounds, together=together,
                state=folder.path(f"evolve-{n}"), progress=progress, **options,
            )  # fmt: skip
            discarded += evolution.discarded
            pools[n] += [
                (v, dataclasses.replace(g.tableau(score_fn.process), name=f"evolve (place {i})"))
                for i, (g, v) in enumerate(zip(evolution.genomes, evolution.values, strict=True), 1)
                if i <= 4 and math.isfinite(v)
            ]
        pools[n].sort(key=lambda row: row[0])
        if "distill" in stages and objective.loss is not None and in_time():
            starts = _starts(pools[n])

            def learning(n: int = n, starts: PyTree = starts, own_key: PyTree = own_key) -> PyTree:
                return distill(
                    score_fn, x_T, cond=cond, reference=reference, nfe=n, key=own_key, start=starts,
                    objective=objective, steps=steps, held_out=held, data_range=data_range,
                    progress=progress, **options, **distill_options,
                ).to_dict()  # fmt: skip

            if starts:
                learned = Plan.from_dict(folder.stage(f"distill-{n}", learning))
                name = f"{learned.start}, distill"
                pools[n].append((-math.inf, dataclasses.replace(learned.tableau, name=name)))
        plans[n] = _choose(
            pools[n], fixed[n], measure, (fit, stop, size), objective, settings,
            time.perf_counter() - began,
        )  # fmt: skip
    return Front(plans, discarded, objective.name, tuple(left_out))


def _entries(rows: Sequence[Array], nfe: int) -> tuple[Entry, ...]:
    return tuple(Entry(s, g, nfe, Tableau.from_dict(t), v["psnr"], v) for s, g, v, t in rows)


def _starts(pool: Sequence[tuple[float, Tableau]]) -> list[Tableau]:
    """What to distill from: the best of each stage, at most three."""
    chosen: dict[str, Tableau] = {}
    for _, tableau in pool:
        stage = tableau.name.split()[0]
        if stage not in chosen and can_distill(tableau):
            chosen[stage] = tableau
    return list(chosen.values())[:3]


def _choose(
    pool: Sequence[tuple[float, Tableau]],
    fixed: Tableau,
    measure: Callable[..., list[dict[str, float]]],
    spans: tuple[int, int, int],
    objective: Objective,
    settings: Mapping[str, Value],
    seconds: float,
) -> Plan:
    """The best few of the pool on the deciding samples, as a plan."""
    fit, stop, size = spans
    shortlist = [t for v, t in pool if v == -math.inf] + [t for _, t in pool[:4]]
    values = measure(shortlist, fit, stop)
    tableau = shortlist[int(np.argmin([v[objective.name] for v in values]))]
    scores: dict[str, dict[str, dict[str, float]]] = {objective.name: {}, "psnr": {}}
    for span, (first, last) in {
        "fit": (0, fit), "chosen_on": (fit, stop), "held_out": (stop, size)
    }.items():  # fmt: skip
        for sampler, one in zip(("start", "found"), measure([fixed, tableau], first, last),
                                strict=True):  # fmt: skip
            for name, value in one.items():
                scores[name].setdefault(span, {})[sampler] = value
    return Plan(
        tableau, tableau.name, fixed.name, scores, (), seconds,
        settings, list(settings["key"]),
    )  # fmt: skip


class _Folder:
    """Finished stages as files; without a path, nothing is kept."""

    def __init__(self, path: Value, settings: Mapping[str, Value]) -> None:
        self.folder = None if path is None else Path(path)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "settings.json"
        text = json.dumps(settings, indent=1)
        if not file.exists():
            write_atomically(file, text.encode())
        elif file.read_text(encoding="utf-8") != text:
            found = read_json(file)
            changed = sorted(k for k, v in json.loads(text).items() if found.get(k) != v)
            raise ValueError(
                f"{self.folder} holds another search: {', '.join(changed)} differ. Give another "
                "folder, or delete it."
            )

    def path(self, name: str) -> Path | None:
        """The file of a stage."""
        return None if self.folder is None else self.folder / f"{name}.json"

    def array(self, name: str, run: Callable[[], PyTree]) -> PyTree:
        """What `run` returns, an array, kept as .npy."""
        path = None if self.folder is None else self.folder / f"{name}.npy"
        if path is not None and path.exists():
            try:
                return jnp.asarray(np.load(io.BytesIO(path.read_bytes()), allow_pickle=False))
            except (ValueError, EOFError) as error:
                raise ValueError(
                    f"{path} is corrupt: {error}. Delete it to make it again."
                ) from error
        array = run()
        if path is not None and np.asarray(array).dtype.kind == "f":  # not bfloat16, as NumPy sees
            buffer = io.BytesIO()
            np.save(buffer, np.asarray(array))
            write_atomically(path, buffer.getvalue())
        return array

    def stage(self, name: str, run: Callable[[], PyTree]) -> PyTree:
        """What `run` returns, from the file if the stage was finished before.

        It goes through JSON either way, so that a resumed run sees what the first one saw.
        """
        path = self.path(name)
        if path is not None and path.exists():
            return decoded(read_json(path))
        text = json.dumps(encoded(run()), allow_nan=False)
        if path is not None:
            write_atomically(path, text.encode())
        return decoded(json.loads(text))
