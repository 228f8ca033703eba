"""The benchmarks run in a reduced size and write the tables they promise; no time is asserted."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import diffsamp as ds

ROOT = Path(__file__).parent.parent


def python(*words):
    """What a run of Python prints; it finds the benchmarks' modules."""
    path = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=3600,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run(script, *arguments):
    python(str(ROOT / "benchmarks" / script), *arguments)


def tables(path):
    """Rows of all tables of a result, without their heads."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for i, line in enumerate(lines)
        if line.startswith("|") and "---" not in line and "---" not in "".join(lines[i + 1 : i + 2])
    ]


@pytest.mark.long
def test_search(tmp_path):
    out = tmp_path / "search.md"
    run(
        "search.py",
        "--network",
        "mixture",
        "--nfe",
        "5",
        "--ddim",
        "5",
        "--steps",
        "16",
        "--fresh",
        "64",
        "--starts",
        "32",
        "--screen",
        "8",
        "--population",
        "4",
        "--rounds",
        "1",
        "--pairs",
        "16",
        "32",
        "--out",
        str(out),
    )
    text = out.read_text(encoding="utf-8")
    for heading in (
        "what is found",
        "Optimised schedules",
        "How few reference pairs",
        "Parts and options",
    ):
        assert heading in text
    assert "nan" not in text
    rows = tables(out)
    first = rows[0]
    assert first[0] == "5"
    fixed, found = float(first[2]), float(first[5].strip("*"))
    assert float(first[6]) == round(found - fixed, 1) or abs(float(first[6]) - found + fixed) < 0.11
    assert {row[0] for row in rows} >= {"karras", "Align Your Steps", "distill: times only"}


@pytest.mark.long
def test_overhead(tmp_path):
    out = tmp_path / "overhead.md"
    run(
        "overhead.py",
        "--networks",
        "1",
        "--seconds",
        "1",
        "--solvers",
        "ddim",
        "unipc3",
        "ddpm",
        "--kinds",
        "channels first",
        "--out",
        str(out),
    )
    rows = tables(out)
    parts = (rows[:9], rows[9:11], rows[11:14], rows[14:])
    times, gradients, memory, around = [{r[0]: r[1:] for r in part} for part in parts]
    assert gradients.keys() == {"channels first", "MLP, batch 256"}
    assert set(times) > {
        "20 jitted calls, ms",
        "bare scan",
        "`ddim`",
        "`unipc3`",
        "`ddpm` z",
        "one program",
    }
    assert all(float(row[0].split()[0]) > 0 for row in times.values())
    assert memory.keys() == {"`ddim`", "`unipc3`", "`ddpm`"}
    for most, extra in memory.values():  # of the compiler: no matter of time
        assert float(extra) <= float(most)
    assert around["`guidance.cfg`"][0].endswith("(20 x 2)")  # calls, and copies of the batch
    assert {"`parallel.sample_parallel`", "`adaptive.ode_solution`"} < around.keys()


def test_every_family_is_measured():
    """The samplers of the overhead benchmark, one or more of every module of solvers."""
    code = (
        "import diffsamp as ds, overhead\n"
        "for name in overhead.SOLVERS:\n"
        "    tableau = overhead.tableau_of(name, ds.processes.flow())\n"
        "    assert tableau.nfe == overhead.NFE, name\n"
        "print(*overhead.SOLVERS)\n"
    )
    measured = python("-c", code).split()
    solvers = ds.solvers
    others = (*solvers.COMPOSED, *solvers.FITTED, *solvers.FEW_STEP)
    assert set(measured) >= set(others)
    modules = {solvers.get(n).function.__module__ for n in measured if n not in others}
    assert modules == {solvers.get(n).function.__module__ for n in solvers.names()}


@pytest.mark.long
def test_compilation(tmp_path):
    out = tmp_path / "compilation.md"
    run("compilation.py", "--networks", "0", "--growth", "5", "--runs", "1", "--out", str(out))
    whole, here, by_hand = tables(out)
    samplers, compilations = whole[5:]
    assert compilations == "1"
    assert int(samplers) > 100
    assert {here[1], by_hand[1]} == {"`ds.sample`", "a loop under one jit"}


@pytest.mark.long
@pytest.mark.skipif(
    shutil.which("taskset") is None or len(os.sched_getaffinity(0)) < 2,
    reason="binds processes to two cores, on Linux",
)
def test_scaling(tmp_path):
    out = tmp_path / "scaling.md"
    run(
        "scaling.py",
        "--networks",
        "0",
        "--seconds",
        "0.1",
        "--most",
        "2",
        "--repeats",
        "1",
        "--out",
        str(out),
    )
    rows = tables(out)
    devices = min(2, len(os.sched_getaffinity(0)))
    assert len(rows) == 6
    assert all(len(row) == 1 + devices for row in rows)
    assert all(float(cell.split()[0]) > 0 for row in rows for cell in row[1:] if cell)


@pytest.mark.peers
def test_peers(tmp_path):
    """What the peers sample is what we sample, with the network's weights copied."""
    for package in ("torch", "diffusers", "diffrax"):
        pytest.importorskip(package, reason="make test-peers installs it")
    out = tmp_path / "peers.md"
    run(
        "peers.py",
        "--networks",
        "0",
        "1",
        "3",
        "--seconds",
        "0.1",
        "--no-compile",
        "--out",
        str(out),
    )
    rows = tables(out)
    assert len(rows) == 3 * (7 + 6)
    assert all(float(row[4]) < 1e-4 for row in rows if "bare" not in row[1])
    assert all(float(row[2]) > 0 for row in rows)


COUNTED = """
import dataclasses, json
import jax, numpy as np
import diffsamp as ds, ladder
from diffsamp import search

process = ds.processes.edm(0.02, 20.0)
means = np.random.default_rng(3).normal(size=(3, 4)) * 0.8
exact = ds.targets.gaussian_mixture([0.5, 0.3, 0.2], means, [0.02, 0.05, 0.1]).score_fn(process)
x_T = process.prior_sample(jax.random.key(0), (16, 4))
reference = search.run(exact, search.reference_tableau(process, 40), x_T)
calls = []

def apply(params, x, t):
    jax.debug.callback(lambda: calls.append(x.shape[0]))
    return exact.apply(params, x, t)

network = dataclasses.replace(exact, apply=apply)
problem = ladder.Problem(network, x_T, None, reference, 1000.0)
effort = ladder.Effort(steps=4, batch=4, few=16, evolved=16, population=4, rounds=1)
said = {}
for name, method in ladder.METHODS.items():
    calls.clear()
    found = method.run(problem, 3, effort)
    jax.effects_barrier()
    x = search.run(exact, found.tableau, x_T)
    psnr = float(ds.metrics.psnr(x, reference))
    said[name] = [found.tableau.nfe, found.forward, found.gradient, sum(calls), psnr]
print(json.dumps(said))
"""


def test_every_mutation_fits_the_code():
    """One whose line has changed would measure nothing."""
    code = "import mutations as m; print(*(len(m.faulty(one)) for one in m.MUTATIONS))"
    assert len(python("-c", code).split()) > 60


@pytest.mark.long
def test_every_rung_of_the_ladder_runs_and_counts_what_it_spends():
    """On an exact target, against the calls of the network itself."""
    said = json.loads(python("-c", COUNTED))
    by_gradient = {"LD3", "S4S-Alt", "DSS", "DyWeight", "DyWeight, features", "GS"}
    ours = {name for name in said if name.startswith(("regress", "best"))}
    assert len(ours) >= 7
    assert said.keys() > by_gradient | ours
    for name, (nfe, forward, gradient, calls, psnr) in said.items():
        assert nfe == 3, name
        starts = 0 if name in ours else 16  # whose fine solutions count 1000 each, or of their own
        if name == "AYS":  # the points of its later rounds are not said
            assert abs(forward - 1000 * starts - calls) < 0.02 * calls
        else:
            # the way back computes the network once more
            assert forward - 1000 * starts == calls - gradient, name
        assert gradient == (4 * 4 * 3 if name in by_gradient else 0), name
        assert psnr > 5, name


def test_the_page_of_searches_says_what_the_ladder_measured():
    """The first table of its section is that of the results."""
    measured = tables(ROOT / "benchmarks" / "results" / "ladder.md")
    verdict = [row for row in measured if len(row) == 10]
    assert verdict
    shown = [row for row in tables(ROOT / "docs" / "search.md") if len(row) == 10]
    assert [row for row in shown if row[0] in {own[0] for own in verdict}] == verdict


def test_accuracy(tmp_path):
    out = tmp_path / "accuracy.md"
    run("accuracy.py", "mixture", "--nfe", "5", "8", "--samples", "4", "--out", str(out))
    rows = {row[0]: row for row in tables(out) if len(row) == 3}
    solvers = {f"`{s}`" for s in ds.solvers.names() if not ds.solvers.get(s).stochastic}
    assert rows.keys() >= {s for s in solvers if ds.solvers.get(s.strip("`")).steps(5)}
    assert rows["`ddim`"][1].split()[1] in ds.schedules.NAMES


@pytest.mark.long
def test_choosing(tmp_path):
    out = tmp_path / "choosing.md"
    run("choosing.py", "mixture-flow", "--nfe", "5", "12", "--samples", "4", "--out", str(out))
    rows = tables(out)
    kinds, networks = rows[:2], rows[2:]
    assert [row[:2] for row in kinds] == [["flow", "5"], ["flow", "12"]]
    for row in networks:  # no pair is better than the best of all, and the search is
        assert float(row[5]) <= 0
        assert float(row[7].split()[0]) <= 0
    assert float(networks[0][8].split()[0]) > 3
    assert not networks[1][8]


def test_the_page_of_choices_says_what_was_measured():
    """The first table of docs/choosing.md is the summary of the results."""
    committed = tables(ROOT / "benchmarks" / "results" / "choosing.md")
    measured = {(row[0], row[1]): row[2:7] for row in committed if len(row) == 8}
    assert len(measured) == 16
    shown = [row for row in tables(ROOT / "docs" / "choosing.md") if (row[0], row[1]) in measured]
    assert len(shown) == len(measured)
    for row in shown:
        pair, usual, rule, suggested, found = measured[row[0], row[1]]
        solver, schedule = pair.split()
        assert row[2] == f"{solver} on `{schedule}`"
        assert row[3:7] == [rule, suggested, found, usual]


def test_the_plots_are_drawn_from_the_committed_tables(tmp_path):
    run("draw.py", "--plots", str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {
        "accuracy.png",
        "overhead.png",
        "peers.png",
    }


@pytest.mark.long
def test_the_picture_of_the_readme_is_drawn_from_what_is_committed(tmp_path):
    run("front.py", "--plots", str(tmp_path))
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_the_gallery_is_drawn(tmp_path):
    run("gallery.py", "--plots", str(tmp_path))
    committed = (ROOT / "docs" / "plots").glob("gallery_*.png")
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in committed}


def test_the_plans_that_the_search_found_load():
    plans = sorted((ROOT / "benchmarks" / "results" / "plans").glob("*.json"))
    assert plans
    for path in plans:
        plan = ds.search.Plan.load(path)
        assert plan.tableau.nfe == plan.nfe == int(path.stem.split("-")[1])


@pytest.mark.long
def test_the_second_network_is_there():
    """Its weights are small and sample something of the data's range."""
    weights = ROOT / "benchmarks" / "weights"
    assert sum(path.stat().st_size for path in weights.iterdir()) < 8_000_000
    code = (
        "import jax, jax.numpy as jnp, diffsamp as ds, unet, classifier\n"
        "f = unet.load('fashion')\n"
        "make = ds.sampler(f, 'dpmpp_2m', nfe=8)\n"
        "c = {'label': jnp.arange(20) % 10}\n"
        "x = make(jax.random.key(0), (20, 16, 16, 1), cond=c)\n"
        "logits = classifier.Classifier().apply({'params': classifier.load_params("
        "unet.WEIGHTS / 'classifier_fashion.safetensors')}, x)[0]\n"
        "print(float(x.min()), float(x.max()), float((logits.argmax(1) == c['label']).mean()))\n"
    )
    low, high, right = map(float, python("-c", code).split())
    assert -2 < low < -0.9
    assert 0.5 < high < 2
    assert right >= 0.7  # the classifier sees the class that was asked for
