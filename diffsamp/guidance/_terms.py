"""Several networks, or one under several conditions, asked at one state.

What guidance combines are terms: pairs of a network and the conditions it overrides. Terms of one
network are one call of it, on a batch that holds each sample as often.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core.types import Array, Bound, Conditions, Network, PyTree, Value
from diffsamp.guidance.transform import Transform
from diffsamp.predictions import Level
from diffsamp.score import expect_score_fn, for_samples

__all__ = ["OfTerms", "Terms", "make_terms", "without"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Terms:
    """Networks, and for every term which of them it asks and the conditions it overrides.

    Attributes:
      networks: each network once.
      overrides: one mapping per term.
      which: one index into `networks` per term.
      costs: what one evaluation of each term's network costs.
      batched: ask terms of one network in one call; else one after another.
    """

    networks: tuple[PyTree, ...]
    overrides: tuple[Mapping[str, PyTree], ...]
    which: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    costs: tuple[float, ...] = dataclasses.field(metadata={"static": True})
    batched: bool = dataclasses.field(metadata={"static": True})

    def bind(self, level: Level, target: tuple[Array, Array]) -> tuple[PyTree, ...]:
        """Every network's bound numbers."""
        return tuple(network.bind(level, target) for network in self.networks)

    def check_bound(self, bound: tuple[Bound, ...], level: Level, evaluates: Array) -> None:
        """As `ScoreFn.check_bound`, for every network."""
        for network, own in zip(self.networks, bound, strict=True):
            network.check_bound(own, level, evaluates)

    def for_samples(self, numbers: Array) -> Terms:
        """As `Transform.for_samples`, for every network."""
        networks = tuple(for_samples(network, numbers) for network in self.networks)
        return dataclasses.replace(self, networks=networks)

    def cost(self, what: str = "nfe_factor", terms: int | None = None) -> PyTree:
        """The sum of a count per call over the first `terms` terms, each times its own cost."""
        pairs = list(zip(self.which, self.costs, strict=True))[:terms]
        return sum(cost * getattr(self.networks[i], what, 0) for i, cost in pairs)

    def predict(
        self, x: PyTree, bound: tuple[Bound, ...], cond: Conditions | None, terms: int | None = None
    ) -> PyTree:
        """A list of what every term says, or of what the first `terms` of them say."""
        which = self.which[:terms]
        parts: list[PyTree] = [None] * len(which)
        for number, network in enumerate(self.networks):
            mine = [i for i, index in enumerate(which) if index == number]
            if mine:
                overrides = [self.overrides[i] for i in mine]
                answers = _ask(network, x, bound[number], cond, overrides, self.batched)
                for i, answer in zip(mine, answers, strict=True):
                    parts[i] = answer
        return parts


class OfTerms(Transform):
    """A transform of several terms; what it costs is what they cost."""

    terms: Terms

    @property
    def score_fn(self) -> PyTree:
        """The first term's network."""
        return self.terms.networks[0]

    @property
    def nfe_factor(self) -> float:
        """Network evaluations per call: one per term, times its cost."""
        return self.terms.cost()

    @property
    def gradients_per_call(self) -> float:
        """Vector-Jacobian products per call, likewise."""
        return self.terms.cost("gradients_per_call")


def make_terms(
    terms: Sequence[tuple[PyTree, Mapping[str, PyTree]]],
    batched: bool,
    costs: Sequence[float] | None,
) -> Terms:
    """Terms from the caller's pairs, checked.

    Raises:
      TypeError: no pairs of a network and a mapping.
      ValueError: no terms, or costs of another number.
    """
    terms = list(terms)
    if not terms:
        raise ValueError("`terms` must hold at least one pair (score_fn, conditions).")
    networks, which, overrides = list[PyTree](), list[int](), list[Mapping[str, PyTree]]()
    for term in terms:
        if not (isinstance(term, tuple | list) and len(term) == 2):
            raise TypeError(
                "each of `terms` must be a pair of a network and the conditions it overrides, such "
                f'as (score_fn, {{"label": 0}}) or (score_fn, {{}}); got {type(term).__name__}.'
            )
        network, own = term
        expect_score_fn(network)
        if not isinstance(own, Mapping):
            raise TypeError(
                "the conditions that a term overrides must be a mapping from their names, {} for "
                f"none; got {type(own).__name__}."
            )
        same = [i for i, known in enumerate(networks) if known is network]
        if not same:
            networks.append(network)
        which.append(same[0] if same else len(networks) - 1)
        overrides.append(dict(own))
    costs = (1,) * len(terms) if costs is None else tuple(costs)
    if len(costs) != len(terms):
        raise ValueError(f"`costs` must hold one number per term, {len(terms)}; got {len(costs)}.")
    return Terms(tuple(networks), tuple(overrides), tuple(which), costs, batched)


def without(cond: Conditions | None, names: Sequence[str]) -> Mapping[str, PyTree] | None:
    """The conditions of the network: all but those that a transform reads itself.

    Raises:
      ValueError: a name that is missing.
    """
    missing = [name for name in names if name not in (cond or {})]
    if missing:
        raise ValueError(f"`cond` lacks {missing}, which a transform around the network reads.")
    return {k: v for k, v in (cond or {}).items() if k not in names} if names else cond


def _ask(
    network: Network,
    x: PyTree,
    bound: Bound,
    cond: Conditions | None,
    overrides: list[Mapping[str, PyTree]],
    batched: bool,
) -> list[PyTree]:
    given = dict(cond or {})
    size = np.shape(jax.tree.leaves(x)[0])[0] if network.batched else None
    own = [
        {name: _own(name, value, given, size) for name, value in override.items()}
        for override in overrides
    ]
    if len(own) == 1:
        return [network.predict(x, bound, {**given, **own[0]} or None)]
    names = list(dict.fromkeys(name for override in own for name in override))
    lacking = [n for n in names if n not in given and not all(n in override for override in own)]
    if lacking and not given:
        raise ValueError(
            "guidance needs the condition it strengthens: pass `cond`, such as "
            f"cond={{{', '.join(f'{name!r}: ..' for name in lacking)}}}."
        )
    if lacking:
        raise ValueError(f"`cond` lacks {lacking}, which some terms override and others take.")
    for name in names:
        if name in given:
            _expect_per_sample(name, given[name], size)
    stacked = {
        name: jax.tree.map(
            lambda *leaves: jnp.stack(
                [jnp.asarray(leaf) for leaf in leaves], axis=1 if size else 0
            ),
            *(override.get(name, given.get(name)) for override in own),
        )
        for name in names
    }
    rest = {name: value for name, value in given.items() if name not in names}
    if size is None or not batched:
        first = stacked if size is None else jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), stacked)
        answers = jax.lax.map(lambda one: network.predict(x, bound, {**rest, **one}), first)
        return [jax.tree.map(lambda v, i=i: v[i], answers) for i in range(len(own))]
    return _together(network, x, bound, rest, stacked, len(own), size)


def _together(
    network: Network, x: PyTree, bound: Bound, rest: PyTree, stacked: PyTree, count: int, size: int
) -> list[PyTree]:
    """One call, each sample beside itself: a batch spread over devices stays where it is."""

    def repeat(leaf: PyTree) -> PyTree:
        return jnp.repeat(leaf, count, axis=0)

    def repeat_own(leaf: PyTree) -> PyTree:
        return repeat(leaf) if _is_per_sample(leaf, size) else leaf

    inner = jax.tree.map(lambda v: repeat(jnp.asarray(v)) if jnp.ndim(v) else v, bound)
    conditions = {
        **jax.tree.map(repeat_own, rest),
        **jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), stacked),
    }
    both = network.predict(jax.tree.map(repeat, x), inner, conditions)
    split = jax.tree.map(lambda v: v.reshape(size, count, *v.shape[1:]), both)
    return [jax.tree.map(lambda v, i=i: v[:, i], split) for i in range(count)]


def _is_per_sample(leaf: PyTree, size: int | None) -> bool:
    """Whether a condition has one entry per sample; others are shared by the whole batch."""
    return size is None or np.shape(leaf)[:1] == (size,)


def _expect_per_sample(name: str, value: Value, size: int | None) -> None:
    for leaf in jax.tree.leaves(value):
        if not _is_per_sample(leaf, size):
            raise ValueError(
                f"the condition {name!r} is shared by the whole batch, shape {np.shape(leaf)}, and "
                "terms of one call would need different ones: pass one per sample, shape "
                f"{(size, *np.shape(leaf))}, such as jnp.broadcast_to(value, (batch, ..))."
            )


def _own(name: str, value: Value, given: Mapping[str, PyTree], size: int | None) -> PyTree:
    """A term's own value of a condition, one per sample, of the dtype of what `cond` holds."""

    def like(leaf: PyTree, old: PyTree) -> PyTree:
        shape, own = np.shape(old), np.shape(leaf)
        if own != shape[len(shape) - len(own) :] and own[:1] != shape[:1]:
            raise ValueError(
                f"a term's {name!r} must broadcast to that of `cond`, shape {shape}; got {own}."
            )
        dtype = getattr(old, "dtype", None)
        leaf = jnp.asarray(leaf) if dtype is None else jnp.asarray(leaf).astype(dtype)
        return jnp.broadcast_to(leaf, shape)

    def spread(leaf: PyTree) -> PyTree:
        leaf = jnp.asarray(leaf)
        whole = leaf.ndim and _is_per_sample(leaf, size)
        return leaf if size is None or whole else jnp.broadcast_to(leaf, (size, *leaf.shape))

    if name not in given:
        return jax.tree.map(spread, value)
    structures: list[PyTree] = [jax.tree.structure(tree) for tree in (value, given[name])]
    if structures[0] != structures[1]:
        return jax.tree.map(lambda old: like(value, old), given[name])
    return jax.tree.map(like, value, given[name])
