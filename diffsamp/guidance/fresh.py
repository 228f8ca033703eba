"""The fresh noise of a row as a function: drawn here, into the prediction."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from diffsamp import predictions
from diffsamp._core import random
from diffsamp._core.numeric import as_float, is_concrete, namespace, silence, working_dtype
from diffsamp._core.types import Array, Bound, Conditions, Key, Network, PyTree
from diffsamp.guidance._numbers import as_partial
from diffsamp.guidance._terms import without
from diffsamp.guidance.transform import Transform, per_row
from diffsamp.predictions import Level
from diffsamp.score import ScoreFn, scale_rows
from diffsamp.tableau import Tableau

__all__ = ["Fresh", "Redrawn", "dsg", "redraw"]


class Fresh(NamedTuple):
    """What the noise of a row may depend on.

    Attributes:
      x: the state, in at least float32.
      data: the data prediction, likewise.
      pull: a gradient by it -> the gradient by the state, one vector-Jacobian product.
      level: the row's level.
      row: its number.
      cond: the conditions.
    """

    x: PyTree
    data: PyTree
    pull: Callable[[PyTree], PyTree]
    level: Level
    row: Array
    cond: Conditions | None


class _RedrawnBound(NamedTuple):
    inner: Bound
    level: Level
    row: Array
    per_output: Array
    r: Array
    s: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Redrawn(Transform):
    """A network whose rows draw a noise of their own; made by `redraw`."""

    score_fn: Network
    f: Partial
    key: Key
    per_output: Array
    pulls: int = dataclasses.field(metadata={"static": True})
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @property
    def gradients_per_call(self) -> float:
        """Vector-Jacobian products of the network per call."""
        inner = getattr(self.score_fn, "gradients_per_call", 0)
        return inner + self.pulls * self.score_fn.nfe_factor

    def for_samples(self, numbers: Array) -> Redrawn:
        """As `Transform.for_samples`, with the keys of these samples."""
        new: Redrawn = super().for_samples(numbers)
        key = random.typed(new.key)
        fold = jax.vmap(jax.random.fold_in, (None, 0))
        return dataclasses.replace(new, key=key[numbers] if key.ndim else fold(key, numbers))

    @silence
    def bind(self, level: Level, target: tuple[Array, Array]) -> _RedrawnBound:
        """The data prediction, the way back, and the row's own numbers."""
        xp = namespace(level.alpha, level.sigma)
        zero, one = xp.zeros_like(level.alpha), xp.ones_like(level.alpha)
        w0, w1 = (as_float(w, level.alpha) for w in target)
        r, s = predictions.conversion((one, zero, one), (w0, w1, one), level.alpha, level.sigma)
        per_output = per_row(level, "a noise by row", self.per_output)[0]
        rows = np.arange(np.shape(level.t)[0], dtype=np.int32)
        at = jax.tree.map(lambda v: as_float(v, level.alpha), level)
        return _RedrawnBound(self.score_fn.bind(level, (one, zero)), at, rows, per_output, r, s)

    def predict(self, x: PyTree, bound: _RedrawnBound, cond: Conditions | None = None) -> PyTree:
        """The row's prediction, with its noise in it."""
        own = without(cond, self.names)
        wide = jax.tree.map(lambda v: v.astype(working_dtype(v.dtype)), x)

        def ask(state: PyTree) -> PyTree:
            narrow = jax.tree.map(lambda v, like: v.astype(like.dtype), state, x)
            said = self.score_fn.predict(narrow, bound.inner, own)
            return jax.tree.map(lambda v, like: v.astype(like.dtype), said, state)

        data, back = jax.vjp(ask, wide) if self.pulls else (ask(wide), _no_gradient)
        batch = jax.tree.leaves(x)[0].shape[0] if self.batched else None
        z = random.normal_like(random.sample_keys(self.key, batch), bound.row, wide)
        told = Fresh(wide, data, lambda v: back(v)[0], bound.level, bound.row, cond)
        noise = self.f(z, told)

        def add(d: jax.Array, v: jax.Array, e: jax.Array, like: jax.Array) -> jax.Array:
            value = scale_rows(bound.r, d) * v + scale_rows(bound.s, d) * d
            return (value + scale_rows(bound.per_output, d) * e).astype(like.dtype)

        return jax.tree.map(add, data, wide, noise, x)


def _no_gradient(_: PyTree) -> PyTree:
    raise ValueError("this noise was said to need no gradient of the network: pass pulls=1.")


def redraw(
    score_fn: ScoreFn | Transform,
    tableau: Tableau,
    f: Callable[[PyTree, Fresh], PyTree],
    key: jax.Array,
    *,
    pulls: int = 0,
    names: Sequence[str] = (),
) -> tuple[Redrawn, Tableau]:
    """A sampler whose fresh noise is a function: x' = its mean + c f(z, ..).

    Args:
      score_fn: a network or transform; put this outside all others.
      tableau: a sampler that adds noise, of one state and one output a row.
      f: (z, `Fresh`) -> noise shaped like the state, z standard normal. `lambda z, told: z` is the
        tableau itself, with the noise that `ds.sample` draws from this key.
      key: one, or one per sample.
      pulls: how many gradients of the network f takes with `told.pull`, which are counted.
      names: entries of `cond` that are for f alone.

    Returns:
      (transform, tableau), to be sampled together, without a key.

    Raises:
      ValueError: rows that use earlier states or outputs, or that draw noise and ask nothing.
    """
    if not is_concrete(tableau):
        raise TypeError("redraw is a host function: call it outside `jit`.")
    a, b, c = (np.asarray(v) for v in (tableau.a, tableau.b, tableau.c))
    noisy = c != 0
    if np.any(a[:, 1:] != 0) or np.any(b[:, 1:] != 0) or np.ndim(tableau.times) != 1:
        raise ValueError(
            f"redraw needs rows of one state and one output; {tableau.name!r} combines several. "
            "Take solvers.ddpm, ddim with noise, or renoise."
        )
    if np.any(noisy & ((b[:, 0] == 0) | ~np.asarray(tableau.evaluates))):
        raise ValueError("redraw needs every row that adds noise to move with its prediction.")
    per_output = np.where(noisy, c / np.where(noisy, b[:, 0], 1.0), 0.0)
    made = Redrawn(score_fn, as_partial(f, "f"), key, per_output, pulls, tuple(names))
    return made, dataclasses.replace(tableau, c=np.zeros_like(c), name=f"{tableau.name}, redrawn")


def dsg(
    score_fn: ScoreFn | Transform,
    f: Callable[[PyTree, Level, Mapping[str, PyTree] | None], PyTree],
    tableau: Tableau,
    key: jax.Array,
    *,
    share: float = 0.1,
    names: Sequence[str] = (),
) -> tuple[Redrawn, Tableau]:
    """DSG: a row's noise turned towards the descent of a loss, its length that of noise.

    The noise becomes sqrt(d) m / |m| with m = (1 - share) z - share sqrt(d) g / |g|, g the gradient
    of f(D(x)) by the state and d the number of elements, per sample. share = 0 is the tableau with
    noise on the sphere.

    Args:
      score_fn: a network or transform, with a batch axis.
      f: (D, level, cond) -> (batch,), as for `loss`.
      tableau: a sampler that adds noise, of one output a row; the paper's is `solvers.ddpm`.
      key: one, or one per sample.
      share: the paper's guidance rate, in [0, 1]; 0.1 to 0.2.
      names: entries of `cond` for f alone.

    Returns:
      (transform, tableau), to be sampled together, without a key.

    Raises:
      ValueError: a share outside [0, 1], or as for `redraw`.

    Reference: Yang et al. 2024, arXiv:2402.03201, algorithm 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"`share` must lie in [0, 1]; got {share}.")
    turned = Partial(_turned, as_partial(f, "f"), float(share))
    return redraw(score_fn, tableau, turned, key, pulls=1, names=names)


def _turned(f: PyTree, share: PyTree, z: PyTree, told: Fresh) -> PyTree:
    slope = jax.grad(lambda d: jnp.sum(f(d, told.level, told.cond)))(told.data)
    gradient = told.pull(slope)
    root = np.sqrt(sum(np.prod(v.shape[1:]) for v in jax.tree.leaves(z)))

    def on_sphere(tree: PyTree) -> PyTree:
        squares = [jnp.sum(v * v, axis=tuple(range(1, v.ndim))) for v in jax.tree.leaves(tree)]
        size = jnp.sqrt(functools.reduce(jnp.add, squares))
        long = jnp.where(size > 0, float(root) / jnp.where(size > 0, size, 1), 0)
        return jax.tree.map(lambda v: v * scale_rows(long, v), tree)

    mixed = jax.tree.map(
        lambda e, g: scale_rows(1 - share, e) * e - scale_rows(share, g) * g,
        z,
        on_sphere(gradient),
    )
    return on_sphere(mixed)
