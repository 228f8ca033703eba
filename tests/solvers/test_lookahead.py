"""PFDiff, F-DDIM, RX, STORK, gradient estimation, Dual-Solver, RBF-Solver and exponential methods.

Each against its authors' loop written out in NumPy, another solver, or a quadrature.
"""

import itertools

import numpy as np
import pytest
from cases import all_processes, skewed_mixture, twin
from scipy.integrate import quad

import diffsamp as ds
from diffsamp import schedules, solvers
from diffsamp.search import canonical
from diffsamp.solvers.etdrk import METHODS

VP, EDM, FLOW = ds.processes.vp_linear(), ds.processes.edm(), ds.processes.flow()
PROCESSES = {k: v for k, v in all_processes().items() if k not in ("flow", "vp_zero_snr")}
X = np.linspace(-2, 2, 7)[:, None]
FREE = {"lower_order_final": False}


def grid(process, n=9, final="t_min"):
    return schedules.logsnr(process, n, final=final)


def assert_same(one, two, atol=1e-11):
    np.testing.assert_array_equal(one.times, two.times)
    first, second = canonical(one), canonical(two)
    for name in ("log_snr", "weights", "sums", "state"):
        np.testing.assert_allclose(first[name], second[name], rtol=atol, atol=atol, err_msg=name)


def data_and_noise(process, x, t):
    return skewed_mixture().posterior(x, process.alpha(t), process.sigma(t))


def run(tableau, x=X):
    return twin(tableau, skewed_mixture().posterior, x)


def ddim(process, x, s, t, e):
    """DDIM's step with the noise e."""
    ratio = process.alpha(t) / process.alpha(s)
    return ratio * x + (process.sigma(t) - ratio * process.sigma(s)) * e


# -- where the network is asked ------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_gradient_estimation_contains_ddim_and_ipndm(process):
    times = grid(process)
    assert_same(solvers.gradient_estimation(process, times, gamma=1), solvers.ddim(process, times))
    half = solvers.gradient_estimation(process, times, gamma=1.5)
    assert_same(half, solvers.ipndm(process, times, order=2))


def test_gradient_estimation_as_published():
    """x <- x - (s - s') (2 e_n - e_{n-1}), in sigma with alpha = 1."""
    times, x, old = grid(EDM), 80 * X, None
    for s, t in itertools.pairwise(times):
        e = data_and_noise(EDM, x, s)[1]
        x, old = x - (s - t) * (e if old is None else 2 * e - old), e
    np.testing.assert_allclose(run(solvers.gradient_estimation(EDM, times), 80 * X), x, rtol=1e-10)
    with pytest.raises(ValueError, match="`gamma` must be finite"):
        solvers.gradient_estimation(EDM, times, gamma=np.nan)


@pytest.mark.parametrize(("skip", "ahead"), [(1, 1), (2, 1), (3, 2), (3, 3)])
def test_pfdiff_as_published(skip, ahead):
    """The authors' loop over a fine grid that is uniform in time."""
    steps = 5
    fine = np.linspace(0.98, 0.05, 2 + steps * (skip + 1))
    times = fine[[0, *range(1, len(fine), skip + 1)]]
    e = data_and_noise(VP, X, fine[0])[1]
    x = ddim(VP, X, fine[0], fine[1], e)
    for i in range(1, len(fine) - skip - 1, skip + 1):
        springboard = ddim(VP, x, fine[i], fine[i + ahead], e)
        e = data_and_noise(VP, springboard, fine[i + ahead])[1]
        x = ddim(VP, x, fine[i], fine[i + skip + 1], e)
    tableau = solvers.pfdiff(VP, times, skip=skip, ahead=ahead)
    assert tableau.nfe == steps + 1
    np.testing.assert_allclose(run(tableau), x, rtol=1e-10)
    other = solvers.pfdiff(VP, times, skip=skip + 1, ahead=ahead)
    assert np.abs(run(other) - x).max() > 1e-3


def test_pfdiff_is_not_asked_below_the_last_trained_level():
    times = schedules.logsnr(EDM, 6)
    tableau = solvers.pfdiff(EDM, times)
    assert min(tableau.times[:-1]) == EDM.t_min
    for bad in ({"skip": 0}, {"ahead": 2}):
        with pytest.raises(ValueError, match=r"`(skip|ahead)` must be"):
            solvers.pfdiff(EDM, times, **bad)


@pytest.mark.parametrize(
    ("process", "start", "end"), [(VP, 0.9, 0.2), (FLOW, 0.9, 0.2)], ids=["vp", "flow"]
)
def test_forward_ddim_errs_the_other_way(process, start, end):
    """The paper's claim: its error is minus DDIM's, so that their mean is of second order."""
    target = skewed_mixture()
    truth = target.ode_solution(X, process, start, end)

    def errors(n):
        times = np.linspace(start, end, n + 1)
        return [run(make(process, times)) - truth for make in (solvers.ddim, solvers.forward_ddim)]

    (one, two), (fine_one, fine_two) = errors(160), errors(320)
    np.testing.assert_allclose(fine_two, -fine_one, rtol=0, atol=0.05 * np.abs(fine_one).max())
    ratio = np.linalg.norm(one + two) / np.linalg.norm(fine_one + fine_two)
    assert ratio > 3.5  # 4 of second order; DDIM's is 2
    assert np.linalg.norm(one) / np.linalg.norm(fine_one) < 2.1


@pytest.mark.parametrize(("process", "chart"), [(VP, "edm"), (EDM, "edm"), (FLOW, "flow")])
@pytest.mark.parametrize(("method", "fraction"), [("midpoint2", 1 / 2), ("ralston2", 2 / 3)])
def test_rx_of_two_steps_is_runge_kutta(process, chart, method, fraction):
    outer = grid(process, 4)
    want = solvers.runge_kutta(process, outer, method=method, coordinates=chart)
    got = solvers.richardson(process, want.times, coordinates=chart)
    for key in ("times", "alpha", "sigma"):
        np.testing.assert_allclose(getattr(got, key), getattr(want, key), rtol=1e-12)
    x = X * float(process.prior_std)
    np.testing.assert_allclose(run(got, x), run(want, x), rtol=1e-9, atol=1e-9)
    assert np.abs(run(got, x) - run(solvers.ddim(process, want.times), x)).max() > 1e-3


@pytest.mark.parametrize("steps", [2, 3])
def test_rx_is_richardsons_extrapolation(steps):
    times, x = grid(EDM, 6), 80 * X
    for start in range(0, 6, steps):
        group = times[start : start + steps + 1]
        short, long = x, None
        for s, t in itertools.pairwise(group):
            e = data_and_noise(EDM, short, s)[1]
            long = ddim(EDM, x, group[0], group[-1], e) if long is None else long
            short = ddim(EDM, short, s, t, e)
        r = np.sum(np.diff(group) ** 2) / (group[-1] - group[0]) ** 2
        x = (short - r * long) / (1 - r)
    tableau = solvers.richardson(EDM, times, steps=steps)
    assert tableau.nfe == 6
    np.testing.assert_allclose(run(tableau, 80 * X), x, rtol=1e-9)


# -- STORK ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_stork_is_adams_bashforth(process, k):
    """Whatever its stages are: order 4 for up to three derivatives, order 2 for one."""
    times = grid(process)
    want = solvers.deis(process, times, order=k, variable="rho")
    assert_same(solvers.stork(process, times, derivatives=k, coordinates="edm"), want, 1e-10)
    if k == 1:
        two = solvers.stork(process, times, order=2, derivatives=1, coordinates="edm", stages=10)
        assert_same(two, want, 1e-9)


def published_stork2(velocity, x, times, stages):
    """The loop of the authors and of diffusers: one derivative, a uniform grid, Euler first."""
    s, old = stages, None

    def b(j):
        return (
            (1.0, 1 / 3)[j]
            if j < 2
            else 4 * (j - 1) * (j + 4) / (3 * j * (j + 1) * (j + 2) * (j + 3))
        )

    for t, after in itertools.pairwise(times):
        h, v = t - after, velocity(x, t)
        slope = 0.0 if old is None else (old - v) / h
        before, now = x, x - h * 6 / ((s + 4) * (s - 1)) * v
        for j in range(2, s + 1):
            c = (4 / 3 if j == 2 else j * j - j - 2) / (s * s + s - 2)
            mu = (2 * j + 1) * b(j) / (j * b(j - 1))
            nu = -(j + 1) * b(j) / (j * b(j - 2))
            first = mu * 6 / ((s + 4) * (s - 1))
            gamma = -first * (1 - j * (j + 1) * b(j - 1) / 2)
            stage = mu * now + nu * before + (1 - mu - nu) * x
            before, now = now, stage - h * first * (v - c * h * slope) - h * gamma * v
        x, old = now, v
    return x


def test_published_stork2_and_what_is_wrong_with_it():
    def velocity(x, t):
        data, noise = data_and_noise(FLOW, x, t)
        return noise - data

    times = np.linspace(0.9, 0.2, 9)
    want = published_stork2(velocity, X, times, 50)
    options = {"order": 2, "derivatives": 1, "coordinates": "flow"}
    got = run(solvers.stork(FLOW, times, compatible=True, **options))
    np.testing.assert_allclose(got, want, rtol=1e-10)
    assert np.abs(run(solvers.stork(FLOW, times, **options)) - want).max() > 1e-3
    truth = skewed_mixture().ode_solution(X, FLOW, 0.9, 0.2)
    orders = []
    for compatible in (False, True):
        coarse, fine = (
            np.linalg.norm(
                run(solvers.stork(FLOW, np.linspace(0.9, 0.2, n), compatible=compatible, **options))
                - truth
            )
            for n in (321, 641)
        )
        orders.append(np.log2(coarse / fine))
    assert orders[0] == pytest.approx(2, abs=0.1)
    assert orders[1] < 1.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 3}, "`order` must be 2 or 4; got 3"),
        ({"derivatives": 4}, "`derivatives` must be from 1 to 3"),
        ({"order": 2, "stages": 2}, "`stages` must be at least 3"),
        ({"compatible": True}, "`compatible` is a matter of order=2"),
        ({"coordinates": "time"}, "`coordinates` must be one of"),
    ],
)
def test_stork_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        solvers.stork(VP, grid(VP), **options)


# -- Dual-Solver and RBF-Solver ------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_dual_solver_contains_the_known_ones(process):
    times = grid(process)

    def dual(gamma, tau, **options):
        return solvers.dual_solver(process, times, gamma=gamma, tau=tau, **options)

    plain = {"corrector": False, **FREE}
    assert_same(dual(1, 1, **plain), solvers.dpmpp(process, times, order=2, **FREE))
    noise = solvers.dpmpp(process, times, order=2, prediction="noise", **FREE)
    assert_same(dual(-1, 1, **plain), noise, 1e-9)
    assert_same(dual(-1, 0, **plain), solvers.deis(process, times, order=1, variable="rho"), 1e-9)
    assert_same(dual(1, 1, order=1), solvers.unipc(process, times, order=1))
    for gamma in (-0.5, 0.0, 0.3):
        one = dual(gamma, 0.4, order=1, corrector=False)
        assert_same(one, solvers.ddim(process, times), 1e-9)


def test_dual_solver_as_published():
    """The authors' loop, with ten numbers a step; y as they write it for either sign of gamma."""
    times, rng = np.linspace(0.95, 0.1, 6), np.random.default_rng(0)
    gammas, taus, kappas = (
        rng.uniform(-1, 1, (5, 2)),
        rng.uniform(0, 1, (5, 2, 2)),
        rng.normal(size=(5, 2, 2)),
    )

    def y(t, gamma):
        alpha, sigma = VP.alpha(t), VP.sigma(t)
        if gamma >= 0:
            return np.array([alpha * sigma**-gamma, sigma ** (1 - gamma)]), sigma**gamma
        return np.array([alpha ** (1 + gamma), sigma * alpha**gamma]), alpha**-gamma

    def variable(v, tau):
        return tau * np.log(v) + (1 - tau) * v

    def step(x, i, which, outputs):
        gamma, tau, kappa = gammas[i, which], taus[i, which], kappas[i, which]
        (now, n_now), (end, n_end) = y(times[i], gamma), y(times[i + 1], gamma)
        change, in_l = end - now, variable(end, tau) - variable(now, tau)
        total = change[0] * outputs[i][0] + change[1] * outputs[i][1]
        residual = 0.5 * (change + kappa * in_l**2)
        if which == 1:
            for k in range(2):
                total = total + residual[k] * (outputs[i + 1][k] - outputs[i][k])
        elif i > 0:
            earlier = variable(now, tau) - variable(y(times[i - 1], gamma)[0], tau)
            for k in range(2):
                slope = (outputs[i][k] - outputs[i - 1][k]) / (earlier[k] / in_l[k])
                total = total + residual[k] * slope
        return n_end / n_now * x + n_end * total

    x, outputs = X, [data_and_noise(VP, X, times[0])]
    for i in range(5):
        predicted = step(x, i, 0, outputs)
        if i < 4:
            outputs.append(data_and_noise(VP, predicted, times[i + 1]))
            x = step(x, i, 1, outputs)
    tableau = solvers.dual_solver(VP, times, gamma=gammas, tau=taus, kappa=kappas, **FREE)
    assert tableau.nfe == 5
    np.testing.assert_allclose(run(tableau), predicted, rtol=1e-8, atol=1e-8)
    off = solvers.dual_solver(VP, times, gamma=gammas, tau=taus, kappa=1.02 * kappas, **FREE)
    assert np.abs(run(off) - predicted).max() > 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.5}, "`gamma` must be finite numbers from -1 to 1"),
        (
            {"tau": np.zeros((3, 2, 2))},
            r"`tau` must broadcast to \(9, 2, 2\); got shape \(3, 2, 2\)",
        ),
        ({"kappa": np.inf}, "`kappa` must be finite numbers; got inf"),
        ({"order": 3}, "`order` must be from 1 to 2"),
    ],
)
def test_dual_solver_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        solvers.dual_solver(VP, grid(VP), **options)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_flat_rbf_is_the_polynomial(process):
    times = grid(process)
    flat = solvers.rbf_solver(process, times, shapes=np.inf, corrector=False, **FREE)
    assert_same(flat, solvers.abnorsett(process, times, order=3))
    x = X * float(process.prior_std)
    ends = [
        run(solvers.rbf_solver(process, times, shapes=s, corrector=False, **FREE), x)
        for s in (2.0, 2.5, 3.0)
    ]
    gaps = [np.abs(end - run(flat, x)).max() for end in ends]
    assert gaps[0] > gaps[1] > gaps[2] > 0


def test_rbf_weights_are_the_interpolants_integrals():
    """Its rows against adaptive quadrature of the interpolant that scipy solves for."""
    from scipy.interpolate import RBFInterpolator

    times = np.linspace(0.9, 0.3, 5)
    tableau = solvers.rbf_solver(VP, times, shapes=0.4, order=3, corrector=False, **FREE)
    lam = VP.log_snr(times)
    h = lam[4] - lam[3]
    nodes = lam[[3, 2, 1]] - lam[3]
    epsilon = 1 / (np.exp(0.4) * h)
    for j in range(3):
        cardinal = RBFInterpolator(
            nodes[:, None], np.eye(3)[j], kernel="gaussian", epsilon=epsilon, degree=0
        )
        want = quad(lambda u, f=cardinal: np.exp(-(h - u)) * float(f([[u]])[0]), 0, h)[0]
        assert tableau.b[3, j] / tableau.alpha[4] == pytest.approx(want, rel=1e-9)
    wide = solvers.rbf_solver(VP, times, shapes=0.42, order=3, corrector=False, **FREE)
    assert np.abs(wide.b[3] / tableau.b[3] - 1).max() > 1e-3


def test_rbf_takes_shapes_by_step():
    times = grid(VP, 4)
    shapes = np.array([[0.1, 0.2], [0.3, np.inf], [1.0, -1.0], [2.0, 0.0]])
    both = solvers.rbf_solver(VP, times, shapes=shapes)
    assert both.nfe == 4
    moved = np.where(np.arange(2) == 1, 0.5, shapes)
    assert np.abs(run(both) - run(solvers.rbf_solver(VP, times, shapes=moved))).max() > 1e-4
    for bad in (np.zeros((3, 2)), 4.0, np.nan, -np.inf):
        with pytest.raises(ValueError, match=r"`shapes` must broadcast to \(4, 2\)"):
            solvers.rbf_solver(VP, times, shapes=bad)


# -- exponential methods -------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("h", [0.3, 2.0, 9.0])
def test_exponential_runge_kutta_integrates_polynomials(method, h):
    """The last row: int exp(-(h - u)) u^k du, to degree 1 (order 2) or 2, by quadrature.

    Every stage keeps a constant: that degree 0 for the rows before it.
    """
    lam = np.array([-1.0, -1.0 + h])
    tableau = solvers.etdrk(VP, VP.time(lam), method=method)
    stages = (VP.log_snr(tableau.times) - lam[0]) / h
    for row in range(tableau.rows):
        end = stages[row + 1] * h
        degrees = 1
        if row == tableau.rows - 1:
            degrees = 2 if method == "etdrk2" else 3
        weights = tableau.b[row, : row + 1][::-1] / tableau.alpha[row + 1]
        for k in range(degrees):
            want = quad(lambda u, k=k, e=end: np.exp(-(e - u)) * (u / h) ** k, 0, end)[0]
            got = weights @ stages[: row + 1] ** k
            assert got == pytest.approx(want, rel=1e-8)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("final", ["t_min", "clean"])
def test_exponential_methods_that_were_here_before(process, final):
    times = grid(process, final=final)
    one = solvers.etdrk(process, times, method="etdrk2")
    two = solvers.exponential_rk(process, times, stages=2, c_2=1.0)
    np.testing.assert_allclose(one.b, two.b, rtol=1e-12, atol=1e-14)
    free = {"variant": "heun", **FREE}
    for order in (1, 2, 3):
        want = solvers.dpmpp(process, times, order=order, **free)
        assert_same(solvers.abnorsett(process, times, order=order), want)


@pytest.mark.parametrize("method", ["midpoint2", "heun2", "rk4"])
def test_lawson_is_a_classical_method_on_x_over_sigma(method):
    """d(x / sigma) / d lambda = exp(lambda) D by the classical formulas."""
    times = np.linspace(0.9, 0.2, 5)

    def slope(lam, v):
        t = float(VP.time(lam))
        return np.exp(lam) * data_and_noise(VP, v * VP.sigma(t), t)[0]

    v = X / VP.sigma(times[0])
    for s, t in zip(VP.log_snr(times), VP.log_snr(times)[1:], strict=False):
        h, k_1 = t - s, slope(s, v)
        if method == "midpoint2":
            v = v + h * slope(s + h / 2, v + h / 2 * k_1)
        elif method == "heun2":
            v = v + h / 2 * (k_1 + slope(t, v + h * k_1))
        else:
            k_2 = slope(s + h / 2, v + h / 2 * k_1)
            k_3 = slope(s + h / 2, v + h / 2 * k_2)
            v = v + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + slope(t, v + h * k_3))
    want = v * VP.sigma(times[-1])
    got = run(solvers.lawson(VP, times, method=method))
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_from_alpha_zero_is_a_classical_one(method):
    """A velocity t^k: the limits are the trapezoidal rule and Simpson's, exact to k = 1 and 3."""
    tableau = solvers.etdrk(FLOW, [1.0, 0.4], method=method)
    order = 2 if method == "etdrk2" else 4
    for k in range(order + 1):

        def posterior(x, alpha, sigma, k=k):
            return x - sigma * sigma**k, x + alpha * sigma**k

        got = twin(tableau, posterior, np.zeros((1, 1)))[0, 0]
        want = (0.4 ** (k + 1) - 1) / (k + 1)
        assert (got == pytest.approx(want, rel=1e-9)) == (k < order)
