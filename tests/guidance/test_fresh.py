"""Noise that is a function of the row: the tableau itself, DSG replayed, and its length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from guidance.exact import build

import diffsamp as ds
from diffsamp import guidance

PROCESS = ds.processes.vp_linear()
COV = np.array([[1.0, 0.8], [0.8, 1.0]])
NETWORK = ds.targets.gaussian([0.0, 0.0], COV).score_fn(PROCESS, "noise")
KEYS = jax.random.split(jax.random.key(0), 3)
X_T = np.array([[0.3, -0.5], [2.0, 1.0], [-1.0, 0.2]])


def misfit(data, level, cond):
    del level, cond
    return 0.5 * (data[:, 0] - 1.0) ** 2


def itself(z, told):
    del told
    return z


def test_the_noise_itself_is_the_tableau(x64):
    tableau = build("ddpm", PROCESS, 5)
    transform, quiet = guidance.redraw(NETWORK, tableau, itself, KEYS)
    assert not quiet.stochastic
    got = ds.sample(transform, quiet, jnp.asarray(X_T))
    want = ds.sample(NETWORK, tableau, jnp.asarray(X_T), key=KEYS)
    np.testing.assert_allclose(got, want, rtol=1e-9)
    part = ds.sample(transform.for_samples(jnp.array([1])), quiet, jnp.asarray(X_T[1:2]))
    np.testing.assert_allclose(part[0], got[1], rtol=1e-9)


def test_dsg_is_its_loop(x64):
    """x' = mean + sqrt(2) c m / |m|, m of z and the loss's gradient; 2 % of the share shows."""
    tableau = build("ddpm", PROCESS, 5)

    def loop(share):
        x = X_T
        for n in range(tableau.rows):
            alpha, sigma = tableau.alpha[n], tableau.sigma[n]
            slope = alpha * COV @ np.linalg.inv(alpha**2 * COV + sigma**2 * np.eye(2))
            data = x @ slope.T
            gradient = np.stack([data[:, 0] - 1.0, 0 * data[:, 0]], axis=1) @ slope
            gradient /= np.linalg.norm(gradient, axis=1, keepdims=True)
            z = np.asarray(ds.random.normal_like(KEYS, n, jnp.zeros((3, 2))))
            m = (1 - share) * z - share * np.sqrt(2) * gradient
            m *= np.sqrt(2) / np.linalg.norm(m, axis=1, keepdims=True)
            x = tableau.a[n, 0] * x + tableau.b[n, 0] * data + tableau.c[n] * m
        return x

    transform, quiet = guidance.dsg(NETWORK, misfit, tableau, KEYS, share=0.2)
    run = ds.trajectory(transform, quiet, jnp.asarray(X_T))
    np.testing.assert_allclose(run.points[-1], loop(0.2), rtol=1e-8)
    assert np.abs(loop(0.204) - loop(0.2)).max() > 1e-3
    assert transform.gradients(quiet) == quiet.nfe == 5
    for n in (0, 3):
        plain = NETWORK(run.points[n], tableau.times[n], prediction="data")
        mean = tableau.a[n, 0] * run.points[n] + tableau.b[n, 0] * plain
        size = np.linalg.norm(run.points[n + 1] - mean, axis=1)
        np.testing.assert_allclose(size, np.sqrt(2) * tableau.c[n], rtol=1e-7)


def test_it_says_what_is_wrong():
    with pytest.raises(ValueError, match="rows of one state and one output"):
        guidance.redraw(NETWORK, build("dpmpp_2m_sde", PROCESS, 4), itself, KEYS)
    travel = ds.solvers.travel(build("ddim", PROCESS, 4), 2)
    with pytest.raises(ValueError, match="move with its prediction"):
        guidance.redraw(NETWORK, travel, itself, KEYS)
    with pytest.raises(ValueError, match=r"`share` must lie in \[0, 1\]"):
        guidance.dsg(NETWORK, misfit, build("ddpm", PROCESS, 4), KEYS, share=2.0)
    tableau = build("ddpm", PROCESS, 4)
    pulled, quiet = guidance.redraw(NETWORK, tableau, lambda z, told: told.pull(z), KEYS)
    with pytest.raises(ValueError, match="pass pulls=1"):
        ds.sample(pulled, quiet, jnp.asarray(X_T))
