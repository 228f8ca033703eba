"""Rows at one level, correctors and constant re-noising, against their exact laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import all_processes, gaussian_moments, twin
from guidance.exact import build

import diffsamp as ds
from diffsamp import guidance, schedules, solvers


def at(process, log_snr=0.3):
    t = float(process.time(np.float64(log_snr)))
    return t, float(process.alpha(t)), float(process.sigma(t))


@pytest.mark.parametrize("process", all_processes().values(), ids=all_processes())
def test_the_stationary_variance_of_langevin(process):
    """S^2 (1 + kappa) / (2 - (1 - kappa) sigma^2 / S^2), and the mean kept."""
    t, alpha, sigma = at(process)
    s2 = alpha**2 * 0.6 + sigma**2
    for kappa in (0.0, 0.5, 0.9):
        tableau = solvers.langevin(process, t, 400, keep=kappa)
        assert tableau.nfe == 400
        tableau.check()
        mean, variance = gaussian_moments(tableau, 0.7, 0.6, start=(0.0, 3.0))
        want = s2 * (1 + kappa) / (2 - (1 - kappa) * sigma**2 / s2)
        np.testing.assert_allclose(variance, want, rtol=1e-9)
        np.testing.assert_allclose(mean, alpha * 0.7, rtol=1e-6, atol=1e-8)
        wrong = s2 * (1 + 1.02 * kappa) / (2 - (1 - 1.02 * kappa) * sigma**2 / s2)
        assert kappa == 0 or abs(wrong / want - 1) > 1e-3


def test_the_stationary_variance_of_ula():
    process = ds.processes.vp_linear()
    t, alpha, sigma = at(process)
    s2 = alpha**2 * 0.6 + sigma**2
    for step in (0.05, 0.3):
        tableau = solvers.ula(process, t, 800, step=step)
        _, variance = gaussian_moments(tableau, 0.7, 0.6, start=(0.0, 3.0))
        np.testing.assert_allclose(variance, s2 / (1 - step / (2 * s2)), rtol=1e-9)
        other = s2 / (1 - 1.02 * step / (2 * s2))
        assert abs(variance / other - 1) > 1e-4


def test_keeping_nothing_is_drawing_anew():
    """kappa = 0 is x' = alpha D + sigma z, renoise(1) at one level; kappa = 1 is refused."""
    process = ds.processes.vp_linear()
    t, alpha, sigma = at(process)
    one = solvers.langevin(process, t, 1, keep=0.0)
    np.testing.assert_allclose([one.a[0, 0], one.b[0, 0], one.c[0]], [0, alpha, sigma])
    again = solvers.renoise(process, [t, t * (1 - 1e-9)], share=1.0)
    np.testing.assert_allclose(again.b, one.b, rtol=1e-6)
    np.testing.assert_allclose(again.c, one.c, rtol=1e-6)
    with pytest.raises(ValueError, match=r"`keep` must lie in \[0, 1\)"):
        solvers.langevin(process, t, 3, keep=1.0)
    with pytest.raises(ValueError, match="`step` must be positive"):
        solvers.ula(process, t, 3, step=0.0)


def test_renoise_is_ddim_and_has_a_limit_of_its_own():
    """c = share sigma': share 0 is DDIM; the variance tends to c^2 (1 + sqrt(1 - share^2)) / 2."""
    process = ds.processes.edm(sigma_max=200.0)
    ddim, none = (
        build("ddim", process, 9),
        solvers.renoise(process, schedules.logsnr(process, 9), share=0.0),
    )
    np.testing.assert_allclose(none.b, ddim.b, rtol=1e-12)
    np.testing.assert_allclose(none.a, ddim.a, rtol=1e-12)
    times = np.append(np.geomspace(200.0, 1e-3, 3000), 0.0)
    for share, want in ((0.85, 0.763), (1.0, 0.5)):
        tableau = solvers.renoise(process, times, share=share)
        tableau.check()
        _, variance = gaussian_moments(tableau, 0.0, 1.0)
        np.testing.assert_allclose(variance, want, atol=4e-3)
    by_row = solvers.renoise(process, schedules.logsnr(process, 3), share=[0.0, 0.5, 1.0])
    assert by_row.c[0] == 0
    assert by_row.c[1] > 0
    assert by_row.c[2] == 0  # the clean end
    with pytest.raises(ValueError, match=r"`share` must lie in \[0, 1\]"):
        solvers.renoise(process, times[-4:], share=1.5)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "unipc3", "ddpm"])
def test_predictor_corrector_is_its_loop(name):
    """In NumPy: every row of the sampler, then Langevin rows at the level where it arrives."""
    process = ds.processes.vp_linear()
    target = ds.targets.gaussian_mixture([0.4, 0.6], [[-1.0], [0.8]], np.array([0.2, 0.1]))
    tableau, steps, kappa = build(name, process, 4), 2, 0.9
    both = solvers.predictor_corrector(tableau, steps, keep=kappa)
    both.check()
    assert both.nfe == tableau.nfe + steps * (tableau.rows - 1)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 1))
    noises = list(rng.normal(size=(both.rows, 5, 1)))
    got = twin(
        both, target.posterior, x, noises=[e for n, e in enumerate(noises) if both.c[n] != 0]
    )
    u, told, row, points = x, [], 0, []
    for n in range(tableau.rows):
        points.append(u)
        data, noise = target.posterior(u, tableau.alpha[n], tableau.sigma[n])
        told.append(tableau.target[n, 0] * data + tableau.target[n, 1] * noise)
        u = tableau.a[n, 0] * u + sum(
            tableau.b[n, j] * told[n - j] for j in range(min(tableau.q, n + 1))
        )
        u = u + (tableau.c[n] * noises[row] if tableau.c[n] else 0)
        row += 1
        if tableau.sigma[n + 1] == 0:
            break
        for _ in range(steps):
            alpha, sigma = tableau.alpha[n + 1], tableau.sigma[n + 1]
            data, _ = target.posterior(u, alpha, sigma)
            u = kappa * u + (1 - kappa) * alpha * data
            u = u + sigma * np.sqrt(1 - kappa**2) * noises[row]
            row += 1
    np.testing.assert_allclose(got, u, rtol=1e-10, atol=1e-10)


def test_samplers_that_no_corrector_fits():
    process = ds.processes.vp_linear()
    with pytest.raises(ValueError, match="needs rows of one state each"):
        solvers.predictor_corrector(build("heun", process, 4), 2, keep=0.9)
    with pytest.raises(ValueError, match="noise predictions from before the new noise"):
        solvers.predictor_corrector(build("deis_tab2", process, 4), 2, keep=0.9)
    with pytest.raises(ValueError, match=r"`keep` must lie in \[0, 1\)"):
        solvers.predictor_corrector(build("ddim", process, 4), 2, keep=1.0)


def test_guidance_in_the_corrector_approaches_the_tilt(x64):
    """q_c = N(1, 1/4), q_0 = N(0, 1), scale 2: the tilted density is N(8/7, 1/7).

    DDIM with the condition alone, then four Langevin rows with guidance at every level, by the
    library's own rows; the ODE with scale 2 gives (1.380, .0625).
    """
    from guidance.exact import gaussians, labels, law

    process, w = ds.processes.edm(), 2.0
    network = gaussians([0.0, 1.0], [1.0, 0.25], process)
    plain = ds.solvers.ddim(process, np.append(np.geomspace(80.0, 0.01, 40), 0.0))

    def moments(steps):
        tableau = solvers.predictor_corrector(plain, steps, keep=0.9)
        inside = tableau.times[1:] == tableau.times[:-1]
        weights = np.where(inside[:, None], [w, 1 - w], [1.0, 0.0])
        guided = guidance.combine([(network, {}), (network, {"label": 0})], weights)
        assert guided.nfe(tableau) == tableau.nfe + inside.sum()
        mean, cov = law(guided, tableau, 1, cond={"label": labels(2, 1)})
        return mean[0], cov[0, 0]

    away = [np.hypot(m - 8 / 7, v - 1 / 7) for m, v in map(moments, (0, 4, 16))]
    assert away[0] > 2 * away[1] > 4 * away[2]
    assert away[2] < 0.03


def test_walk_jump_samples_the_data():
    """Langevin at one level of a mixture started right, then the jump: the denoised law."""
    process = ds.processes.edm()
    target = ds.targets.gaussian([0.7], 0.6)
    walk = solvers.langevin(process, 0.5, 60, keep=0.8)
    jump = walk.then(ds.solvers.ddim(process, [0.5, 0.0]))
    x = 0.7 + jax.random.normal(jax.random.key(0), (4000, 1))
    out = ds.sample(target.score_fn(process, "data"), jump, x, key=jax.random.key(1))
    s2 = 0.6 + 0.25
    stationary = s2 * 1.8 / (2 - 0.2 * 0.25 / s2)
    want = (0.6 / s2) ** 2 * stationary
    assert float(jnp.var(out)) == pytest.approx(want, rel=0.08)
    assert float(jnp.mean(out)) == pytest.approx(0.7, abs=0.05)
