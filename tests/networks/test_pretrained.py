"""Whole folders of diffusers: the samples of its own pipelines, guided as they guide."""

import dataclasses
import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers_folders import SCHEDULERS, TABLE, pixels, saved, start
from diffusers_networks import apart, arrays

import diffsamp as ds

# of diffusers' own pipelines
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
PROMPTS = ["a cat and the moon", "red dog"]
CLOSE = 1e-5  # float32, two implementations
STEPS = 5


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "stable"
    return saved("stable", folder), folder


@pytest.mark.parametrize("schedule", list(SCHEDULERS))
def test_stable_diffusion_with_each_scheduler(stable, schedule):
    pipeline, folder = stable
    kind, fields = SCHEDULERS[schedule]
    pipeline.scheduler = getattr(diffusers, kind)(**TABLE, **fields)
    model = ds.from_pretrained(folder, scheduler={**fields, "_class_name": kind})
    latents = start(2, model.shape)
    with torch.no_grad():
        want = pipeline(
            PROMPTS,
            num_inference_steps=STEPS,
            guidance_scale=5.0,
            latents=latents,
            output_type="latent",
        ).images
    guided = ds.guidance.cfg(model.score_fn, 5.0, null=model.null())
    tableau = model.sampler(STEPS).tableau
    got = ds.sample(guided, tableau, arrays(latents), cond=model.conditions(PROMPTS))
    assert apart(got, want) < CLOSE
    # and without guidance, by the Sampler itself
    with torch.no_grad():
        free = pipeline(
            PROMPTS,
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            latents=latents,
            output_type="latent",
        ).images
    run = model.sampler(STEPS)
    got = run(jax.random.key(0), arrays(latents), cond=model.conditions(PROMPTS))
    assert apart(got, free) < CLOSE
    assert apart(got, want) > 1e-3, "guidance does something"


def test_a_negative_prompt_and_the_decoder(stable):
    pipeline, folder = stable
    pipeline.scheduler = diffusers.DDIMScheduler(**TABLE, clip_sample=False)
    model = ds.from_pretrained(folder)
    assert (model.shape, model.image_size) == ((4, 8, 8), (16, 16))
    latents = start(2, model.shape)
    with torch.no_grad():
        want = pipeline(
            PROMPTS,
            negative_prompt=["no dog"] * 2,
            num_inference_steps=STEPS,
            guidance_scale=5.0,
            latents=latents,
            output_type="pt",
        ).images
    guided = ds.guidance.cfg(model.score_fn, 5.0, null=model.null("no dog"))
    x = ds.sample(
        guided, model.sampler(STEPS).tableau, arrays(latents), cond=model.conditions(PROMPTS)
    )
    pictures = jnp.clip(model.decode(x) / 2 + 0.5, 0, 1)
    assert pictures.shape == (2, 3, 16, 16)
    assert apart(pictures, want) < CLOSE


def test_generate_decodes_its_files(stable, tmp_path):
    model = ds.from_pretrained(stable[1])
    cond = model.conditions(PROMPTS)
    job = ds.generate(
        model.score_fn,
        model.sampler(2).tableau,
        4,
        tmp_path / "out",
        key=jax.random.key(0),
        shape=model.shape,
        cond=lambda numbers: jax.tree.map(lambda a: a[numbers % 2], cond),
        finish=model.decode,
        batch=2,
        progress=False,
    )
    (pictures,) = job.load().values()
    assert pictures.shape == (4, 3, 16, 16)
    assert np.isfinite(pictures).all()


def whole_label(level):
    return np.trunc(1000 * level.t + 1e-9)


@pytest.mark.parametrize(
    ("name", "scale", "options"),
    [
        ("xl", 5.0, {"height": 16, "width": 16}),
        ("stable3", 4.0, {"height": 16, "width": 16}),
        (
            "sana_small",
            4.5,
            {"use_resolution_binning": False, "height": 32, "width": 32},
        ),
        ("pixart_alpha", 4.5, {"use_resolution_binning": False, "height": 16, "width": 16}),
    ],
)
def test_guided_pipelines(name, scale, options, tmp_path):
    pipeline = saved(name, tmp_path / name)
    size = options["height"], options["width"]
    model = ds.from_pretrained(tmp_path / name, size=size)
    assert model.image_size == size
    latents = start(2, model.shape)
    with torch.no_grad():
        want = pipeline(
            PROMPTS,
            num_inference_steps=STEPS,
            guidance_scale=scale,
            latents=latents,
            output_type="latent",
            **options,
        ).images
    score_fn = model.score_fn
    if name == "sana_small":  # docs/diffusers.md: its scheduler cuts the labels off, ours are real
        score_fn = dataclasses.replace(score_fn, time=whole_label)
    guided = ds.guidance.cfg(score_fn, scale, null=model.null())
    tableau = model.sampler(STEPS).tableau
    got = ds.sample(guided, tableau, arrays(latents), cond=model.conditions(PROMPTS))
    assert apart(got, want) < CLOSE
    plain = ds.sample(model.score_fn, tableau, arrays(latents), cond=model.conditions(PROMPTS))
    assert apart(plain, want) > 1e-3, "guidance does something"


def test_a_distilled_network_with_its_guidance_inside(tmp_path):
    pipeline = saved("distilled", tmp_path / "distilled")
    model = ds.from_pretrained(tmp_path / "distilled")
    latents = start(2, model.shape)
    ends = {}
    for scale in (7.5, 2.0):
        with torch.no_grad():
            want = pipeline(
                PROMPTS,
                num_inference_steps=STEPS,
                guidance_scale=scale,
                latents=latents,
                output_type="latent",
            ).images
        cond = model.conditions(PROMPTS, guidance_scale=scale)
        ends[scale] = model.sampler(STEPS)(jax.random.key(0), arrays(latents), cond=cond)
        assert apart(ends[scale], want) < CLOSE
    assert float(jnp.abs(ends[7.5] - ends[2.0]).max()) > 1e-3, "the scale does something"


def test_a_film(tmp_path):
    pipeline = saved("film", tmp_path / "film")
    model = ds.from_pretrained(tmp_path / "film", size=(5, 32, 32))
    assert model.shape == (4, 2, 4, 4)
    latents = start(2, model.shape)
    with torch.no_grad():
        want = pipeline(
            PROMPTS,
            height=32,
            width=32,
            num_frames=5,
            num_inference_steps=3,
            guidance_scale=4.0,
            latents=latents,
            max_sequence_length=16,
            output_type="pt",
        ).frames
    guided = ds.guidance.cfg(model.score_fn, 4.0, null=model.null(max_sequence_length=16))
    cond = model.conditions(PROMPTS, max_sequence_length=16)
    x = ds.sample(guided, model.sampler(3).tableau, arrays(latents), cond=cond)
    frames = jnp.clip(model.decode(x) / 2 + 0.5, 0, 1)
    assert frames.shape == (2, 3, 5, 32, 32)
    assert apart(jnp.moveaxis(frames, 1, 2), want) < CLOSE


def test_half_precision(tmp_path):
    """The network and the text encoders; the decoder stays in float32."""
    saved("stable3", tmp_path / "sd3")
    ends = []
    for dtype in (None, jnp.bfloat16):
        model = ds.from_pretrained(tmp_path / "sd3", dtype=dtype)
        assert model.score_fn.dtype == (dtype or jnp.float32)
        cond = model.conditions(PROMPTS)
        assert cond["encoder_hidden_states"].dtype == model.score_fn.dtype
        x = model.sampler(2)(jax.random.key(0), arrays(start(2, model.shape)), cond=cond)
        ends.append(model.decode(x))
        assert ends[-1].dtype == jnp.float32
    assert 0 < float(jnp.abs(ends[1] - ends[0]).max() / jnp.abs(ends[0]).max()) < 0.03


def test_flux_with_its_embedded_guidance(tmp_path):
    pipeline = saved("flux1", tmp_path / "flux")
    model = ds.from_pretrained(tmp_path / "flux", size=(32, 16))
    assert model.shape == (8 * 4, 16)
    latents = start(2, model.shape)
    run, conds = model.sampler(STEPS), {}
    for scale in (3.5, 1.5):
        with torch.no_grad():
            want = pipeline(
                PROMPTS,
                height=32,
                width=16,
                num_inference_steps=STEPS,
                guidance_scale=scale,
                latents=latents,
                max_sequence_length=16,
                output_type="pt",
            ).images
        conds[scale] = model.conditions(PROMPTS, guidance_scale=scale, max_sequence_length=16)
        x = run(jax.random.key(0), arrays(latents), cond=conds[scale])
        pictures = jnp.clip(model.decode(x) / 2 + 0.5, 0, 1)
        assert pictures.shape == (2, 3, 32, 16)
        assert apart(pictures, want) < CLOSE
    other = run(jax.random.key(0), arrays(latents), cond=conds[3.5])
    assert float(jnp.abs(other - x).max()) > 1e-3, "the scale does something"


def test_a_transformer_of_classes(tmp_path):
    pipeline = saved("classes", tmp_path / "dit")
    model = ds.from_pretrained(tmp_path / "dit")
    with torch.no_grad():
        want = pipeline(
            [3, 7],
            guidance_scale=4.0,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(3),
            output_type="np",
        ).images
    # it makes one more start than it says, for each label
    latents = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(3))
    # its null label is 1000, whatever the network; the tiny one's own is 10
    guided = ds.guidance.cfg(model.score_fn, 4.0, null=model.null())
    assert model.null()["class_labels"] == 1000
    tableau = model.sampler(STEPS).tableau
    x = ds.sample(guided, tableau, arrays(latents), cond=model.conditions([3, 7]))
    pictures = jnp.moveaxis(jnp.clip(model.decode(x) / 2 + 0.5, 0, 1), 1, -1)
    assert apart(pictures, torch.tensor(want)) < CLOSE
    with pytest.raises(ValueError, match="takes labels, integers from 0 to 1000"):
        model.conditions(["cat"])


def test_a_model_of_pixels(tmp_path):
    folder = tmp_path / "pixels"
    pipeline = saved("pixels", folder)
    pipeline = diffusers.DDIMPipeline(
        pipeline.unet, diffusers.DDIMScheduler(clip_sample=False, beta_end=0.02)
    )
    pipeline.set_progress_bar_config(disable=True)
    model = ds.from_pretrained(folder, scheduler={"_class_name": "DDIMScheduler"})
    with torch.no_grad():
        want = pipeline(
            2,
            generator=torch.Generator().manual_seed(3),
            num_inference_steps=STEPS,
            output_type="np",
        ).images
    latents = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(3))
    x = ds.sample(model.score_fn, model.sampler(STEPS).tableau, arrays(latents))
    pictures = jnp.moveaxis(jnp.clip(model.decode(x) / 2 + 0.5, 0, 1), 1, -1)
    assert apart(pictures, torch.tensor(want)) < CLOSE
    with pytest.raises(ValueError, match="takes no prompts"):
        model.conditions(["a cat"])


# -- what cannot be ------------------------------------------------------------------------------


def changed(folder, name, **fields):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_bad_folders_in_words(tmp_path):
    folder = tmp_path / "pixels"
    saved("pixels", folder)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ds.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
        ds.from_pretrained(folder / "unet")
    with pytest.raises(FileNotFoundError, match="hf download nobody/nothing"):
        ds.from_pretrained("nobody/nothing")
    with pytest.raises(ValueError, match=r"`size` must be \(height, width\)"):
        ds.from_pretrained(folder, size=(1, 8, 8))

    pickled = tmp_path / "pickled"
    shutil.copytree(folder, pickled)
    (pickled / "unet" / "diffusion_pytorch_model.safetensors").rename(
        pickled / "unet" / "diffusion_pytorch_model.bin"
    )
    with pytest.raises(ValueError, match=r"as a pickle \(diffusion_pytorch_model.bin\)"):
        ds.from_pretrained(pickled)
    (pickled / "unet" / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        ds.from_pretrained(pickled)

    changed(folder, "model_index.json", unet=["diffusers", "UNet9DModel"])
    with pytest.raises(ValueError, match=r"class UNet9DModel, which is not read; those are UNet2D"):
        ds.from_pretrained(folder)
    changed(folder, "model_index.json", unet=["diffusers", "UNet2DModel"])
    changed(folder, "unet/config.json", out_channels=5)
    with pytest.raises(ValueError, match="takes 3 channels and returns 5"):
        ds.from_pretrained(folder)
    changed(folder, "unet/config.json", out_channels=6)
    with pytest.raises(ValueError, match=r"cannot be read as a UNet2DModel: .*(?s:.)*conv_out"):
        ds.from_pretrained(folder)
    changed(folder, "unet/config.json", out_channels=3)
    changed(folder, "model_index.json", boundary_ratio=0.9)
    with pytest.raises(ValueError, match="two networks in turn"):
        ds.from_pretrained(folder)
    changed(folder, "model_index.json", boundary_ratio=None)
    changed(folder, "scheduler/scheduler_config.json", _class_name="RePaintScheduler")
    with pytest.raises(ValueError, match="RePaintScheduler is not read"):
        ds.from_pretrained(folder)


def test_a_name_is_found_in_the_cache(tmp_path, monkeypatch):
    """As huggingface_hub lays it out: refs/main names a snapshot."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--somebody--pixels"
    commit = "0" * 40
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    pixels().save_pretrained(place / "snapshots" / commit)
    assert ds.from_pretrained("somebody/pixels").shape == (3, 8, 8)
