"""The first answer without the network: from the noise itself, or a constant."""

from __future__ import annotations

import dataclasses

import numpy as np

from diffsamp._core.types import Array
from diffsamp.tableau import Tableau

__all__ = ["analytic_first_step", "cached_first_answer"]


def analytic_first_step(tableau: Tableau) -> Tableau:
    """AFS: the same sampler with the first evaluation saved.

    At the highest noise a state is nearly all noise, so the first answer is replaced by

        E = u / sqrt(alpha^2 + sigma^2),    D = (u - sigma E) / alpha = alpha u / (m (m + sigma)),

    m that root: EDM's x / sqrt(1 + t^2) on every process, finite at alpha = 0. It is a multiple of
    the state, so whatever row used the answer (history, stages, corrector) uses the state instead;
    the row that would have asked is kept and asks nothing. It pays at few evaluations: n steps cost
    n - 1, so give the sampler one step more. The answer is not consistent: for data whose standard
    deviation is far from 1, or a start at moderate noise, it costs accuracy at once.

    Args:
      tableau: any sampler, its first evaluation at the start.

    Returns:
      A tableau of one evaluation fewer, named "..-afs".

    Raises:
      ValueError: a tableau of one evaluation or none, or one stacked per sample.

    Reference: Dockhorn, Vahdat & Kreis 2022 (GENIE), arXiv:2210.05475; Zhou et al. 2024,
    arXiv:2312.00094, section 3.3.
    """
    first, alpha, sigma = _first(tableau)
    m = np.hypot(alpha, sigma)
    on_data, on_noise = tableau.target[first]
    said = on_data * alpha / (m * (m + sigma)) + on_noise / m
    return _replaced(tableau, first, said, None, "afs", "arXiv:2210.05475")


def cached_first_answer(tableau: Tableau, answer: Array) -> Tableau:
    """The same sampler with its first answer a constant.

    At the highest noise a network's data prediction is close to the data's mean, whatever the
    state. The constant is part of the tableau (`d`): any program that reads it needs nothing else.
    For one constant per class, and in a search, use `guidance.first_answer`.

    Args:
      tableau: any sampler, its first evaluation at the start.
      answer: the data prediction, shaped like a sample, or a number.

    Returns:
      A tableau of one evaluation fewer, named "..-cached".

    Raises:
      ValueError: as for `analytic_first_step`; an answer that is not finite.
    """
    answer = np.asarray(answer, np.float64)
    if not np.all(np.isfinite(answer)):
        raise ValueError("`answer` must be finite.")
    first, alpha, sigma = _first(tableau)
    on_data, on_noise = tableau.target[first]
    # w0 D + w1 (u - alpha D) / sigma
    on_state = on_noise / sigma
    constant = (on_data - on_state * alpha) * answer
    return _replaced(tableau, first, on_state, constant, "cached", "")


def _first(tableau: Tableau) -> tuple[int, float, float]:
    """The first row that evaluates, its alpha and its sigma."""
    if np.ndim(tableau.times) != 1:
        raise ValueError("save the first evaluation of each tableau before stacking them.")
    asked = np.flatnonzero(np.asarray(tableau.evaluates))
    if len(asked) < 2:
        raise ValueError(
            f"saving the first evaluation leaves nothing to ask of {tableau.name!r}, which makes "
            f"{len(asked)}; give it at least 2."
        )
    first = int(asked[0])
    return first, float(tableau.alpha[first]), float(tableau.sigma[first])


def _replaced(
    tableau: Tableau,
    first: int,
    said: float,
    constant: np.ndarray | None,
    suffix: str,
    source: str,
) -> Tableau:
    """With `said` times the state plus a constant in place of the answer of row `first`."""
    lags = range(min(tableau.q, tableau.rows - first))
    used = [j for j in lags if np.any(tableau.b[first + j, j] != 0)]
    new = tableau.pad(p=max(tableau.p, 1 + max(used, default=0)))
    a, b, evaluates = new.a.copy(), new.b.copy(), new.evaluates.copy()
    for j in used:
        a[first + j, j] += said * b[first + j, j]
        b[first + j, j] = 0.0
    d = new.d
    if constant is not None:
        shape = (tableau.rows, 1, *constant.shape) if constant.ndim else (tableau.rows,)
        d = np.zeros(shape)
        if new.d is not None:
            old = np.asarray(new.d)
            d = d + old.reshape(old.shape + (1,) * (d.ndim - old.ndim))
        for j in used:
            weight = tableau.b[first + j, j]
            d[first + j] += np.asarray(weight) * constant
    evaluates[first] = False
    return dataclasses.replace(
        new,
        a=a,
        b=b,
        d=d,
        evaluates=evaluates,
        name=f"{tableau.name}-{suffix}",
        source="; ".join(filter(None, [tableau.source, source])),
        padded=tableau.padded,
    )
