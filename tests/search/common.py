"""What the tests of the search have in common."""

import jax
import numpy as np

import diffsamp as ds

PROCESS = ds.processes.edm(0.02, 20.0)


def start(n, seed=0):
    """Starts in four dimensions."""
    return PROCESS.prior_sample(jax.random.key(seed), (n, 4))


def mixture():
    """A skewed mixture of three components in four dimensions."""
    rng = np.random.default_rng(3)
    return ds.targets.gaussian_mixture(
        [0.5, 0.3, 0.2], rng.normal(size=(3, 4)) * 0.8, np.array([0.02, 0.05, 0.1])
    )
