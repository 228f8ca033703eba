"""Score distillation: gradients that make a sample, or what renders it, likely; and editing.

Each function returns a gradient with respect to a clean sample. To descend it through a renderer
or a generator, differentiate sum(stop_gradient(gradient) * x_0).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core import random
from diffsamp._core.checks import expect_times
from diffsamp._core.types import Array, Conditions, Key, Network, PyTree, Times
from diffsamp.predictions import Level
from diffsamp.score import ScoreFn, scale_rows

__all__ = ["ddcm", "dmd", "sds", "vsd"]


def _noised(score_fn: Network, x_0: PyTree, t: Array, key: Key) -> tuple[PyTree, PyTree]:
    batch = jax.tree.leaves(x_0)[0].shape[0]
    eps = random.normal_like(random.sample_keys(key, batch), 0, x_0)
    t = jnp.asarray(t, jax.tree.leaves(x_0)[0].dtype)
    alpha, sigma = score_fn.process.alpha(t), score_fn.process.sigma(t)
    x = jax.tree.map(
        lambda v, e: (scale_rows(alpha, v) * v + scale_rows(sigma, v) * e).astype(v.dtype), x_0, eps
    )
    return x, eps


def sds(
    score_fn: ScoreFn, x_0: PyTree, t: Array, *, key: jax.Array, cond: Conditions | None = None
) -> PyTree:
    """Score distillation sampling: E(x_t) - eps, one draw of eps. Costs one evaluation.

    It has no entropy term: descended, a distribution collapses to the most likely sample.

    Args:
      score_fn: a network or transform, usually guided.
      x_0: samples, (batch, ...).
      t: the level's time, a scalar or one per sample; times a weight of the caller's.
      key: one, or one per sample.
      cond: keyword arguments for the network.

    Reference: Poole et al. 2023, arXiv:2209.14988, eq. 3.
    """
    x, eps = _noised(score_fn, x_0, t, key)
    noise = score_fn(x, t, prediction="noise", cond=cond)
    return jax.lax.stop_gradient(jax.tree.map(jnp.subtract, noise, eps))


def vsd(
    score_fn: ScoreFn,
    fake: ScoreFn,
    x_0: PyTree,
    t: Array,
    *,
    key: jax.Array,
    cond: Conditions | None = None,
    fake_cond: Conditions | None = None,
) -> PyTree:
    """Variational score distillation: E_real(x_t) - E_fake(x_t). Costs one evaluation of each.

    sigma / alpha times it (in the noised sample's own units, over sigma) is the gradient of the
    divergence of the noised distributions, if `fake` is a perfect network of the samples.

    Args:
      score_fn: the pretrained network.
      fake: a network trained on the samples.
      x_0: samples, (batch, ...).
      t: as for `sds`.
      key: one, or one per sample.
      cond: keyword arguments for the pretrained network.
      fake_cond: for the other; None: the same.

    Reference: Wang et al. 2023, arXiv:2305.16213, eq. 9.
    """
    x, _ = _noised(score_fn, x_0, t, key)
    real = score_fn(x, t, prediction="noise", cond=cond)
    own = fake(x, t, prediction="noise", cond=cond if fake_cond is None else fake_cond)
    return jax.lax.stop_gradient(jax.tree.map(jnp.subtract, real, own))


def dmd(
    score_fn: ScoreFn,
    fake: ScoreFn,
    x_0: PyTree,
    t: Array,
    *,
    key: jax.Array,
    cond: Conditions | None = None,
    fake_cond: Conditions | None = None,
    normalise: bool = True,
) -> PyTree:
    """Distribution matching distillation: (D_fake - D_real) / mean |x_0 - D_real|, per sample.

    Args:
      score_fn: the pretrained network.
      fake: a network trained on the samples.
      x_0: samples, (batch, ...).
      t: as for `sds`.
      key: one, or one per sample.
      cond: keyword arguments for the pretrained network.
      fake_cond: for the other; None: the same.
      normalise: divide by the mean over the sample's elements; this moves the minimum of the loss
        where the data is skewed.

    Reference: Yin et al. 2024, arXiv:2311.18828, eq. 7-8; arXiv:2405.14867.
    """
    x, _ = _noised(score_fn, x_0, t, key)
    real = score_fn(x, t, prediction="data", cond=cond)
    own = fake(x, t, prediction="data", cond=cond if fake_cond is None else fake_cond)
    gradient = jax.tree.map(jnp.subtract, own, real)
    if normalise:
        away = jax.tree.leaves(jax.tree.map(lambda v, d: jnp.abs(v - d), x_0, real))
        sizes: list[jax.Array] = [jnp.sum(v.reshape(v.shape[0], -1), axis=1) for v in away]
        mean = sum(sizes[1:], sizes[0]) / sum(v[0].size for v in away)
        gradient = jax.tree.map(lambda g: g / scale_rows(jnp.maximum(mean, 1e-12), g), gradient)
    return jax.lax.stop_gradient(gradient)


def ddcm(
    score_fn: ScoreFn,
    x_0: PyTree,
    times: Times,
    *,
    key: jax.Array,
    source: Mapping[str, PyTree],
    target: Mapping[str, Array],
) -> PyTree:
    """Edit without inversion: what the target condition says, less what the source's says.

    At every level one z noises both the given sample and the edited one; the edited data is
    (x' - sigma (E_target(x') - E_source(x) + z)) / alpha. With equal conditions the sample comes
    back as it was.

    Args:
      score_fn: a conditional network or transform.
      x_0: the samples to be edited, (batch, ...).
      times: (n,) falling levels, two evaluations each, with alpha > 0 and sigma > 0.
      key: one, or one per sample.
      source: conditions that describe x_0.
      target: conditions that describe the result.

    Returns:
      (batch, ...).

    Reference: Xu et al. 2024 (InfEdit), arXiv:2312.04965, algorithm 2.
    """
    process = score_fn.process
    times = expect_times(np.append(np.asarray(times, np.float64), process.t_clean))[:-1]
    alpha, sigma = (np.asarray(f(times)) for f in (process.alpha, process.sigma))
    if not np.all((alpha > 0) & (sigma > 0)):
        raise ValueError("`times` must have signal and noise at every level.")
    bound = score_fn.bind(Level(times, alpha, sigma), (np.zeros(len(times)), np.ones(len(times))))
    keys = random.sample_keys(key, jax.tree.leaves(x_0)[0].shape[0])
    dtype = jax.dtypes.canonicalize_dtype(np.float64)

    def body(carry: PyTree, row: Array) -> PyTree:
        data, n = carry
        own, a, s = row
        z = random.normal_like(keys, n, x_0)

        def noised(v: jax.Array, e: jax.Array) -> jax.Array:
            return scale_rows(a, v) * v + scale_rows(s, v) * e

        given, edited = jax.tree.map(noised, x_0, z), jax.tree.map(noised, data, z)
        was = score_fn.predict(given, own, source)
        becomes = score_fn.predict(edited, own, target)
        data = jax.tree.map(
            lambda v, e, b, w: (v - scale_rows(s, v) * (b - w + e)) / scale_rows(a, v),
            edited,
            z,
            becomes,
            was,
        )
        return (data, n + 1), None

    rows = jax.tree.map(
        lambda v: jnp.asarray(v, dtype if np.asarray(v).dtype == np.float64 else None),
        (bound, alpha, sigma),
    )
    return jax.lax.scan(body, (x_0, jnp.zeros((), jnp.int32)), rows)[0][0]
