"""Guidance that is linear in the outputs: combinations of networks and of conditions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core.numeric import as_float, is_concrete, namespace, silence, working_dtype
from diffsamp._core.types import Array, Bound, Conditions, PyTree
from diffsamp.guidance._numbers import Mixture, Numbers, scale_numbers, weight_numbers
from diffsamp.guidance._terms import OfTerms, Terms, make_terms, without
from diffsamp.guidance.data import keep_noise
from diffsamp.guidance.transform import Transform
from diffsamp.predictions import Level
from diffsamp.score import ScoreFn, scale_rows
from diffsamp.tableau import Tableau

__all__ = ["Combined", "cfg", "cfg_pp", "combine"]


class _CombinedBound(NamedTuple):
    inner: Bound
    weights: Array
    first_alone: PyTree
    of_state: PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Combined(OfTerms):
    """A combination of several predictions; made by `combine`, `cfg` and their relatives.

    Weights that differ from row to row may be 0 for all terms but the first: these are not asked
    there. That takes a branch with the network in each arm, which constant weights do without.
    """

    terms: Terms
    weights: Numbers | Mixture

    def nfe(self, tableau: Tableau) -> float:
        """Network evaluations of a run, per sample: rows where the first term is alone cost less.

        Args:
          tableau: the sampler.
        """
        level = Level(*(v[:-1] for v in (tableau.times, tableau.alpha, tableau.sigma)))
        alone = self._first_alone(self.weights.bind(level))
        calls = np.where(
            False if alone is None else alone, self.terms.cost(terms=1), self.nfe_factor
        )
        total = np.sum(np.where(tableau.evaluates, calls, 0))
        return int(total) if float(total).is_integer() else float(total)

    def for_samples(self, numbers: Array) -> Combined:
        """As `Transform.for_samples`."""
        own = {name: getattr(self, name).for_samples(numbers) for name in ("terms", "weights")}
        return dataclasses.replace(self, **own)

    @silence
    def bind(self, level: Level, target: tuple[Array, Array]) -> _CombinedBound:
        """As `ScoreFn.bind`, with every term's weight in each row."""
        bound = self.weights.bind(level)
        of_state: PyTree = None
        if not isinstance(self.weights, Mixture) and not self.weights.pair:
            # E = sum w_i E_i is, in what the row wants, the same sum and this share of the state
            xp = namespace(level.alpha, *(bound or ()))
            w0 = as_float(target[0], level.alpha)
            of_state = xp.where(w0 == 0, xp.zeros_like(w0), w0 / level.alpha)
            if bound is not None:
                of_state = _of_state(bound, of_state)
                if is_concrete(of_state) and not np.any(of_state):
                    of_state = None
        return _CombinedBound(
            self.terms.bind(level, target), bound, self._first_alone(bound), of_state
        )

    def _first_alone(self, bound: Bound) -> PyTree:
        """Where all terms but the first have no weight; None if nowhere, or if rows are alike."""
        if not self.weights.varies or len(bound) == 1:
            return None
        xp = namespace(*bound)
        alone = xp.all(xp.stack([weight == 0 for weight in bound[1:]]), axis=0)
        alone = alone & (bound[0] == 1)
        return alone if not is_concrete(alone) or np.any(alone) else None

    def check_bound(self, bound: _CombinedBound, level: Level, evaluates: Array) -> None:
        """As `ScoreFn.check_bound`; weights that do not sum to 1 need some signal in the state."""
        self.terms.check_bound(bound.inner, level, evaluates)
        if bound.of_state is None or not is_concrete(bound.of_state, evaluates):
            return
        if np.any(np.asarray(evaluates) & ~np.isfinite(np.asarray(bound.of_state))):
            raise ValueError(
                "weights that do not sum to 1 combine the noise, which does not determine the data "
                "at alpha = 0: start the times below it, or let the weights sum to 1 there."
            )

    def predict(self, x: PyTree, bound: _CombinedBound, cond: Conditions | None = None) -> PyTree:
        """The combination; terms of one network are one call of it."""
        if bound.first_alone is None:
            return self.with_parts(x, bound, cond)[0]
        own = without(cond, self.weights.names)
        return jax.lax.cond(
            jnp.all(bound.first_alone),
            lambda: self.terms.predict(x, bound.inner, own, terms=1)[0],
            lambda: self.with_parts(x, bound, cond)[0],
        )

    def with_parts(
        self, x: PyTree, bound: _CombinedBound, cond: Conditions | None = None
    ) -> tuple[PyTree, list[PyTree]]:
        """The combination and what every term says, from the same calls."""
        parts = self.terms.predict(x, bound.inner, without(cond, self.weights.names))
        share = self.weights.read(bound.weights, x, cond)
        if len(share) != len(parts):
            raise ValueError(f"the mixture has {len(share)} weights; there are {len(parts)} terms.")
        rest = bound.of_state
        if rest is not None and bound.weights is None:  # weights that only this call knows
            rest = _of_state(share, jnp.asarray(rest, share[0].dtype))

        def add(state: jax.Array, *leaves: jax.Array) -> jax.Array:
            dtype = working_dtype(state.dtype)
            terms = [scale_rows(w, m) * m.astype(dtype) for w, m in zip(share, leaves, strict=True)]
            if rest is not None:
                terms.append(scale_rows(rest, state) * state.astype(dtype))
            return sum(terms[1:], terms[0]).astype(state.dtype)

        return jax.tree.map(add, x, *parts), parts


def _of_state(share: Sequence[PyTree], per_missing: PyTree) -> PyTree:
    """What weights that do not sum to 1 add of the state; exactly 0 where they do."""
    xp = namespace(per_missing, *share)
    missing = 1 - sum(share[1:], share[0])
    none = xp.abs(missing) < (1e-12 if xp is np else 1e-6)
    return xp.where(none, xp.zeros_like(missing * 1.0), missing * per_missing)


def combine(
    terms: Sequence[tuple[ScoreFn | Transform, Mapping[str, PyTree]]],
    weights: Array,
    *,
    batched: bool = True,
    costs: Sequence[float] | None = None,
) -> Combined:
    """E = sum_i w_i E_i, of several networks, of one under several conditions, or both.

    Where the weights sum to 1 this is the same in every prediction; else it is meant in the noise,
    D = sum_i w_i D_i + (1 - sum_i w_i) x / alpha. Guidance is (w, 1 - w), composition of k
    conditions (1 - sum w_i, w_1, .. w_k) with the unconditional network first, autoguidance
    (w, 1 - w) of a good and a bad network, a product of experts (1, 1), a negation (1, w, -w).

    Args:
      terms: pairs (score_fn, conditions), the conditions being those the term overrides; {} for
        none. Values broadcast to what `cond` holds, or from one sample to the batch. Terms with the
        same network object are one call of it, on a batch that holds each sample as often; the
        networks may differ in everything but the process.
      weights: (terms,), one per term; (rows, terms), which follows the tableau's rows; a function
        of the `Level` (arrays over the rows) that returns one array, or number, per term, or an
        array (.., terms); the name of an entry of `cond`, (batch, terms), which the network is not
        given; or a `mixture`. Rows where the first term has weight 1 and the others 0 ask only it.
      batched: False asks the terms of a network one after another, which needs less memory.
      costs: what an evaluation of each term costs, for `nfe`: 1 by default, 0.2 for a network a
        fifth as large. None: 1 each.

    Returns:
      A transform to sample with.

    Raises:
      TypeError: terms that are no pairs.
      ValueError: no terms, or weights or costs of another number.

    Reference: Liu et al. 2022, arXiv:2206.01714; Du et al. 2023, arXiv:2302.11552; Karras et al.
    2024, arXiv:2406.02507.
    """
    made = make_terms(terms, batched, costs)
    return Combined(made, weight_numbers(weights, len(made.which)))


def cfg(
    score_fn: ScoreFn | Transform,
    scale: float | jax.Array | str | Callable[[Level], Array],
    null: Mapping[str, PyTree],
) -> Combined:
    """Classifier-free guidance: T = T_free + scale (T_given - T_free).

    Affine, so it is the same in every prediction. Both halves are one call of the network on a
    batch twice as long; `nfe_factor` is 2. Where a scale that is a function gives exactly 1, the
    network is called on the batch as it is; `nfe(tableau)` of the result says what a run costs. A
    negative prompt is a `null` that says what not to show. `unfold` makes the same rows of a
    tableau.

    Args:
      score_fn: a conditional network, with a batch axis.
      scale: 1 is the conditional network, 0 the unconditional, above 1 guidance. One number; one
        per sample, (batch,) or the name of an entry of `cond` that holds them; or a function of the
        `Level` (arrays over the rows) for guidance that changes along the way, such as
        `lambda level: np.where(level.sigma < 2, 3.0, 1.0)` (a limited interval; Kynkaanniemi et al.
        2024, arXiv:2404.07724).
      null: what "no condition" is, by name of the condition; broadcast to each sample. Conditions
        it does not name are given to both halves, as they are if the batch shares them.

    Returns:
      A transform to sample with `cond=...`.

    Raises:
      ValueError: a network without a batch axis, or an empty `null`.

    Reference: Ho & Salimans 2022, arXiv:2207.12598, eq. 6, with their w = scale - 1.
    """
    return Combined(null_terms(score_fn, null), scale_numbers(scale, pair=True))


def null_terms(score_fn: ScoreFn | Transform, null: Mapping[str, PyTree]) -> Terms:
    """The two terms of guidance: the condition given, and none.

    Raises:
      ValueError: a network without a batch axis, or an empty `null`.
    """
    if not score_fn.batched:
        raise ValueError("guidance needs a network with a batch axis, ScoreFn(batched=True).")
    if not null:
        raise ValueError('`null` must say what no condition is, such as {"label": 10}.')
    return make_terms([(score_fn, {}), (score_fn, null)], True, None)


def cfg_pp(
    score_fn: ScoreFn | Transform,
    tableau: Tableau,
    strength: float,
    null: Mapping[str, PyTree],
) -> Combined:
    """CFG++: guide the data prediction and keep the noise of the unconditional network.

    x' = alpha' D_w + (the row's noise) E_free, with D_w the guided data prediction of scale
    `strength` in [0, 1]. That is classifier-free guidance with scale strength * g_n, g_n the gain
    of `keep_noise`; so its effect grows with the number of steps, and has no limit.

    Args:
      score_fn: a conditional network, with a batch axis.
      tableau: the sampler to be used, of one output per row.
      strength: the paper's lambda; 0.6 in its scripts for 50 steps.
      null: as for `cfg`.

    Raises:
      ValueError: a tableau with more than one output per row; a network without a batch axis.

    Reference: Chung et al. 2024, arXiv:2406.08070.
    """
    scale = strength * keep_noise(tableau)
    return Combined(
        null_terms(score_fn, null), weight_numbers(np.stack([scale, 1 - scale], axis=-1), 2)
    )
