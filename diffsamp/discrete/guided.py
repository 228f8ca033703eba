"""Guidance of masked models: networks made of networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from diffsamp._core.types import PyTree
from diffsamp.discrete.network import TokenFn

__all__ = ["classifier_guided", "guided"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Guided:
    network: TokenFn
    scale: PyTree
    null: Mapping[str, PyTree]

    def log_prob(self, x: jax.Array, t: jax.Array, cond: Mapping[str, PyTree]) -> jax.Array:
        missing = [name for name in self.null if name not in cond]
        if missing:
            raise ValueError(f"guidance needs `cond` with {', '.join(map(repr, missing))}.")
        free = {}
        for name, value in self.null.items():
            own = jnp.asarray(cond[name])
            free[name] = jnp.broadcast_to(jnp.asarray(value, own.dtype), own.shape)
        # both in one call of a doubled batch
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), dict(cond), {**cond, **free})
        told = self.network(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both)
        given, null = jnp.split(told, 2)
        scale = jnp.reshape(jnp.asarray(self.scale, told.dtype), (-1, 1, 1))
        return scale * given + (1 - scale) * null


def _apply_guided(params: _Guided, x: jax.Array, t: jax.Array, **cond: PyTree) -> jax.Array:
    return params.log_prob(x, t, cond)


def guided(network: TokenFn, scale: PyTree, null: Mapping[str, PyTree]) -> TokenFn:
    """D-CFG: log p = w log p(token | condition) + (1 - w) log p(token), renormalised per token.

    Exact for one token; for several masked at once an approximation of the tilted joint, as for
    continuous models.

    Args:
      network: a conditional one.
      scale: w, a number or one per sample.
      null: what "no condition" is, by name; such as {"label": 10}.

    Returns:
      A network of two evaluations a call, as one of a doubled batch.

    Reference: Schiff et al. 2024, arXiv:2412.10193, equation 9.
    """
    if not null:
        raise ValueError('`null` must say what no condition is, such as {"label": 10}.')
    made = _Guided(network, jnp.asarray(scale, jnp.float32), dict(null))
    return TokenFn(_apply_guided, made, network.vocabulary, network.mask)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Classified:
    network: TokenFn
    params: PyTree
    scale: PyTree
    log_prob: Callable[..., jax.Array] = dataclasses.field(metadata={"static": True})


def _apply_classified(params: _Classified, x: jax.Array, t: jax.Array, **cond: PyTree) -> jax.Array:
    network = params.network
    told = network(x, t, {k: v for k, v in cond.items() if k != "target"} or None)
    width = network.vocabulary + 1
    # the mask has the last column, whatever its id
    column = jnp.where(x == network.mask, network.vocabulary, x)
    one_hot = jax.nn.one_hot(column, width, dtype=told.dtype)

    def total(v: jax.Array) -> jax.Array:
        return jnp.sum(params.log_prob(params.params, v, t, cond.get("target")))

    slope = jax.grad(total)(one_hot)
    change = slope - jnp.sum(slope * one_hot, axis=-1, keepdims=True)
    return told + params.scale * change[..., : network.vocabulary]


def classifier_guided(
    network: TokenFn,
    log_prob: Callable[..., jax.Array],
    params: PyTree = None,
    *,
    scale: float = 1.0,
) -> TokenFn:
    """A classifier's log-likelihood of changing each token, to first order in the token.

    log p += w (log p(y | x with the token) - log p(y | x)), by the gradient at the one-hot tokens:
    one gradient a row in place of V L classifier calls.

    Args:
      network: the masked model.
      log_prob: (params, one_hot, t, target) -> (batch,), differentiable; one_hot (batch, length,
        vocabulary + 1), the last column the mask's.
      params: its arrays.
      scale: w.

    Returns:
      A network that takes the classifier's target as `cond["target"]`.

    Reference: Nisonoff et al. 2024, arXiv:2406.01572, section 3.3.
    """
    made = _Classified(network, params, jnp.asarray(scale, jnp.float32), log_prob)
    return TokenFn(_apply_classified, made, network.vocabulary, network.mask)
