"""What `ds.sample` costs over a bare scan of the network.

    python benchmarks/overhead.py

Both are jitted, warmed up, and run alternately in one process; the ratio of their fastest times is
reported, for 20 network evaluations. The bare scan feeds the network's output back as its input
and does nothing else. All samplers share one compiled program per network; the number of
compilations is counted.
"""

from __future__ import annotations

import argparse
import gc
import time
from typing import Any

import jax
import jax.numpy as jnp
from _report import RESULTS, heading, table

import diffsamp as ds
from diffsamp.models import digits

NFE = 20
SOLVERS = ("ddim", "ddpm", "heun", "dpmpp_2m", "dpmpp_3m", "deis_tab3", "ipndm4", "unipc3")


def mlp(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
    """Two hidden layers of 256."""
    hidden = jnp.tanh(x @ params[0] + t[:, None])
    return jnp.tanh(hidden @ params[1]) @ params[2]


def mlp_params() -> list[jax.Array]:
    """Random weights: only the time matters."""
    shapes = [(64, 256), (256, 256), (256, 64)]
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, s) / s[0] ** 0.5 for k, s in zip(keys, shapes, strict=True)]


def fastest(functions: dict[str, Any], rounds: int) -> dict[str, float]:
    """Fastest time of each function in seconds, run in turn so that all see the same machine."""
    times = dict.fromkeys(functions, float("inf"))
    for function in functions.values():
        jax.block_until_ready(function())
    gc.disable()
    for _ in range(rounds):
        for name, function in functions.items():
            began = time.perf_counter()
            jax.block_until_ready(function())
            times[name] = min(times[name], time.perf_counter() - began)
    gc.enable()
    return times


def measure(score_fn: ds.ScoreFn, x_T: jax.Array, rounds: int) -> tuple[dict[str, float], int]:
    """Times by sampler, "bare" among them, and how often the network was traced for sampling."""
    traces = []
    inner = score_fn.apply

    def apply(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
        traces.append(1)
        return inner(params, x, t)

    counted = ds.ScoreFn(
        apply,
        score_fn.params,
        score_fn.process,
        score_fn.prediction,
        sigma_data=score_fn.sigma_data,
    )
    process = score_fn.process
    tableaux = ds.Tableau.pad_together(
        [
            s(process, ds.schedules.logsnr(process, s.steps(NFE) or NFE // 2, final=final))
            for s in map(ds.solvers.get, SOLVERS)
            for final in ["clean" if s.steps(NFE) else "t_min"]
        ]
    )
    assert all(t.nfe == NFE for t in tableaux)
    labels = jnp.linspace(1.0, 0.0, NFE)

    @jax.jit
    def bare(params: Any, x: jax.Array) -> jax.Array:
        def body(x: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
            return inner(params, x, jnp.broadcast_to(t, x.shape[:1])), None

        return jax.lax.scan(body, x, labels)[0]

    key = jax.random.key(1)
    functions = {"bare": lambda: bare(score_fn.params, x_T)}
    for name, tableau in zip(SOLVERS, tableaux, strict=True):
        needed = key if tableau.stochastic else None
        functions[name] = lambda t=tableau, k=needed: ds.sample(counted, t, x_T, key=k)
    return fastest(functions, rounds), len(traces)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", default=str(RESULTS / "overhead.md"))
    arguments = parser.parse_args()

    bundled = digits.load_digits_model()
    flow = ds.processes.flow()
    cases = {
        "MLP 256 wide, batch 256": (
            ds.ScoreFn(mlp, mlp_params(), flow, prediction="velocity"),
            jax.random.normal(jax.random.key(0), (256, 64)),
        ),
        "digits transformer, batch 1": (bundled, jnp.ones((1, 8, 8, 1))),
        "digits transformer, batch 64": (bundled, jnp.ones((64, 8, 8, 1))),
    }
    rows = []
    for name, (score_fn, x_T) in cases.items():
        times, traces = measure(score_fn, x_T, arguments.rounds)
        bare = times.pop("bare")
        ratios = [f"{seconds / bare:.2f}" for seconds in times.values()]
        rows.append([name, f"{bare * 1e3:.2f}", *ratios, str(traces)])
        print(rows[-1], flush=True)
    text = heading("Overhead over a bare scan of the network", "python benchmarks/overhead.py")
    text += (
        f"\nTime of `ds.sample` over the time of a bare `lax.scan` of the network, {NFE} "
        "evaluations, the fastest of alternating runs. The last column counts how often the "
        "network was traced for all samplers together: 2 is one program without noise and one "
        "with.\n\n"
    )
    text += table(["network", "bare scan, ms", *SOLVERS, "traces"], rows)
    with open(arguments.out, "w", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    main()
