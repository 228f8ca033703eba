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
    kin = {"snr_shift_scale", "sigma_min", "sigma_max", "invert_sigmas", "final_sigmas_type"}
    kin |= {"base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"}
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
        (UNIPC, {"predict_x0": False}, "'predict_x0' = False predicts noise, which is not finite"),
        (UNIPC, {"solver_p": {"a": 1}}, "'solver_p' = .* is not"),
        (UNIPC, {"lower_order_final": False}, "'lower_order_final' = False is not finite"),
        (DEIS, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, "do not go tog"),
        (DEIS, {"algorithm_type": "x"}, "'algorithm_type' = 'x' is not"),
        # fields of another kind of network
        ("DDIMScheduler", {"shift": 3.0}, "'shift' = 3.0 is a field of flow models. Read it as"),
        (DPM, {"shift": 3.0, "prediction_type": "epsilon"}, "'shift' = 3.0 is a field of flow"),
        (MATCH, {"beta_schedule": "scaled_linear"}, "says that this is a noise model"),
        (DPM, {"sigma_data": 0.5}, "'sigma_data' = 0.5, which belongs to EDM's"),
        (DPM, {"rho": 7.0}, "'rho' = 7.0, which belongs to EDM's"),
        ("EDMEulerScheduler", {"beta_schedule": "linear"}, "a table of betas. Read it as a class"),
        (
            "HeunDiscreteScheduler",
            {"timestep_type": "continuous", "prediction_type": "v_prediction"},
            r"it takes log\(sigma\) / 4",
        ),
        ("EDMEulerScheduler", {"prediction_type": "v_prediction"}, "minus EDM's network output"),
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
        (
            "EulerDiscreteScheduler",
            {"final_sigmas_type": "sigma_min"},
            5,
            "size zero; set 'final_sigmas_type' = 'zero'",
        ),
        ("SASolverScheduler", {"use_karras_sigmas": True}, 5, "which end at sigma = 0"),
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


def test_no_error_advises_to_ignore_what_the_network_is():
    """Only clipping, thresholding and a second head, which live around the network, can be left."""
    for field in sorted(fields.DEFAULTS):
        for name in fields.CLASSES:
            for value in (True, 3.7, "x", [1]):
                said = ""
                try:
                    ds.from_diffusers({"_class_name": f"{name}Scheduler", field: value})
                except (ValueError, TypeError) as error:
                    said = str(error)
                advised = "pass ignore=" in said
                assert not advised or any(f"{key!r} =" in said for key in fields._WAYS)


def test_a_flow_model_stays_one_in_another_class():
    """SD3's config as DPM-Solver and UniPC, and that of networks whose time runs from noise."""
    for name in (DPM, UNIPC, "DPMSolverSinglestepScheduler"):
        sampler = ds.from_diffusers({"_class_name": name, "shift": 3.0})
        full = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
        same = ds.from_diffusers({"_class_name": name, **full})
        assert isinstance(sampler.process, ds.processes.Flow)
        assert sampler.prediction == "velocity"
        np.testing.assert_array_equal(sampler.times(6), same.times(6))
        assert ds.from_diffusers({"_class_name": name, "invert_sigmas": True}).negated
        dynamic = {"_class_name": name, "use_dynamic_shifting": True, "max_shift": 0.9, "shift": 1}
        sampler = ds.from_diffusers(dynamic)
        # 64 x 64 tokens, the upper end of the line
        np.testing.assert_allclose(
            sampler.times(6, image_size=(1024, 1024)), sampler.times(6, mu=0.9)
        )
    back = ds.from_diffusers({"_class_name": MATCH, "use_flow_sigmas": True, "flow_shift": 3.0})
    np.testing.assert_array_equal(
        back.times(6), ds.from_diffusers({"_class_name": MATCH, "shift": 3.0}).times(6)
    )


def test_pipelines_pass_sigmas_of_their_own(tmp_path):
    match = {"_class_name": MATCH, "shift": 1.0}
    flux = ds.from_diffusers(match, pipeline="FluxPipeline")
    np.testing.assert_allclose(flux.times(4), [1, 0.75, 0.5, 0.25, 0])
    assert ds.from_diffusers(match).times(4)[3] == pytest.approx(0.001)  # the scheduler's own
    omnigen = ds.from_diffusers({**match, "invert_sigmas": True}, pipeline="OmniGenPipeline")
    np.testing.assert_allclose(omnigen.times(5), [1, 0.8, 0.6, 0.4, 0.2, 0])
    with pytest.raises(ValueError, match=r"`pipeline` must begin with one of Flux, .*'NoPipeline'"):
        ds.from_diffusers(match, pipeline="NoPipeline")
    # a pipeline's folder says which it is
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(match))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    for place in (tmp_path, tmp_path / "scheduler"):
        np.testing.assert_array_equal(ds.from_diffusers(place).times(4), flux.times(4))


def test_times_of_ones_own_in_every_class():
    """Given as timesteps or as sigmas they are the evaluations, and the end is the class's own."""
    folder = Path(__file__).parent / "fixtures" / "schedulers"
    labels = {"edm": np.log([0.9, 0.6, 0.3, 0.1]) / 4, "angle": [0.9, 0.6, 0.3, 0.1]}
    by_class = {
        "EDMEuler": labels["edm"],
        "EDMDPMSolverMultistep": labels["edm"],
        "CosineDPMSolverMultistep": labels["angle"],
        "IPNDM": labels["angle"],
        "DDPMWuerstchen": labels["angle"],
        "SCM": labels["angle"],
        "CMStochasticIterative": [39, 20, 9, 2],
    }
    unclean = ("DEIS", "SASolver", "TCD", "DDPMWuerstchen")
    seen = set()
    for path in sorted(folder.glob("*.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        name = config["_class_name"].removesuffix("Scheduler")
        seen.add(name)
        sampler = ds.from_diffusers(config)
        options = {"mu": 0.9} if config.get("use_dynamic_shifting") else {}
        timesteps = labels["edm"] if path.stem == "svd" else by_class.get(name, [900, 600, 300, 99])
        sigmas, rising = np.array([0.9, 0.6, 0.3, 0.1]), name.endswith("Inverse")
        for key, given in (("timesteps", timesteps), ("sigmas", sigmas)):
            given = np.sort(given) if rising else np.asarray(given)
            times = sampler.times(**options, **{key: given})
            np.testing.assert_array_equal(times, sampler.times(4, **options, **{key: given}))
            tableau = sampler.solver(sampler.process, times)
            assert np.sum(np.isin(tableau.times[:-1], times)) >= 4 or rising
            assert len(times) == 5
            ends = config.get("final_sigmas_type") == "sigma_min" and "beta_start" in config
            first = config.get("set_alpha_to_one") is False and name in ("DDIM", "PNDM")
            clean = not (ends or first or name.startswith(unclean) or rising)
            assert (tableau.sigma[-1] == 0) == clean, (path.stem, key)
    assert seen >= {"DDIM", "PNDM", "EDMEuler", "SCM", "IPNDM", "UniPCMultistep", "LCM", "UnCLIP"}


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        (DPM, {"timesteps": [900, 950]}, "`timesteps` must decrease"),
        (DPM, {"n": 3, "timesteps": [900, 500]}, r"`timesteps` must have shape \(3,\)"),
        (DPM, {"sigmas": [20.0, 1.0]}, r"sigma = 20 is above 157\.\d+|sigma = 200"),
        (DPM, {"timesteps": [900], "sigmas": [1.0]}, "give `sigmas` or `timesteps`, not both"),
        ("CMStochasticIterativeScheduler", {"timesteps": [99, 3]}, "between 0 and 39"),
        ("IPNDMScheduler", {"timesteps": [900, 3]}, "angles in units of pi / 2, between 0 and 1"),
        ("DDIMInverseScheduler", {"timesteps": [900, 3]}, "must be rising numbers"),
        ("CosineDPMSolverMultistepScheduler", {"timesteps": [1.0, 0.5]}, "below 1"),
    ],
)
def test_times_of_ones_own_that_do_not_fit(name, given, message):
    config = {"_class_name": name}
    sampler = ds.from_diffusers(config, ignore=("clip_denoised", "clip_sample"))
    if "sigmas" in given and len(given) == 1:
        given = {"sigmas": [200.0, 1.0]}
    with pytest.raises(ValueError, match=message):
        sampler.times(**given)


def test_more_steps_than_levels_is_said_of_n():
    for name in (DPM, UNIPC, "EulerDiscreteScheduler", "DDIMScheduler"):
        config = {"_class_name": name, "clip_sample": False, "timestep_spacing": "trailing"}
        with pytest.raises(ValueError, match="n = 1001 is too many for 1000 levels"):
            ds.from_diffusers(config).times(1001)


def test_noise_forms_do_not_step_to_the_clean_end():
    config = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
    for name in (DPM, "DPMSolverSinglestepScheduler"):
        sampler = ds.from_diffusers({"_class_name": name, **config})
        assert sampler.solver(sampler.process, sampler.times(4)).nfe == 4
        with pytest.raises(ValueError, match="'dpmsolver' predicts noise, and is not finite"):
            sampler.solver(sampler.process, [900.0, 500.0, -1.0])


def test_the_network_is_called_as_its_pipeline_does():
    """A network that says what it was told: the label, the scale of its input, and its sign."""
    cases = [
        ({"_class_name": MATCH}, 0.25, 250.0, 1.0, 1.0),
        ({"_class_name": MATCH, "num_train_timesteps": 500}, 0.25, 125.0, 1.0, 1.0),
        ({"_class_name": MATCH, "invert_sigmas": True}, 0.25, 750.0, 1.0, -1.0),
        ({"_class_name": "MiniMaxH3Scheduler"}, 0.25, 0.75, 1.0, -1.0),
        ({"_class_name": "EDMEulerScheduler"}, 2.0, np.log(2) / 4, 1 / np.sqrt(4.25), 1.0),
        ({"_class_name": "CosineDPMSolverMultistepScheduler"}, 0.3, 0.3, 1.0, 1.0),
        ({"_class_name": "SCMScheduler"}, 0.3, 0.3, 1.0, 1.0),
        ({"_class_name": "DDIMScheduler"}, 300.0, 300.0, 1.0, 1.0),
    ]
    for config, t, label, scale, sign in cases:
        sampler = ds.from_diffusers(config, ignore="clip_sample")
        told = sampler.score_fn(lambda params, x, t: 0 * x + t[:, None], ())
        given = sampler.score_fn(lambda params, x, t: x, ())
        x = jnp.ones((1, 1))
        np.testing.assert_allclose(told(x, t), [[sign * label]], rtol=2e-6, err_msg=str(config))
        np.testing.assert_allclose(given(x, t), [[sign * scale]], rtol=2e-6)
    apply = cases.append  # one function gives one program, however often it is wrapped
    assert ds.from_diffusers(cases[2][0]).score_fn(apply, ()).apply == (
        ds.from_diffusers(cases[2][0]).score_fn(apply, ()).apply
    )


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
