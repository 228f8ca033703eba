"""Transforms are pytrees: passed into `jit` they give what they give outside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from guidance.exact import build

import diffsamp as ds
from diffsamp import guidance, inverse, schedules

PROCESS = ds.processes.vp_linear()
NETWORK = ds.targets.gaussian([0.0, 0.0], [[1.0, 0.8], [0.8, 1.0]]).score_fn(PROCESS, "noise")
KEY = jax.random.key(0)
Y, MASK = np.ones((2, 2), np.float32), np.array([1.0, 0.0])


def misfit(data, level, cond):
    del level, cond
    return 0.5 * (data[:, 0] - 1.0) ** 2


def made(name, rows):
    """(transform, tableau)."""
    seen, times = inverse.mask(MASK), schedules.logsnr(PROCESS, 3)
    loss, measurement = guidance.loss, guidance.measurement
    table = ([-1.0, 0.0, 1.0], np.zeros((3, 2)))
    return {
        "loss": lambda: loss(NETWORK, misfit, 0.3),
        "loss, data": lambda: loss(NETWORK, misfit, 0.3, through="data", spread=0.7),
        "loss, draws": lambda: loss(NETWORK, misfit, 0.3, samples=2, spread=0.7, key=KEY),
        "dps": lambda: guidance.dps(NETWORK, rows, misfit, 0.3),
        "tfg": lambda: guidance.tfg(NETWORK, misfit, rows, 0.02, 0.01),
        "tfg, data": lambda: guidance.tfg(NETWORK, misfit, rows, 0.0, 0.01, smooth=0.1, key=KEY),
        "measurement": lambda: measurement(NETWORK, seen, Y, 0.3),
        "isotropic": lambda: measurement(NETWORK, seen, Y, 0.3, covariance="isotropic", spread=0.7),
        "diffpir": lambda: inverse.diffpir(NETWORK, seen, Y, 0.3, times),
        "ddnm": lambda: inverse.ddnm(NETWORK, seen, Y, times),
        "inpaint": lambda: guidance.inpaint(NETWORK, Y, MASK, rows),
        "omegance": lambda: guidance.omegance(NETWORK, 1.02),
        "thresholding": lambda: guidance.dynamic_thresholding(NETWORK),
        "calibrate": lambda: guidance.calibrate(NETWORK, table),
        "first_answer": lambda: guidance.first_answer(NETWORK, "linear"),
    }[name]()


FEW = ("loss, data", "tfg, data", "isotropic", "diffpir")
REST = (
    "loss",
    "loss, draws",
    "dps",
    "tfg",
    "measurement",
    "ddnm",
    "inpaint",
    "omegance",
    "thresholding",
    "calibrate",
    "first_answer",
)


@pytest.mark.parametrize("name", [*FEW, *(pytest.param(n, marks=pytest.mark.long) for n in REST)])
def test_as_an_argument(name):
    rows, x_T = build("ddim", PROCESS, 3), jnp.array([[0.3, -0.5], [1.0, 2.0]], jnp.float32)
    found = made(name, rows)
    transform, rows = found if isinstance(found, tuple) else (found, rows)
    inside = jax.jit(lambda t: ds.sample(t, rows, x_T, key=KEY))(transform)
    outside = ds.sample(transform, rows, x_T, key=KEY)
    np.testing.assert_allclose(inside, outside, rtol=2e-6, atol=1e-6)
