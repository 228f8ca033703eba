"""The ladder: published searches as settings of the library's, against `regress` and `best`.

    python benchmarks/ladder.py --network digits
    python benchmarks/ladder.py --network noise velocity --nfe 4 6
    python benchmarks/ladder.py --network fashion --data fashion_mnist.npz --steps 100 --batch 24

LD3, S4S, DSS, DyWeight and GS learn by gradient, GITS and AYS choose times, USF evolves; each is a
few options of `diffsamp.search` (`METHODS`). All see the same starts and the same fine solutions,
and all are judged on noise that took no part: PSNR to the fine solution and Frechet distance to the
data, against the network evaluations that the search spent. Every finished search is a line of
`results/ladder.jsonl`: a run that was stopped goes on where it was, and the tables and the picture
are drawn from all lines.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _report import RESULTS, heading, table

import diffsamp as ds
from diffsamp import plot, search
from diffsamp.plot._style import color_of, figure, styled

KEY = jax.random.key(3)
NETWORKS = ("digits", "noise", "velocity", "fashion")
BATCH = 64  # samples at a time of what takes no gradient
# those of `search.suggest`, and the grids on which every method's own solvers begin
USUAL = ("ipndm3", "unipc3", "accelerated_ddim")
GRIDS = ("logsnr", "kl_optimal", "polynomial", "quadratic", "beta")
PLOTS = Path(__file__).resolve().parent.parent / "docs" / "plots"


@dataclasses.dataclass(frozen=True)
class Effort:
    """What a search may use.

    Attributes:
      steps: of gradient, for every method that takes them.
      batch: samples of one.
      few: starts of what fits without a gradient, a quarter of them held out; also those on which
        fixed samplers are compared.
      evolved: starts on which genomes are measured.
      population: genomes a round.
      rounds: after the first.
    """

    steps: int = 300
    batch: int = 16
    few: int = 64
    evolved: int = 64
    population: int = 32
    rounds: int = 8


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network with starts to search on, and where the fine solver takes them.

    Attributes:
      score_fn: the network.
      x_T: (n, ...) starts; methods that need fewer take the first.
      cond: keyword arguments of the network, with the leading axis n.
      reference: (n, ...) fine solutions.
      cost: evaluations of one of them.
      features: samples -> (batch, dim), for the objective of DyWeight; None: pixels.
    """

    score_fn: Any
    x_T: Any
    cond: Any
    reference: Any
    cost: float
    features: Any = None

    def first(self, n: int) -> dict[str, Any]:
        """The first n starts, as the searches take them."""
        x_T, cond, reference = (
            jax.tree.map(lambda v: v[:n], tree) for tree in (self.x_T, self.cond, self.reference)
        )
        return {"x_T": x_T, "cond": cond, "reference": reference}

    def unsolved(self, n: int) -> dict[str, Any]:
        """The first n starts for searches that solve them themselves."""
        return {name: v for name, v in self.first(n).items() if name != "reference"}

    def size(self, n: int) -> int:
        """At most n starts, of those there are."""
        return min(n, int(self.x_T.shape[0]))

    @property
    def dimension(self) -> int:
        """Numbers of one sample."""
        return math.prod(self.x_T.shape[1:])


@dataclasses.dataclass(frozen=True)
class Found:
    """A sampler, and what it took.

    Attributes:
      tableau: the sampler.
      forward: network evaluations, fine solutions included.
      gradient: those of them that were differentiated, which costs about two more each.
    """

    tableau: ds.Tableau
    forward: float
    gradient: float = 0.0

    @property
    def evaluations(self) -> float:
        """As the library counts: a gradient is two more."""
        return self.forward + 2 * self.gradient


def fixed(
    problem: Problem, nfe: int, effort: Effort, solvers: Sequence[str], grids: Any = GRIDS
) -> tuple[ds.Tableau, float]:
    """The best of a few solvers on a few grids, and the evaluations without those of references."""
    own = problem.first(problem.size(effort.few))
    found = search.compare(
        problem.score_fn, nfe=[nfe], solver=solvers, schedule=grids, batch=BATCH, **own
    )
    return found.best(nfe).tableau, found.evaluations


def descend(
    problem: Problem,
    effort: Effort,
    start: ds.Tableau,
    steps: int | None = None,
    **options: Any,
) -> tuple[ds.Tableau, float, float]:
    """`distill`: the sampler, evaluations without and with a gradient; references not counted."""
    plan = search.distill(
        problem.score_fn,
        start=start,
        key=KEY,
        steps=effort.steps if steps is None else steps,
        batch=effort.batch,
        **problem.first(len(problem.x_T)),
        **options,
    )
    made = plan.history[-1][0] * plan.settings["batch"] * plan.settings["cost"]
    return plan.tableau, plan.settings["evaluations"] - 2 * made, made


def learned(
    problem: Problem,
    nfe: int,
    effort: Effort,
    solvers: Sequence[str],
    *phases: dict[str, Any],
    told: bool = False,
) -> Found:
    """The best fixed one of a method's own solvers, and gradient descent from it in phases.

    `told` gives the start conditioning times of its own, equal to the states', so that descents
    that free every number free those as well.
    """
    tableau, forward = fixed(problem, nfe, effort, solvers)
    if told:
        tableau = dataclasses.replace(tableau, asked=np.asarray(tableau.times)[:-1])
    forward += problem.cost * len(problem.x_T)
    gradient = 0.0
    steps = max(1, effort.steps // len(phases))
    for options in phases:
        tableau, plain, differentiated = descend(problem, effort, tableau, steps, **options)
        forward, gradient = forward + plain, gradient + differentiated
    return Found(tableau, forward, gradient)


def radius_of(problem: Problem, nfe: int) -> float:
    """LD3's ball in units of the start's norm: 0.001 dim / nfe^2 around unit noise."""
    return 0.001 * problem.dimension**0.5 / nfe**2


def usual(problem: Problem, nfe: int, effort: Effort) -> Found:
    """The best of `suggest`'s 15 pairs."""
    tableau, spent = fixed(problem, nfe, effort, USUAL)
    return Found(tableau, spent + problem.cost * problem.size(effort.few))


def ays(problem: Problem, nfe: int, effort: Effort) -> Found:
    """Times by the KL bound, for the best of three solvers on them."""
    size, points, rounds = problem.size(2 * effort.few), 60, 3
    own = problem.first(size)
    times = search.align_steps(
        problem.score_fn,
        own["reference"],
        nfe,
        key=KEY,
        cond=own["cond"],
        points=points,
        rounds=rounds,
    )
    # what a round takes a sample: its cells' levels and a point in each, and the last level; before
    # them a timed batch, twice. A few points of the later rounds coincide.
    points, inner = max(points, 2 * nfe), nfe - 2
    finer = nfe - 1 + 2 * inner * (max(2, points // inner) // 2)
    spent = size * (2 * points + 1 + (rounds - 1) * (2 * finer + 1)) + 2 * min(size, BATCH)
    solvers = ("ddim", "dpmpp_2m", "ipndm3")
    tableau, compared = fixed(problem, nfe, effort, solvers, {"aligned": lambda _, n: times})
    return Found(tableau, spent + compared + problem.cost * size)


def gits(problem: Problem, nfe: int, effort: Effort) -> Found:
    """Times by dynamic programming on how the trajectory bends, for iPNDM of the best order."""
    process = problem.score_fn.process
    own = problem.first(len(problem.x_T))
    # x / alpha, in which the deviation is measured, is infinite where flows start
    kind = "deviation" if process.alpha(process.t_max) > 0 else "distance"
    costs = search.step_costs(
        problem.score_fn,
        own["x_T"],
        cond=own["cond"],
        times=ds.schedules.karras(process, 60),
        kind=kind,
        batch=BATCH,
    )
    paths = {f"{w}": costs.with_weight(w) for w in (1.0, 1.15, 1.3)}
    tableau, compared = fixed(problem, nfe, effort, ("ipndm2", "ipndm3", "ipndm4"), paths)
    spent = costs.evaluations + compared
    return Found(tableau, spent + problem.cost * problem.size(effort.few))


def usf(problem: Problem, nfe: int, effort: Effort) -> Found:
    """Evolution over solvers, orders, predictions and times, from random ones."""
    size = problem.size(effort.evolved)
    found = search.evolve(
        problem.score_fn,
        nfe=nfe,
        key=KEY,
        population=effort.population,
        rounds=effort.rounds,
        batch=BATCH,
        **problem.first(size),
    )
    tableau = found.best.tableau(problem.score_fn.process)
    return Found(tableau, found.evaluations + problem.cost * size)


def ld3(problem: Problem, nfe: int, effort: Effort) -> Found:
    """Times and conditioning times; the solver's weights stay."""
    options = {"learn": ("times", "labels"), "radius": radius_of(problem, nfe)}
    return learned(problem, nfe, effort, ("unipc3", "dpmpp_3m", "ipndm4"), options)


def s4s(problem: Problem, nfe: int, effort: Effort) -> Found:
    """Weights of the last three evaluations and times in turn, twice each (S4S-Alt)."""
    ball = radius_of(problem, nfe)
    weights = {"learn": "weights", "memory": 3, "radius": ball}
    times = {"learn": ("times", "labels"), "radius": ball}
    solvers = ("unipc3", "dpmpp_3m", "ipndm3")
    return learned(problem, nfe, effort, solvers, weights, times, weights, times)


def dss(problem: Problem, nfe: int, effort: Effort) -> Found:
    """Times and weights that sum to one, from Euler's method, with Lion."""
    rate = optax.cosine_decay_schedule(1e-2, effort.steps)
    options = {"learn": ("times", "weights"), "optimizer": optax.lion(rate, weight_decay=0.0)}
    return learned(problem, nfe, effort, ("ddim",), options)


def dyweight(problem: Problem, nfe: int, effort: Effort) -> Found:
    """Weights of three evaluations with free sums, and conditioning times, from iPNDM."""
    options = {"consistent": False, "memory": 3, "learning_rate": 3e-2}
    return learned(problem, nfe, effort, ("ipndm3",), options, told=True)


def dyweight_features(problem: Problem, nfe: int, effort: Effort) -> Found:
    """The same by the error in features, as published."""
    goal = search.objective.rmse()
    if problem.features is not None:
        goal = search.objective.feature_error(problem.features, log=False)
    options = {"consistent": False, "memory": 3, "learning_rate": 3e-2, "objective": goal}
    return learned(problem, nfe, effort, ("ipndm3",), options, told=True)


def gs(problem: Problem, nfe: int, effort: Effort) -> Found:
    """All numbers as corrections to DPM-Solver++, sums, states and conditioning times included."""
    return learned(problem, nfe, effort, ("dpmpp_3m",), {"consistent": False}, told=True)


def regressed(problem: Problem, nfe: int, effort: Effort, share: int = 1) -> Found:
    """`regress` as it is, towards where its own trajectory ends; of a share of the starts."""
    own = problem.unsolved(effort.few // share)
    plan = search.regress(problem.score_fn, nfe=nfe, key=KEY, **own)
    return Found(plan.tableau, plan.settings["evaluations"])


CONSISTENT = ("times", "labels", "weights")  # with these alone a constant stays exact


def best(
    problem: Problem,
    nfe: int,
    effort: Effort,
    numbers: tuple[str, ...] | None = CONSISTENT,
    share: int = 1,
) -> Found:
    """`best` of consistent rows: `regress`, then `refine`, towards where its trajectory ends."""
    options = problem.unsolved(effort.few // share)
    front = search.best(problem.score_fn, nfe=[nfe], key=KEY, numbers=numbers, **options)
    plan = front.plans[nfe]
    return Found(plan.tableau, plan.settings["evaluations"])


@dataclasses.dataclass(frozen=True)
class Method:
    """A rung.

    Attributes:
      run: (problem, nfe, effort) -> what was found.
      setting: which options of the searches it is.
      source: the paper.
      published: what its authors spend, from their papers and repositories.
      differs: what is not as published.
    """

    run: Callable[..., Found]
    setting: str
    source: str = ""
    published: str = ""
    differs: str = ""


METHODS = {
    "fixed": Method(usual, "`compare` on the pairs of `suggest`"),
    "AYS": Method(
        ays,
        "`align_steps`, then the best of three solvers",
        "arXiv:2404.14507",
        "KL bound by Monte Carlo, single times moved in turn",
        "the exact optimum on a fine grid for the sweeps",
    ),
    "GITS": Method(
        gits,
        '`step_costs(kind="deviation")`, then the best of iPNDM 2 to 4 and three weights',
        "arXiv:2405.11326",
        "256 trajectories of 60 steps, weight 1.15",
        'flows: `kind="distance"`',
    ),
    "USF": Method(
        usf,
        "`evolve`",
        "arXiv:2312.07243",
        "FID of images of every candidate; their number is not in the repository",
        "PSNR for FID; no free first evaluation and no DPM-Solver-v3 among the choices",
    ),
    "LD3": Method(
        ld3,
        '`distill(learn=("times", "labels"), radius=)` from UniPC 3, DPM-Solver++ 3 or iPNDM 4',
        "arXiv:2405.15506",
        "50 + 50 solutions of 20 steps, 7 rounds in batches of 1 or 2",
        "PSNR for LPIPS; the solver's weights stay as times move; Adam for RMSprop and SGD",
    ),
    "S4S-Alt": Method(
        s4s,
        '`distill(learn="weights", memory=3)` and `learn=("times", "labels")` in turn, twice',
        "arXiv:2502.17423",
        "no code was published",
        "PSNR for LPIPS; weights sum to one",
    ),
    "DSS": Method(
        dss,
        '`distill(learn=("times", "weights"), optimizer=lion)` from DDIM',
        "arXiv:2505.21114",
        "50,000 samples, Euler of 100 steps, Lion at 1e-2",
        "the end for the trajectory; the rate decays",
    ),
    "DyWeight": Method(
        dyweight,
        "`distill(consistent=False, memory=3)` from iPNDM 3",
        "arXiv:2603.11607",
        "10,000 samples in batches of 16, iPNDM of 35 steps",
        "PSNR for features; times move; no free first evaluation",
    ),
    "DyWeight, features": Method(
        dyweight_features,
        "the same with `objective=feature_error`",
        "arXiv:2603.11607",
        "as above",
        "the classifier's features for Inception's",
    ),
    "GS": Method(
        gs,
        "`distill(consistent=False)` with conditioning times, from DPM-Solver++ 3",
        "arXiv:2510.17699",
        "1400 solutions, LPIPS, 1 to 2.5 hours of a GPU",
        "PSNR for LPIPS; no discriminator",
    ),
    "regress": Method(regressed, "`regress`"),
    "regress, half": Method(functools.partial(regressed, share=2), "the same, of half the starts"),
    "regress, quarter": Method(functools.partial(regressed, share=4), "the same, of a quarter"),
    "best": Method(best, "`best` of consistent rows"),
    "best, sums": Method(
        functools.partial(best, numbers=(*CONSISTENT, "sums")), '`best(numbers=(.., "sums"))`'
    ),
    "best, half": Method(
        functools.partial(best, numbers=None, share=2), "`best` as it is, of half the starts"
    ),
    "best, quarter": Method(
        functools.partial(best, numbers=None, share=4), "the same, of a quarter"
    ),
}
OURS = tuple(name for name in METHODS if name.startswith(("regress", "best")))
OUR_LINES = {"regress, quarter": ":", "regress": "-", "best, half": "-.", "best": "--"}  # drawn
BASE = "fixed"  # in the tables for comparison: no search


# -- the networks ----------------------------------------------------------------------------------


class Arena:
    """A network, what is searched on, and what judges."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        import classifier
        import kinds
        import unet

        from diffsamp.models import digits

        if name == "digits":
            score_fn: Any = digits.load_digits_model()
        else:
            score_fn = unet.load(name) if name == "fashion" else kinds.load(name)
        shape = (16, 16, 1) if name == "fashion" else digits.IMAGE_SHAPE
        known = "fashion" if name == "fashion" else "digits"
        data, self.labels = classifier.data_of(known, arguments.data)
        order = np.random.default_rng(0).permutation(len(data))[:5000]
        features = classifier.features(known)
        self.judge = search.objective.frechet(data[order], features)
        self.score_fn, self.shape = score_fn, shape
        self.fine = search.reference_tableau(score_fn.process, arguments.reference)
        fit, self.fresh = self._starts(1, arguments.starts), self._starts(2, arguments.fresh)
        solved = self.run(self.fine, fit)
        self.problem = Problem(score_fn, *fit, solved, score_fn.nfe(self.fine), features)
        self.fresh_reference = self.run(self.fine, self.fresh)
        self.floor = self.judge(self.fresh_reference, None)

    def _starts(self, seed: int, n: int) -> tuple[Any, Any]:
        """Starts, and labels in the proportions of the data."""
        x_T = self.score_fn.process.prior_sample(jax.random.key(seed), (n, *self.shape))
        return x_T, {"label": jnp.asarray(self.labels[np.arange(n) % len(self.labels)])}

    def run(self, tableau: ds.Tableau, starts: tuple[Any, Any]) -> Any:
        """Samples."""
        return search.run(self.score_fn, tableau, starts[0], cond=starts[1], batch=128)

    def judged(self, tableau: ds.Tableau) -> dict[str, float]:
        """On fresh noise."""
        x = self.run(tableau, self.fresh)
        psnr = search.objective.finite_psnr(x, self.fresh_reference, 2.0)
        finite = bool(jnp.all(jnp.isfinite(x)))
        return {"psnr": psnr, "frechet": self.judge(x, None) if finite else math.inf}


# -- results ---------------------------------------------------------------------------------------

Row = dict[str, Any]


def key_of(row: Row) -> tuple[str, int, str]:
    """What a line is known by."""
    return row["network"], row["nfe"], row["method"]


def cost(row: Row) -> float:
    """Evaluations, a gradient counted as two more."""
    return row["forward"] + 2 * row["gradient"]


def read(path: Path) -> list[Row]:
    """Finished searches in the order of the ladder, the last of each."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    last = {key_of(row): row for row in rows if row["method"] in METHODS}
    names = list(METHODS)
    return sorted(
        last.values(),
        key=lambda r: (NETWORKS.index(r["network"]), r["nfe"], names.index(r["method"])),
    )


def write(path: Path, text: str) -> None:
    """Atomically."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def measure(arguments: argparse.Namespace) -> None:
    """Run what is not there yet; a line is written when its search is done."""
    fields = [field.name for field in dataclasses.fields(Effort)]
    effort = Effort(**{name: getattr(arguments, name) for name in fields})
    names = ("starts", "fresh", "reference", *fields)
    settings = {name: getattr(arguments, name) for name in names}
    for name in arguments.network:
        arena = None
        for nfe in arguments.nfe:
            for method in arguments.methods:
                rows = {key_of(row): row for row in read(arguments.lines)}
                known = rows.get((name, nfe, method))
                if known is not None and known["settings"] == settings:
                    continue
                arena = Arena(name, arguments) if arena is None else arena
                began = time.perf_counter()
                found = METHODS[method].run(arena.problem, nfe, effort)
                row = {
                    "network": name,
                    "nfe": nfe,
                    "method": method,
                    **arena.judged(found.tableau),
                    "floor": arena.floor,
                    "forward": found.forward,
                    "gradient": found.gradient,
                    "seconds": round(time.perf_counter() - began, 1),
                    "settings": settings,
                }
                rows = {key_of(r): r for r in read(arguments.lines)}  # others may have written
                rows[key_of(row)] = row
                write(arguments.lines, "".join(json.dumps(r) + "\n" for r in rows.values()))
                print(json.dumps(row), flush=True)


def thousands(count: float) -> str:
    """For a table."""
    return f"{count / 1000:.0f}" if count >= 9500 or count == 0 else f"{count / 1000:.1f}"


def verdict(rows: list[Row]) -> str:
    """At each budget, the best published method and ours."""
    lines = []
    for network in dict.fromkeys(row["network"] for row in rows):
        for nfe in sorted({row["nfe"] for row in rows if row["network"] == network}):
            own = {r["method"]: r for r in rows if (r["network"], r["nfe"]) == (network, nfe)}
            others = [r for m, r in own.items() if m not in (*OURS, BASE)]
            ours = [own[m] for m in OURS if m in own]
            if not others or not ours:
                continue
            rival = max(others, key=lambda r: r["psnr"])
            closest = min(others, key=lambda r: r["frechet"])
            # the cheapest of ours that is better than all of them, else the best of ours
            enough = [r for r in ours if r["psnr"] > rival["psnr"]]
            mine = min(enough, key=cost) if enough else max(ours, key=lambda r: r["psnr"])
            top = max(ours, key=lambda r: r["psnr"])
            lines.append(
                [
                    network,
                    str(nfe),
                    f"{rival['method']}: {rival['psnr']:.1f}",
                    thousands(cost(rival)),
                    f"{top['method']}: **{top['psnr']:.1f}**",
                    f"{top['psnr'] - rival['psnr']:+.1f}",
                    thousands(cost(top)),
                    f"{mine['method']}, 1 / {cost(rival) / cost(mine):.1f}" if enough else "none",
                    f"{closest['method']}: {closest['frechet']:.3f}",
                    f"{min(r['frechet'] for r in ours):.3f}",
                ]
            )
    head = ["network", "NFE", "best published, dB", "evaluations", "best of ours, dB", "gain"]
    head += ["evaluations", "cheapest of ours above it", "least Frechet published", "ours"]
    return table(head, lines)


def report(arguments: argparse.Namespace) -> None:
    """The tables of all lines there are."""
    rows = read(arguments.lines)
    text = heading("The ladder of published searches", "optax")
    text += (
        "\nEvery method is a setting of the library's searches, on the same starts and fine "
        "solutions. PSNR in dB to the fine solution from the same noise and Frechet distance to "
        "the data in a classifier's features, on fresh noise, the same for all. Evaluations in "
        "thousands, fine solutions included (ours end where their own trajectory of 64 evaluations "
        "does), a gradient counted as two more; the long tables "
        "have evaluations forward and those that were differentiated apart. Seconds are wall "
        "clock on one or two cores that had up to ten times their work, compilation included: an "
        "upper bound, and no basis for ratios. One seed each; an empty cell was not run. Measured "
        "line by line (`results/ladder.jsonl`) by `--network`, `--nfe`, `--methods` at the default "
        "sizes."
        "\n\n## Against the best of them\n\n"
    )
    text += verdict(rows) + "\n## Settings\n\n"
    text += table(
        ["method", "setting", "paper", "published cost", "not as published"],
        [[n, m.setting, m.source, m.published, m.differs] for n, m in METHODS.items()],
    )
    for network in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == network]
        budgets = sorted({row["nfe"] for row in own})
        cells = {key_of(row)[1:]: row for row in own}
        methods = [m for m in METHODS if any(row["method"] == m for row in own)]
        used = own[-1]["settings"]
        text += f"\n## {network}\n\n"
        text += (
            f"{used['starts']} starts for the gradient (a quarter held out), {used['steps']} steps "
            f"of {used['batch']}; {used['few']} for `regress` and `best` (a quarter held out; "
            "half or a quarter of them where it says so) and for comparing fixed samplers; "
            f"{used['population']} x {used['rounds'] + 1} genomes on {used['evolved']}. Judged on "
            f"{used['fresh']} others. The fine solutions "
            f"({used['reference']} evaluations) have Frechet distance {own[-1]['floor']:.3f}.\n\n"
        )
        short = []
        for method in methods:
            line = [method]
            for n in budgets:
                row = cells.get((n, method))
                best_of = max(r["psnr"] for r in own if r["nfe"] == n)
                if row is None:
                    line.append("")
                    continue
                number = f"{row['psnr']:.1f}"
                bold = f"**{number}**" if row["psnr"] == best_of else number
                line.append(f"{bold} ({thousands(cost(row))})")
            short.append(line)
        text += "PSNR (evaluations, thousands):\n\n"
        text += table(["method", *(f"NFE {n}" for n in budgets)], short) + "\n"
        long = [
            [
                str(row["nfe"]),
                row["method"],
                f"{row['psnr']:.2f}",
                f"{row['frechet']:.3f}",
                thousands(row["forward"]),
                thousands(row["gradient"]),
                f"{row['seconds']:.0f}",
            ]
            for row in own
        ]
        head = ["NFE", "method", "PSNR", "Frechet", "forward", "gradients", "seconds"]
        text += table(head, long)
    write(arguments.out, text)


@styled
def picture(rows: list[Row]) -> Any:
    """PSNR against the evaluations of the search, one panel a network, a line a method.

    Networks of one budget have no lines and are left out, unless there are no others.
    """
    networks = list(dict.fromkeys(row["network"] for row in rows))
    budgets = {name: {r["nfe"] for r in rows if r["network"] == name} for name in networks}
    networks = [name for name in networks if len(budgets[name]) > 1] or networks
    columns = min(3, len(networks))
    lines = -(-len(networks) // columns)
    drawn = figure(2.8 * lines + 0.5)
    axes = drawn.subplots(lines, columns, squeeze=False).reshape(-1)
    for axis in axes[len(networks) :]:
        axis.set_axis_off()
    published = [m for m in METHODS if m not in OURS]
    handles = {}
    for axis, network in zip(axes, networks, strict=False):
        for method in METHODS:
            own = [r for r in rows if (r["network"], r["method"]) == (network, method)]
            if not own or (method in OURS and method not in OUR_LINES):
                continue
            if method in OURS:
                style: dict[str, Any] = {"color": "black", "zorder": 3}
                dashes = OUR_LINES[method]
            else:
                color, dashes = color_of(published.index(method))
                style = {"color": color}
            x, y = [cost(r) / 1000 for r in own], [r["psnr"] for r in own]
            (line,) = axis.plot(
                x, y, linestyle=dashes, marker="o", markersize=2.5, linewidth=1.1, **style
            )
            handles.setdefault(method, line)
            if method == "best":
                for r in own:
                    axis.annotate(
                        str(r["nfe"]),
                        (cost(r) / 1000, r["psnr"]),
                        (-3, 4),
                        textcoords="offset points",
                    )
        axis.set(xscale="log", xlabel="thousand evaluations", title=network)
        low, high = axis.get_xlim()
        ticks = [n for n in (10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if low <= n <= high]
        axis.set_xticks(ticks, [str(n) for n in ticks])
        axis.set_xticks([], minor=True)
        axis.grid()
    axes[0].set_ylabel("PSNR to the fine solution, dB")
    order = [m for m in METHODS if m in handles]
    drawn.legend([handles[m] for m in order], order, loc="outside lower center", ncols=5)
    return drawn


FULL = {"starts": 1024, "steps": 2000, "population": 64, "rounds": 16, "evolved": 256}


def main() -> None:
    """Measure what is missing, then write the tables and the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=["digits"])
    parser.add_argument("--data", help="fashion_mnist.npz, for the network of that name")
    parser.add_argument("--nfe", type=int, nargs="+", default=[4, 6])
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--starts", type=int, default=256, help="for searches by gradient")
    parser.add_argument("--fresh", type=int, default=1024, help="noises to report on")
    parser.add_argument("--reference", type=int, default=200, help="evaluations of fine solutions")
    for field in dataclasses.fields(Effort):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    parser.add_argument(
        "--full", action="store_true", help=f"all budgets of the docs, and {FULL}: for a GPU"
    )
    parser.add_argument("--report", action="store_true", help="only the tables and the picture")
    parser.add_argument("--lines", type=Path, default=RESULTS / "ladder.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS / "ladder.md")
    parser.add_argument("--plots", type=Path, default=PLOTS)
    if "--full" in sys.argv:
        parser.set_defaults(**FULL, nfe=[3, 4, 5, 6, 8, 10])
    arguments = parser.parse_args()
    if "fashion" in arguments.network and arguments.data is None and not arguments.report:
        parser.error("--network fashion needs --data")
    if not arguments.report:
        measure(arguments)
    report(arguments)
    plot.save(picture(read(arguments.lines)), arguments.plots / "ladder.png")


if __name__ == "__main__":
    main()
