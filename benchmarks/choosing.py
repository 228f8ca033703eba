"""The decision table of docs/choosing.md: rules, `ds.suggest`, a search, against the best of all.

    python benchmarks/choosing.py                # all networks, a quarter of an hour on two cores
    python benchmarks/choosing.py mixture-vp     # one

Every network is measured with 11 solvers on every schedule, from the same noise. Beside the best of
these: the pair that the rule for its kind names, the pair that `ds.suggest` finds from four other
starts, and what `search.regress` finds from 42 others. The digits network, which was trained with
EDM's process, is also asked through the linear VP process and the flow, with the same answers: a
denoiser knows nothing but the noise level.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import accuracy
import jax
import jax.numpy as jnp
import numpy as np
import unet
from _report import RESULTS, heading, table

import diffsamp as ds
from diffsamp import search
from diffsamp.models import digits

BUDGETS = (5, 8, 12, 20)
SEARCHED = (5, 8)  # also by regression
# one evaluation a step and no noise: the others lose at these budgets
SOLVERS = (
    "ddim",
    "accelerated_ddim",
    "dpmpp_2m",
    "dpmpp_3m",
    "deis_tab2",
    "deis_tab3",
    "ipndm2",
    "ipndm3",
    "ipndm4",
    "unipc2",
    "unipc3",
)
KINDS = {"edm": "EDM", "vp": "VP", "flow": "flow", "guided": "guided"}
NETWORKS = (
    "digits-edm",
    "fashion-edm",
    "digits-vp",
    "mixture-vp",
    "digits-flow",
    "mixture-flow",
    "digits-guided",
    "fashion-guided",
)
SCALE = 3.0  # of the guidance


def rule(kind: str, nfe: int) -> tuple[str, str]:
    """Solver and schedule without measuring anything: the first column of the page."""
    if kind == "vp":
        return "ipndm3", "polynomial"
    if kind == "flow":
        return "ipndm3", "beta"
    if kind == "guided" and nfe < 10:
        return "accelerated_ddim", "kl_optimal"
    if nfe < 7:
        return "ipndm3", "kl_optimal"
    return ("unipc3" if kind == "edm" and nfe > 15 else "ipndm3"), "logsnr"


def _asked(params: Any, x: jax.Array, t: jax.Array, **cond: Any) -> jax.Array:
    inner, process = params
    sigma = process.sigma(t)
    alpha = jnp.maximum(process.alpha(t), sigma / inner.process.t_max)  # within its own levels
    rho = jnp.maximum(sigma / alpha, inner.process.t_min)
    return inner(x / alpha[:, None, None, None], rho, prediction="data", cond=cond)


def network(name: str) -> tuple[Any, tuple[int, ...], bool]:
    """A score function, the shape of a sample, and whether it takes labels."""
    which, kind = name.split("-")
    process = {"vp": ds.processes.vp_linear(), "flow": ds.processes.flow()}.get(kind)
    if which == "mixture":
        rng = np.random.default_rng(0)
        target = ds.targets.gaussian_mixture(
            [0.3, 0.3, 0.2, 0.2], rng.normal(size=(4, 8)) * 0.8, [0.02, 0.04, 0.08, 0.05]
        )
        return target.score_fn(process), (8,), False
    shape = digits.IMAGE_SHAPE if which == "digits" else (16, 16, 1)
    score_fn = digits.load_digits_model() if which == "digits" else unet.load("fashion")
    if process is not None:
        score_fn = ds.ScoreFn(_asked, (score_fn, process), process, prediction="data", time="t")
    if kind == "guided":
        score_fn = ds.guidance.cfg(score_fn, SCALE, null={"label": 10})
    return score_fn, shape, True


def measure(name: str, count: int, budgets: tuple[int, ...]) -> list[list[str]]:
    """Rows of the table: kind, network, NFE, best, rule, loss, suggested, loss, found, gain."""
    score_fn, shape, labelled = network(name)
    kind = name.split("-")[1]
    count = count // 2 if name.startswith("fashion") else count

    def starts(seed: int, n: int) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        x_T = score_fn.process.prior_sample(jax.random.key(seed), (n, *shape))
        return x_T, {"label": jnp.arange(n) % 10} if labelled else None

    x_T, cond = starts(11, count)
    whole = search.compare(
        score_fn,
        x_T,
        nfe=budgets,
        cond=cond,
        solver=SOLVERS,
        schedule=accuracy.SCHEDULES.get(name.split("-")[0]),
    )
    rows = []
    for nfe in budgets:
        psnr = {(e.solver, e.schedule): e.psnr for e in whole.entries if e.nfe == nfe}
        best = whole.best(nfe)
        ruled = rule(kind, nfe)
        few, own = starts(12, 4)
        told = ds.suggest(score_fn, few, nfe, cond=own)
        chosen = (told.solver, told.schedule)
        found = ""
        if nfe in SEARCHED:
            many, own = starts(13, 42)
            plan = search.regress(score_fn, many, nfe=nfe, key=jax.random.key(14), cond=own)
            x = search.run(score_fn, plan.tableau, x_T, cond=cond)
            gain = float(ds.metrics.psnr(x, whole.reference)) - best.psnr
            found = f"{_over(gain)} ({plan.settings['evaluations'] / 1000:.0f} thousand)"
        rows.append(
            [
                KINDS[kind],
                name.split("-")[0],
                str(nfe),
                f"`{best.solver}` {best.schedule}, {best.psnr:.1f}",
                f"`{ruled[0]}` {ruled[1]}",
                _over(psnr[ruled] - best.psnr),
                f"`{chosen[0]}` {chosen[1]}",
                f"{_over(psnr[chosen] - best.psnr)} ({told.evaluations:.0f})",
                found,
                _over(psnr["dpmpp_2m", "karras"] - best.psnr),
            ]
        )
        print(*rows[-1], flush=True)
    return rows


def _over(value: float) -> str:
    """With its sign, unless it rounds to nothing."""
    return f"{value:+.1f}" if abs(value) >= 0.05 else "0.0"


def summary(rows: list[list[str]]) -> list[list[str]]:
    """By kind and budget: loss of the rule, loss of `suggest`, gain of the search; means."""

    def mean(own: list[list[str]], column: int) -> str:
        values = [float(row[column].split()[0]) for row in own if row[column]]
        return _over(float(np.mean(values))) if values else ""

    lines = []
    for kind in dict.fromkeys(row[0] for row in rows):
        for nfe in dict.fromkeys(row[2] for row in rows):
            own = [row for row in rows if row[0] == kind and row[2] == nfe]
            named = sorted({row[4] for row in own})
            names = ", ".join(row[1] for row in own)
            means = [mean(own, column) for column in (9, 5, 7, 8)]
            lines.append([kind, nfe, ", ".join(named), *means, names])
    return lines


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="network")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--nfe", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--out", type=Path, default=RESULTS / "choosing.md")
    arguments = parser.parse_args()
    unknown = set(arguments.networks) - set(NETWORKS)
    if unknown:
        parser.error(f"unknown {', '.join(sorted(unknown))}; there are {', '.join(NETWORKS)}.")
    budgets = tuple(arguments.nfe)
    text = heading("Choosing a sampler")
    rows = [row for name in arguments.networks for row in measure(name, arguments.samples, budgets)]
    text += (
        "\nPSNR to the ODE's solution from the same noise, in dB, over that of the best of "
        f"{len(SOLVERS)} solvers on all schedules; means over the networks of a kind. Guidance "
        f"has scale {SCALE:g}.\n\n## By kind\n\n"
    )
    text += table(
        [
            "kind",
            "NFE",
            "rule",
            "`dpmpp_2m` on karras",
            "the rule",
            "`ds.suggest`",
            "`search.regress`",
            "networks",
        ],
        summary(rows),
    )
    text += "\n## Every network\n\n"
    text += table(
        [
            "kind",
            "network",
            "NFE",
            "best of all, dB",
            "rule",
            "over the best",
            "suggested",
            "over the best (evaluations)",
            "`search.regress` (evaluations)",
            "`dpmpp_2m` on karras",
        ],
        rows,
    )
    arguments.out.write_text(text, encoding="utf-8")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
