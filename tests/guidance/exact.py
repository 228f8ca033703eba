"""Exact networks for the tests of guidance: conditional Gaussians whose score is linear."""

import jax
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


def law(transform, tableau, dim, *, start=None, cond=None):
    """Exact mean and covariance of a chain whose every output is affine in the state.

    The transform is asked at the origin and the unit vectors, at all rows at once; the rows, of one
    state and one output each, are then multiplied out.
    """
    assert tableau.p == tableau.q == 1
    level = ds.predictions.Level(*(v[:-1] for v in (tableau.times, tableau.alpha, tableau.sigma)))
    bound = transform.bind(level, (tableau.target[:, 0], tableau.target[:, 1]))
    points = jnp.concatenate([jnp.zeros((1, dim)), jnp.eye(dim)])

    def ask(one):
        return transform.predict(points, one, cond)

    told = np.asarray(jax.jit(jax.vmap(ask))(jax.tree.map(jnp.asarray, bound)))
    offset, slope = told[:, 0], np.swapaxes(told[:, 1:] - told[:, :1], 1, 2)
    scale = float(tableau.sigma[0])
    mean, cov = (np.zeros(dim), scale**2 * np.eye(dim)) if start is None else start
    for n in range(tableau.rows):
        total = tableau.a[n, 0] * np.eye(dim) + tableau.b[n, 0] * slope[n]
        mean = total @ mean + tableau.b[n, 0] * offset[n]
        cov = total @ cov @ total.T + tableau.c[n] ** 2 * np.eye(dim)
    return mean, cov
