"""Students that know where a step ends: shortcut models and MeanFlow."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffsamp._core.checks import expect_int
from diffsamp._core.types import Conditions, Key, PyTree
from diffsamp.processes import Flow
from diffsamp.score import ScoreFn, scale_rows
from diffsamp.students.target import Target, drawn, noised, uniform

__all__ = ["mean_flow", "shortcut"]


def _expect_flow(network: ScoreFn, what: str) -> None:
    if not isinstance(network.process, Flow):
        raise ValueError(
            f"{what} is defined for straight paths: its network needs processes.flow(); got "
            f"{type(network.process).__name__}."
        )


def _velocity(network: ScoreFn, x: PyTree, t: jax.Array, cond: Conditions) -> PyTree:
    return network(x, t, prediction="velocity", cond=cond)


def shortcut(
    network: ScoreFn,
    key: Key,
    x_0: PyTree,
    cond: Conditions | None = None,
    *,
    name: str = "dt",
    largest: int = 7,
    bootstrap: float = 0.25,
) -> Target:
    """A shortcut model: two steps of half the length are one step.

    The first part of the batch learns a step of 2^-k, k = largest - 1 .. 0 equally often, from two
    steps of half of it by the network itself; the rest flow matching, at the label of the smallest
    step. The step's label is -log2 of its length, as `few_step.shortcut` gives it.

    Args:
      network: the student, or better a running mean of it: velocity on the flow process, with the
        condition `name`.
      key: random key, or one per sample.
      x_0: (batch, ...) data.
      cond: further conditions, (batch, ...).
      name: of the step's condition.
      largest: log2 of how many smallest steps fill [0, 1]; 7 are 128.
      bootstrap: which part of the batch; 1/4 in the paper, 1/8 in the authors' code.

    Returns:
      A `Target` in velocity, of weight 1.

    Raises:
      ValueError: another process, or a part outside [0, 1].

    Reference: Frans et al. 2024, arXiv:2410.12557, algorithm 1.
    """
    _expect_flow(network, "a shortcut model")
    largest = expect_int(largest, "largest", at_least=1)
    if not 0 <= bootstrap <= 1:
        raise ValueError(f"`bootstrap` must lie in [0, 1]; got {bootstrap}.")
    keys, noise = drawn(network, key, x_0)
    batch = keys.shape[0]
    first = jnp.arange(batch) < round(bootstrap * batch)
    k = jnp.where(first, largest - 1 - jnp.arange(batch) % largest, largest)
    step = 2.0 ** -k.astype(jnp.float32)
    # t on multiples of the step, from one step above the data to pure noise
    t = step * (1 + jnp.floor(uniform(keys, 1) / step))
    x = noised(network.process, t, x_0, noise)

    def ask(x: PyTree, t: jax.Array) -> PyTree:
        halves = jnp.minimum(k + 1, largest).astype(jnp.float32)
        return _velocity(network, x, t, {**(cond or {}), name: halves})

    one = ask(x, t)
    between = jax.tree.map(lambda v, u: v - scale_rows(step / 2, v) * u, x, one)
    two = ask(between, t - step / 2)

    def choose(v: jax.Array, e: jax.Array, u: jax.Array, w: jax.Array) -> jax.Array:
        pick = first.reshape((-1,) + (1,) * (v.ndim - 1))
        return jnp.where(pick, (u + w) / 2, e - v).astype(v.dtype)

    target = jax.tree.map(choose, x_0, noise, one, two)
    condition = {**(cond or {}), name: k.astype(jnp.float32)}
    return jax.lax.stop_gradient(Target(x, t, condition, target, jnp.ones(batch), "velocity"))


def mean_flow(
    network: ScoreFn,
    key: Key,
    x_0: PyTree,
    cond: Conditions | None = None,
    *,
    name: str = "r",
    same: float = 0.75,
    power: float = 1.0,
    teacher: ScoreFn | None = None,
) -> Target:
    """MeanFlow: the mean velocity from t down to r, by its own derivative.

    target = v - (t - r) du/dt, with du/dt along (v, 1, 0). t and r are the sorted exponentials of
    logit-normal draws with mean -0.4, and r = t for a part of the batch.

    Args:
      network: the student: velocity on the flow process, with the condition `name`, the end r.
      key: random key, or one per sample.
      x_0: (batch, ...) data.
      cond: further conditions, (batch, ...).
      name: of the end's condition.
      same: which part of the batch has r = t, drawn per sample.
      power: p of the weight 1 / (|error|^2 + 0.01)^p, which moves the minimiser where the error's
        law is skewed; 0 for the plain squared error.
      teacher: gives the marginal velocity v; None: eps - x_0, which has the same minimiser.

    Returns:
      A `Target` in velocity.

    Raises:
      ValueError: another process.

    Reference: Geng et al. 2025, arXiv:2505.13447, equations 11 and 22.
    """
    _expect_flow(network, "MeanFlow")
    keys, noise = drawn(network, key, x_0)

    def logit_normal(number: int) -> jax.Array:
        folded = jax.vmap(lambda k: jax.random.fold_in(k, number))(keys)
        return jax.nn.sigmoid(
            jax.vmap(lambda k: jax.random.normal(k, dtype=jnp.float32))(folded) - 0.4
        )

    one, two = logit_normal(1), logit_normal(2)
    t = jnp.maximum(one, two)
    r = jnp.where(uniform(keys, 3) < same, t, jnp.minimum(one, two))
    x = noised(network.process, t, x_0, noise)
    v: PyTree = jax.tree.map(lambda data, e: e - data, x_0, noise)
    if teacher is not None:
        v = teacher(x, t, prediction="velocity", cond=cond)

    def mean(x: PyTree, t: jax.Array) -> PyTree:
        return _velocity(network, x, t, {**(cond or {}), name: r})

    u, slope = jax.jvp(mean, (x, t), (v, jnp.ones_like(t)))
    target = jax.tree.map(lambda w, d: w - scale_rows(t - r, w) * d, v, slope)
    squares = jax.tree.leaves(
        jax.tree.map(
            lambda a, b: jnp.sum(jnp.square(a - b), axis=tuple(range(1, a.ndim))), u, target
        )
    )
    error = sum(squares[1:], squares[0])
    weight = 1 / (error + 0.01) ** power
    condition = {**(cond or {}), name: r}
    return jax.lax.stop_gradient(Target(x, t, condition, target, weight, "velocity"))
