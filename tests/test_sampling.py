"""The executor: equal to its twin, one network in the program, one compilation, keys, pytrees."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, DETERMINISTIC, gaussian_moments, skewed_mixture, twin

import diffsamp as ds
from diffsamp import schedules, solvers


def mlp(params, x, t, shift=None):
    """A small nonlinear network of x and t."""
    hidden = jnp.tanh(x @ params["w1"] + t[:, None] * params["b"][None])
    out = hidden @ params["w2"]
    return out if shift is None else out + shift[:, None]


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(7), 3)
    return {
        "w1": jax.random.normal(keys[0], (3, 16)) * 0.5,
        "w2": jax.random.normal(keys[1], (16, 3)) * 0.5,
        "b": jax.random.normal(keys[2], (16,)),
    }


@pytest.fixture(scope="module")
def score_fn(params):
    return ds.ScoreFn(mlp, params, ds.processes.vp_linear(), prediction="data")


def build(name, nfe=6, schedule="logsnr", process=None):
    process = ds.processes.vp_linear() if process is None else process
    solver = solvers.get(name)
    return solver(process, schedules.get(schedule)(process, solver.steps(nfe) or nfe))


def start(n=4, seed=0):
    return ds.processes.vp_linear().prior_sample(jax.random.key(seed), (n, 3))


# -- equality with the NumPy twin ------------------------------------------------------------------


@pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
@pytest.mark.usefixtures("x64")
def test_equals_the_twin_in_float64(case):
    process, target = ds.processes.vp_linear(), skewed_mixture()
    tableau = case.solver(process, schedules.logsnr(process, 7))
    x = np.linspace(-2, 2, 9)[:, None]
    want = twin(tableau, target.posterior, x)
    got = ds.sample(target.score_fn(process, "noise"), tableau, jnp.asarray(x))
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("prediction", ds.predictions.NAMES)
def test_every_network_prediction_gives_the_same_samples(prediction):
    """float32: the conversion numbers make all six parameterisations one sampler."""
    process, target = ds.processes.vp_linear(), skewed_mixture()
    x = jnp.linspace(-2, 2, 9)[:, None]
    for name, nfe in (("unipc3", 7), ("deis_tab3", 7), ("heun", 19)):
        tableau = build(name, nfe)
        want = twin(tableau, target.posterior, np.asarray(x, np.float64))
        got = ds.sample(target.score_fn(process, prediction), tableau, x)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=0, atol=5e-5)


# -- one network in the program, whatever N --------------------------------------------------------


def count_tanh(score_fn, rows):
    tableau = build("unipc3", 6).pad(rows=rows)
    lowered = jax.jit(ds.sample).lower(score_fn, tableau, start(), key=jax.random.key(0))
    text = lowered.as_text()
    return text.count("stablehlo.tanh"), len(text)


def test_the_program_holds_the_network_once(score_fn):
    few, size_few = count_tanh(score_fn, 6)
    many, size_many = count_tanh(score_fn, 400)
    assert few == many == 1
    assert abs(size_many - size_few) < 0.05 * size_few


def test_padded_rows_skip_the_network(score_fn):
    """Counted at run time; and the sample is the unpadded one."""
    calls = []

    def counting(params, x, t):
        jax.debug.callback(lambda: calls.append(1))
        return mlp(params, x, t)

    counted = dataclasses.replace(score_fn, apply=counting)
    tableau = build("dpmpp_2m", 5)
    plain = ds.sample(counted, tableau, start())
    jax.effects_barrier()
    assert len(calls) == 5
    calls.clear()
    padded = ds.sample(counted, tableau.pad(rows=30, p=3, q=6), start())
    jax.effects_barrier()
    assert len(calls) == 5
    # more zero terms in the sums may be added in another order: float32 rounding
    np.testing.assert_allclose(plain, padded, rtol=1e-5, atol=1e-6)


# -- one compilation for all solvers, schedules, budgets and predictions ---------------------------


def test_one_compilation_for_all_solvers_and_budgets(params):
    traces = []

    def traced(params, x, t):
        traces.append(1)
        return mlp(params, x, t)

    process = ds.processes.vp_linear()
    score_fn = ds.ScoreFn(traced, params, process, prediction="data")
    tableaux = [
        case.solver(process, schedules.get(schedule)(process, case.solver.steps(nfe)))
        for case in CASES
        for nfe in range(5, 21, 3)
        for schedule in ("karras", "logsnr")
        if case.solver.steps(nfe) is not None
    ]
    assert {tuple(t.target[0]) for t in tableaux} == {(1.0, 0.0), (0.0, 1.0)}
    for tableau in ds.Tableau.pad_together(tableaux):
        ds.sample(score_fn, tableau, start(), key=jax.random.key(0))
    assert len(tableaux) > 600
    # one trace of the scan's body; a recompilation would trace it again
    assert len(traces) == 1
    # the test can fail: another padding is another program
    ds.sample(score_fn, tableaux[0].pad(rows=41), start(), key=jax.random.key(0))
    assert len(traces) == 2


def test_what_is_not_padded_has_no_branches(score_fn):
    """A sampler of its own shape: no branch around the network, and no noise nobody asked for."""

    def program(tableau, key=None):
        run = jax.jit(lambda x: ds.sample(score_fn, tableau, x, key=key))
        return str(jax.make_jaxpr(run)(start()))

    key = jax.random.key(0)
    for name in ("ddim", "dpmpp_3m", "heun"):
        assert "cond[" not in program(build(name, 7), key)
        assert "random_bits" not in program(build(name, 7), key)
        assert "cond[" in program(build(name, 7).pad())
    assert "random_bits" in program(build("ddpm", 7), key)
    assert "cond[" not in program(build("ddpm", 7), key)
    process = score_fn.process
    grid = schedules.karras(process, 4, final="t_min")
    restarted = solvers.restart(process, grid, intervals=[(2, 1, 0.1, 1.0)])
    assert "cond[" in program(restarted, key)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "dpmpp_3m", "ipndm4", "heun", "ghvb2.8"])
def test_memory_over_a_bare_scan_is_the_history(name):
    """As the compiler counts it: at most p + q states, for a state much larger than the network."""
    process = ds.processes.flow()
    score_fn = ds.ScoreFn(lambda p, x, t: jnp.tanh(p * x), jnp.ones(()), process)
    x_T = jnp.ones((64, 1000))

    def used(function):
        analysis = jax.jit(function).lower(x_T).compile().memory_analysis()
        return analysis.temp_size_in_bytes + analysis.output_size_in_bytes

    def bare(x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(score_fn.params * x), None), x, length=20)[0]

    tableau = build(name, 9, process=process)
    extra = used(lambda x: ds.sample(score_fn, tableau, x)) - used(bare)
    assert extra < (tableau.p + tableau.q + 0.1) * x_T.nbytes


def test_names_are_not_in_the_treedef():
    one = build("dpmpp_2m", 5)
    other = dataclasses.replace(one, name="x", source="y")
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert jax.tree.map(lambda v: v, one).name == ""


# -- keys: samples are independent of their batch, sharding and padding ----------------------------


@pytest.mark.parametrize("name", ["ddpm", "unipc3", "heun"])
def test_a_sample_does_not_depend_on_its_batch(score_fn, name):
    """Sample i of 64 against sample i alone, drawn with its own key.

    To float32 rounding: the compiler blocks matrix products and fuses multiply-adds differently
    for another batch size.
    """
    tableau = build(name, 7)
    x_T = start(64)
    keys = ds.random.sample_keys(jax.random.key(3), 64)
    whole = ds.sample(score_fn, tableau, x_T, key=jax.random.key(3))
    for i in (0, 17, 63):
        alone = ds.sample(score_fn, tableau, x_T[i : i + 1], key=keys[i : i + 1])
        np.testing.assert_allclose(alone[0], whole[i], rtol=1e-5, atol=1e-5)
    if name == "ddpm":
        other = ds.sample(score_fn, tableau, x_T, key=jax.random.key(4))
        assert np.abs(np.asarray(other - whole)).max() > 0.1


def test_noise_has_unit_variance_and_is_independent():
    """Statistics of the executor's own noise, over samples, rows and axes: 5 standard errors."""
    keys = ds.random.sample_keys(jax.random.key(0), 4000)
    x = jnp.zeros((4000, 3))
    first, second = (np.asarray(ds.random.normal_like(keys, row, x)) for row in (0, 1))
    n = first.size
    assert abs(first.mean()) < 5 / np.sqrt(n)
    assert abs(first.var() - 1) < 5 * np.sqrt(2 / n)
    assert abs(np.mean(first * second)) < 5 / np.sqrt(n)
    assert abs(np.mean(first[1:] * first[:-1])) < 5 / np.sqrt(n)
    assert abs(np.mean(first[:, 0] * first[:, 1])) < 5 / np.sqrt(4000)


def test_ddpm_samples_have_the_right_variance():
    """End to end through the executor, and a noise that is 5 % too large is noticed."""
    process, n = ds.processes.vp_linear(), 40_000
    score_fn = ds.targets.gaussian([0.5], 0.3).score_fn(process, "noise")
    x_T = process.prior_sample(jax.random.key(1), (n, 1))
    tableau = solvers.ddpm(process, schedules.logsnr(process, 60, final="t_min"))
    # what these 60 rows give in exact arithmetic from x_T ~ N(0, 1), not the limit of many rows
    mean, variance = gaussian_moments(tableau, 0.5, 0.3, start=(0.0, 1.0))

    def variance_of(tableau):
        x = np.asarray(ds.sample(score_fn, tableau, x_T, key=jax.random.key(2)), np.float64)
        assert x.mean() == pytest.approx(mean, abs=4 * np.sqrt(variance / n))
        return x.var()

    tolerance = 4 * np.sqrt(2 / n)  # four standard errors, relative
    assert variance_of(tableau) == pytest.approx(variance, rel=tolerance)
    louder = dataclasses.replace(tableau, c=tableau.c * 1.05)
    assert variance_of(louder) > variance * (1 + tolerance)


def test_sharded_batch_gives_the_same_samples_without_a_gather(score_fn):
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    tableau = build("ddpm", 6)
    x_T = start(8)
    keys = ds.random.sample_keys(jax.random.key(3), 8)
    plain = ds.sample(score_fn, tableau, x_T, key=keys)
    split = ds.sample(
        score_fn, tableau, jax.device_put(x_T, sharding), key=jax.device_put(keys, sharding)
    )
    assert split.sharding.is_equivalent_to(sharding, split.ndim)
    np.testing.assert_allclose(plain, split, rtol=1e-6, atol=1e-6)
    lowered = jax.jit(ds.sample).lower(
        score_fn, tableau, jax.device_put(x_T, sharding), key=jax.device_put(keys, sharding)
    )
    text = lowered.compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text


def test_a_network_sharded_over_a_model_axis_keeps_its_own_collectives_only():
    """Columns and rows of an MLP over two devices: one all-reduce a call, and none of ours."""
    mesh = jax.make_mesh((1, 2), ("batch", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def placed(value, *spec):
        return jax.device_put(
            value, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        )

    keys = jax.random.split(jax.random.key(0))
    plain = (0.3 * jax.random.normal(keys[0], (3, 64)), 0.3 * jax.random.normal(keys[1], (64, 3)))
    split = (placed(plain[0], None, "model"), placed(plain[1], "model", None))

    def network(params, x, t):
        return jnp.tanh(x @ params[0] + t[:, None]) @ params[1]

    process = ds.processes.vp_linear()
    tableau, x_T = build("unipc3", 6), start(8)
    ours = ds.ScoreFn(network, split, process, prediction="data")
    one = ds.ScoreFn(network, plain, process, prediction="data")
    x = ds.sample(ours, tableau, placed(x_T, "batch"))
    np.testing.assert_allclose(x, ds.sample(one, tableau, x_T), rtol=1e-4, atol=1e-5)
    call = jax.jit(network).lower(split, placed(x_T, "batch"), jnp.ones(8)).compile().as_text()
    whole = jax.jit(ds.sample).lower(ours, tableau, placed(x_T, "batch")).compile().as_text()
    for kind in (
        "all-reduce(",
        "all-gather(",
        "all-to-all(",
        "collective-permute(",
        "outfeed(",
        "callback",
    ):
        assert whole.count(kind) == call.count(kind)
    assert call.count("all-reduce(") == 1


TRANSFORMS = {
    "cfg": lambda f: ds.guidance.cfg(f, 2.0, {"label": 0.0}),
    "static": ds.guidance.static_thresholding,
    "dynamic": ds.guidance.dynamic_thresholding,
    "time_shift": lambda f: ds.time_shift.time_shift(f, window=0.1, cutoff=0.2),
    "cfg in dynamic": lambda f: ds.guidance.dynamic_thresholding(TRANSFORMS["cfg"](f)),
    "picard": lambda f: f,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_is_around_the_network_keeps_a_batch_where_it_is(name):
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))

    def network(params, x, t, label):
        return jnp.tanh(params * x + t[:, None] + label[:, None])

    process = ds.processes.vp_linear()
    score_fn = TRANSFORMS[name](ds.ScoreFn(network, jnp.ones(()), process))
    tableau = ds.solvers.unipc(process, ds.schedules.logsnr(process, 6))
    x_T, cond = start(8), {"label": jnp.linspace(0.1, 1, 8)}

    def run(score_fn, x_T, cond):
        if name == "picard":
            made = ds.parallel.sample_parallel(score_fn, tableau, x_T, cond=cond, tolerance=0.0)
            return made.x
        return ds.sample(score_fn, tableau, x_T, cond=cond)

    spread = jax.device_put((x_T, cond), sharding)
    program = jax.jit(run).lower(score_fn, *spread).compile()
    np.testing.assert_allclose(
        program(score_fn, *spread), run(score_fn, x_T, cond), rtol=1e-5, atol=1e-6
    )
    text = program.as_text()
    # whether all samples of a Picard iteration have settled is one bit for all devices
    most = {"all-reduce(": 4 if name == "picard" else 0}
    for kind in ("all-gather(", "all-reduce(", "all-to-all(", "collective-permute("):
        assert text.count(kind) <= most.get(kind, 0), kind


# -- states, times and transformations -------------------------------------------------------------


def test_pytree_states(score_fn):
    """A state of two arrays of different ranks is two states side by side."""
    process = score_fn.process

    def pair(params, x, t):
        return {
            "a": mlp(params, x["a"], t),
            "b": jnp.tanh(x["b"]) * (1 + t)[:, None, None],
        }

    whole = ds.ScoreFn(pair, score_fn.params, process, prediction="data")
    x_T = {"a": start(4), "b": jax.random.normal(jax.random.key(5), (4, 2, 5))}
    for name in ("ddpm", "unipc3"):
        tableau = build(name, 6)
        got = ds.sample(whole, tableau, x_T, key=jax.random.key(0))
        assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, x_T)
        if name == "unipc3":
            np.testing.assert_allclose(
                got["a"], ds.sample(score_fn, tableau, x_T["a"]), rtol=1e-6, atol=1e-6
            )


def test_stacked_tableaux_give_each_sample_its_own_sampler(score_fn):
    """Per-sample times, solvers and step counts in one batch."""
    x_T = start(3)
    keys = ds.random.sample_keys(jax.random.key(0), 3)
    tableaux = [build("ddim", 4), build("unipc3", 9, "karras"), build("ddpm", 6)]
    stacked = ds.Tableau.stack(tableaux)
    assert stacked.times.shape == (10, 3)
    together = ds.sample(score_fn, stacked, x_T, key=keys)
    for i, tableau in enumerate(tableaux):
        alone = ds.sample(score_fn, tableau, x_T[i : i + 1], key=keys[i : i + 1])
        np.testing.assert_allclose(together[i], alone[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="stacked for 3 samples; x_T has a batch of 4"):
        ds.sample(score_fn, stacked, start(4), key=jax.random.key(0))


def test_a_finished_sample_does_not_see_the_network():
    """NaN from the network at another sample's rows must not reach a sample that is done."""
    process = ds.processes.vp_linear()

    def apply(params, x, t):
        return jnp.where(t[:, None] < 0.05, jnp.nan, params * x)

    score_fn = ds.ScoreFn(apply, jnp.ones(()), process)
    short = solvers.ddim(process, [0.9, 0.5, 0.04])
    stacked = ds.Tableau.stack([short, solvers.ddim(process, [0.9, 0.5, 0.2, 0.1, 0.04, 0.01])])
    x = np.asarray(ds.sample(score_fn, stacked, jnp.ones((2, 3))))
    assert np.all(np.isfinite(x[0]))
    assert np.all(np.isnan(x[1]))


def test_vmap_over_a_population_of_tableaux(score_fn):
    names = ("ddim", "dpmpp_2m", "unipc3", "heun")
    tableaux = ds.Tableau.pad_together([build(name, 7) for name in names])
    population = jax.tree.map(lambda *leaves: np.stack(leaves), *tableaux)
    x_T = start(4)
    many = jax.vmap(lambda tableau: ds.sample(score_fn, tableau, x_T))(population)
    for i, tableau in enumerate(tableaux):
        alone = ds.sample(score_fn, tableau, x_T)  # another program, which rounds otherwise
        np.testing.assert_allclose(many[i], alone, rtol=1e-5, atol=1e-5)


def test_unbatched_states_and_vmap_over_them(params):
    def single(params, x, t):
        return mlp(params, x[None], t[None])[0]

    process = ds.processes.vp_linear()
    one = ds.ScoreFn(single, params, process, prediction="data", batched=False)
    many = ds.ScoreFn(mlp, params, process, prediction="data")
    tableau = build("ddpm", 6)
    x_T, keys = start(4), ds.random.sample_keys(jax.random.key(0), 4)
    together = ds.sample(many, tableau, x_T, key=keys)
    np.testing.assert_allclose(
        ds.sample(one, tableau, x_T[1], key=keys[1]), together[1], rtol=1e-5, atol=1e-5
    )
    mapped = jax.vmap(lambda x, k: ds.sample(one, tableau, x, key=k))(x_T, keys)
    np.testing.assert_allclose(mapped, together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ddpm", "unipc3", "heun", "ipndm4"])
def test_step_and_trajectory_are_sample(score_fn, name):
    tableau, x_T, key = build(name, 7), start(), jax.random.key(1)
    want = ds.sample(score_fn, tableau, x_T, key=key)
    state = ds.init(tableau, x_T, key)
    advance = jax.jit(ds.step)
    for _ in range(tableau.rows):
        state = advance(score_fn, tableau, state)
    np.testing.assert_allclose(state.x, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="all have been run"):
        ds.step(score_fn, tableau, state)

    run = ds.trajectory(score_fn, tableau, x_T, key=key)
    assert run.points.shape == (tableau.rows + 1, *x_T.shape)
    assert run.outputs.shape == (tableau.rows, *x_T.shape)
    np.testing.assert_array_equal(run.points[0], x_T)
    np.testing.assert_allclose(run.points[-1], want, rtol=1e-5, atol=1e-5)
    # each output is the network's own answer at its point
    kind = "data" if tableau.target[2, 0] else "noise"
    direct = score_fn(run.points[2], float(tableau.times[2]), prediction=kind)
    np.testing.assert_allclose(run.outputs[2], direct, rtol=1e-4, atol=1e-4)


def test_unrolled_form_reproduces_the_samples(score_fn):
    tableau, x_T = build("ddpm", 7), start()
    keys = ds.random.sample_keys(jax.random.key(1), 4)
    run = ds.trajectory(score_fn, tableau, x_T, key=keys)
    on_start, on_outputs, on_noise = tableau.unroll()
    noise = np.stack([ds.random.normal_like(keys, n, x_T) for n in range(tableau.rows)])
    for n in range(tableau.rows + 1):
        want = on_start[n] * np.asarray(x_T, np.float64)
        want = want + np.tensordot(on_outputs[n], np.asarray(run.outputs, np.float64), 1)
        want = want + np.tensordot(on_noise[n], noise, 1)
        np.testing.assert_allclose(run.points[n], want, rtol=0, atol=2e-5)


@pytest.mark.usefixtures("x64")
def test_gradients_match_finite_differences(params):
    """Through the sampler, to x_T, the network's weights and the tableau's own numbers."""
    params = jax.tree.map(lambda v: v.astype(jnp.float64), params)
    process = ds.processes.vp_linear()
    tableau = build("unipc2", 5)
    x_T = start(2).astype(jnp.float64)

    def loss(params, b, x_T, checkpoint):
        score_fn = ds.ScoreFn(mlp, params, process)
        changed = dataclasses.replace(tableau, b=b)
        return jnp.sum(jnp.square(ds.sample(score_fn, changed, x_T, checkpoint=checkpoint)))

    b = jnp.asarray(tableau.b)
    grads = jax.grad(loss, argnums=(0, 1, 2))(params, b, x_T, False)
    again = jax.grad(loss, argnums=(0, 1, 2))(params, b, x_T, True)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14), grads, again
    )
    direction = jax.tree.map(
        lambda v: jax.random.normal(jax.random.key(v.size), v.shape, v.dtype), (params, b, x_T)
    )
    step = 1e-5
    ahead, behind = (
        loss(*jax.tree.map(lambda v, d, s=s: v + s * d, (params, b, x_T), direction), False)
        for s in (step, -step)
    )
    along = sum(
        jnp.sum(g * d)
        for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True)
    )
    np.testing.assert_allclose((ahead - behind) / (2 * step), along, rtol=1e-6)


def test_checkpointing_stores_less(score_fn):
    """Of the network's hidden layer everything, its products and sums, or nothing is kept."""
    tableau, x_T = build("dpmpp_2m", 50), start(32)
    everything = jax.checkpoint_policies.everything_saveable

    def loss(x_T, checkpoint):
        return jnp.sum(ds.sample(score_fn, tableau, x_T, checkpoint=checkpoint))

    def stacked(checkpoint):
        text = str(jax.make_jaxpr(jax.grad(lambda x: loss(x, checkpoint)))(x_T))
        return text.count("f32[50,32,16]")  # (rows, batch, hidden)

    assert stacked(True) == 0 < stacked(False) < stacked(everything)
    # nor does a run without gradient know of it
    plain = jax.jit(lambda x: ds.sample(score_fn, tableau, x)).lower(x_T).compile().as_text()
    assert "opt-barrier" not in plain


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_state_keeps_its_dtype(score_fn, dtype):
    tableau = build("unipc3", 6)
    want = ds.sample(score_fn, tableau, start())
    low = dataclasses.replace(
        score_fn, params=jax.tree.map(lambda v: v.astype(dtype), score_fn.params)
    )

    def apply(params, x, t):
        return mlp(params, x, t.astype(x.dtype))

    low = dataclasses.replace(low, apply=apply)
    got = ds.sample(low, tableau, start().astype(dtype))
    assert got.dtype == dtype
    # a few units in the last place of samples of size 1
    tolerance = 6 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=0, atol=tolerance)


def test_conditioning_reaches_the_network(score_fn):
    tableau, x_T = build("ddim", 5), start()
    shift = jnp.array([0.0, 1.0, 0.0, -1.0])
    plain = np.asarray(ds.sample(score_fn, tableau, x_T))
    moved = np.asarray(ds.sample(score_fn, tableau, x_T, cond={"shift": shift}))
    changed = np.abs(moved - plain).max(axis=1)
    assert np.all((changed > 1e-3) == np.array([False, True, False, True]))


# -- errors ----------------------------------------------------------------------------------------


def test_errors_say_what_to_do(score_fn):
    ddim, ddpm, x_T = build("ddim"), build("ddpm"), start()
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="'ddpm' adds noise and needs a random key: pass `key`"):
        ds.sample(score_fn, ddpm, x_T)
    with pytest.raises(ValueError, match="needs a random key"):
        ds.init(ddpm, x_T)
    with pytest.raises(TypeError, match=r"`key` must be a JAX random key.*got int"):
        ds.sample(score_fn, ddpm, x_T, key=0)
    with pytest.raises(ValueError, match=r"one per sample, shape \(4,\); got shape \(3,\)"):
        ds.sample(score_fn, ddpm, x_T, key=jax.random.split(key, 3))
    with pytest.raises(TypeError, match=r"`tableau` must be a diffsamp\.Tableau; got str"):
        ds.sample(score_fn, "ddim", x_T)
    with pytest.raises(TypeError, match="floating dtype; got"):
        ds.sample(score_fn, ddim, jnp.ones((4, 3), jnp.int32))
    with pytest.raises(ValueError, match="one leading batch axis"):
        ds.sample(score_fn, ddim, jnp.ones(()))
    bad = dataclasses.replace(score_fn, apply=lambda p, x, t: x[:, :2])
    with pytest.raises(ValueError, match="must have the shape of x"):
        ds.sample(bad, ddim, x_T)
    other = build("ddim", process=ds.processes.flow())
    with pytest.raises(ValueError, match="built for another process"):
        ds.sample(score_fn, other, x_T)


def test_a_traced_stochastic_tableau_without_key_gives_nan(score_fn):
    """It cannot raise under jit, and must not drop its noise in silence."""
    x_T = start()
    assert np.all(np.isnan(jax.jit(ds.sample)(score_fn, build("ddpm"), x_T)))
    assert np.all(np.isfinite(jax.jit(ds.sample)(score_fn, build("ddim"), x_T)))


def test_raw_keys_are_accepted(score_fn):
    tableau, x_T = build("ddpm"), start()
    raw = jax.random.PRNGKey(5)
    np.testing.assert_array_equal(
        ds.sample(score_fn, tableau, x_T, key=raw),
        ds.sample(score_fn, tableau, x_T, key=jax.random.wrap_key_data(raw)),
    )


def test_inside_jit_with_everything_traced(score_fn):
    """Process, tableau and state as arguments: conversions then happen in the program."""
    tableau, x_T = build("deis_tab3", 8), start()
    np.testing.assert_allclose(
        jax.jit(ds.sample)(score_fn, tableau, x_T),
        ds.sample(score_fn, tableau, x_T),
        rtol=2e-5,
        atol=2e-5,
    )
