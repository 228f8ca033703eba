"""`evolve`: mix solvers step by step, by mutation and crossover under a learned ranking.

A genome is a list of times and one choice per step (`diffsamp.solvers.MixedStep`). A small network,
trained with a pairwise ranking loss on all genomes measured so far, filters the children of the
best ones; those it ranks first are measured on the model.

Reference: Liu et al. 2023, USF and S3 (arXiv:2312.07243).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import schedules
from diffsamp._core.checks import expect_int
from diffsamp._core.digest import digest, fingerprint
from diffsamp._core.files import write_atomically
from diffsamp._core.sharding import on_mesh
from diffsamp._core.types import Conditions, Key, PyTree, Sharding, Value
from diffsamp.processes import Process
from diffsamp.score import ScoreFn
from diffsamp.search._cost import Estimate, announce, expect_limit
from diffsamp.search.compare import Comparison
from diffsamp.search.explicit import own_start
from diffsamp.search.genome import (
    KINDS,
    Genome,
    crossover,
    features,
    from_times,
    mutate,
    random_genome,
)
from diffsamp.search.objective import Objective, cost_of_reference, log_mse, make_reference
from diffsamp.search.running import Progress, expect_batch, run_many

__all__ = ["Evolution", "evolve"]

_PAIRS, _FIT_STEPS = 256, 150


@dataclasses.dataclass(frozen=True)
class Evolution:
    """Every genome measured, the best first.

    Attributes:
      genomes: without repeats.
      values: the objective of each on the given noise; inf if it diverged.
      discarded: how many diverged.
      seconds: wall-clock time, compilation included (of this run, if it was resumed).
      evaluations: of the network, per sample and call, the reference included.
      estimate: what was said of the cost before it began.
    """

    genomes: tuple[Genome, ...]
    values: tuple[float, ...]
    discarded: int
    seconds: float
    evaluations: float = 0
    estimate: Estimate | None = None

    @property
    def best(self) -> Genome:
        """The best genome.

        Raises:
          ValueError: all diverged.
        """
        if not math.isfinite(self.values[0]):
            raise ValueError(
                f"all {len(self.values)} candidates gave samples that are not finite; look at the "
                "network first."
            )
        return self.genomes[0]


def evolve(
    score_fn: ScoreFn,
    x_T: PyTree,
    *,
    nfe: int,
    key: Key,
    start: Comparison | None = None,
    cond: Conditions | None = None,
    reference: PyTree = None,
    objective: Objective | None = None,
    population: int = 32,
    rounds: int = 8,
    schedule: Sequence[str] = ("logsnr", "karras", "polynomial", "quadratic", "kl_optimal"),
    predictor: bool = True,
    batch: int | None = None,
    together: int = 1,
    evaluations: int | None = None,
    sharding: Sharding = None,
    state: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Evolution:
    """Search the space of mixed solvers for this network.

    Args:
      score_fn: the network, batched.
      x_T: (n, ...) starts at t_max.
      nfe: the budget, which every candidate meets exactly.
      key: random key of mutations and of the predictor's start.
      start: a comparison whose best solvers of this budget, as far as they are one kind of step
        throughout, begin in the population.
      cond: keyword arguments for the network, every array with the leading axis n.
      reference: as for `compare`.
      objective: what is minimised; any `Objective`. None: `log_mse`.
      population: candidates measured in each round.
      rounds: how many after the first.
      schedule: names of grids of the first population.
      predictor: rank children with the network; False: measure them as they come.
      batch: samples of one candidate at a time; None: all.
      together: candidates at a time, in one batch of `batch` x `together` samples.
      evaluations: begin no round that would spend more network evaluations than this in all.
      sharding: over the batch axis, as for `run`.
      state: file in which every finished round is kept; a run with the same settings goes on from
        it.
      progress: called with (what, done, total).

    Returns:
      An `Evolution`; `best.tableau(process)` is the sampler.

    Raises:
      ValueError: a budget below 1, an unknown grid, a reference that is not finite, or a state
        file of another search.
      ModuleNotFoundError: flax or optax is missing.
    """
    began = time.perf_counter()
    expect_int(nfe, "nfe", at_least=1)
    expect_int(population, "population", at_least=2)
    expect_int(rounds, "rounds", at_least=0)
    grids = tuple(schedule)
    if not grids:
        raise ValueError("`schedule` must name at least one grid.")
    for name in grids:
        schedules.get(name)
    if predictor and rounds:
        _packages()
    expect_batch(x_T, cond)
    score_fn = on_mesh(score_fn, sharding)
    process = score_fn.process
    objective = log_mse() if objective is None else objective
    size, limit = expect_batch(x_T, cond), expect_limit(evaluations)
    spent = cost_of_reference(score_fn, reference) * size
    each = population * nfe * size * score_fn.nfe_factor
    estimate, timed = announce(
        f"evolve, {nfe} NFE",
        score_fn,
        x_T,
        cond,
        evaluations=min(spent + each * (rounds + 1), limit),
        batch=size if batch is None else batch,
        sharding=sharding,
    )
    spent += timed
    reference = make_reference(
        score_fn, reference, x_T, cond=cond, batch=batch, sharding=sharding, progress=progress
    )
    seeds = np.asarray(jax.random.key_data(key)).ravel().tolist()
    settings = {
        "nfe": nfe,
        "key": seeds,
        "population": population,
        "rounds": rounds,
        "grids": list(grids),
        "predictor": predictor,
        "objective": objective.name,
        "starts": state and digest(x_T, cond),
        "network": state and fingerprint(score_fn),
        "from": [] if start is None else [e.solver for e in _encodable(start, nfe)],
    }
    known = _read(state, settings)
    spent += len(known) * each / population

    def measure(genomes: Sequence[Genome]) -> None:
        tableaux = {genome: _tableau(genome, process) for genome in genomes}
        made = {genome: t for genome, t in tableaux.items() if t is not None}
        samples = run_many(
            score_fn,
            list(made.values()),
            x_T,
            cond=cond,
            batch=batch,
            population=together,
            sharding=sharding,
        )
        values = {g: objective(x, reference, cond) for g, x in zip(made, samples, strict=True)}
        known.update({genome: values.get(genome, math.inf) for genome in genomes})

    while (done := len(known) // population) <= rounds:
        if known and spent + each > limit:
            break
        spent += each
        rng = np.random.default_rng([*seeds, done])
        if done == 0:
            chosen = _first(rng, nfe, process, grids, start, population)
        else:
            chosen = _children(rng, known, population, predictor)
        measure(chosen)
        _write(state, settings, known)
        if progress is not None:
            progress("evolving", done + 1, rounds + 1)
    order = sorted(known, key=lambda g: known[g])
    return Evolution(
        tuple(order),
        tuple(known[g] for g in order),
        sum(not math.isfinite(v) for v in known.values()),
        time.perf_counter() - began,
        spent,
        estimate,
    )


def _tableau(genome: Genome, process: Process) -> PyTree:
    """None for a genome whose weights are so large that the tableau is consistent no more."""
    try:
        return genome.tableau(process)
    except ValueError:
        return None


def _encodable(start: Comparison, nfe: int) -> list[PyTree]:
    entries = [e for e in start.entries if e.nfe == nfe and e.solver in KINDS]
    return sorted(entries, key=lambda e: -e.psnr)


def _first(
    rng: np.random.Generator,
    nfe: int,
    process: Process,
    grids: Sequence[str],
    start: PyTree,
    size: int,
) -> list[Genome]:
    """Half of the first population from the comparison, the rest at random."""
    chosen: dict[Genome, None] = {}
    for entry in [] if start is None else _encodable(start, nfe)[: size // 2]:
        chosen[
            from_times(process, own_start(entry.tableau)[0].times, [KINDS[entry.solver]] * nfe)
        ] = None
    while len(chosen) < size:
        chosen[random_genome(rng, nfe, process, grids)] = None
    return list(chosen)


def _children(
    rng: np.random.Generator, known: Mapping[Genome, float], size: int, predictor: bool
) -> list[Genome]:
    """New genomes from the best ones: those that the predictor ranks first, and a few at random."""
    order = sorted(known, key=lambda g: known[g])
    parents = order[: max(4, size // 2)]
    wanted = size * (8 if predictor else 1)
    made: dict[Genome, None] = {}
    while len(made) < wanted:
        # better parents more often
        one, two = (parents[int(len(parents) * rng.random() ** 2)] for _ in range(2))
        child = crossover(rng, one, two) if rng.random() < 0.4 else one
        child = mutate(rng, child if child is not None else one)
        if child not in known:
            made[child] = None
    children = list(made)
    if not predictor:
        return children
    worst = max((v for v in known.values() if math.isfinite(v)), default=0.0) + 1
    values = np.array([v if math.isfinite(v) else worst for v in known.values()])
    ranked = _rank(
        rng,
        np.stack([features(g) for g in known]),
        values,
        np.stack([features(g) for g in children]),
    )
    best = [children[i] for i in ranked[: size - size // 4]]
    rest = [children[i] for i in rng.permutation(ranked[size - size // 4 :])[: size // 4]]
    return best + rest


# -- the predictor --------------------------------------------------------------------------------


def _packages() -> tuple[PyTree, PyTree]:
    try:
        import optax
        from flax import linen
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'evolve needs flax and optax: pip install "diffsamp[search]" ({error})',
            name=error.name,
        ) from error
    return linen, optax


@functools.cache
def _ranker() -> tuple[PyTree, PyTree]:
    linen, optax = _packages()
    net = linen.Sequential(
        [linen.Dense(64), linen.gelu, linen.Dense(64), linen.gelu, linen.Dense(1)]
    )
    return net, optax.adam(3e-3)


@jax.jit
def _fit(seed, better, worse):
    """Train from scratch on pairs, (steps, pairs, features) each; returns the parameters."""
    net, optimizer = _ranker()
    params = net.init(jax.random.wrap_key_data(seed), better[0])

    def loss_of(params, better, worse):
        # the score is a predicted objective: smaller is better
        return jnp.mean(jax.nn.softplus(net.apply(params, better) - net.apply(params, worse)))

    def step(carry, pair):
        params, state = carry
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(jax.grad(loss_of)(params, *pair), state, params)
            params = jax.tree.map(jnp.add, params, updates)
        return (params, state), None

    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
    return jax.lax.scan(step, (params, state), (better, worse))[0][0]


def _rank(
    rng: np.random.Generator, seen: np.ndarray, values: np.ndarray, unseen: np.ndarray
) -> np.ndarray:
    """Indices of `unseen`, the most promising first."""
    mean, scale = seen.mean(0), seen.std(0) + 1e-3
    seen, unseen = (seen - mean) / scale, (unseen - mean) / scale
    pair = rng.integers(0, len(seen), (_FIT_STEPS, _PAIRS, 2))
    low_first = values[pair[..., 0]] <= values[pair[..., 1]]
    better = np.where(low_first, pair[..., 0], pair[..., 1])
    worse = np.where(low_first, pair[..., 1], pair[..., 0])
    seed = jnp.asarray(rng.integers(0, 2**32, 2, dtype=np.uint32))
    params = _fit(seed, jnp.asarray(seen[better]), jnp.asarray(seen[worse]))
    scores = np.asarray(_ranker()[0].apply(params, jnp.asarray(unseen)))[:, 0]
    return np.argsort(scores, kind="stable")


# -- state ----------------------------------------------------------------------------------------


def _read(path: Value, settings: dict[str, Value]) -> dict[Genome, float]:
    if path is None or not Path(path).exists():
        return {}
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        found, known = data["settings"], data["known"]
        known = {Genome.from_list(g): math.inf if v is None else float(v) for g, v in known}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{os.fspath(path)} is no state of `evolve`: {error}. Delete it."
        ) from error
    if found != settings:
        changed = sorted(k for k in settings if found.get(k) != settings[k])
        raise ValueError(
            f"{os.fspath(path)} is the state of another search: {', '.join(changed)} changed. "
            "Delete it, or give another path."
        )
    return known


def _write(path: Value, settings: dict[str, Value], known: Mapping[Genome, float]) -> None:
    if path is not None:
        rows = [[g.to_list(), v if math.isfinite(v) else None] for g, v in known.items()]
        write_atomically(path, json.dumps({"settings": settings, "known": rows}).encode())
