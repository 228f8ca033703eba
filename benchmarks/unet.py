"""A small convolutional U-Net of images, and the data sets it is trained on.

The second real network of the benchmarks: `train_unet.py` trains it, `load` reads what that wrote.
Blocks as in Ho et al. 2020 (arXiv:2006.11239) with the modulation of Dhariwal & Nichol 2021
(arXiv:2105.05233), EDM's preconditioning around it (Karras et al. 2022, arXiv:2206.00364).
"""

from __future__ import annotations

import functools
import io
import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import diffsamp as ds
from diffsamp.models.digits import load_params

NUM_CLASSES = 10
WEIGHTS = Path(__file__).resolve().parent / "weights"
# width of the network, pooling of the images, standard deviation of the pixels in [-1, 1]
SETTINGS: dict[str, tuple[int, int, float]] = {
    "fashion": (32, 2, 0.6264),
    "cifar10": (64, 1, 0.5),
}
DOWNLOADS = {
    "fashion": "fashion_mnist.npz (x_train, y_train: uint8), from the Fashion-MNIST project's page",
    "cifar10": "CIFAR-10's 50,000 training images as records of label (uint8), length (uint16), "
    "JPEG; the images are on the CIFAR-10 page of the University of Toronto",
}


def Conv(features: int, **options: Any) -> nn.Conv:
    """A 3 x 3 convolution."""
    return nn.Conv(features, (3, 3), **options)


class _Residual(nn.Module):
    """Two 3 x 3 convolutions, the second modulated by the noise level and the class."""

    channels: int

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        """(batch, height, width, in) to (batch, height, width, channels)."""
        h = Conv(self.channels)(nn.silu(nn.GroupNorm(8)(x)))
        modulation = nn.Dense(2 * self.channels)(condition)[:, None, None, :]
        scale, shift = jnp.split(modulation, 2, axis=-1)
        h = nn.silu(nn.GroupNorm(8)(h) * (1.0 + scale) + shift)
        h = Conv(self.channels, kernel_init=nn.initializers.zeros)(h)
        return (x if x.shape[-1] == self.channels else nn.Dense(self.channels)(x)) + h


class _Attention(nn.Module):
    """Self-attention over all pixels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Adds what the pixels say to each other; the shape stays."""
        batch, height, width, channels = x.shape
        h = nn.GroupNorm(8)(x).reshape(batch, height * width, channels)
        h = nn.MultiHeadDotProductAttention(4, out_kernel_init=nn.initializers.zeros)(h)
        return x + h.reshape(x.shape)


class UNet(nn.Module):
    """Three resolutions, one residual block down and two up, attention at the lowest.

    Attributes:
        width: channels at the full resolution; twice as many below.
        channels: of the images.
    """

    width: int = 32
    channels: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, c_noise: jax.Array, label: jax.Array) -> jax.Array:
        """The raw output F for images (batch, height, width, channels) scaled by c_in."""
        frequencies = jnp.asarray(np.geomspace(0.5, 32.0, 32), x.dtype)
        angles = c_noise.astype(x.dtype)[:, None] * frequencies
        features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        condition = nn.Dense(4 * self.width)(nn.silu(nn.Dense(4 * self.width)(features)))
        one_hot = jax.nn.one_hot(label, NUM_CLASSES + 1, dtype=x.dtype)
        condition = nn.silu(condition + nn.Dense(4 * self.width, use_bias=False)(one_hot))
        multiples = (1, 2, 2)
        h = Conv(self.width)(x)
        skips = [h]
        for level, multiple in enumerate(multiples):
            if level:
                h = nn.avg_pool(h, (2, 2), (2, 2))
                skips.append(h)
            h = _Residual(self.width * multiple)(h, condition)
            skips.append(h)
        h = _Attention()(h)
        h = _Residual(self.width * multiples[-1])(h, condition)
        for level, multiple in reversed(list(enumerate(multiples))):
            for _ in range(2):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = _Residual(self.width * multiple)(h, condition)
            if level:
                h = jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)
        h = nn.silu(nn.GroupNorm(8)(h))
        return Conv(self.channels, kernel_init=nn.initializers.zeros)(h)


@functools.cache
def apply_for(name: str) -> Any:
    """The apply function of a data set's network; one object per name, as `ScoreFn` wants it."""
    module = UNet(SETTINGS[name][0], 3 if name == "cifar10" else 1)

    def apply(params: Any, x: jax.Array, t: jax.Array, label: jax.Array | None = None) -> jax.Array:
        if label is None:
            label = jnp.full((x.shape[0],), NUM_CLASSES, jnp.int32)
        return module.apply({"params": params}, x, t, label)

    return apply


def init_for(name: str, image_shape: tuple[int, ...]) -> Any:
    """key -> parameters."""
    module = UNet(SETTINGS[name][0], image_shape[-1])

    def init(key: jax.Array) -> Any:
        zeros = jnp.zeros((1, *image_shape)), jnp.zeros((1,)), jnp.zeros((1,), jnp.int32)
        return module.init(key, *zeros)["params"]

    return init


def load(name: str) -> ds.ScoreFn:
    """The trained network of a data set on the EDM process, with `cond` {"label": (batch,)}.

    Raises:
      FileNotFoundError: there are no weights; train them with `train_unet.py`.
    """
    params = load_params(WEIGHTS / f"unet_{name}.safetensors")
    return ds.ScoreFn(
        apply_for(name),
        params,
        ds.processes.edm(),
        prediction="edm_f",
        sigma_data=SETTINGS[name][2],
    )


def load_data(name: str, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, height, width, channels), float32 in [-1, 1], and int32 labels.

    Fashion-MNIST is padded to 32 x 32 and pooled to 16 x 16, which a CPU can train in an hour.
    """
    if name == "fashion":
        with np.load(path, allow_pickle=False) as file:
            images, labels = file["x_train"], file["y_train"]
        images = np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None]
    else:
        from PIL import Image

        raw, at, decoded, names = Path(path).read_bytes(), 0, [], []
        while at < len(raw):
            label, length = struct.unpack_from("<BH", raw, at)
            picture = Image.open(io.BytesIO(raw[at + 3 : at + 3 + length]))
            decoded.append(np.asarray(picture.convert("RGB")))
            names.append(label)
            at += 3 + length
        images, labels = np.stack(decoded), np.asarray(names)
    pool = SETTINGS[name][1]
    n, height, width, channels = images.shape
    pooled = images.reshape(n, height // pool, pool, width // pool, pool, channels)
    scaled = pooled.mean(axis=(2, 4), dtype=np.float32) / 127.5 - 1.0
    return scaled.astype(np.float32), labels.astype(np.int32)
