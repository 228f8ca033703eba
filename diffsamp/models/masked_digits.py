"""A masked diffusion model of 8x8 handwritten digits in four grey levels: 64 tokens of 4 values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core.types import PyTree
from diffsamp.discrete import TokenFn
from diffsamp.models.digits import _Block, load_data, load_params

__all__ = ["LEVELS", "MaskedTransformer", "apply", "load_masked_digits_model", "load_tokens"]

LEVELS: Final = 4
LENGTH: Final = 64
NUM_CLASSES: Final = 10


class MaskedTransformer(nn.Module):
    """Tokens, their places and a class in; a logit for every grey level of every token out.

    It needs no time: how much is masked can be seen.

    Attributes:
      width: of the tokens.
      depth: blocks.
      num_heads: attention heads.
      mlp_width: hidden width of each block's perceptron.
    """

    width: int = 64
    depth: int = 3
    num_heads: int = 4
    mlp_width: int = 192

    @nn.compact
    def __call__(self, x: jax.Array, label: jax.Array) -> jax.Array:
        """Tokens (batch, 64), 4 where masked, classes (batch,), 10 for none -> (batch, 64, 4)."""
        place = self.param("place", nn.initializers.normal(0.02), (LENGTH, self.width))
        h = nn.Embed(LEVELS + 1, self.width, name="token")(x) + place[None]
        modulation = nn.Embed(NUM_CLASSES + 1, self.width, name="label")(label)
        modulation = nn.Dense(6 * self.width, name="modulation")(nn.silu(modulation))
        for i in range(self.depth):
            h = _Block(self.num_heads, self.mlp_width, name=f"block_{i}")(h, modulation)
        return nn.Dense(LEVELS, name="out")(h)


def apply(
    params: Mapping[str, PyTree], x: jax.Array, t: jax.Array, label: jax.Array | None = None
) -> jax.Array:
    """The network with its default sizes, as a `discrete.TokenFn` calls it.

    Args:
      params: from `load_masked_digits_model`.
      x: (batch, 64) int32 tokens, 4 where masked, row by row.
      t: (batch,), not used.
      label: (batch,) classes, 10 or None for none.

    Returns:
      (batch, 64, 4) logits.
    """
    del t
    label = jnp.full(x.shape[:1], NUM_CLASSES) if label is None else label
    return cast(jax.Array, MaskedTransformer().apply({"params": params}, x, label))


def load_tokens() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits as tokens (1797, 64), int32, and their labels (1797,).

    Raises:
      ImportError: scikit-learn is not installed.
    """
    images, labels = load_data()
    levels = np.clip(np.floor((images + 1) * LEVELS / 2), 0, LEVELS - 1)
    return levels.reshape(-1, LENGTH).astype(np.int32), labels


def load_masked_digits_model() -> TokenFn:
    """The bundled masked model; `cond` is {"label": (batch,) int32}, 10 for any class.

    Raises:
      ImportError: flax or safetensors is missing.
    """
    return TokenFn(apply, load_params(_file()), LEVELS)


def _file() -> PyTree:
    from importlib import resources

    return resources.files(__package__) / "masked_digits.safetensors"
