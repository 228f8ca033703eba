"""Samplers that begin alike, run on the host from where they differ.

A number of row n of a table (`explicit`) moves nothing before the state that row n reaches, so what
was reached and told until there is taken over from a run of the table as it was. Of the N
evaluations of each of the N (N - 1) / 2 weights that leaves about a third; the last row's weights
cost none. All that is compiled is one evaluation, the same one for every table and budget.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from diffsamp._core.types import Bound
from diffsamp.sampling import row_levels
from diffsamp.score import ScoreFn
from diffsamp.search._cost import at_row
from diffsamp.search.explicit import Explicit
from diffsamp.search.running import slice_batch
from diffsamp.search.starts import Starts

__all__ = ["Path", "count_tail", "run_table", "run_variants"]


@dataclasses.dataclass(frozen=True)
class Path:
    """A table, and what it reached and was told from starts low .. low + k - 1.

    Attributes:
      table: of N evaluations.
      low: the first start.
      states: u_0 .. u_N, (k, ...) each.
      answers: D_0 .. D_{N-1}, (k, ...) each.
    """

    table: Explicit
    low: int
    states: tuple[np.ndarray, ...]
    answers: tuple[np.ndarray, ...]

    @property
    def end(self) -> np.ndarray:
        """u_N."""
        return self.states[-1]

    def part(self, low: int, high: int) -> Path:
        """The same for some of its starts, numbered as the search numbers them."""
        states, answers = (
            tuple(slice_batch(v, low - self.low, high - self.low) for v in values)
            for values in (self.states, self.answers)
        )
        return Path(self.table, low, states, answers)


def run_table(
    starts: Starts, table: Explicit, low: int, high: int, *, network: ScoreFn | None = None
) -> Path:
    """The path of a table from starts low .. high - 1, of which the evaluations are counted.

    Args:
      starts: of the search.
      table: the sampler.
      low: the first start.
      high: one past the last.
      network: another than that of the search.
    """
    nothing = Path(table, low, (np.empty((high - low, 0)),), ())
    (path,) = _run(starts, [table], nothing, 0, network)
    return path


def run_variants(
    starts: Starts, near: Path, tables: Sequence[Explicit], *, together: int = 1
) -> Iterator[np.ndarray]:
    """Where tables that begin as that of a path does end, from its starts, in order.

    Args:
      starts: of the search.
      near: the path.
      tables: the samplers, of as many evaluations.
      together: how many of them in one batch.
    """
    known = [table.nfe - count_tail(table, near.table) for table in tables]
    order = sorted(range(len(tables)), key=lambda i: known[i])
    ends: dict[int, np.ndarray] = {}
    for first in range(0, len(order), together):
        group = order[first : first + together]
        filled = group + [group[-1]] * (together - len(group))  # one shape for all groups
        paths = _run(starts, [tables[i] for i in filled], near, min(known[i] for i in group))
        for i, path in zip(filled, paths, strict=True):
            ends[i] = path.end
    for i in range(len(tables)):
        yield ends.pop(i)


def count_tail(one: Explicit, other: Explicit) -> int:
    """How many evaluations are left after those with which both tables begin.

    Args:
      one: a sampler.
      other: another, of as many evaluations.
    """
    same = np.ones(one.nfe, bool)
    for a, b in zip(_levels(one), _levels(other), strict=True):
        same &= a == b
    same[1:] &= np.all(one.weights[:-1] == other.weights[:-1], axis=1)
    return 0 if np.all(same) else one.nfe - int(np.argmin(same))


def _levels(table: Explicit) -> list[np.ndarray]:
    asked = table.times if table.asked is None else np.append(table.asked, 0.0)
    return [v[: table.nfe] for v in (table.times, table.alpha, table.sigma, asked)]


def _run(
    starts: Starts,
    tables: Sequence[Explicit],
    near: Path,
    known: int,
    network: ScoreFn | None = None,
) -> list[Path]:
    """Tables side by side, from evaluation `known` on; what lies before is near's."""
    network = starts.score_fn if network is None else network
    process, count = network.process, len(near.states[0])
    low, high = near.low, near.low + count
    bounds, tails = zip(*(_bound(network, table, known) for table in tables), strict=True)
    starts.spent += sum(tails) * count
    x_T = np.asarray(starts.x_T[low:high])
    states, answers = [], []
    for table in tables:
        scale = table.sigma[0] / float(process.sigma(process.t_max))
        # u_known too is near's, unless the row that leads to it or the start is another
        own = list(near.states[:known]) if known else [np.asarray(scale * x_T, x_T.dtype)]
        states.append(own)
        answers.append(list(near.answers[:known]))
        if known:
            own.append(_advance(table, known - 1, own[-1], answers[-1]))
    for n in range(known, tables[0].nfe):
        told = starts.ask(
            np.concatenate([own[-1] for own in states]),
            _side_by_side([at_row(bound, n) for bound in bounds], count),
            low,
            high,
            network=network,
        )
        for table, own, heard, new in zip(
            tables, states, answers, np.split(told, len(tables)), strict=True
        ):
            heard.append(new)
            own.append(_advance(table, n, own[-1], heard))
    return [
        Path(table, low, tuple(own), tuple(heard))
        for table, own, heard in zip(tables, states, answers, strict=True)
    ]


def _advance(table: Explicit, n: int, x: np.ndarray, answers: Sequence[np.ndarray]) -> np.ndarray:
    """Row n, in float64."""
    new = (table.sigma[n + 1] / table.sigma[n]) * x.astype(np.float64)
    for j in map(int, np.flatnonzero(table.weights[n, : n + 1])):
        new += table.weights[n, j] * answers[j]
    with np.errstate(over="ignore"):
        return new.astype(x.dtype)


def _bound(network: ScoreFn, table: Explicit, known: int) -> tuple[Bound, float]:
    """What binds the evaluations of a table, and what those from `known` on cost a start."""
    tableau = table.tableau(network.process, name="", source="", check="none")
    level, live = row_levels(tableau), np.flatnonzero(tableau.evaluates)
    bound = network.bind(level, (tableau.target[:, 0], tableau.target[:, 1]))
    network.check_bound(bound, level, tableau.evaluates)
    rest = np.zeros(tableau.rows, bool)
    rest[live[known:]] = True
    own = jax.tree.map(lambda v: np.asarray(v)[live], bound)
    return own, network.nfe(dataclasses.replace(tableau, evaluates=rest))


def _side_by_side(bounds: Sequence[Bound], count: int) -> Bound:
    """The bound numbers of each of the samples of several tables."""
    if len(bounds) == 1:
        return bounds[0]
    return jax.tree.map(lambda *v: np.repeat(np.stack(v, axis=-1), count, axis=-1), *bounds)
