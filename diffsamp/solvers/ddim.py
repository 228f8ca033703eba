"""DDIM and DDPM: one evaluation a step, order 1, with or without fresh noise.

A step from s to t with injected standard deviation `std`, for any process:

    x_t = alpha_t D + sqrt(sigma_t^2 - std^2) E + std z

which has the right mean and variance when D is the true x_0. A step to sigma_t = 0 is x_t = D.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from diffsamp._checks import expect_choice
from diffsamp.processes import Process
from diffsamp.solvers._builder import Builder, transfer
from diffsamp.tableau import Tableau

__all__ = ["ddim", "ddpm"]


def ddim(process: Process, times: Any, *, eta: float = 0.0) -> Tableau:
    """DDIM: deterministic for eta = 0, DDPM's posterior for eta = 1.

    std = eta sigma_t sqrt(1 - exp(-2 h)), h the log-SNR step. Order 1, one evaluation a step.
    With eta = 0 it equals DPM-Solver-1, DPM-Solver++ 1, DEIS of order 0, UniP-1 and Euler's method
    in sigma / alpha (and, for flow models, in t). For few evaluations prefer a multistep solver.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.
      eta: noise scale in [0, 1].

    Returns:
      A tableau of n evaluations, in data prediction.

    Raises:
      ValueError: times that do not decrease, eta outside [0, 1].

    Reference: Song, Meng & Ermon 2021, arXiv:2010.02502, eq. 12 and 16.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"`eta` must lie in [0, 1]; got {eta}.")
    builder = Builder(process, times)
    x = builder.start
    for s, t in zip(builder.points, builder.points[1:], strict=False):
        answer = builder.evaluate(x, s)
        x = transfer(answer, t)
        std = eta * t.sigma * np.sqrt(-np.expm1(-2 * (t.log_snr - s.log_snr)))
        if std > 0:
            x = x + (np.sqrt(t.sigma**2 - std**2) - t.sigma) * answer.noise
            x = x + std * builder.fresh_noise()
    name = "ddim" if eta == 0 else f"ddim(eta={eta:g})"
    return builder.finish(x, builder.points[-1], name=name, source="arXiv:2010.02502, eq. 12")


def ddpm(process: Process, times: Any, *, variance: str = "small") -> Tableau:
    """DDPM's ancestral sampler. Weak order 1, one evaluation a step.

    "small" draws from the posterior q(x_t | x_s, x_0 = D) and equals DDIM with eta = 1. "large"
    keeps its mean and takes the forward variance sigma_s^2 - (alpha_s / alpha_t)^2 sigma_t^2
    (beta in DDPM's symbols), which is too much noise unless steps are many. No noise is added on
    the last row when it ends at sigma = 0.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.
      variance: "small" or "large".

    Returns:
      A stochastic tableau of n evaluations, in data prediction.

    Raises:
      ValueError: times that do not decrease, an unknown `variance`.

    Reference: Ho, Jain & Abbeel 2020, arXiv:2006.11239, eq. 6-7 and section 3.2.
    """
    expect_choice(variance, "variance", ("small", "large"))
    builder = Builder(process, times)
    x = builder.start
    for s, t in zip(builder.points, builder.points[1:], strict=False):
        answer = builder.evaluate(x, s)
        if t.sigma == 0:
            x = transfer(answer, t)
            continue
        kept = np.exp(-(t.log_snr - s.log_snr))  # exp(-h), 0 from alpha = 0
        x = t.alpha * answer.data + t.sigma * kept * answer.noise
        forward = s.sigma**2 - (s.alpha / t.alpha * t.sigma) ** 2
        small = t.sigma * np.sqrt(-np.expm1(-2 * (t.log_snr - s.log_snr)))
        std = small if variance == "small" else np.sqrt(forward)
        x = x + std * builder.fresh_noise()
    return builder.finish(
        x,
        builder.points[-1],
        name="ddpm" if variance == "small" else "ddpm(large)",
        source="arXiv:2006.11239, eq. 7",
        check="full" if variance == "small" else "mean",
    )
