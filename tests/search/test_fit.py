"""The fits behind DC-Solver, IIA and DPM-Solver-v3, on a network with exact predictions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsamp as ds
from diffsamp import schedules, search, solvers

PROCESS = ds.processes.vp_linear()
TARGET = ds.targets.gaussian_mixture(
    [0.5, 0.3, 0.2], [[-1.0, 0.5], [1.0, -0.5], [0.2, 1.3]], [0.05, 0.1, 0.02]
)
NETWORK = TARGET.score_fn(PROCESS, "noise")


@pytest.fixture(scope="module")
def starts():
    fit = PROCESS.prior_sample(jax.random.key(0), (64, 2))
    new = PROCESS.prior_sample(jax.random.key(1), (512, 2))
    return fit, new, search.run(NETWORK, search.reference_tableau(PROCESS), new)


def error(tableau, starts):
    return float(jnp.mean((ds.sample(NETWORK, tableau, starts[1]) - starts[2]) ** 2))


def test_dc_ratios_lower_the_error_on_new_noise(starts):
    times = schedules.logsnr(PROCESS, 6)
    calls = []
    fit = search.fit_dc(NETWORK, times, starts[0], progress=lambda *a: calls.append(a))
    assert fit.tableau.nfe == 6
    assert np.all(fit.errors[:, 1] <= fit.errors[:, 0])
    assert np.any(fit.values != 1)
    np.testing.assert_array_equal(fit.values[:2], 1)
    assert calls[-1] == ("fitting", 6, 6)
    plain = error(solvers.unipc(PROCESS, times, order=2), starts)
    assert error(fit.tableau, starts) < 0.8 * plain


def test_the_cascade_gives_ratios_for_other_budgets_and_scales():
    """Any polynomial of its family is found, from three budgets and scales; the first two are 1."""
    coefficients = np.random.default_rng(0).normal(size=(4, 3, 3))

    def ratio(nfe, scale):  # by Horner's rule, highest power first, one variable after the other
        i = np.arange(1, nfe + 1) / nfe
        of_scale = [[np.polyval(c, nfe / 50) for c in row] for row in coefficients]
        values = np.polyval([np.polyval(row, scale / 12) for row in of_scale], i)
        return np.where(np.arange(nfe) < 2, 1.0, values)

    known = {(n, scale): ratio(n, scale) for n in (8, 12, 20) for scale in (1.5, 4.0, 7.5)}
    found = search.fit_dc_cascade(known)
    for nfe, scale in ((10, 3.0), (16, 6.0), (8, 7.5)):
        np.testing.assert_allclose(found(nfe, scale), ratio(nfe, scale), rtol=1e-6, atol=1e-6)
    # a budget too few for a cubic, alone: what there is, is met
    alone = search.fit_dc_cascade({(4, 1.0): [1.0, 1.0, 0.9, 1.2]})
    np.testing.assert_allclose(alone(4), [1.0, 1.0, 0.9, 1.2], rtol=1e-6)
    with pytest.raises(ValueError, match=r"the ratios of \(5, 1\) must be 5 finite numbers"):
        search.fit_dc_cascade({(5, 1.0): [1.0]})
    with pytest.raises(ValueError, match="some with 3 evaluations and more"):
        search.fit_dc_cascade({(2, 1.0): [1.0, 1.0]})


def test_cascade_ratios_help_at_a_budget_that_was_not_fitted(starts):
    fits = {
        (n, 1.0): search.fit_dc(NETWORK, schedules.logsnr(PROCESS, n), starts[0]).values
        for n in (5, 7, 8)
    }
    times = schedules.logsnr(PROCESS, 6)
    ratios = search.fit_dc_cascade(fits)(6)
    assert error(solvers.dc_solver(PROCESS, times, ratios=ratios), starts) < 0.9 * error(
        solvers.unipc(PROCESS, times, order=2), starts
    )


@pytest.mark.parametrize("method", ["ddim", "guided", "heun", "dpmpp", "dpm_solver"])
def test_iia_coefficients_lower_the_error_on_new_noise(method, starts):
    times = schedules.logsnr(PROCESS, 8)
    fit = search.fit_iia(NETWORK, times, starts[0], method=method)
    assert np.all(fit.errors[1:, 1] <= fit.errors[1:, 0])
    name = {"heun": "heun", "dpmpp": "dpmpp_2m", "dpm_solver": "dpm2"}.get(method, "ddim")
    plain = solvers.get(name)(PROCESS, times)
    assert fit.tableau.nfe == plain.nfe
    assert error(fit.tableau, starts) < 0.8 * error(plain, starts)


def test_iia_against_its_own_solver_has_nothing_to_add(starts):
    """With one fine step of Heun's, the target is Heun's step itself."""
    times = schedules.logsnr(PROCESS, 5, final="t_min")
    fit = search.fit_iia(NETWORK, times, starts[0], method="heun", refine=1)
    # single precision: states of order 1, rounded to 1e-7
    assert np.all(fit.errors < 1e-11)


def test_statistics_of_a_gaussian_are_closed_forms():
    """eps = sigma (x - alpha m) / (alpha^2 v + sigma^2), so l = sigma^2 / (alpha^2 v + sigma^2)."""
    variance = np.array([0.3, 2.0])
    target = ds.targets.gaussian([0.0, 0.0], variance)
    network = target.score_fn(PROCESS, "noise")
    x_0 = target.sample(jax.random.key(0), 256)
    levels = np.linspace(-3.0, 3.0, 49)
    got = search.model_statistics(
        network, x_0, key=jax.random.key(1), log_snr=levels, per_element=True
    )
    want = 1 / (1 + np.exp(2 * levels)[:, None] * variance)
    np.testing.assert_allclose(got.l, want, atol=2e-5)  # exact for a linear network
    # f = (sigma eps - l x) / alpha is then constant 0 for zero-mean data: s is free; with a mean:
    shifted = ds.targets.gaussian([0.7, -1.2], variance)
    x_0 = shifted.sample(jax.random.key(0), 256)
    got = search.model_statistics(
        shifted.score_fn(PROCESS, "noise"),
        x_0,
        key=jax.random.key(1),
        log_snr=levels,
        per_element=True,
    )
    # f = -l m is known at every level, so f' = b = -l' m and there is nothing for s to explain; up
    # to central differences of l
    inner = slice(2, -2)
    slope = -2 * (1 - want) * want
    np.testing.assert_allclose(got.b[inner], -slope[inner] * [0.7, -1.2], atol=0.01)
    np.testing.assert_allclose(got.s[inner], 0, atol=0.05)
    scalar = search.model_statistics(network, x_0, key=jax.random.key(1), log_snr=levels)
    assert scalar.l.shape == (49,)
    assert np.all((scalar.l > want.min(1) - 1e-4) & (scalar.l < want.max(1) + 1e-4))


def test_dpm_solver_v3_is_exact_for_a_gaussian_with_its_own_statistics():
    """The linear part is integrated exactly: one step of order 1 is the ODE's solution, where
    DDIM's error is large. Needs the statistics per element."""
    variance = np.array([0.3, 2.0])
    target = ds.targets.gaussian([0.0, 0.0], variance)
    levels = np.linspace(-3.5, 3.5, 200)
    linear = 1 / (1 + np.exp(2 * levels)[:, None] * variance)
    own = solvers.ModelStatistics(levels, linear, np.zeros_like(linear))
    times = PROCESS.time(np.array([-3.0, -1.0, 3.0]))
    tableau = solvers.dpm_solver_v3(PROCESS, times, statistics=own, order=1)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 2)), jnp.float32)
    truth = target.ode_solution(np.asarray(x), PROCESS, times[0], times[-1])
    got = ds.sample(target.score_fn(PROCESS, "noise"), tableau, x)
    np.testing.assert_allclose(got, truth, atol=2e-4)
    ddim = ds.sample(target.score_fn(PROCESS, "noise"), solvers.ddim(PROCESS, times), x)
    assert np.abs(ddim - truth).max() > 0.1


def test_the_bias_of_dpm_solver_v3_integrates_a_mean_exactly(tmp_path):
    """One step of order 1 on a Gaussian off zero, by its estimated statistics; without b the error
    is that of a constant left to extrapolation. The tableau is saved with its constants."""
    target = ds.targets.gaussian([0.7, -1.2], [0.3, 2.0])
    network = target.score_fn(PROCESS, "noise")
    levels = np.linspace(-3.5, 3.5, 200)
    own = search.model_statistics(
        network,
        target.sample(jax.random.key(0), 64),
        key=jax.random.key(1),
        log_snr=levels,
        per_element=True,
    )
    own.save(tmp_path / "statistics.npz")
    own = solvers.ModelStatistics.load(tmp_path / "statistics.npz")
    times = PROCESS.time(np.array([-3.0, -1.0, 3.0]))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 2)), jnp.float32)
    truth = target.ode_solution(np.asarray(x), PROCESS, times[0], times[-1])
    errors = []
    for statistics in (own, solvers.ModelStatistics(levels, own.l, own.s)):
        tableau = solvers.dpm_solver_v3(PROCESS, times, statistics=statistics, order=1)
        tableau.save(tmp_path / "v3.json")
        again = ds.Tableau.load(tmp_path / "v3.json")
        got = ds.sample(network, again, x)
        padded = ds.Tableau.pad_together([again, solvers.ddim(PROCESS, times)])[0].pad(rows=4)
        np.testing.assert_allclose(ds.sample(network, padded, x), got, atol=1e-6)
        errors.append(np.abs(got - truth).max())
    assert errors[0] < 2e-3
    assert errors[1] > 0.1


def test_statistics_of_this_network_help_at_few_evaluations(starts):
    """Against UniPC, its counterpart without statistics, at the same evaluations."""
    x_0 = TARGET.sample(jax.random.key(3), 256)
    own = search.model_statistics(NETWORK, x_0, key=jax.random.key(4))
    gains = []
    for nfe in (6, 8, 10):
        times = schedules.logsnr(PROCESS, nfe)
        logs = []
        for tableau in (
            solvers.unipc(PROCESS, times, order=2),
            solvers.dpm_solver_v3(PROCESS, times, statistics=own, order=2),
        ):
            # the mean log: a few samples on the border of two modes carry the mean square
            wrong = ds.sample(NETWORK, tableau, starts[1]) - starts[2]
            logs.append(float(jnp.mean(jnp.log(jnp.mean(wrong**2, axis=1) + 1e-12))))
        gains.append(logs[0] - logs[1])
    assert np.mean(gains) > np.log(1.5)


@pytest.mark.parametrize("prediction", ["data", "velocity"])
def test_fits_on_a_flow_to_the_clean_end(prediction):
    """Whatever the network predicts: their fine solution must not ask it at sigma = 0."""
    process = ds.processes.flow()
    network = ds.targets.gaussian([0.4, -0.2], 0.3).score_fn(process, prediction)
    x_T = process.prior_sample(jax.random.key(0), (20, 2))
    times = schedules.uniform(process, 4)
    ratios = search.fit_dc(network, times, x_T)
    fitted = search.fit_iia(network, times, x_T)
    fine = ds.sample(network, solvers.unipc(process, schedules.uniform(process, 200)), x_T)
    plain = ds.sample(network, solvers.ddim(process, times), x_T)
    error = float(ds.metrics.rmse(plain, fine))
    for tableau in (
        solvers.iia(process, times, coefficients=fitted.values),
        solvers.dc_solver(process, times, ratios=ratios.values),
    ):
        assert float(ds.metrics.rmse(ds.sample(network, tableau, x_T), fine)) < 0.7 * error


@pytest.mark.long
@pytest.mark.parametrize("prediction", ["data", "velocity"])
def test_restart_on_a_flow_counts_as_it_says(prediction):
    process = ds.processes.flow()
    network = ds.targets.gaussian([0.4, -0.2], 0.3).score_fn(process, prediction)
    times = schedules.logsnr(process, 6)
    tableau = solvers.restart(process, times, intervals=[(3, 2, 0.1, 0.5)])
    assert tableau.nfe == 2 * 6 - 1 + 2 * (3 - 1) * 2
    x_T = process.prior_sample(jax.random.key(0), (4, 2))
    assert np.all(np.isfinite(ds.sample(network, tableau, x_T, key=jax.random.key(1))))
