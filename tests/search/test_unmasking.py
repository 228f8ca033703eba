"""The counts of a masked model's rows, against enumeration on small spaces."""

import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffsamp import discrete, search

KEY = jax.random.key(0)
LENGTH = 5
JOINT = np.random.default_rng(8).dirichlet(np.full(2**LENGTH, 0.4)).reshape((2,) * LENGTH)


def exact(joint):
    """The network that knows the joint of binary tokens."""
    states = itertools.product(range(3), repeat=joint.ndim)
    table = np.array([discrete.conditionals(joint, s) for s in states])
    powers = jnp.asarray(3 ** np.arange(joint.ndim)[::-1], jnp.int32)

    def apply(params, x, t):
        return params[jnp.sum(x * powers[None], axis=1)]

    return discrete.TokenFn(apply, jnp.log(jnp.asarray(table, jnp.float32) + 1e-30), 2)


def drawn(joint, n, seed=1):
    flat = np.random.default_rng(seed).choice(joint.size, size=n, p=joint.ravel())
    return np.stack(np.unravel_index(flat, joint.shape), axis=1).astype(np.int32)


def chain(length, stay):
    joint = np.zeros((2,) * length)
    for state in itertools.product((0, 1), repeat=length):
        moves = [stay if a == b else 1 - stay for a, b in itertools.pairwise(state)]
        joint[state] = 0.5 * np.prod(moves)
    return joint


@pytest.mark.parametrize("order", ["max", "margin", "entropy"])
def test_held_out_nats_are_those_of_the_samplers_law(order):
    """An order that sees revealed tokens only: -log law(x), sequence by sequence, no chance in it.

    Every sequence as often: the quarter that is held out is then any quarter, so all but one are.
    """
    x_0 = np.array(list(itertools.product((0, 1), repeat=LENGTH)), np.int32)
    network = exact(JOINT)
    found = search.unmasking(network, x_0, nfe=(2, 3), key=KEY, order=order, held_out=31)
    shuffle, _ = jax.random.split(KEY)
    held = x_0[np.asarray(jax.random.permutation(shuffle, 32))[1:]]
    for n in (2, 3):
        for got, rows in (
            (found.nats[n], found.rows[n]),
            (found.cosine[n], discrete.parallel(LENGTH, n, law="cosine")),
        ):
            law = discrete.law(JOINT, rows, order)
            want = -np.mean(np.log(law[tuple(held.T)])) / LENGTH
            assert got == pytest.approx(want, rel=1e-5)
    assert found.counts(2).sum() == found.counts(3).sum() == LENGTH


@pytest.mark.parametrize("order", ["random", "max"])
def test_the_counts_that_it_finds_are_the_best_of_all(order):
    """Against every way to cut five tokens into three rows, by the exact law."""
    network = exact(JOINT)
    found = search.unmasking(network, drawn(JOINT, 4000), nfe=3, key=KEY, order=order, batch=3000)

    def entropy(counts):
        rows = discrete.parallel(LENGTH, 3, law=list(counts))
        return -np.sum(JOINT * np.log(discrete.law(JOINT, rows, order)))

    ways = [c for c in itertools.product(range(1, 4), repeat=3) if sum(c) == LENGTH]
    values = {c: entropy(c) for c in ways}
    place = 0 if order == "random" else 1  # no move leads from the second to the best
    assert values[tuple(int(v) for v in found.counts(3))] <= sorted(values.values())[place]


def test_a_random_order_costs_what_its_entropies_say():
    """The curve of a Markov chain by enumeration, the bound from it, and the cosine beaten."""
    joint = chain(7, 0.85)
    network = exact(joint)
    x_0 = drawn(joint, 6000)
    found = search.unmasking(network, x_0, nfe=(2, 3, 4), key=KEY, batch=700)
    states = list(itertools.product((0, 1), repeat=7))
    curve = np.zeros(8)
    for m in range(1, 8):
        places = list(itertools.combinations(range(7), m))
        for hidden, state in itertools.product(places, states):
            seen = tuple(2 if i in hidden else v for i, v in enumerate(state))
            told = discrete.conditionals(joint, seen)
            lost = -np.mean([np.log(told[i, state[i]]) for i in hidden])
            curve[m] += joint[state] * lost / len(places)
    for i, j in ((0, 1), (0, 3), (2, 5), (4, 7)):
        assert found.cost[i, j] == pytest.approx((j - i) * curve[7 - i], rel=0.04)

    def bound(counts):
        counts = np.asarray(counts)
        return counts @ curve[7 - np.cumsum(counts) + counts] / 7

    for n in (2, 3, 4):
        np.testing.assert_array_equal(found.counts(n), discrete.best_counts(curve, n))
        assert found.nats[n] == pytest.approx(bound(found.counts(n)), rel=0.03)
        gain = bound(discrete.parallel(7, n, law="cosine").count) - bound(found.counts(n))
        assert gain > 0
        assert found.cosine[n] - found.nats[n] == pytest.approx(gain, abs=3 * found.deviation[n])
    assert "order random, held-out nats per token" in str(found)


def test_evaluations_are_said_counted_and_limited(caplog):
    asked = []
    known = exact(JOINT)

    def apply(params, x, t):
        jax.debug.callback(lambda n: asked.append(int(n)), jnp.asarray(x.shape[0]))
        return known.apply(params, x, t)

    network = discrete.TokenFn(apply, known.params, 2)
    seen = []
    with caplog.at_level(logging.INFO, "diffsamp.search"):
        found = search.unmasking(
            network,
            drawn(JOINT, 40),
            nfe=(2, 3),
            key=KEY,
            batch=16,
            evaluations=200,
            progress=lambda *word: seen.append(word),
        )
    jax.effects_barrier()
    assert sum(asked) == found.evaluations <= 200
    assert found.evaluations == found.estimate.evaluations + 2
    assert "unmasking: " in caplog.text
    assert seen
    assert found.seconds > 0


def test_what_it_refuses():
    network, x_0 = exact(JOINT), drawn(JOINT, 8)
    good = {"nfe": 2, "key": KEY}
    with pytest.raises(TypeError, match=r"`network` must be a discrete\.TokenFn"):
        search.unmasking(lambda x, t: x, x_0, **good)
    with pytest.raises(TypeError, match="`x_0` must be integers"):
        search.unmasking(network, x_0 * 1.0, **good)
    with pytest.raises(ValueError, match="`x_0` must be whole sequences"):
        search.unmasking(network, x_0 + 1, **good)
    with pytest.raises(ValueError, match="`order` must be one of"):
        search.unmasking(network, x_0, order="sampled", **good)
    with pytest.raises(ValueError, match="of which 8 are held out"):
        search.unmasking(network, x_0, held_out=8, **good)
    with pytest.raises(ValueError, match="`evaluations` is too low"):
        search.unmasking(network, x_0, evaluations=9, **good)
