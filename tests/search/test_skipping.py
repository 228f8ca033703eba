"""Rows that do not ask: the sampler that results, and which rows to choose."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import PROCESS, start

import diffsamp as ds
from diffsamp import search, solvers

KEY = jax.random.key(1)
GRID = ds.schedules.logsnr(PROCESS, 7)


def test_nothing_skipped_is_the_same():
    tableau = solvers.dpmpp(PROCESS, GRID)
    assert solvers.skip(tableau, []) is tableau


def test_reuse_in_ddim_is_one_step_over_both():
    """A constant data prediction over two rows: DDIM on the grid without the point between."""
    shorter = solvers.ddim(PROCESS, np.delete(GRID, [2, 5]))
    found = solvers.skip(solvers.ddim(PROCESS, GRID), [2, 5], order=0)
    assert found.nfe == shorter.nfe == 5
    at = [0, 1, 3, 4, 6]
    np.testing.assert_allclose(
        found.unroll(prediction="data")[1][-1][at],
        shorter.unroll(prediction="data")[1][-1],
        atol=1e-12,
    )


@pytest.mark.parametrize("name", ["ddim", "dpmpp_3m", "dpmpp_2m", "unipc3", "dpmpp_2s"])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_polynomial_is_extrapolated_exactly(name, order):
    """Rows that follow enough answers say what the network would have said; with more, not."""
    tableau = solvers.get(name)(PROCESS, GRID)
    rows = np.flatnonzero(tableau.evaluates)[[order + 2, order + 3]]
    assert np.all(tableau.target == [1.0, 0.0])
    found = solvers.skip(tableau, rows, order=order)
    log_snr = np.log(tableau.alpha[:-1]) - np.log(tableau.sigma[:-1])

    def states(sampler, degree):
        """From x_T = 0, if the network says a polynomial of the log-SNR, whatever the state."""
        said = np.polyval([-0.05, 0.1, 0.3, -0.2][-degree - 1 :], log_snr)
        return sampler.unroll()[1] @ said

    np.testing.assert_allclose(states(found, order), states(tableau, order), atol=1e-9)
    assert np.abs(states(found, order + 1) - states(tableau, order + 1)).max() > 1e-4


def test_evaluations_are_not_made():
    tableau = solvers.get("heun")(PROCESS, ds.schedules.logsnr(PROCESS, 4))
    found = solvers.skip(tableau, [3, 4], order=1)
    calls = []

    def apply(params, x, t):
        jax.debug.callback(lambda: calls.append(1))
        return 0.5 * x

    network = ds.ScoreFn(apply, None, PROCESS, prediction="data")
    ds.sample(network, found, start(2)).block_until_ready()
    jax.effects_barrier()
    assert len(calls) == found.nfe == tableau.nfe - 2
    found.check()


def test_alpha_of_zero_and_conditioning_times_come_along():
    process = ds.processes.flow()
    tableau = solvers.dpmpp(process, ds.schedules.uniform(process, 5), order=2)
    found = solvers.skip(tableau, [1, 2], order=2)  # after one answer, at alpha = 0: reuse
    assert found.nfe == 3
    assert np.all(np.isfinite(found.b))
    found.check()
    np.testing.assert_allclose(found.unroll()[1][2, 1:], 0, atol=1e-15)


@pytest.mark.parametrize(
    ("rows", "words"),
    [([0], "cannot be skipped"), ([9], "cannot be skipped"), ([-1], "rows"), ([1.5], "rows")],
)
def test_rows_that_cannot_be_skipped(rows, words):
    with pytest.raises((ValueError, TypeError), match=words):
        solvers.skip(solvers.ddim(PROCESS, GRID), rows)


def test_predictions_must_agree():
    tableau = solvers.dpmpp(PROCESS, GRID)
    target = tableau.target.copy()
    target[3] = 0.0, 1.0
    mixed = dataclasses.replace(tableau, target=target)
    with pytest.raises(ValueError, match="different predictions"):
        solvers.skip(mixed, [2])


# -- the choice --------------------------------------------------------------------------------


def test_one_row_is_the_one_that_costs_least(score_fn):
    """By trying all, on the starts that fit."""
    x_T, tableau = start(24), solvers.dpmpp(PROCESS, GRID, order=2)
    reference = search.run(score_fn, search.reference_tableau(PROCESS), x_T)
    plan = search.skip_rows(
        score_fn, tableau, x_T, nfe=6, key=KEY, reference=reference, orders=[1], held_out=8
    )
    fit = np.asarray(jax.random.permutation(KEY, 24))[:16]
    judge = search.objective.log_mse()
    errors = [
        judge(search.run(score_fn, solvers.skip(tableau, [row]), x_T[fit]), reference[fit])
        for row in range(1, 7)
    ]
    assert plan.settings["skipped"] == [1 + int(np.argmin(errors))]
    assert plan.history[0][1] == pytest.approx(min(errors), rel=1e-5)


def test_it_is_near_the_best_choice_and_refine_learns_the_rest(score_fn):
    x_T, tableau = start(32), solvers.ddim(PROCESS, GRID)
    reference = search.run(score_fn, search.reference_tableau(PROCESS), x_T)
    plan = search.skip_rows(score_fn, tableau, x_T, nfe=4, key=KEY, reference=reference)
    assert plan.nfe == plan.settings["cost"] == 4
    assert len(plan.settings["skipped"]) == 3
    judge = search.objective.log_mse()

    def error(sampler):
        return judge(search.run(score_fn, sampler, x_T), reference)

    all_choices = [
        error(solvers.skip(tableau, rows, order=order))
        for rows in itertools.combinations(range(1, 7), 3)
        for order in (0, 1, 2)
    ]
    assert np.mean(np.array(all_choices) < error(plan.tableau)) < 0.2
    refined = search.refine(score_fn, plan.tableau, x_T, key=KEY, reference=reference, iterations=3)
    held = refined.psnr["held_out"]
    assert held["found"] > held["start"] + 3


def test_evaluations_are_counted_and_limited(score_fn):
    calls = []

    def apply(params, x, t):
        jax.debug.callback(lambda n: calls.append(int(n)), jnp.asarray(x.shape[0]))
        return score_fn.apply(params, x, t)

    network = ds.ScoreFn(apply, score_fn.params, PROCESS, score_fn.prediction, time=score_fn.time)
    x_T, tableau = start(16), solvers.ddim(PROCESS, GRID)
    plan = search.skip_rows(network, tableau, x_T, nfe=5, key=KEY, orders=(0,))
    jax.effects_barrier()
    assert sum(calls) == plan.settings["evaluations"]
    # all of it is known before the first evaluation
    spent = plan.settings["evaluations"]
    options = {"nfe": 5, "key": KEY, "orders": (0,)}
    again = search.skip_rows(network, tableau, x_T, evaluations=int(spent), **options)
    assert again.settings["evaluations"] == spent
    assert again.settings["estimate"]["evaluations"] == spent - 2 * 16 * 7  # a batch was timed
    with pytest.raises(ValueError, match="`evaluations` is too low"):
        search.skip_rows(network, tableau, x_T, evaluations=int(spent) - 1, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nfe": 7}, "must be below the 7"),
        ({"orders": ()}, "at least one degree"),
        ({"tableau": solvers.ddpm(PROCESS, GRID)}, "adds noise"),
    ],
)
def test_errors(score_fn, options, words):
    options = {"tableau": solvers.ddim(PROCESS, GRID), "nfe": 4, **options}
    with pytest.raises(ValueError, match=words):
        search.skip_rows(score_fn, options.pop("tableau"), start(16), key=KEY, **options)
