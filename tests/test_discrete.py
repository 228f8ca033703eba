"""Samplers of masked models against their exact laws on small spaces."""

import itertools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm

import diffsamp as ds
from diffsamp import discrete
from diffsamp.discrete import executor

KEY = jax.random.key(0)
RNG = np.random.default_rng(3)
SIZE, LENGTH = 3, 3
JOINT = RNG.dirichlet(np.full(SIZE**LENGTH, 0.4)).reshape((SIZE,) * LENGTH)
PAIR = RNG.dirichlet(np.full(9, 0.5)).reshape(3, 3)
DRAWS = 40_000


def exact(joint):
    """The network that knows the joint."""
    size, length = joint.shape[0], joint.ndim
    states = itertools.product(range(size + 1), repeat=length)
    table = np.array([discrete.conditionals(joint, s) for s in states])

    def apply(params, x, t):
        place = jnp.zeros(x.shape[0], jnp.int32)
        for i in range(length):
            place = place * (size + 1) + x[:, i]
        return params[place]

    return discrete.TokenFn(apply, jnp.log(jnp.asarray(table, jnp.float32) + 1e-30), size)


NETWORK = exact(JOINT)


def drawn(joint, rows, order="random", seed=1, network=None, draws=DRAWS, **options):
    network = network or exact(joint)
    x = jnp.full((draws, joint.ndim), network.mask)
    x = discrete.sample(network, rows, x, key=jax.random.key(seed), order=order, **options)
    return histogram(x, joint)


def histogram(x, joint):
    assert int(jnp.max(x)) < joint.shape[0]
    counts = np.zeros(joint.shape)
    np.add.at(counts, tuple(np.asarray(x).T), 1)
    return counts / counts.sum()


def distance(one, two):
    return 0.5 * np.abs(one - two).sum()


def floor(law, draws):
    """The expected distance of an exact sampler's histogram, times 1.8."""
    return 1.8 * 0.5 * np.sum(np.sqrt(2 / np.pi * law * (1 - law) / draws))


# -- exact laws -----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine", "quadratic"])
def test_the_law_of_two_tokens_is_a_formula(schedule):
    rows = discrete.ancestral(schedule, 5)
    q = np.diff(rows.alpha)
    product = PAIR.sum(axis=1)[:, None] * PAIR.sum(axis=0)[None]
    expected = (1 - np.sum(q**2)) * PAIR + np.sum(q**2) * product
    np.testing.assert_allclose(discrete.law(PAIR, rows), expected, atol=1e-12)


def test_ancestral_rows_approach_the_joint():
    """Total variation falls as one over the number of rows."""
    errors = [distance(discrete.law(JOINT, discrete.ancestral("linear", n)), JOINT) for n in (4, 8)]
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.15)
    assert errors[1] > 0.02


@pytest.mark.parametrize("order", ["random", "max", "margin", "entropy"])
def test_one_position_a_row_is_exact_in_any_order_that_sees_distributions_only(order):
    rows = discrete.parallel(LENGTH, LENGTH)
    np.testing.assert_allclose(discrete.law(JOINT, rows, order), JOINT, atol=1e-12)


def test_analytic_masks_of_sedd_and_exact_flow_matching_are_ancestral():
    one, two = discrete.ancestral("cosine", 6), discrete.flow_matching("cosine", 6)
    np.testing.assert_array_equal(one.unmask, two.unmask)
    # Euler's tau-leaping is first order, and exact where the rate is 1 / t
    errors = [
        np.abs(
            discrete.tau_leaping("cosine", n).alpha - discrete.ancestral("cosine", n).alpha
        ).max()
        for n in (32, 64)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.3)
    linear = discrete.tau_leaping("linear", 16)
    np.testing.assert_allclose(linear.alpha, discrete.ancestral("linear", 16).alpha, atol=1e-6)


SAMPLERS = {
    "ancestral": (discrete.ancestral("linear", 4), "random"),
    "cosine": (discrete.ancestral("cosine", 6), "random"),
    "first hitting": (discrete.first_hitting(LENGTH), "random"),
    "parallel": (discrete.parallel(LENGTH, 2), "random"),
    "confidence": (discrete.parallel(LENGTH, 2), "max"),
    "margin": (discrete.parallel(LENGTH, 2), "margin"),
    "entropy": (discrete.parallel(LENGTH, 3), "entropy"),
    "blocks": (discrete.blocks(discrete.ancestral("linear", 2), 2, LENGTH), "random"),
    "threshold": (discrete.threshold(LENGTH, 0.7), "max"),
    "bounded": (discrete.entropy_bounded(LENGTH, 0.6), "entropy"),
    "remasked": (discrete.remdm(discrete.ancestral("linear", 8), 0.05), "random"),
    "rescaled": (discrete.remdm(discrete.ancestral("linear", 6), 0.5, kind="rescale"), "random"),
    "loop": (discrete.remdm_loop("linear", 4, loops=3, at=0.6, eta=0.2), "random"),
    "leaping": (discrete.tau_leaping("cosine", 4), "random"),
}


# one shape and one network: one program for all
PADDED = dict(
    zip(SAMPLERS, discrete.Rows.pad_together([rows for rows, _ in SAMPLERS.values()]), strict=True)
)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_follow_the_exact_law(name):
    rows, order = SAMPLERS[name]
    law = discrete.law(JOINT, rows, order)
    assert law.sum() == pytest.approx(1, abs=1e-9)
    draws = 20_000
    found = drawn(JOINT, PADDED[name], order, network=NETWORK, draws=draws)
    assert distance(found, law) < floor(law, draws)
    # the power: another law, a few percent away, is not taken for it
    if distance(law, JOINT) > 0.04:
        assert distance(found, JOINT) > floor(law, draws)


def test_remasking_keeps_the_share_of_unmasked_tokens():
    """A single site is unmasked with probability alpha after every row, whatever is remasked."""
    joint = np.array([0.5, 0.3, 0.2])
    rows = discrete.remdm(discrete.ancestral("linear", 4), 0.3)
    network = exact(joint)
    for n in range(1, 5):
        head = jax.tree.map(lambda v, n=n: v[: n + (len(v) > 4)], rows).pad(4)
        x = jnp.full((DRAWS, 1), network.mask)
        x = discrete.sample(network, head, x, key=KEY)
        share = float(jnp.mean(x != network.mask))
        assert share == pytest.approx(rows.alpha[n], abs=4 * 0.5 / np.sqrt(DRAWS))
    with pytest.raises(ValueError, match="row 1 of 'bad' leaves a share"):
        discrete.Rows.create(times=[1, 0.5, 0], alpha=[0, 0.5, 1], unmask=[0.5, 0.9], name="bad")
    with pytest.raises(ValueError, match="rows of coins"):
        discrete.remdm(discrete.first_hitting(3))


@pytest.mark.parametrize("kind", ["rescale", "conf"])
def test_a_prompt_is_never_masked_again(kind):
    """A prompt that the network finds unlikely, under the largest remasking there is."""
    joint = np.zeros((2, 2, 2)) + 1e-3
    joint[0, 0, 0] = 1.0
    rows = discrete.remdm(discrete.ancestral("linear", 8), 1.0, kind=kind)
    x = jnp.full((500, 3), 2).at[:, 1].set(1)
    y = np.asarray(discrete.sample(exact(joint / joint.sum()), rows, x, key=KEY))
    assert np.all(y[:, 1] == 1)
    assert np.all(y < 2)


def test_confident_remasking_prefers_unlikely_tokens():
    joint = np.array([0.9, 0.1])
    rows = discrete.remdm(discrete.ancestral("linear", 2), 1.0, kind="conf")
    network = exact(joint[:, None] * joint[None])
    head = jax.tree.map(lambda v: v[: 1 + (len(v) > 2)], rows)
    x = discrete.sample(network, head, jnp.full((DRAWS, 2), 2), key=KEY)
    assert 0.4 < float(jnp.mean(x != 2)) < 0.6
    # where both tokens stand, one of each kind: the unlikely one is masked more often
    once = discrete.Rows.create(
        times=[1, 0.5, 0],
        alpha=[0, 1, 1],
        unmask=[1.0, 0.0],
        remask=[0.0, 1.0],
        confident=[False, True],
    )
    y = np.asarray(discrete.sample(network, once, jnp.full((DRAWS, 2), 2), key=KEY))
    masked = y == 2
    assert 0.9 < masked.sum(axis=1).mean() < 1.1  # the softmax sums to one
    lonely = masked.sum(axis=1) == 1
    other = np.where(masked[:, 0], y[:, 1], y[:, 0])[lonely]
    # of a mixed pair, 0 (p = .9) stays with sigmoid(.9 - .1) of the weight
    assert other.mean() < 0.1


def test_uniform_noise_against_the_matrix_exponential():
    """One site of two states: the posterior of a continuous-time chain, step by step."""
    p = np.array([0.8, 0.2])
    rows = discrete.uniform("linear", 6)

    def apply(params, x, t):
        """p(x_0 | x_t) by Bayes, at the level of t."""
        alpha = 1 - t
        here = jax.nn.one_hot(x[:, 0], 2)
        like = alpha[:, None] * here + (1 - alpha)[:, None] / 2
        told = params[None] * like
        return jnp.log(told / told.sum(axis=1, keepdims=True))[:, None]

    network = discrete.TokenFn(apply, jnp.asarray(p, jnp.float32), 2, mask=5)
    x = jax.random.randint(KEY, (DRAWS, 1), 0, 2)
    for n in (1, 4, 6):
        head = jax.tree.map(lambda v, n=n: v[: n + (len(v) > 6)], rows).pad(6)
        y = discrete.sample(network, head, x, key=jax.random.key(2))
        rate = -np.log(max(rows.alpha[n], 1e-12)) / 2
        generator = np.array([[-1.0, 1.0], [1.0, -1.0]])
        expected = p @ expm(rate * generator)
        share = float(jnp.mean(y == 1))
        assert share == pytest.approx(expected[1], abs=5 * 0.5 / np.sqrt(DRAWS))


def test_maskgit_keeps_its_counts_and_is_biased_as_defined():
    rows = discrete.maskgit(16, 4, temperature=0.0)
    left = np.append(16, 16 - np.cumsum(rows.count))
    np.testing.assert_array_equal(
        left[1:-1], np.floor(16 * np.cos(np.pi / 2 * np.arange(1, 4) / 4))
    )
    assert left[-1] == 0
    # L = 2, one position a row: the likelier token is taken first, so its value comes too often
    one = discrete.maskgit(2, 2, temperature=0.0)
    product = np.array([0.7, 0.3])
    joint = np.zeros((2, 2))
    joint[0, 0], joint[1, 1] = product  # two equal tokens
    found = drawn(joint, one, "sampled")
    # both positions draw; the pick is the likelier of the two draws
    assert found[0, 0] == pytest.approx(1 - 0.3**2, abs=0.01)
    assert drawn(joint, one, "max")[0, 0] == pytest.approx(0.7, abs=0.01)
    assert np.all(np.diff(discrete.maskgit(16, 4).noise) < 0)
    assert list(discrete.maskgit(2, 4).count) == [1, 1, 0, 0]  # more rows than tokens


# -- the executor ---------------------------------------------------------------------------------


def test_rare_tokens_are_as_rare_as_they_are():
    """Single-precision Gumbel noise cuts off; here 80 and 40 tokens are expected."""
    p = np.array([1 - 6e-5, 4e-5, 2e-5])
    network = discrete.TokenFn(
        lambda params, x, t: jnp.broadcast_to(params, (*x.shape, 3)),
        jnp.log(jnp.asarray(p, jnp.float32)),
        3,
    )
    rows = discrete.ancestral("linear", 1)
    drawn = discrete.sample(network, rows, jnp.full((1, 2_000_000), 3), key=KEY)
    counts, expected = np.bincount(np.asarray(drawn)[0], minlength=3), 2_000_000 * p
    assert abs(counts[1] - expected[1]) < 5 * np.sqrt(expected[1])
    assert abs(counts[2] - expected[2]) < 5 * np.sqrt(expected[2])


def test_a_rate_of_1e_7_is_right_to_5_percent():
    """Of 10^6 draws in which the rare token's uniform number begins with zeros or with ones only.

    Such numbers are a share of 2^-17, and no others let a token of 1e-7 win: it needs an
    exponential number below 1e-7 of the likely token's, which is below 16.
    """
    fixed = 18
    threefry = jax.extend.random.threefry_prng_impl

    def random_bits(key, width, shape):
        assert width == 32
        coin, bits = threefry.split(key, (2,))
        bits = threefry.random_bits(bits, width, shape)
        ones = threefry.random_bits(coin, 32, (shape[-2],)) >= np.uint32(1 << 31)
        start = jnp.where(ones, np.uint32(2**32 - 2 ** (32 - fixed)), np.uint32(0))
        high = (0,) * (len(shape) - 2)  # with more than one word a number, the first of them
        rare = bits[(*high, slice(None), 1)]
        return bits.at[(*high, slice(None), 1)].set(start | (rare >> fixed))

    tails = jax.extend.random.define_prng_impl(
        key_shape=threefry.key_shape,
        seed=threefry.seed,
        split=threefry.split,
        fold_in=threefry.fold_in,
        random_bits=random_bits,
        name="tails",
        tag="tails",
    )
    p = np.array([1 - 1e-7, 1e-7])
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (1, 1_000_000, 2))
    key = jax.random.key(0, impl=tails)

    def rate(drawn):
        return float(jnp.mean(drawn == 1)) * 2.0 ** (1 - fixed)

    draw = jax.jit(executor._categorical)
    assert rate(draw(key[None], logits)) == pytest.approx(1e-7, rel=0.05)
    single = jax.random.categorical(key, logits[0], mode="low")
    assert 0.4e-7 < rate(single) < 0.6e-7  # 2^-23 times the sum of exp(-k 2^-23 / 1e-7)


def test_one_program_for_all_samplers_and_budgets():
    traces = []
    known = exact(JOINT)

    def apply(params, x, t):
        traces.append(1)
        return known.apply(params, x, t)

    network = discrete.TokenFn(apply, known.params, SIZE)
    several = [rows for rows, _ in SAMPLERS.values()]
    x = jnp.full((4, LENGTH), SIZE)
    for (_, order), rows in zip(
        SAMPLERS.values(), discrete.Rows.pad_together(several), strict=True
    ):
        y = discrete.sample(network, rows, x, key=KEY, order=order)
        assert int(jnp.max(y)) < SIZE
    assert len(traces) == 1


def test_padding_prompts_and_evaluations():
    calls = []
    known = exact(JOINT)

    def apply(params, x, t):
        jax.debug.callback(lambda n: calls.append(int(n)), jnp.asarray(x.shape[0]))
        return known.apply(params, x, t)

    network = discrete.TokenFn(apply, known.params, SIZE)
    rows = discrete.threshold(LENGTH, 0.7)
    x = jnp.array([[3, 1, 3], [0, 3, 3], [2, 1, 0]])
    whole = discrete.run(network, rows, x, key=KEY, order="max")
    jax.effects_barrier()
    assert len(calls) == int(jnp.max(whole.evaluations))
    assert list(np.asarray(whole.evaluations))[2] == 0  # nothing was masked
    np.testing.assert_array_equal(np.where(x == 3, whole.x, x), whole.x)
    assert int(jnp.max(whole.x)) < SIZE
    padded = discrete.run(network, rows.pad(9), x, key=KEY, order="max")
    np.testing.assert_array_equal(padded.x, whole.x)
    np.testing.assert_array_equal(padded.evaluations, whole.evaluations)


def test_a_sample_depends_on_its_own_key_only():
    network, rows = NETWORK, discrete.remdm(discrete.ancestral("linear", 6), 0.1)
    keys = jax.random.split(KEY, 6)
    x = jnp.full((6, LENGTH), SIZE)
    whole = discrete.sample(network, rows, x, key=keys)
    np.testing.assert_array_equal(whole[4:5], discrete.sample(network, rows, x[:1], key=keys[4:5]))


def test_a_prompt_of_a_neighbour_changes_no_time():
    """First hitting in blocks: a sample that rests keeps its own time."""

    def apply(params, x, t):
        return jnp.stack([0 * t, 40 * (t - 0.4)], axis=1)[:, None] * jnp.ones((1, x.shape[1], 1))

    network = discrete.TokenFn(apply, None, 2)
    rows = discrete.blocks(discrete.first_hitting(4), 4, 8)
    keys = jax.random.split(KEY, 64)
    free, known = jnp.full((64, 8), 2), jnp.full((64, 8), 2).at[:, :4].set(0)
    alone = discrete.sample(network, rows, known, key=keys)
    both = discrete.sample(
        network, rows, jnp.concatenate([known, free]), key=jnp.concatenate([keys, keys])
    )
    np.testing.assert_array_equal(both[:64], alone)


def test_times_of_first_hitting_follow_their_law():
    seen = []

    def apply(params, x, t):
        jax.debug.callback(lambda v: seen.append(np.asarray(v)), t)
        return jnp.zeros((*x.shape, 2))

    network = discrete.TokenFn(apply, None, 2)
    rows = discrete.first_hitting(3)
    discrete.sample(network, rows, jnp.full((20_000, 3), 2), key=KEY).block_until_ready()
    jax.effects_barrier()
    t = np.stack(seen)  # order statistics of three uniforms, from the largest
    np.testing.assert_allclose(t.mean(axis=1), [0.75, 0.5, 0.25], atol=0.01)
    assert np.all(np.diff(t, axis=0) < 0)


def test_temperature_and_top_k():
    network = discrete.TokenFn(
        lambda params, x, t: jnp.broadcast_to(params, (*x.shape, 3)),
        jnp.log(jnp.array([0.5, 0.3, 0.2])),
        3,
    )
    rows, x = discrete.ancestral("linear", 2), jnp.full((1, 30_000), 3)
    for temperature, power in ((0.5, 2.0), (2.0, 0.5)):
        y = np.asarray(discrete.sample(network, rows, x, key=KEY, temperature=temperature))
        expected = np.array([0.5, 0.3, 0.2]) ** power
        found = np.bincount(y[0], minlength=3) / 30_000
        np.testing.assert_allclose(found, expected / expected.sum(), atol=0.012)
    assert np.all(np.asarray(discrete.sample(network, rows, x, key=KEY, temperature=0.0)) == 0)
    two = np.bincount(
        np.asarray(discrete.sample(network, rows, x, key=KEY, top_k=2))[0], minlength=3
    )
    assert two[2] == 0
    assert two[0] / two.sum() == pytest.approx(0.625, abs=0.012)


# -- guidance and search --------------------------------------------------------------------------


def test_guidance_of_one_token_is_the_tilted_law():
    p = np.array([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])  # free, and given

    def apply(params, x, t, label):
        return jnp.broadcast_to(params[label][:, None], (*x.shape, 3))

    network = discrete.TokenFn(apply, jnp.log(jnp.asarray(p, jnp.float32)), 3)
    guided = discrete.guided(network, 2.0, {"label": 0})
    x = jnp.full((DRAWS, 1), 3)
    cond = {"label": jnp.ones(DRAWS, jnp.int32)}
    y = discrete.sample(guided, discrete.ancestral("linear", 1), x, key=KEY, cond=cond)
    expected = p[1] ** 2 / p[0]
    found = np.bincount(np.asarray(y)[:, 0], minlength=3) / DRAWS
    np.testing.assert_allclose(found, expected / expected.sum(), atol=0.01)
    with pytest.raises(ValueError, match="guidance needs `cond` with 'label'"):
        discrete.sample(guided, discrete.ancestral("linear", 1), x, key=KEY)


def test_a_linear_classifier_is_exact_to_first_order():
    p = np.array([0.5, 0.3, 0.2])
    weights = np.array([0.3, -0.7, 1.1, 0.0])  # the mask's last
    network = discrete.TokenFn(
        lambda params, x, t: jnp.broadcast_to(params, (*x.shape, 3)),
        jnp.log(jnp.asarray(p, jnp.float32)),
        3,
    )

    def log_prob(params, one_hot, t, target):
        return jnp.sum(one_hot * params[None, None], axis=(1, 2)) * target

    guided = discrete.classifier_guided(
        network, log_prob, jnp.asarray(weights, jnp.float32), scale=1.5
    )
    x, cond = jnp.full((DRAWS, 1), 3), {"target": jnp.ones(DRAWS)}
    y = discrete.sample(guided, discrete.ancestral("linear", 1), x, key=KEY, cond=cond)
    expected = p * np.exp(1.5 * weights[:3])
    found = np.bincount(np.asarray(y)[:, 0], minlength=3) / DRAWS
    np.testing.assert_allclose(found, expected / expected.sum(), atol=0.01)


def chain(length, stay):
    """A binary Markov chain: entropies fall as more is known."""
    joint = np.zeros((2,) * length)
    for state in itertools.product((0, 1), repeat=length):
        p = 0.5
        for a, b in itertools.pairwise(state):
            p *= stay if a == b else 1 - stay
        joint[state] = p
    return joint


def divergence(p, q):
    inside = p > 0
    return float(np.sum(p[inside] * np.log(p[inside] / q[inside])))


def exact_curve(joint):
    """e(m) by enumeration."""
    length = joint.ndim
    curve = np.zeros(length + 1)
    for m in range(1, length + 1):
        values = []
        for masked in itertools.combinations(range(length), m):
            for state in itertools.product(range(joint.shape[0]), repeat=length):
                hidden = tuple(joint.shape[0] if i in masked else v for i, v in enumerate(state))
                told = discrete.conditionals(joint, hidden)
                loss = -np.mean([np.log(told[i, state[i]]) for i in masked])
                values.append(joint[state] * loss)
        curve[m] = np.sum(values) / len(list(itertools.combinations(range(length), m)))
    return curve


def test_the_measured_cost_is_the_divergence_and_the_best_counts_minimise_it():
    """KL(data || sampler) of the random order, for every way to cut five tokens into two rows."""
    joint = chain(5, 0.9)
    curve = exact_curve(joint)
    cost = discrete.excess(curve)
    found = {}
    for first in range(1, 5):
        rows = discrete.parallel(5, 2, law=[first, 5 - first])
        upper = cost[0, first] + cost[first, 5]
        found[first] = divergence(joint, discrete.law(joint, rows))
        # over orders the mean of divergences; that of the mixture is no larger
        assert found[first] <= upper + 1e-9
    best = discrete.best_counts(curve, 2)
    assert best.sum() == 5
    uppers = {k: cost[0, k] + cost[k, 5] for k in range(1, 5)}
    assert best[0] == min(uppers, key=uppers.get)
    assert found[int(best[0])] <= min(found.values()) * 1.05
    # measured by the network itself, from samples
    network = exact(joint)
    flat = RNG.choice(32, size=4000, p=joint.ravel())
    x_0 = np.stack(np.unravel_index(flat, joint.shape), axis=1)
    measured = discrete.token_entropies(network, x_0, key=KEY, repeats=2)
    np.testing.assert_allclose(measured, curve, atol=0.02)
    np.testing.assert_array_equal(discrete.best_counts(measured, 5), np.ones(5))
    with pytest.raises(ValueError, match="6 rows cannot each unmask one of 5 tokens"):
        discrete.best_counts(curve, 6)


def test_found_counts_beat_the_cosine_at_every_budget():
    joint = chain(7, 0.8)
    curve = exact_curve(joint)
    for n in (2, 3, 4):
        best = discrete.parallel(7, n, law=discrete.best_counts(curve, n))
        cosine = discrete.parallel(7, n, law="cosine")
        one, two = (divergence(joint, discrete.law(joint, r)) for r in (best, cosine))
        assert one < 0.9 * two


def test_what_it_refuses():
    network = exact(JOINT)
    x = jnp.full((1, LENGTH), SIZE)
    rows = discrete.ancestral("linear", 2)
    with pytest.raises(TypeError, match=r"`network` must be a discrete\.TokenFn"):
        discrete.sample(lambda x, t: x, rows, x, key=KEY)
    with pytest.raises(ValueError, match="`order` must be one of"):
        discrete.sample(network, rows, x, key=KEY, order="best")
    with pytest.raises(TypeError, match="`x` must be integers"):
        discrete.sample(network, rows, x * 1.0, key=KEY)
    wrong = discrete.TokenFn(lambda p, x, t: jnp.zeros((*x.shape, 2)), None, SIZE)
    with pytest.raises(ValueError, match="the network must return logits of shape"):
        discrete.sample(wrong, rows, x, key=KEY)
    with pytest.raises(ValueError, match="`schedule` must be one of"):
        discrete.ancestral("sine", 3)
    with pytest.raises(ValueError, match="the schedule must go from 0 to 1"):
        discrete.ancestral(lambda t: 0.5 * (1 - t), 3)
    with pytest.raises(ValueError, match="add up to the length 3"):
        discrete.parallel(3, 2, law=[1, 1])
    with pytest.raises(ValueError, match="more than the state"):
        discrete.law(JOINT, discrete.uniform("linear", 2))
    with pytest.raises(ValueError, match="look at distributions only"):
        discrete.law(JOINT, rows, "sampled")
    assert set(discrete.SAMPLERS) <= set(discrete.__all__)
    assert repr(rows) == "<ancestral, 2 rows: 2 rows>"
    assert ds.discrete is discrete
