"""PSLD: its moments against their ODE, and samplers against the exact reverse ODE of a Gaussian."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

import diffsamp as ds
from diffsamp import phase_space
from diffsamp._core import random

PROCESS = phase_space.psld(gamma=0.02, nu=4.02)
MEAN, VARIANCE = 0.7, 0.3  # of the data, per element


def drift_and_spread(process):
    F = process.beta / 2 * np.array([[-process.gamma, 1 / process.mass], [-1, -process.nu]])
    return F, process.beta * np.diag([process.gamma, process.mass * process.nu])


@pytest.mark.parametrize(
    "process", [PROCESS, phase_space.psld(4.0, 0.0, 3.0, 0.2)], ids=["paper", "gamma0"]
)
def test_moments_solve_their_equations(process):
    F, GG = drift_and_spread(process)

    def rhs(t, y):
        mean, cov = y[:4].reshape(2, 2), y[4:].reshape(2, 2)
        return np.concatenate([(F @ mean).ravel(), (F @ cov + cov @ F.T + GG).ravel()])

    start = np.concatenate([np.eye(2).ravel(), [0, 0, 0, process.kappa * process.mass]])
    times = np.array([0.01, 0.1, 0.5, 1.0])
    exact = solve_ivp(rhs, (0, 1), start, t_eval=times, rtol=1e-12, atol=1e-14).y
    np.testing.assert_allclose(np.stack(process.mean(times)), exact[:4], atol=1e-10)
    np.testing.assert_allclose(np.stack(process.covariance(times)), exact[[4, 5, 7]], atol=1e-10)
    h = 1e-6
    for value, slope in ((process.alpha, process.alpha_dot), (process.sigma, process.sigma_dot)):
        numeric = (value(times[:-1] + h) - value(times[:-1] - h)) / (2 * h)
        np.testing.assert_allclose(slope(times[:-1]), numeric, rtol=1e-5)
    np.testing.assert_allclose(process.time(process.log_snr(times)), times, rtol=1e-9)
    assert (process.alpha(0.0), process.sigma(0.0)) == (1, 0)


def moments(process, t):
    """Mean (2,) and covariance (2, 2) of z_t for Gaussian data."""
    e = np.array(process.mean(t)).reshape(2, 2)
    xx, xm, mm = process.covariance(t)
    return e[:, 0] * MEAN, np.array([[xx, xm], [xm, mm]]) + VARIANCE * np.outer(e[:, 0], e[:, 0])


def network(process):
    """eps = -L^T score, the perfect network, in JAX."""

    def apply(params, z, t):
        xx, _xm, mx, _mm = process.mean(t)
        s_xx, s_xm, s_mm = process.covariance(t)
        c = (s_xx + VARIANCE * xx * xx, s_xm + VARIANCE * xx * mx, s_mm + VARIANCE * mx * mx)
        det = c[0] * c[2] - c[1] ** 2
        shape = (-1,) + (1,) * (z.ndim - 2)
        dx = z[..., 0] - (xx * MEAN).reshape(shape)
        dm = z[..., 1] - (mx * MEAN).reshape(shape)
        c = [(v / det).reshape(shape) for v in c]
        score = -(c[2] * dx - c[1] * dm), -(c[0] * dm - c[1] * dx)
        first = jnp.sqrt(s_xx)
        cross, second = s_xm / first, jnp.sqrt(s_mm - s_xm**2 / s_xx)
        eps_x = -(first.reshape(shape) * score[0] + cross.reshape(shape) * score[1])
        return jnp.stack([eps_x, -second.reshape(shape) * score[1]], axis=-1)

    return ds.ScoreFn(apply, None, process, prediction="noise")


def exact_flow(process, z, s, t):
    """The reverse ODE by a tight integrator, nothing of the package's matrices in it."""
    F, GG = drift_and_spread(process)

    def rhs(time, y):
        y = y.reshape(-1, 2)
        mean, cov = moments(process, time)
        score = -(y - mean) @ np.linalg.inv(cov)
        return (y @ F.T - score @ GG / 2).ravel()

    return solve_ivp(rhs, (s, t), z.ravel(), rtol=1e-11, atol=1e-12).y[:, -1].reshape(-1, 2)


NFE = {"euler": 1, "conjugate": 1, "symplectic_euler": 2, "verlet": 3, "reduced_verlet": 2}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", NFE)
def test_order_and_evaluations(method):
    score_fn = network(PROCESS)
    z_T = np.array([[-1.5, 0.2], [0.3, -0.7], [1.2, 0.9]])
    exact = exact_flow(PROCESS, z_T, 1.0, 0.02)
    errors = []
    for n in (100, 200, 400):
        times = np.linspace(1, 0.02, n + 1)
        steps, tableau = phase_space.sampler(score_fn, times, method=method)
        assert tableau.nfe == n * NFE[method]
        got = ds.sample(steps, tableau, jnp.asarray(z_T))
        errors.append(np.abs(got - exact).max())
    slopes = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert 0.8 < slopes[-1] < 1.4, (slopes, errors)
    assert errors[-1] < (0.12 if NFE[method] == 1 else 0.05)


@pytest.mark.usefixtures("x64")
def test_splitting_and_conjugate_steps_are_closer_than_eulers():
    score_fn = network(PROCESS)
    z_T = np.array([[-1.5, 0.2], [0.3, -0.7], [1.2, 0.9]])
    exact = exact_flow(PROCESS, z_T, 1.0, 0.02)
    times = np.linspace(1, 0.02, 201)
    error = {}
    for method in NFE:
        steps, tableau = phase_space.sampler(score_fn, times, method=method)
        error[method] = np.abs(ds.sample(steps, tableau, jnp.asarray(z_T)) - exact).max()
    assert all(error[m] < 0.6 * error["euler"] for m in ("verlet", "reduced_verlet"))
    assert error["conjugate"] < 0.8 * error["euler"]


@pytest.mark.usefixtures("x64")
def test_conjugate_is_exact_for_a_constant_noise_prediction():
    """At rate 0 in one step of any length; another rate is Euler on the stretch alone."""
    eps = jnp.array([0.4, -1.1])
    score_fn = ds.ScoreFn(
        lambda p, z, t: jnp.broadcast_to(eps, z.shape), None, PROCESS, prediction="noise"
    )
    F, GG = drift_and_spread(PROCESS)

    def rhs(t, z):
        xx, xm, mm = PROCESS.covariance(t)
        L = np.linalg.cholesky(np.array([[xx, xm], [xm, mm]]))
        return F @ z + GG @ np.linalg.inv(L).T @ np.asarray(eps) / 2

    z_T = np.array([0.5, -0.2])
    exact = solve_ivp(rhs, (1, 0.1), z_T, rtol=1e-12, atol=1e-12).y[:, -1]
    for rate, close in ((0.0, True), (0.5, False)):
        steps, tableau = phase_space.sampler(score_fn, [1.0, 0.1], method="conjugate", rate=rate)
        got = ds.sample(steps, tableau, jnp.asarray(z_T)[None])[0]
        assert np.allclose(got, exact, atol=1e-8) == close


def test_samples_have_the_datas_moments():
    """From the prior, in float32, images of 3 x 2 elements; padding changes nothing."""
    times = ds.schedules.quadratic(PROCESS, 120, final="t_min")
    steps, tableau = phase_space.sampler(network(PROCESS), times)
    z_T = PROCESS.prior_sample(jax.random.key(0), (3000, 3, 2, 2))
    assert float(jnp.std(z_T[..., 1])) == pytest.approx(np.sqrt(PROCESS.mass), rel=0.02)
    z = ds.sample(steps, tableau, z_T)
    assert float(jnp.mean(z[..., 0])) == pytest.approx(MEAN, abs=0.03)
    assert float(jnp.std(z[..., 0])) == pytest.approx(np.sqrt(VARIANCE), rel=0.05)
    padded = ds.sample(steps, tableau.pad(rows=250, p=2, q=3), z_T[:4])
    np.testing.assert_allclose(padded, z[:4], atol=1e-4)


def their_sde_step(method, z, s, h, following, zeta):
    """One step of the reverse SDE in NumPy, from the equations of the papers; 0: no noise."""
    beta, gamma, nu, mass = (getattr(PROCESS, k) for k in ("beta", "gamma", "nu", "mass"))
    mean, cov = moments(PROCESS, s)
    score = -(z - mean) @ np.linalg.inv(cov)
    (x, m), (s_x, s_m) = z.T, score.T
    if method == "euler_maruyama":
        x_new = x + h * (beta / 2 * (gamma * x - m / mass) + gamma * beta * s_x)
        m_new = m + h * (beta / 2 * (x + nu * m) + mass * nu * beta * s_m)
        widths = np.sqrt(h * beta * np.array([gamma, mass * nu]))
        return np.stack([x_new, m_new], -1) + (widths * zeta if following else 0)
    if method == "sscs":
        x = x + h * gamma * beta * (s_x + x)
        m = m + h * mass * nu * beta * (s_m + m / mass)
        after = (h + following) / 2
        linear = beta / 2 * np.array([[-gamma, -1 / mass], [1, -nu]])

        def rhs(t, y):
            mean, cov = y[:4].reshape(2, 2), y[4:].reshape(2, 2)
            spread = beta * np.diag([gamma, mass * nu])
            grown = linear @ cov + cov @ linear.T + spread
            return np.concatenate([(linear @ mean).ravel(), grown.ravel()])

        start = np.concatenate([np.eye(2).ravel(), np.zeros(4)])
        end = solve_ivp(rhs, (0, after), start, rtol=1e-12, atol=1e-15).y[:, -1]
        moved = np.stack([x, m], -1) @ end[:4].reshape(2, 2).T
        return moved + (zeta @ np.linalg.cholesky(end[4:].reshape(2, 2)).T if following else 0)
    m = m + h * beta / 2 * (x + 2 * nu * m + 2 * mass * nu * s_m)
    x = x + h * beta / 2 * (2 * gamma * x - m / mass + 2 * gamma * s_x)
    rates = np.array([gamma, nu]) * beta * following
    spread = np.sqrt(np.array([1, mass]) * -np.expm1(-rates))
    return np.exp(-rates / 2) * np.stack([x, m], -1) + spread * zeta


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", ["euler_maruyama", "sscs", "reduced_oba"])
def test_stochastic_steps_are_the_papers(method):
    """Step by step with the same noise, and a padded tableau."""
    times = np.array([1.0, 0.8, 0.55, 0.3, 0.1, 0.02])
    steps, tableau = phase_space.sampler(network(PROCESS), times, method=method)
    assert (tableau.nfe, tableau.stochastic) == (5, True)
    keys = jax.random.split(jax.random.key(3), 4)
    z_T = PROCESS.prior_sample(jax.random.key(0), (4, 2))
    want = np.asarray(z_T)
    for n, (s, t) in enumerate(itertools.pairwise(times)):
        zeta = np.asarray(random.normal_like(keys, n, z_T))
        following = t - times[n + 2] if n < 4 else 0.0
        want = their_sde_step(method, want, s, s - t, following, zeta)
    got = ds.sample(steps, tableau, z_T, key=keys)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)
    padded = ds.sample(steps, tableau.pad(rows=9, p=2, q=3), z_T, key=keys)
    np.testing.assert_allclose(padded, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["euler_maruyama", "sscs", "reduced_oba"])
def test_the_reverse_sde_ends_in_the_datas_law(method):
    """700 steps, float32: mean and spread of data and momentum."""
    times = ds.schedules.quadratic(PROCESS, 700, final="t_min")
    steps, tableau = phase_space.sampler(network(PROCESS), times, method=method)
    z_T = PROCESS.prior_sample(jax.random.key(0), (2000, 4, 2))
    z = np.asarray(ds.sample(steps, tableau, z_T, key=jax.random.key(1))).reshape(-1, 2)
    mean, cov = moments(PROCESS, float(times[-1]))
    np.testing.assert_allclose(z.mean(0), mean, rtol=0, atol=0.03)
    np.testing.assert_allclose(np.diag(np.cov(z.T)), np.diag(cov), rtol=0.06)  # 4 errors


def test_bad_input():
    score_fn = network(PROCESS)
    for call, message in (
        (lambda: phase_space.sampler(score_fn, [1.0, 0.0]), r"`times` must lie in \(0, 1\]"),
        (
            lambda: phase_space.sampler(score_fn, [1.0, 0.1], method="oba"),
            "`method` must be one of",
        ),
        (lambda: phase_space.psld(gamma=5.0), "0 <= gamma < nu"),
        (lambda: PROCESS.prior_sample(jax.random.key(0), (4, 3)), "the parts on the last axis"),
        (
            lambda: phase_space.sampler(
                ds.targets.gaussian([0.0], 1.0).score_fn(ds.processes.vp_linear()), [1.0, 0.1]
            ),
            r"take a ScoreFn with a phase_space.psld\(\) process",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    steps, tableau = phase_space.sampler(score_fn, [1.0, 0.5, 0.1])
    short = ds.Tableau(
        **{
            k: getattr(tableau, k)[: 1 if k not in ("times", "alpha", "sigma") else 2]
            for k in ("times", "alpha", "sigma", "target", "a", "b", "c", "evaluates")
        }
    )
    with pytest.raises(ValueError, match="made for 4 rows; the tableau has 1"):
        ds.sample(steps, short, jnp.zeros((1, 2)))
    # what would read the steps as a data prediction
    with pytest.raises(ValueError, match="are no prediction of data"):
        ds.parallel.sample_parallel(steps, tableau, jnp.zeros((1, 2)))
    clipped = ds.guidance.static_thresholding(steps)
    with pytest.raises(ValueError, match="are no prediction of data"):
        ds.sample(clipped, tableau, jnp.zeros((1, 2)))


# -- any linear diffusion -------------------------------------------------------------------------

F3 = np.array([[-0.3, 1.0, 0.0], [-1.0, -2.5, 0.5], [0.0, -0.5, -3.0]])
START3 = np.diag([0.0, 0.2, 0.3])
NOISE3 = np.diag([0.3, 0.2, 2.8])


def third(matrix=F3):
    return phase_space.linear(matrix, NOISE3, start=START3, beta=(1.0, 4.0))


def test_linear_with_pslds_matrices_is_psld():
    F, GG = drift_and_spread(PROCESS)
    start = np.diag([0.0, PROCESS.kappa * PROCESS.mass])
    made = phase_space.linear(F, np.linalg.cholesky(GG), start=start)
    times = np.array([1e-3, 0.1, 0.5, 1.0])
    for name in ("alpha", "sigma", "alpha_dot", "sigma_dot", "log_snr"):
        found, right = (getattr(p, name)(times) for p in (made, PROCESS))
        np.testing.assert_allclose(found, right, rtol=1e-9, err_msg=name)
    for t in times:
        np.testing.assert_allclose(made.spread(t), PROCESS.spread(t), atol=1e-12)
        np.testing.assert_allclose(made.transition(0.4, t), PROCESS.transition(0.4, t), atol=1e-10)
    grid = np.linspace(1, 0.02, 6)
    for method in (*NFE, "euler_maruyama"):
        ours, theirs = (
            phase_space.sampler(network(p) if p is PROCESS else plain(p), grid, method=method)
            for p in (made, PROCESS)
        )
        for key in ("on_state", "on_noise", "basis"):
            a, b = (getattr(made.network, key) for made in (ours, theirs))
            assert (a is None) == (b is None)
            if a is not None:
                np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match=r"'sscs' is made for phase_space.psld"):
        phase_space.sampler(plain(made), grid, method="sscs")


def plain(process):
    return ds.ScoreFn(lambda p, z, t: z, None, process, prediction="noise")


def test_moments_of_three_parts_with_a_rate_that_grows():
    def rhs(t, y, F=F3):
        rate, mean, cov = 1.0 + 3.0 * t, y[:9].reshape(3, 3), y[9:].reshape(3, 3)
        change = F @ cov + cov @ F.T + NOISE3 @ NOISE3.T
        return rate * np.concatenate([(F @ mean).ravel(), change.ravel()])

    times = np.array([0.002, 0.1, 0.6, 1.0])
    start = np.concatenate([np.eye(3).ravel(), START3.ravel()])
    exact = solve_ivp(rhs, (0, 1), start, t_eval=times, rtol=1e-12, atol=1e-14).y
    process = third()
    mean, cov = process.moments(times)
    np.testing.assert_allclose(mean.reshape(4, 9).T, exact[:9], atol=1e-10)
    np.testing.assert_allclose(cov.reshape(4, 9).T, exact[9:], atol=1e-10)
    wrong = third(F3 * np.where(F3 == 0.5, 1.02, 1)).moments(times)[1].reshape(4, 9).T
    assert np.abs(wrong - exact[9:]).max() > 1e-4
    on_device = jax.jit(lambda p, t: p.moments(t)[1])(process, jnp.asarray(times, jnp.float32))
    np.testing.assert_allclose(on_device, cov, atol=3e-5)
    h = 1e-6
    for value, slope in ((process.alpha, process.alpha_dot), (process.sigma, process.sigma_dot)):
        numeric = (value(times[:-1] + h) - value(times[:-1] - h)) / (2 * h)
        np.testing.assert_allclose(slope(times[:-1]), numeric, rtol=1e-5)
    np.testing.assert_allclose(process.time(process.log_snr(times)), times, rtol=1e-9)
    z = process.prior_sample(jax.random.key(0), (20000, 3))
    np.testing.assert_allclose(np.cov(np.asarray(z).T), process.spread(1.0), atol=0.05)


def of_gaussian(process):
    """eps = -L^T score for data N(MEAN, VARIANCE), of any number of parts."""

    def apply(params, z, t):
        mean, cov = process.moments(t[0])  # the same for all
        first = mean[:, 0]
        total = cov + VARIANCE * jnp.outer(first, first)
        away = z - MEAN * first[None]
        return (jnp.linalg.cholesky(cov).T @ jnp.linalg.solve(total, away.T)).T

    return ds.ScoreFn(apply, None, process, prediction="noise")


@pytest.mark.usefixtures("x64")
def test_three_parts_with_a_constant_noise_prediction():
    """One conjugate step of any length is the ODE's solution, Euler's is its tangent."""
    process, eps, z_T = third(), np.array([0.4, -1.1, 0.7]), np.array([0.8, -0.5, 0.3])

    def rhs(t, z):
        root = np.linalg.cholesky(process.spread(t))
        push = NOISE3 @ NOISE3.T @ np.linalg.inv(root).T @ eps / 2
        return (1 + 3 * t) * (F3 @ z + push)

    exact = solve_ivp(rhs, (1, 0.4), z_T, rtol=1e-9, atol=1e-11).y[:, -1]
    score_fn = ds.ScoreFn(
        lambda p, z, t: jnp.broadcast_to(eps, z.shape), None, process, prediction="noise"
    )
    for method, expected in (("conjugate", exact), ("euler", z_T - 0.6 * rhs(1.0, z_T))):
        steps, tableau = phase_space.sampler(score_fn, [1.0, 0.4], method=method)
        got = ds.sample(steps, tableau, jnp.asarray(z_T)[None])[0]
        np.testing.assert_allclose(got, expected, atol=1e-7, err_msg=method)


@pytest.mark.long
def test_the_sde_of_three_parts_has_the_datas_moments():
    process = third()
    grid = np.append(np.linspace(1, 0.1, 100) ** 1.5, 0.01)
    steps, tableau = phase_space.sampler(of_gaussian(process), grid, method="euler_maruyama")
    noise = process.prior_sample(jax.random.key(0), (4000, 3))
    late = process.moments(np.float64(1.0))[0][:, 0]
    data = MEAN + VARIANCE**0.5 * np.random.default_rng(0).normal(size=(4000, 1))
    z_T = noise + jnp.asarray(data * late, jnp.float32)
    x = np.asarray(ds.sample(steps, tableau, z_T, key=jax.random.key(1)))[:, 0]
    mean, cov = process.moments(np.float64(grid[-1]))
    assert x.mean() == pytest.approx(MEAN * mean[0, 0], abs=0.05)
    assert x.var() == pytest.approx(VARIANCE * mean[0, 0] ** 2 + cov[0, 0], rel=0.12)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((np.eye(2)[:1], np.eye(2)), {}, r"`matrix` must be \(k, k\)"),
        ((F3, NOISE3), {"start": np.eye(3)}, "0 in the row and column of the data"),
        ((F3, NOISE3), {"beta": (0.0, 1.0)}, "`beta` must be two positive numbers"),
        (([[0.0, 5.0], [-5.0, -0.1]], np.diag([0.0, 1.0])), {}, "An underdamped process swings"),
    ],
)
def test_bad_linear_processes(arguments, options, words):
    with pytest.raises(ValueError, match=words):
        phase_space.linear(*arguments, **options)
