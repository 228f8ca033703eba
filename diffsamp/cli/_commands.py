"""What the commands do."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

import diffsamp as ds
from diffsamp._core.files import write_atomically
from diffsamp._core.types import PyTree, Value
from diffsamp.cli._problem import Problem, load_plan, tableau_of

__all__ = [
    "check",
    "compare",
    "convert",
    "export",
    "generate",
    "sample",
    "search",
    "show",
    "suggest",
]


def sample(arguments: argparse.Namespace) -> int:
    """Draw some samples into one file."""
    out, kind = Path(arguments.out), Path(arguments.out).suffix
    if kind not in (".npy", ".npz", ".png"):
        raise ValueError(f"--out must end in .npy, .npz or .png; got {arguments.out}.")
    problem = Problem.of(arguments)
    tableau = tableau_of(arguments, problem)
    run = ds.Sampler(problem.score_fn, tableau)
    key, n = jax.random.key(arguments.seed), arguments.n
    x = problem.finish(run(key, (n, *problem.shape), cond=problem.conditions(n)))
    if kind == ".png":
        images = np.asarray(x, np.float32)
        rows = [("", images[i : i + 8]) for i in range(0, n, 8)]
        ds.plot.save(ds.plot.image_grid(rows), out)
    elif kind == ".npy":
        np.save(out, np.asarray(x))
    else:
        np.savez(out, samples=np.asarray(x))
    print(f"{n} samples of {tableau.nfe} evaluations ({tableau.name}) in {out}.")
    if not np.all(np.isfinite(np.asarray(x, np.float32))):
        print("Some are not finite.")
    return 0


def generate(arguments: argparse.Namespace) -> int:
    """Draw many samples into a folder, resumed after a stop."""
    problem = Problem.of(arguments)
    whole = problem.conditions(arguments.n)

    def cond(numbers: np.ndarray) -> Mapping[str, PyTree]:
        return jax.tree.map(lambda v: v[numbers], dict(whole or {}))

    done = ds.generate(
        problem.score_fn,
        tableau_of(arguments, problem),
        arguments.n,
        arguments.out,
        key=jax.random.key(arguments.seed),
        shape=problem.shape,
        cond=None if whole is None else cond,
        finish=None if problem.pretrained is None else problem.pretrained.decode,
        batch=arguments.batch,
        format=arguments.format,
    )
    print(f"{done.n} samples in {len(done.shards)} files of {arguments.out}.")
    return 0


def suggest(arguments: argparse.Namespace) -> int:
    """Say which solver and schedule suit a network, and the measured reason."""
    problem = Problem.of(arguments)
    found = ds.suggest(
        problem.score_fn,
        problem.starts(arguments.seed, arguments.starts),
        arguments.nfe,
        cond=problem.conditions(arguments.starts),
        starts=arguments.starts,
        evaluations=arguments.evaluations,
    )
    print(found)
    if arguments.out is not None:
        _named(found.plan(problem.score_fn), problem.name).save(arguments.out)
        print(f"wrote {arguments.out}")
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Measure solvers x schedules on a network and print the table."""
    problem, bar = Problem.of(arguments), ds.ProgressBar()
    result = ds.search.compare(
        problem.score_fn,
        problem.starts(arguments.seed, arguments.starts),
        nfe=arguments.nfe,
        solver=arguments.solver,
        schedule=arguments.schedule,
        cond=problem.conditions(arguments.starts),
        batch=arguments.batch,
        population=arguments.together,
        progress=bar,
    )
    bar.close()
    print(f"PSNR (dB) to the ODE's solution at equal noise, {arguments.starts} starts; * best")
    print(result.table(rows=arguments.rows))
    if result.discarded:
        print(f"{result.discarded} gave samples that are not finite.")
    return 0


def search(arguments: argparse.Namespace) -> int:
    """Search for the best sampler of each budget and write the plans."""
    problem, out, bar = Problem.of(arguments), Path(arguments.out), ds.ProgressBar()
    front = ds.search.best(
        problem.score_fn,
        problem.starts(arguments.seed, arguments.starts),
        nfe=arguments.nfe,
        key=jax.random.fold_in(jax.random.key(arguments.seed), 1),
        cond=problem.conditions(arguments.starts),
        solver=arguments.solver,
        schedule=arguments.schedule,
        stages=arguments.stages,
        steps=arguments.steps,
        rounds=arguments.rounds,
        batch=arguments.batch,
        together=arguments.together,
        seconds=arguments.seconds,
        state=out / "state",
        progress=bar,
    )
    bar.close()
    named = {nfe: _named(plan, problem.name) for nfe, plan in front.plans.items()}
    paths = dataclasses.replace(front, plans=named).save(out)
    print("PSNR (dB) to the ODE's solution on held-out noise:")
    for path, (nfe, plan) in zip(paths, sorted(front.plans.items()), strict=True):
        held = plan.psnr["held_out"]
        print(
            f"  {nfe:>3} evaluations: {held['start']:.1f} (best fixed: {plan.start}) -> "
            f"{held['found']:.1f}, by {plan.method}; {path}"
        )
    missing = sorted(set(front.plans) - set(front.pareto))
    if missing:
        print(f"A cheaper plan is as good as those of {', '.join(map(str, missing))} evaluations.")
    if front.discarded:
        print(f"{front.discarded} candidates gave samples that are not finite.")
    return 0


def _named(plan: ds.search.Plan, name: str) -> ds.search.Plan:
    checkpoint = {**plan.network["checkpoint"], "name": name}
    return dataclasses.replace(plan, network={**plan.network, "checkpoint": checkpoint})


def show(arguments: argparse.Namespace) -> int:
    """Say what a plan or a tableau does at each step, and draw it."""
    found = load_plan(arguments.path)
    tableau = found if isinstance(found, ds.Tableau) else found.tableau
    if isinstance(found, ds.search.Plan):
        print(f"found by {found.method} in {found.seconds:.0f} s, with {dict(found.versions)}")
        if found.network:
            print(_made_for(found.network))
        for name, sets in found.scores.items():
            for where, values in sets.items():
                print(
                    f"{name} on {where.replace('_', ' ')} noise: {values['start']:.4g} "
                    f"({found.start}) -> {values['found']:.4g}"
                )
    print(ds.describe(tableau))
    if arguments.cite:
        print(ds.cite(found))
    if arguments.plot is not None:
        ds.plot.save(ds.plot.tableau(tableau), arguments.plot)
        print(f"wrote {arguments.plot}")
    return 0


def _made_for(network: Mapping[str, Value]) -> str:
    around = [f"{one['name']} {one.get('scale', '')}".strip() for one in network["guidance"]]
    checkpoint = network["checkpoint"]
    weights = checkpoint["name"] or (checkpoint["fingerprint"] or "unknown weights")[:19]
    guided = f", guided by {', '.join(around)}" if around else ""
    return (
        f"for a network of {network['prediction']} on {network['process']['name']}, time "
        f"{network.get('time', 'unknown')}{guided} ({weights})"
    )


def check(arguments: argparse.Namespace) -> int:
    """Measure whether what was said of a network fits it; 1 if not."""
    problem, x_0 = Problem.of(arguments), _array(arguments.data)
    if x_0.shape[1:] != tuple(problem.shape):
        want = ", ".join(map(str, ("n", *problem.shape)))
        raise ValueError(f"--data must be ({want}); got {x_0.shape}.")
    api: Value = ds
    result = api.check(problem.score_fn, x_0, cond=problem.conditions(len(x_0)))
    print(result)
    return 0 if result else 1


def _array(path: str) -> np.ndarray:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        found = np.load(path, allow_pickle=False)
        array = found if isinstance(found, np.ndarray) else found[found.files[0]]
    except (ValueError, OSError, EOFError, IndexError) as error:
        raise ValueError(f"{path} is no .npy or .npz of numbers: {error}") from error
    if array.dtype.kind not in "fiu" or array.ndim < 2:
        raise ValueError(f"{path} must hold (n, ...) numbers; got {array.dtype} of {array.shape}.")
    return array.astype(np.float32)


def export(arguments: argparse.Namespace) -> int:
    """Write network and sampler as one file that runs without the model's code."""
    problem = Problem.of(arguments)
    sampler = ds.Sampler(problem.score_fn, tableau_of(arguments, problem))
    cond, out = problem.conditions(2), arguments.out
    ds.export(sampler, out, shape=problem.shape, cond=cond, platforms=arguments.platforms)
    print(f"{out}: {sampler.tableau.nfe} evaluations, {Path(out).stat().st_size:,} bytes.")
    return 0


def convert(arguments: argparse.Namespace) -> int:
    """Write a plan as the folder of a diffusers scheduler."""
    from diffsamp.interop.diffusers import scheduler_config

    load_plan(arguments.plan)  # checked as a plan first
    config = scheduler_config(arguments.plan, arguments.prediction)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "scheduler_config.json"
    write_atomically(file, (json.dumps(config, indent=1) + "\n").encode())
    print(f"wrote {file}, {len(config['timesteps'])} steps:")
    print(f'  pipe.scheduler = TableauScheduler.from_pretrained("{out}")')
    return 0
