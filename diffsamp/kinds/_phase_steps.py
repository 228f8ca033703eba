"""The steps of phase space: z' = z + P z + Q eps + R zeta with matrices that mix the parts."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from diffsamp.kinds._linear import PhaseSpace

if TYPE_CHECKING:
    from diffsamp.kinds.phase_space import PSLD

__all__ = ["METHODS", "ONLY_PSLD", "STOCHASTIC", "Step", "deterministic_steps", "stochastic_steps"]

ONLY_PSLD = ("sscs", "reduced_oba")  # they know its stationary law and its friction
STOCHASTIC = ("euler_maruyama", *ONLY_PSLD)
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
    process: PhaseSpace, times: np.ndarray, method: str, rate: float = 0.0
) -> list[Step]:
    """Steps of the reverse ODE; `rate` is that of "conjugate"."""
    rows = list[Step]()
    size = process.parts
    x_only = np.diag(np.eye(size)[0])
    m_only = np.eye(size) - x_only
    for s, t in itertools.pairwise(times):
        step, drift, noise = t - s, process.drift(s), _noise(process, s)
        whole = (step * drift, step * noise)
        if method == "euler":
            rows.append(Step(s, *whole))
        elif method == "conjugate":
            rows.append(Step(s, *_conjugate(process, s, t, rate)))
        elif method == "reduced_verlet":
            half = step * x_only + step / 2 * m_only + step**2 / 2 * x_only @ drift @ m_only
            rows.append(Step(s, half @ drift, half @ noise))
            end = step / 2 * m_only
            rows.append(Step(t, end @ process.drift(t), end @ _noise(process, t)))
        else:
            parts = [m_only, x_only] if method[0] == "s" else [m_only / 2, x_only, m_only / 2]
            rows += [Step(s, part @ whole[0], part @ whole[1]) for part in parts]
    return rows


def stochastic_steps(
    process: PhaseSpace, times: np.ndarray, method: str, _rate: float = 0.0
) -> list[Step]:
    """Steps of the reverse SDE; the last adds no noise."""
    one = np.eye(process.parts)
    intervals = -np.diff(times)
    steps = list[Step]()
    for s, h, following in zip(times, intervals, [*intervals[1:], 0.0], strict=False):
        score = -2 * h * _noise(process, s)  # times eps it is h G G^T score
        if method == "euler_maruyama":
            kept, on_noise = one - h * process.drift(s), score
            spread = np.linalg.cholesky(h * process.diffusion(s)) if following else None
        else:
            kept, on_noise, spread = _split(cast("PSLD", process), h, following, method, score)
        steps.append(Step(float(s), kept, on_noise, spread if following else None))
    return steps


def _split(
    process: PSLD, h: float, following: float, method: str, score: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A step of "sscs" or "reduced_oba": what is kept, on eps, and the noise's root."""
    one, x_only, m_only = np.eye(2), np.diag([1.0, 0.0]), np.diag([0.0, 1.0])
    rates = process.beta * np.array([process.gamma, process.nu])  # of friction
    stationary = np.diag([1.0, process.mass])
    if method == "sscs":
        # F with its coupling turned round, whose exponential is that of F with the same signs
        forget = np.array(process.mean((h + following) / 2)).reshape(2, 2) * [[1, -1], [-1, 1]]
        spread = np.linalg.cholesky(stationary - forget @ stationary @ forget.T)
        return forget @ (one + h * np.diag(rates)), forget @ score, spread
    # the data's and the momentum's part of the reverse equation, its friction turned into noise
    own = process.beta / 2 * np.array([[2 * process.gamma, -1 / process.mass], [1, 2 * process.nu]])
    decay = np.diag(np.exp(-rates * following / 2))
    data = one + h * x_only @ own
    kept = decay @ data @ (one + h * m_only @ own)
    on_noise = decay @ (data @ m_only @ score + x_only @ score)
    return kept, on_noise, np.sqrt(np.diag(-np.expm1(-rates * following)) @ stationary)


def _noise(process: PhaseSpace, t: float) -> np.ndarray:
    """(1/2) G G^T L^-T at t: what eps is multiplied by in the reverse ODE."""
    root = np.linalg.cholesky(process.spread(t))
    return process.diffusion(t) @ np.linalg.inv(root).T / 2


def _conjugate(
    process: PhaseSpace, s: float, t: float, rate: float
) -> tuple[np.ndarray, np.ndarray]:
    """P and Q with A(t') = exp(rate (t' - s)) transition(t', s) and eps frozen."""

    def stretch(time: float) -> np.ndarray:
        return np.exp(rate * (time - s)) * process.transition(time, s)

    nodes, weights = np.polynomial.legendre.leggauss(32)
    inner = s + (t - s) * (nodes + 1) / 2
    total = sum(
        w * (t - s) / 2 * stretch(time) @ _noise(process, time)
        for w, time in zip(weights, inner, strict=True)
    )
    back = np.linalg.inv(stretch(t))
    return back * (1 + rate * (t - s)) - np.eye(process.parts), back @ total
