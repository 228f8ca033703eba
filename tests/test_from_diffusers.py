"""Reading scheduler configs: files, conversions, and clear refusals (parity is in test_peers)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsamp as ds

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


@pytest.mark.parametrize("n", [1, 2, 7, 50, 999])
@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "DDPMScheduler",
        "EulerDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "FlowMatchEulerDiscreteScheduler",
    ],
)
def test_any_number_of_steps(name, n):
    """n asked for are n evaluated, n = 1 included, and the end is clean."""
    sampler = ds.from_diffusers({"_class_name": name}, ignore=("clip_sample",)) if (
        name.startswith("DD")
    ) else ds.from_diffusers({"_class_name": name})  # fmt: skip
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


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "`_class_name` must be one of DDIMScheduler"),
        ({"_class_name": "KarrasVeScheduler"}, "got 'KarrasVeScheduler'"),
        ({"_class_name": "DDIMScheduler"}, r"'clip_sample' = True is not reproduced"),
        (
            {"_class_name": "UniPCMultistepScheduler", "thresholding": True},
            "'thresholding' = True is not reproduced",
        ),
        (
            {"_class_name": "UniPCMultistepScheduler", "disable_corrector": [0]},
            r"'disable_corrector' = \[0\] is not reproduced",
        ),
        (
            {"_class_name": "UniPCMultistepScheduler", "lower_order_final": False},
            "'lower_order_final' = False",
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
            "'algorithm_type' must be 'dpmsolver",
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "new_field": 3},
            "'new_field' = 3 .* not known",
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"},
            "do not go together",
        ),
        (
            {"_class_name": "DDPMScheduler", "variance_type": "learned", "clip_sample": False},
            "'variance_type' must be",
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "x"},
            "`prediction` must",
        ),
    ],
)
def test_what_is_not_reproduced_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        ds.from_diffusers(config)


@pytest.mark.parametrize(
    ("config", "n", "message"),
    [
        (
            {"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "x"},
            5,
            "must be 'lins",
        ),
        (
            {"_class_name": "DEISMultistepScheduler", "use_karras_sigmas": True},
            5,
            "step of size zero",
        ),
        (
            {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False},
            5,
            "set 'steps_offset' to 1",
        ),
        (
            {
                "_class_name": "DDIMScheduler",
                "clip_sample": False,
                "steps_offset": 1,
            },
            1000,
            "lies beyond the last trained one",
        ),
        ({"_class_name": "DPMSolverMultistepScheduler"}, 0, "`n` must be at least 1"),
    ],
)
def test_grids_that_cannot_be_made(config, n, message):
    with pytest.raises(ValueError, match=message):
        ds.from_diffusers(config).times(n)


def test_ignored_fields_and_bad_files(tmp_path):
    sampler = ds.from_diffusers({"_class_name": "DDIMScheduler"}, ignore=("clip_sample",))
    assert sampler.times(5)[-1] == -1
    with pytest.raises(FileNotFoundError):
        ds.from_diffusers(tmp_path)
    path = tmp_path / "scheduler_config.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        ds.from_diffusers(tmp_path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        ds.from_diffusers(path)
