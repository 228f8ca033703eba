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
@pytest.mark.parametrize("name", [*schedules.GRIDS, "exponential", "beta57", "bong_tangent"])
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
    spaced_in_log_snr = name in ("logsnr", "karras", "exponential")
    if spaced_in_log_snr and np.isneginf(process.log_snr(process.t_max)):
        # alpha = 0 at t_max: the spacing starts where log-SNR is -5.1
        assert process.log_snr(clean[0]) == pytest.approx(-5.1, rel=1e-12)
    else:
        assert clean[0] == process.t_max
    if (spaced_in_log_snr or name == "kl_optimal") and n > 1:
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


def test_kl_optimal_is_comfyuis_formula():
    """sigma_i = tan(i/(n-1) arctan(sigma_min) + (1 - i/(n-1)) arctan(sigma_max)), then 0."""
    process, n = ds.processes.edm(), 12
    part = np.linspace(0, 1, n)
    want = np.tan(part * np.arctan(0.002) + (1 - part) * np.arctan(80.0))
    got = schedules.kl_optimal(process, n)
    np.testing.assert_allclose(got[:-1], want, rtol=1e-9)
    # the cosine process's own uniform spacing is uniform in that angle, up to its offset s
    vp = ds.processes.vp_cosine()
    steps = np.diff(schedules.kl_optimal(vp, 9)[:-1])
    np.testing.assert_allclose(steps[:-1], steps[0], rtol=2e-3)


def published_dmn_objective(lam):
    """The authors' closed forms, for order 3 and at least 4 steps."""
    e, h, steps = np.exp(lam), np.diff(lam), len(lam) - 1
    sigma, alpha = 1 / np.sqrt(1 + e**2), 1 / np.sqrt(1 + e**-2.0)
    err, total, c = sigma**2 / alpha, 0.0, np.zeros(len(lam))

    def h_0(x):
        return np.exp(x) - 1

    def h_1(x):
        return np.exp(x) * x - h_0(x)

    def h_2(x):
        return np.exp(x) * x * x - 2 * h_1(x)

    for s in range(steps):
        x, start = h[s], e[s]
        if s in (0, steps - 1):
            total += abs(start * h_0(x) * err[s])
            continue
        if s in (1, steps - 2):
            a = h[s - 1]
            weights = [-start * h_1(x) / a, start * (h_1(x) + a * h_0(x)) / a]
        else:
            a, b = h[s - 2], h[s - 1]
            weights = [
                start * (h_2(x) + b * h_1(x)) / (a * (a + b)),
                -start * (h_2(x) + (a + b) * h_1(x)) / (a * b),
                start * (h_2(x) + (2 * b + a) * h_1(x) + b * (a + b) * h_0(x)) / (b * (a + b)),
            ]
        at = np.arange(s - len(weights) + 1, s + 1)
        if s >= 3:
            c[at] += err[at] * weights
        else:
            total += np.linalg.norm(err[at] * weights)
    return total + np.abs(c).sum()


@pytest.mark.parametrize("n", [5, 8, 12])
def test_dmn_minimises_the_published_objective(n):
    process = ds.processes.vp_linear()
    rng = np.random.default_rng(n)
    for _ in range(3):
        lam = np.cumsum(rng.uniform(0.3, 2, n + 1)) - 5
        want = published_dmn_objective(lam) * np.exp(-lam[-1])
        assert schedules.dmn_bound(lam) == pytest.approx(want, rel=1e-10)
    found = process.log_snr(schedules.dmn(process, n, final="t_min"))
    least = published_dmn_objective(found)
    for name in ("logsnr", "karras", "uniform"):
        other = process.log_snr(schedules.get(name)(process, n, final="t_min"))
        assert least < published_dmn_objective(other)
    # neither a single time can be moved to gain, nor all of them at once
    moves = [*np.eye(n - 1), *-np.eye(n - 1), *rng.uniform(-1, 1, (200, n - 1))]
    for size in (1e-4, 1e-3, 0.02):
        for move in moves:
            moved = found.copy()
            moved[1:-1] += size * move * np.minimum(np.diff(found)[1:], np.diff(found)[:-1])
            assert published_dmn_objective(moved) > least * (1 - 1e-6)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_dmn_on_every_process(process, n):
    clean, ending = schedules.dmn(process, n), schedules.dmn(process, n, final="t_min")
    for times in (clean, ending):
        assert times.shape == (n + 1,)
        assert np.all(np.diff(times) < 0)
    assert clean[0] == ending[0] == schedules.logsnr(process, n)[0]
    assert clean[-1] == process.t_clean
    assert ending[-1] == process.t_min
    with pytest.raises(ValueError, match="`order` must be from 1 to 3"):
        schedules.dmn(process, n, order=4)


def published_bong_tangent(steps, pivot=0.6, slope=0.2):
    """RES4LYF's loops, as Python integers and floats."""
    from math import atan, pi

    def heights(size, slope, pivot, start, end):
        top, bottom = (((2 / pi) * atan(-slope * (x - pivot)) + 1) / 2 for x in (0, size - 1))
        return [
            ((((2 / pi) * atan(-slope * (x - pivot)) + 1) / 2) - bottom)
            * (1 / (top - bottom))
            * (start - end)
            + end
            for x in range(size)
        ]

    steps += 2
    midpoint = int((steps * pivot + steps * pivot) / 2)
    at, slope = int(steps * pivot), slope / (steps / 40)
    lower = heights(steps - midpoint, slope, at - midpoint, 0.5, 0.0)
    return heights(midpoint, slope, at, 1.0, 0.5)[:-1] + lower


def test_bong_tangent_is_the_published_one():
    flow, table = ds.processes.flow(), ds.processes.vp_discrete()
    for n in (2, 3, 4, 8, 10, 20, 37, 50):
        want = published_bong_tangent(n)
        assert len(want) == n + 1
        got = schedules.bong_tangent(flow, n)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-14)
        assert 0.5 in got.round(12)
        np.testing.assert_allclose(schedules.bong_tangent(table, n), 1000 * got - 1, atol=1e-10)
    other = schedules.bong_tangent(flow, 20, slopes=(0.204, 0.204))  # it can fail: 2 % off
    assert np.abs(other - published_bong_tangent(20)).max() > 1e-3
    np.testing.assert_array_equal(schedules.bong_tangent(flow, 1), [1.0, 0.0])
    for options, message in (
        ({"middle": 1.0}, "`start`, `middle` and `end` must fall"),
        ({"pivots": (0.6, 1.0)}, "`pivots` must lie between 0 and 1"),
        ({"pivots": (0.1, 0.1)}, "leave one of the curves of 5 steps no points"),
    ):
        with pytest.raises(ValueError, match=message):
            schedules.bong_tangent(flow, 5, **options)


def test_beta57_is_a_beta():
    from scipy.special import betainc

    process = ds.processes.flow()
    times = schedules.get("beta57")(process, 9)
    np.testing.assert_array_equal(times, schedules.beta(process, 9, a=0.5, b=0.7))
    np.testing.assert_allclose(betainc(0.5, 0.7, times), 1 - np.arange(10) / 9, atol=1e-12)


def test_beta_is_quantiles_of_time():
    from scipy.special import betainc

    flow = ds.processes.flow()
    times = schedules.beta(flow, 10, a=0.6, b=0.6)
    # the inverse: the distribution function of the times is uniform
    np.testing.assert_allclose(betainc(0.6, 0.6, times), 1 - np.arange(11) / 10, atol=1e-12)
    skewed = schedules.beta(flow, 10, a=0.5, b=2.0)
    np.testing.assert_allclose(betainc(0.5, 2.0, skewed), 1 - np.arange(11) / 10, atol=1e-12)
    assert skewed[5] < times[5]  # a small `a` is dense at the clean end
    # ComfyUI: labels rint(ppf(1 - i/n) (T - 1)), where ours start from the clean end at -1
    table, n = ds.processes.vp_discrete(), 20
    from scipy.stats import beta as distribution

    quantiles = distribution.ppf(1 - np.arange(n) / n, 0.6, 0.6)
    ours = schedules.rounded(table, schedules.beta(table, n))[:-1]
    assert np.abs(ours - np.rint(quantiles * 999)).max() <= 1
    # diffusers: quantiles of sigma; an exact parity of those is in test_peers ("euler beta")


def test_cosine_and_shift_by_hand():
    flow = ds.processes.flow()
    u = np.arange(5) / 4
    np.testing.assert_allclose(schedules.cosine(flow, 4), np.cos(np.pi * u / 2), atol=1e-15)
    np.testing.assert_allclose(
        schedules.cosine(flow, 4, sway=0.4),
        1 - (u + 0.4 * (np.cos(np.pi * u / 2) - 1 + u)),
        atol=1e-15,
    )
    np.testing.assert_allclose(schedules.cosine(flow, 7, sway=0.0), schedules.uniform(flow, 7))
    # the shift as a schedule is the shift of the process
    np.testing.assert_allclose(
        schedules.flow_shift(flow, 9, shift=2.5), schedules.uniform(ds.processes.flow(2.5), 9)
    )
    # FLUX: mu = 0.5 at 256 tokens, 1.15 at 4096
    assert schedules.resolution_shift(256) == pytest.approx(np.exp(0.5))
    assert schedules.resolution_shift(4096) == pytest.approx(np.exp(1.15))
    assert schedules.resolution_shift(1024) == pytest.approx(np.exp(0.5 + 0.65 * 768 / 3840))


@pytest.mark.parametrize("n", [2, 3, 8, 13, 40])
def test_linear_quadratic_is_mochis(n):
    """Mochi's coefficients, i^2 and i and 1, written out."""
    threshold, m = 0.025, n // 2
    diff = m - threshold * n
    square = diff / (m * (n - m) ** 2)
    slope = threshold / m - 2 * diff / (n - m) ** 2
    i = np.arange(n + 1)
    late = square * i**2 + slope * i + square * m**2
    want = 1 - np.where(i < m, i * threshold / m, late)
    want[-1] = 0
    np.testing.assert_allclose(schedules.linear_quadratic(ds.processes.flow(), n), want, atol=1e-13)


@pytest.mark.parametrize("n", [1, 2, 4, 7, 10, 20, 30, 61, 333, 1000])
def test_label_grids(n):
    """Against the rules as the other libraries state them, and where those miscount."""
    table = ds.processes.vp_discrete()
    names = [name for name in schedules.LABELS if (name, n) != ("ddim_uniform", 1000)]
    for name in names:
        times = schedules.get(name)(table, n)
        assert times.shape == (n + 1,)
        assert times[-1] == -1
        assert np.all(np.diff(times) < 0)
    labels = {name: schedules.get(name)(table, n)[:-1].tolist() for name in names}
    # diffusers: np.round(np.arange(T, 0, -T / n)) - 1, which has one label too many for n = 61
    theirs = np.round(np.arange(1000, 0, -1000 / n)) - 1
    assert labels["trailing"] == theirs[:n].tolist()
    assert (len(theirs) > n) == (n == 61)
    assert labels["leading"] == (np.arange(n) * (1000 // n))[::-1].tolist()
    assert labels["linspace"] == np.linspace(0, 999, n).round()[::-1].tolist() or n == 1
    # ComfyUI: sigmas[-(1 + int(i T / n))]; labels linspace(T - 1, 0, n + 1)[:-1]
    assert labels["simple"] == [999 - int(i * (1000 / n)) for i in range(n)]
    assert labels["sgm_uniform"] == np.linspace(999, 0, n + 1)[:-1].tolist()
    # ComfyUI: counting up from 1 in strides; more than n labels unless n divides T - 1 well
    theirs = list(range(1, 1000, max(1000 // n, 1)))[::-1]
    if n < 1000:
        assert labels["ddim_uniform"] == theirs[len(theirs) - n :]
    assert (len(theirs) == n) == (n in (1, 2, 4, 10, 20, 333))


def test_multistep_classes_of_diffusers_space_one_more():
    table = ds.processes.vp_discrete()
    sampler = ds.from_diffusers({"_class_name": "DPMSolverMultistepScheduler"})
    np.testing.assert_array_equal(sampler.times(8), schedules.linspace(table, 8, points=9))
    config = {"timestep_spacing": "leading", "steps_offset": 1}
    for name, points in (("DPMSolverMultistep", 9), ("EulerDiscrete", 8)):
        sampler = ds.from_diffusers({"_class_name": f"{name}Scheduler", **config})
        np.testing.assert_array_equal(
            sampler.times(8), schedules.leading(table, 8, offset=1, points=points)
        )
    trailing = ds.from_diffusers(
        {"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "trailing"}
    )
    np.testing.assert_array_equal(trailing.times(8), schedules.trailing(table, 8))


def test_published_schedules():
    """The published numbers at their own n, their resampling rule at another, and the ends."""
    table = ds.processes.vp_discrete("scaled_linear", beta_start=0.00085, beta_end=0.012)
    for name in schedules.PUBLISHED:
        for rho in schedules.PUBLISHED[name][1]:
            assert np.all(np.diff(rho) < 0)
    times = schedules.get("ays_sdxl")(table, 10)
    rho = np.exp(-table.log_snr(times[:-1]))
    np.testing.assert_allclose(rho, schedules.PUBLISHED["ays_sdxl"][1][0][:-1], rtol=1e-4)
    assert times[0] == table.t_max  # 14.6146, which is this table's first level
    # diffusers' timesteps of the same schedule; 250 to 443 apart from its rounding
    named = [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]
    assert np.abs(times[:-1] - named).max() < 2.0
    # 5 steps: every other number, since log-linear resampling passes through the knots
    five = np.exp(-table.log_snr(schedules.get("ays_sdxl")(table, 5)[:-1]))
    np.testing.assert_allclose(five, rho[::2], rtol=1e-4)
    twenty = np.exp(-table.log_snr(schedules.get("ays_sdxl")(table, 20)[:-1]))
    np.testing.assert_allclose(twenty[1:19:2] ** 2, rho[:-1] * rho[1:], rtol=1e-4)
    # GITS has a table of its own for 4 steps, which is no resampling of the one for 10
    four = np.exp(-table.log_snr(schedules.get("gits_sd15")(table, 4)[:-1]))
    np.testing.assert_allclose(four, [14.6146, 2.36326075, 0.92192322, 0.36617002], rtol=1e-4)
    with pytest.raises(ValueError, match=r"covers sigma / alpha from 700 to .*; the process has"):
        schedules.get("ays_svd")(table, 10)
    np.testing.assert_allclose(
        schedules.get("ays_svd")(ds.processes.edm(0.002, 700.0), 10),
        [*schedules.PUBLISHED["ays_svd"][1][0][:-1], 0.0],
    )


def test_the_plot_shows_every_point():
    process = ds.processes.flow()
    grids = {name: schedules.get(name)(process, 8) for name in ("uniform", "karras")}
    figure = ds.plot.schedule(process, grids)
    left, right = figure.axes
    for i, times in enumerate(grids.values()):
        inside = times[(times > 0) & (times < 1)]
        np.testing.assert_allclose(left.lines[i].get_ydata(), inside / (1 - inside))
        np.testing.assert_allclose(right.lines[i].get_xdata(), inside / (1 - inside))
    assert len(ds.plot.schedule(process, grids["karras"]).axes[0].lines) == 1


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
        elif case.levels == "between":  # the steps are these, and the network is asked within
            np.testing.assert_array_equal(got[[0, -1]], exact[[0, -1]])
            assert np.all((exact[1:-1] > got[1:-1]) & (got[1:-1] > exact[2:]))
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
        (lambda p: schedules.trailing(p, 3), "only a discrete process has integer labels"),
        (
            lambda p: schedules.leading(ds.processes.vp_discrete(), 3, offset=400),
            r"`offset` = 400 puts labels outside 0 \.\. 999",
        ),
        (
            lambda p: schedules.simple(ds.processes.vp_discrete(), 1001),
            "`n` must be from 1 to 1000; got 1001",
        ),
        (lambda p: schedules.beta(p, 3, a=0), "`a` and `b` must be positive"),
        (lambda p: schedules.beta(p, 3, t_min=0.1), '`t_min` has no effect with final="clean"'),
        (lambda p: schedules.cosine(p, 3, sway=-1.1), "`sway` must lie between -1 and 1.752"),
        (lambda p: schedules.linear_quadratic(p, 3, threshold=1.0), "`threshold` must lie"),
        (lambda p: schedules.linear_quadratic(p, 3, linear_steps=3), "`linear_steps` must be from"),
        (lambda p: schedules.flow_shift(p, 3, shift=0.0), "`shift` must be positive and finite"),
        (lambda p: schedules.resolution_shift(9, base_tokens=4, max_tokens=4), "must differ"),
        (lambda p: schedules.published(p, 3, name="no"), "`name` must be one of 'ays_sd15'"),
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
