"""Exported samplers: the same samples without the model's code, for any batch size."""

import io
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsamp as ds

PROCESS = ds.processes.vp_linear()


def apply(params, x, t, shift):
    return jnp.tanh(x @ params["w"]) * t[:, None].astype(x.dtype) + shift.astype(x.dtype)[:, None]


def sampler(stochastic=False, dtype=jnp.float32):
    params = {"w": jax.random.normal(jax.random.key(0), (3, 3)).astype(dtype)}
    score_fn = ds.ScoreFn(apply, params, PROCESS, prediction="noise", dtype=dtype)
    solver = ds.solvers.ddpm if stochastic else ds.solvers.unipc
    return ds.Sampler(score_fn, solver(PROCESS, ds.schedules.logsnr(PROCESS, 6)))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "sampler.npz"
    ds.export(sampler(True), path, shape=(3,), cond={"shift": np.zeros(1, np.float32)})
    return path


def test_the_same_samples_for_any_batch(file):
    loaded, own = ds.load_exported(file), sampler(True)
    assert (loaded.shape, loaded.nfe, loaded.dtype) == ((3,), 6, "float32")
    assert loaded.platforms == ("cpu", "cuda", "tpu")
    key = jax.random.key(4)
    for batch in (1, 2, 7):
        cond = {"shift": jnp.linspace(0, 1, batch)}
        x_T = jax.random.normal(jax.random.key(batch), (batch, 3))
        want = own(key, x_T, cond=cond)
        np.testing.assert_allclose(loaded(key, x_T, cond=cond), want, rtol=1e-5, atol=1e-4)
        # drawn here: the starts and the noise of ds.Sampler
        want = own(key, (batch, 3), cond=cond)
        np.testing.assert_allclose(loaded(key, batch, cond=cond), want, rtol=1e-5, atol=1e-4)


def test_it_runs_where_the_models_code_is_not(file):
    """Another process, which never sees `apply`; flax is not even importable."""
    code = textwrap.dedent(
        """
        import sys
        sys.modules["flax"] = None
        import jax
        jax.config.update("jax_platforms", "cpu")
        import diffsamp as ds
        loaded = ds.load_exported(sys.argv[1])
        x = loaded(jax.random.key(4), 2, cond={"shift": [0.0, 1.0]})
        print(x.tolist())
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)],
        capture_output=True,
        text=True,
        check=False,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr
    want = sampler(True)(jax.random.key(4), (2, 3), cond={"shift": jnp.array([0.0, 1.0])})
    np.testing.assert_allclose(np.array(eval(done.stdout)), want, rtol=1e-5, atol=1e-4)


def test_weights_are_no_constants_of_the_program(tmp_path):
    """The program's size does not grow with the network's."""
    sizes = {}
    for width in (4, 400):
        score_fn = ds.ScoreFn(lambda p, x, t: x @ p @ p.T, jnp.ones((3, width)), PROCESS)
        made = ds.Sampler(score_fn, ds.solvers.ddim(PROCESS, [1.0, 0.5, 0.0]))
        path = tmp_path / f"{width}.npz"
        ds.export(made, path, shape=(3,), platforms=("cpu",))
        with np.load(path, allow_pickle=False) as arrays:
            sizes[width] = len(arrays["program"])
    assert sizes[400] < 1.2 * sizes[4]


def test_bfloat16_weights(tmp_path):
    made = sampler(dtype=jnp.bfloat16)
    ds.export(made, tmp_path / "s", shape=(3,), cond={"shift": np.zeros(2, np.float32)})
    loaded = ds.load_exported(tmp_path / "s")
    cond = {"shift": jnp.zeros(5)}
    np.testing.assert_allclose(
        loaded(jax.random.key(0), 5, cond=cond),
        made(jax.random.key(0), (5, 3), cond=cond),
        atol=2e-2,
    )


def test_errors(file, tmp_path):
    loaded, key = ds.load_exported(file), jax.random.key(0)
    shift = {"shift": jnp.zeros(2)}
    for call, message in (
        (lambda: loaded(key, jnp.zeros((2, 4)), cond=shift), r"`x_T` must have shape \(batch, 3\)"),
        (lambda: loaded(key, (2, 4), cond=shift), r"`x_T` must have shape \(batch, 3\)"),
        (lambda: loaded(key, jnp.zeros((0, 3)), cond=shift), "a batch of at least 1"),
        (
            lambda: loaded(jax.random.key(0, impl="rbg"), 2, cond=shift),
            "of the kind 'threefry2x32'",
        ),
        (lambda: loaded(key, 2), r"`cond` must hold \['shift'\]; got \[\]"),
        (lambda: loaded(key, 3, cond=shift), r"must have shape \(3,\); got \(2,\)"),
        (lambda: loaded(key, 0, cond=shift), "`x_T` must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="`x_T` must be of dtype float32; got complex64"):
        loaded(key, jnp.zeros((2, 3), jnp.complex64), cond=shift)
    np.testing.assert_array_equal(loaded(key, (2, 3), cond=shift), loaded(key, 2, cond=shift))
    assert len(repr(loaded)) < 300

    whole = dict(np.load(file, allow_pickle=False))

    def saved(**changes):
        buffer = io.BytesIO()
        np.savez(buffer, **{k: v for k, v in {**whole, **changes}.items() if v is not None})
        return buffer.getvalue()

    single = io.BytesIO()
    np.save(single, np.zeros(3))
    text = np.frombuffer(b"[1]", np.uint8)
    for content in (
        b"",
        b"PK\x03\x04 no zip",
        b"{}",
        single.getvalue(),
        file.read_bytes()[:-30],
        saved(meta=None),
        saved(meta=text),
        saved(program=text),
        saved(prior=None),
        saved(weight_0=text),
        saved(weight_0=None),
    ):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad is (not an exported sampler|corrupt)"):
            ds.load_exported(tmp_path / "bad")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        ds.load_exported(tmp_path / "none")
    alone = ds.ScoreFn(lambda p, x, t: x, 1.0, PROCESS, batched=False)
    with pytest.raises(ValueError, match="needs a network with a batch axis"):
        ds.export(
            ds.Sampler(alone, ds.solvers.ddim(PROCESS, [1.0, 0.0])), tmp_path / "f", shape=(3,)
        )
    fixed = ds.ScoreFn(lambda p, x, t: x.reshape(4, -1).reshape(x.shape), 1.0, PROCESS)
    with pytest.raises(ValueError, match="depends on the batch size"):
        ds.export(
            ds.Sampler(fixed, ds.solvers.ddim(PROCESS, [1.0, 0.0])), tmp_path / "f", shape=(3,)
        )


def test_code_that_asks_for_the_batch_size(tmp_path):
    """As modules of PyTorch do; noise and conditions are each sample's own."""

    def looping(params, x, t, shift):
        rows = [params * jnp.tanh(x[i]) * t[i] + shift[i] for i in range(x.shape[0])]
        return jnp.stack(rows)

    tableau = ds.solvers.ddpm(PROCESS, ds.schedules.uniform(PROCESS, 4))
    made = ds.Sampler(ds.ScoreFn(looping, jnp.asarray(0.4), PROCESS), tableau)
    cond = {"shift": np.linspace(-1, 1, 5, dtype=np.float32)[:, None]}
    ds.export(made, tmp_path / "s", shape=(3,), cond=cond, platforms=("cpu",))
    loaded = ds.load_exported(tmp_path / "s")
    for n in (1, 5):
        few = {"shift": cond["shift"][:n]}
        x_T = np.asarray(jax.random.normal(jax.random.key(1), (n, 3)))
        want = made(jax.random.key(2), x_T, cond=few)
        np.testing.assert_allclose(loaded(jax.random.key(2), x_T, cond=few), want, rtol=1e-5)


def test_bad_arguments_of_export(tmp_path):
    made, path = sampler(), tmp_path / "s"
    cond = {"shift": np.zeros(1, np.float32)}
    for options, kind, message in (
        ({"platforms": "cpu"}, ValueError, r"`platforms` must be some of .*; got 'cpu'"),
        ({"platforms": ("gpu",)}, ValueError, "`platforms` must be some of"),
        ({"platforms": ()}, ValueError, "`platforms` must be some of"),
        ({"dtype": jnp.int32}, TypeError, "`dtype` must be floating; got int32"),
        ({"cond": {"shift": 3.0}}, ValueError, r"cond\['shift'\] must be an array with"),
        ({"cond": {"shift": {"a": 1}}}, ValueError, r"cond\['shift'\] must be an array"),
        ({"path": tmp_path}, IsADirectoryError, "is a folder"),
        ({"path": tmp_path / "no" / "s"}, FileNotFoundError, "the folder of `path` does not exist"),
        ({"sampler": made.score_fn}, TypeError, "`sampler` must be a diffsamp.Sampler"),
    ):
        with pytest.raises(kind, match=message):
            ds.export(**{"sampler": made, "path": path, "shape": (3,), "cond": cond, **options})

    def calling(params, x, t):
        return jax.pure_callback(lambda x: x, x, x)

    closed = ds.Sampler(ds.ScoreFn(calling, 1.0, PROCESS), ds.solvers.ddim(PROCESS, [1.0, 0.0]))
    with pytest.raises(ValueError, match="cannot be exported"):
        ds.export(closed, path, shape=(3,))
    assert not list(tmp_path.iterdir())


def test_transforms_are_exported_with_their_keys(tmp_path):
    network = ds.ScoreFn(lambda p, x, t: (p * x, 0.0 * x), jnp.asarray(0.1), PROCESS)
    tableau = ds.solvers.ddpm(PROCESS, ds.schedules.uniform(PROCESS, 5), variance="learned")
    ranged = ds.guidance.learned_range(network, tableau, jax.random.key(7))
    made = ds.Sampler(ranged, tableau)
    ds.export(made, tmp_path / "s", shape=(3,), platforms=("cpu",))
    loaded, key = ds.load_exported(tmp_path / "s"), jax.random.key(1)
    np.testing.assert_allclose(loaded(key, 4), made(key, (4, 3)), rtol=1e-5, atol=1e-5)
