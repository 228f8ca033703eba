"""Answers that need no network: at the highest noise they are known beforehand.

There a state is nearly all noise, and what a network says about the data hardly depends on it. Rows
at such levels are answered by a formula, a constant, or one constant per class, and cost nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core.numeric import as_float, is_concrete, silence
from diffsamp._core.types import Array, Bound, Conditions, Network, PyTree, Times
from diffsamp.guidance.transform import Transform
from diffsamp.predictions import Level
from diffsamp.score import ScoreFn, expect_score_fn, scale_rows
from diffsamp.tableau import Tableau

__all__ = ["FirstAnswer", "first_answer"]

_FAR = -5.0  # log-SNR that stands for a start without signal
_REACH = 1.0  # nats of log-SNR below which rows are first ones, by default


class _FirstBound(NamedTuple):
    inner: Bound
    level: Level
    free: Array
    w0: Array
    w1: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FirstAnswer(Transform):
    """A network that is not asked at the highest noise; made by `first_answer`."""

    score_fn: Network
    answers: PyTree
    above: Times
    by: str | None = dataclasses.field(metadata={"static": True})
    formula: Callable[[PyTree, Level, Conditions | None], PyTree] | None = dataclasses.field(
        metadata={"static": True}
    )

    @property
    def teacher(self) -> PyTree:
        """The network that is asked everywhere, which a search takes for its reference."""
        return self.score_fn

    def _free(self, t: Array) -> Array:
        return t >= as_float(self.above, t) * (1 - 1e-6)

    @silence
    def bind(self, level: Level, target: tuple[Array, Array]) -> _FirstBound:
        """As `ScoreFn.bind`, and which rows are answered here."""
        w0, w1 = (as_float(w, level.alpha) for w in target)
        at = jax.tree.map(lambda v: as_float(v, level.alpha), level)
        return _FirstBound(self.score_fn.bind(level, target), at, self._free(at.t), w0, w1)

    def check_bound(self, bound: _FirstBound, level: Level, evaluates: Array) -> None:
        """As `ScoreFn.check_bound`, for the rows that ask the network."""
        asks = np.asarray(evaluates, bool)
        if is_concrete(bound.free):
            asks = asks & ~np.asarray(bound.free)
        self.score_fn.check_bound(bound.inner, level, asks)

    def nfe(self, tableau: Tableau) -> float:
        """Network evaluations of a run, per sample: rows that are answered here cost nothing."""
        asks = np.asarray(tableau.evaluates) & ~np.asarray(
            self._free(np.asarray(tableau.times)[:-1])
        )
        return self.score_fn.nfe(dataclasses.replace(tableau, evaluates=asks))

    def predict(self, x: PyTree, bound: _FirstBound, cond: Conditions | None = None) -> PyTree:
        """The known answer, or the network's."""

        def known() -> PyTree:
            return self._known(x, bound, cond)

        def ask() -> PyTree:
            return self.score_fn.predict(x, bound.inner, cond)

        if jnp.ndim(bound.free) == 0:
            return jax.lax.cond(bound.free, known, ask)

        def choose(one: jax.Array, other: jax.Array) -> jax.Array:
            pick = jnp.reshape(bound.free, jnp.shape(bound.free) + (1,) * (one.ndim - 1))
            return jnp.where(pick, one, other)

        return jax.tree.map(choose, known(), ask())

    def _known(self, x: PyTree, bound: _FirstBound, cond: Conditions | None) -> PyTree:
        alpha, sigma = bound.level.alpha, bound.level.sigma
        if self.formula is None and self.answers is None:
            size = jnp.hypot(jnp.asarray(alpha), jnp.asarray(sigma))
            share = bound.w0 * alpha / (size * (size + sigma)) + bound.w1 / size
            return jax.tree.map(lambda v: (scale_rows(share, v) * v).astype(v.dtype), x)
        if self.formula is not None:
            data = self.formula(x, bound.level, cond)
        elif self.by is None:
            data = jax.tree.map(lambda a, v: jnp.broadcast_to(a, v.shape), self.answers, x)
        else:
            if self.by not in (cond or {}):
                raise ValueError(
                    f"the first answer depends on the condition {self.by!r}: pass `cond` with it."
                )
            group = jnp.asarray((cond or {})[self.by])
            data = jax.tree.map(lambda a, v: jnp.broadcast_to(a[group], v.shape), self.answers, x)
        # w0 D + w1 (x - alpha D) / sigma
        on_x = bound.w1 / sigma
        on_data = bound.w0 - on_x * alpha

        def combine(v: jax.Array, d: jax.Array) -> jax.Array:
            return (scale_rows(on_x, v) * v + scale_rows(on_data, v) * d).astype(v.dtype)

        return jax.tree.map(combine, x, data)


def first_answer(
    score_fn: ScoreFn | Transform,
    answer: str | PyTree | Callable[[PyTree, Level, Conditions | None], PyTree] = "linear",
    *,
    by: str | None = None,
    above: float | None = None,
) -> FirstAnswer:
    """Rows at the highest noise are answered without the network, and cost no evaluation.

    At 3 or 4 evaluations the first one is the dearest: it is spent where the answer is known. Give
    the sampler one row more; `score_fn.nfe(tableau)` of the result counts what a run costs, and
    every search takes it.

    Examples:
      >>> import jax, jax.numpy as jnp, diffsamp as ds
      >>> process = ds.processes.edm()
      >>> target = ds.targets.gaussian([0.3, -0.2], [0.04, 0.2])
      >>> network = target.score_fn(process)
      >>> free = ds.guidance.first_answer(network, jnp.array([0.3, -0.2]))
      >>> tableau = ds.solvers.dpmpp(process, ds.schedules.logsnr(process, 5), order=2)
      >>> free.nfe(tableau)
      4

    Args:
      score_fn: the network.
      answer: what it would say. "linear": the noise is x / sqrt(alpha^2 + sigma^2), the analytic
        first step (exact for data of mean 0 and standard deviation 1). An array shaped like a
        sample: the data prediction, such as its mean (`search.first_answers` measures it). With
        `by`, one per value of that condition, (groups, ...). Or a function (x, level, cond) -> data
        prediction: with the posterior mean of a Gaussian fitted to the data
        (`targets.gaussian(..).posterior`) and several rows, Gaussian teleportation.
      by: name of an integer condition in `cond`, (batch,) or (), that chooses the answer.
      above: rows at this time or a larger one are answered; None: within one nat of log-SNR of
        t_max.

    Raises:
      TypeError: no network.
      ValueError: another text, a `by` without an array, or a time outside the process.

    Reference: Dockhorn, Vahdat & Kreis 2022 (GENIE), arXiv:2210.05475, for the linear one; Wang &
    Vastola 2024, arXiv:2412.09726, for the Gaussian.
    """
    expect_score_fn(score_fn)
    process = score_fn.process
    if above is None:
        highest = max(float(process.log_snr(process.t_max)), _FAR)
        above = float(process.time(highest + _REACH))
    if is_concrete(above) and not process.t_clean < float(above) <= float(process.t_max):
        raise ValueError(
            f"`above` must be a time of the process, in ({float(process.t_clean):g}, "
            f"{float(process.t_max):g}]; got {above}."
        )
    formula = answer if callable(answer) else None
    if isinstance(answer, str) and answer != "linear":
        raise ValueError(f'`answer` must be "linear", an array or a function; got {answer!r}.')
    arrays = (
        None if callable(answer) or isinstance(answer, str) else jax.tree.map(jnp.asarray, answer)
    )
    if by is not None and arrays is None:
        raise ValueError(
            "`by` chooses among constant answers: give an array of them, (groups, ..)."
        )
    return FirstAnswer(score_fn, arrays, above, by, formula)
