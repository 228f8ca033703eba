"""Plans in whole pipelines of flow models: from noise, from a picture, in half precision."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers_folders import saved, start
from diffusers_networks import apart

import diffsamp as ds
from diffsamp.interop.diffusers import TableauScheduler
from diffsamp.search.explicit import from_largest_level

# of diffusers' own pipelines
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
PROMPTS = ["a cat and the moon", "red dog"]
CLOSE = 1e-5
FLUX = {"height": 32, "width": 16, "guidance_scale": 3.5, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans") / "flux"
    pipeline = saved("flux1", folder)
    return pipeline, ds.from_pretrained(folder, size=(32, 16))


def ends(pipeline, schedulers, **options):
    """What a pipeline makes with each of some schedulers."""
    made = []
    for scheduler in schedulers:
        pipeline.scheduler = scheduler
        with torch.no_grad():
            made.append(pipeline(output_type="latent", **options).images.float())
    return made


def test_stable_diffusion_3(tmp_path):
    pipeline = saved("stable3", tmp_path / "sd3")
    model = ds.from_pretrained(tmp_path / "sd3", size=(16, 16))
    ours = TableauScheduler.from_tableau(model.sampler(4).tableau, prediction="velocity")
    options = {"prompt": PROMPTS, "num_inference_steps": 4, "height": 16, "width": 16}
    latents = start(2, model.shape)
    want, got = ends(pipeline, (pipeline.scheduler, ours), latents=latents, **options)
    assert apart(got.numpy(), want) < CLOSE


def test_flux_from_a_picture(flux):
    """It says where to begin with `set_begin_index`, and what the level is with `scale_noise`."""
    base, model = flux
    parts = {name: part for name, part in base.components.items() if "image_enc" not in name}
    parts.pop("feature_extractor", None)
    pipeline = diffusers.FluxImg2ImgPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    ours = TableauScheduler.from_tableau(model.sampler(6).tableau, prediction="velocity")
    picture = torch.rand(1, 3, 32, 16, generator=torch.Generator().manual_seed(4))
    made = []
    for scheduler in (base.scheduler, ours):
        options = {"image": picture, "num_inference_steps": 6, "strength": 0.5, **FLUX}
        generator = torch.Generator().manual_seed(5)
        made += ends(pipeline, [scheduler], prompt=PROMPTS[0], generator=generator, **options)
    assert apart(made[1].numpy(), made[0]) < CLOSE
    assert ours.begin_index == 3


def test_flux_whose_plan_starts_from_less_noise(flux):
    """Latents scaled by `init_noise_sigma` end where `ds.sample` does; others are refused."""
    pipeline, model = flux
    process = model.score_fn.process
    late = ds.solvers.dpmpp(process, ds.schedules.uniform(process, 4, t_max=0.9), order=2)
    table = from_largest_level(late, process)
    ours = TableauScheduler.from_tableau(table, prediction="velocity")
    noise = start(2, model.shape)
    options = {"prompt": PROMPTS, "num_inference_steps": 4, **FLUX}
    with pytest.raises(ValueError, match=r"standard deviation 0\.9, and nobody has asked"):
        ends(pipeline, [ours], latents=noise, **options)
    (got,) = ends(pipeline, [ours], latents=ours.init_noise_sigma * noise, **options)
    cond = model.conditions(PROMPTS, guidance_scale=3.5, max_sequence_length=16)
    want = ds.sample(model.score_fn, table, noise.numpy(), cond=cond)
    assert apart(want, got) < CLOSE


@pytest.mark.parametrize(("dtype", "close"), [(torch.float16, 3e-3), (torch.bfloat16, 3e-2)])
def test_flux_in_half_precision(tmp_path, dtype, close):
    """The step itself is made in float32, and gives back what it got."""
    pipeline = saved("flux1", tmp_path / "flux")
    model = ds.from_pretrained(tmp_path / "flux", size=(32, 16))
    ours = TableauScheduler.from_tableau(model.sampler(4).tableau, prediction="velocity")
    options = {"prompt": PROMPTS, "num_inference_steps": 4, **FLUX}
    latents = start(2, model.shape)
    (want,) = ends(pipeline, [ours], latents=latents, **options)
    (got,) = ends(pipeline.to(dtype), [ours], latents=latents.to(dtype), **options)
    assert 0 < apart(got.numpy(), want) < close
    x = latents.to(dtype)
    ours.set_timesteps(4)
    assert ours.step(x, ours.timesteps[0], x).prev_sample.dtype == dtype
    assert ours.add_noise(x, x, ours.timesteps[:1]).dtype == dtype
    assert np.isfinite(got.numpy()).all()
