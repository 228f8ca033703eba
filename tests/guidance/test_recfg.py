"""ReCFG: the share of the free prediction, measured, and what guidance becomes with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from guidance.exact import gaussians, labels

import diffsamp as ds
from diffsamp import guidance

PROCESS = ds.processes.vp_linear()
MEANS, VARIANCES = (0.4, 1.0), (1.0, 0.25)  # free, given
NETWORK = gaussians(MEANS, VARIANCES, PROCESS)
TIMES = np.array([0.7, 0.4, 0.1])


def noise(x, t, which):
    alpha, sigma = PROCESS.alpha(t), PROCESS.sigma(t)
    spread = alpha**2 * VARIANCES[which] + sigma**2
    return sigma * (x - alpha * MEANS[which]) / spread


def test_the_share_and_the_guided_noise(x64):
    n, w = 4000, 3.0
    keys = jax.random.split(jax.random.key(0), n)
    x_0 = 1.0 + 0.5 * jax.random.normal(jax.random.key(1), (n, 1))
    cond = {"label": labels(n, 1)}
    share = guidance.free_share(NETWORK, {"label": 0}, x_0, TIMES, keys, cond=cond)
    for i, t in enumerate(TIMES):
        alpha, sigma = PROCESS.alpha(t), PROCESS.sigma(t)
        x = alpha * np.asarray(x_0) + sigma * np.asarray(ds.random.normal_like(keys, i, x_0))
        given, free = noise(x, t, 1), noise(x, t, 0)
        want = (given * free).mean() / (free**2).mean()
        assert share[i] == pytest.approx(want, rel=1e-9)
        # in closed form S_0^2 / (S_1^2 + alpha^2 (m_1 - m_0)^2), with the error of 4000 draws
        low, high = (alpha**2 * v + sigma**2 for v in VARIANCES[::-1])
        law = high / (low + alpha**2 * (MEANS[1] - MEANS[0]) ** 2)
        assert share[i] == pytest.approx(law, rel=0.05)
    tableau = ds.solvers.ddim(PROCESS, [*TIMES, PROCESS.t_clean])
    guided = guidance.recfg(NETWORK, w, {"label": 0}, share)
    x_T = jnp.array([[0.3], [-1.0]])
    run = ds.trajectory(guided, tableau, x_T, cond={"label": labels(2, 1)})
    for i, t in enumerate(TIMES):
        x = np.asarray(run.points[i])
        mixed = w * noise(x, t, 1) + (1 - w) * share[i] * noise(x, t, 0)
        data = (x - PROCESS.sigma(t) * mixed) / PROCESS.alpha(t)
        np.testing.assert_allclose(run.outputs[i], data, rtol=1e-9, atol=1e-12)
    assert guided.nfe(tableau) == 6
    with pytest.raises(ValueError, match="one number per row"):
        guidance.recfg(NETWORK, w, {"label": 0}, 0.5)
