"""How diffusers' pipelines call their networks: arguments, prompts, sizes, decoders."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffsamp._core.types import Apply, Array, PyTree, Value

__all__ = [
    "FAMILIES",
    "Family",
    "Packed",
    "Scaled",
    "denormalised",
    "geometry",
    "tells_sizes",
    "unpacked",
]

Tensors = dict[str, Value]
# what pipelines pass to their `encode_prompt`, whose own defaults differ
_PASSED = ("max_sequence_length", "complex_human_instruction", "clean_caption", "clip_skip")


class Prompt(NamedTuple):
    """What is to be encoded.

    Attributes:
      text: the prompts.
      negative: what "no prompt" says; None: what the pipeline takes by default.
      null: whether the negative one is wanted.
      size: (height, width) in pixels.
      options: further arguments of the pipeline's `encode_prompt`.
    """

    text: Sequence[Value]
    negative: list[str] | None
    null: bool
    size: tuple[int, ...]
    options: Mapping[str, Value]


class Family(NamedTuple):
    """How one class of networks is called.

    Attributes:
      x: its argument for the state.
      encode: (pipeline, prompt, the network's config) -> {argument: tensor}; None: no prompts.
      labels: the argument for class labels, and the config's entry that counts the classes, which
        is the label for "none".
      fixed: further arguments.
      time: what it takes as its time where that is not the scheduler's; (config) -> time.
      packed: whether its state is the latents in tokens of 2 x 2 (Flux).
      frames: whether its state has an axis of frames.
    """

    x: str
    encode: Callable[[Value, Prompt, Mapping[str, Value]], Tensors] | None = None
    labels: tuple[str, str] | None = None
    fixed: Mapping[str, Value] = {}
    time: str | None = None
    packed: bool = False
    frames: bool = False


def _stable(pipe: Value, prompt: Prompt, config: Mapping[str, Value]) -> Tensors:
    """Stable Diffusion 1 and 2."""
    given, null = pipe.encode_prompt(
        prompt.text, "cpu", 1, prompt.null, negative_prompt=prompt.negative, **prompt.options
    )[:2]
    return {"encoder_hidden_states": null if prompt.null else given}


def _pooled(pipe: Value, prompt: Prompt, **more: Value) -> tuple[Value, Value]:
    """(states, pooled) of a pipeline that returns given, null, pooled given, pooled null."""
    four = pipe.encode_prompt(
        prompt=prompt.text,
        device="cpu",
        do_classifier_free_guidance=prompt.null,
        negative_prompt=prompt.negative,
        **more,
        **prompt.options,
    )
    return four[1 if prompt.null else 0], four[3 if prompt.null else 2]


def _unet(pipe: Value, prompt: Prompt, config: Mapping[str, Value]) -> Tensors:
    import torch

    options = dict(prompt.options)
    scale = float(options.pop("guidance_scale", 7.5))
    prompt = prompt._replace(options=options)
    if config.get("addition_embed_type") != "text_time":
        tensors = _stable(pipe, prompt, config)
    else:
        tensors = _xl(pipe, prompt)
    width = config.get("time_cond_proj_dim")
    if width:  # distilled with guidance as an input (LCM), counted from 0
        scales = torch.full((len(tensors["encoder_hidden_states"]),), scale - 1)
        tensors["timestep_cond"] = pipe.get_guidance_scale_embedding(scales, embedding_dim=width)
    return tensors


def _xl(pipe: Value, prompt: Prompt) -> Tensors:
    import torch

    states, pooled = _pooled(pipe, prompt)
    height, width = prompt.size
    times = torch.tensor([[height, width, 0, 0, height, width]], dtype=pooled.dtype)
    times = times.repeat(len(pooled), 1)
    added = {"text_embeds": pooled, "time_ids": times}
    return {"encoder_hidden_states": states, "added_cond_kwargs": added}


def _sd3(pipe: Value, prompt: Prompt, config: Mapping[str, Value]) -> Tensors:
    states, pooled = _pooled(pipe, prompt, prompt_2=None, prompt_3=None)
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


def _flux(pipe: Value, prompt: Prompt, config: Mapping[str, Value]) -> Tensors:
    import torch

    options = dict(prompt.options)
    scale = float(options.pop("guidance_scale", 3.5))
    text = (prompt.negative or [""]) if prompt.null else prompt.text
    states, pooled, _ = pipe.encode_prompt(text, None, device="cpu", **options)
    tensors = {"encoder_hidden_states": states, "pooled_projections": pooled}
    if config.get("guidance_embeds"):
        tensors["guidance"] = torch.full((len(pooled),), scale)
    return tensors


def _masked(pipe: Value, prompt: Prompt) -> Tensors:
    """Those whose text has a mask: states, mask, null states, null mask."""
    options = dict(prompt.options)
    if prompt.negative is not None:
        options["negative_prompt"] = prompt.negative
    four = pipe.encode_prompt(prompt.text, prompt.null, device="cpu", **options)
    states, mask = four[2:] if prompt.null else four[:2]
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


def _pixart(pipe: Value, prompt: Prompt, config: Mapping[str, Value]) -> Tensors:
    import torch

    tensors = _masked(pipe, prompt)
    count = len(tensors["encoder_hidden_states"])
    if tells_sizes(config):
        height, width = map(float, prompt.size)
        tensors["added_cond_kwargs"] = {
            "resolution": torch.tensor([[height, width]]).repeat(count, 1),
            "aspect_ratio": torch.tensor([[height / width]]).repeat(count, 1),
        }
    return tensors


def tells_sizes(config: Mapping[str, Value]) -> bool:
    """Whether it is told the picture's size: those for 1024 pixels are, unless they say so."""
    if "PixArt" not in str(config.get("_class_name")):
        return False
    said = config.get("use_additional_conditions")
    return config.get("sample_size") == 128 if said is None else bool(said)


def _sana(pipe: Value, prompt: Prompt, config: Mapping[str, Value]) -> Tensors:
    return _masked(pipe, prompt)


def _wan(pipe: Value, prompt: Prompt, config: Mapping[str, Value]) -> Tensors:
    given, null = pipe.encode_prompt(
        prompt.text,
        prompt.negative,
        prompt.null,
        device="cpu",
        **prompt.options,
    )
    return {"encoder_hidden_states": null if prompt.null else given}


FAMILIES: dict[str, Family] = {
    "UNet2DModel": Family("sample", labels=("class_labels", "num_class_embeds")),
    "UNet2DConditionModel": Family("sample", _unet),
    "DiTTransformer2DModel": Family(
        "hidden_states", labels=("class_labels", "num_embeds_ada_norm")
    ),
    "PixArtTransformer2DModel": Family(
        "hidden_states",
        _pixart,
        fixed={"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "SD3Transformer2DModel": Family("hidden_states", _sd3),
    # its pipeline divides the scheduler's time by 1000
    "FluxTransformer2DModel": Family("hidden_states", _flux, time="t", packed=True),
    "WanTransformer3DModel": Family("hidden_states", _wan, frames=True),
    "SanaTransformer2DModel": Family("hidden_states", _sana),
}


def encoded(
    encode: Callable[[Value, Prompt, Mapping[str, Value]], Tensors],
    pipeline: Value,
    prompt: Prompt,
    config: Mapping[str, Value],
) -> Tensors:
    """A family's `encode`, without gradients, with what the pipeline itself passes by default."""
    import torch

    taken = inspect.signature(pipeline.encode_prompt).parameters
    given = inspect.signature(pipeline.__call__).parameters
    defaults = {name: given[name].default for name in _PASSED if name in given and name in taken}
    prompt = prompt._replace(options={**defaults, **prompt.options})
    with torch.no_grad():
        return encode(pipeline, prompt, config)


class Packed:
    """Flux: `apply` with the positions of text and picture, which follow from their sizes.

    Args:
      apply: the transformer's.
      grid: (rows, columns) of the tokens.
    """

    def __init__(self, apply: Apply, grid: tuple[int, int]) -> None:
        self.apply, self.grid = apply, grid

    def __call__(self, params: PyTree, x: Array, t: Array, **cond: PyTree) -> PyTree:
        states = cond.get("encoder_hidden_states")
        if states is None:
            raise ValueError(
                "a Flux network needs cond={'encoder_hidden_states': .., 'pooled_projections': ..}:"
                " pass `pretrained.conditions(prompts)`."
            )
        rows, columns = (jnp.arange(size, dtype=jnp.float32) for size in self.grid)
        at = jnp.meshgrid(rows, columns, indexing="ij")
        picture = jnp.stack([jnp.zeros_like(at[0]), *at], -1).reshape(-1, 3)
        words = jnp.zeros((states.shape[1], 3), jnp.float32)
        return self.apply(params, x, t, img_ids=picture, txt_ids=words, **cond)


def unpacked(tokens: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Tokens (batch, rows * columns, 4 channels) as latents (batch, channels, height, width)."""
    rows, columns = grid
    batch, _, width = tokens.shape
    parts = tokens.reshape(batch, rows, columns, width // 4, 2, 2)
    return parts.transpose(0, 3, 1, 4, 2, 5).reshape(batch, width // 4, 2 * rows, 2 * columns)


def denormalised(z: jax.Array, config: Mapping[str, Value]) -> jax.Array:
    """Latents as the decoder takes them: its scaling and shift factors, or mean and deviation."""
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    scale = float(config.get("scaling_factor") or 1.0)
    if mean is not None and deviation is not None:
        shape = (1, -1, *(1,) * (z.ndim - 2))
        mean, deviation = (jnp.asarray(v, z.dtype).reshape(shape) for v in (mean, deviation))
        return z * (deviation / scale) + mean
    return z / scale + float(config.get("shift_factor") or 0.0)


def expect_plain(kind: str, index: Mapping[str, Value], config: Mapping[str, Value]) -> None:
    """Raise for what a network of this class may have, and the pipeline does more for.

    Raises:
      ValueError: two networks in turn, times for each token, further channels of x.
    """
    second = (index.get("transformer_2") or [None])[0]
    if second or index.get("boundary_ratio") is not None or index.get("expand_timesteps"):
        raise ValueError(
            "this pipeline uses two networks in turn, or a time for each token, which is not read: "
            "ds.from_torch(module, ..) wraps each network."
        )
    into, out = config["in_channels"], config.get("out_channels") or config["in_channels"]
    if out not in (into, 2 * into):
        raise ValueError(
            f"the {kind} takes {into} channels and returns {out}: it is given a picture or a mask "
            "beside the state, which is not read. ds.from_torch(module, ..) wraps it, with an "
            "`apply` around that adds them."
        )


class Geometry(NamedTuple):
    """Sizes that belong together.

    Attributes:
      shape: of a state.
      size: of a picture in pixels, (height, width), after the frames of a film.
      grid: (rows, columns) of the transformer's tokens of one frame.
      tokens: how many of them there are; schedules that shift by size ask for it.
    """

    shape: tuple[int, ...]
    size: tuple[int, ...]
    grid: tuple[int, int]
    tokens: int


def geometry(
    family: Family,
    config: Mapping[str, Value],
    vae: Mapping[str, Value],
    size: Sequence[int] | None,
) -> Geometry:
    """The sizes of a network's states, of its pictures and of its tokens.

    Args:
      family: how it is called.
      config: the network's.
      vae: the config of the VAE, or an empty mapping.
      size: of a picture in pixels; None: the network's own.

    Raises:
      ValueError: a size of another length, or that its parts do not divide.
    """
    edge, frame = _compression(vae)
    patch = config.get("patch_size") or 1
    patches = (1, *patch)[-2:] if isinstance(patch, Sequence) else (patch, patch)
    if family.packed:
        patches = (2, 2)
    if size is None:
        own = config.get("sample_size") or 128  # pixels; Flux, which does not say, makes 1024
        side = tuple(own) if isinstance(own, Sequence) else (own, own)
        size = (81, 480, 832) if family.frames else tuple(edge * s for s in side)
    size = tuple(int(s) for s in size)
    names = "(frames, height, width)" if family.frames else "(height, width)"
    if len(size) != (3 if family.frames else 2):
        raise ValueError(f"`size` must be {names} in pixels; got {size}.")
    if any(s % (edge * p) or s < 1 for s, p in zip(size[-2:], patches, strict=True)):
        raise ValueError(
            f"height and width must be multiples of {edge * patches[0]} and {edge * patches[1]}, "
            f"of the VAE's {edge} pixels and the network's patches {patches}; got {size}."
        )
    latents = tuple(s // edge for s in size[-2:])
    frames = ((size[0] - 1) // frame + 1,) if family.frames else ()
    rows, columns = (s // p for s, p in zip(latents, patches, strict=True))
    channels = int(config["in_channels"])
    tokens = math.prod(frames) * rows * columns
    shape = (tokens, channels) if family.packed else (channels, *frames, *latents)
    return Geometry(shape, size, (rows, columns), tokens)


def _compression(vae: Mapping[str, Value]) -> tuple[int, int]:
    """Pixels that a latent covers along an edge, and frames in time."""
    if not vae:
        return 1, 1
    if vae.get("scale_factor_spatial"):
        return int(vae["scale_factor_spatial"]), int(vae["scale_factor_temporal"])
    blocks = vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or ()
    return 2 ** max(0, len(blocks) - 1), 1


class Scaled:
    """`apply` whose time is multiplied by a number of the network's config (Sana)."""

    def __init__(self, apply: Apply, factor: float) -> None:
        self.apply, self.factor = apply, factor

    def __call__(self, params: PyTree, x: Array, t: Array, **cond: PyTree) -> PyTree:
        return self.apply(params, x, t * self.factor, **cond)
