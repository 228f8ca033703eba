"""Large jobs: the same set however it is cut, stopped, spread or stored."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsamp as ds
from diffsamp import _generate

PROCESS = ds.processes.vp_linear()
TARGET = ds.targets.gaussian_mixture([0.5, 0.5], [[-1.0, 0.5], [1.0, -0.5]], [0.05, 0.1])
SCORE_FN = TARGET.score_fn(PROCESS, "noise")
TABLEAU = ds.solvers.ddpm(PROCESS, ds.schedules.logsnr(PROCESS, 5))
KEY = jax.random.key(3)


def make(out, n=22, **options):
    options = {"key": KEY, "shape": (2,), "batch": 8, **options}
    return ds.generate(SCORE_FN, TABLEAU, n, out, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make(tmp_path_factory.mktemp("whole")).load()["x"]


def test_a_set_is_the_same_however_it_is_made(whole, tmp_path):
    assert whole.shape == (22, 2)
    seen = []
    again = make(tmp_path / "a", batch=5, progress=lambda *told: seen.append(told))
    np.testing.assert_allclose(again.load()["x"], whole, atol=1e-5)
    assert seen[-1] == ("generating", 22, 22)
    assert [first for _, first, _ in again.shards] == [0, 5, 10, 15, 20]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("batch",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    sharded = make(tmp_path / "b", sharding=spread, format="safetensors")
    np.testing.assert_allclose(sharded.load()["x"], whole, atol=1e-5)
    assert sharded.shards[0][0].endswith(".safetensors")
    # sample 9 alone, from its own key
    pair = jax.random.split(jax.random.fold_in(KEY, 9))
    x_T = PROCESS.prior_sample(pair[:1], (1, 2))
    alone = ds.sample(SCORE_FN, TABLEAU, x_T, key=pair[1:])
    np.testing.assert_allclose(alone[0], whole[9], atol=1e-5)
    assert np.std(whole) > 0.3


def test_two_processes_share_the_work(whole, tmp_path):
    first = make(tmp_path, processes=(0, 2))
    assert not first.complete
    with pytest.raises(ValueError, match=r"holds 14 of 22 samples; run `generate` again"):
        first.load()
    second = make(tmp_path, processes=(1, 2))
    assert second.complete
    np.testing.assert_allclose(second.load()["x"], whole, atol=1e-5)


def test_conditions_and_finishing(tmp_path):
    def apply(params, x, t, label):
        return x * 0 + label[:, None].astype(x.dtype)

    network = ds.ScoreFn(apply, 1.0, PROCESS, prediction="data")
    made = ds.generate(
        network, ds.solvers.ddim(PROCESS, [1.0, 0.5, 0.0]), 11, tmp_path, key=KEY, shape=(2,),
        batch=4, cond=lambda numbers: {"label": jnp.asarray(numbers % 3)},
        finish=lambda x: {"image": jnp.round(x).astype(jnp.uint8)},
    )  # fmt: skip
    loaded = made.load()
    assert loaded["image"].dtype == np.uint8
    np.testing.assert_array_equal(loaded["image"][:, 0], np.arange(11) % 3)


SCRIPT = textwrap.dedent(
    """
    import os, signal, sys
    import jax
    jax.config.update("jax_platforms", "cpu")
    import diffsamp as ds
    process = ds.processes.vp_linear()
    target = ds.targets.gaussian_mixture([0.5, 0.5], [[-1.0, 0.5], [1.0, -0.5]], [0.05, 0.1])
    told = []

    def progress(what, done, total):
        told.append(done)
        if len(told) == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

    ds.generate(target.score_fn(process, "noise"),
                ds.solvers.ddpm(process, ds.schedules.logsnr(process, 5)), 22, sys.argv[1],
                key=jax.random.key(3), shape=(2,), batch=8, progress=progress)
    print(told)
    """
)


def test_killed_and_started_again(whole, tmp_path):
    """kill -9 after the first file: the second run draws the others, and the set is the same."""

    def run(stop):
        return subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path), str(stop)],
                              capture_output=True, text=True, check=False, timeout=120)  # fmt: skip

    assert run(1).returncode == -signal.SIGKILL
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("samples-*")}
    assert "samples-000000.npz" in before
    assert len(before) < 3
    second = run(-1)
    assert second.returncode == 0, second.stderr
    after = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("samples-*")}
    assert after["samples-000000.npz"] == before["samples-000000.npz"]  # not drawn again
    made = ds.Generated.open(tmp_path)
    np.testing.assert_allclose(made.load()["x"], whole, atol=1e-5)
    assert not list(tmp_path.glob(".*"))  # no temporary file stayed


def test_a_lost_file_is_drawn_again(whole, tmp_path):
    make(tmp_path)
    (tmp_path / "samples-000001.npz").unlink()
    np.testing.assert_allclose(make(tmp_path).load()["x"], whole, atol=1e-5)


def test_a_full_disk_loses_nothing(whole, tmp_path, monkeypatch):
    real, calls = _generate.write_atomically, []

    def full(path, content):
        calls.append(path)
        if len(calls) == 4:  # manifest, file, manifest, file
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, content)

    monkeypatch.setattr(_generate, "write_atomically", full)
    with pytest.raises(OSError, match=r"cannot write .No space left on device.; what was finished"):
        make(tmp_path)
    monkeypatch.undo()
    made = ds.Generated.open(tmp_path)
    assert made.shards == (("samples-000000.npz", 0, 8),)
    np.testing.assert_allclose(make(tmp_path).load()["x"], whole, atol=1e-5)


def test_errors(tmp_path):
    make(tmp_path / "a", n=4)
    for options, message in (
        ({"key": jax.random.key(9)}, "holds another job: key differ"),
        ({"batch": 4}, "holds another job: batch differ"),
        ({"batch": 0}, "`batch` must be at least 1"),
        ({"format": "pt"}, "`format` must be one of 'npz', 'safetensors'"),
        ({"key": None}, "needs a random key"),
        ({"processes": (2, 2)}, "with index < count"),
    ):
        with pytest.raises(ValueError, match=message):
            make(tmp_path / "a", n=4, **options)
    with pytest.raises(FileNotFoundError, match="holds no manifest"):
        ds.Generated.open(tmp_path)
    manifest = tmp_path / "a" / "manifest-0.json"
    text = manifest.read_text()
    for content, message in (
        ("{", "is corrupt: not JSON"),
        ("[]", "is no manifest"),
        (json.dumps({**json.loads(text), "version": 9}), "has version 9; this diffsamp reads"),
    ):
        manifest.write_text(content)
        with pytest.raises(ValueError, match=message):
            ds.Generated.open(tmp_path / "a")
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match="file"):
        make(blocked / "out")


DISTRIBUTED = textwrap.dedent(
    """
    import sys
    import jax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
    import numpy as np
    import diffsamp as ds
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    assert jax.process_count() == 2 and len(jax.devices()) == 4
    process = ds.processes.vp_linear()
    target = ds.targets.gaussian_mixture([0.5, 0.5], [[-1.0, 0.5], [1.0, -0.5]], [0.05, 0.1])
    score_fn = target.score_fn(process, "noise")
    tableau = ds.solvers.ddpm(process, ds.schedules.logsnr(process, 5))
    # one batch over all devices of both processes
    spread = NamedSharding(Mesh(np.array(jax.devices()), ("batch",)), PartitionSpec("batch"))
    start = np.asarray(process.prior_sample(jax.random.key(0), (8, 2)))
    keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(1), 8)))

    def everywhere(array):
        return jax.make_array_from_callback(array.shape, spread, lambda at: array[at])

    x = jax.jit(lambda f, t, x, k: ds.sample(f, t, x, key=jax.random.wrap_key_data(k)))(
        score_fn, tableau, everywhere(start), everywhere(keys))
    assert len(x.sharding.device_set) == 4
    own = ds.sample(score_fn, tableau, start, key=jax.random.wrap_key_data(keys))
    for shard in x.addressable_shards:
        np.testing.assert_allclose(shard.data, np.asarray(own)[shard.index], atol=1e-5)
    # and a job in which each writes its share
    ds.generate(score_fn, tableau, 22, sys.argv[3], key=jax.random.key(3), shape=(2,), batch=8)
    print("ok")
    """
)


def test_jax_distributed(whole, tmp_path):
    """Two processes on loopback: one sharded batch, and one job between them."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = [
        subprocess.Popen([sys.executable, "-c", DISTRIBUTED, port, str(i), str(tmp_path)],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in (0, 1)
    ]  # fmt: skip
    for process in started:
        out, err = process.communicate(timeout=180)
        assert out.strip().endswith("ok"), err[-3000:]
    made = ds.Generated.open(tmp_path)
    assert made.complete
    np.testing.assert_allclose(made.load()["x"], whole, atol=1e-5)
