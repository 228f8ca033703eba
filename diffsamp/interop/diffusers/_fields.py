"""What each diffusers scheduler reads of its config, and how a config is checked against it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from diffsamp._core.types import Value

__all__ = ["CLASSES", "DEFAULTS", "IDLE", "REFUSED", "on_flow", "read_values", "translated"]

# What diffusers' classes read, with defaults.
# fmt: off
DEFAULTS: dict[str, Value] = {
    "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
    "trained_betas": None, "prediction_type": "epsilon", "timestep_spacing": "linspace",
    "steps_offset": 0, "rescale_betas_zero_snr": False, "set_alpha_to_one": True,
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
    "use_lu_lambdas": False, "use_flow_sigmas": False, "flow_shift": 1.0,
    "final_sigmas_type": "zero", "lambda_min_clipped": -math.inf, "solver_order": 2,
    "lower_order_final": True, "euler_at_final": False, "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint", "disable_corrector": (), "shift": 1.0, "shift_terminal": None,
    "use_dynamic_shifting": False, "time_shift_type": "exponential", "base_shift": 0.5,
    "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096,
    "thresholding": False, "clip_sample": False, "variance_type": None, "predict_x0": True,
    "solver_p": None, "sigma_min": None, "sigma_max": None, "interpolation_type": "linear",
    "timestep_type": "discrete", "invert_sigmas": False, "stochastic_sampling": False,
    "skip_prk_steps": False, "predictor_order": 2, "corrector_order": 2, "tau_func": None,
    "snr_shift_scale": None, "original_inference_steps": 50, "timestep_scaling": 10.0,
    "sigma_data": 0.5, "sigma_schedule": "karras", "rho": 7.0, "eta": 1.0, "s_noise": 1.0,
    "scale_factors": None, "upscale_mode": "bicubic", "clip_denoised": False, "scaler": 1.0,
    "s": 0.008, "noise_sampler_seed": None,
}
_GRIDS = "use_karras_sigmas use_exponential_sigmas use_beta_sigmas"
_EXCLUSIVE = f"{_GRIDS} use_lu_lambdas use_flow_sigmas".split()
_BETAS = "num_train_timesteps beta_start beta_end beta_schedule trained_betas snr_shift_scale"
_TABLE = f"{_BETAS} prediction_type timestep_spacing steps_offset"
_KARRAS = f"{_TABLE} {_GRIDS}"
_SOLVER = "use_flow_sigmas flow_shift solver_order lower_order_final sigma_min sigma_max"
_ENDS = "sigma_min sigma_max"
_MULTISTEP = f"{_KARRAS} {_SOLVER}"
_DYNAMIC = "use_dynamic_shifting time_shift_type"
_FINAL = "rescale_betas_zero_snr final_sigmas_type"
_RESOLUTION = f"{_DYNAMIC} base_shift max_shift base_image_seq_len max_image_seq_len"
_FLOW = f"{_GRIDS} num_train_timesteps shift shift_terminal {_RESOLUTION} invert_sigmas"
_EDM = "sigma_min sigma_max sigma_data sigma_schedule prediction_type rho final_sigmas_type"
_LCM = (f"{_TABLE} rescale_betas_zero_snr original_inference_steps",
        "thresholding clip_sample")
_COG = (f"{_TABLE} rescale_betas_zero_snr set_alpha_to_one", "",
        {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
         "timestep_spacing": "leading", "snr_shift_scale": 3.0})
_ANCIENT = {"beta_start": 0.00085, "beta_end": 0.012}
_DDIM = (f"{_TABLE} rescale_betas_zero_snr set_alpha_to_one", "thresholding clip_sample",
         {"timestep_spacing": "leading", "clip_sample": True})
_DDPM = (f"{_TABLE} rescale_betas_zero_snr variance_type", "thresholding clip_sample",
         {"timestep_spacing": "leading", "clip_sample": True, "variance_type": "fixed_small"})
_Class = tuple[str, str, dict[str, Value]]
_DPM: _Class = (f"{_MULTISTEP} {_FINAL} algorithm_type solver_type euler_at_final use_lu_lambdas "
                f"lambda_min_clipped {_RESOLUTION} invert_sigmas", "thresholding variance_type", {})
# fields used here, fields of which only the value in DEFAULTS is reproduced, defaults of its own
CLASSES: dict[str, _Class] = {
    "DDIM": _DDIM,
    "DDIMParallel": _DDIM,
    "DDIMInverse": (_DDIM[0], "clip_sample", _DDIM[2]),
    "DDPM": _DDPM,
    "DDPMParallel": _DDPM,
    "UnCLIP": ("num_train_timesteps beta_schedule prediction_type variance_type", "clip_sample",
               {"beta_schedule": "squaredcos_cap_v2", "variance_type": "fixed_small_log",
                "clip_sample": True}),
    "DDPMWuerstchen": ("s", "scaler", {}),
    "PNDM": (f"{_TABLE} set_alpha_to_one skip_prk_steps", "",
             {"timestep_spacing": "leading", "set_alpha_to_one": False}),
    "IPNDM": ("", "trained_betas", {}),
    "LCM": (f"{_LCM[0]} timestep_scaling", _LCM[1],
            {**_ANCIENT, "beta_schedule": "scaled_linear", "timestep_spacing": "leading"}),
    "TCD": (_LCM[0], _LCM[1],
            {**_ANCIENT, "beta_schedule": "scaled_linear", "timestep_spacing": "leading"}),
    "CogVideoXDDIM": _COG,
    "CogVideoXDPM": _COG,
    "EulerDiscrete": (f"{_KARRAS} {_FINAL} {_ENDS} timestep_type", "interpolation_type", {}),
    "EulerAncestralDiscrete": (f"{_TABLE} rescale_betas_zero_snr", "", {}),
    "HeunDiscrete": (f"{_KARRAS} {_ENDS}", "clip_sample", _ANCIENT),
    "LMSDiscrete": (_KARRAS, "", {}),
    "KDPM2Discrete": (f"{_KARRAS} {_ENDS}", "", _ANCIENT),
    "KDPM2AncestralDiscrete": (f"{_KARRAS} {_ENDS}", "", _ANCIENT),
    "DPMSolverSDE": (_KARRAS, "", _ANCIENT),
    "DPMSolverMultistep": _DPM,
    "DPMSolverMultistepInverse": (f"{_TABLE} solver_order lower_order_final euler_at_final "
                                  "algorithm_type solver_type lambda_min_clipped",
                                  f"thresholding variance_type {_GRIDS} use_flow_sigmas", {}),
    "DPMSolverSinglestep": (f"{_BETAS} prediction_type {_GRIDS} {_SOLVER} "  # always linspace
                            "final_sigmas_type algorithm_type solver_type "
                            f"lambda_min_clipped {_RESOLUTION} invert_sigmas",
                            "thresholding variance_type", {"lower_order_final": False}),
    "UniPCMultistep": (f"{_MULTISTEP} {_FINAL} solver_type disable_corrector shift_terminal "
                       f"{_RESOLUTION} invert_sigmas predict_x0", "thresholding solver_p",
                       {"solver_type": "bh2"}),
    "DEISMultistep": (f"{_MULTISTEP} algorithm_type solver_type {_DYNAMIC}", "thresholding",
                      {"algorithm_type": "deis", "solver_type": "logrho"}),
    "SASolver": (f"{_KARRAS} {_ENDS} use_flow_sigmas flow_shift lower_order_final predictor_order "
                 "corrector_order lambda_min_clipped algorithm_type",
                 "thresholding variance_type tau_func", {"algorithm_type": "data_prediction"}),
    "FlowMatchEulerDiscrete": (f"{_FLOW} stochastic_sampling {_ENDS} final_sigmas_type", "", {}),
    "FlowMatchHeunDiscrete": ("num_train_timesteps shift", "", {}),
    "FlowMatchLCM": (f"{_FLOW} {_ENDS}", "scale_factors", {}),
    "LTXEulerAncestralRF": (f"{_FLOW} eta s_noise {_ENDS}", "", {}),
    "MiniMaxH3": ("shift", "", {"shift": 12.0}),
    "EDMEuler": (_EDM, "", {"sigma_min": 0.002, "sigma_max": 80.0}),
    "EDMDPMSolverMultistep": (f"{_EDM} solver_order algorithm_type solver_type lower_order_final "
                              "euler_at_final", "thresholding",
                              {"sigma_min": 0.002, "sigma_max": 80.0}),
    "CosineDPMSolverMultistep": (f"{_EDM} solver_order solver_type lower_order_final "
                                 "euler_at_final", "",
                                 {"sigma_min": 0.3, "sigma_max": 500.0, "sigma_data": 1.0,
                                  "sigma_schedule": "exponential",
                                  "prediction_type": "v_prediction"}),
    "SCM": ("prediction_type sigma_data", "", {"prediction_type": "trigflow"}),
    "CMStochasticIterative": ("num_train_timesteps sigma_min sigma_max sigma_data s_noise rho",
                              "clip_denoised",
                              {"num_train_timesteps": 40, "sigma_min": 0.002, "sigma_max": 80.0,
                               "clip_denoised": True}),
}
# Saved configs keep fields of other classes, which a scheduler does not read, and nor do we. These
# only matter when one of theirs is set, or not to the sampler.
IDLE = {"dynamic_thresholding_ratio", "clip_sample_range", "sample_max_value", "skip_prk_steps",
        "set_alpha_to_one", "clip_sample", "upscale_mode", "num_train_timesteps",
        "timestep_spacing", "noise_sampler_seed", "timestep_scaling", "use_flow_sigmas",
        "flow_shift"}
_PIXELS = "ds.guidance.static_thresholding around the ScoreFn"
# how to get what a field asks for
_WAYS = {
    "clip_sample": f"It clips the data prediction, which {_PIXELS} does",
    "clip_denoised": f"It clips the data prediction, which {_PIXELS} does",
    "thresholding": "ds.guidance.dynamic_thresholding around the ScoreFn does it",
    "variance_type": "The network returns a second head: split it off in `apply` (for DDPM's "
                     "learned noise: ds.guidance.learned_range with "
                     'ds.solvers.ddpm(variance="learned"))',
}
_INSTEAD = {
    "interpolation_type": "Its labels are not those of its sigmas. Pass the sigmas you mean: "
                          "times(n, sigmas=[..]), with interpolation_type 'linear'.",
    "solver_p": "Build the predictor's own tableau: ds.solvers.unipc(.., corrector=False).",
    "tau_func": "Pass the function to ds.solvers.sa_solver(process, times, tau=..).",
    "trained_betas": "Its sigmas are then arcsin-spaced by hand: ds.solvers.ipndm on "
                     "ds.processes.trig() with your times.",
    "scale_factors": "A state that changes its size is no row of a tableau: sample each size by "
                     "itself, from its own first sigma.",
    "scaler": "Give ds.processes.vp_cosine() the times you mean, with ds.solvers.ddpm.",
    "use_karras_sigmas": "Use ds.solvers.dpmpp on rising times instead.",
    "use_exponential_sigmas": "Use ds.solvers.dpmpp on rising times instead.",
    "use_beta_sigmas": "Use ds.solvers.dpmpp on rising times instead.",
    "use_flow_sigmas": "Use ds.solvers.dpmpp on rising times of ds.processes.flow() instead.",
}
_CHOICES: dict[str, dict[str, tuple[Value, ...]]] = {
    "": {
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
        "prediction_type": ("epsilon", "sample", "v_prediction", "flow_prediction"),
        "timestep_spacing": ("linspace", "leading", "trailing"),
        "final_sigmas_type": ("zero", "sigma_min"),
        "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
        "time_shift_type": ("exponential", "linear"),
        "timestep_type": ("discrete", "continuous"),
        "sigma_schedule": ("karras", "exponential"),
        "solver_order": (1, 2, 3),
    },
    "DDPM": {"beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")},
    "DDPMParallel": {"beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")},
    "PNDM": {"prediction_type": ("epsilon", "v_prediction")},
    "DPMSolverMultistep": {"algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver",
                                              "sde-dpmsolver"),
                           "solver_type": ("midpoint", "heun"),
                           "time_shift_type": ("exponential",)},
    "DPMSolverMultistepInverse": {"algorithm_type": ("dpmsolver++", "dpmsolver"),
                                  "solver_type": ("midpoint", "heun")},
    "DPMSolverSinglestep": {"algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver"),
                            "solver_type": ("midpoint", "heun"),
                            "time_shift_type": ("exponential",)},
    "EDMDPMSolverMultistep": {"algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
                              "solver_type": ("midpoint", "heun")},
    "CosineDPMSolverMultistep": {"solver_type": ("midpoint", "heun"), "solver_order": (1, 2)},
    "UniPCMultistep": {"solver_type": ("bh2", "bh1"), "solver_order": (1, 2, 3, 4)},
    "DEISMultistep": {"algorithm_type": ("deis",), "solver_type": ("logrho",),
                      "time_shift_type": ("exponential",)},
    "SASolver": {"algorithm_type": ("data_prediction",)},
    "SCM": {"prediction_type": ("trigflow",)},
    "UnCLIP": {"prediction_type": ("epsilon", "sample")},
}
# Of such a value of another multistep class diffusers makes the first choice of this one.
_FOREIGN = ("deis", "dpmsolver++", "logrho", "midpoint", "heun", "bh1", "bh2")
_TOKENS = "it samples discrete tokens, not numbers, and so is no row of a tableau"
_STAGES = "it changes the size of the state between its stages"
# class: (why it cannot be read, what to use)
REFUSED: dict[str, tuple[str, str]] = {
    "Amused": (_TOKENS, "as a `ds.discrete.TokenFn`: `ds.discrete.maskgit`"),
    "BlockRefinement": (_TOKENS, "as a `ds.discrete.TokenFn`: `ds.discrete.blocks`, `threshold`"),
    "DiscreteDDIM": (_TOKENS, "`ds.discrete` has masked and uniform noise, by other rows"),
    "EntropyBound": (_TOKENS, "as a `ds.discrete.TokenFn`: `ds.discrete.entropy_bounded`"),
    "VQDiffusion": (_TOKENS, "`ds.discrete` has masked and uniform noise, not both mixed"),
    "ConsistencyDecoder": ("it is the decoder of a VAE with two fixed steps of its own scalings",
                           "call the decoder itself, or ds.solvers.consistency on "
                           'ds.processes.vp_discrete("squaredcos_cap_v2", num_levels=1024)'),
    "FlowMapEulerDiscrete": ("its network takes two times, where a step starts and where it ends",
                             "ds.few_step.flow_map"),
    "Helios": (_STAGES, "ds.solvers.unipc on ds.processes.flow(), a stage at a time"),
    "HeliosDMD": (_STAGES, "ds.solvers.consistency(.., rho_min=0) on ds.processes.flow(), a stage "
                           "at a time"),
    "KarrasVe": ("it is deprecated, and its churned step is split between scheduler and pipeline",
                 "ds.solvers.heun(process, times, churn=80, churn_min=.05, churn_max=50, "
                 "noise_scale=1.007) on ds.processes.edm()"),
    "Piflow": ("its network returns a policy that is integrated by itself between evaluations",
               "integrate the policy inside `apply`"),
    "RFD4Proteina": ("it masks the state in every step and tempers the score",
                     "ds.solvers.interpolant on ds.processes.flow(), with the mask in `apply`"),
    "RePaint": ("it pastes the known part of an image in every step", "ds.solvers.restart, with "
                "the known part in a transform of the network"),
    "ScoreSdeVe": ("the step of its corrector depends on the norm of what the network says",
                   "ds.processes.ve() with any solver, such as ds.solvers.ddpm"),
    "ScoreSdeVp": ("it is deprecated, and has no config of a discrete table",
                   "ds.processes.vp_linear() with ds.solvers.ddpm"),
}
# fmt: on
_OF_FLOW = (
    "shift",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "invert_sigmas",
    "stochastic_sampling",
)
_OF_EDM = ("sigma_data", "rho", "sigma_schedule")
_OF_TABLE = ("beta_schedule", "beta_start", "beta_end", "trained_betas")
_SEVERAL = ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep")


def family(name: str) -> str:
    """What kind of network a class samples: "flow", "edm", "table" or its own."""
    read = CLASSES[name][0].split()
    if "shift" in read:
        return "flow"
    if "sigma_data" in read:
        return "edm"
    return "table" if "prediction_type" in read else "own"


def on_flow(values: Mapping[str, Value]) -> bool:
    """Whether a table's class samples a flow model."""
    return bool(values.get("use_flow_sigmas"))


def translated(name: str, config: Mapping[str, Value]) -> dict[str, Value]:
    """A config of another kind of network in this class's words.

    diffusers reads what it knows and leaves the rest: a flow model's config as a class of noise
    models becomes a noise model. Here what the fields say of the network is kept.

    Raises:
      ValueError: the class cannot sample such a network.
    """
    config = {key: value for key, value in config.items() if value is not None}
    kind = family(name)
    is_flow = config.get("prediction_type") == "flow_prediction" or on_flow(config)
    marks = [field for field in _OF_FLOW if field in config]
    if kind in ("table", "edm") and marks and not is_flow:
        if name not in _SEVERAL or "prediction_type" in config or "use_flow_sigmas" in config:
            raise ValueError(
                f"{name} would read this as a noise model, but {marks[0]!r} = "
                f"{config[marks[0]]!r} is a field of flow models. Read it as "
                f"FlowMatchEulerDiscreteScheduler, or as {', '.join(_SEVERAL)} with "
                "'prediction_type' = 'flow_prediction', 'use_flow_sigmas' = True and 'flow_shift'."
            )
        config |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        is_flow = True
    if kind == "table" and is_flow and "shift" in config and "flow_shift" not in config:
        config["flow_shift"] = config["shift"]
    if kind == "flow" and not is_flow:
        noise = config.get("prediction_type") or next((f for f in _OF_TABLE if f in config), None)
        if noise is not None and not marks:
            raise ValueError(
                f"{name} samples flow models, but {noise!r} says that this is a noise model with "
                "a table of betas. Read it as a class of those, such as DPMSolverMultistep."
            )
    if kind == "flow" and "flow_shift" in config and "shift" not in config:
        config["shift"] = config["flow_shift"]
    continuous = config.get("timestep_type") == "continuous" and name != "EulerDiscrete"
    if kind == "table" and continuous and config.get("prediction_type") == "v_prediction":
        raise ValueError(
            f"{name} would call this network with the index of a level, but with 'timestep_type' = "
            "'continuous' it takes log(sigma) / 4 (Stable Video Diffusion). Read it as "
            "EulerDiscreteScheduler, and give its process and times to any of ds.solvers."
        )
    marks = [field for field in _OF_EDM if field in config]
    if kind == "flow" and (config.get("sigma_max") or 0) > 1:
        marks = []  # Cosmos 2: a flow model on a grid of sigma / alpha
    if kind in ("table", "flow") and marks and not (name == "LCM" and marks == ["sigma_data"]):
        raise ValueError(
            f"{name} would not read {marks[0]!r} = {config[marks[0]]!r}, which belongs to EDM's "
            "preconditioned networks. Read it as EDMEulerScheduler or "
            "EDMDPMSolverMultistepScheduler (or CosineDPMSolverMultistep, SCM, "
            "CMStochasticIterative, whichever it came with)."
        )
    noise = next((field for field in _OF_TABLE if field in config), None)
    if kind == "edm" and noise is not None and not marks:
        raise ValueError(
            f"{name} samples EDM's preconditioned networks, but {noise!r} says that this is a "
            "network with a table of betas. Read it as a class of those, such as EulerDiscrete."
        )
    return config


def read_values(name: str, config: Mapping[str, Value], ignore: set[str]) -> dict[str, Value]:
    """The fields `name` reads, checked, with its defaults for those that are absent or None."""
    read, fixed, own = CLASSES[name]
    defaults = {**DEFAULTS, **own}
    for field in fixed.split():
        value, only = config.get(field, defaults[field]), DEFAULTS[field]
        if field == "variance_type" and str(value).startswith("fixed"):
            continue  # another scheduler's; only the learned ones change what the network returns
        if field not in ignore and value != only and not (value is None and not only):
            raise ValueError(_refusal(name, field, value))
    for field, value in config.items():
        if not (field.startswith("_") or field in ignore or field in DEFAULTS or field in IDLE):
            raise ValueError(
                f"field {field!r} = {value!r} of {name} is not known: no scheduler of diffusers "
                "0.42 that is read here has it. Take it out of the config if it is not the "
                "sampler's."
            )
    values = {}
    for field in read.split():
        value = None if field in ignore else config.get(field)
        values[field] = defaults[field] if value is None else value
    for field, choices in {**_CHOICES[""], **_CHOICES.get(name, {})}.items():
        if field not in values or values[field] in choices:
            continue
        if values[field] in _FOREIGN:
            values[field] = choices[0]
        else:
            way = f" {_WAYS[field]}." if field in _WAYS else ""
            raise ValueError(
                f"{name} with {field!r} = {values[field]!r} is not reproduced; it must be "
                f"{' or '.join(map(repr, choices))}.{way}"
            )
    _expect_consistent(name, values)
    return values


def _refusal(name: str, field: str, value: Value) -> str:
    text = f"{name} with {field!r} = {value!r} is not reproduced (only {DEFAULTS[field]!r} is). "
    if field in _WAYS:
        return f'{text}{_WAYS[field]}; then pass ignore=("{field}",).'
    return text + _INSTEAD[field]


def _expect_consistent(name: str, values: dict[str, Value]) -> None:
    """Check the fields that depend on each other, and add which grid is used, under "grid"."""
    grids = [field for field in values if field in _EXCLUSIVE and values[field]]
    if name == "UniPCMultistep" and grids == ["use_karras_sigmas", "use_flow_sigmas"]:
        grids = grids[:1]  # Karras's sigmas are then those of sigma / alpha
    # "" if the sigmas are those of the timesteps
    values["grid"] = "".join(grids) if grids != ["use_flow_sigmas"] else ""
    if len(grids) > 1:
        raise ValueError(f"{name} with both {' and '.join(map(repr, grids))} is not reproduced.")
    high, final = values.get("solver_order", 1), values.get("final_sigmas_type")
    algorithm = values.get("algorithm_type", "")
    singles = name == "DPMSolverSinglestep" and values.get("solver_type") != "heun"
    if algorithm.startswith("sde-dpmsolver") and high > 2 and not singles:
        raise ValueError(f"{name}: {algorithm!r} with 'solver_order' = {high} is inconsistent.")
    if algorithm in ("dpmsolver", "sde-dpmsolver") and final == "zero":
        raise ValueError(
            f"{name}: 'algorithm_type' = {algorithm!r} is not finite at sigma = 0: give it "
            "'final_sigmas_type' = 'sigma_min'."
        )
    if name == "UniPCMultistep" and not values["predict_x0"] and final == "zero":
        raise ValueError(
            f"{name}: 'predict_x0' = False predicts noise, which is not finite at sigma = 0: give "
            "it 'final_sigmas_type' = 'sigma_min'."
        )
    if (
        name == "UniPCMultistep"
        and high > 1
        and final == "zero"
        and not values["lower_order_final"]
    ):
        raise ValueError(f"{name}: 'lower_order_final' = False is not finite at sigma = 0.")
    flow = on_flow(values)
    if "use_flow_sigmas" in values:
        velocity = values["prediction_type"] == "flow_prediction"
        if flow != velocity or (flow and final != "zero"):
            raise ValueError(
                f"{name}: 'prediction_type' = {values['prediction_type']!r}, 'use_flow_sigmas' = "
                f"{flow} and 'final_sigmas_type' = {final!r} do not go together; a flow model "
                "needs 'flow_prediction', True and 'zero'"
                + ("." if final else f", so one of {', '.join(_SEVERAL)}.")
            )
    elif values.get("prediction_type") == "flow_prediction" and family(name) == "table":
        raise ValueError(
            f"{name} has no form for flow models ('prediction_type' = 'flow_prediction'). Read it "
            f"as FlowMatchEulerDiscreteScheduler or as one of {', '.join(_SEVERAL)}."
        )
    data = values.get("sigma_data")
    if values.get("prediction_type") == "v_prediction" and family(name) == "edm" and data != 1:
        raise ValueError(
            f"{name}: 'v_prediction' with 'sigma_data' = {data} is minus EDM's network output. "
            "Let `apply` return minus what the network does, and pass 'prediction_type' = "
            "'epsilon'."
        )
