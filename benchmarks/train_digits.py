"""Trains the packaged diffusion model of 8x8 handwritten digits.

    python benchmarks/train_digits.py

takes about five minutes on two CPU cores and rewrites `diffsamp/models/digits.safetensors`, from
scikit-learn's `load_digits` alone. `_training.py` has the objective.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
from _training import Network, parse, parser, train

from diffsamp.models import digits

_WEIGHTS = Path(digits.__file__).with_name("digits.safetensors")


def _init(key: jax.Array) -> dict:
    x = jnp.zeros((1, *digits.IMAGE_SHAPE))
    network = digits.DigitsTransformer()
    return network.init(key, x, jnp.zeros((1,)), jnp.zeros((1,), jnp.int32))["params"]


def main() -> None:
    """Parses the command line and trains."""
    args = parse(parser(__doc__, "train_digits", _WEIGHTS, steps=6000))
    network = Network(_init, digits.apply, digits.SIGMA_DATA, digits.NUM_CLASSES)
    train(network, *digits.load_data(), args)


if __name__ == "__main__":
    main()
