"""`best`: searches one after another, a plan per number of evaluations.

Every stage hands its best candidates to the next, and what is returned is the best of all of them
on noise that no stage was fitted to. With `state`, every finished stage is a file: a run that was
killed goes on where it stopped and returns what the uninterrupted one would have.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import jax

from diffsamp._core.checks import expect_int
from diffsamp._core.digest import digest, fingerprint, seed_of
from diffsamp._core.types import Conditions, Key, PyTree, Sharding, Value
from diffsamp.score import ScoreFn
from diffsamp.search._cost import expect_limit
from diffsamp.search._folder import Folder, Running
from diffsamp.search._stages import RUN, Search
from diffsamp.search._usual import run_usual
from diffsamp.search.objective import Objective, log_mse
from diffsamp.search.plan import Front
from diffsamp.search.running import Progress, expect_batch
from diffsamp.search.starts import Starts

__all__ = ["STAGES", "best"]

STAGES = tuple(RUN)
# for the default objective: evolve and distill add at most 0.1 dB to these for ten times the cost,
# where measured; other objectives need them, as these two know of none
_DEFAULT = ("regress", "refine")
_SHARING = ("regress", "refine", "evolve")  # what a limit on evaluations is divided among
_OTHERS = ("compare", "dynamic", "regress", "refine", "evolve", "distill")


def best(
    score_fn: ScoreFn,
    x_T: PyTree,
    *,
    nfe: Sequence[int] = (4, 5, 6, 8, 10),
    key: Key,
    cond: Conditions | None = None,
    reference: PyTree = None,
    objective: Objective | None = None,
    stages: Sequence[str] | None = None,
    solver: Sequence[str] | None = None,
    schedule: Sequence[str] | None = None,
    screen: int = 64,
    population: int = 32,
    rounds: int = 8,
    steps: int = 400,
    numbers: Sequence[str] | None = None,
    held_out: int | None = None,
    batch: int = 64,
    together: int = 1,
    seconds: float | None = None,
    evaluations: int | None = None,
    data_range: float = 2.0,
    sharding: Sharding = None,
    state: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **distill_options: Value,
) -> Front:
    """The best sampler that the searches find, for each budget.

    Args:
      score_fn: the network, batched.
      x_T: (n, ...) starts at t_max, an array. A quarter is held out: half of that decides between
        candidates, half only reports.
      nfe: budgets.
      key: random key of everything that is drawn.
      cond: keyword arguments for the network, every array with the leading axis n.
      reference: samples to come close to, the tableau that makes them, or None: where the fine
        trajectory of "regress" ends, or the samples of `reference_tableau` if it is no stage.
      objective: what is minimised. None: `log_mse`. One without a `loss` skips "distill".
      stages: which to run, of `STAGES`, in that order; None: "regress" and "refine", which come
        close to the reference, and with an `objective` of one's own all that there are. Without
        "compare" a few usual samplers are compared, to have something to hold the plans against.
      solver: registry names; None: all deterministic ones.
      schedule: schedule names; None: all that fit the process.
      screen: starts on which all solvers x schedules are first compared; the better half of each
        budget goes on to twice as many, until all starts to fit are used.
      population: candidates a round of `evolve`.
      rounds: of `evolve`.
      steps: gradient steps of `distill`.
      numbers: what `refine` frees; None: times, labels and weights, and for budgets of up to 6 also
        the rows' sums, which pay there.
      held_out: starts kept from fitting; None: a quarter.
      batch: samples of one candidate at a time, and of a gradient step.
      together: candidates at a time.
      seconds: stop before a stage that would begin after this time, and return what there is. The
        result then depends on the machine's speed. None: no limit.
      evaluations: a limit on network evaluations, which stages and budgets share; "distill" and the
        comparison that begins a search are left out of it where they do not fit. None: no limit.
      data_range: largest minus smallest value of the data, for the PSNR.
      sharding: over the batch axis, as for `run`.
      state: folder, made if needed, in which every finished stage is kept; for one process. It
        belongs to these arguments and weights: give another when the code of the network changes.
      progress: called with (what, done, total).
      **distill_options: further options of `distill`, such as learning_rate.

    Returns:
      A `Front`; `front.plans[6].tableau` is the sampler of 6 evaluations.

    Raises:
      ValueError: an unknown stage or name, a budget that no solver meets, too few starts, a network
        that is not finite, or a state of another search.
    """
    began = time.perf_counter()
    budgets = sorted({expect_int(n, "nfe", at_least=1) for n in nfe})
    if stages is None:
        stages = _DEFAULT if objective is None else _OTHERS
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown or not stages:
        raise ValueError(f"`stages` must be of {STAGES}; got {tuple(stages)}.")
    objective = log_mse() if objective is None else objective
    size = expect_batch(x_T, cond)
    held = max(2, size // 4) if held_out is None else expect_int(held_out, "held_out", at_least=2)
    if size - held < 2:
        raise ValueError(
            f"`x_T` has {size} starts, of which {held} are held out: too few are left."
        )
    if state is not None and jax.process_count() > 1:
        raise ValueError("`state` is for a search by one process; leave it out on several.")
    effort: dict[str, Value] = {
        "solver": solver and list(solver),
        "schedule": schedule and list(schedule),
        "screen": screen,
        "population": population,
        "rounds": rounds,
        "steps": steps,
        "numbers": numbers and list(numbers),
        "distill": distill_options,
    }
    settings = {
        "nfe": budgets,
        "key": seed_of(key),
        "stages": list(stages),
        "objective": objective.name,
        **effort,
        "held_out": held,
        "batch": batch,
        "limit": evaluations,
        "distill": {k: str(v) for k, v in distill_options.items()},
    }
    job = {}  # to which a folder belongs; arrays of several processes have no digest
    if state is not None:
        job = {"starts": digest(x_T, cond), "reference": digest(reference)}
        job["network"] = fingerprint(score_fn)
    starts = Starts.split(score_fn, x_T, cond, key, held, batch, sharding, shuffled=False)
    starts.objective = objective
    starts.widen(max(budgets))
    folder = Folder(state, {**settings, **job})

    limit = expect_limit(evaluations)
    search = Search(
        starts,
        budgets,
        key,
        Running(batch, together, sharding, data_range, progress),
        effort,
        settings,
        folder,
        limit=limit,
        tasks=len(budgets) * sum(stage in _SHARING for stage in stages),
        own=reference is None and "regress" in stages,
    )

    def make() -> PyTree:
        if search.own:
            search.record()
        else:
            starts.expect_reference(reference, progress)
        counted()  # before the array is kept: a folder that has it knows what it took
        return starts.reference

    def counted() -> float:
        return folder.stage("begun", lambda: {"evaluations": starts.spent})["evaluations"]

    starts.reference = folder.array("reference", make)
    starts.spent = counted()
    if "compare" not in stages:
        run_usual(search)  # what the plans are held against
    for stage, run in RUN.items():
        in_time = seconds is None or time.perf_counter() - began < seconds
        in_limit = starts.spent < search.limit and (stage != "distill" or evaluations is None)
        if stage in stages and ((in_time and in_limit) or stage == "compare"):
            run(search)
    plans = {n: search.plan(n, time.perf_counter() - began) for n in budgets}
    return Front(plans, search.discarded, objective.name, tuple(search.left_out))
