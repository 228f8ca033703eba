"""The starts of a search, split in three, and what was spent on them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core.checks import expect_int
from diffsamp._core.digest import seed_of
from diffsamp._core.sharding import expect_sharding, on_mesh, put
from diffsamp._core.types import Bound, Conditions, Key, PyTree, Sharding, Value
from diffsamp.score import ScoreFn, for_samples
from diffsamp.search._cost import Estimate, announce, ask_data
from diffsamp.search._network import describe_network
from diffsamp.search.objective import (
    Objective,
    cost_of_reference,
    finite_psnr,
    log_mse,
    make_reference,
)
from diffsamp.search.plan import Plan
from diffsamp.search.running import Progress, expect_batch, run, run_many, slice_batch
from diffsamp.tableau import Tableau

__all__ = ["Starts"]


@dataclasses.dataclass
class Starts:
    """Starts in the order that the key gave: [0, fit) fit, [fit, stop) decide, [stop, size) report.

    Attributes:
      score_fn: the network.
      x_T: (size, ...) starts at t_max.
      cond: keyword arguments for the network, or None.
      reference: (size, ...) where samplers should end; None until it is known.
      fit: where the deciding starts begin.
      stop: where the reporting starts begin.
      batch: samples at a time.
      sharding: over the batch axis.
      order: (size,) which of the caller's starts each is.
      objective: what samplers are judged by.
      noise: (size,) keys of the noise that samplers add, the same for all; None for deterministic
        ones.
      spent: network evaluations so far: per sample and call, as many as the network counts.
      seed: the numbers of the key that gave the order.
      estimate: what was said of the cost before the search began.
      began: when the search began, or the last plan was made.
      counted: evaluations that earlier plans report.
      shape: rows, p and q to which samplers are padded, so that all are one program.
    """

    score_fn: ScoreFn
    x_T: PyTree
    cond: PyTree
    reference: PyTree
    fit: int
    stop: int
    batch: int
    sharding: Sharding
    order: np.ndarray
    objective: Objective = dataclasses.field(default_factory=log_mse)
    noise: Key = None
    spent: float = 0
    seed: list[int] = dataclasses.field(default_factory=list)
    estimate: Estimate | None = None
    began: float = dataclasses.field(default_factory=time.perf_counter)
    counted: float = 0
    shape: tuple[int, int, int] = (0, 0, 0)

    @classmethod
    def split(
        cls,
        score_fn: ScoreFn,
        x_T: PyTree,
        cond: Conditions | None,
        key: Key,
        held_out: int | None,
        batch: int,
        sharding: Sharding,
        *,
        shuffled: bool = True,
    ) -> Starts:
        """Split and shuffle, without a reference yet.

        Args:
          score_fn: the network.
          x_T: (n, ...) starts.
          cond: keyword arguments for the network.
          key: random key of the order.
          held_out: how many do not fit, half of them to decide; None: a quarter, at least 2.
          batch: samples at a time.
          sharding: as for `run`.
          shuffled: False: in the caller's order.

        Raises:
          ValueError: too few starts.
        """
        size = expect_batch(x_T, cond)
        held = max(2, size // 4) if held_out is None else held_out
        held = expect_int(held, "held_out", at_least=2)
        if held >= size:
            raise ValueError(
                f"`x_T` has {size} starts, of which {held} are held out: too few are left."
            )
        batch = expect_int(batch, "batch", at_least=1)
        expect_sharding(sharding, batch if batch < size else None)
        order = np.arange(size)
        if shuffled:
            order = np.asarray(jax.random.permutation(key, size))
            x_T, cond = jax.tree.map(lambda leaf: jnp.asarray(leaf)[order], (x_T, cond))
        fit, stop = size - held, size - held + held // 2
        network = on_mesh(score_fn, sharding)
        return cls(network, x_T, cond, None, fit, stop, batch, sharding, order, seed=seed_of(key))

    def begin(self) -> None:
        """A new plan begins: what was spent and what time passed before is not its own."""
        self.counted, self.began = self.spent, time.perf_counter()

    def widen(self, nfe: int) -> None:
        """Tables of up to `nfe` evaluations, and the usual samplers, are to be one program."""
        self.shape = (nfe + 1, 2, max(nfe, 4))

    def _padded(self, tableau: Tableau) -> Tableau:
        if not any(self.shape):
            return tableau
        own = (tableau.rows, tableau.p, tableau.q)
        return tableau.pad(*(max(pair) for pair in zip(self.shape, own, strict=True)))

    @property
    def size(self) -> int:
        """All of them."""
        return int(jax.tree.leaves(self.x_T)[0].shape[0])

    def cost(self, tableau: Tableau) -> float:
        """Network evaluations of a run, per sample, as the network itself counts them."""
        return self.score_fn.nfe(tableau)

    def announce(
        self, what: str, evaluations: float, states: float, tableau: Tableau | None = None
    ) -> None:
        """Say what a search on these starts will cost; see `_cost.announce`.

        Args:
          what: the search.
          evaluations: how many it will make.
          states: how many states of every start it keeps.
          tableau: a sampler to time; None: one evaluation of the starts that fit.
        """
        some = self.fit if tableau is None else self.size
        self.estimate, spent = announce(
            what,
            self.score_fn,
            slice_batch(self.x_T, 0, some),
            slice_batch(self.cond, 0, some),
            evaluations=evaluations,
            batch=self.batch,
            states=states * self.size / some,
            sharding=self.sharding,
            tableau=tableau,
            key=self.noise,
        )
        self.spent += spent

    def expect_reference(self, reference: Tableau | PyTree, progress: Progress | None) -> None:
        """Take or make the reference; see `make_reference`.

        Args:
          reference: samples in the caller's order, the tableau that makes them, or None.
          progress: as for `run`.
        """
        made = reference is None or isinstance(reference, Tableau)
        self.spent += cost_of_reference(self.score_fn, reference) * self.size
        found = make_reference(
            self.score_fn,
            reference,
            self.x_T,
            cond=self.cond,
            batch=self.batch,
            sharding=self.sharding,
            progress=progress,
        )
        self.reference = found if made else jnp.asarray(found)[self.order]

    def samples(self, tableau: Tableau, low: int, high: int) -> PyTree:
        """Samples low .. high - 1."""
        self.spent += self.cost(tableau) * (high - low)
        x, cond, key = (slice_batch(v, low, high) for v in (self.x_T, self.cond, self.noise))
        options = {"key": key, "cond": cond, "batch": self.batch, "sharding": self.sharding}
        return run(self.score_fn, self._padded(tableau), x, **options)

    def many(
        self,
        tableaux: Sequence[Tableau],
        low: int,
        high: int,
        *,
        together: int = 1,
        key: Key = None,
    ) -> Iterator[PyTree]:
        """Samples low .. high - 1 of each of several samplers, in order; see `run_many`.

        Args:
          tableaux: the samplers.
          low: the first start.
          high: one past the last.
          together: samplers in one batch.
          key: of their noise, one per start; None: `noise`.
        """
        self.spent += sum(self.cost(tableau) for tableau in tableaux) * (high - low)
        x, cond, noise = (slice_batch(v, low, high) for v in (self.x_T, self.cond, self.noise))
        return run_many(
            self.score_fn,
            [self._padded(tableau) for tableau in tableaux],
            x,
            key=noise if key is None else key,
            cond=cond,
            batch=self.batch,
            population=together,
            sharding=self.sharding,
        )

    def ask(
        self,
        x: np.ndarray,
        bound: Bound,
        low: int,
        high: int,
        *,
        network: ScoreFn | None = None,
    ) -> np.ndarray:
        """What is bound, of states of starts low .. high - 1; what it costs is not counted.

        Args:
          x: (copies * (high - low), ...) states, one set of starts after the other; several only
            where `batch` holds the starts.
          bound: numbers for all, or one per state.
          low: the first start.
          high: one past the last.
          network: another than that of the search.
        """
        network = self.score_fn if network is None else network
        count = high - low
        copies, answers = len(x) // count, []
        for first in range(low, high, self.batch):
            last = min(first + self.batch, high)
            numbered = for_samples(network, np.tile(np.arange(first, last), copies))
            own = slice_batch(self.cond, first, last)
            if copies > 1:
                assert count <= self.batch, (count, self.batch)
                own = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * copies), own)
            states = x if copies > 1 else x[first - low : last - low]
            answer = ask_data(numbered, put(states, self.sharding), bound, put(own, self.sharding))
            answers.append(np.asarray(answer))
        return np.concatenate(answers)

    def judge(self, x: PyTree, low: int, high: int) -> float:
        """The objective of samples low .. high - 1; inf if anything is not finite."""
        reference, cond = (slice_batch(v, low, high) for v in (self.reference, self.cond))
        return self.objective(x, reference, cond)

    def value(self, tableau: Tableau, low: int, high: int) -> float:
        """The objective of the samples that a sampler makes of starts low .. high - 1."""
        return self.judge(self.samples(tableau, low, high), low, high)

    def decide(self, tableau: Tableau) -> float:
        """`value` on the deciding starts."""
        return self.value(tableau, self.fit, self.stop)

    def scores(
        self, start: Tableau, found: Tableau, data_range: float
    ) -> dict[str, dict[str, dict[str, float]]]:
        """Scores of a `Plan`: objective and PSNR, on the fitting and the reporting starts."""
        scores: dict[str, dict[str, dict[str, float]]] = {self.objective.name: {}, "psnr": {}}
        for span, (low, high) in {"fit": (0, self.fit), "held_out": (self.stop, self.size)}.items():
            for sampler, tableau in (("start", start), ("found", found)):
                x = self.samples(tableau, low, high)
                reference = slice_batch(self.reference, low, high)
                for name, value in {
                    self.objective.name: self.judge(x, low, high),
                    "psnr": finite_psnr(x, reference, data_range),
                }.items():
                    scores[name].setdefault(span, {})[sampler] = value
        return scores

    def plan(
        self,
        method: str,
        found: Tableau,
        given: Tableau,
        *,
        settings: Mapping[str, Value],
        history: Sequence[tuple[int, float, float]],
        data_range: float,
        start: str | None = None,
    ) -> Plan:
        """The plan of a sampler that was found on these starts, with what was spent on it.

        Args:
          method: name of the search.
          found: the sampler.
          given: the one it is compared with in the scores.
          settings: the search's own, beside those that all searches have.
          history: as for `Plan`.
          data_range: largest minus smallest value of the data.
          start: what the search started from; None: the name of `given`.
        """
        scores = self.scores(given, found, data_range)
        everywhere = {
            "nfe": found.nfe,
            "cost": self.cost(found),
            "starts": self.size,
            "held_out": self.size - self.fit,
        }
        spent: dict[str, Value] = {"evaluations": self.spent - self.counted}
        if self.estimate is not None:
            spent["estimate"] = self.estimate.settings
        began, self.began = self.began, time.perf_counter()
        self.counted = self.spent
        return Plan(
            found,
            method,
            given.name if start is None else start,
            scores,
            tuple(history),
            self.began - began,
            {**everywhere, **settings, **spent},
            self.seed,
            network=describe_network(self.score_fn, found, x_T=self.x_T, data_range=data_range),
        )
