"""`fit_null`: answers without condition from earlier ones, so that guidance asks fewer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from diffsamp._core.checks import expect_int
from diffsamp._core.types import Conditions, Key, Network, PyTree
from diffsamp.guidance import combine
from diffsamp.guidance.linear import null_terms
from diffsamp.predictions import Level
from diffsamp.sampling import trajectory
from diffsamp.score import ScoreFn
from diffsamp.search._cost import ask_data, at_row
from diffsamp.search.running import expect_batch
from diffsamp.tableau import Tableau

__all__ = ["fit_null"]


def fit_null(
    score_fn: ScoreFn,
    tableau: Tableau,
    scale: float | Sequence[float] | np.ndarray,
    null: Mapping[str, PyTree],
    x_T: PyTree,
    *,
    skip: Sequence[int],
    lags: int = 2,
    cond: Conditions | None = None,
    key: Key = None,
) -> dict[int, np.ndarray]:
    """LinearAG: what the network would say without condition, as a combination of earlier answers.

    For every row of `skip` least squares over one guided run of some starts. Give the result to
    `guidance.unfold(tableau, scale, estimates=..)`, whose tableau has one evaluation less for each.
    Exact for Gaussians of equal variance.

    Args:
      score_fn: a conditional network, with a batch axis.
      tableau: any sampler of one sample's own.
      scale: of guidance, a number or (rows,).
      null: what "no condition" is, as for `guidance.cfg`.
      x_T: (n, ...) starts, a few of all conditions; each costs 4 evaluations a row.
      skip: numbers of the rows that will not ask the null condition; they, and the evaluation
        before each, must be guided (a scale other than 0 and 1).
      lags: how many answers of each kind, this row's own given one included, as far as they are
        guided.
      cond: keyword arguments for the network, every array with the leading axis n.
      key: for a stochastic tableau.

    Returns:
      {row: (2, lags)}: weights of the given and of the free answers, newest first.

    Raises:
      ValueError: rows that cannot be skipped.

    Reference: Castillo et al. 2023, arXiv:2312.12487, section 5.
    """
    expect_int(lags, "lags", at_least=2)
    expect_batch(x_T, cond)
    w = np.broadcast_to(np.asarray(scale, np.float64), (tableau.rows,))
    asked = [int(n) for n in np.flatnonzero(np.asarray(tableau.evaluates))]
    guided = [n for n in asked if w[n] not in (0.0, 1.0)]
    for n in skip:
        if n not in guided or n == asked[0] or asked[asked.index(n) - 1] not in guided:
            raise ValueError(
                f"row {n} cannot be skipped: it and the evaluation before it must be guided, with "
                "scales other than 0 and 1."
            )
    both: Network = combine([(score_fn, {}), (score_fn, null)], np.stack([w, 1 - w], axis=1))
    points = trajectory(both, tableau, x_T, key=key, cond=cond).points
    level = Level(*(np.asarray(v)[:-1] for v in (tableau.times, tableau.alpha, tableau.sigma)))
    if tableau.asked is not None:
        level = level._replace(asked=np.asarray(tableau.asked))
    terms: Network = null_terms(score_fn, null)
    bound = terms.bind(level, (tableau.target[:, 0], tableau.target[:, 1]))
    told: dict[int, list[np.ndarray]] = {}
    for n in guided:
        said = ask_data(terms, jax.tree.map(lambda v, n=n: v[n], points), at_row(bound, n), cond)
        told[n] = [
            np.concatenate([np.asarray(v, np.float64).ravel() for v in jax.tree.leaves(part)])
            for part in said
        ]
    found: dict[int, np.ndarray] = {}
    for n in sorted(skip):
        before = asked[: asked.index(n) + 1][::-1][:lags]
        known = [k in guided for k in before]
        before = before[: known.index(False) if False in known else len(before)]
        columns = [told[k][0] for k in before] + [told[k][1] for k in before[1:]]
        weights = np.linalg.lstsq(np.stack(columns, axis=1), told[n][1], rcond=1e-6)[0]
        given, free = weights[: len(before)], weights[len(before) :]
        found[n] = np.stack([given, np.append(0.0, free)])
    return found
