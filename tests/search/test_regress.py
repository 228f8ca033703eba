"""`regress` and `refine`: closed forms, counted evaluations, splits, and what they refuse."""

import dataclasses
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import PROCESS, mixture, start

import diffsamp as ds
from diffsamp import search, solvers
from diffsamp.search.explicit import Explicit, from_largest_level
from diffsamp.search.fine import fine_tableau
from diffsamp.search.refine import _used
from diffsamp.search.starts import Starts

regressing = importlib.import_module("diffsamp.search.regress")  # the name is the function's
KEY = jax.random.key(3)


def gaussian(process, variances, prediction="data"):
    """A linear network, and where its ODE takes x_T: x_0 = mean part 0, std c / std of x_T."""
    variances = np.asarray(variances, np.float64)
    target = ds.targets.gaussian(np.zeros(len(variances)), variances)
    alpha, sigma = float(process.alpha(process.t_max)), float(process.sigma(process.t_max))
    factor = np.sqrt(variances / (alpha**2 * variances + sigma**2))
    return target.score_fn(process, prediction), lambda x: jnp.asarray(
        np.asarray(x) * factor, jnp.float32
    )


PROCESSES = {
    "edm": (ds.processes.edm(0.02, 20.0), "data"),
    "vp": (ds.processes.vp_linear(), "noise"),
    "flow": (ds.processes.flow(), "velocity"),
    "ve": (ds.processes.ve(0.02, 20.0), "score"),
}


@pytest.mark.parametrize(
    "name",
    [n if n in ("vp", "flow") else pytest.param(n, marks=pytest.mark.long) for n in PROCESSES],
)
def test_a_gaussian_of_two_variances_is_exact_in_three_evaluations(name):
    """The last row has two weights for two equations; in one it has none, and misses."""
    process, prediction = PROCESSES[name]
    network, solution = gaussian(process, [0.09, 1.4], prediction)
    x_T = process.prior_sample(jax.random.key(0), (24, 2))
    errors = {}
    for nfe in (1, 3):
        plan = search.regress(
            network, x_T, nfe=nfe, key=KEY, reference=solution(x_T), points=40, evaluations=6000
        )
        assert plan.nfe == plan.tableau.nfe == nfe
        errors[nfe] = plan.psnr["held_out"]["found"]
    assert errors[3] > max(95, errors[1] + 50), errors
    fresh = process.prior_sample(jax.random.key(9), (16, 2))
    own = ds.sample(network, plan.tableau, fresh)
    np.testing.assert_allclose(own, solution(fresh), atol=2e-3)


def test_as_many_evaluations_as_points_give_the_reference(score_fn):
    x_T, network = start(24), score_fn
    times = ds.schedules.karras(PROCESS, 12)
    plan = search.regress(network, x_T, nfe=12, key=KEY, points=times)
    own = ds.sample(network, plan.tableau, x_T)
    fine = ds.sample(network, solvers.unipc(PROCESS, times, order=3), x_T)
    assert float(ds.metrics.psnr(own, fine)) > 60


def mixed(name):
    """A network of two narrow Gaussians in the plane, and starts."""
    process, prediction = PROCESSES[name]
    x_T = process.prior_sample(jax.random.key(0), (64, 2))
    target = ds.targets.gaussian_mixture([0.5, 0.5], [[-1.0, 0.5], [1.0, -0.5]], [0.05, 0.1])
    return target.score_fn(process, prediction), process, x_T


@pytest.mark.parametrize("name", list(PROCESSES))
def test_the_trajectory_ends_at_the_solution(name):
    """What `best` takes for its reference; a grid of two kinds of steps loses 24 dB on "vp"."""
    network, process, x_T = mixed(name)
    tableau = fine_tableau(network, None, 4)
    assert tableau.nfe == 64
    assert np.all(np.diff(tableau.times) < 0)
    ends = [ds.sample(network, t, x_T) for t in (tableau, search.reference_tableau(process, 400))]
    assert float(ds.metrics.psnr(*ends)) > 83


def test_several_grids_lead_near_the_best_of_all(monkeypatch):
    """Against every grid of 3 of 16 points; from the best start alone it ends in another valley."""
    network, _, x_T = mixed("edm")
    options = {"nfe": 3, "points": 16, "key": KEY}
    plan = search.regress(network, x_T[:16], **options)
    starts = Starts.split(network, x_T[:16], None, KEY, None, 64, None)
    limits = {"evaluations": None, "progress": None}
    record = regressing.Regression.on(starts, [3], points=16, **limits).record
    walker = regressing._Walker(starts, record, 1e-6, np.inf)
    least = min(walker((*grid, 16)).error for grid in itertools.combinations(range(16), 3))
    found = min(row[1] for row in plan.history)
    assert least - 1e-3 < found < least + 0.6
    monkeypatch.setattr(regressing, "_BEGUN", 3)
    alone = search.regress(network, x_T[:16], **options)
    assert min(row[1] for row in alone.history) > found + 0.3


def counting(network, calls):
    """The same network, which says how many samples it was asked for."""

    def apply(params, x, t, **cond):
        jax.debug.callback(lambda n: calls.append(int(n)), jnp.asarray(x.shape[0]))
        return params(x, t, prediction="data")

    return ds.ScoreFn(apply, network, network.process, prediction="data")


def test_evaluations_are_those_of_the_network():
    calls = []
    network = counting(mixture().score_fn(PROCESS, "edm_f"), calls)
    x_T = start(12)
    plan = search.regress(network, x_T, nfe=3, key=KEY, points=20, batch=5)
    jax.effects_barrier()
    assert plan.settings["evaluations"] == sum(calls)
    calls.clear()
    refined = search.refine(network, plan.tableau, x_T, key=KEY, iterations=2, batch=5)
    jax.effects_barrier()
    assert refined.settings["evaluations"] == sum(calls)
    calls.clear()
    short = search.regress(network, x_T, nfe=3, key=KEY, points=20, evaluations=300)
    jax.effects_barrier()
    assert short.settings["evaluations"] == sum(calls) < plan.settings["evaluations"]


@pytest.fixture(scope="module")
def regressed(score_fn):
    return search.regress(score_fn, start(48), nfe=4, key=KEY)


def test_it_beats_every_fixed_sampler(score_fn, regressed):
    x_T = start(48, seed=5)
    table = search.compare(score_fn, x_T, nfe=(4,))
    found = ds.sample(score_fn, regressed.tableau, x_T)
    best = table.best(4)
    assert float(ds.metrics.psnr(found, table.reference)) > best.psnr + 3


def test_refine_improves_it_and_reports_on_others(score_fn, regressed):
    x_T = start(48)
    plan = search.refine(score_fn, regressed.tableau, x_T, key=KEY)
    assert plan.history[-1][1] < plan.history[0][1] - 0.05  # the mean log error that it descends
    decided = min(row[2] for row in plan.history)
    assert decided <= plan.history[0][2]


def test_sums_help_what_is_freed_beside_them(score_fn, regressed):
    """Against the same numbers without them, and times that stay: the problem is nearly linear."""
    less, more = (
        search.refine(score_fn, regressed.tableau, start(48), key=KEY, numbers=numbers)
        for numbers in (("weights",), ("weights", "sums"))
    )
    assert more.history[-1][1] < less.history[-1][1] - 0.1


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "heun", "dpmpp_2s", "unipc3", "rho_rk4"])
def test_refine_takes_any_deterministic_sampler(score_fn, solver):
    """Also multi-stage ones; the start is reproduced, and a Gauss-Newton step or two helps."""
    registered = solvers.get(solver)
    tableau = registered(PROCESS, ds.schedules.karras(PROCESS, 3))
    x_T = start(24)
    again = Explicit.of(tableau).tableau(PROCESS, name="again", source="")
    np.testing.assert_allclose(
        ds.sample(score_fn, again, x_T), ds.sample(score_fn, tableau, x_T), atol=2e-4
    )
    plan = search.refine(score_fn, tableau, x_T, key=KEY, iterations=2)
    assert plan.scores["log_mse"]["fit"]["found"] < plan.scores["log_mse"]["fit"]["start"] - 0.3


def test_refine_solves_a_gaussian():
    """Two evaluations, one variance: one weight more than equations."""
    network, solution = gaussian(PROCESS, [0.3])
    x_T = PROCESS.prior_sample(jax.random.key(0), (16, 1))
    tableau = solvers.dpmpp(PROCESS, ds.schedules.karras(PROCESS, 2), order=2)
    plan = search.refine(
        network, tableau, x_T, key=KEY, reference=solution(x_T), iterations=12, numbers=("weights",)
    )
    assert plan.psnr["held_out"]["start"] < 30
    assert plan.psnr["held_out"]["found"] > 80


def test_it_is_never_worse_than_the_start(score_fn):
    """With one start to fit, what fits it is worse elsewhere: the start stays the best there."""
    x_T = start(24)
    given = search.regress(score_fn, x_T, nfe=3, key=KEY).tableau
    plan = search.refine(score_fn, given, x_T, key=KEY, held_out=23, iterations=6)
    decided = [row[2] for row in plan.history]
    found = plan.tableau
    if min(decided) == decided[0]:
        assert found is given or np.array_equal(found.b, given.b)
    assert min(decided) <= decided[0]


def test_the_batch_changes_nothing(score_fn):
    one, other = (
        search.regress(score_fn, start(24), nfe=3, key=KEY, points=30, batch=batch).tableau
        for batch in (7, 64)
    )
    np.testing.assert_allclose(one.b, other.b, atol=2e-3)
    np.testing.assert_allclose(one.times, other.times, rtol=1e-3)


def test_nor_does_that_of_refine(score_fn, regressed, x64):
    """In 64 bits: there are directions in which little changes, and rounding moves along them."""
    x_T = start(20).astype(jnp.float64)
    one, other = (
        search.refine(score_fn, regressed.tableau, x_T, key=KEY, batch=batch, iterations=2).tableau
        for batch in (7, 64)
    )
    np.testing.assert_allclose(one.b, other.b, atol=1e-7)
    np.testing.assert_allclose(one.times, other.times, rtol=1e-7)


def test_a_network_without_gradient(score_fn):
    def apply(params, x, t):
        out = jax.eval_shape(lambda: x)
        return jax.pure_callback(
            lambda x, t: np.asarray(x / (1 + np.exp(4 * t)[:, None] ** 2)), out, x, t
        )

    network = ds.ScoreFn(apply, {}, PROCESS, prediction="data", time="c_noise")
    x_T = start(12)
    plan = search.regress(network, x_T, nfe=3, key=KEY, points=20)
    refined = search.refine(network, plan.tableau, x_T, key=KEY, iterations=1)
    assert np.isfinite(refined.psnr["held_out"]["found"])


def test_the_first_time_is_free_and_starts_are_scaled(score_fn, regressed, tmp_path):
    """A sampler that begins below t_max scales x_T by a row that asks nothing."""
    times = ds.schedules.karras(PROCESS, 4, t_max=10.0)
    tableau = solvers.dpmpp(PROCESS, times, order=2)
    longer = from_largest_level(tableau, PROCESS)
    assert (longer.nfe, longer.rows) == (4, 5)
    network, x_T = score_fn, start(24)
    np.testing.assert_allclose(
        ds.sample(network, longer, x_T), ds.sample(network, tableau, x_T / 2), rtol=1e-5, atol=1e-6
    )
    assert from_largest_level(longer, PROCESS) is longer
    assert regressed.tableau.times[0] == PROCESS.t_max
    regressed.save(tmp_path / "plan.json")
    again = search.Plan.load(tmp_path / "plan.json")
    assert np.array_equal(again.tableau.b, regressed.tableau.b)


def test_grids_that_give_nan_are_left_out_and_counted(score_fn, monkeypatch):
    """A network that knows nothing at one level, on states other than the fine trajectory's."""
    walker = regressing._Walker
    real = walker.ask

    def ask(self, x, i):
        return real(self, x, i) * (np.nan if i in (7, 8) else 1)

    monkeypatch.setattr(walker, "ask", ask)
    plan = search.regress(score_fn, start(24), nfe=3, key=KEY, points=30)
    assert plan.settings["discarded"] > 0
    assert np.isfinite(plan.psnr["held_out"]["found"])


def test_what_they_refuse(score_fn):
    x_T = start(8)
    with pytest.raises(ValueError, match="too few are left"):
        search.regress(score_fn, x_T, nfe=3, key=KEY, held_out=8)
    with pytest.raises(ValueError, match="fine grid has"):
        search.regress(score_fn, x_T, nfe=30, key=KEY, points=12)
    noisy = solvers.ddpm(PROCESS, ds.schedules.karras(PROCESS, 4))
    with pytest.raises(ValueError, match="adds noise"):
        search.refine(score_fn, noisy, x_T, key=KEY)
    tableau = solvers.ddim(PROCESS, ds.schedules.karras(PROCESS, 4))
    with pytest.raises(ValueError, match="numbers"):
        search.refine(score_fn, tableau, x_T, key=KEY, numbers=("gamma",))
    bad = ds.ScoreFn(lambda p, x, t: x * jnp.nan, {}, PROCESS, prediction="data")
    with pytest.raises(ValueError, match="not finite"):
        search.regress(bad, x_T, nfe=3, key=KEY)


def test_refine_begins_at_the_sampler_that_it_was_given(score_fn):
    """Also where its rows do not sum to what a consistent one's do, freed or not."""
    x_T, given = start(24), ds.solvers.get("dpmpp_2s")(PROCESS, ds.schedules.karras(PROCESS, 5))
    reference = search.run(score_fn, search.reference_tableau(PROCESS), x_T)
    off = dataclasses.replace(given, b=given.b * np.array([1.1, 0.9, 1.0, 1.2, 1.0])[:, None])
    for numbers in (("weights",), ("times", "sums")):
        plan = search.refine(
            score_fn, off, x_T, key=KEY, reference=reference, numbers=numbers, iterations=1
        )
        fit = np.asarray(jax.random.permutation(KEY, 24))[:18]
        value = search.objective.log_mse()(search.run(score_fn, off, x_T[fit]), reference[fit])
        assert plan.history[0][1] == pytest.approx(value, abs=1e-4)


# -- parallel stages ---------------------------------------------------------------------------


def test_refine_keeps_parallel_stages_parallel(score_fn):
    """Weights between rows of one wave stay 0 if asked, and what is left still gains."""
    x_T = start(24)
    reference = search.run(score_fn, search.reference_tableau(PROCESS), x_T)
    given = ds.solvers.epd(PROCESS, ds.schedules.karras(PROCESS, 3))
    assert (given.nfe, given.latency) == (7, 5)
    options = {"key": jax.random.key(1), "reference": reference, "iterations": 2}
    plan = search.refine(score_fn, given, x_T, keep_waves=True, **options)
    found = plan.tableau.waves[plan.tableau.evaluates]  # a first row may scale the start
    assert found.tolist() == given.waves.tolist() == [1, 2, 2, 3, 4, 4, 5]
    assert (plan.nfe, plan.latency) == (7, 5)
    held = plan.psnr["held_out"]
    assert held["found"] > held["start"] + 3
    np.testing.assert_allclose(
        ds.parallel.sample_waves(score_fn, plan.tableau, x_T),
        ds.sample(score_fn, plan.tableau, x_T),
        atol=1e-3,
    )
    free = search.refine(score_fn, given, x_T, **options)
    assert free.latency == free.nfe == 7


def test_waves_that_cannot_be_kept_are_refused(score_fn):
    """A row that asks early but stands late: what comes after it would wait for it."""
    given = ds.solvers.ddim(PROCESS, ds.schedules.karras(PROCESS, 3))
    a, b = np.array([[1.0], [0.0], [1.0]]), np.array([[0.1], [0.0], [0.1]])
    table = dataclasses.replace(given, a=a, b=b)
    assert table.waves.tolist() == [1, 2, 1]
    with pytest.raises(ValueError, match="cannot be kept"):
        _used(table, True)
    assert _used(table, False).sum() == 6
