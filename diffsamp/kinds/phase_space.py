"""Phase-space Langevin diffusion (PSLD): data x with a momentum m beside it, and its samplers.

The state z has the two parts on its last axis, (batch, ..., 2). With b = beta t,

    dz = (beta / 2) [[-Gamma, 1/M], [-1, -nu]] z dt + G dw,   G G^T = beta diag(Gamma, M nu),

1/M = (Gamma - nu)^2 / 4 (critical damping), so that both the mean exp(F0 b) (x_0, 0) and the
covariance S(b) are closed forms, with m_0 ~ N(0, kappa M) taken as noise. The network predicts
eps of z = exp(F0 b) (x_0, 0) + L eps, L the lower Cholesky factor of S; the score is -L^-T eps.

Any other linear diffusion of a data part and auxiliary ones is `linear`, by matrix exponentials.

Every row of every method here is z' = z + P z + Q eps with matrices, 2 x 2 for PSLD, that depend on
the row. They mix the parts, which a tableau's coefficients do not; so a transform of the network
gives P z + Q eps, and the tableau adds it. A stochastic row adds R zeta with zeta standard normal
and R triangular. Its state is therefore kept as y = R^-1 z, to which a tableau can add zeta itself;
the transform goes from y to z and on to the next row's y.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

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
from diffsamp._core.types import Array, Bound, Conditions, DType, Network, PyTree, Times
from diffsamp.guidance import Transform, per_row
from diffsamp.kinds._linear import Linear, PhaseSpace, linear
from diffsamp.kinds._phase_steps import (
    METHODS,
    ONLY_PSLD,
    STOCHASTIC,
    deterministic_steps,
    stochastic_steps,
)
from diffsamp.predictions import Level, level_at
from diffsamp.score import ScoreFn
from diffsamp.tableau import Tableau

__all__ = [
    "PSLD",
    "Linear",
    "PhaseSpace",
    "PhaseSpaceSampler",
    "PhaseSpaceSteps",
    "linear",
    "psld",
    "sampler",
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PSLD(PhaseSpace):
    """The process; made by `psld`. `alpha` and `sigma` are those of x alone.

    Pandey & Mandt 2023, arXiv:2303.01748.
    """

    beta: Array
    gamma: Array
    nu: Array
    kappa: Array

    @property
    def mass(self) -> Array:
        """M, the momentum's stationary variance."""
        return 4 / (self.gamma - self.nu) ** 2

    def mean(self, t: Array) -> tuple[Array, Array, Array, Array]:
        """exp(F0 b), as (xx, xm, mx, mm); the inverse at -t."""
        b = as_float(t) * self.beta
        decay = namespace(b).exp(-(self.nu + self.gamma) / 4 * b)
        slope = (self.nu - self.gamma) / 4 * b
        return decay * (1 + slope), decay * b / (2 * self.mass), -decay * b / 2, decay * (1 - slope)

    def covariance(self, t: Array) -> tuple[Array, Array, Array]:
        """S as (xx, xm, mm): the stationary diag(1, M) less what the mean has not yet forgotten."""
        xx, xm, mx, mm = self.mean(t)
        rest = (1 - self.kappa) * self.mass
        return (
            1 - xx**2 - rest * xm**2,
            -xx * mx - rest * xm * mm,
            self.mass - mx**2 - rest * mm**2,
        )

    def alpha(self, t: Array) -> Array:
        return self.mean(t)[0]

    @silence
    def sigma(self, t: Array) -> Array:
        return namespace(as_float(t)).sqrt(self.covariance(t)[0])

    def alpha_dot(self, t: Array) -> Array:
        xx, _, mx, _ = self.mean(t)  # d exp(F0 b) = beta F0 exp(F0 b) dt
        return self.beta / 2 * (-self.gamma * xx + mx / self.mass)

    @silence
    def sigma_dot(self, t: Array) -> Array:
        xx, xm, _ = self.covariance(t)  # dS = F S + S F^T + G G^T
        change = self.beta * (-self.gamma * xx + xm / self.mass + self.gamma)
        return change / (2 * namespace(as_float(t)).sqrt(xx))

    @property
    def parts(self) -> int:
        return 2

    def drift(self, t: float) -> np.ndarray:
        entries = [[-self.gamma, 1 / self.mass], [-1.0, -self.nu]]
        return self.beta / 2 * np.array(entries)

    def diffusion(self, t: float) -> np.ndarray:
        return self.beta * np.diag([self.gamma, self.mass * self.nu])

    def transition(self, s: float, t: float) -> np.ndarray:
        return np.array(self.mean(t - s)).reshape(2, 2)

    def spread(self, t: float) -> np.ndarray:
        xx, xm, mm = self.covariance(np.float64(t))
        return np.array([[xx, xm], [xm, mm]])

    def _widths(self, t: Array) -> Array:
        return jnp.diag(jnp.sqrt(jnp.asarray([1.0, self.mass])))

    def start_sample(
        self, key: jax.Array, shape: tuple[int, ...], t: Array, dtype: DType = float
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
        return super().start_sample(key, shape, t, dtype)


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
    inner: Bound
    row: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PhaseSpaceSteps(Transform):
    """A network that says P z + Q eps with every row's own matrices; made by `sampler`.

    Attributes:
      score_fn: the network, of the noise prediction.
      on_state: (N, k, k) P of every row.
      on_noise: Q likewise.
      basis: R likewise, where the state is y = R^-1 z; None: it is z.
    """

    score_fn: Network
    on_state: Array
    on_noise: Array
    basis: Array = None

    def bind(self, level: Level, target: tuple[Array, Array]) -> _StepsBound:
        """As `ScoreFn.bind`, with the number of every row."""
        (row,) = per_row(level, "phase_space.sampler", np.arange(np.shape(self.on_state)[0]))
        if is_concrete(target) and np.any(to_host(target[0]) != 0):
            raise ValueError(
                "the steps of phase_space.sampler are no prediction of data: sample them with the "
                "tableau they came with, and nothing around them but guidance."
            )
        return _StepsBound(self.score_fn.bind(level, target), row)

    def predict(self, x: PyTree, bound: _StepsBound, cond: Conditions | None = None) -> PyTree:
        """P z + Q eps."""

        def times(matrices: Array, v: jax.Array) -> jax.Array:
            matrix = jnp.asarray(matrices, working_dtype(v.dtype))[bound.row]
            size = matrix.shape[-1]
            parts = [v[..., i].astype(matrix.dtype) for i in range(size)]
            sums = [sum(matrix[i, j] * parts[j] for j in range(size)) for i in range(size)]
            return jnp.stack(sums, axis=-1)

        if self.basis is not None:
            x = jax.tree.map(lambda y: times(self.basis, y).astype(y.dtype), x)
        noise = self.score_fn.predict(x, bound.inner, cond)

        def both(z: jax.Array, eps: jax.Array) -> jax.Array:
            return (times(self.on_state, z) + times(self.on_noise, eps)).astype(z.dtype)

        return jax.tree.map(both, x, noise)


class PhaseSpaceSampler(NamedTuple):
    """What `sampler` returns: give both to `ds.sample`.

    Attributes:
      network: the transform of the ScoreFn.
      tableau: with as many evaluations as the method takes.
    """

    network: PhaseSpaceSteps
    tableau: Tableau


def sampler(
    score_fn: ScoreFn, times: Times, *, method: str = "reduced_verlet", rate: float = 0.0
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

    Of the reverse SDE, whose drift has twice the part of eps, one evaluation a step each:

    - "euler_maruyama".
    - "sscs": half a step of the linear equation that leaves N(0, diag(1, M)) as it is, exactly and
      with its noise; Euler's step for what the score has beyond it; the other half.
    - "reduced_oba": friction and noise exactly, then the momentum's and the data's part of the
      equation, both with one score (that of the paper without its factor on the data's noise).

    The half step or friction of sscs and reduced_oba before the first evaluation is left out, as it
    does not change the prior; the last step adds no noise.

    All are of order 1; at equal steps the split ones are closer. "sscs" and "reduced_oba" are made
    for PSLD; the others take any `linear` process, where "the data" is the first part and "the
    momentum" all others.

    Examples:
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
      score_fn: a network of the state (batch, ..., k) on a process of `psld` or `linear`,
        prediction="noise".
      times: (n + 1,) decreasing times; the last above 0, where L is singular.
      method: one of the above.
      rate: of "conjugate"; 0 is the exponential integrator.

    Returns:
      A `PhaseSpaceSampler`, deterministic or stochastic as its method. The states of a stochastic
      one are z in coordinates in which its noise is white, all but the first and last.

    Raises:
      ValueError: another process, prediction or method, times down to 0, or noise without gamma.

    References: Pandey, Rudolph & Mandt 2023 (efficient integrators), arXiv:2310.07894; the SDE's,
    Pandey & Mandt 2023, arXiv:2303.01748; sscs, Dockhorn, Vahdat & Kreis 2022, arXiv:2112.07068.
    """
    process = score_fn.process
    if not isinstance(process, PhaseSpace) or score_fn.prediction != "noise":
        raise ValueError(
            "phase-space samplers take a ScoreFn with a phase_space.psld() process, or one of "
            f'phase_space.linear, and prediction="noise"; got {type(process).__name__} and '
            f"{score_fn.prediction!r}."
        )
    expect_choice(method, "method", METHODS)
    if method in ONLY_PSLD and not isinstance(process, PSLD):
        raise ValueError(
            f"method={method!r} is made for phase_space.psld(); take 'euler_maruyama' or a "
            "deterministic one."
        )
    times = expect_times(times)
    if times[-1] <= 0 or times[0] > process.t_max:
        raise ValueError(
            f"`times` must lie in (0, {process.t_max:g}], such as down to process.t_min; got "
            f"{times[0]:g} .. {times[-1]:g}."
        )
    if method in STOCHASTIC and np.linalg.matrix_rank(process.diffusion(times[0])) < process.parts:
        raise ValueError(
            f"method={method!r} adds noise to all parts, of which this process (gamma = 0) leaves "
            "one out; take a deterministic method."
        )
    stochastic = method in STOCHASTIC
    build = stochastic_steps if stochastic else deterministic_steps
    steps = build(process, times, method, rate)
    one = np.eye(process.parts)
    spreads = [one if step.spread is None else step.spread for step in steps]
    # from y to the next y; the first and the last state are z itself
    on_state, on_noise = (
        np.stack([np.linalg.solve(r, part) for r, part in zip(spreads, matrices, strict=True)])
        for matrices in ([step.on_state for step in steps], [step.on_noise for step in steps])
    )
    basis = np.stack([one, *spreads[:-1]]) if stochastic else None
    asked = np.array([step.time for step in steps] + [times[-1]])
    level = level_at(process, asked)
    ones = np.ones((len(steps), 1))
    tableau = Tableau.create(
        times=asked,
        alpha=level.alpha,
        sigma=level.sigma,
        target=ones * [0.0, 1.0],
        a=0 * ones if stochastic else ones,
        b=ones,
        c=[step.spread is not None for step in steps],
        name=f"psld_{method}",
        source="arXiv:2303.01748" if stochastic else "arXiv:2310.07894",
        check="none",
    )
    return PhaseSpaceSampler(PhaseSpaceSteps(score_fn, on_state, on_noise, basis), tableau)
