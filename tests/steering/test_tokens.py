"""Particles of token sequences against the tilted law of their rows, enumerated."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsamp as ds
from diffsamp import discrete, steering

KEY = jax.random.key(0)
JOINT = np.array([[0.35, 0.15], [0.1, 0.4]])
REWARD = np.array([[2.2, 1.5], [3.1, 2.6]])
TRIPLE = np.random.default_rng(3).dirichlet(np.full(27, 0.6)).reshape(3, 3, 3)
BATCH, PARTICLES = 20_000, 4


def exact(joint):
    """The network that knows the joint."""
    size, length = joint.shape[0], joint.ndim
    states = itertools.product(range(size + 1), repeat=length)
    table = np.array([discrete.conditionals(joint, s) for s in states])

    def apply(params, x, t, **cond):
        place = jnp.zeros(x.shape[0], jnp.int32)
        for i in range(length):
            place = place * (size + 1) + x[:, i]
        return params[place]

    return discrete.TokenFn(apply, jnp.log(jnp.asarray(table, jnp.float32) + 1e-30), size)


NETWORK = exact(JOINT)


def tabled(table):
    """f(x) from a table; a masked token, which it must never see, is NaN."""
    padded = jnp.asarray(np.pad(table, [(0, 1)] * table.ndim, constant_values=np.nan), jnp.float32)

    def f(x_0, level, cond):
        return padded[tuple(x_0.T)]

    return f


GAIN = tabled(REWARD)


def steered(rows, *, network=NETWORK, f=GAIN, temperature=1.0, batch=BATCH, **options):
    options = {"particles": PARTICLES, "key": KEY, **options}
    x = jnp.full((batch, 2 if f is GAIN else 3), network.mask)
    potential = steering.reward(f, temperature)
    return steering.sample_tokens(network, rows, x, potential=potential, **options)


def measure(result, shape):
    """Z times the weighted law of each sample, (batch, cells): unbiased for law(x) exp f(x)."""
    weight = np.exp(np.asarray(result.log_weights, np.float64))
    weight *= np.exp(np.asarray(result.log_Z, np.float64))[:, None]
    cell = np.ravel_multi_index(tuple(np.moveaxis(np.asarray(result.x), 2, 0)), shape)
    return np.stack([np.where(cell == i, weight, 0).sum(1) for i in range(np.prod(shape))], axis=1)


def away(found, want):
    """Largest distance in standard errors, of every cell and of their sum."""
    found = np.concatenate([found, found.sum(1, keepdims=True)], axis=1)
    want = np.append(want.ravel(), want.sum())
    error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    return np.max(np.abs(found.mean(axis=0) - want) / error)


ROWS = {
    "one a row": (discrete.parallel(2, 2), "random"),
    "ancestral": (discrete.ancestral("linear", 2), "random"),
    "together": (discrete.parallel(2, 1), "max"),
    "first hitting": (discrete.first_hitting(2), "random"),
    "remasked": (discrete.remdm(discrete.ancestral("linear", 3), 0.2), "random"),
}
# one shape for all
PADDED = dict(
    zip(ROWS, discrete.Rows.pad_together([rows for rows, _ in ROWS.values()]), strict=True)
)
WAYS = {
    "likely": {"threshold": 0.9},
    "drawn": {"threshold": 1.0, "completions": 2},
    "one": {"threshold": 1.0, "select_one": True},
}
FEW = {("one a row", "likely"), ("ancestral", "one"), ("remasked", "drawn"), ("together", "likely")}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=() if (name, way) in FEW else pytest.mark.long)
        for name in ROWS
        for way in WAYS
    ],
)
def test_weights_aim_at_the_tilted_law_of_the_rows(name, way):
    """E[Z sum_k w_k [x_k = x]] = law(x) exp f(x), for every sequence and any number of particles.

    Four standard errors are about 1 % of Z, so a reward 2 % too large is seen.
    """
    rows, order = ROWS[name]
    law = discrete.law(JOINT, rows, order)
    found = measure(steered(PADDED[name], order=order, **WAYS[way]), JOINT.shape)
    assert away(found, law * np.exp(REWARD)) < 4.2
    assert away(found, law * np.exp(1.02 * REWARD)) > 5
    if name == "together":
        assert away(found, JOINT * np.exp(REWARD)) > 20  # the data's own law is another one


def test_three_tokens_of_three_values_and_a_temperature():
    table = 2.0 + np.random.default_rng(5).normal(size=TRIPLE.shape)
    network, rows = exact(TRIPLE), discrete.parallel(3, 2)
    law = discrete.law(TRIPLE, rows, "margin")
    options = {"network": network, "f": tabled(table), "order": "margin", "particles": 200}
    many = steered(rows, temperature=2.0, batch=1000, **options)
    pairs = measure(many, TRIPLE.shape).reshape(1000, 9, 3).sum(2)
    assert away(pairs, (law * np.exp(table / 2)).sum(2)) < 4.5
    assert away(pairs, (law * np.exp(1.05 * table / 2)).sum(2)) > 5
    # many particles by their weights follow the tilted law
    share = measure(many._replace(log_Z=jnp.zeros(1000)), TRIPLE.shape).mean(axis=0)
    tilted = (law * np.exp(table / 2)).ravel()
    np.testing.assert_allclose(share, tilted / tilted.sum(), atol=0.004)


def test_without_resampling_a_weight_is_its_own_reward():
    """Not by chance: particle by particle, and log Z is the mean's logarithm."""
    for completions in (0, 2):
        result = steered(PADDED["ancestral"], threshold=0.0, completions=completions)
        reward = REWARD[tuple(np.moveaxis(np.asarray(result.x), 2, 0))]
        total = np.log(np.mean(np.exp(reward), axis=1))
        np.testing.assert_allclose(result.log_Z, total, atol=2e-6)
        np.testing.assert_allclose(
            result.log_weights, reward - total[:, None] - np.log(PARTICLES), atol=3e-6
        )
    # and the sequences are those of the plain sampler with the particles' own keys
    keys = jax.random.split(KEY, BATCH)
    own = jax.vmap(jax.random.fold_in, (None, 0))(keys[7], jnp.arange(PARTICLES))
    plain = discrete.sample(NETWORK, PADDED["ancestral"], jnp.full((PARTICLES, 2), 2), key=own)
    same = steered(PADDED["ancestral"], threshold=0.0, key=keys)
    np.testing.assert_array_equal(same.x[7], plain)


def chosen(temperature, power=1.0):
    """The law of SVDD with two proposals a row and one position a row, by enumeration."""
    masked = (2, 2)
    law = np.zeros((2, 2))

    def steps(state):
        told = discrete.conditionals(JOINT, state)
        free = [i for i in (0, 1) if state[i] == 2]
        for i, v in itertools.product(free, (0, 1)):
            yield tuple(v if k == i else s for k, s in enumerate(state)), told[i, v] / len(free)

    def value(state):
        told = discrete.conditionals(JOINT, state)
        seen = tuple(int(np.argmax(told[i])) if s == 2 else s for i, s in enumerate(state))
        return REWARD[seen] / temperature

    def pick(one, two):
        share = 1 / (1 + np.exp(power * (value(two) - value(one))))
        yield one, share
        yield two, 1 - share

    for (a, p), (b, q) in itertools.product(steps(masked), repeat=2):
        for state, w in pick(a, b):
            for (x, r), (y, s) in itertools.product(steps(state), repeat=2):
                for end, u in pick(x, y):
                    law[end] += p * q * w * r * s * u
    return law


def test_svdd_chooses_among_proposals_by_value():
    options = {"particles": 2, "threshold": 1.0, "select_one": True, "batch": 100_000}
    result = steered(ROWS["one a row"][0].pad(5), temperature=0.5, **options)
    found = measure(result._replace(log_Z=jnp.zeros(100_000)), (2, 2))
    assert away(found[:, :3], chosen(0.5).ravel()[:3]) < 4
    assert away(found[:, :3], chosen(0.5, 1.07).ravel()[:3]) > 4.5
    assert away(found[:, :3], chosen(0.5, 30).ravel()[:3]) > 50  # the best of two, no draw


def test_a_call_a_row_and_nobody_else_matters():
    calls, rows = [], discrete.blocks(discrete.threshold(1, 0.9), 1, 2).pad(6)

    def apply(params, x, t, shift):
        jax.debug.callback(lambda n: calls.append(int(n)), jnp.asarray(x.shape[0]))
        return NETWORK.apply(params, x, t) + shift[:, None, None] * jnp.arange(2.0)[None, None]

    network = discrete.TokenFn(apply, NETWORK.params, 2)
    keys = jax.random.split(KEY, 3)
    x = jnp.array([[2, 2], [0, 2], [1, 1]])
    cond = {"shift": jnp.array([0.0, 1.0, 2.0])}
    options = {"potential": steering.reward(GAIN, 0.3), "particles": 4}
    whole = steering.sample_tokens(network, rows, x, key=keys, cond=cond, **options)
    jax.effects_barrier()
    assert calls == [12, 12]
    np.testing.assert_array_equal(whole.x[2], np.ones((4, 2)))  # nothing was masked
    assert whole.log_Z[2] == pytest.approx(REWARD[1, 1] / 0.3, rel=1e-6)
    for i in range(3):
        own = {"shift": cond["shift"][i : i + 1]}
        alone = steering.sample_tokens(
            network, rows, x[i : i + 1], key=keys[i : i + 1], cond=own, **options
        )
        for one, other in zip(alone, whole, strict=True):
            np.testing.assert_allclose(one[0], other[i], atol=4e-6)  # 2 ulp of weights of 16
    spread = jnp.broadcast_to(x[:, None], (3, 4, 2))
    again = steering.sample_tokens(network, rows, spread, key=keys, cond=cond, **options)
    np.testing.assert_array_equal(again.x, whole.x)


def test_uniform_noise_is_steered_too():
    """One site of two states: the posterior rows of its own network, tilted."""
    p, table = np.array([0.7, 0.3]), np.array([2.0, 3.0])

    def apply(params, x, t):
        like = (1 - t)[:, None] * jax.nn.one_hot(x[:, 0], 2) + t[:, None] / 2
        return jnp.log(params[None] * like)[:, None]

    network = discrete.TokenFn(apply, jnp.asarray(p, jnp.float32), 2, mask=5)
    x = jax.random.randint(KEY, (BATCH, PARTICLES, 1), 0, 2)
    result = steering.sample_tokens(
        network,
        discrete.uniform("linear", 4),
        x,
        key=jax.random.key(1),
        potential=steering.reward(tabled(table)),
        particles=PARTICLES,
        threshold=0.9,
    )
    found = measure(result, (2,))
    assert away(found, p * np.exp(table)) < 4.2
    assert away(found, p * np.exp(1.02 * table)) > 5


def test_what_it_refuses():
    rows, x = discrete.parallel(2, 2), jnp.full((1, 2), 2)
    good = {"key": KEY, "potential": steering.reward(GAIN), "particles": 2}
    with pytest.raises(ValueError, match="tokens have no scores to compose"):
        steering.sample_tokens(NETWORK, rows, x, **{**good, "potential": steering.scores([1.0])})
    with pytest.raises(ValueError, match="`temperature` must be positive, for particles"):
        steering.sample_tokens(NETWORK, rows, x, temperature=0.0, **good)
    with pytest.raises(ValueError, match="`threshold` must lie in"):
        steering.sample_tokens(NETWORK, rows, x, threshold=1.5, **good)
    with pytest.raises(TypeError, match="`x` must be integers"):
        steering.sample_tokens(NETWORK, rows, x[None], **good)
    with pytest.raises(TypeError, match=r"`network` must be a discrete\.TokenFn"):
        steering.sample_tokens(lambda x, t: x, rows, x, **good)
    assert ds.steering.sample_tokens is steering.sample_tokens
