"""Noise of one Brownian path: its law, and samples that do not depend on the number of steps."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsamp as ds
from diffsamp import schedules, solvers

VP, EDM = ds.processes.vp_linear(), ds.processes.edm()
MIXTURE = ds.targets.gaussian_mixture([0.5, 0.5], [[-1.0, 0.5], [1.0, -0.5]], [0.05, 0.1])


# one hump, on which no sample changes its mode
HUMP = ds.targets.gaussian_mixture([0.4, 0.6], [[-0.5, 0.5], [0.5, -0.5]], [0.4, 0.5])


def samples(name, steps, x_T, process=VP, target=MIXTURE):
    """The samples of one key at each number of steps; one compilation."""
    tableaux = [solvers.get(name)(process, schedules.logsnr(process, n)) for n in steps]
    f, key = target.score_fn(process), jax.random.key(3)
    return [
        np.asarray(ds.sample(f, tableau, x_T, key=ds.brownian_key(key, tableau)), np.float64)
        for tableau in ds.Tableau.pad_together(tableaux)
    ]


@pytest.mark.parametrize("name", ["ddpm", "sa_solver", "er_sde3", "seeds2"])
def test_samples_of_one_key_at_40_and_80_steps(name):
    x_T = VP.prior_sample(jax.random.key(0), (400, 2))
    one, two = samples(name, (40, 80), x_T)
    assert np.corrcoef(one.ravel(), two.ravel())[0, 1] > 0.95


def test_without_a_path_they_are_other_samples():
    x_T, f = VP.prior_sample(jax.random.key(0), (400, 2)), MIXTURE.score_fn(VP)
    one, two = (
        ds.sample(f, solvers.ddpm(VP, schedules.logsnr(VP, n)), x_T, key=jax.random.key(3))
        for n in (40, 80)
    )
    assert np.corrcoef(np.ravel(one), np.ravel(two))[0, 1] < 0.6


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m_sde"])
def test_the_strong_error_falls_with_the_steps(name):
    x_T = EDM.prior_sample(jax.random.key(0), (100, 2))
    *coarse, fine = samples(name, (10, 20, 40, 80, 320), x_T, EDM, HUMP)
    errors = [np.mean(np.abs(x - fine)) for x in coarse]
    assert all(b < 0.8 * a for a, b in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.05


def noises(tableau, keys, rows, shape=()):
    """(rows, batch, ..): what the executor is given."""
    held = ds.random.sample_keys(ds.brownian_key(keys, tableau), len(keys))
    like = jnp.zeros((len(keys), *shape))
    drawn = jax.jit(jax.vmap(lambda n: ds.random.normal_like(held, n, like)))
    return np.asarray(drawn(jnp.asarray(rows)))


def test_increments_are_normal_and_independent():
    tableau = solvers.ddpm(VP, schedules.logsnr(VP, 9))
    z = noises(tableau, jax.random.split(jax.random.key(0), 20000), [*range(8)])
    np.testing.assert_allclose(z @ z.T / 20000, np.eye(8), atol=0.035)  # 5 / sqrt(20000)
    np.testing.assert_allclose(z.mean(1), 0, atol=0.035)
    np.testing.assert_allclose(np.mean(z**4, axis=1), 3, atol=0.4)
    one, two = noises(tableau, jax.random.split(jax.random.key(0), 1), [3], (5000, 2))[0, 0].T
    assert abs(np.mean(one * two)) < 0.07  # elements of a sample too


def test_two_small_increments_make_the_large_one():
    """In e^(2 log-SNR), whatever the grid between."""
    keys = jax.random.split(jax.random.key(1), 4)
    coarse = solvers.ddpm(VP, VP.time(np.array([-4.5, -1.5, 3.0])))
    fine = solvers.ddpm(VP, VP.time(np.array([-4.5, -3.0, -1.5, 0.3, 3.0])))
    large, small = noises(coarse, keys, [0, 1]), noises(fine, keys, [*range(4)])

    def lengths(tableau):
        return np.sqrt(np.diff((tableau.alpha / tableau.sigma) ** 2))[:, None]

    parts = small * lengths(fine)
    want = np.stack([parts[0] + parts[1], parts[2] + parts[3]]) / lengths(coarse)
    np.testing.assert_allclose(large, want, atol=2e-3)  # levels are rounded to 4e-4


def test_rows_without_an_increment_draw_by_themselves():
    """Up again in Restart, and beyond the rows the key was made for; each sample by its own key."""
    keys = jax.random.split(jax.random.key(2), 3)
    times = schedules.karras(EDM, 18)
    again = solvers.restart(EDM, times)
    key = ds.brownian_key(keys, again)
    up = np.flatnonzero(again.c)
    assert len(up) == 2
    assert np.all(key.end[up] < key.start[up])
    ancestral = solvers.ddpm(EDM, times)
    held = ds.brownian_key(keys, ancestral)
    assert np.all(held.end[:17] > held.start[:17])
    draw = jax.jit(lambda rows: ds.random.normal_like(held, rows, jnp.zeros(3)))
    for row, alike in ((40, True), (3, False)):
        own = ds.random.normal_like(keys, row, jnp.zeros(3))
        assert np.array_equal(draw(row), own) == alike
    x_T = EDM.prior_sample(jax.random.key(0), (3, 2))
    f = MIXTURE.score_fn(EDM)
    whole = ds.sample(f, ancestral, x_T, key=ds.brownian_key(keys, ancestral))
    alone = ds.sample(f, ancestral, x_T[1:2], key=ds.brownian_key(keys[1:2], ancestral))
    np.testing.assert_allclose(alone[0], whole[1], atol=1e-4)


@pytest.mark.long
def test_where_it_goes():
    """Under jit with a traced tableau, one compilation for all; a start at alpha = 0; errors."""
    x_T = VP.prior_sample(jax.random.key(0), (4, 2))
    f = MIXTURE.score_fn(VP)
    pair = [solvers.ddpm(VP, schedules.logsnr(VP, n)) for n in (5, 9)]
    pair = ds.Tableau.pad_together(pair)

    @jax.jit
    def run(tableau, key):
        return ds.sample(f, tableau, x_T, key=ds.brownian_key(key, tableau))

    for tableau in pair:
        key = ds.brownian_key(jax.random.key(4), tableau)
        want = ds.sample(f, tableau, x_T, key=key)
        np.testing.assert_allclose(run(tableau, jax.random.key(4)), want, atol=1e-3)
    assert run._cache_size() == 1
    flow = ds.processes.flow()
    tableau = solvers.ddpm(flow, schedules.uniform(flow, 6))
    generate = ds.Sampler(MIXTURE.score_fn(flow), tableau)
    assert np.all(np.isfinite(generate(ds.brownian_key(jax.random.key(0), tableau), x_T)))
    with pytest.raises(TypeError, match="cannot be drawn with a `brownian_key`"):
        generate(ds.brownian_key(jax.random.key(0), tableau), (4, 2))
    with pytest.raises(ValueError, match="one tableau; make it before stacking"):
        ds.brownian_key(jax.random.key(0), ds.Tableau.stack(pair))


@pytest.mark.long
def test_every_kind_of_state_and_the_other_ways_to_run():
    def halve(params, x, t):
        return jax.tree.map(lambda v: 0.5 * v, x)

    tableau = solvers.ddpm(VP, schedules.logsnr(VP, 4))
    key = ds.brownian_key(jax.random.key(0), tableau)
    tree = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones((2, 2, 2))}
    f = ds.ScoreFn(halve, None, VP, prediction="data")
    out = ds.sample(f, tableau, tree, key=key)
    assert jax.tree.map(lambda v: (v.shape, v.dtype), out) == jax.tree.map(
        lambda v: (v.shape, v.dtype), tree
    )
    state = ds.resume(f, tableau, ds.init(tableau, tree, key))
    np.testing.assert_allclose(state.x["b"], out["b"], atol=1e-5)
    single = dataclasses.replace(f, batched=False)
    assert ds.sample(single, tableau, jnp.ones(3), key=key).shape == (3,)
    x_T = VP.prior_sample(jax.random.key(1), (3, 2))
    picard = ds.parallel.sample_parallel(f, tableau, x_T, key=key, tolerance=1e-6)
    np.testing.assert_allclose(picard.x, ds.sample(f, tableau, x_T, key=key), atol=1e-4)
