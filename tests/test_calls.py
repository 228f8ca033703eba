"""What a ScoreFn answers, every transform of one answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsamp as ds

PROCESS = ds.processes.flow()
TARGET = ds.targets.gaussian([0.5, -0.2], 0.3)
TABLEAU = ds.solvers.ddim(PROCESS, ds.schedules.uniform(PROCESS, 4))
X = jax.random.normal(jax.random.key(0), (6, 2))


def network(heads=1):
    """The exact velocity, moved by a label; with a second head if asked for; any step condition."""
    exact = TARGET.score_fn(PROCESS, "velocity")

    def apply(params, x, t, label=0.0, dt=0.0, r=0.0):
        out = (
            params.apply(params.params, x, t) + 0.1 * jnp.broadcast_to(label, x.shape[:1])[:, None]
        )
        return out if heads == 1 else (out, 0 * out)

    return ds.ScoreFn(apply, exact, PROCESS, prediction="velocity")


LABELS = {"label": jnp.arange(6.0)}
TRANSFORMS = {
    "itself": (lambda f: f, LABELS),
    "cfg": (lambda f: ds.guidance.cfg(f, 2.0, {"label": 0.0}), LABELS),
    "interval": (
        lambda f: ds.guidance.cfg(f, lambda v: jnp.where(v.sigma < 0.5, 2.0, 1.0), {"label": 0.0}),
        LABELS,
    ),
    "static": (lambda f: ds.guidance.static_thresholding(f), LABELS),
    "dynamic": (lambda f: ds.guidance.dynamic_thresholding(f), LABELS),
    "both": (
        lambda f: ds.guidance.static_thresholding(ds.guidance.cfg(f, 2.0, {"label": 0.0})),
        LABELS,
    ),
    "time_shift": (lambda f: ds.time_shift.time_shift(f, window=0.1, cutoff=0.2), LABELS),
    "shortcut": (lambda f: ds.few_step.shortcut(f), LABELS),
    "flow_map": (lambda f: ds.few_step.flow_map(f), LABELS),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_call(name):
    make, cond = TRANSFORMS[name]
    f, plain = make(network()), network()
    assert f.process is plain.process
    assert f.batched
    assert f.prediction == "velocity"
    assert f.nfe_factor in (1, 2)
    assert f.nfe(TABLEAU) >= TABLEAU.nfe
    per_sample = jnp.linspace(0.3, 0.9, 6)
    data = {}
    for prediction in (None, *ds.predictions.NAMES):
        for t in (0.6, per_sample):
            out = f(X, t, prediction=prediction, cond=cond)
            assert out.shape == X.shape
            assert np.all(np.isfinite(out))
        data[prediction] = np.asarray(f(X, 0.6, prediction=prediction, cond=cond))
    np.testing.assert_array_equal(data[None], data["velocity"])
    # predictions of one call agree: x = alpha D + sigma E
    np.testing.assert_allclose(0.4 * data["data"] + 0.6 * data["noise"], X, atol=1e-5)
    # one time for all is that time for each, and jit changes nothing
    np.testing.assert_allclose(f(X, jnp.full(6, 0.6), cond=cond), data[None], atol=1e-5)
    jitted = jax.jit(lambda f, x, t: f(x, t, cond=cond))
    np.testing.assert_allclose(jitted(f, X, 0.6), data[None], atol=1e-5)
    sample = ds.sample(f, TABLEAU, X, cond=cond)
    assert np.all(np.isfinite(sample))


def test_the_values_are_the_transformed_ones():
    f = network()
    given, free = f(X, 0.6, cond=LABELS), f(X, 0.6, cond={"label": jnp.zeros(6)})
    guided = ds.guidance.cfg(f, 2.5, {"label": 0.0})(X, 0.6, cond=LABELS)
    np.testing.assert_allclose(guided, free + 2.5 * (given - free), atol=1e-5)
    clipped = ds.guidance.static_thresholding(f, low=-0.1, high=0.1)
    found = clipped(X, 0.6, prediction="data", cond=LABELS)
    want = jnp.clip(f(X, 0.6, prediction="data", cond=LABELS), -0.1, 0.1)
    np.testing.assert_allclose(found, want, atol=1e-5)


def test_a_second_head_is_left_out():
    process = ds.processes.vp_discrete()
    two = ds.ScoreFn(lambda p, x, t: (x, x), {}, process)
    tableau = ds.solvers.ddpm(process, ds.schedules.trailing(process, 4), variance="learned")
    ranged = ds.guidance.learned_range(two, tableau, jax.random.key(0))
    np.testing.assert_allclose(ranged(X, 500.0), X)
    np.testing.assert_allclose(ranged(X, jnp.full(6, 500.0), prediction="noise"), X)


def test_rows_of_scale_one_are_not_guided_twice():
    """Counted by the network, per sample; the samples are those of guidance everywhere."""
    calls = []

    def apply(params, x, t, label):
        jax.debug.callback(lambda: calls.append(x.shape[0]))
        return network().apply(params, x, t, label)

    f = ds.ScoreFn(apply, network().params, PROCESS, prediction="velocity")
    guided = ds.guidance.cfg(f, lambda v: jnp.where(v.sigma > 0.6, 1.0, 3.0), {"label": 0.0})
    x = ds.sample(guided, TABLEAU, X, cond=LABELS)
    jax.effects_barrier()
    assert sorted(calls) == [6, 6, 12, 12]
    assert guided.nfe(TABLEAU) == sum(calls) / 6 == 6
    assert ds.guidance.cfg(f, 3.0, {"label": 0.0}).nfe(TABLEAU) == 8
    always = ds.guidance.cfg(f, lambda v: jnp.where(v.sigma > 0.6, 1.0 + 1e-7, 3.0), {"label": 0.0})
    np.testing.assert_allclose(x, ds.sample(always, TABLEAU, X, cond=LABELS), atol=1e-5)


def test_a_scale_per_sample():
    """Each sample is what its own scale alone makes of it; another number of scales is refused."""
    scales = jnp.linspace(0.5, 3.0, 6)
    together = ds.sample(
        ds.guidance.cfg(network(), scales, {"label": 0.0}), TABLEAU, X, cond=LABELS
    )
    for i in (0, 5):
        one = ds.guidance.cfg(network(), float(scales[i]), {"label": 0.0})
        np.testing.assert_allclose(
            together[i], ds.sample(one, TABLEAU, X, cond=LABELS)[i], rtol=0, atol=1e-5
        )
    wrong = ds.guidance.cfg(network(), jnp.ones(4), {"label": 0.0})
    with pytest.raises(ValueError, match="scale"):
        ds.sample(wrong, TABLEAU, X, cond=LABELS)
