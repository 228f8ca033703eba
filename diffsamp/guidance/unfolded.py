"""Guidance as rows of a tableau.

Guidance is linear in the outputs, so a guided step is two rows of an ordinary tableau: one that
asks the null condition and keeps the state, and one that asks the condition and moves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core.numeric import is_concrete
from diffsamp._core.types import Array, Bound, Conditions, Network, PyTree
from diffsamp.guidance._numbers import scale_numbers
from diffsamp.guidance._terms import make_terms
from diffsamp.guidance.transform import Transform, per_row
from diffsamp.predictions import Level
from diffsamp.score import ScoreFn
from diffsamp.solvers._rows import spread_rows
from diffsamp.tableau import Tableau

__all__ = ["Selected", "select", "unfold"]


class _SelectedBound(NamedTuple):
    inner: Bound
    which: PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Selected(Transform):
    """A network asked with or without its condition, row by row; made by `select`."""

    score_fn: Network
    null: Mapping[str, PyTree]
    which: PyTree

    def bind(self, level: Level, target: tuple[Array, Array]) -> _SelectedBound:
        """As `ScoreFn.bind`, and which rows ask the null condition."""
        which = per_row(level, "select", self.which)[0]
        return _SelectedBound(self.score_fn.bind(level, target), which)

    def predict(self, x: PyTree, bound: _SelectedBound, cond: Conditions | None = None) -> PyTree:
        """One call of the network, under the row's condition."""
        given = dict(cond or {})
        missing = [name for name in self.null if name not in given]
        if missing:
            raise ValueError(
                "guidance needs the condition it strengthens: pass `cond` with "
                f"{', '.join(map(repr, missing))}."
            )

        def choose(old: PyTree, new: PyTree) -> PyTree:
            # a condition that the batch shares stays shared, unless samples differ in their rows
            old, pick = jnp.asarray(old), jnp.asarray(bound.which)
            new = jnp.broadcast_to(jnp.asarray(new).astype(old.dtype), old.shape)
            if pick.ndim and old.shape[:1] != pick.shape:
                raise ValueError(
                    f"samples follow rows of their own and need a condition each, shape "
                    f"{(*pick.shape, *old.shape)}; got one for the whole batch, {old.shape}."
                )
            return jnp.where(pick.reshape(pick.shape + (1,) * (old.ndim - pick.ndim)), new, old)

        own = {}
        for name, null in self.null.items():
            old = given[name]
            structures: list[PyTree] = [jax.tree.structure(tree) for tree in (null, old)]
            same = structures[0] == structures[1]
            own[name] = jax.tree.map(
                choose, old, null if same else jax.tree.map(lambda _, n=null: n, old)
            )
        return self.score_fn.predict(x, bound.inner, {**given, **own})


def select(score_fn: ScoreFn | Transform, null: Mapping[str, PyTree], which: PyTree) -> Selected:
    """The network for a tableau of `unfold`: null rows ask it without the condition.

    Args:
      score_fn: a conditional network.
      null: what "no condition" is, by name of the condition, as for `cfg`.
      which: from `unfold`, (rows,) booleans; (rows, batch) for one scale per sample.

    Returns:
      A transform to sample with `cond=...` and that tableau, padded or not. One network evaluation
      a call: `tableau.nfe` is what a run costs.

    Raises:
      ValueError: an empty `null`.
    """
    make_terms([(score_fn, {})], True, None)
    if not null:
        raise ValueError('`null` must say what no condition is, such as {"label": 10}.')
    which = np.asarray(which, bool) if is_concrete(which) else which
    return Selected(score_fn, dict(null), which)


def unfold(tableau: Tableau, scale: Array) -> tuple[Tableau, np.ndarray]:
    """Classifier-free guidance as rows of a tableau.

    Every row that evaluates becomes two, one that asks the null condition and keeps the state and
    one that asks the condition and moves; with m = w m_given + (1 - w) m_free put in for each
    output. Rows of scale 1 stay one row, and rows of scale 0 are the null row alone. The result is
    an ordinary tableau: `nfe` counts every call, guidance is learned and searched like any other
    coefficient, and nothing branches. `cfg` asks both in one call of a doubled batch instead, which
    is faster where the batch is small.

    Examples:
      >>> import jax.numpy as jnp, diffsamp as ds
      >>> process = ds.processes.vp_linear()
      >>> def apply(params, x, t, label):
      ...     return 0.5 * x + 0.1 * label[:, None]
      >>> network = ds.ScoreFn(apply, None, process, prediction="data")
      >>> plain = ds.solvers.dpmpp(process, ds.schedules.logsnr(process, 8), order=2)
      >>> guided, which = ds.guidance.unfold(plain, [1, 1, 3, 3, 3, 3, 1, 1])
      >>> guided.nfe
      12
      >>> chosen = ds.guidance.select(network, {"label": 0}, which)
      >>> x = ds.sample(chosen, guided, jnp.ones((2, 3)), cond={"label": jnp.array([1, 2])})
      >>> x.shape
      (2, 3)

    Args:
      tableau: any sampler; of one sample's own (not stacked).
      scale: a number, one per row (rows,), one per row and sample (rows, batch), or a function of
        the `Level` (arrays over the rows).

    Returns:
      (unfolded, which): the tableau, and which of its rows ask the null condition, (rows,) or
      (rows, batch) booleans, for `select`. Fresh noise is drawn by row number, so a stochastic
      sampler draws other noise than under `cfg`, of the same law.

    Raises:
      TypeError: a traced tableau or scale.
      ValueError: a stacked tableau, or a scale of another shape.
    """
    if not is_concrete(tableau, scale if not callable(scale) else ()):
        raise TypeError("unfold is a host function: build the rows outside `jit`.")
    if np.ndim(tableau.times) != 1:
        raise ValueError("unfold the tableaux before stacking them.")
    if np.ndim(scale) == 2 and not callable(scale):
        pairs = [unfold(tableau, column) for column in np.asarray(scale).T]
        rows = max(made.rows for made, _ in pairs)
        which = [np.pad(own, (0, rows - own.shape[0])) for _, own in pairs]
        return Tableau.stack([made for made, _ in pairs]), np.stack(which, axis=-1)
    level = Level(*(np.asarray(v)[:-1] for v in (tableau.times, tableau.alpha, tableau.sigma)))
    if callable(scale) or np.ndim(scale) == 0:
        bound = scale_numbers(scale).bind(level)
        scale = bound[0] if bound is not None else scale
    w = np.asarray(scale, np.float64)
    if w.shape != (tableau.rows,) or not np.all(np.isfinite(w)):
        raise ValueError(
            f"`scale` must be finite: a number, one per row, shape ({tableau.rows},), one per row "
            f"and sample, ({tableau.rows}, batch), or a function of the level; got shape {w.shape}."
        )
    return _unfold(tableau, w)


def _unfold(tableau: Tableau, w: np.ndarray) -> tuple[Tableau, np.ndarray]:
    asks = np.asarray(tableau.evaluates, bool)
    both = asks & (w != 1) & (w != 0)
    last = np.arange(tableau.rows) + np.cumsum(both)  # where each row's state moves
    first = last - both
    rows = int(last[-1]) + 1
    which = np.zeros(rows, bool)
    which[first[both]] = which[last[asks & (w == 0)]] = True
    spread = spread_rows(tableau, last, rows)
    evaluates = np.array(spread.evaluates)
    evaluates[first[both]] = True
    # m = w m_given + (1 - w) m_free, the two outputs side by side
    b = np.zeros((rows, spread.b.shape[1] + 1, *spread.b.shape[2:]))
    for n in range(tableau.rows):
        for j in range(min(tableau.q, n + 1)):
            k, weight = n - j, np.asarray(tableau.b)[n, j]
            if not np.any(weight):
                continue
            b[last[n], last[n] - last[k]] += (w[k] if both[k] else 1.0) * weight
            if both[k]:
                b[last[n], last[n] - first[k]] += (1 - w[k]) * weight
    used = np.flatnonzero(np.any(b != 0, axis=(0, *range(2, b.ndim))))
    b = b[:, : 1 + int(used.max(initial=0))]
    name = f"{tableau.name}, guided" if np.any(w[asks] != 1) else tableau.name
    return dataclasses.replace(spread, b=b, evaluates=evaluates, name=name), which
