"""Diffusion bridges: against DBIM's own recursion and an exact target."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import gaussian_moments, twin

import diffsamp as ds
from diffsamp import bridges, solvers

BASES = {
    "vp": ds.processes.vp_linear(0.1, 2.0),
    "ve": ds.processes.edm(0.002, 80.0),
    "edm_bridge": ds.processes.edm(0.01, 1.0),
}


def marginal(base, t):
    """a, b, c of DBIM's paper at t, written out."""
    alpha, rho = base.alpha(t), base.sigma(t) / base.alpha(t)
    end = base.t_max
    alpha_T, rho_T = base.alpha(end), base.sigma(end) / base.alpha(end)
    a = alpha / alpha_T * rho**2 / rho_T**2
    b = alpha * (rho_T**2 - rho**2) / rho_T**2
    c = alpha * rho * np.sqrt(np.maximum(rho_T**2 - rho**2, 0)) / rho_T
    return a, b, c


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_the_process_is_the_marginal(base):
    process = bridges.Bridge(base)
    t = np.linspace(base.t_clean, base.t_max, 21)
    a, b, c = marginal(base, t)
    on_end, norm = process.numbers(t)
    np.testing.assert_allclose(on_end, a, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(norm * process.alpha(t), b, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(norm * process.sigma(t), c, rtol=1e-7, atol=1e-12)
    assert (process.alpha(base.t_max), process.sigma(base.t_max)) == (0, 1)
    assert (process.alpha(base.t_clean), process.sigma(base.t_clean)) == (1, 0)
    inner = t[1:-1]
    np.testing.assert_allclose(process.time(process.log_snr(inner)), inner, rtol=1e-9)
    assert process.time(np.float64(-np.inf)) == base.t_max
    h = 1e-6 * base.t_max
    for value, slope in ((process.alpha, process.alpha_dot), (process.sigma, process.sigma_dot)):
        numeric = (value(inner + h) - value(inner - h)) / (2 * h)
        np.testing.assert_allclose(slope(inner), numeric, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_is_dbim(base, eta):
    """The published recursion in x: kappa x + (a - kappa a_s) x_T + (b - kappa b_s) D + Omega z."""
    process = bridges.Bridge(base)
    times = bridges.times(process, 6, start_gap=1e-3 * base.t_max)
    tableau = solvers.ddim(process, times, eta=eta)
    rng = np.random.default_rng(0)
    end, u = rng.normal(size=(5, 2)), rng.normal(size=(5, 2))
    outputs = rng.normal(size=(6, 5, 2))  # whatever the network says
    noises = rng.normal(size=(6, 5, 2))
    # ours, in u
    state, drawn = u, []
    for n in range(6):
        state = tableau.a[n, 0] * state + tableau.b[n, 0] * outputs[n] + tableau.c[n] * noises[n]
        on_end, norm = process.numbers(times[n + 1])
        drawn.append(on_end * end + norm * state)
    # theirs: booting noise after the first evaluation, then the recursion
    a, b, c = marginal(base, times)
    boot = u
    if eta == 1:  # with fresh noise on every step, the first too
        boot = noises[0]
    elif eta:
        boot = np.sqrt(1 - eta**2) * u + eta * noises[0]
    x = a[1] * end + b[1] * outputs[0] + c[1] * boot
    np.testing.assert_allclose(drawn[0], x, rtol=1e-6, atol=1e-9)
    rho = base.sigma(times) / base.alpha(times)
    for n in range(1, 6):
        omega = (
            eta * base.alpha(times[n + 1]) * rho[n + 1] * np.sqrt(1 - (rho[n + 1] / rho[n]) ** 2)
        )
        kappa = np.sqrt(c[n + 1] ** 2 - omega**2) / c[n]
        x = (
            kappa * x
            + (a[n + 1] - kappa * a[n]) * end
            + (b[n + 1] - kappa * b[n]) * outputs[n]
            + omega * noises[n]
        )
        np.testing.assert_allclose(drawn[n], x, rtol=1e-6, atol=1e-8)
        if eta == 1:  # the Markov bridge forgets x_T
            assert abs(a[n + 1] - kappa * a[n]) < 1e-9
    np.testing.assert_allclose(x, outputs[-1], atol=1e-9)


def test_higher_orders_converge_on_a_bridge():
    """The bridge's ODE in u is that of any process, whose solution is known."""
    base = BASES["vp"]
    process = bridges.Bridge(base)
    target = ds.targets.gaussian_mixture([0.4, 0.6], [[-1.0], [0.8]], [0.05, 0.2])
    start, end = 0.95, 0.1
    x = np.linspace(-2, 2, 9)[:, None]
    truth = target.ode_solution(x, process, start, end)
    for make, order in (
        (lambda t: solvers.ddim(process, t), 1),
        (lambda t: solvers.dpmpp(process, t, order=2, variant="heun"), 2),
    ):
        errors = [
            np.abs(twin(make(np.linspace(start, end, n + 1)), target.posterior, x) - truth).max()
            for n in (160, 320)
        ]
        assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)
    # moments, from the pure noise at T, also with the Markov bridge's noise
    for eta in (0.0, 1.0):
        tableau = solvers.ddim(process, np.linspace(1, 0.05, 2001), eta=eta)
        mean, variance = gaussian_moments(tableau, 0.7, 0.3)
        alpha, sigma = tableau.alpha[-1], tableau.sigma[-1]
        np.testing.assert_allclose(mean, alpha * 0.7, rtol=1e-9)
        np.testing.assert_allclose(variance, alpha**2 * 0.3 + sigma**2, rtol=3e-3)


def paired(params, x, t, x_T):
    """The perfect network for x_0 | x_T ~ N(x_T / 2, v): it sees x, subtracts its part of x_T."""
    base, variance = params
    process = bridges.Bridge(base)
    on_end, norm = process.numbers(t)
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    u = (x - on_end[:, None] * x_T) / jnp.maximum(norm, 1e-20)[:, None]
    # at T the state says nothing: norm is 0 there
    u = jnp.where(norm[:, None] > 1e-12, u, 0.0)
    gain = alpha * variance / (alpha**2 * variance + sigma**2)
    return 0.5 * x_T + gain * (u - alpha * 0.5 * x_T)


@pytest.mark.parametrize(
    ("name", "nfe"),
    [
        ("ddim", 41),
        ("dpmpp_2m_heun", 21),
        ("dpmpp_3m", 21),
        ("ddpm", 301),
        ("unipc2", 21),
        ("heun", 41),
    ],
)
def test_samples_of_an_exact_bridge(name, nfe):
    base = BASES["vp"]
    variance = np.float32(0.09)
    network = ds.ScoreFn(paired, (base, variance), base, prediction="data")
    bridged = bridges.bridge(network)
    solver = ds.solvers.get(name)
    steps = solver.steps(nfe)
    tableau = solver(bridged.process, bridges.times(bridged.process, steps))
    x_T = 2 * jax.random.normal(jax.random.key(0), (4000, 1))
    noise = bridged.process.prior_sample(jax.random.key(1), (4000, 1))
    x = ds.sample(bridged, tableau, noise, key=jax.random.key(2), cond={"x_T": x_T})
    rest = np.asarray(x - 0.5 * x_T)
    # five standard errors and the discretisation's own, at most 2 % of the spread
    assert abs(rest.mean()) < 5 * 0.3 / np.sqrt(4000) + 0.003
    assert rest.std() == pytest.approx(0.3, rel=0.02 + 5 / np.sqrt(8000))
    assert abs(np.corrcoef(rest[:, 0], np.asarray(x_T)[:, 0])[0, 1]) < 5 / np.sqrt(4000)


def test_other_solvers_and_refusals():
    base = BASES["vp"]
    network = ds.ScoreFn(paired, (base, np.float32(0.09)), base, prediction="data")
    bridged = bridges.bridge(network)
    times = bridges.times(bridged.process, 5)
    assert len(times) == 6
    noise = bridged.process.prior_sample(jax.random.key(1), (4, 1))
    tableau = solvers.ddim(bridged.process, times)
    with pytest.raises(ValueError, match="a bridge needs its end"):
        ds.sample(bridged, tableau, noise)
    with pytest.raises(ValueError, match="must be shaped like the state"):
        ds.sample(bridged, tableau, noise, cond={"x_T": jnp.ones((4, 2))})
    with pytest.raises(ValueError, match='prediction="data"'):
        bridges.bridge(ds.ScoreFn(paired, None, base, prediction="noise"))
    with pytest.raises(ValueError, match="bridged already"):
        bridges.bridge(bridged.score_fn)
    with pytest.raises(ValueError, match="must be at least 2"):
        bridges.times(bridged.process, 1)


# -- the authors' code, whole runs -----------------------------------------------------------------


def told(params, x, t, x_T):
    """A network that no method integrates exactly."""
    t = t.reshape((-1,) + (1,) * (x.ndim - 1))
    return jnp.tanh(0.8 * x - 0.4 * x_T) + 0.1 * jnp.sin(3 * t) * x_T


def dbim_as_published(base, x_T, boot, times, order):
    """sample_dbim_high_order: orders 1, 2, .., the last step 1; times[0] is after the booting."""

    def said(x, t):
        return np.asarray(told(None, jnp.asarray(x), jnp.full(len(x), t), jnp.asarray(x_T)))

    end = base.t_max
    a, b, c = marginal(base, times)
    lam = np.log(b / c)
    x = a[0] * x_T + b[0] * said(x_T, end) + c[0] * boot
    known = []
    for n in range(len(times) - 1):
        known.insert(0, said(x, times[n]))
        now = 1 if n == len(times) - 2 else min(order, n + 1)
        h = lam[n + 1] - lam[n]
        inner = (1 - np.exp(-h)) * known[0]
        if now == 2:
            slope = (known[0] - known[1]) / (lam[n] - lam[n - 1])
            inner = inner + (np.exp(-h) + h - 1) * slope
        if now == 3:
            h_1, h_2 = lam[n] - lam[n - 1], lam[n - 1] - lam[n - 2]
            new, old = (known[0] - known[1]) / h_1, (known[1] - known[2]) / h_2
            slope = (new * (2 * h_1 + h_2) - old * h_1) / (h_1 + h_2)
            bend = 2 * (new - old) / (h_1 + h_2)
            inner = inner + (np.exp(-h) + h - 1) * slope
            inner = inner + (h**2 / 2 - h + 1 - np.exp(-h)) * bend
        kept = c[n + 1] / c[n]
        x = kept * x + (a[n + 1] - kept * a[n]) * x_T + b[n + 1] * inner
    return x


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["vp", "edm_bridge"])
def test_dbim_of_higher_order_is_the_authors(name):
    base, rng = BASES[name], np.random.default_rng(0)
    x_T, boot = rng.normal(size=(5, 2)), rng.normal(size=(5, 2))
    bridged = bridges.bridge(ds.ScoreFn(told, None, base, prediction="data"))
    for order, nfe in ((2, 6), (3, 6), (3, 9)):
        times = bridges.times(bridged.process, nfe, end=1e-4 if name == "vp" else 0.01)
        assert (len(times), times[1]) == (nfe + 1, base.t_max - 1e-3)
        want = dbim_as_published(base, x_T, boot, times[1:], order)
        tableau = solvers.dpmpp(
            bridged.process, times, order=order, variant="heun", lower_order_final="last"
        )
        u = ds.sample(bridged, tableau, jnp.asarray(boot), cond={"x_T": jnp.asarray(x_T)})
        on_end, norm = bridged.process.numbers(times[-1])
        np.testing.assert_allclose(on_end * x_T + norm * u, want, atol=1e-7)
    # to the clean end, which is of order 1 by itself
    times = bridges.times(bridged.process, 7)
    ends = [
        solvers.dpmpp(bridged.process, times, order=3, variant="heun", lower_order_final=low)
        for low in ("last", False)
    ]
    np.testing.assert_array_equal(ends[0].b, ends[1].b)
    with pytest.raises(ValueError, match="`lower_order_final` must be one of 'last'"):
        solvers.dpmpp(bridged.process, times, lower_order_final="first")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("churn", [0.0, 0.33])
@pytest.mark.parametrize("name", ["vp", "ve"])
def test_hybrid_heun_is_ddbms(name, churn):
    """sample_heun with their drifts: to_d on the VE bridge, get_d_vp on the VP one."""
    base = BASES[name]
    x_T = np.random.default_rng(0).normal(size=(5, 2))
    high = base.t_max - 1e-4
    times = np.append(np.linspace(high ** (1 / 7), 0.002 ** (1 / 7), 6) ** 7, 0.0)
    network = ds.ScoreFn(told, None, base, prediction="data")
    steps, tableau = bridges.hybrid_heun(network, times, churn=churn)
    assert tableau.nfe == (17 if churn else 11)

    def drift(x, t, stochastic):
        data = np.asarray(told(None, jnp.asarray(x), jnp.full(len(x), t), jnp.asarray(x_T)))
        if name == "ve":
            d = (
                -(1 if stochastic else 0.5)
                * 2
                * t
                * (
                    (data - x) / t**2
                    - (0 if stochastic else 1) * (x_T - x) / (base.t_max**2 - t**2)
                )
            )
            return d, 2 * t
        beta = 0.1 + 1.9 * t  # of vp_linear(0.1, 2.0)
        log_s = lambda v: -(0.1 * v + 0.95 * v * v) / 2  # noqa: E731
        ratio = np.sqrt(np.expm1(-2 * log_s(t)))  # sigma / alpha
        scale, end = np.exp(log_s(t)), np.exp(log_s(1.0))
        left = 1 - (ratio**2) / np.expm1(-2 * log_s(1.0))  # 1 - SNR_T / SNR_t
        mean = (1 - left) * scale / end * x_T + left * scale * data
        std = ratio * scale
        score = -(x - mean) / std**2 / left
        guide = -(x - scale / end * x_T) / std**2 / (left / (1 - left))
        return -0.5 * beta * x - beta * ((1 if stochastic else 0.5) * score - guide), beta

    key, row, x = jax.random.key(3), 0, x_T
    keys = ds.random.sample_keys(key, 5)
    for s, t in itertools.pairwise(times):
        hat = s
        if churn:
            hat = s + churn * (t - s)
            d, squared = drift(x, s, True)
            z = np.asarray(ds.random.normal_like(keys, row, jnp.zeros((5, 2))))
            x, row = x + (hat - s) * d + np.sqrt((s - hat) * squared) * z, row + 1
        d, _ = drift(x, hat, False)
        end, row = x + (t - hat) * d, row + 1
        if t > 0:
            end, row = x + (t - hat) / 2 * (d + drift(end, t, False)[0]), row + 1
        x = end
    assert row == tableau.rows
    end = jnp.asarray(x_T)
    got = ds.sample(steps, tableau, end, key=key, cond={"x_T": end})
    np.testing.assert_allclose(got, x, rtol=1e-7, atol=1e-7)


def test_hybrid_heun_samples_the_bridge():
    """x_0 given x_T of an exact bridge, in float32, and what it refuses."""
    base, variance = BASES["vp"], np.float32(0.09)
    network = ds.ScoreFn(paired, (base, variance), base, prediction="data")
    times = np.append(np.linspace(0.9999 ** (1 / 7), 1e-4 ** (1 / 7), 60) ** 7, 0.0)
    x_T = 2 * jax.random.normal(jax.random.key(0), (4000, 1))
    steps, tableau = bridges.hybrid_heun(network, times)
    x = ds.sample(steps, tableau, x_T, key=jax.random.key(2), cond={"x_T": x_T})
    rest = np.asarray(x - 0.5 * x_T)
    assert abs(rest.mean()) < 5 * 0.3 / np.sqrt(4000) + 0.003
    assert rest.std() == pytest.approx(0.3, rel=0.02 + 5 / np.sqrt(8000))
    with pytest.raises(ValueError, match="must start below T = 1"):
        bridges.hybrid_heun(network, [1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match=r"`churn` must lie in \[0, 1\)"):
        bridges.hybrid_heun(network, times, churn=1.0)
    with pytest.raises(ValueError, match="a bridge needs its end"):
        ds.sample(steps, tableau, x_T, key=jax.random.key(2))
    with pytest.raises(ValueError, match="`start_gap` must be positive and `end` in"):
        bridges.times(bridges.Bridge(base), 5, end=1.0)
