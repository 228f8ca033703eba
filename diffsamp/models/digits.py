"""A small pretrained diffusion transformer of 8x8 handwritten digits.

The network is a DiT (Peebles & Xie 2023, arXiv:2212.09748) with the shared modulation
projection of PixArt-alpha (Chen et al. 2023, arXiv:2310.00426, "adaLN-single"), trained with
the EDM objective (Karras et al. 2022, arXiv:2206.00364) on the 1797 images of scikit-learn's
`load_digits`. It is class-conditional, and also unconditional: a tenth of the training
images had their label dropped. `benchmarks/train_digits.py` reproduces the weights.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Final, cast

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core.files import write_atomically
from diffsamp._core.types import PyTree
from diffsamp.processes import edm
from diffsamp.score import ScoreFn

_EXTRA_HINT: Final = 'install it with: pip install "diffsamp[models]"'

try:
    from flax import linen as nn
except ImportError as error:  # pragma: no cover - depends on the environment
    raise ImportError(f"diffsamp.models.digits needs flax; {_EXTRA_HINT}") from error

__all__ = [
    "IMAGE_SHAPE",
    "NUM_CLASSES",
    "SIGMA_DATA",
    "DigitsTransformer",
    "apply",
    "load_data",
    "load_digits_model",
    "load_params",
    "save_params",
]

SIGMA_DATA: Final[float] = 0.7521
"""Standard deviation of all pixels of the data, scaled to [-1, 1]."""

IMAGE_SHAPE: Final[tuple[int, int, int]] = (8, 8, 1)
"""Shape of one image: height, width, channels."""

NUM_CLASSES: Final[int] = 10
"""Number of digit classes. The label `NUM_CLASSES` itself means "no label"."""

_WEIGHTS_FILE: Final = "digits.safetensors"
_PATCH: Final = 2


def _layer_norm(x: jax.Array) -> jax.Array:
    """Normalises the last axis, without learned scale or offset (the modulation has both)."""
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-6)


def _modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Applies a per-example shift and scale, (batch, width), to (batch, tokens, width)."""
    return x * (1.0 + scale[:, None, :]) + shift[:, None, :]


def _fourier_features(t: jax.Array, num_features: int) -> jax.Array:
    """Sines and cosines of `t` at angular frequencies from 1/2 to 32."""
    # c_noise = log(sigma)/4 spans about 2.7 over sigma in [0.002, 80]: the lowest frequency is
    # monotone over that range, and the highest still resolves a factor of 2 in sigma smoothly.
    frequencies = jnp.asarray(np.geomspace(0.5, 32.0, num_features // 2), dtype=t.dtype)
    angles = t[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class _Block(nn.Module):
    """Self-attention and a two-layer perceptron, both modulated and gated."""

    num_heads: int
    mlp_width: int

    @nn.compact
    def __call__(self, x: jax.Array, modulation: jax.Array) -> jax.Array:
        """Maps tokens (batch, tokens, width), given the shared modulation (batch, 6 width)."""
        batch, tokens, width = x.shape
        head_width = width // self.num_heads
        bias = self.param("modulation_bias", nn.initializers.zeros, (6 * width,))
        modulation = modulation + bias.astype(x.dtype)[None, :]
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(modulation, 6, axis=-1)

        h = _modulate(_layer_norm(x), shift_1, scale_1)
        h = nn.Dense(3 * width, dtype=x.dtype, name="attention_qkv")(h)
        h = h.reshape(batch, tokens, 3, self.num_heads, head_width)
        query, key, value = h[:, :, 0], h[:, :, 1], h[:, :, 2]
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) * (1.0 / math.sqrt(head_width))
        attention = jax.nn.softmax(logits, axis=-1)
        h = jnp.einsum("bhqk,bkhd->bqhd", attention, value).reshape(batch, tokens, width)
        h = nn.Dense(width, dtype=x.dtype, name="attention_out")(h)
        x = x + gate_1[:, None, :] * h

        h = _modulate(_layer_norm(x), shift_2, scale_2)
        h = nn.Dense(self.mlp_width, dtype=x.dtype, name="mlp_in")(h)
        h = nn.Dense(width, dtype=x.dtype, name="mlp_out")(nn.gelu(h, approximate=True))
        return x + gate_2[:, None, :] * h


class DigitsTransformer(nn.Module):
    """Diffusion transformer for 8x8 images; its output is the raw EDM network output F.

    The computation runs in the dtype of `x`; the parameters are stored in float32.

    Attributes:
        width: Width of the tokens.
        depth: Number of transformer blocks.
        num_heads: Number of attention heads.
        mlp_width: Width of the hidden layer of each block's perceptron.
    """

    width: int = 64
    depth: int = 4
    num_heads: int = 4
    mlp_width: int = 224

    @nn.compact
    def __call__(
        self, x: jax.Array, c_noise: jax.Array, label: jax.Array | None = None
    ) -> jax.Array:
        """Evaluates the network.

        Args:
            x: Images scaled by EDM's `c_in`, (batch, 8, 8, 1), floating point.
            c_noise: EDM's noise conditioning `log(sigma) / 4`, (batch,).
            label: Integer class 0..9 of each image, or 10 for "no label", (batch,). Default:
                no labels.

        Returns:
            The raw network output F, (batch, 8, 8, 1), in the dtype of `x`.

        Raises:
            ValueError: If the shapes do not fit.
        """
        if x.ndim != 4 or x.shape[1:] != IMAGE_SHAPE:
            raise ValueError(f"x must have shape (batch, 8, 8, 1), got {x.shape}")
        batch = x.shape[0]
        if c_noise.shape != (batch,):
            raise ValueError(f"c_noise must have shape ({batch},), got {c_noise.shape}")
        if label is None:
            label = jnp.full((batch,), NUM_CLASSES, dtype=jnp.int32)
        elif label.shape != (batch,):
            raise ValueError(f"label must have shape ({batch},), got {label.shape}")
        dtype = x.dtype
        height, width, channels = IMAGE_SHAPE
        rows, columns = height // _PATCH, width // _PATCH
        patch_size = _PATCH * _PATCH * channels

        condition = _fourier_features(c_noise.astype(dtype), self.width)
        condition = nn.silu(nn.Dense(self.width, dtype=dtype, name="noise_in")(condition))
        condition = nn.Dense(self.width, dtype=dtype, name="noise_out")(condition)
        embedding = self.param(
            "label_embedding", nn.initializers.normal(0.02), (NUM_CLASSES + 1, self.width)
        )
        # A one-hot product rather than a gather: on CPU the gradient of a gather is a slow scatter.
        one_hot = jax.nn.one_hot(label, NUM_CLASSES + 1, dtype=dtype)
        condition = nn.silu(condition + one_hot @ embedding.astype(dtype))

        # One projection serves every block, which differ by a learned offset only. With the
        # gates at zero each block starts as the identity.
        modulation = nn.Dense(
            6 * self.width, dtype=dtype, kernel_init=nn.initializers.zeros, name="modulation"
        )(condition)

        patches = x.reshape(batch, rows, _PATCH, columns, _PATCH, channels)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, patch_size)
        h = nn.Dense(self.width, dtype=dtype, name="patch_in")(patches)
        position = self.param(
            "position_embedding", nn.initializers.normal(0.02), (rows * columns, self.width)
        )
        h = h + position.astype(dtype)[None, :, :]
        for index in range(self.depth):
            h = _Block(self.num_heads, self.mlp_width, name=f"block_{index}")(h, modulation)

        final = nn.Dense(
            2 * self.width, dtype=dtype, kernel_init=nn.initializers.zeros, name="final_modulation"
        )(condition)
        shift, scale = jnp.split(final, 2, axis=-1)
        h = _modulate(_layer_norm(h), shift, scale)
        h = nn.Dense(patch_size, dtype=dtype, kernel_init=nn.initializers.zeros, name="patch_out")(
            h
        )
        h = h.reshape(batch, rows, columns, _PATCH, _PATCH, channels)
        return h.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels)


def apply(
    params: Mapping[str, PyTree], x: jax.Array, t: jax.Array, label: jax.Array | None = None
) -> jax.Array:
    """Evaluates the network with its default sizes.

    This is a module-level function so that its identity is stable: as a static argument of
    `jax.jit` it never causes a recompilation.

    Args:
        params: Nested parameters, as from `load_params`.
        x: Images scaled by EDM's `c_in`, (batch, 8, 8, 1).
        t: EDM's noise conditioning `log(sigma) / 4`, (batch,).
        label: Integer class of each image, (batch,), with 10 for "no label"; None for no labels.

    Returns:
        The raw EDM network output F, (batch, 8, 8, 1).
    """
    return cast(jax.Array, DigitsTransformer().apply({"params": params}, x, t, label))


def _flatten(params: Mapping[str, PyTree], prefix: str = "") -> dict[str, np.ndarray]:
    """Nested parameters to {"block_0/mlp_in/kernel": array}."""
    flat: dict[str, np.ndarray] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{name}/"))
        else:
            flat[prefix + name] = np.ascontiguousarray(value)
    return flat


def _unflatten(flat: Mapping[str, np.ndarray]) -> dict[str, PyTree]:
    """The inverse of `_flatten`, with jax arrays as leaves."""
    nested: dict[str, PyTree] = {}
    for path, value in flat.items():
        *folders, name = path.split("/")
        node = nested
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = jnp.asarray(value)
    return nested


def load_params(path: str | os.PathLike[str] | None = None) -> dict[str, PyTree]:
    """Reads the pretrained weights that ship with the package, or others that `save_params` wrote.

    Args:
        path: a safetensors file; None: the weights of `DigitsTransformer` that ship.

    Returns:
        The nested parameters, float32.

    Raises:
        ImportError: If safetensors is not installed.
    """
    try:
        from safetensors import numpy as safetensors_numpy
    except ImportError as error:
        raise ImportError(f"load_params needs safetensors; {_EXTRA_HINT}") from error
    file = resources.files(__package__) / _WEIGHTS_FILE if path is None else Path(path)
    data = file.read_bytes()
    return _unflatten(safetensors_numpy.load(data))


def save_params(path: str | os.PathLike[str], params: Mapping[str, PyTree]) -> None:
    """Writes parameters as a safetensors file, atomically.

    Args:
        path: The file to write. Its folder must exist.
        params: Nested parameters, of `DigitsTransformer` or any network.

    Raises:
        ImportError: If safetensors is not installed.
    """
    try:
        from safetensors import numpy as safetensors_numpy
    except ImportError as error:
        raise ImportError(f"save_params needs safetensors; {_EXTRA_HINT}") from error
    write_atomically(path, safetensors_numpy.save(_flatten(params)))


def load_data() -> tuple[np.ndarray, np.ndarray]:
    """Loads the training data from scikit-learn, which carries it: nothing is downloaded.

    Returns:
        Images, float32 (1797, 8, 8, 1) in [-1, 1], and their int32 labels, (1797,).

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f"load_data needs scikit-learn; {_EXTRA_HINT}") from error
    digits = load_digits()
    images = (digits.images / 8.0 - 1.0).astype(np.float32)[..., None]
    return images, digits.target.astype(np.int32)


def load_digits_model() -> ScoreFn:
    """The bundled pretrained network as a `ScoreFn` on the EDM process.

    It takes states (batch, 8, 8, 1) and, as `cond`, {"label": (batch,) int32}, where 10 or no
    label at all samples from all classes.

    Raises:
      ImportError: flax or safetensors is missing.
    """
    return ScoreFn(apply, load_params(), edm(), prediction="edm_f", sigma_data=SIGMA_DATA)
