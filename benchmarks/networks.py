"""The networks whose time is measured: a small MLP, a 12-layer transformer, a U-Net, convolutions.

Random weights, since only the time matters, small enough at the end that samples stay bounded. All
are `apply(params, x, t)` and have a twin in `torch_networks.py` that takes the same parameters.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import unet
from flax import linen as nn

WIDTH, DEPTH, HEADS, PATCH = 384, 12, 6, 4
IMAGE = (32, 32, 3)


@dataclasses.dataclass(frozen=True)
class Network:
    """A network to be measured.

    Attributes:
      name: for the tables.
      apply: (params, x, t) -> an array like x.
      params: its parameters.
      shape: of one sample.
      batch: samples at once.
    """

    name: str
    apply: Callable[..., jax.Array]
    params: Any
    shape: tuple[int, ...]
    batch: int

    @property
    def params_are_bf16(self) -> bool:
        """Whether it computes in bfloat16."""
        return jax.tree.leaves(self.params)[0].dtype == jnp.bfloat16

    def start(self) -> jax.Array:
        """Noise to start from."""
        return jax.random.normal(jax.random.key(0), (self.batch, *self.shape))


def time_features(t: Any, width: int, xp: Any = jnp) -> Any:
    """Cosines and sines of t, (batch,) -> (batch, width); `xp` is jax.numpy or torch."""
    frequencies = xp.exp(xp.arange(width // 2) * (-math.log(1e4) / (width // 2)))
    angles = t[:, None] * frequencies[None]
    return xp.concatenate([xp.cos(angles), xp.sin(angles)], -1)


def mlp(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
    """Two hidden layers of 256 for vectors of 64."""
    hidden = jnp.tanh(x @ params["in"] + t[:, None])
    return jnp.tanh(hidden @ params["middle"]) @ params["out"]


def mlp_params() -> dict[str, np.ndarray]:
    """Random weights of `mlp`."""
    rng = np.random.default_rng(0)
    shapes = {"in": (64, 256), "middle": (256, 256), "out": (256, 64)}
    return {k: _matrix(rng, s, 0.1 if k == "out" else 1.0) for k, s in shapes.items()}


def transformer(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
    """A plain pre-norm transformer over patches, the noise level added to every token."""
    batch, height, width, channels = x.shape
    rows, columns = height // PATCH, width // PATCH
    patches = x.reshape(batch, rows, PATCH, columns, PATCH, channels)
    patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
    level = time_features(t.astype(jnp.float32), WIDTH).astype(x.dtype) @ params["time"]
    h = patches @ params["patch"] + params["position"] + level[:, None]
    for block in params["blocks"]:
        qkv = (_norm(h) @ block["qkv"]).reshape(batch, rows * columns, 3, HEADS, -1)
        mixed = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        h = h + mixed.reshape(batch, rows * columns, WIDTH) @ block["out"]
        h = h + jax.nn.gelu(_norm(h) @ block["up"], approximate=True) @ block["down"]
    h = (_norm(h) @ params["pixels"]).reshape(batch, rows, columns, PATCH, PATCH, channels)
    return h.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape)


def transformer_params(depth: int = DEPTH) -> dict[str, Any]:
    """Random weights of `transformer`, 21 million at 12 layers."""
    rng = np.random.default_rng(0)
    pixels, tokens = PATCH * PATCH * IMAGE[-1], IMAGE[0] * IMAGE[1] // PATCH**2
    shapes = {
        "qkv": (WIDTH, 3 * WIDTH),
        "out": (WIDTH, WIDTH),
        "up": (WIDTH, 4 * WIDTH),
        "down": (4 * WIDTH, WIDTH),
    }
    return {
        "patch": _matrix(rng, (pixels, WIDTH)),
        "position": _matrix(rng, (tokens, WIDTH)),
        "time": _matrix(rng, (WIDTH, WIDTH)),
        "blocks": [{k: _matrix(rng, s) for k, s in shapes.items()} for _ in range(depth)],
        "pixels": _matrix(rng, (WIDTH, pixels), 0.1),
    }


def _norm(h: jax.Array) -> jax.Array:
    wide = h.astype(jnp.float32)
    mean = jnp.mean(wide, -1, keepdims=True)
    variance = jnp.mean((wide - mean) ** 2, -1, keepdims=True)
    return ((wide - mean) * jax.lax.rsqrt(variance + 1e-5)).astype(h.dtype)


def _matrix(rng: np.random.Generator, shape: tuple[int, int], scale: float = 1.0) -> np.ndarray:
    return (scale * rng.normal(size=shape) / math.sqrt(shape[0])).astype(np.float32)


COUNT = 4


@functools.cache
def network(which: int, full: bool) -> Network:
    """One of the `COUNT` networks of a run: the MLP, the transformer at two batches, the U-Net.

    Args:
      which: its number.
      full: for a GPU, the transformer at batch 1 and 64 in bf16 and a wide U-Net at batch 64; else
        sizes that a CPU does in minutes, float32, the transformer at batch 1 and 4, and the U-Net
        that was trained for the search at batch 8.
    """
    if which == 0:
        params: Any = jax.tree.map(jnp.asarray, mlp_params())
        return Network("MLP, batch 256", mlp, params, (64,), 256)
    if which < 3:
        batch, kind = ((1, 64) if full else (1, 4))[which - 1], "bfloat16" if full else "float32"
        params = jax.tree.map(lambda v: jnp.asarray(v, kind), transformer_params())
        name = f"transformer {DEPTH} x {WIDTH}, {kind}, batch {batch}"
        return Network(name, transformer, params, IMAGE, batch)
    data, shape, batch = ("cifar10", IMAGE, 64) if full else ("fashion", (16, 16, 1), 8)
    params = jax.jit(unet.init_for(data, shape))(jax.random.key(0))
    # its last layers start at zero, which would leave nothing to compare
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda v: v + jnp.asarray(0.03 * rng.normal(size=v.shape), v.dtype), params
    )
    return Network(f"U-Net, batch {batch}", unet.apply_for(data), params, shape, batch)


CHANNELS = 64
CONVOLUTIONS = ("channels last", "channels first", "strided", "transposed", "grouped", "depthwise")


class Convolutions(nn.Module):
    """Three residual convolutions of one kind between two plain ones, channels last."""

    kind: str

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """(batch, height, width, channels), (batch,) -> like x."""
        groups = {"grouped": 8, "depthwise": CHANNELS}.get(self.kind, 1)
        h = nn.Conv(CHANNELS, (3, 3))(x) + t[:, None, None, None]
        for _ in range(3):
            if self.kind in ("strided", "transposed"):
                low = nn.silu(nn.Conv(CHANNELS, (3, 3), strides=2)(h))
                if self.kind == "transposed":
                    change = nn.ConvTranspose(CHANNELS, (3, 3), strides=(2, 2))(low)
                else:
                    low = nn.Conv(CHANNELS, (3, 3))(low)
                    change = jnp.repeat(jnp.repeat(low, 2, 1), 2, 2)
            else:
                change = nn.Conv(CHANNELS, (3, 3), feature_group_count=groups)(h)
                if self.kind == "depthwise":
                    change = nn.Dense(CHANNELS)(nn.silu(change))
            h = h + nn.silu(change)
        return 0.1 * nn.Conv(x.shape[-1], (3, 3))(h)


def channels_first(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
    """The same in the layout of what comes from PyTorch, with flax's parameters."""

    def convolve(h: jax.Array, layer: Any) -> jax.Array:
        kernel = jnp.transpose(layer["kernel"], (3, 2, 0, 1))
        return jax.lax.conv(h, kernel, (1, 1), "SAME") + layer["bias"][:, None, None]

    first, *middle, last = (params["params"][f"Conv_{i}"] for i in range(5))
    h = convolve(x, first) + t[:, None, None, None]
    for layer in middle:
        h = h + nn.silu(convolve(h, layer))
    return 0.1 * convolve(h, last)


def convolutional(kind: str, batch: int = 8) -> Network:
    """A small network of one kind of convolution, images of 16 x 16."""
    plain = Convolutions("channels last" if kind == "channels first" else kind)
    shape = (16, 16, 3)
    params = plain.init(jax.random.key(1), jnp.zeros((1, *shape)), jnp.zeros((1,)))
    if kind == "channels first":
        return Network(kind, channels_first, params, (3, 16, 16), batch)
    return Network(kind, plain.apply, params, shape, batch)
