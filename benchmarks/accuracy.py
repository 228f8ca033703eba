"""Which sampler to choose: error against NFE of all of them, each on its best schedule.

    python benchmarks/accuracy.py                        # the exact target and the digits, minutes
    python benchmarks/accuracy.py mixture digits fashion # and the U-Net, half an hour

Every deterministic solver of the registry on every schedule of the process (six of them for the
U-Net), measured by RMSE to the ODE's solution from the same noise. Also: how much is lost by one
pair of solver and schedule used everywhere, and what `ds.search` finds (`results/plans`).
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import unet
from _report import RESULTS, heading, table

import diffsamp as ds
from diffsamp import search
from diffsamp.models import digits

BUDGETS = (4, 5, 6, 7, 8, 9, 10, 15, 20)
PLANS = RESULTS / "plans"
FOUND = "found by `ds.search`"
# those that win on the fast networks; all of them would take the slow one hours
SCHEDULES = {"fashion": ("karras", "logsnr", "kl_optimal", "polynomial", "quadratic", "beta")}
TITLES = {
    "mixture": "mixture, exact score (linear VP)",
    "digits": "digits transformer (EDM)",
    "fashion": "Fashion-MNIST U-Net (EDM)",
}


def network(name: str) -> tuple[Any, tuple[int, ...], Any]:
    """A score function, the shape of a sample, and whether it takes labels."""
    if name == "mixture":
        rng = np.random.default_rng(0)
        target = ds.targets.gaussian_mixture(
            [0.3, 0.3, 0.2, 0.2], rng.normal(size=(4, 8)) * 0.8, [0.02, 0.04, 0.08, 0.05]
        )
        return target.score_fn(ds.processes.vp_linear()), (8,), False
    if name == "digits":
        return digits.load_digits_model(), digits.IMAGE_SHAPE, True
    return unet.load(name), (16, 16, 1), True


def measure(name: str, samples: int, budgets: tuple[int, ...]) -> search.Comparison:
    """All solvers on all schedules; on a slow network fewer of them, on half the samples."""
    score_fn, shape, labelled = network(name)
    samples = samples // 2 if name in SCHEDULES else samples
    x_T = score_fn.process.prior_sample(jax.random.key(11), (samples, *shape))
    cond = {"label": jnp.arange(samples) % 10} if labelled else None
    return search.compare(score_fn, x_T, nfe=budgets, cond=cond, schedule=SCHEDULES.get(name))


def rmse(entry: search.Entry) -> float:
    """From the PSNR, for data of range 2."""
    return 2 * 10 ** (-entry.psnr / 20)


def best_of(entries: Any) -> dict[tuple[str, int], search.Entry]:
    """The best schedule of every solver at every budget."""
    found: dict[tuple[str, int], search.Entry] = {}
    for e in entries:
        if (e.solver, e.nfe) not in found or e.psnr > found[e.solver, e.nfe].psnr:
            found[e.solver, e.nfe] = e
    return found


def searched(name: str) -> dict[int, float]:
    """RMSE of the plans that the search left, where they are."""
    plans = [search.Plan.load(path) for path in sorted(PLANS.glob(f"{name}-*.json"))]
    if not plans:
        return {}
    score_fn, shape, labelled = network(name)
    x_T = score_fn.process.prior_sample(jax.random.key(11), (64, *shape))
    cond = {"label": jnp.arange(64) % 10} if labelled else None
    run = functools.partial(search.run, score_fn, x_T=x_T, cond=cond)
    fine = run(tableau=search.reference_tableau(score_fn.process))
    return {
        plan.tableau.nfe: 2 * 10 ** (-float(ds.metrics.psnr(run(tableau=plan.tableau), fine)) / 20)
        for plan in sorted(plans, key=lambda plan: plan.tableau.nfe)
    }


def table_of(
    comparison: search.Comparison, budgets: tuple[int, ...], plans: dict[int, float]
) -> str:
    """RMSE of every solver on its best schedule, the best on average first, after the plans."""
    best = best_of(comparison.entries)
    solvers = {solver for solver, _ in best}

    def rank(solver: str) -> float:
        own = [best[solver, n].psnr for n in budgets if (solver, n) in best]
        return -float(np.mean(own)) if len(own) == len(budgets) else np.inf

    def cell(solver: str, n: int) -> str:
        if (solver, n) not in best:
            return ""
        e = best[solver, n]
        return f"{rmse(e):.3g} {e.schedule}"

    rows = [[FOUND, *(f"{plans[n]:.3g}" if n in plans else "" for n in budgets)]] if plans else []
    rows += [[f"`{s}`", *(cell(s, n) for n in budgets)] for s in sorted(solvers, key=rank)]
    return table(["solver", *(f"NFE {n}" for n in budgets)], rows)


def losses(found: dict[str, search.Comparison], budgets: tuple[int, ...]) -> str:
    """dB that a fixed pair loses against the best pair of each network and budget."""
    regret: dict[tuple[str, str], dict[tuple[str, int], float]] = {}
    for name, comparison in found.items():
        for n in budgets:
            own = [e for e in comparison.entries if e.nfe == n]
            top = max(e.psnr for e in own)
            for e in own:
                regret.setdefault((e.solver, e.schedule), {})[name, n] = top - e.psnr
    cases = [(name, n) for name in found for n in budgets]
    whole = {pair: lost for pair, lost in regret.items() if len(lost) == len(cases)}
    ordered = sorted(whole, key=lambda pair: float(np.mean(list(whole[pair].values()))))
    named = [
        ("dpmpp_2m", "karras"),
        ("dpmpp_2m", "logsnr"),
        ("unipc3", "logsnr"),
        ("ddim", "uniform"),
    ]
    rows = []
    for pair in [*ordered[:8], *(p for p in named if p in whole and p not in ordered[:8])]:
        lost = whole[pair]
        rows.append(
            [
                f"`{pair[0]}`",
                pair[1],
                f"{np.mean(list(lost.values())):.1f}",
                f"{max(lost.values()):.1f}",
                *(f"{np.mean([lost[name, n] for n in budgets]):.1f}" for name in found),
            ]
        )
    return table(
        ["solver", "schedule", "mean loss, dB", "worst", *(TITLES[n] for n in found)], rows
    )


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "networks",
        nargs="*",
        default=["mixture", "digits"],
        metavar="network",
        help=", ".join(TITLES),
    )
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--nfe", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy.md")
    arguments = parser.parse_args()
    unknown = set(arguments.networks) - set(TITLES)
    if unknown:
        parser.error(
            f"unknown network {', '.join(sorted(unknown))}; there are {', '.join(TITLES)}."
        )
    budgets = tuple(arguments.nfe)
    text = heading("Which sampler to choose")
    found: dict[str, search.Comparison] = {}
    tables = ""
    for name in arguments.networks:
        found[name] = measure(name, arguments.samples, budgets)
        entries = found[name].entries
        tables += (
            f"\n## {TITLES[name]}\n\nRMSE to the ODE's solution on "
            f"{len(found[name].reference)} noises, and the schedule that gives it; {len(entries)} "
            "samplers.\n\n"
        ) + table_of(found[name], budgets, searched(name))
        print(name, len(entries), flush=True)
        summary = (
            "\n## One pair for everything\n\nWhat a solver with one schedule loses against the "
            "best pair at the same evaluations, in dB of PSNR: mean and worst over all networks "
            "and budgets, and the mean of each network.\n\n"
        ) + losses(found, budgets)
        arguments.out.write_text(text + summary + tables, encoding="utf-8")


if __name__ == "__main__":
    main()
