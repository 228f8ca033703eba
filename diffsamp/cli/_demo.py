"""`diffsamp demo`: the whole library on the bundled network, in a minute."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import diffsamp as ds
from diffsamp._core.types import Key, PyTree, Value

__all__ = ["BUDGETS", "demo"]

_DEMO_SOLVERS = (
    "ddim",
    "dpmpp_2m",
    "ipndm3",
    "unipc2",
    "unipc3",
)
BUDGETS = (4, 5, 6, 8, 10, 20)
_BATCH = 128  # on two cores the fastest, by half against 1024: it stays in the cache


def demo(arguments: argparse.Namespace) -> int:
    """Sample the bundled digits model with many solvers, then search for a better one."""
    from diffsamp import plot
    from diffsamp.models import digits

    began = time.perf_counter()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    score_fn = digits.load_digits_model()
    process = score_fn.process
    data, data_labels = digits.load_data()
    print(
        f"Bundled model: a class-conditional transformer of "
        f"{sum(leaf.size for leaf in jax.tree.leaves(score_fn.params)):,} parameters, trained on "
        f"{len(data)} handwritten digits ({process})."
    )
    key_table, key_fit, key_order = jax.random.split(jax.random.key(arguments.seed), 3)

    def start(key: Key, n: int) -> tuple[Value, dict[str, Value]]:
        # labels in the proportions of the data, so that the sets can be compared
        labels = jnp.asarray(data_labels[np.arange(n) % len(data_labels)])
        return process.prior_sample(key, (n, *digits.IMAGE_SHAPE)), {"label": labels}

    def distance(x: PyTree, _: Value = None) -> float:
        return ds.metrics.frechet_distance(x, data)

    bar = ds.ProgressBar()
    x_T, cond = start(key_table, arguments.samples)
    table = ds.search.compare(
        score_fn,
        x_T,
        nfe=BUDGETS,
        solver=_DEMO_SOLVERS,
        schedule=("karras", "logsnr"),
        cond=cond,
        scores={"distance": distance},
        batch=_BATCH,
        progress=bar,
    )
    print(
        "\nPSNR (dB) to the ODE's solution at equal noise / Frechet distance to the real digits, "
        f"{arguments.samples} samples; * best at this NFE"
    )
    print(table.table(score="distance"))
    odd, even = data[1::2], data[::2]
    print(
        f"Frechet distance of the ODE's own solution {distance(table.reference):.2f}; between two "
        f"halves of the data {ds.metrics.frechet_distance(odd, even):.2f}."
    )

    nfe = arguments.nfe
    print(f"\nSearching for {nfe} evaluations: least squares, then Gauss-Newton steps ...")
    x_fit, cond_fit = start(key_fit, 64)
    options: dict[str, PyTree] = {"key": key_order, "cond": cond_fit, "progress": bar}
    searched = time.perf_counter()
    fitted = ds.search.regress(score_fn, x_fit, nfe=nfe, **options)
    plan = ds.search.refine(score_fn, fitted.tableau, x_fit, iterations=arguments.steps, **options)
    seconds = time.perf_counter() - searched
    spent = sum(one.settings["evaluations"] for one in (fitted, plan))
    held = plan.psnr["held_out"]
    found = ds.search.run(score_fn, plan.tableau, x_T, cond=cond, batch=_BATCH)
    found_psnr = float(ds.metrics.psnr(found, table.reference))
    best_any = table.best(nfe)
    print(
        f"Held-out noise: {held['start']:.1f} dB, then {held['found']:.1f} dB, in {seconds:.0f} s "
        f"and {spent:,} evaluations.\n"
        f"On the table's noise: {best_any.psnr:.1f} dB (best fixed, {best_any.solver} on "
        f"{best_any.schedule}) -> {found_psnr:.1f} dB; Frechet distance "
        f"{best_any.scores['distance']:.2f} -> {distance(found):.2f}."
    )
    matched = [n for n in BUDGETS if table.best(n).psnr >= found_psnr]
    print(
        f"The best fixed sampler needs {matched[0]} evaluations for that."
        if matched
        else f"No fixed sampler reaches that with {BUDGETS[-1]} evaluations."
    )

    files = {
        "tableau": out / f"digits-{nfe}.json",
        "samples": out / "samples.png",
        "plot": out / "quality_against_nfe.png",
    }
    plan.tableau.save(files["tableau"])
    show = np.array([int(np.flatnonzero(np.asarray(cond["label"]) == d)[0]) for d in range(10)])
    ddim = table.best(nfe, where=lambda entry: entry.solver == "ddim")
    rows = [("data", data[show]), ("ODE solution", np.asarray(table.reference)[show])]
    for label, tableau in (
        (f"found, {nfe} NFE", plan.tableau),
        (f"{best_any.solver}, {nfe} NFE", best_any.tableau),
        (f"ddim, {nfe} NFE", ddim.tableau),
    ):
        x = ds.search.run(score_fn, tableau, x_T[show], cond={"label": cond["label"][show]})
        rows.append((label, np.asarray(x)))
    plot.save(plot.image_grid(rows, title="One noise per column, class 0 to 9"), files["samples"])
    figure = plot.comparison(
        table,
        marks={"found": [(nfe, found_psnr, distance(found))]},
        score="distance",
        score_label="Frechet distance to data",
    )
    plot.save(figure, files["plot"])
    bar.close()
    print("\nWrote " + ", ".join(str(path) for path in files.values()))
    print(f"Done in {time.perf_counter() - began:.0f} s.")
    return 0
