"""The rows of a sampler in parallel, for latency.

Unrolled, a tableau says that every state is a combination of the start, the noises and the data
predictions D of earlier rows,

    u_n = A_n x_T + sum_{j<n} B_{nj} D_j + sum_{j<n} C_{nj} z_j,      D_j = D(u_j, t_j).

Waves (`sample_waves`): rows that need none of each other's answers are asked together. Methods of
parallel stages gain by it, without an evaluation more; for most others every row is a wave.

Picard sampling (`sample_parallel`): a window of rows is evaluated at once, at states made from the
D of the sweep before, until they agree. The rows up to the first that still moves are then final
and the window slides on. Any tableau will do, at the price of evaluations.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from diffsamp._core.checks import expect_int
from diffsamp._core.numeric import working_dtype
from diffsamp._core.types import Conditions, Key, PyTree
from diffsamp.loops._unrolled import Prepared, Unrolled
from diffsamp.score import ScoreFn
from diffsamp.tableau import Tableau

__all__ = ["ParallelResult", "sample_parallel", "sample_waves"]


class ParallelResult(NamedTuple):
    """What `sample_parallel` returns.

    Attributes:
      x: the samples, as of `sample`.
      sweeps: (batch,) int32, network calls in sequence that each sample needed; the run took their
        maximum. () without a batch axis.
      evaluations: (batch,) int32, rows at which the network was asked for each sample.
    """

    x: PyTree
    sweeps: PyTree
    evaluations: PyTree


def sample_parallel(
    score_fn: ScoreFn,
    tableau: Tableau,
    x_T: PyTree,
    *,
    key: Key = None,
    cond: Conditions | None = None,
    window: int | None = None,
    tolerance: float = 1e-3,
) -> ParallelResult:
    """`sample` with a window of rows evaluated together, each sweep one network call.

    Worth it where the device has room for `window` times the batch, and for many rows: a sweep of
    20 rows that finishes 5 takes a fifth of the sequential calls and 4 times the evaluations. A row
    is final as soon as all it depends on is, so that at most N sweeps are needed.

    Examples:
      >>> import jax.numpy as jnp, diffsamp as ds
      >>> process = ds.processes.vp_linear()
      >>> score_fn = ds.targets.gaussian([0.5], 0.04).score_fn(process)
      >>> tableau = ds.solvers.ddim(process, ds.schedules.logsnr(process, 100))
      >>> result = ds.parallel.sample_parallel(score_fn, tableau, jnp.ones((2, 1)), window=50)
      >>> bool(result.sweeps.max() < 40)
      True

    Args:
      score_fn: the network.
      tableau: the sampler; a concrete one, of plain numbers.
      x_T: the start, as for `sample`.
      key: as for `sample`, and the same noise: each is drawn once, before the first sweep.
      cond: keyword arguments for the network. An array whose first axis is as long as the batch
        holds one entry per sample and is repeated for the window; others are shared.
      window: rows evaluated together; None: all. It takes memory for `window` times the batch.
      tolerance: a row's data prediction that moved by less between two sweeps counts as settled;
        root mean square over the sample, in units of the data. 0: equal to `sample` up to rounding.

    Returns:
      A `ParallelResult`. A sample depends on nothing else in the batch.

    Raises:
      TypeError: x_T not floating, a traced tableau.
      ValueError: a negative tolerance, a window below 1, a stacked tableau or one whose
        coefficients have axes of the data; and as `sample`.

    Reference: Shih et al. 2023, arXiv:2305.16317, algorithm 1; here with the data predictions
    rather than the drift in the fixed point, which makes multistep methods a case of it.
    """
    prepared, batch = Prepared.of(score_fn, tableau, x_T, key, cond)
    if not tolerance >= 0:
        raise ValueError(f"`tolerance` must not be negative; got {tolerance}.")
    if window is not None:
        expect_int(window, "window", 1)
    count = prepared.on_data.shape[1]
    return _sweep(score_fn, prepared, tolerance, window=min(window or count, count), batch=batch)


@functools.partial(jax.jit, static_argnames=("window", "batch"))
def _sweep(score_fn, prepared, tolerance, *, window, batch):
    run = Unrolled.start(score_fn, prepared, batch)
    size, count = run.size, run.count

    # the first row depends on x_T only; its answer is the first guess everywhere
    start = jnp.zeros((size, 1), jnp.int32)
    first = run.ask(start, jax.tree.map(lambda leaf: leaf[:, :1], run.fixed))
    data = jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=1), first)
    ones = jnp.ones((size,), jnp.int32)
    place = jnp.arange(count, dtype=jnp.int32)[None]

    def body(state):
        base, data, sweeps, evaluations = state
        going = base < count
        rows = jnp.minimum(base[:, None] + place[:, :window], count - 1)
        new = run.ask(rows, run.states(rows, data))
        moved = _distance(new, jax.tree.map(lambda d: jax.vmap(lambda v, r: v[r])(d, rows), data))
        # the first row of the window had final inputs; each next one, if its predecessors settled
        settled = jnp.cumprod(moved <= tolerance, axis=1, dtype=jnp.int32).sum(
            axis=1, dtype=jnp.int32
        )
        ahead = jnp.clip(place - base[:, None], 0, window - 1)
        after = place >= base[:, None]  # what lies beyond the window takes its last D

        def update(old, fresh):
            spread = jax.vmap(lambda v, i: v[i])(fresh, ahead)
            return jnp.where(after.reshape(after.shape + (1,) * (old.ndim - 2)), spread, old)

        data = jax.tree.map(update, data, new)
        used = jnp.where(going, jnp.minimum(window, count - base), 0)
        base = jnp.where(going, jnp.minimum(base + jnp.minimum(settled + 1, window), count), base)
        return base, data, sweeps + going.astype(jnp.int32), evaluations + used

    state = (ones, data, ones, ones)
    _, data, sweeps, evaluations = lax.while_loop(lambda s: jnp.any(s[0] < count), body, state)
    result = ParallelResult(run.end(data), sweeps, evaluations)
    return jax.tree.map(lambda leaf: leaf[0], result) if batch is None else result


def sample_waves(
    score_fn: ScoreFn,
    tableau: Tableau,
    x_T: PyTree,
    *,
    key: Key = None,
    cond: Conditions | None = None,
) -> PyTree:
    """`sample` with rows that do not depend on one another in one batched call of the network.

    The table says which these are (`Tableau.waves`): `tableau.latency` calls in sequence make its
    `tableau.nfe` evaluations. All calls are as wide as the widest wave. What a narrower one leaves
    free repeats a row: it is no evaluation of the sampler, but takes the device's time as one does,
    `latency * widest - nfe` places in all (`describe` says how many). Every state is made from all
    answers before it, which are kept: memory for 2 `nfe` states.

    Examples:
      >>> import jax.numpy as jnp, diffsamp as ds
      >>> process = ds.processes.vp_linear()
      >>> score_fn = ds.targets.gaussian([0.5], 0.04).score_fn(process)
      >>> tableau = ds.solvers.epd(process, ds.schedules.logsnr(process, 4))
      >>> tableau.nfe, tableau.latency
      (10, 7)
      >>> ds.parallel.sample_waves(score_fn, tableau, jnp.ones((2, 1))).shape
      (2, 1)

    Args:
      score_fn: the network.
      tableau: the sampler; a concrete one, of plain numbers.
      x_T: the start, as for `sample`.
      key: as for `sample`, and the same noise.
      cond: as for `sample_parallel`.

    Returns:
      What `sample` returns, up to rounding.

    Raises:
      TypeError: x_T not floating, a traced tableau.
      ValueError: a stacked tableau or one whose coefficients have axes of the data; and as
        `sample`.

    Reference: Zhu et al. 2025 (EPD), arXiv:2507.14797, for stages that are asked in parallel.
    """
    prepared, batch = Prepared.of(score_fn, tableau, x_T, key, cond)
    wave = tableau.waves[np.asarray(tableau.evaluates)]
    members = [np.flatnonzero(wave == number) for number in range(1, tableau.latency + 1)]
    widest = max((rows.size for rows in members), default=0)
    places = np.array([np.resize(rows, widest) for rows in members], np.int32)
    return _waves(score_fn, prepared, places.reshape(-1, widest), batch=batch)


@functools.partial(jax.jit, static_argnames=("batch",))
def _waves(score_fn, prepared, places, *, batch):
    run = Unrolled.start(score_fn, prepared, batch)

    def body(data, rows):
        every = jnp.broadcast_to(rows, (run.size, rows.size))
        new = run.ask(every, run.states(every, data))
        return jax.tree.map(lambda old, now: old.at[:, rows].set(now), data, new), None

    data = jax.tree.map(
        lambda leaf, x: jnp.zeros((run.size, run.count, *leaf.shape[2:]), x.dtype),
        run.fixed,
        run.x_T,
    )
    data, _ = lax.scan(body, data, places)
    x = run.end(data)
    return jax.tree.map(lambda leaf: leaf[0], x) if batch is None else x


def _distance(new: PyTree, old: PyTree) -> PyTree:
    """Root mean square over each sample's elements, (sample, rows); NaN counts as no move."""

    def squares(a: jax.Array, b: jax.Array) -> jax.Array:
        flat = (a - b).astype(working_dtype(a.dtype)).reshape(*a.shape[:2], -1)
        return jnp.sum(flat * flat, axis=2)

    parts = jax.tree.leaves(jax.tree.map(squares, new, old))
    elements = sum(leaf[0, 0].size for leaf in jax.tree.leaves(new))
    return jnp.nan_to_num(jnp.sqrt(functools.reduce(jnp.add, parts) / elements), nan=0.0)
