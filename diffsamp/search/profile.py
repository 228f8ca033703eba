"""Schedules from a profile of the network: where its trajectories bend.

A profile says how much happens in every step of a fine grid; the schedule of n steps puts as much
in each. It is measured once, for every n:

- `sharp_euler`: how fast the velocity changes (Gupta et al. 2026, SharpEuler, arXiv:2605.11547);
- `tors`: by how much the trajectory's frame turns (Zhou et al. 2026, TORS, arXiv:2603.00763).

Both are stated for flow models. Other processes are looked at in the coordinates of the flow of the
same log-SNR, y = x / (alpha + sigma) at u = sigma / (alpha + sigma), where dy/du = eps - x_0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from diffsamp import solvers
from diffsamp._core.checks import expect_int, expect_times
from diffsamp._core.sharding import expect_sharding, on_mesh, put
from diffsamp._core.types import Conditions, PyTree, Sharding, Times
from diffsamp.processes import Process
from diffsamp.sampling import trajectory
from diffsamp.score import ScoreFn
from diffsamp.search._cost import Estimate, affordable, announce, expect_limit
from diffsamp.search.running import Progress, expect_batch, slice_batch
from diffsamp.tableau import Tableau

__all__ = ["Profile", "sharp_euler", "tors"]

_STRAIGHT = 1e-3  # radians: the plane of a step that turns by less is lost in float32's rounding
_ROUNDING = 1e-3  # of the velocity: what it changes by, in all, is no more than rounding


@dataclasses.dataclass(frozen=True)
class Profile:
    """How much happens between the points of a fine grid.

    Call it as a schedule, profile(process, n), or use `schedule`.

    Attributes:
      times: (M + 1,) fine times, falling.
      amount: (M,) in each step between them, not negative: radians for `tors`; for `sharp_euler` in
        units of which only ratios matter.
      evaluations: of the network that measuring took, per sample and call.
      estimate: what was said of it before it began.
    """

    times: np.ndarray
    amount: np.ndarray
    evaluations: float = 0
    estimate: Estimate | None = None

    def schedule(self, n: int) -> np.ndarray:
        """The n + 1 times between which equal amounts lie; linear within a fine step.

        Args:
          n: steps, at least 1.
        """
        n = expect_int(n, "n", at_least=1)
        before = np.concatenate([[0.0], np.cumsum(self.amount)])
        times = np.interp(np.linspace(0, before[-1], n + 1), before, self.times)
        times[0], times[-1] = self.times[0], self.times[-1]
        return expect_times(times)

    def __call__(self, process: Process, n: int) -> np.ndarray:
        """`schedule(n)`: the signature of `diffsamp.schedules`; the process is known already."""
        del process
        return self.schedule(n)


def sharp_euler(
    score_fn: ScoreFn,
    x_T: PyTree,
    *,
    points: int = 100,
    times: Times = None,
    power: float = 0.5,
    smooth: float = 0.01,
    cond: Conditions | None = None,
    batch: int = 64,
    evaluations: int | None = None,
    sharding: Sharding = None,
    progress: Progress | None = None,
) -> Profile:
    """A profile by how fast the velocity changes along Euler's trajectory on a fine grid.

    Euler's error in a step of length h is h^2 / 2 |dv/du|, and is the same in all steps if their
    density is |dv/du|^(1/2). The norm's mean over the starts is raised to `power` and smoothed.

    Args:
      score_fn: the network, batched.
      x_T: (n, ...) starts at t_max, an array.
      points: M, of a grid uniform in u (the flow's time).
      times: the fine grid, (M + 1,) falling, in place of it.
      power: of the mean norm.
      smooth: standard deviation of the Gaussian, in u; 0: none.
      cond: keyword arguments for the network, every array with the leading axis n.
      batch: samples at a time: 2 M x `batch` states are in memory.
      evaluations: spend at most so many network evaluations, on fewer starts; None: all.
      sharding: over the batch axis, as for `run`.
      progress: called with (what, done, total).

    Returns:
      A `Profile`.

    Raises:
      ValueError: a trajectory that is not finite or straight, a power or a smoothing that is
        negative, times that do not fall, or a limit that is too low for one start.

    Reference: Gupta, Yu, Erichson & Lim 2026, arXiv:2605.11547.
    """
    if not (power >= 0 and smooth >= 0):
        raise ValueError(f"`power` and `smooth` must not be negative; got {power} and {smooth}.")
    times = _fine(score_fn.process, points) if times is None else expect_times(times)
    tableau = solvers.ddim(score_fn.process, times)
    run = _Run.of("sharp_euler", score_fn, tableau, x_T, cond, batch, evaluations, sharding)
    length, total, speed = -np.diff(run.variable), np.zeros(tableau.rows - 1), 0.0
    for _, velocity in run.paths(progress):
        total += np.sqrt(np.mean(np.diff(velocity, axis=0) ** 2, axis=2)).sum(axis=1)
        speed += np.sqrt(np.mean(velocity**2, axis=(0, 2))).sum()
    run.expect_turns(total.sum() > _ROUNDING * speed)
    rate = (total / run.size / length[:-1]) ** power
    if smooth > 0:
        middle = (run.variable[:-2] + run.variable[1:-1]) / 2
        kernel = np.exp(-0.5 * (np.subtract.outer(middle, middle) / smooth) ** 2) * length[:-1]
        rate = (kernel @ rate) / kernel.sum(axis=1)
    return run.profile(rate)


def tors(
    score_fn: ScoreFn,
    x_T: PyTree,
    *,
    points: int = 100,
    times: Times = None,
    torsion: bool = True,
    cond: Conditions | None = None,
    batch: int = 64,
    evaluations: int | None = None,
    sharding: Sharding = None,
    progress: Progress | None = None,
) -> Profile:
    """A profile by how far the trajectory's frame turns: constant total rotation.

    Each trajectory is looked at in three dimensions, the line between its ends and the two
    principal directions of what lies beside it. By Frenet and Serret its tangent turns by kappa and
    its plane by tau per unit of length, its frame by sqrt(kappa^2 + tau^2): the angle between the
    velocities at the ends of a fine step, and between the planes of neighbouring steps. The angles
    of a step are averaged over the starts. A Gaussian's trajectories are planar and turn by what
    kappa says; a straight trajectory turns nowhere, and has no such schedule.

    Args:
      score_fn: the network, batched.
      x_T: (n, ...) starts at t_max, an array.
      points: M, of a grid uniform in u (the flow's time).
      times: the fine grid, (M + 1,) falling, in place of it.
      torsion: False: kappa alone. Where a trajectory is nearly straight, tau can be large.
      cond: keyword arguments for the network, every array with the leading axis n.
      batch: samples at a time: 2 M x `batch` states are in memory.
      evaluations: spend at most so many network evaluations, on fewer starts; None: all.
      sharding: over the batch axis, as for `run`.
      progress: called with (what, done, total).

    Returns:
      A `Profile`, in radians.

    Raises:
      ValueError: a trajectory that is not finite or straight, times that do not fall, or a limit
        that is too low for one start.

    Reference: Zhou, Chen, Lyu, Chen & Wang 2026, arXiv:2603.00763. The discrete angles, the fine
    solver (UniPC of order 3) and the mean over starts are ours.
    """
    times = _fine(score_fn.process, points) if times is None else expect_times(times)
    tableau = solvers.unipc(score_fn.process, times, order=3)
    run = _Run.of("tors", score_fn, tableau, x_T, cond, batch, evaluations, sharding)
    total = np.zeros(len(times) - 2)
    for states, velocity in run.paths(progress):
        for i in range(states.shape[1]):
            total += _rotation(_in_three(states[:, i], velocity[:, i]), torsion)
    run.expect_turns(total.sum() > _ROUNDING * run.size)
    return run.profile(total / run.size / -np.diff(run.variable[:-1]))


def _fine(process: Process, points: int) -> np.ndarray:
    """(M + 1,) times from t_max to the clean end, uniform in u."""
    points = expect_int(points, "points", at_least=4)
    highest, lowest = float(process.t_max), float(process.t_min)
    u = np.linspace(_variable(process, np.array([highest]))[0], 0.0, points + 1)
    inner = np.asarray(process.time(np.log1p(-u[1:-1]) - np.log(u[1:-1])), np.float64)
    inner = inner[(inner > lowest) & (inner < highest)]
    return expect_times(np.concatenate([[highest], inner, [float(process.t_clean)]]))


def _variable(process: Process, times: np.ndarray) -> np.ndarray:
    """u of times."""
    alpha, sigma = (np.asarray(f(times), np.float64) for f in (process.alpha, process.sigma))
    return sigma / (alpha + sigma)


@dataclasses.dataclass(frozen=True)
class _Run:
    """A fine trajectory of every start, a batch at a time, and what it costs."""

    score_fn: ScoreFn
    tableau: Tableau
    x_T: PyTree
    cond: PyTree
    batch: int
    sharding: Sharding
    spent: float
    estimate: Estimate

    @classmethod
    def of(
        cls,
        what: str,
        score_fn: ScoreFn,
        tableau: Tableau,
        x_T: PyTree,
        cond: Conditions | None,
        batch: int,
        evaluations: int | None,
        sharding: Sharding,
    ) -> _Run:
        size = expect_batch(x_T, cond)
        batch = min(expect_int(batch, "batch", at_least=1), size)
        expect_sharding(sharding, batch if batch < size else None)
        score_fn = on_mesh(score_fn, sharding)
        each = score_fn.nfe(tableau)
        limit, timed = expect_limit(evaluations), 2 * score_fn.nfe_factor
        size = affordable(what, size, each + timed * np.isfinite(limit), limit)
        batch = min(batch, size)
        few, own = slice_batch(x_T, 0, size), slice_batch(cond, 0, size)
        estimate, spent = announce(
            what,
            score_fn,
            few,
            own,
            evaluations=size * each,
            batch=batch,
            states=2 * tableau.rows * batch / size,
            sharding=sharding,
        )
        spent += size * each
        return cls(score_fn, tableau, few, own, batch, sharding, spent, estimate)

    @property
    def size(self) -> int:
        return int(jax.tree.leaves(self.x_T)[0].shape[0])

    @property
    def variable(self) -> np.ndarray:
        """(M + 1,) u of the fine times."""
        return np.asarray(self.tableau.sigma / (self.tableau.alpha + self.tableau.sigma))

    def paths(self, progress: Progress | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches of y (M + 1, n, elements) and of dy/du (M, n, elements), in float64."""
        for start in range(0, self.size, self.batch):
            stop = min(start + self.batch, self.size)
            x, own = (
                put(slice_batch(v, start, stop), self.sharding) for v in (self.x_T, self.cond)
            )
            path = trajectory(self.score_fn, self.tableau, x, cond=own)
            points, data = (
                np.asarray(v, np.float64).reshape(len(v), stop - start, -1)
                for v in (path.points, path.outputs)
            )
            if not np.all(np.isfinite(points)):
                raise ValueError(
                    "the fine trajectory is not finite: the network returned NaN or inf. Look at "
                    "its samples with a fine solver first."
                )
            alpha, sigma = (v[:, None, None] for v in (self.tableau.alpha, self.tableau.sigma))
            noise = (points[:-1] - alpha[:-1] * data) / sigma[:-1]
            if progress is not None:
                progress("measuring the trajectory", stop, self.size)
            yield points / (alpha + sigma), noise - data

    def expect_turns(self, turns: bool) -> None:
        """Raise unless the trajectories turn by more than rounding explains."""
        if not turns:
            raise ValueError(
                "the trajectories are straight: every schedule is as good, and none follows."
            )

    def profile(self, rate: np.ndarray) -> Profile:
        """From what happens per unit of u in all steps but the last, which is as the one before."""
        rate = np.append(rate, rate[-1])
        amount = rate * -np.diff(self.variable)
        return Profile(self.tableau.times, amount, self.spent, self.estimate)


def _in_three(states: np.ndarray, velocity: np.ndarray) -> np.ndarray:
    """(M, 3) the velocities of one trajectory in the space that holds most of it.

    Directions in which it moves by no more than rounding are left out, as zeros.
    """
    moved = states - states[0]
    size = np.linalg.norm(moved[-1])
    line = moved[-1] / size if size > 0 else moved[-1]
    beside = moved - np.outer(moved @ line, line)
    squares, vectors = np.linalg.eigh(beside @ beside.T)
    found = [velocity @ line]
    for k in (-1, -2):
        length = np.sqrt(max(squares[k], 0.0))
        known = length > 1e-5 * np.linalg.norm(moved)
        along = velocity @ (beside.T @ vectors[:, k]) / length if known else 0 * found[0]
        found.append(along)
    return np.stack(found, axis=1)


def _rotation(velocity: np.ndarray, torsion: bool) -> np.ndarray:
    """(M - 1,) by how much the frame turns between velocities (M, 3), in radians."""
    planes = np.cross(velocity[:-1], velocity[1:])
    turned = np.arctan2(
        np.linalg.norm(planes, axis=1), np.sum(velocity[:-1] * velocity[1:], axis=1)
    )
    if not torsion:
        return turned
    twist = np.arctan2(
        np.linalg.norm(np.cross(planes[:-1], planes[1:]), axis=1),
        np.abs(np.sum(planes[:-1] * planes[1:], axis=1)),  # a plane has no sign
    )
    known = turned > _STRAIGHT
    twist = np.where(known[:-1] & known[1:], twist, 0.0)
    # between two steps; half of it in each, at the ends all that there is
    twisted = np.append(twist[:1], (twist[:-1] + twist[1:]) / 2)
    return np.hypot(turned, np.append(twisted, twist[-1:]))
