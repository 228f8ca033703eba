"""Identities between solvers: two derivations of one method must give one set of numbers.

Tableaux in different predictions are compared in the canonical data form of `search.canonical`
(weights of every past data prediction), which is unique; 1e-12 in float64.
"""

import numpy as np
import pytest
from cases import all_processes

import diffsamp as ds
from diffsamp import schedules, solvers
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
        np.testing.assert_allclose(first[name], second[name], rtol=0, atol=atol, err_msg=name)


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
