"""Two small networks of digits that are not EDM's: one predicts noise, one velocity.

So that no result of the benchmarks hangs on one parametrisation. `noise` is trained as DDPM was (Ho
et al. 2020, arXiv:2006.11239): the linear table of 1000 betas, whose integer labels are its time;
`velocity` on the straight path of flow matching (Lipman et al. 2023, arXiv:2210.02747). Both are
the transformer of `diffsamp.models.digits`, smaller. `train_kinds.py` trains them.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import diffsamp as ds
from diffsamp.models import digits
from diffsamp.models.digits import load_params

WEIGHTS = Path(__file__).resolve().parent / "weights"
LEVELS = 1000
KINDS = ("noise", "velocity")
_MODULE = digits.DigitsTransformer(width=48, depth=3, num_heads=4, mlp_width=128)
_SPAN = 2.7  # of the time that the transformer's features were made for


def _apply(
    scale: float, params: Any, x: jax.Array, t: jax.Array, label: jax.Array | None = None
) -> jax.Array:
    return _MODULE.apply({"params": params}, x, t * scale, label)


def _noise(params: Any, x: jax.Array, t: jax.Array, label: jax.Array | None = None) -> jax.Array:
    """The noise in x, (batch, 8, 8, 1), at labels t of 0 to 999, real ones too."""
    return _apply(_SPAN / LEVELS, params, x, t, label)


def _velocity(params: Any, x: jax.Array, t: jax.Array, label: jax.Array | None = None) -> jax.Array:
    """dx/dt at x, (batch, 8, 8, 1), and times t of 0 (data) to 1."""
    return _apply(_SPAN, params, x, t, label)


APPLY = {"noise": _noise, "velocity": _velocity}


def init(key: jax.Array) -> Any:
    """Fresh parameters, the same for both."""
    zeros = jnp.zeros((1, *digits.IMAGE_SHAPE)), jnp.zeros((1,)), jnp.zeros((1,), jnp.int32)
    return _MODULE.init(key, *zeros)["params"]


@functools.cache
def process_of(kind: str) -> ds.Process:
    """The process that a kind is trained on."""
    return ds.processes.vp_discrete("linear") if kind == "noise" else ds.processes.flow()


def load(kind: str) -> ds.ScoreFn:
    """The trained network of a kind, with `cond` {"label": (batch,)}.

    Raises:
      FileNotFoundError: there are no weights; train them with `train_kinds.py`.
    """
    params = load_params(WEIGHTS / f"{kind}_digits.safetensors")
    return ds.ScoreFn(APPLY[kind], params, process_of(kind), prediction=kind)
