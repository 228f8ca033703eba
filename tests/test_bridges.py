"""Diffusion bridges: against DBIM's own recursion and an exact target."""

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


def test_order_three_is_dbims():
    """x' = (c'/c) (x - a x_T) + a' x_T + b' int exp(-(h - u)) D(u) du, D through the last one, two
    or three points in log(b / c), the last step of order 1; by quadrature."""
    base = BASES["vp"]
    process = bridges.Bridge(base)
    times = bridges.times(process, 7, end=1e-4)
    assert (times[-1], len(times)) == (1e-4, 8)
    rng = np.random.default_rng(0)
    end, u, outputs = rng.normal(size=(3, 2)), rng.normal(size=(3, 2)), rng.normal(size=(7, 3, 2))
    # the first evaluation, at T, says x_0; the booting noise gives the state after it
    a, b, c = marginal(base, times[1])
    x = a * end + b * outputs[0] + c * u
    nodes = []
    for n in range(1, 7):
        (a, b, c), (a_t, b_t, c_t) = (marginal(base, t) for t in times[n : n + 2])
        lam, h = np.log(b / c), np.log(b_t / c_t) - np.log(b / c)
        nodes = [lam, *nodes][:3]
        used = 1 if n == 6 else len(nodes)  # lower_order_final lowers the last step alone
        points, weights = np.polynomial.legendre.leggauss(40)
        v = h * (points + 1) / 2
        total = 0.0
        for j in range(used):
            others = [k for k in range(used) if k != j]
            basis = np.prod(
                [(lam + v - nodes[k]) / (nodes[j] - nodes[k]) for k in others] or [np.ones(40)], 0
            )
            total = total + h / 2 * (weights * np.exp(v - h)) @ basis * outputs[n - j]
        x = c_t / c * (x - a * end) + a_t * end + b_t * total
    options = {"order": 3, "variant": "heun", "lower_order_final": False}
    rows = solvers.dpmpp(process, times, **options)
    # "clean" times end with a step of order 1 by themselves; here the last row is that of order 1
    last = solvers.dpmpp(process, times, order=1).b[-1]
    b_rows = rows.b.copy()
    b_rows[-1] = [*last, 0.0, 0.0]
    state, said = u, []
    for n in range(7):
        said = [outputs[n], *said]
        state = rows.a[n, 0] * state + sum(w * d for w, d in zip(b_rows[n], said, strict=False))
    a, _, _ = marginal(base, times[-1])
    _, norm = process.numbers(times[-1])
    np.testing.assert_allclose(a * end + norm * state, x, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="`end` must lie between"):
        bridges.times(process, 4, end=1.0)


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
    [("ddim", 41), ("dpmpp_2m_heun", 21), ("dpmpp_3m", 21), ("ddpm", 301), ("unipc2", 21),
     ("heun", 41)],
)  # fmt: skip
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
