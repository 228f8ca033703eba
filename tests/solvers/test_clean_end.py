"""Runge-Kutta methods on flow models keep their order to the clean end."""

import itertools

import numpy as np
import pytest

import diffsamp as ds
from diffsamp import solvers

FLOW = ds.processes.flow()
ORDERS = {
    "heun2": 2,
    "midpoint2": 2,
    "ralston2": 2,
    "kutta3": 3,
    "heun3": 3,
    "ralston3": 3,
    "ssprk3": 3,
    "rk4": 4,
}
STD = 0.6


def velocity(x, t):
    """Of N(0, STD^2) under x = (1 - t) x_0 + t eps: x times the slope of log std(t)."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    return x * (t - (1 - t) * STD**2) / variance


def run(tableau, x):
    """In float64, with the network's own output: every row asks for the velocity."""
    states, outputs = [x], []
    for n in range(tableau.rows):
        assert tuple(tableau.target[n]) == (-1.0, 1.0)
        outputs.append(velocity(states[-1], tableau.times[n]))
        new = sum(tableau.a[n, i] * states[n - i] for i in range(min(tableau.p, n + 1)))
        states.append(
            new + sum(tableau.b[n, j] * outputs[n - j] for j in range(min(tableau.q, n + 1)))
        )
    return states[-1]


def textbook(times, method):
    x = 1.0
    fractions, lower, weights = solvers._charts.BUTCHER[method]
    for s, t in itertools.pairwise(times):
        slopes = []
        for c, row in zip(fractions, lower, strict=True):
            stage = x + (t - s) * sum(a * k for a, k in zip(row, slopes, strict=True))
            slopes.append(velocity(stage, s + c * (t - s)))
        x = x + (t - s) * sum(w * k for w, k in zip(weights, slopes, strict=True))
    return x


@pytest.mark.parametrize("method", ORDERS)
def test_order_through_the_clean_end(method):
    errors = []
    for n in (10, 20, 40, 80):
        times = ds.schedules.uniform(FLOW, n)
        tableau = solvers.runge_kutta(FLOW, times, method=method)
        assert tableau.nfe == n * len(solvers._charts.BUTCHER[method][0])
        found = run(tableau, 1.0)
        np.testing.assert_allclose(found, textbook(times, method), rtol=1e-11)
        errors.append(abs(found - STD))
    slope = np.log2(errors[-2] / errors[-1])
    # the midpoint's leading error happens to vanish on this target
    assert (
        ORDERS[method] - 0.25 < slope < ORDERS[method] + (1.25 if method == "midpoint2" else 0.25)
    )
    euler = solvers.runge_kutta(
        FLOW, ds.schedules.uniform(FLOW, 80), method=method, clean_end="euler"
    )
    assert abs(run(euler, 1.0) - STD) > 3 * errors[-1]


def test_heun_too_and_only_where_a_velocity_is_known():
    times = ds.schedules.uniform(FLOW, 8)
    network = ds.targets.gaussian([0.0], STD**2).score_fn(FLOW, "velocity")
    tableau = solvers.heun(FLOW, times)
    assert tableau.nfe == 16
    assert solvers.get("heun")(FLOW, times).nfe == 15
    x = np.linspace(-1, 1, 5)[:, None].astype(np.float32)
    np.testing.assert_allclose(ds.sample(network, tableau, x), run(tableau, x), atol=1e-5)
    data = ds.targets.gaussian([0.0], STD**2).score_fn(FLOW, "data")
    with pytest.raises(ValueError, match="does not determine the wanted prediction at t = 0"):
        ds.sample(data, tableau, x)
    ds.sample(data, solvers.heun(FLOW, times, clean_end="euler"), x)
    edm = ds.processes.edm()
    assert solvers.heun(edm, ds.schedules.karras(edm, 4)).nfe == 7
    with pytest.raises(ValueError, match="for the flow process in flow coordinates"):
        solvers.heun(edm, ds.schedules.karras(edm, 4), clean_end="full")
