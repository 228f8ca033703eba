"""The reference reader agrees with `ds.sample`, and runs without JAX."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from cases import CASES
from elsewhere import PROCESSES, network, noises, padded, relative, start, tableau

import diffsamp as ds
from diffsamp.interop import numpy as reader

FIXTURES = Path(__file__).parent.parent / "fixtures"


def model_of(score_fn):
    """The network's own function."""
    apply = jax.jit(lambda x, t: score_fn.apply(score_fn.params, x, t))
    return lambda x, t: np.asarray(apply(x, t))


def check(prediction, names=None):
    score_fn, key = network(prediction, "float64"), jax.random.key(7)
    x_T = start(score_fn.process, dtype=np.float64)
    model = model_of(score_fn)
    for name, table in padded(prediction, names).items():
        plan = ds.search.Plan.of(tableau(name, prediction), score_fn, x_T=x_T)
        plan = json.loads(json.dumps(plan.to_dict()))
        z = noises(table, key, x_T)
        want = ds.sample(score_fn, table, x_T, key=key)
        got = reader.run(plan, model, x_T, z[: len(plan["tableau"]["c"])])
        assert got.dtype == np.float64
        assert relative(got, want) < 1e-10, name


def test_every_registered_solver_agrees_with_sample(x64):
    check("noise")


@pytest.mark.parametrize("prediction", ["v", "velocity", "edm_f", "data", "score"])
def test_every_prediction_agrees_with_sample(x64, prediction):
    check(prediction, ["ddim", "unipc3", "heun", "bdia", "dpmpp_2m_sde", "seeds3"])


def told_later(prediction):
    """A sampler whose network is told other times than the states' own."""
    table = tableau("dpmpp_2m", prediction)
    asked = np.maximum(table.times[:-1] * 0.97, table.times[-2])
    return dataclasses.replace(table, asked=asked)


@pytest.mark.parametrize("prediction", ["noise", "velocity", "edm_f"])
def test_conditioning_times(x64, prediction):
    score_fn, table = network(prediction, "float64"), told_later(prediction)
    x_T = start(score_fn.process, dtype=np.float64)
    plan = json.loads(json.dumps(ds.search.Plan.of(table, score_fn, x_T=x_T).to_dict()))
    want = ds.sample(score_fn, table, x_T)
    assert relative(reader.run(plan, model_of(score_fn), x_T), want) < 1e-10
    assert relative(ds.sample(score_fn, tableau("dpmpp_2m", prediction), x_T), want) > 1e-4
    del plan["network"]["calls"]
    if prediction == "edm_f":
        with pytest.raises(ValueError, match="other times than the states'"):
            reader.calls(*reader.read(plan), prediction)
    elif prediction == "noise":
        np.testing.assert_allclose(
            reader.calls(*reader.read(plan), prediction)["time"], table.asked
        )


def test_a_first_answer_that_is_not_in_the_table_is_refused():
    score_fn = network("noise", "float32")
    free = ds.guidance.first_answer(score_fn, 0.0)
    plan = ds.search.Plan.of(tableau("dpmpp_2m", "noise"), free).to_dict()
    with pytest.raises(ValueError, match=r"solvers\.cached_first_answer"):
        reader.calls(*reader.read(plan))


@pytest.mark.long
@pytest.mark.parametrize("prediction", ["v", "velocity", "edm_f", "data", "score"])
def test_every_solver_and_prediction_agrees_with_sample(x64, prediction):
    fits = []
    for case in CASES:
        try:
            tableau(case.name, prediction)
            fits.append(case.name)
        except AssertionError:  # the solver is not for this process
            assert case.name.startswith("interpolant"), case.name
    check(prediction, fits)


@pytest.mark.parametrize("prediction", list(PROCESSES))
def test_conversions_without_the_plans_numbers_are_the_same(x64, prediction):
    """From the table and the prediction's name alone, against what ScoreFn computed."""
    score_fn = ds.ScoreFn(abs, None, PROCESSES[prediction], prediction=prediction)
    for name in ("unipc3", "ipndm3", "euler"):
        table = tableau(name, prediction)
        want = ds.search.Plan.of(table, score_fn).network["calls"]
        got = reader.calls(table.to_dict(), {}, prediction)
        for key in ("scale", "state", "output", "time"):
            np.testing.assert_allclose(got[key], want[key], rtol=1e-9, atol=1e-12, err_msg=key)


def test_it_needs_neither_jax_nor_the_package(tmp_path):
    """Imported as a module and by its path, in a process of its own."""
    path = reader.__file__
    code = f"""
import sys, json
sys.modules["jax"] = None  # an import of it is an error
import numpy as np
import diffsamp.interop.numpy as reader
assert not [name for name in sys.modules if name.startswith("diffsamp.s")]
x = np.ones((2, 3))
plan = {str(FIXTURES / "plan-v1.json")!r}
one = reader.run(plan, lambda x, t: 0.5 * x, x, prediction="noise")
import importlib.util
spec = importlib.util.spec_from_file_location("alone", {path!r})
alone = importlib.util.module_from_spec(spec); spec.loader.exec_module(alone)
assert (alone.run(plan, lambda x, t: 0.5 * x, x, prediction="noise") == one).all()
print(json.dumps(one.tolist()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plan = ds.search.Plan.load(FIXTURES / "plan-v1.json")
    score_fn = ds.ScoreFn(lambda _, x, t: 0.5 * x, None, ds.processes.vp_discrete())
    want = ds.sample(score_fn, plan.tableau, np.ones((2, 3), np.float32))
    assert relative(json.loads(done.stdout), want) < 1e-4  # one in float32


def test_noise_in_each_of_its_forms():
    table = tableau("ddpm", "noise")
    x_T = start(PROCESSES["noise"])
    plan = ds.search.Plan.of(table, network("noise"))
    model = model_of(network("noise"))
    z = noises(table, jax.random.key(1), x_T)
    want = reader.run(plan, model, x_T, z)
    noisy = np.flatnonzero(table.c)
    assert len(noisy) < table.rows
    np.testing.assert_array_equal(reader.run(plan, model, x_T, z[noisy]), want)
    np.testing.assert_array_equal(reader.run(plan, model, x_T, lambda n: z[n]), want)
    assert relative(reader.run(plan, model, x_T, 1.05 * z), want) > 1e-3
    for wrong in (None, z[:2], z[:, :2]):
        with pytest.raises(ValueError, match="noise"):
            reader.run(plan, model, x_T, wrong)


def test_errors_say_what_is_wrong(tmp_path):
    x = np.ones((2, 3), np.float32)
    table = tableau("ddim", "noise")

    def model(x, t):
        return x

    with pytest.raises(FileNotFoundError, match="there is no plan"):
        reader.run(tmp_path / "none.json", model, x)
    file = tmp_path / "plan.json"
    file.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        reader.run(file, model, x)
    for content, match in (
        ({"format": "else"}, "is no plan"),
        ([1], "is no plan"),
        ({"format": "diffsamp.plan", "version": 9}, "version 9"),
        ({**table.to_dict(), "a": [[1.0]]}, "corrupt: a do not fit"),
        ({k: v for k, v in table.to_dict().items() if k != "target"}, "lacks target"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=match):
            reader.run(file, model, x)
    with pytest.raises(ValueError, match="does not say what its network predicts"):
        reader.run(table, model, x)
    with pytest.raises(ValueError, match="`prediction` must be one of"):
        reader.run(table, model, x, prediction="nosie")
    with pytest.raises(ValueError, match="flow process"):
        reader.run(table, model, x, prediction="velocity")
    with pytest.raises(ValueError, match="must return the shape"):
        reader.run(table, lambda x, t: x[:1], x, prediction="noise")
    with pytest.raises(TypeError, match="floating"):
        reader.run(table, model, np.ones((2, 3), int), prediction="noise")
    with pytest.raises(ValueError, match="stacked"):
        reader.run(ds.Tableau.stack([table, table]), model, x, prediction="noise")
