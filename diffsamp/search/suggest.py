"""`suggest`: which fixed sampler to take for a network, measured in a few hundred evaluations.

A comparison (`compare`, with successive halving) of the few pairs of solver and schedule among
which the best of the registry, or one as good, was found on every network of the benchmarks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from diffsamp._core.checks import expect_int
from diffsamp._core.types import Conditions, PyTree, Sharding
from diffsamp.score import ScoreFn, expect_score_fn
from diffsamp.search._cost import expect_limit
from diffsamp.search._halving import price, rounds_of
from diffsamp.search.compare import Comparison, Entry, compare
from diffsamp.search.fine import fine_tableau
from diffsamp.search.objective import reference_tableau
from diffsamp.search.plan import Plan
from diffsamp.search.regress import likely
from diffsamp.search.running import Progress, expect_batch, slice_batch
from diffsamp.tableau import Tableau

__all__ = ["SCHEDULES", "SOLVERS", "Suggestion", "suggest"]

SOLVERS = ("ipndm3", "unipc3", "accelerated_ddim")
"""Solvers that are tried. Of 11 deterministic solvers of one evaluation a step on 10 schedules,
what is found among these on `SCHEDULES` lost 0.2 dB to the best on average, and 1.2 dB at worst, at
5 to 20 evaluations of eight networks (benchmarks/choosing.py)."""
SCHEDULES = ("logsnr", "kl_optimal", "polynomial", "quadratic", "beta")
"""Schedules that are tried."""

_EQUAL = 0.5  # dB: what few starts cannot tell apart


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A sampler, and what was measured to choose it; `str` says it.

    Attributes:
      solver: the registry's name.
      schedule: the schedule's name.
      tableau: the sampler.
      psnr: dB to the ODE's solution from the same noise, mean over the starts.
      finalists: all that were measured on all starts, the best first.
      comparison: everything that was measured.
      search: evaluations that `search.regress` would take, which finds a better one.
    """

    solver: str
    schedule: str
    tableau: Tableau
    psnr: float
    finalists: tuple[Entry, ...]
    comparison: Comparison
    search: int

    @property
    def nfe(self) -> int:
        """Evaluations of the sampler."""
        return self.tableau.nfe

    @property
    def evaluations(self) -> float:
        """Network evaluations that were spent, per sample and call, the reference included."""
        return self.comparison.evaluations

    @property
    def equals(self) -> tuple[Entry, ...]:
        """Other finalists within half a decibel: so few starts cannot tell them apart."""
        return tuple(e for e in self.finalists[1:] if e.psnr > self.psnr - _EQUAL)

    def plan(self, score_fn: ScoreFn) -> Plan:
        """The suggestion as a file that can be run elsewhere.

        Args:
          score_fn: the network that it was made for.
        """
        return self.comparison.plan(score_fn, self.nfe)

    def __str__(self) -> str:
        count = len(self.comparison.reference)
        lines = [
            f"{self.solver} on {self.schedule}, {self.nfe} evaluations: {self.psnr:.1f} dB to the "
            f"ODE's solution from the same noise ({count} start{'s' if count > 1 else ''})."
        ]
        others = self.finalists[1:5]
        if others:
            found = [f"{e.solver} on {e.schedule} {e.psnr - self.psnr:+.1f} dB" for e in others]
            lines.append(f"Next best: {', '.join(found)}.")
        if self.equals:
            lines.append("Those within half a decibel are as good as far as this can tell.")
        lines.append(
            f"{len(self.comparison.entries)} samplers were compared with {self.evaluations:.0f} "
            "network evaluations."
        )
        lines.append(
            f"A search finds a better one: search.regress, in some {self.search:,} evaluations."
        )
        lines.append(
            f'  ds.sampler(score_fn, "{self.solver}", nfe={self.nfe}, schedule="{self.schedule}")'
        )
        return "\n".join(lines)


def suggest(
    score_fn: ScoreFn,
    x_T: PyTree,
    nfe: int,
    *,
    cond: Conditions | None = None,
    starts: int = 4,
    solver: Sequence[str] = SOLVERS,
    schedule: Sequence[str] = SCHEDULES,
    reference: PyTree = None,
    evaluations: int | None = None,
    batch: int | None = None,
    data_range: float = 2.0,
    sharding: Sharding = None,
    progress: Progress | None = None,
) -> Suggestion:
    """The fixed sampler of `nfe` evaluations that suits a network best, and the measured reason.

    15 samplers are measured on one start, the better half on two, and so on, by the distance to a
    finer solution of the ODE from the same noise: about 570 evaluations at the default four starts
    and nfe = 8, twice that under guidance. What it costs is logged as INFO to "diffsamp.search"
    before it begins.

    Only samplers without noise are compared, since only those have the ODE's solution as their
    limit. A search (`search.regress`, `search.best`) takes some ten thousand evaluations more and
    finds better ones.

    Examples:
      >>> import jax, diffsamp as ds
      >>> process = ds.processes.vp_linear()
      >>> network = ds.targets.gaussian([0.0, 1.0], 0.1).score_fn(process)
      >>> found = ds.suggest(network, process.prior_sample(jax.random.key(0), (4, 2)), 6)
      >>> found.nfe, len(found.comparison.entries)
      (6, 15)

    Args:
      score_fn: the network, batched; guided if it will be sampled so.
      x_T: (n, ...) starts at t_max, an array.
      nfe: evaluations of the sampler.
      cond: keyword arguments for the network, every array with the leading axis n.
      starts: the first of x_T that are used, at most.
      solver: registry names.
      schedule: schedule names.
      reference: as for `compare`, for the starts that are used; None: `reference_tableau` of four
        times as many evaluations as the sampler's, at least 40.
      evaluations: spend at most so many network evaluations, the reference included, on fewer
        starts; None: no limit.
      batch: samples at a time; None: all.
      data_range: largest minus smallest value of the data, for the PSNR.
      sharding: over the batch axis; all samplers are then measured on all starts.
      progress: called with (what, done, total).

    Returns:
      A `Suggestion`.

    Raises:
      TypeError: no ScoreFn, such as a masked model, which has samplers of its own.
      ValueError: an unknown name, a budget that none of them meets, a limit that is too low for one
        start, or a network that is not finite.
    """
    expect_score_fn(score_fn, cond)
    nfe = expect_int(nfe, "nfe", at_least=1)
    limit = expect_limit(evaluations)
    size = min(expect_batch(x_T, cond), expect_int(starts, "starts", at_least=1))
    if reference is None:
        reference = reference_tableau(score_fn.process, max(40, 4 * nfe))
    of_reference = score_fn.nfe(reference) if isinstance(reference, Tableau) else 0
    many = len(tuple(solver)) * len(tuple(schedule))
    each = nfe * score_fn.nfe_factor
    # a round of fewer samples than a mesh has devices saves nothing
    first = 1 if sharding is None else size

    def whole(count: int) -> float:
        """What `count` starts take, with the timed runs."""
        prices = {nfe: [each] * many}
        begun = min(first, count)
        return count * of_reference + 2 * each * begun + price(prices, rounds_of(count, begun))

    while size > 1 and whole(size) > limit:
        size -= 1
    if whole(size) > limit:
        raise ValueError(
            f"`evaluations` is too low: {many} samplers of {nfe} evaluations and their reference "
            f"take {whole(1):.0f} on one start; got {evaluations}. Name fewer solvers or schedules."
        )
    comparison = compare(
        score_fn,
        slice_batch(x_T, 0, size),
        nfe=(nfe,),
        solver=solver,
        schedule=schedule,
        cond=slice_batch(cond, 0, size),
        reference=reference,
        data_range=data_range,
        batch=batch,
        halving=min(first, size),
        sharding=sharding,
        progress=progress,
    )
    best = comparison.best(nfe)
    finalists = sorted(
        (e for e in comparison.entries if e.starts == 0 and math.isfinite(e.psnr)),
        key=lambda e: -e.psnr,
    )
    return Suggestion(
        best.solver,
        best.schedule,
        best.tableau,
        best.psnr,
        tuple(finalists),
        comparison,
        score_fn.nfe_factor * likely(32, 10, [nfe], fine_tableau(score_fn, None, nfe).rows),
    )
