"""Every name in a public list works in every public place that takes such a name."""

import jax
import numpy as np
import pytest
from cases import skewed_mixture, twin

import diffsamp as ds
from diffsamp import schedules, solvers
from diffsamp.solvers._registry import ALIASES

PROCESSES = {
    "vp_discrete": ds.processes.vp_discrete(),
    "vp_linear": ds.processes.vp_linear(),
    "edm": ds.processes.edm(),
    "flow": ds.processes.flow(),
}
TARGET = ds.targets.gaussian([0.5], 0.3)
NETWORKS = {name: TARGET.score_fn(p) for name, p in PROCESSES.items()}


def fits(schedule, process):
    """Label grids are for tables; published ones for processes that reach their levels."""
    if schedule in schedules.LABELS:
        return process.t_clean < 0
    if schedule in schedules.PUBLISHED:
        rho = max(table[0] for table in schedules.PUBLISHED[schedule][1])
        return np.exp(-process.log_snr(process.t_max)) > rho * (1 - 1e-3)
    return True


@pytest.mark.parametrize("name", PROCESSES)
def test_schedules_in_sampler(name):
    process, network = PROCESSES[name], NETWORKS[name]
    for schedule in schedules.NAMES:
        for final in ("clean", "t_min"):
            try:
                sampler = ds.sampler(network, "dpmpp_2m", nfe=5, schedule=schedule, final=final)
            except ValueError as error:
                words = str(error)
                assert "Use" in words or "use" in words, (schedule, words)
                refused = not fits(schedule, process) or final == "t_min"
                assert refused or "covers" in words, (schedule, final, words)
                continue
            assert sampler.tableau.nfe == 5
            end = process.t_clean if final == "clean" else process.t_min
            assert sampler.tableau.times[-1] == end, (schedule, final)


@pytest.mark.parametrize("solver", [*solvers.names(), *ALIASES])
def test_solvers_in_sampler(solver):
    """Also those that other libraries use."""
    network = NETWORKS["vp_linear"]
    nfe = next(n for n in range(6, 16) if solvers.get(solver).steps(n))
    assert ds.sampler(network, solver, nfe=nfe).tableau.nfe == nfe


def test_all_names_in_compare():
    """And so in `best` and the command line, which pass them on."""
    network, process = NETWORKS["vp_discrete"], PROCESSES["vp_discrete"]
    x_T = process.prior_sample(jax.random.key(0), (2, 1))
    names = [n for n in schedules.NAMES if n != "dpm_fast_2s"]
    table = ds.search.compare(network, x_T, nfe=(5,), solver=("DDIMScheduler",), schedule=names)
    had = {e.schedule for e in table.entries} | {one.schedule for one in table.left_out}
    assert had == set(names)
    assert {one.schedule for one in table.left_out} <= set(schedules.PUBLISHED)
    some = [*ALIASES][::4]
    table = ds.search.compare(
        network, x_T, nfe=(5, 6, 7, 14), solver=some, schedule=("ays_sd15",), key=jax.random.key(1)
    )
    assert {e.solver for e in table.entries} == {solvers.get(name).name for name in some}


@pytest.mark.parametrize("prediction", [*ds.predictions.NAMES, *ds.predictions._ALIASES])
def test_predictions_everywhere(prediction):
    network = NETWORKS["vp_linear"]
    x = jax.numpy.ones((2, 1))
    asked = network(x, 0.5, prediction=prediction)
    name = ds.predictions.canonical_name(prediction)
    own = ds.ScoreFn(lambda p, x, t: x, {}, network.process, prediction=prediction)
    assert own.prediction == name
    np.testing.assert_array_equal(asked, network(x, 0.5, prediction=name))
    options = {"process": network.process, "t": 0.5}
    again = ds.predictions.convert(asked, x, source=prediction, target="data", **options)
    np.testing.assert_allclose(again, network(x, 0.5, prediction="data"), atol=1e-5)
    back = ds.predictions.convert(again, x, source="data", target=prediction, **options)
    np.testing.assert_allclose(back, asked, atol=1e-4)


def test_what_diffusers_names_is_its_default():
    """The single-step class is DPM-Solver++ 2S by default; LMS is of order 4."""
    assert solvers.get("DPMSolverSinglestepScheduler").name == "dpmpp_2s"
    assert solvers.get("DPMSolverMultistepScheduler").name == "dpmpp_2m"
    assert solvers.get("lms").name == "deis_rhoab3"
    with pytest.raises(ValueError, match="`solver` must be one of"):
        solvers.get("ipndm_v")  # the code known by that name is another method: docs/deis.md


@pytest.mark.parametrize(
    "alias",
    [a for s in ds.solvers.SOLVERS.values() for a in s.aliases if a.endswith("Scheduler")],
)
def test_an_alias_is_its_owners_default(alias):
    """The class with its default fields, as `from_diffusers` reads it, which equals diffusers."""
    config = {"_class_name": alias}
    if alias in ("DDIMScheduler", "DDPMScheduler"):
        config["clip_sample"] = False  # which is around the network: guidance.static_thresholding
    if alias == "PNDMScheduler":
        config["steps_offset"] = 1  # as every published one; else it ends with a step of size 0
    read = ds.from_diffusers(config)
    x = np.linspace(-2, 2, 7)[:, None]
    noises = np.random.default_rng(0).normal(size=(200, 7, 1))
    for n in (5, 10, 25):
        times = read.times(n)
        one, two = read.solver(read.process, times), ds.solvers.get(alias)(read.process, times)
        ends = [twin(t, skewed_mixture().posterior, x, noises=noises) for t in (one, two)]
        np.testing.assert_allclose(*ends, rtol=0, atol=1e-9)


def test_a_class_that_is_no_solver_says_what_reads_it():
    for name in ("SASolverScheduler", "IPNDMScheduler"):
        with pytest.raises(ValueError, match=r"ds\.from_diffusers"):
            ds.solvers.get(name)
