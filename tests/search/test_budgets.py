"""Every search says what it will cost, keeps within a limit, and counts what the network counts."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import PROCESS, mixture, start

import diffsamp as ds
from diffsamp import search

KEY = jax.random.key(3)
FINE = ds.solvers.unipc(PROCESS, ds.schedules.logsnr(PROCESS, 20), order=3)
SOLVERS = ("ddim", "dpmpp_2m", "ipndm3")
GRIDS = ("karras", "logsnr", "uniform")


class Counted:
    """A network, and how many samples it was asked for."""

    def __init__(self):
        exact, self.calls = mixture().score_fn(PROCESS, "data"), []

        def apply(params, x, t):
            jax.debug.callback(lambda n: self.calls.append(int(n)), jnp.asarray(x.shape[0]))
            return exact.apply(exact.params, x, t)

        self.network = ds.ScoreFn(apply, None, PROCESS, prediction="data")

    @property
    def count(self):
        jax.effects_barrier()
        return sum(self.calls)


def compared(network, x_T, **options):
    options = {"nfe": (4,), "solver": SOLVERS, "schedule": GRIDS, "reference": FINE, **options}
    return search.compare(network, x_T, **options)


def run(name, network, x_T, limit=None):
    """(evaluations that it reports, its estimate)."""
    if name == "compare":
        found = compared(network, x_T, evaluations=limit, batch=4)
    elif name == "step_costs":
        found = search.step_costs(network, x_T, points=20, evaluations=limit, batch=4)
    elif name == "align":
        levels = np.exp(-np.asarray(PROCESS.log_snr(ds.schedules.logsnr(PROCESS, 6)[:-1])))
        found = search.align_costs(network, x_T, levels, key=KEY, evaluations=limit, batch=4)
    elif name == "evolve":
        found = search.evolve(
            network,
            x_T,
            nfe=3,
            key=KEY,
            population=4,
            rounds=3,
            evaluations=limit,
            batch=4,
            reference=FINE,
        )
    else:
        options = (
            {"nfe": 3, "points": 20} if name == "regress" else {"iterations": 3, "reference": FINE}
        )
        more = () if name == "regress" else (ds.solvers.dpmpp(PROCESS, GRID, order=2),)
        function = getattr(search, name)
        plan = function(network, *more, x_T, key=KEY, evaluations=limit, batch=4, **options)
        return plan.settings["evaluations"], search.Estimate(
            megabytes=1, **{k: v for k, v in plan.settings["estimate"].items() if k != "megabytes"}
        )
    return found.evaluations, found.estimate


GRID = ds.schedules.logsnr(PROCESS, 3)
LIMITS = {
    "compare": 520,
    "step_costs": 700,
    "align": 60,
    "evolve": 550,
    "regress": 600,
    "refine": 400,
}


@pytest.mark.parametrize(
    "name",
    [n if n in ("regress", "compare") else pytest.param(n, marks=pytest.mark.long) for n in LIMITS],
)
def test_it_says_what_it_costs_and_keeps_within_a_limit(name, caplog):
    counted, x_T = Counted(), start(12)
    with caplog.at_level(logging.INFO, logger="diffsamp.search"):
        spent, estimate = run(name, counted.network, x_T)
    assert spent == counted.count
    assert 0.5 * spent < estimate.evaluations < 4 * spent
    assert estimate.seconds > 0
    assert f"{estimate}".split()[0] in caplog.text
    assert "MB of states" in caplog.text
    limited = Counted()
    less, estimate = run(name, limited.network, x_T, LIMITS[name])
    assert less == limited.count
    assert less < spent
    # a step or a round that has begun is finished, and plans are judged at the end
    slack = {"regress": 300, "refine": 500}.get(name, 0)
    assert less <= LIMITS[name] + slack
    assert estimate.evaluations <= LIMITS[name]


def test_halving_finds_what_all_on_all_find():
    network, x_T = mixture().score_fn(PROCESS, "data"), start(64)
    whole = compared(network, x_T)
    halved = compared(network, x_T, halving=8)
    assert halved.best(4).tableau.name == whole.best(4).tableau.name
    assert halved.best(4).psnr == pytest.approx(whole.best(4).psnr, abs=1e-3)
    counts = sorted(e.starts for e in halved.entries)
    assert counts == [0, 0, 16, 32, 32, *[8] * 4] or counts.count(8) == 4
    assert len(halved.entries) == len(whole.entries)
    reference, of_timing = 20 * 64, 2 * 4 * 64
    assert whole.evaluations == reference + of_timing + 9 * 4 * 64
    assert halved.evaluations == reference + 2 * 4 * 8 + 4 * (9 * 8 + 5 * 16 + 3 * 32 + 2 * 64)
    # by another score
    scores = {"worst": lambda x, r: float(jnp.max(jnp.abs(x - r)))}
    by = compared(network, x_T, halving=8, by="worst", scores=scores)
    full = compared(network, x_T, scores=scores)
    assert by.best(4, by="worst").scores["worst"] <= 1.2 * full.best(4, by="worst").scores["worst"]


def test_a_limit_that_is_too_low_says_so():
    network, x_T = mixture().score_fn(PROCESS, "data"), start(12)
    with pytest.raises(ValueError, match=r"`evaluations` is too low by .* name fewer solvers"):
        compared(network, x_T, evaluations=100)
    with pytest.raises(ValueError, match="`evaluations` is too low: step_costs takes"):
        search.step_costs(network, x_T, points=20, evaluations=10)
    given = ds.solvers.dpmpp(PROCESS, GRID, order=2)
    with pytest.raises(ValueError, match=r"`evaluations` is too low: .* go before the first step"):
        search.distill(network, x_T, start=given, key=KEY, evaluations=100)
    with pytest.raises(ValueError, match="`evaluations` must be"):
        search.regress(network, x_T, nfe=3, key=KEY, evaluations=0)


def test_distill_makes_as_many_steps_as_a_limit_allows():
    network, x_T = mixture().score_fn(PROCESS, "data"), start(16)
    given = ds.solvers.dpmpp(PROCESS, GRID, order=2)
    reference = ds.sample(network, ds.search.reference_tableau(PROCESS), x_T)
    options = {"start": given, "key": KEY, "reference": reference, "batch": 4, "evaluate_every": 5}
    plan = search.distill(network, x_T, steps=50, evaluations=400, **options)
    steps = plan.history[-1][0]
    assert steps == 400 // (3 * 4 * 3)
    looks = len(plan.history) * 2 * 3
    judged = 2 * (4 + 2) * 3
    assert plan.settings["evaluations"] == 2 * 4 + 3 * 3 * 4 * steps + looks + judged


@pytest.mark.long
def test_best_shares_a_limit_and_counts_all():
    counted, x_T = Counted(), start(32)
    options = {"nfe": (3, 4), "key": KEY, "batch": 24}
    whole = search.best(counted.network, x_T, **options)
    spent = whole.plans[4].settings["evaluations"]
    assert spent <= counted.count
    assert counted.count - spent < 200  # what scores the last plan
    limited = Counted()
    front = search.best(limited.network, x_T, evaluations=16_000, **options)
    assert limited.count < 17_000 < counted.count
    for n in (3, 4):
        chosen = front.plans[n].psnr["chosen_on"]
        assert chosen["found"] >= chosen["start"]


def test_guidance_counts_twice():
    network = mixture().score_fn(PROCESS, "data")

    def apply(params, x, t, label):
        return network.apply(params, x, t) + 0.01 * label[:, None]

    guided = ds.guidance.cfg(
        ds.ScoreFn(apply, network.params, PROCESS, prediction="data"), 2.0, {"label": 0.0}
    )
    x_T, cond = start(8), {"label": jnp.ones(8)}
    table = search.compare(guided, x_T, nfe=(3,), solver=("ddim",), schedule=("logsnr",), cond=cond)
    reference = ds.search.reference_tableau(PROCESS).nfe
    assert table.evaluations == 2 * 8 * (reference + 2 * 3 + 3)


def test_rounds_of_aligning_are_announced_together(caplog):
    counted, x_T = Counted(), start(8)
    with caplog.at_level(logging.INFO, logger="diffsamp.search"):
        search.align_steps(counted.network, x_T, 4, key=KEY, points=10, rounds=3, batch=4)
    (line,) = [r.args[1] for r in caplog.records if r.args and r.args[0] == "align"]
    assert 0.5 * line.evaluations < counted.count <= line.evaluations + 2 * 4
    limited = Counted()
    search.align_steps(
        limited.network, x_T, 4, key=KEY, points=10, rounds=3, batch=4, evaluations=250
    )
    assert 0 < limited.count <= 250
