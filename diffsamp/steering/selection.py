"""Spending evaluations on choice: best of n, and searches over the start's noise."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import sampling
from diffsamp._core import random
from diffsamp._core.checks import expect_int
from diffsamp._core.types import Conditions, PyTree
from diffsamp.score import ScoreFn, scale_rows
from diffsamp.steering._weights import particle_keys, spread
from diffsamp.tableau import Tableau

__all__ = ["best_of", "search_noise"]


def best_of(
    score_fn: ScoreFn,
    tableau: Tableau,
    x_T: PyTree,
    *,
    reward: Callable[[PyTree], PyTree],
    key: jax.Array | None = None,
    cond: Conditions | None = None,
) -> tuple[PyTree, jax.Array]:
    """The sample with the highest reward, of n per sample. Costs n runs.

    Args:
      score_fn: a network or transform with a batch axis.
      tableau: the sampler.
      x_T: starts, (batch, n, ...).
      reward: x_0 (batch * n, ...) -> (batch * n,).
      key: for stochastic samplers, one or one per sample.
      cond: keyword arguments for the network, one entry per sample.

    Returns:
      (x, rewards): (batch, ...), and (batch, n) the rewards of all.

    Reference: Ma et al. 2025, arXiv:2501.09732.
    """
    batch, n = jax.tree.leaves(x_T)[0].shape[:2]
    flat = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), x_T)
    keys = None
    if key is not None:
        keys, _ = particle_keys(random.sample_keys(key, batch), n)
    x = sampling.sample(score_fn, tableau, flat, key=keys, cond=spread(cond, batch, n))
    value = reward(x)
    if np.shape(value) != (batch * n,):
        raise ValueError(
            f"`reward` must return one number per sample, shape ({batch * n},); got shape "
            f"{np.shape(value)}."
        )
    value = value.reshape(batch, n)
    best = jnp.argmax(value, axis=1)
    split = jax.tree.map(lambda v: v.reshape(batch, n, *v.shape[1:]), x)
    return _pick(split, best), value


def _pick(tree: PyTree, index: jax.Array) -> PyTree:
    """Of (batch, n, ...) one each, (batch, ...)."""
    return jax.tree.map(lambda v: jax.vmap(lambda s, i: s[i])(v, index), tree)


def search_noise(
    score_fn: ScoreFn,
    tableau: Tableau,
    x_T: PyTree,
    *,
    reward: Callable[[PyTree], PyTree],
    key: jax.Array,
    neighbours: int,
    rounds: int,
    radius: float = 0.3,
    cond: Conditions | None = None,
) -> tuple[PyTree, PyTree, jax.Array]:
    """Zero-order search over the start: keep the best of a pivot and its neighbours, again.

    A neighbour is sqrt(1 - radius^2) x_T + radius s z, s the start's standard deviation, which is
    a draw of the prior itself; x_T + radius z would not be. Costs (neighbours + 1) * rounds runs.

    Args:
      score_fn: a network or transform with a batch axis.
      tableau: the sampler; a stochastic one draws the same noise in every run.
      x_T: starts, (batch, ...).
      reward: x_0 (n, ...) -> (n,).
      key: one, or one per sample.
      neighbours: how many around the pivot, each round.
      rounds: how often.
      radius: in (0, 1].
      cond: keyword arguments for the network, one entry per sample.

    Returns:
      (x, x_T, rewards): the best sample and its start, (batch, ...) each, and (rounds, batch) the
      best rewards so far.

    Raises:
      ValueError: a radius outside (0, 1].

    Reference: Ma et al. 2025, arXiv:2501.09732.
    """
    expect_int(neighbours, "neighbours", at_least=1)
    expect_int(rounds, "rounds", at_least=1)
    if not 0 < radius <= 1:
        raise ValueError(f"`radius` must lie in (0, 1]; got {radius}.")
    batch = jax.tree.leaves(x_T)[0].shape[0]
    keys = random.sample_keys(key, batch)
    std = float(np.asarray(tableau.sigma)[0])
    kept = np.sqrt(1 - radius**2)
    x, history = x_T, []
    for turn in range(rounds):
        places = [jax.tree.map(jnp.asarray, x_T)]
        for i in range(neighbours):
            z = random.normal_like(keys, 1 + turn * neighbours + i, x_T)
            places.append(
                jax.tree.map(
                    lambda v, e: (scale_rows(kept, v) * v + scale_rows(radius * std, v) * e).astype(
                        v.dtype
                    ),
                    x_T,
                    z,
                )
            )
        many = jax.tree.map(lambda *v: jnp.stack(v, axis=1), *places)
        noise = keys if tableau.stochastic else None
        x, values = best_of(score_fn, tableau, many, reward=reward, key=noise, cond=cond)
        best = jnp.argmax(values, axis=1)
        x_T = _pick(many, best)
        history.append(jnp.max(values, axis=1))
    return x, x_T, jnp.stack(history)
