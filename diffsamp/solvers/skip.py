"""Rows that do not ask: their answer is extrapolated from those before.

What caches do inside a network (MagCache, TaylorSeer) done around it: at a skipped row the whole
answer is the last one, or a line or parabola in log-SNR through the last ones. All of that is
linear, so the result is a tableau again, with fewer evaluations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from diffsamp._core.checks import expect_int
from diffsamp._core.types import Array
from diffsamp.tableau import Tableau

__all__ = ["skip"]


def skip(tableau: Tableau, rows: Sequence[int], *, order: int = 1) -> Tableau:
    """The same sampler without the evaluations of some rows.

    A skipped row takes for its answer, in the prediction that the sampler asks for, the polynomial
    of degree `order` in log-SNR through the last order + 1 real answers (as many as there are).
    Reusing the last answer of DDIM in data prediction is one DDIM step over both rows; other
    predictions, orders and solvers give other samplers.

    Args:
      tableau: any sampler whose rows all ask for one prediction.
      rows: which rows; not the first that asks.
      order: 0 reuses the last answer, 1 is a line, 2 a parabola (TaylorSeer's orders).

    Returns:
      A tableau of `len(rows)` evaluations fewer; the state still takes every step.

    Raises:
      ValueError: a row that makes no evaluation or is the first, rows that ask for different
        predictions, or coefficients with axes of the data.

    Reference: Liu et al. 2025 (TaylorSeer), arXiv:2503.06923, eq. 7; Ma et al. 2025 (MagCache),
    arXiv:2506.09045, for order 0.
    """
    order = expect_int(order, "order", at_least=0)
    live = np.flatnonzero(np.asarray(tableau.evaluates))
    chosen = sorted({expect_int(row, "rows", at_least=0) for row in rows})
    if np.ndim(tableau.times) != 1 or np.ndim(tableau.b) != 2:
        raise ValueError("only a tableau of plain numbers can skip evaluations.")
    wrong = [row for row in chosen if row not in live[1:]]
    if wrong:
        raise ValueError(
            f"`rows` {wrong} of tableau {tableau.name!r} cannot be skipped: they make no "
            "evaluation, or the first, before which there is no answer."
        )
    if np.any(tableau.target[live] != tableau.target[live[0]]):
        raise ValueError(
            f"the rows of tableau {tableau.name!r} ask for different predictions, between which "
            "nothing can be extrapolated."
        )
    if not chosen:
        return tableau
    answers = _answers(tableau, [int(n) for n in live if n not in chosen], chosen, order)
    count = tableau.rows
    on_answers = np.zeros((count, count))
    for n in range(count):
        for j in range(min(tableau.q, n + 1)):
            on_answers[n] += tableau.b[n, j] * answers[n - j]
    lag = np.subtract.outer(np.arange(count), np.arange(count))
    used = lag[on_answers != 0]
    width = max(int(used.max(initial=0)) + 1, 1)
    b = np.zeros((count, width))
    for j in range(width):
        at = np.arange(j, count)
        b[at, j] = on_answers[at, at - j]
    evaluates = np.asarray(tableau.evaluates).copy()
    evaluates[chosen] = False
    return dataclasses.replace(
        tableau,
        b=b,
        evaluates=evaluates,
        name=f"{tableau.name}, {len(chosen)} skipped",
        source=f"diffsamp.solvers.skip (order {order}); {tableau.source}",
    )


def _answers(tableau: Tableau, asked: list[int], skipped: list[int], order: int) -> Array:
    """(N, N) every row's answer as weights of the real ones."""
    with np.errstate(divide="ignore"):
        log_snr = np.log(tableau.alpha[:-1]) - np.log(tableau.sigma[:-1])
    answers = np.zeros((tableau.rows, tableau.rows))
    answers[asked, asked] = 1.0
    for row in skipped:
        nodes: list[int] = []
        for past in reversed([n for n in asked if n < row]):
            apart = all(abs(log_snr[past] - log_snr[n]) > 1e-9 for n in nodes)
            if not nodes or (np.isfinite(log_snr[past]) and apart):
                nodes.append(past)
            if len(nodes) == order + 1 or not np.all(np.isfinite(log_snr[[row, *nodes]])):
                break  # at alpha = 0 or sigma = 0 there is no length to extrapolate over
        for n in nodes:
            others = np.array([log_snr[m] for m in nodes if m != n])
            answers[row, n] = np.prod((log_snr[row] - others) / (log_snr[n] - others))
    return answers
