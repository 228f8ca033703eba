"""What every student is trained on, and the few steps from which all methods are made."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffsamp._core import random
from diffsamp._core.checks import expect_state, expect_times
from diffsamp._core.numeric import as_float
from diffsamp._core.types import Array, Conditions, Key, Network, PyTree, Times
from diffsamp.processes import Process
from diffsamp.score import ScoreFn, expect_score_fn, scale_rows

__all__ = [
    "Distance",
    "Target",
    "ddim_step",
    "drawn",
    "loss",
    "noised",
    "pseudo_huber",
    "squared_error",
    "uniform",
    "window",
]

# (difference, (batch, ...)) -> (batch,)
Distance = Callable[[jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """What a student should say; every array has the batch in front.

    Attributes:
      x: the states at which the student is asked.
      t: (batch,) their times.
      condition: keyword arguments for the student, the step's among them.
      target: what it should say there, shaped like x.
      weight: (batch,) of each sample's distance.
      prediction: in which prediction `target` is.
    """

    x: PyTree
    t: Array
    condition: Conditions
    target: PyTree
    weight: Array
    prediction: str = dataclasses.field(metadata={"static": True})


def squared_error(difference: jax.Array) -> jax.Array:
    """Mean squared difference of each sample."""
    return jnp.mean(jnp.square(difference), axis=tuple(range(1, difference.ndim)))


def pseudo_huber(scale: float | None = None) -> Distance:
    """sqrt(|d|^2 + c^2) - c, for consistency training.

    It changes the minimiser wherever the residual's law is skewed.

    Args:
      scale: c; None: 0.00054 sqrt(dim).

    Reference: Song & Dhariwal 2023 (iCT), arXiv:2310.14189, section 3.3.
    """

    def distance(difference: jax.Array) -> jax.Array:
        size = math.prod(difference.shape[1:])
        c = 0.00054 * math.sqrt(size) if scale is None else scale
        square = jnp.sum(jnp.square(difference), axis=tuple(range(1, difference.ndim)))
        return jnp.sqrt(square + c * c) - c

    return distance


def loss(score_fn: ScoreFn, target: Target, distance: Distance = squared_error) -> jax.Array:
    """(batch,) weighted distances of what a student says to what it should say.

    Args:
      score_fn: the student, called with the target's condition; it is differentiated.
      target: from a method of this module.
      distance: of each sample; leaves of a state are added.
    """
    said = score_fn(target.x, target.t, prediction=target.prediction, cond=target.condition or None)
    parts = jax.tree.leaves(jax.tree.map(lambda a, b: distance(a - b), said, target.target))
    total = functools.reduce(jnp.add, parts)
    return jnp.asarray(target.weight, total.dtype) * total


# -- what methods are made of ---------------------------------------------------------------------


def drawn(network: Network, key: Key, x_0: PyTree) -> tuple[Key, PyTree]:
    """One key per sample, and noise like x_0: a sample depends on nothing but its own key.

    Args:
      network: checked to be one.
      key: a key, or one per sample.
      x_0: (batch, ...).
    """
    expect_score_fn(network)
    keys: PyTree = random.sample_keys(key, expect_state(x_0, "x_0", batched=True))
    return keys, random.normal_like(keys, 0, x_0)


def uniform(keys: Key, number: int) -> jax.Array:
    """(batch,) uniform numbers in [0, 1), other ones for each `number`.

    Args:
      keys: one per sample.
      number: which draw, 1 or more.
    """
    return jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, number), dtype=jnp.float32))(
        keys
    )


def window(times: Times, keys: Key) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(number, start, end) of each sample's step of a grid, drawn uniformly; (batch,) each.

    Args:
      times: (N + 1,) falling.
      keys: one per sample; their first draw.
    """
    levels = jnp.asarray(expect_times(times), jnp.float32)
    count = len(levels) - 1
    index = jnp.minimum((uniform(keys, 1) * count).astype(jnp.int32), count - 1)
    return index, levels[index], levels[index + 1]


def noised(process: Process, t: Array, x_0: PyTree, noise: PyTree) -> PyTree:
    """alpha x_0 + sigma eps at each sample's time.

    Args:
      process: the noise process.
      t: (batch,).
      x_0: (batch, ...).
      noise: like it.
    """
    alpha, sigma = as_float(process.alpha(t)), as_float(process.sigma(t))
    return jax.tree.map(
        lambda v, e: (scale_rows(alpha, v) * v + scale_rows(sigma, v) * e).astype(v.dtype),
        x_0,
        noise,
    )


def ddim_step(process: Process, data: PyTree, x: PyTree, t: Array, end: Array) -> PyTree:
    """From t to `end` along a constant data prediction, each sample at its own times.

    Args:
      process: the noise process.
      data: what the network says about x_0.
      x: the states at t.
      t: (batch,).
      end: (batch,), smaller.
    """
    ratio = process.sigma(end) / process.sigma(t)
    kappa = process.alpha(end) - process.alpha(t) * ratio
    return jax.tree.map(
        lambda v, d: (scale_rows(ratio, v) * v + scale_rows(kappa, v) * d).astype(v.dtype), x, data
    )
