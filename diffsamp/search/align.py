"""Align Your Steps: schedules that minimise a bound on the KL divergence of stochastic sampling.

With rho = sigma / alpha and the process coupled with itself, x_rho' = x_rho + sqrt(rho'^2 - rho^2)
z, the reverse SDE whose data prediction is frozen over each step is off by at most

    KLUB = sum_i int_{rho_{i+1}}^{rho_i} rho^-3 E || D(x_rho, rho) - D(x_{rho_i}, rho_i) ||^2 d rho

up to a factor. It is a sum over steps, so `Costs` finds its exact minimum over a fine grid, where
the authors sweep over single times; the grid is then refined around what was found.

Reference: Sabour, Fidler & Kreis 2024, arXiv:2404.14507.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import schedules
from diffsamp._core.checks import expect_choice, expect_int
from diffsamp._core.sharding import expect_sharding, on_mesh, put
from diffsamp._core.types import Conditions, Key, PyTree, Sharding, Times
from diffsamp.score import ScoreFn
from diffsamp.search._cost import Estimate, affordable, announce, expect_limit
from diffsamp.search.dynamic import Costs
from diffsamp.search.running import Progress, expect_batch, slice_batch

__all__ = ["align_costs", "align_steps"]


def align_costs(
    score_fn: ScoreFn,
    data: PyTree,
    levels: Times,
    *,
    key: Key,
    cond: Conditions | None = None,
    batch: int = 64,
    evaluations: int | None = None,
    sharding: Sharding = None,
    progress: Progress | None = None,
) -> Costs:
    """The bound of every step between the given noise levels, by Monte Carlo.

    Each sample of the data gets one path of noise through all levels. The integral over a cell
    between neighbouring levels is taken at one point, drawn from the density rho^-3 in the cell
    (importance sampling: the weight is then the same for every draw) and stratified over the
    samples.

    Args:
      score_fn: the network, batched.
      data: (n, ...) samples of the data, or of the network.
      levels: (M + 1,) noise levels sigma / alpha, falling, positive.
      key: random key of noise and levels.
      cond: keyword arguments for the network, every array with the leading axis n.
      batch: samples at a time: 2 M x `batch` predictions are in memory.
      evaluations: spend at most so many network evaluations, on fewer of the data; None: all.
      sharding: over the batch axis, as for `run`.
      progress: called with (what, done, total).

    Returns:
      The `Costs`, per dimension of the data. Its last time is the lowest level.

    Raises:
      ValueError: levels that do not fall or are not positive, or a network that is not finite.
    """
    levels = np.asarray(levels, np.float64)
    if levels.ndim != 1 or len(levels) < 2 or not np.all(np.diff(levels) < 0) or levels[-1] <= 0:
        raise ValueError("`levels` must be at least two positive noise levels that fall.")
    aligned = _Aligned.of(
        score_fn, data, cond, [len(levels) - 1], batch, evaluations, sharding, progress
    )
    return aligned.costs(levels, key)


@dataclasses.dataclass
class _Aligned:
    """What all grids share that are measured one after the other."""

    score_fn: ScoreFn
    data: PyTree
    cond: Conditions | None
    batch: int
    sharding: Sharding
    progress: Progress | None
    estimate: Estimate
    spent: float

    @classmethod
    def of(
        cls,
        score_fn: ScoreFn,
        data: PyTree,
        cond: Conditions | None,
        cells: Sequence[int],
        batch: int,
        evaluations: int | None,
        sharding: Sharding,
        progress: Progress | None,
    ) -> _Aligned:
        """Say what grids of so many cells at most will cost, and take what data can be paid."""
        size = expect_batch(data, cond)
        batch = min(expect_int(batch, "batch", at_least=1), size)
        expect_sharding(sharding, batch if batch < size else None)
        score_fn = on_mesh(score_fn, sharding)
        each = sum(2 * n + 1 for n in cells) * score_fn.nfe_factor
        size = affordable("align", size, each + 2 * score_fn.nfe_factor, expect_limit(evaluations))
        batch = min(batch, size)
        data, cond = slice_batch(data, 0, size), slice_batch(cond, 0, size)
        estimate, spent = announce(
            "align",
            score_fn,
            data,
            cond,
            evaluations=size * each,
            batch=batch,
            states=4 * max(cells) * batch / size,
            sharding=sharding,
        )
        return cls(score_fn, data, cond, batch, sharding, progress, estimate, spent)

    def costs(self, levels: np.ndarray, key: Key) -> Costs:
        """Of one grid; adds to what is spent."""
        score_fn, data, cond, batch = self.score_fn, self.data, self.cond, self.batch
        size, cells = expect_batch(data, cond), len(levels) - 1
        self.spent += size * (2 * cells + 1) * score_fn.nfe_factor
        # quantiles of rho^-3 in each cell, one of `size` strata per sample in an order of its own
        key_strata, key_noise = jax.random.split(key)
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key_strata)).ravel().tolist())
        order = np.stack([rng.permutation(size) for _ in range(cells)], axis=1)
        quantile = (order + rng.uniform(size=order.shape)) / size
        high, low = levels[:-1] ** -2.0, levels[1:] ** -2.0
        inside = (low + quantile * (high - low)) ** -0.5  # (size, cells), one per cell
        weight = (low - high) / 2  # int rho^-3 over the cell
        process = score_fn.process
        total = np.zeros((cells, cells))
        for start in range(0, size, batch):
            stop = min(start + batch, size)
            rho = np.concatenate(
                [np.repeat(levels[None], stop - start, 0), inside[start:stop]], axis=1
            )
            time = np.asarray(process.time(-np.log(rho)), np.float64)
            keys = jax.vmap(functools.partial(jax.random.fold_in, key_noise))(
                jnp.arange(start, stop)
            )
            part = _cell_costs(
                score_fn,
                put(slice_batch(data, start, stop), self.sharding),
                keys,
                jnp.asarray(rho, jnp.float32),
                jnp.asarray(time, jnp.float32),
                put(slice_batch(cond, start, stop), self.sharding),
            )
            total += np.asarray(part, np.float64)
            if self.progress is not None:
                self.progress("aligning", stop, size)
        if not np.all(np.isfinite(total)):
            raise ValueError("the network's predictions are not all finite; look at it first.")
        # [i, m]: cell m while the prediction is frozen at level i <= m
        integrand = np.triu(total / size * weight)
        cost = np.zeros((cells + 1, cells + 1))
        cost[:-1, 1:] = np.cumsum(integrand, axis=1)
        times = np.asarray(process.time(-np.log(levels)), np.float64)
        times[0] = min(times[0], process.t_max)
        cost = np.triu(cost, 1)
        return Costs(times, cost, evaluations=self.spent, estimate=self.estimate)


@jax.jit
def _cell_costs(score_fn, data, keys, rho, time, cond):
    """Sum over samples of the mean squared difference between cell point m and level i."""
    cells = rho.shape[1] // 2
    order = jnp.argsort(rho, axis=1)
    rising = jnp.take_along_axis(rho, order, axis=1)
    step = jnp.sqrt(jnp.maximum(jnp.diff(jnp.square(rising), axis=1, prepend=0.0), 0.0))
    shape = (rho.shape[1], *data.shape[1:])
    drawn = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
    wide = (...,) + (None,) * (data.ndim - 1)
    grown = jnp.cumsum(step[wide] * drawn, axis=1)
    back = jnp.argsort(order, axis=1)
    grown = jnp.take_along_axis(grown, back[wide], axis=1)
    alpha = score_fn.process.alpha(time)

    def predict(level):
        noise, t, a = level
        x = a[(slice(None), *wide[1:])] * (data + noise)
        return score_fn(x.astype(data.dtype), t, prediction="data", cond=cond)

    said = jax.lax.map(predict, (jnp.moveaxis(grown, 1, 0), time.T, alpha.T))
    at_levels, inside = said[:cells], said[cells + 1 :]

    def differences(at_level):
        squared = jnp.square(inside - at_level[None])
        return jnp.mean(squared, axis=tuple(range(2, squared.ndim))).sum(axis=1)

    return jax.lax.map(differences, at_levels)


def align_steps(
    score_fn: ScoreFn,
    data: PyTree,
    n: int,
    *,
    key: Key,
    cond: Conditions | None = None,
    points: int = 60,
    rounds: int = 3,
    final: str = "clean",
    batch: int = 64,
    evaluations: int | None = None,
    sharding: Sharding = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """A schedule by Align Your Steps for this network and data.

    The first fine grid has log-SNR spacing over the whole range; each further round puts its points
    between the neighbours of those found, in a window that shrinks by half, and keeps the found
    ones as candidates.

    Args:
      score_fn: the network, batched.
      data: (n, ...) samples of the data, or of the network.
      n: number of evaluations of a one-evaluation method.
      key: random key.
      cond: keyword arguments for the network, every array with the leading axis n.
      points: of the first fine grid, at least 2 n.
      rounds: how many grids; at least 1.
      final: "clean": n levels are aligned and the clean end follows, as the published tables;
        "t_min": n + 1 levels.
      batch: samples at a time.
      evaluations: spend at most so many network evaluations, on fewer of the data; None: all. What
        all rounds cost at most is logged before the first.
      sharding: over the batch axis, as for `run`.
      progress: called with (what, done, total).

    Returns:
      float64 times, shape (n + 1,), decreasing.
    """
    process = score_fn.process
    expect_int(rounds, "rounds", at_least=1)
    expect_choice(final, "final", ("clean", "t_min"))
    steps = expect_int(n, "n", at_least=2) - (final == "clean")
    points = max(expect_int(points, "points", at_least=2), 2 * n)
    coarse = schedules.logsnr(process, points, final="t_min")
    levels = np.exp(-np.asarray(process.log_snr(coarse), np.float64))
    found = np.zeros(0)
    each = max(2, points // max(steps - 1, 1))
    finer = steps + 2 * (steps - 1) * (each // 2)  # cells at most
    cells = [points, *[finer] * (rounds - 1)]
    aligned = _Aligned.of(score_fn, data, cond, cells, batch, evaluations, sharding, progress)
    for i in range(rounds):
        costs = aligned.costs(levels, jax.random.fold_in(key, i))
        found = levels[costs.path(steps)]
        logs = np.log(found)
        window = 0.5 ** (i + 1)
        fine = [
            logs[k] + window * np.linspace(0, 1, each // 2 + 1)[1:] * (logs[k + side] - logs[k])
            for k in range(1, steps)
            for side in (-1, 1)
        ]
        levels = np.exp(np.unique(np.concatenate([logs, *fine])))[::-1]
        levels[0], levels[-1] = found[0], found[-1]
    times = np.asarray(process.time(-np.log(found)), np.float64)
    times[0] = coarse[0]
    return np.append(times, process.t_clean) if final == "clean" else times
