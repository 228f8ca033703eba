"""`evolution_strategy`: all numbers of a sampler, by samples of an objective and nothing else.

For objectives without a gradient: a reward from a person, a program or a model in another language,
a distance between sets in features, a count. A separable natural evolution strategy (Wierstra et
al. 2014, JMLR 15, section 4.2): candidates are drawn around the present numbers, in pairs of
opposite signs, ranked, and the mean and the spread of every number move along the ranks' natural
gradient. Ranks make it blind to the objective's scale and to single bad candidates.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np

from diffsamp._core import random
from diffsamp._core.checks import expect_int
from diffsamp._core.digest import seed_of
from diffsamp._core.types import Array, Conditions, Key, PyTree, Sharding
from diffsamp.processes import Process
from diffsamp.score import ScoreFn
from diffsamp.search._cost import expect_limit
from diffsamp.search._gradient import arrays_of, scales_of
from diffsamp.search.canonical import canonical
from diffsamp.search.explicit import from_largest_level, own_start
from diffsamp.search.objective import Objective, cost_of_reference, log_mse
from diffsamp.search.plan import Plan
from diffsamp.search.running import Progress
from diffsamp.search.starts import Starts
from diffsamp.tableau import Tableau

__all__ = ["evolution_strategy"]


def evolution_strategy(
    score_fn: ScoreFn,
    tableau: Tableau,
    x_T: PyTree,
    *,
    key: Key,
    objective: Objective | None = None,
    cond: Conditions | None = None,
    reference: Tableau | PyTree = None,
    held_out: int | None = None,
    batch: int = 64,
    rounds: int = 50,
    population: int = 16,
    spread: float = 0.05,
    evaluations: int | None = None,
    together: int = 1,
    data_range: float = 2.0,
    sharding: Sharding = None,
    progress: Progress | None = None,
) -> Plan:
    """Improve a sampler for this network under any objective, without a gradient of anything.

    Args:
      score_fn: the network, batched; only ever called forward.
      tableau: the sampler to start from: one evaluation a row, falling levels; it may add noise,
        and then learns how much.
      x_T: (n, ...) starts at the process's t_max, an array.
      key: random key: which starts fit, decide and report, the candidates, and the noise of a
        stochastic sampler, which is the same for all candidates of a round.
      objective: what to minimise, such as `objective.reward(score)`; None: `log_mse`.
      cond: keyword arguments for the network, every array with the leading axis n.
      reference: the samples to come close to, shaped like x_T, or the tableau that makes them;
        None: `reference_tableau`. Objectives that ignore it still report the PSNR to it.
      held_out: how many of the n starts are kept from fitting, half of them to decide and half to
        report; at least 2. None: a quarter.
      batch: samples at a time.
      rounds: of `population` candidates each, on all starts that fit.
      population: candidates a round, an even number.
      spread: standard deviation of the first candidates: of weights in units of their step, of
        times in units of the smaller step next to them, of angles of noise in radians.
      evaluations: stop once so many network evaluations were spent, the reference included.
      together: samplers in one batch, for a device that `batch` samples do not fill.
      data_range: largest minus smallest value of the data, for the PSNR.
      sharding: over the batch axis, as for `run`.
      progress: called with (what, done, total).

    Returns:
      A `Plan` for starts at t_max. Its tableau is never worse on the deciding starts than the one
      given. Candidates that are not finite count as worst.

    Raises:
      ValueError: a sampler without a canonical form (`canonical`), too few starts, an odd
        population, or a start whose samples are not finite.
    """
    rounds = expect_int(rounds, "rounds", at_least=1)
    population = expect_int(population, "population", at_least=2)
    if population % 2:
        raise ValueError(f"`population` must be even: candidates are pairs; got {population}.")
    if not 0 < spread < math.inf:
        raise ValueError(f"`spread` must be positive and finite; got {spread}.")
    process = score_fn.process
    given = from_largest_level(tableau, process)
    numbers = _Vector.of(given, process)
    starts = Starts.split(score_fn, x_T, cond, key, held_out, batch, sharding)
    starts.objective = log_mse() if objective is None else objective
    if tableau.stochastic:
        starts.noise = random.sample_keys(jax.random.fold_in(key, 1), starts.size)
    limit, cost = expect_limit(evaluations), starts.cost(given)
    each = cost * starts.fit * population
    likely = each * rounds + cost_of_reference(score_fn, reference) * starts.size
    starts.announce(f"evolution strategy, {given.nfe} NFE", min(likely, limit), 2.0, given)
    starts.expect_reference(reference, progress)

    mean, width = np.zeros(numbers.size), np.full(numbers.size, float(spread))
    best, least = mean, starts.decide(given)
    if not math.isfinite(starts.value(given, 0, starts.fit)):
        raise ValueError(
            f"tableau {tableau.name!r} gives samples or an objective that are not finite on this "
            "network; start from one that works."
        )
    history, discarded, done = [(0, float("nan"), least)], 0, 0
    rank, rate = _utilities(population), _rate(numbers.size)
    rng = np.random.default_rng(seed_of(jax.random.fold_in(key, 2)))
    for done in range(1, rounds + 1):
        if starts.spent + each > limit:
            done -= 1
            break
        half = rng.standard_normal((population // 2, numbers.size))
        drawn = np.concatenate([half, -half])
        values = _values(starts, [numbers.tableau(mean + width * z) for z in drawn], together, done)
        discarded += int(np.sum(~np.isfinite(values)))
        weights = np.zeros(population)
        weights[np.argsort(values, kind="stable")] = rank
        mean = mean + width * (weights @ drawn)
        width = width * np.exp(rate / 2 * (weights @ (drawn**2 - 1)))
        decided = math.inf
        if (moved := numbers.tableau(mean)) is not None:
            decided = starts.decide(moved)
        history.append((done, float(np.min(values)), decided))
        if decided < least:
            best, least = mean, decided
        if progress is not None:
            progress("evolution strategy", done, rounds)

    found = given
    if np.any(best):
        found = dataclasses.replace(
            numbers.expect(best),
            name=f"{tableau.name}, by evolution strategy",
            source=f"diffsamp.search.evolution_strategy; start: {tableau.source}",
        )
    settings = {
        "objective": starts.objective.name,
        "rounds": done,
        "population": population,
        "spread": spread,
        "discarded": discarded,
    }
    return starts.plan(
        "evolution_strategy",
        found,
        given,
        settings=settings,
        history=history,
        data_range=data_range,
    )


def _utilities(population: int) -> np.ndarray:
    """(population,) weights by rank, best first, that sum to 0 (Wierstra et al., section 3.1)."""
    raw = np.maximum(0, np.log(population / 2 + 1) - np.log(np.arange(1, population + 1)))
    return raw / raw.sum() - 1 / population


def _rate(size: int) -> float:
    """Learning rate of the spreads (Wierstra et al., table 1)."""
    return (3 + math.log(size)) / (5 * math.sqrt(size))


def _values(starts: Starts, tableaux: list[Tableau | None], together: int, seed: int) -> np.ndarray:
    """The objective of every candidate on the fitting starts, all with the same fresh noise."""
    living = [t for t in tableaux if t is not None]
    values = np.full(len(tableaux), math.inf)
    if not living:
        return values
    key = None
    if starts.noise is not None:
        key = jax.vmap(lambda k: jax.random.fold_in(k, seed))(starts.noise[: starts.fit])
    samples = starts.many(living, 0, starts.fit, together=together, key=key)
    at = [i for i, t in enumerate(tableaux) if t is not None]
    for i, found in zip(at, samples, strict=True):
        values[i] = starts.judge(found, 0, starts.fit)
    return values


@dataclasses.dataclass(frozen=True)
class _Vector:
    """The canonical numbers of a sampler as changes in one vector, 0 for the sampler itself."""

    base: dict[str, np.ndarray]
    ends: dict[str, np.ndarray]
    scales: dict[str, np.ndarray]
    places: dict[str, tuple[np.ndarray, ...]]
    process: Process

    @classmethod
    def of(cls, tableau: Tableau, process: Process) -> _Vector:
        own, _ = own_start(tableau)
        base = canonical(tableau, process)
        count = own.nfe
        ends = {k: np.asarray(getattr(own, k))[[0, count]] for k in ("times", "alpha", "sigma")}
        places: dict[str, tuple[np.ndarray, ...]] = {
            "log_snr": (np.arange(count - 1),),
            "weights": np.tril_indices(count, -1),
        }
        for name in ("labels", "noise"):
            if name in base:
                places[name] = (np.arange(count),)
        return cls(base, ends, scales_of(base, own), places, process)

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return sum(len(place[0]) for place in self.places.values())

    def tableau(self, vector: Array) -> Tableau | None:
        """The sampler of a vector, for starts at t_max; None if its times are out of order."""
        moved, at = {}, 0
        for name, place in self.places.items():
            count = len(place[0])
            moved[name] = np.zeros(self.base[name].shape)
            moved[name][place] = vector[at : at + count]
            at += count
        arrays = arrays_of(moved, (self.base, self.ends, self.scales), self.process, host=True)
        times = np.asarray(arrays["times"])
        finite = all(np.all(np.isfinite(array)) for array in arrays.values())
        if not finite or not np.all(np.diff(times) < 0):
            return None
        return from_largest_level(Tableau.create(**arrays, check="none"), self.process)

    def expect(self, vector: Array) -> Tableau:
        """The sampler of a vector that is known to have one."""
        found = self.tableau(vector)
        assert found is not None
        return found
