"""`tfg`: how strongly training-free guidance should pull, for this network and this loss."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import guidance, solvers
from diffsamp._core import random
from diffsamp._core.checks import expect_int
from diffsamp._core.sharding import on_mesh
from diffsamp._core.types import Conditions, Key, Network, PyTree, Sharding, Value
from diffsamp.predictions import Level
from diffsamp.score import ScoreFn
from diffsamp.search._cost import Estimate, announce, expect_limit
from diffsamp.search.running import Progress, expect_batch, run, slice_batch
from diffsamp.tableau import Tableau

__all__ = ["Strength", "TrainingFree", "tfg"]


class Strength(NamedTuple):
    """Numbers of `guidance.tfg`, and the passes of every row."""

    rho: float
    mu: float
    repeats: int


@dataclasses.dataclass(frozen=True)
class TrainingFree:
    """What `tfg` found.

    Attributes:
      best: the strengths of least value.
      transform: the guided network with them, without a key for its draws if it has any.
      tableau: what it is to be sampled with.
      values: the objective of all that were measured, the best first; inf if not finite.
      held_out: that of the best on the starts that took no part.
      evaluations: of the network, per sample and call; a gradient counts as two.
      seconds: wall-clock time, compilation included.
      estimate: what was said of the cost before it began.
    """

    best: Strength
    transform: guidance.Loss
    tableau: Tableau
    values: dict[Strength, float]
    held_out: float
    evaluations: float
    seconds: float
    estimate: Estimate


def tfg(
    score_fn: ScoreFn | guidance.Transform,
    f: Callable[[PyTree, Level, Mapping[str, PyTree] | None], PyTree],
    tableau: Tableau,
    x_T: PyTree,
    *,
    objective: Callable[[PyTree, PyTree], Value],
    key: Key,
    reference: PyTree = None,
    cond: Conditions | None = None,
    rho: float = 0.25,
    mu: float = 0.25,
    repeats: Sequence[int] = (1, 2),
    rounds: int = 6,
    beam: int = 2,
    held_out: int | None = None,
    batch: int | None = None,
    evaluations: int | None = None,
    sharding: Sharding = None,
    progress: Progress | None = None,
    **options: PyTree,
) -> TrainingFree:
    """Search rho, mu and the passes N of training-free guidance, by doubling and halving.

    It begins with both strengths, and with each alone. In every round the `beam` best so far try
    twice and half of each number and the next N, all on the same starts and noise; it ends when
    none of these is among the best. The budget of a run grows with N: judge that in `objective`, or
    give one N.

    Args:
      score_fn: a network or transform.
      f: the loss, as for `guidance.tfg`.
      tableau: the sampler of one pass, of one state and one output a row.
      x_T: (n, ...) starts.
      objective: (samples, reference) -> number, smaller is better; a `search.Objective` or a
        function. It must also know what guidance may spoil, such as a distance to data.
      key: random key of the order, of the rows' noise and of the loss's draws.
      reference: what the objective is given beside the samples, a pytree with the leading axis n:
        the images to restore, the classes asked for.
      cond: keyword arguments for the network and f, every array with the leading axis n.
      rho: where it begins.
      mu: where it begins.
      repeats: rising numbers of passes.
      rounds: how many after the first, at most.
      beam: how many go on from each round.
      held_out: how many starts only report; None: a quarter, at least 1.
      batch: samples at a time; None: all.
      evaluations: begin no run that would spend more network evaluations than this in all.
      sharding: over the batch axis, as for `run`.
      progress: called with (what, done, total).
      **options: of `guidance.tfg`: `steps`, `shape`, `smooth`, `samples`, `names`.

    Raises:
      ValueError: starts that are too few, numbers that are not positive, a limit below one run, or
        samples that are not finite whatever the strength.

    Reference: Ye et al. 2024, arXiv:2409.15761, section 4.3.
    """
    began = time.perf_counter()
    expect_int(rounds, "rounds", at_least=0)
    expect_int(beam, "beam", at_least=1)
    for name, number in (("rho", rho), ("mu", mu)):
        if not (np.isfinite(number) and number > 0):
            raise ValueError(f"`{name}` must be positive, to be doubled; got {number}.")
    passes = [expect_int(n, "repeats", at_least=1) for n in repeats]
    if not passes or passes != sorted(set(passes)):
        raise ValueError(f"`repeats` must be rising integers; got {repeats}.")
    size = expect_batch((x_T, reference), cond)
    held = max(1, size // 4) if held_out is None else expect_int(held_out, "held_out", at_least=1)
    if held >= size:
        raise ValueError(f"`x_T` has {size} starts, of which {held} are held out.")
    order_key, noise_key, draw_key = jax.random.split(random.typed(key), 3)
    order = np.asarray(jax.random.permutation(order_key, size))
    x_T, reference, cond = jax.tree.map(lambda v: jnp.asarray(v)[order], (x_T, reference, cond))
    keys = random.sample_keys(noise_key, size)
    network: Network = on_mesh(score_fn, sharding)
    rows = {n: solvers.travel(tableau, n) for n in passes}
    drawn = draw_key if options.get("smooth", 0) > 0 else None

    def make(one: Strength) -> guidance.Loss:
        named: dict[str, PyTree] = {"key": drawn, **options}
        return guidance.tfg(network, f, rows[one.repeats], one.rho, one.mu, **named)

    def cost(one: Strength) -> float:
        made = make(one)
        return made.nfe(rows[one.repeats]) + 2 * made.gradients(rows[one.repeats])

    def measure(one: Strength, low: int, high: int) -> float:
        x_own, reference_own, cond_own = (slice_batch(v, low, high) for v in (x_T, reference, cond))
        made: Network = make(one)
        if drawn is not None:
            made = made.for_samples(np.arange(low, high))
        x = run(
            made,
            rows[one.repeats],
            x_own,
            key=keys[low:high],
            cond=cond_own,
            batch=batch,
            sharding=sharding,
        )
        found = float(objective(x, reference_own))
        return found if math.isfinite(found) else math.inf

    fit, limit = size - held, expect_limit(evaluations)
    first = [
        Strength(rho, mu, passes[0]),
        Strength(rho, 0.0, passes[0]),
        Strength(0.0, mu, passes[0]),
    ]
    dearest = cost(Strength(rho, mu, passes[-1]))
    most = fit * (sum(map(cost, first)) + rounds * beam * 5 * dearest) + held * dearest
    estimate, spent = announce(
        "tfg",
        network,
        x_T,
        {k: v for k, v in (cond or {}).items() if k not in options.get("names", ())} or None,
        evaluations=min(most, limit),
        batch=fit if batch is None else batch,
        sharding=sharding,
    )
    known: dict[Strength, float] = {}
    best: list[Strength] = []
    for turn in range(rounds + 1):
        for one in first if turn == 0 else _around(best, passes):
            price = cost(one) * fit
            if one in known or spent + price + cost(one) * held > limit:
                continue
            known[one] = measure(one, 0, fit)
            spent += price
        if progress is not None:
            progress("strengths", turn + 1, rounds + 1)
        ranked = sorted(known, key=functools.partial(_rank, known))[:beam]
        if ranked == best:
            break
        best = ranked
    if not best:
        raise ValueError("`evaluations` is too low for one run of the starts that fit.")
    if not math.isfinite(known[best[0]]):
        raise ValueError(
            f"all {len(known)} strengths gave samples that are not finite: begin with smaller ones."
        )
    chosen = best[0]
    spent += cost(chosen) * held
    order_of = sorted(known, key=functools.partial(_rank, known))
    return TrainingFree(
        chosen,
        make(chosen),
        rows[chosen.repeats],
        {one: known[one] for one in order_of},
        measure(chosen, fit, size),
        spent,
        time.perf_counter() - began,
        estimate,
    )


def _rank(known: Mapping[Strength, float], one: Strength) -> tuple[float, float, int]:
    return known[one], one.rho + one.mu, one.repeats  # of equal ones the gentlest


def _around(best: Sequence[Strength], passes: Sequence[int]) -> list[Strength]:
    """Twice and half of each number, and the next number of passes, without repeats."""
    found: dict[Strength, None] = {}
    for one in best:
        for factor in (2.0, 0.5):
            found[one._replace(rho=factor * one.rho)] = None
            found[one._replace(mu=factor * one.mu)] = None
        later = passes[passes.index(one.repeats) + 1 :]
        if later:
            found[one._replace(repeats=later[0])] = None
    return list(found)
