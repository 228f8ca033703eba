"""Students of a teacher's trajectories: halved steps, straightened paths, few points."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core.checks import expect_choice, expect_int, expect_times
from diffsamp._core.numeric import as_float
from diffsamp._core.types import Array, Conditions, Key, PyTree, Times
from diffsamp.processes import Flow, Process
from diffsamp.sampling import sample
from diffsamp.score import ScoreFn, scale_rows
from diffsamp.students.target import Target, ddim_step, drawn, noised, uniform, window
from diffsamp.tableau import Tableau

__all__ = ["boss", "perflow", "progressive_distillation", "reflow", "sfd"]


def _solve(
    teacher: ScoreFn, x: PyTree, ends: tuple[Array, Array], steps: int, cond: Conditions | None
) -> PyTree:
    """DDIM steps of a teacher, each sample between its own ends, uniform in log-SNR or in t."""
    start, end = ends
    process = teacher.process
    for i in range(steps):
        # uniform in the process's time: windows may end at alpha = 0 or at sigma = 0
        t = start + (end - start) * (i / steps)
        s = start + (end - start) * ((i + 1) / steps)
        data = teacher(x, t, prediction="data", cond=cond)
        x = ddim_step(process, data, x, t, s)
    return x


def _data_that_leads(process: Process, x: PyTree, end: PyTree, t: Array, s: Array) -> PyTree:
    """The data prediction whose DDIM step takes x at t to `end` at s."""
    ratio = as_float(process.sigma(s)) / as_float(process.sigma(t))
    kappa = as_float(process.alpha(s)) - as_float(process.alpha(t)) * ratio
    return jax.tree.map(
        lambda v, e: ((e - scale_rows(ratio, v) * v) / scale_rows(kappa, v)).astype(v.dtype), x, end
    )


def progressive_distillation(
    network: ScoreFn,
    key: Key,
    x_0: PyTree,
    cond: Conditions | None = None,
    *,
    times: Times,
    substeps: int = 2,
    weight: str = "truncated_snr",
) -> Target:
    """One DDIM step of the student for two (or more) of the teacher.

    Args:
      network: the teacher.
      key: random key, or one per sample.
      x_0: (batch, ...) data.
      cond: conditions, (batch, ...).
      times: (N + 1,) falling: the student's steps, of which each sample gets one.
      substeps: steps of the teacher in it.
      weight: "truncated_snr", max(SNR, 1); "snr_plus_one"; or "one".

    Returns:
      A `Target` in data.

    Reference: Salimans & Ho 2022, arXiv:2202.00512, algorithm 2.
    """
    expect_choice(weight, "weight", ("truncated_snr", "snr_plus_one", "one"))
    substeps = expect_int(substeps, "substeps", at_least=1)
    process = network.process
    keys, noise = drawn(network, key, x_0)
    _, t, s = window(times, keys)
    x = noised(process, t, x_0, noise)
    end = _solve(network, x, (t, s), substeps, cond)
    target = _data_that_leads(process, x, end, t, s)
    snr = (as_float(process.alpha(t)) / as_float(process.sigma(t))) ** 2
    weights = {
        "truncated_snr": jnp.maximum(snr, 1),
        "snr_plus_one": snr + 1,
        "one": jnp.ones_like(snr),
    }
    return jax.lax.stop_gradient(Target(x, t, dict(cond or {}), target, weights[weight], "data"))


def sfd(
    network: ScoreFn,
    key: Key,
    x_0: PyTree,
    cond: Conditions | None = None,
    *,
    times: Times,
    substeps: int = 4,
) -> Target:
    """Simple and fast distillation: a student's few points on the teacher's own trajectory.

    Unlike progressive distillation its states are those that sampling meets: a trajectory of the
    teacher from pure noise, at one of whose few points each sample is asked.

    Args:
      network: the teacher.
      key: random key, or one per sample.
      x_0: (batch, ...), for its shape: data are not needed.
      cond: conditions, (batch, ...).
      times: (N + 1,) falling from t_max: the student's few steps.
      substeps: steps of the teacher in each of them.

    Returns:
      A `Target` in data, of weight 1.

    Reference: Zhou et al. 2024 (SFD), arXiv:2409.19681.
    """
    substeps = expect_int(substeps, "substeps", at_least=1)
    process = network.process
    levels = expect_times(times)
    keys, noise = drawn(network, key, x_0)
    index, t, s = window(levels, keys)
    spread = as_float(process.sigma(jnp.float32(levels[0])))
    x = jax.tree.map(lambda e: scale_rows(spread, e) * e, noise)
    states, ends = [], []
    for start, end in itertools.pairwise(levels):
        states.append(x)
        both = tuple(jnp.full(keys.shape[:1], float(v), jnp.float32) for v in (start, end))
        x = _solve(network, x, (both[0], both[1]), substeps, cond)
        ends.append(x)

    def chosen(path: list[PyTree]) -> PyTree:
        def pick(*leaves: jax.Array) -> jax.Array:
            stacked = jnp.stack(leaves, axis=1)
            at = index.reshape((-1, 1) + (1,) * (leaves[0].ndim - 1))
            return jnp.take_along_axis(stacked, at, axis=1)[:, 0]

        return jax.tree.map(pick, *path)

    own, reached = chosen(states), chosen(ends)
    target = _data_that_leads(process, own, reached, t, s)
    return jax.lax.stop_gradient(
        Target(own, t, dict(cond or {}), target, jnp.ones(t.shape), "data")
    )


def perflow(
    network: ScoreFn,
    key: Key,
    x_0: PyTree,
    cond: Conditions | None = None,
    *,
    windows: int | Times = 4,
    steps: int = 8,
) -> Target:
    """Piecewise rectified flow: a straight line through each window of time.

    Args:
      network: the teacher, guided if wanted.
      key: random key, or one per sample.
      x_0: (batch, ...) data.
      cond: conditions, (batch, ...).
      windows: how many, of equal length in time; or their ends, (K + 1,) falling.
      steps: DDIM steps of the teacher through a window.

    Returns:
      A `Target` in velocity, the chord's slope, of weight 1. The student is a network on
      `few_step.piecewise(process, windows)` that predicts velocity.

    Reference: Yan et al. 2024, arXiv:2405.07510, algorithm 1.
    """
    process = network.process
    steps = expect_int(steps, "steps", at_least=1)
    if np.ndim(windows) == 0:
        count = expect_int(windows, "windows", at_least=1)
        windows = np.linspace(float(process.t_max), float(process.t_clean), count + 1)
    keys, noise = drawn(network, key, x_0)
    _, start, end = window(windows, keys)
    high = noised(process, start, x_0, noise)
    low = _solve(network, high, (start, end), steps, cond)
    share = uniform(keys, 2)  # of the way down
    t = start + share * (end - start)
    x = jax.tree.map(lambda a, b: a + scale_rows(share, a) * (b - a), high, low)
    target = jax.tree.map(lambda a, b: (a - b) / scale_rows(start - end, a), high, low)
    return jax.lax.stop_gradient(
        Target(x, t, dict(cond or {}), target, jnp.ones(t.shape), "velocity")
    )


def boss(
    network: ScoreFn,
    key: Key,
    x_0: PyTree,
    cond: Conditions | None = None,
    *,
    times: Times,
    steps: int = 8,
) -> Target:
    """Straightening on optimised times: `perflow` whose windows are the student's steps.

    Args:
      network: the teacher.
      key: random key, or one per sample.
      x_0: (batch, ...) data.
      cond: conditions, (batch, ...).
      times: (N + 1,) falling, such as `search.step_costs(..).schedule(N)`.
      steps: DDIM steps of the teacher through each.

    Returns:
      A `Target` in velocity, of weight 1.

    Reference: Nguyen et al. 2023 (Bellman optimal stepsize straightening), arXiv:2312.16414.
    """
    return perflow(network, key, x_0, cond, windows=expect_times(times), steps=steps)


def reflow(
    network: ScoreFn,
    key: Key,
    x_0: PyTree,
    cond: Conditions | None = None,
    *,
    tableau: Tableau,
    density: str = "uniform",
) -> Target:
    """Rectified flow's second round: straight lines between noise and what it becomes.

    Args:
      network: the flow model that makes the pairs; a straight path, `processes.flow`.
      key: random key, or one per sample.
      x_0: (batch, ...), for its shape: data are not needed.
      cond: conditions, (batch, ...).
      tableau: the sampler that makes them.
      density: of t: "uniform", or "exponential", ~ 10^t, which trains more at the noise.

    Returns:
      A `Target` in velocity, of weight 1.

    Raises:
      ValueError: another process.

    Reference: Liu et al. 2022, arXiv:2209.03003; Kim et al. 2024 (Simple ReFlow), arXiv:2410.07815,
    for the density.
    """
    expect_choice(density, "density", ("uniform", "exponential"))
    if not isinstance(network.process, Flow):
        raise ValueError("reflow straightens flows: its network needs processes.flow().")
    keys, noise = drawn(network, key, x_0)
    made = sample(network, tableau, noise, key=key if tableau.stochastic else None, cond=cond)
    t = uniform(keys, 1)
    if density == "exponential":
        t = jnp.log10(1 + 9 * t)
    x = noised(network.process, t, made, noise)
    target = jax.tree.map(lambda e, v: e - v, noise, made)
    return jax.lax.stop_gradient(
        Target(x, t, dict(cond or {}), target, jnp.ones(t.shape), "velocity")
    )
