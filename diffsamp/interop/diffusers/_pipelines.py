"""What diffusers' pipelines of flow models pass to their schedulers: sigmas, and mu for a size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from diffsamp._core.checks import expect_choice
from diffsamp._core.types import Value

__all__ = ["MU_RULES", "PIPELINES", "Pipeline", "find_pipeline", "mu_of", "pipeline_sigmas"]


def linear_mu(values: Mapping[str, Value], tokens: float, n: int) -> float:
    """Flux, SD3, Qwen-Image, LTX, Chroma: the line through (base_.., base_shift), (max_.., ..)."""
    span = values["max_image_seq_len"] - values["base_image_seq_len"]
    slope = (values["max_shift"] - values["base_shift"]) / span
    return values["base_shift"] + slope * (tokens - values["base_image_seq_len"])


def empirical_mu(values: Mapping[str, Value], tokens: float, n: int) -> float:
    """Flux 2: two fitted lines in the tokens, for 10 and 200 steps, and between them in n."""
    many = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333
    return many + (few - many) * (200 - n) / 190


def cogview_mu(values: Mapping[str, Value], tokens: float, n: int) -> float:
    """CogView 4 and GLM-Image: base_shift + max_shift sqrt(tokens / base_image_seq_len)."""
    root = math.sqrt(tokens / values["base_image_seq_len"])
    return values["base_shift"] + values["max_shift"] * root


MU_RULES = {"linear": linear_mu, "empirical": empirical_mu, "sqrt": cogview_mu}


class Pipeline(NamedTuple):
    """What a pipeline passes to its scheduler.

    Attributes:
      sigmas: "inverse_n" (1 .. 1/n), "to_zero" (1 .. 0, without 0), "integers" (those of whole
        timesteps), "linear_quadratic", or "" for the scheduler's own.
      rule: of mu, in MU_RULES.
      patch: pixels a token covers, along an edge and in time.
      defaults: of the fields the rule reads, where the config leaves them out.
    """

    sigmas: str
    rule: str = "linear"
    patch: tuple[int, int] = (16, 1)
    defaults: Mapping[str, Value] = {}


# by the beginning of the pipeline's class name, the longest that fits
PIPELINES: dict[str, Pipeline] = {
    "Flux": Pipeline("inverse_n"),
    "Flux2": Pipeline("inverse_n", "empirical"),
    "QwenImage": Pipeline("inverse_n"),
    "Chroma": Pipeline("inverse_n"),
    "Lumina2": Pipeline("inverse_n"),
    "LTX": Pipeline("inverse_n", patch=(32, 8)),
    "LTXCondition": Pipeline(""),
    "Krea2": Pipeline("inverse_n", defaults={"max_image_seq_len": 6400}),
    "StableDiffusion3": Pipeline("", defaults={"max_shift": 1.16}),
    "HiDreamImage": Pipeline(""),
    "CogView4": Pipeline("integers", "sqrt", defaults={"base_shift": 0.25, "max_shift": 0.75}),
    "GlmImage": Pipeline("integers", "sqrt", defaults={"base_shift": 0.25, "max_shift": 0.75}),
    "HunyuanVideo": Pipeline("to_zero"),
    "OmniGen": Pipeline("to_zero"),
    "Mochi": Pipeline("linear_quadratic"),
    "Sana": Pipeline(""),
    "Wan": Pipeline(""),
    "AuraFlow": Pipeline(""),
}


def find_pipeline(name: str) -> Pipeline:
    """The entry of PIPELINES for a pipeline's class name.

    Raises:
      ValueError: none fits.
    """
    fits = [key for key in PIPELINES if name.startswith(key)]
    if name.startswith("LTX2") or not fits:
        raise ValueError(
            f"`pipeline` must begin with one of {', '.join(PIPELINES)}; got {name!r}. For another "
            "one pass what it passes: times(n, sigmas=.., mu=..)."
        )
    return PIPELINES[max(fits, key=len)]


def pipeline_sigmas(kind: str, n: int, levels: int) -> np.ndarray | None:
    """The sigmas that a pipeline passes for n steps; None for the scheduler's own."""
    if kind == "inverse_n":
        return np.linspace(1, 1 / n, n)
    if kind == "to_zero":
        return np.linspace(1, 0, n + 1)[:-1]
    if kind == "integers":
        return np.trunc(np.linspace(levels, 1, n)) / levels
    if kind == "linear_quadratic":
        if n < 2:
            raise ValueError("Mochi's linear-quadratic grid needs n of 2 or more; got 1.")
        half, noise = n // 2, 0.025
        rest = n - half
        bend = (half - noise * n) / (half * rest**2)
        slope = noise / half - 2 * (half - noise * n) / rest**2
        i = np.arange(half, n)
        risen = bend * i**2 + slope * i + bend * half**2
        return 1 - np.append(np.arange(half) * noise / half, risen)
    return None


def mu_of(
    values: Mapping[str, Value],
    n: int,
    pipeline: Pipeline | None,
    mu: float | None,
    image_seq_len: float | None,
    image_size: Sequence[int] | None,
    rule: str | None,
) -> float | None:
    """mu as given, or by the rule; None if the config does not shift by resolution."""
    given = [v is not None for v in (mu, image_seq_len, image_size)]
    if not values.get("use_dynamic_shifting"):
        if any(given) and pipeline is None:
            raise ValueError("this config has no dynamic shifting; leave out `mu`.")
        return None
    if sum(given) != 1:
        raise ValueError(
            "this config shifts by resolution: give `image_seq_len` or `mu`, or `image_size` = "
            "(height, width) or (height, width, frames) in pixels; one of them."
        )
    if mu is not None:
        return float(mu)
    patch = pipeline.patch if pipeline else (16, 1)
    if image_size is not None:
        height, width, *frames = image_size
        image_seq_len = (height // patch[0]) * (width // patch[0])
        if frames:
            image_seq_len *= (frames[0] - 1) // patch[1] + 1
    assert image_seq_len is not None  # one of the three was given
    rule = rule or (pipeline.rule if pipeline else "linear")
    return MU_RULES[expect_choice(rule, "mu_rule", tuple(MU_RULES))](values, image_seq_len, n)
