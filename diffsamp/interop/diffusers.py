"""Read a diffusers `scheduler_config.json` as process, prediction, times and solver.

What the scheduler does is written out in this library's terms; the tests compare it with diffusers
0.42.1 step by step. Where diffusers is off, on purpose not followed:

- DDIMScheduler steps from t to t - T // n whatever its spacing. Where that is not the next time it
  evaluates ("linspace", or "trailing" when n does not divide T) it integrates over another interval
  and may end at a level that is not clean. Here a step ends where the next one begins.
- "trailing" gives one timestep too many, labelled -1, for 62 of the n up to 1000 (61 the first), by
  rounding. Here n are n.
- With sigmas of their own (Karras, flow, ..) the multistep schedulers round the network's label, or
  cut it off, to an integer, though not the sigma. Here the network gets the sigma's real label.
- Karras, exponential or beta sigmas that end at "sigma_min" (DEIS: always) repeat the last one, an
  evaluation for a step of size zero. That is refused.
- UniPC "bh1" gives NaN in a step to sigma = 0. Here that step is the data prediction.
- DDPMScheduler with "fixed_large" adds noise in its last step too, unless that starts at t = 0.

Reproduced, though not what it seems: the third order of DPMSolverMultistepScheduler (half of a
coefficient, `compatible` in `solvers.dpmpp`); DEIS, which interpolates in log rho; the `shift` of
FlowMatchEulerDiscreteScheduler, applied to its smallest sigma twice (pipelines that pass their own
sigmas are `times(n, sigmas=...)`); Euler's, Heun's and the LMS scheduler's sigmas, linear between
table entries, whose label here is that of the log-SNR.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import beta as beta_distribution

from diffsamp import processes, solvers
from diffsamp._core.checks import expect_int, expect_times
from diffsamp._core.files import read_json
from diffsamp.predictions import canonical_name
from diffsamp.processes import Process
from diffsamp.schedules import shifted
from diffsamp.tableau import Tableau

__all__ = ["DiffusersSampler", "from_diffusers"]


class DiffusersSampler(NamedTuple):
    """What a diffusers scheduler amounts to.

    Attributes:
      process: the noise process; a discrete one's time is the training timestep, -1 is clean.
      prediction: what the network predicts, a name for `ScoreFn`.
      times: n -> (n + 1,) times; n is diffusers' `num_inference_steps`.
      solver: (process, times) -> Tableau.
    """

    process: Process
    prediction: str
    times: Callable[..., np.ndarray]
    solver: Callable[[Process, Any], Tableau]


# What diffusers' classes read, with defaults.
# fmt: off
_DEFAULTS: dict[str, Any] = {
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
}
_GRIDS = "use_karras_sigmas use_exponential_sigmas use_beta_sigmas"
_EXCLUSIVE = f"{_GRIDS} use_lu_lambdas use_flow_sigmas".split()
_TABLE = ("num_train_timesteps beta_start beta_end beta_schedule trained_betas prediction_type "
          "timestep_spacing steps_offset")
_MULTISTEP = f"{_TABLE} {_GRIDS} use_flow_sigmas flow_shift solver_order lower_order_final"
_FINAL = "rescale_betas_zero_snr final_sigmas_type"
# fields used here, fields of which only the value in _DEFAULTS is reproduced, defaults of its own
_CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "DDIM": (f"{_TABLE} rescale_betas_zero_snr set_alpha_to_one", "thresholding clip_sample",
             {"timestep_spacing": "leading", "clip_sample": True}),
    "DDPM": (f"{_TABLE} rescale_betas_zero_snr variance_type", "thresholding clip_sample",
             {"timestep_spacing": "leading", "clip_sample": True, "variance_type": "fixed_small"}),
    "EulerDiscrete": (f"{_TABLE} {_GRIDS} {_FINAL}",
                      "interpolation_type timestep_type sigma_min sigma_max", {}),
    "HeunDiscrete": (f"{_TABLE} {_GRIDS}", "clip_sample",
                     {"beta_start": 0.00085, "beta_end": 0.012}),
    "LMSDiscrete": (f"{_TABLE} {_GRIDS}", "", {}),
    "DPMSolverMultistep": (f"{_MULTISTEP} {_FINAL} algorithm_type solver_type euler_at_final "
                           "use_lu_lambdas lambda_min_clipped",
                           "thresholding use_dynamic_shifting variance_type", {}),
    "UniPCMultistep": (f"{_MULTISTEP} {_FINAL} solver_type disable_corrector",
                       "thresholding use_dynamic_shifting predict_x0 solver_p sigma_min sigma_max "
                       "shift_terminal", {"solver_type": "bh2"}),
    "DEISMultistep": (f"{_MULTISTEP} algorithm_type solver_type",
                      "thresholding use_dynamic_shifting",
                      {"algorithm_type": "deis", "solver_type": "logrho"}),
    "FlowMatchEulerDiscrete": (f"{_GRIDS} num_train_timesteps shift shift_terminal "
                               "use_dynamic_shifting time_shift_type base_shift max_shift "
                               "base_image_seq_len max_image_seq_len",
                               "invert_sigmas stochastic_sampling", {}),
}
# Saved configs keep fields of other classes, which a scheduler does not read, and nor do we. These
# are no field of the classes above, or only matter when one of theirs is set.
_IDLE = {"dynamic_thresholding_ratio", "clip_sample_range", "sample_max_value", "skip_prk_steps"}
_CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "": {
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
        "prediction_type": ("epsilon", "sample", "v_prediction", "flow_prediction"),
        "timestep_spacing": ("linspace", "leading", "trailing"),
        "final_sigmas_type": ("zero", "sigma_min"),
        "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
        "time_shift_type": ("exponential", "linear"),
        "solver_order": (1, 2, 3),
    },
    "DPMSolverMultistep": {"algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
                           "solver_type": ("midpoint", "heun")},
    "UniPCMultistep": {"solver_type": ("bh2", "bh1"), "solver_order": (1, 2, 3, 4)},
    "DEISMultistep": {"algorithm_type": ("deis",), "solver_type": ("logrho",)},
}
# Of such a value of another multistep class diffusers makes the first choice of this one.
_FOREIGN = ("deis", "dpmsolver++", "logrho", "midpoint", "heun", "bh1", "bh2")
# fmt: on


def from_diffusers(
    config: Mapping[str, Any] | str | os.PathLike[str], *, ignore: Iterable[str] = ()
) -> DiffusersSampler:
    """Process, prediction, times and solver of a diffusers scheduler.

    Supported: DDIM, DDPM, EulerDiscrete, HeunDiscrete, LMSDiscrete, DPMSolverMultistep (++ and
    sde-++), UniPCMultistep, DEISMultistep and FlowMatchEulerDiscrete. As in diffusers, any of them
    can sample a network that came with another's config: change `_class_name`. Networks of flow
    models take 1000 t as their time: `ScoreFn(..., time="label")`.

    Example:
      >>> import diffsamp as ds
      >>> sampler = ds.from_diffusers({"_class_name": "UniPCMultistepScheduler"})
      >>> sampler.solver(sampler.process, sampler.times(8)).nfe
      8

    Args:
      config: the dict, or the path of a `scheduler_config.json` or of the folder that holds it.
      ignore: names of fields whose effect is to be left out knowingly, such as ("clip_sample",),
        which is on by default in DDIMScheduler and DDPMScheduler.

    Returns:
      A `DiffusersSampler`. For FlowMatchEulerDiscreteScheduler, `times(n)` also takes `sigmas`, n
      numbers in place of its own before they are shifted, and, if the config uses dynamic
      shifting, `mu` or the `image_seq_len` from which mu is computed.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a class or a field's value that is not reproduced; the message names it.
    """
    config = dict(config) if isinstance(config, Mapping) else _load(config)
    name = str(config.get("_class_name")).removesuffix("Scheduler")
    if name not in _CLASSES:
        raise ValueError(
            f"`_class_name` must be one of {'Scheduler, '.join(_CLASSES)}Scheduler; got "
            f"{config.get('_class_name')!r}. The network can be sampled with any of them: pass "
            '{**config, "_class_name": ...}.'
        )
    values = _values(name, config, {ignore} if isinstance(ignore, str) else set(ignore))
    if name == "FlowMatchEulerDiscrete":
        return DiffusersSampler(
            processes.flow(), "velocity", lambda n, **kw: _flow_match(values, n, **kw), solvers.ddim
        )
    prediction = canonical_name(values["prediction_type"])
    on_flow = bool(values.get("use_flow_sigmas"))
    final = values.get("final_sigmas_type")
    if on_flow != (prediction == "velocity") or (on_flow and final != "zero"):
        raise ValueError(
            f"{name}: 'prediction_type' = {values['prediction_type']!r}, 'use_flow_sigmas' = "
            f"{on_flow} and 'final_sigmas_type' = {final!r} do not go together; a flow model needs "
            "'flow_prediction', True and 'zero'."
        )
    process = processes.flow() if on_flow else _discrete(values, final is not None)
    return DiffusersSampler(
        process, prediction, lambda n: _times(name, values, process, n), _solver(name, values)
    )


def _load(path: str | os.PathLike[str]) -> dict[str, Any]:
    file = Path(path)
    file = file / "scheduler_config.json" if file.is_dir() else file
    data = read_json(file)
    if not isinstance(data, dict):
        raise ValueError(f"{file} must hold a JSON object; got {type(data).__name__}.")
    return data


def _values(name: str, config: dict[str, Any], ignore: set[str]) -> dict[str, Any]:
    """The fields `name` reads, checked, with its defaults for those that are absent or None."""
    read, fixed, own = _CLASSES[name]
    defaults = {**_DEFAULTS, **own}
    for field in fixed.split():
        value, only = config.get(field, defaults[field]), _DEFAULTS[field]
        if field == "variance_type" and str(value).startswith("fixed"):
            continue  # another scheduler's; only the learned ones change what the network returns
        if field not in ignore and value != only and not (value is None and not only):
            raise ValueError(
                f"{name} with {field!r} = {value!r} is not reproduced (only {only!r} is). To "
                f'sample without it, pass ignore=("{field}",).'
            )
    for field, value in config.items():
        if not (field.startswith("_") or field in ignore or field in _DEFAULTS or field in _IDLE):
            raise ValueError(
                f"field {field!r} = {value!r} of {name} is not known. If it does not matter, pass "
                f'ignore=("{field}",).'
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
            raise ValueError(
                f"{name} with {field!r} = {values[field]!r} is not reproduced; it must be "
                f"{' or '.join(map(repr, choices))}."
            )
    grids = [field for field in values if field in _EXCLUSIVE and values[field]]
    values["grid"] = "".join(grids)  # "" if the sigmas are those of the timesteps
    if len(grids) > 1:
        raise ValueError(f"{name} with both {' and '.join(map(repr, grids))} is not reproduced.")
    high = values.get("solver_order", 1)
    if values.get("algorithm_type") == "sde-dpmsolver++" and high > 2:
        raise ValueError(f"{name}: 'sde-dpmsolver++' with 'solver_order' = {high} is inconsistent.")
    not_finite = high > 1 and values.get("final_sigmas_type") == "zero"
    if name == "UniPCMultistep" and not_finite and not values["lower_order_final"]:
        raise ValueError(f"{name}: 'lower_order_final' = False is not finite at sigma = 0.")
    return values


def _discrete(values: Mapping[str, Any], floor: bool) -> processes.VPDiscrete:
    trained, levels = values["trained_betas"], values["num_train_timesteps"]
    if trained is not None and len(trained) != levels:
        raise ValueError(f"'trained_betas' must hold {levels} numbers; got {len(trained)}.")
    zero_snr = bool(values.get("rescale_betas_zero_snr"))
    process = processes.vp_discrete(
        values["beta_schedule"] if trained is None else trained,
        num_levels=levels,
        beta_start=values["beta_start"],
        beta_end=values["beta_end"],
        zero_terminal_snr=zero_snr,
    )
    if zero_snr and floor:  # so that their first sigma, 4096, is finite
        last = math.log(2**-12) - math.log1p(-(2**-24)) / 2
        process = processes.VPDiscrete(np.append(process.log_snrs[:-1], last))
    return process


def _times(name: str, values: Mapping[str, Any], process: Process, n: int) -> np.ndarray:
    """The timesteps, then where the last step ends."""
    expect_int(n, "n", at_least=1)
    if values.get("use_flow_sigmas"):
        return _flow_sigmas(name, values, n)
    multistep = "solver_order" in values
    log_snrs = np.asarray(process.log_snr(np.arange(values["num_train_timesteps"])))
    spaced = _spaced(values, n, n + 1 if multistep else n, log_snrs)
    if name in ("EulerDiscrete", "HeunDiscrete", "LMSDiscrete"):
        real = spaced != np.round(spaced)
        sigmas = np.interp(spaced[real], np.arange(len(log_snrs)), np.exp(-log_snrs))
        spaced[real] = process.time(-np.log(sigmas))
    else:
        spaced[:] = np.round(spaced)
    stops = values.get("final_sigmas_type") == "sigma_min" or name == "DEISMultistep"
    last = 0.0 if stops or not values.get("set_alpha_to_one", True) else process.t_clean
    grid = values["grid"]
    if grid:
        # the ends: those of the whole table, or of the spaced times (Euler, Heun, LMS)
        ends = (process.t_max, 0.0) if multistep else (spaced[0], spaced[-1])
        high, low = (float(np.exp(-process.log_snr(t))) for t in ends)
        spaced[:] = process.time(-np.log(_spread(grid, high, low, n)))
        spaced[-1], spaced[0] = ends[1], ends[0]  # verbatim, not through the inverse
    if spaced[-1] <= last:
        raise ValueError(
            f"{name} evaluates last at t = {spaced[-1]:g} and ends there, a step of size zero; "
            f"{f'unset {grid!r}' if grid else 'raise `steps_offset`'}, or end at sigma = 0."
        )
    return expect_times(np.append(spaced, last))


def _spaced(values: Mapping[str, Any], n: int, points: int, log_snrs: np.ndarray) -> np.ndarray:
    """n timesteps by `timestep_spacing`, out of `points`: the multistep classes drop the last."""
    levels, spacing = len(log_snrs), values["timestep_spacing"]
    # DPM-Solver can leave out the noisiest levels
    kept = int(np.sum(log_snrs >= values.get("lambda_min_clipped", -math.inf)))
    if spacing == "linspace":
        steps: Any = np.linspace(0, kept - 1, points)[::-1][:n]
    elif spacing == "leading":
        steps = (np.arange(points) * (kept // points))[::-1][:n] + float(values["steps_offset"])
    else:
        steps = np.round(np.arange(kept, 0, -levels / n))[:n] - 1
    if len(steps) < n or steps[0] > levels - 1:
        offset = values["steps_offset"]
        raise ValueError(f"n = {n} with 'steps_offset' = {offset} does not fit {kept} levels.")
    return steps


def _spread(grid: str, high: float, low: float, n: int) -> np.ndarray:
    """n sigmas from high to low: Karras's with rho = 7, uniform in the log, or beta quantiles."""
    ramp = np.linspace(0, 1, n)
    if grid == "use_karras_sigmas":
        return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    if grid == "use_beta_sigmas":
        return low + beta_distribution.ppf(1 - ramp, 0.6, 0.6) * (high - low)
    return np.exp(np.log(high) + ramp * (np.log(low) - np.log(high)))


def _flow_sigmas(name: str, values: Mapping[str, Any], n: int) -> np.ndarray:
    """The `use_flow_sigmas` grid; UniPC's differs from DPM-Solver's, as in diffusers."""
    grid = np.linspace(1, 1 / values["num_train_timesteps"], n + 1)
    if name != "UniPCMultistep":
        return np.append(shifted(1 - grid[:0:-1], values["flow_shift"]), 0.0)
    sigma = shifted(grid[:-1], values["flow_shift"])
    sigma[0] -= 1e-6  # as diffusers steps back from log 0, so that the levels agree
    return np.append(sigma, 0.0)


def _flow_match(
    values: dict[str, Any], n: int, *, mu: Any = None, image_seq_len: Any = None, sigmas: Any = None
) -> np.ndarray:
    expect_int(n, "n", at_least=1)
    shift, end = values["shift"], 1 / values["num_train_timesteps"]
    if not values["use_dynamic_shifting"]:
        if mu is not None or image_seq_len is not None:
            raise ValueError("this config has no dynamic shifting; leave out `mu`.")
        end = shifted(end, shift)  # once here, when the scheduler is made, and again below
    else:
        if mu is None and image_seq_len is None:
            raise ValueError("this config shifts by resolution: give `image_seq_len` or `mu`.")
        if mu is None:
            span = values["max_image_seq_len"] - values["base_image_seq_len"]
            slope = (values["max_shift"] - values["base_shift"]) / span
            mu = values["base_shift"] + slope * (image_seq_len - values["base_image_seq_len"])
        shift = math.exp(mu) if values["time_shift_type"] == "exponential" else mu
    sigma = np.linspace(1, end, n) if sigmas is None else np.asarray(sigmas, np.float64)
    if sigma.shape != (n,):
        raise ValueError(f"`sigmas` must have shape ({n},); got {sigma.shape}.")
    sigma = shifted(sigma, shift)
    if values["shift_terminal"]:
        if sigma[-1] == 1:
            raise ValueError("'shift_terminal' needs a last sigma below 1; take n of 2 or more.")
        sigma = 1 - (1 - sigma) * (1 - values["shift_terminal"]) / (1 - sigma[-1])
    if values["grid"]:
        sigma = _spread(values["grid"], sigma[0], sigma[-1], n)
    return expect_times(np.append(sigma, 0.0))


def _solver(name: str, values: Mapping[str, Any]) -> Callable[[Process, Any], Tableau]:
    """(process, times) -> Tableau; options that depend on the number of steps are chosen inside."""
    order, variant = values.get("solver_order", 1), values.get("solver_type", "")
    lower, disabled = bool(values.get("lower_order_final")), values.get("disable_corrector", ())
    stochastic = values.get("algorithm_type") == "sde-dpmsolver++"
    variance = "large" if values.get("variance_type") == "fixed_large" else "small"

    def few(times: Any) -> bool:
        return lower and len(times) - 1 < 15  # diffusers lowers the order for few steps only

    def dpmpp(process: Process, times: Any) -> Tableau:
        build = partial(solvers.dpmpp, variant=variant, compatible=True, eta=float(stochastic))
        tableau = build(process, times, order=order, lower_order_final=few(times))
        last = [len(times) - 2] if values["euler_at_final"] else []
        return _with_rows(tableau, build(process, times, order=1), last)

    def unipc(process: Process, times: Any) -> Tableau:
        build = partial(solvers.unipc, order=order, variant=variant, lower_order_final=lower)
        plain = build(process, times, corrector=False)
        rows = [n + 1 for n in disabled if 0 <= n < len(times) - 2]
        return _with_rows(build(process, times), plain, rows)

    def deis(process: Process, times: Any) -> Tableau:
        build = partial(solvers.deis, order=order - 1, variable="log_rho")
        return build(process, times, lower_order_final=few(times))

    table: dict[str, Callable[[Process, Any], Tableau]] = {
        "DDIM": solvers.ddim,
        "DDPM": partial(solvers.ddpm, variance=variance),
        "EulerDiscrete": solvers.euler,
        "HeunDiscrete": partial(solvers.heun, coordinates="edm"),
        "LMSDiscrete": partial(solvers.deis, order=3, variable="rho"),
        "DPMSolverMultistep": dpmpp,
        "UniPCMultistep": unipc,
        "DEISMultistep": deis,
    }
    return table[name]


def _with_rows(tableau: Tableau, other: Tableau, rows: list[int]) -> Tableau:
    """`tableau` with some rows of `other`, on the same times: a row holds all of its history."""
    if not rows:
        return tableau
    a, b = tableau.a.copy(), np.zeros((tableau.rows, max(tableau.q, other.q)))
    b[:, : tableau.q] = tableau.b
    for n in rows:
        a[n], b[n] = other.a[n], 0.0
        b[n, : other.q] = other.b[n]
    return dataclasses.replace(tableau, a=a, b=b)
