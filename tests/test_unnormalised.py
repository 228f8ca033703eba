"""Densities known up to a constant, and clouds of weighted points, as networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsamp as ds

EDM = ds.processes.edm(0.03, 8.0)
MODES, WEIGHTS, SPREAD = np.array([[1.0, 0.5], [-1.0, 0.0]]), np.array([0.75, 0.25]), 0.3
KEY = jax.random.key(0)


def log_mixture(x):
    squares = jnp.sum((x[:, None] - jnp.asarray(MODES, x.dtype)[None]) ** 2, axis=2) / SPREAD**2
    return jax.nn.logsumexp(
        -0.5 * squares + jnp.log(jnp.asarray(WEIGHTS, x.dtype))[None] + 3.0, axis=1
    )


def log_banana(x):
    return -0.5 * x[:, 0] ** 2 - 0.5 * ((x[:, 1] - 0.5 * x[:, 0] ** 2) / 0.4) ** 2


def mixture(**options):
    return ds.targets.unnormalised(
        log_mixture, key=KEY, mean=jnp.zeros(2), scale=jnp.full(2, 1.2), **options
    )


def test_posterior_means_are_those_of_the_mixture():
    exact = ds.targets.gaussian_mixture(WEIGHTS, MODES, np.full(2, SPREAD**2))
    rng = np.random.default_rng(0)
    posterior = jax.jit(mixture(chains=128).posterior, static_argnums=(1, 2))
    for sigma in (0.1, 0.6, 8.0):
        x_0 = np.asarray(exact.sample(jax.random.key(1), 200))
        x = x_0 + sigma * rng.normal(size=x_0.shape)
        expected = exact.posterior(x, 1.0, sigma)[0]
        found, noise = posterior(jnp.asarray(x, jnp.float32), 1.0, sigma)
        error = np.asarray(found) - expected
        assert np.abs(error.mean(axis=0)).max() < 0.02
        assert np.sqrt(np.mean(error**2)) < 0.15
        np.testing.assert_allclose(noise, (x - found) / sigma, rtol=1e-4, atol=1e-4)


TABLEAU = ds.solvers.dpmpp(EDM, ds.schedules.logsnr(EDM, 24), order=2)


@pytest.mark.long
def test_modes_and_weights_of_its_samples():
    x_T = EDM.prior_sample(KEY, (500, 2))
    exact = ds.targets.gaussian_mixture(WEIGHTS, MODES, np.full(2, SPREAD**2))
    right = np.asarray(ds.sample(exact.score_fn(EDM), TABLEAU, x_T))
    x = np.asarray(ds.sample(mixture(chains=128).score_fn(EDM), TABLEAU, x_T))
    first = x[:, 0] > 0
    # from the same noise: what is left of the weights' error is that of the chains
    assert first.mean() == pytest.approx((right[:, 0] > 0).mean(), abs=0.02)
    assert first.mean() == pytest.approx(0.75, abs=0.05)
    for mode, own in ((MODES[0], x[first]), (MODES[1], x[~first])):
        np.testing.assert_allclose(own.mean(axis=0), mode, atol=0.06)
        np.testing.assert_allclose(own.std(axis=0), SPREAD, rtol=0.15)


@pytest.mark.long
def test_a_banana():
    target = ds.targets.unnormalised(
        log_banana, key=KEY, mean=jnp.array([0.0, 0.5]), scale=2.0, chains=128
    )
    x = np.asarray(ds.sample(target.score_fn(EDM), TABLEAU, EDM.prior_sample(KEY, (1000, 2))))
    assert np.mean(x[:, 0]) == pytest.approx(0, abs=0.12)
    assert np.std(x[:, 0]) == pytest.approx(1, rel=0.08)
    assert np.std(x[:, 1] - 0.5 * x[:, 0] ** 2) == pytest.approx(0.4, rel=0.15)
    # the bend, which no Gaussian has
    assert np.cov(x[:, 0] ** 2, x[:, 1])[0, 1] == pytest.approx(1.0, abs=0.3)


def test_a_sample_does_not_depend_on_its_batch():
    network = mixture(chains=8, steps=2).score_fn(EDM)
    x = EDM.prior_sample(KEY, (5, 2))
    ask = jax.jit(lambda x: network(x, 2.0, prediction="data"))
    np.testing.assert_allclose(ask(x)[3:4], ask(x[3:4]), rtol=1e-5)
    noise = jax.jit(lambda x: network(x, EDM.t_max, prediction="noise"))(x)
    assert jnp.all(jnp.isfinite(noise))
    assert mixture().log_prob(jnp.zeros((1, 2))).shape == (1,)
    with pytest.raises(ValueError, match="noised density"):
        mixture().log_prob(jnp.zeros((1, 2)), 1.0, 0.5)
    with pytest.raises(NotImplementedError, match=r"run ds\.sample on its score_fn"):
        mixture().sample(KEY, 3)
    with pytest.raises(ValueError, match="`scale` be positive"):
        ds.targets.unnormalised(log_mixture, key=KEY, mean=jnp.zeros(2), scale=-1.0)


def test_a_weighted_cloud_is_its_own_posterior():
    rng = np.random.default_rng(1)
    points, logs = rng.normal(size=(30, 2)), rng.normal(size=30)
    cloud = ds.targets.empirical(points, logs + 5.0)
    x = rng.normal(size=(4, 2))
    alpha, sigma = 0.8, 0.5
    joint = np.exp(logs[None] - np.sum((x[:, None] - alpha * points) ** 2, axis=2) / 2 / sigma**2)
    expected = joint @ points / joint.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(cloud.posterior(x, alpha, sigma)[0], expected, rtol=1e-10)
    density = joint.sum(axis=1) / np.exp(logs).sum() / (2 * np.pi * sigma**2)
    np.testing.assert_allclose(cloud.log_prob(x, alpha, sigma), np.log(density), rtol=1e-10)
    # weights as repetitions: one of three counts is a point that stands there three times
    repeated = ds.targets.empirical(points[[0, 1, 1, 1, 2, 2]])
    weighed = ds.targets.empirical(points[:3], np.log([1.0, 3.0, 2.0]))
    np.testing.assert_allclose(
        weighed.posterior(x, alpha, sigma)[0], repeated.posterior(x, alpha, sigma)[0], rtol=1e-10
    )
    drawn = np.asarray(weighed.sample(KEY, 3000))
    share = np.mean(np.isclose(drawn[:, 0], points[1, 0], atol=1e-5))
    assert share == pytest.approx(0.5, abs=0.04)
    none = ds.targets.empirical(points[:2], [0.0, -np.inf])
    np.testing.assert_allclose(none.posterior(x, alpha, sigma)[0], np.tile(points[0], (4, 1)))
    with pytest.raises(ValueError, match="`log_weights` must have shape"):
        ds.targets.empirical(points, logs[:3])


def test_an_ensemble_gives_a_gaussians_posterior():
    """Prior particles weighed by a likelihood: the filter's analysis step, sampled."""
    rng = np.random.default_rng(2)
    prior = rng.normal(size=(4000, 1))
    cloud = ds.targets.empirical(prior, -0.5 * ((prior[:, 0] - 1.0) / 0.5) ** 2)
    process = ds.processes.edm(0.1, 8.0)
    tableau = ds.solvers.dpmpp(process, ds.schedules.logsnr(process, 16, final="t_min"), order=2)
    x = ds.sample(cloud.score_fn(process), tableau, process.prior_sample(KEY, (600, 1)))
    assert np.mean(x) == pytest.approx(0.8, abs=0.07)
    assert np.var(x) == pytest.approx(0.2 + 0.1**2, rel=0.2)
