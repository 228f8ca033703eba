"""SA-Solver and 2M-HB, step by step as their authors' code runs, in NumPy."""

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


# -- noise form ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["midpoint", "heun"])
def test_dpm_solver_multistep_of_the_noise(variant):
    """x' = (alpha'/alpha) x - sigma' [(e^h - 1) E + ..], the slope by the authors' two formulas."""
    times = schedules.logsnr(VP, 8, final="t_min")
    lam, alpha, sigma = (np.asarray(f(times)) for f in (VP.log_snr, VP.alpha, VP.sigma))
    x, said = X, []
    for n, s in enumerate(times[:-1]):
        said.append(perfect(VP, x, s)[1])
        h = lam[n + 1] - lam[n]
        change = np.expm1(h) * said[-1]
        if 0 < n < 7:  # the last step is of order 1
            slope = (said[-1] - said[-2]) * h / (lam[n] - lam[n - 1])
            weight = np.expm1(h) / 2 if variant == "midpoint" else np.expm1(h) / h - 1
            change = change + weight * slope
        x = alpha[n + 1] / alpha[n] * x - sigma[n + 1] * change
    tableau = solvers.dpmpp(VP, times, prediction="noise", variant=variant)
    np.testing.assert_allclose(run(tableau), x, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match='prediction="noise" is of the ODE alone'):
        solvers.dpmpp(VP, times, prediction="noise", eta=1.0)


def test_noise_forms_agree_and_keep_their_order():
    """Order 1 is DDIM, UniP-2 (bh2) is DPM-Solver 2M; each converges at its order."""
    times = schedules.logsnr(VP, 9, final="t_min")
    noise = {"prediction": "noise"}
    ddim = run(solvers.ddim(VP, times))
    for one in (
        solvers.dpmpp(VP, times, order=1, **noise),
        solvers.unipc(VP, times, order=1, corrector=False, **noise),
    ):
        np.testing.assert_allclose(run(one), ddim, rtol=0, atol=1e-10)
    np.testing.assert_allclose(
        run(solvers.unipc(VP, times, order=2, corrector=False, **noise)),
        run(solvers.dpmpp(VP, times, **noise)),
        rtol=0,
        atol=1e-10,
    )
    truth = skewed_mixture().ode_solution(X, VP, 0.9, 0.1)
    free = {**noise, "lower_order_final": False}
    for build, order in (
        (lambda t: solvers.dpmpp(VP, t, **free), 2),
        (lambda t: solvers.unipc(VP, t, order=1, **free), 2),
        (lambda t: solvers.unipc(VP, t, order=2, variant="bh1", **free), 2),
    ):
        errors = []
        for n in (80, 160):
            grid = VP.time(np.linspace(*VP.log_snr(np.array([0.9, 0.1])), n + 1))
            errors.append(np.abs(run(build(grid)) - truth).max())
        assert np.log2(errors[0] / errors[1]) > order - 0.3, errors
