"""Exact networks for the tests of guidance: conditional Gaussians whose score is linear."""

import jax.numpy as jnp
import numpy as np

import diffsamp as ds
from diffsamp import schedules


def gaussian_apply(params, x, t, label, extra=None):
    """Data N(means[label], variances[label]) elementwise; `params` holds the process too."""
    means, variances, process = params
    alpha, sigma = process.alpha(t), process.sigma(t)
    mean, variance = (jnp.asarray(v, x.dtype)[label] for v in (means, variances))
    gain = alpha * variance / (alpha**2 * variance + sigma**2)
    column = (-1,) + (1,) * (x.ndim - 1)
    data = mean.reshape(column) + gain.reshape(column) * (x - (alpha * mean).reshape(column))
    return data if extra is None else data + extra


def gaussians(means, variances, process):
    """A network with one class per pair of a mean and a variance, in data prediction."""
    params = (np.asarray(means, float), np.asarray(variances, float), process)
    return ds.ScoreFn(gaussian_apply, params, process, prediction="data")


def labels(size, value):
    return jnp.full(size, value, jnp.int32)


def build(name, process, n=8, **options):
    return ds.solvers.get(name)(process, schedules.logsnr(process, n), **options)
