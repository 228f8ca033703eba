"""Schedules: their laws, values by hand, and user times used verbatim."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, all_processes

import diffsamp as ds
from diffsamp import schedules, solvers

PROCESSES = all_processes()


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("name", schedules.NAMES)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 20, 100])
def test_laws(process, name, n):
    clean = schedules.get(name)(process, n)
    ending = schedules.get(name)(process, n, final="t_min")
    for times in (clean, ending):
        assert times.shape == (n + 1,)
        assert times.dtype == np.float64
        assert np.all(np.diff(times) < 0)
        assert times[0] <= process.t_max
    assert clean[-1] == process.t_clean
    assert ending[-1] == process.t_min
    assert clean[0] == ending[0]
    spaced_in_log_snr = name in ("logsnr", "karras")
    if spaced_in_log_snr and np.isneginf(process.log_snr(process.t_max)):
        # alpha = 0 at t_max: the spacing starts where log-SNR is -5.1
        assert process.log_snr(clean[0]) == pytest.approx(-5.1, rel=1e-12)
    else:
        assert clean[0] == process.t_max
    if spaced_in_log_snr and n > 1:
        assert clean[-2] == process.t_min  # n points from t_max to t_min, then the clean end


def test_karras_is_the_edm_grid():
    """(sigma_max^(1/7) + i / (n - 1) (sigma_min^(1/7) - sigma_max^(1/7)))^7, then 0."""
    process = ds.processes.edm()
    i = np.arange(18)
    want = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    got = schedules.karras(process, 18)
    np.testing.assert_allclose(got[:-1], want, rtol=1e-12)
    assert (got[0], got[-2], got[-1]) == (80.0, 0.002, 0.0)
    # the same grid of noise levels on another process
    vp = ds.processes.vp_linear()
    times = schedules.karras(vp, 5, rho=3.0, final="t_min")
    levels = np.exp(-vp.log_snr(times)) ** (1 / 3)
    np.testing.assert_allclose(np.diff(levels), np.diff(levels)[0], rtol=1e-9)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("final", ["clean", "t_min"])
@pytest.mark.parametrize("n", [2, 9])
def test_steps_are_equal_in_the_grids_own_measure(process, final, n):
    """log-SNR for "logsnr", (sigma / alpha)^(1/rho) for "karras": n points, or n + 1 to t_min."""
    points = n if final == "clean" else n + 1
    options = {"final": final}

    def unevenness(values):
        steps = np.diff(values[:points])
        return np.abs(steps / steps.mean() - 1).max()

    def levels(times, rho):
        return (process.sigma(times[:points]) / process.alpha(times[:points])) ** (1 / rho)

    log_snr = process.log_snr(schedules.logsnr(process, n, **options)[:points])
    times = schedules.karras(process, n, **options)
    # log-SNR is a difference of logarithms up to 10, and its steps are at least 0.9
    assert unevenness(log_snr) < 1e-12
    assert unevenness(levels(times, 7)) < 1e-12
    assert unevenness(levels(schedules.karras(process, n, rho=3, **options), 3)) < 1e-12
    if points > 2:  # it can fail: a power 1 % off
        assert unevenness(levels(times, 7.07)) > 1e-4


def test_uniform_quadratic_and_polynomial():
    vp, flow = ds.processes.vp_linear(), ds.processes.flow()
    np.testing.assert_allclose(schedules.uniform(vp, 4), [1, 0.75, 0.5, 0.25, 0], atol=1e-15)
    np.testing.assert_allclose(
        schedules.uniform(vp, 3, t_max=0.9, t_min=0.3, final="t_min"), [0.9, 0.7, 0.5, 0.3]
    )
    np.testing.assert_allclose(schedules.quadratic(flow, 2), [1, 0.25, 0])
    np.testing.assert_allclose(schedules.polynomial(flow, 2, power=3), [1, 0.125, 0])
    # powers of a table's time count from its clean end at -1
    table = ds.processes.vp_discrete()
    u = 1 - np.arange(6) / 5
    np.testing.assert_allclose(schedules.quadratic(table, 5), 1000 * u**2 - 1, rtol=1e-12)
    np.testing.assert_allclose(schedules.uniform(table, 5), 999 - 200 * np.arange(6), rtol=1e-12)
    np.testing.assert_allclose(
        schedules.polynomial(vp, 5, power=1.5, t_max=0.8, t_min=0.01, final="t_min") ** (2 / 3),
        0.8 ** (2 / 3) + np.arange(6) / 5 * (0.01 ** (2 / 3) - 0.8 ** (2 / 3)),
        rtol=1e-12,
    )
    shifted = schedules.uniform(ds.processes.flow(shift=3.0), 4)
    t = np.array([1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(shifted, 3 * t / (1 + 2 * t))


def test_uniform_on_a_table_is_trailing():
    process = ds.processes.vp_discrete()
    for n in (7, 10, 50):
        trailing = np.round(np.arange(1000, 0, -1000 / n)) - 1
        got = schedules.rounded(process, schedules.uniform(process, n))
        np.testing.assert_array_equal(got[:-1], trailing)
        assert got[-1] == -1
        np.testing.assert_array_equal(schedules.rounded(process, got), got)
    times = schedules.rounded(process, [998.6, 3.4, 0.2, -1.0])
    np.testing.assert_array_equal(times, [999.0, 3.0, 0.0, -1.0])
    with pytest.raises(ValueError, match="must decrease"):
        schedules.rounded(process, [3.4, 3.2, -1.0])
    with pytest.raises(ValueError, match="only a discrete process has integer labels; got Flow"):
        schedules.rounded(ds.processes.flow(), [1.0, 0.0])


@pytest.mark.parametrize("case", [c for c in CASES if c.solver.stages == 1], ids=str)
@pytest.mark.parametrize("name", ["vp_linear", "vp_discrete", "flow"])
def test_user_times_are_used_verbatim(case, name):
    process = PROCESSES[name]
    u = np.array([0.97, 0.61803398875, 0.5, 0.1, 0.0999])
    times = process.t_clean + u * (process.t_max - process.t_clean)
    single = times.astype(np.float32)  # not rounded again, whatever array they come in
    for given in (times, list(times), single, jnp.asarray(single)):
        got, exact = case.solver(process, given).times, np.asarray(given, np.float64)
        if case.levels == "more":
            assert np.isin(exact, got).all()
            assert got[0] == exact[0]
            assert got[-1] == exact[-1]
        else:
            np.testing.assert_array_equal(got, exact)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_solver_refuses_bad_times(case):
    process = PROCESSES["vp_linear"]
    for times, message in (
        ([1.0, 0.5, 0.5, 0.1], r"got times\[1\] = 0.5 and then times\[2\] = 0.5"),
        ([1.0, 0.5, 0.7, 0.1], r"must decrease from noise to data; got times\[1\] = 0.5 and then"),
        ([0.1, 0.5, 0.4, 0.9], r"got times\[1\] = 0.5 and then .* \(or from data to noise, to enc"),
        ([1.0, np.nan, 0.1], r"must be finite; got times\[1\] = nan"),
        ([1.0, 0.5, -np.inf], r"must be finite; got times\[2\] = -inf"),
        ([], r"must have shape \(n \+ 1,\)"),
        (0.5, r"must have shape \(n \+ 1,\)"),
        ([1.5, 0.5, 0.1], "must lie between t_clean = 0.0 and t_max = 1.0 of VPLinear; got 1.5"),
        ([1.0, 0.5, -0.1], "must lie between t_clean = 0.0 and t_max = 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            case.solver(process, times)
    if case.solver.stochastic:
        with pytest.raises(
            ValueError, match="adds noise, and so cannot encode: its times must dec"
        ):
            case.solver(process, [0.1, 0.3, 0.5, 0.7, 1.0])
    with pytest.raises(TypeError, match=r"(`times` must be a host array|host functions)"):
        jax.jit(lambda t: case.solver(process, t).a)(np.array([1.0, 0.5]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: schedules.uniform(p, 0), "`n` must be at least 1; got 0"),
        (lambda p: schedules.karras(p, 2.5), "`n` must be an integer; got 2.5"),
        (lambda p: schedules.karras(p, True), "`n` must be an integer; got True"),
        (lambda p: schedules.logsnr(p, 3, t_min=0.5, t_max=0.4), "`t_max` must exceed `t_min`"),
        (lambda p: schedules.logsnr(p, 3, t_max=1.5), "times must lie between"),
        (lambda p: schedules.logsnr(p, 3, t_min=-0.5), "times must lie between"),
        (lambda p: schedules.logsnr(p, 3, t_min=0.0), "spacing is infinite at t = 0"),
        (lambda p: schedules.karras(p, 3, final="end"), "`final` must be one of 'clean', 't_min'"),
        (lambda p: schedules.karras(p, 3, rho=0), "`rho` must be positive"),
        (lambda p: schedules.karras(p, 3, rho=np.inf), "`rho` must be positive and finite"),
        (lambda p: schedules.polynomial(p, 3, power=np.inf), "`power` must be positive and finite"),
        (lambda p: schedules.logsnr(p, 3, t_max=np.nan), "`t_max` must exceed `t_min`; got .*nan"),
        (lambda p: schedules.uniform(p, 3, t_max=1.01), "times must lie between"),
        (lambda p: schedules.uniform(p, 3, t_max=0.0), "`t_max` must exceed `t_min`"),
        (lambda p: schedules.uniform(p, -2), "`n` must be at least 1; got -2"),
        (lambda p: schedules.uniform(p, "3"), "`n` must be an integer; got '3'"),
        (lambda p: schedules.polynomial(p, 3, power=-1), "`power` must be positive"),
        (lambda p: schedules.uniform(p, 3, t_min=0.1), '`t_min` has no effect with final="clean"'),
        (lambda p: schedules.get("sgm"), "`schedule` must be one of"),
        (lambda p: solvers.ddim(p, [1.0]), r"must have shape \(n \+ 1,\)"),
        (lambda p: solvers.ddim(p, [[1.0, 0.5]]), r"must have shape \(n \+ 1,\)"),
        (lambda p: solvers.ddim(p, [1.0, np.nan, 0.1]), r"must be finite; got times\[1\] = nan"),
        (
            lambda p: solvers.ddim(p, [1.0, 0.5, 0.5]),
            r"must decrease from noise to data; got times\[1\] = 0.5 and then times\[2\] = 0.5",
        ),
        (lambda p: solvers.ddim(p, "abc"), "must be an array of numbers"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(ds.processes.vp_linear())


def test_host_functions_say_so_when_traced():
    process = ds.processes.vp_linear()
    with pytest.raises(TypeError, match="`times` must be a host array"):
        jax.jit(lambda t: solvers.ddim(process, t).a)(np.array([1.0, 0.5]))
    with pytest.raises(TypeError, match="schedules are host functions"):
        jax.jit(lambda p: schedules.karras(p, 3))(process)
    with pytest.raises(TypeError, match="solvers are host functions"):
        jax.jit(lambda p: solvers.ddim(p, [1.0, 0.5]).a)(process)
