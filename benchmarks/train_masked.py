"""Trains the packaged masked model of 8x8 digits in four grey levels.

    python benchmarks/train_masked.py

takes about four minutes on two CPU cores and rewrites `diffsamp/models/masked_digits.safetensors`,
from scikit-learn's `load_digits` alone: cross entropy of masked tokens, a uniform number of them
masked. A tenth of the images is held out.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffsamp.models import masked_digits
from diffsamp.models.digits import save_params

FILE = Path(masked_digits.__file__).with_name("masked_digits.safetensors")
MASK = masked_digits.LEVELS


def loss(params: dict, x: jax.Array, label: jax.Array, key: jax.Array) -> jax.Array:
    """Mean cross entropy of masked tokens, nats, over a uniform number of them."""
    count, order, drop = jax.random.split(key, 3)
    batch, length = x.shape
    m = jax.random.randint(count, (batch, 1), 1, length + 1)
    rank = jnp.argsort(jnp.argsort(jax.random.uniform(order, x.shape), axis=1), axis=1)
    masked = rank < m
    label = jnp.where(jax.random.uniform(drop, (batch,)) < 0.1, masked_digits.NUM_CLASSES, label)
    logits = masked_digits.apply(params, jnp.where(masked, MASK, x), jnp.zeros(batch), label)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, x)
    return jnp.mean(jnp.sum(jnp.where(masked, each, 0), axis=1) / m[:, 0])


def main() -> None:
    """Trains and writes the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", default=str(FILE))
    arguments = parser.parse_args()
    tokens, labels = masked_digits.load_tokens()
    order = np.random.default_rng(0).permutation(len(tokens))
    held, fit = order[: len(order) // 10], order[len(order) // 10 :]
    network = masked_digits.MaskedTransformer()
    params = network.init(jax.random.key(0), jnp.asarray(tokens[:1]), jnp.asarray(labels[:1]))
    params = params["params"]
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 200, arguments.steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.05)
    )
    state, mean = optimizer.init(params), params

    @jax.jit
    def step(params, mean, state, x, label, key):
        value, gradient = jax.value_and_grad(loss)(params, x, label, key)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return params, optax.incremental_update(params, mean, 0.002), state, value

    evaluate = jax.jit(functools.partial(loss))
    rng, began = np.random.default_rng(1), time.perf_counter()
    for i in range(1, arguments.steps + 1):
        index = rng.choice(fit, arguments.batch)
        x, label = jnp.asarray(tokens[index]), jnp.asarray(labels[index])
        # shifts by one pixel, as an augmentation
        dx, dy = rng.integers(-1, 2, 2)
        if rng.random() < 0.3:
            x = jnp.roll(x.reshape(-1, 8, 8), (dx, dy), (1, 2)).reshape(-1, 64)
        params, mean, state, value = step(params, mean, state, x, label, jax.random.key(i))
        if i % 500 == 0:
            keys = [jax.random.key(k) for k in range(10)]
            whole = jnp.asarray(tokens[held]), jnp.asarray(labels[held])
            out = np.mean([float(evaluate(mean, *whole, k)) for k in keys])
            seconds = time.perf_counter() - began
            print(f"{i} {float(value):.4f} held out {out:.4f} nats, {seconds:.0f} s", flush=True)
    mean = jax.tree.map(lambda v: np.asarray(v, np.float32), mean)
    save_params(arguments.out, mean)


if __name__ == "__main__":
    main()
