"""Read a diffusers `scheduler_config.json` as process, prediction, times and solver.

What the scheduler does is written out in this library's terms and compared with diffusers step by
step in the tests. Known differences, on purpose:

- DDIMScheduler steps from t to t - T // n whatever its spacing; where that is not the next time it
  evaluates ("linspace", or "trailing" when n does not divide T) it integrates over the wrong
  interval. Here every step ends at the next time.
- With Karras sigmas the multistep schedulers feed the network a label rounded to an integer, while
  the sigma is not rounded. Here the network gets the real label of that sigma.
- DEISMultistepScheduler with Karras, exponential or beta sigmas repeats its last sigma, a step of
  size zero; that is refused.
- Where Euler's and Heun's schedulers have real timesteps they interpolate sigma linearly between
  table entries; here, as for every process, the log-SNR is interpolated, which is what they do when
  they invert sigma to a timestep.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import beta as beta_distribution

from diffsamp import processes, schedules, solvers
from diffsamp._checks import expect_int, expect_times
from diffsamp.predictions import canonical_name
from diffsamp.processes import Process
from diffsamp.tableau import Tableau

__all__ = ["DiffusersSampler", "from_diffusers"]


class DiffusersSampler(NamedTuple):
    """What a diffusers scheduler amounts to.

    Attributes:
      process: the noise process; the time of a discrete one is the training timestep, -1 is clean.
      prediction: what the network predicts, a name for `ScoreFn`.
      times: n -> (n + 1,) times; n is diffusers' `num_inference_steps`.
      solver: (process, times) -> Tableau.
    """

    process: Process
    prediction: str
    times: Callable[..., np.ndarray]
    solver: Callable[[Process, Any], Tableau]


# Fields with their defaults. Those marked None under _READ are used; any other must keep the value
# given here, since another would change the samples in a way that is not reproduced.
_TABLE = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
}
_GRIDS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
_FLOW_GRID = {"use_flow_sigmas": False, "flow_shift": 1.0}
_FIXED: dict[str, Any] = {
    "thresholding": False,
    "clip_sample": False,
    "use_lu_lambdas": False,
    "lambda_min_clipped": -float("inf"),
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "sigma_min": None,
    "sigma_max": None,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "predict_x0": True,
    "disable_corrector": [],
    "solver_p": None,
    "invert_sigmas": False,
    "stochastic_sampling": False,
}
# they only matter when a field above is set
_IDLE = {
    "dynamic_thresholding_ratio",
    "clip_sample_range",
    "sample_max_value",
    "variance_type",
    "time_shift_type",
    "skip_prk_steps",
}
_LINSPACE = {**_TABLE, "timestep_spacing": "linspace"}
_MULTISTEP = {**_LINSPACE, **_GRIDS, **_FLOW_GRID, "solver_order": 2, "lower_order_final": True}
_READ: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {**_TABLE, "set_alpha_to_one": True},
    "DDPMScheduler": {**_TABLE, "variance_type": "fixed_small"},
    "EulerDiscreteScheduler": {**_LINSPACE, **_GRIDS, "final_sigmas_type": "zero"},
    "HeunDiscreteScheduler": {**_LINSPACE, **_GRIDS, "beta_start": 0.00085, "beta_end": 0.012},
    "DPMSolverMultistepScheduler": {
        **_MULTISTEP,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "euler_at_final": False,
        "final_sigmas_type": "zero",
    },
    "UniPCMultistepScheduler": {**_MULTISTEP, "solver_type": "bh2", "final_sigmas_type": "zero"},
    "DEISMultistepScheduler": {**_MULTISTEP, "algorithm_type": "deis", "solver_type": "logrho"},
    "FlowMatchEulerDiscreteScheduler": {
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": False,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "time_shift_type": "exponential",
    },
}
# diffusers clips by default in these two; configs of latent models say False
_CLIPS_BY_DEFAULT = {"DDIMScheduler", "DDPMScheduler"}


def from_diffusers(
    config: Mapping[str, Any] | str | os.PathLike[str], *, ignore: tuple[str, ...] = ()
) -> DiffusersSampler:
    """Process, prediction, times and solver of a diffusers scheduler.

    Supported: DDIM, DDPM, EulerDiscrete, HeunDiscrete, DPMSolverMultistep (dpmsolver++),
    UniPCMultistep, DEISMultistep and FlowMatchEulerDiscrete.

    Example:
      >>> import diffsamp as ds
      >>> sampler = ds.from_diffusers({"_class_name": "UniPCMultistepScheduler"})
      >>> sampler.solver(sampler.process, sampler.times(8)).nfe
      8

    Args:
      config: the dict, or the path of a `scheduler_config.json` or of the folder that holds it.
      ignore: names of fields whose effect is to be left out knowingly, such as ("clip_sample",).

    Returns:
      A `DiffusersSampler`. For flow models `times(n)` takes `mu`, or `image_seq_len` from which
      mu is computed, if the config uses dynamic shifting.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a class or a field's value that is not reproduced; the message names it.
    """
    config = dict(config) if isinstance(config, Mapping) else _load(config)
    name = config.get("_class_name")
    if name not in _READ:
        raise ValueError(
            f"`_class_name` must be one of {', '.join(_READ)}; got {name!r}. Build the process "
            "and choose a solver from diffsamp.solvers directly."
        )
    read = _READ[name]
    if name in _CLIPS_BY_DEFAULT:
        config.setdefault("clip_sample", True)
    for field, value in config.items():
        if field.startswith("_") or field in read or field in ignore or field in _IDLE:
            continue
        if field not in _FIXED:
            raise ValueError(
                f"field {field!r} = {value!r} of {name} is not known. If it does not matter, pass "
                f'ignore=("{field}",).'
            )
        if value != _FIXED[field] and not (value is None and not _FIXED[field]):
            raise ValueError(
                f"{name} with {field!r} = {value!r} is not reproduced (only {_FIXED[field]!r} "
                f'is). To sample without it, pass ignore=("{field}",).'
            )
    values = {
        field: default if config.get(field) is None else config[field]
        for field, default in read.items()
    }
    if name == "FlowMatchEulerDiscreteScheduler":
        return DiffusersSampler(
            processes.flow(), "velocity", lambda n, **kw: _flow_match(values, n, **kw), solvers.ddim
        )
    prediction = canonical_name(values["prediction_type"])
    on_flow = bool(values.get("use_flow_sigmas"))
    if on_flow != (prediction == "velocity"):
        raise ValueError(
            f"{name}: 'prediction_type' = {values['prediction_type']!r} and 'use_flow_sigmas' = "
            f"{on_flow} do not go together; a flow model needs both."
        )
    process = processes.flow() if on_flow else _discrete(values)
    return DiffusersSampler(
        process,
        prediction,
        lambda n: _times(name, values, process, n),
        _solver(name, values),
    )


def _load(path: str | os.PathLike[str]) -> dict[str, Any]:
    file = Path(path)
    file = file / "scheduler_config.json" if file.is_dir() else file
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}.") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file} must hold a JSON object; got {type(data).__name__}.")
    return data


def _discrete(values: Mapping[str, Any]) -> processes.VPDiscrete:
    trained = values["trained_betas"]
    return processes.vp_discrete(
        values["beta_schedule"] if trained is None else trained,
        num_levels=values["num_train_timesteps"],
        beta_start=values["beta_start"],
        beta_end=values["beta_end"],
        zero_terminal_snr=values["rescale_betas_zero_snr"],
    )


def _times(name: str, values: Mapping[str, Any], process: Process, n: int) -> np.ndarray:
    """The timesteps, then where the last step ends."""
    expect_int(n, "n", at_least=1)
    multistep = "solver_order" in values
    if values.get("use_flow_sigmas"):
        return _flow_sigmas(name, values, n)
    spaced = _spaced(values, n, multistep=multistep, rounded=name != "EulerDiscreteScheduler"
                     and name != "HeunDiscreteScheduler")  # fmt: skip
    last_level = process.t_clean
    if values.get("final_sigmas_type") == "sigma_min" or name == "DEISMultistepScheduler":
        last_level = 0.0
    if name == "DDIMScheduler" and not values["set_alpha_to_one"]:
        last_level = 0.0
    used = [grid for grid in _GRIDS if values.get(grid)]
    if used:
        if name == "DEISMultistepScheduler":
            raise ValueError(f"{name} with {used[0]!r} ends with a step of size zero; unset it.")
        # the ends: those of the whole table, or of the spaced times (Euler, Heun)
        ends = (process.t_max, 0.0) if multistep else (spaced[0], spaced[-1])
        spaced = _sigma_grid(used[0], process, ends, n)
    if spaced[-1] <= last_level:
        raise ValueError(
            f"{name} evaluates last at timestep {spaced[-1]:g} and ends there, a step of size "
            "zero; set 'steps_offset' to 1, or end at sigma = 0."
        )
    return expect_times(np.append(spaced, last_level))


def _spaced(values: Mapping[str, Any], n: int, *, multistep: bool, rounded: bool) -> np.ndarray:
    """n timesteps by `timestep_spacing`; the multistep classes space n + 1 and drop the last."""
    levels, spacing = values["num_train_timesteps"], values["timestep_spacing"]
    points = n + 1 if multistep else n
    if spacing == "linspace":
        steps = np.linspace(0, levels - 1, points)
        steps = (np.round(steps) if rounded else steps)[::-1][:n]
    elif spacing == "leading":
        steps = (np.arange(points) * (levels // points))[::-1][:n] + float(values["steps_offset"])
    elif spacing == "trailing":
        steps = np.round(np.arange(levels, 0, -levels / n)) - 1
    else:
        raise ValueError(
            f"'timestep_spacing' must be 'linspace', 'leading' or 'trailing'; got {spacing!r}."
        )
    if steps[0] > levels - 1:
        raise ValueError(
            f"the first timestep, {steps[0]:g}, lies beyond the last trained one, {levels - 1}: "
            f"'steps_offset' = {values['steps_offset']} does not fit n = {n}."
        )
    return steps


def _sigma_grid(grid: str, process: Process, ends: tuple[float, float], n: int) -> np.ndarray:
    """Times spaced in sigma / alpha as Karras's, exponential or beta sigmas."""
    if grid == "use_karras_sigmas":
        return schedules.karras(process, n, t_max=ends[0], t_min=ends[1])[:-1]
    if grid == "use_exponential_sigmas":
        return schedules.logsnr(process, n, t_max=ends[0], t_min=ends[1])[:-1]
    high, low = (np.exp(-process.log_snr(t)) for t in ends)
    quantile = beta_distribution.ppf(1 - np.linspace(0, 1, n), 0.6, 0.6)
    times = np.asarray(process.time(-np.log(low + quantile * (high - low))))
    times[0], times[-1] = ends if n > 1 else (ends[0], ends[0])
    return times


def _flow_sigmas(name: str, values: Mapping[str, Any], n: int) -> np.ndarray:
    """The `use_flow_sigmas` grid; UniPC's differs from the others', as in diffusers."""
    levels, shift = values["num_train_timesteps"], values["flow_shift"]
    grid = np.linspace(1, 1 / levels, n + 1)
    sigma = grid[:-1] if name == "UniPCMultistepScheduler" else (1 - grid)[::-1][:-1]
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    if sigma[0] > 1 - 1e-6:  # diffusers steps back from log 0; so that the levels agree, so do we
        sigma[0] -= 1e-6
    if name == "DEISMultistepScheduler":
        raise ValueError(f"{name} with 'use_flow_sigmas' ends with a step of size zero; unset it.")
    if values["final_sigmas_type"] == "sigma_min":
        raise ValueError("'final_sigmas_type' = 'sigma_min' with flow sigmas is a step of size 0.")
    return np.append(sigma, 0.0)


def _flow_match(
    values: Mapping[str, Any],
    n: int,
    *,
    mu: float | None = None,
    image_seq_len: int | None = None,
) -> np.ndarray:
    expect_int(n, "n", at_least=1)
    levels, shift = values["num_train_timesteps"], values["shift"]

    def shifted(sigma: np.ndarray) -> np.ndarray:
        return shift * sigma / (1 + (shift - 1) * sigma)

    smallest = np.array(1 / levels)
    if not values["use_dynamic_shifting"]:
        if mu is not None or image_seq_len is not None:
            raise ValueError("this config has no dynamic shifting; leave out `mu`.")
        # the table's end is shifted when the scheduler is made, then the grid once more
        return np.append(shifted(np.linspace(1, float(shifted(smallest)), n)), 0.0)
    if mu is None:
        if image_seq_len is None:
            raise ValueError("this config shifts by resolution: give `image_seq_len` or `mu`.")
        span = values["max_image_seq_len"] - values["base_image_seq_len"]
        slope = (values["max_shift"] - values["base_shift"]) / span
        mu = values["base_shift"] + slope * (image_seq_len - values["base_image_seq_len"])
    strength = np.exp(mu) if values["time_shift_type"] == "exponential" else mu
    sigma = np.linspace(1, float(smallest), n)
    return np.append(strength * sigma / (1 + (strength - 1) * sigma), 0.0)


def _solver(name: str, values: Mapping[str, Any]) -> Callable[[Process, Any], Tableau]:
    """(process, times) -> Tableau; options that depend on the number of steps are chosen inside."""
    if name == "DDIMScheduler":
        return solvers.ddim
    if name == "EulerDiscreteScheduler":
        return solvers.euler
    if name == "HeunDiscreteScheduler":
        return lambda process, times: solvers.heun(process, times, coordinates="edm")
    if name == "DDPMScheduler":
        kinds = {"fixed_small": "small", "fixed_large": "large"}
        variance = values["variance_type"]
        if variance not in kinds:
            raise ValueError(
                f"'variance_type' must be 'fixed_small' or 'fixed_large'; got {variance!r}."
            )
        return lambda process, times: solvers.ddpm(process, times, variance=kinds[variance])

    order, lower = values["solver_order"], values["lower_order_final"]
    if name == "UniPCMultistepScheduler":
        if not lower:
            raise ValueError("UniPC with 'lower_order_final' = False is not finite at sigma = 0.")
        return lambda process, times: solvers.unipc(
            process, times, order=order, variant=values["solver_type"]
        )

    def lowers(times: Any) -> bool:
        return bool(lower) and len(times) - 1 < 15  # diffusers' rule, for few steps only

    if name == "DEISMultistepScheduler":
        if values["algorithm_type"] != "deis" or values["solver_type"] != "logrho":
            raise ValueError(
                "only 'algorithm_type' = 'deis' with 'solver_type' = 'logrho' is DEIS."
            )
        return lambda process, times: solvers.deis(
            process, times, order=order - 1, variable="log_rho", lower_order_final=lowers(times)
        )
    if values["algorithm_type"] != "dpmsolver++":
        raise ValueError(
            f"'algorithm_type' must be 'dpmsolver++'; got {values['algorithm_type']!r}."
        )
    if values["euler_at_final"] and values["final_sigmas_type"] != "zero":
        raise ValueError("'euler_at_final' is reproduced with 'final_sigmas_type' = 'zero' only.")
    return lambda process, times: solvers.dpmpp(
        process,
        times,
        order=order,
        variant=values["solver_type"],
        lower_order_final=lowers(times),
        compatible=True,
    )
