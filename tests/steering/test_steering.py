"""Particles against the exact laws that their weights aim at."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import gaussian_moments

import diffsamp as ds
from diffsamp import guidance, steering

PROCESS = ds.processes.vp_linear()
NORMAL = ds.targets.gaussian([0.0], 1.0).score_fn(PROCESS, "data")


def first(x_0, level, cond):
    del level, cond
    return x_0[:, 0]


def ddpm(process=PROCESS, n=30):
    return ds.solvers.ddpm(process, ds.schedules.logsnr(process, n))


def moments(result):
    """Pooled mean and variance of independent particle systems, and the mean's standard error."""
    w = np.exp(np.asarray(result.log_weights, np.float64))
    x = np.asarray(result.x, np.float64)[..., 0]
    means = (w * x).sum(1) / w.sum(1)
    away = (w * (x - means.mean()) ** 2).sum(1) / w.sum(1)
    return means.mean(), away.mean(), means.std(ddof=1) / np.sqrt(len(means))


def starts(process, batch, particles, scale=1.0):
    return scale * process.prior_sample(jax.random.key(0), (batch, particles, 1))


@pytest.mark.parametrize(
    "threshold",
    [pytest.param(0.0, marks=pytest.mark.long), 0.5, pytest.param(1.0, marks=pytest.mark.long)],
)
def test_a_linear_reward_tilts_the_chain(threshold):
    """N(m + v / T, v) with the chain's own v at 30 rows, whether it resamples or accumulates.

    64000 particles: the variance's deviation is 0.7 %. The loop itself is replayed exactly in
    test_replay.py; this is that its resampling aims where it should.
    """
    tableau, temperature = ddpm(), 1.0
    mean, variance = gaussian_moments(tableau, 0.0, 1.0, start=(0.0, 1.0))
    result = steering.sample(
        NORMAL,
        tableau,
        starts(PROCESS, 16, 4000),
        key=jax.random.key(1),
        particles=4000,
        potential=steering.reward(first, temperature),
        threshold=threshold,
    )
    got = moments(result)
    assert got[0] == pytest.approx(mean + variance, rel=0.015)
    assert got[1] == pytest.approx(variance, rel=0.02)
    assert got[0] > 0.7  # weights dropped where nothing is resampled would leave it at 0.007
    # log_Z is unbiased for E[exp(r)] of the chain
    estimate = np.exp(np.asarray(result.log_Z)).mean()
    assert estimate == pytest.approx(np.exp(mean + variance / 2), rel=0.015)
    np.testing.assert_allclose(np.exp(result.log_weights).sum(1), 1, rtol=1e-4)
    assert np.all(result.ess <= 4000.5)


@pytest.mark.long
def test_correctors_reach_the_product():
    """q_1 = N(1, 1/4), q_2 = N(0, 1): the tilted Gaussian, which the plain sampler misses.

    With resampling; what the weights aim at is exact in test_replay.py.
    """
    betas, moments_ = (2.0, -1.0), (8 / 7, 1 / 7)
    process = ds.processes.edm()
    parts = [ds.targets.gaussian([m], v).score_fn(process, "data") for m, v in ((1, 0.25), (0, 1))]
    combined = guidance.combine([(p, {}) for p in parts], betas)
    times = np.append(np.geomspace(80.0, 0.01, 300), 0.0)
    tableau = ds.solvers.ddpm(process, times)
    x_T = starts(process, 4, 3000, 1 / np.sqrt(sum(betas)))
    run = lambda threshold: moments(  # noqa: E731
        steering.sample(
            combined,
            tableau,
            x_T,
            key=jax.random.key(1),
            particles=3000,
            potential=steering.scores(betas),
            threshold=threshold,
        )
    )
    mean, variance, _ = run(0.5)
    assert mean == pytest.approx(moments_[0], abs=0.03)
    assert variance == pytest.approx(moments_[1], rel=0.08)
    plain = ds.sample(combined, tableau, x_T.reshape(-1, 1), key=jax.random.key(2))
    assert abs(float(plain.mean()) - moments_[0]) > 0.05


@pytest.mark.long
def test_a_twisted_proposal_samples_the_posterior_of_a_mixture():
    """A skewed mixture with y = x + .5 z: exact by quadrature; guidance without weights is off."""
    target = ds.targets.gaussian_mixture(
        [0.3, 0.5, 0.2], [[-1.0], [0.4], [1.5]], np.array([0.04, 0.09, 0.25])
    )
    network, y, noise = target.score_fn(PROCESS, "data"), 0.9, 0.5
    grid = np.linspace(-4, 5, 4001)
    density = np.exp(np.asarray(target.log_prob(grid[:, None])) - 0.5 * ((y - grid) / noise) ** 2)
    want = (grid * density).sum() / density.sum()
    spread = ((grid - want) ** 2 * density).sum() / density.sum()

    def log_psi(data, level, cond):
        del cond
        r2 = level.sigma**2 / (level.sigma**2 + level.alpha**2)
        total = noise**2 + r2
        return -0.5 * (y - data[:, 0]) ** 2 / total - 0.5 * jnp.log(total)

    proposal = guidance.loss(network, lambda d, level, cond: -log_psi(d, level, cond))
    tableau = ddpm(n=50)
    options = {"key": jax.random.key(1), "particles": 1500, "potential": steering.twist(log_psi)}
    x_T = starts(PROCESS, 6, 1500)
    got = moments(steering.sample(network, tableau, x_T, proposal=proposal, **options))
    assert got[0] == pytest.approx(want, abs=0.03)
    assert got[1] == pytest.approx(spread, rel=0.1)
    bare = moments(steering.sample(network, tableau, x_T, **options))  # weights alone
    assert bare[0] == pytest.approx(want, abs=0.05)
    # a proposal that is wrong by itself is put right
    strong = guidance.loss(network, lambda d, level, cond: -log_psi(d, level, cond), 2.0)
    alone = ds.sample(strong, tableau, x_T.reshape(-1, 1), key=jax.random.key(2))
    assert abs(float(alone.mean()) - want) > 0.06
    steered = moments(steering.sample(network, tableau, x_T, proposal=strong, **options))
    assert steered[0] == pytest.approx(want, abs=0.02 + 4 * steered[2])
    assert steered[2] < 0.04
    # a proposal that is no transform of this network: asked beside it, with the same law
    other = guidance.loss(
        target.score_fn(PROCESS, "noise"), lambda d, level, cond: -log_psi(d, level, cond)
    )
    again = moments(steering.sample(network, tableau, x_T, proposal=other, **options))
    assert again[0] == pytest.approx(want, abs=0.03)


def test_one_call_of_the_network_and_no_dependence_on_the_batch():
    traces = []

    def apply(params, x, t):
        traces.append(x.shape)
        return NORMAL.apply(params, x, t)

    network = ds.ScoreFn(apply, NORMAL.params, PROCESS, prediction="data")
    tableau, keys = ddpm(n=6), jax.random.split(jax.random.key(3), 3)
    options = {"particles": 5, "potential": steering.reward(first, 0.3)}
    x_T = starts(PROCESS, 3, 5)
    whole = steering.sample(network, tableau, x_T, key=keys, **options)
    assert set(traces) == {(15, 1)}
    alone = steering.sample(network, tableau, x_T[1:2], key=keys[1:2], **options)
    for got, want in zip(alone, whole, strict=True):
        np.testing.assert_allclose(got[0], want[1], rtol=1e-4, atol=1e-5)
    assert whole.x.shape == (3, 5, 1)
    assert whole.ess.shape == (3,)
    same = steering.sample(network, tableau, x_T[:, 0], key=keys, **options)  # one start for all
    assert np.asarray(same.x).std() > 0.1


def test_an_axis_of_the_data_is_none_of_particles():
    """(2, 4) may be two states of four numbers, for a network that takes nothing else."""

    def apply(params, x, t):
        return x @ params

    network = ds.ScoreFn(apply, 0.5 * jnp.eye(4), PROCESS, prediction="data")
    options = {
        "key": jax.random.key(3),
        "potential": steering.reward(first, 0.3),
        "particles": 4,
    }
    x_T = jax.random.normal(jax.random.key(1), (2, 4))
    inferred = steering.sample(network, ddpm(n=6), x_T, **options)
    said = steering.sample(network, ddpm(n=6), x_T, own_starts=False, **options)
    assert inferred.x.shape == said.x.shape == (2, 4, 4)
    np.testing.assert_array_equal(inferred.x, said.x)
    either = ds.targets.gaussian([0.0], 1.0).score_fn(PROCESS)
    assert steering.sample(either, ddpm(n=6), x_T[..., None], **options).x.shape == (2, 4, 1)
    with pytest.raises(ValueError, match=r"one start for each of 4 particles"):
        steering.sample(network, ddpm(n=6), x_T[:, :3], own_starts=True, **options)


def test_multistep_samplers_and_rows_without_evaluation():
    """SDE-DPM-Solver++ keeps its histories through resampling; Restart's noise rows add nothing."""
    restart = ds.solvers.restart(
        PROCESS,
        ds.schedules.logsnr(PROCESS, 12),
        intervals=[(3, 2, 0.3, 2.0)],
        solver=ds.solvers.ddim,
    )
    for tableau, slack in (
        (ds.solvers.get("dpmpp_2m_sde")(PROCESS, ds.schedules.logsnr(PROCESS, 20)), 0.06),
        (restart, 0.12),
    ):
        mean, variance = gaussian_moments(tableau, 0.0, 1.0, start=(0.0, 1.0))
        result = steering.sample(
            NORMAL,
            tableau,
            starts(PROCESS, 8, 1500),
            key=jax.random.key(1),
            particles=1500,
            potential=steering.reward(first, 1.0),
        )
        assert moments(result)[0] == pytest.approx(mean + variance, abs=slack)


def test_best_of_n_is_the_maximum():
    """r(x) = x on N(0, 1): E max of 4 is 1.029, of 16 1.766."""
    tableau = ds.solvers.dpmpp(PROCESS, ds.schedules.logsnr(PROCESS, 12), order=2)
    for n, want in ((4, 1.029), (16, 1.766)):
        x, rewards = steering.best_of(
            NORMAL, tableau, starts(PROCESS, 4000, n), reward=lambda v: v[:, 0]
        )
        width = np.sqrt(gaussian_moments(tableau, 0.0, 1.0, start=(0.0, 1.0))[1])
        assert float(x.mean()) == pytest.approx(want * width, abs=0.04)
        np.testing.assert_array_equal(rewards.max(1), x[:, 0])
        assert rewards.shape == (4000, n)


def test_neighbours_stay_draws_of_the_prior():
    """Without preference (a constant reward keeps the pivot, an inverted one takes neighbours)."""
    tableau = ds.solvers.ddim(PROCESS, ds.schedules.logsnr(PROCESS, 8))
    x_T = PROCESS.prior_sample(jax.random.key(0), (4000, 1))
    x, kept, rewards = steering.search_noise(
        NORMAL,
        tableau,
        x_T,
        reward=lambda v: v[:, 0],
        key=jax.random.key(1),
        neighbours=3,
        rounds=4,
        radius=0.5,
    )
    assert rewards.shape == (4, 4000)
    assert np.all(np.diff(rewards, axis=0) >= -1e-5)
    assert float(rewards[-1].mean()) > 1.0
    np.testing.assert_allclose(x, ds.sample(NORMAL, tableau, kept), rtol=1e-4, atol=1e-5)
    one = steering.search_noise(
        NORMAL,
        tableau,
        x_T,
        reward=lambda v: jnp.arange(v.shape[0]) % 2,
        key=jax.random.key(1),
        neighbours=1,
        rounds=1,
        radius=0.5,
    )[1]
    assert float(jnp.std(one)) == pytest.approx(float(tableau.sigma[0]), rel=0.05)


@functools.partial(jax.jit, static_argnames="steps")
def mala(x, key, step, steps):
    """On N(0, 2)."""
    return steering.mala(lambda v: -0.25 * v[:, 0] ** 2, x, key=key, step=step, steps=steps)


@pytest.mark.parametrize("step", [0.02, 0.1, 0.5])
def test_mala_is_exact_for_every_step(step):
    """N(0, 2): 2 eps for 4 eps in the proposal's density gives 285, 209, 85 instead of 2."""
    x = jnp.sqrt(2.0) * jax.random.normal(jax.random.key(0), (10000, 1))
    out, accepted = mala(x, jax.random.key(1), step, steps=200)
    assert float(out.var()) == pytest.approx(2.0, rel=0.06)
    assert 0.5 < float(accepted.mean()) <= 1.0
    keys = jax.random.split(jax.random.key(2), 3)
    one, _ = mala(x[5:6], keys[1:2], step, steps=9)
    many, _ = mala(x[4:7], keys, step, steps=9)
    np.testing.assert_allclose(one[0], many[1], rtol=1e-5)


def test_hmc_on_a_quartic():
    """Variance of exp(-x^4 / 4) is 2 Gamma(3/4) / Gamma(1/4) = .676; also with kept velocities."""
    x = 0.8 * jax.random.normal(jax.random.key(0), (20000, 1))
    for keep in (0.0, 0.9):
        out, accepted = steering.hmc(
            lambda v: -0.25 * v[:, 0] ** 4,
            x,
            key=jax.random.key(1),
            step=0.5,
            leaps=2,
            steps=60,
            keep=keep,
        )
        assert float(out.var()) == pytest.approx(0.676, rel=0.04)
        assert float(accepted.mean()) < 0.99


def test_it_says_what_is_wrong():
    key, x_T = jax.random.key(0), starts(PROCESS, 2, 4)
    ddim = ds.solvers.ddim(PROCESS, ds.schedules.logsnr(PROCESS, 5))
    options = {"key": key, "particles": 4}
    with pytest.raises(ValueError, match="adds no noise"):
        steering.sample(NORMAL, ddim, x_T, potential=steering.reward(first), **options)
    with pytest.raises(ValueError, match="needs a `combine` of as many terms"):
        steering.sample(NORMAL, ddpm(), x_T, potential=steering.scores([2.0]), **options)
    combined = guidance.combine([(NORMAL, {})], [2.0])
    renoise = ds.solvers.renoise(PROCESS, ds.schedules.logsnr(PROCESS, 5), share=0.5)
    with pytest.raises(ValueError, match=r"belong to ancestral rows, solvers\.ddpm"):
        steering.sample(combined, renoise, x_T, potential=steering.scores([2.0]), **options)
    bad = steering.reward(lambda x, level, cond: jnp.sum(x))
    with pytest.raises(ValueError, match="a potential must return one number per sample"):
        steering.sample(NORMAL, ddpm(), x_T, potential=bad, **options)
    with pytest.raises(ValueError, match="`temperature` must be positive"):
        steering.reward(first, 0.0)
    with pytest.raises(ValueError, match="`threshold` must lie"):
        steering.sample(
            NORMAL, ddpm(), x_T, potential=steering.reward(first), threshold=2.0, **options
        )
