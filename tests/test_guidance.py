"""Guidance and thresholding as transforms of a ScoreFn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import all_processes, skewed_mixture, twin

import diffsamp as ds
from diffsamp import guidance, schedules, solvers

PROCESS = ds.processes.vp_linear()


def apply(params, x, t, label, extra=None):
    """A conditional network whose label shifts the data; -1 is no label."""
    shift = jnp.where(label < 0, 0.0, params * label.astype(x.dtype))
    out = jnp.tanh(x) * 0.5 + shift[:, None]
    return out if extra is None else out + extra[:, None]


NETWORK = ds.ScoreFn(apply, jnp.asarray(0.1), PROCESS, prediction="data")
LABEL = jnp.array([0, 1, 2, 3], jnp.int32)
X = PROCESS.prior_sample(jax.random.key(0), (4, 3))


def build(name, n=6):
    return solvers.get(name)(PROCESS, schedules.logsnr(PROCESS, n))


@pytest.mark.parametrize("solver", ["dpmpp_2m", "deis_tab2", "ddpm"])
def test_cfg_is_its_formula(solver):
    """Against a network that computes the guided output itself, in either prediction."""
    scale = 2.5

    def guided_apply(params, x, t, label):
        free = apply(params, x, t, jnp.full_like(label, -1))
        return free + scale * (apply(params, x, t, label) - free)

    by_hand = ds.ScoreFn(guided_apply, NETWORK.params, PROCESS, prediction="data")
    guided = guidance.cfg(NETWORK, scale, {"label": -1})
    assert guided.nfe_factor == 2
    tableau, key = build(solver), jax.random.key(1)
    want = ds.sample(by_hand, tableau, X, key=key, cond={"label": LABEL})
    got = ds.sample(guided, tableau, X, key=key, cond={"label": LABEL})
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    one = ds.sample(
        guidance.cfg(NETWORK, 1.0, {"label": -1}), tableau, X, key=key, cond={"label": LABEL}
    )
    plain = ds.sample(NETWORK, tableau, X, key=key, cond={"label": LABEL})
    np.testing.assert_allclose(one, plain, rtol=1e-4, atol=1e-5)


def test_guidance_in_an_interval():
    """A scale that depends on the level is a number per row: outside the interval it is 1."""
    tableau = build("ddim", 8)

    def inside(level):
        return jnp.where(jnp.asarray(level.sigma) < -1.0, 9.0, 1.0)  # nowhere

    def everywhere(level):
        return 3.0 * np.ones_like(level.sigma)

    cond = {"label": LABEL}
    plain = ds.sample(NETWORK, tableau, X, cond=cond)
    never = ds.sample(guidance.cfg(NETWORK, inside, {"label": -1}), tableau, X, cond=cond)
    always = ds.sample(guidance.cfg(NETWORK, everywhere, {"label": -1}), tableau, X, cond=cond)
    fixed = ds.sample(guidance.cfg(NETWORK, 3.0, {"label": -1}), tableau, X, cond=cond)
    np.testing.assert_allclose(never, plain, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(always, fixed, rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(always - plain)).max() > 0.1


def test_the_network_is_called_once_and_a_new_scale_compiles_nothing():
    calls, traces = [], []

    def counting(params, x, t, label):
        traces.append(1)
        jax.debug.callback(lambda: calls.append(x.shape[0]))
        return apply(params, x, t, label)

    counted = ds.ScoreFn(counting, NETWORK.params, PROCESS, prediction="data")
    tableau = build("unipc3", 5)
    for scale in (1.5, 3.0, 7.5):
        guided = guidance.cfg(counted, scale, {"label": -1})
        jax.block_until_ready(ds.sample(guided, tableau, X, cond={"label": LABEL}))
    jax.effects_barrier()
    assert len(traces) == 1
    assert calls == [8] * 15


def test_other_conditions_go_to_both_halves_and_stacked_tableaux_work():
    guided = guidance.cfg(NETWORK, 2.0, {"label": -1})
    extra = jnp.linspace(0.0, 0.3, 4)
    stacked = ds.Tableau.stack([build("ddim", 3), build("dpmpp_2m", 5)] * 2)
    cond = {"label": LABEL, "extra": extra}
    together = ds.sample(guided, stacked, X, cond=cond)
    second = jax.tree.map(lambda v: v[1:2], cond)
    alone = ds.sample(guided, build("dpmpp_2m", 5), X[1:2], cond=second)
    np.testing.assert_allclose(together[1], alone[0], rtol=1e-4, atol=1e-5)


def test_a_guided_network_can_be_distilled():
    guided = guidance.cfg(NETWORK, 2.0, {"label": -1})
    x_T = PROCESS.prior_sample(jax.random.key(5), (64, 3))
    cond = {"label": jnp.arange(64, dtype=jnp.int32) % 4}
    plan = ds.search.distill(
        guided, x_T, nfe=3, key=jax.random.key(0), cond=cond, steps=40, batch=32
    )
    assert plan.psnr["held_out"]["found"] > plan.psnr["held_out"]["start"]


@pytest.mark.parametrize("name", ["dpmpp_2m", "deis_tab2", "heun"])
def test_static_thresholding_clips_what_every_row_uses(name):
    """In NumPy: the posterior mean clipped, the noise re-derived from it."""
    target = skewed_mixture()

    def posterior(x, alpha, sigma):
        data = np.clip(target.posterior(x, alpha, sigma)[0], -0.5, 0.7)
        return data, (x - alpha * data) / sigma

    tableau = build(name, 5)
    x = np.linspace(-2, 2, 9)[:, None]
    clipped = guidance.static_thresholding(target.score_fn(PROCESS, "noise"), low=-0.5, high=0.7)
    got = ds.sample(clipped, tableau, jnp.asarray(x, jnp.float32))
    # Heun on this grid takes states of size 100
    np.testing.assert_allclose(got, twin(tableau, posterior, x), rtol=0, atol=1e-3)
    ddim = ds.sample(clipped, build("ddim", 5), jnp.asarray(x, jnp.float32))
    assert float(ddim.max()) <= 0.7
    assert float(ddim.min()) >= -0.5


def test_dynamic_thresholding():
    """Per sample: values beyond its quantile are clipped and the rest scaled to the bound."""
    values = jnp.array([[0.1, -0.2, 0.5, 0.9], [4.0, -2.0, 1.0, 0.0]])
    network = ds.ScoreFn(lambda p, x, t: p * jnp.ones_like(x), values, PROCESS, prediction="data")
    transform = guidance.dynamic_thresholding(network, quantile=0.5, bound=1.0)
    closed = solvers.ddim(PROCESS, [0.5, 0.0])
    got = ds.sample(transform, closed, jnp.zeros((2, 4)))
    # the first sample's median of |D| is below 1: plain clipping; the second's is 1.5
    want = [[0.1, -0.2, 0.5, 0.9], [1.0, -1.0, 1.0 / 1.5, 0.0]]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    # thresholding outside guidance
    both = guidance.dynamic_thresholding(guidance.cfg(NETWORK, 4.0, {"label": -1}))
    assert both.nfe_factor == 2
    x = ds.sample(both, build("ddim", 5), X, cond={"label": LABEL})
    assert float(jnp.abs(x).max()) <= 1.0 + 1e-6


def test_transforms_are_pytrees():
    guided = guidance.cfg(NETWORK, 2.0, {"label": -1})
    for transform in (
        guided,
        guidance.cfg(NETWORK, lambda level: 2.0, {"label": -1}),
        guidance.static_thresholding(guided),
    ):
        leaves, treedef = jax.tree.flatten(transform)
        assert jax.tree.structure(jax.tree.unflatten(treedef, leaves)) == treedef
        assert transform.process is PROCESS
    got = jax.jit(ds.sample)(guided, build("ddim"), X, cond={"label": LABEL})
    want = ds.sample(guided, build("ddim"), X, cond={"label": LABEL})
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def test_errors():
    guided = guidance.cfg(NETWORK, 2.0, {"label": -1})
    with pytest.raises(ValueError, match="guidance needs the condition it strengthens"):
        ds.sample(guided, build("ddim"), X)
    with pytest.raises(ValueError, match=r"`cond` lacks \['label'\]"):
        ds.sample(guided, build("ddim"), X, cond={"extra": jnp.zeros(4)})
    with pytest.raises(ValueError, match="`null` must say what no condition is"):
        guidance.cfg(NETWORK, 2.0, {})
    alone = ds.ScoreFn(apply, 1.0, PROCESS, batched=False)
    with pytest.raises(ValueError, match="needs a network with a batch axis"):
        guidance.cfg(alone, 2.0, {"label": -1})
    with pytest.raises(ValueError, match="`low` must be below `high`"):
        guidance.static_thresholding(NETWORK, low=1.0, high=0.0)
    with pytest.raises(ValueError, match="`quantile` must lie"):
        guidance.dynamic_thresholding(NETWORK, quantile=0.0)
    with pytest.raises(ValueError, match="`bound` must be positive"):
        guidance.dynamic_thresholding(NETWORK, bound=0.0)


# -- learned variance -----------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "variance"), [(-1.0, "small"), (1.0, "large")])
@pytest.mark.parametrize("name", ["vp_linear", "vp_discrete"])
def test_learned_range_spans_small_to_large(name, value, variance):
    """v = -1 is DDPM's small variance and v = 1 its large one, with the same key the same noise."""
    process = all_processes()[name]
    exact = skewed_mixture().score_fn(process, "noise")

    def apply(params, x, t):
        return exact.apply(params, x, t), jnp.full_like(x, value)

    network = dataclasses.replace(exact, apply=apply)
    times = ds.schedules.uniform(process, 12)
    x_T, key = process.prior_sample(jax.random.key(0), (7, 1)), jax.random.key(1)
    want = ds.sample(exact, ds.solvers.ddpm(process, times, variance=variance), x_T, key=key)
    mean = ds.solvers.ddpm(process, times, variance="learned")
    ranged = ds.guidance.learned_range(network, mean, key)
    np.testing.assert_allclose(ds.sample(ranged, mean, x_T), want, rtol=2e-4, atol=2e-4)
    padded = ds.sample(ranged, mean.pad(rows=15, p=2), x_T)
    np.testing.assert_allclose(padded, want, rtol=2e-4, atol=2e-4)
    keys = jax.random.split(jax.random.key(5), 7)  # one per sample
    ranged = ds.guidance.learned_range(network, mean, keys)
    want = ds.sample(
        exact, ds.solvers.ddpm(process, times, variance=variance), x_T[2:4], key=keys[2:4]
    )
    np.testing.assert_allclose(ds.sample(ranged, mean, x_T)[2:4], want, rtol=2e-4, atol=2e-4)


def test_learned_range_is_geometric_between():
    """At v = 0 the noise of one row has the geometric mean of the two standard deviations."""
    process = ds.processes.vp_linear()

    def apply(params, x, t):
        return jnp.zeros_like(x), jnp.zeros_like(x)

    network = ds.ScoreFn(apply, None, process, prediction="data")
    mean = ds.solvers.ddpm(process, [0.6, 0.2], variance="learned")
    ranged = ds.guidance.learned_range(network, mean, jax.random.key(0))
    x = ds.sample(ranged, mean, jnp.zeros((4000, 4)))
    alpha, sigma = mean.alpha, mean.sigma
    large = np.sqrt(sigma[0] ** 2 - (alpha[0] / alpha[1] * sigma[1]) ** 2)
    small = large * sigma[1] / sigma[0]
    assert float(jnp.std(x)) == pytest.approx(np.sqrt(small * large), rel=0.02)
    assert small < 0.9 * large


def test_learned_range_takes_its_own_tableau_only():
    process = ds.processes.vp_linear()
    network = ds.ScoreFn(lambda p, x, t: (x, x), None, process)
    times = ds.schedules.uniform(process, 6)
    for tableau in (ds.solvers.ddpm(process, times), ds.solvers.unipc(process, times)):
        with pytest.raises(ValueError, match=r"learned_range needs the tableau of solvers\.ddpm"):
            ds.guidance.learned_range(network, tableau, jax.random.key(0))
    mean = ds.solvers.ddpm(process, times, variance="learned")
    ranged = ds.guidance.learned_range(network, mean, jax.random.key(0))
    fewer = ds.solvers.ddpm(process, times[2:], variance="learned")
    with pytest.raises(ValueError, match="made for 6 rows; the tableau has 4"):
        ds.sample(ranged, fewer, jnp.ones((2, 1)))
