"""Schedules from a profile: closed forms of Gaussians, helices and velocities that are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsamp as ds
from diffsamp import search

FLOW, EDM = ds.processes.flow(), ds.processes.edm()


def before(profile):
    """How much happened before every fine time, as a share."""
    return np.append(0.0, np.cumsum(profile.amount)) / profile.amount.sum()


def field(velocity):
    """A flow model by its velocity (x, t)."""

    def apply(params, x, t):
        return velocity(x, jnp.broadcast_to(t, x.shape[:1])[:, None])

    return ds.ScoreFn(apply, None, FLOW, prediction="velocity")


# -- the schedule of a profile ---------------------------------------------------------------------


def test_equal_amounts_lie_between_its_times():
    rng = np.random.default_rng(0)
    times = np.sort(rng.uniform(size=21))[::-1]
    amount = rng.exponential(size=20)
    amount[[0, 7, 8, 19]] = 0.0  # nothing happens there
    profile = search.Profile(times, amount)
    for n in (1, 3, 10):
        found = profile.schedule(n)
        assert (found[0], found[-1]) == (times[0], times[-1])
        share = np.interp(-found, -times, before(profile))
        np.testing.assert_allclose(share, np.arange(n + 1) / n, atol=1e-12)
        np.testing.assert_array_equal(profile(FLOW, n), found)
    np.testing.assert_allclose(profile.schedule(12)[::3], profile.schedule(4), atol=1e-12)
    flat = search.Profile(np.linspace(1, 0, 5), np.full(4, 0.3))
    np.testing.assert_allclose(flat.schedule(7), np.linspace(1, 0, 8), atol=1e-12)
    with pytest.raises(ValueError, match="`n` must be at least 1"):
        profile.schedule(0)


# -- SharpEuler ------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_sharp_euler_of_a_known_velocity(power):
    """v = c t^3: |dv/dt| = 3 t^2 |c|, so a share q of steps lies below q^(1 / (2 power + 1))."""
    network = field(lambda x, t: 0 * x + t**3 * jnp.array([[1.0, -2.0]]))
    profile = search.sharp_euler(network, jnp.zeros((3, 2)), power=power, smooth=0.0)
    want = (np.arange(9) / 8) ** (1 / (2 * power + 1))
    np.testing.assert_allclose(profile.schedule(8)[::-1], want, atol=2e-3)


def test_sharp_euler_of_a_gaussian():
    """The velocity is -m + std'(t) z and changes by std'' = s^2 / std^3, whatever m and z."""
    variance = 0.04
    network = ds.targets.gaussian([0.5, -0.2, 0.1], variance).score_fn(FLOW, "velocity")
    x_T = FLOW.prior_sample(jax.random.key(0), (32, 3))
    profile = search.sharp_euler(network, x_T, points=200, smooth=0.0)
    t = np.linspace(0, 1, 20001)
    density = np.sqrt(variance / ((1 - t) ** 2 * variance + t**2) ** 1.5)
    share = np.append(0, np.cumsum((density[1:] + density[:-1]) / 2))
    want = np.interp(np.arange(7) / 6, share / share[-1], t)
    np.testing.assert_allclose(profile.schedule(6)[::-1], want, atol=4e-3)
    other = search.sharp_euler(network, x_T, points=200, smooth=0.0, power=0.52)
    assert np.abs(other.schedule(6)[::-1] - want).max() > 4e-3


def test_smoothing_spreads_what_happens_in_one_place():
    """A velocity with one jump: a normal density around it, of the width that is asked for."""
    network = field(lambda x, t: 0 * x + jnp.where(t > 0.5, 1.0, 0.0))
    x_T = jnp.zeros((2, 1))
    sharp = search.sharp_euler(network, x_T, points=200, smooth=0.0, power=1.0)
    assert sharp.amount.max() > 0.99 * sharp.amount.sum()
    smooth = search.sharp_euler(network, x_T, points=200, smooth=0.05, power=1.0)
    middle = (smooth.times[:-1] + smooth.times[1:]) / 2
    weights = smooth.amount / smooth.amount.sum()
    assert weights @ middle == pytest.approx(0.5, abs=0.01)
    assert np.sqrt(weights @ (middle - weights @ middle) ** 2) == pytest.approx(0.05, rel=0.02)


# -- TORS ------------------------------------------------------------------------------------------


def test_a_gaussian_turns_in_a_plane():
    """By the angle between -m + std'(t) z at both ends; its torsion is 0."""
    variance, mean = 0.09, np.array([0.6, -0.3, 0.4, 0.2])
    network = ds.targets.gaussian(mean, variance).score_fn(FLOW, "velocity")
    x_T = FLOW.prior_sample(jax.random.key(0), (16, 4))
    profile = search.tors(network, x_T)
    t = profile.times
    std = np.sqrt((1 - t) ** 2 * variance + t**2)
    slope = ((variance + 1) * t - variance) / std
    z = np.asarray(x_T, np.float64)  # std is 1 and the mean 0 at t = 1
    velocity = -mean + slope[:, None, None] * z
    unit = velocity / np.linalg.norm(velocity, axis=2, keepdims=True)
    angles = np.arccos(np.clip(np.sum(unit[1:] * unit[:-1], axis=2), -1, 1)).mean(axis=1)
    np.testing.assert_allclose(profile.amount[:-1], angles[:-1], rtol=0.01, atol=1e-4)
    assert profile.amount.sum() == pytest.approx(angles.sum(), rel=0.01)


def test_a_helix_turns_and_twists():
    """A frame that turns by theta'(t), of which the curvature alone is 3/5 of it."""
    rng = np.random.default_rng(1)
    frame = jnp.asarray(np.linalg.qr(rng.normal(size=(8, 8)))[0][:3], jnp.float32)  # in 8 axes
    speed = 6.0

    def velocity(x, t):
        inside = x @ frame.T
        turn = jnp.stack([-inside[:, 1], inside[:, 0], 4 / 3 + 0 * inside[:, 2]], axis=1)
        return 2 * t * speed * turn @ frame

    start = jnp.asarray([[1.0, 0.0, 0.3], [0.0, -1.0, 0.0]], jnp.float32) @ frame
    profile = search.tors(field(velocity), start, points=200)
    # theta = speed t^2
    assert profile.amount.sum() == pytest.approx(speed, rel=0.01)
    flat = search.tors(field(velocity), start, points=200, torsion=False)
    assert flat.amount.sum() == pytest.approx(0.6 * speed, rel=0.01)
    want = np.sqrt(np.arange(6) / 5)
    np.testing.assert_allclose(profile.schedule(5)[::-1], want, atol=0.01)


def test_planes_have_no_sign():
    """A plane curve with an inflection: the binormal flips there, and nothing twists."""
    network = field(lambda x, t: jnp.concatenate([jnp.ones_like(t), jnp.sin(6 * t)], axis=1))
    profile = search.tors(network, jnp.zeros((1, 2)))
    angle = np.arctan(np.sin(6 * profile.times))
    assert profile.amount.sum() == pytest.approx(np.abs(np.diff(angle)).sum(), rel=0.02)


# -- both ------------------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize("function", [search.tors, search.sharp_euler])


@BOTH
def test_other_processes_are_seen_as_a_flow(function):
    """The same levels of log-SNR and the same starts give the same amounts."""
    target = ds.targets.gaussian_mixture([0.4, 0.6], [[-1.0, 0.2], [0.7, 0.5]], [0.05, 0.1])
    u = np.linspace(0.97, 0.0, 80)
    y = 0.5 * np.random.default_rng(0).normal(size=(6, 2))
    levels = {"flow": (FLOW, u, y), "edm": (EDM, u / (1 - u), y / (1 - u[0]))}
    found = {
        name: function(
            target.score_fn(process, "data"), jnp.asarray(x, jnp.float32), times=times
        ).amount
        for name, (process, times, x) in levels.items()
    }
    np.testing.assert_allclose(found["edm"], found["flow"], rtol=0.02, atol=1e-3)


@BOTH
def test_evaluations_are_counted_and_limited_and_batches_change_nothing(function):
    exact = ds.targets.gaussian_mixture([0.4, 0.6], [[-1.0], [0.7]], [0.05, 0.1]).score_fn(FLOW)
    calls = []

    def apply(params, x, t, shift):
        jax.debug.callback(lambda n: calls.append(int(n)), jnp.asarray(x.shape[0]))
        return exact.apply(params, x - shift, t)

    network = dataclasses.replace(exact, apply=apply)
    x_T = FLOW.prior_sample(jax.random.key(0), (6, 1))
    cond = {"shift": jnp.linspace(0, 1, 6)[:, None]}
    whole = function(network, x_T, points=20, cond=cond)
    jax.effects_barrier()
    assert sum(calls) == whole.evaluations
    assert whole.estimate.evaluations == 6 * 20
    parts = function(network, x_T, points=20, cond=cond, batch=4)
    np.testing.assert_allclose(parts.amount, whole.amount, rtol=1e-3, atol=1e-5)
    limited = function(network, x_T, points=20, cond=cond, evaluations=70, batch=2)
    assert limited.evaluations <= 70
    few = function(network, x_T[:3], points=20, cond={"shift": cond["shift"][:3]})
    np.testing.assert_allclose(limited.amount, few.amount, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="`evaluations` is too low"):
        function(network, x_T, points=20, cond=cond, evaluations=10)


@BOTH
def test_it_is_a_schedule_like_any_other(function):
    network = ds.targets.gaussian_mixture([0.4, 0.6], [[-1.0], [0.7]], [0.05, 0.1]).score_fn(EDM)
    x_T = EDM.prior_sample(jax.random.key(0), (8, 1))
    profile = function(network, x_T, points=40)
    assert profile.times[-1] == 0.0
    assert np.all(profile.times[:-1] >= EDM.t_min)
    table = search.compare(
        network, x_T, nfe=(5,), solver=("ddim",), schedule={"mine": profile}, reference=x_T
    )
    (entry,) = table.entries
    np.testing.assert_array_equal(entry.tableau.times, profile.schedule(5))


@BOTH
def test_bad_input(function):
    straight = field(lambda x, t: jnp.ones_like(x))
    with pytest.raises(ValueError, match="straight"):
        function(straight, jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="not finite"):
        function(field(lambda x, t: x * jnp.nan), jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="`points` must be at least 4"):
        function(straight, jnp.zeros((2, 3)), points=3)
    with pytest.raises(ValueError, match="decreas"):
        function(straight, jnp.zeros((2, 3)), times=[0.0, 0.5, 1.0])


def test_negative_powers_are_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        search.sharp_euler(field(lambda x, t: x), jnp.zeros((2, 3)), power=-1.0)
