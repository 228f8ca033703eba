"""Networks as files: the same numbers, gradients, vectorised, searched, without their code."""

import functools
import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsamp as ds

PROCESS = ds.processes.vp_linear()
WIDTH = 3


def apply(params, x, t, shift):
    h = jnp.tanh(x @ params["in"]["w"] + t[:, None].astype(x.dtype))
    return h @ params["out"] + shift["by"].astype(x.dtype)[:, None] * params["gain"]


def closed(batch, params, x, t):
    """Code that is written for one size of batch, as traced PyTorch modules are."""
    if x.shape[0] != batch or not isinstance(x.shape[0], int):
        raise TypeError(f"made for {batch}")
    return jnp.tanh(x @ params["w"]) * t[:, None]


def params(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "out": jax.random.normal(keys[0], (5, WIDTH)).astype(dtype),
        "in": {"w": jax.random.normal(keys[1], (WIDTH, 5)).astype(dtype)},
        "gain": jnp.ones((), dtype),
    }


COND = {"shift": {"by": np.zeros(1, np.float32)}}


def network(**options):
    return ds.ScoreFn(apply, params(), PROCESS, prediction="v", **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("network") / "net"
    ds.export_network(network(time="log_snr"), path, shape=(WIDTH,), cond=COND)
    return path


def batch_of(n):
    x = jax.random.normal(jax.random.key(n), (n, WIDTH))
    return x, jnp.linspace(0.2, 0.9, n), {"shift": {"by": jnp.linspace(0, 1, n)}}


def test_the_same_network_for_any_batch(folder):
    own, loaded = network(time="log_snr"), ds.load_network(folder)
    assert (loaded.prediction, loaded.time, loaded.scale_input) == ("v", "log_snr", False)
    assert loaded.process == PROCESS
    assert set(loaded.params) == {"in/w", "out", "gain"}
    for n in (1, 4):
        x, t, cond = batch_of(n)
        want = own(x, t, prediction="data", cond=cond)
        got = jax.jit(lambda s, x, c, t=t: s(x, t, prediction="data", cond=c))(loaded, x, cond)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_gradients_by_everything(folder):
    own, loaded = network(time="log_snr"), ds.load_network(folder)
    x, t, cond = batch_of(3)

    def loss(params, x, t, cond, apply):
        return jnp.sum(jnp.sin(apply(params, x, t, **cond)))

    want = jax.grad(loss, (0, 1, 2, 3))(own.params, x, t, cond, own.apply)
    got = jax.jit(jax.grad(loss, (0, 1, 2, 3)), static_argnums=4)(
        loaded.params, x, t, cond, loaded.apply
    )
    renamed = {"in": {"w": got[0]["in/w"]}, "out": got[0]["out"], "gain": got[0]["gain"]}
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5),
        (renamed, *got[1:]),
        want,
    )


def test_vectorised_in_scans_and_with_gradients(folder):
    own, loaded = network(), ds.load_network(folder)
    x, t, cond = batch_of(2)
    many = jnp.stack([x, 2 * x, -x])

    def run(s, x):
        def step(x, _):
            return s.apply(s.params, x, t, **cond) + x, None

        return jax.lax.scan(step, x, None, 2)[0]

    want = jax.vmap(functools.partial(run, own))(many)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(functools.partial(run, loaded)))(many), want, rtol=2e-5, atol=2e-5
    )

    def slope(s, x):
        return jax.grad(lambda x: jnp.sum(run(s, x) ** 2))(x)

    want = jax.vmap(functools.partial(slope, own))(many)
    got = jax.vmap(functools.partial(slope, loaded))(many)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [None, 2])
def test_a_network_of_one_batch_size_takes_any(tmp_path, size):
    weights = {"w": params()["out"][:WIDTH]}
    own = ds.ScoreFn(functools.partial(closed, size or 1), weights, PROCESS)
    ds.export_network(own, tmp_path / "net", shape=(WIDTH,), batch=size)
    loaded = ds.load_network(tmp_path / "net")
    x, t, _ = batch_of(5)

    def loss(apply, weights, x, t):
        return jnp.sum(apply(weights, x, t) ** 2)

    def plain(params, x, t):
        return jnp.tanh(x @ params["w"]) * t[:, None]

    np.testing.assert_allclose(
        loaded.apply(loaded.params, x, t), plain(weights, x, t), rtol=1e-5, atol=1e-6
    )
    want = jax.grad(functools.partial(loss, plain), (0, 1, 2))(weights, x, t)
    got = jax.grad(functools.partial(loss, loaded.apply), (0, 1, 2))(loaded.params, x, t)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), got, want)


def test_functions_of_the_level_and_low_precision(tmp_path):
    def squared(level):
        return level.sigma**2

    def plain(params, x, t):
        assert x.dtype == jnp.bfloat16
        return x * params * t[:, None].astype(x.dtype)

    own = ds.ScoreFn(
        plain,
        jnp.bfloat16(0.5),
        ds.processes.vp_discrete("linear"),
        time=squared,
        scale_input=True,
        sigma_data=0.7,
        dtype=jnp.bfloat16,
    )
    ds.export_network(own, tmp_path / "net", shape=(WIDTH,))
    loaded = ds.load_network(tmp_path / "net")
    x, _, _ = batch_of(3)
    assert loaded.params["x"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(loaded.process.log_snrs, own.process.log_snrs)
    tableau = ds.solvers.ddim(own.process, ds.schedules.leading(own.process, 3))
    want = ds.sample(own, tableau, x)
    np.testing.assert_allclose(ds.sample(loaded, tableau, x), want, rtol=2e-2, atol=2e-2)


def test_it_is_searched_where_the_networks_code_is_not(folder, tmp_path):
    """Another process, where neither `apply` nor torch, flax can be imported."""
    code = """
        import sys
        class Gone:
            def find_spec(name, *_):
                if name.split(".")[0] in ("torch", "torchax", "flax", "diffusers"):
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Gone)
        import jax, jax.numpy as jnp
        import diffsamp as ds
        net = ds.load_network(sys.argv[1])
        x_T = jax.random.normal(jax.random.key(0), (24, 3))
        cond = {"shift": {"by": jnp.linspace(0, 1, 24)}}
        plan = ds.search.regress(net, x_T, nfe=3, cond=cond, key=jax.random.key(1))
        plan = ds.search.refine(
            net, plan.tableau, x_T, cond=cond, key=jax.random.key(1), iterations=2
        )
        plan.save(sys.argv[2])
        start = jnp.float32(0.1) * x_T
        slope = jax.grad(lambda x: jnp.sum(net(x, 0.5, cond=cond) ** 2))(start)
        print(bool(jnp.isfinite(slope).all()))
    """
    out = tmp_path / "plan.json"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(folder), str(out)],
        capture_output=True,
        text=True,
        check=False,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "True"
    # the plan serves the network itself
    own, found = network(time="log_snr"), ds.search.Plan.load(out).tableau
    x_T = jax.random.normal(jax.random.key(5), (16, WIDTH))
    cond = {"shift": {"by": jnp.linspace(0, 1, 16)}}

    def end(tableau):
        return ds.sample(own, tableau, x_T, cond=cond)

    fine = end(ds.solvers.dpmpp(PROCESS, ds.schedules.logsnr(PROCESS, 60), order=2))
    plain = end(ds.solvers.dpmpp(PROCESS, ds.schedules.logsnr(PROCESS, 3), order=2))
    assert found.nfe == 3
    # a network of random weights: half the error is what any search must gain
    assert jnp.mean((end(found) - fine) ** 2) < 0.5 * jnp.mean((plain - fine) ** 2)


@pytest.mark.long
def test_it_is_distilled_by_its_gradient(folder):
    """The same plan as with the network itself."""
    x_T = jax.random.normal(jax.random.key(0), (12, WIDTH))
    cond = {"shift": {"by": jnp.linspace(0, 1, 12)}}
    start = ds.solvers.ddim(PROCESS, ds.schedules.logsnr(PROCESS, 2))
    found = [
        ds.search.distill(
            net, x_T, cond=cond, start=start, key=jax.random.key(1), steps=4, batch=4, held_out=4
        )
        for net in (network(time="log_snr"), ds.load_network(folder))
    ]
    moved = np.abs(found[0].tableau.b - start.b).max()
    assert moved > 1e-3
    np.testing.assert_allclose(found[0].tableau.b, found[1].tableau.b, atol=1e-2 * moved)


def test_the_programs_do_not_hold_the_weights(tmp_path):
    sizes = {}
    for width in (4, 200):
        own = ds.ScoreFn(lambda p, x, t: x @ p, jnp.ones((width, width)), PROCESS)
        ds.export_network(own, tmp_path / str(width), shape=(width,))
        folder = tmp_path / str(width)
        sizes[width] = sum(file.stat().st_size for file in folder.glob("*.stablehlo"))
        assert (folder / "weights.safetensors").stat().st_size > 4 * width**2
    assert sizes[200] < sizes[4] + 2000


def test_bad_arguments_in_words(folder, tmp_path):
    own = network()
    guided = ds.guidance.cfg(own, 2.0, null={"shift": {"by": 0.0}})
    write = functools.partial(ds.export_network, path=tmp_path / "net", shape=(WIDTH,), cond=COND)
    with pytest.raises(TypeError, match="put the transform around"):
        write(guided)
    with pytest.raises(TypeError, match=r"must be a diffsamp\.ScoreFn"):
        write(apply)
    with pytest.raises(ValueError, match="needs a network with a batch axis"):
        write(ds.ScoreFn(apply, {}, PROCESS, batched=False))
    with pytest.raises(ValueError, match="`platforms` must be"):
        write(own, platforms="cpu")
    with pytest.raises(TypeError, match="`dtype` must be floating"):
        write(own, dtype=jnp.int32)
    with pytest.raises(ValueError, match="leading batch axis"):
        write(own, cond={"shift": {"by": np.float32(1)}})
    with pytest.raises(ValueError, match="output must have the shape of x"):
        write(ds.ScoreFn(lambda p, x, t, shift: x[:, :2], {}, PROCESS))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write(own, path=tmp_path / "file")

    loaded = ds.load_network(folder)
    x, t, cond = batch_of(2)
    with pytest.raises(ValueError, match=r"states of shape \(batch, 3\); got \(2, 4\)"):
        loaded(jnp.ones((2, 4)), 0.5, cond=cond)
    with pytest.raises(ValueError, match="was written for conditions"):
        loaded(x, 0.5)
    write(own, with_gradient=False)
    forward = ds.load_network(tmp_path / "net")
    assert forward.apply(forward.params, x, t, **cond).shape == (2, WIDTH)
    with pytest.raises(ValueError, match="written without its gradient"):
        jax.grad(lambda x: jnp.sum(forward(x, 0.5, cond=cond)))(x)


def test_bad_files_in_words(folder, tmp_path):
    def copy(**changes):
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        for name, content in changes.items():
            (tmp_path / name.replace("_", ".")).write_bytes(content)
        return tmp_path

    with pytest.raises(FileNotFoundError, match="no network of `export_network`"):
        ds.load_network(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="weights of another network"):
        ds.load_network(copy(weights_safetensors=b"x"))
    with pytest.raises(ValueError, match="not JSON"):
        ds.load_network(copy(network_json=b"{"))
    with pytest.raises(ValueError, match=r"reads 'diffsamp.network' of version 1"):
        ds.load_network(copy(network_json=b"{}"))
    with pytest.raises(ValueError, match="corrupt"):
        ds.load_network(copy(network_stablehlo=b"{}"))
    copy()
    about = json.loads((tmp_path / "network.json").read_text())
    about["process"][0] = "Mine"
    (tmp_path / "network.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="process is Mine, which diffsamp does not have"):
        ds.load_network(tmp_path)
    assert ds.load_network(tmp_path, process=PROCESS).process == PROCESS
    (tmp_path / "gradient.stablehlo").unlink()
    with pytest.raises(FileNotFoundError, match=r"gradient\.stablehlo"):
        ds.load_network(tmp_path, process=PROCESS)
