"""A PyTorch UNet in a sampler: diffusers' own loop, eager and compiled, against diffsamp.

    make test-interop && .venv-interop/bin/python benchmarks/interop.py    # what it needs is there

One UNet2DModel of random weights, DDIM, the same start. Milliseconds per network evaluation inside
the sampler, the fastest of alternating runs in one process, and how far the samples lie apart. Then
a search of the smaller network from end to end, without gradients and with. Writes
`results/interop.md`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any

if "--cores" in sys.argv:  # before torch and XLA count them, and start as many threads
    count = int(sys.argv[sys.argv.index("--cores") + 1])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-count:])

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from _report import RESULTS, heading, table
from _timing import fastest

import diffsamp as ds

NFE = 10
CONFIG = {"beta_schedule": "linear", "timestep_spacing": "trailing", "clip_sample": False}
SIZES = {
    "1 M": {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8},
    "35 M": {"block_out_channels": (128, 256, 256, 256), "layers_per_block": 2},
}


def unet(name: str) -> Any:
    """A UNet for 32x32 images in three channels."""
    torch.manual_seed(0)
    options = SIZES[name]
    levels = len(options["block_out_channels"])
    down, up = ["DownBlock2D"] * levels, ["UpBlock2D"] * levels
    down[-1], up[0] = "AttnDownBlock2D", "AttnUpBlock2D"
    return diffusers.UNet2DModel(
        sample_size=32, down_block_types=down, up_block_types=up, attention_head_dim=8, **options
    ).eval()


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--cores", type=int, help="to run on; all there are unless given")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--no-search", action="store_true")
    arguments = parser.parse_args()
    scheduler = diffusers.DDIMScheduler(**CONFIG)
    parsed = ds.from_diffusers({**CONFIG, "_class_name": "DDIMScheduler"})
    rows, networks = [], {}
    # once torchax is there, torch.compile fails: it takes "jax" for an accelerator
    modules = {name: unet(name) for name in arguments.sizes}
    starts = np.random.default_rng(0).normal(size=(arguments.batch, 3, 32, 32)).astype(np.float32)

    def loop(model: Any) -> torch.Tensor:
        scheduler.set_timesteps(NFE)
        state = torch.from_numpy(starts)
        with torch.no_grad():
            for t in scheduler.timesteps:
                state = scheduler.step(model(state, t).sample, t, state).prev_sample
        return state

    compiled = {name: warmed(module, loop) for name, module in modules.items()}
    for name, module in modules.items():
        count = sum(p.numel() for p in module.parameters()) / 1e6
        score_fn = ds.from_torch(module, process=parsed.process, prediction="noise", time="label")
        tableau = ds.solvers.ddim(parsed.process, parsed.times(NFE))
        sampler = jax.jit(lambda f, v, t=tableau: ds.sample(f, t, v))
        call = jax.jit(lambda f, v: f(v, jnp.float32(500.0)))
        networks[name] = score_fn
        functions = {
            "eager": lambda m=module: loop(m),
            "diffsamp": lambda f=score_fn, s=sampler: s(f, starts),
            "calls": lambda f=score_fn, c=call: [c(f, starts) for _ in range(NFE)][-1],
        }
        if compiled[name] is not None:
            functions["compiled"] = lambda m=compiled[name]: loop(m)

        def wait(value: Any) -> None:
            if not isinstance(value, torch.Tensor):
                jax.block_until_ready(value)

        want = loop(module).numpy()
        apart = np.max(np.abs(want - np.asarray(sampler(score_fn, starts)))) / np.max(np.abs(want))
        times = fastest(functions, arguments.seconds, wait=wait)
        each = {k: f"{v * 1e3 / NFE:.1f}" for k, v in times.items()}
        rows.append(
            [
                f"{count:.1f} M",
                each["eager"],
                each.get("compiled", "-"),
                each["calls"],
                each["diffsamp"],
                f"{times['diffsamp'] / times['eager']:.2f}",
                f"{apart:.1e}",
            ]
        )
        print(*rows[-1], flush=True)
    head = ["parameters", "eager", "compiled", "jitted calls", "diffsamp", "over eager", "apart"]
    text = [
        heading("A PyTorch UNet in a sampler", "torch", "diffusers", "torchax"),
        f"On {len(os.sched_getaffinity(0))} of them, with others at work on the machine: columns "
        "are measured in turn, and a number is the fastest of its kind. "
        f"Milliseconds per evaluation of {arguments.batch} images of 32x32, {NFE} steps of DDIM. "
        "Eager and compiled: diffusers' own loop around the module and around `torch.compile` of "
        "it. Jitted calls: as many calls of the network under XLA, in a Python loop. Apart: the "
        "largest difference of the samples of diffsamp and eager, relative to the largest.\n",
        table(head, rows),
    ]
    if not arguments.no_search:
        text.append(searched(networks[arguments.sizes[0]]))
    (RESULTS / "interop.md").write_text("\n".join(text) + "\n", encoding="utf-8")


def warmed(module: Any, loop: Callable[[Any], torch.Tensor]) -> Any:
    """The module under `torch.compile`, or None where that finds no compiler."""
    compiled = torch.compile(module)
    began = time.perf_counter()
    try:
        loop(compiled)
    except Exception as error:  # of many kinds
        print(f"torch.compile: {error}")
        return None
    print(f"torch.compile: {time.perf_counter() - began:.0f} s", flush=True)
    return compiled


def searched(score_fn: ds.ScoreFn) -> str:
    """A search of 16 starts at 6 evaluations, without gradients and with."""
    x_T = score_fn.process.prior_sample(jax.random.key(0), (16, 3, 32, 32))
    key, rows = jax.random.key(1), []
    began = time.perf_counter()
    plan = ds.search.regress(score_fn, x_T, nfe=6, key=key, batch=8, points=40, evaluations=4000)
    spent = plan.settings["evaluations"]
    rows.append(["`regress`", f"{spent:.0f}", f"{time.perf_counter() - began:.0f}"])
    began = time.perf_counter()
    refined = ds.search.refine(
        score_fn, plan.tableau, x_T, key=key, batch=8, iterations=1, reference=None
    )
    spent = refined.settings["evaluations"]
    rows.append(["`refine`, one iteration", f"{spent:.0f}", f"{time.perf_counter() - began:.0f}"])
    began = time.perf_counter()
    learned = ds.search.distill(
        score_fn, x_T, start=plan.tableau, key=key, batch=8, steps=10, evaluate_every=10
    )
    spent = learned.settings["evaluations"]
    rows.append(["`distill`, ten steps", f"{spent:.0f}", f"{time.perf_counter() - began:.0f}"])
    text = "\nSearches of the smaller network, 16 starts, 6 evaluations, with compilation:\n\n"
    return text + table(["search", "evaluations", "seconds"], rows)


if __name__ == "__main__":
    main()
