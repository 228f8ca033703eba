"""Several laws in one state: coupled Gaussians against their ODE, laws alone, frequencies."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
from scipy.integrate import solve_ivp

import diffsamp as ds

KEY = jax.random.key(0)
LAWS = {"edges": ds.processes.ve(0.1, 3.0), "nodes": ds.processes.vp_linear(0.1, 6.0)}
SHAPES = {"edges": (2,), "nodes": (1, 2)}
# data of four correlated numbers, the edges first
MEAN = np.array([0.5, -0.3, 0.2, 0.7])
ROOT = np.array([[0.9, 0, 0, 0], [0.4, 0.5, 0, 0], [-0.5, 0.3, 0.6, 0], [0.2, -0.4, 0.3, 0.5]])
COV = ROOT @ ROOT.T


def levels(t, laws=LAWS):
    """alpha and sigma of the four numbers."""
    pairs = [laws[name] for name in ("edges", "edges", "nodes", "nodes")]
    return (
        np.array([float(f(np.float64(t))) for f in fs])
        for fs in zip(*[(p.alpha, p.sigma) for p in pairs], strict=True)
    )


def coupled(prediction="noise", laws=LAWS):
    """The perfect network of the whole pytree."""

    def apply(params, x, t):
        flat = jnp.concatenate([x["edges"], x["nodes"][:, 0]], axis=1)
        on = [laws[k] for k in ("edges", "edges", "nodes", "nodes")]
        alpha, sigma = (
            jnp.stack(v, axis=1) for v in zip(*[(p.alpha(t), p.sigma(t)) for p in on], strict=True)
        )
        dtype = flat.dtype
        cov = alpha[:, :, None] * jnp.asarray(COV, dtype)[None] * alpha[:, None]
        cov = cov + jax.vmap(jnp.diag)(sigma**2)
        away = flat - alpha * jnp.asarray(MEAN, dtype)[None]
        noise = sigma * jnp.linalg.solve(cov, away[..., None])[..., 0]
        out = {"noise": noise, "score": -noise / sigma, "data": (flat - sigma * noise) / alpha}[
            prediction
        ]
        return {"edges": out[:, :2], "nodes": out[:, None, 2:]}

    return ds.ScoreFn(apply, None, laws["nodes"], prediction=prediction)


def exact(x, s, t):
    """dx/dt = alpha'/alpha x - g^2 / 2 score with numerical derivatives of the coefficients."""

    def rhs(time, y):
        alpha, sigma = levels(time)
        h = 1e-6
        later, earlier = [np.array(list(levels(time + d))) for d in (h, -h)]
        alpha_dot, sigma_dot = (later - earlier) / (2 * h)
        cov = alpha[:, None] * COV * alpha[None] + np.diag(sigma**2)
        score = -np.linalg.solve(cov, (y.reshape(-1, 4) - alpha * MEAN).T).T
        drift = alpha_dot / alpha
        half = sigma * (sigma_dot - drift * sigma)
        return (drift * y.reshape(-1, 4) - half * score).ravel()

    return solve_ivp(rhs, (s, t), x.ravel(), rtol=1e-9, atol=1e-11).y[:, -1].reshape(-1, 4)


X_T = np.array([[2.0, -1.0, 0.3, 0.8], [-3.0, 0.5, -1.2, 0.1]])
BEGIN, END = 1.0, 0.02
TRUE = exact(X_T, BEGIN, END)


LIMIT = 0.002


def error(joint, solver, n, **options):
    network, tableau = joint.sampler(
        solver, np.linspace(BEGIN**0.5, END**0.5, n + 1) ** 2, **options
    )
    assert tableau.nfe == n * (2 if solver == "heun" else 1)
    return np.abs(np.asarray(ds.sample(network, tableau, jnp.asarray(X_T))) - TRUE).max()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("solver", "prediction", "order"),
    [("ddim", "score", 1), ("dpmpp_2m", "noise", 2), ("unipc2", "data", 2), ("heun", "noise", 2)],
)
def test_two_coupled_leaves_follow_their_ode(solver, prediction, order):
    joint = ds.joint.per_leaf(coupled(prediction), LAWS, SHAPES)
    coarse, fine = error(joint, solver, 15), error(joint, solver, 60)
    assert fine < (0.02 if order == 1 else LIMIT)
    assert np.log2(coarse / fine) / 2 > order - 0.35


@pytest.mark.usefixtures("x64")
def test_a_law_wrong_by_two_percent_is_seen():
    wrong = {**LAWS, "edges": ds.processes.ve(0.1, 3.06)}
    joint = ds.joint.per_leaf(coupled(), wrong, SHAPES)
    assert error(joint, "dpmpp_2m", 60) > 5 * LIMIT


@pytest.mark.parametrize("solver", ["unipc3", "deis_tab2", "euler"])
def test_leaves_that_do_not_meet_are_sampled_as_alone(solver):
    """Each leaf with its own process, tableau and network: the same numbers."""
    targets = {
        "edges": ds.targets.gaussian([1.0, -1.0], [0.3, 0.2]),
        "nodes": ds.targets.gaussian([0.5, 0.2], [0.1, 0.5]),
    }
    alone = {k: targets[k].score_fn(LAWS[k], "noise") for k in LAWS}

    def apply(params, x, t):
        flat = {"edges": x["edges"], "nodes": x["nodes"][:, 0]}
        out = {k: f.apply(f.params, flat[k], t) for k, f in alone.items()}
        return {"edges": out["edges"], "nodes": out["nodes"][:, None]}

    joint = ds.joint.per_leaf(
        ds.ScoreFn(apply, None, LAWS["edges"], prediction="noise"), LAWS, SHAPES
    )
    times = np.linspace(1.0, 0.01, 9)
    network, tableau = joint.sampler(solver, times)
    x_T = joint.prior_sample(KEY, 5)
    parts = joint.parts(ds.sample(network, tableau, x_T))
    starts = joint.parts(x_T)
    for k in LAWS:
        own = ds.solvers.get(solver)(LAWS[k], times)
        start = starts[k].reshape(5, 2)
        expected = ds.sample(alone[k], own, start)
        np.testing.assert_allclose(parts[k].reshape(5, 2), expected, rtol=2e-5, atol=2e-5)


def test_a_stochastic_sampler_has_the_laws_covariance():
    joint = ds.joint.per_leaf(coupled(), LAWS, SHAPES)
    times = np.append(np.linspace(1.0, 0.15, 60) ** 2, 0.01)
    network, tableau = joint.sampler("ddpm", times)
    x = ds.sample(network, tableau, joint.prior_sample(KEY, 6000), key=jax.random.key(1))
    alpha, sigma = levels(0.01)
    cov = alpha[:, None] * COV * alpha[None] + np.diag(sigma**2)
    found = np.asarray(x, np.float64)
    # from the prior, which is not quite the law at t = 1: 0.05 of 0.9 is left of the mean
    np.testing.assert_allclose(np.cov(found.T), cov, atol=0.06)
    # guidance inside acts leaf by leaf
    same = ds.guidance.combine([(coupled(), {}), (coupled(), {})], [3.0, -2.0])
    guided = ds.joint.per_leaf(same, LAWS, SHAPES).sampler("ddpm", times)
    start = joint.prior_sample(KEY, 3)
    np.testing.assert_allclose(
        ds.sample(*guided, start, key=KEY), ds.sample(network, tableau, start, key=KEY), atol=2e-3
    )


def spectrum(shape):
    i, j = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
    return 1.0 / (1 + i**2 + j**2)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_2m_sde"])
def test_blurring_diffusion_of_a_gaussian_field(solver):
    """Pixels with a known spectrum: the network sees pixels, samples have the data's variances."""
    shape = (4, 3)
    laws, index = ds.joint.blurring(*shape, blur=3.0)
    power = spectrum(shape)

    def apply(params, x, t):
        u = jax.vmap(lambda v: jax.scipy.fft.dctn(v[..., 0], norm="ortho"))(x)
        tau = (3.0 * jnp.sin(jnp.pi / 2 * t) ** 2) ** 2 / 2
        i, j = np.meshgrid(*[np.pi * np.arange(n) / n for n in shape], indexing="ij")
        rate = jnp.asarray(i**2 + j**2, x.dtype)[None]
        fade = (1 - 1e-3) * jnp.exp(-rate * tau[:, None, None]) + 1e-3
        base = ds.processes.vp_cosine()
        alpha, sigma = base.alpha(t)[:, None, None] * fade, base.sigma(t)[:, None, None]
        noise = sigma * u / (alpha**2 * jnp.asarray(power, x.dtype)[None] + sigma**2)
        return jax.vmap(lambda v: jax.scipy.fft.idctn(v, norm="ortho"))(noise)[..., None]

    score_fn = ds.ScoreFn(apply, None, ds.processes.vp_cosine(), prediction="noise")
    joint = ds.joint.per_frequency(score_fn, laws, index, (*shape, 1))
    t_max = laws[0].t_max
    times = np.append(t_max * np.linspace(1, 0.02, 60), 0.0)
    network, tableau = joint.sampler(solver, times)
    u = ds.sample(network, tableau, joint.prior_sample(KEY, 8000), key=jax.random.key(1))
    found = np.var(np.asarray(u)[..., 0], axis=0)
    # four times the 1.6 % of 8000 samples
    np.testing.assert_allclose(found, power, rtol=0.065)
    pixels = joint.parts(u)
    np.testing.assert_allclose(
        pixels[0, ..., 0], scipy.fft.idctn(np.asarray(u)[0, ..., 0], norm="ortho"), atol=1e-5
    )
    np.testing.assert_allclose(joint.state(pixels), u, atol=1e-5)


def test_the_laws_of_blurring():
    laws, index = ds.joint.blurring(4, 4, blur=2.0)
    assert index.shape == (4, 4, 1)
    assert len(laws) == 10  # i^2 + j^2 for 0 <= i <= j < 4
    t, h = np.array([0.1, 0.4, 0.8]), 1e-6
    base = ds.processes.vp_cosine()
    for (i, j), k in np.ndenumerate(index[..., 0]):
        law = laws[k]
        tau = (2.0 * np.sin(np.pi * t / 2) ** 2) ** 2 / 2
        fade = np.exp(-(np.pi**2) * (i**2 + j**2) / 16 * tau) * 0.999 + 0.001
        np.testing.assert_allclose(law.alpha(t), base.alpha(t) * fade, rtol=1e-9)
        np.testing.assert_allclose(law.sigma(t), base.sigma(t))
        np.testing.assert_allclose(law.time(law.log_snr(t)), t, rtol=1e-9)
        np.testing.assert_allclose(
            law.alpha_dot(t), (law.alpha(t + h) - law.alpha(t - h)) / 2 / h, rtol=1e-5
        )
        assert (law.alpha(0.0), law.sigma(0.0)) == (1, 0)
    np.testing.assert_allclose(
        ds.joint.cosine_basis(5) @ np.eye(5),
        scipy.fft.dct(np.eye(5), axis=0, norm="ortho"),
        atol=1e-12,
    )


@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_s4_is_the_authors_step(kind):
    """Their code's step in NumPy, of a state, a score and three noises: linear, so unit by unit."""
    snr, scale, low, high = 0.3, 0.7, 0.1, 5.0
    process = ds.processes.vp_linear(low, high) if kind == "vp" else ds.processes.ve(low, high)

    def transition(x, t, dt):  # dt is negative
        if kind == "ve":
            return x, np.sqrt(
                (low * (high / low) ** t) ** 2 - (low * (high / low) ** (t + dt)) ** 2
            )
        c = 0.25 * dt * (2 * low + (2 * t + dt) * (high - low))
        return np.exp(-c) * x, np.sqrt(1 - np.exp(2 * c))

    def authors(x, score, noises, t, dt, last):
        beta = low + t * (high - low)
        sigma = low * (high / low) ** t
        g = np.sqrt(beta) if kind == "vp" else sigma * np.sqrt(2 * np.log(high / low))
        std = np.sqrt(1 - np.exp(-0.5 * t**2 * (high - low) - t * low)) if kind == "vp" else sigma
        keep = 1 + beta * dt if kind == "vp" else 1.0
        step = (snr * std) ** 2 * 2 * keep
        x = x + step * score + np.sqrt(2 * step) * noises[0] * scale
        x, width = transition(x, t, dt / 2)
        x = x + width * noises[1] - g**2 * score * dt
        x, width = transition(x, t + dt / 2, dt / 2)
        return x if last else x + width * noises[2]

    times = np.array([0.9, 0.8, 0.6])
    on_start, on_noise, fresh = ds.joint.s4(process, times, snr=snr, scale=scale).unroll(
        prediction="data"
    )
    # a network that always says x_0 = 1, and then one that says 0: both unknowns of every row
    for x_0 in (0.0, 1.0):
        for x in (0.0, 2.0):
            state = x
            for n, (s, t) in enumerate(itertools.pairwise(times)):
                score = (process.alpha(s) * x_0 - state) / process.sigma(s) ** 2
                state = authors(state, score, (0, 0, 0), s, t - s, n == 1)
            assert on_start[2] * x + on_noise[2].sum() * x_0 == pytest.approx(state, rel=1e-10)
    parts = [authors(0.0, 0.0, unit, 0.9, -0.1, False) for unit in np.eye(3)]
    assert fresh[1, 0] == pytest.approx(np.linalg.norm(parts), rel=1e-10)


def test_s4_without_langevin_tends_to_the_law_and_runs_on_leaves():
    process, off = LAWS["nodes"], []
    for n in (40, 80):
        made = ds.joint.s4(process, np.linspace(1, 0.02, n + 1), snr=0.0)
        off.append(float(ds.evaluation.describe.gaussian_spread(made, [0.7])[0]) - 1)
    assert abs(off[1]) < 0.03
    assert 0.7 < np.log2(off[0] / off[1]) < 1.3
    graph = ds.joint.per_leaf(coupled(), LAWS, SHAPES)
    _, tableau = graph.sampler(ds.joint.s4, np.linspace(1.0, 0.02, 9), snr=0.1)
    assert tableau.nfe == 8
    assert np.ptp(tableau.c[0]) > 0.01  # a noise of its own for every law
    with pytest.raises(ValueError, match="`snr` and `scale` must be"):
        ds.joint.s4(process, [1.0, 0.5], snr=-1.0)
    with pytest.raises(ValueError, match="too long for s4"):
        ds.joint.s4(process, [1.0, 0.5])


def test_bad_input_is_refused():
    joint = ds.joint.per_leaf(coupled(), LAWS, SHAPES)
    times = np.linspace(1.0, 0.1, 4)
    with pytest.raises(
        ValueError, match=r"asks laws\['nodes'\] at other times than laws\['edges'\]"
    ):
        joint.sampler("dpm2", times)
    network, _ = joint.sampler("ddim", times)
    alone = ds.solvers.ddim(LAWS["nodes"], times)
    with pytest.raises(ValueError, match="the tableau it came with"):
        ds.sample(network, alone, joint.prior_sample(KEY, 2))
    with pytest.raises(ValueError, match=r"laws\['edges'\]: `times` must lie between"):
        joint.sampler("ddim", [2.0, 1.0])
    with pytest.raises(ValueError, match="`shapes` must give a shape"):
        ds.joint.per_leaf(coupled(), LAWS, {"edges": (2,)})
    with pytest.raises(TypeError, match="`process` must be a diffsamp process"):
        ds.joint.per_leaf(coupled(), {"edges": 1, "nodes": 2}, SHAPES)
    with pytest.raises(ValueError, match="leaves must have the shapes"):
        joint.state({"edges": jnp.ones((1, 3)), "nodes": jnp.ones((1, 1, 2))})
    laws, index = ds.joint.blurring(2, 2)
    plain = ds.ScoreFn(lambda p, x, t: x, None, ds.processes.vp_cosine())
    with pytest.raises(ValueError, match="`index` must hold integers from 0 to 1"):
        ds.joint.per_frequency(plain, laws[:2], index, (2, 2, 1))
    with pytest.raises(ValueError, match=r"bases\[0\] must be orthonormal"):
        ds.joint.per_frequency(plain, laws, index, (2, 2, 1), bases=[np.ones((2, 2))])
    with pytest.raises(ValueError, match="scale_input=False"):
        ds.joint.per_leaf(
            ds.ScoreFn(lambda p, x, t: x, None, LAWS["edges"], prediction="edm_f"), LAWS, SHAPES
        )
    with pytest.raises(ValueError, match="`blur` must be"):
        ds.joint.blurring(2, 2, blur=-1.0)
