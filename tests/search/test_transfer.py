"""Samplers for budgets, scales and levels that were not searched, read off those that were."""

from pathlib import Path

import jax
import numpy as np
import pytest
from common import PROCESS

import diffsamp as ds
from diffsamp import search
from diffsamp.models import digits
from diffsamp.search.explicit import from_largest_level, label_offsets, told_times

PLANS = Path(__file__).parents[2] / "benchmarks" / "results" / "plans"
PROCESSES = [PROCESS, ds.processes.vp_linear(), ds.processes.flow(), ds.processes.trig()]
ARRAYS = ("times", "alpha", "sigma")


def same(one, two, atol=1e-10):
    """The same samples from the same start, whatever form the rows are in."""
    for name in ARRAYS:
        np.testing.assert_allclose(getattr(one, name), getattr(two, name), atol=atol)
    for got, wanted in zip(
        one.unroll(prediction="data"), two.unroll(prediction="data"), strict=True
    ):
        np.testing.assert_allclose(got, wanted, atol=atol)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", ["ddim", "dpmpp_3m", "ipndm3", "dpmpp_2m_sde", "ddpm"])
def test_at_its_own_budget_it_is_itself(process, name):
    tableau = ds.solvers.get(name)(process, ds.schedules.uniform(process, 6))
    same(search.transfer(tableau, process), tableau)
    same(search.interpolate({6: tableau, 9: tableau}, process, 6), tableau)
    other = ds.solvers.get("ddim")(process, ds.schedules.uniform(process, 8))
    same(search.interpolate({6: tableau, 8: other}, process, 8), other)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("nfe", [1, 2, 5, 7, 20])
def test_ddim_stays_ddim_on_the_times_of_its_curve(process, nfe):
    """Its curve is its own schedule, where that has one curve for all budgets."""
    grid = ds.schedules.uniform(process, 10)
    found = search.transfer(ds.solvers.ddim(process, grid), process, nfe=nfe)
    assert found.nfe == nfe
    assert np.all(np.diff(found.times) < 0)
    same(found, ds.solvers.ddim(process, found.times))
    if 10 % nfe == 0:  # every point is one of those of the grid
        np.testing.assert_allclose(found.times, grid[:: 10 // nfe], atol=1e-9)


def test_twice_as_many_rows_take_the_steps_between():
    """In log-SNR, in which an exponential integrator counts, and on where there is room."""
    grid = np.append(PROCESS.time(np.linspace(-2.9, 3.1, 4)), 0.0)
    found = search.transfer(ds.solvers.ddim(PROCESS, grid), PROCESS, nfe=8)
    wanted = np.linspace(-2.9, (3.1 + np.log(50)) / 2, 8)  # sigma_min = .02 ends the process
    got = np.log(found.alpha[-9:-1]) - np.log(found.sigma[-9:-1])
    np.testing.assert_allclose(got, wanted, atol=1e-9)
    again = search.transfer(ds.solvers.ddim(PROCESS, grid[[0, 1, -1]]), PROCESS, nfe=4)
    got = np.log(again.alpha[-5:-1]) - np.log(again.sigma[-5:-1])
    np.testing.assert_allclose(got, [-2.9, -1.9, -0.9, 0.1], atol=1e-9)


@pytest.mark.parametrize("name", ["dpmpp_3m", "ipndm3", "unipc3", "dpmpp_3m_sde"])
@pytest.mark.parametrize("nfe", [1, 2, 3, 8, 30])
def test_a_constant_stays_exact(name, nfe):
    """Also where early rows have fewer answers behind them than the rows they come from."""
    tableau = ds.solvers.get(name)(PROCESS, ds.schedules.logsnr(PROCESS, 12))
    search.transfer(tableau, PROCESS, nfe=nfe).check()


@pytest.mark.parametrize("nfe", [2, 8, 12])
def test_ddpm_stays_ddpm(nfe):
    """Half a step keeps the root of what the step keeps of the noise."""
    grid = np.append(PROCESS.time(np.linspace(-2.0, 2.0, 5)), 0.0)
    found = search.transfer(ds.solvers.ddpm(PROCESS, grid), PROCESS, nfe=nfe)
    inner = np.linspace(-2.0, -2.0 + 5 * (nfe - 1) / nfe, nfe)
    own = ds.solvers.ddpm(PROCESS, np.append(PROCESS.time(inner), 0.0))
    same(found, from_largest_level(own, PROCESS), atol=1e-9)


def test_between_two_samplers_numbers_are_between():
    """Times as log-SNR, weights and conditioning times linearly: DC-Solver's case."""
    one = ds.solvers.dpmpp(PROCESS, ds.schedules.logsnr(PROCESS, 5), order=2)
    two = ds.solvers.dpmpp(PROCESS, ds.schedules.karras(PROCESS, 5), order=3)
    found = search.interpolate({1.0: one, 4.0: two}, PROCESS, 2.0)
    low, high, got = (search.canonical(t) for t in (one, two, found))
    for name in ("log_snr", "weights", "sums"):
        np.testing.assert_allclose(got[name], (2 * low[name] + high[name]) / 3, atol=1e-10)
    plan = search.Plan(one, "fixed", "", {})
    same(search.interpolate({1.0: plan, 4.0: two}, PROCESS, 2.0), found)


def test_conditioning_times_and_later_starts_come_along():
    times = PROCESS.time(np.linspace(-2.0, 2.0, 4))
    base = ds.solvers.dpmpp(PROCESS, np.append(times, 0.0), order=2)
    arrays = {k: getattr(base, k) for k in (*ARRAYS, "target", "a", "b")}
    told = told_times(PROCESS, times, np.array([0.3, -0.1, 0.2, 0.1]))
    given = from_largest_level(ds.Tableau.create(**arrays, asked=told), PROCESS)
    assert given.rows == 5
    same(search.transfer(given, PROCESS), given)
    np.testing.assert_allclose(search.transfer(given, PROCESS).asked, given.asked)
    finer = search.transfer(given, PROCESS, nfe=8)
    assert (finer.nfe, finer.rows) == (8, 9)
    # half the offset on half the step, and between the points what lies between
    offsets = label_offsets(PROCESS, finer.times[1:-1], finer.asked[1:])
    wanted = [0.15, 0.05, -0.05, 0.025, 0.1, 0.075, 0.05, 0.05]
    np.testing.assert_allclose(offsets, wanted, atol=1e-9)


def test_it_is_better_than_any_fixed_sampler_on_the_digits():
    """From plans for 5 and 8 evaluations to 6; the best of 1710 fixed ones has 31.6 dB there."""
    network = digits.load_digits_model()
    x_T = network.process.prior_sample(jax.random.key(11), (32, *digits.IMAGE_SHAPE))
    cond = {"label": np.arange(32, dtype=np.int32) % 10}
    plans = {n: search.Plan.load(PLANS / f"digits-{n}.json") for n in (5, 8)}
    samples = {
        name: search.run(network, tableau, x_T, cond=cond)
        for name, tableau in {
            "reference": search.reference_tableau(network.process, 60),
            "between": search.interpolate(plans, network.process, 6),
            "from 5": search.transfer(plans[5], network.process, nfe=6),
        }.items()
    }
    reference = samples.pop("reference")
    psnr = {name: float(ds.metrics.psnr(x, reference)) for name, x in samples.items()}
    assert psnr["between"] > 40
    assert psnr["from 5"] > 38


@pytest.mark.parametrize("shift", [0.4, 3.0])
def test_a_shift_is_that_of_flow_matching(shift):
    process = ds.processes.flow()
    given = ds.solvers.ddim(process, ds.schedules.uniform(process, 6))
    found = search.transfer(given, process, log_snr_shift=-np.log(shift))
    wanted = ds.schedules.flow_shift(process, 6, shift=shift)
    np.testing.assert_allclose(found.times, wanted, atol=1e-12)


def test_errors():
    grid = ds.schedules.logsnr(PROCESS, 4)
    one = ds.solvers.ddim(PROCESS, grid)
    heun = ds.solvers.get("heun")(PROCESS, ds.schedules.logsnr(PROCESS, 2))
    with pytest.raises(ValueError, match="cannot be distilled"):
        search.transfer(heun, PROCESS)
    with pytest.raises(ValueError, match="nfe"):
        search.transfer(one, PROCESS, nfe=0)
    with pytest.raises(ValueError, match="`log_snr_shift` = -30 moves them too far"):
        search.transfer(one, PROCESS, log_snr_shift=-30.0)
    with pytest.raises(ValueError, match="at least two"):
        search.interpolate({4: one}, PROCESS, 4)
    with pytest.raises(ValueError, match="between 4 and 8"):
        search.interpolate({4: one, 8: one}, PROCESS, 9)
    other = ds.solvers.ddim(PROCESS, ds.schedules.logsnr(PROCESS, 5))
    with pytest.raises(ValueError, match="say `nfe`"):
        search.interpolate({1.0: one, 2.0: other}, PROCESS, 1.5)
    early = ds.solvers.ddim(PROCESS, ds.schedules.logsnr(PROCESS, 4, final="t_min"))
    with pytest.raises(ValueError, match="end at different levels"):
        search.interpolate({1.0: one, 2.0: early}, PROCESS, 1.5)
