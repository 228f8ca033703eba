"""Large jobs: the same set however it is cut, stopped, spread or stored."""

import dataclasses
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
from diffsamp._core.sharding import on_mesh
from diffsamp.jobs import generate as _generate

PROCESS = ds.processes.vp_linear()
TARGET = ds.targets.gaussian_mixture([0.5, 0.5], [[-1.0, 0.5], [1.0, -0.5]], [0.05, 0.1])
SCORE_FN = TARGET.score_fn(PROCESS, "noise")
TABLEAU = ds.solvers.ddpm(PROCESS, ds.schedules.logsnr(PROCESS, 5))
EULER = ds.solvers.ddim(PROCESS, ds.schedules.logsnr(PROCESS, 5))
KEY = jax.random.key(3)


def make(out, n=22, **options):
    options = {
        "score_fn": SCORE_FN,
        "tableau": TABLEAU,
        "key": KEY,
        "shape": (2,),
        "batch": 8,
        "progress": False,
        **options,
    }
    return ds.generate(n=n, out=out, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make(tmp_path_factory.mktemp("whole")).load()["x"]


def test_a_set_is_the_same_however_it_is_made(whole, tmp_path):
    assert whole.shape == (22, 2)
    seen = []
    again = make(tmp_path / "a", batch=5, progress=lambda *told: seen.append(told))
    np.testing.assert_allclose(again.load()["x"], whole, atol=1e-5)
    assert [done for _, done, _ in seen] == [0, 5, 10, 15, 20, 22]
    assert seen[-1] == ("generating", 22, 22)
    assert [shard.first for shard in again.shards] == [0, 5, 10, 15, 20]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("batch",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    sharded = make(tmp_path / "b", sharding=spread, format="safetensors")
    np.testing.assert_allclose(sharded.load()["x"], whole, atol=1e-5)
    assert sharded.shards[0].file.endswith(".safetensors")
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


def test_a_job_goes_on_with_other_processes(whole, tmp_path):
    """What others have drawn is not drawn again, and every manifest keeps what it knew."""
    make(tmp_path, processes=(1, 3))
    made = {p: p.stat().st_mtime_ns for p in tmp_path.glob("samples-*")}
    assert len(made) == 1
    assert make(tmp_path, processes=(0, 2)).shards[0].first == 0
    alone = make(tmp_path)
    assert all(p.stat().st_mtime_ns == when for p, when in made.items())
    np.testing.assert_allclose(alone.load()["x"], whole, atol=1e-5)
    for other in tmp_path.glob("manifest-[1-9].json"):
        other.unlink()
    assert ds.Generated.open(tmp_path).complete
    make(tmp_path, processes=(0, 2))
    assert ds.Generated.open(tmp_path).complete


def test_a_conditional_job(tmp_path):
    network = ds.ScoreFn(
        lambda p, x, t, label: x * 0 + label[:, None].astype(x.dtype),
        1.0,
        PROCESS,
        prediction="data",
    )
    tableau = ds.solvers.ddim(PROCESS, [1.0, 0.5, 0.0])
    job = {"score_fn": network, "tableau": tableau, "cond": lambda i: {"label": i % 5}}
    make(tmp_path, n=4, **job)  # less than a batch
    make(tmp_path, n=9, **job)
    made = make(tmp_path, **job)
    np.testing.assert_allclose(made.load()["x"][:, 0], np.arange(22) % 5, atol=1e-6)
    with pytest.raises(ValueError, match="holds another job: labels differ"):
        make(tmp_path, **{**job, "cond": lambda i: {"label": i % 3}})
    with pytest.raises(ValueError, match=r"holds another job: cond.* differ"):
        make(tmp_path, **{**job, "cond": lambda i: {"label": np.float32(i)}})


def test_a_decoder_with_weights(tmp_path):
    decode = jax.tree_util.Partial(lambda weights, x: x @ weights, jnp.ones((2, 3)))
    made = make(tmp_path / "a", finish=decode, sharding=spread(2)).load()["x"]
    plain = make(tmp_path / "b").load()["x"]
    np.testing.assert_allclose(made, plain @ np.ones((2, 3), np.float32), atol=1e-5)


def test_more_samples_later(whole, tmp_path):
    make(tmp_path, n=11)
    assert not (tmp_path / "samples-000002.npz").exists()
    more = make(tmp_path)  # the second file held 3 samples, and is filled up
    np.testing.assert_allclose(more.load()["x"], whole, atol=1e-5)
    assert ds.Generated.open(tmp_path).n == 22
    with pytest.raises(ValueError, match=r"holds a job of n = 22 samples; got n = 11"):
        make(tmp_path, n=11)


def test_processes_must_agree(tmp_path):
    make(tmp_path, n=16, processes=(0, 2))
    for options in ({"batch": 4}, {"key": jax.random.key(4)}):
        with pytest.raises(ValueError, match=r"holds another job"):
            make(tmp_path, n=16, processes=(1, 2), **options)
    # two that started at once, and did not see each other
    make(tmp_path / "other", n=16, processes=(1, 2), key=jax.random.key(4))
    os.replace(tmp_path / "other" / "manifest-1.json", tmp_path / "manifest-1.json")
    with pytest.raises(ValueError, match=r"different jobs: key differ in manifest-1.json"):
        ds.Generated.open(tmp_path)


def test_another_network_is_another_job(tmp_path):
    network = ds.ScoreFn(lambda p, x, t: p["w"] * x, {"w": jnp.ones(())}, PROCESS)
    made = make(tmp_path, score_fn=network)
    assert make(tmp_path, score_fn=network).shards == made.shards
    for other in (
        dataclasses.replace(network, params={"w": jnp.full((), 1.001)}),
        dataclasses.replace(network, prediction="v"),
        dataclasses.replace(network, process=ds.processes.vp_linear(beta_max=19.0)),
        ds.guidance.static_thresholding(network),
    ):
        with pytest.raises(ValueError, match="holds another job: network differ"):
            make(tmp_path, score_fn=other)
    with pytest.raises(ValueError, match="holds another job: arrays differ"):
        make(tmp_path, score_fn=network, finish=lambda x: x.astype(jnp.float16))


def test_noise_of_a_learned_range_does_not_depend_on_the_batch(tmp_path):
    network = ds.ScoreFn(lambda p, x, t: (p * x, 0.0 * x), 0.1, PROCESS, prediction="noise")
    times = ds.schedules.uniform(PROCESS, 5)
    tableau = ds.solvers.ddpm(PROCESS, times, variance="learned")
    ranged = ds.guidance.learned_range(network, tableau, jax.random.key(7))
    sets = [
        make(tmp_path / str(batch), 12, score_fn=ranged, tableau=tableau, batch=batch).load()["x"]
        for batch in (12, 4)
    ]
    np.testing.assert_allclose(*sets, rtol=1e-5)
    x_T = jnp.zeros((8, 2))
    whole = ds.sample(ranged, tableau, x_T)
    np.testing.assert_allclose(ds.search.run(ranged, tableau, x_T, batch=4), whole, rtol=1e-5)
    assert len(np.unique(whole)) == whole.size
    own = dataclasses.replace(ranged, key=jax.random.split(jax.random.key(1), 8))
    np.testing.assert_allclose(
        ds.search.run(own, tableau, x_T, batch=4), ds.sample(own, tableau, x_T), rtol=1e-5
    )


def test_samples_that_are_not_finite_are_counted(tmp_path):
    def apply(params, x, t, label):
        return jnp.where(label[:, None] == 3, jnp.nan, x)

    with pytest.warns(RuntimeWarning, match=r"1 of 8 samples hold NaN or inf"):
        made = make(
            tmp_path,
            score_fn=ds.ScoreFn(apply, 1.0, PROCESS),
            finish=lambda x: jnp.nan_to_num(x),
            cond=lambda numbers: {"label": numbers},
        )
    assert made.not_finite == ds.Generated.open(tmp_path).not_finite == 1
    assert [shard.not_finite for shard in made.shards] == [1, 0, 0]
    assert made.complete


def test_at_most_two_batches_are_on_the_way(tmp_path):
    """One being written while the next is sampled: that much is lost by a kill."""
    asked, written = [], []

    def cond(numbers):
        asked.append(int(numbers[0]))
        return {"label": jnp.asarray(numbers)}

    def progress(what, done, total):
        written.append((done // 4, len(asked) - 1))  # the first was asked for to compare jobs

    network = ds.ScoreFn(lambda p, x, t, label: x, 1.0, PROCESS)
    make(tmp_path, n=40, batch=4, score_fn=network, cond=cond, progress=progress)
    assert len(written) == 11
    assert all(sampled - done <= 2 for done, sampled in written)


def test_weights_are_moved_to_the_mesh_once(whole, tmp_path):
    """The second batch copies nothing between devices."""
    network = ds.ScoreFn(
        lambda p, x, t: x @ p["w"], {"w": jax.device_put(jnp.eye(2), jax.devices()[0])}, PROCESS
    )
    spread = jax.sharding.NamedSharding(
        jax.sharding.Mesh(np.array(jax.devices()[:2]), ("batch",)),
        jax.sharding.PartitionSpec("batch"),
    )
    moved = on_mesh(network, spread)
    assert moved.params["w"].sharding.device_set == spread.device_set
    assert on_mesh(moved, spread).params["w"] is moved.params["w"]
    x_T = jax.device_put(jnp.ones((4, 2)), spread)
    run = jax.jit(lambda f, x: ds.sample(f, ds.solvers.ddim(PROCESS, [1.0, 0.5, 0.1]), x))
    run(moved, x_T)
    with jax.transfer_guard_device_to_device("disallow"):
        run(moved, x_T)
    alone = make(tmp_path / "a", score_fn=network).load()["x"]
    np.testing.assert_allclose(
        make(tmp_path / "b", score_fn=network, sharding=spread).load()["x"], alone, rtol=1e-5
    )


def test_conditions_and_finishing(tmp_path):
    def apply(params, x, t, label):
        return x * 0 + label[:, None].astype(x.dtype)

    network = ds.ScoreFn(apply, 1.0, PROCESS, prediction="data")
    made = ds.generate(
        network,
        ds.solvers.ddim(PROCESS, [1.0, 0.5, 0.0]),
        11,
        tmp_path,
        key=KEY,
        shape=(2,),
        batch=4,
        cond=lambda numbers: {"label": jnp.asarray(numbers % 3)},
        finish=lambda x: {"image": jnp.round(x).astype(jnp.uint8)},
    )
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
    from diffsamp._core import files as _files

    real, written = os.fsync, []

    def fsync(handle):  # in the middle of writing a file
        written.append(handle)
        if len(written) == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        real(handle)

    _files.os.fsync = fsync

    ds.generate(target.score_fn(process, "noise"),
                ds.solvers.ddpm(process, ds.schedules.logsnr(process, 5)), 22, sys.argv[1],
                key=jax.random.key(3), shape=(2,), batch=8)
    """
)


def test_killed_and_started_again(whole, tmp_path):
    """kill -9 while a file is written: the next run draws what is missing, no more."""

    def run(stop):
        return subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path), str(stop)],
            capture_output=True,
            text=True,
            check=False,
            timeout=3600,
        )

    assert run(3).returncode == -signal.SIGKILL  # a file, its manifest, and then the second file
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("samples-*")}
    assert list(before) == ["samples-000000.npz"]
    assert len(list(tmp_path.glob(".samples-000001.npz.*"))) == 1
    assert run(2).returncode == -signal.SIGKILL  # the second file, but not its manifest
    second = run(-1)
    assert second.returncode == 0, second.stderr
    after = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("samples-*")}
    assert after["samples-000000.npz"] == before["samples-000000.npz"]  # not drawn again
    made = ds.Generated.open(tmp_path)
    np.testing.assert_allclose(made.load()["x"], whole, atol=1e-5)
    assert not list(tmp_path.glob(".*"))  # no temporary file stayed


def test_a_lost_or_short_file_is_drawn_again(whole, tmp_path):
    make(tmp_path)
    one, two = (tmp_path / f"samples-00000{i}.npz" for i in (1, 2))
    one.unlink()
    two.write_bytes(two.read_bytes()[:-10])
    left = ds.Generated.open(tmp_path)
    assert not left.complete
    assert [shard.first for shard in left.shards] == [0]
    np.testing.assert_allclose(make(tmp_path).load()["x"], whole, atol=1e-5)
    content = bytearray(one.read_bytes())
    content[len(content) // 2] ^= 255
    one.write_bytes(content)
    with pytest.raises(ValueError, match=r"samples-000001.npz is corrupt .* Delete it and run"):
        make(tmp_path).load()


def test_a_full_disk_loses_nothing(whole, tmp_path, monkeypatch):
    real, calls = _generate.write_atomically, []

    def full(path, content):
        calls.append(path)
        if len(calls) >= 3:  # file, manifest, file
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, content)

    monkeypatch.setattr(_generate, "write_atomically", full)
    with pytest.raises(OSError, match=r"cannot write .No space left on device.; what was finished"):
        make(tmp_path)
    monkeypatch.undo()
    made = ds.Generated.open(tmp_path)
    assert [shard[:3] for shard in made.shards] == [("samples-000000.npz", 0, 8)]
    np.testing.assert_allclose(make(tmp_path).load()["x"], whole, atol=1e-5)


def test_errors(tmp_path):
    make(tmp_path / "a", n=4)
    for options, message in (
        ({"key": jax.random.key(9)}, "holds another job: key differ"),
        ({"batch": 4}, "holds another job: batch differ"),
        ({"tableau": EULER}, "holds another job: tableau differ"),
        ({"batch": 0}, "`batch` must be at least 1"),
        ({"format": "pt"}, "`format` must be one of 'npz', 'safetensors'"),
        ({"key": None}, "draws the starts: pass `key`"),
        ({"key": jax.random.split(KEY, 3)}, r"must be one key, .*; got \(3,\) keys"),
        ({"processes": (2, 2)}, "with index < count"),
        ({"shape": (-2,)}, "`shape` must be at least 1"),
        ({"cond": lambda i: {"label": jnp.zeros(3)}}, r"one entry per sample, 8; got shape \(3,\)"),
        ({"finish": lambda x: x[:3]}, r"must keep the batch axis .* 'x' has shape \(3, 2\)"),
        ({"finish": jnp.mean}, r"must keep the batch axis"),
        ({"finish": lambda x: {}}, "names of their own"),
        ({"finish": lambda x: {"a": {"b": x}, "a/b": x}}, "names of their own"),
        ({"finish": lambda x: x.astype(jnp.bfloat16)}, "'x' as bfloat16, which .* does not hold"),
        ({"sharding": spread(2), "batch": 7}, r"`batch` = 7 must divide among the 2 .*; take 6"),
        ({"tableau": ds.Tableau.stack([TABLEAU] * 8)}, "takes one tableau for all samples"),
    ):
        with pytest.raises(ValueError, match=message):
            make(tmp_path / "a", **{"n": 4, **options})
    for options, message in (
        ({"score_fn": lambda x: x}, "`score_fn` must be a diffsamp.ScoreFn"),
        ({"tableau": "ddim"}, "`tableau` must be a diffsamp.Tableau"),
        ({"key": 0}, "`key` must be a JAX random key"),
        ({"shape": 2}, "`shape` must be a tuple"),
        ({"processes": 2}, r"`processes` must be \(index, count\)"),
        ({"cond": lambda i: jnp.zeros(8)}, "`cond` must be keyword arguments"),
        ({"sharding": jax.devices()[0]}, "must be a jax.sharding.NamedSharding"),
    ):
        with pytest.raises(TypeError, match=message):
            make(tmp_path / "a", **{"n": 4, **options})
    made = make(
        tmp_path / "b",
        n=np.int64(4),
        batch=np.int64(4),
        shape=[np.int64(2)],
        finish=lambda x: {"file": x},
    )
    assert made.load()["file"].shape == (4, 2)
    with pytest.raises(FileNotFoundError, match="holds no manifest"):
        ds.Generated.open(tmp_path)
    manifest = tmp_path / "a" / "manifest-0.json"
    text = manifest.read_text()
    for content, message in (
        ("{", "is corrupt: not JSON"),
        ("[]", "is no manifest"),
        (json.dumps({**json.loads(text), "version": 9}), "has version 9; this diffsamp reads"),
        (json.dumps({**json.loads(text), "shards": [["x"]]}), "is corrupt .* Delete it"),
        (text.replace("samples-000000", "../samples-000000"), "is corrupt .* Delete it"),
        (json.dumps({**json.loads(text), "settings": {}}), "is corrupt .* Delete it"),
    ):
        manifest.write_text(content)
        with pytest.raises(ValueError, match=message):
            ds.Generated.open(tmp_path / "a")
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match="cannot be written as a folder"):
        make(blocked)
    with pytest.raises(OSError, match="cannot be written as a folder"):
        make(blocked / "out")


def spread(count):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), ("batch",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))


def test_a_call_that_failed_leaves_nothing(whole, tmp_path):
    network = ds.ScoreFn(lambda p, x, t: x @ p, jnp.eye(2), PROCESS)
    with pytest.raises(TypeError, match="dot"):
        make(tmp_path, score_fn=network, shape=(5,))
    assert not list(tmp_path.iterdir())
    np.testing.assert_allclose(make(tmp_path).load()["x"], whole, atol=1e-5)


def test_a_bar_is_shown(tmp_path, capsys):
    make(tmp_path, progress=True)
    shown = capsys.readouterr().err
    assert "generating" in shown
    assert "/22" in shown


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
    job = dict(key=jax.random.key(3), shape=(2,), batch=8)
    ds.generate(score_fn, tableau, 22, sys.argv[3], **job)
    try:
        ds.generate(score_fn, tableau, 22, sys.argv[3], sharding=spread, **job)
    except ValueError as error:
        assert "devices of other processes" in str(error), error
    else:
        raise AssertionError("a mesh over processes was taken")
    # a search over all of them: its numbers are the same in every process
    starts = np.asarray(process.prior_sample(jax.random.key(5), (24, 2)))
    everyone = jax.make_array_from_callback((24, 2), spread, lambda at: starts[at])
    found = ds.search.compare(
        score_fn, everyone, nfe=[4], solver=["ddim", "dpmpp_2m"], batch=8, sharding=spread)
    front = ds.search.best(
        score_fn, everyone, nfe=[4], key=jax.random.key(0), solver=["ddim", "dpmpp_2m"],
        schedule=["logsnr"], stages=("compare", "distill"), steps=80, batch=8, sharding=spread)
    scores = front.plans[4].psnr["held_out"]
    assert scores["found"] > scores["start"] + 1, scores
    print([round(v, 3) for v in (*scores.values(), *(entry.psnr for entry in found.entries))])
    try:
        ds.search.best(score_fn, everyone, nfe=[4], key=jax.random.key(0), state=sys.argv[3])
    except ValueError as error:
        assert "for a search by one process" in str(error), error
    print("ok")
    """
)


@pytest.mark.long
def test_jax_distributed(whole, tmp_path):
    """Two processes on loopback: one sharded batch, and one job between them."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", DISTRIBUTED, port, str(i), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in (0, 1)
    ]
    said = []
    try:
        for process in started:
            out, err = process.communicate(timeout=3600)
            assert out.strip().endswith("ok"), err[-3000:]
            said.append(out.splitlines()[-2])
    finally:  # one that waits for a process that failed would stay, and warn when it is collected
        for process in started:
            process.kill()
            process.communicate()
    assert said[0] == said[1]
    assert said[0].startswith("[")
    made = ds.Generated.open(tmp_path)
    assert made.complete
    np.testing.assert_allclose(made.load()["x"], whole, atol=1e-5)


def test_a_flipped_byte_is_found_and_drawn_again(tmp_path):
    process = ds.processes.flow()
    network = ds.ScoreFn(lambda params, x, t: x, {}, process, prediction="velocity")
    tableau = ds.solvers.ddim(process, ds.schedules.uniform(process, 2))
    job = {"key": jax.random.key(0), "shape": (3,), "batch": 4, "progress": False}
    made = ds.generate(network, tableau, 12, tmp_path, **job)
    want = made.load()["x"]
    assert made.verify() == ()
    file = tmp_path / made.shards[1].file
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    opened = ds.Generated.open(tmp_path)  # without the arguments of the job
    assert opened.verify() == (made.shards[1],)
    again = ds.generate(network, tableau, 12, tmp_path, verify=True, **job)
    assert again.verify() == ()
    assert np.array_equal(again.load()["x"], want)
    file.write_bytes(content)
    assert opened.verify(remove=True) == (made.shards[1],)
    half = ds.Generated.open(tmp_path)
    assert not half.complete
    assert [len(part["x"]) for part in half] == [4, 4]
    assert ds.generate(network, tableau, 12, tmp_path, **job).complete


def test_a_folder_without_checksums_is_read(tmp_path):
    process = ds.processes.flow()
    network = ds.ScoreFn(lambda params, x, t: x, {}, process, prediction="velocity")
    tableau = ds.solvers.ddim(process, ds.schedules.uniform(process, 2))
    job = {"key": jax.random.key(0), "shape": (3,), "batch": 4, "progress": False}
    made = ds.generate(network, tableau, 4, tmp_path, **job)
    manifest = tmp_path / "manifest-0.json"
    data = json.loads(manifest.read_text())
    data["version"] = 2
    data["shards"] = [row[:5] for row in data["shards"]]
    manifest.write_text(json.dumps(data))
    old = ds.Generated.open(tmp_path)
    assert old.verify() == ()
    (tmp_path / made.shards[0].file).write_bytes(b"PK" + bytes(made.shards[0].size - 2))
    assert old.verify() == old.shards
