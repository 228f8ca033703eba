"""Grids for solvers that make several evaluations a step out of consecutive times."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffsamp._core.checks import expect_int, expect_times
from diffsamp.processes import Process
from diffsamp.schedules.grids import checked_ends, finite_start

__all__ = ["dpm_fast", "expect_orders", "step_orders"]


def step_orders(n: int, order: int, *, closed: bool) -> list[int]:
    """Orders of the steps that make exactly n evaluations, most of them of the given order.

    The authors' rule for order 3 is 3, .., 3 and then 2, 1 or 1 or 2, for n mod 3 = 0, 1, 2; for
    order 2 it is 2, .., 2 or 2, .., 2, 1.

    Args:
      n: evaluations.
      order: 1, 2 or 3.
      closed: whether the last step goes to sigma = 0, and so must be of order 1.
    """
    if closed and n > 1:
        return [*step_orders(n - 1, order, closed=False), 1]
    if order == 1 or n < 2:
        return [1] * n
    if order == 2:
        return [2] * (n // 2) + [1] * (n % 2)
    if n % 3 == 0:
        return [3] * (n // 3 - 1) + [2, 1]
    return [3] * (n // 3) + [n % 3]


def expect_orders(orders: Sequence[int], n: int) -> list[int]:
    """`orders` after checking that they are orders of steps that make n evaluations."""
    found = [expect_int(order, "orders", 1, 3) for order in orders]
    if sum(found) != n:
        raise ValueError(
            f"`orders` must add up to the number of evaluations, {n}; got {found}, which make "
            f"{sum(found)}."
        )
    return found


def dpm_fast(
    process: Process,
    n: int,
    *,
    order: int = 3,
    orders: Sequence[int] | None = None,
    t_max: float | None = None,
    t_min: float | None = None,
    final: str = "clean",
) -> np.ndarray:
    """DPM-Solver-fast: steps uniform in log-SNR, each split by its order (Lu et al. 2022).

    A step of order k makes k evaluations, at times that part it evenly in log-SNR, so that a step
    of order 1 is as long as one of order 3: three times as long as it would be on `logsnr`. For
    `solvers.dpm_solver` of the same order, whose times are those of all evaluations. With
    final="clean" the n - 1 evaluations before the last make the steps from t_max to t_min, and the
    last one, at t_min, is the step to the clean end (the authors' `denoise_to_zero`).

    Args:
      process: the noise process.
      n: number of evaluations, at least 1.
      order: 1, 2 or 3; the orders of the steps follow from it and n (`step_orders`).
      orders: the orders of the steps instead, which must add up to n; with final="clean" the last
        is 1. [order] * k with final="t_min" is the authors' "singlestep_fixed".
      t_max: first time; None: as for `logsnr`.
      t_min: end of the steps; None: the process's.
      final: "clean" or "t_min".

    Returns:
      float64 times, shape (n + 1,), decreasing.

    Raises:
      ValueError: orders that do not add up to n, or whose last is not 1 where it must be.

    Reference: Lu et al. 2022, arXiv:2206.00927, section 3.4 and appendix B ("DPM-Solver-fast").
    """
    expect_int(order, "order", 1, 3)
    t_max = finite_start(process, t_max)
    first, last, _ = checked_ends(process, n, t_max, t_min, final)
    closed = final == "clean"
    orders = expect_orders(step_orders(n, order, closed=closed) if orders is None else orders, n)
    if closed and orders.pop() != 1:
        raise ValueError(
            'with final="clean" the last of `orders` must be 1: the step to sigma = 0 is of order '
            '1. Add a 1, or use final="t_min".'
        )
    if not orders:  # one evaluation, one step to the clean end
        return expect_times([first, process.t_clean])
    low, high = process.log_snr(np.array([first, last]))
    ends = np.linspace(low, high, len(orders) + 1)
    parts = [
        np.linspace(start, end, k, endpoint=False)
        for start, end, k in zip(ends, ends[1:], orders, strict=False)
    ]
    times = np.append(np.asarray(process.time(np.concatenate(parts)), np.float64), last)
    times[0] = first  # verbatim, not through the inverse
    return expect_times(np.append(times, process.t_clean) if closed else times)
