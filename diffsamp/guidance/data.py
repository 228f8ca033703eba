"""Rules: functions of what networks predict, in the prediction in which they are meant."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import predictions
from diffsamp._core.numeric import as_float, is_concrete, namespace, silence, working_dtype
from diffsamp._core.types import Array, Bound, Conditions, PyTree, Value
from diffsamp.guidance._numbers import Numbers, as_partial, scale_numbers
from diffsamp.guidance._terms import OfTerms, Terms, make_terms, without
from diffsamp.guidance.transform import Transform, per_row
from diffsamp.predictions import Level
from diffsamp.score import ScoreFn, scale_rows
from diffsamp.tableau import Tableau

__all__ = [
    "Row",
    "Rule",
    "dynamic_thresholding",
    "keep_noise",
    "on_data",
    "on_noise",
    "rule",
    "static_thresholding",
]


class Row(NamedTuple):
    """What a rule may know besides the predictions, at one call."""

    level: Level
    scale: Array
    cond: Conditions | None


class _RuleBound(NamedTuple):
    inner: Bound
    level: Level
    scale: Array
    gain: PyTree
    r: Array
    s: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Rule(OfTerms):
    """A function of predictions; made by `rule`, `on_data`, `on_noise` and what stands on them."""

    terms: Terms
    f: jax.tree_util.Partial
    scale: Numbers | None
    gain: PyTree
    meant_in: str = dataclasses.field(metadata={"static": True})
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def nfe(self, tableau: Tableau) -> float:
        """Network evaluations of a run, per sample.

        Args:
          tableau: the sampler.
        """
        pairs = zip(self.terms.which, self.terms.costs, strict=True)
        return sum(cost * self.terms.networks[i].nfe(tableau) for i, cost in pairs)

    def for_samples(self, numbers: Array) -> Rule:
        """As `Transform.for_samples`."""
        scale = None if self.scale is None else self.scale.for_samples(numbers)
        return dataclasses.replace(self, terms=self.terms.for_samples(numbers), scale=scale)

    @silence
    def bind(self, level: Level, target: tuple[Array, Array]) -> _RuleBound:
        """The networks' predictions as the rule means them, and how the row's own follows."""
        w0, w1, g = predictions.weights(self.meant_in, self.process, level, self.sigma_data)
        xp = namespace(level.alpha, level.sigma)
        one = xp.ones_like(level.alpha)
        wanted = tuple(as_float(w, level.alpha) for w in target)
        r, s = predictions.conversion((w0, w1, g), (*wanted, one), level.alpha, level.sigma)
        gain = None if self.gain is None else per_row(level, "a gain by row", self.gain)[0]
        inner = self.terms.bind(level, (w0 / g, w1 / g))
        at = jax.tree.map(lambda v: as_float(v, level.alpha), level)
        return _RuleBound(
            inner, at, None if self.scale is None else self.scale.bind(level), gain, r, s
        )

    def check_bound(self, bound: _RuleBound, level: Level, evaluates: Array) -> None:
        """As `ScoreFn.check_bound`, for the networks and for the way back."""
        self.terms.check_bound(bound.inner, level, evaluates)
        if not is_concrete(bound.r, bound.s, evaluates):
            return
        bad = ~(np.isfinite(np.asarray(bound.r)) & np.isfinite(np.asarray(bound.s)))
        if np.any(bad & np.asarray(evaluates, bool)):
            raise ValueError(
                f"a rule on the {self.meant_in!r} prediction does not determine what the tableau "
                "asks for where alpha = 0 or sigma = 0: evaluate away from that end, or state the "
                "rule in another prediction."
            )

    def predict(self, x: PyTree, bound: _RuleBound, cond: Conditions | None = None) -> PyTree:
        """The row's prediction from the rule's."""
        own = () if self.scale is None else self.scale.names
        network_cond = without(cond, (*self.names, *own))
        parts = self.terms.predict(x, bound.inner, network_cond)
        wide = [jax.tree.map(lambda v: v.astype(working_dtype(v.dtype)), part) for part in parts]
        scale = None if self.scale is None else self.scale.read(bound.scale, x, cond)[0]
        value = self.f(wide, Row(bound.level, scale, cond))
        _expect_like(value, x)

        def back(new: jax.Array, old: jax.Array, state: jax.Array) -> jax.Array:
            new = new.astype(old.dtype)
            if bound.gain is not None:
                new = old + scale_rows(bound.gain, old) * (new - old)
            wide_state = state.astype(new.dtype)
            new = scale_rows(bound.s, new) * new + scale_rows(bound.r, new) * wide_state
            return new.astype(state.dtype)

        return jax.tree.map(back, value, wide[0], x)


def _expect_like(value: Value, x: PyTree) -> None:
    shapes = [[np.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (value, x)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"a rule must return a prediction shaped like the state, {shapes[1]}; got {shapes[0]}."
        )


def _plain(f: PyTree, parts: list[PyTree], row: Row) -> PyTree:
    return f(parts, row.level)


def _scaled(f: PyTree, parts: list[PyTree], row: Row) -> PyTree:
    return f(parts, row.level, row.scale)


def _alone(f: PyTree, parts: list[PyTree], row: Row) -> PyTree:
    return f(parts[0], row.level, row.cond)


def rule(
    terms: Sequence[tuple[ScoreFn | Transform, Mapping[str, PyTree]]],
    f: Callable[..., PyTree],
    *,
    prediction: str = "data",
    scale: Array = None,
    batched: bool = True,
    costs: Sequence[float] | None = None,
) -> Rule:
    """Any function of several predictions, in the prediction in which it is meant.

    For guidance that is not affine, which is another thing in every prediction.

    Args:
      terms: pairs (score_fn, conditions that it overrides), as for `combine`.
      f: f([m_1, .. m_k], level) -> m, shaped like the state, in at least float32; the numbers of
        `level` are scalars or one per sample. With a `scale`, f(.., level, scale). A function, by
        identity; `jax.tree_util.Partial` binds arrays to it that may change without a new
        compilation.
      prediction: what the m_i and m are, one of the six names.
      scale: a number that f takes, in the forms that `cfg` knows; None: f takes none.
      batched: as for `combine`.
      costs: as for `combine`.

    Raises:
      TypeError: terms that are no pairs, an f that is no function.
      ValueError: no terms, an unknown prediction.
    """
    made = make_terms(terms, batched, costs)
    numbers = None if scale is None else scale_numbers(scale)
    wrapped = jax.tree_util.Partial(_plain if scale is None else _scaled, as_partial(f, "f"))
    return Rule(made, wrapped, numbers, None, predictions.canonical_name(prediction), ())


def scaled_rule(terms: Terms, f: jax.tree_util.Partial, scale: Numbers, prediction: str) -> Rule:
    """A rule f(parts, level, scale) on terms that are made already.

    Args:
      terms: from `make_terms`.
      f: the rule.
      scale: what it takes.
      prediction: in which it is meant.
    """
    name = predictions.canonical_name(prediction)
    return Rule(terms, jax.tree_util.Partial(_scaled, f), scale, None, name, ())


def on_data(
    score_fn: ScoreFn | Transform,
    f: Callable[[PyTree, Level, Mapping[str, PyTree] | None], PyTree],
    gain: PyTree = None,
    *,
    names: Sequence[str] = (),
) -> Rule:
    """Change the data prediction: D -> D + gain (f(D, level, cond) - D).

    The noise is derived again from the changed data, E = (x - alpha D) / sigma ("derive"), so a row
    of weight b on the data moves by b (f(D) - D). With `gain=keep_noise(tableau)` the noise stays
    what the network said and the row moves by alpha' (f(D) - D) ("keep"). The two have different
    limits: a known coordinate is conditioned on exactly by the second, with fresh noise and many
    rows, and by a wrong law with the first.

    Args:
      score_fn: a network or transform; put this outside guidance.
      f: (D, level, cond) -> D shaped like it; D is in at least float32. As for `rule`, and `cond`
        is all that the caller passes.
      gain: (rows,), one number per row of the tableau; None: 1.
      names: entries of `cond` that are for f alone and not given to the network, such as a
        measurement per sample.

    Raises:
      TypeError: an f that is no function.
    """
    made = make_terms([(score_fn, {})], True, None)
    wrapped = jax.tree_util.Partial(_alone, as_partial(f, "f"))
    return Rule(made, wrapped, None, _expect_gain(gain), "data", tuple(names))


def on_noise(
    score_fn: ScoreFn | Transform,
    f: Callable[[PyTree, Level, Mapping[str, PyTree] | None], PyTree],
    *,
    names: Sequence[str] = (),
) -> Rule:
    """Change the noise prediction: E -> f(E, level, cond), the data derived again from it.

    Args:
      score_fn: a network or transform.
      f: as for `on_data`, of the noise prediction.
      names: as for `on_data`.

    Raises:
      TypeError: an f that is no function.
    """
    made = make_terms([(score_fn, {})], True, None)
    wrapped = jax.tree_util.Partial(_alone, as_partial(f, "f"))
    return Rule(made, wrapped, None, None, "noise", tuple(names))


def keep_noise(tableau: Tableau) -> np.ndarray:
    """The gain with which a changed data prediction leaves the noise as it was.

    A row x' = a x + b T, with T = w_0 D + w_1 E, has weight b (w_0 - w_1 alpha / sigma) on the data
    once E follows from x and D; the gain is alpha' over that. DDIM: 1 / (1 - exp(-h)), DDPM:
    1 / (1 - exp(-2 h)), h the step in log-SNR; 1 on a step to sigma = 0.

    Args:
      tableau: a sampler whose rows use one state and one output each.

    Returns:
      (rows,), float64; 1 for rows that do not evaluate.

    Raises:
      ValueError: rows that use earlier states or outputs, for which there is no such number.
    """
    if not is_concrete(tableau):
        raise TypeError("keep_noise is a host function: call it outside `jit`.")
    a, b = np.asarray(tableau.a), np.asarray(tableau.b)
    if np.any(a[:, 1:] != 0) or np.any(b[:, 1:] != 0):
        raise ValueError(
            f"keep_noise is defined for rows of one state and one output; {tableau.name!r} "
            "combines several. Take solvers.ddim, ddpm or renoise, or derive the noise (no gain)."
        )
    w0, w1 = tableau.target[:, 0], tableau.target[:, 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        on_state = np.where(w1 == 0, 0.0, w1 * tableau.alpha[:-1] / tableau.sigma[:-1])
        share = b[:, 0] * (w0 - on_state)
        gain = np.where(tableau.evaluates, tableau.alpha[1:] / share, 1.0)
    if not np.all(np.isfinite(gain)):
        row = int(np.argmin(np.isfinite(gain)))
        raise ValueError(
            f"row {row} of {tableau.name!r} does not move with its data prediction, so no gain "
            "keeps its noise."
        )
    return gain


def _expect_gain(gain: PyTree) -> PyTree:
    if gain is not None and np.ndim(gain) < 1:
        raise ValueError(
            "`gain` must hold one number per row of the tableau, such as keep_noise(tableau); got "
            f"{gain!r}."
        )
    return gain


def static_thresholding(
    score_fn: ScoreFn | Transform, *, low: float = -1.0, high: float = 1.0
) -> Rule:
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
    return on_data(score_fn, jax.tree_util.Partial(_clip, float(low), float(high)))


def _clip(low: PyTree, high: PyTree, data: PyTree, level: Level, cond: Conditions | None) -> PyTree:
    del level, cond
    return jax.tree.map(
        lambda leaf: jnp.clip(leaf, jnp.asarray(low, leaf.dtype), jnp.asarray(high, leaf.dtype)),
        data,
    )


def dynamic_thresholding(
    score_fn: ScoreFn | Transform, *, quantile: float = 0.995, bound: float = 1.0
) -> Rule:
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
    f = _squash if score_fn.batched else _squash_one
    return on_data(score_fn, jax.tree_util.Partial(f, float(quantile), float(bound)))


def _squash(
    quantile: PyTree,
    bound: Bound,
    data: PyTree,
    level: Level,
    cond: Conditions | None,
    first: int = 1,
) -> PyTree:
    del level, cond

    def one(leaf: jax.Array) -> jax.Array:
        high = jnp.asarray(bound, leaf.dtype)
        axes = tuple(range(first, leaf.ndim))
        q = jnp.asarray(quantile, leaf.dtype)
        size = jnp.quantile(jnp.abs(leaf), q, axis=axes, keepdims=True)
        size = jnp.maximum(size, jnp.broadcast_to(high, size.shape))
        return jnp.clip(leaf, -size, size) * (high / size)

    return jax.tree.map(one, data)


def _squash_one(
    quantile: PyTree, bound: Bound, data: PyTree, level: Level, cond: Conditions | None
) -> PyTree:
    return _squash(quantile, bound, data, level, cond, first=0)
