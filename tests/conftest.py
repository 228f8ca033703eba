"""Test settings: strict dtypes and ranks, warnings as errors, two CPU devices."""

import gc
from pathlib import Path

import jax
import pytest

# with 64-bit arrays networks of float32 weights meet inputs of float64, as a user's would
PROMOTION = "standard" if jax.config.jax_enable_x64 else "strict"
jax.config.update("jax_numpy_dtype_promotion", PROMOTION)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_platforms", "cpu")


@pytest.fixture
def x64():
    """Run one test with 64-bit JAX arrays."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def _programs_leave():
    """Drop compiled programs before their mappings of memory reach the system's limit.

    Each holds some; Linux allows a process 65,530, and the compiler crashes beyond.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 20_000:
        jax.clear_caches()
        gc.collect()
