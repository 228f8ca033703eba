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


def unfold(
    tableau: Tableau,
    scale: Array,
    *,
    momentum: float = 0.0,
    estimates: Mapping[int, np.ndarray] | None = None,
) -> tuple[Tableau, np.ndarray]:
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
      momentum: beta of a running difference, m = m_given + (w - 1) d_n with d_n = m_given - m_free
        + beta d_{n-1}, which begins anew after rows of scale 0 or 1: APG's momentum (negative in
        its paper, on data predictions), without its projection, which is not linear.
      estimates: by row number (2, lags), for rows that do not ask the null condition: its answer is
        sum_j e[0, j] given_{n-j} + e[1, j] free_{n-j} over the evaluations up to this row (e[1, 0]
        is 0). LinearAG (Castillo et al. 2023, arXiv:2312.12487); from `search.fit_null`.

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
        own = np.asarray(scale).T
        pairs = [unfold(tableau, w, momentum=momentum, estimates=estimates) for w in own]
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
    _expect_estimates(estimates or {}, tableau, w)
    return _unfold(tableau, w, float(momentum), estimates)


def _expect_estimates(estimates: Mapping[int, np.ndarray], tableau: Tableau, w: np.ndarray) -> None:
    asked = [int(n) for n in np.flatnonzero(np.asarray(tableau.evaluates))]
    for n, weights in estimates.items():
        shape = np.shape(weights)
        if n not in asked or w[n] in (0.0, 1.0) or len(shape) != 2 or shape[0] != 2:
            raise ValueError(
                "`estimates` must map rows that evaluate, of a scale other than 0 and 1, to arrays "
                f"of shape (2, lags); got shape {shape} for row {n}."
            )
        before = asked[: asked.index(n) + 1][::-1]
        if shape[1] > len(before) or np.asarray(weights)[1, 0] != 0:
            raise ValueError(
                f"row {n} has {len(before) - 1} evaluations before it and no free answer of its "
                f"own; got weights {np.asarray(weights).tolist()}."
            )
        for j, k in enumerate(before[: shape[1]]):
            missing = np.asarray(weights)[:, j] != 0
            if (missing[0] and w[k] == 0) or (missing[1] and w[k] == 1):
                raise ValueError(f"the estimate of row {n} uses an answer that row {k} never asks.")


def _unfold(
    tableau: Tableau,
    w: np.ndarray,
    momentum: float = 0.0,
    estimates: Mapping[int, np.ndarray] | None = None,
) -> tuple[Tableau, np.ndarray]:
    asks = np.asarray(tableau.evaluates, bool)
    guided = asks & (w != 1) & (w != 0)
    both = guided.copy()
    both[list(estimates or ())] = False
    last = np.arange(tableau.rows) + np.cumsum(both)  # where each row's state moves
    first = last - both
    rows = int(last[-1]) + 1
    which = np.zeros(rows, bool)
    which[first[both]] = which[last[asks & (w == 0)]] = True
    spread = spread_rows(tableau, last, rows)
    evaluates = np.array(spread.evaluates)
    evaluates[first[both]] = True
    outputs = _outputs(w, guided, asks, (first, last), both, momentum, estimates or {}, rows)
    width = rows if momentum or estimates else spread.b.shape[1] + 1
    b = np.zeros((rows, width, *spread.b.shape[2:]))
    for n in range(tableau.rows):
        for j in range(min(tableau.q, n + 1)):
            weight = np.asarray(tableau.b)[n, j]
            if not np.any(weight):
                continue
            for place in np.flatnonzero(outputs[n - j]):
                b[last[n], last[n] - place] += outputs[n - j][place] * weight
    used = np.flatnonzero(np.any(b != 0, axis=(0, *range(2, b.ndim))))
    b = b[:, : 1 + int(used.max(initial=0))]
    name = f"{tableau.name}, guided" if np.any(w[asks] != 1) else tableau.name
    return dataclasses.replace(spread, b=b, evaluates=evaluates, name=name), which


def _outputs(
    w: np.ndarray,
    guided: np.ndarray,
    asks: np.ndarray,
    places: tuple[np.ndarray, np.ndarray],
    both: np.ndarray,
    momentum: float,
    estimates: Mapping[int, np.ndarray],
    rows: int,
) -> list[np.ndarray]:
    """Every row's guided output as weights of what the unfolded rows are told, (rows,) each.

    m = given + (w - 1) running, running = given - free + momentum running; a row without its own
    free answer takes the estimate, a combination of earlier ones.
    """
    one, (first, last) = np.eye(rows), places
    given, free, found = dict[int, np.ndarray](), dict[int, np.ndarray](), list[np.ndarray]()
    running = np.zeros(rows)
    numbers = [n for n in range(len(w)) if asks[n]]
    for n in range(len(w)):
        if not asks[n]:
            found.append(np.zeros(rows))
            continue
        if w[n] == 0:
            free[n] = one[last[n]]
        else:
            given[n] = one[last[n]]
        if not guided[n]:
            running = np.zeros(rows)  # what it accumulates is not known here
            found.append(one[last[n]])
            continue
        if both[n]:
            free[n] = one[first[n]]
        else:
            before = numbers[: numbers.index(n) + 1][::-1]
            free[n] = np.zeros(rows)
            for (p, q), k in zip(estimates[n].T, before, strict=False):
                free[n] = free[n] + (p * given[k] if p else 0) + (q * free[k] if q else 0)
        running = given[n] - free[n] + momentum * running
        found.append(given[n] + (w[n] - 1) * running)
    return found
