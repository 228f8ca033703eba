"""Transforms of a ScoreFn: guidance and thresholding.

What is not linear in the network's outputs, or needs more than one of them, is put around the
network, not into the sampler. A transform has the same two methods as `ScoreFn` (`bind` and
`predict`), so it can be sampled, searched for and wrapped again. `nfe_factor` says how many network
evaluations one of its own costs: a tableau's `nfe` counts calls of the transform.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import random
from diffsamp._numeric import as_float, namespace, silence, working_dtype
from diffsamp.predictions import Level
from diffsamp.processes import Process
from diffsamp.score import ScoreFn, for_samples, scale_rows
from diffsamp.tableau import Tableau

__all__ = [
    "Guided",
    "LearnedRange",
    "Thresholded",
    "Transform",
    "cfg",
    "dynamic_thresholding",
    "learned_range",
    "per_row",
    "static_thresholding",
]


class _GuidedBound(NamedTuple):
    inner: Any
    scale: Any


class _RangeBound(NamedTuple):
    inner: Any
    row: Any
    low: Any
    spread: Any
    per_output: Any


class _ThresholdedBound(NamedTuple):
    inner: Any
    on_state: Any
    on_data: Any


class Transform:
    """What every transform passes through to the ScoreFn inside it; for transforms of one's own.

    A subclass is a pytree with a field `score_fn`, and gives `bind` and `predict`. Every array of
    what `bind` returns has the rows in front, and a field `inner` holds the inner bound numbers.
    """

    score_fn: Any

    @property
    def process(self) -> Process:
        """The noise process of the network inside."""
        return self.score_fn.process

    @property
    def batched(self) -> bool:
        """Whether states have a batch axis."""
        return self.score_fn.batched

    @property
    def nfe_factor(self) -> int:
        """Network evaluations per call."""
        return self.score_fn.nfe_factor

    def for_samples(self, numbers: Any) -> Any:
        """The same transform for a batch of a larger set, which matters if it draws random numbers.

        Args:
          numbers: (batch,) integers, each sample's number in the set.
        """
        inner: Any = for_samples(self.score_fn, numbers)
        this: Any = self
        return self if inner is self.score_fn else dataclasses.replace(this, score_fn=inner)

    def check_bound(self, bound: Any, level: Level, evaluates: Any) -> None:
        """As `ScoreFn.check_bound`."""
        self.score_fn.check_bound(bound.inner, level, evaluates)


def per_row(level: Level, what: str, *arrays: Any) -> list[Any]:
    """Arrays with one number per row, for the rows of `level`; padding rows get 0.

    For transforms that follow the rows of a tableau.

    Args:
      level: what `bind` was given.
      what: the transform, for the error.
      *arrays: (n,) each, of the tableau the transform was made for.

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
    return [namespace(v).pad(v, (0, rows - own)) for v in arrays]


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


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Thresholded(Transform):
    """Thresholded data prediction; made by `static_thresholding` and `dynamic_thresholding`."""

    score_fn: Any
    low: Any
    high: Any
    quantile: float | None

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        return (self.score_fn, self.low, self.high), self.quantile

    @classmethod
    def tree_unflatten(cls, quantile: Any, children: tuple[Any, ...]) -> Thresholded:
        new = object.__new__(cls)
        for name, value in zip(("score_fn", "low", "high"), children, strict=True):
            object.__setattr__(new, name, value)
        object.__setattr__(new, "quantile", quantile)
        return new

    @silence
    def bind(self, level: Level, target: tuple[Any, Any]) -> _ThresholdedBound:
        """The network's data prediction, and how the row's own follows from it and the state."""
        xp = namespace(level.alpha, level.sigma)
        one, zero = xp.ones_like(level.alpha), xp.zeros_like(level.alpha)
        w0, w1 = (as_float(w, level.alpha) for w in target)
        # eps is re-derived from the clipped data: (x - alpha D) / sigma
        on_state = xp.where(w1 == 0, zero, w1 / level.sigma)
        on_data = w0 - on_state * level.alpha
        return _ThresholdedBound(self.score_fn.bind(level, (one, zero)), on_state, on_data)

    def predict(
        self, x: Any, bound: _ThresholdedBound, cond: Mapping[str, Any] | None = None
    ) -> Any:
        """The row's prediction from the clipped data prediction."""
        data = self.score_fn.predict(x, bound.inner, cond)

        def convert(leaf: jax.Array, state: jax.Array) -> jax.Array:
            clipped = self._clip(leaf.astype(working_dtype(leaf.dtype)))
            state = state.astype(clipped.dtype)
            value = scale_rows(bound.on_state, state) * state
            return (value + scale_rows(bound.on_data, clipped) * clipped).astype(leaf.dtype)

        return jax.tree.map(convert, data, x)

    def _clip(self, data: jax.Array) -> jax.Array:
        low, high = (jnp.asarray(v, data.dtype) for v in (self.low, self.high))
        if self.quantile is None:
            return jnp.clip(data, low, high)
        axes = tuple(range(1 if self.batched else 0, data.ndim))
        size = jnp.quantile(jnp.abs(data), self.quantile, axis=axes, keepdims=True)
        size = jnp.maximum(size, jnp.broadcast_to(high, size.shape))
        return jnp.clip(data, -size, size) * (high / size)


def static_thresholding(
    score_fn: ScoreFn | Transform, *, low: float = -1.0, high: float = 1.0
) -> Thresholded:
    """Clip the data prediction to [low, high] before it is used.

    For models of pixels. The noise is re-derived from the clipped data.

    Args:
      score_fn: a network or transform; put thresholding outside guidance.
      low: smallest value of the data.
      high: largest.

    Raises:
      ValueError: low is not below high.
    """
    if not low < high:
        raise ValueError(f"`low` must be below `high`; got {low} and {high}.")
    return Thresholded(score_fn, float(low), float(high), None)


def dynamic_thresholding(
    score_fn: ScoreFn | Transform, *, quantile: float = 0.995, bound: float = 1.0
) -> Thresholded:
    """Clip each sample's data prediction to its own quantile and scale it back to the bound.

    s = max(quantile of |D| over the sample, bound), D <- clip(D, -s, s) bound / s. Keeps strong
    guidance of pixel models from saturating. (The authors' and diffusers' code leave out the
    factor `bound`, which is 1 there; diffusers moreover clips s at 1 by default, which makes it
    static.)

    Args:
      score_fn: a network or transform; put thresholding outside guidance.
      quantile: in (0, 1].
      bound: largest absolute value of the data, positive.

    Raises:
      ValueError: a quantile outside (0, 1], a bound that is not positive.

    Reference: Saharia et al. 2022 (Imagen), arXiv:2205.11487, section 2.3.
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"`quantile` must lie in (0, 1]; got {quantile}.")
    if not (np.isfinite(bound) and bound > 0):
        raise ValueError(f"`bound` must be positive; got {bound}.")
    return Thresholded(score_fn, -float(bound), float(bound), float(quantile))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LearnedRange(Transform):
    """DDPM's noise with a learned variance; made by `learned_range`."""

    score_fn: Any
    key: Any
    low: Any
    spread: Any
    per_output: Any

    def for_samples(self, numbers: Any) -> LearnedRange:
        """With the keys of these samples, so that their noise does not depend on the batch."""
        key = random.typed(self.key)
        keys = key[numbers] if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
        return dataclasses.replace(self, key=keys)

    def bind(self, level: Level, target: tuple[Any, Any]) -> _RangeBound:
        """As `ScoreFn.bind`, with the numbers of each row's noise."""
        numbers = per_row(level, "learned_range", self.low, self.spread, self.per_output)
        rows = np.arange(np.shape(level.t)[0], dtype=np.int32)
        return _RangeBound(self.score_fn.bind(level, target), rows, *numbers)

    def predict(self, x: Any, bound: _RangeBound, cond: Mapping[str, Any] | None = None) -> Any:
        """The prediction, with this row's noise in it."""
        heads: list[Any] = []

        def first(*arguments: Any, **more: Any) -> Any:
            output, second = self.score_fn.apply(*arguments, **more)
            heads.append(second)
            return output

        output = dataclasses.replace(self.score_fn, apply=first).predict(x, bound.inner, cond)
        batch = jax.tree.leaves(x)[0].shape[0] if self.batched else None
        noise = random.normal_like(random.sample_keys(self.key, batch), bound.row, x)

        def add(m: jax.Array, v: jax.Array, z: jax.Array) -> jax.Array:
            share = (v.astype(working_dtype(m.dtype)) + 1) / 2
            std = jnp.exp(scale_rows(bound.low, m) + share * scale_rows(bound.spread, m))
            return (m + std * scale_rows(bound.per_output, m) * z).astype(m.dtype)

        return jax.tree.map(add, output, heads.pop(), noise)


def learned_range(score_fn: ScoreFn, tableau: Tableau, key: Any) -> LearnedRange:
    """Improved DDPM's sampler: the noise's variance from the network's second head.

    log variance = f log(beta) + (1 - f) log(beta~), elementwise, with f = (v + 1) / 2 and v the
    second head; beta~ is DDPM's "small" and beta its "large" variance. The noise depends on the
    network's output and so is drawn here, into the prediction, while the tableau
    (`solvers.ddpm(.., variance="learned")`) holds the mean.

    Example:
      >>> import jax, diffsamp as ds
      >>> process = ds.processes.vp_linear()
      >>> def apply(params, x, t):
      ...     return 0.1 * x, 0.0 * x  # the noise prediction, and v in [-1, 1]
      >>> network = ds.ScoreFn(apply, None, process, prediction="noise")
      >>> tableau = ds.solvers.ddpm(
      ...     process, ds.schedules.uniform(process, 10), variance="learned"
      ... )
      >>> ranged = ds.guidance.learned_range(network, tableau, jax.random.key(0))
      >>> x_T = process.prior_sample(jax.random.key(1), (4, 3))
      >>> ds.sample(ranged, tableau, x_T).shape
      (4, 3)

    Args:
      score_fn: a network whose `apply` returns a pair, prediction and v, each shaped like x.
      tableau: from `solvers.ddpm(process, times, variance="learned")`; sample with the same one
        (padded or not).
      key: one key, or one per sample; row n of sample i draws as `ds.sample` would with this key.

    Raises:
      ValueError: a tableau of another kind.

    Reference: Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15.
    """
    alpha, sigma = np.asarray(tableau.alpha), np.asarray(tableau.sigma)
    rows = tableau.nfe
    if tableau.stochastic or (tableau.p, tableau.q) != (1, 1) or rows != tableau.rows:
        raise ValueError(
            'learned_range needs the tableau of solvers.ddpm(process, times, variance="learned"); '
            f"got {tableau.name!r}."
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        large = np.sqrt(sigma[:-1] ** 2 - (alpha[:-1] / alpha[1:] * sigma[1:]) ** 2)
        small = large * sigma[1:] / sigma[:-1]
        noisy = small > 0
        low = np.where(noisy, np.log(np.where(noisy, small, 1)), 0)
        spread = np.where(noisy, np.log(large) - low, 0)
    per_output = np.where(noisy, 1 / np.asarray(tableau.b)[:, 0], 0)
    return LearnedRange(score_fn, key, low, spread, per_output)
