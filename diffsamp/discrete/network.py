"""`TokenFn`: a masked model, told once how it is called."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

import diffsamp._core.convolution  # noqa: F401 - fast ones, wherever a network is wrapped
from diffsamp._core.checks import expect_int
from diffsamp._core.types import Conditions, PyTree

__all__ = ["TokenFn"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TokenFn:
    """A network that says what tokens may be.

    Attributes:
      apply: `apply(params, x, t, **cond) -> logits`: x (batch, length) int32 tokens, `mask` where
        unknown; t (batch,) the share that is masked, or the time; logits (batch, length, columns),
        of which the first `vocabulary` count. Compared by identity.
      params: its arrays.
      vocabulary: number of tokens, 0 .. vocabulary - 1.
      mask: the id of an unknown token; left out: `vocabulary`.
    """

    apply: Callable[..., jax.Array] = dataclasses.field(metadata={"static": True})
    params: PyTree
    vocabulary: int = dataclasses.field(metadata={"static": True})
    mask: int = dataclasses.field(default=-1, metadata={"static": True})

    def __post_init__(self) -> None:
        if not callable(self.apply):
            raise TypeError(f"`apply` must be a function; got {type(self.apply).__name__}.")
        expect_int(self.vocabulary, "vocabulary", at_least=2)
        if self.mask < 0:
            object.__setattr__(self, "mask", self.vocabulary)

    def __call__(self, x: jax.Array, t: jax.Array, cond: Conditions | None = None) -> jax.Array:
        """(batch, length, vocabulary) log-probabilities, float32 at least.

        Raises:
          ValueError: at trace time, logits of another shape.
        """
        t = jnp.broadcast_to(jnp.asarray(t, jnp.float32), x.shape[:1])
        logits = self.apply(self.params, x, t, **(cond or {}))
        if logits.shape[:2] != x.shape or logits.shape[-1] < self.vocabulary:
            raise ValueError(
                f"the network must return logits of shape {(*x.shape, self.vocabulary)}, or with "
                f"more columns; got {logits.shape}."
            )
        wide = jnp.promote_types(logits.dtype, jnp.float32)
        return jax.nn.log_softmax(logits[..., : self.vocabulary].astype(wide), axis=-1)
