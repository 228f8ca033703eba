"""Stochastic samplers against the authors' code: their loops in NumPy, float64, on given noises."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import gaussian_moments, skewed_mixture, twin
from scipy.integrate import quad

import diffsamp as ds
from diffsamp import schedules, solvers

VP, EDM = ds.processes.vp_linear(), ds.processes.edm()
X = np.linspace(-2, 2, 7)[:, None]
NOISES = np.random.default_rng(0).standard_normal((200, 7, 1))


def perfect(process, x, t):
    """(data, noise) of the perfect network for the skewed mixture."""
    return skewed_mixture().posterior(x, float(process.alpha(t)), float(process.sigma(t)))


def run(tableau, x=X):
    return twin(tableau, skewed_mixture().posterior, x, noises=NOISES)


# -- EDM's churn -----------------------------------------------------------------------------------


@pytest.mark.parametrize("s_max", [np.inf, 50.0])
def test_churn_in_every_row_that_edm_churns(s_max):
    """Algorithm 2 at S_max = inf: the first row goes above sigma_max."""
    for process, (s_churn, s_min, s_noise) in itertools.product(
        (EDM, ds.processes.ve()), ((10.0, 0.05, 1.003), (80.0, 0.0, 1.007))
    ):
        times = schedules.karras(process, 18)
        sigma = np.append(process.sigma(times[:-1]), 0.0)
        x = start = X * float(process.prior_std)
        drawn, noisy = iter(NOISES), 0
        for s, t in itertools.pairwise(sigma):
            gamma = min(s_churn / 18, np.sqrt(2) - 1) if s_min <= s <= s_max else 0.0
            hat = s * (1 + gamma)
            if gamma:
                x, noisy = x + np.sqrt(hat**2 - s**2) * s_noise * next(drawn), noisy + 1
            _, d = skewed_mixture().posterior(x, 1.0, hat)
            end = x + (t - hat) * d
            if t > 0:
                end = x + (t - hat) / 2 * (d + skewed_mixture().posterior(end, 1.0, t)[1])
            x = end
        tableau = solvers.heun(
            process, times, churn=s_churn, churn_min=s_min, churn_max=s_max, noise_scale=s_noise
        )
        assert np.sum(tableau.c > 0) == noisy
        assert (noisy == 18) == (s_min == 0 and s_max == np.inf)
        assert (tableau.times[1] > process.t_max) == (s_max == np.inf)
        np.testing.assert_allclose(run(tableau, start), x, rtol=1e-9, atol=1e-9)
    got = ds.sample(
        skewed_mixture().score_fn(process), tableau, np.float32(start), key=jax.random.key(0)
    )
    assert np.all(np.isfinite(got))


def test_churn_of_a_table_stays_on_it():
    process = ds.processes.vp_discrete()
    tableau = solvers.euler(process, schedules.karras(process, 12), churn=30.0)
    assert np.sum(tableau.c > 0) == 11
    assert tableau.times.max() == process.t_max


# -- SA-Solver -------------------------------------------------------------------------------------


def stochastic_adams(nodes, start, end, tau, rescale):
    """int (1 + tau^2) exp((1 + tau^2) lam) l_j(lam) d lam, by their antiderivatives of powers."""
    rate = 1 + tau**2

    def integral(power):  # of exp(rate lam) lam^power, by parts
        def at(lam):
            total, factor = 0.0, 1.0
            for k in range(power + 1):
                total += factor * lam ** (power - k) / rate ** (k + 1)
                factor *= -(power - k)
            return np.exp(rate * lam) * total

        return at(end) - at(start)

    weights = []
    for j, node in enumerate(nodes):
        others = np.delete(nodes, j)
        powers = np.atleast_1d(np.poly(others))[::-1] / np.prod(node - others)
        weights.append(sum(c * integral(k) for k, c in enumerate(powers)))
    if rescale and len(nodes) == 2:
        h = end - start
        change = np.exp(rate * end) * (h**2 / 2 - (h * rate - 1 + np.exp(-rate * h)) / rate**2)
        change /= nodes[0] - nodes[1]
        weights = [weights[0] + change, weights[1] - change]
    return rate * np.array(weights)


def sa_as_published(process, x, times, p, c, tau, mode, few_steps):
    """Their loop: predict, evaluate, correct from the stored state with the same noise."""
    lam, steps = process.log_snr(times), len(times) - 1
    sigma = process.sigma(times)
    outputs, drawn, count = [perfect(process, x, times[0])[0]], iter(NOISES), 1
    for n in range(1, steps + 1):
        last = n == steps
        strength = 0.0 if last and few_steps else tau(times[n])
        h = lam[n] - lam[n - 1]
        noise = next(drawn) if strength else 0.0
        fixed = np.exp(-(strength**2) * h) * sigma[n] / sigma[n - 1] * x
        fixed = fixed + sigma[n] * np.sqrt(1 - np.exp(-2 * strength**2 * h)) * noise

        def update(indices, n=n, strength=strength, fixed=fixed):
            weights = stochastic_adams(lam[indices], lam[n - 1], lam[n], strength, few_steps)
            scale = sigma[n] * np.exp(-(strength**2) * lam[n])
            return fixed + scale * sum(
                w * outputs[i] for w, i in zip(weights, indices, strict=True)
            )

        used = min(p, n, steps - n + 1)
        predicted = update(list(range(n - 1, n - 1 - used, -1)))
        if last:
            return predicted, count
        outputs.append(perfect(process, predicted, times[n])[0])
        count += 1
        x = predicted
        if c:
            used = min(c, n + 1, steps - n + 2)
            x = update(list(range(n, n - used, -1)))
        if mode == "PECE":
            outputs[-1] = perfect(process, x, times[n])[0]
            count += 1
    raise AssertionError


@pytest.mark.parametrize("few_steps", [True, False])
@pytest.mark.parametrize("mode", ["PEC", "PECE"])
def test_sa_solver_in_the_authors_modes(mode, few_steps):
    for process, (p, c), noisy in itertools.product(
        (VP, EDM), ((1, 1), (1, 2), (2, 2), (2, 3), (3, 4), (3, 2), (2, 4)), (False, True)
    ):

        def tau(t, process=process, noisy=noisy):
            return 0.8 * (noisy and t > process.t_min * 3)

        times = schedules.logsnr(process, 7, final="t_min")
        x = X * float(process.prior_std)
        want, count = sa_as_published(process, x, times, p, c, tau, mode, few_steps)

        def own(t, tau=tau, end=times[-1]):  # their few-step mode ends without noise
            return 0.0 if few_steps and t == end else tau(t)

        tableau = solvers.sa_solver(
            process, times, order=p, corrector=c, tau=own, mode=mode, rescale=few_steps
        )
        assert tableau.nfe == count == (7 if mode == "PEC" else 13)
        np.testing.assert_allclose(run(tableau, x), want, rtol=1e-8, atol=1e-8)


def test_sa_solvers_rescaling_is_of_second_order():
    """The rescaling changes a step by O(h^3), and so a run by O(h^2)."""
    gaps = []
    for n in (5, 160, 320):
        times = schedules.logsnr(VP, n, final="t_min")
        both = [
            solvers.sa_solver(VP, times, order=2, corrector=2, tau=0.0, rescale=few)
            for few in (True, False)
        ]
        gaps.append(np.abs(run(both[0]) - run(both[1])).max())
    assert gaps[0] > 0.01
    assert 1.8 < np.log2(gaps[1] / gaps[2]) < 2.3


# -- SEEDS -----------------------------------------------------------------------------------------


def seeds_as_published(process, x, times, order, nodes, form):
    """The paper's stages; their noises drawn jointly, by the covariance of the SDE's own path."""
    drawn = iter(NOISES)

    def scales(lam):
        t = process.time(lam)
        return (process.alpha(t), process.sigma(t), t)

    for lam_s, lam_t in itertools.pairwise(process.log_snr(times)):
        h, (alpha_s, sigma_s, s) = lam_t - lam_s, scales(lam_s)
        grid = np.array([*nodes, 1.0]) * h
        low, high = np.minimum.outer(grid, grid), np.maximum.outer(grid, grid)
        if form == "noise":  # of int sqrt(2) exp(h' - u) dW, and int sqrt(2) exp(-(h' - u)) dW
            joint = np.exp(low + high) * (1 - np.exp(-2 * low))
        else:
            joint = np.exp(low - high) * (1 - np.exp(-2 * low))
        factor = np.linalg.cholesky(joint)
        z = [next(drawn) for _ in grid]
        said = [perfect(process, x, s)[form == "noise"]]
        for i, part in enumerate(grid):
            alpha, sigma, t = scales(lam_s + part)
            rate = -1 if form == "noise" else 2  # phi_1, phi_2 at -h, twice, and at 2 h
            phi_1, phi_2 = -np.expm1(-rate * part), 1 + np.expm1(-rate * part) / (rate * part)
            if form == "noise":
                u, weight = alpha / alpha_s * x, 2 * sigma
            else:
                u, weight = sigma / sigma_s * np.exp(-part) * x, alpha
            u = u + weight * phi_1 * said[0]
            if i == 1 and order == 2:
                u = u + weight * phi_1 / (2 * nodes[0]) * (said[1] - said[0])
            elif i:
                u = u + weight * phi_2 * (part / h) / nodes[i - 1] * (said[i] - said[0])
            u = u + sigma * sum(f * zk for f, zk in zip(factor[i], z, strict=True))
            if i < len(nodes):
                said.append(perfect(process, u, t)[form == "noise"])
        x = u
    return x


@pytest.mark.parametrize("form", ["data", "noise"])
def test_seeds_in_both_forms(form):
    for process, order in itertools.product((VP, EDM), (1, 2, 3)):
        times = schedules.logsnr(process, 6, final="t_min")
        x = X * float(process.prior_std)
        for nodes in {(), (0.5,), (1 / 3,), (1 / 3, 2 / 3), (0.2, 0.7)}:
            if len(nodes) == order - 1:
                want = seeds_as_published(process, x, times, order, nodes, form)
                tableau = solvers.seeds(process, times, order=order, nodes=nodes, prediction=form)
                assert tableau.nfe == 6 * order
                scale = np.abs(want).max()
                np.testing.assert_allclose(run(tableau, x), want, rtol=0, atol=1e-8 * scale)


def test_seeds_1_of_the_noise_is_published():
    """x_t = alpha_t/alpha_s x - 2 sigma_t (e^h - 1) E - sigma_t sqrt(e^2h - 1) z."""
    times = schedules.logsnr(VP, 6, final="t_min")
    x, lam, drawn = X, VP.log_snr(times), iter(NOISES)
    for n in range(6):
        h, sigma = lam[n + 1] - lam[n], VP.sigma(times[n + 1])
        x = (
            VP.alpha(times[n + 1]) / VP.alpha(times[n]) * x
            - 2 * sigma * np.expm1(h) * (perfect(VP, x, times[n])[1])
        )
        x = x + sigma * np.sqrt(np.expm1(2 * h)) * next(drawn)
    np.testing.assert_allclose(run(solvers.seeds(VP, times, order=1, prediction="noise")), x)


def test_seeds_noise_form_converges():
    """The variance on Gaussian data, at least at order 1 for SEEDS-1, 2 for the others."""
    for order, slope in ((1, 1), (2, 2), (3, 2)):
        errors = []
        for n in (80, 160):
            times = schedules.logsnr(VP, n, final="t_min")
            made = solvers.seeds(VP, times, order=order, prediction="noise")
            alpha, sigma = VP.alpha(times[-1]), VP.sigma(times[-1])
            errors.append(abs(gaussian_moments(made, 0.5, 0.2)[1] - (alpha**2 * 0.2 + sigma**2)))
        assert np.log2(errors[0] / errors[1]) > slope - 0.3, (order, errors)


# -- ER-SDE ----------------------------------------------------------------------------------------

SCALES = {
    "ode": lambda x: x,
    "sde": lambda x: x**2,
    "sde_1": lambda x: x * (np.exp(x**-1 / -1) + 10),
    "sde_2": lambda x: x**1.5,
    "sde_3": lambda x: x**2.5,
    "sde_4": lambda x: x**0.9 * np.log10(1 + 100 * x**1.5),
    "er_sde": lambda x: x * (np.exp(x**0.3) + 10),
}


@pytest.mark.parametrize("scale", SCALES)
def test_er_sde_with_the_authors_scales(scale):
    phi = SCALES[scale]
    for process, order in itertools.product((VP, EDM), (1, 2, 3)):
        times = schedules.karras(process, 7, final="t_min")
        alpha, rho = process.alpha(times), process.sigma(times) / process.alpha(times)
        x = start = X * float(process.prior_std)
        said, slopes, drawn = [], [], iter(NOISES)
        for n in range(7):
            said.append(perfect(process, x, times[n])[0])
            kept = phi(rho[n + 1]) / phi(rho[n])
            new = alpha[n + 1] * (kept * x / alpha[n] + (1 - kept) * said[-1])
            whole = quad(lambda r: 1 / phi(r), rho[n + 1], rho[n], epsrel=1e-11)[0]
            if order >= 2 and n >= 1:
                slopes.append((said[-1] - said[-2]) / (rho[n] - rho[n - 1]))
                weight = rho[n + 1] - rho[n] + phi(rho[n + 1]) * whole
                new = new + alpha[n + 1] * weight * slopes[-1]
            if order == 3 and n >= 2:
                bend = 2 * (slopes[-1] - slopes[-2]) / (rho[n] - rho[n - 2])
                first = quad(
                    lambda r, s=rho[n]: (r - s) / phi(r), rho[n + 1], rho[n], epsrel=1e-11
                )[0]
                weight = (rho[n + 1] - rho[n]) ** 2 / 2 + phi(rho[n + 1]) * first
                new = new + alpha[n + 1] * weight * bend
            variance = rho[n + 1] ** 2 - (rho[n] * kept) ** 2
            if scale != "ode":
                new = new + alpha[n + 1] * np.sqrt(variance) * next(drawn)
            x = new
        tableau = solvers.er_sde(process, times, order=order, scale=scale)
        np.testing.assert_allclose(run(tableau, start), x, rtol=0, atol=2e-6)
        own = solvers.er_sde(process, times, order=order, scale=phi)
        np.testing.assert_allclose(own.b, tableau.b, rtol=1e-12)


def test_er_sde_keeps_the_noise_that_the_authors_code_drops():
    """Below rho = 0.001 their variance is cut to 0; a scale that falls is refused."""
    process = ds.processes.edm(sigma_min=1e-4)
    times = schedules.karras(process, 6, final="t_min")
    times[-2:] = 8e-4, 4e-4
    assert 0 < solvers.er_sde(process, times).c[-1] < 1e-3
    with pytest.raises(ValueError, match="noise of negative variance"):
        solvers.er_sde(EDM, schedules.karras(EDM, 6), scale=lambda rho: rho**0.5)


# -- EDM's ablation: Heun in the time of the VP process --------------------------------------------


@pytest.mark.parametrize("churn", [0.0, 20.0])
def test_heun_in_vp_time_is_edms_ablation(churn):
    """Their sampler with discretization, schedule and scaling "vp", beta_d 19.9, beta_min 0.1."""
    n = 12

    def sigma(t):
        return np.sqrt(np.expm1(19.9 / 2 * t**2 + 0.1 * t))

    def sigma_dot(t):
        return 0.5 * (0.1 + 19.9 * t) * (sigma(t) + 1 / sigma(t))

    def inverse(v):
        return (np.sqrt(0.1**2 + 2 * 19.9 * np.log1p(v**2)) - 0.1) / 19.9

    def s(t):
        return 1 / np.sqrt(1 + sigma(t) ** 2)

    def slope(x, t):
        data = skewed_mixture().posterior(x, s(t), s(t) * sigma(t))[0]
        s_dot = -sigma(t) * sigma_dot(t) * s(t) ** 3
        return (sigma_dot(t) / sigma(t) + s_dot / s(t)) * x - sigma_dot(t) * s(t) / sigma(t) * data

    times = np.append(np.linspace(1, 1e-3, n - 1), 0.0)
    x, drawn, steps = X, iter(NOISES), len(times) - 1
    for t, after in itertools.pairwise(times):
        gamma = min(churn / steps, np.sqrt(2) - 1)
        hat = inverse(sigma(t) * (1 + gamma)) if gamma else t
        if gamma:
            x = s(hat) / s(t) * x + np.sqrt(sigma(hat) ** 2 - sigma(t) ** 2) * s(hat) * next(drawn)
        d = slope(x, hat)
        end = x + (after - hat) * d
        x = end if after == 0 else x + (after - hat) / 2 * (d + slope(end, after))
    tableau = solvers.heun(VP, times, coordinates="time", churn=churn)
    assert tableau.nfe == 2 * steps - 1
    np.testing.assert_allclose(run(tableau), x, rtol=1e-8, atol=1e-8)


def test_time_coordinates_of_flow_models_are_their_own():
    """There alpha + sigma is 1 and t is sigma, so they are "flow"; elsewhere of the named order."""
    flow = ds.processes.flow()
    times = schedules.uniform(flow, 6)
    for method in ("heun2", "rk4"):
        one, two = (
            run(solvers.runge_kutta(flow, times, method=method, coordinates=c, clean_end="euler"))
            for c in ("time", "flow")
        )
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-12)
    truth = skewed_mixture().ode_solution(X, VP, 0.8, 0.05)
    for method, order in (("heun2", 2), ("rk4", 4)):
        errors = [
            np.abs(
                run(
                    solvers.runge_kutta(
                        VP, np.linspace(0.8, 0.05, n + 1), method=method, coordinates="time"
                    )
                )
                - truth
            ).max()
            for n in (80, 160)
        ]
        assert order - 0.3 < np.log2(errors[0] / errors[1]) < order + 0.5, (method, errors)


# -- rectified flow --------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_rectified_flow_asks_at_shifted_times():
    """Their loop: dt = 1 / N, the network asked at 999 (i / N (1 - eps) + eps)."""

    def net(params, x, label):
        return jnp.sin(label / 300.0)[:, None] * x - 0.3

    def apply(params, x, t):
        return net(params, x, 999 * t)

    eps, n = 1e-3, 5
    x = jnp.asarray(X)
    for i in range(n):
        t = jnp.full(7, i / n * (1 - eps) + eps)
        x = x + net(None, x, 999 * t) / n
    flow = ds.processes.flow()
    adapted = ds.reversed_flow_apply(apply, offset=eps)
    f = ds.ScoreFn(adapted, None, flow, prediction="velocity")
    got = ds.sample(f, solvers.euler(flow, schedules.uniform(flow, n)), jnp.asarray(X))
    np.testing.assert_allclose(got, x, rtol=0, atol=1e-12)
    plain = ds.ScoreFn(ds.reversed_flow_apply(apply), None, flow, prediction="velocity")
    other = ds.sample(plain, solvers.euler(flow, schedules.uniform(flow, n)), jnp.asarray(X))
    assert 1e-4 < np.abs(other - x).max() < 0.1
    with pytest.raises(ValueError, match=r"`offset` must lie in \[0, 1\)"):
        ds.reversed_flow_apply(apply, offset=1.0)
