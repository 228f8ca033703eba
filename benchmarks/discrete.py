"""Samplers of the bundled masked digits by quality against evaluations: a table and a plot.

    python benchmarks/discrete.py

Writes `results/discrete.md`, `docs/plots/discrete.png` and `docs/plots/discrete_samples.png`. Class
accuracy: how often the nearest image of the data has the class that was asked for. Nats: the
model's own loss of the samples, one token after another in random order, per token; those of the
data are given beside it; nats far below them are a lack of variety.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from _report import RESULTS, heading, table

from diffsamp import discrete, plot
from diffsamp.models import masked_digits

COUNT, LENGTH = 128, masked_digits.LENGTH
BUDGETS = (2, 4, 8, 16, 32, 64)
NETWORK = masked_digits.load_masked_digits_model()
TOKENS, LABELS = masked_digits.load_tokens()
CLASSES = jnp.arange(COUNT, dtype=jnp.int32) % 10
COND = {"label": CLASSES}
START = jnp.full((COUNT, LENGTH), NETWORK.mask)
PLOTS = RESULTS.parent.parent / "docs" / "plots"


def accuracy(x: jax.Array) -> float:
    """Of the asked class, by the nearest image of the data."""
    distance = ((np.asarray(x)[:, None] - TOKENS[None]) ** 2).sum(axis=2)
    return float(np.mean(LABELS[np.argmin(distance, axis=1)] == np.asarray(CLASSES)))


@jax.jit
def _chain(x: jax.Array, label: jax.Array, key: jax.Array) -> jax.Array:
    rank = jnp.argsort(jax.random.uniform(key, x.shape), axis=1)

    def body(total: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        told = NETWORK(jnp.where(rank >= i, NETWORK.mask, x), jnp.zeros(()), {"label": label})
        said = jnp.take_along_axis(told, x[..., None], axis=2)[..., 0]
        return total - jnp.sum(jnp.where(rank == i, said, 0), axis=1), None

    total, _ = jax.lax.scan(body, jnp.zeros(x.shape[0]), jnp.arange(LENGTH))
    return jnp.mean(total) / LENGTH


def nats(x: jax.Array, label: jax.Array = CLASSES) -> float:
    """Per token, by the model itself."""
    return float(_chain(jnp.asarray(x), label, jax.random.key(9)))


def main() -> None:
    """Measures and writes."""
    fit = np.random.default_rng(0).choice(len(TOKENS), 256, replace=False)
    curve = discrete.token_entropies(
        NETWORK, TOKENS[fit], key=jax.random.key(5), cond={"label": jnp.asarray(LABELS[fit])}
    )
    ways: dict[str, tuple[Callable[[int], discrete.Rows], str]] = {
        "ancestral, linear": (lambda n: discrete.ancestral("linear", n), "random"),
        "ancestral, cosine": (lambda n: discrete.ancestral("cosine", n), "random"),
        "counts, cosine": (lambda n: discrete.parallel(LENGTH, n, law="cosine"), "random"),
        "counts, found": (
            lambda n: discrete.parallel(LENGTH, n, law=discrete.best_counts(curve, n)),
            "random",
        ),
        "max, cosine": (lambda n: discrete.parallel(LENGTH, n, law="cosine"), "max"),
        "max, found": (
            lambda n: discrete.parallel(LENGTH, n, law=discrete.best_counts(curve, n)),
            "max",
        ),
        "entropy, cosine": (lambda n: discrete.parallel(LENGTH, n, law="cosine"), "entropy"),
        "margin, cosine": (lambda n: discrete.parallel(LENGTH, n, law="cosine"), "margin"),
        "maskgit": (lambda n: discrete.maskgit(LENGTH, n), "sampled"),
        "remasked": (
            lambda n: discrete.remdm(discrete.ancestral("cosine", n), 0.05),
            "random",
        ),
    }
    found, pictures = {}, {}
    for name, (make, order) in ways.items():
        for n in BUDGETS:
            rows = make(n).pad(LENGTH)  # one program for all
            x = discrete.sample(NETWORK, rows, START, key=jax.random.key(1), order=order, cond=COND)
            found[name, n] = accuracy(x), nats(x)
            if n == 8:
                pictures[name] = np.asarray(x[:10])
        print(name, [f"{a:.2f} {b:.3f}" for a, b in (found[name, n] for n in BUDGETS)], flush=True)
    for name, rows, order in (
        ("threshold 0.9", discrete.threshold(LENGTH, 0.9), "max"),
        ("entropy bounded 0.5", discrete.entropy_bounded(LENGTH, 0.5), "entropy"),
    ):
        run = discrete.run(NETWORK, rows, START, key=jax.random.key(1), order=order, cond=COND)
        calls = float(jnp.mean(run.evaluations))
        found[name, 0] = accuracy(run.x), nats(run.x)
        ways[f"{name} ({calls:.1f} evaluations)"] = ways["maskgit"]
        found[f"{name} ({calls:.1f} evaluations)", 0] = found[name, 0]
    data = nats(jnp.asarray(TOKENS[fit]), jnp.asarray(LABELS[fit]))
    body = [
        [name, *(f"{found[name, n][0]:.2f}, {found[name, n][1]:.3f}" for n in BUDGETS)]
        for name in ways
        if (name, BUDGETS[0]) in found
    ]
    others = [
        [name, f"{a:.2f}, {b:.3f}"] for (name, n), (a, b) in found.items() if n == 0 and "(" in name
    ]
    text = [
        heading("Masked digits: samplers by evaluations"),
        f"Class accuracy, and nats per token of {COUNT} samples under the model itself; the data's "
        f"own are {data:.3f}.\n",
        table(["rows", *map(str, BUDGETS)], body),
        "\nAs many evaluations as they need, per sample:\n",
        table(["sampler", "accuracy, nats"], others),
    ]
    (RESULTS / "discrete.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    names = [row[0] for row in body]
    panels = [
        (title, label, {name: [(n, found[name, n][k]) for n in BUDGETS] for name in names}, level)
        for k, title, label, level in (
            (0, "images of the class asked for", "class accuracy", None),
            (1, "under the model (dashed: the data)", "nats per token", data),
        )
    ]
    plot.save(plot.error_against_nfe(panels, log=False), PLOTS / "discrete.png")
    rows = [(name, x.reshape(10, 8, 8, 1)) for name, x in pictures.items()]
    plot.save(plot.image_grid(rows, limits=(0, 3)), PLOTS / "discrete_samples.png")


if __name__ == "__main__":
    main()
