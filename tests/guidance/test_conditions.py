"""CADS: conditions noised at high noise levels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from guidance.exact import build, labels

import diffsamp as ds
from diffsamp import guidance

PROCESS = ds.processes.vp_linear()
SEEN = []


def apply(params, x, t, text):
    del params
    jax.debug.callback(lambda v, s: SEEN.append((float(s[0]), np.asarray(v))), text, t)
    return 0.5 * x + jnp.mean(text, axis=1, keepdims=True).astype(x.dtype)


NETWORK = ds.ScoreFn(apply, None, PROCESS, prediction="data")
TEXT = jax.random.normal(jax.random.key(3), (3, 64)) * 2 + 1
X = PROCESS.prior_sample(jax.random.key(0), (3, 2))


def seen(transform, x=X, text=TEXT, rows=10):
    SEEN.clear()
    tableau = ds.solvers.ddim(PROCESS, ds.schedules.uniform(PROCESS, rows))
    jax.block_until_ready(ds.sample(transform, tableau, x, cond={"text": text}))
    jax.effects_barrier()
    return dict(SEEN)


def test_the_condition_is_kept_below_and_noise_above():
    """g = 1 below tau[0]: the bits as they were; above tau[1] no part of the condition is left."""
    told = seen(guidance.anneal_condition(NETWORK, "text", jax.random.key(1), tau=(0.45, 0.85)))
    corr = {}
    for t, text in told.items():
        if t <= 0.45:
            np.testing.assert_array_equal(text, TEXT)
        else:  # mean and deviation of each sample's own condition
            np.testing.assert_allclose(text.mean(1), TEXT.mean(1), atol=1e-5)
            np.testing.assert_allclose(text.std(1), TEXT.std(1), rtol=1e-5)
        corr[t] = np.corrcoef(text[0], TEXT[0])[0, 1]
    assert abs(corr[max(corr)]) < 0.4
    assert len({round(c, 3) for c in corr.values()}) > 3
    # without the rescaling: sqrt(g) c + s sqrt(1 - g) n, whose deviation is known
    plain = guidance.anneal_condition(
        NETWORK, "text", jax.random.key(1), tau=(0.4, 1.0), scale=0.5, mix=0.0
    )
    for t, text in seen(plain).items():
        g = np.clip((1.0 - t) / 0.6, 0, 1)
        noise = (text - np.sqrt(g) * np.asarray(TEXT)) / (0.5 * np.sqrt(max(1 - g, 1e-9)))
        if g < 0.999:
            assert noise.std() == pytest.approx(1, abs=0.15)


def test_each_sample_and_row_has_its_own_noise():
    keys = jax.random.split(jax.random.key(1), 3)
    whole = seen(guidance.anneal_condition(NETWORK, "text", keys))
    alone = seen(guidance.anneal_condition(NETWORK, "text", keys[1:2]), X[1:2], TEXT[1:2])
    top = max(whole)
    np.testing.assert_allclose(whole[top][1], alone[top][0], rtol=1e-5)
    ts = sorted(whole)[-2:]
    assert np.abs(whole[ts[0]][0] - whole[ts[1]][0]).max() > 0.1
    one = guidance.anneal_condition(NETWORK, "text", jax.random.key(1))
    numbered = seen(one.for_samples(jnp.array([1])), X[1:2], TEXT[1:2])
    np.testing.assert_allclose(seen(one)[top][1], numbered[top][0], rtol=1e-5)


def test_around_guidance_the_null_stays_clean():
    guided = guidance.cfg(NETWORK, 2.0, {"text": np.zeros(64)})
    told = seen(guidance.anneal_condition(guided, "text", jax.random.key(1)))
    text = told[max(told)]
    np.testing.assert_array_equal(text[1::2], 0)
    assert np.abs(text[::2] - TEXT).max() > 0.1
    assert guidance.anneal_condition(guided, "text", jax.random.key(1)).nfe_factor == 2


def test_it_says_what_is_wrong():
    annealed = guidance.anneal_condition(NETWORK, "text", jax.random.key(1))
    tableau = build("ddim", PROCESS, 3)
    with pytest.raises(TypeError, match=r"cond\['text'\] is of dtype int32 and cannot be noised"):
        ds.sample(annealed, tableau, X, cond={"text": labels(3, 1)[:, None]})
    with pytest.raises(ValueError, match=r"`cond` lacks \['text'\]"):
        ds.sample(annealed, tableau, X)
    with pytest.raises(ValueError, match="must have one entry per sample"):
        ds.sample(annealed, tableau, X, cond={"text": TEXT[0]})
    with pytest.raises(ValueError, match="`tau` must rise"):
        guidance.anneal_condition(NETWORK, "text", jax.random.key(1), tau=(0.9, 0.6))
    with pytest.raises(ValueError, match="follows the rows of a tableau"):
        annealed(X, 0.5, cond={"text": TEXT})
