"""OU-VE and other processes around a known mean: exact laws, published formulas, solvers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad, solve_ivp

import diffsamp as ds

KEY = jax.random.key(0)
OUVE = ds.processes.ouve()
THETA, LOW, HIGH = 1.5, 0.05, 0.5
CENTRE, SPREAD = 0.4, 0.3  # of clean data given y: N(CENTRE y, SPREAD^2)


def test_its_law_is_that_of_the_equation():
    """Mean and variance of dx = theta (y - x) dt + g dw by integration, and the published sigma."""
    growth = np.log(HIGH / LOW)

    def g(s):
        return LOW * (HIGH / LOW) ** s * np.sqrt(2 * growth)

    t = np.array([0.01, 0.2, 0.7, 1.0])
    squared = [
        quad(lambda s, e=end: np.exp(-2 * THETA * (e - s)) * g(s) ** 2, 0, end)[0] for end in t
    ]
    np.testing.assert_allclose(OUVE.sigma(t) ** 2, squared, rtol=1e-10)
    published = (
        LOW**2 * ((HIGH / LOW) ** (2 * t) - np.exp(-2 * THETA * t)) * growth / (THETA + growth)
    )
    np.testing.assert_allclose(OUVE.sigma(t) ** 2, published, rtol=1e-10)
    np.testing.assert_allclose(OUVE.alpha(t), np.exp(-THETA * t))
    h = 1e-6
    for value, slope in ((OUVE.alpha, OUVE.alpha_dot), (OUVE.sigma, OUVE.sigma_dot)):
        np.testing.assert_allclose(slope(t), (value(t + h) - value(t - h)) / 2 / h, rtol=1e-6)
    np.testing.assert_allclose(OUVE.time(OUVE.log_snr(t)), t, rtol=1e-12)
    assert (OUVE.alpha(0.0), OUVE.sigma(0.0)) == (1, 0)
    with pytest.raises(ValueError, match="`theta` must be a positive"):
        ds.processes.ouve(-1.0)


def network(prediction, process=OUVE, weight=None):
    """The exact network of x for clean data N(CENTRE y, SPREAD^2): it sees x and y, not x - y."""

    def apply(params, x, t, mean):
        t = t[:, None]
        alpha, sigma = process.alpha(t), process.sigma(t)
        w = jnp.ones_like(t) if weight is None else weight(t)
        away = x - alpha * CENTRE * mean - (w - alpha) * mean
        noise = sigma * away / (alpha**2 * SPREAD**2 + sigma**2)
        data = CENTRE * mean + alpha * SPREAD**2 * away / (alpha**2 * SPREAD**2 + sigma**2)
        if prediction == "velocity":  # dx/dt of x = alpha x_0 + (1 - alpha) y + sigma eps
            return process.alpha_dot(t) * (data - mean) + process.sigma_dot(t) * noise
        return {
            "noise": noise,
            "score": -noise / sigma,
            "data": data,
            "v": alpha * noise - sigma * data,
        }[prediction]

    return ds.ScoreFn(apply, None, process, prediction=prediction)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("prediction", ["score", "data", "velocity", "v"])
def test_every_prediction_follows_the_exact_ode(prediction):
    """The ODE of x itself, integrated, has none of the package's shifts in it."""
    y = np.array([[1.0, -2.0, 0.5]])
    x_T = y + 0.4 * np.array([[0.3, -1.0, 2.0]])
    end = 0.03

    def rhs(t, x):
        alpha, sigma = (float(f(np.float64(t))) for f in (OUVE.alpha, OUVE.sigma))
        squared = 2 * np.log(HIGH / LOW) * LOW**2 * (HIGH / LOW) ** (2 * t)
        centre = alpha * CENTRE * y[0] + (1 - alpha) * y[0]
        score = -(x - centre) / (alpha**2 * SPREAD**2 + sigma**2)
        return THETA * (y[0] - x) - squared / 2 * score

    exact = solve_ivp(rhs, (1.0, end), x_T[0], rtol=1e-10, atol=1e-12).y[:, -1]
    around = ds.known_mean.around(network(prediction))
    times = np.linspace(1.0, end, 81)
    cond = {"mean": jnp.asarray(y)}
    for solver, limit in (("dpmpp_2m", 2e-4), ("heun", 1e-3), ("unipc3", 2e-4)):
        tableau = ds.solvers.get(solver)(OUVE, times)
        u = ds.sample(around, tableau, jnp.asarray(x_T - y), cond=cond)
        x = ds.known_mean.with_mean(around, u, end, jnp.asarray(y))
        assert np.abs(x[0] - exact).max() < limit, solver
    # a mean wrong by 2 % is seen
    u = ds.sample(around, tableau, jnp.asarray(x_T - y), cond={"mean": 1.02 * cond["mean"]})
    assert np.abs(u[0] + y[0] - exact).max() > 0.005


def test_samples_have_the_conditional_law():
    """From noise around y, for means of every sample's own, with a stochastic solver."""
    around = ds.known_mean.around(network("score"))
    y = jnp.tile(jnp.array([[2.0, -1.0]]), (4000, 1))
    times = np.append(np.linspace(1.0, 0.03, 60), 0.0)
    tableau = ds.solvers.get("dpmpp_2m_sde")(OUVE, times)
    u_T = OUVE.prior_sample(KEY, (4000, 2))
    u = ds.sample(around, tableau, u_T, key=jax.random.key(1), cond={"mean": y})
    x = np.asarray(ds.known_mean.with_mean(around, u, 0.0, y))
    np.testing.assert_allclose(x.std(axis=0), SPREAD, rtol=0.06)
    # from the prior, which has no alpha(1) (x_0 - y) in it, a part of its mean stays
    start = SPREAD**2 * OUVE.alpha(1.0) ** 2 + OUVE.sigma(1.0) ** 2
    np.testing.assert_allclose(x.mean(axis=0), CENTRE * y[0], atol=0.06)
    exact = OUVE.alpha(1.0) * (CENTRE - 1) * y + u_T * np.sqrt(start).astype(
        np.float32
    ) / np.float32(OUVE.sigma(1.0))
    u = ds.sample(around, tableau, exact, key=jax.random.key(1), cond={"mean": y})
    np.testing.assert_allclose(np.mean(u + y, axis=0), CENTRE * np.asarray(y[0]), atol=0.02)


def cdiffuse(t):
    """CDiffuSE's weight of the mean for x_0 = y: sqrt of alpha-bar, here exp(-t)."""
    xp = jnp if isinstance(t, jax.Array) else np
    return xp.exp(-t)


@pytest.mark.usefixtures("x64")
def test_a_mean_of_another_weight():
    """alpha = (1 - m) w, share of y m w: the state stays exactly the process's combination."""
    t = np.linspace(0, 1, 33)
    process = ds.processes.table(t, np.exp(-t) * (1 - 0.9 * t), np.sqrt(t * (2 - t)))
    around = ds.known_mean.around(network("data", process, cdiffuse), weight=cdiffuse)
    y = jnp.array([[1.0, -2.0]])
    x_0, eps = 0.7, np.array([[0.3, -1.2]])
    s, e = 0.9, 0.2

    def state(t):
        return (
            process.alpha(t) * x_0 + (cdiffuse(t) - process.alpha(t)) * y + process.sigma(t) * eps
        )

    right = ds.ScoreFn(
        lambda p, x, t, mean: jnp.full_like(x, x_0), None, process, prediction="data"
    )
    around = ds.known_mean.around(right, weight=cdiffuse)
    tableau = ds.solvers.ddim(process, [s, 0.5, e])
    u = ds.sample(around, tableau, jnp.asarray(state(s) - cdiffuse(s) * y), cond={"mean": y})
    np.testing.assert_allclose(ds.known_mean.with_mean(around, u, e, y), state(e), rtol=1e-10)
    with pytest.raises(ValueError, match="needs weight=None"):
        ds.known_mean.around(network("velocity"), weight=cdiffuse)


def test_guidance_inside_and_bad_input():
    """Guidance by the same network changes nothing; a missing or misshapen mean is refused."""
    y, u_T = jnp.ones((2, 3)), OUVE.prior_sample(KEY, (2, 3))
    tableau = ds.solvers.ddim(OUVE, np.linspace(1.0, 0.1, 4))
    one = network("score")
    twice = ds.guidance.combine([(one, {}), (one, {})], [2.0, -1.0])
    found = ds.sample(ds.known_mean.around(twice), tableau, u_T, cond={"mean": y})
    around = ds.known_mean.around(one)
    np.testing.assert_allclose(
        found, ds.sample(around, tableau, u_T, cond={"mean": y}), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="a known mean must be given"):
        ds.sample(around, tableau, u_T)
    with pytest.raises(ValueError, match="must be shaped like the state"):
        ds.sample(around, tableau, u_T, cond={"mean": y[:, :2]})
    with pytest.raises(ValueError, match="around its mean already"):
        ds.known_mean.around(around)
    rising = ds.Tableau.create(
        times=[0.0, 0.5],
        alpha=[1.0, OUVE.alpha(0.5)],
        sigma=[0.0, OUVE.sigma(0.5)],
        target=[[0.0, 1.0]],
        a=[[1.0]],
        b=[[0.0]],
        check="none",
    )
    data = ds.known_mean.around(network("data"))
    with pytest.raises(ValueError, match="does not determine"):
        ds.sample(data, rising, u_T, cond={"mean": y})
