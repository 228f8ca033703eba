"""DDIM, DDPM and their relatives: one evaluation a step.

A step from s to t with injected standard deviation `std`, for any process:

    x_t = alpha_t D + sqrt(sigma_t^2 - std^2) E + std z

which has the right mean and variance when D is the true x_0. A step to sigma_t = 0 is x_t = D.
"""

from __future__ import annotations

import numpy as np

from diffsamp._core.checks import expect_choice
from diffsamp._core.types import Times
from diffsamp.processes import Process
from diffsamp.solvers._builder import NOISE, Answer, Builder, Combination, Point, transfer
from diffsamp.tableau import Tableau

__all__ = ["accelerated_ddpm", "conjugate_ddim", "ddim", "ddpm"]


def ddim(process: Process, times: Times, *, eta: float = 0.0) -> Tableau:
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
    if eta:
        builder.expect_falling("ddim with eta > 0")
    x = builder.start
    for s, t in zip(builder.points, builder.points[1:], strict=False):
        answer = builder.evaluate(x, s)
        x = transfer(answer, t)
        std = eta * _posterior_std(s, t) if eta else 0.0
        if std > 0:
            x = x + (np.sqrt(t.sigma**2 - std**2) - t.sigma) * answer.noise
            x = x + std * builder.fresh_noise()
    name = "ddim" if eta == 0 else f"ddim(eta={eta:g})"
    return builder.finish(x, builder.points[-1], name=name, source="arXiv:2010.02502, eq. 12")


def ddpm(process: Process, times: Times, *, variance: str = "small") -> Tableau:
    """DDPM's ancestral sampler. Weak order 1, one evaluation a step.

    "small" draws from the posterior q(x_t | x_s, x_0 = D) and equals DDIM with eta = 1. "large"
    keeps its mean and takes the forward variance sigma_s^2 - (alpha_s / alpha_t)^2 sigma_t^2
    (beta in DDPM's symbols), which is too much noise unless steps are many. "learned" is the mean
    alone: the noise comes from `guidance.learned_range`. No noise is added on the last row when
    it ends at sigma = 0.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.
      variance: "small", "large" or "learned".

    Returns:
      A tableau of n evaluations, in data prediction; stochastic unless "learned".

    Raises:
      ValueError: times that do not decrease, an unknown `variance`.

    Reference: Ho, Jain & Abbeel 2020, arXiv:2006.11239, eq. 6-7 and section 3.2.
    """
    expect_choice(variance, "variance", ("small", "large", "learned"))
    builder = Builder(process, times)
    builder.expect_falling("ddpm")
    x = builder.start
    for s, t in zip(builder.points, builder.points[1:], strict=False):
        answer = builder.evaluate(x, s)
        if t.sigma == 0:
            x = transfer(answer, t)
            continue
        x = _posterior_mean(answer, t)
        if variance != "learned":
            std = _posterior_std(s, t) if variance == "small" else _forward_std(s, t)
            x = x + std * builder.fresh_noise()
    return builder.finish(
        x,
        builder.points[-1],
        name="ddpm" if variance == "small" else f"ddpm({variance})",
        source="arXiv:2006.11239, eq. 7",
        check="full" if variance == "small" else "mean",
    )


def conjugate_ddim(process: Process, times: Times, *, rate: float = 1.0) -> Tableau:
    """lambda-DDIM: DDIM in coordinates stretched by exp(rate t). Order 1, one evaluation a step.

    With rho = sigma / alpha, y = exp(rate t) x / alpha obeys dy = rate y dt + exp(rate t) E d rho;
    Euler's method on the first term and E frozen in the second, whose integral is exact, give

        y_t = y_s (1 + rate (t - s)) + E int_s^t exp(rate t') d rho(t').

    rate 0 is DDIM; unlike it, other rates do not keep a constant data prediction exact, which
    shifts the error of a step and can lower the whole. Steps to sigma = 0 and from alpha = 0 are
    DDIM's.

    Args:
      process: the noise process; t is its time, scaled to 0 at the data and 1 at the noise.
      times: (n + 1,) decreasing times, used verbatim.
      rate: the paper's lambda; small against 1 / (the longest step).

    Returns:
      A deterministic tableau of n evaluations, in noise prediction.

    Raises:
      ValueError: times that do not decrease, a rate that is not finite.

    Reference: Pandey, Rudolph & Mandt 2024, arXiv:2310.07894.
    """
    if not np.isfinite(rate):
        raise ValueError(f"`rate` must be finite; got {rate}.")
    nodes, weights = np.polynomial.legendre.leggauss(64)
    builder = Builder(process, times, NOISE)
    x = builder.start
    for s, t in zip(builder.points, builder.points[1:], strict=False):
        answer = builder.evaluate(x, s)
        if s.alpha == 0 or t.sigma == 0:
            x = transfer(answer, t)
            continue
        # relative to the step's end, exp(rate (t' - t)), so that no exponential is large
        middle, half = (t.log_snr + s.log_snr) / 2, (t.log_snr - s.log_snr) / 2
        log_snr = middle + half * nodes
        ahead = builder.unit_time(process.time(log_snr)) - builder.unit_time(t.t)
        integral = -half * float(weights @ np.exp(rate * ahead - log_snr))
        growth = rate * (builder.unit_time(t.t) - builder.unit_time(s.t))
        kept = np.exp(-growth) * (1 + growth)
        x = t.alpha * (kept / s.alpha * answer.state + integral * answer.noise)
    return builder.finish(
        x,
        builder.points[-1],
        name=f"conjugate_ddim({rate:g})",
        source="arXiv:2310.07894",
        check="full" if rate == 0 else "none",
    )


def accelerated_ddpm(process: Process, times: Times) -> Tableau:
    """Accelerated DDPM: the network is asked at a noised state. One evaluation a step.

    In variance-preserving units, with a = abar_s / abar_t the step's ratio and beta = 1 - a,

        y = x_s + sqrt(beta / 2) z,   x_t = [y + beta score_s(y) + sqrt(beta / 2) z'] / sqrt(a),

    the score being that of level s although y carries more noise. A step's defect in the variance
    is of third order, against the second of DDPM. (The authors' scripts put the noise elsewhere,
    which loses that.) Steps to sigma = 0 and from alpha = 0 are DDPM's.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.

    Returns:
      A stochastic tableau of n evaluations, in noise prediction.

    Raises:
      ValueError: times that do not decrease.

    Reference: Li, Huang, Efimov et al. 2024, arXiv:2403.03852.
    """
    builder = Builder(process, times, NOISE)
    builder.expect_falling("accelerated_ddpm")
    x = builder.start
    for s, t in zip(builder.points, builder.points[1:], strict=False):
        if t.sigma == 0 or s.alpha == 0:
            answer = builder.evaluate(x, s)
            x = transfer(answer, t)
            if t.sigma > 0:
                x = _posterior_mean(answer, t) + t.sigma * builder.fresh_noise()
            continue
        norm_s, norm_t = np.hypot(s.alpha, s.sigma), np.hypot(t.alpha, t.sigma)
        ratio = (s.alpha / norm_s * norm_t / t.alpha) ** 2
        spread = norm_s * np.sqrt((1 - ratio) / 2)
        answer = builder.evaluate(x + spread * builder.fresh_noise(), s)
        drift = answer.state - (1 - ratio) * norm_s**2 / s.sigma * answer.noise
        scale = norm_t / norm_s / np.sqrt(ratio)
        x = scale * (drift + spread * builder.fresh_noise())
    return builder.finish(
        x, builder.points[-1], name="accelerated_ddpm", source="arXiv:2403.03852", check="mean"
    )


def _posterior_mean(answer: Answer, t: Point) -> Combination:
    """Mean of q(x_t | x_s, x_0 = D): alpha_t D + sigma_t exp(-h) E; exp(-h) is 0 from alpha = 0."""
    kept = np.exp(-(t.log_snr - answer.point.log_snr))
    return t.alpha * answer.data + t.sigma * kept * answer.noise


def _posterior_std(s: Point, t: Point) -> float:
    """Its standard deviation, sigma_t sqrt(1 - exp(-2 h))."""
    return float(t.sigma * np.sqrt(-np.expm1(-2 * (t.log_snr - s.log_snr))))


def _forward_std(s: Point, t: Point) -> float:
    """That of the forward process from t to s; DDPM's sqrt(beta)."""
    return float(np.sqrt(s.sigma**2 - (s.alpha / t.alpha * t.sigma) ** 2))
