"""Each later family against its published formula written out, or another solver."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import all_processes, gaussian_moments, skewed_mixture, twin
from scipy.integrate import quad

import diffsamp as ds
from diffsamp import schedules, solvers
from diffsamp.search import canonical
from diffsamp.solvers import ModelStatistics
from diffsamp.solvers._weights import adams_weights

VP, EDM, FLOW = ds.processes.vp_linear(), ds.processes.edm(), ds.processes.flow()
PROCESSES = {k: v for k, v in all_processes().items() if k not in ("flow", "vp_zero_snr")}
X = np.linspace(-2, 2, 7)[:, None]


def grid(process, n=9, final="t_min"):
    return schedules.logsnr(process, n, final=final)


def assert_same(one, two, atol=1e-11):
    np.testing.assert_array_equal(one.times, two.times)
    first, second = canonical(one), canonical(two)
    for name in ("log_snr", "weights", "sums", "state"):
        np.testing.assert_allclose(first[name], second[name], rtol=atol, atol=atol, err_msg=name)


def assert_same_arrays(one, two, rtol=1e-12):
    for key in ("times", "alpha", "sigma", "target", "a", "b", "c", "evaluates"):
        np.testing.assert_allclose(
            getattr(one, key), getattr(two, key), rtol=rtol, atol=1e-14, err_msg=key
        )


def noise_at(process, x, t):
    """The perfect noise prediction for the skewed mixture."""
    return skewed_mixture().posterior(x, process.alpha(t), process.sigma(t))[1]


# -- multistep ---------------------------------------------------------------------------------


def move(process, x, s, t, e):
    """PNDM's transfer: DDIM with the noise e."""
    ratio = process.alpha(t) / process.alpha(s)
    return ratio * x + (process.sigma(t) - ratio * process.sigma(s)) * e


@pytest.mark.parametrize("start", ["rk4", "heun"])
def test_pndm_as_published(start):
    times = np.linspace(0.98, 0.05, 9)
    tableau = solvers.pndm(VP, times, start=start)
    assert tableau.nfe == (8 + 9 if start == "rk4" else 8 + 1)
    x, old = X, []
    for n, (s, t) in enumerate(itertools.pairwise(times)):
        e_1 = noise_at(VP, x, s)
        if start == "heun" and n == 0:
            e = (e_1 + noise_at(VP, move(VP, x, s, t, e_1), t)) / 2
        elif start == "heun":
            e = (3 * e_1 - old[0]) / 2
        elif n < 3:
            m = (s + t) / 2
            e_2 = noise_at(VP, move(VP, x, s, m, e_1), m)
            e_3 = noise_at(VP, move(VP, x, s, m, e_2), m)
            e_4 = noise_at(VP, move(VP, x, s, t, e_3), t)
            e = (e_1 + 2 * e_2 + 2 * e_3 + e_4) / 6
        else:
            e = (55 * e_1 - 59 * old[0] + 37 * old[1] - 9 * old[2]) / 24
        x, old = move(VP, x, s, t, e), [e_1, *old]
    np.testing.assert_allclose(twin(tableau, skewed_mixture().posterior, X), x, atol=1e-12)


def test_pndm_budgets_and_refusals():
    pndm = solvers.get("pndm")
    assert [n for n in range(1, 17) if pndm.steps(n)] == [13, 14, 15, 16]
    assert pndm.steps(13) == 4
    assert solvers.get("s_pndm").steps(3) == 2
    with pytest.raises(ValueError, match=r"takes 3 steps and needs at least one after it; got 3"):
        solvers.pndm(VP, np.linspace(1, 0, 4))


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_accelerated_ddim_is_adams_in_abar(process):
    """The closed form against quadrature of the Lagrange polynomials in abar."""
    times = grid(process)
    # where alpha is smaller than that the same step is written in data predictions
    times = times[process.alpha(times) > 0.006]
    tableau = solvers.accelerated_ddim(process, times)
    lam = process.log_snr(times)
    for n in range(1, tableau.rows):
        nodes = 1 / (1 + np.exp(-2 * lam[[n, n - 1]]))
        weights = adams_weights(
            nodes,
            np.exp(-lam[n]),
            np.exp(-lam[n + 1]),
            lambda log_rho: 1 / (1 + np.exp(2 * log_rho)),
        )
        np.testing.assert_allclose(tableau.b[n], tableau.alpha[n + 1] * weights, rtol=1e-7)


def test_accelerated_ddim_keeps_its_order_to_the_clean_end():
    closed = solvers.accelerated_ddim(VP, grid(VP, final="clean"))
    assert closed.b[-1, 1] != 0
    assert np.isfinite(closed.b).all()


def test_high_orders_of_unipc():
    """Order p is exact for a data prediction that is a polynomial of degree p - 1 in log-SNR; the
    corrector for degree p."""
    times = VP.time(np.array([-3.0, -2.4, -1.5, -1.1, -0.2, 0.5, 1.6, 2.1]))
    lam = VP.log_snr(times)
    for order, corrector in itertools.product((5, 6), (False, True)):
        tableau = solvers.unipc(
            VP, times, order=order, corrector=corrector, lower_order_final=False
        )
        degree = order - 1

        def data_at(level, degree=degree):
            return (level / 3) ** degree

        u = [np.ones(1)]
        # from exact states, the last rows must be exact
        exact = [u[0]]
        for a, b in itertools.pairwise(lam):
            step = quad(lambda v, b=b: np.exp(v - b) * data_at(v), a, b, epsabs=1e-14)[0]
            sigma, alpha = VP.sigma(VP.time(np.array([a, b]))), VP.alpha(VP.time(b))
            exact.append(sigma[1] / sigma[0] * exact[-1] + alpha * step)
        outputs = [np.array([data_at(v)]) for v in lam[:-1]]
        n = tableau.rows - 1
        got = sum(tableau.a[n, i] * exact[n - i] for i in range(tableau.p))
        got = got + sum(tableau.b[n, j] * outputs[n - j] for j in range(min(tableau.q, n + 1)))
        np.testing.assert_allclose(got, exact[-1], rtol=1e-11)
        assert tableau.q == (order + 1 if corrector else order)


# -- exponential Runge-Kutta -----------------------------------------------------------------------


def test_res_with_two_stages_is_dpm_solver_plus_plus_2s_taylor():
    lam = np.linspace(-3, 2, 6)
    inner = np.sort(np.concatenate([lam, (lam[1:] + lam[:-1]) / 2]))
    one = solvers.exponential_rk(VP, VP.time(lam), stages=2)
    two = solvers.dpm_solver(VP, VP.time(inner), order=2, prediction="data", variant="taylor")
    np.testing.assert_allclose(one.times, two.times, rtol=1e-9)
    np.testing.assert_allclose(one.b, two.b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("c_2", "c_3"), [(0.5, 1.0), (0.4, 0.8)])
def test_res_with_three_stages_meets_its_order_conditions(c_2, c_3):
    """sum_i b_i (c_i h)^k = int e^{-(h - u)} u^k du for k = 0, 1, and the coupling of the stages'
    defects, sum_i b_i psi_i = 0 (Hochbruck & Ostermann; to leading order, here to 2 %)."""
    h, s = 0.02, VP.time(0.3)
    times = np.array([s, VP.time(0.3 + h)])
    tableau = solvers.exponential_rk(VP, times, stages=3, c_2=c_2, c_3=c_3)
    weights = tableau.b[2][::-1] / tableau.alpha[3]
    nodes = np.array([0.0, c_2, c_3]) * h

    def integral(end, k):
        return quad(lambda u: np.exp(u - end) * u**k, 0, end, epsabs=1e-16)[0]

    for k in range(2):
        np.testing.assert_allclose(weights @ nodes**k, integral(h, k), rtol=1e-8)
    stage = tableau.b[1, :2][::-1] / tableau.alpha[2]
    np.testing.assert_allclose(stage.sum(), integral(c_3 * h, 0), rtol=1e-8)
    psi_2, psi_3 = -integral(c_2 * h, 1), stage @ nodes[:2] - integral(c_3 * h, 1)
    assert abs(weights[1] * psi_2 + weights[2] * psi_3) < 0.02 * abs(weights[1] * psi_2)


def test_res_refuses_stages_outside_the_step():
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
        solvers.exponential_rk(VP, [0.5, 0.1], c_2=1.5)


# -- conjugate and accelerated ---------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_conjugate_ddim_without_rate_is_ddim(process):
    times = grid(process)
    assert_same(solvers.conjugate_ddim(process, times, rate=0.0), solvers.ddim(process, times))


def test_conjugate_ddim_as_published():
    """x_t = (A_s / A_t) (1 + rate dt) x_s + (dPhi / A_t) eps, A = e^{rate t} / alpha, by quad."""
    rate, times = 1.7, np.linspace(0.95, 0.1, 6)
    tableau = solvers.conjugate_ddim(VP, times, rate=rate)

    def factor(t):
        return np.exp(rate * t) / VP.alpha(t)

    def phi_dot(t):  # A g^2 / (2 sigma), with g^2 = beta for variance preserving
        beta = -2 * VP.alpha_dot(t) / VP.alpha(t)
        return 0.5 * factor(t) * beta / VP.sigma(t)

    for n, (s, t) in enumerate(itertools.pairwise(times)):
        kept = factor(s) / factor(t) * (1 + rate * (t - s))
        np.testing.assert_allclose(tableau.a[n, 0], kept, rtol=1e-12)
        np.testing.assert_allclose(tableau.b[n, 0], quad(phi_dot, s, t)[0] / factor(t), rtol=1e-9)


def test_accelerated_ddpm_has_a_third_order_defect():
    """One step from the exact marginal of Gaussian data: defect O(beta^3); DDPM's is O(beta^2)."""
    variance = 0.3

    def defect(make, beta):
        alphas = np.sqrt([0.5 * (1 - beta), 0.5])  # abar_s / abar_t = 1 - beta
        lam = np.log(alphas) - 0.5 * np.log1p(-(alphas**2))
        tableau = make(VP, VP.time(lam))
        got = gaussian_moments(tableau, 0.0, variance)[1]
        return abs(got - (tableau.alpha[-1] ** 2 * variance + tableau.sigma[-1] ** 2))

    for make, order in ((solvers.accelerated_ddpm, 3), (solvers.ddpm, 2)):
        slope = np.log2(defect(make, 0.02) / defect(make, 0.01))
        assert slope == pytest.approx(order, abs=0.1)


# -- stages with noise -----------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_one_stage_of_seeds_is_ddpm_and_no_noise_is_dpm2(process):
    times = grid(process)
    assert_same_arrays(solvers.seeds(process, times, order=1), solvers.ddpm(process, times), 1e-9)
    plain = solvers.dpm2(process, times)
    assert_same_arrays(solvers.dpm2_ancestral(process, times, eta=0.0), plain, 1e-9)


@pytest.mark.parametrize(("order", "nodes"), [(2, (0.5,)), (2, (0.3,)), (3, None), (3, (0.2, 0.7))])
def test_seeds_noise_is_one_path(order, nodes):
    """Covariances of the states at the stages and the end are those of the reverse SDE with x_0
    known, Cov = sigma_i sigma_j e^{-(h_j - h_i)} (1 - e^{-2 h_i}) from a fixed start."""
    tableau = solvers.seeds(VP, VP.time(np.array([-0.4, 0.7])), order=order, nodes=nodes)
    lam = VP.log_snr(tableau.times)
    *_, noise = tableau._propagate()
    fresh = noise[:, 1:] @ noise[:, 1:].T  # without the start's own noise
    for i, j in itertools.combinations_with_replacement(range(1, order + 1), 2):
        h_i, h_j = lam[i] - lam[0], lam[j] - lam[0]
        want = np.exp(-(h_j - h_i)) * -np.expm1(-2 * h_i) * tableau.sigma[i] * tableau.sigma[j]
        np.testing.assert_allclose(fresh[i, j], want, rtol=1e-9)
    # independent stages (DPM++ SDE) have no such path
    other = solvers.dpmpp_sde(VP, VP.time(np.array([-0.4, 0.7])))
    *_, noise = other._propagate()
    assert abs((noise[:, 1:] @ noise[:, 1:].T)[1, 2]) < 1e-12


def test_seeds_drift_for_a_linear_data_prediction():
    """D = log-SNR, whatever the state: the mean of the SDE is an integral. SEEDS-3 has it exactly,
    SEEDS-2, whose slope has half the total weight, to third order in h."""

    def error(order, h):
        lam = np.array([-0.4, -0.4 + h])
        tableau = solvers.seeds(VP, VP.time(lam), order=order)
        mean = tableau.unroll(prediction="data")[1][-1] @ VP.log_snr(tableau.times)[:-1]
        integral = quad(lambda v: 2 * np.exp(2 * (v - lam[1])) * v, *lam, epsabs=1e-14)[0]
        return abs(mean - tableau.alpha[-1] * integral)

    assert error(3, 1.1) < 1e-9
    assert np.log2(error(2, 0.1) / error(2, 0.05)) == pytest.approx(3, abs=0.1)
    with pytest.raises(ValueError, match="rising fractions"):
        solvers.seeds(VP, [0.5, 0.1], order=3, nodes=(0.7, 0.2))


# -- stochastic interpolants -----------------------------------------------------------------------


def test_interpolant_without_diffusion_is_euler_and_heun():
    for process in (VP, FLOW):
        times = np.linspace(0.95, 0.1, 8)
        one = solvers.interpolant(process, times, scale=0.0)
        assert_same(one, solvers.ddim(process, times))
        two = solvers.interpolant(process, times, method="heun", scale=0.0)
        posterior = skewed_mixture().posterior
        heun = solvers.heun(process, times, coordinates="flow")
        np.testing.assert_allclose(
            twin(two, posterior, X), twin(heun, posterior, X), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("diffusion", ["sigma", "constant", "decreasing", "increasing-decreasing"])
def test_interpolant_is_sits_sampler_on_flows(method, diffusion):
    """SiT runs its clock from noise (0) to data (1): x += dt (v + w s) + sqrt(2 w dt) z."""
    times, rng = np.linspace(0.96, 0.1, 5), np.random.default_rng(0)
    w = {
        "sigma": lambda c: 1 - c,
        "constant": lambda c: 1.0,
        "decreasing": lambda c: 0.25 * (np.cos(np.pi * c) + 1) ** 2,
        "increasing-decreasing": lambda c: np.sin(np.pi * c) ** 2,
    }[diffusion]
    target = skewed_mixture()

    def drift(x, clock):
        data, noise = target.posterior(x, clock, 1 - clock)
        return data - noise + w(clock) * -noise / (1 - clock)

    tableau = solvers.interpolant(FLOW, times, method=method, diffusion=diffusion)
    noises = rng.normal(size=(4, *X.shape))
    x = X
    for (s, t), z in zip(itertools.pairwise(1 - times), noises, strict=True):
        dt = t - s
        kick = np.sqrt(2 * w(s) * dt) * z
        if method == "euler":
            x = x + dt * drift(x, s) + kick
        else:
            x = x + kick
            first = drift(x, s)
            x = x + dt / 2 * (first + drift(x + dt * first, t))
    np.testing.assert_allclose(twin(tableau, target.posterior, X, noises=noises), x, atol=1e-12)


@pytest.mark.parametrize("diffusion", sorted(solvers.interpolant.__globals__["DIFFUSIONS"]))
def test_interpolant_marginals_do_not_depend_on_the_diffusion(diffusion):
    for process in (VP, FLOW):
        times = np.linspace(0.9, 0.1, 1601)
        tableau = solvers.interpolant(process, times, diffusion=diffusion)
        got = gaussian_moments(tableau, 0.4, 0.2)
        alpha, sigma = tableau.alpha[-1], tableau.sigma[-1]
        np.testing.assert_allclose(got, [alpha * 0.4, alpha**2 * 0.2 + sigma**2], rtol=5e-3)


def test_interpolant_refuses_a_negative_diffusion():
    with pytest.raises(ValueError, match="must be at least 0 and finite; got -1"):
        solvers.interpolant(FLOW, [0.9, 0.5], diffusion=lambda t: -1.0)
    with pytest.raises(ValueError, match="`diffusion` must be one of"):
        solvers.interpolant(FLOW, [0.9, 0.5], diffusion="no")


# -- consistency -----------------------------------------------------------------------------------


def test_multistep_consistency_as_published():
    """x <- f(x, tau), then + sqrt(tau'^2 - sigma_min^2) z; nothing after the last."""
    for indices, n in solvers.CONSISTENCY_INDICES.values():
        levels = schedules.karras(EDM, n - 1, final="t_min")
        times = levels[list(indices)]
        tableau = solvers.consistency(EDM, times)
        assert tableau.nfe == len(indices) - 1
        want = [np.sqrt(t**2 - 0.002**2) for t in times[1:-1]]
        np.testing.assert_allclose(tableau.c, [*want, 0.0], rtol=1e-12)
        np.testing.assert_array_equal(tableau.a, 0)
        np.testing.assert_array_equal(tableau.b, 1)
    with pytest.raises(ValueError, match="nor above an inner level"):
        solvers.consistency(EDM, [80.0, 0.001, 0.0])


# -- fitted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [2, 3])
def test_dc_solver_without_compensation_is_unipc(order):
    times = grid(VP)
    one = solvers.dc_solver(VP, times, ratios=np.ones(9), order=order)
    assert_same_arrays(one.pad(q=9), solvers.unipc(VP, times, order=order).pad(q=9), 1e-12)


def test_dc_solver_replaces_the_newest_output_by_the_parabola():
    """One row written out: ratio on step 2 of a predictor of order 1."""
    times = np.linspace(0.9, 0.2, 5)
    ratios = np.array([1, 1, 0.8, 1])
    tableau = solvers.dc_solver(
        VP, times, ratios=ratios, order=1, lower_order_final=False, correct_first=False
    )
    outputs = np.array([0.3, -0.5, 0.9])
    at = times[1] + 0.8 * (times[2] - times[1])
    moved = np.polyval(np.polyfit(times[:3], outputs, 2), at)
    plain = solvers.unipc(VP, times, order=1, lower_order_final=False)
    # the state after step 2, as a change against UniPC's
    change = (tableau.b[2, :3] - plain.pad(q=4).b[2, :3]) @ outputs[::-1]
    h = VP.log_snr(times[3]) - VP.log_snr(times[2])
    want = VP.alpha(times[3]) * -np.expm1(-h) * (moved - outputs[2])
    np.testing.assert_allclose(change, want, rtol=1e-10)
    with pytest.raises(ValueError, match="`ratios` must be 4 finite numbers"):
        solvers.dc_solver(VP, times, ratios=[1.0])


def statistics(l, s):  # noqa: E741
    return ModelStatistics([-20.0, 20.0], [l, l], [s, s])


def test_dpm_solver_v3_with_trivial_statistics_is_older_solvers():
    times = grid(VP)
    options = {"lower_order_final": False, "corrector": False}
    data = statistics(1.0, 0.0)
    assert_same(
        solvers.dpm_solver_v3(VP, times, statistics=data, order=2, **options),
        solvers.dpmpp(VP, times, order=2, variant="heun", lower_order_final=False),
    )
    same = solvers.dpm_solver_v3(VP, times, statistics=data, order=3, **options)
    unip = solvers.unipc(VP, times, order=3, **options)
    rows = slice(2, None)  # the start-up of UniP has its coefficient fixed at 1/2
    for key in ("weights", "sums", "state"):
        np.testing.assert_allclose(
            canonical(same)[key][rows], canonical(unip)[key][rows], atol=1e-11
        )
    noise = statistics(0.0, -1.0)
    assert_same(
        solvers.dpm_solver_v3(VP, times, statistics=noise, order=2, **options),
        solvers.deis(VP, times, order=1, variable="log_rho"),
        atol=1e-9,
    )


@pytest.mark.parametrize(
    ("order", "corrector"),
    [
        pytest.param(1, False, marks=pytest.mark.long),
        pytest.param(2, False, marks=pytest.mark.long),
        (3, False),
        pytest.param(2, True, marks=pytest.mark.long),
    ],
)
def test_dpm_solver_v3_converges_with_any_statistics(order, corrector):
    levels = np.linspace(-6, 6, 49)
    odd = ModelStatistics(levels, 0.5 + 0.3 * np.sin(levels), -0.3 + 0.2 * np.cos(levels))
    target, (start, end) = skewed_mixture(), (0.9, 0.2)
    x = X * float(np.hypot(VP.alpha(start), VP.sigma(start)))
    truth, errors = target.ode_solution(x, VP, start, end), []
    for n in (320, 640):  # coarser ones fall on either side of a zero of the error
        times = np.linspace(start, end, n + 1)
        tableau = solvers.dpm_solver_v3(
            VP, times, statistics=odd, order=order, corrector=corrector, lower_order_final=False
        )
        exact = [target.ode_solution(x, VP, start, times[k]) for k in (1, 2)][: order - 1]
        if corrector:
            exact = []
        errors.append(np.sqrt(np.mean((twin(tableau, target.posterior, x, exact) - truth) ** 2)))
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order + corrector, abs=0.25)


def test_dpm_solver_v3_per_element():
    """Element i of a tableau with axes of the data is the scalar one with its statistics."""
    levels = np.array([-8.0, 0.0, 8.0])
    l = np.array([[0.9, 0.4], [1.1, 0.7], [0.8, 0.2]])  # noqa: E741
    s = np.array([[0.1, -0.4], [0.0, -1.0], [0.2, 0.0]])
    times = grid(VP, 5)
    whole = solvers.dpm_solver_v3(
        VP, times, statistics=ModelStatistics(levels, l, s), corrector=True
    )
    assert whole.a.shape[2:] == (1, 2)
    for i in range(2):
        one = solvers.dpm_solver_v3(
            VP, times, statistics=ModelStatistics(levels, l[:, i], s[:, i]), corrector=True
        )
        np.testing.assert_allclose(whole.a[:, :, 0, i], one.a, rtol=1e-12)
        np.testing.assert_allclose(whole.b[:, :, 0, i], one.b, rtol=1e-12)
    network = skewed_mixture().score_fn(VP, "noise")
    x = ds.sample(network, one, jnp.asarray(X, jnp.float32))
    assert np.isfinite(np.asarray(x)).all()


def test_statistics_are_checked_and_saved(tmp_path):
    for bad, message in (
        (([0.0], [1.0], [1.0]), "at least two rising"),
        (([0.0, 1.0], [1.0], [1.0]), "one shape"),
        (([0.0, 1.0], [1.0, np.nan], [1.0, 1.0]), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            ModelStatistics(*bad)
    some = ModelStatistics([0.0, 1.0], [1.0, 0.5], [0.1, 0.2])
    some.save(tmp_path / "ems.npz")
    again = ModelStatistics.load(tmp_path / "ems.npz")
    np.testing.assert_array_equal(again.l, some.l)
    np.testing.assert_allclose(some.integral("l", -1.0, 2.0), 1 + 0.75 + 0.5)
    np.testing.assert_allclose(some.integral("l", 2.0, -1.0), -2.25)
    (tmp_path / "bad.npz").write_bytes(b"no")
    with pytest.raises(ValueError, match="holds no model statistics"):
        ModelStatistics.load(tmp_path / "bad.npz")


@pytest.mark.parametrize(
    ("method", "name", "width"),
    [
        ("ddim", "ddim", 2),
        ("guided", "ddim", 1),
        ("heun", "heun", 4),
        ("dpmpp", "dpmpp_2m", 2),
        ("dpm_solver", "dpm2", 4),
    ],
)
def test_iia_without_coefficients_is_its_solver(method, name, width):
    times = grid(VP, final="clean")
    zero = np.zeros((9, width))
    one = solvers.iia(VP, times, coefficients=zero, method=method)
    assert_same_arrays(one, solvers.get(name)(VP, times), 1e-9)
    with pytest.raises(ValueError, match="`coefficients` must be finite, of shape"):
        solvers.iia(VP, times, coefficients=zero[1:], method=method)


# -- encoding --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["ddim", "dpmpp_2m", "dpmpp_3m", "deis_tab2", "unipc2", "heun", "rho_rk4", "ghvb1.8"]
)
def test_deterministic_solvers_encode(name):
    """On rising times each solves the same ODE upwards: its error falls at its order."""
    target, errors = skewed_mixture(), []
    start, end = 0.2, 0.9
    truth = target.ode_solution(X, VP, start, end)
    for n in (160, 320):
        tableau = solvers.get(name)(VP, np.linspace(start, end, n + 1))
        errors.append(np.abs(twin(tableau, target.posterior, X) - truth).max())
    order = min(solvers.get(name).order, 2) if name not in ("rho_rk4",) else 4
    assert np.log2(errors[0] / errors[1]) > order - 0.3
    assert errors[1] < 0.02


def test_what_cannot_encode():
    rising = np.linspace(0.1, 0.9, 5)
    stochastic = [s for s in solvers.SOLVERS.values() if s.stochastic]
    for solver in stochastic:
        with pytest.raises(ValueError, match="adds noise, and so cannot encode"):
            solver(VP, rising)
    with pytest.raises(ValueError, match="cannot encode"):
        solvers.heun(VP, rising, churn=3.0)
    with pytest.raises(ValueError, match="where alpha = 0 and nothing is left"):
        solvers.ddim(FLOW, [0.1, 1.0])
    assert jax.tree.leaves(solvers.ddim(FLOW, [0.1, 0.9]))
