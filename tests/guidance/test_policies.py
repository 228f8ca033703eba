"""Log-probabilities of rows: the Gaussian joint, gradients in closed form, divergences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from guidance.exact import build

import diffsamp as ds

PROCESS = ds.processes.vp_linear()
TARGET = ds.targets.gaussian([0.3, -0.2], [[0.5, 0.2], [0.2, 0.4]])


def gaussian_log_prob(away, cov):
    sign, log_det = np.linalg.slogdet(cov)
    assert sign == 1
    return -0.5 * (away @ np.linalg.solve(cov, away) + log_det + len(away) * np.log(2 * np.pi))


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m_sde", "sa_solver", "dpm2_ancestral"])
def test_the_sum_is_the_gaussian_joint(name, x64):
    """Of all noisy states of a run, whose joint law given x_T follows from the unrolled tableau."""
    network = TARGET.score_fn(PROCESS, "data")
    tableau = build(name, PROCESS, 5)
    x_T = jnp.array([[0.5, -1.0], [1.0, 0.2]])
    run = ds.trajectory(network, tableau, x_T, key=jax.random.key(0))
    got = np.asarray(ds.log_prob(tableau, run))
    assert got.shape == (tableau.rows, 2)
    noisy = np.flatnonzero(tableau.c != 0)
    assert np.all(got[np.asarray(tableau.c) == 0] == 0)
    # propagate mean and noise of every state by hand: outputs of this network are affine
    dim, rows = 2, tableau.rows
    for i in range(2):
        u = [np.concatenate([np.asarray(x_T[i])[:, None], np.zeros((dim, dim * rows))], axis=1)]
        m = []
        for n in range(rows):
            alpha, sigma = tableau.alpha[n], tableau.sigma[n]
            mean, cov = TARGET.mean_and_cov()
            gain = alpha * cov @ np.linalg.inv(alpha**2 * cov + sigma**2 * np.eye(dim))
            data = gain @ u[n]
            data[:, 0] += mean - alpha * gain @ mean
            noise = (u[n] - alpha * data) / sigma
            said = tableau.target[n, 0] * data + tableau.target[n, 1] * noise
            m.append(said if tableau.evaluates[n] else 0 * data)
            new = sum(tableau.a[n, k] * u[n - k] for k in range(min(tableau.p, n + 1)))
            new = new + sum(tableau.b[n, k] * m[n - k] for k in range(min(tableau.q, n + 1)))
            new[:, 1 + dim * n : 1 + dim * (n + 1)] += tableau.c[n] * np.eye(dim)
            u.append(new)
        stacked = np.concatenate([u[n + 1] for n in noisy])
        drawn = np.concatenate([np.asarray(run.points[n + 1][i]) for n in noisy])
        cov = stacked[:, 1:] @ stacked[:, 1:].T
        want = gaussian_log_prob(drawn - stacked[:, 0], cov)
        np.testing.assert_allclose(got[:, i].sum(), want, rtol=1e-8)


def test_it_is_a_sum_and_not_a_mean(x64):
    """Two independent copies of a sample in one state have twice the log-probability."""
    target = ds.targets.gaussian([0.3], 0.5).score_fn(PROCESS, "data")
    tableau = build("ddpm", PROCESS, 4)
    run = ds.trajectory(target, tableau, jnp.ones((2, 1)), key=jax.random.key(0))
    twice = ds.Trajectory(run.times, *(jnp.concatenate([v, v], -1) for v in run[1:]))
    np.testing.assert_allclose(
        ds.log_prob(tableau, twice), 2 * ds.log_prob(tableau, run), rtol=1e-12
    )


def network_with(shift):
    def apply(params, x, t):
        return TARGET.score_fn(PROCESS, "data").apply((TARGET, PROCESS), x, t) + params[None]

    return ds.ScoreFn(apply, shift, PROCESS, prediction="data")


def test_the_gradient_of_the_score_function_estimator(x64):
    """d E[r] / d shift of a linear reward, in closed form, from many runs."""
    tableau = build("ddpm", PROCESS, 4)
    x_T = PROCESS.prior_sample(jax.random.key(0), (40000, 2), dtype=jnp.float64)
    run = ds.trajectory(network_with(jnp.zeros(2)), tableau, x_T, key=jax.random.key(1))
    cov = TARGET.mean_and_cov()[1]
    # d u_N / d shift without the last, noiseless row: shifts enter every row with weight b
    slope = np.zeros((2, 2))
    for n in range(tableau.rows - 1):
        alpha, sigma = tableau.alpha[n], tableau.sigma[n]
        gain = alpha * cov @ np.linalg.inv(alpha**2 * cov + sigma**2 * np.eye(2))
        slope = (tableau.a[n, 0] * np.eye(2) + tableau.b[n, 0] * gain) @ slope
        slope += tableau.b[n, 0] * np.eye(2)
    reward = run.points[-2].sum(-1)
    reward = reward - reward.mean()

    def surrogate(shift):
        told = ds.log_prob(tableau, run, network_with(shift))
        return (told[:-1].sum(0) * reward).reshape(20, -1).mean(1)

    groups = jax.jacrev(surrogate)(jnp.zeros(2))
    error = np.std(groups, axis=0) / np.sqrt(20)
    assert np.all(error < 0.15 * slope.sum(0))
    np.testing.assert_array_less(np.abs(groups.mean(0) - slope.sum(0)), 4 * error)
    # and at the run's own weights the replayed log-probabilities are the recorded ones
    replayed = ds.log_prob(tableau, run, network_with(jnp.zeros(2)))
    np.testing.assert_allclose(replayed, ds.log_prob(tableau, run), rtol=1e-9)


def test_the_divergence_between_two_networks(x64):
    """b^2 |shift|^2 / (2 c^2), and the mean of the log-ratio under the first."""
    tableau, shift = build("ddpm", PROCESS, 4), jnp.array([0.1, -0.05])
    x_T = PROCESS.prior_sample(jax.random.key(0), (20000, 2), dtype=jnp.float64)
    first, second = network_with(jnp.zeros(2)), network_with(shift)
    run = ds.trajectory(first, tableau, x_T, key=jax.random.key(1))
    got = ds.row_kl(tableau, run.outputs, ds.replay(second, tableau, run.points))
    want = tableau.b[:-1, 0] ** 2 * float(jnp.sum(shift**2)) / (2 * tableau.c[:-1] ** 2)
    np.testing.assert_allclose(got[:-1], np.tile(want[:, None], (1, 20000)), rtol=1e-8)
    assert np.all(got[-1] == 0)
    ratio = ds.log_prob(tableau, run) - ds.log_prob(tableau, run, second)
    # the log-ratio of two normals has twice its mean as variance
    allowed = 5 * np.sqrt(2 * want / 20000)
    np.testing.assert_array_less(np.abs(ratio[:-1].mean(1) - want), allowed)
    assert np.any(allowed < 0.05 * want)
    with pytest.raises(ValueError, match="the trajectory has 4 rows; tableau 'ddpm' has 5"):
        ds.log_prob(build("ddpm", PROCESS, 5), run)
