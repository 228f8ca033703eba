"""Successive halving: how many starts each round may use under a limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["first_round", "price", "rounds_of"]


def rounds_of(size: int, first: int) -> list[int]:
    """How many starts each round of successive halving uses.

    Args:
      size: all starts.
      first: those of the first round.
    """
    counts = [first]
    while counts[-1] < size:
        counts.append(min(2 * counts[-1], size))
    return counts


def price(prices: Mapping[int, Sequence[float]], plan: Sequence[int]) -> float:
    """Evaluations of a plan: of each budget the better half goes on, at its mean cost.

    Args:
      prices: what a run of each sampler costs, by budget.
      plan: starts of each round.
    """
    total = 0.0
    for costs in prices.values():
        left = len(costs)
        for count in plan:
            total += count * left * float(np.mean(costs)) if costs else 0.0
            left = -(-left // 2)
    return total


def first_round(
    prices: Mapping[int, Sequence[float]], size: int, most: int, limit: float, pieces: int = 1
) -> int:
    """On how many starts all may be measured first.

    Args:
      prices: as for `price`.
      size: all starts.
      most: no more than these.
      limit: evaluations.
      pieces: devices among which a round must divide, unless it is of all starts.

    Raises:
      ValueError: not even one, or one for each device.
    """
    allowed = [n for n in range(most, 0, -1) if n % pieces == 0 or n == size]
    for first in allowed:
        if price(prices, rounds_of(size, first)) <= limit:
            return first
    least = price(prices, rounds_of(size, allowed[-1])) - limit
    raise ValueError(
        f"`evaluations` is too low by {least:.0f} for these samplers and {size} starts: name fewer "
        "solvers, schedules or budgets, give fewer starts, or pass the reference."
    )
