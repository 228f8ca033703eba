"""The two families of quadrature weights most samplers are made of, in float64.

`exponential_weights`: integrals of exp(-rate (h - u)) against the Lagrange basis in log-SNR
(DPM-Solver++, UniPC and their SDE forms). `adams_weights`: integrals of d rho against the Lagrange
basis in any variable (DEIS, iPNDM, LMS). Both use Gauss-Legendre rules that are exact to rounding
for the polynomial part; no finite difference and no Riemann sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from diffsamp.processes import Process

__all__ = ["adams_weights", "diffusion_time", "exponential_weights", "lagrange", "phis", "spread"]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


def lagrange(nodes: Sequence[float], x: np.ndarray) -> np.ndarray:
    """Lagrange basis polynomials on `nodes` at x; shape (len(nodes), len(x))."""
    basis = np.ones((len(nodes), np.size(x)))
    for j in range(len(nodes)):
        for i in range(len(nodes)):
            if i != j:
                basis[j] *= (x - nodes[i]) / (nodes[j] - nodes[i])
    return basis


def exponential_weights(nodes: Sequence[float], h: float, rate: float = 1.0) -> np.ndarray:
    """W_j = int_0^h rate exp(-rate (h - u)) l_j(u) du.

    The weights of D_j in x_t = (sigma_t / sigma_s) exp(-(rate - 1) h) x_s + alpha_t sum_j W_j D_j
    (variation of constants with D interpolated in log-SNR). rate 1 is the ODE, 2 the reverse SDE.
    Rate -1 is the ODE in noise form, x_t = (alpha_t / alpha_s) x_s + sigma_t sum_j W_j E_j.

    Args:
      nodes: log-SNR of the past (and, for a corrector, coming) outputs minus that of the present
        point, finite and distinct.
      h: log-SNR step, positive, may be inf (a step to sigma = 0) only for the single node 0.
      rate: positive, or -1.

    Returns:
      float64 array of len(nodes); it sums to 1 - exp(-rate h).
    """
    if len(nodes) == 1:
        return np.array([-np.expm1(-rate * h)])
    # the integrand is negligible further than 50 / rate from the end, or from the start
    low, high = (max(0.0, h - 50.0 / rate), h) if rate > 0 else (0.0, min(h, -50.0 / rate))
    u = low + (high - low) * (_NODES + 1) / 2
    weight = (high - low) / 2 * _WEIGHTS * rate * np.exp(-rate * (h - u))
    return lagrange(nodes, u) @ weight


def phis(h: float) -> tuple[float, float, float]:
    """phi_1 = 1 - exp(-h), phi_2 = 1 - phi_1 / h, phi_3 = 1/2 - phi_2 / h.

    They are int_0^1 h exp(-h (1 - s)) s^k / k! ds for k = 0, 1, 2: the weights of a function's
    value, slope and bend over the step. Negative h gives the (negated) weights of the noise form.
    By series where the differences would cancel; h may be inf.
    """
    phi_1 = -math.expm1(-h)
    if abs(h) < 0.5:
        powers = [(-h) ** k for k in range(1, 18)]
        phi_2 = -math.fsum(p / math.factorial(k + 1) for k, p in enumerate(powers, 1))
        phi_3 = -math.fsum(p / math.factorial(k + 2) for k, p in enumerate(powers, 1))
        return phi_1, phi_2, phi_3
    phi_2 = 1 - phi_1 / h
    return phi_1, phi_2, 0.5 - phi_2 / h


def adams_weights(
    nodes: Sequence[float],
    rho_start: float,
    rho_end: float,
    variable: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """C_j = int l_j(v(rho)) d rho from rho_start to rho_end.

    The weights of eps_j in x_t / alpha_t = x_s / alpha_s + sum_j C_j eps_j, with eps interpolated
    in the variable v.

    Args:
      nodes: v at the past outputs, newest first, finite and distinct.
      rho_start: sigma / alpha at the present point, finite.
      rho_end: sigma / alpha at the coming point; positive unless `variable` is None.
      variable: v as a function of log rho; None: v is rho itself, and the rule is exact.

    Returns:
      float64 array of len(nodes); it sums to rho_end - rho_start.
    """
    if len(nodes) == 1:
        return np.array([rho_end - rho_start])
    if variable is None:
        start, end = rho_start, rho_end
    else:
        # in log rho the integrand has no square-root singularity at the clean end
        start, end = np.log(rho_start), np.log(rho_end)
    point = start + (end - start) * (_NODES + 1) / 2
    weight = (end - start) / 2 * _WEIGHTS
    if variable is None:
        return lagrange(nodes, point) @ weight
    return lagrange(nodes, variable(point)) @ (weight * np.exp(point))


def diffusion_time(process: Process) -> Callable[[np.ndarray], np.ndarray]:
    """The t of tAB-DEIS as a function of log rho.

    The process's own; where alpha is constant, and the process's time is rho (EDM) or log rho (VE),
    that of the linear variance-preserving process with log(1 + rho^2) = t^2 b / 2 + t a which has
    the process's largest rho at t = 1 and its smallest at t = 1e-3.
    """
    ends = process.log_snr(np.array([process.t_min, process.t_max]))
    if process.alpha(process.t_max) != process.alpha(process.t_min):
        return lambda log_rho: np.asarray(process.time(-log_rho))
    low, high = np.logaddexp(0, -2 * ends)
    start = max(1e-3, low / high)  # later where the levels rise more slowly than any such process's
    b = 2 * (high - low / start) / (1 - start)
    a = high - b / 2

    def time(log_rho: np.ndarray) -> np.ndarray:
        grown = np.logaddexp(0, 2 * log_rho)
        return 2 * grown / (np.sqrt(a * a + 2 * b * grown) + a)

    return time


def spread(strength: float) -> float:
    """sqrt(1 - exp(-2 strength)): the fresh noise of an SDE step, in units of sigma_t."""
    return math.sqrt(-math.expm1(-2 * strength))
