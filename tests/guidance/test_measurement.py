"""Measurements: the guided network is the posterior's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import all_processes
from guidance.exact import build, law

import diffsamp as ds
from diffsamp import guidance, schedules

PROCESS = ds.processes.vp_linear()
COV = np.array([[1.0, 0.8], [0.8, 1.0]])
MEAN = np.array([0.2, -0.1])
PRIOR = ds.targets.gaussian(MEAN, COV)
NOISE = 0.3


def first(x):
    return x[:, :1]


def posterior(a, y, noise):
    total = a @ COV @ a.T + noise**2 * np.eye(len(y))
    gain = COV @ a.T @ np.linalg.inv(total)
    return ds.targets.gaussian(MEAN + gain @ (y - a @ MEAN), COV - gain @ a @ COV)


@pytest.mark.parametrize("name", ["vp_linear", "edm", "flow"])
def test_it_is_the_posteriors_network(name, x64):
    """At any level of any process, in any prediction; a noise off by 2 % is seen."""
    process = all_processes()[name]
    exact = posterior(np.array([[1.0, 0.0]]), np.array([1.0]), NOISE).score_fn(process, "data")
    t = process.time(np.float64(0.4))
    x = jnp.array([[0.3, -0.5], [1.0, 2.0], [0.0, 0.0]])
    y = jnp.ones((3, 1))
    for emits in ("noise", "data"):
        guided = guidance.measurement(PRIOR.score_fn(process, emits), first, y, NOISE)
        for wanted in ("data", "noise", "velocity"):
            want = exact(x, t, prediction=wanted)
            np.testing.assert_allclose(guided(x, t, prediction=wanted), want, rtol=1e-8, atol=1e-9)
        wrong = guidance.measurement(PRIOR.score_fn(process, emits), first, y, 1.02 * NOISE)
        assert np.abs(wrong(x, t, prediction="data") - exact(x, t, prediction="data")).max() > 1e-4


@pytest.mark.parametrize("solver", ["unipc3", "heun", "deis_tab2"])
def test_every_solver_then_samples_the_posterior(solver, x64):
    """Two measurements of two numbers with noise of their own, one y per sample by name."""
    a = np.array([[1.0, 0.5], [0.2, -1.0]])
    ys = np.array([[1.0, -0.3], [0.0, 2.0]])
    tableau = build(solver, PROCESS, 8)
    x_T = PROCESS.prior_sample(jax.random.key(0), (2, 2), dtype=jnp.float64)
    matrix = jax.tree_util.Partial(lambda m, x: x @ m.T, jnp.asarray(a))
    guided = guidance.measurement(PRIOR.score_fn(PROCESS, "noise"), matrix, "y", NOISE)
    got = ds.sample(guided, tableau, x_T, cond={"y": jnp.asarray(ys)})
    for i in range(2):
        exact = posterior(a, ys[i], NOISE).score_fn(PROCESS, "noise")
        want = ds.sample(exact, tableau, x_T[i : i + 1])
        np.testing.assert_allclose(got[i], want[0], rtol=1e-6, atol=1e-6)
    assert guided.nfe_factor == 1
    assert guided.gradients_per_call == 9


def test_the_law_of_isotropic_and_scalar_covariances(x64):
    """PiGDM's mean is (.896, .697) for the posterior's (.917, .734), by the same rows in NumPy."""
    centred = ds.targets.gaussian([0.0, 0.0], COV).score_fn(PROCESS, "data")
    tableau = ds.solvers.ddpm(PROCESS, schedules.logsnr(PROCESS, 1000))
    y = jnp.ones((3, 1))
    exact = law(guidance.measurement(centred, first, y, NOISE), tableau, 2)
    np.testing.assert_allclose(exact[0], (1 / 1.09, 0.8 / 1.09), atol=2e-3)
    np.testing.assert_allclose(np.diag(exact[1]), (0.09 / 1.09, 1 - 0.64 / 1.09), atol=5e-3)
    pigdm = guidance.measurement(centred, first, y, NOISE, covariance="isotropic")
    mean, _ = law(pigdm, tableau, 2)
    np.testing.assert_allclose(mean, (0.896, 0.697), atol=1e-3)
    by_hand, cov = np.zeros(2), tableau.sigma[0] ** 2 * np.eye(2)
    for n in range(tableau.rows):
        alpha, sigma = tableau.alpha[n], tableau.sigma[n]
        slope = alpha * COV @ np.linalg.inv(alpha**2 * COV + sigma**2 * np.eye(2))
        square = sigma**2 / (sigma**2 + alpha**2)
        gain = sigma**2 / alpha * slope[:, 0] / (square + NOISE**2)
        total = tableau.a[n, 0] * np.eye(2) + tableau.b[n, 0] * (slope - np.outer(gain, slope[0]))
        by_hand = total @ by_hand + tableau.b[n, 0] * gain
        cov = total @ cov @ total.T + tableau.c[n] ** 2 * np.eye(2)
    np.testing.assert_allclose(mean, by_hand, rtol=1e-9)
    np.testing.assert_allclose(law(pigdm, tableau, 2)[1], cov, rtol=1e-8)
    assert pigdm.gradients_per_call == 1
    scalar = guidance.measurement(centred, first, y, NOISE, covariance="scalar")
    assert scalar.gradients_per_call == 0
    # one level by hand: r^2 everywhere
    t, x = 0.4, jnp.array([[0.3, -0.5]])
    alpha, sigma = PROCESS.alpha(t), PROCESS.sigma(t)
    square = sigma**2 / (sigma**2 + alpha**2)
    data = np.asarray(centred(x, t, prediction="data"))
    want = data + np.array([[square / (square + NOISE**2) * (1 - data[0, 0]), 0.0]])
    scalar = guidance.measurement(centred, first, jnp.ones((1, 1)), NOISE, covariance="scalar")
    np.testing.assert_allclose(scalar(x, t, prediction="data"), want, rtol=1e-10)


def test_no_noise_and_no_signal(x64):
    """noise = 0 fixes what was measured; at alpha = 0 the row is the network's own."""
    process = ds.processes.flow()
    network = PRIOR.score_fn(process, "velocity")
    tableau = ds.solvers.ddim(process, schedules.uniform(process, 30))
    guided = guidance.measurement(network, first, jnp.ones((1, 1)), 0.0)
    run = ds.trajectory(guided, tableau, jnp.array([[0.3, -0.5]]))
    np.testing.assert_allclose(run.points[-1][0, 0], 1.0, rtol=1e-8)
    plain = ds.trajectory(network, tableau, jnp.array([[0.3, -0.5]]))
    np.testing.assert_allclose(run.outputs[0], plain.outputs[0], rtol=1e-12)


def test_a_sample_does_not_depend_on_its_batch():
    """Conjugate gradients run per sample; one with a zero residual does not disturb the others."""
    network = PRIOR.score_fn(PROCESS, "noise")
    tableau = build("dpmpp_2m", PROCESS, 5)
    x_T = PROCESS.prior_sample(jax.random.key(0), (4, 2))
    guided = guidance.measurement(network, first, "y", NOISE)
    y = jnp.array([[1.0], [-50.0], [0.0], [0.2]], jnp.float32)
    whole = ds.sample(guided, tableau, x_T, cond={"y": y})
    alone = ds.sample(guided, tableau, x_T[2:3], cond={"y": y[2:3]})
    np.testing.assert_allclose(whole[2], alone[0], rtol=1e-4, atol=1e-5)
    assert np.isfinite(whole).all()


@pytest.mark.long
def test_a_jacobian_that_is_no_covariance_does_no_harm(x64):
    """Of networks with any Jacobian: the residual of the system never grows from its start."""
    from diffsamp.guidance.measurements import solve

    rng = np.random.default_rng(0)
    for _ in range(20):
        system = jnp.asarray(rng.normal(size=(6, 6)) + 0.3 * np.eye(6))
        right = jnp.asarray(rng.normal(size=(1, 6)))
        for iterations in (1, 4, 12):
            u = solve(lambda v, s=system: v @ s.T, right, iterations)
            left = jnp.linalg.norm(u @ system.T - right)
            assert left <= jnp.linalg.norm(right) * (1 + 1e-12)
    # and it solves what is symmetric and positive
    positive = system @ system.T + 0.1 * jnp.eye(6)
    u = solve(lambda v: v @ positive, right, 8)
    np.testing.assert_allclose(u @ positive, right, rtol=1e-7, atol=1e-8)


def test_a_nonlinear_operator_is_linearised(x64):
    """On a narrow prior the linearised posterior is the exact one to the second order."""
    narrow = ds.targets.gaussian([0.8], 1e-4).score_fn(PROCESS, "data")
    t, x = 0.3, jnp.array([[0.8 * PROCESS.alpha(0.3)]])
    guided = guidance.measurement(narrow, lambda v: v**3, jnp.full((1, 1), 0.8**3 + 0.01), 0.01)
    data = float(narrow(x, t, prediction="data")[0, 0])
    alpha, sigma = PROCESS.alpha(t), PROCESS.sigma(t)
    cov = 1e-4 * sigma**2 / (alpha**2 * 1e-4 + sigma**2)
    slope = 3 * data**2
    want = data + cov * slope / (slope**2 * cov + 1e-4) * (0.8**3 + 0.01 - data**3)
    np.testing.assert_allclose(guided(x, t, prediction="data")[0, 0], want, rtol=1e-10)
    with pytest.raises(ValueError, match="`covariance` must be one of"):
        guidance.measurement(narrow, first, jnp.ones((1, 1)), 0.1, covariance="diagonal")
