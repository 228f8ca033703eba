"""How many tokens of the masked digits to unmask in each row: searched against the cosine.

    python benchmarks/unmasking.py

Bits per token of held-out digits under the law of the rows, by `search.unmasking`, for a random
order and for the network's own. Writes `results/unmasking.md`.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from _report import RESULTS, heading, table

import diffsamp as ds
from diffsamp.models import masked_digits

BUDGETS = (4, 8, 16)


def row(found: ds.search.Unmasking) -> list[str]:
    """Bits per token, and how many fewer than with the cosine's counts."""
    unit = np.log(2)
    cells = [
        f"{found.nats[n] / unit:.4f} ({(found.cosine[n] - found.nats[n]) / unit:.4f} +- "
        f"{found.deviation[n] / unit:.4f})"
        for n in BUDGETS
    ]
    return [found.order, *cells]


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--orders", nargs="+", default=["random", "max"])
    parser.add_argument("--fit", type=int, default=400, help="images that are searched on")
    parser.add_argument("--moves", type=int, default=4, help="as for the search")
    arguments = parser.parse_args()
    network = masked_digits.load_masked_digits_model()
    tokens, labels = masked_digits.load_tokens()
    chosen = np.random.default_rng(0).permutation(len(tokens))[: 3 * arguments.fit]
    several = []
    for order in arguments.orders:
        found = ds.search.unmasking(
            network,
            tokens[chosen],
            nfe=BUDGETS,
            key=jax.random.key(6),
            order=order,
            cond={"label": jnp.asarray(labels[chosen])},
            held_out=2 * arguments.fit,
            moves=arguments.moves,
        )
        print(found, flush=True)
        several.append(found)
    counts = [[f.order, *(str(f.counts(n).tolist()) for n in BUDGETS)] for f in several]
    spent = "; ".join(f"{f.order} {f.evaluations:,} in {f.seconds:.0f} s" for f in several)
    text = [
        heading("Masked digits: how many tokens a row"),
        f"Bits per token of {2 * arguments.fit} held-out digits under the law of the rows (for the "
        "random order a bound), and in brackets how many fewer than with the cosine's counts in as "
        f"many rows, with its standard error. Searched on {arguments.fit} others.\n",
        table(["order", *(f"{n} evaluations" for n in BUDGETS)], [row(f) for f in several]),
        "\nTokens that each row unmasks:\n",
        table(["order", *map(str, BUDGETS)], counts),
        f"\nEvaluations, those of the report included: {spent}, on a machine that others used.",
    ]
    (RESULTS / "unmasking.md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
