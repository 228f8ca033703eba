"""Guidance that is linear in the network's outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core.numeric import as_float, namespace, working_dtype
from diffsamp.guidance.transform import Transform
from diffsamp.predictions import Level
from diffsamp.score import ScoreFn, scale_rows
from diffsamp.tableau import Tableau

__all__ = ["Guided", "cfg"]


class _GuidedBound(NamedTuple):
    inner: Any
    scale: Any


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Guided(Transform):
    """Classifier-free guidance; made by `cfg`.

    A scale that is a function may be 1 on some rows, where the null half says nothing: it is not
    asked there. That takes a branch with the network in each arm, which a constant scale does
    without.
    """

    score_fn: Any
    scale: Any
    null: Mapping[str, Any]

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        function = callable(self.scale)
        return (self.score_fn, None if function else self.scale, self.null), (
            self.scale if function else None
        )

    @classmethod
    def tree_unflatten(cls, static: Any, children: tuple[Any, ...]) -> Guided:
        score_fn, scale, null = children
        new = object.__new__(cls)
        values = score_fn, scale if static is None else static, null
        for name, value in zip(("score_fn", "scale", "null"), values, strict=True):
            object.__setattr__(new, name, value)
        return new

    @property
    def nfe_factor(self) -> int:
        """Network evaluations per call: with and without the condition."""
        return 2 * self.score_fn.nfe_factor

    def nfe(self, tableau: Tableau) -> int:
        """Network evaluations of a run, per sample: one on rows of scale 1, two on the others.

        Args:
          tableau: the sampler.
        """
        level = Level(*(v[:-1] for v in (tableau.times, tableau.alpha, tableau.sigma)))
        alone = np.asarray(self._scales(level)) == 1 if callable(self.scale) else False
        calls = np.where(tableau.evaluates, np.where(alone, 1, 2), 0)
        return int(calls.sum()) * self.score_fn.nfe_factor

    def _scales(self, level: Level) -> Any:
        scale = self.scale(level) if callable(self.scale) else self.scale
        scale = as_float(scale, level.alpha)
        if np.shape(scale) not in ((), np.shape(level.alpha)):
            raise ValueError(
                "`scale` must be one number, or a function of the level that gives one per row, "
                f"shape {np.shape(level.alpha)}; got shape {np.shape(scale)}. For a scale per "
                "sample stack tableaux (Tableau.stack), or vmap over the scale."
            )
        return scale * namespace(level.alpha, scale).ones_like(level.alpha)

    def bind(self, level: Level, target: tuple[Any, Any]) -> _GuidedBound:
        """As `ScoreFn.bind`, and the guidance scale of every row."""
        return _GuidedBound(self.score_fn.bind(level, target), self._scales(level))

    def predict(self, x: Any, bound: _GuidedBound, cond: Mapping[str, Any] | None = None) -> Any:
        """Both predictions in one call of the network, on a batch twice as long."""
        self._expect_conditions(cond)
        if not callable(self.scale):
            return self._both(x, bound, cond)
        return jax.lax.cond(
            jnp.all(bound.scale == 1),
            lambda: self.score_fn.predict(x, bound.inner, cond),
            lambda: self._both(x, bound, cond),
        )

    def _expect_conditions(self, cond: Mapping[str, Any] | None) -> None:
        if not cond:
            raise ValueError(
                "guidance needs the condition it strengthens: pass `cond`, such as "
                f"cond={{{', '.join(f'{name!r}: ..' for name in self.null)}}}."
            )
        missing = [name for name in self.null if name not in cond]
        if missing:
            raise ValueError(f"`cond` lacks {missing}, for which `null` says what no condition is.")

    def _both(self, x: Any, bound: _GuidedBound, cond: Any) -> Any:
        # each sample beside itself, so that a batch spread over devices stays where it is
        def twice(leaf: Any) -> Any:
            return jnp.repeat(leaf, 2, axis=0)

        def pair(name: str, given: Any) -> Any:
            if name not in self.null:
                return twice(given)
            empty = jnp.broadcast_to(jnp.asarray(self.null[name]).astype(given.dtype), given.shape)
            return jnp.stack([given, empty], axis=1).reshape(-1, *given.shape[1:])

        inner = jax.tree.map(lambda v: twice(jnp.asarray(v)) if jnp.ndim(v) else v, bound.inner)
        pairs = {name: pair(name, jnp.asarray(v)) for name, v in cond.items()}
        both = self.score_fn.predict(jax.tree.map(twice, x), inner, pairs)

        def combine(leaf: jax.Array) -> jax.Array:
            leaf = leaf.reshape(-1, 2, *leaf.shape[1:])
            given, free = (leaf[:, i].astype(working_dtype(leaf.dtype)) for i in (0, 1))
            return (free + scale_rows(bound.scale, free) * (given - free)).astype(leaf.dtype)

        return jax.tree.map(combine, both)


def cfg(
    score_fn: ScoreFn | Transform,
    scale: float | Callable[[Level], Any],
    null: Mapping[str, Any],
) -> Guided:
    """Classifier-free guidance: T = T_free + scale (T_given - T_free).

    Affine, so it is the same in every prediction. Both halves are one call of the network on a
    batch twice as long; `nfe_factor` is 2. Where a scale that is a function gives exactly 1, the
    network is called on the batch as it is; `nfe(tableau)` of the result says what a run costs.

    Args:
      score_fn: a conditional network, with a batch axis.
      scale: 1 is the conditional network, 0 the unconditional, above 1 guidance. Or a function of
        the `Level` (arrays over the rows) for guidance that changes along the way, such as
        `lambda level: np.where(level.sigma < 2, 3.0, 1.0)` (a limited interval; Kynkaanniemi et al.
        2024, arXiv:2404.07724).
      null: what "no condition" is, by name of the condition; broadcast to each sample. Conditions
        it does not name are given to both halves.

    Returns:
      A transform to sample with `cond=...`.

    Raises:
      ValueError: a network without a batch axis, or an empty `null`.

    Reference: Ho & Salimans 2022, arXiv:2207.12598, eq. 6, with their w = scale - 1.
    """
    if not score_fn.batched:
        raise ValueError("guidance needs a network with a batch axis, ScoreFn(batched=True).")
    if not null:
        raise ValueError('`null` must say what no condition is, such as {"label": 10}.')
    return Guided(score_fn, scale, dict(null))
