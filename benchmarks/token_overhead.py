"""What a row of a discrete sampler costs over a jitted call of its network.

    python benchmarks/token_overhead.py

`discrete.sample` against as many jitted calls of the network as it makes, each waiting for the one
before, and against calls that draw their tokens by `jax.random.categorical`, too. All are warmed
up and run in turn in one process, and the fastest of each counts. Networks: the bundled masked
digits, and a plain transformer of 64 tokens with random weights. Writes
`results/token_overhead.md`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _report import RESULTS, heading, table
from _timing import fastest

from diffsamp import discrete
from diffsamp.models import masked_digits

COPIES = 3  # of the calls, compiled apart: how far they lie apart is noise
LENGTH, WIDTH, DEPTH, HEADS, VOCABULARY = 128, 128, 4, 4, 64


def transformer(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
    """A plain pre-norm transformer of tokens."""
    h = params["token"][x] + params["place"] + t[:, None, None] * params["time"]
    for block in params["blocks"]:
        qkv = (_norm(h) @ block["qkv"]).reshape(*x.shape, 3, HEADS, -1)
        mixed = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        h = h + mixed.reshape(h.shape) @ block["out"]
        h = h + jax.nn.gelu(_norm(h) @ block["up"], approximate=True) @ block["down"]
    return _norm(h) @ params["logits"]


def _norm(h: jax.Array) -> jax.Array:
    mean = jnp.mean(h, -1, keepdims=True)
    variance = jnp.mean((h - mean) ** 2, -1, keepdims=True)
    return (h - mean) * jax.lax.rsqrt(variance + 1e-5)


def transformer_params() -> dict[str, Any]:
    """Random weights of `transformer`."""
    rng = np.random.default_rng(0)

    def matrix(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) / math.sqrt(shape[0])).astype(np.float32)

    shapes = {"qkv": 3 * WIDTH, "out": WIDTH, "up": 4 * WIDTH}
    return {
        "token": matrix(VOCABULARY + 1, WIDTH),
        "place": matrix(LENGTH, WIDTH),
        "time": matrix(WIDTH),
        "blocks": [
            {k: matrix(WIDTH, n) for k, n in shapes.items()} | {"down": matrix(4 * WIDTH, WIDTH)}
            for _ in range(DEPTH)
        ],
        "logits": 3 * matrix(WIDTH, VOCABULARY),
    }


def samplers(length: int) -> dict[str, tuple[discrete.Rows, str]]:
    """Rows and order, by name."""
    cosine = discrete.ancestral("cosine", 16)
    return {
        "ancestral": (cosine, "random"),
        "maskgit": (discrete.maskgit(length, 16), "sampled"),
        "remdm": (discrete.remdm(cosine, 0.05), "random"),
        "threshold": (discrete.threshold(length, 0.5), "max"),
        "uniform": (discrete.uniform("cosine", 16), "random"),
    }


def calls(network: discrete.TokenFn, x: jax.Array, number: int, draws: bool) -> Callable[[], Any]:
    """() -> tokens after so many jitted calls of the network; `draws`: each draws tokens."""

    @jax.jit
    def one(params: Any, x: jax.Array, t: jax.Array, key: jax.Array) -> jax.Array:
        logits = network.apply(params, x, t)
        # whatever it says is needed, and the next call waits for it
        drawn = jax.random.categorical(key, logits) if draws else jnp.int32(0)
        return jnp.where(logits[..., 0] > 1e30, drawn.astype(x.dtype), x)

    times = [jnp.full(x.shape[0], t, jnp.float32) for t in np.linspace(1, 0, number)]
    keys = list(jax.random.split(jax.random.key(0), number))

    def run() -> jax.Array:
        state = x
        for t, key in zip(times, keys, strict=True):
            state = one(network.params, state, t, key)
        return state

    return run


def sampled(
    network: discrete.TokenFn, rows: discrete.Rows, x: jax.Array, key: jax.Array, order: str
) -> Callable[[], Any]:
    """() -> tokens of `discrete.sample`, in a `jit`."""
    whole = jax.jit(lambda n, x, k: discrete.sample(n, rows, x, key=k, order=order))
    return lambda: whole(network, x, key)


def measure(network: discrete.TokenFn, x: jax.Array, seconds: float, only: list[str]) -> list[Any]:
    """A row of the table for each sampler."""
    rows, key = [], jax.random.key(1)
    for name, (made, order) in samplers(x.shape[1]).items():
        if name not in only:
            continue
        first = discrete.run(network, made, x, key=key, order=order)
        number = int(jnp.max(first.evaluations))
        functions = {f"calls {i}": calls(network, x, number, False) for i in range(COPIES)}
        functions["drawing"] = calls(network, x, number, True)
        functions["sample"] = sampled(network, made, x, key, order)
        times = fastest(functions, seconds, rounds=5)
        bare = [v for k, v in times.items() if k.startswith("calls")]
        middle = float(np.median(bare))
        rows.append(
            [
                f"`{name}`",
                str(number),
                f"{middle * 1e3 / number:.2f}",
                f"{min(bare) / middle:.3f} to {max(bare) / middle:.3f}",
                f"{times['drawing'] / middle:.3f}",
                f"{times['sample'] / middle:.3f}",
            ]
        )
        print(*rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each line of the tables")
    parser.add_argument("--samplers", nargs="+", default=list(samplers(8)))
    parser.add_argument("--networks", nargs="+", default=["digits", "transformer"])
    parser.add_argument("--out", default=str(RESULTS / "token_overhead.md"))
    arguments = parser.parse_args()
    digits = masked_digits.load_masked_digits_model
    networks = {
        "digits": ("Masked digits: 64 tokens of 4 values", digits, masked_digits.LENGTH),
        "transformer": (
            f"A transformer: {LENGTH} tokens of {VOCABULARY} values, width {WIDTH}, {DEPTH} layers",
            lambda: discrete.TokenFn(transformer, transformer_params(), VOCABULARY),
            LENGTH,
        ),
    }
    text = heading("Overhead of discrete samplers over jitted calls of the network")
    text += (
        f"\nTime of `discrete.sample` in a `jit`, {arguments.batch} samples, over as many jitted "
        "calls of the network as it makes; drawing: calls that draw tokens, too. The fastest of "
        f"alternating runs. The calls are the median of {COPIES} copies, compiled apart; how far "
        "they lie apart is what a ratio here can be wrong by.\n"
    )
    head = ["sampler", "calls", "a call, ms", "copies of the calls", "drawing", "`sample`"]
    for name in arguments.networks:
        title, make, length = networks[name]
        network = jax.tree.map(jnp.asarray, make())
        x = jnp.full((arguments.batch, length), network.mask)
        found = measure(network, x, arguments.seconds, arguments.samplers)
        text += f"\n{title}.\n\n" + table(head, found)
    with open(arguments.out, "w", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    main()
