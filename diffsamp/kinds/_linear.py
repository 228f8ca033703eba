"""Linear diffusions of several parts: what their samplers need, and the general one."""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from diffsamp._core.numeric import as_float, namespace, silence
from diffsamp._core.types import Array, DType
from diffsamp.processes import Process, time_by_bisection

__all__ = ["Linear", "PhaseSpace", "linear"]


class PhaseSpace(Process):
    """dz = F(t) z dt + G(t) dw of a state whose parts, the data first, are on its last axis.

    The data's part starts as x_0 and the others as noise. A sampler needs the four matrices below,
    on the host.
    """

    @property
    @abc.abstractmethod
    def parts(self) -> int:
        """How many parts, k."""

    @abc.abstractmethod
    def drift(self, t: float) -> np.ndarray:
        """F(t), (k, k)."""

    @abc.abstractmethod
    def diffusion(self, t: float) -> np.ndarray:
        """G(t) G(t)^T, (k, k)."""

    @abc.abstractmethod
    def transition(self, s: float, t: float) -> np.ndarray:
        """What takes the mean from s to t, (k, k); t may be the earlier one."""

    @abc.abstractmethod
    def spread(self, t: float) -> np.ndarray:
        """The covariance of the noise at t, (k, k)."""

    def time(self, log_snr: Array) -> Array:
        return time_by_bisection(self, log_snr)  # no closed form

    @property
    def t_max(self) -> float:
        return 1.0

    @property
    def t_min(self) -> float:
        return 1e-3

    @property
    def prior_std(self) -> float:
        return 1.0  # of the white noise that a start is made of

    def _widths(self, t: Array) -> Array:
        """A matrix whose product with white noise is the start at t."""
        return np.linalg.cholesky(self.spread(float(t)))

    def prior_sample(
        self, key: jax.Array, shape: tuple[int, ...], dtype: DType = float
    ) -> jax.Array:
        """Draw the parts at t_max; `shape` ends in their number. Else as for any process."""
        return self.start_sample(key, shape, self.t_max, dtype)

    def start_sample(
        self, key: jax.Array, shape: tuple[int, ...], t: Array, dtype: DType = float
    ) -> jax.Array:
        """Draw the noise of all parts at t, which is a host number."""
        if np.ndim(shape) != 1 or len(shape) < 2 or shape[-1] != self.parts:
            raise ValueError(
                f"`shape` must be (batch, .., {self.parts}), with the parts on the last axis, the "
                f"data first; got {shape}."
            )
        noise = super().prior_sample(key, shape, dtype)
        root = jnp.asarray(self._widths(t), noise.dtype)
        return jnp.einsum("...j,ij->...i", noise, root, precision="highest")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linear(PhaseSpace):
    """dz = beta(t) F z dt + sqrt(beta(t)) G dw with any matrices; made by `linear`.

    With b the integral of beta, the mean is exp(F b) and the covariance solves S' = F S + S F^T +
    G G^T in b. Both are those of a short b by Van Loan's matrix exponential, doubled.

    Attributes:
      matrix: F, (k, k).
      noise: G G^T, (k, k).
      start: covariance at t = 0, 0 for the data.
      beta: its values at t = 0 and 1, linear between.
    """

    matrix: Array
    noise: Array
    start: Array
    beta: tuple[Array, Array]

    @property
    def parts(self) -> int:
        return np.shape(self.matrix)[-1]

    def clock(self, t: Array) -> Array:
        """b(t), the integral of beta."""
        t = as_float(t)
        low, high = (as_float(v, t) for v in self.beta)
        return low * t + (high - low) / 2 * t * t

    def _rate(self, t: Array) -> Array:
        low, high = (as_float(v, t) for v in self.beta)
        return low + (high - low) * t

    def moments(self, t: Array) -> tuple[Array, Array]:
        """exp(F b) and the noise's covariance at times t, (..., k, k) each; NumPy or JAX."""
        b = self.clock(t)
        xp, k = namespace(b), self.parts
        matrix, noise, start = (
            xp.broadcast_to(as_float(v, b), (*b.shape, k, k))
            for v in (self.matrix, self.noise, self.start)
        )
        halvings = 8
        short = (b / 2**halvings)[..., None, None]
        upper = xp.concatenate([matrix, noise], axis=-1)
        lower = xp.concatenate([xp.zeros_like(matrix), -xp.swapaxes(matrix, -1, -2)], axis=-1)
        exponential = scipy.linalg.expm if xp is np else jax.scipy.linalg.expm
        block = exponential(xp.concatenate([upper, lower], axis=-2) * short)
        mean = block[..., :k, :k]
        cov = block[..., :k, k:] @ xp.swapaxes(mean, -1, -2)
        for _ in range(halvings):
            cov = cov + mean @ cov @ xp.swapaxes(mean, -1, -2)
            mean = mean @ mean
        return mean, cov + mean @ start @ xp.swapaxes(mean, -1, -2)

    def alpha(self, t: Array) -> Array:
        return self.moments(t)[0][..., 0, 0]

    @silence
    def sigma(self, t: Array) -> Array:
        cov = self.moments(t)[1][..., 0, 0]
        return namespace(cov).sqrt(cov)

    def alpha_dot(self, t: Array) -> Array:
        mean = self.moments(t)[0]
        return self._rate(as_float(t)) * self._first(mean)

    def _first(self, v: Array) -> Array:
        """The data's entry of F v."""
        row = as_float(self.matrix, v)[0]
        return sum(row[j] * v[..., j, 0] for j in range(self.parts))

    @silence
    def sigma_dot(self, t: Array) -> Array:
        cov = self.moments(t)[1]
        change = 2 * self._first(cov) + as_float(self.noise, cov)[0, 0]
        return self._rate(as_float(t)) * change / (2 * namespace(cov).sqrt(cov[..., 0, 0]))

    def drift(self, t: float) -> np.ndarray:
        return self._rate(np.float64(t)) * np.asarray(self.matrix)

    def diffusion(self, t: float) -> np.ndarray:
        return self._rate(np.float64(t)) * np.asarray(self.noise)

    def transition(self, s: float, t: float) -> np.ndarray:
        return scipy.linalg.expm(np.asarray(self.matrix) * (self.clock(t) - self.clock(s)))

    def spread(self, t: float) -> np.ndarray:
        return self.moments(np.float64(t))[1]


def linear(
    matrix: Array,
    diffusion: Array,
    *,
    start: Array | None = None,
    beta: tuple[float, float] = (1.0, 1.0),
) -> Linear:
    """Any linear diffusion of a data part and auxiliary ones: dz = beta F z dt + sqrt(beta) G dw.

    Examples:
      >>> import numpy as np, diffsamp as ds
      >>> F = [[0.0, 1.0, 0.0], [-1.0, 0.0, 2.0], [0.0, -2.0, -4.0]]  # Langevin of third order
      >>> G = np.diag([0.0, 0.0, 8.0**0.5])
      >>> process = ds.phase_space.linear(F, G, start=np.diag([0.0, 0.1, 0.1]), beta=(5.0, 5.0))
      >>> process.spread(1.0).round(1)[2, 2]  # all parts end as N(0, 1)
      np.float64(1.0)

    Args:
      matrix: F, (k, k); its first row and column are the data's.
      diffusion: G, (k, any).
      start: (k, k) covariance of the auxiliary parts at t = 0, with 0 for the data; None: 0.
      beta: the rate at t = 0 and t = 1, linear between.

    Returns:
      A process for `sampler`, whose network predicts eps of z = E (x_0, 0, ..) + L eps, L the lower
      Cholesky factor of the covariance.

    Raises:
      ValueError: shapes that do not agree, a start that is noisy in the data, or a process on which
        the data's signal changes sign or its log-SNR does not fall (underdamped).

    Reference: Singhal, Goldstein & Ranganath 2023, arXiv:2302.07261.
    """
    matrix, diffusion = (np.asarray(v, np.float64) for v in (matrix, diffusion))
    size = matrix.shape[0] if matrix.ndim == 2 else 0
    if size < 1 or matrix.shape != (size, size) or diffusion.shape[:1] != (size,):
        raise ValueError(
            f"`matrix` must be (k, k) and `diffusion` (k, ..); got {matrix.shape} and "
            f"{diffusion.shape}."
        )
    start = np.zeros((size, size)) if start is None else np.asarray(start, np.float64)
    if start.shape != (size, size) or np.any(start[0]) or np.any(start[:, 0]):
        raise ValueError("`start` must be (k, k), and 0 in the row and column of the data.")
    low, high = (float(v) for v in beta)
    if not (low > 0 and high > 0):
        raise ValueError(f"`beta` must be two positive numbers; got {beta}.")
    made = Linear(matrix, diffusion @ diffusion.T, start, (low, high))
    t = np.linspace(made.t_min, 1, 200)
    alpha, sigma = made.alpha(t), made.sigma(t)
    if not (np.all(alpha > 0) and np.all(sigma > 0) and np.all(np.diff(alpha / sigma) < 0)):
        raise ValueError(
            "the data's part must keep a positive signal, get noise, and its log-SNR fall from t = "
            "0 to 1. An underdamped process swings: raise its friction, or lower `beta`."
        )
    return made
