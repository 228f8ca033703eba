"""Schedules by dynamic programming: the exact optimum of an additive cost over a fine grid.

`Costs` holds what a step from fine point i to fine point j costs; `Costs.schedule(n)` is the path
of n steps that costs least, exactly. Where the costs come from is another matter:

- `step_costs`: the error of one Euler (DDIM) step against the network's own trajectory, measured
  once for all pairs from the states and predictions along it (Nguyen et al. 2024, BOSS,
  arXiv:2312.16414; Chen et al. 2024, GITS, arXiv:2405.11326);
- `diffsamp.search.align_steps`: the KL bound of Align Your Steps.

A multistep method's error depends on its history, which no additive cost knows: use the schedule as
a candidate, or a start for `distill`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import schedules, solvers
from diffsamp._core.checks import expect_choice, expect_int, expect_times
from diffsamp._core.sharding import expect_sharding, on_mesh, put
from diffsamp.processes import Process
from diffsamp.sampling import trajectory
from diffsamp.score import ScoreFn
from diffsamp.search.objective import Progress, expect_batch, slice_batch

__all__ = ["Costs", "shortest_path", "step_costs"]


def shortest_path(cost: np.ndarray, steps: int, *, weight: float = 1.0) -> np.ndarray:
    """Indices 0 = i_0 < .. < i_steps = M that minimise sum_k weight^k cost[i_k, i_{k+1}].

    Args:
      cost: (M + 1, M + 1), of which the part above the diagonal is used; inf forbids a step.
      steps: from 1 to M.
      weight: factor from one step to the next; above 1 the later, cleaner steps count more (the
        coefficient of GITS).

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
    value = np.full(last + 1, np.inf)
    value[0] = 0.0
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


@dataclasses.dataclass(frozen=True)
class Costs:
    """What steps between the points of a fine grid cost.

    Call it as a schedule, costs(process, n), or use `schedule`.

    Attributes:
      times: (M + 1,) fine times, falling, the last the clean end (or t_min).
      cost: (M + 1, M + 1): [i, j] is the cost of a step from times[i] to times[j].
      weight: default of `schedule`.
    """

    times: np.ndarray
    cost: np.ndarray
    weight: float = 1.0

    def path(self, n: int, *, weight: float | None = None) -> np.ndarray:
        """Indices of the best path of n steps (see `shortest_path`)."""
        return shortest_path(self.cost, n, weight=self.weight if weight is None else weight)

    def schedule(self, n: int, *, weight: float | None = None) -> np.ndarray:
        """The n + 1 times of the best path of n steps."""
        return expect_times(self.times[self.path(n, weight=weight)])

    def value(self, path: Any) -> float:
        """The cost of a path of indices, unweighted."""
        path = np.asarray(path, int)
        return float(sum(self.cost[i, j] for i, j in itertools.pairwise(path)))

    def __call__(self, process: Process, n: int) -> np.ndarray:
        """`schedule(n)`: the signature of `diffsamp.schedules`; the process is known already."""
        del process
        return self.schedule(n)

    def with_weight(self, weight: float) -> Costs:
        """The same costs with another default weight."""
        return dataclasses.replace(self, weight=float(weight))


def step_costs(
    score_fn: ScoreFn,
    x_T: Any,
    *,
    times: Any = None,
    points: int = 100,
    kind: str = "local",
    cond: Mapping[str, Any] | None = None,
    batch: int = 64,
    sharding: Any = None,
    progress: Progress | None = None,
) -> Costs:
    """What Euler (DDIM) steps between the points of a fine grid cost on this network.

    The trajectory is that of UniPC of order 3 on the fine grid, one evaluation a point; the costs
    of all M (M + 1) / 2 steps follow from its states and predictions without another one.

    Args:
      score_fn: the network, batched.
      x_T: (n, ...) starts, an array.
      times: the fine grid, (M + 1,) falling; None: `points` of log-SNR spacing.
      points: M.
      kind: "local": mean squared error of the step's end, in units of alpha there, which sums to
        the squared error of the sample if errors neither grow nor shrink (BOSS); "distance": its
        root, the mean distance (GITS with the metric "l2"); "deviation": how much further than the
        trajectory the step's end is from the straight line between the trajectory's ends, as root
        mean square over the elements, in x / alpha (GITS's default, "dev"). It may be negative.
      cond: keyword arguments for the network, every array with the leading axis n.
      batch: starts at a time: `points` x `batch` states are in memory.
      sharding: over the batch axis, as for `run`.
      progress: called with (what, done, total).

    Returns:
      The `Costs`.

    Raises:
      ValueError: an unknown kind, a trajectory that is not finite, or "deviation" from alpha = 0.
    """
    expect_choice(kind, "kind", ("local", "distance", "deviation"))
    process = score_fn.process
    if times is None:
        times = schedules.logsnr(process, expect_int(points, "points", at_least=2))
    times = expect_times(times)
    size = expect_batch(x_T, cond)
    batch = min(expect_int(batch, "batch", at_least=1), size)
    expect_sharding(sharding, batch if batch < size else None)
    score_fn = on_mesh(score_fn, sharding)
    tableau = solvers.unipc(process, times, order=3)
    alpha, sigma = (np.asarray(v, np.float64) for v in (tableau.alpha, tableau.sigma))
    if kind == "deviation" and alpha[0] == 0:
        raise ValueError(
            f'kind="deviation" measures x / alpha, which is infinite at t = {times[0]:g}, where '
            'alpha = 0; pass `times` that start below it, or take kind="distance".'
        )
    total = np.zeros((len(times), len(times)))
    for start in range(0, size, batch):
        stop = min(start + batch, size)
        run = trajectory(
            score_fn, tableau, put(slice_batch(x_T, start, stop), sharding),
            cond=put(slice_batch(cond, start, stop), sharding),
        )  # fmt: skip
        levels = (jnp.asarray(v, jnp.float32) for v in (alpha, sigma))
        if kind == "deviation":
            part = _deviation_costs(run.points, run.outputs, *levels)
        else:
            part = pair_costs(run.points, run.outputs, *levels, root=kind == "distance")
        total += np.asarray(part, np.float64)
        if progress is not None:
            progress("measuring steps", stop, size)
    if not np.all(np.isfinite(total)):
        raise ValueError(
            "the fine trajectory is not finite: the network returned NaN or inf. Look at its "
            "samples with a fine solver first."
        )
    return Costs(times, np.triu(total / size, 1))


@functools.partial(jax.jit, static_argnames="root")
def pair_costs(points, outputs, alpha, sigma, *, root):
    """Sum over samples of the error of each step i -> j, (M + 1, M + 1)."""
    rows = outputs.shape[0]
    weights = jnp.maximum(alpha, jnp.finfo(jnp.float32).tiny)

    def from_point(i):
        ratio = sigma / sigma[i]
        kappa = alpha - alpha[i] * ratio

        def error(ratio, kappa, weight, state):
            end = ratio * points[i] + kappa * outputs[i]
            axes = tuple(range(1, end.ndim))
            squared = jnp.mean(jnp.square((end - state) / weight), axis=axes)
            return jnp.sum(jnp.sqrt(squared) if root else squared)

        return jax.lax.map(lambda v: error(*v), (ratio, kappa, weights, points))

    costs = jax.lax.map(from_point, jnp.arange(rows))
    return jnp.concatenate([costs, jnp.zeros((1, rows + 1), costs.dtype)])


@jax.jit
def _deviation_costs(points, outputs, alpha, sigma):
    """Sum over samples of how much further each step i -> j leads from the line of the ends."""
    shape = (-1,) + (1,) * (points.ndim - 1)
    states = points / alpha.reshape(shape)
    axes = tuple(range(1, points.ndim - 1))  # of a state, (batch, ..)
    first, last = states[0], states[-1]
    along = last - first
    length = jnp.sum(jnp.square(along), axis=axes, keepdims=True)

    def deviation(state):
        rest = last - state
        rest = rest - jnp.sum(rest * along, axis=axes, keepdims=True) / length * along
        return jnp.sqrt(jnp.mean(jnp.square(rest), axis=axes))

    own = jax.lax.map(deviation, states)

    def from_point(i):
        ratio = sigma / sigma[i]
        kappa = alpha - alpha[i] * ratio

        def further(ratio, kappa, scale, of_state):
            end = (ratio * points[i] + kappa * outputs[i]) / scale
            return jnp.sum(deviation(end) - of_state)

        return jax.lax.map(lambda v: further(*v), (ratio, kappa, alpha, own))

    costs = jax.lax.map(from_point, jnp.arange(outputs.shape[0]))
    return jnp.concatenate([costs, jnp.zeros((1, len(alpha)), costs.dtype)])
