"""ScoreFn: every framework, no weight as a constant, time conventions, dtypes, errors."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import all_processes
from flax import linen, nnx

import diffsamp as ds
from diffsamp import schedules, solvers

PROCESS = ds.processes.vp_linear()
WIDTH = 37  # a size that nothing else in the program has


def plain_apply(params, x, t):
    return jnp.tanh(x @ params["in"] + t[:, None]) @ params["out"]


def plain_params(seed=0):
    key_in, key_out = jax.random.split(jax.random.key(seed))
    return {
        "in": jax.random.normal(key_in, (3, WIDTH)),
        "out": jax.random.normal(key_out, (WIDTH, 3)) / WIDTH,
    }


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x, t):
        hidden = jnp.tanh(linen.Dense(WIDTH)(x) + t[:, None])
        return linen.Dense(3)(hidden)


def linen_apply(params, x, t):
    return Linen().apply(params, x, t)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(3, WIDTH, rngs=rngs), nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, x, t):
        return self.second(jnp.tanh(self.first(x) + t[:, None]))


class Equinox(eqx.Module):
    layers: list
    activation: callable  # not an array: static in ScoreFn's pytree
    scale: float

    def __init__(self, key):
        key_first, key_second = jax.random.split(key)
        self.layers = [
            eqx.nn.Linear(3, WIDTH, key=key_first),
            eqx.nn.Linear(WIDTH, 3, key=key_second),
        ]
        self.activation = jnp.tanh
        self.scale = 1.0

    def __call__(self, x, t):
        hidden = self.activation(self.layers[0](x) * self.scale + t)
        return self.layers[1](hidden)


def call_module(module, x, t):
    return module(x, t)


def call_single(module, x, t):
    """An equinox module takes one sample; vmap over the batch."""
    return jax.vmap(module)(x, t)


def frameworks():
    linen_params = Linen().init(jax.random.key(0), jnp.ones((1, 3)), jnp.ones(1))
    return {
        "plain": (plain_apply, plain_params()),
        "linen": (linen_apply, linen_params),
        "nnx": (call_module, Nnx(nnx.Rngs(0))),
        "equinox": (call_single, Equinox(jax.random.key(0))),
    }


FRAMEWORKS = frameworks()
EACH = pytest.mark.parametrize("which", FRAMEWORKS)


def build(which="plain", **options):
    apply, params = FRAMEWORKS[which]
    return ds.ScoreFn(apply, params, PROCESS, **{"prediction": "data", **options})


def tableau(n=4):
    return solvers.dpmpp(PROCESS, schedules.logsnr(PROCESS, n))


def start(n=5):
    return PROCESS.prior_sample(jax.random.key(1), (n, 3))


@EACH
def test_a_model_of_each_framework_samples(which):
    score_fn = build(which)
    apply, params = FRAMEWORKS[which]
    x, t = start(), 0.6
    got = score_fn(x, t, prediction="data")
    np.testing.assert_allclose(got, apply(params, x, jnp.full(5, t, jnp.float32)), rtol=1e-6)
    sampled = ds.sample(score_fn, tableau(), x)
    again = jax.jit(ds.sample)(score_fn, tableau(), x)
    assert np.all(np.isfinite(sampled))
    np.testing.assert_allclose(sampled, again, rtol=2e-4, atol=2e-5)


def has_weight_constant(text):
    """A dense constant of a weight's shape in the program."""
    shapes = (f"tensor<3x{WIDTH}xf32>", f"tensor<{WIDTH}x3xf32>")
    return any(
        "stablehlo.constant" in line and any(s in line for s in shapes) and 'dense<"0x' in line
        for line in text.splitlines()
    )


@EACH
def test_the_program_holds_no_weight(which):
    score_fn = build(which)
    text = jax.jit(ds.sample).lower(score_fn, tableau(), start()).as_text()
    assert f"{WIDTH}x3xf32" in text or f"3x{WIDTH}xf32" in text
    assert not has_weight_constant(text)
    # the test can fail: a closure bakes them in
    closed = jax.jit(lambda x: ds.sample(score_fn, tableau(), x)).lower(start()).as_text()
    assert has_weight_constant(closed)


def eager_program(tmp_path, score_fn, x):
    """The StableHLO that a plain `ds.sample` compiles for itself."""
    jax.config.update("jax_dump_ir_to", str(tmp_path))
    try:
        ds.sample(score_fn, tableau(), x)
    finally:
        jax.config.update("jax_dump_ir_to", None)
    return "\n".join(path.read_text() for path in tmp_path.glob("*_run_*.mlir"))


@EACH
def test_the_program_of_a_plain_call_holds_no_weight(which, tmp_path):
    """The same inside `ds.sample`; each network is a new function, so that it compiles."""
    apply, params = FRAMEWORKS[which]
    honest, closed = tmp_path / "argument", tmp_path / "closure"
    honest.mkdir()
    closed.mkdir()
    score_fn = ds.ScoreFn(lambda p, x, t: apply(p, x, t), params, PROCESS, prediction="data")
    text = eager_program(honest, score_fn, start())
    assert f"{WIDTH}x3xf32" in text or f"3x{WIDTH}xf32" in text
    assert not has_weight_constant(text)
    # the test can fail: weights that `apply` closes over
    score_fn = ds.ScoreFn(lambda p, x, t: apply(params, x, t), (), PROCESS, prediction="data")
    assert has_weight_constant(eager_program(closed, score_fn, start()))


@EACH
def test_pytree_round_trip_and_no_retrace_for_new_weights(which):
    apply, params = FRAMEWORKS[which]
    traces = []

    def traced(params, x, t):
        traces.append(1)
        return apply(params, x, t)

    score_fn = ds.ScoreFn(traced, params, PROCESS, prediction="data")
    leaves, treedef = jax.tree.flatten(score_fn)
    rebuilt = jax.tree.unflatten(treedef, leaves)
    assert jax.tree.structure(rebuilt) == treedef
    x = start()
    first = ds.sample(score_fn, tableau(), x)
    np.testing.assert_array_equal(first, ds.sample(rebuilt, tableau(), x))
    doubled = jax.tree.unflatten(treedef, [2 * v if np.ndim(v) else v for v in leaves])
    other = ds.sample(doubled, tableau(), x)
    assert np.abs(np.asarray(first - other)).max() > 1e-3
    assert len(traces) == 1


@EACH
def test_compiled_ahead_of_time(which):
    """From descriptions of the arrays, and called with the arrays."""
    score_fn, x = build(which), start()
    described = jax.tree.map(lambda v: jax.ShapeDtypeStruct(np.shape(v), jnp.float32), score_fn)
    assert jax.tree.structure(described) == jax.tree.structure(score_fn)
    steps = tableau()
    run = jax.jit(lambda f, x: ds.sample(f, steps, x))
    want = run(score_fn, x)
    for argument in (score_fn, described):
        program = run.lower(argument, x).compile()
        arrays = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), score_fn)
        given = score_fn if argument is score_fn else arrays
        np.testing.assert_allclose(program(given, x), want, rtol=1e-4, atol=1e-5)


def test_what_is_not_an_array_survives_the_round_trip():
    """An equinox module's activation and Python number are static; named paths lead to arrays."""
    score_fn = build("equinox")
    paths, treedef = jax.tree_util.tree_flatten_with_path(score_fn)
    assert all(isinstance(leaf, jax.Array | float) for _, leaf in paths)
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    assert ".params.layers[0].weight" in names
    assert ".process.beta_min" in names
    rebuilt = jax.tree.unflatten(treedef, [leaf for _, leaf in paths])
    assert isinstance(rebuilt.params, Equinox)
    assert rebuilt.params.activation is jnp.tanh
    assert rebuilt.params.scale == 1.0
    np.testing.assert_array_equal(rebuilt(start(), 0.6), score_fn(start(), 0.6))
    # and a map over the pytree keeps them
    zero = jax.tree.map(jnp.zeros_like, score_fn)
    assert zero.params.activation is jnp.tanh
    np.testing.assert_array_equal(zero.params.layers[1].weight, 0)


@pytest.mark.parametrize(
    ("change", "traces"),
    [
        ({}, 1),
        ({"params": plain_params(7)}, 1),
        ({"process": ds.processes.vp_linear(0.2, 15.0)}, 1),
        ({"prediction": "data"}, 1),  # the one it has
        # what changes the program is static
        ({"prediction": "v"}, 2),
        ({"time": "log_snr"}, 2),
        ({"scale_input": True}, 2),
        ({"dtype": jnp.bfloat16}, 2),
    ],
)
def test_what_traces_again(change, traces):
    calls = []

    def apply(params, x, t):
        calls.append(1)
        return plain_apply(params, x.astype(jnp.float32), t)

    score_fn = ds.ScoreFn(apply, plain_params(), PROCESS, prediction="data")
    sample = jax.jit(ds.sample)
    sample(score_fn, tableau(), start())
    assert len(calls) == 1
    sample(dataclasses.replace(score_fn, **change), tableau(), start())
    assert len(calls) == traces


def test_gradients_reach_the_weights():
    score_fn = build("equinox")

    def loss(score_fn):
        return jnp.sum(jnp.square(ds.sample(score_fn, tableau(), start())))

    gradient = jax.grad(loss, allow_int=True)(score_fn)
    assert isinstance(gradient, ds.ScoreFn)
    assert np.abs(gradient.params.layers[0].weight).max() > 0


@pytest.mark.parametrize(
    ("time", "process", "t", "want"),
    [
        ("t", PROCESS, 0.3, 0.3),
        ("sigma", PROCESS, 0.3, float(PROCESS.sigma(0.3))),
        ("label", PROCESS, 0.3, 300.0),
        ("label", ds.processes.vp_discrete(), 123.0, 123.0),
        ("log_snr", PROCESS, 0.3, float(PROCESS.log_snr(0.3))),
        ("c_noise", ds.processes.edm(), 2.5, np.log(2.5) / 4),
        ("rho", PROCESS, 0.3, float(PROCESS.sigma(0.3) / PROCESS.alpha(0.3))),
        (lambda level: level.sigma**2, PROCESS, 0.3, float(PROCESS.sigma(0.3)) ** 2),
    ],
)
def test_time_conventions(time, process, t, want):
    def tell(params, x, t):
        return x * 0 + t[:, None]

    score_fn = ds.ScoreFn(tell, (), process, prediction="data", time=time)
    np.testing.assert_allclose(score_fn(jnp.ones((2, 1)), t), want, rtol=1e-5)
    # the executor hands over the same number, from the tableau
    one_row = solvers.ddim(process, [t, process.t_clean])
    np.testing.assert_allclose(ds.sample(score_fn, one_row, jnp.ones((2, 1))), want, rtol=1e-5)


def test_the_executor_tells_every_row_its_own_time():
    """Recorded inside the network, row by row, against the schedule."""
    seen = []

    def apply(params, x, t):
        jax.debug.callback(lambda x, t: seen.append((x, t)), x, t, ordered=True)
        return x

    process = ds.processes.vp_discrete()
    score_fn = ds.ScoreFn(apply, (), process, prediction="noise", time="label")
    times = [961.5, 700.0, 12.25, 0.0, -1.0]
    x = start()
    jax.block_until_ready(ds.sample(score_fn, solvers.ddim(process, times), x))
    jax.effects_barrier()
    np.testing.assert_array_equal([t for _, t in seen], np.tile(times[:-1], (5, 1)).T)
    np.testing.assert_array_equal(seen[0][0], x)  # at the first row the network gets x_T itself


def test_edm_networks_get_scaled_inputs_and_c_noise():
    """F(c_in x / alpha, log(rho) / 4), and D = c_skip x / alpha + c_out F."""
    s, t = 0.5, 0.4
    score_fn = ds.ScoreFn(lambda p, x, t: x + t[:, None], (), PROCESS, prediction="edm_f")
    x = start()
    alpha, sigma = float(PROCESS.alpha(t)), float(PROCESS.sigma(t))
    rho = sigma / alpha
    f = x / alpha / np.sqrt(rho**2 + s**2) + np.log(rho) / 4
    want = s**2 / (rho**2 + s**2) * x / alpha + rho * s / np.sqrt(rho**2 + s**2) * f
    np.testing.assert_allclose(score_fn(x, t, prediction="data"), want, rtol=1e-5, atol=1e-6)


def test_low_precision_networks_keep_a_float32_state():
    seen = {}

    def apply(params, x, t):
        seen.update(x=x.dtype, t=t.dtype)
        return x * params

    score_fn = ds.ScoreFn(apply, jnp.ones((), jnp.bfloat16), PROCESS, dtype=jnp.bfloat16)
    x = ds.sample(score_fn, tableau(), start())
    assert seen == {"x": jnp.bfloat16, "t": jnp.float32}
    assert x.dtype == jnp.float32


@pytest.mark.parametrize("state", [jnp.float32, jnp.bfloat16])
def test_the_coefficients_are_not_rounded_to_the_networks_dtype(state):
    """x + 1e-3 F: in bfloat16 arithmetic the second term would be lost."""
    flow = ds.processes.flow()
    score_fn = ds.ScoreFn(
        lambda p, x, t: jnp.ones_like(x), (), flow, prediction="velocity", dtype=jnp.bfloat16
    )
    got = score_fn(jnp.ones((2, 1), state), 1e-3, prediction="data")
    assert got.dtype == state
    # x - t F; the result is rounded to the state's dtype, and only that
    np.testing.assert_array_equal(got, jnp.asarray(1 - 1e-3, state))
    if state == jnp.float32:
        assert float(got[0, 0]) != 1.0


def test_networks_without_a_batch_axis():
    shapes = []

    def apply(params, x, t):
        shapes.append((x.shape, t.shape))
        return jnp.tanh(x @ params["in"] + t) @ params["out"]

    x = start()
    single = build(batched=False)
    single = dataclasses.replace(single, apply=apply)
    whole = ds.sample(build(), tableau(), x)
    one = ds.sample(single, tableau(), x[0])
    assert set(shapes) == {((3,), ())}
    np.testing.assert_allclose(one, whole[0], rtol=1e-5, atol=1e-6)
    several = jax.vmap(lambda v: ds.sample(single, tableau(), v))(x)
    np.testing.assert_allclose(several, whole, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"the time must be a scalar; got shape \(3,\)"):
        single(x[0], jnp.full(3, 0.5))
    with pytest.raises(ValueError, match=r"build ScoreFn\(\.\.\., batched=False\)"):
        build()(jnp.ones(()), 0.5)


def test_conditions_reach_the_network():
    seen = []

    def apply(params, x, t, *, label, strength=1.0):
        seen.append(type(label).__name__)
        return x * 0 + strength * label["class"][:, None]

    score_fn = ds.ScoreFn(apply, (), PROCESS, prediction="data")
    classes = {"class": jnp.arange(5.0)}
    x = start()
    want = np.tile(np.arange(5.0)[:, None], 3)
    np.testing.assert_array_equal(score_fn(x, 0.5, cond={"label": classes}), want)
    sampled = ds.sample(score_fn, tableau(), x, cond={"label": classes, "strength": 2.0})
    np.testing.assert_allclose(sampled, 2 * want, rtol=1e-6)
    assert set(seen) == {"dict"}
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'label'"):
        score_fn(x, 0.5)


def test_states_that_are_pytrees_or_numpy():
    def apply(params, x, t):
        return {"a": x["a"] * 2, "b": -x["b"]}

    score_fn = ds.ScoreFn(apply, (), PROCESS, prediction="data")
    x = {"a": np.ones((2, 3)), "b": jnp.ones((2, 4, 5))}  # float64 of NumPy becomes JAX's float
    got = score_fn(x, 0.5)
    np.testing.assert_array_equal(got["a"], 2)
    np.testing.assert_array_equal(got["b"], -1)
    assert got["a"].dtype == jnp.float32


@pytest.mark.parametrize("prediction", ds.predictions.NAMES)
@pytest.mark.parametrize("process", all_processes().values(), ids=all_processes())
def test_the_networks_own_output_is_returned_as_it_is(prediction, process):
    """At any level, also where the prediction determines nothing else."""
    score_fn = ds.ScoreFn(
        lambda p, x, t: jnp.full_like(x, 0.3), (), process, prediction=prediction, time="t"
    )
    x = start()
    for t in (process.t_clean, process.t_max):
        np.testing.assert_array_equal(score_fn(x, t), np.float32(0.3))
        np.testing.assert_array_equal(score_fn(x, t, prediction=prediction), np.float32(0.3))


def test_per_sample_times_in_a_call():
    score_fn = build()
    x, t = start(), jnp.linspace(0.1, 0.9, 5)
    together = score_fn(x, t, prediction="noise")
    for i in range(5):
        alone = score_fn(x[i : i + 1], float(t[i]), prediction="noise")
        np.testing.assert_allclose(together[i], alone[0], rtol=2e-4, atol=2e-5)


def test_errors():
    score_fn, x = build(), start()
    with pytest.raises(TypeError, match="`apply` must be a function; got str"):
        ds.ScoreFn("net", (), PROCESS)
    with pytest.raises(ValueError, match="`prediction` must be one of"):
        build(prediction="epsilom")
    with pytest.raises(ValueError, match="`time` must be one of 't', 'sigma'"):
        build(time="timestep")
    with pytest.raises(ValueError, match="`prediction` must be one of"):
        score_fn(x, 0.5, prediction="nope")
    with pytest.raises(ValueError, match="does not determine the wanted prediction at t = 0"):
        score_fn(x, 0.0, prediction="noise")
    for own in ("data", "noise", "v"):
        for bad in ("score", *({"data": ["noise", "v"]}.get(own, []))):
            with pytest.raises(ValueError, match=f"predicts '{own}' does not determine"):
                build(prediction=own)(x, 0.0, prediction=bad)
    with pytest.raises(TypeError, match=r"`x` must be an array.*int32"):
        score_fn(jnp.ones((2, 3), jnp.int32), 0.5)
    with pytest.raises(TypeError, match=r"`x` must be an array.*got float"):
        score_fn([1.0, 2.0], 0.5)
    with pytest.raises(ValueError, match="one leading batch axis, the same in every array"):
        score_fn({"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))}, 0.5)
    with pytest.raises(ValueError, match="must hold at least one array"):
        score_fn((), 0.5)
    for wrong in (jnp.full(4, 0.5), jnp.full((5, 1), 0.5)):
        with pytest.raises(ValueError, match=r"a scalar or one per sample, shape \(5,\); got"):
            score_fn(x, wrong)
    with pytest.raises(TypeError, match=r"`process` must be a diffsamp process.*got str"):
        ds.ScoreFn(plain_apply, (), "flow")
    for bad in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="`sigma_data` must be a positive, finite number"):
            build(sigma_data=bad)

    two = dataclasses.replace(score_fn, apply=lambda p, x, t: (x, x))
    with pytest.raises(ValueError, match="output must have the structure of x"):
        ds.sample(two, tableau(), x)
    wide = dataclasses.replace(score_fn, apply=lambda p, x, t: jnp.ones((5, 6)))
    with pytest.raises(ValueError, match=r"shape of x, \(5, 3\); got \(5, 6\).*second head"):
        ds.sample(wide, tableau(), x)


def test_a_row_that_cannot_be_converted_is_named():
    """A noise-predicting network says nothing of the data where alpha = 0."""
    flow = ds.processes.flow()
    score_fn = ds.ScoreFn(lambda p, x, t: x, (), flow, prediction="noise")
    whole = solvers.ddim(flow, schedules.uniform(flow, 4))
    with pytest.raises(ValueError, match=r"does not determine .* at t = 1 \(alpha = 0, .* row 0"):
        ds.sample(score_fn, whole, start())
    ds.sample(score_fn, solvers.ddim(flow, [0.99, 0.5, 0.0]), start())


def test_the_networks_own_errors_pass_through():
    class Mine(Exception):
        pass

    def apply(params, x, t):
        raise Mine("from the network")

    score_fn = ds.ScoreFn(apply, (), PROCESS)
    for call in (ds.sample, jax.jit(ds.sample), lambda s, _, x: s(x, 0.5)):
        with pytest.raises(Mine, match=r"^from the network") as caught:
            call(score_fn, tableau(), start())
        assert type(caught.value) is Mine
