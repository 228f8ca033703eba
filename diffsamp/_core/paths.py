"""The cheapest path of a given number of steps, by dynamic programming."""

from __future__ import annotations

import numpy as np

from diffsamp._core.checks import expect_int

__all__ = ["shortest_path"]


def shortest_path(
    cost: np.ndarray, steps: int, *, weight: float = 1.0, start: np.ndarray | None = None
) -> np.ndarray:
    """Indices i_0 < .. < i_steps = M that minimise start[i_0] + sum_k weight^k cost[i_k, i_{k+1}].

    Args:
      cost: (M + 1, M + 1), of which the part above the diagonal is used; inf forbids a step.
      steps: from 1 to M.
      weight: factor from one step to the next; above 1 the later, cleaner steps count more (the
        coefficient of GITS).
      start: (M + 1,) what it costs to begin at a point, inf forbids it; None: begin at point 0.

    Returns:
      (steps + 1,) integers. Exact, in O(M^2 steps).

    Raises:
      ValueError: a matrix that is not square, NaN, more steps than M, or no path of finite cost.
    """
    cost = np.asarray(cost, np.float64)
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1] or np.isnan(cost).any():
        raise ValueError(f"`cost` must be a square matrix without NaN; got shape {cost.shape}.")
    last = cost.shape[0] - 1
    expect_int(steps, "steps", at_least=1, at_most=last)
    if not 0 < weight < np.inf:
        raise ValueError(f"`weight` must be positive and finite; got {weight}.")
    forward = np.where(np.triu(np.ones_like(cost, bool), 1), cost, np.inf)
    if start is None:
        value = np.full(last + 1, np.inf)
        value[0] = 0.0
    else:
        value = np.asarray(start, np.float64).copy()
        if value.shape != (last + 1,) or np.isnan(value).any():
            raise ValueError(
                f"`start` must be {last + 1} numbers without NaN; got shape {value.shape}."
            )
    came = np.zeros((steps, last + 1), int)
    for k in range(steps):
        total = value[:, None] + weight**k * forward
        came[k] = np.argmin(total, axis=0)
        value = total[came[k], np.arange(last + 1)]
    if not np.isfinite(value[last]):
        raise ValueError(f"no path of {steps} steps has a finite cost.")
    path = [last]
    for k in reversed(range(steps)):
        path.append(int(came[k, path[-1]]))
    return np.array(path[::-1])
