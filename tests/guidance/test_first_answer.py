"""Answers that cost nothing: against tableaux that hold them, and against counted calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsamp as ds
from diffsamp import search, solvers
from diffsamp.guidance import first_answer

EDM = ds.processes.edm(0.02, 20.0)
FLOW = ds.processes.flow()
VP = ds.processes.vp_linear()
MEAN = np.array([0.3, -0.2, 0.1])
KEY = jax.random.key(0)


def target():
    return ds.targets.gaussian(MEAN, [0.04, 0.2, 0.5])


@pytest.mark.parametrize("name", ["dpmpp_2m", "ddim", "heun", "deis_tab2", "unipc2"])
@pytest.mark.parametrize(("process", "prediction"), [(EDM, "noise"), (FLOW, "velocity")])
def test_it_is_the_tableau_that_holds_the_answer(name, process, prediction, tmp_path):
    network = target().score_fn(process, prediction)
    tableau = solvers.get(name)(process, ds.schedules.logsnr(process, 4))
    x_T = process.prior_sample(KEY, (5, 3))
    linear = first_answer(network, above=float(tableau.times[0]))
    held = solvers.analytic_first_step(tableau)
    np.testing.assert_allclose(
        ds.sample(linear, tableau, x_T), ds.sample(network, held, x_T), rtol=2e-4, atol=1e-4
    )
    constant = first_answer(network, MEAN, above=float(tableau.times[0]))
    held = solvers.cached_first_answer(tableau, MEAN)
    assert held.nfe == constant.nfe(tableau) == tableau.nfe - 1
    held.save(tmp_path / "held.json")
    held = ds.Tableau.load(tmp_path / "held.json")
    expected = ds.sample(network, held, x_T)
    own = ds.sample(constant, tableau, x_T)
    np.testing.assert_allclose(own, expected, rtol=2e-4, atol=1e-4)
    # 2 % more of the constant is seen
    other = ds.sample(
        first_answer(network, 1.02 * MEAN, above=float(tableau.times[0])), tableau, x_T
    )
    assert np.abs(other - expected).max() > 3 * np.abs(own - expected).max()
    # padded, and followed by other rows
    np.testing.assert_allclose(
        ds.sample(network, held.pad(rows=held.rows + 2, q=6), x_T), expected, rtol=2e-5, atol=2e-5
    )


def test_one_answer_per_class():
    def apply(params, x, t, label):
        return params[label] + 0.1 * x * jnp.cos(t)[:, None]

    means = jnp.array([[0.0, 1.0], [2.0, -1.0], [0.5, 0.5]])
    network = ds.ScoreFn(apply, means, VP, prediction="data")
    tableau = solvers.dpmpp(VP, ds.schedules.logsnr(VP, 4), order=2)
    label = jnp.array([2, 0, 1, 1])
    x_T = VP.prior_sample(KEY, (4, 2))
    answers = search.first_answers(network, x_T, cond={"label": label}, by="label", groups=4)
    assert answers.shape == (4, 2)
    told = network(x_T, VP.t_max, prediction="data", cond={"label": label})
    np.testing.assert_allclose(answers[1], np.mean(told[2:], axis=0), rtol=1e-5)
    np.testing.assert_allclose(answers[3], np.mean(told, axis=0), rtol=1e-5)  # nobody's
    free = first_answer(network, answers, by="label")
    x = ds.sample(free, tableau, x_T, cond={"label": label})
    for i, own in enumerate(label):
        held = solvers.cached_first_answer(tableau, answers[own])
        alone = ds.sample(network, held, x_T[i : i + 1], cond={"label": label[i : i + 1]})
        np.testing.assert_allclose(x[i], alone[0], rtol=2e-5, atol=2e-5)
    with pytest.raises(ValueError, match="depends on the condition 'label': pass `cond`"):
        ds.sample(free, tableau, x_T, cond={"other": label})


def test_the_network_is_not_called_and_samples_with_rows_of_their_own():
    calls = []

    def apply(params, x, t):
        jax.debug.callback(lambda v: calls.append(float(v)), t[0])
        return 0.3 * x

    network = ds.ScoreFn(apply, None, EDM, prediction="data", time="t")
    tableau = solvers.dpmpp(EDM, ds.schedules.logsnr(EDM, 5), order=2)
    free = first_answer(network, 0.0)
    x_T = EDM.prior_sample(KEY, (2, 3))
    ds.sample(free, tableau, x_T).block_until_ready()
    jax.effects_barrier()
    assert sorted(calls, reverse=True) == pytest.approx(list(tableau.times[1:-1]))
    low = solvers.ddim(EDM, [2.0, 0.4, 0.0])
    stacked = ds.Tableau.stack([tableau, low])
    both = ds.sample(free, stacked, x_T)
    for i, one in enumerate((tableau, low)):
        alone = ds.sample(free, one, x_T[i : i + 1])
        np.testing.assert_allclose(both[i], alone[0], rtol=1e-5, atol=1e-6)
    assert first_answer(network, 0.0, above=1.0).nfe(low) == 1


def test_the_posterior_of_a_gaussian_is_teleportation():
    """A network that is exact where it is asked, and a Gaussian where it is not."""
    exact = target()
    network = ds.ScoreFn(lambda params, x, t: 0 * x, None, EDM, prediction="data")

    def moments(x, level, cond):
        return exact.posterior(x, level.alpha, level.sigma)[0]

    free = first_answer(network, moments, above=2.0)
    times = np.geomspace(20.0, 2.0, 40)
    tableau = solvers.dpmpp(EDM, times, order=2)
    assert free.nfe(tableau) == 0
    x_T = np.asarray(EDM.prior_sample(KEY, (4, 3)))
    variance = np.array([0.04, 0.2, 0.5])
    factor = np.sqrt((variance + 2.0**2) / (variance + 20.0**2))
    np.testing.assert_allclose(
        ds.sample(free, tableau, x_T), MEAN + factor * (x_T - MEAN), atol=2e-3
    )


@pytest.mark.parametrize("function", ["regress", "refine"])
def test_searches_count_it_as_nothing(function):
    asked = []

    def apply(params, x, t):
        jax.debug.callback(lambda v: asked.append(v.shape[0]), x)
        return exact.apply(exact.params, x, t)

    exact = ds.targets.gaussian_mixture(
        [0.5, 0.5], [[-0.6, 0.3], [0.5, 0.2]], np.array([0.04, 0.1])
    ).score_fn(EDM, "data")
    network = ds.ScoreFn(apply, None, EDM, prediction="data")
    free = first_answer(network, np.array([-0.05, 0.25]))
    x_T = EDM.prior_sample(KEY, (16, 2))
    if function == "regress":
        plan = search.regress(free, x_T, nfe=3, key=KEY, batch=4, points=20)
    else:
        given = solvers.dpmpp(EDM, ds.schedules.logsnr(EDM, 3), order=2)
        plan = search.refine(free, given, x_T, key=KEY, batch=4, iterations=2)
    jax.effects_barrier()
    assert sum(asked) == plan.settings["evaluations"]
    assert plan.settings["cost"] == free.nfe(plan.tableau) == 2
    assert plan.psnr["fit"]["found"] > plan.psnr["fit"]["start"] - 1e-6


def test_a_free_first_answer_is_worth_an_evaluation():
    exact = ds.targets.gaussian_mixture(
        [0.5, 0.3, 0.2], [[-0.6, 0.3], [0.5, 0.2], [0.1, -0.7]], np.array([0.02, 0.04, 0.03])
    ).score_fn(EDM, "data")
    x_T = EDM.prior_sample(KEY, (64, 2))
    answer = search.first_answers(exact, x_T)
    free = first_answer(exact, answer)
    plain = search.regress(exact, x_T, nfe=3, key=KEY)
    more = search.regress(free, x_T, nfe=4, key=KEY)
    assert more.settings["cost"] == plain.settings["cost"] == 3
    assert more.psnr["held_out"]["found"] > plain.psnr["held_out"]["found"] + 1


def test_what_it_refuses():
    network = target().score_fn(EDM)
    with pytest.raises(ValueError, match='`answer` must be "linear", an array or a function'):
        first_answer(network, "mean")
    with pytest.raises(ValueError, match="`by` chooses among constant answers"):
        first_answer(network, by="label")
    with pytest.raises(ValueError, match="`above` must be a time of the process"):
        first_answer(network, above=80.0)
    with pytest.raises(TypeError, match="`score_fn` must be"):
        first_answer(lambda x: x)
    tableau = solvers.ddim(EDM, [20.0, 1.0, 0.0])
    with pytest.raises(ValueError, match="`answer` must be finite"):
        solvers.cached_first_answer(tableau, np.array([np.nan]))
    field = solvers.cached_first_answer(tableau, MEAN)
    with pytest.raises(ValueError, match="shaped like the data cannot be stacked"):
        ds.Tableau.stack([field, tableau])
    with pytest.raises(ValueError, match="`cond` must have 'label' as integers of shape"):
        search.first_answers(network, EDM.prior_sample(KEY, (2, 3)), by="label")
