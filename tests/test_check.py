"""`check` names the mistake: closed-form denoisers, wrapped wrongly on purpose, and the digits.

The networks are exact posterior means of points with a little Gaussian width, so that no other
convention can be better; each is made in one convention and declared in another.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsamp as ds

POINTS = np.random.default_rng(0).choice([-0.9, -0.3, 0.4, 0.9], (24, 12))
WIDTH = 0.02
TABLE = ds.processes.vp_discrete("linear")
FLOW = ds.processes.flow()


def data(n=64, seed=1):
    rng = np.random.default_rng(seed)
    return POINTS[rng.integers(len(POINTS), size=n)] + WIDTH * rng.normal(size=(n, 12))


def posterior(x, alpha, sigma, points=POINTS, width=WIDTH):
    """E[x_0 | x], exactly."""
    points = jnp.asarray(points, x.dtype)
    alpha, sigma = alpha[:, None], sigma[:, None]
    total = (alpha * width) ** 2 + sigma**2
    distance = jnp.sum((x[:, None] - alpha[..., None] * points[None]) ** 2, -1)
    weights = jax.nn.softmax(-distance / (2 * total), axis=-1)
    centre = weights @ points
    return centre + alpha * width**2 / total * (x - alpha * centre)


def network(process, prediction, of_label=lambda label: label, scale=1.0, offset=0.0, sign=1.0):
    """A network of the process's time t = of_label(label), and of data scale x + offset."""
    points, width = scale * POINTS + offset, scale * WIDTH

    def apply(params, x, label):
        level = ds.predictions.level_at(process, of_label(label))
        alpha, sigma = level.alpha, level.sigma
        x_0 = posterior(x, alpha, sigma, points, width)
        eps = (x - alpha[:, None] * x_0) / sigma[:, None]
        w_0, w_1, g = ds.predictions.weights(prediction, process, level)
        w_0, w_1, g = (jnp.broadcast_to(v, label.shape)[:, None] for v in (w_0, w_1, g))
        return sign * (w_0 * x_0 + w_1 * eps) / g

    return apply


def declared(apply, process, prediction, **options):
    return ds.ScoreFn(apply, None, process, prediction=prediction, **options)


RIGHT = [
    (TABLE, "noise", {}),
    (TABLE, "v", {}),
    (ds.processes.vp_linear(), "score", {}),
    (FLOW, "velocity", {}),
    (ds.processes.trig(), "v", {}),
]


@pytest.mark.parametrize(("process", "prediction", "options"), RIGHT, ids=lambda v: str(v)[:10])
def test_what_is_right_fits(process, prediction, options):
    found = ds.check(declared(network(process, prediction), process, prediction), data())
    assert found
    assert (found.fits, found.best) == (True, "as declared")
    assert next(iter(found.losses)) == "as declared"
    assert found.losses["as declared"] < 1
    assert found.levels.shape == found.by_level.shape == (10,)
    assert str(found).startswith("The declared convention fits.")


MISTAKES = {
    "another prediction": (
        declared(network(TABLE, "v"), TABLE, "noise"),
        'prediction="v"',
    ),
    "score with its own 1/std": (
        declared(network(TABLE, "score"), TABLE, "noise"),
        'prediction="score"',
    ),
    "noise that is taken for a score": (
        declared(network(TABLE, "noise", sign=-1.0), TABLE, "noise"),
        'prediction="noise" of the other sign',
    ),
    "from noise to data": (
        declared(network(FLOW, "velocity", sign=-1.0), FLOW, "velocity"),
        'prediction="velocity" of the other sign',
    ),
    "labels 1..T": (
        declared(network(TABLE, "noise", lambda label: label - 1), TABLE, "noise"),
        "the time's index plus 1",
    ),
    "labels one too high": (
        declared(network(TABLE, "noise", lambda label: label + 1), TABLE, "noise"),
        "the time's index minus 1",
    ),
    "index / T": (
        declared(network(TABLE, "noise", lambda label: 1000 * label), TABLE, "noise"),
        "the time divided by 1000",
    ),
    "t for 1000 t": (
        declared(network(FLOW, "velocity", lambda label: label / 1000), FLOW, "velocity"),
        'time="label"',
    ),
    "1000 t for t": (
        declared(network(FLOW, "velocity"), FLOW, "velocity", time="label"),
        'time="t"',
    ),
    "reversed": (
        declared(network(FLOW, "velocity", lambda label: 1 - label), FLOW, "velocity"),
        "the time reversed",
    ),
    "reversed index": (
        declared(network(TABLE, "noise", lambda label: 999 - label), TABLE, "noise"),
        "the time reversed",
    ),
    "sigma": (
        declared(network(ds.processes.edm(), "noise"), ds.processes.edm(), "noise", time="c_noise"),
        'time="t"',
    ),
    "data in [-.5, .5]": (
        declared(network(TABLE, "noise", scale=0.5), TABLE, "noise"),
        "data divided by 2",
    ),
    "data in [0, 1]": (
        declared(network(FLOW, "velocity", scale=0.5, offset=0.5), FLOW, "velocity"),
        "data from [-1, 1] to [0, 1] ((x + 1) / 2)",
    ),
    "another table": (
        declared(network(ds.processes.vp_discrete("squaredcos_cap_v2"), "noise"), TABLE, "noise"),
        'process=vp_discrete("squaredcos_cap_v2")',
    ),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_a_mistake_is_named(name):
    score_fn, want = MISTAKES[name]
    # an index of a thousand is little: twelve numbers of 64 vectors do not tell
    found = ds.check(score_fn, data(1024 if "index " in want else 64))
    assert (found.fits, found.best) == (False, want)
    assert f"What does: {want}." in str(found)
    assert found.losses[want] < found.losses["as declared"]


def test_two_mistakes_are_named_together():
    apply = network(FLOW, "velocity", lambda label: 1 - label, sign=-1.0)
    found = ds.check(declared(apply, FLOW, "velocity"), data())
    assert set(found.best.split(" and ")) == {
        "the time reversed",
        'prediction="velocity" of the other sign',
    }


def test_a_network_that_knows_nothing():
    found = ds.check(declared(lambda p, x, t: 0.1 * x, TABLE, "noise"), data())
    assert not found.fits
    broken = declared(lambda p, x, t: x * jnp.nan, TABLE, "noise")
    assert str(ds.check(broken, data())).startswith("No convention fits")


@pytest.mark.long
def test_the_bundled_network():
    models = pytest.importorskip("diffsamp.models.digits")
    images, labels = models.load_data()
    images, cond = images[:64], {"label": labels[:64]}
    net = models.load_digits_model()
    assert ds.check(net, images, cond=cond).fits
    assert ds.check(net, images, cond=cond, key=jax.random.key(3), levels=6).fits
    change = dataclasses.replace
    for wrong, best in [
        (change(net, prediction="noise"), 'prediction="edm_f"'),
        (change(net, scale_input=False), "scale_input=True"),
    ]:
        found = ds.check(wrong, images, cond=cond)
        assert (found.fits, found.best) == (False, best)
    found = ds.check(net, 127.5 * (images + 1), cond=cond)
    assert found.best == "data from 0..255 to [-1, 1] (x / 127.5 - 1)"
    found = ds.check(net, (images + 1) / 2, cond=cond)
    assert found.best == "data from [0, 1] to [-1, 1] (2 x - 1)"


def test_one_sample_at_a_time_and_few_data():
    batched = network(TABLE, "v")

    def single(params, x, t):
        return batched(params, x[None], t[None])[0]

    found = ds.check(ds.ScoreFn(single, None, TABLE, prediction="v", batched=False), data(8))
    assert found.fits
    wrong = ds.ScoreFn(single, None, TABLE, prediction="noise", batched=False)
    assert ds.check(wrong, data(8)).best == 'prediction="v"'


def test_bad_arguments_in_words():
    score_fn = declared(network(TABLE, "noise"), TABLE, "noise")
    with pytest.raises(TypeError, match=r"got the transform Combined. Check the network inside"):
        ds.check(ds.guidance.cfg(score_fn, 2.0, null={"label": 0}), data())
    with pytest.raises(TypeError, match=r"must be a diffsamp\.ScoreFn"):
        ds.check(network(TABLE, "noise"), data())
    with pytest.raises(TypeError, match="`x_0` must be an array"):
        ds.check(score_fn, "data")
    with pytest.raises(ValueError, match="finite and differ"):
        ds.check(score_fn, np.zeros((4, 12)))
    with pytest.raises(ValueError, match="`levels`"):
        ds.check(score_fn, data(), levels=1)
    with pytest.raises(ValueError, match="output must have the shape of x_0"):
        ds.check(declared(lambda p, x, t: x[:, :2], TABLE, "noise"), data())
