"""Schedules: host functions (process, n) -> n + 1 decreasing float64 times.

A schedule of n has n + 1 times: n at which a one-evaluation method asks the network, then the last,
where the sample is. What the last time means is said by `final`:

- "clean" (default): the last time is `process.t_clean`, where sigma = 0; a solver's last row is
  then closed, u_N = the data prediction (combination) itself.
- "t_min": the last time is `t_min`, a smallest noise level that stays in the sample.

Grids that are uniform in a quantity which is finite at the clean end (t, or a power of it) run
through to it; grids in log-SNR, sigma^(1/rho) or the angle put n points from t_max to t_min and add
it, which is EDM's convention (Karras et al. 2022, eq. 5).

`grids` and `warped` have the laws, `stages` the grid of DPM-Solver's single steps, `labels` the
integer grids of discrete processes, `optimised` what minimises a bound without a network,
`published` what others found for one model. `diffsamp.search`
optimises schedules for yours. User arrays are as good as these: solvers take any decreasing times
and use them verbatim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from diffsamp._core.checks import expect_choice
from diffsamp.processes import Process
from diffsamp.schedules.grids import (
    exponential,
    karras,
    kl_optimal,
    logsnr,
    polynomial,
    quadratic,
    uniform,
)
from diffsamp.schedules.labels import (
    ddim_uniform,
    leading,
    linspace,
    rounded,
    sgm_uniform,
    simple,
    trailing,
)
from diffsamp.schedules.optimised import dmn, dmn_bound
from diffsamp.schedules.published import PUBLISHED, published, resample
from diffsamp.schedules.stages import dpm_fast
from diffsamp.schedules.warped import (
    beta,
    bong_tangent,
    cosine,
    flow_shift,
    linear_quadratic,
    resolution_shift,
    shifted,
)

__all__ = [
    "GRIDS",
    "LABELS",
    "NAMES",
    "PUBLISHED",
    "beta",
    "bong_tangent",
    "cosine",
    "ddim_uniform",
    "dmn",
    "dmn_bound",
    "dpm_fast",
    "exponential",
    "flow_shift",
    "get",
    "karras",
    "kl_optimal",
    "leading",
    "linear_quadratic",
    "linspace",
    "logsnr",
    "names",
    "polynomial",
    "published",
    "quadratic",
    "resample",
    "resolution_shift",
    "rounded",
    "sgm_uniform",
    "shifted",
    "simple",
    "trailing",
    "uniform",
]

_GRIDS: dict[str, Callable[..., np.ndarray]] = {
    "uniform": uniform,
    "quadratic": quadratic,
    "polynomial": polynomial,
    "logsnr": logsnr,
    "karras": karras,
    "kl_optimal": kl_optimal,
    "beta": beta,
    "cosine": cosine,
    "linear_quadratic": linear_quadratic,
    "flow_shift": flow_shift,
}
_LABELS: dict[str, Callable[..., np.ndarray]] = {
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
    "sgm_uniform": sgm_uniform,
    "simple": simple,
    "ddim_uniform": ddim_uniform,
}
_SCHEDULES: dict[str, Callable[..., np.ndarray]] = {
    **_GRIDS,
    "exponential": exponential,
    "beta57": functools.partial(beta, a=0.5, b=0.7),
    "bong_tangent": bong_tangent,
    "dmn": dmn,
    "dpm_fast": dpm_fast,
    "dpm_fast_2s": functools.partial(dpm_fast, order=2),
    **_LABELS,
    **{name: functools.partial(published, name=name) for name in PUBLISHED},
}

GRIDS = tuple(_GRIDS)
"""Laws, for any process. ("exponential" is another name of "logsnr" and "beta57" of a "beta";
"bong_tangent" and "dmn" are asked for by name; "dpm_fast" and "dpm_fast_2s", the grids of
DPM-Solver's single-step methods, are for them alone.)"""
LABELS = tuple(_LABELS)
"""Integer grids, for discrete processes."""
NAMES = tuple(_SCHEDULES)
"""All names that `get` takes."""


def names(process: Process) -> tuple[str, ...]:
    """Names of the schedules that fit a process; published ones are not counted.

    The grids for every process, and the label grids for a discrete one.
    """
    return GRIDS + (LABELS if process.t_clean < 0 else ())


def get(name: str) -> Callable[..., np.ndarray]:
    """The schedule function called `name`.

    Raises:
      ValueError: an unknown name.
    """
    return _SCHEDULES[expect_choice(name, "schedule", NAMES)]
