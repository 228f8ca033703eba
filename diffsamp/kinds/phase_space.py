"""Phase-space Langevin diffusion (PSLD): data x with a momentum m beside it, and its samplers.

The state z has the two parts on its last axis, (batch, ..., 2). With b = beta t,

    dz = (beta / 2) [[-Gamma, 1/M], [-1, -nu]] z dt + G dw,   G G^T = beta diag(Gamma, M nu),

1/M = (Gamma - nu)^2 / 4 (critical damping), so that both the mean exp(F0 b) (x_0, 0) and the
covariance S(b) are closed forms, with m_0 ~ N(0, kappa M) taken as noise. The network predicts
eps of z = exp(F0 b) (x_0, 0) + L eps, L the lower Cholesky factor of S; the score is -L^-T eps.

Every row of every method here is z' = z + P z + Q eps with matrices of 2 x 2 that depend on the
row. They mix the parts, which a tableau's coefficients do not; so a transform of the network gives
P z + Q eps, and the tableau adds it. Noise R xi with a matrix R of 2 x 2 is a tableau's standard
normal xi for the state R^-1 z, in which stochastic methods run.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core.checks import expect_choice, expect_times
from diffsamp._core.numeric import (
    as_float,
    is_concrete,
    namespace,
    silence,
    to_host,
    working_dtype,
)
from diffsamp.guidance import Transform, per_row
from diffsamp.predictions import Level, level_at
from diffsamp.processes import Process
from diffsamp.score import ScoreFn, scale_rows
from diffsamp.tableau import Tableau

__all__ = ["PSLD", "PhaseSpaceSampler", "PhaseSpaceSteps", "psld", "sampler"]

_STOCHASTIC = ("euler_maruyama", "sscs")
_METHODS = ("euler", "conjugate", "symplectic_euler", "verlet", "reduced_verlet", *_STOCHASTIC)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PSLD(Process):
    """The process; made by `psld`. `alpha` and `sigma` are those of x alone.

    Pandey & Mandt 2023, arXiv:2303.01748.
    """

    beta: Any
    gamma: Any
    nu: Any
    kappa: Any

    @property
    def mass(self) -> Any:
        """M, the momentum's stationary variance."""
        return 4 / (self.gamma - self.nu) ** 2

    def mean(self, t: Any) -> tuple[Any, Any, Any, Any]:
        """exp(F0 b), as (xx, xm, mx, mm); the inverse at -t."""
        b = as_float(t) * self.beta
        decay = namespace(b).exp(-(self.nu + self.gamma) / 4 * b)
        slope = (self.nu - self.gamma) / 4 * b
        return decay * (1 + slope), decay * b / (2 * self.mass), -decay * b / 2, decay * (1 - slope)

    def covariance(self, t: Any) -> tuple[Any, Any, Any]:
        """S as (xx, xm, mm): the stationary diag(1, M) less what the mean has not yet forgotten."""
        xx, xm, mx, mm = self.mean(t)
        rest = (1 - self.kappa) * self.mass
        return (
            1 - xx**2 - rest * xm**2,
            -xx * mx - rest * xm * mm,
            self.mass - mx**2 - rest * mm**2,
        )

    def alpha(self, t: Any) -> Any:
        return self.mean(t)[0]

    @silence
    def sigma(self, t: Any) -> Any:
        return namespace(as_float(t)).sqrt(self.covariance(t)[0])

    def alpha_dot(self, t: Any) -> Any:
        xx, _, mx, _ = self.mean(t)  # d exp(F0 b) = beta F0 exp(F0 b) dt
        return self.beta / 2 * (-self.gamma * xx + mx / self.mass)

    @silence
    def sigma_dot(self, t: Any) -> Any:
        xx, xm, _ = self.covariance(t)  # dS = F S + S F^T + G G^T
        change = self.beta * (-self.gamma * xx + xm / self.mass + self.gamma)
        return change / (2 * namespace(as_float(t)).sqrt(xx))

    @silence
    def time(self, log_snr: Any) -> Any:
        log_snr = as_float(log_snr)
        xp = namespace(log_snr)
        low, high = xp.zeros_like(log_snr), xp.ones_like(log_snr)
        for _ in range(60):  # no closed form; alpha / sigma falls with t
            middle = (low + high) / 2
            noisier = self.log_snr(middle) < log_snr
            low, high = xp.where(noisier, low, middle), xp.where(noisier, middle, high)
        return (low + high) / 2

    @property
    def t_max(self) -> float:
        return 1.0

    @property
    def t_min(self) -> float:
        return 1e-3

    @property
    def prior_std(self) -> float:
        return 1.0

    def prior_sample(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = float) -> jax.Array:
        """Draw (x, m) ~ N(0, diag(1, M)); `shape` ends in 2. Else as for any process."""
        if np.ndim(shape) != 1 or len(shape) < 2 or shape[-1] != 2:
            raise ValueError(
                f"`shape` must be (batch, .., 2), with x and m on the last axis; got {shape}."
            )
        dtype = jax.dtypes.canonicalize_dtype(dtype)
        width = jnp.sqrt(jnp.asarray([1.0, self.mass], dtype))
        noise = super().prior_sample(key, shape, dtype)
        return noise * width.reshape((1,) * (len(shape) - 1) + (2,))

    def start_sample(
        self, key: jax.Array, shape: tuple[int, ...], t: Any, dtype: Any = float
    ) -> jax.Array:
        """The prior, for samplers that start at t_max: below it x and m are correlated.

        Raises:
          ValueError: t below t_max.
        """
        if is_concrete(t) and np.any(to_host(t) < self.t_max):
            raise ValueError(
                f"a phase-space sampler starts at t_max = {self.t_max:g}; this one starts at t = "
                f"{float(np.min(to_host(t))):g}, where position and momentum are correlated. Pass "
                "x_T of that level."
            )
        return self.prior_sample(key, shape, dtype)


def psld(beta: float = 8.0, gamma: float = 0.01, nu: float = 4.01, kappa: float = 0.04) -> PSLD:
    """Phase-space Langevin diffusion with constant beta, t from 1 (noise) to 0 (data).

    Args:
      beta: noise rate.
      gamma: friction of the data, Gamma. The authors' best models have 0.02 with nu = 4.02.
      nu: friction of the momentum, above gamma.
      kappa: variance of the data's own momentum, as a share of M.

    Raises:
      ValueError: a number out of range.
    """
    if not (beta > 0 and 0 <= gamma < nu and 0 < kappa <= 1):
        raise ValueError(
            "PSLD needs beta > 0, 0 <= gamma < nu and 0 < kappa <= 1; got "
            f"beta = {beta}, gamma = {gamma}, nu = {nu}, kappa = {kappa}."
        )
    return PSLD(float(beta), float(gamma), float(nu), float(kappa))


class _StepsBound(NamedTuple):
    inner: Any
    on_state: Any
    on_noise: Any
    on_input: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PhaseSpaceSteps(Transform):
    """A network that says P z + Q eps with every row's own matrices; made by `sampler`.

    Attributes:
      score_fn: the network, of the noise prediction.
      on_state: P as four arrays (N,): xx, xm, mx, mm.
      on_noise: Q likewise.
      on_input: R likewise, which makes z of the state, R^-1 z; None where the state is z.
    """

    score_fn: Any
    on_state: Any
    on_noise: Any
    on_input: Any = None

    def bind(self, level: Level, target: tuple[Any, Any]) -> _StepsBound:
        """As `ScoreFn.bind`, with the matrices of every row."""
        scaled = () if self.on_input is None else self.on_input
        numbers = per_row(level, "phase_space.sampler", *self.on_state, *self.on_noise, *scaled)
        if is_concrete(target) and np.any(to_host(target[0]) != 0):
            raise ValueError(
                "the steps of phase_space.sampler are no prediction of data: sample them with the "
                "tableau they came with, and nothing around them but guidance."
            )
        inner = self.score_fn.bind(level, target)
        return _StepsBound(inner, numbers[:4], numbers[4:8], numbers[8:] or None)

    def predict(self, x: Any, bound: _StepsBound, cond: Mapping[str, Any] | None = None) -> Any:
        """P z + Q eps."""
        z = x
        if bound.on_input is not None:
            z = jax.tree.map(lambda v: _times(bound.on_input, v).astype(v.dtype), x)
        noise = self.score_fn.predict(z, bound.inner, cond)

        def both(v: jax.Array, eps: jax.Array) -> jax.Array:
            return (_times(bound.on_state, v) + _times(bound.on_noise, eps)).astype(v.dtype)

        return jax.tree.map(both, x, noise)


def _times(matrix: Any, v: jax.Array) -> jax.Array:
    """A row's matrix of 2 x 2 times the two parts, in at least float32."""
    xx, xm, mx, mm = (scale_rows(entry, v[..., 0]) for entry in matrix)
    first, second = (v[..., i].astype(working_dtype(v.dtype)) for i in (0, 1))
    return jnp.stack([xx * first + xm * second, mx * first + mm * second], axis=-1)


class PhaseSpaceSampler(NamedTuple):
    """What `sampler` returns: give both to `ds.sample`.

    Attributes:
      network: the transform of the ScoreFn.
      tableau: with as many evaluations as the method takes.
    """

    network: PhaseSpaceSteps
    tableau: Tableau


def sampler(
    score_fn: ScoreFn, times: Any, *, method: str = "reduced_verlet", rate: float = 0.0
) -> PhaseSpaceSampler:
    """A sampler of a phase-space model: the reverse ODE dz = F z + (1/2) G G^T L^-T eps dt, or SDE.

    - "euler": one evaluation a step.
    - "conjugate": the linear part exact and eps frozen, in coordinates stretched by exp(rate t)
      (Conjugate Integrators with B = rate I); one evaluation a step.
    - "symplectic_euler": the momentum's half of the equation, then the data's with the new
      momentum (naive splitting); two evaluations a step.
    - "verlet": half a step of the momentum, a step of the data, half of the momentum, each with an
      evaluation of its own at the step's first time (naive); three a step.
    - "reduced_verlet": the first two share an evaluation, and the last is made at the step's end;
      two a step.

    All are of order 1; at equal steps the split ones are closer. Two are stochastic, for the
    reverse SDE, with one evaluation a step:

    - "euler_maruyama": z' = z + (F z + G G^T L^-T eps) dt + G dw.
    - "sscs": what the SDE would be if the score were that of the prior is solved exactly for half a
      step, with its noise; then Euler's step with what the score has beyond that, asked at the
      step's first time; then the other half.

    Their last step is the authors' denoising: Euler's, without noise. The authors' n steps to 0.001
    are `times` of n + 2 numbers, the last two 0.001 and 0. The first half step of "sscs", which
    leaves the prior as it is, is not taken. Between steps the state is R^-1 z, with R the factor of
    the last noise.

    Example:
      >>> import jax, diffsamp as ds
      >>> process = ds.phase_space.psld()
      >>> def apply(params, z, t):
      ...     return 0.1 * z  # stands for a network that predicts the noise of both parts
      >>> score_fn = ds.ScoreFn(apply, None, process, prediction="noise")
      >>> network, tableau = ds.phase_space.sampler(score_fn, [1.0, 0.6, 0.3, 0.001])
      >>> z_T = process.prior_sample(jax.random.key(0), (4, 8, 8, 2))
      >>> x = ds.sample(network, tableau, z_T)[..., 0]
      >>> tableau.nfe, x.shape
      (6, (4, 8, 8))

    Args:
      score_fn: a network of the state (batch, ..., 2) on a `PSLD` process, prediction="noise".
      times: (n + 1,) decreasing times. The last may be 0 for stochastic methods; for the others it
        is above it, since L is singular there.
      method: one of the above.
      rate: of "conjugate"; 0 is the exponential integrator.

    Returns:
      A `PhaseSpaceSampler`; sample it with a key if the method is stochastic.

    Raises:
      ValueError: another process, prediction or method, or times down to 0.

    Reference: Pandey, Rudolph & Mandt 2023 (efficient integrators), arXiv:2310.07894; stochastic:
    Pandey & Mandt 2023, arXiv:2303.01748, "sscs" after Dockhorn et al. 2022, arXiv:2112.07068.
    """
    process = score_fn.process
    if not isinstance(process, PSLD) or score_fn.prediction != "noise":
        raise ValueError(
            "phase-space samplers take a ScoreFn with a phase_space.psld() process and "
            f'prediction="noise"; got {type(process).__name__} and {score_fn.prediction!r}.'
        )
    expect_choice(method, "method", _METHODS)
    times = expect_times(times)
    noisy = method in _STOCHASTIC
    if not (times[-1] > 0 or (noisy and times[-1] == 0)) or times[0] > process.t_max:
        raise ValueError(
            f"`times` must lie in {'[' if noisy else '('}0, {process.t_max:g}], such as down to "
            f"process.t_min; got {times[0]:g} .. {times[-1]:g}."
        )
    if noisy:
        return _stochastic(score_fn, process, times, method)
    rows: list[tuple[float, np.ndarray, np.ndarray]] = []  # time of the evaluation, P, Q
    x_only, m_only = np.diag([1.0, 0.0]), np.diag([0.0, 1.0])
    drift = _drift(process)
    for s, t in itertools.pairwise(times):
        step, noise = t - s, _noise(process, s)
        whole = (step * drift, step * noise)
        if method == "euler":
            rows.append((s, *whole))
        elif method == "conjugate":
            rows.append((s, *_conjugate(process, s, t, rate)))
        elif method == "reduced_verlet":
            half = np.eye(2) * [step, step / 2] + step**2 / 2 * drift * [[0, 1], [0, 0]]
            rows.append((s, half @ drift, half @ noise))
            rows.append((t, m_only @ whole[0] / 2, m_only @ _noise(process, t) * step / 2))
        else:
            parts = [m_only, x_only] if method[0] == "s" else [m_only / 2, x_only, m_only / 2]
            rows += [(s, part @ whole[0], part @ whole[1]) for part in parts]
    asked = np.array([row[0] for row in rows] + [times[-1]])
    matrices = _entries([row[1] for row in rows]), _entries([row[2] for row in rows])
    tableau = _rows(process, asked, 1.0, 0.0, f"psld_{method}", "arXiv:2310.07894")
    return PhaseSpaceSampler(PhaseSpaceSteps(score_fn, *matrices), tableau)


def _entries(matrices: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    """xx, xm, mx, mm of every row, (N,) each."""
    return tuple(np.stack(matrices).reshape(-1, 4).T)


def _rows(process: PSLD, times: Any, kept: float, c: Any, name: str, source: str) -> Tableau:
    """u' = kept u + m + c xi."""
    level, one = level_at(process, times), np.ones((len(times) - 1, 1))
    return Tableau.create(
        times=times, alpha=level.alpha, sigma=level.sigma, target=one * [0.0, 1.0], a=kept * one,
        b=one, c=c * one[:, 0], name=name, source=source, check="none",
    )  # fmt: skip


def _stochastic(
    score_fn: ScoreFn, process: PSLD, times: np.ndarray, method: str
) -> PhaseSpaceSampler:
    """Rows y' = R'^-1 (P R y + Q eps(R y)) + xi, with z = R y; R is the identity at both ends."""
    spread = process.beta * np.diag([process.gamma, process.mass * process.nu])  # G G^T
    prior = np.diag([1.0, process.mass])
    scale, on_state, on_noise, on_input = np.eye(2), [], [], []
    steps = len(times) - 1
    for n, (s, t) in enumerate(itertools.pairwise(times)):
        span, factor = s - t, np.eye(2)
        whole, push = np.eye(2) - span * _drift(process), -2 * span * _noise(process, s)
        if n < steps - 1 and method == "sscs":
            # the halves around the next evaluation in one: the second of this step, the first of
            # the next, which the denoising step has not
            half = span / 2 + (0.0 if n == steps - 2 else (t - times[n + 2]) / 2)
            back = np.array(process.mean(half)).reshape(2, 2) * [[1, -1], [-1, 1]]
            whole = back @ (np.eye(2) + span * spread @ np.linalg.inv(prior))
            push, factor = back @ push, np.linalg.cholesky(prior - back @ prior @ back.T)
        elif n < steps - 1:
            # no noise of x at Gamma = 0: so little that the state does not hold it
            factor = np.sqrt(span * np.maximum(spread, 1e-24 * np.eye(2)))
        inverse = np.linalg.inv(factor)
        on_state.append(inverse @ whole @ scale)
        on_noise.append(inverse @ push)
        on_input.append(scale)
        scale = factor
    c = np.arange(steps) < steps - 1
    tableau = _rows(process, times, 0.0, c, f"psld_{method}", "arXiv:2303.01748")
    matrices = [_entries(rows) for rows in (on_state, on_noise, on_input)]
    return PhaseSpaceSampler(PhaseSpaceSteps(score_fn, *matrices), tableau)


def _drift(process: PSLD) -> np.ndarray:
    """F, (2, 2)."""
    entries = [[-process.gamma, 1 / process.mass], [-1.0, -process.nu]]
    return process.beta / 2 * np.array(entries)


def _noise(process: PSLD, t: Any) -> np.ndarray:
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
