"""The descent of `distill`: one problem, and what is learned from a start of it."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core import random
from diffsamp._core.sharding import put
from diffsamp._core.types import Key, PyTree, Sharding, Value
from diffsamp.score import ScoreFn
from diffsamp.search._gradient import arrays_of, fit_step, scales_of
from diffsamp.search.canonical import canonical
from diffsamp.search.explicit import own_start
from diffsamp.search.objective import Objective
from diffsamp.search.running import Progress, run, slice_batch
from diffsamp.tableau import Tableau

__all__ = ["Candidate", "Problem"]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Learned changes `moved` of a start whose numbers are `fixed`, and how good they are.

    `scale` is what x_T is multiplied by: 1 for samplers that begin at t_max.
    """

    fixed: PyTree
    moved: PyTree
    value: float
    history: tuple[tuple[int, float, float], ...]
    scale: float = 1.0
    steps: int = 0  # that were made to get there


@dataclasses.dataclass(frozen=True)
class Problem:
    """What stays the same over the starts of one search: fit on [0, fit), stop on [fit, stop)."""

    score_fn: ScoreFn
    x_T: PyTree
    cond: PyTree
    reference: PyTree
    fit: int
    stop: int
    batch: int
    key: Key
    optimizer: Value
    objective: Objective
    free: set[str] | None  # None: everything
    memory: int | None
    radius: float
    checkpoint: bool
    pieces: int
    evaluate_every: int
    sharding: Sharding

    def arrays(self, candidate: Candidate) -> dict[str, PyTree]:
        """The tableau's arrays, float64 on the host."""
        return arrays_of(candidate.moved, candidate.fixed, self.score_fn.process, host=True)

    def samples(self, candidate: Candidate, first: int, last: int) -> PyTree:
        """Samples first .. last - 1; NaN if the numbers themselves are not finite."""
        arrays = self.arrays(candidate)
        x_T = _scaled(slice_batch(self.x_T, first, last), candidate.scale)
        if not all(np.all(np.isfinite(array)) for array in arrays.values()):
            return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), x_T)
        tableau = Tableau.create(**arrays, check="none")
        return run(
            self.score_fn,
            tableau,
            x_T,
            key=self.noise[first:last] if tableau.stochastic else None,
            cond=slice_batch(self.cond, first, last),
            batch=self.batch,
            sharding=self.sharding,
        )

    @functools.cached_property
    def noise(self) -> Key:
        """(n,) keys of the noise with which samplers are looked at: the same at every look."""
        size = jax.tree.leaves(self.x_T)[0].shape[0]
        return random.sample_keys(jax.random.fold_in(self.key, 1), size)

    def cost(self, found: Candidate, start: Tableau) -> float:
        """Network evaluations of `descend`: a gradient counts as two, looks as what they run."""
        looks = len(found.history) * (self.stop - self.fit)
        return self.score_fn.nfe(start) * (3 * self.batch * found.steps + looks)

    def value(self, candidate: Candidate) -> float:
        """The objective on the stopping samples; inf if anything is not finite."""
        x = self.samples(candidate, self.fit, self.stop)
        reference, cond = (slice_batch(v, self.fit, self.stop) for v in (self.reference, self.cond))
        return self.objective(x, reference, cond)

    def descend(
        self,
        start: Tableau,
        steps: int,
        patience: int | None = None,
        progress: Progress | None = None,
    ) -> Candidate:
        """Gradient descent from `start`; the best candidate seen on the stopping samples."""
        start, scale = own_start(start)
        base = canonical(start, self.score_fn.process)
        if self.free is not None and "labels" in self.free:
            base.setdefault("labels", np.zeros(start.nfe))
        ends = {
            k: np.asarray(getattr(start, k))[[0, start.nfe]] for k in ("times", "alpha", "sigma")
        }
        free = set(base) if self.free is None else self.free & set(base)
        if not free:
            raise ValueError(f"tableau {start.name!r} has none of the numbers to learn.")
        scales = scales_of(base, start)
        if self.memory is not None:
            lag = np.subtract.outer(np.arange(start.nfe), np.arange(start.nfe))
            scales["weights"] = scales["weights"] * (lag < self.memory)
        moved = {name: jnp.zeros(base[name].shape, jnp.float32) for name in sorted(free)}
        state = self.optimizer.init(moved)
        best = Candidate((base, ends, scales), moved, np.inf, (), scale)
        best = dataclasses.replace(best, value=self.value(best))
        history = [(0, float("nan"), best.value)]
        key, since_gain, order = self.key, 0, np.arange(0)
        fresh = jax.random.fold_in(self.key, 2) if "noise" in base else None
        fit_x = _scaled(slice_batch(self.x_T, 0, self.fit), scale)
        own = fit_x if self.radius else None  # the starts, as far as they have moved
        for step in range(1, steps + 1):
            if order.size < self.batch:
                key, key_epoch = jax.random.split(key)
                order = np.asarray(jax.random.permutation(key_epoch, self.fit))
            index, order = order[: self.batch], order[self.batch :]

            def pick(tree: PyTree, at: PyTree = index) -> PyTree:
                return put(jax.tree.map(lambda leaf: leaf[at], tree), self.sharding)

            moved, state, loss, new = fit_step(
                moved,
                state,
                best.fixed,
                self.score_fn,
                pick(fit_x),
                pick(own),
                pick(self.cond),
                pick(self.reference),
                fresh
                if fresh is None
                else random.sample_keys(jax.random.fold_in(fresh, step), self.batch),
                loss_of_samples=self.objective.loss_of,
                optimizer=self.optimizer,
                checkpoint=self.checkpoint,
                radius=self.radius,
                pieces=self.pieces,
            )
            if own is not None:
                own = jax.tree.map(lambda all_, part, at=index: all_.at[at].set(part), own, new)
            if step % self.evaluate_every == 0 or step == steps:
                now = dataclasses.replace(best, moved=moved)
                value = self.value(now)
                history.append((step, float(loss), value))
                since_gain = 0 if value < best.value else since_gain + 1
                if value < best.value:
                    best = dataclasses.replace(now, value=value)
                lost = not np.isfinite(float(loss))  # nothing finite comes after
                if lost or (patience is not None and since_gain >= patience):
                    break
            if progress is not None:
                progress("distilling", step, steps)
        return dataclasses.replace(best, history=tuple(history), steps=step)


def _scaled(x: PyTree, scale: float) -> PyTree:
    return x if scale == 1 else jax.tree.map(lambda leaf: leaf * scale, x)
