"""Test settings: strict dtypes and ranks, warnings as errors, two CPU devices, quick programs."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

# Most of a test's time is the compiler's, and most of that goes into kernels that run once: these
# switches compile three times as fast. A flag that this jaxlib does not know would end the process,
# so it is tried in another one, once a run. DIFFSAMP_TESTS_OPTIMISED=1 compiles as users do.
_QUICK = "--xla_cpu_use_fusion_emitters=false"


def _known(flag: str) -> bool:
    program = "import jax; jax.jit(lambda x: x + 1)(1.0)"
    environment = os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    told = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True)
    return told.returncode == 0


_QUICKLY = not os.environ.get("DIFFSAMP_TESTS_OPTIMISED")
if _QUICKLY:
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # of the processes that tests start, too
    jax.config.update("jax_disable_most_optimizations", True)
    if "XLA_FLAGS" not in os.environ and _known(_QUICK):  # the workers inherit it
        os.environ["XLA_FLAGS"] = _QUICK

# with 64-bit arrays networks of float32 weights meet inputs of float64, as a user's would
PROMOTION = "standard" if jax.config.jax_enable_x64 else "strict"
jax.config.update("jax_numpy_dtype_promotion", PROMOTION)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_platforms", "cpu")

# a search for garbage goes through all that was ever compiled
gc.set_threshold(10_000, 20, 50)


@pytest.fixture
def x64():
    """Run one test with 64-bit JAX arrays."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def optimised():
    """With the compiler's passes, where the last bits matter: two programs that agree in them."""
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", _QUICKLY)


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
