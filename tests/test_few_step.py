"""Step-conditioned networks and piecewise straight flows."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import skewed_mixture

import diffsamp as ds
from diffsamp import few_step, solvers

FLOW = ds.processes.flow()
TARGET = ds.targets.gaussian([0.5, -1.0], [0.3, 2.0])


def exact_map(x, t, r):
    """The flow map of a Gaussian target from t to r, in JAX: each coordinate is stretched."""
    mean, var = jnp.asarray([0.5, -1.0]), jnp.asarray([0.3, 2.0])
    t, r = t[:, None], r[:, None]
    ratio = jnp.sqrt(((1 - r) ** 2 * var[None] + r**2) / ((1 - t) ** 2 * var[None] + t**2))
    return (1 - r) * mean[None] + ratio * (x - (1 - t) * mean[None])


def mean_velocity(params, x, t, r):
    """(x_t - x_r) / (t - r): what a perfect MeanFlow network says."""
    return (x - exact_map(x, t, r)) / (t - r)[:, None]


def shortcut_apply(params, x, t, dt):
    return mean_velocity(params, x, t, t - 2.0**-dt)


def test_a_perfect_flow_map_is_exact_in_one_step_or_any():
    network = ds.ScoreFn(mean_velocity, None, FLOW, prediction="velocity")
    x_T = FLOW.prior_sample(jax.random.key(0), (64, 2))
    truth = TARGET.ode_solution(np.asarray(x_T), FLOW, 1.0, 0.0)
    for nfe in (1, 2, 3, 7):
        tableau = few_step.uniform_tableau(FLOW, nfe)
        assert tableau.nfe == nfe
        x = ds.sample(few_step.flow_map(network), tableau.pad(rows=9), x_T)
        np.testing.assert_allclose(x, truth, atol=2e-5)
    # on any times at all, and with the length as condition
    odd = solvers.ddim(FLOW, [1.0, 0.83, 0.2, 0.0])
    length = ds.ScoreFn(
        lambda p, x, t, d: mean_velocity(p, x, t, t - d), None, FLOW, prediction="velocity"
    )
    by_length = few_step.flow_map(length, name="d", label="length")
    np.testing.assert_allclose(ds.sample(by_length, odd, x_T), truth, atol=2e-5)
    by_function = few_step.flow_map(length, name="d", label=lambda t, r: t - r)
    np.testing.assert_allclose(ds.sample(by_function, odd, x_T), truth, atol=2e-5)
    # where a plain velocity network is not
    plain = TARGET.score_fn(FLOW, "velocity")
    assert np.abs(ds.sample(plain, few_step.uniform_tableau(FLOW, 3), x_T) - truth).max() > 0.1


@pytest.mark.parametrize("nfe", [1, 2, 4, 128])
def test_shortcut_labels_are_log2_of_the_steps(nfe):
    seen = []

    def apply(params, x, t, dt):
        jax.debug.callback(lambda d: seen.append(float(d[0])), dt)
        return shortcut_apply(params, x, t, dt)

    network = few_step.shortcut(ds.ScoreFn(apply, None, FLOW, prediction="velocity"))
    x_T = FLOW.prior_sample(jax.random.key(0), (8, 2))
    x = ds.sample(network, few_step.uniform_tableau(FLOW, nfe), x_T)
    jax.effects_barrier()
    np.testing.assert_allclose(seen, np.log2(nfe), atol=1e-4)
    truth = TARGET.ode_solution(np.asarray(x_T), FLOW, 1.0, 0.0)
    np.testing.assert_allclose(x, truth, atol=1e-3)


def test_shortcut_in_the_authors_direction_of_time():
    """Their clock runs from noise (0) to data (1), their network gives x_0 - eps."""

    def apply(params, x, t, dt):
        return -shortcut_apply(params, x, 1 - t, dt)

    network = ds.ScoreFn(ds.reversed_flow_apply(apply), None, FLOW, prediction="velocity")
    x_T = FLOW.prior_sample(jax.random.key(0), (8, 2))
    x = ds.sample(few_step.shortcut(network), few_step.uniform_tableau(FLOW, 2), x_T)
    truth = TARGET.ode_solution(np.asarray(x_T), FLOW, 1.0, 0.0)
    np.testing.assert_allclose(x, truth, atol=2e-5)


def test_one_compilation_and_guidance_outside():
    network = few_step.shortcut(ds.ScoreFn(shortcut_apply, None, FLOW, prediction="velocity"))
    x_T = FLOW.prior_sample(jax.random.key(0), (8, 2))
    tableaux = ds.Tableau.pad_together([few_step.uniform_tableau(FLOW, n) for n in (1, 2, 4)])
    run = jax.jit(lambda t: ds.sample(network, t, x_T))
    for tableau in tableaux:
        run(tableau)
    assert run._cache_size() == 1

    def labelled(params, x, t, dt, label):
        return shortcut_apply(params, x, t, dt) + 0.1 * label[:, None]

    inner = few_step.shortcut(ds.ScoreFn(labelled, None, FLOW, prediction="velocity"))
    guided = ds.guidance.cfg(inner, 2.0, null={"label": 0.0})
    x = ds.sample(guided, few_step.uniform_tableau(FLOW, 1), x_T, cond={"label": jnp.ones(8)})
    plain = ds.sample(network, few_step.uniform_tableau(FLOW, 1), x_T)
    np.testing.assert_allclose(x, plain - 0.2, atol=1e-5)


def test_refusals():
    network = few_step.shortcut(ds.ScoreFn(shortcut_apply, None, FLOW, prediction="velocity"))
    x_T = FLOW.prior_sample(jax.random.key(0), (8, 2))
    with pytest.raises(ValueError, match=r"steps of length 1, 1/2, 1/4, .*one of 0.333333"):
        ds.sample(network, few_step.uniform_tableau(FLOW, 3), x_T)
    with pytest.raises(ValueError, match="`cond` must not hold 'dt'"):
        ds.sample(network, few_step.uniform_tableau(FLOW, 2), x_T, cond={"dt": jnp.ones(8)})
    with pytest.raises(ValueError, match="`label` must be one of"):
        few_step.flow_map(ds.ScoreFn(mean_velocity, None, FLOW, prediction="velocity"), label="x")
    with pytest.raises(ValueError, match="`nfe` must be at least 1"):
        few_step.uniform_tableau(FLOW, 0)


@pytest.mark.parametrize(
    "base",
    [ds.processes.vp_linear(), ds.processes.vp_discrete(), ds.processes.edm(), FLOW],
    ids=str,
)
def test_piecewise_process(base):
    process = few_step.piecewise(base, 4)
    ends = np.linspace(base.t_clean, base.t_max, 5)
    np.testing.assert_allclose(process.alpha(ends), base.alpha(ends), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(process.sigma(ends), base.sigma(ends), rtol=1e-12)
    t = np.linspace(base.t_clean, base.t_max, 41)[1:-1]
    np.testing.assert_allclose(process.time(process.log_snr(t)), t, rtol=1e-9)
    h = 1e-6 * base.t_max
    inside = t[np.abs(t[:, None] - ends).min(1) > 1e-3]
    for value, slope in ((process.alpha, process.alpha_dot), (process.sigma, process.sigma_dot)):
        numeric = (value(inside + h) - value(inside - h)) / (2 * h)
        np.testing.assert_allclose(slope(inside), numeric, rtol=1e-5, atol=1e-9)
    # a DDIM step inside a window is a straight line along the velocity
    low, high = float(ends[2]), float(ends[3])
    tableau = solvers.ddim(process, [high, 0.3 * high + 0.7 * low])
    x, velocity = 0.7, -1.3
    alpha, sigma, alpha_dot, sigma_dot = (
        float(f(high)) for f in (process.alpha, process.sigma, process.alpha_dot, process.sigma_dot)
    )
    data = (sigma_dot * x - sigma * velocity) / (alpha * sigma_dot - sigma * alpha_dot)
    got = tableau.a[0, 0] * x + tableau.b[0, 0] * data
    np.testing.assert_allclose(got, x + (tableau.times[1] - high) * velocity, rtol=1e-9)


def test_a_perfect_piecewise_flow_takes_one_step_a_window():
    """The network knows the ODE's map through each window, and says its straight line."""
    base, target = ds.processes.vp_linear(), skewed_mixture()
    process = few_step.piecewise(base, 3)
    ends = np.linspace(1.0, 0.0, 4)
    x = np.asarray(base.prior_sample(jax.random.key(0), (16, 1)), np.float64)
    states = [x]
    for s, t in itertools.pairwise(ends):
        states.append(target.ode_solution(states[-1], base, s, t))
    lines = jnp.asarray(
        [(states[i + 1] - states[i]) / (ends[i + 1] - ends[i]) for i in range(3)], jnp.float32
    )

    def apply(params, x, t):
        window = jnp.clip(jnp.floor((1 - t[0]) * 3 + 1e-3).astype(jnp.int32), 0, 2)
        return lines[window]

    network = ds.ScoreFn(apply, None, process, prediction="velocity")
    one_each = solvers.ddim(process, ends)
    got = ds.sample(network, one_each, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, states[-1], atol=2e-5)
    two_each = solvers.ddim(process, np.linspace(1, 0, 7))
    got = ds.sample(network, two_each, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, states[-1], atol=2e-5)


def test_rectified_flow_is_ddim_on_the_flow_process():
    """t_i = 1 - i / N, x += v dt with v the network's velocity, one step included."""
    plain = TARGET.score_fn(FLOW, "velocity")
    x_T = FLOW.prior_sample(jax.random.key(0), (8, 2))
    for n in (1, 4):
        x = x_T
        for i in range(n):
            t = 1 - i / n
            x = x - plain(x, t) / n
        got = ds.sample(plain, few_step.uniform_tableau(FLOW, n), x_T)
        np.testing.assert_allclose(got, x, atol=1e-5)
