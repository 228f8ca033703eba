"""Plans inside diffusers: every registered solver, tiny pipelines, files. `make test-peers`."""

import dataclasses
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest
from cases import CASES
from elsewhere import network, noises, padded, relative, start, tableau

import diffsamp as ds
from diffsamp.search.explicit import from_largest_level

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]  # diffusers' own
# float32 throughout; a few roundings of each of some twenty operations
CLOSE = 1e-4


@pytest.fixture(scope="module")
def torch():
    """torch, where diffusers is there too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package in ("torch", "diffusers"):
            pytest.importorskip(package, reason="make test-peers installs it")
    import torch

    return torch


@pytest.fixture(scope="module")
def scheduler_class(torch):
    from diffsamp.interop.diffusers import TableauScheduler

    return TableauScheduler


def loop(torch, scheduler, model, x, given=None):
    """A pipeline's loop; `given` holds the noise of every row that adds some."""
    assert scheduler.init_noise_sigma > 0, "what starts are scaled by; ours are already"
    x = torch.tensor(np.asarray(x))
    scheduler.set_timesteps(len(scheduler.timesteps))
    given = iter(given) if given is not None else None
    table = scheduler.config.table
    rows = [n for n, asked in enumerate(table["evaluates"]) if asked] + [len(table["evaluates"])]
    for k, t in enumerate(scheduler.timesteps):
        inputs = scheduler.scale_model_input(x, t).numpy()
        output = torch.tensor(model(inputs, np.full(len(inputs), float(t), np.float32)))
        noise = None
        if given is not None:
            noise = [torch.tensor(next(given)) for n in range(*rows[k : k + 2]) if table["c"][n]]
        x = scheduler.step(output, t, x, variance_noise=noise, return_dict=False)[0]
    return x.numpy()


def model_of(score_fn):
    """The network as a pipeline calls it; 1000 t for flow models."""
    per = 1000 if isinstance(score_fn.process, ds.processes.Flow) else 1
    apply = jax.jit(lambda x, t: score_fn.apply(score_fn.params, x, t / per))
    return lambda x, t: np.array(apply(x, t))


@pytest.mark.parametrize("prediction", ["noise", "v", "velocity", "edm_f"])
def test_every_registered_solver_agrees_with_sample(torch, scheduler_class, prediction):
    score_fn, key = network(prediction), jax.random.key(7)
    x_T = start(score_fn.process)
    model, names, worst = model_of(score_fn), [], {}
    for case in CASES:
        try:
            tableau(case.name, prediction)
            names.append(case.name)
        except AssertionError:
            assert case.name.startswith("interpolant"), case.name
    for name, table in padded(prediction, names).items():
        own = tableau(name, prediction)
        plan = ds.search.Plan.of(own, score_fn)
        scheduler = scheduler_class.from_plan(plan.to_dict())
        z = noises(own, key, x_T)
        want = ds.sample(score_fn, table, x_T, key=key)
        begin = x_T
        if not own.evaluates[0]:  # noise before the first evaluation belongs to the start
            begin = own.a[0, 0].astype(np.float32) * x_T + own.c[0].astype(np.float32) * z[0]
            z = z[1:]
        c = own.c[len(own.c) - len(z) :]
        z = z[c != 0] if own.stochastic else None
        worst[name] = relative(loop(torch, scheduler, model, begin, z), want)
    assert max(worst.values()) < CLOSE, {k: v for k, v in worst.items() if v >= CLOSE}
    assert len(worst) >= 50


# -- in pipelines, against diffusers' own schedulers ----

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SD |= {"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}


def unet(**options):
    from diffusers import UNet2DConditionModel, UNet2DModel

    cross = "cross_attention_dim" in options
    down, up = (
        ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D") if cross else ("DownBlock2D", "UpBlock2D")
    )
    return (UNet2DConditionModel if cross else UNet2DModel)(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=(down,),
        up_block_types=(up,),
        **options,
    ).eval()


def stable_diffusion(torch, kind="StableDiffusionPipeline"):
    import diffusers

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    return getattr(diffusers, kind)(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        unet=unet(in_channels=4, out_channels=4, cross_attention_dim=8, attention_head_dim=4),
        scheduler=diffusers.DDIMScheduler(**SD),
        requires_safety_checker=False,
    )


def tableau_of(config, n, name=None, **options):
    sampler = ds.from_diffusers({"_class_name": name, **config} if name else config, **options)
    return sampler.solver(sampler.process, sampler.times(n))


def pictures(pipe, scheduler, **options):
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    return np.asarray(pipe(**options, return_dict=False)[0])


def test_ddpm_pipeline(torch, scheduler_class, tmp_path):
    """And the whole pipeline through its folder."""
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline

    torch.manual_seed(0)
    network, config = unet(in_channels=3, out_channels=3), {"clip_sample": False}
    table = tableau_of(config, 5, "DDIMScheduler")
    scheduler = scheduler_class.from_tableau(table, prediction="epsilon")
    want = pictures(
        DDIMPipeline(network, DDIMScheduler(**config)),
        DDIMScheduler(**config),
        num_inference_steps=5,
        generator=torch.manual_seed(1),
        output_type="np",
        batch_size=2,
    )
    pipe, options = (
        DDPMPipeline(network, scheduler),
        {"num_inference_steps": 5, "output_type": "np"},
    )
    got = pictures(pipe, scheduler, generator=torch.manual_seed(1), batch_size=2, **options)
    assert got.std() > 0.01
    assert np.abs(got - want).max() < CLOSE
    pipe.save_pretrained(tmp_path)
    again = DDPMPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is scheduler_class
    same = pictures(again, again.scheduler, generator=torch.manual_seed(1), batch_size=2, **options)
    np.testing.assert_array_equal(same, got)
    with pytest.raises(ValueError, match="makes 5 evaluations: pass num_inference_steps=5, not 50"):
        pipe(num_inference_steps=50)


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
)
def test_stable_diffusion_pipeline(torch, scheduler_class, name):
    import diffusers

    pipe = stable_diffusion(torch)
    theirs = getattr(diffusers, name).from_config({**SD, "timestep_spacing": "leading"})
    table = tableau_of(dict(theirs.config), 6, name)
    ours = scheduler_class.from_tableau(table, prediction="epsilon")
    embeds = torch.randn(2, 1, 5, 8, generator=torch.manual_seed(3))
    options = {
        "prompt_embeds": embeds[0],
        "negative_prompt_embeds": embeds[1],
        "output_type": "latent",
        "guidance_scale": 4.0,
        "num_inference_steps": 6,
        "height": 8,
        "width": 8,
        "latents": torch.randn(1, 4, 8, 8, generator=torch.manual_seed(2)),
    }
    want, got = (pictures(pipe, each, **options) for each in (theirs, ours))
    assert relative(got, want) < CLOSE
    assert relative(got, options["latents"]) > 0.1


def test_image_to_image(torch, scheduler_class):
    """From the middle of a plan: DDIM is diffusers' own; other methods begin with a DDIM step."""
    import diffusers

    pipe = stable_diffusion(torch, "StableDiffusionImg2ImgPipeline")
    theirs = diffusers.DDIMScheduler(**SD)
    embeds = torch.randn(2, 1, 5, 8, generator=torch.manual_seed(3))
    image = torch.rand(1, 3, 8, 8, generator=torch.manual_seed(4))

    def run(scheduler, strength=0.5):
        return pictures(
            pipe,
            scheduler,
            image=image,
            prompt_embeds=embeds[0],
            negative_prompt_embeds=embeds[1],
            num_inference_steps=6,
            strength=strength,
            output_type="latent",
            generator=torch.manual_seed(5),
        )

    table = tableau_of({**SD, "timestep_spacing": "leading"}, 6, "DDIMScheduler")
    ours = scheduler_class.from_tableau(table, prediction="epsilon")
    assert relative(run(ours), run(theirs)) < CLOSE


@pytest.mark.parametrize("begin", [1, 4])
def test_a_run_from_the_middle_is_exact_where_the_network_is(torch, scheduler_class, begin):
    """A network that always answers one x_0: from any evaluation every method ends on its line."""
    data, noise = torch.tensor([[0.5, -1.0, 2.0]]), torch.tensor([[1.0, 0.3, -0.7]])
    for case in CASES:
        if case.solver.stochastic or case.check == "none":
            continue
        table = tableau(case.name, "noise")
        scheduler = scheduler_class.from_tableau(table, prediction="noise")
        scheduler.set_begin_index(begin)
        times = scheduler.timesteps[begin:]
        x = scheduler.add_noise(data, noise, times[:1])
        rows = np.flatnonzero(table.evaluates)[begin:]
        for n, t in zip(rows, times, strict=True):
            x = scheduler.step((x - table.alpha[n] * data) / table.sigma[n], t, x).prev_sample
        want = table.alpha[-1] * data + table.sigma[-1] * noise
        # noise is predicted: at the last, cleanest level it is divided by a small sigma
        assert relative(x, want) < 1e-3, case.name


def test_flux_pipeline(torch, scheduler_class):
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=False,
    ).eval()
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=1)
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipe = diffusers.FluxPipeline(
        scheduler=theirs,
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    table = tableau_of(config, 4, pipeline="FluxPipeline")
    plan = ds.search.Plan.of(
        table, ds.ScoreFn(abs, None, ds.processes.flow(), prediction="velocity", time="label")
    )
    latents = torch.randn(1, 16, 4, generator=torch.manual_seed(2))
    options = {
        "prompt_embeds": torch.randn(1, 5, 8, generator=torch.manual_seed(3)),
        "pooled_prompt_embeds": torch.randn(1, 8, generator=torch.manual_seed(4)),
        "height": 8,
        "width": 8,
        "num_inference_steps": 4,
        "latents": latents,
        "output_type": "latent",
    }
    ours = scheduler_class.from_plan(plan.to_dict())
    want, got = (pictures(pipe, each, **options) for each in (theirs, ours))
    assert relative(got, want) < CLOSE
    assert relative(got, latents) > 0.01


# -- the class -------------------------------------------------------------------------------------


def test_a_searched_plan_and_its_file(torch, scheduler_class, tmp_path):
    """A plan of `refine`, whose first row scales the start, saved, loaded and converted."""
    score_fn = network("noise")
    process = score_fn.process
    x_T = np.asarray(process.prior_sample(jax.random.key(0), (32, 3)))
    ipndm = ds.solvers.get("ipndm2")(process, ds.schedules.logsnr(process, 5))
    plan = ds.search.refine(score_fn, ipndm, x_T, key=jax.random.key(1), iterations=2)
    plan.save(tmp_path / "plan.json")
    assert not plan.tableau.evaluates[0]
    scheduler = scheduler_class.from_plan(tmp_path / "plan.json")
    scheduler.save_pretrained(tmp_path)
    again = scheduler_class.from_pretrained(tmp_path)
    assert (tmp_path / "scheduler_config.json").stat().st_size < 10_000
    assert dict(again.config) == dict(scheduler.config)
    want = ds.sample(score_fn, plan.tableau, x_T)
    for one in (scheduler, again, scheduler_class.from_config(scheduler.config)):
        got = loop(torch, one, model_of(score_fn), x_T * np.float32(one.init_noise_sigma))
        assert relative(got, want) < CLOSE


def test_a_start_that_a_pipeline_does_not_scale_is_refused(torch, scheduler_class):
    """DDPMPipeline, and those of flow models, never ask for `init_noise_sigma`."""
    import diffusers

    process = ds.processes.vp_discrete("linear")
    late = ds.solvers.ddim(process, ds.schedules.logsnr(process, 3, t_max=700.0))
    moved = from_largest_level(late, process)
    scheduler = scheduler_class.from_tableau(moved, "noise")
    pipe = diffusers.DDPMPipeline(unet(in_channels=3, out_channels=3), scheduler)
    with pytest.raises(ValueError, match=r"starts from noise of standard deviation 0\.9"):
        pictures(pipe, scheduler, num_inference_steps=3, output_type="np")
    # whoever reads it knows; and from the middle there is no start
    x = torch.zeros(1, 3, 8, 8)
    scheduler.set_timesteps(3)
    assert 0.98 < scheduler.init_noise_sigma < 0.999
    scheduler.step(x, scheduler.timesteps[0], x)
    again = scheduler_class.from_tableau(moved, "noise")
    again.set_begin_index(1)
    again.step(x, again.timesteps[1], x)


def test_noise_is_added_at_the_plans_levels(torch, scheduler_class):
    table = tableau("unipc2", "velocity")
    scheduler = scheduler_class.from_tableau(table, prediction="flow_prediction")
    assert scheduler.order == 1
    assert len(scheduler) == 1000
    x, z = torch.ones(2, 3), torch.full((2, 3), 2.0)
    for k in (0, 3):
        t = scheduler.timesteps[k]
        want = (1 - t / 1000) + t / 1000 * 2
        got = scheduler.scale_noise(x, t[None].expand(2), z)
        assert torch.allclose(got, want.expand(2, 3), atol=1e-6)
        assert torch.equal(got, scheduler.add_noise(x, z, t[None].expand(2)))
    with pytest.raises(ValueError, match=r"none of the plan's timesteps"):
        scheduler.add_noise(x, z, torch.tensor([3.21]))


def test_errors_say_what_is_wrong(torch, scheduler_class, tmp_path):
    table = tableau("ddim", "noise")
    with pytest.raises(ValueError, match=r"from_plan\(path\)"):
        scheduler_class.from_config({"num_train_timesteps": 1000})
    with pytest.raises(FileNotFoundError, match="there is no plan"):
        scheduler_class.from_plan(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="does not say what its network predicts"):
        scheduler_class.from_plan(table)
    with pytest.raises(ValueError, match="`prediction` must be one of"):
        scheduler_class.from_tableau(table, prediction="nosie")
    with pytest.raises(ValueError, match="flow process"):
        scheduler_class.from_tableau(table, prediction="flow_prediction")
    with pytest.raises(ValueError, match="7 numbers, one per evaluation"):
        scheduler_class.from_tableau(table, "noise", timesteps=[1.0])
    scheduler = scheduler_class.from_tableau(table, "noise")
    with pytest.raises(ValueError, match="7 evaluations; got 3 sigmas"):
        scheduler.set_timesteps(3, sigmas=[1.0, 0.5, 0.2])
    with pytest.raises(ValueError, match="timesteps of its own"):
        scheduler.set_timesteps(timesteps=list(range(7)))
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="Split off a learned variance"):
        scheduler.step(torch.zeros(2, 6), scheduler.timesteps[0], x)
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
    with pytest.raises(ValueError, match="all evaluations of the plan were made"):
        scheduler.step(x, t, x)
    noisy = scheduler_class.from_tableau(tableau("ddpm", "noise"), "noise")
    with pytest.raises(ValueError, match="`variance_noise` is too short"):
        noisy.step(x, noisy.timesteps[0], x, variance_noise=[])


def test_a_plan_for_another_process_is_refused(torch, scheduler_class):
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

    plan = ds.search.Plan.of(tableau("ddim", "noise"), network("noise")).to_dict()
    own = {"beta_schedule": "scaled_linear"}
    for kind in (DDIMScheduler, EulerDiscreteScheduler):
        scheduler_class.from_plan(plan, like=kind(**own))
    # one of `refine`, whose network is told other times than the states'
    own_table = tableau("ddim", "noise")
    told = np.where(own_table.evaluates, own_table.times[:-1] + 20.0, 0.0)
    told = dataclasses.replace(own_table, asked=told)
    moved = ds.search.Plan.of(told, network("noise")).to_dict()
    scheduler_class.from_plan(moved, like=DDIMScheduler(**own))
    with pytest.raises(ValueError, match="another process: at timestep"):
        scheduler_class.from_plan(moved, like=DDIMScheduler())
    for other, match in (
        (FlowMatchEulerDiscreteScheduler(), "is for the other kind"),
        (DDIMScheduler(**own, prediction_type="v_prediction"), "scheduler says 'v_prediction'"),
        (DDIMScheduler(), "another process: at timestep"),
        (DDIMScheduler(**SD), "another process: at timestep"),
    ):
        with pytest.raises(ValueError, match=match):
            scheduler_class.from_plan(plan, like=other)
    flow = ds.search.Plan.of(tableau("ddim", "velocity"), network("velocity")).to_dict()
    scheduler_class.from_plan(flow, like=FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="the plan is for a flow model"):
        scheduler_class.from_plan(flow, like=DDIMScheduler())


def test_neither_reader_needs_jax(torch, tmp_path):
    ds.search.Plan.of(tableau("unipc2", "noise"), network("noise")).save(tmp_path / "plan.json")
    code = f"""
import sys
sys.modules["jax"] = sys.modules["jaxlib"] = None  # an import of either is an error
import torch
from diffsamp.interop.diffusers import TableauScheduler
from diffsamp.interop.k_diffusion import sample_tableau
scheduler = TableauScheduler.from_plan({str(tmp_path / "plan.json")!r})
x = torch.ones(2, 3)
for t in scheduler.timesteps:
    x = scheduler.step(0.5 * x, t, x).prev_sample
y = sample_tableau(lambda x, sigma: 0.5 * x, torch.ones(2, 3), plan={str(tmp_path / "plan.json")!r})
assert torch.isfinite(x).all() and torch.isfinite(y).all()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
