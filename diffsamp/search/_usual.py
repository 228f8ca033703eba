"""What the plans of `best` are held against where its stage "compare" is left out."""

from __future__ import annotations

import itertools
import math

from diffsamp import schedules, solvers
from diffsamp._core.types import PyTree
from diffsamp.search._stages import Search, begin
from diffsamp.search._tails import run_table
from diffsamp.search.explicit import Explicit, from_largest_level
from diffsamp.search.objective import finite_psnr
from diffsamp.search.running import expect_asked, slice_batch
from diffsamp.tableau import Tableau

__all__ = ["run_usual"]

_USUAL = ("ddim", "dpmpp_2m", "unipc2", "ipndm3")
_USUAL_GRIDS = ("logsnr", "uniform", "karras", "quadratic", "trailing")
_SEVERAL = 4  # of the best, for stages that begin from several


def run_usual(search: Search) -> None:
    """A few usual samplers, which the plans are held against where nothing else is compared."""
    process, objective = search.starts.score_fn.process, search.starts.objective.name
    fitting = schedules.names(process)
    grids = [name for name in _USUAL_GRIDS if name in fitting] or fitting

    more = {"dynamic", "evolve", "distill"} & set(search.settings["stages"])
    keep = _SEVERAL if more else 1
    low = max(0, 2 * search.starts.fit - search.starts.size)  # as many as are held out

    def measuring() -> dict[str, PyTree]:
        before = search.starts.spent
        kept: dict[str, PyTree] = {}
        lost, unfit = 0, []
        for n in search.budgets:
            made = []
            for solver, grid in itertools.product(_USUAL, grids):
                try:
                    times = schedules.get(grid)(process, n)
                    tableau = from_largest_level(solvers.get(solver)(process, times), process)
                    expect_asked(search.starts.score_fn, tableau)
                except ValueError as error:
                    unfit.append([solver, grid, n, str(error)])
                else:
                    made.append((solver, grid, tableau))
            few = [_measured(search, one[-1], low) for one in made]
            finite = [i for i, value in enumerate(few) if math.isfinite(value["psnr"])]
            finite.sort(key=lambda i: few[i][objective])
            chosen = [made[i] for i in finite[:keep]]
            values = [_measured(search, one[-1], 0) for one in chosen]
            rows = [
                [solver, grid, value, tableau.to_dict()]
                for (solver, grid, tableau), value in zip(chosen, values, strict=True)
                if math.isfinite(value["psnr"])
            ]
            if not rows:
                raise ValueError(
                    f"all {len(made)} samplers of {n} evaluations gave samples that are not "
                    "finite; look at the network first."
                )
            lost += len(made) - len(finite) + len(chosen) - len(rows)
            kept[str(n)] = sorted(rows, key=lambda row: row[2][objective])
        spent = search.starts.spent - before
        return {"entries": kept, "discarded": lost, "evaluations": spent, "left_out": unfit}

    before = search.starts.spent
    measured = search.folder.stage("compare", measuring)
    search.starts.spent = before
    begin(search, measured)


def _measured(search: Search, tableau: Tableau, low: int) -> dict[str, float]:
    """The objective and the PSNR on samples low .. fit - 1, by programs that `regress` has, too."""
    starts = search.starts
    x = run_table(starts, Explicit.of(tableau), low, starts.fit).end
    reference = slice_batch(starts.reference, low, starts.fit)
    psnr = finite_psnr(x, reference, search.running.data_range)
    return {starts.objective.name: starts.judge(x, low, starts.fit), "psnr": psnr}
