"""Published schedules, found by optimisation for one model, resampled to any n.

As tables of rho = sigma / alpha, so that any process whose range holds them can use them. Between
the published numbers of steps, log rho is interpolated linearly in the index, which is what the
authors do. The last number is where the last step starts to end: as in the authors' code it is
replaced by the clean end.
"""

from __future__ import annotations

import numpy as np

from diffsamp._core.checks import expect_choice, expect_int
from diffsamp.processes import Process
from diffsamp.schedules.grids import with_end

__all__ = ["PUBLISHED", "published", "resample"]

# fmt: off
PUBLISHED: dict[str, tuple[str, tuple[tuple[float, ...], ...]]] = {
    # Sabour et al. 2024, Align Your Steps (arXiv:2404.14507), the authors' how-to page
    "ays_sd15": ("arXiv:2404.14507", ((
        14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092,
        0.9642583904, 0.6523686016, 0.3977456272, 0.1515232662, 0.0291671582),)),
    "ays_sdxl": ("arXiv:2404.14507", ((
        14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141,
        0.5550693289, 0.3798540708, 0.2332364134, 0.1114188177, 0.0291671582),)),
    "ays_svd": ("arXiv:2404.14507", ((
        700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),)),
    # Chen et al. 2024, GITS (arXiv:2405.11326): Stable Diffusion 1.5, coefficient 1.20
    "gits_sd15": ("arXiv:2405.11326", (
        (14.61464119, 0.803307, 0.02916753),
        (14.61464119, 1.56271636, 0.52423614, 0.02916753),
        (14.61464119, 2.36326075, 0.92192322, 0.36617002, 0.02916753),
        (14.61464119, 2.84484982, 1.24153244, 0.59516323, 0.25053367, 0.02916753),
        (14.61464119, 5.85520077, 2.05039096, 0.95350921, 0.45573691, 0.17026083, 0.02916753),
        (14.61464119, 5.85520077, 2.45070267, 1.24153244, 0.64427125, 0.29807833, 0.09824532,
         0.02916753),
        (14.61464119, 5.85520077, 2.45070267, 1.36964464, 0.803307, 0.45573691, 0.25053367,
         0.09824532, 0.02916753),
        (14.61464119, 5.85520077, 2.84484982, 1.61558151, 0.95350921, 0.59516323, 0.36617002,
         0.19894916, 0.09824532, 0.02916753),
        (14.61464119, 5.85520077, 2.84484982, 1.67050016, 1.08895338, 0.74807048, 0.50118381,
         0.32104823, 0.19894916, 0.09824532, 0.02916753),
        (14.61464119, 7.49001646, 4.65472794, 3.07277966, 2.19988537, 1.61558151, 1.24153244,
         0.95350921, 0.74807048, 0.59516323, 0.50118381, 0.41087446, 0.34370604, 0.29807833,
         0.25053367, 0.22545385, 0.19894916, 0.17026083, 0.13792117, 0.09824532, 0.02916753),
    )),
    # Pei et al. 2025, Optimal Stepsize for Diffusion Sampling (arXiv:2503.21774): flow models'
    # times, sigma / (alpha + sigma), kept as rho = t / (1 - t)
    "oss_flux": ("arXiv:2503.21774", (tuple(t / (1 - t) for t in (
        0.9968, 0.9886, 0.9819, 0.975, 0.966, 0.9471, 0.9158, 0.8287, 0.5512, 0.2808, 0.001)),)),
}
# fmt: on


def resample(values: np.ndarray, n: int) -> np.ndarray:
    """n + 1 values from a falling positive sequence, log-linear in the index; the ends stay."""
    values = np.asarray(values, np.float64)
    place = np.linspace(0, 1, n + 1)
    result = np.exp(np.interp(place, np.linspace(0, 1, len(values)), np.log(values)))
    result[0], result[-1] = values[0], values[-1]
    return result


def published(process: Process, n: int, *, name: str, final: str = "clean") -> np.ndarray:
    """A published schedule: of n steps if there is one, else resampled from the next longer.

    Args:
      process: a process whose range of sigma / alpha holds the table's.
      n: number of evaluations of a one-evaluation method, at least 1.
      name: a key of `PUBLISHED`.
      final: "clean", as the tables end, or "t_min".

    Returns:
      float64 times, shape (n + 1,), decreasing.

    Raises:
      ValueError: an unknown name, or noise levels outside the process's range.
    """
    expect_int(n, "n", at_least=1)
    tables = PUBLISHED[expect_choice(name, "name", tuple(PUBLISHED))][1]
    longer = [table for table in tables if len(table) > n]
    table = np.asarray(min(longer or [tables[-1]], key=len))
    rho = table if len(table) == n + 1 else resample(table, n)
    highest = float(np.exp(-process.log_snr(process.t_max)))
    lowest = float(np.exp(-process.log_snr(process.t_min)))
    # tables are rounded: an end that is the process's own up to that is taken as it
    rho = np.where(np.isclose(rho, highest, rtol=1e-3), highest, rho)
    if rho[0] > highest or (n > 1 and rho[-2] < lowest * (1 - 1e-3)):
        raise ValueError(
            f"schedule {name!r} covers sigma / alpha from {rho[0]:.4g} to {rho[-2]:.4g}; the "
            f"process has {highest:.4g} to {lowest:.4g}. It was made for {PUBLISHED[name][0]}; use "
            "a grid such as karras or logsnr here."
        )
    times = np.asarray(process.time(-np.log(rho[:-1])), np.float64)
    if rho[0] == highest:
        times[0] = process.t_max
    return with_end(process, times, final)
