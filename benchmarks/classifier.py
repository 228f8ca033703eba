"""Small classifiers whose features measure samples, and the script that trains them.

    python benchmarks/classifier.py --name digits
    python benchmarks/classifier.py --name fashion --data fashion_mnist.npz

The features are the 64 activations before the last layer. A Frechet distance of them plays the part
that Inception's plays for photographs; it is comparable within one table only.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import unet
from flax import linen as nn

from diffsamp.models import digits
from diffsamp.models.digits import load_params, save_params


class Classifier(nn.Module):
    """Three convolutions and two dense layers; returns logits and features."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images (batch, height, width, channels) to (batch, 10) and (batch, 64)."""
        h = nn.gelu(unet.Conv(16)(x))
        h = nn.avg_pool(nn.gelu(unet.Conv(32)(h)), (2, 2), (2, 2))
        h = nn.avg_pool(nn.gelu(unet.Conv(64)(h)), (2, 2), (2, 2))
        h = nn.Dense(64)(h.reshape(h.shape[0], -1))
        return nn.Dense(10)(nn.gelu(h)), h


@jax.jit
def _features(params: Any, x: jax.Array) -> jax.Array:
    return Classifier().apply({"params": params}, x)[1]


@functools.cache
def features(name: str) -> Any:
    """samples -> (batch, 64) features of the classifier trained on a data set.

    Raises:
      FileNotFoundError: it has not been trained.
    """
    params = load_params(unet.WEIGHTS / f"classifier_{name}.safetensors")
    return functools.partial(_features, params)


def data_of(name: str, path: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a data set."""
    return digits.load_data() if name == "digits" else unet.load_data(name, str(path))


def main() -> None:
    """Trains on nine tenths, prints the accuracy on the rest, and writes the weights."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--name", choices=("digits", *unet.SETTINGS), required=True)
    parser.add_argument("--data", help="; ".join(f"{k}: {v}" for k, v in unet.DOWNLOADS.items()))
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    images, labels = data_of(arguments.name, arguments.data)
    order = np.random.default_rng(0).permutation(len(images))
    held, fitted = order[: len(order) // 10], order[len(order) // 10 :]
    net = Classifier()
    params = net.init(jax.random.key(0), jnp.asarray(images[:1]))["params"]
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, arguments.steps), weight_decay=0.02)
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any, key: jax.Array, x: jax.Array, y: jax.Array) -> Any:
        # a little noise, so that the features see samples that are not quite clean
        x = x + 0.1 * jax.random.normal(key, x.shape)

        def loss_of(params: Any) -> jax.Array:
            logits = net.apply({"params": params}, x)[0]
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        loss, gradient = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    rng = np.random.default_rng(1)
    for i in range(arguments.steps):
        at = fitted[rng.integers(0, len(fitted), 128)]
        key = jax.random.fold_in(jax.random.key(1), i)
        params, state, _ = step(
            params, state, key, jnp.asarray(images[at]), jnp.asarray(labels[at])
        )
    predicted = [
        np.asarray(net.apply({"params": params}, jnp.asarray(images[held[i : i + 500]]))[0])
        for i in range(0, len(held), 500)
    ]
    right = np.mean(np.concatenate(predicted).argmax(1) == labels[held])
    unet.WEIGHTS.mkdir(exist_ok=True)
    out = unet.WEIGHTS / f"classifier_{arguments.name}.safetensors"
    save_params(out, params)
    print(f"{arguments.name}: {right:.1%} right on {len(held)} held-out images; {out.name}")


if __name__ == "__main__":
    main()
