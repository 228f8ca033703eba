"""EPD against its published loop, the solver it contains, and the condition on its order."""

import dataclasses

import numpy as np
import pytest
from cases import Case, skewed_mixture, twin

import diffsamp as ds
from diffsamp import schedules, solvers

EDM, FLOW, VP = ds.processes.edm(0.02, 20.0), ds.processes.flow(), ds.processes.vp_linear()
X = np.linspace(-2, 2, 7)[:, None]


def published(velocity, x, times, positions, weights):
    """The authors' sampler: dx/dt = velocity(x, t), a row of positions and weights a step."""
    for s, t, r, w in zip(times, times[1:], positions, weights, strict=False):
        slope = velocity(x, s)
        if t == 0:
            return x + (t - s) * slope
        inner = [t**k * s ** (1 - k) for k in r]
        slopes = [velocity(x + (v - s) * slope, v) for v in inner]
        x = x + (t - s) * sum(share * one for share, one in zip(w, slopes, strict=True))
    return x


def velocity_of(process):
    def velocity(x, t):
        data, noise = skewed_mixture().posterior(x, process.alpha(t), process.sigma(t))
        return process.alpha_dot(t) * data + process.sigma_dot(t) * noise

    return velocity


@pytest.mark.parametrize("process", [EDM, FLOW], ids=["edm", "flow"])
@pytest.mark.parametrize("points", [1, 2, 3])
@pytest.mark.parametrize("learned", [False, True])
def test_as_published(process, points, learned):
    """In EDM's coordinates and in those of flow models, whose state and time are their own."""
    times = schedules.logsnr(process, 5)
    positions = np.tile(np.arange(1, points + 1) / (points + 1), (5, 1))
    weights = np.full((5, points), 1 / points)
    given = {}
    if learned:
        rng = np.random.default_rng(points)
        positions = rng.uniform(0.1, 1.0, (5, points))
        weights = rng.dirichlet(np.ones(points), 5)
        given = {"positions": positions, "weights": weights}
    tableau = solvers.epd(process, times, points=points, **given)
    got = twin(tableau, skewed_mixture().posterior, X)
    want = published(velocity_of(process), X, times, positions, weights)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)
    assert tableau.nfe == 4 * (points + 1) + 1
    assert tableau.latency == 4 * 2 + 1


@pytest.mark.parametrize("process", [EDM, VP], ids=["edm", "vp"])
def test_one_point_in_the_middle_is_dpm2(process):
    times = schedules.logsnr(process, 6)
    one = solvers.epd(process, times, points=1, coordinates="edm")
    two = solvers.dpm2(process, times)
    np.testing.assert_allclose(one.times, two.times, rtol=1e-12)
    for mine, other in zip(one.unroll(), two.unroll(), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("weights", "order"), [((0.7, 0.3), 1), ((0.25, 0.75), 1), ((0.5, 0.5), 2)]
)
def test_of_second_order_where_the_mean_of_the_points_is_the_middle(weights, order):
    process = ds.processes.edm(0.02, 5.0)
    x = np.linspace(-2, 2, 9)[:, None] * 4.5
    truth = skewed_mixture().ode_solution(x, process, 4.5, 1.0)
    case = dataclasses.replace(Case("epd", order), steps=(160, 320))
    errors = []
    for n in case.steps:
        tableau = case.solver(process, np.geomspace(4.5, 1.0, n + 1), weights=weights)
        end = twin(tableau, skewed_mixture().posterior, x)
        errors.append(np.sqrt(np.mean((end - truth) ** 2)))
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_rising_times_encode_from_the_data():
    """From sigma = 0, where the geometric mean is 0: the way down again gives it back."""
    up = np.linspace(0.0, 0.9, 41)
    with np.errstate(invalid="ignore"):  # the self-check has no noise to begin with
        rising = solvers.epd(FLOW, up)
    assert np.all(np.diff(rising.times) >= 0)
    assert rising.times[1] > 0
    encoded = twin(rising, skewed_mixture().posterior, X)
    back = twin(solvers.epd(FLOW, up[::-1]), skewed_mixture().posterior, encoded)
    np.testing.assert_allclose(back, X, atol=0.05)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"points": 0}, "`points` must be at least 1"),
        ({"positions": [0.0, 0.5]}, "`positions` must lie above 0"),
        ({"positions": [0.5, 1.2]}, "`positions` must lie above 0"),
        ({"weights": [0.5, 0.6]}, "must sum to 1"),
        ({"weights": [1.5, -0.5]}, "must not be negative"),
        ({"weights": [1.0]}, r"must have shape \(2,\), or \(4, 2\)"),
    ],
)
def test_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        solvers.epd(EDM, schedules.logsnr(EDM, 4), **options)
