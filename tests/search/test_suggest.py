"""`suggest`: the best of what it tries, counted, within a limit, near the best of the registry."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import PROCESS, mixture, start
from test_budgets import Counted

import diffsamp as ds
from diffsamp import cli
from diffsamp.search.suggest import SCHEDULES, SOLVERS

PAIRS = [(s, g) for s in SOLVERS for g in SCHEDULES]


def errors(score_fn, x_T, nfe, pairs=PAIRS):
    """{pair: dB to a solution of 100 steps of Heun's method}, by a loop of its own."""
    fine = ds.solvers.heun(score_fn.process, ds.schedules.karras(score_fn.process, 100))
    exact = np.asarray(ds.sample(score_fn, fine, x_T), np.float64)
    made = [ds.sampler(score_fn, s, nfe=nfe, schedule=g).tableau for s, g in pairs]
    found = {}
    for (solver, schedule), tableau in zip(pairs, ds.Tableau.pad_together(made), strict=True):
        x = np.asarray(ds.sample(score_fn, tableau, x_T), np.float64)
        mse = ((x - exact) ** 2).mean(axis=1)
        found[solver, schedule] = float((10 * np.log10(4 / mse)).mean())
    return found


def test_it_says_the_best_and_why(score_fn):
    x_T = start(4)
    found = ds.suggest(score_fn, x_T, 6)
    measured = errors(score_fn, x_T, 6)
    finalists = [(e.solver, e.schedule) for e in found.finalists]
    chosen = measured[found.solver, found.schedule]
    assert chosen > max(measured[pair] for pair in finalists) - 0.5
    assert chosen > np.median(list(measured.values())) + 3
    for entry in found.finalists:  # the reference here is finer than there
        assert entry.psnr == pytest.approx(measured[entry.solver, entry.schedule], abs=0.5)
    assert found.psnr == found.finalists[0].psnr
    assert all(entry.psnr > found.psnr - 0.5 for entry in found.equals)
    # what halving dropped is not better by much: it saw one start of these four
    assert max(measured.values()) < chosen + 1.0
    text = str(found)
    assert text.startswith(f"{found.solver} on {found.schedule}, 6 evaluations: {found.psnr:.1f}")
    assert f"15 samplers were compared with {found.evaluations:.0f} network evaluations" in text
    line = text.splitlines()[-1]
    named = eval(line, {"ds": ds, "score_fn": score_fn})
    for name in ("times", "a", "b"):
        np.testing.assert_array_equal(getattr(named.tableau, name), getattr(found.tableau, name))
    assert found.nfe == named.tableau.nfe == 6
    plan = found.plan(score_fn)
    assert plan.start == f"{found.solver} on {found.schedule}"


@pytest.mark.parametrize(
    "process",
    [
        ds.processes.vp_linear(),
        pytest.param(ds.processes.flow(), marks=pytest.mark.long),
        pytest.param(ds.processes.vp_discrete(), marks=pytest.mark.long),
    ],
    ids=lambda p: type(p).__name__,
)
def test_on_other_starts_it_is_near_the_best_of_the_registry(process):
    network = mixture().score_fn(process)
    found = ds.suggest(network, process.prior_sample(jax.random.key(1), (4, 4)), 8)
    x_T = process.prior_sample(jax.random.key(2), (32, 4))
    whole = ds.search.compare(
        network,
        x_T,
        nfe=(8,),
        solver=("ddim", "dpmpp_2m", "deis_tab3", "unipc2", *SOLVERS),
        reference=ds.search.reference_tableau(process, 100),
    )
    own = [e for e in whole.entries if (e.solver, e.schedule) == (found.solver, found.schedule)]
    assert own[0].psnr > whole.best(8).psnr - 3.0
    usual = [e.psnr for e in whole.entries if (e.solver, e.schedule) == ("dpmpp_2m", "karras")]
    assert own[0].psnr > usual[0] + 3.0  # what is often taken


def test_evaluations_are_counted_announced_and_limited(caplog):
    x_T = start(8)
    counted = Counted()
    with caplog.at_level(logging.INFO, logger="diffsamp.search"):
        found = ds.suggest(counted.network, x_T, 5)
    assert counted.count == found.evaluations
    assert 300 < found.evaluations < 500  # a few hundred
    estimate = found.comparison.estimate
    assert [record.message for record in caplog.records] == [f"compare, 15 samplers: {estimate}"]
    assert found.evaluations == estimate.evaluations + 2 * 5  # and the run that was timed, twice
    assert len(found.comparison.reference) == 4  # of eight starts
    for limit in (found.evaluations - 1, 130):
        counted = Counted()
        less = ds.suggest(counted.network, x_T, 5, evaluations=int(limit))
        assert counted.count == less.evaluations <= limit
        assert len(less.comparison.reference) < 4
    with pytest.raises(ValueError, match="reference take 125 on one start; got 124"):
        ds.suggest(counted.network, x_T, 5, evaluations=124)


def test_guided_networks_cost_twice(score_fn):
    """And conditions go with the starts that are used."""

    def apply(params, x, t, shift):
        return score_fn.apply(params, x, t) + 0 * shift[:, None]

    labelled = ds.ScoreFn(apply, score_fn.params, PROCESS, prediction=score_fn.prediction)
    guided = ds.guidance.cfg(labelled, 2.0, null={"shift": 0.0})
    cond = {"shift": jnp.ones(6)}
    found = ds.suggest(guided, start(6), 5, cond=cond, starts=2)
    alone = ds.suggest(labelled, start(6), 5, cond=cond, starts=2)
    assert found.evaluations == 2 * alone.evaluations
    assert found.search == 2 * alone.search
    assert found.nfe == alone.nfe == 5


def test_on_a_mesh():
    """Every sampler on all starts, since fewer than the devices would save nothing."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    counted = Counted()
    found = ds.suggest(counted.network, start(4), 4, sharding=spread, solver=("ddim", "ipndm3"))
    assert counted.count == found.evaluations
    assert len(found.finalists) == 10
    alone = ds.suggest(Counted().network, start(4), 4, solver=("ddim", "ipndm3"))
    assert (alone.solver, alone.schedule) == (found.solver, found.schedule)
    assert alone.psnr == pytest.approx(found.psnr, abs=1e-3)


def test_what_is_wrong_is_said(score_fn):
    with pytest.raises(TypeError, match=r"must be a diffsamp\.ScoreFn"):
        ds.suggest(lambda x, t: x, start(2), 4)
    with pytest.raises(ValueError, match="`nfe` must be at least 1"):
        ds.suggest(score_fn, start(2), 0)
    with pytest.raises(ValueError, match="`starts` must be at least 1"):
        ds.suggest(score_fn, start(2), 4, starts=0)
    with pytest.raises(ValueError, match="can make exactly"):
        ds.suggest(score_fn, start(2), 4, solver=("heun",))
    bad = ds.ScoreFn(lambda p, x, t: x / 0, None, PROCESS, prediction="data")
    with pytest.raises(ValueError, match="not all finite"):
        ds.suggest(bad, start(2), 4)


MODEL = """
import jax.numpy as jnp
import diffsamp as ds

score_fn = ds.targets.gaussian_mixture(
    [0.5, 0.5], [[-1.0, 0.5], [1.0, -0.5]], [0.05, 0.1]
).score_fn(ds.processes.vp_linear())
"""


def test_the_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine_to_suggest.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    words = ["suggest", "--model", "mine_to_suggest:score_fn", "--shape", "2", "--nfe", "5"]
    assert cli.main([*words, "--starts", "2", "--out", "plan.json"]) == 0
    text = capsys.readouterr().out
    assert "15 samplers were compared" in text
    plan = ds.search.Plan.load("plan.json")
    assert plan.tableau.nfe == 5
    assert plan.start == text.partition(",")[0]
    assert cli.main([*words, "--evaluations", "30"]) == 1
    assert "`evaluations` is too low" in capsys.readouterr().err
