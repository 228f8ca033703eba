"""Targets against numerical integration, automatic differentiation and an ODE solver."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import all_processes, skewed_mixture
from scipy.integrate import quad, solve_ivp
from scipy.stats import multivariate_normal, norm

import diffsamp as ds
from diffsamp import targets


def mixture_3d():
    rng = np.random.default_rng(0)
    roots = rng.normal(size=(2, 3, 3))
    return targets.gaussian_mixture(
        [0.4, 0.6], rng.normal(size=(2, 3)), roots @ np.swapaxes(roots, 1, 2) + 0.1 * np.eye(3)
    )


def test_posterior_means_against_integration():
    weights, means, variances = [0.3, 0.5, 0.2], [-1.0, 0.4, 1.5], [0.04, 0.09, 0.25]
    target = skewed_mixture()
    for alpha, sigma, x in ((0.8, 0.6, 0.3), (1.0, 3.0, -2.0), (0.99, 0.1, 0.9)):

        def joint(x_0, alpha=alpha, sigma=sigma, x=x):
            prior = sum(
                w * norm.pdf(x_0, m, np.sqrt(v))
                for w, m, v in zip(weights, means, variances, strict=True)
            )
            return prior * norm.pdf(x, alpha * x_0, sigma)

        def integral(f, near=(*means, x / alpha)):
            return quad(f, -8, 8, points=sorted(near), limit=500, epsabs=1e-14)[0]

        evidence = integral(joint)
        mean = integral(lambda v, joint=joint: v * joint(v)) / evidence
        data, noise = target.posterior(np.array([[x]]), alpha, sigma)
        assert data[0, 0] == pytest.approx(mean, rel=1e-8)
        assert noise[0, 0] == pytest.approx((x - alpha * mean) / sigma, rel=1e-7)
        assert target.log_prob(np.array([[x]]), alpha, sigma)[0] == pytest.approx(
            np.log(evidence), rel=1e-8
        )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("make", [mixture_3d, lambda: targets.empirical(np.eye(3) * 2)])
def test_noise_is_minus_sigma_times_the_score(make):
    """grad log p by automatic differentiation of the density."""
    target = make()
    x = jnp.asarray(np.random.default_rng(2).normal(size=(5, 3)))
    alpha, sigma = 0.7, 0.9
    score = jax.grad(lambda x: jnp.sum(target.log_prob(x, alpha, sigma)))(x)
    data, noise = target.posterior(x, alpha, sigma)
    np.testing.assert_allclose(noise, -sigma * score, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(alpha * data + sigma * noise, x, rtol=1e-10, atol=1e-12)


def test_density_and_moments_of_a_mixture():
    target = mixture_3d()
    x = np.random.default_rng(1).normal(size=(4, 3))
    covs = np.einsum("kij,kj,klj->kil", target.bases, target.variances, target.bases)
    for alpha, sigma in ((1.0, 0.0), (0.6, 0.8)):
        want = sum(
            np.exp(w) * multivariate_normal(alpha * m, alpha**2 * c + sigma**2 * np.eye(3)).pdf(x)
            for w, m, c in zip(target.log_weights, target.means, covs, strict=True)
        )
        np.testing.assert_allclose(target.log_prob(x, alpha, sigma), np.log(want), rtol=1e-10)
    samples = np.asarray(target.sample(jax.random.key(0), 20_000))
    mean, cov = target.mean_and_cov()
    error = 5 * np.sqrt(np.diag(cov) / len(samples))  # five standard errors
    assert np.all(np.abs(samples.mean(0) - mean) < error)
    scale = np.sqrt(np.outer(np.diag(cov), np.diag(cov)))
    assert np.all(np.abs(np.cov(samples.T) - cov) < 8 * scale / np.sqrt(len(samples)))
    few = target.sample(jax.random.key(0), 7)
    np.testing.assert_allclose(samples[:7], few, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["vp_linear", "flow", "edm"])
@pytest.mark.parametrize("which", ["mixture 1-D", "Gaussian 3-D"])
def test_ode_solution_against_a_solver(name, which):
    process = all_processes()[name]
    if which == "mixture 1-D":
        target = skewed_mixture()
    else:
        root = np.random.default_rng(4).normal(size=(3, 3))
        target = targets.gaussian([0.5, -1.0, 0.0], root @ root.T)
    t, t_end = 0.9 * process.t_max, 0.05 * process.t_max
    dim = target.means.shape[1]
    x = np.random.default_rng(5).normal(size=(4, dim)) * float(process.sigma(t))

    def slope(t, flat):
        data, noise = target.posterior(
            flat.reshape(-1, dim), float(process.alpha(t)), float(process.sigma(t))
        )
        return (process.alpha_dot(t) * data + process.sigma_dot(t) * noise).ravel()

    solved = solve_ivp(slope, (t, t_end), x.ravel(), method="DOP853", rtol=1e-11, atol=1e-12)
    got = target.ode_solution(x, process, t, t_end)
    np.testing.assert_allclose(got.ravel(), solved.y[:, -1], rtol=1e-7, atol=1e-8)
    back = target.ode_solution(got, process, t_end, t)
    np.testing.assert_allclose(back, x, rtol=1e-7, atol=1e-7 * float(process.sigma(t)))


@pytest.mark.parametrize("process", all_processes().values(), ids=all_processes())
@pytest.mark.parametrize("prediction", ds.predictions.NAMES)
def test_score_fn_is_the_exact_network(process, prediction):
    """Whatever it emits, its data prediction is the posterior mean."""
    target = mixture_3d()
    score_fn = target.score_fn(process, prediction)
    assert score_fn.prediction == prediction
    t = process.t_clean + 0.4 * (process.t_max - process.t_clean)
    x = np.random.default_rng(0).normal(size=(4, 3)) * float(process.sigma(t))
    data, _ = target.posterior(x, float(process.alpha(t)), float(process.sigma(t)))
    got = score_fn(jnp.asarray(x, jnp.float32), t, prediction="data")
    np.testing.assert_allclose(got, data, rtol=1e-3, atol=2e-3)


def test_empirical_collapses_to_the_nearest_point():
    points = np.random.default_rng(0).normal(size=(6, 2, 2))
    target = targets.empirical(points)
    x = points.reshape(6, -1) + 0.01
    data, _ = target.posterior(x, 1.0, 0.02)
    np.testing.assert_allclose(data, points.reshape(6, -1), atol=1e-10)
    wide, _ = target.posterior(x, 1e-9, 1.0)
    np.testing.assert_allclose(wide, np.tile(points.reshape(6, -1).mean(0), (6, 1)), atol=1e-8)
    drawn = np.asarray(target.sample(jax.random.key(0), 50))
    assert np.abs(drawn[:, None] - np.float32(points.reshape(1, 6, 4))).sum(2).min(1).max() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: targets.gaussian_mixture([1.0], [[0.0], [1.0]], [1.0]), "`weights` \\(K,\\)"),
        (lambda: targets.gaussian_mixture([1.0, -1.0], [[0.0], [1.0]], [1, 1]), "must be positive"),
        (lambda: targets.gaussian([0.0, 1.0], [1.0, 2.0, 3.0]), "`covs` must have shape"),
        (lambda: targets.gaussian([0.0, 1.0], [[1.0, 2.0], [0.0, 1.0]]), "must be symmetric"),
        (lambda: targets.gaussian([0.0, 1.0], [[1.0, 2.0], [2.0, 1.0]]), "positive definite"),
        (lambda: targets.empirical([1.0, 2.0]), r"`points` must have shape \(K, ...\)"),
        (lambda: mixture_3d().sample(jax.random.key(0), 0), "`n` must be at least 1"),
        (
            lambda: mixture_3d().ode_solution(np.zeros((1, 3)), ds.processes.flow(), 1.0, 0.5),
            "this mixture has 2 components in 3",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
