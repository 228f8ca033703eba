"""The commands with `--pretrained FOLDER`, on folders that diffusers wrote."""

import diffusers
import jax
import numpy as np
import pytest
from diffusers_folders import saved

import diffsamp as ds
from diffsamp import cli
from diffsamp.interop.diffusers import TableauScheduler

# of diffusers' own pipelines
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
PROMPTS = ["a cat and the moon", "red dog"]


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_prompts_guided_and_decoded(folder):
    saved("stable", "sd")
    asked = ["--pretrained", "sd", "--prompt", *PROMPTS, "--guidance", 5, "--nfe", 3]
    assert run("sample", *asked, "--n", 2, "--out", "x.npy") == 0
    model = ds.from_pretrained("sd")
    guided = ds.guidance.cfg(model.score_fn, 5.0, null=model.null())
    sampler = ds.Sampler(guided, model.sampler(3).tableau)
    cond = model.conditions(PROMPTS)
    want = model.decode(sampler(jax.random.key(0), (2, *model.shape), cond=cond))
    np.testing.assert_allclose(np.load("x.npy"), want, atol=1e-5)
    assert run("sample", *asked, "--n", 2, "--out", "x.png") == 0
    assert (folder / "x.png").read_bytes().startswith(b"\x89PNG")


def test_guidance_that_is_an_input_of_the_network(folder, capsys):
    """Flux: one evaluation a step, whatever the scale; nothing is guided twice."""
    saved("flux1", "flux")
    model = ds.from_pretrained("flux")
    assert model.has_guidance_inside
    asked = ["sample", "--pretrained", "flux", "--prompt", *PROMPTS, "--n", 2, "--nfe", 2]
    for scale in (1.5, 3.5):
        assert run(*asked, "--guidance", scale, "--out", f"{scale}.npy") == 0
        cond = model.conditions(PROMPTS, guidance_scale=scale)
        want = model.decode(model.sampler(2)(jax.random.key(0), (2, *model.shape), cond=cond))
        np.testing.assert_allclose(np.load(f"{scale}.npy"), want, atol=1e-5)
    assert np.abs(np.load("1.5.npy") - np.load("3.5.npy")).max() > 1e-3
    assert run(*asked, "--guidance", 2, "--negative", "no dog") == 1
    assert "has its guidance inside and takes no negative prompt" in capsys.readouterr().err


def test_search_convert_generate_export_check(folder, capsys):
    """From a folder to a plan, from the plan to a scheduler in diffusers."""
    pipeline = saved("pixels", "pixels")
    network = ["--pretrained", "pixels"]
    few = ["--starts", 12, "--batch", 12, "--stages", "regress"]
    assert run("search", *network, "--nfe", 2, *few, "--out", "plans") == 0
    plan = "plans/plan-2.json"
    assert ds.search.Plan.load(plan).network["checkpoint"]["name"] == "pixels"
    assert run("convert", plan, "--out", "scheduler") == 0
    assert TableauScheduler.from_pretrained("scheduler").num_inference_steps == 2
    TableauScheduler.from_plan(plan, like=pipeline.scheduler)
    assert run("generate", *network, "--plan", plan, "--n", 3, "--batch", 2, "--out", "many") == 0
    assert run("export", *network, "--plan", plan, "--platforms", "cpu", "--out", "x.sampler") == 0
    np.save("data.npy", np.random.default_rng(0).normal(size=(8, 3, 8, 8)))
    assert run("check", *network, "--data", "data.npy") in (0, 1)
    assert "declared" in capsys.readouterr().out
    other = diffusers.DDPMPipeline(
        pipeline.unet, diffusers.DDPMScheduler(clip_sample=False, beta_schedule="scaled_linear")
    )
    other.save_pretrained("other")
    assert run("sample", "--pretrained", "other", "--plan", plan, "--out", "y.npy") == 1
    assert "built for another process" in capsys.readouterr().err
