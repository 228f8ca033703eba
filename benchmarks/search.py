"""What `distill` gains over the best fixed solver and schedule, and what it costs.

    python benchmarks/search.py

On the bundled digits network, at each budget: the best of the whole registry on every schedule
(chosen on the fitting noise), the sampler distilled from it, and both on noise that neither has
seen; the Frechet distance to real digits beside.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from _report import RESULTS, heading, table

import diffsamp as ds
from diffsamp.models import digits


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nfe", type=int, nargs="+", default=[4, 5, 6, 8, 10])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--starts", type=int, default=512, help="noises to fit, a quarter held out")
    parser.add_argument("--fresh", type=int, default=1797, help="noises to report on")
    parser.add_argument("--out", default=str(RESULTS / "search.md"))
    arguments = parser.parse_args()

    score_fn = digits.load_digits_model()
    process = score_fn.process
    data, data_labels = digits.load_data()
    key_fit, key_fresh, key_order = jax.random.split(jax.random.key(0), 3)

    def start(key: jax.Array, n: int) -> tuple[jax.Array, dict[str, jax.Array]]:
        labels = jnp.asarray(data_labels[np.arange(n) % len(data_labels)])
        return process.prior_sample(key, (n, *digits.IMAGE_SHAPE)), {"label": labels}

    x_fit, cond_fit = start(key_fit, arguments.starts)
    x_fresh, cond_fresh = start(key_fresh, arguments.fresh)
    fine = ds.search.reference_tableau(process)
    reference = ds.search.run(score_fn, fine, x_fresh, cond=cond_fresh, batch=128)
    began = time.perf_counter()
    compared = ds.search.compare(
        score_fn, x_fit[:256], nfe=arguments.nfe,
        cond=jax.tree.map(lambda v: v[:256], cond_fit),
    )  # fmt: skip
    comparing = time.perf_counter() - began
    print(f"compared {len(compared.entries)} samplers in {comparing:.0f} s", flush=True)

    def on_fresh(tableau: ds.Tableau) -> tuple[float, float]:
        x = ds.search.run(score_fn, tableau, x_fresh, cond=cond_fresh, batch=128)
        return float(ds.metrics.psnr(x, reference)), ds.metrics.frechet_distance(x, data)

    rows = []
    for nfe in arguments.nfe:
        best = compared.best(nfe)
        starts = ds.search.candidates(compared, nfe, most=3)
        plan = ds.search.distill(
            score_fn, x_fit, start=starts, key=key_order, cond=cond_fit,
            steps=arguments.steps,
        )  # fmt: skip
        (psnr_best, far_best), (psnr_found, far_found) = map(on_fresh, (best.tableau, plan.tableau))
        rows.append(
            [
                str(nfe),
                f"{best.solver}, {best.schedule}",
                f"{psnr_best:.1f}",
                f"{psnr_found:.1f}",
                f"{psnr_found - psnr_best:+.1f}",
                f"{far_best:.2f}",
                f"{far_found:.2f}",
                plan.start,
                f"{plan.seconds:.0f}",
            ]
        )
        print(rows[-1], flush=True)
    text = heading("Distilled against the best fixed sampler", "python benchmarks/search.py")
    odd, even = data[1::2], data[::2]
    text += (
        f"\nBundled digits network, {arguments.starts} noises to fit (a quarter of them held out), "
        f"{arguments.steps} gradient steps of 64, from the one of three starts that got furthest "
        f"in an eighth of that. PSNR in dB to the 200-evaluation solution and Frechet distance to "
        f"the real digits (pixels), both on {arguments.fresh} noises that took no part. The ODE's "
        f"own distance is {ds.metrics.frechet_distance(reference, data):.2f}, that of two halves "
        f"of the data {ds.metrics.frechet_distance(odd, even):.2f}. Comparing all "
        f"{len(compared.entries)} fixed samplers on 256 noises took {comparing:.0f} s.\n\n"
    )
    head = ["NFE", "best fixed", "its PSNR", "distilled", "gain"]
    text += table([*head, "its distance", "distilled", "from", "s"], rows)
    with open(arguments.out, "w", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    main()
