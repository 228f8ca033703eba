"""SA-Solver, 2M-HB and BDIA around Heun, step by step as their authors' code runs, in NumPy."""

import itertools

import numpy as np
import pytest
from cases import skewed_mixture, twin

import diffsamp as ds
from diffsamp import schedules, solvers

VP, EDM = ds.processes.vp_linear(), ds.processes.edm()
X = np.linspace(-2, 2, 7)[:, None]


def perfect(process, x, t):
    """(data, noise) of the perfect network for the skewed mixture."""
    return skewed_mixture().posterior(x, float(process.alpha(t)), float(process.sigma(t)))


def run(tableau, x=X, noises=()):
    return twin(tableau, skewed_mixture().posterior, x, noises=noises)


def slope_weight(h, c, rescale):
    """Of (D_1 - D_0) / (distance) over a step: theirs, or the integral."""
    return c * h**2 / 2 if rescale else (c * h - 1 + np.exp(-c * h)) / c


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("mode", ["PEC", "PECE"])
def test_sa_solver_of_order_two(mode, rescale):
    """Predictor of two evaluations and corrector of two, tau a function of the step's end."""
    times = schedules.logsnr(VP, 7, final="t_min")
    lam, alpha, sigma = (np.asarray(f(times)) for f in (VP.log_snr, VP.alpha, VP.sigma))
    tau = lambda t: 0.7 if t > 0.3 else 0.2  # noqa: E731
    noises = np.random.default_rng(0).normal(size=(7, *X.shape))
    x, said, before = X, [], None
    for n, (s, t) in enumerate(itertools.pairwise(times)):
        new = perfect(VP, x, s)[0]
        if before is not None:  # correct what the last step predicted
            start, h, c, kept, noise = before
            slope = slope_weight(h, c, rescale) * (new - said[-1]) / h
            x = kept * start + alpha[n] * (-np.expm1(-c * h) * said[-1] + slope) + noise
            if mode == "PECE":
                new = perfect(VP, x, s)[0]
        said.append(new)
        h, c = lam[n + 1] - lam[n], 1 + tau(t) ** 2
        kept = sigma[n + 1] / sigma[n] * np.exp(-(tau(t) ** 2) * h)
        noise = sigma[n + 1] * np.sqrt(-np.expm1(-2 * tau(t) ** 2 * h)) * noises[n]
        drift = -np.expm1(-c * h) * said[-1]
        if 0 < n < 6:  # the last step is of order 1
            drift = drift + slope_weight(h, c, rescale) * (said[-1] - said[-2]) / (
                lam[n] - lam[n - 1]
            )
        before = (x, h, c, kept, noise)
        x = kept * x + alpha[n + 1] * drift + noise
    tableau = solvers.sa_solver(
        VP, times, order=2, corrector=2, tau=tau, rescale=rescale, mode=mode
    )
    assert tableau.nfe == (7 if mode == "PEC" else 13)
    np.testing.assert_allclose(run(tableau, noises=noises), x, rtol=0, atol=1e-11)


def test_sa_solver_without_noise_keeps_its_order():
    """tau = 0: PEC and PECE of order 2 with a corrector of 3, and the rescaled one of order 2."""
    truth = skewed_mixture().ode_solution(X, VP, 0.9, 0.1)
    for options, order in (
        ({"order": 2, "mode": "PECE"}, 3),
        ({"order": 2, "corrector": 2, "rescale": True}, 2),
        ({"order": 3, "corrector": 4}, 3),
    ):
        errors = []
        for n in (40, 80):
            times = VP.time(np.linspace(*VP.log_snr(np.array([0.9, 0.1])), n + 1))
            tableau = solvers.sa_solver(VP, times, tau=0.0, lower_order_final=False, **options)
            errors.append(np.abs(run(tableau) - truth).max())
        # from a cold start: order 2 in the first steps
        assert np.log2(errors[0] / errors[1]) > min(order, 2) - 0.3, (options, errors)


def test_sa_solver_refuses():
    times = schedules.logsnr(VP, 4)
    for options, message in (
        ({"mode": "PECEC"}, "mode"),
        ({"mode": "PECE", "corrector": False}, "it needs a corrector"),
        ({"tau_at": "middle"}, "tau_at"),
        ({"corrector": 7}, "`corrector` must be"),
    ):
        with pytest.raises(ValueError, match=message):
            solvers.sa_solver(VP, times, **options)


@pytest.mark.parametrize("beta", [0.8, 0.5])
def test_two_m_hb(beta):
    """Momentum in steps of order 2 only, whose first takes its direction as it is."""
    times = schedules.uniform(VP, 10, final="t_min")
    lam, alpha, sigma = (np.asarray(f(times)) for f in (VP.log_snr, VP.alpha, VP.sigma))
    x, said, velocity = X, [], None
    for n, s in enumerate(times[:-1]):
        said.append(perfect(VP, x, s)[0])
        h = lam[n + 1] - lam[n]
        direction = said[-1]
        if 0 < n < 9:
            ratio = (lam[n] - lam[n - 1]) / h
            direction = said[-1] + (said[-1] - said[-2]) / (2 * ratio)
            velocity = direction if velocity is None else (1 - beta) * velocity + beta * direction
            direction = velocity
        x = sigma[n + 1] / sigma[n] * x - alpha[n + 1] * np.expm1(-h) * direction
    tableau = solvers.dpmpp(VP, times, beta=beta)
    np.testing.assert_allclose(run(tableau), x, rtol=0, atol=1e-12)
    other = solvers.heavy_ball(solvers.dpmpp(VP, times), beta=beta)
    assert np.abs(run(other) - x).max() > 0.01  # which runs through all steps
    with pytest.raises(ValueError, match="below 1 it needs order=2 and eta=0"):
        solvers.dpmpp(VP, times, order=3, beta=beta)


@pytest.mark.parametrize("gamma", [1.0, 0.6])
def test_bdia_around_heun(gamma):
    """x / alpha in rho; the way back is Heun's step, too."""
    times = schedules.karras(EDM, 8, t_max=5.0, final="t_min")
    rho = np.asarray(EDM.sigma(times))

    def heun(x, s, t):
        first = perfect(EDM, x, s)[1]
        second = perfect(EDM, x + (t - s) * first, t)[1]
        return x + (t - s) * (first + second) / 2

    states = [5 * X, heun(5 * X, rho[0], rho[1])]
    for n in range(1, 8):
        back = states[n - 1] - heun(states[n], rho[n], rho[n - 1])
        states.append(gamma * back + heun(states[n], rho[n], rho[n + 1]))
    tableau = solvers.bdia(EDM, times, gamma=gamma, base="heun")
    assert tableau.nfe == 2 + 3 * 7
    np.testing.assert_allclose(run(tableau, 5 * X), states[-1], rtol=0, atol=1e-11)


def test_bdia_around_heun_has_order_two():
    truth = skewed_mixture().ode_solution(X, VP, 0.9, 0.1)
    for gamma in (0.5, 1.0):
        errors = [
            np.abs(
                run(solvers.bdia(VP, np.linspace(0.9, 0.1, n + 1), gamma=gamma, base="heun"))
                - truth
            ).max()
            for n in (80, 160)
        ]
        assert 1.7 < np.log2(errors[0] / errors[1]) < 3.3, errors
    times = schedules.logsnr(VP, 6)
    one, two = solvers.bdia(VP, times, gamma=0.0, base="heun"), solvers.heun(VP, times)
    assert one.nfe == two.nfe
    np.testing.assert_allclose(run(one), run(two), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="base"):
        solvers.bdia(VP, times, base="euler")


def test_edm_churn_is_theirs_from_the_first_row_on():
    """S_max = inf lifts every level, the first beyond t_max, as in EDM's code; not so elsewhere."""
    times = schedules.karras(EDM, 6)
    noises = np.random.default_rng(1).normal(size=(6, *X.shape))
    x, gamma = 80 * X, min(20.0 / 6, np.sqrt(2) - 1)
    for n, (s, t) in enumerate(itertools.pairwise(times)):
        lifted = s + gamma * s
        x = x + np.sqrt(lifted**2 - s**2) * 1.003 * noises[n]
        slope = perfect(EDM, x, lifted)[1]
        end = x + (t - lifted) * slope
        x = end if t == 0 else x + (t - lifted) / 2 * (slope + perfect(EDM, end, t)[1])
    tableau = solvers.heun(EDM, times, churn=20.0, noise_scale=1.003)
    assert np.sum(tableau.c != 0) == 6
    np.testing.assert_allclose(run(tableau, 80 * X, noises), x, rtol=0, atol=1e-10)
    bounded = solvers.heun(VP, schedules.logsnr(VP, 6), churn=20.0)
    assert bounded.times.max() <= VP.t_max
