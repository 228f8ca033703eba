"""`ds.sampler`: names and a budget to a function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsamp as ds


@pytest.fixture(scope="module")
def network():
    return ds.targets.gaussian([0.0, 1.0], 0.1).score_fn(ds.processes.flow(), "velocity")


def test_samples_from_a_start_or_a_shape(network):
    generate = ds.sampler(network, "unipc", nfe=8, schedule="uniform", order=2)
    assert generate.tableau.nfe == 8
    assert generate.tableau.name == "unipc2_bh2"
    key = jax.random.key(0)
    x_T = network.process.prior_sample(key, (5, 2))
    want = ds.sample(network, generate.tableau, x_T)
    np.testing.assert_array_equal(generate(key, x_T), want)
    x = np.asarray(generate(key, (2000, 2)))
    # mean of N(1, 0.1): five standard errors
    np.testing.assert_allclose(x.mean(0), [0, 1], atol=5 * np.sqrt(0.1 / 2000) + 0.02)


def test_is_jittable_and_independent_of_the_batch(network):
    generate = ds.sampler(network, "ddpm", nfe=5)
    keys = jax.random.split(jax.random.key(1), 6)
    whole = jax.jit(lambda s, k: s(k, (6, 2)))(generate, keys)
    alone = generate(keys[2:3], (1, 2))
    np.testing.assert_allclose(whole[2], alone[0], rtol=1e-4, atol=1e-5)
    one_key = generate(jax.random.key(1), (6, 2))
    assert np.abs(np.asarray(one_key[0] - one_key[1])).max() > 1e-3


def test_networks_without_a_batch_axis():
    alone = ds.ScoreFn(
        lambda p, x, t: x * p,
        jnp.ones(()),
        ds.processes.flow(),
        batched=False,
        prediction="velocity",
    )
    assert ds.sampler(alone, "ddpm", nfe=3)(jax.random.key(0), (4,)).shape == (4,)


def test_a_budget_that_cannot_be_met_names_those_that_can(network):
    with pytest.raises(ValueError, match=r"heun cannot make exactly 8 evaluations.* 7 and 9"):
        ds.sampler(network, "heun", nfe=8)
    assert ds.sampler(network, "heun", nfe=8, final="t_min").tableau.nfe == 8
    with pytest.raises(ValueError, match=r"rho_rk4 cannot make exactly 4 .* 1 and 5"):
        ds.sampler(network, "rho_rk4", nfe=4)
    with pytest.raises(ValueError, match="`solver` must be one of 'ddim'"):
        ds.sampler(network, "nope", nfe=8)


def test_options_that_change_the_budget_are_refused():
    network = ds.targets.gaussian([0.0], 1.0).score_fn(ds.processes.vp_linear())
    for name, options in (("sa_solver", {"mode": "PECE"}), ("bdia", {"method": "heun"})):
        with pytest.raises(ValueError, match=r"build the tableau with ds\.solvers"):
            ds.sampler(network, name, nfe=8, **options)
    assert ds.sampler(network, "sa_solver", nfe=8, rescale=True).tableau.nfe == 8
