"""Distribution matching: the samples of a student move so that a teacher finds them likelier."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffsamp._core.checks import expect_choice
from diffsamp._core.numeric import as_float
from diffsamp._core.types import Conditions, Key, PyTree
from diffsamp.score import ScoreFn, scale_rows
from diffsamp.students.target import Target, drawn, noised, uniform

__all__ = ["dmd2", "f_distill", "f_weight"]

_DIVERGENCES = ("rkl", "kl", "js", "hellinger", "jeffreys", "softened")


def dmd2(
    network: ScoreFn,
    key: Key,
    x_0: PyTree,
    cond: Conditions | None = None,
    *,
    fake: ScoreFn,
    low: float = 0.02,
    high: float = 0.98,
    normalise: bool = True,
) -> Target:
    """The gradient of KL(student || teacher) over noised samples, as a target.

    (D_fake - D_real) / mean |x - D_real| per sample: `target` is x_0 less that, and a generator
    descends 0.5 |x_0 - target|^2 with x_0 its own, differentiable sample. It is no target of a
    network at (x, t): take `squared_error(x_0 - target.target)`, not `students.loss`.

    Args:
      network: the teacher, guided if wanted.
      key: random key, or one per sample.
      x_0: (batch, ...) samples of the student.
      cond: conditions, (batch, ...).
      fake: a diffusion model of the student's samples, trained beside it.
      low: smallest time that is drawn, as a part of the process's range.
      high: the largest.
      normalise: by the mean distance; without it the step is the gradient of the divergence itself,
        up to the data prediction's factor alpha / sigma^2.

    Returns:
      A `Target` in data; x are the noised samples.

    Reference: Yin et al. 2024 (DMD2), arXiv:2405.14867; (DMD) arXiv:2311.18828, equation 7.
    """
    process = network.process
    keys, noise = drawn(network, key, x_0)
    span = float(process.t_max) - float(process.t_clean)
    t = float(process.t_clean) + span * (low + (high - low) * uniform(keys, 1))
    t = jnp.asarray(t, jnp.float32)
    x = noised(process, t, x_0, noise)
    real, own = (f(x, t, prediction="data", cond=cond) for f in (network, fake))
    gradient = jax.tree.map(lambda a, b: a - b, own, real)
    if normalise:
        sizes = jax.tree.map(
            lambda v, d: jnp.mean(jnp.abs(v - d), axis=tuple(range(1, v.ndim))), x_0, real
        )
        leaves = jax.tree.leaves(sizes)
        size = sum(leaves[1:], leaves[0]) / len(leaves)
        gradient = jax.tree.map(lambda g: g / scale_rows(size, g), gradient)
    target = jax.tree.map(lambda v, g: v - g, x_0, gradient)
    return jax.lax.stop_gradient(Target(x, t, dict(cond or {}), target, jnp.ones(t.shape), "data"))


def f_weight(ratio: jax.Array, divergence: str) -> jax.Array:
    """h(r) = f''(r) r^2 of an f-divergence, r = teacher's over student's density.

    Args:
      ratio: r, the exponential of an optimal discriminator's logit.
      divergence: "rkl" (1, DMD itself), "kl", "js", "hellinger", "jeffreys" or "softened".

    Reference: Xu et al. 2025, arXiv:2502.15681, table 1.
    """
    expect_choice(divergence, "divergence", _DIVERGENCES)
    r = as_float(ratio)
    return {
        "rkl": jnp.ones_like(r),
        "kl": r,
        "js": r / (1 + r),
        "hellinger": jnp.sqrt(r),
        "jeffreys": 1 + r,
        "softened": 1 / (1 + r),
    }[divergence]


def f_distill(
    network: ScoreFn,
    key: Key,
    x_0: PyTree,
    cond: Conditions | None = None,
    *,
    fake: ScoreFn,
    ratio: jax.Array,
    divergence: str = "js",
    low: float = 0.02,
    high: float = 0.98,
) -> Target:
    """`dmd2` for any f-divergence: each sample's gradient times h of the density ratio.

    Args:
      network: the teacher.
      key: random key, or one per sample.
      x_0: (batch, ...) samples of the student.
      cond: conditions, (batch, ...).
      fake: a diffusion model of the student's samples.
      ratio: (batch,) teacher's over student's density at the noised samples, from a discriminator;
        kept within [0.1, 20].
      divergence: as for `f_weight`.
      low: as for `dmd2`.
      high: as for `dmd2`.

    Returns:
      A `Target`, to be used as that of `dmd2`; its weight is h. (The authors divide it by its mean
      over the batch, which makes a sample depend on the others: left to the caller.)

    Reference: Xu et al. 2025, arXiv:2502.15681.
    """
    plain = dmd2(network, key, x_0, cond, fake=fake, low=low, high=high)
    weight = f_weight(jnp.clip(as_float(ratio), 0.1, 20.0), divergence)

    def weighted(target: jax.Array, v: jax.Array) -> jax.Array:
        return v + scale_rows(weight, v) * (target - v)

    target: PyTree = jax.tree.map(weighted, plain.target, x_0)
    return jax.lax.stop_gradient(Target(plain.x, plain.t, plain.condition, target, weight, "data"))
