"""Convolutions on CPU: the rule changes nothing but speed, and reaches into every loop."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.interpreters import mlir

import diffsamp as ds
from diffsamp._core import convolution, every_core

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the rule is for CPU")

SPACE = "HWD"


@pytest.fixture(autouse=True)
def _leave_it_on():
    yield
    assert ds.fast_convolutions(True)


def layouts(dims):
    """Channels first, channels last, and one with every axis out of its place."""
    space = SPACE[:dims]
    return (
        (f"NC{space}", f"OI{space}", f"NC{space}"),
        (f"N{space}C", f"{space}IO", f"N{space}C"),
        (f"{space[::-1]}CN", f"I{space}O", f"C{space[::-1]}N"),
    )


def arrange(array, source, target):
    return jnp.transpose(array, [source.index(letter) for letter in target])


def case(dims, layout, groups=1, batch_groups=1, stride=1, lhs=1, rhs=1, kernel=3, **more):
    """A function of (x, w) with two arguments for it; 8 inputs and 8 outputs."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4 * batch_groups, 8, *range(5, 5 + dims)))
    w = rng.normal(size=(8, 8 // groups, *[kernel] * dims))
    plain = layouts(dims)[0]
    dtype = more.pop("dtype", jnp.float32)
    x, w = (jnp.asarray(np.round(v * 8) / 8, dtype) for v in (x, w))  # exact in bfloat16
    x, w = arrange(x, plain[0], layout[0]), arrange(w, plain[1], layout[1])

    def convolve(x, w):
        return lax.conv_general_dilated(
            x,
            w,
            (stride,) * dims,
            [(1, 2)] * dims,
            (lhs,) * dims,
            (rhs,) * dims,
            layout,
            feature_group_count=groups,
            batch_group_count=batch_groups,
            **more,
        )

    return convolve, x, w


def both(function, *arguments):
    """What the rule gives, and what JAX's own gives; compiled apart."""
    results = []
    for on in (True, False):
        assert ds.fast_convolutions(on) is on
        results.append(jax.jit(lambda *a: function(*a))(*arguments))
    return results


def agree(results, tolerance=2e-6):
    ours, own = jax.tree.leaves(results[0]), jax.tree.leaves(results[1])
    for a, b in zip(ours, own, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        a, b = (np.asarray(v, np.float64 if v.dtype.kind != "c" else None) for v in (a, b))
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(initial=1.0), rtol=0)


def with_gradients(convolve):
    """Values, both gradients, and a second derivative."""

    def loss(x, w):
        return jnp.sum(jnp.sin(0.1 * convolve(x, w)))

    def everything(x, w):
        tangent = jax.jvp(jax.grad(loss), (x, w), (x, jnp.zeros_like(w)))[1]
        return convolve(x, w), jax.grad(loss, (0, 1))(x, w), tangent

    return everything


# every option in one dimension, where compiling is cheap; then those whose form depends on it
OPTIONS = {
    1: (
        {},
        {"stride": 2},
        {"lhs": 2},
        {"rhs": 2},
        {"stride": 2, "rhs": 2, "lhs": 3},
        {"kernel": 1},
        {"kernel": 9},
        {"groups": 2},
        {"groups": 4},
        {"groups": 8},
        {"groups": 8, "stride": 2},
        {"groups": 4, "lhs": 2},
        {"batch_groups": 2},
        {"batch_groups": 8},
        {"groups": 2, "kernel": 13},
    ),
    2: ({"stride": 2, "lhs": 3}, {"groups": 4, "rhs": 2}, {"groups": 2, "kernel": 4}),
    3: ({"lhs": 2}, {"groups": 8}),
}


@pytest.mark.parametrize(
    "dims", [pytest.param(1, marks=pytest.mark.long), 2, pytest.param(3, marks=pytest.mark.long)]
)
def test_values_and_gradients_are_those_of_jax(dims):
    for i, options in enumerate(OPTIONS[dims]):
        # every layout without options, and with each of them one in turn
        for layout in layouts(dims) if not options else layouts(dims)[i % 3 :][:1]:
            convolve, x, w = case(dims, layout, **options)
            agree(both(with_gradients(convolve), x, w))


FORMS = ("_product", "_row_made", "_row_of_zeros", "_rows_as_inputs")


@pytest.mark.parametrize(
    ("options", "forms"),
    [
        ({}, {"_row_made", "_row_of_zeros"}),
        ({"groups": 2}, {"_row_made", "_row_of_zeros"}),
        ({"stride": (1, 2)}, {"_row_made", "_row_of_zeros"}),
        ({"stride": 2}, {"_rows_as_inputs"}),
        ({"stride": (2, 1), "rhs": (1, 2), "kernel": (3, 2)}, {"_rows_as_inputs"}),
        ({"kernel": 1, "padding": 0}, {"_product"}),
        ({"kernel": (6, 5), "padding": 0}, {"_product"}),
        ({"rhs": 2, "padding": 2}, {"_row_made"}),
    ],
)
def test_forms_for_several_cores(monkeypatch, options, forms):
    """Those for large convolutions and several cores, on small ones and any number of cores."""
    used = set()
    for name in FORMS:
        form = getattr(every_core, name)

        def noted(*args, name=name, form=form):
            used.add(name)
            return form(*args)

        monkeypatch.setattr(every_core, name, noted)
    for name in ("SMALL", "SHORT"):
        monkeypatch.setattr(every_core, name, 0)
    monkeypatch.setattr(every_core, "_cores", lambda: 64)
    for layout in layouts(2)[:2]:
        convolve, x, w = pair(layout, **options)
        agree(both(with_gradients(convolve), x, w))
    assert forms <= used
    used.clear()
    assert ds.fast_convolutions(True)
    symbol = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b"), *x.shape[1:]), x.dtype)
    exported = jax.export.export(jax.jit(convolve), platforms=("cpu",))(symbol, w)
    assert used == forms - {"_row_of_zeros"}  # which is for gradients
    agree([exported.call(x, w), convolve(x, w)])
    monkeypatch.setattr(every_core, "_cores", lambda: 1)
    used.clear()
    jax.clear_caches()
    agree(both(convolve, x, w))
    assert used <= {"_product"}


def pair(layout, groups=1, stride=1, rhs=1, kernel=3, padding=1):
    """A convolution of 24 channels, and two arguments; numbers of both axes may differ."""

    def two(value):
        return (value, value) if isinstance(value, int) else value

    rng = np.random.default_rng(0)
    plain = layouts(2)[0]
    x = jnp.asarray(rng.normal(size=(8, 24, 6, 5)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(24, 24 // groups, *two(kernel))), jnp.float32)
    x, w = arrange(x, plain[0], layout[0]), arrange(w, plain[1], layout[1])
    edges = [(p, p) for p in two(padding)]
    named = {"dimension_numbers": layout, "feature_group_count": groups}
    return (
        lambda x, w: lax.conv_general_dilated(
            x, w, two(stride), edges, rhs_dilation=two(rhs), **named
        ),
        x,
        w,
    )


def test_gradient_of_depthwise_kernels(monkeypatch):
    """With strides, dilations and two outputs an input; the sums over pixels are used."""
    used = []
    form = convolution._sums_over_pixels
    monkeypatch.setattr(convolution, "_sums_over_pixels", lambda *a: used.append(1) or form(*a))
    for more in ({}, {"window_strides": (2, 1), "rhs_dilation": (1, 2)}, {"lhs_dilation": (2, 2)}):
        for layout in layouts(2):
            x = arrange(case(2, layouts(2)[0])[1], "NCHW", layout[0])
            w = jnp.asarray(np.random.default_rng(0).normal(size=(16, 1, 3, 2)), jnp.float32)
            named = {"window_strides": (1, 1), "padding": ((1, 2), (1, 1))} | more
            named["dimension_numbers"] = layout

            def convolve(x, w, named=named):
                return lax.conv_general_dilated(x, w, feature_group_count=8, **named)

            used.clear()
            agree(both(with_gradients(convolve), x, arrange(w, "OIHW", layout[1])))
            assert used


def test_other_types_and_arguments():
    first = layouts(2)[0]
    for dtype in (jnp.bfloat16, jnp.float16):
        for groups in (1, 8):
            convolve, x, w = case(2, first, groups, dtype=dtype)
            agree(both(convolve, x, w), 2e-2)
            convolve, x, w = case(2, first, groups, dtype=dtype, preferred_element_type=jnp.float32)
            agree(both(convolve, x, w))
    for dtype in (jnp.int8, jnp.int32, jnp.complex64):
        convolve, x, w = case(2, first, dtype=dtype)
        agree(both(convolve, x, w))
    for precision in ("highest", lax.Precision.DEFAULT):
        convolve, x, w = case(2, first, precision=precision)
        agree(both(convolve, x, w))
    with jax.enable_x64(True):
        for groups in (1, 8):
            convolve, x, w = case(2, first, groups, dtype=jnp.float64)
            agree(both(with_gradients(convolve), x, w), 1e-14)


def test_no_elements_and_no_space():
    convolve, x, w = case(2, layouts(2)[0])
    agree(both(convolve, x[:0], w))
    agree(both(lambda x, w: lax.conv(x, w, (), []), jnp.ones((4, 3)), jnp.ones((5, 3))))


def test_vmap_and_loops():
    convolve, x, w = case(2, layouts(2)[0])
    grouped, _, few = case(2, layouts(2)[0], groups=8)
    xs, ws = jnp.stack([x, 2 * x]), jnp.stack([w, w[::-1]])
    agree(both(jax.vmap(convolve), xs, ws))
    agree(both(jax.vmap(convolve, (None, 0)), x, ws))
    agree(both(jax.vmap(grouped, (0, None)), xs, few))
    agree(both(jax.vmap(grouped), xs, jnp.stack([few, few + 1])))
    agree(both(jax.vmap(jax.grad(lambda w, x: jnp.sum(grouped(x, w) ** 2)), (None, 0)), few, xs))

    def looped(x, w):
        def step(x, _):
            # one larger on every axis than its input
            new = lax.cond(jnp.any(x > 0), lambda x: convolve(x, w)[..., 1:, 1:], jnp.sin, x)
            return 0.1 * new, None

        return lax.scan(jax.checkpoint(step), x, None, length=3)[0]

    agree(both(lambda x, w: (looped(x, w), jax.grad(lambda w: looped(x, w).sum())(w)), x, w))


def network(params, x, t):
    """Channels first, strided, transposed, grouped, depthwise, in a shape that is kept."""
    first = ("NCHW", "OIHW", "NCHW")

    def go(x, w, strides=(1, 1), padding="SAME", **more):
        return lax.conv_general_dilated(
            x, params[w], strides, padding, dimension_numbers=first, **more
        )

    h = jnp.tanh(go(x, "in") + t[:, None, None, None])
    h = h + go(
        jnp.tanh(go(h, "grouped", feature_group_count=2)), "depthwise", feature_group_count=16
    )
    low = jnp.tanh(go(h, "down", strides=(2, 2)))
    lowest = go(
        jnp.tanh(go(low, "middle", strides=(2, 2))), "middle"
    )  # the kernel is larger than its input
    low = low + jnp.repeat(jnp.repeat(lowest, 2, axis=2), 2, axis=3)
    up = go(low, "up", padding=((1, 2), (1, 2)), lhs_dilation=(2, 2))
    return go(jnp.tanh(h + up), "out")


def network_params():
    shapes = {
        "in": (16, 3, 3, 3),
        "grouped": (16, 8, 3, 3),
        "depthwise": (16, 1, 3, 3),
        "down": (32, 16, 3, 3),
        "middle": (32, 32, 3, 3),
        "up": (16, 32, 3, 3),
        "out": (3, 16, 3, 3),
    }
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(0.1 * rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


def programs():
    """{name: (function, its arguments)} of the loops of the library."""
    process = ds.processes.flow()
    score_fn = ds.ScoreFn(network, network_params(), process)
    tableau, x = ds.solvers.unipc(process, ds.schedules.logsnr(process, 3)), jnp.ones((2, 3, 8, 8))
    padded = tableau.pad(rows=5)

    def loss(f, x, checkpoint=False):
        return jnp.sum(ds.sample(f, tableau, x, checkpoint=checkpoint) ** 2)

    def resumed(f, x):
        return ds.resume(f, tableau, ds.init(tableau, x)).x

    return {
        "sample": lambda f, x: ds.sample(f, tableau, x),
        "padded": lambda f, x: ds.sample(f, padded, x),
        "gradient": lambda f, x: jax.grad(lambda f, x: loss(f, x), (0, 1))(f, x),
        "gradient, checkpointed": lambda f, x: jax.grad(lambda x: loss(f, x, True))(x),
        "resume": resumed,
        "parallel": lambda f, x: ds.parallel.sample_parallel(f, tableau, x, window=2).x,
    }, (score_fn, x)


def labels(function, *arguments):
    """The order of axes of every convolution in the compiled program."""
    text = jax.jit(lambda *a: function(*a)).lower(*arguments).compile().as_text()
    return re.findall(r"dim_labels=([\w>-]+)", text)


FAST = {f"b{space}f_{space}io->b{space}f" for space in ("0", "01", "012")}


@pytest.mark.long
def test_no_loop_keeps_a_slow_convolution():
    functions, arguments = programs()
    for name, function in functions.items():
        found = labels(function, *arguments)
        assert found, name
        assert set(found) <= FAST, name
    ds.fast_convolutions(False)
    assert not set(labels(functions["sample"], *arguments)) <= FAST  # the test can fail


def test_samples_are_the_same():
    functions, arguments = programs()
    for name in ("sample", "gradient"):
        agree(both(functions[name], *arguments), 1e-5)


def test_exported_for_several_platforms():
    convolve, x, w = case(2, layouts(2)[0])
    (batch,) = jax.export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    function = jax.jit(lambda x, w: lax.map(lambda w: convolve(x, w), w[None])[0])
    written = jax.export.export(function, platforms=("cpu", "cuda", "tpu"))(shape, w)
    ds.fast_convolutions(False)
    agree([written.call(x, w), convolve(x, w)])
    plain = jax.export.export(jax.jit(convolve), platforms=("tpu",))(x, w).mlir_module()
    ds.fast_convolutions(True)
    assert jax.export.export(jax.jit(convolve), platforms=("tpu",))(x, w).mlir_module() == plain
    assert "transpose" not in plain
    ours = jax.export.export(jax.jit(convolve), platforms=("cpu",))(x, w).mlir_module()
    assert "transpose" in ours


def test_what_it_rests_on_is_where_it_was():
    """Fails when JAX moved it: the library then works, with slow loops. See `fast_convolutions`."""
    assert ds.fast_convolutions(True)
    rule = mlir._platform_specific_lowerings["cpu"][lax.conv_general_dilated_p].rule
    assert rule.func is convolution._lower
    convolve, x, w = case(2, layouts(2)[0])
    (equation,) = jax.make_jaxpr(convolve)(x, w).eqns
    assert set(equation.params) == convolution.PARAMETERS


def test_jax_that_moved(monkeypatch):
    convolve, x, w = case(2, layouts(2)[0])
    expected = both(convolve, x, w)[1]
    ds.fast_convolutions(True)
    with monkeypatch.context() as changed:
        changed.setattr(convolution, "_order", lambda *axes: 1 / 0)
        with pytest.warns(UserWarning, match="JAX's own rule"):
            found = jax.jit(lambda *a: convolve(*a))(x, w)
        agree([found, expected])
    with monkeypatch.context() as changed:
        changed.setattr(convolution, "PARAMETERS", {"another"})
        agree([jax.jit(lambda *a: convolve(*a))(x, w), expected])
    with monkeypatch.context() as changed:
        changed.setattr(mlir, "_platform_specific_lowerings", {})
        assert not ds.fast_convolutions(True)


@pytest.mark.parametrize("module", ["sampling", "search", "discrete", "guidance"])
def test_they_are_on_whichever_module_is_imported(module):
    code = (
        f"import diffsamp.{module}; from jax.interpreters import mlir; from jax import lax;"
        "rule = mlir._platform_specific_lowerings['cpu'][lax.conv_general_dilated_p].rule;"
        "assert rule.func.__module__ == 'diffsamp._core.convolution'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
