"""What each objective of the search buys, and what a plan is worth where it was not searched.

    python benchmarks/recipes.py

On the bundled digits. One plan from least squares is the start of all; every other line changes
what is minimised, and every column judges all of them, on noise that took no part. Then plans read
off others by `transfer` and `interpolate`, beside those that were searched.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import classifier
import jax
import jax.numpy as jnp
import numpy as np
import unet
from _report import RESULTS, heading, table

import diffsamp as ds
from diffsamp import search
from diffsamp.models import digits
from diffsamp.models.digits import load_params
from diffsamp.search import objective

KEY = jax.random.key(3)


class Problem:
    """The network, starts to fit and fresh ones, with labels in turn."""

    def __init__(self, starts: int, fresh: int, scale: float = 1.0) -> None:
        self.network = digits.load_digits_model()
        self.process = self.network.process
        if scale != 1:
            self.network = ds.guidance.cfg(self.network, scale, null={"label": jnp.int32(10)})
        self.fit, self.fresh = self._starts(1, starts), self._starts(2, fresh)
        fine = search.reference_tableau(self.process)
        self.fit_reference = self.run(fine, self.fit)
        self.fresh_reference = self.run(fine, self.fresh)

    def _starts(self, seed: int, n: int) -> tuple[jax.Array, dict[str, jax.Array]]:
        x_T = self.process.prior_sample(jax.random.key(seed), (n, *digits.IMAGE_SHAPE))
        return x_T, {"label": jnp.asarray(np.arange(n) % 10, jnp.int32)}

    def run(self, tableau: ds.Tableau, starts: tuple[jax.Array, dict[str, jax.Array]]) -> jax.Array:
        """Samples, with the same noise for all that need it."""
        key = jax.random.key(7) if tableau.stochastic else None
        x_T, cond = starts
        return search.run(self.network, tableau, x_T, cond=cond, key=key, batch=128)

    def psnr(self, tableau: ds.Tableau) -> float:
        """On fresh noise."""
        return float(ds.metrics.psnr(self.run(tableau, self.fresh), self.fresh_reference))

    def searched(self, nfe: int) -> search.Plan:
        """`regress`, then `refine`."""
        x_T, cond = self.fit
        options = {"key": KEY, "cond": cond, "reference": self.fit_reference}
        plan = search.regress(self.network, x_T, nfe=nfe, **options)
        return search.refine(self.network, plan.tableau, x_T, **options, iterations=6)


def objectives(arguments: argparse.Namespace) -> str:
    """One line an objective, one column a judge."""
    problem, nfe = Problem(arguments.starts, arguments.fresh), arguments.nfe
    data, _ = classifier.data_of("digits", None)
    params = load_params(unet.WEIGHTS / "classifier_digits.safetensors")
    features = classifier.features("digits")

    def logits(x: jax.Array) -> jax.Array:
        return classifier.Classifier().apply({"params": params}, x)[0]

    def ink(x: jax.Array) -> np.ndarray:
        """How many pixels are more than half dark: a count, without a gradient."""
        return np.mean(np.asarray(x) > 0, axis=(1, 2, 3))

    labels = problem.fresh[1]["label"]
    frechet = objective.frechet(data, features)
    close = objective.feature_error(features)
    judges: dict[str, Callable[[jax.Array], float]] = {
        "PSNR": lambda x: float(ds.metrics.psnr(x, problem.fresh_reference)),
        "feature error (log)": lambda x: close(x, problem.fresh_reference),
        "cross-entropy": lambda x: objective.classifier(logits)(x, None, {"label": labels}),
        "Frechet": lambda x: frechet(x, None),
        "ink": lambda x: float(ink(x).mean()),
    }
    x_T, cond = problem.fit
    common = {"key": KEY, "cond": cond, "reference": problem.fit_reference, "batch": 64}

    def distill(
        start: ds.Tableau, goal: objective.Objective, learning_rate: float = 2e-3
    ) -> search.Plan:
        return search.distill(
            problem.network,
            x_T,
            start=start,
            objective=goal,
            steps=arguments.steps,
            learning_rate=learning_rate,
            **common,
        )

    def strategy(start: ds.Tableau, goal: objective.Objective) -> search.Plan:
        rounds = arguments.rounds
        return search.evolution_strategy(
            problem.network, start, x_T, objective=goal, rounds=rounds, spread=0.02, **common
        )

    base = problem.searched(nfe)
    start = base.tableau
    grid = ds.schedules.logsnr(problem.process, nfe)
    noisy = ds.solvers.ddim(problem.process, grid, eta=0.3)
    quiet = ds.solvers.ddim(problem.process, grid)
    lines: dict[str, Callable[[], search.Plan]] = {
        "error to the trajectory: `regress`, `refine`": lambda: base,
        "features: `feature_error`, `distill`": lambda: distill(start, close),
        "class, no teacher: `classifier`, `distill`": lambda: distill(
            start, objective.classifier(logits)
        ),
        "set in features: `kernel`, `evolution_strategy`": lambda: strategy(
            start, objective.kernel(data, features)
        ),
        "black box: `reward(ink)`, `evolution_strategy`": lambda: strategy(
            start, objective.reward(ink)
        ),
        "set: `energy`, `distill`, from DDIM": lambda: distill(quiet, objective.energy(), 1e-2),
        "the same with noise, from DDIM eta = 0.3": lambda: distill(
            noisy, objective.energy(), 1e-2
        ),
    }
    rows = []
    for name, make in lines.items():
        began = time.perf_counter()
        plan = make()
        seconds = time.perf_counter() - began
        x = problem.run(plan.tableau, problem.fresh)
        rows.append([name, *(f"{judge(x):.3f}" for judge in judges.values()), f"{seconds:.0f}"])
        print(rows[-1], flush=True)
    x = problem.fresh_reference
    rows.append(["the reference itself", *(f"{judge(x):.3f}" for judge in judges.values()), ""])
    rows[-1][1] = ""
    note = (
        f"## Objectives, {nfe} evaluations\n\n{arguments.starts} starts to search, "
        f"{arguments.fresh} others to judge; {arguments.steps} steps of `distill`, "
        f"{arguments.rounds} rounds of `evolution_strategy`. Lower is better but for PSNR and "
        "ink.\n\n"
    )
    return note + table(["minimised", *judges, "seconds"], rows)


def transferred(arguments: argparse.Namespace) -> str:
    """Budgets, then guidance scales."""
    starts = min(arguments.starts, 64)
    problem = Problem(starts, arguments.fresh)
    budgets = (4, 5, 6, 8, 10)
    plans = {n: problem.searched(n) for n in budgets}
    head = ["used at", *(f"from {n}" for n in budgets), "from the two beside it"]
    rows = []
    for i, n in enumerate(budgets):
        moved = [search.transfer(plans[m], problem.process, nfe=n) for m in budgets]
        row = [f"{n}", *(f"{problem.psnr(t):.1f}" for t in moved), ""]
        if 0 < i < len(budgets) - 1:
            beside = {m: plans[m] for m in (budgets[i - 1], budgets[i + 1])}
            between = search.interpolate(beside, problem.process, n)
            row[-1] = f"{problem.psnr(between):.1f}"
        rows.append(row)
        print(row, flush=True)
    text = f"## Plans at other budgets (PSNR in dB; {starts} starts; the diagonal was searched)\n\n"
    text += table(head, rows)
    nfe, scales = 6, (1.0, 2.0, 3.0)
    problems = {s: Problem(starts, arguments.fresh, s) for s in scales}
    found = {s: problems[s].searched(nfe) for s in scales}
    rows = []
    for i, s in enumerate(scales):
        row = [f"{s:g}", *(f"{problems[s].psnr(found[other].tableau):.1f}" for other in scales), ""]
        if 0 < i < len(scales) - 1:
            beside = {k: found[k] for k in (scales[i - 1], scales[i + 1])}
            row[-1] = f"{problems[s].psnr(search.interpolate(beside, problem.process, s)):.1f}"
        rows.append(row)
        print(row, flush=True)
    head = ["used at guidance", *(f"from {s:g}" for s in scales), "from the two beside it"]
    text += f"\n## Plans at other guidance scales, {nfe} rows\n\n" + table(head, rows)
    return text


def main() -> None:
    """Write benchmarks/results/recipes.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nfe", type=int, default=4)
    parser.add_argument("--starts", type=int, default=256)
    parser.add_argument("--fresh", type=int, default=512)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    parts = [objectives(arguments), transferred(arguments)]
    title = heading("Objectives, and plans where they were not searched")
    (RESULTS / "recipes.md").write_text(title + "\n" + "\n".join(parts))


if __name__ == "__main__":
    main()
