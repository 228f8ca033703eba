"""The pictures of docs/pictures.md, one of every function of `ds.plot`, on the bundled network.

python benchmarks/gallery.py    # a minute
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from _report import RESULTS

import diffsamp as ds
from diffsamp import plot, search
from diffsamp.models import digits

PLOTS = RESULTS.parent.parent / "docs" / "plots"


def main() -> None:
    """Draw them all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plots", type=Path, default=PLOTS)
    out = parser.parse_args().plots
    network = digits.load_digits_model()
    process = network.process
    data, _ = digits.load_data()
    x_T = process.prior_sample(jax.random.key(0), (32, *digits.IMAGE_SHAPE))
    cond = {"label": jnp.arange(32) % 10}
    plans = {int(p.stem.split("-")[1]): search.Plan.load(p) for p in RESULTS.glob("plans/digits-*")}

    sampler = ds.sampler(network, "unipc3", nfe=12).tableau
    run = ds.trajectory(network, sampler, x_T, cond=cond)
    plot.save(plot.trajectory(run, samples=2, outputs=True), out / "gallery_trajectory.png")

    grids = {n: ds.schedules.get(n)(process, 8) for n in ("logsnr", "karras", "kl_optimal")}
    grids["found"] = plans[8].tableau.times
    plot.save(plot.schedule(process, grids), out / "gallery_schedule.png")
    plot.save(plot.tableau(plans[6].tableau), out / "gallery_tableau.png")

    table = search.compare(
        network,
        x_T,
        nfe=(4, 5, 6, 8, 10, 15, 20),
        solver=("ddim", "dpmpp_2m", "ipndm3", "unipc3"),
        schedule=("logsnr", "karras", "kl_optimal"),
        cond=cond,
    )
    marks = {}
    for nfe, plan in plans.items():
        x = search.run(network, plan.tableau, x_T, cond=cond)
        marks[nfe] = (nfe, float(ds.metrics.psnr(x, table.reference)), None)
    figure = plot.comparison(table, marks={"found": [marks[n] for n in sorted(marks)]})
    plot.save(figure, out / "gallery_comparison.png")
    plot.save(plot.front(plans), out / "gallery_front.png")

    rows = [("ODE solution", np.asarray(table.reference)[:10])]
    chosen = {"label": cond["label"][:10]}
    best = table.best(4)
    for name, made in (("found, 4", plans[4].tableau), (f"{best.solver}, 4", best.tableau)):
        rows.append((name, np.asarray(ds.sample(network, made, x_T[:10], cond=chosen))))
    plot.save(plot.image_grid(rows), out / "gallery_image_grid.png")

    truth = jnp.asarray(data[::180][:8])
    coarse = ds.inverse.downsample(2)
    y = coarse(truth) + 0.05 * jax.random.normal(jax.random.key(1), (8, 4, 4, 1))
    times = ds.schedules.logsnr(process, 30)
    posterior = ds.guidance.measurement(network, coarse, y, noise=0.05)
    projected, noisy = ds.inverse.ddnm(network, coarse, y, times)
    free, start = {"label": jnp.full(8, 10)}, x_T[:8]
    key = jax.random.key(2)
    found = {
        "ddnm": ds.sample(projected, noisy, start, key=key, cond=free),
        "measurement": ds.sample(
            posterior, ds.solvers.ddpm(process, times), start, key=key, cond=free
        ),
    }
    plot.save(plot.inverse(truth, y, found), out / "gallery_inverse.png")


if __name__ == "__main__":
    main()
