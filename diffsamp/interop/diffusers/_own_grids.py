"""Times of the classes that space them by a rule of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from diffsamp import processes
from diffsamp._core.checks import expect_int, expect_times
from diffsamp._core.types import Array, PyTree, Times, Value
from diffsamp.interop.diffusers._grids import at_sigmas, custom_times, table_times
from diffsamp.processes import Process

__all__ = [
    "consistency_times",
    "ipndm_times",
    "rising_times",
    "scm_times",
    "unclip_times",
    "wuerstchen_times",
]


def unclip_times(
    name: str, values: Mapping[str, Value], process: Process, n: int | None = None, **own: PyTree
) -> np.ndarray:
    """As other tables, but that one timestep cannot be spaced by n - 1."""
    if not own and expect_int(n, "n", at_least=1) == 1:
        raise ValueError("UnCLIPScheduler spaces its timesteps by n - 1: take n of 2 or more.")
    return table_times(name, values, process, n, **own)


def rising_times(
    name: str,
    values: Mapping[str, Value],
    process: processes.VPDiscrete,
    n: int | None = None,
    *,
    timesteps: Times = None,
    sigmas: Array = None,
) -> np.ndarray:
    """Times from the data to the noise."""
    first = process.t_clean if values.get("set_alpha_to_one") else 0.0
    if timesteps is not None or sigmas is not None:
        what = "timesteps" if sigmas is None else "sigmas"
        given = np.asarray(timesteps if sigmas is None else sigmas, np.float64)
        if given.ndim != 1 or np.any(np.diff(given) <= 0) or (n is not None and len(given) != n):
            raise ValueError(
                f"{name} goes from the data to the noise: `{what}` must be "
                f"{'' if n is None else f'{n} '}rising numbers; got {given}."
            )
        steps = given if sigmas is None else at_sigmas(process, given[::-1])[::-1]
        if name == "DDIMInverse":
            return expect_times(np.append(first, steps[steps > first]), what, may_rise=True)
        top = [] if steps[-1] == process.t_max else [process.t_max]
        return expect_times(np.append(steps, top), what, may_rise=True)
    n = expect_int(n, "n", at_least=1)
    if name == "DDIMInverse":
        plain = {**values, "set_alpha_to_one": True}
        falling = table_times("DDIM", plain, process, n)
        return expect_times(np.append(first, falling[-2::-1]), may_rise=True)
    kept = int(np.sum(process.log_snrs >= values["lambda_min_clipped"]))
    levels, spacing = values["num_train_timesteps"], values["timestep_spacing"]
    steps = np.round(np.arange(kept, 0, -levels / n)[:n])[::-1] - 1
    if spacing == "linspace":
        steps = np.round(np.linspace(0, kept - 1, n + 1))[:-1]
    elif spacing == "leading":
        steps = np.arange(n) * (kept // (n + 1)) + float(values["steps_offset"])
    if steps[-1] >= kept - 1:
        raise ValueError(
            f"{name} evaluates last at the noisiest level and ends there, a step of size zero; "
            "take 'timestep_spacing' = 'linspace' or 'leading'."
        )
    return expect_times(np.append(steps, kept - 1), may_rise=True)


def _within(timesteps: Times, low: float, high: float, what: str) -> np.ndarray:
    given = np.asarray(timesteps, np.float64)
    if given.ndim != 1 or given.size < 1 or np.any((given < low) | (given > high)):
        raise ValueError(f"`timesteps` must be {what}, between {low:g} and {high:g}; got {given}.")
    return given


def consistency_times(
    values: Mapping[str, Value],
    process: Process,
    n: int | None = None,
    *,
    timesteps: Times = None,
    sigmas: Array = None,
) -> np.ndarray:
    """Levels `timesteps` (falling indices) of a Karras grid, and then the data."""
    levels = values["num_train_timesteps"]
    if sigmas is not None:
        return custom_times(process, n, timesteps, sigmas, process.t_clean)
    if timesteps is None:
        n = expect_int(n, "n", at_least=1, at_most=levels)
        timesteps = (np.arange(n) * (levels // n))[::-1]
    falling = _within(timesteps, 0, levels - 1, "indices of the grid")
    ramp, rho = falling[::-1] / (levels - 1), values["rho"]  # counted from the noise
    high, low = (values[key] ** (1 / rho) for key in ("sigma_max", "sigma_min"))
    return expect_times(np.append((high + ramp * (low - high)) ** rho, 0.0), "timesteps")


def scm_times(
    process: Process,
    n: int | None = None,
    *,
    timesteps: Times = None,
    sigmas: Array = None,
    max_timesteps: float = math.pi / 2,
    intermediate_timesteps: float = 1.3,
) -> np.ndarray:
    """n angles and 0; for n = 2 the second is `intermediate_timesteps`."""
    if sigmas is not None:
        return custom_times(process, n, timesteps, sigmas, process.t_clean)
    if timesteps is not None:
        given = _within(timesteps, 0, 1.5709, "angles")  # diffusers' own pi / 2 is 1.5708
        given = given if given[-1] == 0 else np.append(given, 0.0)
        return expect_times(np.minimum(given, process.t_max), "timesteps")
    n = expect_int(n, "n", at_least=1)
    first = min(max_timesteps, process.t_max)
    if n == 2:
        return expect_times([first, intermediate_timesteps, 0.0])
    return expect_times(np.linspace(first, 0, n + 1))


def ipndm_times(
    process: Process, n: int | None = None, *, timesteps: Times = None, sigmas: Array = None
) -> np.ndarray:
    """sigma = sin^2 of a uniform angle; the network's time is its own angle, in units of pi / 2."""
    if sigmas is not None:
        return custom_times(process, n, timesteps, sigmas, process.t_clean)
    if timesteps is not None:
        given = _within(timesteps, 0, 1, "angles in units of pi / 2")
        return expect_times(given if given[-1] == 0 else np.append(given, 0.0), "timesteps")
    share = np.linspace(1, 0, expect_int(n, "n", at_least=1) + 1)
    return expect_times(np.arcsin(np.sin(share * math.pi / 2) ** 2) * 2 / math.pi)


def wuerstchen_times(
    process: Process, n: int | None = None, *, timesteps: Times = None, sigmas: Array = None
) -> np.ndarray:
    """Times from 1 to 0, where alpha^2 is kept within 1e-4 and 0.9999: it does not end clean."""
    end = float(process.time(np.log(0.9999 / 1e-4) / 2))
    if sigmas is not None:
        return custom_times(process, n, timesteps, sigmas, end)
    t = np.linspace(1, 0, 2 if timesteps is not None else expect_int(n, "n", at_least=1) + 1)
    if timesteps is not None:
        t = _within(timesteps, 0, 1, "times")
        t = t if t[-1] == 0 else np.append(t, 0.0)
    square = np.clip(process.alpha(t) ** 2, 1e-4, 0.9999)
    return expect_times(process.time((np.log(square) - np.log1p(-square)) / 2), "timesteps")
