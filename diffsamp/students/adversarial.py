"""Students against a critic: score mismatching, and shortcut fine-tuning of few rows."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffsamp._core import random
from diffsamp._core.numeric import as_float
from diffsamp._core.types import Conditions, Key, PyTree, Times
from diffsamp.sampling import Trajectory
from diffsamp.score import ScoreFn, scale_rows
from diffsamp.students.policy import policy_loss
from diffsamp.students.target import Target, drawn, noised, squared_error, uniform
from diffsamp.tableau import Tableau

__all__ = ["critic_loss", "mismatching_loss", "score_mismatching", "shortcut_fine_tuning"]

# (batch, ...) -> (batch,)
Critic = Callable[[PyTree], jax.Array]


def _levels(
    network: ScoreFn, key: Key, x_0: PyTree, times: Times
) -> tuple[Key, PyTree, jax.Array, PyTree]:
    """Keys, noise, times of a grid equally often, and the states there."""
    keys, noise = drawn(network, key, x_0)
    grid = jnp.asarray(times, jnp.float32)
    if grid.ndim != 1 or grid.shape[0] == 0:
        raise ValueError(f"`times` must be levels, (levels,); got shape {grid.shape}.")
    index = jnp.minimum((uniform(keys, 1) * len(grid)).astype(jnp.int32), len(grid) - 1)
    return keys, noise, grid[index], noised(network.process, grid[index], x_0, noise)


def score_mismatching(
    network: ScoreFn,
    key: Key,
    x_0: PyTree,
    cond: Conditions | None = None,
    *,
    times: Times,
    fake: bool,
) -> Target:
    """What the score network of score mismatching is trained on: a critic that predicts noise.

    For data the noise that was added, as ever; for a generator's samples (`fake`) other noise,
    which nothing can tell. With as many of both, the minimiser is the share of data at x times the
    noise that is expected there, p E[eps | x] / (p + q), p and q the noised densities: half of the
    data's own where the generator is right. Take the mean of `loss` over both.

    Args:
      network: the score network, for its process.
      key: random key, or one per sample.
      x_0: (batch, ...) data, or the generator's samples.
      cond: conditions, (batch, ...).
      times: (levels,) the levels that are drawn, equally often; the authors take ten, up to
        sigma / alpha = 0.33.
      fake: whether x_0 are the generator's.

    Returns:
      A `Target` in noise, of weight 1.

    Reference: Ye & Liu 2023, arXiv:2309.11043, and the authors' code.
    """
    keys, noise, t, x = _levels(network, key, x_0, times)
    target = random.normal_like(keys, 2, x_0) if fake else noise
    return jax.lax.stop_gradient(Target(x, t, dict(cond or {}), target, jnp.ones(t.shape), "noise"))


def mismatching_loss(
    network: ScoreFn, key: Key, x_0: PyTree, cond: Conditions | None = None, *, times: Times
) -> jax.Array:
    """(batch,) what the generator of score mismatching descends; differentiable in its samples.

    0.5 |eps_theta(alpha x_0 + sigma eps) - eps|^2, the score network as it is: samples whose noise
    it can tell are those that it takes for data. For a network that is not trained on, too, the
    minimiser is a single point, the one whose noise is easiest to tell: train both in turn.

    Args:
      network: the score network, which gets no gradient.
      key: random key, or one per sample.
      x_0: (batch, ...) the generator's samples.
      cond: conditions, (batch, ...).
      times: as for `score_mismatching`.

    Reference: Ye & Liu 2023, arXiv:2309.11043, and the authors' code.
    """
    _, noise, t, x = _levels(network, key, x_0, times)
    said = jax.lax.stop_gradient(network)(x, t, prediction="noise", cond=cond)
    parts: list[jax.Array] = jax.tree.leaves(
        jax.tree.map(lambda s, e: squared_error(s - e), said, noise)
    )
    return 0.5 * sum(parts[1:], parts[0])


def critic_loss(
    critic: Critic,
    x_0: PyTree,
    generated: PyTree,
    *,
    key: Key = None,
    penalty: float = 0.0,
) -> jax.Array:
    """(batch,) what the critic of an integral probability metric descends: f(data) - f(generated).

    The distance is the largest E f(generated) - E f(data) among critics of a class; give it by the
    network (the authors normalise its weights), or by a penalty on slopes other than 1.

    Args:
      critic: f, (batch, ...) -> (batch,), large where samples are not like data.
      x_0: (batch, ...) data.
      generated: (batch, ...) samples of the student.
      key: of the penalty's places, one or one per sample.
      penalty: lambda of (|grad f| - 1)^2, at a random place between each datum and its sample.

    Raises:
      ValueError: a penalty without a key.

    Reference: Fan & Lee 2023, arXiv:2301.13362, equation 6; Gulrajani et al. 2017,
    arXiv:1704.00028, for the penalty.
    """
    gap = critic(x_0) - critic(generated)
    if not penalty:
        return gap
    if key is None:
        raise ValueError("a penalty needs a `key` for its places.")
    share = uniform(random.sample_keys(key, gap.shape[0]), 1)
    between = jax.tree.map(
        lambda a, b: a + scale_rows(share, a) * (b - a).astype(a.dtype), x_0, generated
    )
    slope = jax.grad(lambda v: jnp.sum(critic(v)))(between)
    squares: list[jax.Array] = [
        jnp.sum(jnp.square(g).reshape(g.shape[0], -1), axis=1) for g in jax.tree.leaves(slope)
    ]
    # of a slope of 0 the root has no derivative
    size = jnp.sqrt(jnp.maximum(sum(squares[1:], squares[0]), 1e-12))
    return gap + as_float(penalty, gap) * jnp.square(size - 1)


def shortcut_fine_tuning(
    score_fn: ScoreFn,
    tableau: Tableau,
    trajectory: Trajectory,
    critic: Critic,
    *,
    value: Callable[[PyTree], jax.Array] | None = None,
    cond: Conditions | None = None,
) -> jax.Array:
    """(batch,) what shortcut fine-tuning descends: the metric of `critic_loss`, by policy gradient.

    (f(x_N) - v) log p of every row, no path back through the rows: few rows learn to end at data in
    whatever way, not to follow the many.

    Args:
      score_fn: the network; it is differentiated.
      tableau: the few noisy rows of the run, such as `solvers.ddpm`.
      trajectory: from `diffsamp.trajectory`.
      critic: as for `critic_loss`; no gradient goes into it.
      value: a baseline, the trajectory's points before each row, (rows, batch, ...) ->
        (rows, batch), which the authors fit to f(x_N) by least squares. It changes the variance
        only.
      cond: conditions, (batch, ...).

    Reference: Fan & Lee 2023 (SFT-PG), arXiv:2301.13362, algorithm 1.
    """
    cost = critic(jax.tree.map(lambda v: v[-1], trajectory.points))[None]
    if value is not None:
        cost = cost - value(jax.tree.map(lambda v: v[:-1], trajectory.points))
    gained = jax.lax.stop_gradient(-cost)
    return policy_loss(score_fn, tableau, trajectory, gained, cond=cond, clip=None)
