"""Reading scheduler configs: files, conversions, and clear refusals (parity is in test_peers)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsamp as ds
from diffsamp.interop.diffusers import _fields as fields

# every field of every class, with its default, as diffusers has them
GOLDEN = Path(__file__).parent / "fixtures" / "peers.json"
FIELDS = json.loads(GOLDEN.read_text(encoding="utf-8"))["fields"]
STABLE_DIFFUSION = {
    "_class_name": "DPMSolverMultistepScheduler",
    "_diffusers_version": "0.42.1",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "skip_prk_steps": True,
    "sample_max_value": 1.0,
}


def test_reads_a_dict_a_file_and_a_folder(tmp_path):
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(STABLE_DIFFUSION))
    for config in (STABLE_DIFFUSION, path, str(path), tmp_path):
        process, prediction, times, solver = ds.from_diffusers(config)
        assert prediction == "noise"
        assert isinstance(process, ds.processes.VPDiscrete)
        np.testing.assert_array_equal(times(4), [801, 601, 401, 201, -1])
        assert solver(process, times(4)).nfe == 4


def test_the_result_samples():
    sampler = ds.from_diffusers(STABLE_DIFFUSION)
    seen = []

    def apply(params, x, t):
        seen.append(t.shape)
        return params * x + 0 * t[:, None]

    score_fn = ds.ScoreFn(apply, jnp.asarray(0.9), sampler.process, prediction=sampler.prediction)
    x_T = sampler.process.prior_sample(jax.random.key(0), (3, 2))
    x = ds.sample(score_fn, sampler.solver(sampler.process, sampler.times(6)), x_T)
    assert np.all(np.isfinite(x))
    assert seen == [(3,)]


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_a_network_is_sampled_with_every_class(name):
    """Config to samples, jitted, for a network of the class's own kind."""
    sampler = ds.from_diffusers({"_class_name": name}, ignore=("clip_sample",))

    def apply(params, x, t):
        return params * x + 0 * t[:, None]

    score_fn = ds.ScoreFn(
        apply, jnp.asarray(0.5), sampler.process, prediction=sampler.prediction, time="label"
    )
    x_T = sampler.process.prior_sample(jax.random.key(0), (3, 2))
    tableau = sampler.solver(sampler.process, sampler.times(5))
    x = jax.jit(ds.sample)(score_fn, tableau, x_T, key=jax.random.key(1))
    assert x.shape == (3, 2)
    assert np.all(np.isfinite(x))


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_every_field_of_a_class_is_accounted_for(name):
    """Each is reproduced, refused unless it has its default, or idle; defaults are diffusers'."""
    read, fixed, own = fields.CLASSES[name.removesuffix("Scheduler")]
    idle = fields.IDLE | {"time_shift_type"}  # which needs use_dynamic_shifting
    # fields of kin that are read wherever a config has them
    kin = {"snr_shift_scale", "sigma_min", "sigma_max"}
    assert {*read.split(), *fixed.split()} - kin <= set(FIELDS[name])
    assert set(FIELDS[name]) <= {*read.split(), *fixed.split(), *idle}
    for field in {*read.split(), *fixed.split()} & set(FIELDS[name]):
        default = {**fields.DEFAULTS, **own}[field]
        assert FIELDS[name][field] == (list(default) if default == () else default), field


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_the_full_config_that_diffusers_saves_is_read(name):
    config = {**FIELDS[name], "_class_name": name, "_diffusers_version": "0.42.1"}
    if name in ("DDIMScheduler", "DDPMScheduler"):
        with pytest.raises(ValueError, match="'clip_sample' = True"):
            ds.from_diffusers(config)
    sampler = ds.from_diffusers(config, ignore="clip_sample")
    few = ds.from_diffusers({"_class_name": name}, ignore=["clip_sample"])
    np.testing.assert_array_equal(sampler.times(7), few.times(7))


def test_fields_of_other_classes_are_left_alone():
    """SDXL's own config has DDIM's fields; SD 1.5's is PNDM's, to be read as another's."""
    sdxl = {
        "_class_name": "EulerDiscreteScheduler",
        "_diffusers_version": "0.19.0.dev0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "interpolation_type": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
        "use_karras_sigmas": False,
    }
    np.testing.assert_array_equal(ds.from_diffusers(sdxl).times(4), [751, 501, 251, 1, -1])
    pndm = {**sdxl, "_class_name": "PNDMScheduler"}
    assert ds.from_diffusers(pndm).solver.__class__ is not None  # PLMS, SD 1.x's own default
    for name in sorted(set(FIELDS) - {"FlowMatchEulerDiscreteScheduler"}):
        assert ds.from_diffusers({**pndm, "_class_name": name}).prediction == "noise"


def test_values_of_another_multistep_class_become_this_ones():
    """As in diffusers' `from_config`: bh2 read by DPM-Solver is midpoint, and so on."""
    unipc = {"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1", "solver_order": 3}
    for name in ("DPMSolverMultistepScheduler", "DEISMultistepScheduler"):
        swapped = ds.from_diffusers({**unipc, "_class_name": name})
        plain = ds.from_diffusers({"_class_name": name, "solver_order": 3})
        tableaux = [s.solver(s.process, s.times(6)) for s in (swapped, plain)]
        np.testing.assert_array_equal(tableaux[0].b, tableaux[1].b)


@pytest.mark.parametrize("n", [1, 2, 7, 50, 61, 999])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "DDPMScheduler",
        "EulerDiscreteScheduler",
        "LMSDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "FlowMatchEulerDiscreteScheduler",
    ],
)
def test_any_number_of_steps(name, spacing, n):
    """n asked for are n evaluated, n = 1 included, and the end is clean."""
    config = {"_class_name": name, "timestep_spacing": spacing, "clip_sample": False}
    sampler = ds.from_diffusers(config)
    times = sampler.times(n)
    tableau = sampler.solver(sampler.process, times)
    assert tableau.nfe == n
    assert tableau.sigma[-1] == 0


def test_dynamic_shift_from_the_sequence_length():
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    sampler = ds.from_diffusers(config)
    # the line through (256, 0.5) and (4096, 1.15)
    np.testing.assert_allclose(sampler.times(8, image_seq_len=4096), sampler.times(8, mu=1.15))
    np.testing.assert_allclose(sampler.times(8, image_seq_len=256), sampler.times(8, mu=0.5))
    with pytest.raises(ValueError, match="give `image_seq_len` or `mu`"):
        sampler.times(8)
    with pytest.raises(ValueError, match="no dynamic shifting"):
        ds.from_diffusers({"_class_name": config["_class_name"]}).times(8, mu=1.0)
    with pytest.raises(ValueError, match=r"`sigmas` must have shape \(8,\); got \(3,\)"):
        sampler.times(8, mu=1.0, sigmas=[1.0, 0.5, 0.2])
    with pytest.raises(ValueError, match="'shift_terminal' needs a last sigma below 1"):
        ds.from_diffusers({**config, "shift_terminal": 0.1}).times(1, mu=1.0)


DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
DEIS, MATCH = "DEISMultistepScheduler", "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (None, {}, "`_class_name` must be one of DDIMScheduler, .*Scheduler; got None"),
        ("KarrasVeScheduler", {}, "KarrasVeScheduler is not read: it is deprecated"),
        ("DDIMScheduler", {}, r"'clip_sample' = True .*pass ignore=\(\"clip_sample\",\)"),
        ("DDPMScheduler", {"variance_type": "learned", "clip_sample": False}, "'variance_type' ="),
        ("DDIMScheduler", {"clip_sample": False, "beta_schedule": "laplace"}, "'beta_schedule' ="),
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, "'interpolation_type'"),
        ("EulerDiscreteScheduler", {"trained_betas": [0.1, 0.2]}, "must hold 1000 numbers; got 2"),
        ("HeunDiscreteScheduler", {"clip_sample": True}, "'clip_sample' = True is not"),
        ("HeunDiscreteScheduler", {"beta_schedule": "exp"}, "'beta_schedule' = 'exp' is not"),
        (DPM, {"prediction_type": "x"}, "'prediction_type' = 'x' is not"),
        (DPM, {"timestep_spacing": "x"}, "'timestep_spacing' = 'x' is not"),
        (DPM, {"final_sigmas_type": "x"}, "'final_sigmas_type' = 'x' is not"),
        (DPM, {"solver_order": 4}, "'solver_order' = 4 is not reproduced; it must be 1 or 2 or 3"),
        (DPM, {"algorithm_type": "dpmsolver"}, "'algorithm_type' = 'dpmsolver' is not"),
        (DPM, {"algorithm_type": "sde-dpmsolver"}, "'algorithm_type' = 'sde-dpmsolver' is not"),
        (DPM, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "is inconsistent"),
        (DPM, {"variance_type": "learned_range"}, "'variance_type' = 'learned_range' is not"),
        (DPM, {"thresholding": True}, "'thresholding' = True is not reproduced"),
        (DPM, {"new_field": 3}, "'new_field' = 3 .* not known"),
        (DPM, {"prediction_type": "flow_prediction"}, "do not go together"),
        (DPM, {"use_flow_sigmas": True}, "do not go together"),
        (DPM, {"use_karras_sigmas": True, "use_lu_lambdas": True}, "with both 'use_karras_"),
        (UNIPC, {"predict_x0": False}, "'predict_x0' = False is not"),
        (UNIPC, {"solver_p": {"a": 1}}, "'solver_p' = .* is not"),
        (UNIPC, {"lower_order_final": False}, "'lower_order_final' = False is not finite"),
        (DEIS, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, "do not go tog"),
        (DEIS, {"algorithm_type": "x"}, "'algorithm_type' = 'x' is not"),
    ],
)
def test_what_is_not_reproduced_is_refused(name, fields, message):
    with pytest.raises(ValueError, match=message):
        ds.from_diffusers({"_class_name": name, **fields})


@pytest.mark.parametrize(
    ("name", "fields", "n", "message"),
    [
        (DPM, {}, 0, "`n` must be at least 1"),
        (DEIS, {"use_karras_sigmas": True}, 5, "size zero; unset 'use_karras_sigmas'"),
        ("DDIMScheduler", {"set_alpha_to_one": False}, 5, "size zero; raise `steps_offset`"),
        ("DDIMScheduler", {"steps_offset": 1}, 1000, "n = 1000 with 'steps_offset' = 1 does not"),
        (
            DPM,
            {
                "timestep_spacing": "trailing",
                "lambda_min_clipped": -5.1,
                "beta_schedule": "squaredcos_cap_v2",
            },
            1000,
            "does not fit 99. levels",
        ),
    ],
)
def test_grids_that_cannot_be_made(name, fields, n, message):
    sampler = ds.from_diffusers({"_class_name": name, "clip_sample": False, **fields})
    with pytest.raises(ValueError, match=message):
        sampler.times(n)


def test_ignored_fields_and_bad_files(tmp_path):
    config = {"_class_name": DPM, "thresholding": True, "new_field": 3, "solver_order": 3}
    sampler = ds.from_diffusers(config, ignore=("thresholding", "new_field", "solver_order"))
    tableau = sampler.solver(sampler.process, sampler.times(5))
    assert tableau.q == 2  # the default order, since the field is left out
    with pytest.raises(FileNotFoundError):
        ds.from_diffusers(tmp_path)
    path = tmp_path / "scheduler_config.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        ds.from_diffusers(tmp_path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        ds.from_diffusers(path)


def test_every_class_is_on_the_page():
    page = (Path(__file__).parent.parent / "docs" / "diffusers.md").read_text(encoding="utf-8")
    for name in (*fields.CLASSES, *fields.REFUSED):
        assert f"| `{name}Scheduler` |" in page, name
