"""The canonical form of a sampler, in which it is learned.

Every deterministic, consistent tableau of N evaluations on falling levels has one canonical form
in data prediction,

    u_{n+1} = (sigma_{n+1}/sigma_n) u_n + kappa_n sum_{j<=n} G[n,j] D_j,
    kappa_n = alpha_{n+1} - alpha_n sigma_{n+1}/sigma_n,      sum_j G[n,j] = 1,

because its own x_T coefficient is sigma_n/sigma_0 (the tableau's self-check). The free numbers are
the log-SNRs of the inner points and the off-diagonal part of the lower triangular G: N - 1 and
N (N - 1) / 2; and, if the network may be told another time than the state's, N conditioning times
(Tong et al. 2025, arXiv:2405.15506, section 3). Without consistency the row sums of G and the
coefficient of u_n are free as well, 2 N numbers more, as in bespoke non-stationary solvers (Shaul
et al. 2024, arXiv:2403.01329).

A sampler that adds noise has N angles more. Row n keeps cos(phi_n) of the noise that the state
carries and draws the rest,

    u_{n+1} = r_n u_n + kappa_n sum_j G[n,j] D_j + sin(phi_n) sigma_{n+1} z_n,
    r_n = cos(phi_n) sigma_{n+1}/sigma_n,      kappa_n = alpha_{n+1} - alpha_n r_n,

so that mean and variance stay right whatever the angles are: sin(phi_n) is the eta of DDIM (Song et
al. 2021, arXiv:2010.02502, eq. 16) as a share of sigma_{n+1}, and learned noise (AdaSDE) is learned
angles.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diffsamp._core.numeric import as_float, namespace
from diffsamp._core.types import Array, PyTree
from diffsamp.processes import Process
from diffsamp.search.explicit import label_offsets, own_start, told_times
from diffsamp.tableau import Tableau

__all__ = ["can_distill", "canonical", "from_canonical"]


def canonical(tableau: Tableau, process: Process | None = None) -> dict[str, np.ndarray]:
    """The numbers of the canonical form of a tableau; float64.

    A first row that only scales the start (`explicit.from_largest_level`) is no part of it.

    Args:
      tableau: the sampler.
      process: the noise process; without it conditioning times are left out.

    Returns:
      "log_snr" (N - 1,) of the inner points, "weights" (N, N) strictly lower part of G, "sums"
      (N,) row sums of G minus 1 and "state" (N,) change of u_n's coefficient; the last two are 0
      up to rounding for a consistent tableau. If it has conditioning times, "labels" (N,): how far
      in log-SNR they lie from the state's; if it adds noise, "noise" (N,): the angles phi.

    Raises:
      ValueError: rows without evaluation other than trailing padding, levels that do not fall
        (multi-stage methods revisit one), noise of one row that a later one uses apart from the
        state, or noise that is more or less than sigma wants.
    """
    tableau, _ = own_start(tableau)
    rows = tableau.nfe
    live = np.asarray(tableau.evaluates)
    if not np.all(live[:rows]):
        raise ValueError(
            f"tableau {tableau.name!r} cannot be distilled: every row must make an evaluation."
        )
    alpha, sigma = tableau.alpha[: rows + 1], tableau.sigma[: rows + 1]
    rho = sigma[:-1] / np.maximum(alpha[:-1], 1e-300)
    if not (np.all(np.diff(rho) < 0) and sigma[-1] / alpha[-1] < rho[-1]):
        raise ValueError(
            f"tableau {tableau.name!r} cannot be distilled: its noise level must fall from row to "
            "row. Start from a method of one evaluation a step."
        )
    on_start, on_data, on_noise = tableau.unroll(prediction="data")
    on_start, on_data = on_start[: rows + 1], on_data[: rows + 1, :rows]
    ratio = sigma[1:] / sigma[:-1]
    told = {}
    if tableau.stochastic:
        told["noise"] = _angles(tableau, on_start, on_noise[: rows + 1, :rows], sigma)
        ratio = ratio * np.cos(told["noise"])
        state = np.zeros(rows)
    else:
        state = on_start[1:] / on_start[:-1] - ratio
    kappa = alpha[1:] - alpha[:-1] * ratio
    weights = (on_data[1:] - (ratio + state)[:, None] * on_data[:-1]) / kappa[:, None]
    if tableau.asked is not None and process is not None:
        own, asked = tableau.times[:rows], tableau.asked[:rows]
        told["labels"] = label_offsets(process, own, asked)
    return {
        **told,
        "log_snr": np.log(alpha[1:-1]) - np.log(sigma[1:-1]),
        "weights": np.tril(weights, -1),
        "sums": weights.sum(axis=1) - 1,
        "state": state,
    }


def _angles(
    tableau: Tableau, on_start: np.ndarray, on_noise: np.ndarray, sigma: np.ndarray
) -> np.ndarray:
    """(N,) angles of a tableau that adds noise; 0 in a row that ends at sigma = 0."""
    rows = len(sigma) - 1
    carried = np.concatenate([on_start[:, None], on_noise], axis=1)  # x_T, z_0 .. z_{N-1}
    carried[:, 0] *= sigma[0]  # in units of standard deviations
    angles = np.zeros(rows)
    for n in range(rows):
        before, after = carried[n, : n + 1], carried[n + 1, : n + 1]
        kept, fresh = after @ before / (before @ before), carried[n + 1, n + 1]
        scale = max(float(sigma[n + 1]), 1e-12)
        if np.abs(after - kept * before).max() > 1e-6 * scale:
            raise ValueError(
                f"tableau {tableau.name!r} cannot be distilled: row {n} uses noise of an earlier "
                "row apart from the state. Start from one whose rows use the state and past data "
                "predictions, such as ddim(eta=) or an SDE form of DPM-Solver++."
            )
        if abs(np.hypot(kept * sigma[n], fresh) - sigma[n + 1]) > 1e-6 * scale:
            raise ValueError(
                f"tableau {tableau.name!r} cannot be distilled: row {n} adds more or less noise "
                "than sigma wants."
            )
        if sigma[n + 1] > 0:
            angles[n] = np.arctan2(fresh, kept * sigma[n])
    return angles


def from_canonical(
    numbers: Mapping[str, Array], ends: Mapping[str, PyTree], process: Process
) -> dict[str, PyTree]:
    """Arrays of the tableau with these numbers: the inverse of `canonical`.

    Works on the host in float64 and, differentiably, on JAX arrays.

    Args:
      numbers: as `canonical` returns them.
      ends: "times", "alpha" and "sigma", each (2,): the first and the last level, kept as given.
      process: the noise process.
    """
    xp = namespace(numbers["weights"])
    weights = as_float(numbers["weights"])
    rows = weights.shape[0]
    inner = process.time(numbers["log_snr"])
    levels = {"times": inner, "alpha": process.alpha(inner), "sigma": process.sigma(inner)}
    for name, value in levels.items():
        first_last = as_float(ends[name], weights)
        levels[name] = xp.concatenate([first_last[:1], value, first_last[1:]])
    alpha, sigma = levels["alpha"], levels["sigma"]
    ratio = sigma[1:] / sigma[:-1]
    told = {}
    if "noise" in numbers:
        angles = as_float(numbers["noise"], weights)
        ratio, told["c"] = ratio * xp.cos(angles), sigma[1:] * xp.sin(angles)
    kappa = alpha[1:] - alpha[:-1] * ratio
    lower = xp.tril(weights, -1)
    diagonal = 1 + as_float(numbers["sums"], weights) - xp.sum(lower, axis=1)
    square = (lower + diagonal[:, None] * xp.eye(rows, dtype=weights.dtype)) * kappa[:, None]
    # column j of `square` belongs to D_j; a tableau's column is the lag n - j
    lag = np.arange(rows)[:, None] - np.arange(rows)[None, :]
    b = xp.where(lag >= 0, xp.take_along_axis(square, np.maximum(lag, 0), axis=1), 0)
    target = xp.stack([xp.ones_like(ratio), xp.zeros_like(ratio)], axis=1)
    a = (ratio + as_float(numbers["state"], weights))[:, None]
    if "labels" in numbers:
        told["asked"] = told_times(process, levels["times"][:-1], as_float(numbers["labels"]))
    return {**levels, **told, "target": target, "a": a, "b": b.astype(weights.dtype)}


def can_distill(tableau: Tableau) -> bool:
    """Whether `distill` can start from this tableau (see `canonical`)."""
    try:
        canonical(tableau)
    except ValueError:
        return False
    return True
