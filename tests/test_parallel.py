"""Picard sampling: equal to sequential, in far fewer calls in sequence, whatever the tableau."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, all_processes, skewed_mixture

import diffsamp as ds
from diffsamp import schedules, solvers
from diffsamp.loops.parallel import sample_parallel
from diffsamp.models import digits

PROCESSES = all_processes()


@pytest.fixture(scope="module")
def network():
    return digits.load_digits_model()


def rms(x):
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("windows", [(4,), pytest.param((None, 1), marks=pytest.mark.long)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal_to_sequential_at_tolerance_zero(case, windows):
    """Every solver of the registry, with a window shorter than the run; the same noise."""
    process = PROCESSES["vp_linear"]
    score_fn = skewed_mixture().score_fn(process)
    tableau = case.solver(process, schedules.logsnr(process, 9))
    x_T, key = jnp.linspace(-2, 2, 5)[:, None], jax.random.key(4)
    want = ds.sample(score_fn, tableau, x_T, key=key)
    for window in windows:
        got = sample_parallel(score_fn, tableau, x_T, key=key, window=window, tolerance=0.0)
        # the unrolled weights of noise-prediction methods cancel a few digits
        np.testing.assert_allclose(got.x, want, atol=1e-9)
        assert int(got.sweeps.max()) <= tableau.nfe
        assert int(got.evaluations.min()) >= tableau.nfe
        if window == 1:  # sequential
            np.testing.assert_array_equal(got.sweeps, tableau.nfe)
            np.testing.assert_array_equal(got.evaluations, tableau.nfe)


@pytest.mark.parametrize("name", ["vp_zero_snr", "ve", "edm", "flow", "vp_discrete"])
def test_other_processes_in_float32(name):
    process = PROCESSES[name]
    score_fn = skewed_mixture().score_fn(process, "velocity" if name == "flow" else "v")
    tableau = solvers.unipc(process, schedules.logsnr(process, 12), order=2)
    x_T = process.prior_sample(jax.random.key(0), (6, 1))
    got = sample_parallel(score_fn, tableau, x_T, tolerance=0.0)
    np.testing.assert_allclose(got.x, ds.sample(score_fn, tableau, x_T), atol=2e-5)


@pytest.mark.parametrize(
    ("name", "nfe", "most_sweeps"),
    [
        ("ddim", 100, 25),
        pytest.param("unipc2", 50, 25, marks=pytest.mark.long),
        pytest.param("ddpm", 200, 45, marks=pytest.mark.long),
    ],
)
def test_sweeps_are_far_below_the_number_of_steps(network, name, nfe, most_sweeps):
    """On a trained network: the error is that of the tolerance, at a fraction of the calls."""
    sampler = ds.sampler(network, name, nfe=nfe, schedule="logsnr")
    x_T = network.process.prior_sample(jax.random.key(0), (16, 8, 8, 1))
    key, cond = jax.random.key(1), {"label": jnp.arange(16) % 10}
    want = ds.sample(network, sampler.tableau, x_T, key=key, cond=cond)
    errors = []
    for tolerance in (1e-2, 1e-3, 1e-4):
        got = sample_parallel(
            network, sampler.tableau, x_T, key=key, cond=cond, window=20, tolerance=tolerance
        )
        errors.append(rms(got.x - want))
        if tolerance == 1e-3:
            assert int(got.sweeps.max()) <= most_sweeps
            assert nfe < float(got.evaluations.mean()) < 5 * nfe
    assert errors[1] < 4e-3
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_a_sample_does_not_depend_on_its_batch(network):
    """Each slides its own window: alone it takes the same sweeps and gives the same numbers."""
    sampler = ds.sampler(network, "ddpm", nfe=60, schedule="karras")
    x_T = network.process.prior_sample(jax.random.key(0), (6, 8, 8, 1))
    keys = jax.random.split(jax.random.key(1), 6)
    label = jnp.array([3, 1, 4, 1, 5, 9])
    options = {"window": 12, "tolerance": 3e-3}
    all_ = sample_parallel(
        network, sampler.tableau, x_T, key=keys, cond={"label": label}, **options
    )
    assert len(set(np.asarray(all_.sweeps).tolist())) > 1
    for i in (0, 5):
        one = sample_parallel(
            network,
            sampler.tableau,
            x_T[i : i + 1],
            key=keys[i : i + 1],
            cond={"label": label[i : i + 1]},
            **options,
        )
        np.testing.assert_array_equal(one.sweeps[0], all_.sweeps[i])
        np.testing.assert_array_equal(one.evaluations[0], all_.evaluations[i])
        np.testing.assert_allclose(one.x[0], all_.x[i], atol=2e-4)


def test_evaluations_are_counted():
    """What it reports against what the network saw: rows in flight of samples not done."""
    process = PROCESSES["vp_linear"]
    target = skewed_mixture().score_fn(process)
    asked = []

    def apply(params, x, t):
        jax.debug.callback(lambda n: asked.append(int(n)), x.shape[0])
        return target.apply(target.params, x, t)

    score_fn = dataclasses.replace(target, apply=apply)
    tableau = solvers.ddim(process, schedules.logsnr(process, 30))
    x_T = jnp.linspace(-2, 2, 4)[:, None]
    got = sample_parallel(score_fn, tableau, x_T, window=8)
    jax.effects_barrier()
    assert len(asked) == int(got.sweeps.max())
    assert asked.count(4) == 1  # the first row alone
    assert asked.count(4 * 8) == len(asked) - 1
    # padding at the end, and samples that wait for others, are not counted
    assert int(got.evaluations.sum()) <= sum(asked)


def test_pytrees_guidance_and_no_batch_axis():
    process = PROCESSES["flow"]

    def apply(params, x, t, shift):
        time = t.reshape(t.shape + (1,) * (x["a"].ndim - t.ndim))
        return {"a": jnp.tanh(x["a"]) + shift, "b": x["b"] * time}

    score_fn = ds.ScoreFn(apply, None, process, prediction="velocity")
    tableau = solvers.heun(process, schedules.uniform(process, 9), clean_end="euler")
    tree = {"a": jnp.linspace(-1, 1, 6).reshape(3, 2), "b": jnp.linspace(0, 1, 3)[:, None]}
    cond = {"shift": jnp.array([[0.1], [0.2], [0.3]])}  # one per sample
    guided = ds.guidance.cfg(score_fn, 1.5, {"shift": jnp.zeros(1)})
    for network in (score_fn, guided):
        want = ds.sample(network, tableau, tree, cond=cond)
        got = sample_parallel(network, tableau, tree, cond=cond, tolerance=0.0)
        for leaf, other in zip(jax.tree.leaves(got.x), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(leaf, other, atol=2e-6)
    alone = dataclasses.replace(score_fn, batched=False)
    one = jax.tree.map(lambda leaf: leaf[1], tree)
    got = sample_parallel(alone, tableau, one, cond={"shift": jnp.array([0.2])}, tolerance=0.0)
    assert got.sweeps.shape == ()
    want = ds.sample(score_fn, tableau, tree, cond=cond)
    np.testing.assert_allclose(got.x["a"], want["a"][1], atol=2e-6)


def test_a_network_that_returns_nan_ends():
    process = PROCESSES["flow"]
    score_fn = ds.ScoreFn(lambda p, x, t: x * jnp.nan, None, process, prediction="velocity")
    tableau = solvers.ddim(process, schedules.uniform(process, 5))
    assert np.isnan(sample_parallel(score_fn, tableau, jnp.ones((2, 1))).x).all()


def test_bad_input():
    process = PROCESSES["vp_linear"]
    score_fn = skewed_mixture().score_fn(process)
    times, x_T = schedules.logsnr(process, 5), jnp.ones((2, 1))
    ddim, ddpm = solvers.ddim(process, times), solvers.ddpm(process, times)
    other = solvers.ddim(PROCESSES["flow"], [1.0, 0.5, 0.0])
    for tableau, options, message in (
        (ddim, {"tolerance": -1.0}, "`tolerance` must not be negative"),
        (ddim, {"window": 0}, "`window` must be at least 1"),
        (ddpm, {}, "adds noise and needs a random key"),
        (ds.Tableau.stack([ddim, ddim]), {}, "only a tableau of plain numbers can be unrolled"),
        (other, {}, "was built for another process"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_parallel(score_fn, tableau, x_T, **options)
    with pytest.raises(TypeError, match="not known inside a traced function"):
        jax.jit(lambda t: sample_parallel(score_fn, t, x_T).x)(ddim)
