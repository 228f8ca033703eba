"""How far samples are from a reference, at equal noise, and sample sets from each other.

The first kind compares sample by sample: run a sampler and a fine reference from the same x_T. It
needs few samples and says what the solver lost. The second kind compares distributions and says
what a user sees; it needs thousands of samples.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core.checks import expect_int
from diffsamp._core.numeric import working_dtype
from diffsamp._core.types import Array, Key, PyTree

__all__ = [
    "energy_distance",
    "energy_terms",
    "frechet_distance",
    "kernel_distance",
    "mean_squared_error",
    "psnr",
    "rmse",
    "sliced_wasserstein",
]


@jax.jit
def mean_squared_error(x: PyTree, reference: PyTree) -> jax.Array:
    """Mean squared difference of each sample over its own axes; (batch, ...) -> (batch,).

    In float32 at least: differences of integers (8-bit images) would wrap around.
    """
    x, reference = map(jnp.asarray, (x, reference))
    wide = jnp.promote_types(working_dtype(x.dtype), working_dtype(reference.dtype))
    x, reference = x.astype(wide), reference.astype(wide)
    if x.shape != reference.shape or x.ndim < 1:
        raise ValueError(
            "`x` and `reference` must have one shape, (batch, ...); got "
            f"{x.shape} and {reference.shape}."
        )
    return jnp.mean(jnp.square(x - reference).reshape(x.shape[0], -1), axis=1)


def rmse(x: PyTree, reference: PyTree) -> jax.Array:
    """Root of the mean squared error over all samples, in units of x; a scalar."""
    return jnp.sqrt(jnp.mean(mean_squared_error(x, reference)))


def psnr(x: PyTree, reference: PyTree, *, data_range: float = 2.0) -> jax.Array:
    """Peak signal-to-noise ratio in dB, the mean over samples of 20 log10(range) - 10 log10(MSE).

    Args:
      x: (batch, ...).
      reference: same shape.
      data_range: distance between the smallest and largest value data can have; 2 for [-1, 1].

    Returns:
      A scalar. The mean of logarithms, as in Shaul et al. 2024 (BNS, arXiv:2403.01329).
    """
    if not data_range > 0:
        raise ValueError(f"`data_range` must be positive; got {data_range}.")
    # float32's smallest normal number stands for "equal"
    return _decibels(x, reference, 20 * math.log10(data_range))


@jax.jit
def _decibels(x: PyTree, reference: PyTree, peak: float) -> jax.Array:
    error = jnp.maximum(mean_squared_error(x, reference), float(np.finfo(np.float32).tiny))
    return jnp.mean(jnp.asarray(peak, error.dtype) - 10 * jnp.log10(error))


def _sets(least: int, **named: Array) -> list[np.ndarray]:
    """The sets in float64, flattened to (n, dim), checked to have as many dimensions."""
    sets = []
    for name, values in named.items():
        values = np.asarray(values, np.float64)
        if values.ndim < 1 or values.shape[0] < least or (values.ndim < 2 and least > 1):
            raise ValueError(f"`{name}` must have shape (n >= {least}, ...); got {values.shape}.")
        sets.append(values.reshape(values.shape[0], -1))
    if sets[0].shape[1] != sets[1].shape[1]:
        first, second = (f"`{name}`" for name in named)
        raise ValueError(
            f"{first} and {second} must have as many dimensions; got "
            f"{sets[0].shape[1]} and {sets[1].shape[1]}."
        )
    return sets


def frechet_distance(features: PyTree, reference: PyTree) -> float:
    """Frechet distance between the Gaussians fitted to two sets of features.

    |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)), in float64 on the host. On Inception features
    of 50,000 images it is FID (Heusel et al. 2017, arXiv:1706.08500); on other features compare it
    with the distance between two halves of the data.

    Args:
      features: (n, ...), flattened to (n, dim); more samples than dimensions are wise.
      reference: (m, ...).

    Returns:
      A float, in squared units of the features.

    Raises:
      ValueError: fewer than 2 samples, or different dimensions.
    """
    moments = [
        (values.mean(0), np.atleast_2d(np.cov(values, rowvar=False)))
        for values in _sets(2, features=features, reference=reference)
    ]
    (mean_1, cov_1), (mean_2, cov_2) = moments
    # tr (C_1 C_2)^(1/2) is the sum of the roots of the eigenvalues of S C_2 S, S = C_1^(1/2)
    values, vectors = np.linalg.eigh(cov_1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_2 @ root), 0)).sum()
    difference = mean_1 - mean_2
    return float(difference @ difference + np.trace(cov_1) + np.trace(cov_2) - 2 * cross)


def energy_terms(x: Array, reference: Array) -> jax.Array:
    """(n,) for every sample: mean distance to the reference, less half of that to the others.

    Twice their mean, less the mean distance within the reference, is the energy distance: what of
    it depends on x, for gradients.

    Args:
      x: (n, ...), n >= 2.
      reference: (m, ...), with the same dimensions.

    Raises:
      ValueError: one sample alone, or different dimensions.
    """
    x, reference = (jnp.reshape(v, (jnp.shape(v)[0], -1)) for v in (x, reference))
    if len(x) < 2 or x.shape[1:] != reference.shape[1:]:
        raise ValueError(
            "an energy distance needs two samples and equal dimensions; got shapes "
            f"{x.shape} and {reference.shape}."
        )
    return jnp.mean(_distances(x, reference), axis=1) - jnp.sum(_distances(x, x), axis=1) / (
        2 * (len(x) - 1)
    )


def energy_distance(x: Array, reference: Array) -> jax.Array:
    """2 E|x - y| - E|x - x'| - E|y - y'| of two sets, unbiased: 0 for equal distributions.

    Sees all of a distribution, needs no features, and has a gradient (Szekely & Rizzo 2013,
    doi:10.1016/j.jspi.2013.03.018). It may be slightly negative.

    Args:
      x: (n, ...), flattened to (n, dim), n >= 2.
      reference: (m, ...), m >= 2.

    Returns:
      (), in units of x.

    Raises:
      ValueError: one sample alone, or different dimensions.
    """
    return 2 * (jnp.mean(energy_terms(x, reference)) + jnp.mean(energy_terms(reference, x))) - (
        2 * jnp.mean(_distances(*(jnp.reshape(v, (jnp.shape(v)[0], -1)) for v in (x, reference))))
    )


def _distances(x: jax.Array, y: jax.Array) -> jax.Array:
    """(n, m) Euclidean distances; the gradient at equal points is 0."""
    gap = jnp.sum(jnp.square(x[:, None] - y[None]), axis=-1)
    positive = gap > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, gap, 1)), 0)


def kernel_distance(features: PyTree, reference: PyTree) -> float:
    """Squared maximum mean discrepancy with the kernel (x . y / dim + 1)^3, unbiased.

    On Inception features it is KID (Binkowski et al. 2018, arXiv:1801.01401). Unlike a Frechet
    distance its mean does not depend on the number of samples; it may be slightly negative.

    Args:
      features: (n, ...), flattened to (n, dim).
      reference: (m, ...).

    Returns:
      A float, in float64 on the host.

    Raises:
      ValueError: fewer than 2 samples, or different dimensions.
    """
    x, y = _sets(2, features=features, reference=reference)

    def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: np.ndarray) -> float:
        """Mean over different pairs."""
        matrix, n = similarity(a, a), len(a)
        return float((matrix.sum() - np.trace(matrix)) / (n * (n - 1)))

    return within(x) + within(y) - 2 * float(similarity(x, y).mean())


def sliced_wasserstein(x: PyTree, reference: PyTree, key: Key, *, projections: int = 256) -> float:
    """Root mean squared 2-Wasserstein distance over random one-dimensional projections.

    Sees what a Frechet distance does not: shapes beyond mean and covariance.

    Args:
      x: (n, ...), flattened to (n, dim).
      reference: (m, ...), with the same dimensions; n and m may differ.
      key: random key for the directions.
      projections: number of directions.

    Returns:
      A float in units of x; 0 for equal sets.

    Raises:
      ValueError: no samples, or different dimensions.
    """
    expect_int(projections, "projections", at_least=1)
    sets = _sets(1, x=x, reference=reference)
    # float32 draws whatever the default, and a copy: NumPy's view of a JAX array is read-only
    drawn = jax.random.normal(key, (sets[0].shape[1], projections), jnp.float32)
    directions = np.array(drawn, np.float64)
    directions /= np.linalg.norm(directions, axis=0)
    # compare quantile functions on a common grid of midpoints
    count = max(len(sets[0]), len(sets[1]))
    levels = (np.arange(count) + 0.5) / count
    first, second = (_quantiles(np.sort(v @ directions, axis=0), levels) for v in sets)
    return float(np.sqrt(np.mean((first - second) ** 2)))


def _quantiles(ordered: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Linear interpolation between the midpoint quantiles of each sorted column."""
    place = np.clip(levels * len(ordered) - 0.5, 0, len(ordered) - 1)
    below = np.floor(place).astype(int)
    above = np.minimum(below + 1, len(ordered) - 1)
    part = (place - below)[:, None]
    return (1 - part) * ordered[below] + part * ordered[above]
