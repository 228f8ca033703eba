"""Samples a second on more devices: a mesh, several processes, `generate`, a search.

    python benchmarks/scaling.py            # one CPU device a core, up to the cores there are
    python benchmarks/scaling.py --full     # the GPUs of a machine

What a machine gives for twice the devices is less than twice, with or without us: memory and clock
are shared. So a mesh of d devices is held against d processes that know nothing of each other, each
with a device of its own, started together. Rates are sustained over some seconds after a first run;
every row is made by processes of its own, on a CPU (Linux) bound to as many cores as devices.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from _report import RESULTS, heading, table
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from networks import COUNT, network
from overhead import score_fn_of

import diffsamp as ds

NFE = 10


def sustained(function: Callable[[], Any], seconds: float) -> float:
    """Seconds a call, over at least 2 calls and as many as fill the time, after a first one."""
    jax.block_until_ready(function())
    began, calls = time.perf_counter(), 0
    while calls < 2 or time.perf_counter() - began < seconds:
        jax.block_until_ready(function())
        calls += 1
    return (time.perf_counter() - began) / calls


def one(what: str, which: int, full: bool, seconds: float, address: str, place: int) -> float:
    """Samples a second (of all processes together), in this process."""
    if address:
        processes = int(os.environ["DIFFSAMP_PROCESSES"])
        jax.distributed.initialize(address, processes, place)
    net, process = network(which, full), ds.processes.flow()
    score_fn = score_fn_of(net, process)
    tableau = ds.solvers.dpmpp(process, ds.schedules.logsnr(process, NFE), order=2)
    count = len(jax.devices())
    batch = net.batch * count
    spread = NamedSharding(Mesh(np.array(jax.devices()), ("batch",)), PartitionSpec("batch"))
    everywhere = NamedSharding(spread.mesh, PartitionSpec())
    start = np.random.default_rng(0).normal(size=(batch, *net.shape)).astype(np.float32)
    x_T = jax.make_array_from_callback(start.shape, spread, lambda at: start[at])
    if what == "search":
        starts = np.concatenate([start] * 4)

        def search() -> Any:
            return (
                ds.search.compare(
                    score_fn,
                    starts,
                    nfe=[4],
                    solver=["ddim", "dpmpp_2m", "unipc3", "ipndm3"],
                    schedule=["logsnr"],
                    reference=starts,
                    batch=batch,
                    sharding=spread,
                )
                .entries[0]
                .psnr
            )

        return 4 * len(starts) / sustained(search, seconds)
    score_fn = jax.tree.map(
        lambda v: jax.device_put(v, everywhere) if isinstance(v, jax.Array) else v, score_fn
    )
    draw = jax.jit(lambda f, x: ds.sample(f, tableau, x))
    alone = sustained(lambda: draw(score_fn, x_T), seconds)
    if what == "sample":
        return batch / alone
    rounds = max(4, int(seconds / alone))
    with tempfile.TemporaryDirectory() as folder:
        job = functools.partial(
            ds.generate,
            score_fn,
            tableau,
            key=jax.random.key(0),
            shape=net.shape,
            batch=batch,
            sharding=spread,
            format=what,
            progress=False,
        )
        job(n=batch, out=f"{folder}/first")
        began = time.perf_counter()
        job(n=rounds * batch, out=f"{folder}/all")
        return rounds * batch / (time.perf_counter() - began)


def started(
    what: str, which: int, devices: range, options: argparse.Namespace, port: int = 0
) -> list[subprocess.Popen[str]]:
    """One process with all these devices; with a port, a process for each, one job between them."""
    groups = [devices] if not port else [range(i, i + 1) for i in devices]
    found = []
    for place, group in enumerate(groups):
        environment = {**os.environ, "DIFFSAMP_PROCESSES": str(len(groups))}
        if options.full:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, group))
        else:
            flag = f"--xla_force_host_platform_device_count={len(group)}"
            environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag}
        bind = []
        if not options.full:
            cores = sorted(os.sched_getaffinity(0))
            bind = ["taskset", "--cpu-list", ",".join(str(cores[i]) for i in group)]
        command = [
            *bind,
            sys.executable,
            __file__,
            "--one",
            what,
            str(which),
            f"127.0.0.1:{port}" if port else "",
            str(place),
            "--seconds",
            str(options.seconds),
            *["--full"] * options.full,
        ]
        pipe = subprocess.PIPE
        found.append(
            subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
        )
    return found


def rates(processes: list[subprocess.Popen[str]]) -> list[float]:
    """What they print."""
    found = []
    for process in processes:
        out, error = process.communicate()
        if process.returncode:
            raise RuntimeError(error[-3000:])
        found.append(json.loads(out.splitlines()[-1]))
    return found


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def measure(which: int, count: int, options: argparse.Namespace) -> dict[str, float]:
    """Samples a second by what was run, on `count` devices."""
    apart = [started("sample", which, range(i, i + 1), options) for i in range(count)]
    found = {"apart": sum(rates([p for group in apart for p in group]))}
    for what in ("sample", "npz", "safetensors", "search"):
        (found[what],) = rates(started(what, which, range(count), options))
    if count > 1:
        found["processes"] = rates(started("sample", which, range(count), options, free_port()))[0]
    return found


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--full", action="store_true", help="sizes for a GPU")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each rate")
    parser.add_argument("--repeats", type=int, default=2, help="of each, of which the best counts")
    parser.add_argument("--networks", type=int, nargs="+", default=[3], choices=range(COUNT))
    parser.add_argument("--most", type=int, help="devices; default: all there are")
    parser.add_argument("--out", default=str(RESULTS / "scaling.md"))
    options = parser.parse_args()
    if options.one:
        what, which, address, place = options.one
        rate = one(what, int(which), options.full, options.seconds, address, int(place))
        print(json.dumps(rate))
        return

    here = len(jax.devices()) if options.full else len(os.sched_getaffinity(0))
    counts = [2**i for i in range(10) if 2**i <= min(options.most or here, here)]
    names = {
        "sample": "`ds.sample`, one process and a mesh",
        "processes": "`ds.sample`, a process for each device, one mesh",
        "npz": "`ds.generate` on a mesh, npz",
        "safetensors": "`ds.generate` on a mesh, safetensors",
        "search": "`search.compare` on a mesh, of 4 evaluations",
    }
    text = heading("Samples a second on more devices")
    text += (
        f"\nDPM-Solver++ 2M, {NFE} evaluations, the same batch on every device. In brackets: over "
        "as many processes that know nothing of each other, each with one device, started "
        "together; for the search, which makes fewer evaluations, over its own rate on one "
        f"device, per device. The best of {options.repeats} runs in turn.\n"
    )
    for which in options.networks:
        runs = [
            {count: measure(which, count, options) for count in counts}
            for _ in range(options.repeats)
        ]
        found = {
            count: {what: max(run[count][what] for run in runs) for what in runs[0][count]}
            for count in counts
        }
        print(network(which, options.full).name, found, flush=True)
        rows = [
            [
                "processes that know nothing of each other",
                *(f"{found[count]['apart']:.4g}" for count in counts),
            ]
        ]
        for what, label in names.items():
            cells = []
            for count in counts:
                rate = found[count].get(what)
                base = found[count]["apart"]
                if what == "search":
                    base = count * found[1]["search"]
                cells.append("" if rate is None else f"{rate:.4g} ({rate / base:.2f})")
            rows.append([label, *cells])
        text += f"\n## {network(which, options.full).name}, per device\n\n"
        heads = [f"{count} device" + "s" * (count > 1) for count in counts]
        text += table(["samples a second", *heads], rows)
    with open(options.out, "w", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    main()
