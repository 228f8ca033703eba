"""What the searches find, what it costs, and which of their parts earn their place.

    python benchmarks/search.py --network digits
    python benchmarks/search.py --network fashion --data fashion_mnist.npz --steps 150 --batch 32
    python benchmarks/search.py --network mixture

On each network and budget: the best of the whole registry on every schedule, the best with a
schedule by dynamic programming, the best mix of solvers by evolution, and what gradient descent
makes of them; all on noise that took no part in anything. Then how few reference pairs are needed,
how plans transfer to other guidance and classes, and every part left out in turn.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _report import RESULTS, heading, table

import diffsamp as ds
from diffsamp import search
from diffsamp.models import digits

Starts = tuple[Any, Any]


class Problem:
    """A network with its starts, its reference and its distance to data."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        name = arguments.network
        self.batch = arguments.batch
        self.guided: Callable[[float], Any] | None = None
        self.known: dict[int, search.Comparison] = {}
        if name == "mixture":
            rng = np.random.default_rng(0)
            target = ds.targets.gaussian_mixture(
                [0.3, 0.3, 0.2, 0.2], rng.normal(size=(4, 8)) * 0.8, [0.02, 0.04, 0.08, 0.05]
            )
            self.score_fn = target.score_fn(ds.processes.edm())
            self.shape: tuple[int, ...] = (8,)
            self.labels = None
            data = np.asarray(target.sample(jax.random.key(9), arguments.fresh))
            self.judge: Any = search.objective.sliced_wasserstein(data, jax.random.key(8))
            self.what = "sliced Wasserstein distance to the target"
        else:
            import classifier

            if name == "digits":
                self.score_fn, self.shape = digits.load_digits_model(), digits.IMAGE_SHAPE
            else:
                import unet

                self.score_fn, self.shape = unet.load(name), (16, 16, 1)
            data, labels = classifier.data_of(name, arguments.data)
            self.labels = labels
            order = np.random.default_rng(0).permutation(len(data))[: max(5000, arguments.fresh)]
            self.judge = search.objective.frechet(data[order], classifier.features(name))
            self.what = "Frechet distance to the data in a classifier's features"
            self.guided = functools.partial(
                ds.guidance.cfg, self.score_fn, null={"label": jnp.int32(10)}
            )
        self.process = self.score_fn.process
        self.fine = search.reference_tableau(self.process, arguments.reference)
        self.fit = self.starts(1, arguments.starts)
        self.fresh = self.starts(2, arguments.fresh)
        self.fit_reference = self.run(self.fine, self.fit)
        self.fresh_reference = self.run(self.fine, self.fresh)
        more = range(100, 99 + arguments.seeds)
        self.sets = [self.fresh, *(self.starts(seed, arguments.fresh) for seed in more)]

    def starts(self, seed: int, n: int, classes: Any = None) -> Starts:
        """Starts, and labels in the proportions of the data."""
        x_T = self.process.prior_sample(jax.random.key(seed), (n, *self.shape))
        if self.labels is None:
            return x_T, None
        labels = self.labels if classes is None else self.labels[np.isin(self.labels, classes)]
        return x_T, {"label": jnp.asarray(labels[np.arange(n) % len(labels)])}

    def run(self, tableau: ds.Tableau, starts: Starts, score_fn: Any = None) -> Any:
        """Samples."""
        network = self.score_fn if score_fn is None else score_fn
        return search.run(network, tableau, starts[0], cond=starts[1], batch=128)

    def psnr(self, tableau: ds.Tableau) -> float:
        """On the fresh noise."""
        return float(ds.metrics.psnr(self.run(tableau, self.fresh), self.fresh_reference))

    def distance(self, tableau: ds.Tableau) -> np.ndarray:
        """To the data, on each set of fresh noise."""
        return np.array([self.judge(self.run(tableau, starts), None) for starts in self.sets])

    def distill(self, start: Any, arguments: argparse.Namespace, **options: Any) -> search.Plan:
        """With the script's settings."""
        settings: dict[str, Any] = {
            "x_T": self.fit[0],
            "cond": self.fit[1],
            "reference": self.fit_reference,
            "key": jax.random.key(3),
            "steps": arguments.steps,
            "batch": arguments.batch,
        }
        return search.distill(self.score_fn, start=start, **{**settings, **options})


def fixed(problem: Problem, arguments: argparse.Namespace) -> tuple[search.Comparison, float]:
    """The registry on every schedule: all on a few starts, the best 16 a budget on all."""
    began = time.perf_counter()
    few = arguments.screen
    cut = functools.partial(jax.tree.map, lambda v: v[:few])
    screened = search.compare(
        problem.score_fn,
        problem.fit[0][:few],
        nfe=arguments.nfe,
        cond=cut(problem.fit[1]),
        reference=problem.fit_reference[:few],
        batch=problem.batch,
    )
    print(f"{len(screened.entries)} fixed, {screened.discarded} not finite", flush=True)
    entries = []
    for nfe in arguments.nfe:
        own = sorted((e for e in screened.entries if e.nfe == nfe), key=lambda e: -e.psnr)[:16]
        samples = search.run_many(
            problem.score_fn,
            [e.tableau for e in own],
            problem.fit[0],
            cond=problem.fit[1],
            batch=128,
        )
        for e, x in zip(own, samples, strict=True):
            psnr = float(ds.metrics.psnr(x, problem.fit_reference))
            entries.append(search.Entry(e.solver, e.schedule, nfe, e.tableau, psnr, {}))
    chosen = search.Comparison(tuple(entries), problem.fit_reference)
    arguments.compared = len(screened.entries)
    return chosen, time.perf_counter() - began


def more_evaluations(problem: Problem, chosen: search.Comparison, nfe: int) -> float:
    """PSNR on fresh noise of the fixed samplers that are best at `nfe`, with half as many more."""
    more = -(-3 * nfe // 2)
    own = sorted((e for e in chosen.entries if e.nfe == nfe), key=lambda e: -e.psnr)
    found = [-np.inf]
    for entry in own[:6]:
        solver = ds.solvers.get(entry.solver)
        steps = solver.steps(more)
        if steps is not None and len(found) < 5:
            times = ds.schedules.get(entry.schedule)(problem.process, steps)
            found.append(problem.psnr(solver(problem.process, times)))
    return max(found)


def difference(values: np.ndarray) -> str:
    """Mean and standard error over the sets of noise."""
    if len(values) < 2:
        return f"{values.mean():+.3f}"
    return f"{values.mean():+.3f} ± {values.std(ddof=1) / np.sqrt(len(values)):.3f}"


def main_table(
    problem: Problem, arguments: argparse.Namespace
) -> tuple[str, dict[int, dict[str, Any]]]:
    """The searches one after another at each budget."""
    chosen, comparing = fixed(problem, arguments)
    costs = [
        search.step_costs(
            problem.score_fn,
            problem.fit[0][:64],
            cond=jax.tree.map(lambda v: v[:64], problem.fit[1]),
            kind=kind,
        ).with_weight(weight)
        for kind in ("local", "distance")
        for weight in (1.0, 1.2, 1.4)
    ]
    rows, costs_rows, found = [], [], {}
    for nfe in arguments.nfe:
        seconds = {}
        best = chosen.best(nfe)
        began = time.perf_counter()
        names = list(
            dict.fromkeys(
                e.solver
                for e in sorted(chosen.entries, key=lambda e: -e.psnr)
                if e.nfe == nfe and ds.solvers.get(e.solver).steps(nfe) is not None
            )
        )[:4]
        table_ = search.compare(
            problem.score_fn,
            problem.fit[0],
            nfe=[nfe],
            solver=names,
            schedule={f"{i}": c for i, c in enumerate(costs)},
            cond=problem.fit[1],
            reference=problem.fit_reference,
            batch=128,
        )
        seconds["dynamic"] = time.perf_counter() - began
        both = search.Comparison(chosen.entries + table_.entries, problem.fit_reference)
        problem.known[nfe], programmed = both, table_.best(nfe)
        evolution = search.evolve(
            problem.score_fn,
            problem.fit[0],
            nfe=nfe,
            key=jax.random.key(4),
            start=both,
            cond=problem.fit[1],
            reference=problem.fit_reference,
            batch=128,
            population=arguments.population,
            rounds=arguments.rounds,
        )
        seconds["evolve"] = evolution.seconds
        mixed = evolution.best.tableau(problem.process)
        starts = [mixed]
        starts += [t.tableau for t in (best, programmed) if search.can_distill(t.tableau)]
        plan = problem.distill(starts, arguments)
        seconds["distill"] = plan.seconds
        pairs = {
            "fixed": best.tableau,
            "dynamic": programmed.tableau,
            "evolve": mixed,
            "distill": plan.tableau,
        }
        if nfe in arguments.ddim:
            grid = ds.schedules.kl_optimal(problem.process, nfe)
            learned = problem.distill(ds.solvers.ddim(problem.process, grid), arguments)
            pairs["from ddim"] = learned.tableau
            pairs["from evolve"] = problem.distill(mixed, arguments).tableau
        psnr = {name: problem.psnr(t) for name, t in pairs.items()}
        far = {name: problem.distance(pairs[name]) for name in ("fixed", "distill")}
        equal = more_evaluations(problem, chosen, nfe)
        found[nfe] = {"plan": plan, "psnr": psnr, "fixed": best.tableau, "evolve": mixed}
        rows.append(
            [
                str(nfe),
                f"{best.solver}, {best.schedule}",
                f"{psnr['fixed']:.1f}",
                f"{psnr['dynamic']:.1f}",
                f"{psnr['evolve']:.1f}",
                f"**{psnr['distill']:.1f}**",
                f"{psnr['distill'] - psnr['fixed']:+.1f}",
                f"{equal:.1f}",
                f"{far['fixed'].mean():.3f}",
                f"{far['distill'].mean():.3f}",
                difference(far["distill"] - far["fixed"]),
            ]
        )
        costs_rows.append(
            [
                str(nfe),
                f"{psnr['from ddim']:.1f}" if "from ddim" in psnr else "",
                f"{psnr['from evolve']:.1f}" if "from evolve" in psnr else "",
                *(f"{seconds[k]:.0f}" for k in ("dynamic", "evolve", "distill")),
            ]
        )
        print(rows[-1], costs_rows[-1], flush=True)
        if arguments.plans:
            plan.save(f"{arguments.plans}/{arguments.network}-{nfe}.json")
    floor = problem.distance(problem.fine)
    n, m = arguments.starts, arguments.fresh
    text = (
        f"\n## {arguments.network}: what is found\n\n"
        f"PSNR in dB to the {arguments.reference}-evaluation solution from the same noise, and "
        f"{problem.what}, both on {m} noises that took no part (the distance: mean of "
        f"{arguments.seeds} such sets, and standard error of the difference between two samplers "
        "on the same noise). Everything was chosen and learned "
        f"on {n} others (a quarter of them held from the gradient). Fixed: the best of "
        f"{arguments.compared} (every deterministic solver of the registry on every schedule at "
        f"these budgets: all on {arguments.screen} noises, the best 16 of each on {n}); comparing "
        f"took {comparing:.0f} s. "
        f"Evolve: {arguments.population} x {arguments.rounds + 1} candidates. Distill: "
        f"{arguments.steps} steps of {arguments.batch}, from whichever of evolve, fixed and "
        f"dynamic got furthest in an eighth of that. "
        f"The reference itself: {floor.mean():.3f}.\n\n"
    )
    head = [
        "NFE",
        "best fixed",
        "PSNR",
        "dynamic",
        "evolve",
        "distill",
        "gain",
        "fixed, 1.5 NFE",
        "distance, fixed",
        "distill",
        "difference",
    ]
    text += table(head, rows)
    text += "\nDistilled from one start only (PSNR), and seconds of each search:\n\n"
    text += table(["NFE", "from DDIM", "from evolve", "dynamic", "evolve", "distill"], costs_rows)
    return text, found


def schedules_table(problem: Problem, arguments: argparse.Namespace) -> str:
    """Optimised schedules, for solvers they were and were not made for."""
    few = min(128, arguments.starts)
    cond = jax.tree.map(lambda v: v[:few], problem.fit[1])
    own: dict[str, Any] = {"cond": cond, "batch": problem.batch}
    x_T, data = problem.fit[0][:few], problem.fit_reference[:few]
    local = search.step_costs(problem.score_fn, x_T, **own)
    distance = search.step_costs(problem.score_fn, x_T, kind="distance", **own)
    grids: dict[str, Any] = {
        name: ds.schedules.get(name) for name in ("karras", "logsnr", "kl_optimal")
    }
    grids |= {
        "dynamic, squared error": local,
        "dynamic, squared error, weight 1.2": local.with_weight(1.2),
        "dynamic, distance (GITS), weight 1.2": distance.with_weight(1.2),
        "Align Your Steps": lambda _, n: search.align_steps(
            problem.score_fn, data, n, key=jax.random.key(5), **own
        ),
    }
    names = ("ddim", "dpmpp_2m", "ipndm3")
    budgets = [n for n in arguments.detail if n in arguments.nfe]
    result = search.compare(
        problem.score_fn,
        problem.fresh[0],
        nfe=budgets,
        solver=names,
        schedule=grids,
        cond=problem.fresh[1],
        reference=problem.fresh_reference,
        batch=128,
    )
    found = {(e.solver, e.nfe, e.schedule): e.psnr for e in result.entries}
    rows = [
        [grid, *(f"{found[name, n, grid]:.1f}" for n in budgets for name in names)]
        for grid in grids
    ]
    learned = ["by gradient (LD3), from kl_optimal"]
    for n in budgets:
        for name in names:
            start = ds.solvers.get(name)(
                problem.process, ds.schedules.kl_optimal(problem.process, n)
            )
            plan = problem.distill(start, arguments, learn="times")
            # the weights of the solver on the times found
            again = ds.solvers.get(name)(problem.process, plan.tableau.times)
            learned.append(f"{problem.psnr(plan.tableau):.1f} ({problem.psnr(again):.1f})")
    rows.append(learned)
    text = "\n## Optimised schedules\n\nPSNR on fresh noise, measured on "
    text += f"{few} noises. By gradient the weights stay those of the start; in brackets, the "
    text += "solver built anew on the times found.\n\n"
    return text + table(["schedule", *(f"{s}, NFE {n}" for n in budgets for s in names)], rows)


def pairs_table(problem: Problem, arguments: argparse.Namespace, found: Any) -> str:
    """How few reference pairs are needed."""
    rows = []
    for nfe in (n for n in arguments.detail if n in found):
        row = [str(nfe)]
        for n in arguments.pairs:
            x_T, cond = problem.fit
            plan = problem.distill(
                found[nfe]["evolve"],
                arguments,
                x_T=x_T[:n],
                cond=jax.tree.map(lambda v, n=n: v[:n], cond),
                reference=problem.fit_reference[:n],
            )
            row.append(f"{problem.psnr(plan.tableau):.1f}")
        rows.append(row)
        print(row, flush=True)
    text = (
        "\n## How few reference pairs\n\nDistilled from the evolved sampler; PSNR on fresh noise "
    )
    text += "(a quarter of the pairs is held from the gradient; BNS uses 520).\n\n"
    return text + table(["NFE", *(f"{n} pairs" for n in arguments.pairs)], rows)


def transfer_table(problem: Problem, arguments: argparse.Namespace, found: Any) -> str:
    """Plans used where they were not found."""
    nfe = 6
    half = problem.starts(1, arguments.starts, classes=range(5))
    conditions: dict[str, tuple[Any, Starts]] = {
        "no guidance": (problem.score_fn, problem.fresh),
        "guidance 2": (problem.guided(2.0), problem.fresh),
        "guidance 4": (problem.guided(4.0), problem.fresh),
        "classes 0-4": (problem.score_fn, problem.starts(5, 512, range(5))),
        "classes 5-9": (problem.score_fn, problem.starts(6, 512, range(5, 10))),
        "other seeds": (problem.score_fn, problem.starts(7, 512)),
    }
    key = jax.random.key(3)

    def learn(network: Any, starts: Starts) -> ds.Tableau:
        return search.distill(
            network,
            starts[0],
            cond=starts[1],
            nfe=nfe,
            start=found[nfe]["evolve"],
            key=key,
            steps=arguments.steps,
            batch=arguments.batch,
            reference=problem.fine,
        ).tableau

    plans = {
        "best fixed": found[nfe]["fixed"],
        "no guidance": learn(problem.score_fn, problem.fit),
        "guidance 2": learn(problem.guided(2.0), problem.fit),
        "guidance 4": learn(problem.guided(4.0), problem.fit),
        "classes 0-4": learn(problem.score_fn, half),
    }
    rows = []
    references = {
        name: problem.run(problem.fine, starts, network)
        for name, (network, starts) in conditions.items()
    }
    for name, tableau in plans.items():
        row = [name]
        for where, (network, starts) in conditions.items():
            x = problem.run(tableau, starts, network)
            row.append(f"{float(ds.metrics.psnr(x, references[where])):.1f}")
        rows.append(row)
        print(row, flush=True)
    text = f"\n## Transfer\n\nPSNR at {nfe} evaluations of the sampler (guidance calls the network "
    text += "twice in each); rows: where the plan was found, columns: where it is used.\n\n"
    return text + table(["found with", *conditions], rows)


def ablation_table(problem: Problem, arguments: argparse.Namespace, found: Any) -> str:
    """Every part left out, and every option."""
    budgets = [n for n in arguments.detail if n in found]
    variants: dict[str, dict[str, Any]] = {
        "as it is": {},
        "times only": {"learn": "times"},
        "weights only": {"learn": "weights"},
        "last 2 predictions": {"memory": 2},
        "last 3 predictions": {"memory": 3},
        "not kept consistent": {"consistent": False},
        "mean squared error": {"objective": search.objective.rmse()},
        "starts relaxed, radius 0.002": {"radius": 0.002},
        "starts relaxed, radius 0.02": {"radius": 0.02},
        "twice the steps": {"steps": 2 * arguments.steps},
    }
    rows = []
    for name, options in variants.items():
        row = [f"distill: {name}"]
        for nfe in budgets:
            plan = problem.distill(found[nfe]["evolve"], arguments, **options)
            row.append(f"{problem.psnr(plan.tableau):.1f}")
        rows.append(row)
        print(row, flush=True)
    for name, options in {
        "as it is": {},
        "without the predictor": {"predictor": False},
        "from random genomes only": {"start": None},
    }.items():
        row = [f"evolve: {name}"]
        for nfe in budgets:
            own: dict[str, Any] = {"start": problem.known[nfe], **options}
            evolution = search.evolve(
                problem.score_fn,
                problem.fit[0],
                nfe=nfe,
                key=jax.random.key(4),
                cond=problem.fit[1],
                reference=problem.fit_reference,
                batch=128,
                population=arguments.population,
                rounds=arguments.rounds,
                **own,
            )
            row.append(f"{problem.psnr(evolution.best.tableau(problem.process)):.1f}")
        rows.append(row)
        print(row, flush=True)
    text = "\n## Parts and options\n\nPSNR on fresh noise; distill from the evolved sampler.\n\n"
    return text + table(["", *(f"NFE {n}" for n in budgets)], rows)


def more_table(problem: Problem, arguments: argparse.Namespace) -> str:
    """What more steps of gradient make of the plans that a run before has left."""
    rows = []
    for nfe in arguments.nfe:
        path = f"{arguments.plans}/{arguments.network}-{nfe}.json"
        before = search.Plan.load(path).tableau
        plan = problem.distill(before, arguments)
        plan.save(path)
        away = problem.distance(plan.tableau)
        rows.append(
            [
                str(nfe),
                f"{problem.psnr(before):.1f}",
                f"{problem.psnr(plan.tableau):.1f}",
                f"{away.mean():.3f}",
                f"{plan.seconds:.0f}",
            ]
        )
        print(rows[-1], flush=True)
    text = f"\n## More gradient\n\nThe plans above after {arguments.steps} more steps.\n\n"
    return text + table(["NFE", "PSNR before", "after", "distance", "seconds"], rows)


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", choices=("digits", "fashion", "mixture"), default="digits")
    parser.add_argument("--data", help="the data set's file, where it is not bundled")
    parser.add_argument("--nfe", type=int, nargs="+", default=[4, 5, 6, 8, 10])
    parser.add_argument(
        "--ddim",
        type=int,
        nargs="*",
        default=[4, 5, 6, 8, 10],
        help="budgets at which to distill from DDIM, too",
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--starts", type=int, default=512, help="noises to fit, a quarter held out")
    parser.add_argument("--screen", type=int, default=64, help="noises for all fixed samplers")
    parser.add_argument("--fresh", type=int, default=1797, help="noises to report on")
    parser.add_argument("--seeds", type=int, default=4, help="sets of noise for the distance")
    parser.add_argument("--reference", type=int, default=200, help="evaluations of the reference")
    parser.add_argument("--population", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--pairs", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument(
        "--detail",
        type=int,
        nargs="+",
        default=[5, 8],
        help="budgets of the tables after the first",
    )
    parser.add_argument("--only-main", action="store_true", help="the first table only")
    parser.add_argument(
        "--more",
        action="store_true",
        help="only --steps more for the plans in --plans, appended to the result",
    )
    parser.add_argument("--out")
    parser.add_argument("--plans", help="folder for the plans that are found")
    arguments = parser.parse_args()
    problem = Problem(arguments)
    out = arguments.out or str(RESULTS / f"search_{arguments.network}.md")
    if arguments.more:
        with open(out, "a", encoding="utf-8") as file:
            file.write(more_table(problem, arguments))
        return
    text = heading("What the search finds")

    def write(more: str) -> None:
        """After every table: hours of work are not lost with the last one."""
        nonlocal text
        text += more
        with open(out, "w", encoding="utf-8") as file:
            file.write(text)

    first, found = main_table(problem, arguments)
    write(first)
    if not arguments.only_main:
        write(schedules_table(problem, arguments))
        write(pairs_table(problem, arguments, found))
        if problem.guided is not None and 6 in found:
            write(transfer_table(problem, arguments, found))
        write(ablation_table(problem, arguments, found))


if __name__ == "__main__":
    main()
