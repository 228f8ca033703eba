"""Guidance that is not affine in the outputs, each in the prediction its paper means.

Norms, products and standard deviations are those of one sample, over all its elements.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from diffsamp._core.checks import expect_int
from diffsamp._core.numeric import is_concrete
from diffsamp._core.types import Array, PyTree
from diffsamp.guidance._numbers import scale_numbers
from diffsamp.guidance.data import Rule, scaled_rule
from diffsamp.guidance.linear import null_terms
from diffsamp.guidance.transform import Transform
from diffsamp.score import ScoreFn
from diffsamp.tableau import Tableau

__all__ = ["apg", "cfg_zero_star", "rescale", "tcfg", "zero_first"]


def apg(
    score_fn: ScoreFn | Transform,
    scale: float | jax.Array | str | Callable[..., Array],
    null: Mapping[str, PyTree],
    *,
    parallel: float = 0.0,
    radius: float = np.inf,
) -> Rule:
    """Adaptive projected guidance: leave out what is parallel to the conditional prediction.

    In the data prediction, with delta = (D_given - D_free) min(1, radius / |D_given - D_free|)
    split along D_given: D = D_given + (scale - 1) (delta_orthogonal + parallel delta_parallel). At
    scale 1 it is the conditional network; parallel = 1 without radius is `cfg`. The paper's
    momentum needs an output of the row before: `unfold(.., momentum=)`, without the projection.

    Args:
      score_fn: a conditional network, with a batch axis.
      scale: as for `cfg`.
      null: as for `cfg`.
      parallel: share of the parallel part that is kept (the paper's eta).
      radius: largest norm of the difference; 2.5 to 15 in the paper.

    Reference: Sadat et al. 2025, arXiv:2410.02416, algorithm 1.
    """
    f = Partial(_apg, float(parallel), float(radius))
    return scaled_rule(null_terms(score_fn, null), f, scale_numbers(scale), "data")


def _apg(
    parallel: PyTree, radius: PyTree, parts: list[PyTree], level: PyTree, scale: Array
) -> PyTree:
    del level
    (given, free), back = _vectors(parts)
    delta = given - free
    norm = jnp.linalg.norm(delta, axis=1, keepdims=True)
    radius = jnp.asarray(radius, norm.dtype)
    delta = delta * jnp.where(norm > radius, radius / jnp.where(norm == 0, 1, norm), 1)
    along = _divide(_dot(delta, given), _dot(given, given)) * given
    kept = delta - along + jnp.asarray(parallel, norm.dtype) * along
    return back(given + (_column(scale, given) - 1) * kept)


def rescale(
    score_fn: ScoreFn | Transform,
    scale: float | jax.Array | str | Callable[..., Array],
    null: Mapping[str, PyTree],
    *,
    share: float = 0.7,
    prediction: str | None = None,
) -> Rule:
    """Guidance with the standard deviation of the conditional prediction.

    m = share m_w std(m_given) / std(m_w) + (1 - share) m_w, m_w the guided prediction. Another
    thing in every prediction; the paper's is the network's own.

    Args:
      score_fn: a conditional network, with a batch axis.
      scale: as for `cfg`.
      null: as for `cfg`.
      share: the paper's phi.
      prediction: in which it is meant; None: what the network emits.

    Reference: Lin et al. 2024, arXiv:2305.08891, eq. 15-16.
    """
    f = Partial(_rescale, float(share))
    own = score_fn.prediction if prediction is None else prediction
    return scaled_rule(null_terms(score_fn, null), f, scale_numbers(scale), own)


def _rescale(share: PyTree, parts: list[PyTree], level: PyTree, scale: Array) -> PyTree:
    del level
    (given, free), back = _vectors(parts)
    guided = free + _column(scale, given) * (given - free)
    share = jnp.asarray(share, given.dtype)
    ratio = _divide(_std(given), _std(guided), otherwise=1)
    return back(guided * (share * ratio + 1 - share))


def cfg_zero_star(
    score_fn: ScoreFn | Transform,
    scale: float | jax.Array | str | Callable[..., Array],
    null: Mapping[str, PyTree],
) -> Rule:
    """CFG-Zero*: the unconditional velocity scaled to fit the conditional one, for flow models.

    u = s u_free + scale (u_given - s u_free), s = <u_given, u_free> / |u_free|^2 per sample. The
    paper also takes u = 0 on the first rows: `zero_first(tableau)`.

    Args:
      score_fn: a conditional network, with a batch axis.
      scale: as for `cfg`.
      null: as for `cfg`.

    Reference: Fan et al. 2025, arXiv:2503.18886, algorithm 1.
    """
    terms = null_terms(score_fn, null)
    return scaled_rule(terms, Partial(_cfg_zero_star), scale_numbers(scale), "velocity")


def _cfg_zero_star(parts: list[PyTree], level: PyTree, scale: Array) -> PyTree:
    del level
    (given, free), back = _vectors(parts)
    fitted = _dot(given, free) / (_dot(free, free) + 1e-8) * free
    return back(fitted + _column(scale, given) * (given - fitted))


def zero_first(tableau: Tableau, rows: int | None = None) -> Tableau:
    """The tableau whose first rows keep the state, as a velocity of 0 does, and ask nothing.

    Args:
      tableau: a sampler whose rows use one state and one output each.
      rows: how many; None: 4 % of them, at least 1, as in the paper.

    Returns:
      A tableau with as many evaluations fewer; it is not consistent, on purpose.

    Raises:
      ValueError: rows that use earlier states or outputs, or all of the rows.

    Reference: Fan et al. 2025, arXiv:2503.18886.
    """
    if not is_concrete(tableau):
        raise TypeError("zero_first is a host function: call it outside `jit`.")
    rows = max(1, int(0.04 * tableau.rows)) if rows is None else rows
    rows = expect_int(rows, "rows", at_least=0, at_most=tableau.rows - 1)
    a, b, c, evaluates = (np.array(v) for v in (tableau.a, tableau.b, tableau.c, tableau.evaluates))
    if np.any(a[:, 1:] != 0) or np.any(b[:, 1:] != 0):
        raise ValueError(
            f"zero_first needs rows of one state and one output; {tableau.name!r} combines "
            "several, which a row that asks nothing would spoil. Take solvers.euler or ddim."
        )
    a[:rows], b[:rows], c[:rows], evaluates[:rows] = 1.0, 0.0, 0.0, False
    a[:, 1:] = 0.0
    name = f"{tableau.name}, zero first"
    return dataclasses.replace(tableau, a=a, b=b, c=c, evaluates=evaluates, name=name)


def tcfg(
    score_fn: ScoreFn | Transform,
    scale: float | jax.Array | str | Callable[..., Array],
    null: Mapping[str, PyTree],
    *,
    prediction: str | None = None,
) -> Rule:
    """Tangential damping: the unconditional prediction, projected on the direction both share.

    m_free becomes its projection on the top right singular vector of the two predictions, which
    follows from their 2 x 2 Gram matrix. Another thing in every prediction.

    Args:
      score_fn: a conditional network, with a batch axis.
      scale: as for `cfg`.
      null: as for `cfg`.
      prediction: in which it is meant; None: what the network emits.

    Reference: Kwon et al. 2025, arXiv:2503.18137.
    """
    own = score_fn.prediction if prediction is None else prediction
    return scaled_rule(null_terms(score_fn, null), Partial(_tcfg), scale_numbers(scale), own)


def _tcfg(parts: list[PyTree], level: PyTree, scale: Array) -> PyTree:
    del level
    (given, free), back = _vectors(parts)
    gg, gf, ff = _dot(given, given), _dot(given, free), _dot(free, free)
    half = (gg - ff) / 2
    top = (gg + ff) / 2 + jnp.hypot(half, gf)
    # of the two forms of the eigenvector the one that does not cancel
    p, q = jnp.where(half >= 0, top - ff, gf), jnp.where(half >= 0, gf, top - gg)
    norm = jnp.hypot(p, q)
    p, q = _divide(p, norm, otherwise=1), _divide(q, norm)
    # (free . v) v with v = (p given + q free) / sqrt(top)
    along = _divide(p * gf + q * ff, top) * (p * given + q * free)
    return back(along + _column(scale, given) * (given - along))


def _vectors(parts: list[PyTree]) -> tuple[list[jax.Array], Callable[[jax.Array], PyTree]]:
    """Every part as (batch, elements), and the way back to the state's structure."""
    leaves, treedef = jax.tree.flatten(parts[0])
    sizes = np.cumsum([int(np.prod(leaf.shape[1:])) for leaf in leaves])[:-1]

    def flat(tree: PyTree) -> jax.Array:
        return jnp.concatenate([v.reshape(v.shape[0], -1) for v in jax.tree.leaves(tree)], axis=1)

    def back(vector: jax.Array) -> PyTree:
        pieces = jnp.split(vector, sizes, axis=1)
        shaped = [
            piece.reshape(leaf.shape).astype(leaf.dtype)
            for piece, leaf in zip(pieces, leaves, strict=True)
        ]
        return jax.tree.unflatten(treedef, shaped)

    return [flat(part) for part in parts], back


def _std(a: jax.Array) -> jax.Array:
    return jnp.std(a, axis=1, keepdims=True)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(a * b, axis=1, keepdims=True)


def _divide(a: jax.Array, b: jax.Array, otherwise: float = 0.0) -> jax.Array:
    return jnp.where(b == 0, jnp.asarray(otherwise, a.dtype), a / jnp.where(b == 0, 1, b))


def _column(scale: Array, like: jax.Array) -> jax.Array:
    scale = jnp.asarray(scale, like.dtype)
    return scale.reshape(-1, 1)
