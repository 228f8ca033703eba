"""The rows of a tableau with others put between them."""

from __future__ import annotations

import dataclasses

import numpy as np

from diffsamp._core.types import Array, Value
from diffsamp.tableau import Tableau

__all__ = ["spread_rows"]


def spread_rows(tableau: Tableau, at: np.ndarray, rows: int) -> Tableau:
    """The tableau with row n at place at[n] of `rows`; the others keep the state and ask nothing.

    A row before the first place, or between two, lives at the level of the row after it; every
    row's past states and outputs stay those it had.
    """
    source = np.searchsorted(at, np.arange(rows))
    source = np.minimum(source, tableau.rows - 1)
    placed = np.zeros(rows, bool)
    placed[at] = True
    new: dict[str, Array] = {}
    for name in ("a", "b"):
        old = np.asarray(getattr(tableau, name))
        entries = [
            (int(at[n]), int(at[n] - at[n - lag]), old[n, lag])
            for n in range(tableau.rows)
            for lag in range(min(old.shape[1], n + 1))
            if np.any(old[n, lag] != 0)
        ]
        width = 1 + max((lag for _, lag, _ in entries), default=0)
        new[name] = np.zeros((rows, width, *old.shape[2:]))
        for row, lag, weight in entries:
            new[name][row, lag] = weight
    new["a"][~placed, 0] = 1.0

    def only_placed(values: Value) -> Array:
        wide = np.asarray(values)[source]
        wide[~placed] = 0
        return wide

    levels = np.append(source, tableau.rows)
    for name in ("times", "alpha", "sigma"):
        new[name] = np.asarray(getattr(tableau, name))[levels]
    for name in ("c", "evaluates", "d"):
        if getattr(tableau, name) is not None:
            new[name] = only_placed(getattr(tableau, name))
    for name in ("target", "asked"):
        if getattr(tableau, name) is not None:
            new[name] = np.asarray(getattr(tableau, name))[source]
    return dataclasses.replace(tableau, **new)
