"""`Plan`: a sampler that was searched for, with what is known of it, as a readable file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from diffsamp._core.files import read_json, write_atomically
from diffsamp._core.types import Network, PyTree, Value
from diffsamp.score import expect_score_fn
from diffsamp.search._network import describe_network, expect_calls, expect_fit
from diffsamp.tableau import Tableau

__all__ = ["Front", "Plan", "decoded", "encoded", "versions"]

_FORMAT = "diffsamp.plan"
_VERSION = 2
_OLDER = (1,)  # without `network`

# {score: {"fit" | "held_out": {"start" | "found": value}}}
Scores = Mapping[str, Mapping[str, Mapping[str, float]]]


def versions() -> dict[str, str]:
    """Versions of the packages that a plan depends on."""
    # diffsamp's as it says itself: it may be run where it lies, without being installed
    own = sys.modules[__name__.split(".")[0]].__version__
    return {"diffsamp": own, "jax": jax.__version__, "numpy": np.__version__}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A sampler that was searched for, and what is known of it.

    Attributes:
      tableau: the sampler.
      method: how it was found: "compare", "dynamic", "evolve", "distill" or several of them.
      start: name of the tableau the search started from, or of the best fixed one.
      scores: by score, set and sampler: {"psnr": {"fit": {"start": .., "found": ..}, "held_out":
        {..}}, ..}. "psnr" is in dB to the reference at equal noise; the held-out noise took no
        part in the search.
      history: (step, training loss, score on the stopping noise) at every evaluation.
      seconds: wall-clock time of the search, compilation included.
      settings: the options of the search, as JSON values.
      seed: the numbers of its random key.
      versions: of diffsamp, jax and numpy.
      network: what it was made for (`describe_network`, docs/plan-format.md): process, prediction
        and time of the network, guidance, checkpoint, data, and the numbers of every call; empty
        if that is not known.
    """

    tableau: Tableau
    method: str
    start: str
    scores: Scores
    history: tuple[tuple[int, float, float], ...] = ()
    seconds: float = 0.0
    settings: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    seed: list[int] = dataclasses.field(default_factory=list)
    versions: Mapping[str, str] = dataclasses.field(default_factory=versions)
    network: Mapping[str, Value] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        tableau: Tableau,
        score_fn: Network,
        *,
        x_T: PyTree = None,
        data_range: float | None = None,
        checkpoint: str = "",
    ) -> Plan:
        """A plan of a sampler that nobody searched for, to run it on this network elsewhere.

        Args:
          tableau: the sampler.
          score_fn: the network it is for, or a transform of one.
          x_T: (batch, ...) starts, or what has their shape, for the shape of a sample.
          data_range: largest minus smallest value of the data.
          checkpoint: the name of the weights, for people.

        Raises:
          TypeError: not a network.
          ValueError: a tableau built for another process.
        """
        expect_score_fn(score_fn)
        expect_fit(score_fn, tableau)
        facts = describe_network(
            score_fn, tableau, x_T=x_T, data_range=data_range, checkpoint=checkpoint
        )
        return cls(tableau, "fixed", tableau.name, {}, network=facts)

    def for_network(
        self,
        score_fn: Network,
        *,
        x_T: PyTree = None,
        data_range: float | None = None,
        checkpoint: str = "",
    ) -> Plan:
        """The same plan, with what it says of its network written anew; arguments as for `of`."""
        facts = Plan.of(
            self.tableau, score_fn, x_T=x_T, data_range=data_range, checkpoint=checkpoint
        )
        return dataclasses.replace(self, network=facts.network)

    @property
    def nfe(self) -> int:
        """Its evaluations."""
        return self.tableau.nfe

    @property
    def latency(self) -> int:
        """Its calls in sequence, where rows that can share one do (`parallel.sample_waves`)."""
        return self.tableau.latency

    @property
    def psnr(self) -> Mapping[str, Mapping[str, float]]:
        """PSNR in dB to the reference, by set and sampler."""
        return self.scores["psnr"]

    def to_dict(self) -> dict[str, Value]:
        """Plain lists, numbers and strings, as written to a file; NaN and infinities as strings."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "tableau"
        }
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "nfe": self.nfe,
            **encoded(fields),
            "tableau": self.tableau.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Value, *, where: str = "the plan") -> Plan:
        """The inverse of `to_dict`, checked.

        Args:
          data: what `to_dict` gave.
          where: what to call it in errors.

        Raises:
          ValueError: anything missing or inconsistent, in words.
        """
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ValueError(f'{where} is not a diffsamp plan: it must say "format": "{_FORMAT}".')
        if data.get("version") not in (*_OLDER, _VERSION):
            raise ValueError(
                f"{where} has version {data.get('version')!r}; this diffsamp reads versions "
                f"1 to {_VERSION}. Install the diffsamp that wrote it, or a newer one."
            )
        if data["version"] == 1:
            data = {"network": {}, **data}
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if name not in data]
        if missing:
            raise ValueError(f"{where} lacks {', '.join(map(repr, missing))}.")
        tableau = Tableau.from_dict(data["tableau"], where=f"the tableau of {where}")
        if data.get("nfe") != tableau.nfe:
            raise ValueError(
                f'{where} is corrupt: it says "nfe": {data.get("nfe")}, its tableau evaluates '
                f"{tableau.nfe} times."
            )
        values = decoded({name: data[name] for name in names if name != "tableau"})
        if not isinstance(values["network"], dict):
            raise ValueError(f"{where} is corrupt: its `network` must be an object.")
        if "calls" in values["network"]:
            expect_calls(values["network"]["calls"], tableau.rows, where)
        scores = values["scores"]
        numbers = [
            number
            for sets in (scores.values() if isinstance(scores, dict) else [None])
            for samplers in (sets.values() if isinstance(sets, dict) else [None])
            for number in (samplers.values() if isinstance(samplers, dict) else [None])
        ]
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError(f"{where} is corrupt: its scores must be numbers by set and sampler.")
        try:
            values["history"] = tuple((int(a), float(b), float(c)) for a, b, c in values["history"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where} is corrupt: its history must be triples.") from error
        return cls(tableau=tableau, **values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as readable JSON (float64 values exactly), atomically."""
        lines = []
        for name, value in self.to_dict().items():
            if name == "tableau":
                inner = [f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()]
                lines.append('  "tableau": {\n' + ",\n".join(inner) + "\n  }")
            else:
                lines.append(f"  {json.dumps(name)}: {json.dumps(value, allow_nan=False)}")
        write_atomically(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what `save` wrote.

        Raises:
          FileNotFoundError: no such file.
          ValueError: the file is not a plan, or is corrupt; the message says where.
        """
        return cls.from_dict(read_json(path), where=os.fspath(path))


_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encoded(value: Value) -> Value:
    """Plain JSON values: NaN and infinities as strings, NumPy scalars as numbers."""
    if isinstance(value, Mapping):
        return {str(k): encoded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [encoded(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def decoded(value: Value) -> Value:
    """The inverse of `encoded`."""
    if isinstance(value, dict):
        return {k: decoded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [decoded(v) for v in value]
    return _SPECIAL.get(value, value) if isinstance(value, str) else value


@dataclasses.dataclass(frozen=True)
class Front:
    """What `best` found: a plan per budget.

    Attributes:
      plans: {nfe: plan}; every one makes exactly that many evaluations.
      discarded: candidates that gave NaN or inf on the way, over all stages.
      by: the score the plans were chosen by, smaller is better.
      left_out: (solver, schedule, nfe, reason) of candidates that could not be built.
    """

    plans: Mapping[int, Plan]
    discarded: int
    by: str
    left_out: tuple[tuple[str, str, int, str], ...] = ()

    def value(self, nfe: int) -> float:
        """The score of the plan of a budget, on the noise that decided between candidates."""
        return self.plans[nfe].scores[self.by]["chosen_on"]["found"]

    @property
    def pareto(self) -> dict[int, Plan]:
        """The plans that no cheaper one equals: along them the score falls strictly."""
        kept: dict[int, Plan] = {}
        lowest = math.inf
        for nfe in sorted(self.plans):
            if self.value(nfe) < lowest:
                kept[nfe], lowest = self.plans[nfe], self.value(nfe)
        return kept

    def within(self, nfe: int) -> Plan:
        """The best plan of at most `nfe` evaluations.

        Raises:
          ValueError: none is that cheap.
        """
        fitting = [n for n in self.pareto if n <= nfe]
        if not fitting:
            raise ValueError(f"the cheapest plan makes {min(self.plans)} evaluations, not {nfe}.")
        return self.plans[max(fitting)]

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write every plan as `plan-<nfe>.json` into a folder, which is made if needed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"plan-{nfe}.json" for nfe in sorted(self.plans)]
        for nfe, path in zip(sorted(self.plans), paths, strict=True):
            self.plans[nfe].save(path)
        return paths
