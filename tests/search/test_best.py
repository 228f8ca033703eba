"""Plans and `best`: files, fronts, kill and resume at every stage, eight devices."""

import dataclasses
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
from diffsamp import search
from diffsamp._core.files import write_atomically
from diffsamp.search.fine import fine_tableau

PROCESS = ds.processes.edm(0.02, 20.0)
SMALL = {
    "nfe": (2, 4),
    "solver": ("ddim", "heun", "dpmpp_2m", "ipndm3"),
    "schedule": ("karras", "logsnr"),
    "population": 6,
    "rounds": 1,
    "steps": 12,
    "batch": 16,
    "screen": 16,
    "stages": search.STAGES,
}


@pytest.fixture(scope="module")
def score_fn():
    target = ds.targets.gaussian_mixture([0.4, 0.6], [[-1.0, 0.4], [0.8, 0.1]], [0.02, 0.1])
    return target.score_fn(PROCESS, "edm_f")


def start(n, seed=0):
    return PROCESS.prior_sample(jax.random.key(seed), (n, 2))


@pytest.fixture(scope="module")
def front(score_fn):
    return search.best(score_fn, start(48), key=jax.random.key(1), **SMALL)


def same(one, two):
    assert set(one.plans) == set(two.plans)
    assert one.discarded == two.discarded
    for n, plan in one.plans.items():
        other = two.plans[n]
        for name in ("times", "a", "b", "c"):
            np.testing.assert_array_equal(getattr(plan.tableau, name), getattr(other.tableau, name))
        assert plan.scores == other.scores
        assert plan.method == other.method


def test_best_returns_a_plan_per_budget(front, score_fn):
    assert list(front.plans) == [2, 4]
    for n, plan in front.plans.items():
        assert plan.nfe == plan.tableau.nfe == n
        assert plan.start.startswith("compare (")
        decided = plan.scores["log_mse"]["chosen_on"]
        assert decided["found"] <= decided["start"]
        # what it reports of noise that decided nothing is so
        x_T = start(48)
        reference = ds.sample(score_fn, fine_tableau(score_fn, None, 4), x_T)
        x = ds.sample(score_fn, plan.tableau, x_T[42:])
        want = float(ds.metrics.psnr(x, reference[42:]))
        assert plan.psnr["held_out"]["found"] == pytest.approx(want, abs=0.02)
        assert plan.seed == [0, 1]
        assert set(plan.versions) == {"diffsamp", "jax", "numpy"}
    four = front.plans[4]
    assert four.psnr["held_out"]["found"] > four.psnr["held_out"]["start"] + 1


def test_the_default_is_forward_evaluations_only(score_fn):
    """Least squares and Gauss-Newton steps, counted; an objective of one's own gets every stage."""
    calls = []
    front = search.best(
        score_fn, start(32), nfe=(3,), key=jax.random.key(1), progress=lambda *a: calls.append(a[0])
    )
    plan = front.plans[3]
    assert plan.settings["stages"] == ["regress", "refine"]
    assert plan.method.split(", ")[-1] in ("regress", "refine")
    assert plan.settings["evaluations"] > 1000
    assert plan.psnr["held_out"]["found"] > plan.psnr["held_out"]["start"] + 3
    assert not {"evolving", "distilling", "measuring steps"} & set(calls)


def test_the_front_is_monotone(front):
    values = [front.value(n) for n in front.pareto]
    assert values == sorted(values, reverse=True)
    assert front.within(3) is front.plans[2]
    assert front.within(100) is front.pareto[max(front.pareto)]
    with pytest.raises(ValueError, match="the cheapest plan makes 2 evaluations, not 1"):
        front.within(1)
    # a dearer plan that is no better is left out
    worse = dataclasses.replace(front.plans[4], tableau=front.plans[4].tableau)
    scores = json.loads(json.dumps(worse.scores))
    scores["log_mse"]["chosen_on"]["found"] = 9.0
    worse = dataclasses.replace(worse, scores=scores)
    poor = dataclasses.replace(front, plans={2: front.plans[2], 4: worse})
    assert list(poor.pareto) == [2]
    assert poor.within(4) is front.plans[2]


def test_a_saved_plan_gives_identical_samples(front, score_fn, tmp_path):
    plan = front.plans[4]
    paths = front.save(tmp_path / "made")
    assert [path.name for path in paths] == ["plan-2.json", "plan-4.json"]
    loaded = search.Plan.load(paths[1])
    assert loaded == dataclasses.replace(
        plan, tableau=loaded.tableau, settings=loaded.settings, scores=loaded.scores
    )
    assert loaded.scores == plan.scores
    x_T = start(8, 5)
    np.testing.assert_array_equal(
        ds.sample(score_fn, plan.tableau, x_T), ds.sample(score_fn, loaded.tableau, x_T)
    )
    text = paths[1].read_text()
    assert "NaN" not in text
    assert max(map(len, text.splitlines())) < 4000


def test_distills_history_survives_a_file(score_fn, tmp_path):
    """Its first loss is NaN: no step has been made."""
    first = ds.solvers.ddim(PROCESS, [20.0, 1.0, 0.0])
    plan = search.distill(score_fn, start(12), start=first, key=jax.random.key(0), steps=2, batch=4)
    plan.save(tmp_path / "p.json")
    loaded = search.Plan.load(tmp_path / "p.json")
    np.testing.assert_array_equal(np.array(loaded.history), np.array(plan.history))
    assert np.isnan(loaded.history[0][1])


def test_files_that_are_no_plans(front, tmp_path):
    path = tmp_path / "plan.json"
    good = front.plans[2].to_dict()
    for change, message in (
        ({"format": "x"}, "is not a diffsamp plan"),
        ({"version": 99}, "has version 99; this diffsamp reads versions 1 to 2"),
        ({"nfe": 7}, 'it says "nfe": 7, its tableau evaluates 2 times'),
        ({"scores": {"psnr": {"fit": {"found": "high"}}}}, "its scores must be numbers"),
        ({"scores": []}, "its scores must be numbers"),
        ({"history": [[1]]}, "its history must be triples"),
        ({"tableau": {**good["tableau"], "a": [[1.0]]}}, "the tableau of .* is corrupt"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=message):
            search.Plan.load(path)
    path.write_text(json.dumps({k: v for k, v in good.items() if k != "seed"}))
    with pytest.raises(ValueError, match="lacks 'seed'"):
        search.Plan.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is corrupt: not JSON"):
        search.Plan.load(path)


SCRIPT = textwrap.dedent(
    """
    import json, os, signal, sys
    import jax
    jax.config.update("jax_platforms", "cpu")
    import diffsamp as ds
    from diffsamp import search

    folder, when, count, options = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    process = ds.processes.edm(0.02, 20.0)
    target = ds.targets.gaussian_mixture([0.4, 0.6], [[-1.0, 0.4], [0.8, 0.1]], [0.02, 0.1])
    x_T = process.prior_sample(jax.random.key(0), (48, 2))
    seen = []

    def progress(what, done, total):
        seen.append(what)
        if what == when and done >= count:
            os.kill(os.getpid(), signal.SIGKILL)

    front = search.best(target.score_fn(process, "edm_f"), x_T, key=jax.random.key(1),
                        state=folder + "/state", progress=progress, **json.loads(options))
    front.save(folder + "/plans")
    print(json.dumps({"discarded": front.discarded, "seen": sorted(set(seen))}))
    """
)


@pytest.mark.long
def test_killed_in_every_stage_and_resumed(front, tmp_path):
    """kill -9 in every stage but refine: the same plans in the end."""

    def run(when, count=1):
        return subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path), when, str(count), json.dumps(SMALL)],
            capture_output=True,
            text=True,
            check=False,
            timeout=3600,
        )

    state = tmp_path / "state"
    fitted = {"compare", "dynamic", "regress-2", "regress-4", "refine-2", "refine-4"}
    expected = [
        ("comparing", 3, set()),
        ("measuring steps", 16, {"compare"}),
        ("moving times", 1, {"compare", "dynamic"}),
        ("evolving", 1, {*fitted, "evolve-2"}),
        ("distilling", 7, {*fitted, "evolve-2", "evolve-4"}),
    ]
    for when, count, finished in expected:
        assert run(when, count).returncode == -signal.SIGKILL
        assert {path.stem for path in state.glob("*.json")} == {"settings", "begun", *finished}
    last = run("never")
    assert last.returncode == 0, last.stderr
    told = json.loads(last.stdout)
    assert "comparing" not in told["seen"]  # finished stages are not repeated
    assert "measuring steps" not in told["seen"]
    plans = {n: search.Plan.load(tmp_path / "plans" / f"plan-{n}.json") for n in (2, 4)}
    same(front, search.Front(plans, told["discarded"], front.by))
    again = run("never")
    assert json.loads(again.stdout)["seen"] == []


@pytest.mark.parametrize("lost", ["begun.json", "reference.npy", "regress-2.json"])
def test_stopped_at_any_file_it_counts_the_same(score_fn, tmp_path, monkeypatch, lost):
    def found(folder):
        options = {"nfe": (2,), "stages": ("regress",), "solver": ("ddim",), "state": folder}
        return search.best(score_fn, start(16), key=jax.random.key(0), **options).plans[2]

    def stopped(path, data):
        if path.name == lost:
            raise KeyboardInterrupt
        write_atomically(path, data)

    whole = found(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("diffsamp.search._folder.write_atomically", stopped)
        with pytest.raises(KeyboardInterrupt):
            found(tmp_path / "part")
    assert not (tmp_path / "part" / lost).exists()
    resumed = found(tmp_path / "part")
    assert resumed.settings["evaluations"] == whole.settings["evaluations"]
    assert resumed.tableau.to_dict() == whole.tableau.to_dict()


def test_the_state_belongs_to_one_search(score_fn, tmp_path):
    options = {**SMALL, "nfe": (2,), "stages": ("compare",), "state": tmp_path}
    search.best(score_fn, start(16), key=jax.random.key(0), **options)
    with pytest.raises(ValueError, match="holds another search: key differ"):
        search.best(score_fn, start(16), key=jax.random.key(1), **options)
    other = dataclasses.replace(score_fn, sigma_data=0.6)
    with pytest.raises(ValueError, match="holds another search: network differ"):
        search.best(other, start(16), key=jax.random.key(0), **options)
    with pytest.raises(ValueError, match="holds another search: starts differ"):
        search.best(score_fn, start(16, 9), key=jax.random.key(0), **options)
    with pytest.raises(ValueError, match="holds another search: reference differ"):
        search.best(score_fn, start(16), key=jax.random.key(0), reference=start(16, 2), **options)
    (tmp_path / "compare.json").write_text("[")
    with pytest.raises(ValueError, match=r"compare\.json is corrupt"):
        search.best(score_fn, start(16), key=jax.random.key(0), **options)
    (tmp_path / "reference.npy").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"reference\.npy is corrupt"):
        search.best(score_fn, start(16), key=jax.random.key(0), **options)


def test_a_limit_of_time_ends_it_with_what_there_is(score_fn):
    front = search.best(score_fn, start(24), key=jax.random.key(0), seconds=0.0, **SMALL)
    assert all(plan.method.startswith("compare (") for plan in front.plans.values())


def test_an_objective_without_a_loss_skips_the_gradient(score_fn):
    data = ds.targets.gaussian_mixture([0.4, 0.6], [[-1.0, 0.4], [0.8, 0.1]], [0.02, 0.1])
    goal = search.objective.sliced_wasserstein(
        data.sample(jax.random.key(3), 256), jax.random.key(4)
    )
    front = search.best(
        score_fn, start(64), key=jax.random.key(1), objective=goal, **{**SMALL, "nfe": (3,)}
    )
    assert "distill" not in front.plans[3].method
    assert front.by == "sliced_wasserstein"


@pytest.mark.long
def test_a_plan_for_a_guided_model():
    """Guidance is a transform of the network; every stage works on what comes out."""

    def apply(params, x, t, label):
        centre = jnp.where(label[:, None] == 0, 0.0, jnp.where(label[:, None] == 1, -1.0, 1.0))
        keep = 0.1 / (0.1 + jnp.square(t)[:, None])
        return keep * x + (1 - keep) * centre * params[None]

    network = ds.ScoreFn(apply, jnp.ones(2), PROCESS, prediction="data")
    guided = ds.guidance.cfg(network, 2.0, null={"label": 0})
    cond = {"label": jnp.arange(48) % 2 + 1}
    front = search.best(guided, start(48), key=jax.random.key(1), cond=cond, **SMALL)
    four = front.plans[4].psnr["held_out"]
    assert four["found"] >= four["start"]
    first = ds.solvers.ddim(PROCESS, [20.0, 2.0, 0.5, 0.0])
    plan = search.distill(
        guided, start(48), start=first, key=jax.random.key(0), cond=cond, steps=40, batch=16
    )
    assert plan.psnr["held_out"]["found"] > plan.psnr["held_out"]["start"] + 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": ()}, "`stages` must be of"),
        ({"stages": ("compare", "anneal")}, "`stages` must be of"),
        ({"nfe": (0,)}, "`nfe` must be at least 1"),
        ({"nfe": (2,), "solver": ("heun",)}, r"can make exactly \[2\]"),
        ({"held_out": 24}, "too few are left"),
    ],
)
def test_errors(score_fn, options, message):
    with pytest.raises(ValueError, match=message):
        search.best(score_fn, start(24), key=jax.random.key(0), **{**SMALL, **options})


MESH = textwrap.dedent(
    """
    import jax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    import numpy as np
    import diffsamp as ds
    from diffsamp import search
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    process = ds.processes.edm(0.02, 20.0)
    target = ds.targets.gaussian_mixture([0.4, 0.6], [[-1.0, 0.4], [0.8, 0.1]], [0.02, 0.1])
    score_fn = target.score_fn(process, "edm_f")
    x_T = process.prior_sample(jax.random.key(0), (64, 2))
    spread = NamedSharding(Mesh(np.array(jax.devices()), ("batch",)), PartitionSpec("batch"))
    assert len(jax.devices()) == 8
    tableau = ds.solvers.unipc(process, ds.schedules.karras(process, 5))
    x = search.run(score_fn, tableau, x_T, batch=64, sharding=spread)
    assert len(x.sharding.device_set) == 8, x.sharding
    np.testing.assert_allclose(x, search.run(score_fn, tableau, x_T), atol=1e-5)
    noisy = ds.solvers.ddpm(process, ds.schedules.karras(process, 5))
    keys = jax.device_put(jax.random.split(jax.random.key(0), 64), spread)
    program = jax.jit(ds.sample).lower(score_fn, noisy, jax.device_put(x_T, spread), key=keys)
    text = program.compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text, collective

    options = dict(nfe=[4], solver=["ddim", "dpmpp_2m"], schedule=["logsnr"], batch=16)
    one = search.compare(score_fn, x_T, **options)
    many = search.compare(score_fn, x_T, sharding=spread, population=2, **options)
    for entry, other in zip(one.entries, many.entries, strict=True):
        assert abs(entry.psnr - other.psnr) < 0.05, (entry.psnr, other.psnr)
    # a first round below the mesh is one of the mesh, and within a limit, too
    options["schedule"] = ["logsnr", "karras", "uniform"]
    halved = search.compare(score_fn, x_T, sharding=spread, halving=3, **options)
    assert sorted({e.starts for e in halved.entries}) == [0, 8, 16, 32], halved.entries
    limit = 400 * 64
    limited = search.compare(
        score_fn, x_T, sharding=spread, evaluations=limit, reference=x_T, **options
    )
    assert limited.evaluations <= limit
    few = search.compare(
        score_fn, x_T, sharding=spread, evaluations=1100, reference=x_T, halving=20, **options
    )
    assert few.evaluations <= 1100
    assert sorted({e.starts for e in few.entries}) == [0, 8, 16, 32], few.entries
    try:
        search.compare(
            score_fn, x_T, sharding=spread, evaluations=300, reference=x_T, **options
        )
    except ValueError as error:
        assert "`evaluations` is too low by" in str(error), error
    else:
        raise AssertionError("a limit that allows no round was taken")
    try:
        search.run(score_fn, tableau, x_T, batch=12, sharding=spread)
    except ValueError as error:
        assert "`batch` = 12 must divide among the 8 devices" in str(error), error
    else:
        raise AssertionError("a batch that does not divide was taken")
    """
)

BEST = textwrap.dedent(
    """
    # with all numbers free it is rounding that chooses the valley; with weights alone there is one
    options = dict(nfe=(3,), numbers=("weights",), solver=("ddim", "dpmpp_2m", "ipndm3"),
                   schedule=("karras", "logsnr"), population=4, rounds=1, steps=10,
                   batch=16, screen=16, held_out=29, key=jax.random.key(1))
    one = search.best(score_fn, x_T, **options)
    many = search.best(score_fn, x_T, sharding=spread, **options)
    together = search.best(score_fn, x_T, sharding=spread, together=4, **options)
    for other in (many, together):
        held, want = (f.plans[3].psnr["held_out"]["found"] for f in (other, one))
        assert abs(held - want) < 0.1, (held, want)
    """
)


def on_eight_devices(script):
    done = subprocess.run(
        [sys.executable, "-c", script + "print('ok')"],
        capture_output=True,
        text=True,
        check=False,
        timeout=3600,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.stdout.strip() == "ok", done.stderr[-3000:]


def test_on_eight_devices():
    """Samples, and candidates with them, over a mesh: the same results."""
    on_eight_devices(MESH)


@pytest.mark.long
def test_best_on_eight_devices():
    """A whole search over a mesh, candidates one by one and together."""
    on_eight_devices(MESH + BEST)
