"""What every transform of a ScoreFn has in common."""

from __future__ import annotations

import dataclasses

import numpy as np

from diffsamp._core.numeric import namespace
from diffsamp._core.types import Array, Bound, Conditions, Network, PyTree
from diffsamp.predictions import Level
from diffsamp.processes import Process
from diffsamp.score import ask, for_samples
from diffsamp.tableau import Tableau

__all__ = ["Transform", "per_row"]


class Transform:
    """What every transform passes through to the ScoreFn inside it; for transforms of one's own.

    A subclass is a pytree with a field `score_fn`, and gives `bind` and `predict`. Every array of
    what `bind` returns has the rows in front, and a field `inner` holds the inner bound numbers.
    """

    score_fn: Network

    @property
    def process(self) -> Process:
        """The noise process of the network inside."""
        return self.score_fn.process

    @property
    def batched(self) -> bool:
        """Whether states have a batch axis."""
        return self.score_fn.batched

    @property
    def prediction(self) -> str:
        """What the network inside emits, and what a call without another wish returns."""
        return self.score_fn.prediction

    @property
    def sigma_data(self) -> float:
        """The standard deviation of the data that "edm_f" means."""
        return self.score_fn.sigma_data

    @property
    def nfe_factor(self) -> float:
        """Network evaluations per call."""
        return self.score_fn.nfe_factor

    @property
    def gradients_per_call(self) -> float:
        """Vector-Jacobian products of the network per call, which `nfe_factor` does not count.

        One costs about two evaluations, and the memory of the network's activations.
        """
        return getattr(self.score_fn, "gradients_per_call", 0)

    def nfe(self, tableau: Tableau) -> float:
        """Network evaluations of a run, per sample.

        Args:
          tableau: the sampler.
        """
        return tableau.nfe * self.nfe_factor

    def gradients(self, tableau: Tableau) -> float:
        """Vector-Jacobian products of the network in a run, per sample.

        Args:
          tableau: the sampler.
        """
        return tableau.nfe * self.gradients_per_call

    def __call__(
        self,
        x: PyTree,
        t: Array,
        *,
        prediction: str | None = None,
        cond: Conditions | None = None,
    ) -> PyTree:
        """The transformed prediction at state x and time t; as for a `ScoreFn`.

        Args:
          x: the state, (batch, ...) or a pytree of such.
          t: the process's time, a scalar or one per sample, shape (batch,).
          prediction: what to return, any of the six names. None: what the network inside emits.
          cond: keyword arguments for the network.

        Raises:
          ValueError: as for a `ScoreFn`; or a transform that follows the rows of a tableau.
        """
        return ask(self, x, t, prediction, cond)

    def for_samples(self, numbers: Array) -> PyTree:
        """The same transform for a batch of a larger set, which matters if it draws random numbers.

        Args:
          numbers: (batch,) integers, each sample's number in the set.
        """
        inner: Bound = for_samples(self.score_fn, numbers)
        this: PyTree = self
        return self if inner is self.score_fn else dataclasses.replace(this, score_fn=inner)

    def check_bound(self, bound: Bound, level: Level, evaluates: Array) -> None:
        """As `ScoreFn.check_bound`."""
        self.score_fn.check_bound(bound.inner, level, evaluates)


def per_row(level: Level, what: str, *arrays: Array) -> list[PyTree]:
    """Arrays with one number per row, for the rows of `level`; padding rows get 0.

    For transforms that follow the rows of a tableau.

    Args:
      level: what `bind` was given.
      what: the transform, for the error.
      *arrays: (n, ...) each, of the tableau the transform was made for.

    Raises:
      ValueError: a level that is no tableau's (a single time), or one with fewer rows.
    """
    if np.ndim(level.t) == 0:
        raise ValueError(
            f"{what} follows the rows of a tableau: use it with ds.sample, not at a single time or "
            "with step-size control."
        )
    rows = np.shape(level.t)[0]
    own = max((np.shape(v)[0] for v in arrays), default=0)
    if rows < own:
        raise ValueError(f"{what} was made for {own} rows; the tableau has {rows}.")
    return [namespace(v).pad(v, [(0, rows - own)] + [(0, 0)] * (np.ndim(v) - 1)) for v in arrays]
