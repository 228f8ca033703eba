"""Waves: which rows wait for which, from the table; and all of a wave in one call."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, all_processes, skewed_mixture

import diffsamp as ds
from diffsamp import schedules, solvers
from diffsamp.loops.parallel import sample_waves

PROCESSES = all_processes()
SOME = ("epd", "rho_rk4", "unipc3", "bdia", "pndm", "sa_solver", "seeds3")


def longest_paths(tableau):
    """Waves by brute force, from the unrolled weights that rounding does not explain."""
    on_data = tableau.unroll(prediction="data")[1]
    waves = np.zeros(tableau.rows, int)
    for n in range(tableau.rows):
        if tableau.evaluates[n]:
            needed = np.abs(on_data[n, :n]) > 1e-12 * np.abs(on_data[n]).max()
            waves[n] = 1 + max(waves[:n][needed], default=0)
    return waves


@pytest.mark.parametrize("case", CASES, ids=str)
def test_waves_of_every_solver_are_those_of_its_unrolled_form(case):
    for process in (PROCESSES["vp_linear"], PROCESSES["flow"]):
        tableau = case.solver(process, schedules.logsnr(process, 6))
        np.testing.assert_array_equal(tableau.waves, longest_paths(tableau))
        assert (tableau.latency < tableau.nfe) == (case.name == "epd")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "case",
    [case if case.name in SOME else pytest.param(case, marks=pytest.mark.long) for case in CASES],
    ids=str,
)
def test_equal_to_sequential(case):
    """Every solver of the registry, with the same noise."""
    process = PROCESSES["vp_linear"]
    score_fn = skewed_mixture().score_fn(process)
    tableau = case.solver(process, schedules.logsnr(process, 6))
    x_T, key = jnp.linspace(-2, 2, 5)[:, None], jax.random.key(4)
    got = sample_waves(score_fn, tableau, x_T, key=key)
    # the unrolled weights of noise-prediction methods cancel a few digits
    np.testing.assert_allclose(got, ds.sample(score_fn, tableau, x_T, key=key), atol=1e-9)


@pytest.mark.parametrize("name", ["vp_zero_snr", "ve", "edm", "flow", "vp_discrete"])
def test_other_processes_in_float32(name):
    process = PROCESSES[name]
    score_fn = skewed_mixture().score_fn(process, "velocity" if name == "flow" else "v")
    tableau = solvers.epd(process, schedules.logsnr(process, 4), points=3)
    assert tableau.latency == 7
    x_T = process.prior_sample(jax.random.key(0), (6, 1))
    got = sample_waves(score_fn, tableau, x_T)
    # states of size up to 100 lie between, rounded in another order
    np.testing.assert_allclose(got, ds.sample(score_fn, tableau, x_T), rtol=2e-5, atol=2e-5)


def of_rows(b, a=None, evaluates=None, **more):
    """A table by its weights alone."""
    rows = len(b)
    return ds.Tableau.create(
        times=np.linspace(1, 0, rows + 1),
        alpha=np.linspace(0, 1, rows + 1),
        sigma=np.linspace(1, 0, rows + 1),
        target=np.tile([1.0, 0.0], (rows, 1)),
        a=np.ones((rows, 1)) if a is None else a,
        b=b,
        evaluates=evaluates,
        check="none",
        **more,
    )


def test_what_a_row_waits_for():
    zero, one = 0.0, 1.0
    # u_1, u_2 of x_T alone; u_3 of both answers; then a row that asks nothing; then its answer
    b = [[zero, zero, zero], [zero, zero, zero], [one, one, zero], [zero] * 3, [zero, zero, one]]
    asks = [True, True, True, False, True]
    tableau = of_rows(b, evaluates=np.array(asks))
    assert tableau.waves.tolist() == [1, 1, 1, 0, 2]
    assert (tableau.latency, tableau.nfe) == (2, 4)
    # through a state, too: u_2 keeps what u_1 had of D_0
    assert of_rows([[one], [zero], [zero]]).waves.tolist() == [1, 2, 2]
    assert of_rows([[one], [zero], [zero]], a=[[one], [zero], [one]]).waves.tolist() == [1, 2, 1]
    # stacked: where any of them waits
    both = ds.Tableau.stack([of_rows([[one], [zero]]), of_rows([[zero], [zero]])])
    assert both.waves.tolist() == [1, 2]


def test_weights_that_cancel_up_to_rounding_still_count():
    """0.1 + 0.2 - 0.3 is 5.6e-17: the table says that u_3 has D_0, and so it waits for it."""
    b = [[0.1, 0.0, 0.0], [0.0, 0.2, 0.0], [0.0, 0.0, -0.3]]
    tableau = of_rows([*b, [0.0, 0.0, 0.0]])
    assert 0 < abs(tableau.unroll()[1][3, 0]) < 1e-16
    assert tableau.waves.tolist() == [1, 2, 2, 2]


def test_one_call_a_wave_as_wide_as_the_widest():
    process = PROCESSES["vp_linear"]
    target = skewed_mixture().score_fn(process)
    asked = []

    def apply(params, x, t):
        jax.debug.callback(lambda n: asked.append(int(n)), x.shape[0])
        return target.apply(target.params, x, t)

    score_fn = dataclasses.replace(target, apply=apply)
    tableau = solvers.epd(process, schedules.logsnr(process, 5), points=3)
    x_T = jnp.linspace(-2, 2, 4)[:, None]
    sample_waves(score_fn, tableau, x_T).block_until_ready()
    jax.effects_barrier()
    assert asked == [4 * 3] * tableau.latency
    text = str(ds.describe(tableau))
    idle = 3 * tableau.latency - tableau.nfe
    assert f"17 evaluations in 9 waves of at most 3 ({idle} idle places)" in text
    assert text.splitlines()[3].split()[:2] == ["0", "1"]
    assert text.splitlines()[5].split()[:2] == ["2", "2"]


def test_pytrees_guidance_conditions_and_no_batch_axis():
    process = PROCESSES["flow"]

    def apply(params, x, t, shift):
        time = t.reshape(t.shape + (1,) * (x["a"].ndim - t.ndim))
        return {"a": jnp.tanh(x["a"]) + shift, "b": x["b"] * time}

    score_fn = ds.ScoreFn(apply, None, process, prediction="velocity")
    tableau = solvers.epd(process, schedules.uniform(process, 4))
    tree = {"a": jnp.linspace(-1, 1, 6).reshape(3, 2), "b": jnp.linspace(0, 1, 3)[:, None]}
    cond = {"shift": jnp.array([[0.1], [0.2], [0.3]])}  # one per sample
    guided = ds.guidance.cfg(score_fn, 1.5, {"shift": jnp.zeros(1)})
    for network in (score_fn, guided):
        want = ds.sample(network, tableau, tree, cond=cond)
        got = sample_waves(network, tableau, tree, cond=cond)
        for leaf, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(leaf, other, atol=2e-6)
    alone = dataclasses.replace(score_fn, batched=False)
    one = jax.tree.map(lambda leaf: leaf[1], tree)
    got = sample_waves(alone, tableau, one, cond={"shift": jnp.array([0.2])})
    want = ds.sample(score_fn, tableau, tree, cond=cond)
    np.testing.assert_allclose(got["a"], want["a"][1], atol=2e-6)


def test_a_sample_does_not_depend_on_its_batch():
    process = PROCESSES["vp_linear"]
    score_fn = skewed_mixture().score_fn(process)
    tableau = solvers.get("ddpm")(process, schedules.logsnr(process, 4))
    x_T, keys = jnp.linspace(-2, 2, 5)[:, None], jax.random.split(jax.random.key(0), 5)
    all_ = sample_waves(score_fn, tableau, x_T, key=keys)
    one = sample_waves(score_fn, tableau, x_T[2:3], key=keys[2:3])
    np.testing.assert_allclose(one[0], all_[2], atol=1e-6)


def test_refuses():
    process = PROCESSES["vp_linear"]
    score_fn = skewed_mixture().score_fn(process)
    times, x_T = schedules.logsnr(process, 3), jnp.ones((2, 1))
    ddim = solvers.ddim(process, times)
    for tableau, message in (
        (solvers.ddpm(process, times), "adds noise and needs a random key"),
        (ds.Tableau.stack([ddim, ddim]), "only a tableau of plain numbers can be unrolled"),
        (solvers.ddim(PROCESSES["flow"], [1.0, 0.5, 0.0]), "was built for another process"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_waves(score_fn, tableau, x_T)
    with pytest.raises(TypeError, match="not known inside a traced function"):
        jax.jit(lambda t: sample_waves(score_fn, t, x_T))(ddim)
    with pytest.raises(TypeError, match=r"`tableau\.waves` is not known"):
        jax.jit(lambda t: jnp.asarray(t.latency))(ddim)
