"""Guidance that is linear in the network's outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffsamp._core.numeric import as_float, namespace, working_dtype
from diffsamp.guidance.transform import Transform
from diffsamp.predictions import Level
from diffsamp.score import ScoreFn, scale_rows

__all__ = ["Guided", "cfg"]


class _GuidedBound(NamedTuple):
    inner: Any
    scale: Any


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Guided(Transform):
    """Classifier-free guidance; made by `cfg`."""

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

    def bind(self, level: Level, target: tuple[Any, Any]) -> _GuidedBound:
        """As `ScoreFn.bind`, and the guidance scale of every row."""
        scale = self.scale(level) if callable(self.scale) else self.scale
        scale = as_float(scale, level.alpha)
        ones = namespace(level.alpha, scale).ones_like(level.alpha)
        return _GuidedBound(self.score_fn.bind(level, target), scale * ones)

    def predict(self, x: Any, bound: _GuidedBound, cond: Mapping[str, Any] | None = None) -> Any:
        """Both predictions in one call of the network, on a batch twice as long."""
        if not cond:
            raise ValueError(
                "guidance needs the condition it strengthens: pass `cond`, such as "
                f"cond={{{', '.join(f'{name!r}: ..' for name in self.null)}}}."
            )
        missing = [name for name in self.null if name not in cond]
        if missing:
            raise ValueError(f"`cond` lacks {missing}, for which `null` says what no condition is.")

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
    batch twice as long; `nfe_factor` is 2.

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
