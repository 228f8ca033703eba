"""`skip_rows`: which evaluations of a sampler can be left out.

Caching methods choose by a threshold on how much the network's features change; here every row is
tried. The row whose absence costs least is left out, then the next, until the budget is met
(backward elimination), from forward evaluations alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from diffsamp._core.checks import expect_int
from diffsamp._core.types import Conditions, Key, PyTree, Sharding
from diffsamp.score import ScoreFn
from diffsamp.search._cost import expect_limit
from diffsamp.search.objective import Objective, cost_of_reference, log_mse
from diffsamp.search.plan import Plan
from diffsamp.search.running import Progress
from diffsamp.search.starts import Starts
from diffsamp.solvers import skip
from diffsamp.tableau import Tableau

__all__ = ["skip_rows"]


def skip_rows(
    score_fn: ScoreFn,
    tableau: Tableau,
    x_T: PyTree,
    *,
    nfe: int,
    key: Key,
    orders: Sequence[int] = (0, 1, 2),
    objective: Objective | None = None,
    cond: Conditions | None = None,
    reference: Tableau | PyTree = None,
    held_out: int | None = None,
    batch: int = 64,
    evaluations: int | None = None,
    together: int = 1,
    data_range: float = 2.0,
    sharding: Sharding = None,
    progress: Progress | None = None,
) -> Plan:
    """Leave out evaluations of a sampler until `nfe` are left, those that cost least.

    The extrapolation is that of `solvers.skip`; `refine` afterwards learns it, with the times.

    Args:
      score_fn: the network, batched; only ever called forward.
      tableau: a deterministic sampler of more than `nfe` evaluations.
      x_T: (n, ...) starts at the process's t_max, an array.
      nfe: evaluations that are left.
      key: random key for which of the starts fit, decide and report.
      orders: degrees of the extrapolation; each is tried, and the deciding starts choose.
      objective: what is minimised; None: `log_mse`.
      cond: keyword arguments for the network, every array with the leading axis n.
      reference: the samples to come close to, shaped like x_T, or the tableau that makes them;
        None: `reference_tableau`.
      held_out: how many of the n starts are kept from fitting, half of them to decide and half to
        report; at least 2. None: a quarter.
      batch: samples at a time.
      evaluations: a limit on network evaluations.
      together: samplers in one batch, for a device that `batch` samples do not fill.
      data_range: largest minus smallest value of the data, for the PSNR.
      sharding: over the batch axis, as for `run`.
      progress: called with (what, done, total).

    Returns:
      A `Plan`; `settings["skipped"]` are the rows, `settings["order"]` is the degree.

    Raises:
      ValueError: a stochastic sampler, a budget that is not below its evaluations, rows that ask
        for different predictions, or a limit that does not suffice.
    """
    nfe = expect_int(nfe, "nfe", at_least=1)
    if tableau.stochastic:
        raise ValueError(f"tableau {tableau.name!r} adds noise; skip rows of a deterministic one.")
    if nfe >= tableau.nfe:
        raise ValueError(
            f"`nfe` must be below the {tableau.nfe} evaluations of {tableau.name!r}; got {nfe}."
        )
    degrees = sorted({expect_int(order, "orders", at_least=0) for order in orders})
    if not degrees:
        raise ValueError("`orders` must hold at least one degree.")
    starts = Starts.split(score_fn, x_T, cond, key, held_out, batch, sharding)
    starts.objective = log_mse() if objective is None else objective
    each = starts.cost(tableau) / tableau.nfe
    trials = sum((left - 1) ** 2 for left in range(nfe + 1, tableau.nfe + 1))
    likely = trials * len(degrees) * each * starts.fit
    likely += cost_of_reference(score_fn, reference) * starts.size
    likely += len(degrees) * nfe * each * (starts.stop - starts.fit)  # to decide
    reporting = starts.fit + starts.size - starts.stop
    likely += (tableau.nfe + nfe) * each * reporting
    timing = 2 * min(batch, starts.size) * starts.cost(tableau)
    if likely + timing > expect_limit(evaluations):
        raise ValueError(
            f"`evaluations` is too low: leaving out {tableau.nfe - nfe} rows one by one takes "
            f"about {likely + timing:.0f}. Begin with fewer rows or orders."
        )
    starts.announce(f"skip rows, {nfe} NFE", likely, 2.0, tableau)
    starts.expect_reference(reference, progress)

    found: list[tuple[float, int, list[int]]] = []
    history: list[tuple[int, float, float]] = []
    for i, order in enumerate(degrees):
        skipped, value = _eliminate(starts, tableau, nfe, order, together)
        decided = starts.decide(skip(tableau, skipped, order=order))
        history.append((order, value, decided))
        found.append((decided, order, skipped))
        if progress is not None:
            progress("leaving out rows", i + 1, len(degrees))
    least, order, skipped = min(found)
    if not math.isfinite(least):
        raise ValueError(f"no choice of rows of {tableau.name!r} gives finite samples.")
    best = skip(tableau, skipped, order=order)
    return starts.plan(
        "skip_rows",
        best,
        tableau,
        settings={"objective": starts.objective.name, "skipped": skipped, "order": order},
        history=history,
        data_range=data_range,
    )


def _eliminate(
    starts: Starts, tableau: Tableau, nfe: int, order: int, together: int
) -> tuple[list[int], float]:
    """Rows to leave out, and the objective on the fitting starts without them."""
    skipped: list[int] = []
    value = math.inf
    while tableau.nfe - len(skipped) > nfe:
        left = [int(n) for n in np.flatnonzero(tableau.evaluates) if n not in skipped][1:]
        tableaux = [skip(tableau, [*skipped, row], order=order) for row in left]
        samples = starts.many(tableaux, 0, starts.fit, together=together)
        values = [starts.judge(sample, 0, starts.fit) for sample in samples]
        best = int(np.argmin(values))
        value = values[best]
        skipped.append(left[best])
    return sorted(skipped), value
