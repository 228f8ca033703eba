"""Few-step models: networks that know how far a step goes, and piecewise straight flows.

A step-conditioned flow gives the mean velocity from its time to the end of the step, so that one
DDIM step of any length, x' = x - (t - t') u, is exact for a perfect network. All it needs beside a
velocity network is the step's end as a condition, which `shortcut` and `flow_map` read off the
tableau's own times. Rectified flows are flow models; consistency models have a solver,
`solvers.consistency`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import solvers
from diffsamp._core.checks import expect_choice, expect_int
from diffsamp._core.numeric import as_float, is_concrete, namespace, silence, to_host
from diffsamp._core.types import Array, Bound, Conditions, Network, PyTree, Times, Value
from diffsamp.guidance import Transform, per_row
from diffsamp.predictions import Level
from diffsamp.processes import Process
from diffsamp.score import ScoreFn, ask
from diffsamp.tableau import Tableau

__all__ = ["Piecewise", "StepConditioned", "flow_map", "piecewise", "shortcut", "uniform_tableau"]

_LABELS = ("log2", "length", "end")


class _StepBound(NamedTuple):
    inner: Bound
    label: PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class StepConditioned(Transform):
    """A network told where each step ends; made by `shortcut` and `flow_map`."""

    score_fn: Network
    name: str = dataclasses.field(metadata={"static": True})
    label: str | Callable[[PyTree, PyTree], PyTree] = dataclasses.field(metadata={"static": True})

    @silence
    def bind(self, level: Level, target: tuple[Array, Array]) -> _StepBound:
        """As `ScoreFn.bind`, with every row's step from the tableau's own times."""
        per_row(level, "a step-conditioned network")
        t = as_float(level.t)
        xp = namespace(t)
        clean = xp.zeros_like(t[-1:]) + as_float(self.process.t_clean, t)
        end = xp.concatenate([t[1:], clean])
        return _StepBound(self.score_fn.bind(level, target), self._label(t, end))

    def __call__(
        self,
        x: PyTree,
        t: Array,
        *,
        prediction: str | None = None,
        cond: Conditions | None = None,
    ) -> PyTree:
        """As for a `ScoreFn`; the step is the one from t to the clean end."""
        t = as_float(t)
        label = jnp.asarray(self._label(t, as_float(self.process.t_clean, t)))
        label = label.astype(jnp.result_type(label, jnp.float32))
        if self.batched:
            label = jnp.broadcast_to(label, jax.tree.leaves(x)[0].shape[:1])
        return ask(self.score_fn, x, t, prediction, {**(cond or {}), self.name: label})

    def _label(self, t: Array, end: PyTree) -> PyTree:
        xp = namespace(t)
        if callable(self.label):
            label = self.label(t, end)
        elif self.label == "end":
            label = end
        else:
            length = (t - end) / as_float(self.process.t_max - self.process.t_clean, t)
            label = length if self.label == "length" else -xp.log2(length)
        return label

    def predict(self, x: PyTree, bound: _StepBound, cond: Conditions | None = None) -> PyTree:
        """The network's prediction, given the step as one more condition."""
        if cond and self.name in cond:
            raise ValueError(f"`cond` must not hold {self.name!r}: it is the step, set here.")
        label = jnp.asarray(bound.label)
        label = label.astype(jnp.result_type(label, jnp.float32))
        if self.batched:
            label = jnp.broadcast_to(label, jax.tree.leaves(x)[0].shape[:1])
        return self.score_fn.predict(x, bound.inner, {**(cond or {}), self.name: label})

    def check_bound(self, bound: Bound, level: Level, evaluates: Array) -> None:
        """As `ScoreFn.check_bound`; with log2 labels, also that steps are powers of 1/2."""
        self.score_fn.check_bound(bound.inner, level, evaluates)
        if self.label != "log2" or not is_concrete(bound, evaluates):
            return
        label = to_host(bound.label)[np.asarray(evaluates, bool)]
        if np.any(np.abs(label - np.round(label)) > 1e-4):
            worst = label[np.argmax(np.abs(label - np.round(label)))]
            raise ValueError(
                "a shortcut model takes steps of length 1, 1/2, 1/4, ..; the tableau has one of "
                f"{2.0**-worst:.6g}. Use few_step.uniform_tableau with 1, 2, 4, 8, .. evaluations."
            )


def shortcut(score_fn: ScoreFn | Transform, *, name: str = "dt") -> StepConditioned:
    """A shortcut model: its condition `name` is log2 of how many such steps fill [0, 1].

    Trained with the flow-matching label log2(128) = 7 for the smallest step. Sample with
    `uniform_tableau(process, 2**k)`. (A budget that is no power of two has no label; the authors'
    code truncates it.)

    Args:
      score_fn: a network on the flow process that takes the condition; for the authors' direction
        of time see `processes.reversed_flow_apply`.
      name: the condition's name.

    Reference: Frans et al. 2024, arXiv:2410.12557.
    """
    return StepConditioned(score_fn, name, "log2")


def flow_map(
    score_fn: ScoreFn | Transform,
    *,
    name: str = "r",
    label: str | Callable[[PyTree, PyTree], PyTree] = "end",
) -> StepConditioned:
    """A flow map or MeanFlow model: u(x, t, r), the mean velocity from t down to r.

    Args:
      score_fn: a network on the flow process that takes the condition.
      name: the condition's name.
      label: "end" (r itself), "length" (t - r), or a function of (t, r).

    Raises:
      ValueError: an unknown label.

    Reference: Geng et al. 2025 (MeanFlow), arXiv:2505.13447; Boffi et al. 2024, arXiv:2406.07507.
    """
    if not callable(label):
        expect_choice(label, "label", _LABELS)
    return StepConditioned(score_fn, name, label)


def uniform_tableau(process: Process, nfe: int) -> Tableau:
    """DDIM on times uniform over the whole process: Euler steps of a flow, one included.

    Args:
      process: the noise process.
      nfe: evaluations, at least 1.
    """
    expect_int(nfe, "nfe", at_least=1)
    times = np.linspace(process.t_max, process.t_clean, nfe + 1)
    return solvers.ddim(process, times)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Piecewise(Process):
    """alpha and sigma of another process, made linear in t between the ends of windows.

    A straight path through each window: with "velocity" as the network's prediction a DDIM step
    within a window is x' = x + (t' - t) v. Made by `piecewise`.
    """

    times: Times
    alphas: Array
    sigmas: Array

    def _linear(self, t: Array, values: Value) -> tuple[Array, Array]:
        """`values` interpolated at t, and the slope there (of the window below, at an end)."""
        t = as_float(t, self.times)
        xp = namespace(t, self.times)
        times, values = as_float(self.times, t), as_float(values, t)
        # an end of a window belongs to the window below, also when rounding has lifted it
        slack = 1e-6 * (times[-1] - times[0])
        i = xp.clip(xp.searchsorted(times + slack, t), 1, np.shape(times)[0] - 1)
        slope = (values[i] - values[i - 1]) / (times[i] - times[i - 1])
        return values[i - 1] + slope * (t - times[i - 1]), slope

    def alpha(self, t: Array) -> Array:
        return self._linear(t, self.alphas)[0]

    def sigma(self, t: Array) -> Array:
        return self._linear(t, self.sigmas)[0]

    def alpha_dot(self, t: Array) -> Array:
        return self._linear(t, self.alphas)[1]

    def sigma_dot(self, t: Array) -> Array:
        return self._linear(t, self.sigmas)[1]

    @silence
    def time(self, log_snr: Array) -> Array:
        log_snr = as_float(log_snr, self.times)
        xp = namespace(log_snr, self.times)
        times, alphas, sigmas = (
            as_float(v, log_snr) for v in (self.times, self.alphas, self.sigmas)
        )
        rho = xp.exp(-log_snr)
        i = xp.clip(xp.searchsorted(sigmas / alphas, rho), 1, np.shape(times)[0] - 1)
        step_alpha, step_sigma = alphas[i] - alphas[i - 1], sigmas[i] - sigmas[i - 1]
        # sigma_0 + u step_sigma = rho (alpha_0 + u step_alpha); rho = inf is alpha = 0
        finite = xp.isfinite(rho)
        safe = xp.where(finite, rho, xp.ones_like(rho))
        u = (safe * alphas[i - 1] - sigmas[i - 1]) / (step_sigma - safe * step_alpha)
        u = xp.where(finite, u, -alphas[i - 1] / step_alpha)
        return times[i - 1] + u * (times[i] - times[i - 1])

    @property
    def t_max(self) -> Array:
        return self.times[-1]

    @property
    def t_min(self) -> Array:
        return self.times[0] + (self.times[-1] - self.times[0]) * 1e-3

    @property
    def t_clean(self) -> Array:
        return self.times[0]


def piecewise(process: Process, windows: int) -> Piecewise:
    """The process of a piecewise rectified flow on `process`, its time cut into equal windows.

    Such a network predicts the "velocity" of the straight line through its window. Sample on times
    that include the windows' ends, one or more steps each, with solvers.ddim.

    Args:
      process: the process of the network that was rectified.
      windows: how many, at least 1; the authors' Stable Diffusion models have 4.

    Reference: Yan et al. 2024 (PeRFlow), arXiv:2405.07510.
    """
    expect_int(windows, "windows", at_least=1)
    times = np.linspace(process.t_clean, process.t_max, windows + 1)
    return Piecewise(times, as_float(process.alpha(times)), as_float(process.sigma(times)))
