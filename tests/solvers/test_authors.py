"""Against the authors' code, step by step as it runs: their loops written in NumPy, float64."""

import itertools

import numpy as np
import pytest
from cases import skewed_mixture, twin
from scipy.integrate import quad

import diffsamp as ds
from diffsamp import schedules, solvers

VP, EDM, FLOW = ds.processes.vp_linear(), ds.processes.edm(), ds.processes.flow()
X = np.linspace(-2, 2, 7)[:, None]
EXACT = {"rtol": 0, "atol": 1e-11}


def perfect(process, x, t):
    """(data, noise) of the perfect network for the skewed mixture."""
    return skewed_mixture().posterior(x, float(process.alpha(t)), float(process.sigma(t)))


def run(tableau, x=X):
    return twin(tableau, skewed_mixture().posterior, x)


# -- DPM-Solver, single-step -----------------------------------------------------------------------


def single_step(process, x, lam_s, lam_t, order, form):
    """Their update of order 1, 2, 3 with stages that part the step evenly in log-SNR."""
    h = lam_t - lam_s
    sign, kind = (-1, 0) if form == "data" else (1, 1)

    def scales(lam):
        t = process.time(lam)
        alpha, sigma = process.alpha(t), process.sigma(t)
        return (sigma, alpha) if form == "data" else (alpha, sigma)

    def said(x, lam):
        return perfect(process, x, process.time(lam))[kind]

    first = said(x, lam_s)

    def start(lam):  # what the stages and the end begin with: the step of order 1
        kept, other = scales(lam)
        return kept / scales(lam_s)[0] * x - other * np.expm1(sign * (lam - lam_s)) * first

    if order == 1:
        return start(lam_t)
    lam_1 = lam_s + h / order
    second = said(start(lam_1), lam_1)
    other = scales(lam_t)[1]
    if order == 2:
        return start(lam_t) - other * np.expm1(sign * h) * (second - first)
    lam_2 = lam_s + 2 * h / 3
    bend = np.expm1(sign * 2 * h / 3) / (2 * h / 3) - sign
    third = said(start(lam_2) - sign * 2 * scales(lam_2)[1] * bend * (second - first), lam_2)
    return start(lam_t) - sign * 1.5 * other * (np.expm1(sign * h) / h - sign) * (third - first)


@pytest.mark.parametrize("form", ["noise", "data"])
def test_dpm_solver_fast_and_fixed_on_the_authors_grid(form):
    """K outer steps uniform in log-SNR, whatever their orders; `steps // order` of one order."""
    for process, order, n in itertools.product((VP, EDM), (2, 3), range(1, 13)):
        rule = {
            2: [2] * (n // 2) + [1] * (n % 2),
            3: [[3] * (n // 3 - 1) + [2, 1], [3] * (n // 3) + [1], [3] * (n // 3) + [2]][n % 3],
        }[order]
        fixed = [order] * (n // order) if n % order == 0 else None
        for orders, given in ((rule, None), (fixed, fixed)):
            if orders is None:
                continue
            lam = np.linspace(
                *process.log_snr(np.array([process.t_max, process.t_min])), len(orders) + 1
            )
            x = want = X * float(process.prior_std)
            for k, (s, t) in zip(orders, itertools.pairwise(lam), strict=True):
                want = single_step(process, want, s, t, k, form)
            grid = {"order": order, "orders": given, "final": "t_min"}
            times = schedules.dpm_fast(process, n, **grid)
            tableau = solvers.dpm_solver(process, times, order=order, orders=given, prediction=form)
            assert tableau.nfe == n
            np.testing.assert_allclose(run(tableau, x), want, rtol=1e-8, atol=1e-8)
            # denoise_to_zero: the same steps, one evaluation more
            closed = schedules.dpm_fast(process, n + 1, order=order, orders=given and [*given, 1])
            np.testing.assert_array_equal(closed[:-1], times)
            assert closed[-1] == process.t_clean


def test_dpm_fast_is_the_registrys_grid_and_beats_log_snr():
    """The errors of the two grids, noise form, ending at t_min; theirs is lower at 8 and 12."""
    truth = skewed_mixture().ode_solution(X, VP, 1.0, 1e-3)
    for n in (8, 12):
        errors = [
            np.sqrt(np.mean((run(solvers.dpm_solver(VP, grid(VP, n, final="t_min"))) - truth) ** 2))
            for grid in (schedules.dpm_fast, schedules.logsnr)
        ]
        assert errors[0] < errors[1]
    network = skewed_mixture().score_fn(VP)
    for name, order in (
        ("dpm_solver_2s", 2),
        ("dpm_solver_3s", 3),
        ("dpmpp_2s", 2),
        ("dpmpp_3s", 3),
    ):
        for n in (1, 7, 9):
            tableau = ds.sampler(network, name, nfe=n).tableau
            assert tableau.nfe == n
            want = schedules.dpm_fast(VP, n, order=order)
            np.testing.assert_allclose(tableau.times, want, rtol=1e-12)
    named = ds.sampler(network, "dpmpp_3s", nfe=7, schedule="logsnr").tableau
    np.testing.assert_array_equal(named.times, schedules.logsnr(VP, 7))
    assert ds.sampler(network, "unipc3", nfe=7).tableau.times[1] == schedules.logsnr(VP, 7)[1]


def test_orders_that_do_not_fit_are_refused():
    open_times, flow = schedules.logsnr(VP, 6, final="t_min"), schedules.uniform(FLOW, 6)
    for call, message in (
        (lambda: solvers.dpm_solver(VP, open_times, orders=[3, 2]), "must add up to the number of"),
        (lambda: solvers.dpm_solver(VP, open_times, orders=[4, 2]), "must be from 1 to 3; got 4"),
        (lambda: solvers.dpm_solver(FLOW, flow, orders=[2, 3, 1]), "the first of `orders` must be"),
        (
            lambda: solvers.dpm_solver(FLOW, flow, orders=[1, 3, 2]),
            "the last of `orders` must be 1",
        ),
        (lambda: schedules.dpm_fast(VP, 6, orders=[3, 3]), 'Add a 1, or use final="t_min"'),
        (lambda: schedules.dpm_fast(VP, 6, orders=[3, 3, 1]), "which make 7"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert solvers.dpm_solver(FLOW, flow, orders=[1, 2, 2, 1]).nfe == 6


# -- DEIS ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [EDM, ds.processes.ve()], ids=["edm", "ve"])
def test_tab_deis_on_edm_is_in_the_time_of_a_fitted_vp_process(process):
    """int l_j(t) d rho by quadrature over t, for beta(t) linear, sigma_min at 1e-3, sigma_max at 1;
    no two names of the registry are one solver there."""
    low, high = (np.log1p(float(process.sigma(t)) ** 2) for t in (process.t_min, process.t_max))
    slope = 2 * (low / 1e-3 - high) / (1e-3 - 1)
    start = high - slope / 2
    times = schedules.karras(process, 6, final="t_min")
    sigma = np.asarray(process.sigma(times))
    t = (np.sqrt(start**2 + 2 * slope * np.log1p(sigma**2)) - start) / slope
    assert (t[0], t[-1]) == (pytest.approx(1.0), pytest.approx(1e-3, rel=1e-6))

    def rho_dot(v):
        grown = np.exp(slope * v**2 / 2 + start * v)
        return (slope * v + start) * grown / (2 * np.sqrt(grown - 1))

    tableau = solvers.deis(process, times, order=2)
    for n in range(2, 6):
        nodes = t[[n, n - 1, n - 2]]
        for j in range(3):
            others = np.delete(nodes, j)
            want = quad(
                lambda v, o=others, x=nodes[j]: rho_dot(v) * np.prod((v - o) / (x - o)),
                t[n],
                t[n + 1],
                epsabs=1e-11,
                epsrel=1e-10,
            )[0]
            np.testing.assert_allclose(tableau.b[n, j], want, rtol=1e-6, atol=1e-9)


def test_no_two_deis_of_the_registry_are_one():
    for process in (VP, EDM, ds.processes.ve(), FLOW):
        times = schedules.karras(process, 12, final="t_min")
        made = [s(process, times) for s in solvers.SOLVERS.values() if s.function is solvers.deis]
        for one, two in itertools.combinations([t.unroll()[1][-1] for t in made], 2):
            assert np.abs(one - two).max() > 1e-4 * np.abs(one).max()


# -- DPM-Solver-v3 ---------------------------------------------------------------------------------


def v3_as_published(x, lam, order, p_pseudo, corrector, c_pseudo, lower, l, s, b):  # noqa: E741
    """Their loop with l, s, b as functions, the integrals by dense trapezoids from lambda_T."""
    fine = np.linspace(lam[0], lam[-1], 240001)
    index = np.rint((lam - lam[0]) / (fine[1] - fine[0])).astype(int)
    times = VP.time(lam)
    alpha, sigma = VP.alpha(times), VP.sigma(times)

    def antiderivative(values):
        return np.append(0.0, np.cumsum((values[1:] + values[:-1]) / 2)) * (fine[1] - fine[0])

    L, S = antiderivative(l(fine)), antiderivative(s(fine))
    I, B = antiderivative(np.exp(L + S)), antiderivative(np.exp(-S) * b(fine))  # noqa: E741
    C = antiderivative(np.exp(L + S) * B)

    def update(x_s, nodes, known, i_t, pseudo):
        """nodes: step numbers, the first where the step starts; known: {number: (x, eps)}."""
        i = index[nodes[0]]
        g = []
        for k in nodes:
            x_k, eps = known[k]
            f = (sigma[k] * eps - l(lam[k]) * x_k) / alpha[k]
            j = index[k]
            g.append(np.exp(S[i] - S[j]) * f - np.exp(S[i]) * (B[j] - B[i]))
        t, at = index[i_t], lam[nodes]
        constant = C[t] - C[i] - B[i] * (I[t] - I[i])
        out = alpha[i_t] / alpha[nodes[0]] * np.exp(L[i] - L[t]) * x_s
        out = out - alpha[i_t] * np.exp(-L[t] - S[i]) * (I[t] - I[i]) * g[0]
        out = out - alpha[i_t] * np.exp(-L[t]) * constant
        if pseudo:
            table, derivatives = [g], []
            for k in range(1, len(g)):
                table.append(
                    [
                        (table[-1][j] - table[-1][j + 1]) / (at[j] - at[j + k])
                        for j in range(len(g) - k)
                    ]
                )
                derivatives.append(table[-1][0])
        else:
            powers = np.array([(at[1:] - at[0]) ** k for k in range(1, len(g))]).T
            rest = np.array([v - g[0] for v in g[1:]]).reshape(len(g) - 1, x_s.size)
            solved = np.linalg.solve(powers, rest) if len(g) > 1 else rest
            derivatives = [row.reshape(x_s.shape) for row in solved]
        span = slice(i, t + 1)
        for k, derivative in enumerate(derivatives, 1):
            integrand = np.exp((L + S)[span] - (L + S)[i]) * (fine[span] - fine[i]) ** k
            weight = np.trapezoid(integrand, fine[span])
            out = out - alpha[i_t] * np.exp(L[i] - L[t]) * weight * derivative
        return out

    known, steps, before = {}, len(lam) - 1, 0
    for n in range(steps):
        known[n] = (x, perfect(VP, x, times[n])[1])
        now = before + c_pseudo
        if corrector and now > 1:
            nodes = [n - 1, n, *range(n - 2, -1, -1)][:now]
            new = update(known[n - 1][0], nodes, known, n, c_pseudo)
            kept = sigma[n] * known[n][1] - l(lam[n]) * known[n][0]
            known[n] = (new, (kept + l(lam[n]) * new) / sigma[n])
        before = min(n + 1, order)
        if lower:
            before = min(before, steps - n)
        x = update(known[n][0], list(range(n, n - before, -1)), known, n + 1, p_pseudo)
    return x


@pytest.mark.parametrize("biased", [False, True])
def test_dpm_solver_v3_in_the_authors_modes(biased):
    levels = np.linspace(-5, 3.75, 400)
    l = lambda v: 0.6 + 0.3 * np.sin(v)  # noqa: E731, E741
    s = lambda v: -0.3 + 0.2 * np.cos(v)  # noqa: E731
    b = lambda v: biased * (0.4 + 0.3 * np.sin(2 * v))  # noqa: E731
    known = solvers.ModelStatistics(levels, l(levels), s(levels), b(levels))
    lam = np.linspace(-4.5, 3.5, 9)
    modes = {False: (False, False), "lower": (True, False), "pseudo": (True, True)}
    for order, pseudo, mode in itertools.product((2, 3), (False, True), modes):
        tableau = solvers.dpm_solver_v3(
            VP, VP.time(lam), statistics=known, order=order, pseudo=pseudo, corrector=mode
        )
        want = v3_as_published(X, lam, order, pseudo, *modes[mode], True, l, s, b)
        np.testing.assert_allclose(run(tableau), want, rtol=0, atol=2e-5)


# -- GHVB, the analytic first step -----------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_ghvb_with_fixed_weights_is_the_authors(order):
    """v_n = (1 - b) v_{n-1} + b E_n from v_0 = E_0, stepped with their mixer / b."""
    for process, beta in itertools.product((VP, EDM), (0.3, 0.8, 1.0)):
        times = schedules.karras(process, 12, final="t_min")
        mixers = [
            [beta],
            np.array([2 + beta, -(2 - beta)]) / 2,
            np.array([18 + 5 * beta, -24 + 8 * beta, 6 - beta]) / 12,
            np.array([46 + 9 * beta, -78 + 19 * beta, 42 - 5 * beta, -10 + beta]) / 24,
            np.array(
                [
                    1650 + 251 * beta,
                    -3420 + 646 * beta,
                    2880 - 264 * beta,
                    -1380 + 106 * beta,
                    270 - 19 * beta,
                ]
            )
            / 720,
        ]
        start = x = X * float(process.prior_std)
        velocities = []
        for s, t in itertools.pairwise(times):
            noise = perfect(process, x, s)[1]
            velocities.insert(0, (1 - beta) * (velocities or [noise])[0] + beta * noise)
            mixer = mixers[min(order, len(velocities)) - 1]
            mean = sum(d * v for d, v in zip(mixer, velocities, strict=False)) / beta
            rho_s, rho_t = np.exp(-process.log_snr(np.array([s, t])))
            x = process.alpha(t) * (x / process.alpha(s) + (rho_t - rho_s) * mean)
        tableau = solvers.ghvb(process, times, order=order, beta=beta, variable_step=False)
        assert (tableau.p, tableau.q) <= (2, order)
        np.testing.assert_allclose(run(tableau, start), x, rtol=1e-9, atol=1e-9)


def test_analytic_first_step_of_every_solver():
    """The same run in which the first answer is the noise x / sqrt(alpha^2 + sigma^2)."""
    target = skewed_mixture()
    for process in (VP, ds.processes.ve(), EDM, FLOW):
        for solver in solvers.SOLVERS.values():
            steps = next(n for n in map(solver.steps, (13, 14, 15, 16)) if n)
            if solver.stochastic:
                continue
            whole = solver(process, schedules.uniform(process, steps))
            tableau = solvers.analytic_first_step(whole)
            assert tableau.nfe == whole.nfe - 1
            assert tableau.rows == whole.rows
            calls = []

            def posterior(x, alpha, sigma, calls=calls):
                calls.append(alpha)
                if len(calls) > 1:
                    return target.posterior(x, alpha, sigma)
                m = np.sqrt(alpha**2 + sigma**2)
                data = np.zeros_like(x) if alpha == 0 else (x - sigma * x / m) / alpha
                return data, x / m

            x = X * float(process.prior_std)
            want = twin(whole, posterior, x)
            scale = max(1.0, np.abs(whole.unroll()[1]).max())
            np.testing.assert_allclose(run(tableau, x), want, rtol=0, atol=1e-9 * scale)
    with pytest.raises(ValueError, match="leaves nothing to ask of 'ddim'"):
        solvers.analytic_first_step(solvers.ddim(VP, [1.0, 0.0]))


def test_analytic_first_step_in_the_executor_and_with_noise():
    """Counted, in one program with others; an EDM Heun step as diff-sampler runs it."""
    times = schedules.karras(EDM, 4)
    tableau = solvers.analytic_first_step(solvers.heun(EDM, times))
    x = start = X * 80.0
    for n, (s, t) in enumerate(itertools.pairwise(times)):
        d = x / np.sqrt(1 + s**2) if n == 0 else perfect(EDM, x, s)[1]
        end = x + (t - s) * d
        x = end if t == 0 else x + (t - s) / 2 * (d + perfect(EDM, end, t)[1])
    np.testing.assert_allclose(run(tableau, start), x, rtol=0, atol=1e-10)
    got = ds.sample(skewed_mixture().score_fn(EDM), tableau, np.float32(start))
    np.testing.assert_allclose(got, x, atol=2e-4)
    noisy = solvers.ddpm(VP, schedules.logsnr(VP, 5))
    assert solvers.analytic_first_step(noisy).nfe == 4
    np.testing.assert_array_equal(solvers.analytic_first_step(noisy).c, noisy.c)


# -- BDIA around EDM's sampler, IIA around DPM-Solver++ --------------------------------------------


@pytest.mark.parametrize("back", ["heun", "euler"])
def test_bdia_around_edms_sampler(back):
    """z' = z_- - (1 - g)(z_- - z) - g Delta(back | z) + Delta(on | z), z_- the state before z."""
    for final, gamma in itertools.product(("t_min", "clean"), (0.3, 1.0)):
        sigma = schedules.karras(EDM, 7, final=final)

        def delta(x, s, t):
            d = perfect(EDM, x, s)[1]
            other = d if t == 0 else perfect(EDM, x + (t - s) * d, t)[1]
            return (t - s) / 2 * (d + other)

        x = [X * 80.0]
        for n in range(7):
            new = x[-1] + delta(x[-1], sigma[n], sigma[n + 1])
            if n:
                behind = (sigma[n - 1] - sigma[n]) * perfect(EDM, x[-1], sigma[n])[1]
                behind = delta(x[-1], sigma[n], sigma[n - 1]) if back == "heun" else behind
                new = new - x[-1] + x[-2] - (1 - gamma) * (x[-2] - x[-1]) - gamma * behind
            x.append(new)
        tableau = solvers.bdia(EDM, sigma, gamma=gamma, method="heun", back=back)
        steps = 7 * 2 + (6 if back == "heun" else 0) - (final == "clean")
        assert tableau.nfe == steps
        np.testing.assert_allclose(run(tableau, x[0]), x[-1], rtol=1e-9, atol=1e-9)


def test_bdia_heun_without_gamma_is_heun_and_its_orders():
    times = schedules.karras(VP, 8, final="t_min")
    np.testing.assert_allclose(
        run(solvers.bdia(VP, times, gamma=0.0, method="heun")),
        run(solvers.heun(VP, times)),
        **EXACT,
    )
    truth = skewed_mixture().ode_solution(X, VP, 0.8, 0.05)
    for back, order in (("heun", 2), ("euler", 1)):
        errors = [
            np.abs(
                run(solvers.bdia(VP, np.linspace(0.8, 0.05, n + 1), method="heun", back=back))
                - truth
            ).max()
            for n in (160, 320)
        ]
        assert np.log2(errors[0] / errors[1]) > order - 0.25, (back, errors)
    with pytest.raises(ValueError, match="is infinite at the first time"):
        solvers.bdia(FLOW, schedules.uniform(FLOW, 4), method="heun")
    with pytest.raises(ValueError, match="cannot be inverted"):
        ds.inversion.inverse(solvers.bdia(VP, times, method="heun"))


def test_iia_around_dpmpp_2m_is_iia_around_ddim():
    """2M's step is DDIM's and alpha (1 - e^-h) h / (2 h_0) times the difference of its data."""
    for process in (VP, EDM):
        times = schedules.karras(process, 6, final="t_min")
        h = np.diff(process.log_snr(times))
        c = np.zeros((6, 2))
        c[1:, 0] = -process.alpha(times[2:]) * np.expm1(-h[1:]) * h[1:] / (2 * h[:-1])
        one = solvers.iia(process, times, coefficients=c)
        two = solvers.dpmpp(process, times, order=2, lower_order_final=False)
        x = X * float(process.prior_std)
        np.testing.assert_allclose(run(one, x), run(two, x), rtol=1e-10, atol=1e-10)
