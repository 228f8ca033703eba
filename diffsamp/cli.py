"""The command line: `diffsamp demo`, `list`, `compare`, `search` and `show`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import diffsamp as ds
from diffsamp._core.types import Key, PyTree, Value

__all__ = ["build_parser", "main"]

_DEMO_SOLVERS = (
    "ddim",
    "dpmpp_2m",
    "deis_tab3",
    "ipndm3",
    "unipc2",
    "unipc3",
)
_DEMO_BUDGETS = (4, 5, 6, 8, 10, 20)
_BATCH = 128  # on two cores the fastest, by half against 1024: it stays in the cache


def demo(arguments: argparse.Namespace) -> int:
    """Sample the bundled digits model with many solvers, then search for a better one."""
    from diffsamp import plot
    from diffsamp.models import digits

    began = time.perf_counter()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    score_fn = digits.load_digits_model()
    process = score_fn.process
    data, data_labels = digits.load_data()
    print(
        f"Bundled model: a class-conditional transformer of "
        f"{sum(leaf.size for leaf in jax.tree.leaves(score_fn.params)):,} parameters, trained on "
        f"{len(data)} handwritten digits ({process})."
    )
    key_table, key_fit, key_order = jax.random.split(jax.random.key(arguments.seed), 3)

    def start(key: Key, n: int) -> tuple[Value, dict[str, Value]]:
        # labels in the proportions of the data, so that the sets can be compared
        labels = jnp.asarray(data_labels[np.arange(n) % len(data_labels)])
        return process.prior_sample(key, (n, *digits.IMAGE_SHAPE)), {"label": labels}

    def distance(x: PyTree, _: Value = None) -> float:
        return ds.metrics.frechet_distance(x, data)

    bar = ds.ProgressBar()
    x_T, cond = start(key_table, arguments.samples)
    table = ds.search.compare(
        score_fn,
        x_T,
        nfe=_DEMO_BUDGETS,
        solver=_DEMO_SOLVERS,
        schedule=("karras", "logsnr"),
        cond=cond,
        scores={"distance": distance},
        batch=_BATCH,
        progress=bar,
    )
    print(
        "\nPSNR (dB) to the ODE's solution at equal noise / Frechet distance to the real digits, "
        f"{arguments.samples} samples; * best at this NFE"
    )
    print(table.table(score="distance"))
    odd, even = data[1::2], data[::2]
    print(
        f"Frechet distance of the ODE's own solution {distance(table.reference):.2f}; between two "
        f"halves of the data {ds.metrics.frechet_distance(odd, even):.2f}."
    )

    nfe = arguments.nfe
    starts = ds.search.candidates(table, nfe, most=2)
    names = " or ".join(tableau.name for tableau in starts)
    print(f"\nSearching for {nfe} evaluations, from {names} ...")
    x_fit, cond_fit = start(key_fit, 256)
    plan = ds.search.distill(
        score_fn,
        x_fit,
        start=starts,
        key=key_order,
        cond=cond_fit,
        steps=arguments.steps,
        progress=bar,
    )
    held = plan.psnr["held_out"]
    found = ds.search.run(score_fn, plan.tableau, x_T, cond=cond, batch=_BATCH)
    found_psnr = float(ds.metrics.psnr(found, table.reference))
    best_any = table.best(nfe)
    print(
        f"Held-out noise: {held['start']:.1f} dB -> {held['found']:.1f} dB "
        f"({held['found'] - held['start']:+.1f} dB) in {plan.seconds:.0f} s, from {plan.start}.\n"
        f"On the table's noise: {best_any.psnr:.1f} dB (best fixed, {best_any.solver} on "
        f"{best_any.schedule}) -> {found_psnr:.1f} dB; Frechet distance "
        f"{best_any.scores['distance']:.2f} -> {distance(found):.2f}."
    )
    matched = [n for n in _DEMO_BUDGETS if table.best(n).psnr >= found_psnr]
    print(
        f"The best fixed sampler needs {matched[0]} evaluations for that."
        if matched
        else f"No fixed sampler reaches that with {_DEMO_BUDGETS[-1]} evaluations."
    )

    files = {
        "tableau": out / f"digits-{nfe}.json",
        "samples": out / "samples.png",
        "plot": out / "quality_against_nfe.png",
    }
    plan.tableau.save(files["tableau"])
    show = np.array([int(np.flatnonzero(np.asarray(cond["label"]) == d)[0]) for d in range(10)])
    ddim = table.best(nfe, where=lambda entry: entry.solver == "ddim")
    rows = [("data", data[show]), ("ODE solution", np.asarray(table.reference)[show])]
    for label, tableau in (
        (f"distilled, {nfe} NFE", plan.tableau),
        (f"{best_any.solver}, {nfe} NFE", best_any.tableau),
        (f"ddim, {nfe} NFE", ddim.tableau),
    ):
        x = ds.search.run(score_fn, tableau, x_T[show], cond={"label": cond["label"][show]})
        rows.append((label, np.asarray(x)))
    plot.save(plot.image_grid(rows, title="One noise per column, class 0 to 9"), files["samples"])
    figure = plot.quality_against_nfe(
        table,
        found=[(nfe, found_psnr, distance(found))],
        score="distance",
        score_label="Frechet distance to real digits",
    )
    plot.save(figure, files["plot"])
    bar.close()
    print("\nWrote " + ", ".join(str(path) for path in files.values()))
    print(f"Done in {time.perf_counter() - began:.0f} s.")
    return 0


def list_solvers(arguments: argparse.Namespace) -> int:
    """Print the registry."""
    del arguments
    for solver in ds.solvers.SOLVERS.values():
        kind = "stochastic" if solver.stochastic else "deterministic"
        start = f" and {solver.extra} to start" if solver.extra else ""
        aliases = f" (elsewhere: {', '.join(solver.aliases)})" if solver.aliases else ""
        print(
            f"{solver.name:16s} order {solver.order}, {solver.stages} evaluation"
            f"{'s' if solver.stages > 1 else ' '} a step{start}, {kind}; {solver.source}{aliases}"
        )
    return 0


def _entry(name: str, option: str) -> Value:
    """What "module:name" stands for; modules of the current folder are found."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"{option} must look like module:name; got {name!r}.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0] and error.name != module:
            raise
        raise ValueError(f"{option}: there is no module {module!r}.") from error
    if not hasattr(found, attribute):
        raise ValueError(f"{option}: module {module!r} has no {attribute!r}.")
    return getattr(found, attribute)


def _problem(arguments: argparse.Namespace, starts: int) -> tuple[Value, Value, Value]:
    """The network, starts and conditions that the options name."""
    score_fn = _entry(arguments.model, "--model")
    if callable(score_fn) and not isinstance(score_fn, ds.ScoreFn):
        score_fn = score_fn()
    if not hasattr(score_fn, "process"):
        raise ValueError(
            f"--model {arguments.model} must be a ScoreFn, or a function without arguments that "
            f"returns one; got {type(score_fn).__name__}."
        )
    key = jax.random.fold_in(jax.random.key(arguments.seed), 0)
    x_T = score_fn.process.prior_sample(key, (starts, *arguments.shape))
    cond = None if arguments.cond is None else _entry(arguments.cond, "--cond")(starts)
    return score_fn, x_T, cond


def compare(arguments: argparse.Namespace) -> int:
    """Measure solvers x schedules on a network and print the table."""
    score_fn, x_T, cond = _problem(arguments, arguments.starts)
    bar = ds.ProgressBar()
    result = ds.search.compare(
        score_fn,
        x_T,
        nfe=arguments.nfe,
        solver=arguments.solver,
        schedule=arguments.schedule,
        cond=cond,
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
    score_fn, x_T, cond = _problem(arguments, arguments.starts)
    out = Path(arguments.out)
    bar = ds.ProgressBar()
    front = ds.search.best(
        score_fn,
        x_T,
        nfe=arguments.nfe,
        key=jax.random.fold_in(jax.random.key(arguments.seed), 1),
        cond=cond,
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
    paths = front.save(out)
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


def show(arguments: argparse.Namespace) -> int:
    """Say what a plan or a tableau does at each step, and draw it."""
    text = Path(arguments.path).read_text(encoding="utf-8")
    try:
        kind = json.loads(text).get("format")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{arguments.path} is neither a plan nor a tableau: {error}.") from error
    if kind == "diffsamp.plan":
        plan = ds.search.Plan.load(arguments.path)
        tableau = plan.tableau
        print(f"found by {plan.method} in {plan.seconds:.0f} s, with {dict(plan.versions)}")
        for name, sets in plan.scores.items():
            for where, values in sets.items():
                print(
                    f"{name} on {where.replace('_', ' ')} noise: {values['start']:.4g} "
                    f"({plan.start}) -> {values['found']:.4g}"
                )
    else:
        tableau = ds.Tableau.load(arguments.path)
    print(ds.describe(tableau))
    if arguments.plot is not None:
        ds.plot.save(ds.plot.tableau(tableau), arguments.plot)
        print(f"wrote {arguments.plot}")
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _network_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="module:name of a ScoreFn, or of a function that makes one")
    add("--shape", required=True, type=_numbers, help="shape of one sample, such as 32,32,3")
    add("--cond", help="module:name of a function n -> keyword arguments of the network")
    add("--nfe", type=_numbers, default=(4, 6, 8), help="budgets (default: 4,6,8)")
    add("--starts", type=int, default=256, help="noises (default: 256)")
    add("--batch", type=int, default=64, help="samples of one candidate at a time")
    add("--together", type=int, default=1, help="candidates at a time; more fill a GPU")
    add("--solver", type=_words, help="names, such as ddim,unipc3 (default: all deterministic)")
    add("--schedule", type=_words, help="names, such as karras,logsnr (default: all that fit)")
    add("--seed", type=int, default=0, help="seed of everything that is drawn")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the `diffsamp` command."""
    parser = argparse.ArgumentParser(prog="diffsamp", description=ds.__doc__)
    parser.add_argument("--version", action="version", version=f"diffsamp {ds.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("demo", help="sample the bundled model, compare solvers, search")
    one.add_argument("--out", default="out", help="folder for the results (default: out)")
    one.add_argument("--nfe", type=int, default=6, choices=_DEMO_BUDGETS, help="budget searched")
    one.add_argument("--seed", type=int, default=0, help="seed of all noise")
    one.add_argument("--samples", type=int, default=512, help="samples behind the table")
    one.add_argument("--steps", type=int, default=120, help="gradient steps of the search")
    one.set_defaults(function=demo)
    two = commands.add_parser("list", help="the solvers there are")
    two.set_defaults(function=list_solvers)
    three = commands.add_parser("compare", help="measure solvers x schedules on a network")
    _network_options(three)
    three.add_argument("--rows", type=int, default=20, help="lines of the table (default: 20)")
    three.set_defaults(function=compare)
    four = commands.add_parser("search", help="find the best sampler for a network and a budget")
    _network_options(four)
    four.add_argument(
        "--stages",
        nargs="+",
        choices=ds.search.STAGES,
        help="what to run (default: regress and refine)",
    )
    four.add_argument("--steps", type=int, default=400, help="gradient steps (default: 400)")
    four.add_argument("--rounds", type=int, default=8, help="rounds of evolution (default: 8)")
    four.add_argument("--seconds", type=float, help="begin no stage after this time")
    four.add_argument(
        "--out",
        default="plans",
        help="folder of the plans and of the state (default: plans); run "
        "the same command again to go on after a stop",
    )
    four.set_defaults(function=search)
    five = commands.add_parser("show", help="what a plan or a tableau does at each step")
    five.add_argument("path", help="a plan-<nfe>.json or a tableau's file")
    five.add_argument("--plot", help="also draw it into this PNG file")
    five.set_defaults(function=show)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.function(arguments)
    except (ModuleNotFoundError, OSError, ValueError) as error:
        print(f"diffsamp {arguments.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
