"""The Time-Shift sampler: ask the network about the noise level a state really seems to have.

A network that is sampled sees its own earlier errors (exposure bias): the state at time t looks
like one of another time. The sample variance of the state, which at high noise is close to
sigma(t)^2, says which; the network is then asked at that time. A transform of a ScoreFn, so it goes
with every solver and adds no evaluation.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core.checks import expect_choice
from diffsamp._core.numeric import as_float, working_dtype
from diffsamp._core.types import Array, Bound, Conditions, PyTree
from diffsamp.guidance.transform import Transform, per_row
from diffsamp.predictions import Level
from diffsamp.score import ScoreFn, ask

__all__ = ["PUBLISHED", "TimeShifted", "time_shift"]

# (window, cutoff) of the authors' scripts, as fractions of the training time: of those that shift
# the time at which the network is asked, as their paper does, and (ddim_adm) of one that
# asks at the row's time and shifts the level at which the step ends. Their settings for F-PNDM,
# which shifts that end too, and DPM-Solver, which goes by the variance of the network's output, are
# of other algorithms and not here.
PUBLISHED: dict[str, tuple[float, float]] = {
    "default": (0.002, 0.3),
    "deis-5": (0.020, 0.9),
    "ddim_adm-5": (0.080, 0.3),
}
_CANDIDATES = 65  # times tried within the window


class _ShiftedBound(NamedTuple):
    inner: Bound
    t: Array
    active: PyTree
    w0: Array
    w1: Array


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class TimeShifted(Transform):
    """A network asked at shifted times; made by `time_shift`."""

    score_fn: ScoreFn
    window: PyTree
    cutoff: PyTree
    data_variance: PyTree
    variant: str

    def tree_flatten(self) -> tuple[tuple[PyTree, ...], str]:
        return (self.score_fn, self.window, self.cutoff, self.data_variance), self.variant

    @classmethod
    def tree_unflatten(cls, variant: str, children: tuple[PyTree, ...]) -> TimeShifted:
        new = object.__new__(cls)
        names = ("score_fn", "window", "cutoff", "data_variance")
        for name, value in zip(names, children, strict=True):
            object.__setattr__(new, name, value)
        object.__setattr__(new, "variant", variant)
        return new

    def bind(self, level: Level, target: tuple[Array, Array]) -> _ShiftedBound:
        """As `ScoreFn.bind`, with what the shift needs: the time, and whether it may be shifted."""
        per_row(level, "time_shift")
        bound = self._bind(level, target)
        first = bound.t < bound.t.max()  # never the first evaluation
        return bound._replace(active=bound.active & first)

    def _bind(self, level: Level, target: tuple[Array, Array]) -> _ShiftedBound:
        t, w0, w1 = as_float(level.t), *(as_float(w, level.t) for w in target)
        if level.asked is not None:
            raise ValueError(
                "the time shift chooses what the network is told, and so does this tableau "
                "(`asked`): use one of the two."
            )
        cutoff = self.process.t_clean + self.cutoff * (self.process.t_max - self.process.t_clean)
        return _ShiftedBound(self.score_fn.bind(level, target), t, t > cutoff, w0, w1)

    def __call__(
        self,
        x: PyTree,
        t: Array,
        *,
        prediction: str | None = None,
        cond: Conditions | None = None,
    ) -> PyTree:
        """As for a `ScoreFn`; every time above the cutoff is shifted, the largest too."""
        one = _AtOneTime(self.score_fn, self.window, self.cutoff, self.data_variance, self.variant)
        # a JAX array, since the shift is made in the program
        return ask(one, x, jnp.asarray(t, jnp.result_type(float)), prediction, cond)

    def predict(self, x: PyTree, bound: _ShiftedBound, cond: Conditions | None = None) -> PyTree:
        """The prediction of the network asked at each sample's own time."""
        shifted = self.shifted_time(x, bound)
        level = Level(shifted, self.process.alpha(shifted), self.process.sigma(shifted))
        ones = jnp.ones_like(shifted)
        other = self.score_fn.bind(level, (bound.w0 * ones, bound.w1 * ones))
        if self.variant == "label":
            other = bound.inner._replace(label=other.label)
        # where nothing is shifted the row's own numbers, which were made on the host
        mine = jax.tree.map(
            lambda new, old: jnp.where(bound.active, new, jnp.asarray(old, new.dtype)),
            other,
            jax.tree.map(lambda v, like: jnp.broadcast_to(v, like.shape), bound.inner, other),
        )
        return self.score_fn.predict(x, mine, cond)

    def shifted_time(self, x: PyTree, bound: _ShiftedBound) -> PyTree:
        """The time within the window whose variance is closest to each sample's own."""
        leaves = [leaf.astype(working_dtype(leaf.dtype)) for leaf in jax.tree.leaves(x)]
        flat = jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)
        variance = jnp.var(flat, axis=1, ddof=1)
        process, length = self.process, self.process.t_max - self.process.t_clean
        t = jnp.broadcast_to(jnp.asarray(bound.t, flat.dtype), variance.shape)
        offsets = jnp.asarray(np.linspace(-0.5, 0.5, _CANDIDATES), flat.dtype)
        reach = jnp.asarray(self.window * length, flat.dtype)
        candidates = jnp.clip(
            t[:, None] + reach * offsets[None, :], process.t_min, process.t_max
        ).astype(flat.dtype)
        of_data = jnp.asarray(self.data_variance, flat.dtype)
        spread = process.sigma(candidates) ** 2 + of_data * process.alpha(candidates) ** 2
        nearest = jnp.argmin(jnp.abs(spread - variance[:, None]), axis=1)
        found = jnp.take_along_axis(candidates, nearest[:, None], axis=1)[:, 0]
        return jnp.where(bound.active, found, t)


class _AtOneTime(TimeShifted):
    """The same where there are no rows to follow."""

    def bind(self, level: Level, target: tuple[Array, Array]) -> _ShiftedBound:
        return self._bind(level, target)


def time_shift(
    score_fn: ScoreFn,
    *,
    window: float,
    cutoff: float,
    data_variance: float = 0.0,
    variant: str = "label",
) -> TimeShifted:
    """Ask the network at the time whose variance is that of the state.

    Per sample, over the times within the window around the row's own, the one whose sigma(t)^2 +
    data_variance alpha(t)^2 is nearest the variance over the sample's elements; only above the
    cut-off and never at the first evaluation.

    Args:
      score_fn: a ScoreFn with a batch axis; put guidance around the result.
      window: full width of the window, as a fraction of the process's time (the authors' w / 1000).
        0 is the network as it is. `PUBLISHED` has the authors' pairs by name.
      cutoff: fraction of the process's time above which times are shifted (their t_c / 1000).
      data_variance: variance of the data's elements. The authors take 0, which is biased where
        little noise is left; that is what their cut-off is for.
      variant: "label" gives the network the shifted time and keeps the row's own numbers; "level"
        also converts its output at the shifted level.

    Returns:
      A transform to sample with.

    Raises:
      TypeError: not a ScoreFn.
      ValueError: no batch axis, a negative window, a cut-off outside [0, 1], an unknown variant.

    Reference: Li et al. 2024, arXiv:2305.15583, algorithm 2.
    """
    if not isinstance(score_fn, ScoreFn):
        raise TypeError(
            "time_shift takes a ScoreFn, whose time it changes; put guidance and thresholding "
            f"around its result. Got {type(score_fn).__name__}."
        )
    if not score_fn.batched:
        raise ValueError("time_shift needs a network with a batch axis, ScoreFn(batched=True).")
    expect_choice(variant, "variant", ("label", "level"))
    for name, value, high in (("window", window, 1), ("cutoff", cutoff, 1)):
        if not 0 <= value <= high:
            raise ValueError(f"`{name}` must lie in [0, {high}]; got {value}.")
    if not data_variance >= 0:
        raise ValueError(f"`data_variance` must not be negative; got {data_variance}.")
    return TimeShifted(score_fn, float(window), float(cutoff), float(data_variance), variant)
