"""Samplers as policies: the log-probability of every noisy row of a run.

A row with fresh noise draws u' from N(mean, c^2); what policy gradients of diffusion models (DDPO,
DPPO, SFT-PG) need are these densities and their divergence between two networks. They are sums over
a sample's elements: a mean, as some codes take, is the d-th root of the density ratio.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core.numeric import working_dtype
from diffsamp._core.types import Array, Conditions, PyTree, Value
from diffsamp.sampling import Trajectory, expect_tableau, row_levels
from diffsamp.score import ScoreFn
from diffsamp.tableau import Tableau

__all__ = ["log_prob", "replay", "row_kl"]


def log_prob(
    tableau: Tableau,
    trajectory: Trajectory,
    score_fn: ScoreFn | None = None,
    *,
    cond: Conditions | None = None,
) -> jax.Array:
    """Log-density of every state of a run, given what came before it.

    Row n draws u_{n+1} from a normal distribution with mean sum a u + sum b m (+ d) and standard
    deviation c: -|z|^2 / 2 - d log c - d / 2 log(2 pi), z the standardised difference, summed over
    the sample's d elements. Rows without noise give 0.

    Args:
      tableau: the sampler of the run.
      trajectory: from `diffsamp.trajectory`.
      score_fn: another network, or the same with other weights, to be asked again at the recorded
        states (`replay`); the result differentiates in it. None: the recorded outputs.
      cond: keyword arguments for that network.

    Returns:
      (rows, batch), nats.

    Raises:
      ValueError: a trajectory of another number of rows.

    Reference: Black et al. 2023 (DDPO), arXiv:2305.13301; Ren et al. 2024 (DPPO), arXiv:2409.00588.
    """
    expect_tableau(tableau)
    rows = np.shape(tableau.a)[0]
    leaves = jax.tree.leaves(trajectory.points)
    if leaves[0].shape[0] != rows + 1:
        raise ValueError(
            f"the trajectory has {leaves[0].shape[0] - 1} rows; tableau {tableau.name!r} has "
            f"{rows}."
        )
    outputs = trajectory.outputs
    if score_fn is not None:
        outputs = replay(score_fn, tableau, trajectory.points, cond=cond)
    total = functools.partial(_mix, rows)
    d = 0.0 if tableau.d is None else tableau.d

    def squares(points: jax.Array, told: jax.Array) -> jax.Array:
        mean = total(tableau.a, points[:-1]) + total(tableau.b, told) + _rows(d, told, rows)
        away = points[1:].astype(mean.dtype) - mean
        scale = _rows(tableau.c, mean, rows)
        noisy = scale != 0
        z = jnp.where(noisy, away, 0) / jnp.where(noisy, scale, 1)
        size = math.prod(points.shape[2:])
        flat = jnp.sum(z.reshape(rows, points.shape[1], -1) ** 2, axis=2)
        c = jnp.where(noisy, scale, 1)[(..., *(0,) * (points.ndim - 2))]
        constant = size * (jnp.log(c) + 0.5 * math.log(2 * math.pi))
        return jnp.where(noisy[(..., *(0,) * (points.ndim - 2))], -0.5 * flat - constant, 0.0)

    parts: list[jax.Array] = jax.tree.leaves(jax.tree.map(squares, trajectory.points, outputs))
    return functools.reduce(jnp.add, parts)


def replay(
    score_fn: ScoreFn, tableau: Tableau, points: PyTree, *, cond: Conditions | None = None
) -> PyTree:
    """What a network says at recorded states, row by row: (rows, batch, ...), as `outputs`.

    Args:
      score_fn: the network.
      tableau: the sampler.
      points: the states of a run, rows + 1 in front.
      cond: keyword arguments for the network.
    """
    level = row_levels(tableau)
    bound = score_fn.bind(level, (tableau.target[:, 0], tableau.target[:, 1]))
    score_fn.check_bound(bound, level, tableau.evaluates)
    bound = jax.tree.map(jnp.asarray, bound)

    def ask(row: tuple[Array, Array, Array]) -> PyTree:
        x, own, evaluates = row

        def call() -> PyTree:
            return score_fn.predict(x, own, cond)

        return jax.lax.cond(evaluates, call, lambda: jax.tree.map(jnp.zeros_like, x))

    states = jax.tree.map(lambda v: v[:-1], points)
    return jax.lax.map(ask, (states, bound, jnp.asarray(tableau.evaluates)))


def row_kl(tableau: Tableau, m: PyTree, m_ref: PyTree) -> jax.Array:
    """Divergence of every row between two networks, from the same states and earlier rows.

    |sum_j b_j (m_j - m_ref_j)|^2 / (2 c^2), exact; 0 for rows without noise.

    Args:
      tableau: the sampler.
      m: outputs of one network, (rows, batch, ...), as in a `Trajectory` or from `replay`.
      m_ref: of the other, at the same states.

    Returns:
      (rows, batch), nats.
    """
    expect_tableau(tableau)
    rows = np.shape(tableau.a)[0]

    def one(told: jax.Array, other: jax.Array) -> jax.Array:
        wide = working_dtype(told.dtype)
        away = _mix(rows, tableau.b, told.astype(wide) - other.astype(wide))
        scale = _rows(tableau.c, away, rows)
        noisy = scale != 0
        z = jnp.where(noisy, away, 0) / jnp.where(noisy, scale, 1)
        return 0.5 * jnp.sum(z.reshape(rows, told.shape[1], -1) ** 2, axis=2)

    parts: list[jax.Array] = jax.tree.leaves(jax.tree.map(one, m, m_ref))
    return functools.reduce(jnp.add, parts)


def _rows(values: Value, like: jax.Array, rows: int) -> jax.Array:
    """One number per row (or row and sample), shaped to go with (rows, batch, ...)."""
    values = jnp.asarray(values, like.dtype)
    values = jnp.broadcast_to(values, (rows,)) if values.ndim == 0 else values
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def _mix(rows: int, weights: Array, values: jax.Array) -> jax.Array:
    """sum_i weights[n, i] values[n - i]."""
    wide = working_dtype(values.dtype)
    total = jnp.zeros(values.shape, wide)
    for lag in range(np.shape(weights)[1]):
        if lag < rows:
            held = values[: rows - lag].astype(wide)
            own = _rows(weights[lag:, lag], held, rows - lag)
            total = total.at[lag:].add(own * held)
    return total
