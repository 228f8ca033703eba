"""How often and how long XLA compiles: solvers, budgets, second starts.

    python benchmarks/compilation.py            # in minutes on a CPU
    python benchmarks/compilation.py --full     # the networks in the sizes for a GPU

Compilations are counted where JAX reports them. Every measurement is in a process of its own, so
that nothing is warm, with JAX's persistent cache off except for the second start.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
from _report import RESULTS, heading, table
from networks import COUNT, Network, network
from overhead import bare_scan

import diffsamp as ds

BUDGETS = tuple(range(5, 21))
GROWTH = (5, 10, 20)


class Count:
    """Compilations since it was made."""

    def __init__(self) -> None:
        self.number = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, _: float, **__: Any) -> None:
        self.number += event == "/jax/core/compile/backend_compile_duration"


def all_tableaux(process: Any, budgets: tuple[int, ...]) -> list[ds.Tableau]:
    """Every registered sampler at every budget it can meet."""
    found = []
    for name in ds.solvers.names():
        solver = ds.solvers.get(name)
        for nfe in budgets:
            steps = solver.steps(nfe)
            if steps is not None:
                found.append(solver(process, ds.schedules.logsnr(process, steps, final="t_min")))
    return found


def by_hand(net: Network, process: Any, n: int) -> Any:
    """DPM-Solver++ 2M as it is copied into research code: a Python loop under one jit."""
    times = ds.schedules.logsnr(process, n, final="t_min")
    alpha, sigma = process.alpha(times), process.sigma(times)
    half = jnp.asarray(process.log_snr(times)) / 2
    dtype = jax.tree.leaves(net.params)[0].dtype

    @jax.jit
    def run(params: Any, x: jax.Array) -> jax.Array:
        last = None
        for i in range(n):
            t = jnp.full(x.shape[:1], times[i], x.dtype)
            said = net.apply(params, x.astype(dtype), t.astype(dtype))
            clean = x - sigma[i] * said.astype(x.dtype)
            h = half[i + 1] - half[i]
            ahead = clean
            if last is not None:
                r = (half[i] - half[i - 1]) / h
                ahead = (1 + 1 / (2 * r)) * clean - 1 / (2 * r) * last
            x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * jnp.expm1(-h) * ahead
            last = clean
        return x

    return run


def one(what: str, which: int, n: int, full: bool) -> dict[str, Any]:
    """A measurement, in this process: seconds to trace and compile, or compilations of them all."""
    net = network(which, full)
    dtype = jax.tree.leaves(net.params)[0].dtype
    process = ds.processes.flow()
    score_fn = ds.ScoreFn(net.apply, net.params, process, prediction="velocity", dtype=dtype)
    x_T = jax.block_until_ready(net.start())
    jax.block_until_ready((score_fn.params, jnp.ones(2) + 1))
    if what == "all":
        # of the larger networks the smallest and the largest budget
        budgets = BUDGETS if which == 0 else (BUDGETS[0], BUDGETS[-1])
        tableaux = ds.Tableau.pad_together(all_tableaux(process, budgets))
        key = jax.block_until_ready(ds.random.sample_keys(jax.random.key(1), net.batch))
        count = Count()
        for tableau in tableaux:
            jax.block_until_ready(ds.sample(score_fn, tableau, x_T, key=key))
        return {"compilations": count.number, "samplers": len(tableaux)}
    times = ds.schedules.logsnr(process, n, final="t_min")
    tableau = ds.solvers.get("dpmpp_2m")(process, times)
    function, first = {
        "sample": lambda: (jax.jit(lambda f, x: ds.sample(f, tableau, x)), score_fn),
        "hand": lambda: (by_hand(net, process, n), net.params),
        "bare": lambda: (bare_scan(net, dtype, n), net.params),
    }[what]()
    began = time.perf_counter()
    function.lower(first, x_T).compile()
    return {"seconds": time.perf_counter() - began}


def alone(
    what: str, which: int, n: int = 20, *, full: bool, runs: int = 1, cache: str | None = None
) -> dict[str, Any]:
    """The same in a process of its own, the fastest of some."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    if cache is not None:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
    found = []
    for _ in range(runs):
        done = subprocess.run(
            [sys.executable, __file__, "--one", what, str(which), str(n), *["--full"] * full],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return min(found, key=lambda run: run.get("seconds", 0.0))


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--full", action="store_true", help="sizes for a GPU")
    parser.add_argument("--networks", type=int, nargs="+", default=[0, 1, 3], choices=range(COUNT))
    parser.add_argument("--growth", type=int, nargs="+", default=list(GROWTH))
    parser.add_argument("--runs", type=int, default=3, help="of each, of which the fastest counts")
    parser.add_argument("--out", default=str(RESULTS / "compilation.md"))
    arguments = parser.parse_args()
    if arguments.one:
        what, which, n = arguments.one
        print(json.dumps(one(what, int(which), int(n), arguments.full)))
        return

    own: dict[str, Any] = {"full": arguments.full}
    many = {**own, "runs": arguments.runs}
    text = heading("Compilation")
    rows, growth = [], []
    for which in arguments.networks:
        name = network(which, arguments.full).name
        bare, sample = (alone(what, which, **many)["seconds"] for what in ("bare", "sample"))
        everything = alone("all", which, **own)
        with tempfile.TemporaryDirectory() as folder:
            alone("sample", which, cache=folder, **own)
            second = alone("sample", which, cache=folder, **many)["seconds"]
        rows.append(
            [
                name,
                f"{bare:.2f}",
                f"{sample:.2f}",
                f"{sample / bare:.2f}",
                f"{second:.2f}",
                str(everything["samplers"]),
                str(everything["compilations"]),
            ]
        )
        print(rows[-1], flush=True)
        growth += [
            [
                name,
                label,
                *(f"{alone(what, which, n, **own)['seconds']:.2f}" for n in arguments.growth),
            ]
            for what, label in (("sample", "`ds.sample`"), ("hand", "a loop under one jit"))
        ]
        print(growth[-2:], flush=True)
    text += (
        "\nSeconds to trace and compile. Second start: in a new process that finds the program in "
        "JAX's persistent cache. All samplers: "
        f"the {len(ds.solvers.names())} solvers of the registry at {BUDGETS[0]} to {BUDGETS[-1]} "
        f"evaluations ({BUDGETS[0]} and {BUDGETS[-1]} for all but the first network) where they "
        "can make them, with and without noise, padded to one shape; and how often that "
        "compiled.\n\n"
    )
    text += table(
        [
            "network",
            "bare scan, s",
            "`ds.sample`, s",
            "ratio",
            "second start, s",
            "all samplers",
            "compilations",
        ],
        rows,
    )
    text += (
        "\nThe same against the number of evaluations: DPM-Solver++ 2M here, and as it is copied "
        "into research code, a Python loop under one jit.\n\n"
    )
    text += table(["network", "", *(f"{n} evaluations, s" for n in arguments.growth)], growth)
    with open(arguments.out, "w", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    main()
