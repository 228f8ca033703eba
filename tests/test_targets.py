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


def test_posterior_means_of_one_gaussian_and_of_points():
    """One Gaussian by integration; points by a sum over them with scipy's density."""
    gaussian, points = targets.gaussian([0.4], 0.3), np.array([-1.0, 0.2, 0.3, 2.0])
    empirical = targets.empirical(points[:, None])
    for alpha, sigma, x in ((0.8, 0.6, 0.3), (1.0, 5.0, -2.0), (0.99, 0.2, 0.9)):

        def joint(x_0, alpha=alpha, sigma=sigma, x=x):
            return norm.pdf(x_0, 0.4, np.sqrt(0.3)) * norm.pdf(x, alpha * x_0, sigma)

        evidence = quad(joint, -6, 6, points=[0.4, x / alpha], epsabs=1e-14)[0]
        mean = quad(lambda v, f=joint: v * f(v), -6, 6, points=[0.4, x / alpha], epsabs=1e-14)[0]
        mean /= evidence
        data, noise = gaussian.posterior(np.array([[x]]), alpha, sigma)
        assert data[0, 0] == pytest.approx(mean, rel=1e-9)
        assert noise[0, 0] == pytest.approx((x - alpha * mean) / sigma, rel=1e-8)

        density = norm.pdf(x, alpha * points, sigma)
        mean = density @ points / density.sum()
        data, noise = empirical.posterior(np.array([[x]]), alpha, sigma)
        assert data[0, 0] == pytest.approx(mean, rel=1e-12)
        assert noise[0, 0] == pytest.approx((x - alpha * mean) / sigma, rel=1e-11)
        log_prob = empirical.log_prob(np.array([[x]]), alpha, sigma)[0]
        assert log_prob == pytest.approx(np.log(density.mean()), rel=1e-12, abs=1e-12)
        # it can fail: a noise level 1 % off
        assert gaussian.posterior(np.array([[x]]), alpha, 1.01 * sigma)[1][0, 0] != pytest.approx(
            noise[0, 0], rel=1e-3
        )


def mixture_2d():
    return targets.gaussian_mixture(
        [0.2, 0.8], [[1.0, -1.0], [0.0, 0.5]], [[[1.0, 0.8], [0.8, 1.0]], [[0.3, 0.0], [0.0, 2.0]]]
    )


@pytest.mark.usefixtures("optimised")
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("target", "dim"),
    [(mixture_2d(), 2), (mixture_3d(), 3), (targets.empirical(np.eye(3) * 2), 3)],
    ids=["2-D", "3-D", "points"],
)
def test_noise_is_minus_sigma_times_the_score(target, dim):
    """grad log p by automatic differentiation of the density, at three levels."""
    x = jnp.asarray(np.random.default_rng(2).normal(size=(5, dim)))
    gradient = jax.jit(jax.grad(lambda x, a, s: jnp.sum(target.log_prob(x, a, s))))
    for alpha, sigma in ((0.7, 0.9), (1.0, 4.0), (0.995, 0.1)):
        data, noise = target.posterior(x, alpha, sigma)
        # a difference of densities' logarithms: 1e-16 of log p, divided by sigma
        np.testing.assert_allclose(
            noise, -sigma * gradient(x, alpha, sigma), rtol=1e-9, atol=1e-12 / sigma
        )
        np.testing.assert_allclose(alpha * data + sigma * noise, x, rtol=1e-10, atol=1e-12)
        assert np.abs(noise + 1.01 * sigma * gradient(x, alpha, sigma)).max() > 1e-4  # can fail


def test_levels_per_sample_and_far_away():
    """One level per sample equals a loop; at 1000 standard deviations nothing overflows."""
    x = np.random.default_rng(3).normal(size=(3, 3))
    alpha, sigma = np.array([0.9, 0.5, 1.0]), np.array([0.1, 0.8, 7.0])
    for target in (mixture_3d(), targets.empirical(np.eye(3))):
        together = target.posterior(x, alpha, sigma)
        density = target.log_prob(x, alpha, sigma)
        for i in range(3):
            alone = target.posterior(x[i : i + 1], alpha[i], sigma[i])
            for got, want in zip(together, alone, strict=True):
                np.testing.assert_allclose(got[i], want[0], rtol=1e-14)
            np.testing.assert_allclose(
                density[i], target.log_prob(x[i : i + 1], alpha[i], sigma[i])[0], rtol=1e-14
            )
        far = target.posterior(np.full((1, 3), 1e3), 1.0, 0.1)
        assert np.all(np.isfinite(far))
        np.testing.assert_allclose(far[0] + 0.1 * far[1], 1e3, rtol=1e-12)


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
    points = np.random.default_rng(2).normal(size=(5, 3))
    want = np.mean([multivariate_normal(0.6 * m, 0.64 * np.eye(3)).pdf(x) for m in points], axis=0)
    got = targets.empirical(points).log_prob(x, 0.6, 0.8)
    np.testing.assert_allclose(got, np.log(want), rtol=1e-10)
    samples = np.asarray(target.sample(jax.random.key(0), 20_000))
    mean, cov = target.mean_and_cov()
    error = 5 * np.sqrt(np.diag(cov) / len(samples))  # five standard errors
    assert np.all(np.abs(samples.mean(0) - mean) < error)
    # five standard errors of each entry, from the spread of the products
    centred = samples.astype(np.float64) - mean
    products = centred[:, :, None] * centred[:, None, :]
    error = 5 * products.std(0) / np.sqrt(len(samples))
    assert np.all(np.abs(products.mean(0) - cov) < error)
    assert np.any(np.abs(products.mean(0) - 1.1 * cov) > error)  # it can fail
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

    solved = solve_ivp(slope, (t, t_end), x.ravel(), method="DOP853", rtol=1e-12, atol=1e-13)
    got = target.ode_solution(x, process, t, t_end)
    # the solver's tolerance, summed over some hundred steps
    np.testing.assert_allclose(got.ravel(), solved.y[:, -1], rtol=1e-9, atol=1e-10)
    back = target.ode_solution(got, process, t_end, t)
    # the way back is unstable: the ratio of scales, and of slopes in the mixture's valleys
    np.testing.assert_allclose(back, x, rtol=1e-9, atol=1e-9 * float(process.sigma(t)))
    # it can fail: a level 1 % off
    other = target.ode_solution(x, process, t, 1.01 * t_end)
    assert np.abs(other.ravel() - solved.y[:, -1]).max() > 1e-4


@pytest.mark.parametrize("name", all_processes())
def test_ode_solution_keeps_quantiles(name):
    """In one dimension the flow keeps the distribution function; also in the tails, to the end."""
    process, target = all_processes()[name], skewed_mixture()
    weights, means, variances = [0.3, 0.5, 0.2], [-1.0, 0.4, 1.5], [0.04, 0.09, 0.25]

    def tail(x, t, sign):
        alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
        return sum(
            w * norm.cdf(sign * (x - alpha * m) / np.sqrt(alpha**2 * v + sigma**2))
            for w, m, v in zip(weights, means, variances, strict=True)
        )

    start = process.t_max
    alpha, sigma = float(process.alpha(start)), float(process.sigma(start))
    z = np.array([-8.0, -2.0, 0.0, 0.7, 3.0, 8.0])  # standard deviations
    x = alpha * 0.2 + np.sqrt(sigma**2 + alpha**2) * z
    end = target.ode_solution(x[:, None], process, start, process.t_clean)[:, 0]
    assert np.all(np.diff(end) > 0)
    for sign, part in ((1, z <= 0), (-1, z > 0)):  # the smaller tail, to its own digits
        np.testing.assert_allclose(
            tail(end[part], process.t_clean, sign), tail(x[part], start, sign), rtol=1e-10
        )
    back = target.ode_solution(end[:, None], process, process.t_clean, start)[:, 0]
    np.testing.assert_allclose(back, x, rtol=1e-9, atol=1e-9 * sigma)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("process", all_processes().values(), ids=all_processes())
@pytest.mark.parametrize("prediction", ds.predictions.NAMES)
def test_score_fn_is_the_exact_network(process, prediction):
    """Whatever it emits, its data and noise predictions are the posterior means."""
    target = mixture_3d()
    score_fn = target.score_fn(process, prediction)
    assert score_fn.prediction == prediction
    t = process.t_clean + 0.4 * (process.t_max - process.t_clean)
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    x = np.random.default_rng(0).normal(size=(4, 3)) * sigma
    for name, want in zip(("data", "noise"), target.posterior(x, alpha, sigma), strict=True):
        # float64 roundings, magnified by sigma / alpha (32 at most) and by a table's exponent
        got = score_fn(jnp.asarray(x), t, prediction=name)
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-11)
        assert np.abs(1.01 * np.asarray(got) - want).max() > 1e-4  # it can fail


def test_score_fn_takes_images_in_float32():
    """Trailing axes are flattened to the target's dimensions, and the dtype is the state's."""
    points = np.random.default_rng(0).normal(size=(5, 2, 3))
    process, target = ds.processes.flow(), targets.empirical(points)
    x = np.random.default_rng(1).normal(size=(4, 2, 3))
    got = target.score_fn(process)(jnp.asarray(x, jnp.float32), 0.5)
    assert got.dtype == jnp.float32
    want, _ = target.posterior(x.reshape(4, 6), 0.5, 0.5)
    np.testing.assert_allclose(got, want.reshape(4, 2, 3), rtol=1e-5, atol=1e-5)


def test_empirical_collapses_to_the_nearest_point():
    points = np.random.default_rng(0).normal(size=(6, 2, 2))
    target = targets.empirical(points)
    x = points.reshape(6, -1) + 0.01
    data, _ = target.posterior(x, 1.0, 0.02)
    np.testing.assert_allclose(data, points.reshape(6, -1), atol=1e-10)
    wide, _ = target.posterior(x, 1e-9, 1.0)
    np.testing.assert_allclose(wide, np.tile(points.reshape(6, -1).mean(0), (6, 1)), atol=1e-8)
    drawn = np.asarray(target.sample(jax.random.key(0), 600))
    distance = np.abs(drawn[:, None] - np.float32(points.reshape(1, 6, 4))).sum(2)
    assert distance.min(1).max() == 0
    # every point about 100 times: five standard errors of a binomial count
    counts = np.bincount(distance.argmin(1), minlength=6)
    assert np.all(np.abs(counts - 100) < 5 * np.sqrt(600 / 6 * 5 / 6))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: targets.gaussian_mixture([1.0], [[0.0], [1.0]], [1.0]), "`weights` \\(K,\\)"),
        (lambda: targets.gaussian_mixture([1.0, -1.0], [[0.0], [1.0]], [1, 1]), "must be positive"),
        (lambda: targets.gaussian([0.0, 1.0], [1.0, 2.0, 3.0]), "`covs` must have shape"),
        (lambda: targets.gaussian([0.0, 1.0], [[1.0, 2.0], [0.0, 1.0]]), "must be symmetric"),
        (lambda: targets.gaussian([0.0, 1.0], [[1.0, 2.0], [2.0, 1.0]]), "positive definite"),
        (lambda: targets.empirical([1.0, 2.0]), r"`points` must have shape \(K, ...\)"),
        (lambda: targets.empirical(np.zeros((0, 2))), r"`points` must have shape \(K, ...\)"),
        (lambda: targets.empirical([[0.0], [np.nan]]), "`points` must be finite"),
        (lambda: targets.gaussian(0.0, 1.0), r"`means` must have shape \(K, dim\)"),
        (lambda: targets.gaussian([np.nan], 1.0), "`means` must hold finite numbers"),
        (lambda: targets.gaussian_mixture([], np.zeros((0, 2)), []), "numbers, at least one"),
        (lambda: targets.gaussian([0.0], np.inf), "`covs` must be finite"),
        (lambda: targets.gaussian([0.0], -1.0), "positive definite; use `empirical`"),
        (lambda: mixture_3d().sample(jax.random.key(0), -1), "`n` must be at least 1; got -1"),
        (
            lambda: skewed_mixture().ode_solution([0.3, 0.4], ds.processes.flow(), 1.0, 0.5),
            r"`x` must have shape \(batch, 1\); got \(2,\)",
        ),
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


def test_host_functions_say_so_when_traced():
    target, process = skewed_mixture(), ds.processes.flow()
    for call in (
        lambda x: target.ode_solution(x, process, 1.0, 0.5),
        lambda t: target.ode_solution(np.zeros((1, 1)), process, t, 0.5),
    ):
        with pytest.raises(TypeError, match="`ode_solution` is a host function"):
            jax.jit(call)(np.ones((1, 1)))
