"""Identities between solvers: two derivations of one method must give one set of numbers.

Tableaux in different predictions are compared in the canonical data form of `search.canonical`
(weights of every past data prediction), which is unique; 1e-12 in float64.
"""

import jax
import numpy as np
import pytest
from cases import all_processes, skewed_mixture, twin

import diffsamp as ds
from diffsamp import schedules, solvers
from diffsamp.schedules.stages import step_orders
from diffsamp.search import canonical
from diffsamp.solvers._weights import adams_weights, exponential_weights

TIGHT = {"rtol": 0, "atol": 1e-12}
PROCESSES = {k: v for k, v in all_processes().items() if k not in ("flow", "vp_zero_snr")}


def grid(process, n=9, final="t_min"):
    return schedules.logsnr(process, n, final=final)


def assert_same(one, two, atol=1e-12):
    """Equal rows in canonical form."""
    np.testing.assert_array_equal(one.times, two.times)
    first, second = canonical(one), canonical(two)
    for name in ("log_snr", "weights", "sums", "state"):
        np.testing.assert_allclose(first[name], second[name], rtol=atol, atol=atol, err_msg=name)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("final", ["t_min", "clean"])
def test_first_order_methods_are_one(process, final):
    times = grid(process, final=final)
    ddim = solvers.ddim(process, times)
    for other in (
        solvers.dpmpp(process, times, order=1),
        solvers.deis(process, times, order=0, variable="t"),
        solvers.deis(process, times, order=0, variable="rho"),
        solvers.deis(process, times, order=0, variable="log_rho"),
        solvers.unipc(process, times, order=1, corrector=False),
        solvers.euler(process, times),
        solvers.ipndm(process, times, order=1),
    ):
        assert_same(ddim, other, atol=1e-11)


def test_ddim_and_first_order_dpmpp_are_the_same_arrays():
    process = ds.processes.vp_linear()
    times = grid(process)
    one, two = solvers.ddim(process, times), solvers.dpmpp(process, times, order=1)
    for key in ("times", "alpha", "sigma", "target", "a", "b", "c", "evaluates"):
        np.testing.assert_allclose(getattr(one, key), getattr(two, key), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_ddim_eta_one_is_the_ddpm_posterior(process):
    """x_t = N(mu(x_s, D), beta~): Bayes' rule for q(x_t | x_s, x_0 = D), written with variances."""
    times = grid(process)
    one, two = solvers.ddim(process, times, eta=1.0), solvers.ddpm(process, times)
    for key in ("a", "b", "c"):
        np.testing.assert_allclose(getattr(one, key), getattr(two, key), rtol=1e-9, atol=1e-12)
    for n in range(one.rows):
        alpha_s, alpha_t = one.alpha[n], one.alpha[n + 1]
        var_s, var_t = one.sigma[n] ** 2, one.sigma[n + 1] ** 2
        kept = alpha_s / alpha_t
        forward = var_s - kept**2 * var_t  # Var(x_s | x_t)
        precision = 1 / var_t + kept**2 / forward
        np.testing.assert_allclose(two.a[n, 0], kept / forward / precision, rtol=1e-9)
        np.testing.assert_allclose(two.b[n, 0], alpha_t / var_t / precision, rtol=1e-9)
        np.testing.assert_allclose(two.c[n] ** 2, 1 / precision, rtol=1e-9)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("lower", [True, False])
def test_unip_equals_dpmpp(process, lower):
    times = schedules.quadratic(process, 9, final="t_min")
    options = {"lower_order_final": lower}
    assert_same(
        solvers.unipc(process, times, order=2, corrector=False, **options),
        solvers.dpmpp(process, times, order=2, **options),
    )
    # UniP-3 starts with UniP-2, whose coefficient is fixed at 1/2 (bh2): 2M midpoint
    assert_same(
        solvers.unipc(process, times, order=3, corrector=False, **options),
        solvers.dpmpp(process, times, order=3, **options),
    )


def test_kappa_one_is_another_method():
    process = ds.processes.vp_linear()
    times = grid(process)
    right = solvers.dpmpp(process, times, order=3)
    wrong = solvers.dpmpp(process, times, order=3, compatible=True)
    assert np.abs(right.b - wrong.b).max() > 1e-3


def test_bh1_and_bh2_differ_only_in_the_fixed_halves():
    """With every order-2 predictor and order-1 corrector out of the way the two are one."""
    process = ds.processes.vp_linear()
    times = grid(process, 12)
    one = solvers.unipc(process, times, order=4, variant="bh1", lower_order_final=False)
    two = solvers.unipc(process, times, order=4, variant="bh2", lower_order_final=False)
    np.testing.assert_allclose(one.b[4:, :], two.b[4:, :], **TIGHT)
    assert np.abs(one.b[:3] - two.b[:3]).max() > 1e-4


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_log_rho_deis_is_dpm_solver_2m_in_noise_form(process):
    """The "taylor" form of the DPM-Solver paper, written out: slope weight (e^h - 1)/h - 1."""
    times = grid(process)
    # where alpha is smaller than that the same step is written in data predictions
    times = times[process.alpha(times) > 0.006]
    tableau = solvers.deis(process, times, order=1, variable="log_rho")
    lam = process.log_snr(times)
    for n in range(1, tableau.rows):
        h, back = lam[n + 1] - lam[n], lam[n] - lam[n - 1]
        slope = (np.expm1(h) / h - 1) * h / back
        sigma = tableau.sigma[n + 1]
        expected = [-sigma * (np.expm1(h) + slope), sigma * slope]
        np.testing.assert_allclose(tableau.b[n], expected, rtol=1e-10)


def test_rho_2heun_is_edm_heun():
    """Heun's method on d(x/alpha)/d rho = eps, written out for EDM: x' = x + (d + d') dt / 2."""
    process = ds.processes.edm()
    times = schedules.karras(process, 5)
    tableau = solvers.heun(process, times)
    assert tableau.nfe == 9
    for step in range(4):
        dt = times[step + 1] - times[step]
        np.testing.assert_allclose(tableau.a[2 * step], [1.0, 0.0])
        np.testing.assert_allclose(tableau.b[2 * step, 0], dt)
        np.testing.assert_allclose(tableau.a[2 * step + 1], [0.0, 1.0])
        np.testing.assert_allclose(tableau.b[2 * step + 1], [dt / 2, dt / 2])
    np.testing.assert_allclose(tableau.b[8, 0], -times[4])  # the last step is Euler's, to 0


def test_ipndm_is_deis_rho_on_a_uniform_grid():
    """Fixed Adams weights are the variable-step ones where sigma / alpha is uniform."""
    process = ds.processes.edm()
    times = np.linspace(50.0, 10.0, 9)
    assert_same(
        solvers.ipndm(process, times, order=4), solvers.deis(process, times, variable="rho")
    )


def test_zero_churn_is_deterministic_and_churn_keeps_the_variance():
    process = ds.processes.edm()
    times = schedules.karras(process, 8)
    plain = solvers.euler(process, times)
    assert not solvers.euler(process, times, churn=0.0).stochastic
    churned = solvers.euler(process, times, churn=10.0, churn_min=0.05, churn_max=50.0)
    assert churned.stochastic
    assert plain.nfe == churned.nfe == 8
    # sigma^2 + added^2 = sigma_hat^2: `Tableau.create` has checked it; a wrong noise fails there
    with pytest.raises(ValueError, match="not consistent"):
        ds.Tableau.create(
            **{k: getattr(churned, k) for k in ("times", "alpha", "sigma", "target", "a", "b")},
            c=churned.c * 1.01,
            evaluates=churned.evaluates,
        )


@pytest.mark.parametrize("rate", [1.0, 1.3, 2.0])
@pytest.mark.parametrize("h", [1e-4, 0.3, 2.0, 12.0])
def test_exponential_weights_integrate_polynomials(rate, h):
    """Against the moments of rate exp(-rate (h - u)) in mpmath-free closed form, by recursion."""
    nodes = [0.0, -0.7 * h, -1.9 * h, h]
    weights = exponential_weights(nodes, h, rate)
    moment, power = -np.expm1(-rate * h), 1.0
    for k in range(4):
        if k:
            power *= h
            # integration by parts; unstable for small rate h, where a series takes over
            moment = power - k / rate * moment
        if rate * h < 0.1 and k:
            terms = [
                (-rate * h) ** m * np.prod([1.0 / (k + 1 + i) for i in range(m + 1)])
                for m in range(12)
            ]
            moment = rate * h ** (k + 1) * np.sum(terms)
        got = weights @ np.array(nodes) ** k
        assert got == pytest.approx(moment, rel=1e-9, abs=1e-14 * h**k)


def test_adams_weights_integrate_polynomials():
    nodes = [3.0, 4.0, 6.5, 9.0]
    plain = adams_weights(nodes, 3.0, 1.0)
    for k in range(4):
        assert plain @ np.array(nodes) ** k == pytest.approx((1 - 3.0 ** (k + 1)) / (k + 1))
    # with v = log rho, int v d rho = rho (log rho - 1)
    logs = np.log(nodes)
    weights = adams_weights(logs, 3.0, 1.0, lambda log_rho: log_rho)
    assert weights.sum() == pytest.approx(-2.0, rel=1e-13)
    assert weights @ logs == pytest.approx(-1.0 - 3.0 * (np.log(3.0) - 1), rel=1e-12)


# -- families beyond the first ones ----------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_first_order_stochastic_methods_are_one(process):
    """DDPM's posterior = SDE-DPM-Solver++ 1 = SA(tau=1, order 1) = ER-SDE-1 with phi = rho^2."""
    times = grid(process)
    ddpm = solvers.ddpm(process, times)
    for other in (
        solvers.dpmpp(process, times, order=1, eta=1.0),
        solvers.sa_solver(process, times, order=1, corrector=False),
        solvers.er_sde(process, times, order=1, scale="sde"),
    ):
        for key in ("a", "b", "c"):
            np.testing.assert_allclose(
                getattr(other, key), getattr(ddpm, key), rtol=1e-9, atol=1e-12, err_msg=other.name
            )


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_stochastic_methods_without_noise_are_their_odes(process):
    times = grid(process)
    ddim = solvers.ddim(process, times)
    assert_same(ddim, solvers.er_sde(process, times, order=1, scale="ode"), atol=1e-11)
    assert_same(ddim, solvers.sa_solver(process, times, order=1, corrector=False, tau=0.0))
    assert_same(ddim, solvers.bdia(process, times, gamma=0.0), atol=1e-11)
    plain = solvers.dpmpp(process, times, order=3)
    assert_same(plain, solvers.dpmpp(process, times, order=3, eta=0.0))
    # with its systems all solved, SA's predictor-corrector at tau = 0 is UniPC's from order 3 on
    options = {"order": 4, "lower_order_final": False}
    one = solvers.sa_solver(process, times, tau=0.0, **options)
    two = solvers.unipc(process, times, **options)
    np.testing.assert_allclose(one.b[4:], two.b[4:], rtol=1e-9, atol=1e-11)


def test_runge_kutta_heun_is_heun():
    process = ds.processes.edm()
    times = schedules.karras(process, 6)
    one, two = solvers.heun(process, times), solvers.runge_kutta(process, times, method="heun2")
    for key in ("times", "a", "b"):
        np.testing.assert_array_equal(getattr(one, key), getattr(two, key))


def test_ghvb_without_momentum_is_adams_bashforth():
    process = ds.processes.vp_linear()
    times = grid(process)
    for order in (1, 2, 3, 4):
        fixed = solvers.ghvb(process, times, order=order, beta=1.0, variable_step=False)
        # the canonical form of a noise-form method is a sum of large terms: 1e-12 of them
        assert_same(fixed, solvers.ipndm(process, times, order=order), atol=1e-11)
        variable = solvers.ghvb(process, times, order=order, beta=1.0)
        assert_same(variable, solvers.deis(process, times, order=order - 1, variable="rho"), 1e-11)


def test_ghvb_has_the_papers_weights():
    """d for r = 2, 3, 4 on a uniform grid: (2+b, -(2-b))/2, (18+5b, -24+8b, 6-b)/12, .."""
    process = ds.processes.edm(0.5, 20.0)
    times = np.linspace(20.0, 2.0, 10)
    beta = 0.7
    published = {
        2: np.array([2 + beta, -(2 - beta)]) / 2,
        3: np.array([18 + 5 * beta, -24 + 8 * beta, 6 - beta]) / 12,
        4: np.array([46 + 9 * beta, -78 + 19 * beta, 42 - 5 * beta, -10 + beta]) / 24,
    }
    for order, want in published.items():
        tableau = solvers.ghvb(process, times, order=order, beta=beta)
        step = times[1] - times[0]
        np.testing.assert_allclose(tableau.b[6, :order] / step, want, rtol=1e-12)


def test_heavy_ball_against_its_velocity():
    """v_n = (1 - b) v_{n-1} + b P_n run as written, on DPM-Solver++ 2M's own directions."""
    process, beta = ds.processes.vp_linear(), 0.8
    times = grid(process, 8)
    base = solvers.dpmpp(process, times)
    posterior = skewed_mixture().posterior
    x = np.linspace(-1, 1, 5)[:, None]
    u, outputs, velocity = x, [], None
    for n in range(base.rows):
        outputs.insert(0, posterior(u, base.alpha[n], base.sigma[n])[0])
        ratio = base.sigma[n + 1] / base.sigma[n]
        kappa = base.alpha[n + 1] - base.alpha[n] * ratio
        direction = sum(b * m for b, m in zip(base.b[n], outputs, strict=False)) / kappa
        velocity = direction if velocity is None else (1 - beta) * velocity + beta * direction
        u = ratio * u + kappa * velocity
    got = twin(solvers.heavy_ball(base, beta=beta), posterior, x)
    np.testing.assert_allclose(got, u, rtol=0, atol=1e-12)
    same = solvers.heavy_ball(base, beta=1.0)
    np.testing.assert_array_equal(same.b, base.b)
    one = solvers.heavy_ball(solvers.ddim(process, times), beta=beta, prediction="noise")
    assert_same(one, solvers.ghvb(process, times, order=1, beta=beta), atol=1e-11)


def test_heavy_ball_refuses_what_it_cannot_do():
    process = ds.processes.vp_linear()
    times = grid(process, 4)
    for tableau in (solvers.heun(process, times), solvers.ddpm(process, times)):
        with pytest.raises(ValueError, match="heavy-ball momentum needs a deterministic tableau"):
            solvers.heavy_ball(tableau)
    with pytest.raises(ValueError, match=r"`beta` must lie in \(0, 1\]"):
        solvers.heavy_ball(solvers.ddim(process, times), beta=0.0)


@pytest.mark.parametrize("make", [solvers.bdia, solvers.belm], ids=["bdia", "belm"])
def test_two_step_methods_run_backwards_exactly(make):
    """50 steps down and back in float32, by solving each row for its oldest state."""
    process = ds.processes.vp_linear()
    tableau = make(process, np.linspace(0.98, 0.3, 51))
    posterior = skewed_mixture().posterior
    x = np.linspace(-2, 2, 9)[:, None].astype(np.float32)

    def noise(u, n):
        return posterior(u, tableau.alpha[n], tableau.sigma[n])[1].astype(np.float32)

    a, b = tableau.a.astype(np.float32), tableau.b.astype(np.float32)
    u = [x]
    for n in range(50):
        new = a[n, 0] * u[n] + b[n, 0] * noise(u[n], n)
        u.append(new + a[n, 1] * u[n - 1] if n else new)
    newer, now = u[50], u[49]
    for n in range(49, 0, -1):
        newer, now = now, (newer - a[n, 0] * now - b[n, 0] * noise(now, n)) / a[n, 1]
    np.testing.assert_allclose(now, x, rtol=0, atol=2e-5 if make is solvers.belm else 2e-6)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("closed", [True, False])
def test_single_step_orders_use_the_budget(order, closed):
    for n in range(1, 25):
        orders = step_orders(n, order, closed=closed)
        assert sum(orders) == n
        assert max(orders) <= order
        assert orders[-1] == 1 or not closed
    # the authors' examples
    assert step_orders(6, 3, closed=False) == [3, 2, 1]
    assert step_orders(7, 3, closed=False) == [3, 3, 1]
    assert step_orders(8, 3, closed=False) == [3, 3, 2]


def test_dpm_solver_plus_plus_2s_as_published():
    """With r = 1/2 the second output alone carries the step: exponential midpoint."""
    process = ds.processes.vp_linear()
    times = process.time(np.linspace(-2, 2, 5))
    tableau = solvers.dpm_solver(process, times, order=2, prediction="data")
    lam, sigma, alpha = process.log_snr(times), process.sigma(times), process.alpha(times)
    h = lam[2] - lam[0]
    np.testing.assert_allclose(tableau.a[0, 0], sigma[1] / sigma[0])
    np.testing.assert_allclose(tableau.b[0, 0], -alpha[1] * np.expm1(-h / 2))
    np.testing.assert_allclose(tableau.a[1], [0, sigma[2] / sigma[0]], atol=1e-14)
    np.testing.assert_allclose(tableau.b[1, 0], -alpha[2] * np.expm1(-h))


def test_restart():
    """No repeats is the solver itself; the published configurations cost what the paper says."""
    process = ds.processes.edm()
    times = schedules.karras(process, 18)
    plain = solvers.heun(process, times)
    for intervals in ([], [(3, 0, 0.14, 0.30)]):
        same = solvers.restart(process, times, intervals=intervals)
        for key in ("times", "a", "b", "c"):
            np.testing.assert_array_equal(getattr(same, key), getattr(plain, key))
    for name, (n, intervals) in solvers.RESTART_CONFIGURATIONS.items():
        grid_n = schedules.karras(process, n)
        tableau = solvers.restart(process, grid_n, intervals=intervals)
        assert tableau.nfe == int(name.split("-")[1])
        assert tableau.stochastic
        tableau.check()  # the noise lifts the variance to exactly the upper level
        silent = ~tableau.evaluates
        assert silent.sum() == sum(i.repeats for i in intervals)
        assert np.all(tableau.c[silent] > 0)
        assert np.all(tableau.b[silent] == 0)
    other = solvers.restart(
        ds.processes.vp_linear(),
        np.linspace(1, 0, 9),
        solver=solvers.dpmpp,
        intervals=[(4, 2, 0.5, 2.0)],
    )
    assert other.nfe == 8 + 2 * 3
    churned = solvers.restart(
        process, times, down=lambda p, t: solvers.heun(p, t, churn=0.05 * (len(t) - 1))
    )
    assert churned.nfe == 43
    assert np.sum(churned.c > 0) == 2 * (1 + 2)  # noise up, and at both steps down, twice
    with pytest.raises(ValueError, match="must lie within the grid, above its clean end"):
        solvers.restart(process, times, intervals=[(3, 1, 0.0, 0.3)])
    with pytest.raises(ValueError, match="must lie within the grid"):
        solvers.restart(process, times, intervals=[(3, 1, 0.1, 500.0)])


def test_restart_contracts_the_error_of_an_imperfect_network():
    """At equal evaluations, on a score that is off: nearer to the data than the ODE solver.

    The network is off by a shift at high noise only; the ODE carries that error to the end, the
    noise of Restart forgets part of it.
    """
    process, target = ds.processes.edm(0.02, 20.0), skewed_mixture()
    rng = np.random.default_rng(0)

    def posterior(x, alpha, sigma):
        data, _ = target.posterior(x, alpha, sigma)
        wrong = 0.25 * (sigma > 1.0)
        data = data + wrong
        return data, (x - alpha * data) / sigma

    def distance(tableau, n=20_000):
        start = target.sample(jax.random.key(1), n)
        x = np.asarray(start, np.float64) + 20.0 * rng.normal(size=(n, 1))
        rows = int(np.sum(tableau.c != 0))
        x = twin(tableau, posterior, x, noises=rng.normal(size=(rows, n, 1)))
        levels = np.linspace(0.005, 0.995, 199)
        truth = np.asarray(target.sample(jax.random.key(2), 200_000))
        return np.sqrt(np.mean((np.quantile(x, levels) - np.quantile(truth, levels)) ** 2))

    restarted = solvers.restart(
        process, schedules.karras(process, 12), intervals=[(5, 4, 0.3, 0.9)]
    )
    plain = solvers.heun(process, schedules.karras(process, (restarted.nfe + 1) // 2))
    assert plain.nfe == restarted.nfe
    assert distance(restarted) < 0.7 * distance(plain)
