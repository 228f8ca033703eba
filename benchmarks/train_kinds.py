"""Trains the two small networks of `kinds.py`, which predict noise and velocity, on the digits.

    python benchmarks/train_kinds.py --kind noise
    python benchmarks/train_kinds.py --kind velocity --steps 2500 --batch 128

takes minutes on two CPU cores each and writes `weights/<kind>_digits.safetensors` beside this file,
from scikit-learn's `load_digits` alone. Levels are uniform in label or time; the loss is the plain
mean squared error of what the network predicts.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import kinds
from _training import RESULTS, Network, Objective, parse, parser, train

from diffsamp.models import digits

_UNSET = kinds.WEIGHTS


def _uniform(key: jax.Array, batch: int, args: argparse.Namespace, held_out: bool) -> jax.Array:
    """Stratified in [0, 1)."""
    del args, held_out
    return (jnp.arange(batch) + jax.random.uniform(key, (batch,))) / batch


def _noise_loss(
    network: Network,
    params: Any,
    images: jax.Array,
    labels: jax.Array,
    level: jax.Array,
    noise: jax.Array,
) -> jax.Array:
    """Squared error of the noise, at integer labels."""
    process = kinds.process_of("noise")
    t = jnp.floor(level * kinds.LEVELS)
    alpha, sigma = (f(t)[:, None, None, None] for f in (process.alpha, process.sigma))
    told = network.apply(params, alpha * images + sigma * noise, t, labels)
    return jnp.mean(jnp.square(told - noise), axis=(1, 2, 3))


def _velocity_loss(
    network: Network,
    params: Any,
    images: jax.Array,
    labels: jax.Array,
    level: jax.Array,
    noise: jax.Array,
) -> jax.Array:
    """Squared error of dx/dt = noise - image on the straight path."""
    t = level[:, None, None, None]
    told = network.apply(params, (1 - t) * images + t * noise, level, labels)
    return jnp.mean(jnp.square(told - (noise - images)), axis=(1, 2, 3))


_LOSSES = {"noise": _noise_loss, "velocity": _velocity_loss}


def main() -> None:
    """Parses the command line and trains."""
    made = parser(__doc__, "train_kinds", _UNSET, steps=4000)
    made.add_argument("--kind", choices=kinds.KINDS, required=True)
    args = parse(made)
    if args.out == _UNSET:
        args.out = kinds.WEIGHTS / f"{args.kind}_digits.safetensors"
    if args.log == RESULTS / "train_kinds.jsonl":
        args.log = RESULTS / f"train_{args.kind}.jsonl"
    objective = Objective(_uniform, _LOSSES[args.kind])
    network = Network(
        kinds.init,
        kinds.APPLY[args.kind],
        digits.SIGMA_DATA,
        digits.NUM_CLASSES,
        objective=objective,
    )
    train(network, *digits.load_data(), args)


if __name__ == "__main__":
    main()
