"""`distill`: learn a tableau's times and coefficients by gradient descent, in canonical form.

The start is reproduced exactly at step 0, weights are in units of the step, and a constant data
prediction stays exact whatever is learned (see `canonical`).

References: Shaul et al. 2024 (BNS, arXiv:2403.01329): all coefficients and times free, mean
log-error to a fine solution at equal noise, warm start from a known solver. Tong et al. 2025 (LD3,
arXiv:2405.15506): times only, and the relaxed start. Frankel et al. 2025 (S4S, arXiv:2502.17423):
both, with features.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core.checks import expect_choice, expect_int
from diffsamp._core.digest import seed_of
from diffsamp._core.sharding import expect_sharding, on_mesh
from diffsamp._core.types import Conditions, Key, PyTree, Sharding, Value
from diffsamp.score import ScoreFn
from diffsamp.search._cost import announce, expect_limit
from diffsamp.search._descent import Problem
from diffsamp.search._gradient import (
    default_optimizer,
    optax_or_error,
)
from diffsamp.search._network import describe_network
from diffsamp.search.compare import candidates, compare
from diffsamp.search.explicit import from_largest_level, own_start
from diffsamp.search.objective import (
    Objective,
    cost_of_reference,
    finite_psnr,
    log_mse,
    make_reference,
)
from diffsamp.search.plan import Plan
from diffsamp.search.running import Progress, expect_batch, slice_batch
from diffsamp.tableau import Tableau

__all__ = ["distill"]

_LEARNED = {
    "all": {"log_snr", "labels", "weights", "noise"},
    "times": {"log_snr"},
    "labels": {"labels"},
    "weights": {"weights"},
    "noise": {"noise"},
}


def distill(
    score_fn: ScoreFn,
    x_T: PyTree,
    *,
    nfe: int | None = None,
    start: Tableau | Sequence[Tableau] | None = None,
    key: Key,
    cond: Conditions | None = None,
    reference: Tableau | PyTree = None,
    held_out: int | None = None,
    steps: int = 400,
    batch: int = 64,
    learning_rate: float = 1e-2,
    optimizer: Value = None,
    objective: Objective | None = None,
    learn: str | Sequence[str] = "all",
    memory: int | None = None,
    radius: float = 0.0,
    consistent: bool = True,
    evaluate_every: int = 20,
    patience: int | None = None,
    checkpoint: bool = True,
    micro_batch: int | None = None,
    evaluations: int | None = None,
    data_range: float = 2.0,
    sharding: Sharding = None,
    progress: Progress | None = None,
) -> Plan:
    """Learn a sampler of `nfe` evaluations for this network.

    Gradient descent on the mean log squared error to a fine solution from the same noise (or
    another objective), through the sampler. The samples are split in three: to fit, to stop (the
    numbers kept are the best there), and held out to report.

    Args:
      score_fn: the network.
      x_T: (n, ...) starts at the process's t_max, an array.
      nfe: the budget. May be left out if `start` is given.
      start: the tableau to start from: one evaluation a row, falling levels. A first row that only
        scales the start, as `regress` makes it, stays as it is. One that adds noise (`ddim(eta=)`,
        SDE forms of DPM-Solver++) also learns how much (AdaSDE); give a distance between
        distributions, such as `objective.energy()`, as `objective`. Of several,
        each is tried for an eighth of the steps and the one that got furthest is taken.
        None: the best of each of four families of solvers in `compare`, on the fit noise.
      key: random key for the order of the minibatches.
      cond: keyword arguments for the network, every array with the leading axis n.
      reference: the samples to come close to, shaped like x_T, or the tableau that makes them;
        None: `reference_tableau`.
      held_out: how many of the n starts are kept from fitting, half of them to stop and half to
        report; at least 2. None: a quarter.
      steps: gradient steps.
      batch: samples a step, also the largest number run at once.
      learning_rate: peak of Adam's rate, which decays to 0 along a cosine.
      optimizer: an optax GradientTransformation; None: Adam as said, gradients clipped to norm 1.
      objective: what to descend, and to choose by; it must have a `loss`. None: `log_mse`.
      learn: "all", or only some of "times", "weights", "noise" and "labels" (the conditioning
        times: what the network is told apart from the state's level, LD3 and S4S; part of "all").
      memory: learn the weights of the last `memory` evaluations in each row only (S4S's bands, a
        linear multistep method); those further back keep the start's. None: of all (BNS).
      radius: each start may move within a ball of this radius, in units of its own norm, to where
        the sampler reaches the reference better (LD3, S4S): what few evaluations cannot do from the
        very same noise then does not pull on the numbers. Fit noise only.
      consistent: keep a constant data prediction exact; False frees more numbers.
      evaluate_every: steps between looks at the stopping noise.
      patience: stop after this many looks without a gain; None: never.
      checkpoint: recompute the network in the backward pass, to bound memory.
      micro_batch: samples of a step whose gradient is taken at once, a divisor of `batch`; None:
        all. With `checkpoint`, memory is that of nfe + 1 states and one network for so many.
      evaluations: spend at most so many network evaluations on the steps, of which there are then
        fewer; a gradient counts as two more.
      data_range: largest minus smallest value of the data, for the PSNR.
      sharding: over the batch axis, as for `run`.
      progress: called with (what, done, total).

    Returns:
      A `Plan`. Its tableau is never worse on the stopping noise than the start, which is the
      first candidate; a run that diverges ends there and keeps what was best before.

    Raises:
      ValueError: no budget, a start of another budget, too few starts, or a reference that is not
        finite.
      ModuleNotFoundError: optax is missing.
    """
    began = time.perf_counter()
    optax_or_error()  # if it is missing, say so before the work
    size = expect_batch(x_T, cond)
    objective = log_mse() if objective is None else objective
    if objective.loss is None:
        raise ValueError(
            f"objective {objective.name!r} is no mean over samples and cannot be descended; use "
            "one with a `loss`, or search with `evolve`."
        )
    parts = (learn,) if isinstance(learn, str) else tuple(learn)
    for part in parts:
        expect_choice(part, "learn", tuple(_LEARNED))
    free = set().union(*(_LEARNED[part] for part in parts))
    if not free:
        raise ValueError(f"`learn` must name at least one of {tuple(_LEARNED)}.")
    if memory is not None:
        memory = expect_int(memory, "memory", at_least=1)
    if not 0 <= radius < np.inf:
        raise ValueError(f"`radius` must be at least 0 and finite; got {radius}.")
    if not consistent and free != _LEARNED["all"]:
        raise ValueError('`consistent=False` frees every number; leave `learn` at "all".')
    steps = expect_int(steps, "steps", at_least=1)
    evaluate_every = expect_int(evaluate_every, "evaluate_every", at_least=1)
    held = max(2, size // 4) if held_out is None else expect_int(held_out, "held_out", at_least=2)
    fit = size - held
    if fit < 1:
        raise ValueError(f"`x_T` has {size} starts, of which {held} are held out: none is left.")
    batch = min(expect_int(batch, "batch", at_least=1), fit)
    expect_sharding(sharding, batch if batch < fit else None)
    score_fn = on_mesh(score_fn, sharding)
    micro_batch = batch if micro_batch is None else expect_int(micro_batch, "micro_batch", 1, batch)
    pieces = batch // micro_batch
    if pieces * micro_batch != batch:
        raise ValueError(f"`micro_batch` must divide the batch of {batch}; got {micro_batch}.")
    spent = cost_of_reference(score_fn, reference) * size
    reference = make_reference(
        score_fn, reference, x_T, cond=cond, batch=batch, sharding=sharding, progress=progress
    )
    if start is None:
        if nfe is None:
            raise ValueError("give `nfe`, the budget, or a tableau to `start` from.")
        found = compare(
            score_fn,
            x_T[:batch],
            nfe=[nfe],
            cond=slice_batch(cond, 0, batch),
            reference=slice_batch(reference, 0, batch),
            data_range=data_range,
            sharding=sharding,
            progress=progress,
        )
        starts = candidates(found, nfe)
        spent += found.evaluations
    else:
        starts = [start] if isinstance(start, Tableau) else list(start)
    for one in starts:
        if nfe is not None and one.nfe != nfe:
            raise ValueError(f"`start` makes {one.nfe} evaluations, not the {nfe} asked for.")
    if not starts:
        raise ValueError("`start` must hold at least one tableau.")
    each = 3 * batch * score_fn.nfe(starts[0])  # a step: forward, and twice for the gradient
    limit = expect_limit(evaluations)
    if np.isfinite(limit):
        trials = 1 + 0.125 * (len(starts) > 1) * len(starts)
        steps = min(steps, int((limit - spent) / trials // each))
        if steps < 1:
            raise ValueError(
                f"`evaluations` is too low: {spent:.0f} go before the first step, and a step takes "
                f"{each:.0f}."
            )
    estimate, timed = announce(
        f"distill, {starts[0].nfe} NFE",
        score_fn,
        x_T,
        cond,
        evaluations=spent + each * steps,
        batch=batch,
        states=2.0,
        sharding=sharding,
    )
    spent += timed
    if optimizer is None:
        optimizer = default_optimizer(steps, float(learning_rate))
    problem = Problem(
        score_fn,
        x_T,
        cond,
        reference,
        fit,
        fit + held // 2,
        batch,
        key,
        optimizer,
        objective,
        free if consistent else None,
        memory,
        float(radius),
        checkpoint,
        pieces,
        evaluate_every,
        sharding,
    )
    if len(starts) > 1:
        # a short run from each: what is best to start from is not what is best as it stands
        trial = max(evaluate_every, steps // 8)
        reached = []
        for i, one in enumerate(starts):
            tried = problem.descend(one, trial)
            spent += problem.cost(tried, one)
            reached.append(tried.value)
            if progress is not None:
                progress("trying starts", i + 1, len(starts))
        starts = [starts[int(np.argmin(reached))]]
    best = problem.descend(starts[0], steps, patience, progress)
    spent += problem.cost(best, starts[0])

    chosen = starts[0]
    tableau = Tableau.create(
        **problem.arrays(best),
        name=f"distilled from {chosen.name}, {chosen.nfe} NFE",
        source=f"diffsamp.search.distill (after arXiv:2403.01329); start: {chosen.source}",
        check="full" if consistent and _is_consistent(own_start(chosen)[0]) else "none",
    )
    if best.scale != 1:
        tableau = from_largest_level(tableau, score_fn.process)
    zero = dataclasses.replace(best, moved=jax.tree.map(jnp.zeros_like, best.moved))
    spans = {"fit": (0, min(fit, held)), "held_out": (problem.stop, size)}
    psnr = functools.partial(finite_psnr, data_range=data_range)
    judges: dict[str, Value] = {objective.name: objective, "psnr": psnr}
    scores: dict[str, dict[str, dict[str, float]]] = {name: {} for name in judges}
    for span, (first, last) in spans.items():
        for sampler, candidate in (("start", zero), ("found", best)):
            x = problem.samples(candidate, first, last)
            spent += (last - first) * score_fn.nfe(chosen)
            for name, judge in judges.items():
                own = slice_batch(reference, first, last)
                if name == objective.name:
                    value = objective(x, own, slice_batch(cond, first, last))
                else:
                    value = judge(x, own)
                scores[name].setdefault(span, {})[sampler] = value
    settings = {
        "nfe": chosen.nfe,
        "starts": size,
        "held_out": held,
        "steps": steps,
        "batch": batch,
        "learning_rate": learning_rate,
        "objective": objective.name,
        "learn": list(parts) if len(parts) > 1 else parts[0],
        "memory": memory,
        "radius": radius,
        "consistent": consistent,
        "cost": score_fn.nfe(chosen),
        "evaluations": spent,
        "estimate": estimate.settings,
    }
    return Plan(
        tableau,
        "distill",
        chosen.name,
        scores,
        best.history,
        time.perf_counter() - began,
        settings,
        seed_of(key),
        network=describe_network(score_fn, tableau, x_T=x_T, data_range=data_range),
    )


def _is_consistent(tableau: Tableau) -> bool:
    try:
        tableau.check()
    except ValueError:
        return False
    return True
