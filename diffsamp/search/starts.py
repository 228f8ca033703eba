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
from diffsamp._core.sharding import expect_sharding, on_mesh
from diffsamp._core.types import Conditions, Key, PyTree, Sharding, Value
from diffsamp.score import ScoreFn
from diffsamp.search._cost import Estimate, announce
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
        order = np.asarray(jax.random.permutation(key, size))
        x_T, cond = jax.tree.map(lambda leaf: jnp.asarray(leaf)[order], (x_T, cond))
        fit, stop = size - held, size - held + held // 2
        network = on_mesh(score_fn, sharding)
        return cls(network, x_T, cond, None, fit, stop, batch, sharding, order, seed=seed_of(key))

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
        """Say what a search on these starts will cost; see `_cost.announce`."""
        self.estimate, spent = announce(
            what,
            self.score_fn,
            self.x_T,
            self.cond,
            evaluations=evaluations,
            batch=self.batch,
            states=states,
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
        return run(
            self.score_fn, tableau, x, key=key, cond=cond, batch=self.batch, sharding=self.sharding
        )

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
            tableaux,
            x,
            key=noise if key is None else key,
            cond=cond,
            batch=self.batch,
            population=together,
            sharding=self.sharding,
        )

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
