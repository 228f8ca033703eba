"""Optimised schedules: exact optima, closed forms on Gaussians, and what they gain."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import mixture
from scipy.integrate import quad
from scipy.optimize import minimize

import diffsamp as ds
from diffsamp import schedules, search, solvers
from diffsamp.search.dynamic import pair_costs

EDM = ds.processes.edm(0.02, 50.0)
WIDTH = 0.7


def gaussian(dim=4):
    return ds.targets.gaussian(np.zeros(dim), WIDTH**2).score_fn(EDM)


@pytest.mark.parametrize("weight", [0.8, 1.0, 1.3])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_dynamic_programming_is_brute_force(steps, weight):
    rng = np.random.default_rng(steps)
    for _ in range(20):
        cost = rng.uniform(0, 1, (9, 9)) ** 2
        cost[rng.random((9, 9)) < 0.15] = np.inf
        cost[np.arange(8), np.arange(1, 9)] = 0.3  # so that there is a path of 8
        paths = [(0, *inner, 8) for inner in itertools.combinations(range(1, 8), steps - 1)]

        def price(path, cost=cost):
            return sum(weight**k * cost[a, b] for k, (a, b) in enumerate(itertools.pairwise(path)))

        cheapest = min(price(path) for path in paths)
        if np.isinf(cheapest):
            with pytest.raises(ValueError, match="has a finite cost"):
                search.shortest_path(cost, steps, weight=weight)
        else:
            found = search.shortest_path(cost, steps, weight=weight)
            assert price(found) == pytest.approx(cheapest, rel=1e-12)
            assert len(found) == steps + 1


def test_shortest_path_refuses_what_it_cannot_use():
    cost = np.ones((4, 4))
    for call, message in (
        (lambda: search.shortest_path(cost[:3], 2), "square matrix"),
        (lambda: search.shortest_path(cost * np.nan, 2), "without NaN"),
        (lambda: search.shortest_path(cost, 4), "`steps` must be from 1 to 3; got 4"),
        (lambda: search.shortest_path(cost, 2, weight=0), "`weight` must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_step_costs_are_the_errors_of_euler_steps():
    """On a Gaussian the exact trajectory and the DDIM step are known."""
    score_fn = gaussian()
    x_T = EDM.prior_sample(jax.random.key(0), (48, 4))
    grid = schedules.logsnr(EDM, 200)
    costs = search.step_costs(score_fn, x_T, times=grid, batch=20)
    scale = np.sqrt(WIDTH**2 + grid**2)
    exact = np.asarray(x_T)[:, None] * (scale / scale[0])[:, None]  # (48, 201, 4)
    for i, j in ((0, 40), (10, 90), (100, 150), (150, 199)):
        data = exact[:, i] * WIDTH**2 / scale[i] ** 2
        end = exact[:, i] * grid[j] / grid[i] + data * (1 - grid[j] / grid[i])
        want = np.mean((end - exact[:, j]) ** 2)
        assert costs.cost[i, j] == pytest.approx(want, rel=3e-3)
    root = search.step_costs(score_fn, x_T, times=grid, kind="distance")
    assert root.cost[10, 90] <= np.sqrt(costs.cost[10, 90])
    assert np.all(np.tril(costs.cost) == 0)


def test_start_costs_and_deviations_of_a_gaussian():
    """Exact: the noise taken for the state, carried to the end; distances to the straight line."""
    score_fn = gaussian()
    x_T = EDM.prior_sample(jax.random.key(0), (48, 4))
    grid = schedules.logsnr(EDM, 60)
    costs = search.step_costs(score_fn, x_T, times=grid)
    scale = np.sqrt(WIDTH**2 + grid**2)
    tried = np.flatnonzero(np.isfinite(costs.start))
    assert tried[0] == 0
    assert costs.start[0] == 0
    assert len(tried) == 11
    for i in tried[4:]:
        lost = np.asarray(x_T) * (scale[i] / scale[0] - grid[i] / grid[0])
        want = np.mean((lost * scale[-1] / scale[i]) ** 2)
        assert costs.start[i] == pytest.approx(want, rel=0.02)
    # few steps begin late, many at the top; never where a start from t_max is cheaper
    paths = [costs.path(n) for n in (3, 5, 20)]
    assert paths[0][0] >= paths[1][0] >= paths[2][0]
    assert paths[0][0] > 0
    for n in (3, 5, 20):
        fixed, free = costs.path(n, free=False), costs.path(n)
        assert fixed[0] == 0
        assert costs.value(free) + costs.start[free[0]] <= costs.value(fixed)
    assert search.step_costs(score_fn, x_T, times=grid, free_start=False).start is None

    # all states of a sample lie on one ray, and so does every Euler step: no deviation
    straight = search.step_costs(score_fn, x_T, times=grid, kind="deviation")
    assert np.abs(straight.cost).max() < 1e-3
    assert straight.start is None
    # a network that says a constant direction off the ray
    turned = ds.ScoreFn(
        lambda p, x, t: jnp.tile(jnp.array([1.0, -1.0]), (x.shape[0], 1)),
        None,
        EDM,
        prediction="data",
    )
    off = search.step_costs(turned, jnp.ones((2, 2)), times=[4.0, 2.0, 1.0, 0.5], kind="deviation")
    assert np.abs(off.cost).max() < 1e-5  # D is constant: its trajectories are straight, too


def test_deviation_is_the_distance_to_the_chord():
    """Two states off the line between first and last, an Euler step that ends elsewhere."""
    points = np.array([[[4.0, 0.0]], [[2.0, 1.0]], [[1.0, 2.0]], [[0.0, 0.0]]])
    outputs = np.array([[[1.0, 3.0]], [[0.0, -1.0]], [[2.0, 2.0]]])
    sigma, alpha = np.array([4.0, 2.0, 1.0, 0.5]), np.ones(4)
    cost = pair_costs(*map(jnp.asarray, (points, outputs, alpha, sigma)), kind="deviation")
    for i, j in ((0, 1), (0, 2), (1, 2), (2, 3)):
        ratio = sigma[j] / sigma[i]
        end = ratio * points[i, 0] + (1 - ratio) * outputs[i, 0]
        # the chord is the first axis; root mean square over two elements
        want = (abs(end[1]) - abs(points[j, 0, 1])) / np.sqrt(2)
        assert float(cost[i, j]) == pytest.approx(want, abs=1e-6)


def test_a_later_start_in_compare_and_distill():
    """A schedule that begins below t_max is sampled from scaled starts, and distilled so."""
    score_fn, x_T = gaussian(), EDM.prior_sample(jax.random.key(0), (96, 4))
    low = lambda process, n: schedules.logsnr(process, n, t_max=8.0)  # noqa: E731
    found = search.compare(
        score_fn, x_T, nfe=(3,), solver=("ddim",), schedule={"low": low, "full": schedules.logsnr}
    )
    entry = found.best(3, where=lambda e: e.schedule == "low")
    assert entry.tableau.rows == 4
    assert entry.tableau.nfe == 3
    by_hand = ds.sample(score_fn, solvers.ddim(EDM, low(EDM, 3)), x_T * (8.0 / 50.0))
    np.testing.assert_allclose(ds.sample(score_fn, entry.tableau, x_T), by_hand, rtol=1e-5)
    plan = search.distill(score_fn, x_T, start=entry.tableau, key=jax.random.key(1), steps=40)
    assert plan.tableau.rows == 4
    assert plan.scores["psnr"]["held_out"]["found"] > plan.scores["psnr"]["held_out"]["start"]
    np.testing.assert_allclose(plan.tableau.a[0, 0], 8 / 50)


def test_the_deviation_is_gits_dev():
    """Distances from the line of the trajectory's ends: of the step's end less the trajectory's."""
    process = ds.processes.vp_linear()
    score_fn = mixture().score_fn(process)
    x_T = process.prior_sample(jax.random.key(0), (7, 4))
    grid = schedules.logsnr(process, 20, final="t_min")
    costs = search.step_costs(score_fn, x_T, times=grid, kind="deviation", batch=5)
    run = ds.trajectory(score_fn, ds.solvers.unipc(process, grid, order=3), x_T)
    alpha, sigma = process.alpha(grid)[:, None, None], process.sigma(grid)[:, None, None]
    points, outputs = np.asarray(run.points, np.float64), np.asarray(run.outputs, np.float64)
    path, rho = points / alpha, (sigma / alpha)[:, 0, 0]
    slope = (points[:-1] - alpha[:-1] * outputs) / sigma[:-1]  # eps, the slope in x / alpha

    def deviation(x):
        unit = (path[-1] - path[0]) / np.linalg.norm(path[-1] - path[0], axis=1, keepdims=True)
        rest = path[-1] - x
        rest = rest - np.sum(rest * unit, axis=1, keepdims=True) * unit
        return np.linalg.norm(rest, axis=1)

    for i, j in ((0, 1), (0, 12), (5, 9), (14, 20)):
        end = path[i] + (rho[j] - rho[i]) * slope[i]
        want = np.mean(deviation(end) - deviation(path[j])) / 2  # root mean square of 4 elements
        assert costs.cost[i, j] == pytest.approx(want, abs=3e-6 * np.abs(path[i]).max())
    assert np.all(np.isfinite(costs.schedule(5)))
    flow = ds.processes.flow()
    times = schedules.uniform(flow, 5)
    with pytest.raises(ValueError, match='pass `times` that start below it, or take kind="dis'):
        search.step_costs(mixture().score_fn(flow), x_T, times=times, kind="deviation")


def test_a_schedule_of_least_cost_helps_ddim():
    """Fewer errors than the usual grids, for the solver whose steps were measured."""
    score_fn = mixture().score_fn(EDM)
    costs = search.step_costs(score_fn, EDM.prior_sample(jax.random.key(0), (64, 4)), points=60)
    fresh = EDM.prior_sample(jax.random.key(1), (256, 4))
    table = search.compare(
        score_fn,
        fresh,
        nfe=(4, 6, 10),
        solver=("ddim",),
        schedule={name: schedules.get(name) for name in schedules.GRIDS}
        | {"local": costs, "later": costs.with_weight(1.2)},
        scores={"rmse": search.objective.rmse()},
    )
    for n in (4, 6, 10):
        # the squared error, which the costs add up; and with more weight on later steps the log
        grids = table.best(n, by="rmse", where=lambda e: e.schedule in schedules.GRIDS)
        found = table.best(n, by="rmse")
        assert found.schedule in ("local", "later")
        assert found.scores["rmse"] < 0.8 * grids.scores["rmse"]
        assert table.best(n).schedule == "later"
    heavier = costs.with_weight(1.5).schedule(6)
    assert np.all(heavier[1:-1] <= costs.schedule(6)[1:-1])  # more points near the data
    path = costs.path(6)
    assert costs.value(path) <= costs.value(np.linspace(0, 60, 7).astype(int))


def bound(high, low):
    """KLUB of one step for the Gaussian, per dimension, by quadrature of the closed form."""

    def variance(rho):
        return WIDTH**4 / (WIDTH**2 + rho**2)

    return quad(lambda r: r**-3 * (variance(r) - variance(high)), low, high, limit=200)[0]


def total(levels):
    return sum(bound(a, b) for a, b in itertools.pairwise(levels))


@pytest.fixture(scope="module")
def aligned():
    data = WIDTH * jax.random.normal(jax.random.key(0), (512, 4))
    return search.align_steps(
        gaussian(), data, 8, key=jax.random.key(2), final="t_min", batch=256, rounds=3
    )


def test_the_bound_is_the_closed_form():
    data = WIDTH * jax.random.normal(jax.random.key(0), (512, 4))
    levels = np.geomspace(50.0, 0.02, 25)
    costs = search.align_costs(gaussian(), data, levels, key=jax.random.key(1), batch=200)
    pairs = [(0, 3), (0, 24), (5, 6), (10, 14), (18, 24), (23, 24)]
    want = np.array([bound(levels[i], levels[j]) for i, j in pairs])
    got = np.array([costs.cost[i, j] for i, j in pairs])
    np.testing.assert_allclose(got, want, rtol=0.12)  # 2048 draws of a squared difference
    np.testing.assert_allclose(np.median(got / want), 1, atol=0.05)


def test_aligned_steps_are_the_optimum(aligned):
    """Against a numerical minimum of the closed form, over the times; and it decreased."""
    found = total(aligned)

    def inner(logs):
        return total([50.0, *np.exp(logs), 0.02])

    best = minimize(
        inner, np.log(aligned[1:-1]), method="Nelder-Mead", options={"maxiter": 3000, "fatol": 1e-9}
    )
    assert found < 1.03 * best.fun
    np.testing.assert_allclose(np.log(aligned[1:-1]), best.x, atol=0.2)
    for name in ("logsnr", "karras", "kl_optimal"):
        assert found < 0.95 * total(schedules.get(name)(EDM, 8, final="t_min"))
    # one round, without refinement, is worse
    data = WIDTH * jax.random.normal(jax.random.key(0), (512, 4))
    once = search.align_steps(
        gaussian(), data, 8, key=jax.random.key(2), final="t_min", batch=256, rounds=1, points=20
    )
    assert found < total(once)


def test_aligned_steps_end_clean_and_fit_any_process():
    process = ds.processes.vp_linear()
    target = ds.targets.gaussian(np.zeros(2), 0.25)
    data = 0.5 * jax.random.normal(jax.random.key(0), (64, 2))
    times = search.align_steps(target.score_fn(process), data, 6, key=jax.random.key(1), points=24)
    assert times.shape == (7,)
    assert (times[0], times[-1]) == (process.t_max, 0.0)
    assert solvers.ddim(process, times).nfe == 6


def test_kl_optimal_is_optimal_for_the_ode_on_a_unit_gaussian():
    """Its theorem: of all steps of DDIM, uniform angles come closest to the data's width."""
    process = ds.processes.edm(0.02, 20.0)

    def width(times):
        # DDIM on N(0, 1) is a product of factors, started from the exact width
        rho = np.asarray(times)
        factors = rho[1:] / rho[:-1] + (1 - rho[1:] / rho[:-1]) / (1 + rho[:-1] ** 2)
        return np.sqrt(1 + rho[0] ** 2) * np.prod(factors) / np.sqrt(1 + rho[-1] ** 2)

    times = schedules.kl_optimal(process, 7, final="t_min")
    error = abs(width(times) - 1)
    rng = np.random.default_rng(0)
    for _ in range(50):
        other = times.copy()
        other[1:-1] *= np.exp(rng.normal(0, 0.03, 6))
        assert abs(width(other) - 1) > error


def test_errors():
    score_fn = gaussian(2)
    x = jnp.ones((4, 2))
    nan = ds.ScoreFn(lambda p, x, t: x * jnp.nan, 1.0, EDM, prediction="data")
    key = jax.random.key(0)
    for call, message in (
        (lambda: search.step_costs(score_fn, x, kind="no"), "`kind` must be one of 'local'"),
        (lambda: search.step_costs(nan, x, points=5), "fine trajectory is not finite"),
        (lambda: search.align_costs(nan, x, [3.0, 2.0, 1.0], key=key), "predictions are not all"),
        (lambda: search.align_costs(score_fn, x, [1.0, 2.0], key=key), "noise levels that fall"),
        (lambda: search.align_steps(score_fn, x, 1, key=key), "`n` must be at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
