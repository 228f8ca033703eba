"""Genomes of the evolutionary search: times and one `MixedStep` per step, under an exact budget."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from diffsamp import schedules
from diffsamp._core.types import Times, Value
from diffsamp.processes import Process
from diffsamp.solvers import MixedStep, mixed
from diffsamp.tableau import Tableau

__all__ = ["KINDS", "Genome", "crossover", "features", "from_times", "mutate", "random_genome"]

_BASES = ("data", "noise", "rho", "t", "adams")
_GAP = 0.01  # smallest distance of two times, as a part of the log-SNR range

KINDS: Mapping[str, MixedStep] = {
    "ddim": MixedStep("data", 1),
    "dpmpp_2m_heun": MixedStep("data", 2),
    "unip3": MixedStep("data", 3),
    "unipc1": MixedStep("data", 1, corrector=True),
    "unipc2": MixedStep("data", 2, corrector=True),
    "unipc3": MixedStep("data", 3, corrector=True),
    "unipc4": MixedStep("data", 4, corrector=True),
    "deis_tab1": MixedStep("t", 2),
    "deis_tab2": MixedStep("t", 3),
    "deis_tab3": MixedStep("t", 4),
    "deis_rhoab2": MixedStep("rho", 3),
    "deis_rhoab3": MixedStep("rho", 4),
    "deis_logrhoab1": MixedStep("noise", 2),
    "ipndm2": MixedStep("adams", 2),
    "ipndm3": MixedStep("adams", 3),
    "ipndm4": MixedStep("adams", 4),
}
"""Solvers of the registry that are one kind of step throughout.

Up to the last steps, where some lower their order, and UniPC's two-point weights, which it fixes at
one half and a `MixedStep` integrates.
"""


@dataclasses.dataclass(frozen=True)
class Genome:
    """A sampler of the search space.

    Attributes:
      places: (n - 1,) rising: where the inner times lie, as parts of the log-SNR range from t_max
        (0) to t_min (1); the last time is the clean end.
      steps: n choices; their stages add up to the budget.
    """

    places: tuple[float, ...]
    steps: tuple[MixedStep, ...]

    @property
    def nfe(self) -> int:
        """Evaluations."""
        return sum(step.stages for step in self.steps)

    def tableau(self, process: Process) -> Tableau:
        """The sampler."""
        first, span, start = _range(process)
        inner = np.asarray(process.time(first + span * np.asarray(self.places)), np.float64)
        return mixed(process, [start, *inner, process.t_clean], steps=self.steps)

    def to_list(self) -> list[Value]:
        """Plain JSON values."""
        return [list(self.places), [list(dataclasses.astuple(step)) for step in self.steps]]

    @classmethod
    def from_list(cls, data: Value) -> Genome:
        """The inverse of `to_list`."""
        places, steps = data
        return cls(tuple(places), tuple(MixedStep(*step) for step in steps))


def _range(process: Process) -> tuple[float, float, float]:
    """log-SNR at the start, its span down to t_min, and the time of the start."""
    start = float(schedules.logsnr(process, 2)[0])  # later than t_max where alpha = 0 there
    first = float(process.log_snr(np.float64(start)))
    return first, float(process.log_snr(np.float64(process.t_min))) - first, start


def _spaced(places: np.ndarray) -> tuple[float, ...]:
    """Sorted, at least _GAP apart, inside (0, 1]."""
    places = np.sort(np.asarray(places, np.float64))
    n = len(places)
    low = _GAP * np.arange(1, n + 1)
    places = np.maximum.accumulate(np.maximum(places, low) - low) + low
    high = 1 - _GAP * np.arange(n)[::-1]
    return tuple(float(v) for v in np.minimum(places, high))


def from_times(process: Process, times: Times, steps: Sequence[MixedStep]) -> Genome:
    """The genome with these times (the first and the last are the process's own).

    Args:
      process: the noise process.
      times: (n + 1,) times.
      steps: n choices.
    """
    first, span, _ = _range(process)
    inner = np.asarray(process.log_snr(np.asarray(times, np.float64)[1:-1]), np.float64)
    return Genome(_spaced((inner - first) / span), tuple(steps))


def _random_step(rng: np.random.Generator, stages: int) -> MixedStep:
    return MixedStep(
        basis=str(rng.choice(_BASES)),
        order=int(rng.integers(1, 5)),
        stages=stages,
        corrector=bool(rng.random() < 0.4),
        scale=1.0 if rng.random() < 0.6 else float(np.round(rng.uniform(0.5, 1.5), 3)),
    )


def random_genome(
    rng: np.random.Generator, nfe: int, process: Process, grids: Sequence[str]
) -> Genome:
    """A genome on one of the grids, its steps mostly of one kind.

    Args:
      rng: the host's generator.
      nfe: the budget, met exactly.
      process: the noise process.
      grids: names of schedules.
    """
    doubles = int(rng.integers(0, (nfe - 1) // 2 + 1)) if rng.random() < 0.3 else 0
    count = nfe - doubles
    two = set(rng.choice(count - 1, doubles, replace=False).tolist()) if doubles else set()
    kind = _random_step(rng, 1)
    steps = [
        dataclasses.replace(
            kind if rng.random() < 0.8 else _random_step(rng, 1), stages=2 if i in two else 1
        )
        for i in range(count)
    ]
    times = schedules.get(str(rng.choice(list(grids))))(process, count)
    return from_times(process, times, steps)


def mutate(rng: np.random.Generator, genome: Genome) -> Genome:
    """A child with some times moved, some steps changed, or two evaluations split or joined.

    Args:
      rng: the host's generator.
      genome: the parent; the child has its budget.
    """
    places, steps = np.array(genome.places), list(genome.steps)
    if len(places) and rng.random() < 0.8:
        edges = np.concatenate([[0.0], places, [1.0 + _GAP]])
        gap = np.minimum(np.diff(edges)[:-1], np.diff(edges)[1:])
        chosen = rng.random(len(places)) < max(0.4, 1 / len(places))
        size = 0.4 * 10 ** -rng.uniform(0, 1)  # large moves and small ones
        places = places + chosen * gap * rng.normal(0, size, len(places))
    if rng.random() < 0.5:
        for i in range(len(steps)):
            if rng.random() < max(0.25, 1 / len(steps)):
                fresh = dataclasses.asdict(_random_step(rng, steps[i].stages))
                name = str(rng.choice(["basis", "order", "corrector", "scale"]))
                steps[i] = dataclasses.replace(steps[i], **{name: fresh[name]})
    if rng.random() < 0.15 and len(steps) > 2:
        singles = [i for i in range(len(steps) - 2) if steps[i].stages + steps[i + 1].stages == 2]
        doubles = [i for i in range(len(steps) - 1) if steps[i].stages == 2]
        if doubles and (rng.random() < 0.5 or not singles):
            i = int(rng.choice(doubles))  # a step of two evaluations becomes two of one
            edges = np.concatenate([[0.0], places, [1.0]])
            places = np.insert(places, i, (edges[i] + edges[i + 1]) / 2)
            steps[i : i + 1] = [dataclasses.replace(steps[i], stages=1)] * 2
        elif singles:
            i = int(rng.choice(singles))
            places = np.delete(places, i)
            steps[i : i + 2] = [dataclasses.replace(steps[i], stages=2)]
    return Genome(_spaced(places), tuple(steps))


def crossover(rng: np.random.Generator, one: Genome, two: Genome) -> Genome | None:
    """The noisy part of one parent and the clean part of the other; None if budgets do not meet.

    Args:
      rng: the host's generator.
      one: a parent.
      two: another of the same budget.
    """
    spent_one = list(itertools.accumulate(step.stages for step in one.steps))
    spent_two = list(itertools.accumulate(step.stages for step in two.steps))
    cuts = sorted(set(spent_one[:-1]) & set(spent_two[:-1]))
    if not cuts:
        return None
    cut = int(rng.choice(cuts))
    i, j = spent_one.index(cut) + 1, spent_two.index(cut) + 1
    # times 1 .. i of the first, then those of the second after its time j
    places = np.array([*one.places[:i], *two.places[j:]])
    if np.any(np.diff(places) <= _GAP):
        return None
    return Genome(_spaced(places), (*one.steps[:i], *two.steps[j:]))


def features(genome: Genome) -> np.ndarray:
    """Numbers for the predictor, (12 nfe,): what each step does, padded to the budget."""
    rows = np.zeros((genome.nfe, 12))
    ends = [0.0, *genome.places, 1.0]
    for i, step in enumerate(genome.steps):
        rows[i, :3] = 1.0, ends[i], ends[i + 1] - ends[i]
        rows[i, 3 + _BASES.index(step.basis)] = 1.0
        rows[i, 8:] = step.order / 4, step.stages - 1, step.corrector, step.scale
    return rows.ravel().astype(np.float32)
