"""The picture of the README: samples of fixed and found samplers, and quality against evaluations.

python benchmarks/front.py

The samples are drawn anew, from the U-Net and the plan that are committed; the curves are those of
`results/search_digits.md` and `results/search_fashion.md`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import unet
from _report import RESULTS
from draw import PLOTS, read
from matplotlib.figure import Figure

import diffsamp as ds
from diffsamp import plot

NFE, LABELS, SEED = 4, (1, 3, 5, 7, 8, 9, 0, 4), 3
COLOURS = {"found by ds.search": "C1", "best of 1710 fixed": "C0"}
NETWORKS = {"fashion": "U-Net of Fashion-MNIST", "digits": "transformer of digits"}


def table(name: str) -> list[dict[str, str]]:
    """Rows of the table of what is found, by column."""
    tables = read(RESULTS / f"search_{name}.md")
    head, *rows = next(rows for title, rows in tables.items() if "what is found" in title)
    # the heading has a second, narrower table
    whole = [row for row in rows if len(row) == len(head) and row[0].isdigit()]
    # "distill" is the PSNR first, then the distance
    return [dict(reversed(list(zip(head, row, strict=True)))) for row in whole]


def samples() -> list[tuple[str, np.ndarray]]:
    """(label, pictures) of each sampler, from equal noise."""
    network = unet.load("fashion")
    process = network.process
    x_T = process.prior_sample(jax.random.key(SEED), (len(LABELS), 16, 16, 1))
    row = next(row for row in table("fashion") if row["NFE"] == str(NFE))
    solver, schedule = row["best fixed"].split(", ")
    plan = ds.search.Plan.load(RESULTS / "plans" / f"fashion-{NFE}.json")
    tableaux = {
        f"DDIM, Karras's times\n({NFE} evaluations)": ds.sampler(
            network, "ddim", nfe=NFE, schedule="karras"
        ).tableau,
        f"best of 1710 fixed\n({NFE} evaluations)": ds.sampler(
            network, solver, nfe=NFE, schedule=schedule
        ).tableau,
        f"found by ds.search\n({NFE} evaluations)": plan.tableau,
        "the ODE's solution\n(100 evaluations)": ds.solvers.dpmpp(
            process, ds.schedules.logsnr(process, 100), order=2
        ),
    }
    cond = {"label": jnp.asarray(LABELS)}
    return [
        (label, np.asarray(ds.sample(network, tableau, x_T, cond=cond)))
        for label, tableau in tableaux.items()
    ]


def picture() -> Any:
    """The samples on the left, one panel of curves per network on the right."""
    figure = Figure(figsize=(11.0, 3.2), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    left, *panels = figure.subfigures(1, 3, width_ratios=(2.15, 1, 1))
    rows = samples()
    axes = left.subplots(len(rows), len(LABELS), squeeze=False)
    for line, (label, images) in zip(axes, rows, strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image[..., 0], cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    left.suptitle("Samples of the U-Net, from the same noise", fontsize=10)
    for panel, (name, title) in zip(panels, NETWORKS.items(), strict=True):
        found = table(name)
        axis = panel.subplots()
        budgets = [int(row["NFE"]) for row in found]
        for (label, colour), column in zip(COLOURS.items(), ("distill", "PSNR"), strict=True):
            values = [float(row[column].strip("*")) for row in found]
            axis.plot(budgets, values, "o-", color=colour, label=label, markersize=4)
        axis.set(xlabel="network evaluations", xticks=budgets)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        if name == next(iter(NETWORKS)):
            axis.set_ylabel("PSNR to the solution, dB")
        else:
            axis.legend(fontsize=8, loc="lower right")
    return figure


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plots", type=Path, default=PLOTS)
    arguments = parser.parse_args()
    plot.save(picture(), arguments.plots / "front.png")


if __name__ == "__main__":
    main()
