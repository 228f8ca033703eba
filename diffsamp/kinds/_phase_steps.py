"""The steps of PSLD's samplers: z' = z + P z + Q eps + R zeta with matrices of 2 x 2."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from diffsamp.kinds.phase_space import PSLD

__all__ = ["METHODS", "STOCHASTIC", "Step", "deterministic_steps", "stochastic_steps"]

STOCHASTIC = ("euler_maruyama", "sscs", "reduced_oba")
METHODS = ("euler", "conjugate", "symplectic_euler", "verlet", "reduced_verlet", *STOCHASTIC)


class Step(NamedTuple):
    """One row: the network is asked at `time`.

    Attributes:
      time: of the evaluation.
      on_state: P of a deterministic row, which adds to z; 1 + P of a stochastic one.
      on_noise: Q.
      spread: R, lower triangular; None: no noise.
    """

    time: float
    on_state: np.ndarray
    on_noise: np.ndarray
    spread: np.ndarray | None = None


def deterministic_steps(
    process: PSLD, times: np.ndarray, method: str, rate: float = 0.0
) -> list[Step]:
    """Steps of the reverse ODE; `rate` is that of "conjugate"."""
    rows = list[Step]()
    x_only, m_only = np.diag([1.0, 0.0]), np.diag([0.0, 1.0])
    drift = _drift(process)
    for s, t in itertools.pairwise(times):
        step, noise = t - s, _noise(process, s)
        whole = (step * drift, step * noise)
        if method == "euler":
            rows.append(Step(s, *whole))
        elif method == "conjugate":
            rows.append(Step(s, *_conjugate(process, s, t, rate)))
        elif method == "reduced_verlet":
            half = np.eye(2) * [step, step / 2] + step**2 / 2 * drift * [[0, 1], [0, 0]]
            rows.append(Step(s, half @ drift, half @ noise))
            rows.append(Step(t, m_only @ whole[0] / 2, m_only @ _noise(process, t) * step / 2))
        else:
            parts = [m_only, x_only] if method[0] == "s" else [m_only / 2, x_only, m_only / 2]
            rows += [Step(s, part @ whole[0], part @ whole[1]) for part in parts]
    return rows


def stochastic_steps(
    process: PSLD, times: np.ndarray, method: str, _rate: float = 0.0
) -> list[Step]:
    """Steps of the reverse SDE; the last adds no noise."""
    one, x_only, m_only = np.eye(2), np.diag([1.0, 0.0]), np.diag([0.0, 1.0])
    rates = process.beta * np.array([process.gamma, process.nu])  # of friction
    stationary = np.diag([1.0, process.mass])
    # the data's and the momentum's part of the reverse equation, its friction turned into noise
    own = process.beta / 2 * np.array([[2 * process.gamma, -1 / process.mass], [1, 2 * process.nu]])
    intervals = -np.diff(times)
    steps = list[Step]()
    for s, h, following in zip(times, intervals, [*intervals[1:], 0.0], strict=False):
        score = -2 * h * _noise(process, s)  # times eps it is h G G^T score
        if method == "euler_maruyama":
            kept, on_noise = one - h * _drift(process), score
            spread = np.diag(np.sqrt(h * rates * [1.0, process.mass]))
        elif method == "sscs":
            # F with its coupling turned round, whose exponential is that of F with the same signs
            forget = np.array(process.mean((h + following) / 2)).reshape(2, 2) * [[1, -1], [-1, 1]]
            kept, on_noise = forget @ (one + h * np.diag(rates)), forget @ score
            spread = np.linalg.cholesky(stationary - forget @ stationary @ forget.T)
        else:
            decay = np.diag(np.exp(-rates * following / 2))
            data = one + h * x_only @ own
            kept = decay @ data @ (one + h * m_only @ own)
            on_noise = decay @ (data @ m_only @ score + x_only @ score)
            spread = np.sqrt(np.diag(-np.expm1(-rates * following)) @ stationary)
        steps.append(Step(float(s), kept, on_noise, spread if following else None))
    return steps


def _drift(process: PSLD) -> np.ndarray:
    """F, (2, 2)."""
    entries = [[-process.gamma, 1 / process.mass], [-1.0, -process.nu]]
    return process.beta / 2 * np.array(entries)


def _noise(process: PSLD, t: float) -> np.ndarray:
    """(1/2) G G^T L^-T at t: what eps is multiplied by in the reverse ODE."""
    xx, xm, mm = process.covariance(np.float64(t))
    first = np.sqrt(xx)
    second = np.sqrt(mm - xm**2 / xx)
    inverse = np.array([[1 / first, -xm / xx / second], [0.0, 1 / second]])
    return process.beta / 2 * np.diag([process.gamma, process.mass * process.nu]) @ inverse


def _conjugate(process: PSLD, s: float, t: float, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """P and Q with A(t') = exp(rate (t' - s) - F (t' - s)) and eps frozen."""

    def stretch(time: float) -> np.ndarray:
        return np.exp(rate * (time - s)) * np.array(process.mean(s - time)).reshape(2, 2)

    nodes, weights = np.polynomial.legendre.leggauss(32)
    inner = s + (t - s) * (nodes + 1) / 2
    total = sum(
        w * (t - s) / 2 * stretch(time) @ _noise(process, time)
        for w, time in zip(weights, inner, strict=True)
    )
    back = np.linalg.inv(stretch(t))
    return back * (1 + rate * (t - s)) - np.eye(2), back @ total
