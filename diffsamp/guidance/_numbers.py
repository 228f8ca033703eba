"""Numbers that a transform takes per row, per sample or once: scales, weights, gains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core.numeric import as_float, namespace, working_dtype
from diffsamp._core.types import Array, Bound, Conditions, PyTree, Value
from diffsamp.guidance.transform import per_row
from diffsamp.predictions import Level

__all__ = ["Mixture", "Numbers", "as_partial", "mixture", "scale_numbers", "weight_numbers"]


def as_partial(f: Callable[..., PyTree], what: str) -> jax.tree_util.Partial:
    """A function as a pytree: itself static, the arguments bound to it leaves.

    Raises:
      TypeError: not a function.
    """
    if not callable(f):
        raise TypeError(f"`{what}` must be a function; got {type(f).__name__}.")
    return f if isinstance(f, jax.tree_util.Partial) else jax.tree_util.Partial(f)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Numbers:
    """One number, or `width` of them, for each evaluation; see `scale_numbers`, `weight_numbers`.

    Attributes:
      value: an array, a function of the level, or None where `name` says it.
      kind: "constant", "rows" (an array that follows the tableau's rows), "samples" (one per
        sample), "function" or "cond".
      name: of the entry of `cond` that holds one per sample.
      what: what the caller calls it.
      width: how many; None: one, without an axis.
      pair: read the one number w as the two (w, 1 - w).
    """

    value: Value
    kind: str = dataclasses.field(metadata={"static": True})
    name: str | None = dataclasses.field(metadata={"static": True})
    what: str = dataclasses.field(metadata={"static": True})
    width: int | None = dataclasses.field(metadata={"static": True})
    pair: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def names(self) -> tuple[str, ...]:
        """The entries of `cond` that are read here and not given to the network."""
        return () if self.name is None else (self.name,)

    @property
    def varies(self) -> bool:
        """Whether rows may differ, so that it pays to look for those where a term is silent."""
        return self.kind in ("rows", "function")

    def for_samples(self, numbers: Array) -> Numbers:
        """As `Transform.for_samples`."""
        if self.kind != "samples":
            return self
        return dataclasses.replace(self, value=self.value[numbers])

    def bind(self, level: Level) -> tuple[PyTree, ...] | None:
        """`width` arrays of the level's shape; None if only a call knows them.

        Raises:
          ValueError: numbers of another shape than the rows have.
        """
        if self.kind in ("samples", "cond"):
            return None
        value = self.value(level) if self.kind == "function" else self.value
        if self.kind == "rows":
            value = per_row(level, self.what, value)[0]
        if self.width is not None and not isinstance(value, tuple | list):
            value = [value[..., i] for i in range(self.width)]
        columns = list(value) if self.width is not None else [value]
        return self._pair(tuple(self._column(column, level) for column in columns))

    def read(self, bound: tuple[Bound, ...] | None, x: PyTree, cond: Conditions | None) -> PyTree:
        """The numbers at one call: `width` arrays of shape () or (batch,)."""
        if bound is not None:
            return bound
        value = jnp.asarray(self.value if self.kind == "samples" else (cond or {})[str(self.name)])
        batch = np.shape(jax.tree.leaves(x)[0])[0]
        want = (batch,) if self.width is None else (batch, self.width)
        if value.shape != want:
            raise ValueError(
                f"`{self.name or self.what}` must have one entry per sample, shape {want}; got "
                f"shape {value.shape}."
            )
        value = as_float(value)
        columns = [value] if self.width is None else [value[:, i] for i in range(self.width)]
        return self._pair(tuple(columns))

    def _pair(self, columns: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
        return (columns[0], 1 - columns[0]) if self.pair else columns

    def _column(self, column: PyTree, level: Level) -> PyTree:
        column = as_float(column, level.alpha)
        if np.shape(column) not in ((), np.shape(level.alpha)):
            raise ValueError(
                f"`{self.what}` must be one number, or a function of the level that gives one per "
                f"row, shape {np.shape(level.alpha)}; got shape {np.shape(column)}."
            )
        return column * namespace(level.alpha, column).ones_like(level.alpha)


def scale_numbers(
    value: Value, what: str = "scale", *, pair: bool = False, rows: bool = False
) -> Numbers:
    """A number, one per sample (an array or the name of an entry of `cond`), or f(level)."""
    if isinstance(value, str):
        return Numbers(None, "cond", value, what, None, pair)
    if callable(value):
        return Numbers(as_partial(value, what), "function", None, what, None, pair)
    if rows and np.ndim(value) == 1:  # an array follows the rows, not the samples
        return Numbers(value, "rows", None, what, None, pair)
    if np.ndim(value) > 1:
        raise ValueError(
            f"`{what}` must be a number, one per sample, shape (batch,), the name of an entry of "
            f"`cond`, or a function of the level; got shape {np.shape(value)}."
        )
    kind = "samples" if np.ndim(value) else "constant"
    return Numbers(value if np.ndim(value) else _number(value, what), kind, None, what, None, pair)


def weight_numbers(value: Value, width: int, what: str = "weights") -> PyTree:
    """`width` weights: (width,), (rows, width), f(level), the name of a `cond` entry, a mixture."""
    if isinstance(value, Mixture):
        return value
    if isinstance(value, str):
        return Numbers(None, "cond", value, what, width)
    if callable(value):
        return Numbers(as_partial(value, what), "function", None, what, width)
    value = value if isinstance(value, jax.Array) else np.asarray(value, np.float64)
    if np.ndim(value) not in (1, 2) or np.shape(value)[-1] != width:
        raise ValueError(
            f"`{what}` must be one number per term, shape ({width},), or per row and term, (rows, "
            f"{width}), a function of the level, or the name of an entry of `cond`; got shape "
            f"{np.shape(value)}."
        )
    return Numbers(value, "rows" if np.ndim(value) == 2 else "constant", None, what, width)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """Weights that a classifier of the state gives; made by `mixture`."""

    log_prob: jax.tree_util.Partial
    names: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    varies: bool = dataclasses.field(default=False, metadata={"static": True})

    def for_samples(self, numbers: Array) -> Mixture:
        """As `Transform.for_samples`: nothing here belongs to a sample."""
        del numbers
        return self

    def bind(self, level: Level) -> Level:
        """The level, which the classifier is told."""
        return jax.tree.map(lambda v: as_float(v, level.alpha), level)

    def read(self, bound: Level, x: PyTree, cond: Conditions | None) -> tuple[PyTree, ...]:
        """One weight per term and sample."""
        del cond
        logits = as_float(self.log_prob(x, bound))
        share = jax.nn.softmax(logits.astype(working_dtype(logits.dtype)), axis=-1)
        return tuple(share[..., i] for i in range(share.shape[-1]))


def mixture(log_prob: Callable[[PyTree, Level], PyTree]) -> Mixture:
    """Weights of `combine` for a mixture of the terms' distributions.

    E = sum_i w_i(x, t) E_i with w = softmax(log p_i(x_t)), the share of each in the state.

    Args:
      log_prob: (x, level) -> (batch, terms), the logarithms of the weighted densities of the noised
        state up to a number that all share: the logits of a classifier of the source.

    Reference: Du et al. 2023, arXiv:2302.11552.
    """
    return Mixture(as_partial(log_prob, "log_prob"))


def _number(value: Value, what: str) -> PyTree:
    if isinstance(value, jax.Array):
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"`{what}` must be a number, an array, the name of an entry of `cond`, or a function "
            f"of the level; got {type(value).__name__}."
        ) from None
