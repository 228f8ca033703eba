"""Distributions whose diffusion is known exactly: the ground truth of tests and benchmarks.

For data x_0 from a Gaussian mixture, the state x = alpha x_0 + sigma eps is a Gaussian mixture as
well, and the posterior means E[x_0 | x] and E[eps | x], which a perfect network would predict, are
closed forms. So is the solution of the probability-flow ODE for one Gaussian, and in one dimension
for any mixture, since there the ODE transports the distribution function.
"""

from __future__ import annotations

import dataclasses
import functools
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from diffsamp._core import random
from diffsamp._core.checks import expect_int
from diffsamp._core.numeric import as_float, is_concrete, namespace
from diffsamp._core.types import Array, Key, PyTree
from diffsamp.evaluation._target import Target, column
from diffsamp.evaluation.unnormalised import Unnormalised, unnormalised
from diffsamp.processes import Process

__all__ = [
    "Empirical",
    "GaussianMixture",
    "Target",
    "Unnormalised",
    "empirical",
    "gaussian",
    "gaussian_mixture",
    "unnormalised",
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class GaussianMixture(Target):
    """sum_k weight_k N(mean_k, cov_k); build it with `gaussian` or `gaussian_mixture`.

    Attributes:
      log_weights: (K,).
      means: (K, dim).
      variances: (K, dim) eigenvalues of the covariances.
      bases: (K, dim, dim) eigenvectors, in columns.
    """

    log_weights: Array
    means: Array
    variances: Array
    bases: Array

    def _parts(self, x: PyTree, alpha: Array, sigma: Array) -> tuple[Array, ...]:
        xp = namespace(x, alpha, sigma, self.means)
        x = as_float(x, self.means)
        alpha, sigma = column(alpha, x), column(sigma, x)
        means, bases = as_float(self.means, x), as_float(self.bases, x)
        variances, log_weights = as_float(self.variances, x), as_float(self.log_weights, x)
        offset = x[:, None, :] - alpha[:, None, None] * means[None]
        # coordinates along the eigenvectors of each component
        y = xp.sum(offset[:, :, :, None] * bases[None], axis=2)
        spread = (alpha**2)[:, None, None] * variances[None] + (sigma**2)[:, None, None]
        exponent = -0.5 * xp.sum(y * y / spread + xp.log(2 * np.pi * spread), axis=2)
        return xp, alpha, sigma, means, bases, variances, y, spread, exponent + log_weights[None]

    def posterior(self, x: PyTree, alpha: Array, sigma: Array) -> tuple[Array, Array]:
        xp, alpha, sigma, means, bases, variances, y, spread, log_joint = self._parts(
            x, alpha, sigma
        )
        share = _in(xp).softmax(log_joint, axis=1)
        scaled = y / spread

        def back(coordinates: Array) -> Array:
            return xp.sum(bases[None] * coordinates[:, :, None, :], axis=3)

        data = means[None] + back(alpha[:, None, None] * variances[None] * scaled)
        noise = back(sigma[:, None, None] * scaled)
        return tuple(xp.sum(share[:, :, None] * part, axis=1) for part in (data, noise))

    def log_prob(self, x: PyTree, alpha: Array = 1.0, sigma: Array = 0.0) -> Array:
        xp, *_, log_joint = self._parts(x, alpha, sigma)
        return _in(xp).logsumexp(log_joint, axis=1)

    def sample(self, key: Key, n: int) -> jax.Array:
        expect_int(n, "n", at_least=1)

        def draw(key: jax.Array) -> jax.Array:
            key_component, key_noise = jax.random.split(key)
            k = jax.random.categorical(key_component, jnp.asarray(self.log_weights, jnp.float32))
            mean, basis, variance = (
                jnp.asarray(v, jnp.float32)[k] for v in (self.means, self.bases, self.variances)
            )
            z = jax.random.normal(key_noise, mean.shape, mean.dtype)
            return mean + jnp.sum(basis * (jnp.sqrt(variance) * z)[None, :], axis=1)

        return jax.vmap(draw)(random.sample_keys(key, n))

    def mean_and_cov(self) -> tuple[np.ndarray, np.ndarray]:
        """Exact mean (dim,) and covariance (dim, dim), float64 on the host."""
        weights = np.exp(np.asarray(self.log_weights, np.float64))
        means, bases = np.asarray(self.means, np.float64), np.asarray(self.bases, np.float64)
        mean = weights @ means
        covs = np.einsum("kij,kj,klj->kil", bases, self.variances, bases)
        spread = np.einsum("k,ki,kj->ij", weights, means - mean, means - mean)
        return mean, np.einsum("k,kij->ij", weights, covs) + spread

    def ode_solution(self, x: PyTree, process: Process, t: float, t_end: float) -> np.ndarray:
        """The exact probability-flow ODE solution at t_end through x at t, float64 on the host.

        Args:
          x: (batch, dim) states at time t.
          process: the noise process.
          t: a time where sigma > 0.
          t_end: any time, before or after, also the clean end.

        Returns:
          (batch, dim).

        Raises:
          ValueError: several components in more than one dimension, where no closed form exists;
            or x of another dimension.
        """
        if not is_concrete(self, process, x, t, t_end):
            raise TypeError("`ode_solution` is a host function: call it outside `jit`.")
        x = np.asarray(x, np.float64)
        if x.ndim != 2 or x.shape[1] != np.shape(self.means)[1]:
            raise ValueError(
                f"`x` must have shape (batch, {np.shape(self.means)[1]}); got {x.shape}."
            )
        (a_s, s_s), (a_t, s_t) = (
            (float(process.alpha(v)), float(process.sigma(v))) for v in (t, t_end)
        )
        means, variances = np.asarray(self.means), np.asarray(self.variances)
        if means.shape[0] == 1:
            # each eigen-coordinate is scaled by its ratio of standard deviations
            basis = np.asarray(self.bases[0])
            ratio = np.sqrt((a_t**2 * variances[0] + s_t**2) / (a_s**2 * variances[0] + s_s**2))
            return a_t * means[0] + ((x - a_s * means[0]) @ basis * ratio) @ basis.T
        if means.shape[1] != 1:
            raise ValueError(
                "the ODE's solution is a closed form for one Gaussian, or for a mixture in one "
                f"dimension; this mixture has {means.shape[0]} components in {means.shape[1]}."
            )
        weights = np.exp(np.asarray(self.log_weights, np.float64))

        def tails(y: np.ndarray, alpha: float, sigma: float) -> tuple[np.ndarray, np.ndarray]:
            z = (y[:, None] - alpha * means[:, 0]) / np.sqrt(alpha**2 * variances[:, 0] + sigma**2)
            return special.ndtr(z) @ weights, special.ndtr(-z) @ weights

        below, above = tails(x[:, 0], a_s, s_s)
        spread = np.sqrt(a_t**2 * variances[:, 0] + s_t**2)
        low = np.full(x.shape[0], np.min(a_t * means[:, 0] - 40 * spread))
        high = np.full(x.shape[0], np.max(a_t * means[:, 0] + 40 * spread))
        for _ in range(200):  # bisection to the last bit, on the smaller tail for its accuracy
            middle = 0.5 * (low + high)
            below_middle, above_middle = tails(middle, a_t, s_t)
            too_low = np.where(below < above, below_middle < below, above_middle > above)
            low, high = np.where(too_low, middle, low), np.where(too_low, high, middle)
        return (0.5 * (low + high))[:, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Empirical(Target):
    """A distribution on a data set; build it with `empirical`.

    The perfect network for it is the memorising one: E[x_0 | x] is a softmax mean of the data.

    Attributes:
      points: (K, dim).
      log_weights: (K,) of the points, normalised.
    """

    points: PyTree
    log_weights: Array

    def _log_joint(self, x: PyTree, alpha: Array, sigma: Array) -> tuple[Array, ...]:
        xp = namespace(x, alpha, sigma, self.points)
        x = as_float(x, self.points)
        alpha, sigma = column(alpha, x), column(sigma, x)
        points = as_float(self.points, x)
        offset = x[:, None, :] - alpha[:, None, None] * points[None]
        square = xp.sum(offset * offset, axis=2)
        log_weights = as_float(self.log_weights, x)
        log_joint = log_weights[None] - 0.5 * square / (sigma**2)[:, None]
        return xp, x, alpha, sigma, points, log_joint

    def posterior(self, x: PyTree, alpha: Array, sigma: Array) -> tuple[Array, Array]:
        xp, x, alpha, sigma, points, log_joint = self._log_joint(x, alpha, sigma)
        share = _in(xp).softmax(log_joint, axis=1)
        data = xp.sum(share[:, :, None] * points[None], axis=1)
        return data, (x - alpha[:, None] * data) / sigma[:, None]

    def log_prob(self, x: PyTree, alpha: Array = 1.0, sigma: Array = 0.0) -> Array:
        """As `Target.log_prob`; there is no density at sigma = 0, where it is -inf or NaN."""
        xp, x, _, sigma, points, log_joint = self._log_joint(x, alpha, sigma)
        total = _in(xp).logsumexp(log_joint, axis=1)
        return total - 0.5 * points.shape[1] * xp.log(2 * np.pi * sigma**2)

    def sample(self, key: Key, n: int) -> jax.Array:
        expect_int(n, "n", at_least=1)
        logits = jnp.asarray(self.log_weights, jnp.float32)
        draw = functools.partial(jax.random.categorical, logits=logits)
        index = jax.vmap(draw)(random.sample_keys(key, n))
        return jnp.asarray(self.points, jnp.float32)[index]


def _in(xp: ModuleType) -> ModuleType:
    """Where softmax and logsumexp of a namespace are: a maximum written out has NaN derivatives
    where the compiler computes it twice and rounds differently."""
    return jax.nn if xp is jnp else special


def gaussian_mixture(weights: Array, means: Array, covs: Array) -> GaussianMixture:
    """A Gaussian mixture.

    Args:
      weights: (K,) positive; normalised here.
      means: (K, dim).
      covs: (K,) variances, (K, dim) diagonals or (K, dim, dim) covariances.

    Raises:
      ValueError: shapes that do not agree, a weight that is not positive, a number that is not
        finite, or a covariance that is not symmetric and positive definite.
    """
    weights, means = np.asarray(weights, np.float64), np.asarray(means, np.float64)
    covs = np.asarray(covs, np.float64)
    if means.ndim != 2 or weights.shape != means.shape[:1]:
        raise ValueError(
            "`means` must have shape (K, dim) and `weights` (K,); got "
            f"{means.shape} and {weights.shape}."
        )
    if means.size == 0 or not np.all(np.isfinite(means)):
        raise ValueError(f"`means` must hold finite numbers, at least one; got {means}.")
    if not np.all(weights > 0):
        raise ValueError(f"`weights` must be positive; got {weights}.")
    count, dim = means.shape
    if covs.shape == (count,):
        covs = covs[:, None] * np.ones(dim)
    if covs.shape == (count, dim):
        covs = covs[:, :, None] * np.eye(dim)
    if covs.shape != (count, dim, dim):
        raise ValueError(
            f"`covs` must have shape ({count},), ({count}, {dim}) or ({count}, {dim}, {dim}); got "
            f"{covs.shape}."
        )
    if not np.all(np.isfinite(covs)):
        raise ValueError(f"`covs` must be finite; got {covs}.")
    if not np.allclose(covs, np.swapaxes(covs, 1, 2)):
        raise ValueError("`covs` must be symmetric.")
    variances, bases = np.linalg.eigh(covs)
    if not np.all(variances > 0):
        raise ValueError("`covs` must be positive definite; use `empirical` for points.")
    return GaussianMixture(np.log(weights / weights.sum()), means, variances, bases)


def gaussian(mean: Array, cov: Array) -> GaussianMixture:
    """One Gaussian: mean (dim,), cov a variance, (dim,) or (dim, dim)."""
    return gaussian_mixture([1.0], np.asarray(mean)[None], np.asarray(cov, np.float64)[None])


def empirical(points: PyTree, log_weights: Array | None = None) -> Empirical:
    """A distribution on points (K, ...), flattened to (K, dim).

    With weights its network is that of ensemble score sampling: a cloud of particles, weighed by
    how likely each is, gives the score without training (Bao et al. 2023, arXiv:2309.00983).

    Args:
      points: (K, ...).
      log_weights: (K,) up to a constant; None: all alike.

    Raises:
      ValueError: no points, only one axis, weights of another number, or anything not finite (-inf
        is a point of no weight).
    """
    points = np.asarray(points, np.float64)
    if points.ndim < 2 or points.size == 0:
        raise ValueError(f"`points` must have shape (K, ...); got {points.shape}.")
    if not np.all(np.isfinite(points)):
        raise ValueError("`points` must be finite.")
    count = points.shape[0]
    logs = np.zeros(count) if log_weights is None else np.asarray(log_weights, np.float64)
    if logs.shape != (count,) or np.any(np.isnan(logs)) or not np.isfinite(logs.max()):
        raise ValueError(
            f"`log_weights` must have shape ({count},), one a point, without NaN and not all -inf; "
            f"got shape {logs.shape}."
        )
    logs = logs - logs.max()
    logs = logs - np.log(np.sum(np.exp(logs)))
    # a point of no weight stays one, without an infinity in the arithmetic
    return Empirical(points.reshape(count, -1), np.maximum(logs, -1e30))
