"""What the tests of plans elsewhere have in common."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from cases import CASES

import diffsamp as ds
from diffsamp._core import random

PROCESSES = {
    "noise": ds.processes.vp_discrete("scaled_linear"),
    "v": ds.processes.vp_cosine(),
    "velocity": ds.processes.flow(),
    "edm_f": ds.processes.edm(0.02, 20.0),
    "data": ds.processes.edm(0.02, 20.0),
    "score": ds.processes.ve(0.02, 20.0),
}
NFE = 7


@functools.cache
def network(prediction, dtype="float32"):
    """The exact network of a skewed mixture in three dimensions, on a process of its prediction."""
    rng = np.random.default_rng(3)
    target = ds.targets.gaussian_mixture(
        [0.5, 0.3, 0.2], rng.normal(size=(3, 3)) * 0.8, np.array([0.02, 0.05, 0.1])
    )
    score_fn = target.score_fn(PROCESSES[prediction], prediction)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), score_fn.params)
    return dataclasses.replace(score_fn, params=params)


@functools.cache
def tableau(name, prediction, most=16):
    """The registered solver with the fewest evaluations from NFE on that it can make."""
    process = PROCESSES[prediction]
    for nfe in range(NFE, most):
        try:
            return ds.sampler(network(prediction), name, nfe=nfe, schedule="logsnr").tableau
        except ValueError as error:
            last = error
    raise AssertionError(f"{name} on {process}: {last}")


def start(process, n=4, dtype=np.float32):
    return np.asarray(process.prior_sample(jax.random.key(5), (n, 3), dtype=dtype))


def noises(table, key, x):
    """(rows, ..) what `ds.sample` draws at each row."""
    keys = random.sample_keys(key, len(x))
    return np.stack([random.normal_like(keys, n, jnp.asarray(x)) for n in range(table.rows)])


def padded(prediction, names=None):
    """Every registered solver, in one shape: they share one program."""
    names = [case.name for case in CASES] if names is None else names
    tables = [tableau(name, prediction) for name in names]
    return dict(zip(names, ds.Tableau.pad_together(tables), strict=True))


def relative(got, want):
    """The largest difference in units of the largest number."""
    return float(np.abs(np.asarray(got) - np.asarray(want)).max() / np.abs(want).max())
