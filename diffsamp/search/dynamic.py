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

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import schedules, solvers
from diffsamp._core.checks import expect_choice, expect_int, expect_times
from diffsamp._core.paths import shortest_path
from diffsamp._core.sharding import expect_sharding, on_mesh, put
from diffsamp._core.types import Conditions, PyTree, Sharding, Times, Value
from diffsamp.processes import Process
from diffsamp.sampling import sample, trajectory
from diffsamp.score import ScoreFn
from diffsamp.search._cost import Estimate, affordable, announce, expect_limit
from diffsamp.search.running import Progress, expect_batch, slice_batch
from diffsamp.tableau import Tableau

__all__ = ["Costs", "step_costs"]

_CANDIDATES, _COARSE = 10, 12  # later starts that are tried; evaluations of a coarse solution


@dataclasses.dataclass(frozen=True)
class Costs:
    """What steps between the points of a fine grid cost.

    Call it as a schedule, costs(process, n), or use `schedule`.

    Attributes:
      times: (M + 1,) fine times, falling, the last the clean end (or t_min).
      cost: (M + 1, M + 1): [i, j] is the cost of a step from times[i] to times[j].
      weight: default of `schedule`.
      start: (M + 1,) what it costs to begin at a point below t_max, taking the noise for all there
        is; None: paths begin at times[0].
      evaluations: of the network that measuring took, per sample and call.
      estimate: what was said of it before it began.
    """

    times: np.ndarray
    cost: np.ndarray
    weight: float = 1.0
    start: np.ndarray | None = None
    evaluations: float = 0
    estimate: Estimate | None = None

    def path(self, n: int, *, weight: float | None = None, free: bool = True) -> np.ndarray:
        """Indices of the best path of n steps (see `shortest_path`).

        Args:
          n: steps.
          weight: factor from one step to the next; None: the default.
          free: let the path begin below times[0] where `start` says that this is cheaper.
        """
        weight = self.weight if weight is None else weight
        return shortest_path(self.cost, n, weight=weight, start=self.start if free else None)

    def schedule(self, n: int, *, weight: float | None = None, free: bool = True) -> np.ndarray:
        """The n + 1 times of the best path of n steps.

        They may begin below t_max, where a sampler starts from less noise: `ds.Sampler` draws it,
        `compare` scales the starts it is given. Arguments as for `path`.
        """
        return expect_times(self.times[self.path(n, weight=weight, free=free)])

    def value(self, path: Value) -> float:
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
    x_T: PyTree,
    *,
    times: Times = None,
    points: int = 100,
    kind: str = "local",
    free_start: bool = True,
    cond: Conditions | None = None,
    batch: int = 64,
    evaluations: int | None = None,
    sharding: Sharding = None,
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
        root, the mean distance (GITS); "deviation": by how much further than the trajectory the
        step's end lies from the straight line between the trajectory's first and last state, in
        x / alpha, which may be negative (GITS's "dev"; the default of its authors' code).
      free_start: of "local" costs: also measure what it costs to begin at later points, from noise
        of their level, by what becomes of it: 10 points with two coarse solutions of at most 12
        evaluations each, for the first batch of starts. Distances add up otherwise, and would let
        paths begin too late.
      cond: keyword arguments for the network, every array with the leading axis n.
      batch: starts at a time: `points` x `batch` states are in memory.
      evaluations: spend at most so many network evaluations, on fewer of the starts; None: all.
      sharding: over the batch axis, as for `run`.
      progress: called with (what, done, total).

    Returns:
      The `Costs`, whose paths may begin below t_max.

    Raises:
      ValueError: an unknown kind, a trajectory that is not finite, "deviation" from alpha = 0, or a
        limit that is too low for one start.
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
    limit, each = expect_limit(evaluations), score_fn.nfe(tableau)
    measures_starts = free_start and kind == "local"
    if np.isfinite(limit):  # what is tried on the first batch, and the timed one, count as well
        each += 2 * score_fn.nfe_factor * (1 + _CANDIDATES * _COARSE * measures_starts)
    size = affordable("step_costs", size, each, limit)
    batch = min(batch, size)
    extra = 2 * _CANDIDATES * _COARSE * batch * score_fn.nfe_factor if measures_starts else 0
    estimate, spent = announce(
        "step_costs",
        score_fn,
        slice_batch(x_T, 0, size),
        slice_batch(cond, 0, size),
        evaluations=size * score_fn.nfe(tableau) + extra,
        batch=batch,
        states=2 * len(times) * batch / size,
        sharding=sharding,
    )
    spent += size * score_fn.nfe(tableau)
    total = np.zeros((len(times), len(times)))
    begin = None
    for start in range(0, size, batch):
        stop = min(start + batch, size)
        run = trajectory(
            score_fn,
            tableau,
            put(slice_batch(x_T, start, stop), sharding),
            cond=put(slice_batch(cond, start, stop), sharding),
        )
        part = pair_costs(
            run.points,
            run.outputs,
            jnp.asarray(alpha, jnp.float32),
            jnp.asarray(sigma, jnp.float32),
            kind=kind,
        )
        total += np.asarray(part, np.float64)
        if measures_starts and begin is None:
            own = put(slice_batch(cond, start, stop), sharding)
            begin, tried = _start_costs(score_fn, tableau, run.points, own)
            spent += tried * (stop - start)
        if progress is not None:
            progress("measuring steps", stop, size)
    if not np.all(np.isfinite(total)):
        raise ValueError(
            "the fine trajectory is not finite: the network returned NaN or inf. Look at its "
            "samples with a fine solver first."
        )
    cost = np.triu(total / size, 1)
    return Costs(times, cost, start=begin, evaluations=spent, estimate=estimate)


def _start_costs(
    score_fn: ScoreFn, fine: Tableau, points: PyTree, cond: Conditions | None
) -> tuple[np.ndarray, float]:
    """What beginning at each fine point costs, in squares; inf where it was not tried.

    And the network evaluations per start that this took.

    A start there is noise alone, scaled from x_T. It is wrong by what is left of the data, most of
    which the way down forgets: so both starts are solved to the end, on one coarse grid, and their
    samples compared.
    """
    process, last = score_fn.process, len(fine.times) - 1
    costs = np.full(last + 1, np.inf)
    costs[0] = 0.0
    tried = np.unique(np.linspace(0, 0.6 * last, _CANDIDATES + 1).astype(int))[1:]
    at_end, spent = float(fine.alpha[-1]), 0.0
    for i in tried:
        grid = np.unique(np.linspace(i, last, min(_COARSE, last - i) + 1).astype(int))
        solver = solvers.unipc(process, fine.times[grid], order=2)
        spent += 2 * score_fn.nfe(solver)
        ends = [
            sample(score_fn, solver, x, cond=cond)
            for x in (points[0] * (fine.sigma[i] / fine.sigma[0]), points[i])
        ]
        value = float(jnp.mean(jnp.square(ends[0] - ends[1])))
        costs[i] = value / at_end**2 if np.isfinite(value) else np.inf
    return costs, spent


@functools.partial(jax.jit, static_argnames="kind")
def pair_costs(points, outputs, alpha, sigma, *, kind):
    """Sum over samples of the error of each step i -> j, (M + 1, M + 1)."""
    rows = outputs.shape[0]
    weights = jnp.maximum(alpha, jnp.finfo(jnp.float32).tiny)

    scaled = points / weights.reshape((-1,) + (1,) * (points.ndim - 1))
    straight = scaled[-1] - scaled[0]

    def from_line(end):
        """Distance of (n, ...) states over alpha to the line, a number each."""
        axes = tuple(range(1, end.ndim))
        away = scaled[-1] - end
        size = jnp.maximum(jnp.sum(jnp.square(straight), axes, keepdims=True), 1e-30)
        along = jnp.sum(away * straight, axes, keepdims=True) / size
        return jnp.sqrt(jnp.mean(jnp.square(away - along * straight), axes))

    def from_point(i):
        ratio = sigma / sigma[i]
        kappa = alpha - alpha[i] * ratio

        def error(ratio, kappa, weight, state):
            end = ratio * points[i] + kappa * outputs[i]
            if kind == "deviation":
                return jnp.sum(from_line(end / weight) - from_line(state / weight))
            axes = tuple(range(1, end.ndim))
            squared = jnp.mean(jnp.square((end - state) / weight), axis=axes)
            return jnp.sum(jnp.sqrt(squared) if kind == "distance" else squared)

        return jax.lax.map(lambda v: error(*v), (ratio, kappa, weights, points))

    costs = jax.lax.map(from_point, jnp.arange(rows))
    return jnp.concatenate([costs, jnp.zeros((1, rows + 1), costs.dtype)])
