"""Time-Shift: the base at window 0, times near the true ones on exact states, what it gains."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsamp as ds
from diffsamp import schedules, solvers
from diffsamp.guidance.time_shift import PUBLISHED, time_shift

PROCESS = ds.processes.vp_linear()
VARIANCE, DIM = 0.25, 256


def exact(params, x, t):
    """Noise prediction of isotropic Gaussian data, in closed form."""
    alpha, sigma = PROCESS.alpha(t), PROCESS.sigma(t)
    return x * (sigma / (VARIANCE * alpha**2 + sigma**2))[:, None]


EXACT = ds.ScoreFn(exact, None, PROCESS, prediction="noise")


def biased(factor):
    """A network that over- or underestimates the noise: its own samples drift off the process."""

    def apply(params, x, t):
        return factor * EXACT.apply(params, x, t)

    return dataclasses.replace(EXACT, apply=apply)


def x_T(n=32):
    return PROCESS.prior_sample(jax.random.key(0), (n, DIM))


@pytest.mark.parametrize("variant", ["label", "level"])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "unipc3", "heun"])
def test_without_a_window_it_is_the_base(name, variant):
    network = biased(0.9)
    tableau = solvers.get(name)(PROCESS, schedules.uniform(PROCESS, 9))
    key = jax.random.key(2)
    want = ds.sample(network, tableau, x_T(), key=key)
    for options in ({"window": 0.0, "cutoff": 0.0}, {"window": 0.2, "cutoff": 1.0}):
        shifted = time_shift(network, variant=variant, **options)
        got = ds.sample(shifted, tableau, x_T(), key=key)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    moved = ds.sample(time_shift(network, window=0.2, cutoff=0.1), tableau, x_T(), key=key)
    assert np.abs(np.asarray(moved - want)).max() > 1e-3


@pytest.mark.parametrize("variant", ["label", "level"])
def test_the_network_is_asked_where_it_should_be(variant):
    """One time per sample, within the window; its own at first and below the cut-off."""
    seen = []
    network = biased(0.8)

    def apply(params, x, t):
        jax.debug.callback(lambda t: seen.append(np.asarray(t)), t, ordered=True)
        return network.apply(params, x, t)

    recording = dataclasses.replace(network, apply=apply)
    tableau = solvers.ddim(PROCESS, schedules.uniform(PROCESS, 10))
    shifted = time_shift(recording, window=0.08, cutoff=0.35, variant=variant)
    x = x_T(6).at[0].multiply(0.5)  # one sample of too little noise
    ds.sample(shifted, tableau, x)
    jax.effects_barrier()
    seen = np.stack(seen)
    times = tableau.times[:-1]
    assert seen.shape == (10, 6)
    np.testing.assert_allclose(seen[0], times[0], rtol=1e-6)
    low = times <= 0.35
    assert low.sum() == 3
    np.testing.assert_allclose(seen[low], np.tile(times[low, None], 6), rtol=1e-6)
    distance = np.abs(seen - times[:, None])
    assert distance.max() <= 0.04 + 1e-6
    assert (distance[1:7].max(axis=1) > 1e-3).all()
    np.testing.assert_allclose(seen[1, 0], times[1] - 0.04, rtol=1e-5)  # the end of the window


@pytest.mark.parametrize("data_variance", [0.0, VARIANCE])
def test_exact_states_keep_their_time(data_variance):
    """Var(x_t) = sigma^2 + Var(x_0) alpha^2; without the second part the bias grows as t falls."""
    key_0, key_1 = jax.random.split(jax.random.key(1))
    shifted = time_shift(EXACT, window=0.2, cutoff=0.0, data_variance=data_variance)
    times = np.array([1.0, 0.8, 0.6, 0.4, 0.2])
    level = ds.predictions.level_at(PROCESS, times)
    bound = shifted.bind(level, (np.ones(5), np.zeros(5)))
    x_0 = jnp.sqrt(VARIANCE) * jax.random.normal(key_0, (64, DIM))
    eps = jax.random.normal(key_1, (64, DIM))
    offsets = []
    for n in range(1, 5):
        row = jax.tree.map(lambda v, n=n: np.asarray(v)[n], bound)
        x = level.alpha[n] * x_0 + level.sigma[n] * eps
        offsets.append(float(jnp.mean(shifted.shifted_time(x, row))) - times[n])
    if data_variance:
        # DIM elements tell the variance up to sqrt(2 / DIM) = 9 %
        assert np.abs(offsets).max() < 0.02
    else:
        assert offsets[0] < 0.02
        assert offsets[-1] > 0.02


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_exposure_bias(factor, name):
    """Distance to data of an imperfect network, |std - 0.5| = W2 per element. What is claimed.

    With the data's variance and a low cut-off the shift brings samples closer. The published
    default, which neglects that variance, does not: it does no more than the drift it corrects.
    """
    network = biased(factor)
    tableau = solvers.get(name)(PROCESS, schedules.uniform(PROCESS, 20))

    def distance(score_fn):
        return abs(float(np.std(np.asarray(ds.sample(score_fn, tableau, x_T(256))))) - 0.5)

    base = distance(network)
    assert base > 0.05
    informed = time_shift(network, window=0.3, cutoff=0.05, data_variance=VARIANCE)
    assert distance(informed) < 0.85 * base
    window, cutoff = PUBLISHED["default"]
    published = time_shift(network, window=window, cutoff=cutoff)
    assert distance(published) == pytest.approx(base, rel=0.05)


def test_it_goes_with_guidance_and_thresholding():
    process = PROCESS

    def apply(params, x, t, shift):
        return 0.9 * EXACT.apply(EXACT.params, x, t) + shift

    network = dataclasses.replace(EXACT, apply=apply)
    shifted = time_shift(network, window=0.1, cutoff=0.2)
    guided = ds.guidance.cfg(shifted, 2.0, {"shift": jnp.zeros(1)})
    clipped = ds.guidance.static_thresholding(guided, low=-2, high=2)
    tableau = solvers.ddim(process, schedules.uniform(process, 6))
    x = ds.sample(clipped, tableau, x_T(4), cond={"shift": jnp.full((4, 1), 0.1)})
    assert np.isfinite(np.asarray(x)).all()
    assert np.abs(np.asarray(x)).max() <= 2 + 1e-5
    assert clipped.nfe_factor == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": -0.1, "cutoff": 0.3}, r"`window` must lie in \[0, 1\]; got -0.1"),
        ({"window": 80, "cutoff": 0.3}, r"`window` must lie in \[0, 1\]; got 80"),
        ({"window": 0.1, "cutoff": 300}, r"`cutoff` must lie in \[0, 1\]; got 300"),
        ({"window": 0.1, "cutoff": 0.3, "data_variance": -1}, "`data_variance` must not be neg"),
        ({"window": 0.1, "cutoff": 0.3, "variant": "land"}, "`variant` must be one of 'label', 'l"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        time_shift(EXACT, **options)


def test_it_follows_rows():
    """At a single time there is no first evaluation to leave alone: refused, not ignored."""
    shifted = time_shift(EXACT, window=0.1, cutoff=0.3)
    with pytest.raises(ValueError, match="time_shift follows the rows of a tableau: use it with"):
        ds.adaptive.ode_solution(shifted, x_T(2), 1.0, 0.1)


def test_what_it_does_not_take():
    with pytest.raises(TypeError, match="put guidance and thresholding around its result"):
        time_shift(ds.guidance.static_thresholding(EXACT, low=-1, high=1), window=0.1, cutoff=0.3)
    with pytest.raises(ValueError, match="needs a network with a batch axis"):
        time_shift(dataclasses.replace(EXACT, batched=False), window=0.1, cutoff=0.3)


def test_published_settings_are_of_this_algorithm():
    assert set(PUBLISHED) == {"default", "deis-5", "ddim_adm-5"}
    assert all(0 < window < 0.1 and 0 < cutoff < 1 for window, cutoff in PUBLISHED.values())
