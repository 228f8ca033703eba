"""`from_pretrained`: a folder of diffusers as a network, its sampler, its decoder, its prompts."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core.files import read_json
from diffsamp._core.types import Array, DType, PyTree, Value
from diffsamp.interop import _families as families
from diffsamp.interop._folders import find_folder, load_component, load_text_pipeline
from diffsamp.interop.diffusers import DiffusersSampler, from_diffusers
from diffsamp.interop.diffusers._pipelines import find_pipeline
from diffsamp.interop.torch import extract, from_torch, to_jax
from diffsamp.jobs.sampler import Sampler
from diffsamp.score import ScoreFn

__all__ = ["Pretrained", "from_pretrained"]


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """A pipeline's folder, read by `from_pretrained`.

    Attributes:
      score_fn: the network, without guidance. States are the pipeline's latents, (batch, *shape).
      schedule: what the folder's scheduler amounts to: process, prediction, times and solver.
      shape: of one state, without the batch axis.
      decode: latents to pictures, (batch, channels, height, width) in [-1, 1]: the VAE with its
        scaling and shift factors, its weights as arguments. The `finish` of `ds.generate`. Without
        a VAE, the states themselves.
      folder: where it was found.
      image_size: (height, width) of a picture in pixels, with the frames before them for a film.
    """

    score_fn: ScoreFn
    schedule: DiffusersSampler
    shape: tuple[int, ...]
    decode: Callable[[Array], Array]
    folder: Path
    image_size: tuple[int, ...]
    _family: families.Family = dataclasses.field(repr=False)
    _config: Mapping[str, Value] = dataclasses.field(repr=False)
    _times: Mapping[str, Value] = dataclasses.field(repr=False)
    _text: Callable[[], Value] = dataclasses.field(repr=False)

    @property
    def has_guidance_inside(self) -> bool:
        """Whether the guidance scale is an input of the network: of `conditions`, not of `cfg`."""
        return bool(self._config.get("guidance_embeds") or self._config.get("time_cond_proj_dim"))

    def sampler(self, n: int, **options: Value) -> Sampler:
        """The network with its own scheduler's sampler.

        Args:
          n: as the pipeline's `num_inference_steps`.
          **options: of `schedule.times`, such as `sigmas` or `mu`. The size of the picture is
            given where the schedule shifts by it.

        Returns:
          A `Sampler`: call it with a key and (batch, *shape), or take its `tableau`.
        """
        schedule = self.schedule
        size = {} if set(options) & {"mu", "image_seq_len", "image_size"} else self._times
        tableau = schedule.solver(schedule.process, schedule.times(n, **size, **options))
        return Sampler(self.score_fn, tableau)

    def conditions(self, prompts: str | Sequence[Value], **options: Value) -> dict[str, PyTree]:
        """The network's conditions for prompts, by the folder's own text encoders in PyTorch.

        Args:
          prompts: one text per sample; or class labels, integers, for networks of classes.
          **options: of the pipeline's `encode_prompt`, such as `max_sequence_length`; and
            `guidance_scale` for networks that have it as an input: Flux (3.5 unless given) and
            Stable Diffusion distilled to few steps (7.5).

        Returns:
          {name: array with the leading axis batch}: the `cond` of `ds.sample`.

        Raises:
          ModuleNotFoundError: transformers is missing.
          ValueError: a network without prompts and labels.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if self._family.labels and self._config.get(self._family.labels[1]):
            labels = np.asarray(texts)
            count = self._config[self._family.labels[1]]
            if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() > count:
                raise ValueError(
                    f"this network takes labels, integers from 0 to {count}; got {texts}."
                )
            return {self._family.labels[0]: jnp.asarray(labels, jnp.int32)}
        return self._encoded(texts, None, False, options)

    def null(self, negative: str | None = None, **options: Value) -> dict[str, PyTree]:
        """The `null` of `ds.guidance.cfg`: what the pipeline's guidance takes for no prompt.

        Args:
          negative: a negative prompt. None: none, as the pipeline does it by itself.
          **options: as for `conditions`.

        Returns:
          {name: array without a batch axis}.

        Raises:
          ModuleNotFoundError: transformers is missing.
          ValueError: a network without prompts and labels.
        """
        if self._family.labels and self._config.get(self._family.labels[1]):
            return {self._family.labels[0]: jnp.int32(self._config[self._family.labels[1]])}
        words = None if negative is None else [negative]
        return jax.tree.map(lambda a: a[0], self._encoded([""], words, True, options))

    def _encoded(
        self,
        texts: Sequence[Value],
        negative: list[str] | None,
        null: bool,
        options: Mapping[str, Value],
    ) -> dict[str, PyTree]:
        encode = self._family.encode
        if encode is None:
            raise ValueError("this network takes no prompts: sample it without `cond`.")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"prompts must be texts; got {texts}.")
        pipeline = self._text()
        prompt = families.Prompt(texts, negative, null, self.image_size[-2:], options)
        return jax.tree.map(to_jax, families.encoded(encode, pipeline, prompt, self._config))


def from_pretrained(
    folder: str | os.PathLike[str],
    *,
    size: Sequence[int] | None = None,
    scheduler: Mapping[str, Value] | None = None,
    ignore: Iterable[str] = (),
    dtype: DType = None,
    variant: str | None = None,
) -> Pretrained:
    """Read a pipeline that diffusers wrote: its network, scheduler, VAE and text encoders.

    Nothing is downloaded and no pickle is read. The classes of networks are UNet2DModel,
    UNet2DConditionModel, DiT, PixArt, SD3, Flux, Wan and Sana transformers; the scheduler is any
    that `from_diffusers` reads.

    Examples:
      >>> import jax, diffsamp as ds
      >>> model = ds.from_pretrained("stable-diffusion")  # doctest: +SKIP
      >>> cond = model.conditions(["a cat", "a dog"])  # doctest: +SKIP
      >>> guided = ds.guidance.cfg(model.score_fn, 7.5, null=model.null())  # doctest: +SKIP
      >>> x_T = model.score_fn.process.prior_sample(key, (2, *model.shape))  # doctest: +SKIP
      >>> x = ds.sample(guided, model.sampler(20).tableau, x_T, cond=cond)  # doctest: +SKIP
      >>> pictures = model.decode(x)  # doctest: +SKIP

    Args:
      folder: with `model_index.json`; or the name of a model in huggingface_hub's cache.
      size: of a picture in pixels, (height, width), and (frames, height, width) of a film. None:
        the network's own; films are 81 x 480 x 832.
      scheduler: fields that replace the config's, such as {"_class_name":
        "DPMSolverMultistepScheduler"}.
      ignore: fields of the config to leave out knowingly, as for `from_diffusers`.
      dtype: of the network's and text encoders' weights, such as jnp.bfloat16; the VAE's are
        float32. None: float32.
      variant: of the files, such as "fp16".

    Returns:
      A `Pretrained`.

    Raises:
      FileNotFoundError: no such folder, name in the cache, or part of the pipeline.
      ValueError: a pickle, a class of network or scheduler that is not read, a size that does not
        fit.
      ModuleNotFoundError: diffusers is missing (`pip install "diffsamp[diffusers]"`).
    """
    path = find_folder(folder)
    index = read_json(path / "model_index.json")
    schedule, schedule_config = _schedule(path, index, scheduler or {}, ignore)
    part = "transformer" if "transformer" in index else "unet"
    kind = str((index.get(part) or [None, None])[1])
    if kind not in families.FAMILIES:
        raise ValueError(
            f"{path} has a network of class {kind}, which is not read; those are "
            f"{', '.join(families.FAMILIES)}. For others: ds.from_torch(module, ..)."
        )
    family = families.FAMILIES[kind]
    module, config = load_component(
        path / part, kind, dtype, variant, functools.partial(families.expect_plain, kind, index)
    )
    vae: Value = None
    vae_config: Mapping[str, Value] = {}
    if index.get("vae") and index["vae"][1]:
        # in float32 whatever the network has: pictures show half precision
        vae, vae_config = load_component(path / "vae", str(index["vae"][1]), None, variant)
    geometry = families.geometry(family, config, vae_config, size)
    network = _network(module, family, config, schedule)
    grid = geometry.grid if family.packed else None
    if grid is not None:
        network = dataclasses.replace(network, apply=families.Packed(network.apply, grid))
    decode = _same if vae is None else _decoder(vae, vae_config, grid)
    times: dict[str, Value] = {}
    if schedule_config.get("use_dynamic_shifting"):
        times["image_seq_len"] = geometry.tokens
    text = functools.cache(functools.partial(load_text_pipeline, path, dtype, variant))
    return Pretrained(
        network,
        schedule,
        geometry.shape,
        decode,
        path,
        geometry.size,
        family,
        config,
        times,
        text,
    )


def _schedule(
    path: Path, index: Mapping[str, Value], changes: Mapping[str, Value], ignore: Iterable[str]
) -> tuple[DiffusersSampler, Mapping[str, Value]]:
    """(the scheduler, its config) of a pipeline's folder."""
    config = {**read_json(path / "scheduler" / "scheduler_config.json"), **changes}
    pipeline: str | None = str(index.get("_class_name"))
    try:
        find_pipeline(str(pipeline))
    except ValueError:  # one that passes nothing to its scheduler
        pipeline = None
    return from_diffusers(config, ignore=ignore, pipeline=pipeline), config


def _network(
    module: Value,
    family: families.Family,
    config: Mapping[str, Value],
    schedule: DiffusersSampler,
) -> ScoreFn:
    fixed = {} if families.tells_sizes(config) else family.fixed
    network = from_torch(
        module,
        process=schedule.process,
        prediction=schedule.prediction,
        arguments={"x": family.x, "t": "timestep"},
        fixed=fixed,
    )
    apply = network.apply
    factor = float(config.get("timestep_scale") or 1.0)
    if factor != 1:
        apply = families.Scaled(apply, factor)
    options = {} if family.time is None else {"time": family.time}
    return schedule.score_fn(apply, network.params, dtype=network.dtype, **options)


def _same(latents: Array) -> Array:
    return latents


def _decoder(
    vae: Value, config: Mapping[str, Value], grid: tuple[int, int] | None
) -> Callable[[Array], Array]:
    """latents -> pictures, float32; its weights are the arguments of a Partial."""
    function, weights = extract(vae, "decode")

    def decode(weights: Mapping[str, jax.Array], latents: Array) -> jax.Array:
        z = jnp.asarray(latents, jnp.float32)
        if grid is not None:
            z = families.unpacked(z, grid)
        z = families.denormalised(z, config)
        image = function(weights, {"z": z, "return_dict": False})
        return image.astype(jnp.float32)

    return jax.tree_util.Partial(jax.jit(decode), weights)
