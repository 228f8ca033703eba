"""The networks of `networks.py` in PyTorch, each a function (params, x, t) of the same parameters.

Parameters are those of the JAX network, moved leaf by leaf with `moved`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from networks import HEADS, PATCH, WIDTH, time_features
from torch.nn import functional


def moved(leaf: Any, device: str, dtype: Any) -> Any:
    """A parameter as a tensor; kernels of convolutions in PyTorch's order of axes."""
    tensor = torch.from_numpy(np.array(leaf, np.float32)).to(device, dtype)
    return tensor.permute(3, 2, 0, 1).contiguous() if tensor.ndim == 4 else tensor


def mlp(params: Any, x: Any, t: Any) -> Any:
    """`networks.mlp`."""
    hidden = torch.tanh(x @ params["in"] + t[:, None])
    return torch.tanh(hidden @ params["middle"]) @ params["out"]


def transformer(params: Any, x: Any, t: Any) -> Any:
    """`networks.transformer`, with PyTorch's own attention and normalisation."""
    batch, height, width, channels = x.shape
    rows, columns = height // PATCH, width // PATCH
    patches = x.reshape(batch, rows, PATCH, columns, PATCH, channels)
    patches = patches.permute(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
    level = time_features(t.float(), WIDTH, torch).to(x.dtype) @ params["time"]
    h = patches @ params["patch"] + params["position"] + level[:, None]
    for block in params["blocks"]:
        qkv = functional.layer_norm(h, (WIDTH,)) @ block["qkv"]
        q, k, v = qkv.reshape(batch, rows * columns, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        h = h + mixed.reshape(batch, rows * columns, WIDTH) @ block["out"]
        wide = functional.gelu(functional.layer_norm(h, (WIDTH,)) @ block["up"], approximate="tanh")
        h = h + wide @ block["down"]
    h = functional.layer_norm(h, (WIDTH,)) @ params["pixels"]
    h = h.reshape(batch, rows, columns, PATCH, PATCH, channels)
    return h.permute(0, 1, 3, 2, 4, 5).reshape(x.shape)


def unet(params: Any, x: Any, t: Any) -> Any:
    """`unet.UNet` without a class."""
    rates = torch.logspace(-1, 5, 32, 2.0, dtype=x.dtype, device=x.device)
    angles = t.to(x.dtype)[:, None] * rates
    features = torch.cat([angles.sin(), angles.cos()], -1)
    condition = _dense(params["Dense_0"], functional.silu(_dense(params["Dense_1"], features)))
    condition = functional.silu(condition + params["Dense_2"]["kernel"][-1])
    blocks = iter([params[f"_Residual_{i}"] for i in range(10)])
    h = _conv(params["Conv_0"], x.permute(0, 3, 1, 2))
    skips = [h]
    for level in range(3):
        if level:
            h = functional.avg_pool2d(h, 2)
            skips.append(h)
        h = _residual(next(blocks), h, condition)
        skips.append(h)
    h = _residual(next(blocks), _attention(params["_Attention_0"], h), condition)
    for level in (2, 1, 0):
        for _ in range(2):
            h = _residual(next(blocks), torch.cat([h, skips.pop()], 1), condition)
        if level:
            h = functional.interpolate(h, scale_factor=2)
    h = _conv(params["Conv_1"], functional.silu(_group_norm(params["GroupNorm_0"], h)))
    return h.permute(0, 2, 3, 1)


def _residual(p: Any, x: Any, condition: Any) -> Any:
    h = _conv(p["Conv_0"], functional.silu(_group_norm(p["GroupNorm_0"], x)))
    scale, shift = _dense(p["Dense_0"], condition)[:, :, None, None].chunk(2, 1)
    h = _conv(p["Conv_1"], functional.silu(_group_norm(p["GroupNorm_1"], h) * (1 + scale) + shift))
    if "Dense_1" in p:
        x = _dense(p["Dense_1"], x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return x + h


def _attention(p: Any, x: Any) -> Any:
    h = _group_norm(p["GroupNorm_0"], x).flatten(2).transpose(1, 2)
    weights = p["MultiHeadDotProductAttention_0"]

    def project(name: str) -> Any:
        kernel, bias = weights[name]["kernel"], weights[name]["bias"]
        out = h @ kernel.flatten(1) + bias.flatten()
        return out.unflatten(-1, bias.shape).transpose(1, 2)

    mixed = functional.scaled_dot_product_attention(*map(project, ("query", "key", "value")))
    mixed = mixed.transpose(1, 2).flatten(2)
    out = mixed @ weights["out"]["kernel"].flatten(0, 1) + weights["out"]["bias"]
    return x + out.transpose(1, 2).reshape(x.shape)


def _conv(p: Any, x: Any) -> Any:
    return functional.conv2d(x, p["kernel"], p["bias"], padding=1)


def _dense(p: Any, x: Any) -> Any:
    return x @ p["kernel"] + p["bias"]


def _group_norm(p: Any, x: Any) -> Any:
    return functional.group_norm(x, 8, p["scale"], p["bias"], 1e-6)


# by the number of `networks.network`
TWINS: tuple[Callable[..., Any], ...] = (mlp, transformer, transformer, unet)
