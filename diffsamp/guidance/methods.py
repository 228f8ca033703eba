"""Published methods that are functions of the data or the noise prediction."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from diffsamp._core import random
from diffsamp._core.numeric import namespace
from diffsamp._core.types import Array, Conditions, Network, PyTree, Times, Value
from diffsamp.guidance._numbers import as_partial
from diffsamp.guidance.data import Rule, keep_noise, on_data, on_noise
from diffsamp.guidance.linear import Combined, combine, null_terms
from diffsamp.guidance.transform import Transform
from diffsamp.predictions import Level, level_at
from diffsamp.score import ScoreFn, scale_rows
from diffsamp.tableau import Tableau

__all__ = [
    "bias_table",
    "calibrate",
    "ddnm",
    "free_share",
    "inpaint",
    "mpgd",
    "omegance",
    "recfg",
]


def inpaint(
    score_fn: ScoreFn | Transform, known: PyTree, mask: PyTree, tableau: Tableau | None = None
) -> Rule:
    """Put the known elements into the data prediction: D -> mask known + (1 - mask) D.

    Args:
      score_fn: a network or transform.
      known: the values, (batch, ...) or broadcasting to it, or the name of an entry of `cond`.
      mask: 1 or True where they are known; broadcasts to the state.
      tableau: the sampler to be used; its noise is kept, which is what converges to the exact
        conditional law with fresh noise and many rows. None derives the noise.

    Reference: Wang et al. 2023, arXiv:2212.00490.
    """
    gain = None if tableau is None else keep_noise(tableau)
    if isinstance(known, str):
        return on_data(score_fn, Partial(_inpaint_named(known), mask), gain, names=(known,))
    return on_data(score_fn, Partial(_inpaint, known, mask), gain)


def _inpaint(
    known: PyTree, mask: PyTree, data: PyTree, level: Level, cond: Conditions | None
) -> PyTree:
    del level, cond

    def put(leaf: jax.Array, value: Value, where: PyTree) -> jax.Array:
        value, where = (jnp.asarray(v).astype(leaf.dtype) for v in (value, where))
        value, where = (jnp.broadcast_to(v, leaf.shape) for v in (value, where))
        return where * value + (1 - where) * leaf

    structure: list[PyTree] = [jax.tree.structure(tree) for tree in (mask, data)]
    if structure[0] != structure[1]:
        mask = jax.tree.map(lambda _: mask, data)
    return jax.tree.map(put, data, known, mask)


@functools.cache  # functions of rules are compared by identity
def _inpaint_named(name: str) -> Callable[..., PyTree]:
    def f(mask: PyTree, data: PyTree, level: Level, cond: Conditions) -> PyTree:
        return _inpaint(cond[name], mask, data, level, cond)

    return f


def ddnm(
    score_fn: ScoreFn | Transform, operator: PyTree, y: PyTree, tableau: Tableau | None = None
) -> Rule:
    """Project the data prediction on what was measured: D -> D - A^+ (A D - y).

    For measurements without noise; `measurement` knows of noise.

    Args:
      score_fn: a network or transform.
      operator: an operator of `diffsamp.inverse`, or a pytree with its methods: called with a
        batch it measures, and `pinv(y)` is its pseudo-inverse.
      y: the measurement, or the name of an entry of `cond` that holds one per sample.
      tableau: as for `inpaint`; the paper's is DDIM with eta 0.85, or `solvers.renoise`.

    Reference: Wang, Yu & Zhang 2023, arXiv:2212.00490, algorithm 1.
    """
    gain = None if tableau is None else keep_noise(tableau)
    if isinstance(y, str):
        return on_data(score_fn, Partial(_ddnm_named(y), operator), gain, names=(y,))
    return on_data(score_fn, Partial(_ddnm, operator, y), gain)


def _ddnm(
    operator: PyTree, y: PyTree, data: PyTree, level: Level, cond: Conditions | None
) -> PyTree:
    del level, cond
    measured = operator(data)
    missing = jax.tree.map(lambda v, got: jnp.asarray(v).astype(got.dtype) - got, y, measured)
    return jax.tree.map(lambda d, r: d + r.astype(d.dtype), data, operator.pinv(missing))


@functools.cache
def _ddnm_named(name: str) -> Callable[..., PyTree]:
    def f(operator: PyTree, data: PyTree, level: Level, cond: Conditions) -> PyTree:
        return _ddnm(operator, cond[name], data, level, cond)

    return f


def mpgd(
    score_fn: ScoreFn | Transform,
    f: Callable[[PyTree, Level, Mapping[str, PyTree] | None], PyTree],
    step: float,
    tableau: Tableau | None = None,
    *,
    repeats: int = 1,
    names: tuple[str, ...] = (),
) -> Rule:
    """Gradient steps on the data prediction itself: D -> D - step grad f(D).

    No gradient passes through the network (MPGD, Dreamguider's data term, the backward steps of
    universal guidance).

    Args:
      score_fn: a network or transform.
      f: (D, level, cond) -> (batch,), a loss per sample.
      step: length of a step, a number.
      tableau: the sampler to be used, whose noise is then kept, as in the papers; None derives it.
      repeats: how many steps.
      names: entries of `cond` for f alone.

    Reference: He et al. 2024, arXiv:2311.16424, algorithm 1.
    """
    gain = None if tableau is None else keep_noise(tableau)
    g = Partial(_descend(repeats), as_partial(f, "f"), step)
    return on_data(score_fn, g, gain, names=names)


@functools.cache
def _descend(repeats: int) -> Callable[..., PyTree]:
    def run(f: PyTree, step: PyTree, data: PyTree, level: Level, cond: Conditions | None) -> PyTree:
        gradient = jax.grad(lambda d: jnp.sum(f(d, level, cond)))
        for _ in range(repeats):
            data = jax.tree.map(
                lambda d, g: d - jnp.asarray(step, d.dtype) * g, data, gradient(data)
            )
        return data

    return run


def omegance(score_fn: ScoreFn | Transform, omega: PyTree) -> Rule:
    """Scale the noise prediction: E -> omega E; below 1 for more detail, above 1 for less.

    Args:
      score_fn: a network or transform.
      omega: a number, a mask that broadcasts to the state, or a function of the `Level` (at one
        call) for a schedule; 0.95 to 1.05 in the paper.

    Reference: Hou et al. 2024, arXiv:2411.17769.
    """
    if callable(omega):
        return on_noise(score_fn, Partial(_omega_of_level, as_partial(omega, "omega")))
    return on_noise(score_fn, Partial(_omega, omega))


def _omega(omega: PyTree, noise: PyTree, level: Level, cond: Conditions | None) -> PyTree:
    del level, cond
    return jax.tree.map(lambda e: e * jnp.broadcast_to(jnp.asarray(omega, e.dtype), e.shape), noise)


def _omega_of_level(f: PyTree, noise: PyTree, level: Level, cond: Conditions | None) -> PyTree:
    del cond
    return jax.tree.map(lambda e: e * scale_rows(f(level), e), noise)


def calibrate(score_fn: ScoreFn | Transform, table: tuple[PyTree, PyTree]) -> Rule:
    """Subtract the network's mean error: E -> E - its mean over the data at the level.

    The noise prediction of a perfect network has mean zero at every level.

    Args:
      score_fn: a network or transform.
      table: from `bias_table`: log-SNRs, rising, and the means there; interpolated between.

    Reference: Pang et al. 2023, arXiv:2302.10688.
    """
    return on_noise(score_fn, Partial(_subtract, *table))


def _subtract(
    log_snr: Array, means: PyTree, noise: PyTree, level: Level, cond: Conditions | None
) -> PyTree:
    del cond
    at = jnp.log(level.alpha) - jnp.log(level.sigma)
    grid = jnp.asarray(log_snr, at.dtype)

    def one(e: jax.Array, mean: PyTree) -> jax.Array:
        mean = jnp.asarray(mean, e.dtype)
        flat = mean.reshape(mean.shape[0], -1)
        value = jax.vmap(lambda column: jnp.interp(at, grid, column), 1, -1)(flat)
        per_sample = value.reshape(*at.shape, *mean.shape[1:])
        return e - (per_sample if at.ndim else jnp.broadcast_to(per_sample[None], e.shape))

    return jax.tree.map(one, noise, means)


def bias_table(
    score_fn: ScoreFn | Transform,
    x_0: PyTree,
    times: Times,
    key: jax.Array,
    *,
    cond: Conditions | None = None,
) -> tuple[np.ndarray, PyTree]:
    """The mean noise prediction over data, at every time: what `calibrate` subtracts.

    Args:
      score_fn: a network with a batch axis.
      x_0: data, (batch, ...); the error of a mean is 1 / sqrt(batch).
      times: (n,) times at which 0 < sigma and 0 < alpha.
      key: one key, or one per sample.
      cond: keyword arguments for the network.

    Returns:
      (log_snr, means): (n,) rising log-SNRs, and a pytree like one sample with n in front. It costs
      n evaluations per sample.
    """
    process = score_fn.process
    times = np.sort(np.asarray(times, np.float64))[::-1]
    keys = random.sample_keys(key, jax.tree.leaves(x_0)[0].shape[0])

    @jax.jit
    def mean(score_fn: Network, row: Array, t: Array, cond: Conditions | None) -> PyTree:
        z = random.normal_like(keys, row, x_0)
        alpha, sigma = process.alpha(t), process.sigma(t)
        x = jax.tree.map(lambda v, e: scale_rows(alpha, v) * v + scale_rows(sigma, v) * e, x_0, z)
        noise = score_fn(x, t, prediction="noise", cond=cond)
        # against the noise that was drawn, whose own mean is not exactly zero
        return jax.tree.map(lambda e, own: jnp.mean(e - own, axis=0), noise, z)

    dtype = jax.dtypes.canonicalize_dtype(np.float64)
    rows = [mean(score_fn, i, jnp.asarray(t, dtype), cond) for i, t in enumerate(times)]
    xp = namespace(times)
    return xp.asarray(process.log_snr(times)), jax.tree.map(lambda *v: jnp.stack(v), *rows)


def recfg(
    score_fn: ScoreFn | Transform, scale: float, null: Mapping[str, PyTree], share: Array
) -> Combined:
    """ReCFG: E = w E_c + (1 - w) k E_0, a noise prediction of the mean it should have.

    With k = E[E_c E_0] / E[E_0^2] the free term no longer shifts what guidance expects; its weights
    do not sum to 1, and are meant in the noise.

    Args:
      score_fn: a conditional network, with a batch axis.
      scale: w.
      null: as for `cfg`.
      share: k, (rows,), one per row of the tableau, from `free_share(.., tableau.times[:-1], ..)`.

    Raises:
      ValueError: a share of another shape, or an empty `null`.

    Reference: Xia et al. 2024, arXiv:2410.18737; one number per level here, not per pixel.
    """
    null_terms(score_fn, null)
    share = np.asarray(share, np.float64)
    if share.ndim != 1:
        raise ValueError(f"`share` must hold one number per row, shape (rows,); got {share.shape}.")
    weights = np.stack([np.full_like(share, float(scale)), (1 - float(scale)) * share], axis=1)
    return combine([(score_fn, {}), (score_fn, null)], weights)


def free_share(
    score_fn: ScoreFn | Transform,
    null: Mapping[str, PyTree],
    x_0: PyTree,
    times: Array,
    key: jax.Array,
    *,
    cond: Conditions | None = None,
) -> np.ndarray:
    """E[E_c E_0] / E[E_0^2] over noised data, at every time: what `recfg` takes.

    Args:
      score_fn: a conditional network, with a batch axis.
      null: as for `cfg`.
      x_0: data, (batch, ...), of the conditions in `cond`.
      times: (n,) times with sigma > 0.
      key: one key, or one per sample.
      cond: keyword arguments for the network.

    Returns:
      (n,), in the order of `times`. It costs 2 n evaluations per sample.
    """
    terms = null_terms(score_fn, null)
    process = score_fn.process
    keys = random.sample_keys(key, jax.tree.leaves(x_0)[0].shape[0])

    @jax.jit
    def at(terms: Network, row: Array, t: Array, cond: Conditions | None) -> tuple[PyTree, PyTree]:
        z = random.normal_like(keys, row, x_0)
        level = level_at(process, t)
        x = jax.tree.map(
            lambda v, e: scale_rows(level.alpha, v) * v + scale_rows(level.sigma, v) * e, x_0, z
        )
        one = jnp.ones_like(level.alpha)
        bound = terms.bind(level, (0 * one, one))
        given, free = (jax.tree.leaves(part) for part in terms.predict(x, bound, cond))
        pairs = list(zip(given, free, strict=True))
        return sum(jnp.mean(c * f) * c.size for c, f in pairs), sum(
            jnp.mean(f * f) * f.size for _, f in pairs
        )

    dtype = jax.dtypes.canonicalize_dtype(np.float64)
    found = [at(terms, i, jnp.asarray(t, dtype), cond) for i, t in enumerate(np.asarray(times))]
    return np.array([float(both) / float(own) for both, own in found])
