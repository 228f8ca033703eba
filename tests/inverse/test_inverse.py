"""Operators by their matrices, loops and distillation gradients by exact laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import all_processes
from guidance.exact import gaussians, labels, law

import diffsamp as ds
from diffsamp import inverse

PROCESS = ds.processes.vp_linear()
OPERATORS = {
    "mask": inverse.mask(
        np.array([[1, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]])[..., None]
    ),
    "downsample": inverse.downsample(2),
    "blur": inverse.blur(np.outer([1, 2, 1], [0.2, 1, 0.5]) / 6.8),
    "linear": inverse.linear(np.random.default_rng(0).normal(size=(5, 16)), (4, 4, 1)),
}


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_adjoint_and_pseudo_inverse_are_the_matrix_ones(operator, x64):
    basis = jnp.eye(16).reshape(16, 4, 4, 1)
    matrix = np.asarray(operator(basis)).reshape(16, -1).T
    shape = operator(basis).shape[1:]
    measured = jnp.eye(matrix.shape[0]).reshape(-1, *shape)
    adjoint = np.asarray(operator.adjoint(measured)).reshape(-1, 16).T
    np.testing.assert_allclose(adjoint, matrix.T, atol=1e-12)
    pinv = np.asarray(operator.pinv(measured)).reshape(-1, 16).T
    np.testing.assert_allclose(pinv, np.linalg.pinv(matrix, rcond=1e-3), atol=1e-9)
    np.testing.assert_allclose(operator.forward(basis), operator(basis))
    leaves, treedef = jax.tree.flatten(operator)
    assert jax.tree.structure(jax.tree.unflatten(treedef, leaves)) == treedef
    assert jax.jit(lambda a, x: a.pinv(a(x)))(operator, basis).shape == basis.shape


def test_operators_say_what_is_wrong():
    with pytest.raises(TypeError, match="a nonlinear operator has no pseudo-inverse"):
        inverse.nonlinear(jnp.abs).pinv(jnp.ones((1, 2)))
    with pytest.raises(ValueError, match=r"downsample\(3\) needs images"):
        inverse.downsample(3)(jnp.ones((1, 4, 4)))
    with pytest.raises(ValueError, match="of odd sizes"):
        inverse.blur(np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"`matrix` must be \(m, 16\)"):
        inverse.linear(np.ones((3, 4)), (4, 4, 1))
    same = inverse.downsample(2)
    assert jax.tree.structure(same) == jax.tree.structure(inverse.downsample(2))


@pytest.mark.long
def test_measurements_take_them(x64):
    """The exact posterior of 16 correlated pixels seen through each operator, in one row."""
    rng = np.random.default_rng(1)
    root = rng.normal(size=(16, 16)) / 4
    cov = root @ root.T + 0.1 * np.eye(16)
    prior = ds.targets.gaussian(np.zeros(16), cov).score_fn(PROCESS, "noise")
    x, t = jnp.asarray(rng.normal(size=(2, 4, 4, 1))), 0.4
    for operator in OPERATORS.values():
        matrix = np.asarray(operator(jnp.eye(16).reshape(16, 4, 4, 1))).reshape(16, -1).T
        y = operator(jnp.asarray(rng.normal(size=(2, 4, 4, 1))))
        guided = ds.guidance.measurement(prior, operator, y, 0.2, iterations=24)
        inner = matrix @ cov @ matrix.T + 0.04 * np.eye(len(matrix))
        gain = cov @ matrix.T @ np.linalg.inv(inner)
        got = guided(x, t, prediction="data")
        for i in range(2):
            exact = ds.targets.gaussian(
                gain @ np.asarray(y[i]).ravel(), cov - gain @ matrix @ cov
            ).score_fn(PROCESS, "noise")
            want = exact(x[i : i + 1], t, prediction="data")
            np.testing.assert_allclose(got[i], want[0], rtol=1e-6, atol=1e-7)


@pytest.mark.long
def test_daps_is_exact_with_the_exact_moments():
    """N(0, 1), y = x + .5 z = 1: the posterior N(.8, .2); the paper's r gives (.894, .221).

    The loop itself is replayed exactly in test_loops.py.
    """
    process = ds.processes.edm()
    network = ds.targets.gaussian([0.0], 1.0).score_fn(process, "data")
    times = np.geomspace(20.0, 0.02, 16)
    x_T = 20.0 * jax.random.normal(jax.random.key(0), (60000, 1))
    options = {"key": jax.random.key(1), "chain": 30, "step": 0.5}

    def run(**more):
        out = inverse.daps(
            network, lambda v: v, jnp.ones((60000, 1)), 0.5, x_T, times, **options, **more
        )
        return float(out.mean()), float(out.var())

    exact = run(ode_steps=1, spread=lambda level: level.sigma / np.hypot(level.sigma, 1))
    np.testing.assert_allclose(exact, (0.8, 0.2), atol=0.003)
    published = run(ode_steps=8)
    np.testing.assert_allclose(published, (0.894, 0.221), atol=0.03)  # on another grid


def test_red_diff_has_its_fixed_point():
    """(y + K m) / (1 + K), K = weight mean_t sigma^2 / S^2, for N(m, 1) and A = 1.

    Adam's own bias is .015, its steps' sizes following the draws; test_loops.py is exact.
    """
    network = ds.targets.gaussian([-0.5], 1.0).score_fn(PROCESS, "noise")
    # shuffled, so that Adam's memory sees all levels
    times = np.random.default_rng(0).permutation(np.tile(np.linspace(0.9, 0.1, 40), 75))
    alpha, sigma = PROCESS.alpha(times), PROCESS.sigma(times)
    k = 0.25 * np.mean(sigma**2 / (alpha**2 + sigma**2))
    out = inverse.red_diff(
        network,
        lambda v: v,
        jnp.ones((512, 1)),
        jnp.zeros((512, 1)),
        times,
        key=jax.random.key(0),
        rate=0.004,
    )
    assert float(out.mean()) == pytest.approx((1 - 0.5 * k) / (1 + k), abs=0.02)
    assert abs((1 - 0.5 * k) / (1 + k) - 1) > 0.1


def test_ddnm_and_diffpir_as_rows(x64):
    """The projection makes the last sample fit; DiffPIR's proximal point by hand."""
    network = ds.targets.gaussian([0.0, 0.0], [[1.0, 0.8], [0.8, 1.0]]).score_fn(PROCESS, "data")
    operator = inverse.linear(np.array([[1.0, 0.0]]))
    times = ds.schedules.logsnr(PROCESS, 12)
    transform, tableau = inverse.ddnm(network, operator, jnp.ones((3, 1)), times)
    x_T = PROCESS.prior_sample(jax.random.key(0), (3, 2), dtype=jnp.float64)
    out = ds.sample(transform, tableau, x_T, key=jax.random.key(1))
    np.testing.assert_allclose(out[:, 0], 1.0, rtol=1e-10)
    prox, rows = inverse.diffpir(network, operator, jnp.ones((3, 1)), 0.3, times, weight=4.0)
    t = 0.4
    data = np.asarray(network(x_T, t, prediction="data"))
    rho = 4.0 * 0.3**2 * (PROCESS.alpha(t) / PROCESS.sigma(t)) ** 2
    want = data.copy()
    want[:, 0] = (1.0 + rho * data[:, 0]) / (1 + rho)
    np.testing.assert_allclose(prox(x_T, t, prediction="data"), want, rtol=1e-9)
    assert rows.nfe == 12
    assert prox.gradients_per_call == 0
    mean, _ = law(prox, rows, 2)
    assert 0.5 < mean[0] < 1.0


@pytest.mark.parametrize("name", ["vp_linear", "flow"])
def test_distillation_gradients_are_those_of_their_objectives(name, x64):
    """Generator N(0.4, 0.3), data N(-0.2, 0.5): means of the gradients in closed form."""
    process, t = all_processes()[name], 0.5
    real = ds.targets.gaussian([-0.2], 0.5).score_fn(process, "noise")
    fake = ds.targets.gaussian([0.4], 0.3).score_fn(process, "noise")
    n = 40000
    x_0 = 0.4 + np.sqrt(0.3) * jax.random.normal(jax.random.key(0), (n, 1))
    alpha, sigma = process.alpha(t), process.sigma(t)
    s_real, s_fake = (alpha**2 * v + sigma**2 for v in (0.5, 0.3))
    key = jax.random.key(1)
    # of the mean: d KL(q_t || p_t) / d mean is alpha^2 (0.4 + 0.2) / S_real^2 ..
    want = alpha * sigma * 0.6 / s_real
    for gradient in (inverse.sds(real, x_0, t, key=key), inverse.vsd(real, fake, x_0, t, key=key)):
        assert float(gradient.mean()) == pytest.approx(want, abs=0.02)
    # .. and of the standard deviation: correlation with (x_0 - mean) / std
    z = (x_0 - 0.4) / np.sqrt(0.3)
    slope = float((inverse.vsd(real, fake, x_0, t, key=key) * z).mean())
    kl = alpha * sigma * np.sqrt(0.3) * (1 / s_real - 1 / s_fake)
    assert slope == pytest.approx(kl, abs=0.02)
    # score distillation lacks the entropy: it always shrinks
    alone = float((inverse.sds(real, x_0, t, key=key) * z).mean())
    assert alone == pytest.approx(alpha * sigma * np.sqrt(0.3) / s_real, abs=0.02)
    assert alone > 0 > kl
    plain = inverse.dmd(real, fake, x_0, t, key=key, normalise=False)
    np.testing.assert_allclose(
        plain, sigma / alpha * inverse.vsd(real, fake, x_0, t, key=key), rtol=1e-6, atol=1e-9
    )
    scaled = inverse.dmd(real, fake, x_0[:5], t, key=jax.random.split(key, 5))
    one = inverse.dmd(real, fake, x_0[3:4], t, key=jax.random.split(key, 5)[3:4])
    np.testing.assert_allclose(scaled[3], one[0], rtol=1e-9)


def test_editing_without_inversion(x64):
    """Equal conditions give the sample back; for equal variances the shift is a closed form."""
    network = gaussians([0.2, 1.4], [0.3, 0.3], PROCESS)
    x_0 = jnp.array([[0.1], [0.5], [-0.4]])
    times = np.linspace(0.9, 0.1, 6)
    same = inverse.ddcm(
        network,
        x_0,
        times,
        key=jax.random.key(0),
        source={"label": labels(3, 0)},
        target={"label": labels(3, 0)},
    )
    np.testing.assert_allclose(same, x_0, rtol=1e-10, atol=1e-12)
    edited = inverse.ddcm(
        network,
        x_0,
        times,
        key=jax.random.key(0),
        source={"label": labels(3, 0)},
        target={"label": labels(3, 1)},
    )
    alpha, sigma = PROCESS.alpha(times), PROCESS.sigma(times)
    left = np.prod(1 - sigma**2 / (0.3 * alpha**2 + sigma**2))
    np.testing.assert_allclose(edited - x_0, 1.2 * (1 - left), rtol=1e-9)
