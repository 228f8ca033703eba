"""The times at which diffusers' schedulers, and its pipelines, ask the network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import beta as beta_distribution

from diffsamp import processes
from diffsamp._core.checks import expect_int, expect_times
from diffsamp._core.types import Array, Times, Value
from diffsamp.interop.diffusers._pipelines import Pipeline, mu_of, pipeline_sigmas
from diffsamp.processes import Process
from diffsamp.schedules import shifted

__all__ = [
    "REAL",
    "at_sigmas",
    "continuous_times",
    "custom_times",
    "discrete",
    "edm_times",
    "flow_times",
    "in_ratios",
    "lcm_times",
    "table_times",
]

# classes that hold x / alpha, and take real timesteps by interpolating sigma
REAL = (
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "HeunDiscrete",
    "LMSDiscrete",
    "KDPM2Discrete",
    "KDPM2AncestralDiscrete",
    "DPMSolverSDE",
)
# multistep classes: they space n + 1 timesteps and drop the last
_ONE_MORE = (
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "UniPCMultistep",
    "DEISMultistep",
    "SASolver",
)


# -- flow models --------------------------------------------------------------------------------


def in_ratios(values: Mapping[str, Value]) -> bool:
    """Whether a flow class's grid is one of sigma / alpha: Cosmos 2, up to 80 or 200."""
    return "shift" in values and (values.get("sigma_max") or 0) > 1


def flow_times(
    name: str,
    values: Mapping[str, Value],
    pipeline: Pipeline | None,
    n: int | None = None,
    *,
    mu: float | None = None,
    image_seq_len: float | None = None,
    image_size: Sequence[int] | None = None,
    mu_rule: str | None = None,
    sigmas: Array = None,
    timesteps: Times = None,
) -> np.ndarray:
    """Times of a flow model; see `from_diffusers`."""
    levels = values.get("num_train_timesteps", 1000)
    if sigmas is not None and timesteps is not None:
        raise ValueError("give `sigmas` or `timesteps`, not both.")
    if timesteps is not None:
        sigmas = np.asarray(timesteps, np.float64) / levels
    own = sigmas is None
    if not own:
        sigmas = np.asarray(sigmas, np.float64)
        if sigmas.ndim == 1 and len(sigmas) > 1 and sigmas[-1] == 0:
            sigmas = sigmas[:-1]  # the clean end, which is added below
        n = len(sigmas) if n is None and sigmas.ndim == 1 else n
        if sigmas.shape != (n,):
            raise ValueError(f"`sigmas` must have shape ({n},); got {sigmas.shape}.")
    n = expect_int(n, "n", at_least=1)
    merged = {**(pipeline.defaults if pipeline else {}), **values}
    mu = mu_of(merged, n, pipeline, mu, image_seq_len, image_size, mu_rule)
    if own and pipeline:
        sigmas = pipeline_sigmas(pipeline.sigmas, n, levels)
    table = "flow_shift" in values  # DPM-Solver, UniPC and others with `use_flow_sigmas`
    shift = values["flow_shift" if table else "shift"]
    verbatim = name in ("MiniMaxH3", "LTXEulerAncestralRF") or in_ratios(values)
    if not own and (verbatim or (values["grid"] and table)):
        return expect_times(np.append(sigmas, 0.0), "sigmas")
    if name == "MiniMaxH3":
        if n < 2:
            raise ValueError("MiniMaxH3's n counts the points, the clean end too: take 2 or more.")
        return expect_times(np.append(shifted(np.linspace(1, 0, n)[:-1], shift), 0.0))
    if values["grid"] and (table or in_ratios(values)):
        return _ratio_times(name, values, n)
    if sigmas is None:
        if not table:
            # the smallest is shifted once when the scheduler is made, and again below
            end = 1 / levels if mu is not None else shifted(1 / levels, shift)
            sigmas = np.linspace(1, end, n)
        else:
            grid = np.linspace(1, 1 / levels, n + 1)
            sigmas = grid[:-1] if name == "UniPCMultistep" else 1 - grid[:0:-1]
    if mu is not None:
        shift = math.exp(mu) if values["time_shift_type"] == "exponential" else mu
    sigmas = shifted(sigmas, shift)
    if values.get("shift_terminal"):
        if sigmas[-1] == 1:
            raise ValueError("'shift_terminal' needs a last sigma below 1; take n of 2 or more.")
        sigmas = 1 - (1 - sigmas) * (1 - values["shift_terminal"]) / (1 - sigmas[-1])
    if values["grid"]:
        high, low = values.get("sigma_max"), values.get("sigma_min")
        high = sigmas[0] if high is None else high
        sigmas = spread(values["grid"], high, sigmas[-1] if low is None else low, n)
    if name == "UniPCMultistep" and abs(sigmas[0] - 1) < 1e-6:
        sigmas[0] -= 1e-6  # as diffusers steps back from log 0, so that the levels agree
    return expect_times(np.append(sigmas, 0.0))


def _ratio_times(name: str, values: Mapping[str, Value], n: int) -> np.ndarray:
    """Cosmos 2 and 2.5: the grid is one of sigma / alpha, by default from the table of betas."""
    high, low = values["sigma_max"], values["sigma_min"]
    if high is None or low is None:
        rho = np.exp(-discrete(values, False).log_snrs)
        high, low = rho[-1] if high is None else high, rho[0] if low is None else low
    sigmas = spread(values["grid"], high, low, n)
    sigmas = sigmas / (1 + sigmas)
    if values.get("final_sigmas_type") == "sigma_min":  # Cosmos 2, as the EDM classes
        if n == 1:
            raise ValueError(f"{name} with 'sigma_min' at the end takes no step at all for n = 1.")
        return expect_times(sigmas)
    return expect_times(np.append(sigmas, 0.0))


# -- tables of betas ----------------------------------------------------------------------------


def discrete(values: Mapping[str, Value], floor: bool) -> processes.VPDiscrete:
    """The process of a table of betas; `floor` keeps its first sigma, 4096 at zero SNR, finite."""
    trained, levels = values.get("trained_betas"), values["num_train_timesteps"]
    if trained is not None and len(trained) != levels:
        raise ValueError(f"'trained_betas' must hold {levels} numbers; got {len(trained)}.")
    ends = {key: values[key] for key in ("beta_start", "beta_end") if key in values}
    if values["beta_schedule"] == "sigmoid" and trained is None:
        rise = 1 / (1 + np.exp(-np.linspace(-6, 6, levels)))
        trained = ends["beta_start"] + rise * (ends["beta_end"] - ends["beta_start"])
    zero_snr, shift = bool(values.get("rescale_betas_zero_snr")), values.get("snr_shift_scale")
    process = processes.vp_discrete(
        values["beta_schedule"] if trained is None else trained,
        num_levels=levels,
        zero_terminal_snr=zero_snr and not shift,
        **ends,
    )
    if shift:  # CogVideoX: the SNR is divided by it, and only then made to end at 0
        process = processes.VPDiscrete(process.log_snrs - math.log(shift) / 2)
        if zero_snr:
            root = process.alpha(np.arange(levels))
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
            with np.errstate(divide="ignore"):
                process = processes.VPDiscrete(np.log(root) - np.log1p(-(root**2)) / 2)
    if zero_snr and floor:
        last = math.log(2**-12) - math.log1p(-(2**-24)) / 2
        process = processes.VPDiscrete(np.append(process.log_snrs[:-1], last))
    return process


def table_times(
    name: str,
    values: Mapping[str, Value],
    process: Process,
    n: int | None = None,
    *,
    timesteps: Times = None,
    sigmas: Array = None,
) -> np.ndarray:
    """The timesteps, then where the last step ends."""
    multistep = name in _ONE_MORE
    stops = values.get("final_sigmas_type") == "sigma_min" or name in ("DEISMultistep", "SASolver")
    stops = stops or name == "TCD" or not values.get("set_alpha_to_one", True)
    last = 0.0 if stops else process.t_clean
    if timesteps is not None or sigmas is not None:
        return custom_times(process, n, timesteps, sigmas, last)
    n = expect_int(n, "n", at_least=1)
    levels = values["num_train_timesteps"]
    log_snrs = np.asarray(process.log_snr(np.arange(levels)))
    spaced = _spaced(values, n, n + 1 if multistep else n, log_snrs)
    if name in REAL:
        real = spaced != np.round(spaced)
        known = np.interp(spaced[real], np.arange(levels), np.exp(-log_snrs))
        spaced[real] = process.time(-np.log(known))
    else:
        spaced[:] = np.round(spaced)
    if not values["grid"] and n > 1 and np.any(np.diff(spaced) >= 0):
        raise ValueError(
            f"n = {n} is too many for {levels} levels: two of its timesteps round to one. "
            "Take fewer, or pass your own, times(timesteps=[..])."
        )
    grid = values["grid"]
    if grid:
        # the ends: those of the whole table, or of the spaced times
        ends = (process.t_max, 0.0) if multistep else (spaced[0], spaced[-1])
        high, low = (float(np.exp(-process.log_snr(t))) for t in ends)
        given = [values.get(key) for key in ("sigma_max", "sigma_min")]
        wanted = spread(
            grid, high if given[0] is None else given[0], low if given[1] is None else given[1], n
        )
        spaced[:] = at_sigmas(process, wanted)
        # verbatim, not through the inverse
        spaced[-1] = ends[1] if given[1] is None and n > 1 else spaced[-1]
        spaced[0] = ends[0] if given[0] is None else spaced[0]
    if (
        spaced[-1] <= last
        and not grid
        and values.get("timestep_spacing") == "linspace"
        and not (values.get("final_sigmas_type") or multistep)
    ):
        last = process.t_clean  # the last step of diffusers would have size zero
    if spaced[-1] <= last:
        raise ValueError(
            f"{name} evaluates last at t = {spaced[-1]:g} and ends there, a step of size zero; "
            f"{_way_to_end(values)}."
        )
    return expect_times(np.append(spaced, last))


def _way_to_end(values: Mapping[str, Value]) -> str:
    """How a config's last step gets a size."""
    ways = [f"unset {values['grid']!r}"] if values["grid"] else []
    if values.get("timestep_spacing") == "leading" and not values["grid"]:
        ways.append("raise `steps_offset`")
    if "final_sigmas_type" in values:
        ways.append("set 'final_sigmas_type' = 'zero'")
    elif "set_alpha_to_one" in values:
        ways.append("set 'set_alpha_to_one' = True")
    else:
        ways.append("read it as DPMSolverMultistep or UniPCMultistep, which end at sigma = 0")
    return ", or ".join(ways)


def custom_times(
    process: Process, n: int | None, timesteps: Times, sigmas: Array, last: float
) -> np.ndarray:
    """The caller's own timesteps, or sigmas (of sigma / alpha), and where the last step ends."""
    if timesteps is not None and sigmas is not None:
        raise ValueError("give `sigmas` or `timesteps`, not both.")
    what = "timesteps" if sigmas is None else "sigmas"
    given = np.asarray(timesteps if sigmas is None else sigmas, np.float64)
    if given.ndim != 1 or given.size < 1:
        raise ValueError(f"`{what}` must have shape (n,); got {given.shape}.")
    clean = -1.0 if sigmas is None else 0.0
    evaluated = len(given) - (len(given) > 1 and given[-1] == clean)
    if n is not None and evaluated != n and (sigmas is None or len(given) != n + 1):
        raise ValueError(f"`{what}` must have shape ({n},); got {given.shape}.")
    if sigmas is not None:
        given = at_sigmas(process, given)
    ends_itself = given[-1] == process.t_clean or (n is not None and len(given) == n + 1)
    if ends_itself:
        return expect_times(given, what)
    return expect_times(np.append(given, last if given[-1] > last else process.t_clean), what)


def at_sigmas(process: Process, sigmas: np.ndarray) -> np.ndarray:
    """Times at which sigma / alpha has these values."""
    top = float(np.exp(-process.log_snr(process.t_max)))
    if sigmas[0] > top * (1 + 1e-6):
        raise ValueError(
            f"sigma = {sigmas[0]:g} is above {top:g}, the noisiest level of the network's training."
        )
    closed = np.where(sigmas > 0, sigmas, 1.0)
    found = np.where(sigmas > 0, process.time(-np.log(closed)), process.t_clean)
    return np.minimum(found, process.t_max)


def _spaced(values: Mapping[str, Value], n: int, points: int, log_snrs: np.ndarray) -> np.ndarray:
    """n timesteps by `timestep_spacing`, out of `points`: the multistep classes drop the last."""
    levels, spacing = len(log_snrs), values.get("timestep_spacing", "linspace")
    # DPM-Solver can leave out the noisiest levels
    kept = int(np.sum(log_snrs >= values.get("lambda_min_clipped", -math.inf)))
    if spacing == "linspace":
        steps: Value = np.linspace(0, kept - 1, points)[::-1][:n]
    elif spacing == "leading":
        steps = (np.arange(points) * (kept // points))[::-1][:n] + float(values["steps_offset"])
    else:
        steps = np.round(np.arange(kept, 0, -levels / n))[:n] - 1
    if len(steps) < n or steps[0] > levels - 1:
        offset = values["steps_offset"]
        raise ValueError(f"n = {n} with 'steps_offset' = {offset} does not fit {kept} levels.")
    return steps


def spread(grid: str, high: float, low: float, n: int, rho: float = 7.0) -> np.ndarray:
    """n sigmas from high to low: Karras's, uniform in the log, or beta quantiles."""
    ramp = np.linspace(0, 1, n)
    if grid == "use_karras_sigmas":
        return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    if grid == "use_beta_sigmas":
        return low + beta_distribution.ppf(1 - ramp, 0.6, 0.6) * (high - low)
    return np.exp(np.log(high) + ramp * (np.log(low) - np.log(high)))


def lcm_times(
    name: str,
    values: Mapping[str, Value],
    process: Process,
    n: int | None = None,
    *,
    original_inference_steps: int | None = None,
    timesteps: Times = None,
    sigmas: Array = None,
) -> np.ndarray:
    """n of the labels that LCM and TCD were distilled on, evenly, from the noisiest."""
    last = process.t_clean if name == "LCM" else 0.0
    if timesteps is not None or sigmas is not None:
        return custom_times(process, n, timesteps, sigmas, last)
    n, levels = expect_int(n, "n", at_least=1), values["num_train_timesteps"]
    steps = original_inference_steps or values["original_inference_steps"]
    labels = np.arange(1, steps + 1) * (levels // steps) - 1
    if name == "TCD" and original_inference_steps is not None:
        labels = np.arange(levels)
    if n > len(labels):
        raise ValueError(
            f"n = {n} is more than the {len(labels)} labels of 'original_inference_steps'."
        )
    chosen = np.floor(np.linspace(0, len(labels), n, endpoint=False)).astype(int)
    return expect_times(np.append(labels[::-1][chosen], last))


# -- EDM ----------------------------------------------------------------------------------------


def edm_times(
    name: str,
    values: Mapping[str, Value],
    process: Process,
    n: int | None = None,
    *,
    sigmas: Array = None,
    timesteps: Times = None,
) -> np.ndarray:
    """Karras's or exponential sigmas of an EDM network, then 0."""
    if sigmas is not None or timesteps is not None:
        angle = name == "CosineDPMSolverMultistep"
        return _labelled(process, n, sigmas, timesteps, angle=angle)
    n = expect_int(n, "n", at_least=1)
    schedule = values.get("sigma_schedule", "karras")
    high, low = values["sigma_max"], values["sigma_min"]
    if schedule == "exponential" and n == 1:
        high = low  # as torch.linspace of one number
    rho = values.get("rho", 7.0)
    levels = spread(f"use_{schedule}_sigmas", high, low, n, rho)
    if values.get("final_sigmas_type") == "zero":
        levels = np.append(levels, 0.0)
    elif n == 1 and levels[0] > low:
        if name == "EDMEuler":
            raise ValueError(f"{name} with 'sigma_min' at the end takes no step at all for n = 1.")
        levels = np.append(levels, low)
    elif len(levels) < 2:
        raise ValueError(f"{name} with 'sigma_min' at the end takes no step at all for n = 1.")
    return expect_times(at_sigmas(process, levels))


def _labelled(
    process: Process, n: int | None, sigmas: Array, timesteps: Times, *, angle: bool
) -> np.ndarray:
    """The caller's sigmas, or labels: log(sigma) / 4, or 2 / pi arctan(sigma)."""
    if sigmas is not None and timesteps is not None:
        raise ValueError("give `sigmas` or `timesteps`, not both.")
    if sigmas is None:
        labels = np.asarray(timesteps, np.float64)
        if angle and np.any((labels < 0) | (labels >= 1)):
            raise ValueError(
                f"`timesteps` must be angles in units of pi / 2, below 1; got {labels}."
            )
        if not angle and np.any(np.abs(labels) > 10):
            raise ValueError(f"`timesteps` are log(sigma) / 4 for this network; got {labels}.")
        sigmas = np.tan(labels * math.pi / 2) if angle else np.exp(4 * labels)
    return custom_times(process, n, None, sigmas, process.t_clean)


def continuous_times(
    values: Mapping[str, Value],
    process: Process,
    n: int | None = None,
    *,
    sigmas: Array = None,
    timesteps: Times = None,
) -> np.ndarray:
    """EulerDiscrete with "continuous" timesteps (SVD): sigmas that may leave the table of betas."""
    if sigmas is not None or timesteps is not None:
        return _labelled(process, n, sigmas, timesteps, angle=False)
    table = discrete(values, floor=True)
    plain = {**values, "grid": "", "final_sigmas_type": "zero"}
    levels = np.exp(-table.log_snr(table_times("EulerDiscrete", plain, table, n)[:-1]))
    if values["grid"]:
        high = levels[0] if values["sigma_max"] is None else values["sigma_max"]
        low = levels[-1] if values["sigma_min"] is None else values["sigma_min"]
        levels = spread(values["grid"], high, low, len(levels))
    end = np.exp(-table.log_snrs[0]) if values["final_sigmas_type"] == "sigma_min" else 0.0
    return expect_times(at_sigmas(process, np.append(levels, end)))
