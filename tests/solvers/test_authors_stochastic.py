"""Stochastic samplers against the authors' code: their loops in NumPy, float64, on given noises."""

import itertools

import jax
import numpy as np
import pytest
from cases import skewed_mixture, twin

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
    got = ds.sample(skewed_mixture().score_fn(process), tableau, np.float32(start),
                    key=jax.random.key(0))  # fmt: skip
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
        tableau = solvers.sa_solver(
            process, times, order=p, corrector_order=c, tau=tau, mode=mode, few_steps=few_steps
        )
        assert tableau.nfe == count == (7 if mode == "PEC" else 13)
        np.testing.assert_allclose(run(tableau, x), want, rtol=1e-8, atol=1e-8)


def test_sa_solvers_few_steps_are_not_its_other_mode():
    """The rescaling changes a step by O(h^3), and so a run by O(h^2)."""
    gaps = []
    for n in (5, 160, 320):
        times = schedules.logsnr(VP, n, final="t_min")
        both = [solvers.sa_solver(VP, times, order=2, corrector_order=2, tau=0.0, few_steps=few)
                for few in (True, False)]  # fmt: skip
        gaps.append(np.abs(run(both[0]) - run(both[1])).max())
    assert gaps[0] > 0.01
    assert 1.8 < np.log2(gaps[1] / gaps[2]) < 2.3
    closed = solvers.sa_solver(VP, schedules.logsnr(VP, 5), few_steps=True, mode="PECE")
    assert (closed.nfe, closed.c[-1]) == (9, 0)
    with pytest.raises(ValueError, match="needs corrector=True"):
        solvers.sa_solver(VP, schedules.logsnr(VP, 5), mode="PECE", corrector=False)
