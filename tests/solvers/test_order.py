"""Measured orders of convergence, in float64, on a skewed mixture whose ODE is solved exactly.

A constant field would prove nothing: it integrates exactly under any weights that sum to one. The
slope is taken between the two finest grids above round-off, and must be the stated order to 0.15.
"""

import dataclasses

import numpy as np
import pytest
from cases import CASES, DETERMINISTIC, skewed_mixture, twin

import diffsamp as ds

# uniform in t, except where that would be uniform in sigma / alpha, which flatters fixed weights
PROCESSES = {
    "vp_linear": (ds.processes.vp_linear(), 0.9, 0.2, np.linspace),
    "edm": (ds.processes.edm(0.02, 5.0), 4.5, 1.0, np.geomspace),
    "flow": (ds.processes.flow(), 0.9, 0.2, np.linspace),
}
# errors below this are rounding (1e-16 amplified by hundreds of steps), not the method
ROUND_OFF = 3e-12


def slope(case, process, t_start, t_end, grid, change=None):
    """The slope between the two finest grids above round-off."""
    target = skewed_mixture()
    level = float(np.hypot(process.alpha(t_start), process.sigma(t_start)))
    x = np.linspace(-2, 2, 33)[:, None] * level
    truth = target.ode_solution(x, process, t_start, t_end)
    usable = []
    for n in reversed(case.steps):
        times = grid(t_start, t_end, n + 1)
        tableau = case.solver(process, times, **case.free)
        if change is not None:
            tableau = change(tableau)
        exact = [
            target.ode_solution(x, process, t_start, tableau.times[k + 1])
            for k in range(case.exact_start)
        ]
        x_end = twin(tableau, target.posterior, x, exact)
        error = np.sqrt(np.mean((x_end - truth) ** 2))
        if error > ROUND_OFF:
            usable.append((n, error))
        if len(usable) == 2:
            break
    (n_2, e_2), (n_1, e_1) = usable
    return float(np.log(e_1 / e_2) / np.log(n_2 / n_1))


def in_turn(cases, places):
    """Every case in every place; in the default run each in one of them."""
    for i, case in enumerate(cases):
        for j, where in enumerate(places):
            marks = () if i % len(places) == j else pytest.mark.long
            yield pytest.param(case, where, marks=marks, id=f"{case}-{where}")


@pytest.mark.parametrize(("case", "where"), list(in_turn(DETERMINISTIC, PROCESSES)))
def test_order(case, where):
    order = case.uniform.get(where, case.order)
    assert slope(case, *PROCESSES[where]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(
    "case",
    [
        c if i % 8 == 0 else pytest.param(c, marks=pytest.mark.long)
        for i, c in enumerate(DETERMINISTIC)
    ],
    ids=str,
)
def test_a_wrong_coefficient_is_caught(case):
    """A weight off by 4 % (kept consistent, so that the self-check is silent) breaks the order.

    4 % of the newest output's weight goes to the one before it; a method of one output, or of order
    1, has its weight changed instead.
    """

    def change(tableau):
        a, b = tableau.a.copy(), tableau.b.copy()
        if tableau.q > 1 and case.order > 1:
            moved = 0.04 * b[1:, 0]
            b[1:, 0] -= moved
            b[1:, 1] += moved
        else:
            b[:, 0] *= 1.04
        return dataclasses.replace(tableau, a=a, b=b)

    measured = slope(case, *PROCESSES["vp_linear"], change=change)
    assert measured < case.order - 0.15


def test_compatible_third_order_is_second():
    """DPM-Solver++ 3M with the factor 1 of the published codes is not a third-order method."""
    case = next(c for c in CASES if c.name == "dpmpp_3m")
    wrong = dataclasses.replace(case, free={**case.free, "compatible": True})
    assert slope(wrong, *PROCESSES["edm"]) < 2.3
    assert slope(case, *PROCESSES["edm"]) > 2.85


def test_cold_start_limits_explicit_multistep_methods_to_order_two():
    """What the docstrings say of ramps: one O(h^2) local error remains."""
    case = next(c for c in CASES if c.name == "deis_tab3")
    cold = dataclasses.replace(case, exact_start=0)
    assert slope(cold, *PROCESSES["flow"]) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("name", ["vp_linear", "flow"])
def test_heun_in_either_coordinates_is_second_order(name):
    case = next(c for c in CASES if c.name == "heun")
    for coordinates in ("edm", "flow"):
        one = dataclasses.replace(case, free={"coordinates": coordinates})
        assert slope(one, *PROCESSES[name]) == pytest.approx(2, abs=0.15)
