"""The plan's file: documented, complete, checked when read; older files load."""

import dataclasses
import json
from importlib.resources import files
from pathlib import Path

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from common import PROCESS, start

import diffsamp as ds

FIXTURES = Path(__file__).parent.parent / "fixtures"
SCHEMA = json.loads((files("diffsamp.search") / "plan.schema.json").read_text(encoding="utf-8"))
FACTS = {"process", "prediction", "sigma_data", "guidance", "nfe_factor", "batched", "checkpoint"}
FACTS |= {"data", "time", "scale_input", "calls"}


def expect_valid(plan):
    content = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    jsonschema.Draft202012Validator(SCHEMA).validate(content)
    assert ds.search.Plan.from_dict(content).to_dict() == plan.to_dict()


def found(name, score_fn):
    """A plan by each of the searches, in a minute version."""
    x_T, key = start(24), jax.random.key(1)
    ddim = ds.solvers.ddim(PROCESS, ds.schedules.logsnr(PROCESS, 3))
    if name == "refine":
        own = {"iterations": 1, "numbers": ("times", "weights"), "data_range": 4.0}
        return ds.search.refine(score_fn, ddim, x_T, key=key, **own)
    if name == "regress":
        return ds.search.regress(score_fn, x_T, nfe=3, key=key, points=20, data_range=4.0)
    if name == "distill":
        options = {"steps": 2, "batch": 8, "key": key, "data_range": 4.0, "learn": "weights"}
        return ds.search.distill(score_fn, x_T, start=ddim, **options)
    few = {"solver": ("ddim", "ipndm2"), "schedule": ("logsnr",)}
    if name == "best":
        options = {"stages": ("compare",), "key": key, "data_range": 4.0}
        return ds.search.best(score_fn, x_T, nfe=(3,), **few, **options).plans[3]
    return ds.search.compare(score_fn, x_T, nfe=(3,), **few).plan(score_fn, 3)


@pytest.mark.parametrize(
    "name",
    [
        "refine",
        pytest.param("regress", marks=pytest.mark.long),
        pytest.param("distill", marks=pytest.mark.long),
        pytest.param("best", marks=pytest.mark.long),
        "compare",
    ],
)
def test_searches_say_what_the_plan_is_for(score_fn, name):
    plan = found(name, score_fn)
    expect_valid(plan)
    assert set(plan.network) == FACTS
    assert plan.network["prediction"] == "edm_f"
    assert plan.network["process"] == {"name": "EDM", "sigma_min": 0.02, "sigma_max": 20.0}
    assert plan.network["data"] == {"range": None if name == "compare" else 4.0, "shape": [4]}
    assert plan.network["checkpoint"]["fingerprint"].startswith("sha256:")
    assert plan.method.startswith(name) or name == "best"
    # one call of the network as the file says is what the executor does
    calls, n = plan.network["calls"], int(np.argmax(plan.tableau.evaluates))
    x = np.asarray(start(2)) * 0.1
    raw = score_fn.apply(score_fn.params, calls["scale"][n] * x, jnp.full(2, calls["time"][n]))
    target = plan.tableau.target[n]
    parts = [score_fn(x, plan.tableau.times[n], prediction=p) for p in ("data", "noise")]
    want = target[0] * parts[0] + target[1] * parts[1]
    got = calls["state"][n] * x + calls["output"][n] * raw
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_guidance_and_other_conventions_are_written_down():
    def apply(params, x, t, label):
        return params * x + 0 * label[:, None]

    process = ds.processes.flow(shift=3.0)
    net = ds.ScoreFn(apply, jnp.ones(()), process, prediction="velocity", time="label")
    guided = ds.guidance.cfg(net, 3.5, null={"label": 0})
    table = ds.solvers.ddim(process, ds.schedules.logsnr(process, 4))
    plan = ds.search.Plan.of(table, guided, x_T=jnp.zeros((2, 8, 8, 3)), checkpoint="mine")
    expect_valid(plan)
    assert plan.network["guidance"] == [{"name": "Combined", "scale": 3.5}]
    assert plan.network["nfe_factor"] == 2
    assert plan.network["process"] == {"name": "Flow", "shift": 3.0}
    assert plan.network["time"] == "label"
    assert plan.network["data"]["shape"] == [8, 8, 3]
    assert plan.network["checkpoint"]["name"] == "mine"
    np.testing.assert_allclose(plan.network["calls"]["time"], 1000 * table.times[:-1])
    other = dataclasses.replace(net, params=2 * jnp.ones(()))
    again = plan.for_network(other).network["checkpoint"]
    assert again["fingerprint"] != plan.network["checkpoint"]["fingerprint"]
    assert again["name"] == ""


def test_older_files_load(tmp_path):
    """Files written before there was `network`, byte for byte as they were."""
    old = json.loads((FIXTURES / "plan-v1.json").read_text(encoding="utf-8"))
    assert old["version"] == 1
    assert "network" not in old
    plan = ds.search.Plan.load(FIXTURES / "plan-v1.json")
    assert plan.network == {}
    assert plan.method == "refine"
    assert plan.tableau.to_dict() == ds.Tableau.load(FIXTURES / "tableau-v1.json").to_dict()
    jsonschema.Draft202012Validator(SCHEMA).validate(old)
    plan.save(tmp_path / "new.json")
    assert json.loads((tmp_path / "new.json").read_text())["version"] == 2
    expect_valid(ds.search.Plan.load(tmp_path / "new.json"))


def test_the_schema_refuses_what_is_wrong(score_fn):
    plan = found("compare", score_fn).to_dict()
    for change in (
        {"version": 3},
        {"nfe": 0},
        {"network": {"prediction": "noise"}},
        {"network": {**plan["network"], "prediction": "nosie"}},
        {"tableau": {**plan["tableau"], "a": []}},
        {"scores": {"psnr": 3.0}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(SCHEMA).validate({**plan, **change})


def test_errors_say_what_is_wrong(score_fn, tmp_path):
    plan = found("compare", score_fn).to_dict()
    load = ds.search.Plan.from_dict
    with pytest.raises(FileNotFoundError):
        ds.search.Plan.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match="version 9; this diffsamp reads versions 1 to 2"):
        load({**plan, "version": 9})
    with pytest.raises(ValueError, match="its `network` must be an object"):
        load({**plan, "network": 3})
    calls = {**plan["network"]["calls"], "time": [1.0]}
    with pytest.raises(ValueError, match=r"`network.calls.time` must hold 3 numbers"):
        load({**plan, "network": {**plan["network"], "calls": calls}})
    flow = ds.processes.flow()
    table = ds.solvers.ddim(flow, ds.schedules.logsnr(flow, 3))
    with pytest.raises(ValueError, match="built for another process"):
        ds.search.Plan.of(table, score_fn)
    with pytest.raises(ValueError, match="built for another process"):
        ds.search.Plan(table, "fixed", "", {}).for_network(score_fn)
    with pytest.raises(TypeError, match="ScoreFn"):
        ds.search.Plan.of(table, lambda x: x)
