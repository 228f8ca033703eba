"""Starts are drawn for the sampler's own first level, by everything that draws them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsamp as ds

PROCESSES = {
    "vp_linear": ds.processes.vp_linear(),
    "vp_cosine": ds.processes.vp_cosine(),
    "vp_discrete": ds.processes.vp_discrete(),
    "ve": ds.processes.ve(),
    "edm": ds.processes.edm(),
    "flow": ds.processes.flow(),
    "pfgmpp": ds.processes.pfgmpp(4096.0),
}
SHAPE = (512, 64)


def half(process):
    """A sampler that begins in the middle of the process's range of times."""
    middle = (process.t_max + process.t_clean) / 2
    return ds.solvers.ddim(process, [middle, (middle + process.t_clean) / 2, process.t_clean])


def stay(process):
    """A network whose noise prediction is 0, so that the sampler only scales what it is given."""
    return ds.ScoreFn(lambda params, x, t: 0 * x, {}, process, prediction="noise")


@pytest.mark.parametrize(
    "name",
    [n if n in ("edm", "flow") else pytest.param(n, marks=pytest.mark.long) for n in PROCESSES],
)
def test_from_half_of_the_range(name, tmp_path):
    """With no noise predicted the sample is x / alpha: its std is sigma / alpha of the start."""
    process = PROCESSES[name]
    tableau, network = half(process), stay(process)
    want = tableau.sigma[0] / tableau.alpha[0] * (process.prior_std / process.sigma(process.t_max))
    sampler, key = ds.Sampler(network, tableau), jax.random.key(0)
    found = {"Sampler": sampler(key, SHAPE), "jit": jax.jit(sampler, static_argnums=1)(key, SHAPE)}
    made = ds.generate(
        network,
        tableau,
        SHAPE[0],
        tmp_path / "set",
        key=key,
        shape=SHAPE[1:],
        batch=SHAPE[0],
        progress=False,
    )
    found["generate"] = made.load()["x"]
    ds.export(sampler, tmp_path / "sampler.npz", shape=SHAPE[1:])
    found["export"] = ds.load_exported(tmp_path / "sampler.npz")(key, SHAPE[0])
    for how, x in found.items():
        np.testing.assert_allclose(np.std(x), want, rtol=0.03, err_msg=how)


@pytest.mark.parametrize("name", PROCESSES)
def test_at_the_largest_level_it_is_the_prior(name):
    process, key = PROCESSES[name], jax.random.key(1)
    start = process.start_sample(key, (4, 3), process.t_max)
    assert np.array_equal(start, process.prior_sample(key, (4, 3)))


def test_the_samples_are_right_where_little_is_lost():
    """EDM from sigma = 10 of 80, data of std 0.55: what the prior of t_max would give is 4.4."""
    process = ds.processes.edm()
    network = ds.targets.gaussian([0.5], 0.3).score_fn(process, "data")
    tableau = ds.solvers.unipc(process, ds.schedules.karras(process, 40, t_max=10.0))
    x = ds.Sampler(network, tableau)(jax.random.key(0), (8000, 1))
    np.testing.assert_allclose(np.std(x), np.sqrt(0.3), rtol=0.02)


def test_one_level_per_sample():
    process = ds.processes.edm()
    x = process.start_sample(jax.random.key(0), (2, 4000), jnp.array([80.0, 8.0]))
    np.testing.assert_allclose(np.std(x, axis=1), [80.0, 8.0], rtol=0.05)


def test_phase_space_starts_at_the_end_only():
    process = ds.phase_space.psld()
    with pytest.raises(ValueError, match="starts at t_max"):
        process.start_sample(jax.random.key(0), (2, 4, 2), 0.5)
    assert process.start_sample(jax.random.key(0), (2, 4, 2), 1.0).shape == (2, 4, 2)
