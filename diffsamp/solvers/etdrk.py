"""Exponential Runge-Kutta, Lawson and exponential Adams-Bashforth (ABNorsett) methods.

In log-SNR and data prediction the ODE is semilinear: with y = x / alpha and h a step,

    y_t = exp(-h) y_s + int_0^h exp(-(h - u)) D du.

With phi_k(c) = int_0^{c h} exp(-(c h - u)) (u / (c h))^{k-1} / (k-1)! du the methods are tables of
multiples of phi_k(c_i), the step's length included; Lawson's take the exponential into D instead.
`dpm.exponential_rk` has the methods of two and three stages with free nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from diffsamp._core.checks import expect_choice, expect_int, lowers
from diffsamp._core.types import Times
from diffsamp.processes import Process
from diffsamp.solvers._builder import Answer, Builder, total, transfer
from diffsamp.solvers._charts import BUTCHER, Butcher, Chart, runge_kutta_step
from diffsamp.solvers._weights import exponential_weights, phis
from diffsamp.tableau import Tableau

__all__ = ["abnorsett", "etdrk", "lawson"]

# (c -> phi_k(c) for k = 1, 2, 3) -> rows of the stages after the first, weights of the step
Phi = Callable[[float], tuple[float, float, float]]
Coefficients = Callable[[Phi], tuple[list[list[float]], list[float]]]
_QUARTER = (0.5, 0.5, 1.0)  # where the stages of the methods of fourth order lie


def _last(phi: Phi) -> tuple[float, float, float]:
    """Weights of the start, of the middle's answers together, and of the end: Simpson's rule."""
    phi_1, phi_2, phi_3 = phi(1)
    return phi_1 - 3 * phi_2 + 4 * phi_3, 4 * phi_2 - 8 * phi_3, 4 * phi_3 - phi_2


def _etdrk2(phi: Phi) -> tuple[list[list[float]], list[float]]:
    phi_1, phi_2, _ = phi(1)
    return [[phi_1]], [phi_1 - phi_2, phi_2]


def _etdrk3(phi: Phi) -> tuple[list[list[float]], list[float]]:
    phi_1 = phi(1)[0]
    return [[phi(0.5)[0]], [-phi_1, 2 * phi_1]], [*_last(phi)]


def _etdrk4(phi: Phi) -> tuple[list[list[float]], list[float]]:
    half, (start, middle, end) = phi(0.5)[0], _last(phi)
    rows = [[half], [0.0, half], [phi(1)[0] - 2 * half, 0.0, 2 * half]]
    return rows, [start, middle / 2, middle / 2, end]


def _krogstad(phi: Phi) -> tuple[list[list[float]], list[float]]:
    (half_1, half_2, _), (phi_1, phi_2, _) = phi(0.5), phi(1)
    start, middle, end = _last(phi)
    rows = [[half_1], [half_1 - 2 * half_2, 2 * half_2], [phi_1 - 2 * phi_2, 0.0, 2 * phi_2]]
    return rows, [start, middle / 2, middle / 2, end]


def _strehmel_weiner(phi: Phi) -> tuple[list[list[float]], list[float]]:
    (half_1, half_2, _), (phi_1, phi_2, _) = phi(0.5), phi(1)
    start, middle, end = _last(phi)
    rows = [[half_1], [half_1 - half_2, half_2], [phi_1 - 2 * phi_2, -2 * phi_2, 4 * phi_2]]
    return rows, [start, 0.0, middle, end]


def _friedli(phi: Phi) -> tuple[list[list[float]], list[float]]:
    (half_1, half_2, _), (phi_1, phi_2, _) = phi(0.5), phi(1)
    start, middle, end = _last(phi)
    second, third = (2 * phi_2 - 26 * phi_1) / 25, (26 * phi_1 + 48 * phi_2) / 25
    rows = [[half_1], [half_1 - half_2, half_2], [phi_1 - 2 * phi_2, second, third]]
    return rows, [start, 0.0, middle, end]


def _hochbruck_ostermann(phi: Phi) -> tuple[list[list[float]], list[float]]:
    (half_1, half_2, half_3), (phi_1, phi_2, phi_3) = phi(0.5), phi(1)
    start, middle, end = _last(phi)
    both = half_2 - phi_3 + phi_2 / 4 - half_3
    late = half_2 / 2 - both
    rows = [
        [half_1],
        [half_1 - 2 * half_2, 2 * half_2],
        [phi_1 - 2 * phi_2, phi_2, phi_2],
        [half_1 - 2 * both - late, both, both, late],
    ]
    return rows, [start, 0.0, 0.0, end, middle]


# name: (where the stages after the first lie, coefficients)
METHODS: dict[str, tuple[tuple[float, ...], Coefficients]] = {
    "etdrk2": ((1.0,), _etdrk2),
    "etdrk3": ((0.5, 1.0), _etdrk3),
    "etdrk4": (_QUARTER, _etdrk4),
    "krogstad": (_QUARTER, _krogstad),
    "strehmel_weiner": (_QUARTER, _strehmel_weiner),
    "friedli": (_QUARTER, _friedli),
    "hochbruck_ostermann": ((*_QUARTER, 0.5), _hochbruck_ostermann),
}


def etdrk(process: Process, times: Times, *, method: str = "etdrk4") -> Tableau:
    """Exponential Runge-Kutta methods in log-SNR and data prediction, of order 2 to 4.

    "etdrk2", "etdrk3" and "etdrk4" are Cox and Matthews's, of as many stages; the others are of
    order 4 with four stages, "hochbruck_ostermann" with five. One row per stage. A step to sigma =
    0 is DDIM's, one evaluation; one from alpha = 0, of infinite length in log-SNR, is made in flow
    coordinates by the Runge-Kutta method that each is for short steps.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times of the steps; stages lie between them.
      method: "etdrk2", "etdrk3", "etdrk4", "krogstad", "strehmel_weiner", "friedli" or
        "hochbruck_ostermann".

    Returns:
      A deterministic tableau, in data prediction.

    Raises:
      ValueError: times not sorted, an unknown method.

    Reference: Cox & Matthews 2002, J. Comput. Phys. 176, eq. 22 to 29; Krogstad 2005, J. Comput.
    Phys. 203; Hochbruck & Ostermann 2005, SIAM J. Numer. Anal. 43, section 5, which has
    the methods of Strehmel & Weiner and of Friedli too.
    """
    fractions, made = METHODS[expect_choice(method, "method", tuple(METHODS))]
    rows, weights = made(lambda c: (c, c / 2, c / 6))  # as h -> 0, over h
    classical = ((0.0, *fractions), ((), *map(tuple, rows)), tuple(weights))

    def coefficients(h: float) -> tuple[list[list[float]], list[float]]:
        return made(lambda c: phis(c * h))

    source = "doi:10.1137/040611434"
    return _stepped(process, times, classical, coefficients, method, source)


def lawson(process: Process, times: Times, *, method: str = "rk4") -> Tableau:
    """Lawson's methods: a Runge-Kutta method on x / sigma, whose slope in log-SNR is exp(lambda) D.

    A weight b_j h becomes b_j h exp(-(1 - c_j) h). Unlike `etdrk` they do not keep a constant data
    prediction, so long steps are far off: they are here to compare, and for 20 steps and more. A
    step to sigma = 0 is DDIM's, one from alpha = 0 a classical one in flow coordinates.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times of the steps; stages lie between them.
      method: as for `runge_kutta`.

    Returns:
      A deterministic tableau, in data prediction, of the classical method's order.

    Raises:
      ValueError: times not sorted, an unknown method.

    Reference: Lawson 1967, SIAM J. Numer. Anal. 4.
    """
    classical = BUTCHER[expect_choice(method, "method", tuple(BUTCHER))]
    fractions, lower, weights = classical

    def coefficients(h: float) -> tuple[list[list[float]], list[float]]:
        def taken(row: Sequence[float], end: float) -> list[float]:
            return [h * a * math.exp((c - end) * h) for a, c in zip(row, fractions, strict=False)]

        rows = [taken(row, c) for row, c in zip(lower[1:], fractions[1:], strict=True)]
        return rows, taken(weights, 1.0)

    name, source = f"lawson_{method}", "doi:10.1137/0704033"
    return _stepped(process, times, classical, coefficients, name, source, check="none")


def _stepped(
    process: Process,
    times: Times,
    classical: Butcher,
    coefficients: Callable[[float], tuple[list[list[float]], list[float]]],
    name: str,
    source: str,
    check: str = "full",
) -> Tableau:
    """Steps of several stages, those from alpha = 0 by the classical method."""
    builder = Builder(process, times)
    x, fractions = builder.start, classical[0][1:]
    for s, t in zip(builder.points, builder.points[1:], strict=False):
        start = builder.evaluate(x, s)
        if t.sigma == 0:
            x = transfer(start, t)
            continue
        if s.alpha == 0:
            x = runge_kutta_step(builder, Chart("flow", builder), start, t, classical)
            continue
        h = t.log_snr - s.log_snr
        rows, weights = coefficients(h)
        answers = [start.data]
        for fraction, row in zip(fractions, rows, strict=True):
            stage = t if fraction == 1 else builder.point_at(s.log_snr + fraction * h)
            u = (stage.sigma / s.sigma) * start.state + stage.alpha * total(row, answers)
            answers.append(builder.evaluate(u, stage).data)
        x = (t.sigma / s.sigma) * start.state + t.alpha * total(weights, answers)
    return builder.finish(x, builder.points[-1], name=name, source=source, check=check)


def abnorsett(
    process: Process,
    times: Times,
    *,
    order: int = 3,
    lower_order_final: bool | int = False,
) -> Tableau:
    """ABNorsett: exponential Adams-Bashforth of any order, one evaluation a step.

    The data prediction is extrapolated in log-SNR through the last `order` answers and integrated
    exactly. Order 1 is DDIM, 2 DPM-Solver++ 2M "heun" (RES multistep), 3 DPM-Solver++ 3M, and all
    are UniP without the authors' half weights. The order ramps up, so from a cold start it
    converges at 2. A step to sigma = 0 is of order 1.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.
      order: number of answers, at least 1.
      lower_order_final: lower the order over the last steps; a number: only if there are fewer
        steps than that.

    Returns:
      A deterministic tableau of n evaluations, in data prediction.

    Raises:
      ValueError: times not sorted, another order.

    Reference: Norsett 1969, Lecture Notes in Mathematics 109; Hochbruck & Ostermann 2011, SIAM J.
    Numer. Anal. 49 (exponential Adams methods).
    """
    expect_int(order, "order", at_least=1)
    builder = Builder(process, times)
    steps = len(builder.points) - 1
    x, history = builder.start, list[Answer]()
    for n in range(steps):
        s, t = builder.points[n], builder.points[n + 1]
        history = [builder.evaluate(x, s), *history[: order - 1]]
        used = [a for a in history if math.isfinite(a.point.log_snr)] or history[:1]
        now = 1 if t.sigma == 0 else order
        if lowers(lower_order_final, steps):
            now = min(now, steps - n)
        used = used[:now]
        nodes = [a.point.log_snr - used[0].point.log_snr for a in used]
        change = total(exponential_weights(nodes, t.log_snr - s.log_snr), [a.data for a in used])
        x = (t.sigma / s.sigma) * history[0].state + t.alpha * change
    name = f"abnorsett{order}"
    return builder.finish(x, builder.points[-1], name=name, source="doi:10.1137/100810722")
