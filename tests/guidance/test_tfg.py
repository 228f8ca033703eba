"""Training-free guidance and travel in time: the papers' loops in NumPy, and exact laws."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import gaussian_moments
from guidance.exact import build, law

import diffsamp as ds
from diffsamp import guidance, schedules, solvers

PROCESS = ds.processes.vp_linear()
COV = np.array([[1.0, 0.8], [0.8, 1.0]])
PAIR = ds.targets.gaussian([0.0, 0.0], COV)
NOISE = 0.3  # of the measurement y = x_1 + NOISE z = 1


def misfit(data, level, cond):
    del level, cond
    return 0.5 * (data[:, 0] - 1.0) ** 2 / NOISE**2


def moments(tableau, rho, mu, steps, shape, smooth=0.0):
    """The algorithm's mean and covariance on Gaussians, from its own pseudo-code.

    Every step of it is affine: D = A x; grad_x f(D) = A^T h (D - 1) with h = 1 / NOISE^2 on the
    first element, or 1 / (NOISE^2 + (smooth sigma)^2) for many draws.
    """
    mean, cov = np.zeros(2), np.eye(2) * tableau.sigma[0] ** 2
    where = np.diag([1.0, 0.0])
    asked = tableau.evaluates
    pairs = list(zip(tableau.alpha, tableau.alpha[1:], strict=False))
    step = np.array([(a / b) ** 2 for a, b in pairs])
    along = {"increase": step, "decrease": 1 - step, "constant": np.ones(len(step))}[shape]
    along = along / along[asked].mean()
    for n in range(tableau.rows):
        alpha, sigma = tableau.alpha[n], tableau.sigma[n]
        if not asked[n]:
            ratio = tableau.alpha[n + 1] / alpha
            room = tableau.sigma[n + 1] ** 2 - (ratio * sigma) ** 2
            mean, cov = ratio * mean, ratio**2 * cov + room * np.eye(2)
            continue
        then = tableau.alpha[n + 1]
        slope = alpha * COV @ np.linalg.inv(alpha**2 * COV + sigma**2 * np.eye(2))
        stiff = 1 / (NOISE**2 + (smooth * sigma) ** 2)
        data, offset = slope, np.zeros(2)  # D_k = data x + offset
        for _ in range(steps):
            move = np.eye(2) - mu * along[n] * stiff * where
            data, offset = move @ data, move @ offset + mu * along[n] * stiff * where @ np.ones(2)
        noise = (np.eye(2) - alpha * slope) / sigma
        kept = np.sqrt(tableau.sigma[n + 1] ** 2 - tableau.c[n] ** 2)
        through = rho * along[n] * then / alpha * stiff * slope.T @ where
        total = kept * noise + then * data - through @ slope
        constant = then * offset + through @ np.ones(2)
        mean = total @ mean + constant
        cov = total @ cov @ total.T + tableau.c[n] ** 2 * np.eye(2)
    return mean, cov


CASES = {
    "both": (0.02, 0.01, 3, "increase"),
    "dps": (0.05, 0.0, 4, "decrease"),
    "mpgd": (0.0, 0.02, 4, "constant"),
}


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
@pytest.mark.parametrize(("rho", "mu", "steps", "shape"), CASES.values(), ids=CASES)
def test_its_law_is_that_of_the_papers_loop(rho, mu, steps, shape, solver, x64):
    """Exact moments after 2 passes of 12 rows, and 2 % more of either number shows."""
    network = PAIR.score_fn(PROCESS, "noise")
    tableau = solvers.travel(build(solver, PROCESS, 12), 2)
    make = lambda r, m: guidance.tfg(network, misfit, tableau, r, m, steps=steps, shape=shape)  # noqa: E731
    got, want = law(make(rho, mu), tableau, 2), moments(tableau, rho, mu, steps, shape)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)
    for r, m in ((1.02 * rho, mu), (rho, 1.02 * mu)):
        if (r, m) != (rho, mu):
            assert np.abs(law(make(r, m), tableau, 2)[0] - want[0]).max() > 1e-4
    assert make(rho, mu).gradients(tableau) == (tableau.nfe if rho else 0)
    assert tableau.nfe == 24


@pytest.mark.long
def test_draws_widen_the_likelihood(x64):
    """-log mean exp(-f) over D + s sigma z is the likelihood of variance NOISE^2 + (s sigma)^2."""
    network, keys = PAIR.score_fn(PROCESS, "data"), jax.random.split(jax.random.key(0), 256)
    tableau = build("ddim", PROCESS, 4)
    x_T = jnp.tile(jnp.array([[0.3, -0.5]]), (256, 1))
    options = {"steps": 2, "shape": "constant"}
    drawn = guidance.tfg(
        network, misfit, tableau, 0.02, 0.01, smooth=0.5, samples=64, key=keys, **options
    )

    def wide(data, level, cond):
        del cond
        return 0.5 * (data[:, 0] - 1.0) ** 2 / (NOISE**2 + 0.25 * level.sigma**2)

    run = ds.trajectory(drawn, tableau, x_T)
    want = ds.trajectory(guidance.tfg(network, wide, tableau, 0.02, 0.01, **options), tableau, x_T)
    for n in (1, 3):
        away = np.asarray(run.points[n] - want.points[n])
        spread = np.std(away, axis=0).max() / 16
        np.testing.assert_allclose(np.mean(away, axis=0), 0, atol=4 * spread + 2e-3)
    sharp, smooth = (moments(tableau, 0.02, 0.01, 2, "constant", s)[0] for s in (0.0, 0.5))
    assert np.abs(sharp - smooth).max() > 0.05
    alone = dataclasses.replace(drawn, key=keys[2:3])
    np.testing.assert_allclose(ds.sample(alone, tableau, x_T[2:3])[0], run.points[-1][2], rtol=1e-9)


def test_its_parts_are_the_other_methods(x64):
    """rho = 0 is `mpgd`; mu = 0 is `loss` with the noise kept."""
    network = PAIR.score_fn(PROCESS, "noise")
    tableau, x_T = build("ddim", PROCESS, 6), jnp.array([[0.3, -0.5], [2.0, 1.0]])
    options = {"steps": 3, "shape": "constant"}
    descended = guidance.tfg(network, misfit, tableau, 0.0, 0.02, **options)
    np.testing.assert_allclose(
        ds.sample(descended, tableau, x_T),
        ds.sample(guidance.mpgd(network, misfit, 0.02, tableau, repeats=3), tableau, x_T),
        rtol=1e-10,
    )
    through = guidance.tfg(network, misfit, tableau, 0.05, 0.0, **options)
    scale = 0.05 / tableau.sigma[:-1] ** 2
    kept = guidance.loss(network, misfit, scale, gain=guidance.keep_noise(tableau))
    np.testing.assert_allclose(
        ds.sample(through, tableau, x_T), ds.sample(kept, tableau, x_T), rtol=1e-10
    )
    # from alpha = 0 there is no gradient through the network, and the rest is finite
    flow = ds.processes.flow()
    rows = ds.solvers.ddim(flow, schedules.uniform(flow, 6))
    for shape in ("increase", "decrease", "constant"):
        guided = guidance.tfg(
            PAIR.score_fn(flow, "velocity"), misfit, rows, 0.02, 0.01, shape=shape
        )
        assert np.isfinite(ds.sample(guided, rows, x_T)).all()


@pytest.mark.parametrize("process", [PROCESS, ds.processes.edm(), ds.processes.flow()])
def test_travel_is_the_forward_process(process):
    """Rows that go up and down between; an exact network's law stays, whatever the repeats."""
    plain = ds.solvers.ddpm(process, schedules.logsnr(process, 5))
    again = solvers.travel(plain, [1, 2, 3, 1, 2])
    again.check()
    assert again.nfe == 9
    assert again.rows == 13
    np.testing.assert_array_equal(again.times[[1, 2, 3]], plain.times[[1, 2, 1]])
    same = solvers.travel(plain, 1)
    for name in ("times", "a", "b", "c", "evaluates"):
        np.testing.assert_array_equal(getattr(same, name), getattr(plain, name))
    # the way up from right samples gives right samples: the error is that of the rows, of order 1

    def variance(n, factor=1.0):
        rows = ds.solvers.ddpm(process, schedules.logsnr(process, n))
        twice = solvers.travel(rows, np.append(np.full(n - 1, 2), 1))
        c = np.where(twice.evaluates, twice.c, factor * twice.c)
        return gaussian_moments(dataclasses.replace(twice, c=c), 0.7, 0.6)[1]

    errors = [0.6 - variance(n) for n in (100, 400)]
    assert 3.5 < errors[0] / errors[1] < 4.5
    wrong = [0.6 - variance(n, 1.02) for n in (100, 400)]
    assert not 3.5 < wrong[0] / wrong[1] < 4.5


def test_they_say_what_is_wrong():
    network, tableau = PAIR.score_fn(PROCESS, "data"), build("ddim", PROCESS, 4)
    with pytest.raises(ValueError, match="`rho` must not be negative"):
        guidance.tfg(network, misfit, tableau, -1.0, 0.0)
    with pytest.raises(ValueError, match="`shape` must be one of"):
        guidance.tfg(network, misfit, tableau, 1.0, 0.0, shape="cosine")
    with pytest.raises(ValueError, match="pass `key`"):
        guidance.tfg(network, misfit, tableau, 1.0, 0.0, smooth=0.1)
    with pytest.raises(ValueError, match="rows of one state and one output"):
        guidance.tfg(network, misfit, build("unipc2", PROCESS, 4), 1.0, 0.0)
    with pytest.raises(TypeError, match="outside `jit`"):
        jax.jit(lambda r: guidance.tfg(network, misfit, tableau, r, 0.0))(1.0)
    with pytest.raises(ValueError, match="`repeats` must be at least 1"):
        solvers.travel(tableau, 0)
    with pytest.raises(ValueError, match="one per row"):
        solvers.travel(tableau, [1, 2])
    with pytest.raises(ValueError, match="rows of one state and one output"):
        solvers.travel(build("dpmpp_2m", PROCESS, 4), 2)
    rising = ds.solvers.ddim(PROCESS, tableau.times[-2::-1])
    with pytest.raises(ValueError, match="towards less noise"):
        solvers.travel(rising, 2)
