"""The same model sampled by others: diffusers and k-diffusion in PyTorch, and by hand in JAX.

    make bench-peers

One network with the same weights in JAX and in PyTorch, one noise process (diffusers' linear VP
table), one grid, 20 evaluations; what comes out is compared before anything is timed. Times are
ratios to the bare network of the same framework called 20 times: eager, compiled, or a `lax.scan`.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffrax
import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from _report import RESULTS, heading, table
from _timing import fastest
from networks import COUNT, Network, network
from torch_networks import TWINS, moved

import diffsamp as ds

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "fixtures"))
from make_peers import load_k_diffusion

NFE = 20
CONFIG = {
    "_class_name": "DPMSolverMultistepScheduler",
    "beta_schedule": "linear",
    "timestep_spacing": "trailing",
    "final_sigmas_type": "zero",
}
TORCH_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Grid:
    """Labels and levels of the run, the same for everyone."""

    def __init__(self) -> None:
        self.sampler = ds.from_diffusers(CONFIG)
        self.process = self.sampler.process
        self.times = np.asarray(self.sampler.times(NFE))
        self.alpha, self.sigma = self.process.alpha(self.times), self.process.sigma(self.times)
        self.rho = np.asarray(self.sigma / self.alpha)
        scheduler = diffusers.DPMSolverMultistepScheduler.from_config(CONFIG)
        scheduler.set_timesteps(NFE)
        self.labels = np.asarray(scheduler.timesteps, np.float32)
        all_rho = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5
        self.log_rho = np.log(all_rho.numpy())  # of every label, for models asked by level


def in_torch(model: Network, grid: Grid, apply: Any, compiled: bool) -> dict[str, Callable]:
    """The network's twin, bare and in the peers' loops: functions that return samples."""
    dtype = torch.bfloat16 if model.params_are_bf16 else torch.float32
    params = jax.tree.map(lambda leaf: moved(leaf, TORCH_DEVICE, dtype), model.params)

    def forward(x: Any, t: Any) -> Any:
        return apply(params, x.to(dtype), t / 1000).to(x.dtype)

    net = torch.compile(forward, dynamic=False) if compiled else forward
    start = torch.from_numpy(np.array(model.start())).to(TORCH_DEVICE)
    size = start.shape[0]
    labels = torch.from_numpy(grid.labels).to(TORCH_DEVICE)
    rho = torch.from_numpy(grid.rho.astype(np.float32)).to(TORCH_DEVICE)
    table_ = torch.from_numpy(grid.log_rho).to(TORCH_DEVICE)
    k_diffusion = load_k_diffusion()

    def bare() -> Any:
        x = start
        for t in labels:
            x = net(x, t.expand(size))
        return x

    def with_diffusers(kind: Any, **options: Any) -> Callable[[], Any]:
        def run() -> Any:
            scheduler = kind.from_config({**CONFIG, "_class_name": kind.__name__, **options})
            scheduler.set_timesteps(NFE, device=TORCH_DEVICE)
            # diffusers' Euler keeps x / alpha; the others keep the state itself
            stretched = "Euler" in kind.__name__
            x = start / grid.alpha[0] if stretched else start
            for t in scheduler.timesteps:
                scaled = scheduler.scale_model_input(x, t)
                said = net(scaled.float(), t.float().expand(size))
                x = scheduler.step(said, t, x).prev_sample
            return x

        return run

    def denoiser(x: Any, level: Any, **_: Any) -> Any:
        # as CompVisDenoiser: the label of a level by interpolation in the table
        log = level.log()
        high = torch.searchsorted(table_, log).clamp(1, len(table_) - 1)
        share = ((table_[high - 1] - log) / (table_[high - 1] - table_[high])).clamp(0, 1)
        label = (high - 1 + share).float()
        s = level.reshape(-1, *[1] * (x.ndim - 1))
        return x - s * net(x / (1 + s**2).sqrt(), label)

    def with_k_diffusion(name: str) -> Callable[[], Any]:
        def run() -> Any:
            return getattr(k_diffusion, name)(denoiser, start / grid.alpha[0], rho, disable=True)

        return run

    return {
        "bare network, 20 times": bare,
        "diffusers Euler (DDIM)": with_diffusers(diffusers.EulerDiscreteScheduler),
        "diffusers DPM-Solver++ 2M": with_diffusers(diffusers.DPMSolverMultistepScheduler),
        "diffusers UniPC": with_diffusers(diffusers.UniPCMultistepScheduler),
        "k-diffusion Euler (DDIM)": with_k_diffusion("sample_euler"),
        "k-diffusion DPM-Solver++ 2M": with_k_diffusion("sample_dpmpp_2m"),
    }


def in_jax(model: Network, grid: Grid) -> dict[str, Callable]:
    """A bare scan, diffsamp, and what is written by hand."""
    dtype = jnp.bfloat16 if model.params_are_bf16 else jnp.float32

    def forward(params: Any, x: Any, t: Any) -> Any:
        return model.apply(params, x, t / 1000)

    process, x_T, params = grid.process, model.start(), model.params
    score_fn = ds.ScoreFn(forward, params, process, prediction="noise", dtype=dtype)
    labels = jnp.asarray(grid.labels)
    size = x_T.shape[0]

    @jax.jit
    def bare(params: Any, x: Any) -> Any:
        def body(x: Any, t: Any) -> tuple[Any, None]:
            return forward(params, x, jnp.broadcast_to(t, (size,))), None

        return jax.lax.scan(body, x.astype(dtype), labels)[0]

    def noise_of(params: Any, x: Any, t: Any) -> Any:
        return forward(params, x.astype(dtype), jnp.broadcast_to(t, (size,))).astype(x.dtype)

    # DPM-Solver++ 2M as it is written in research code
    alpha, sigma = (np.asarray(v, np.float32) for v in (grid.alpha, grid.sigma))
    with np.errstate(divide="ignore", invalid="ignore"):
        half = np.log(alpha / sigma)
        h = np.diff(half)
        share = np.concatenate([[0.0], 0.5 * h[1:] / h[:-1]]).astype(np.float32)
    share[-1] = 0.0
    columns = (
        labels,
        *map(jnp.asarray, (alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], np.expm1(-h), share)),
    )

    def one(params: Any, x: Any, last: Any, row: Any) -> tuple[Any, Any]:
        t, a, s, a_next, s_next, shrink, w = row
        clean = (x - s * noise_of(params, x, t)) / a
        ahead = (1 + w) * clean - w * last
        return s_next / s * x - a_next * shrink * ahead, clean

    @jax.jit
    def scanned(params: Any, x: Any) -> Any:
        def body(carry: Any, row: Any) -> tuple[Any, None]:
            return one(params, *carry, row), None

        return jax.lax.scan(body, (x, jnp.zeros_like(x)), columns)[0][0]

    jitted, rows = jax.jit(one), list(zip(*columns, strict=True))

    def looped() -> Any:
        x, last = x_T, jnp.zeros_like(x_T)
        for row in rows:
            x, last = jitted(params, x, last, row)
        return x

    # y = x / alpha against rho = sigma / alpha: dy / drho is the noise, and Euler is DDIM
    log_rho, index = jnp.asarray(grid.log_rho), jnp.arange(len(grid.log_rho), dtype=jnp.float32)

    def field(rho: Any, y: Any, params: Any) -> Any:
        label = jnp.interp(jnp.log(rho), log_rho, index)
        return noise_of(params, y / jnp.sqrt(1 + rho**2), label)

    @jax.jit
    def solved(params: Any, x: Any) -> Any:
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Euler(),
            grid.rho[0],
            grid.rho[-1],
            None,
            x,
            params,
            stepsize_controller=diffrax.StepTo(jnp.asarray(grid.rho, jnp.float32)),
            adjoint=diffrax.DirectAdjoint(),
        )
        return solution.ys[0]

    tableaux = {
        "diffsamp DDIM": ds.solvers.ddim(process, grid.times),
        "diffsamp DPM-Solver++ 2M": grid.sampler.solver(process, grid.times),
        "diffsamp UniPC": ds.from_diffusers(
            {**CONFIG, "_class_name": "UniPCMultistepScheduler"}
        ).solver(process, grid.times),
    }
    own = {}
    for name, tableau in tableaux.items():  # in a jit, as the others
        jitted_ = jax.jit(lambda f, x, t=tableau: ds.sample(f, t, x))
        own[name] = lambda f=jitted_: f(score_fn, x_T)
    return {
        "bare network, 20 times": lambda: bare(params, x_T),
        **own,
        "by hand, DPM-Solver++ 2M, a scan": lambda: scanned(params, x_T),
        "by hand, DPM-Solver++ 2M, a jitted step in a loop": looped,
        "diffrax Euler (DDIM)": lambda: solved(params, x_T / grid.alpha[0]),
    }


def wait(value: Any) -> Any:
    """Until it is computed."""
    if isinstance(value, torch.Tensor):
        if value.is_cuda:
            torch.cuda.synchronize()
        return value
    return jax.block_until_ready(value)


def kind_of(name: str) -> str:
    """Which sampler a row runs."""
    return next(k for k in ("DDIM", "2M", "UniPC", "bare") if k in name)


def main() -> None:
    """Compare, measure and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="sizes for a GPU")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="for each network and framework"
    )
    parser.add_argument(
        "--networks", type=int, nargs="+", default=list(range(COUNT)), choices=range(COUNT)
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", default=str(RESULTS / "peers.md"))
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")

    grid = Grid()
    text = heading(
        "The same model, sampled by others", "torch", "diffusers", "k-diffusion", "diffrax"
    )
    text += (
        f"\n{NFE} evaluations; ratio to the bare network of the same framework, and milliseconds "
        "per image. Difference: the largest of any number from what diffsamp computes with the "
        "same sampler, in units of the largest.\n"
    )
    for which in arguments.networks:
        model = network(which, arguments.full)
        apply = TWINS[which]
        frameworks = {
            "JAX": in_jax(model, grid),
            "PyTorch eager": in_torch(model, grid, apply, compiled=False),
        }
        if not arguments.no_compile:
            frameworks["PyTorch compiled"] = in_torch(model, grid, apply, compiled=True)
        ours = {
            kind_of(k): np.asarray(f(), np.float32)
            for k, f in frameworks["JAX"].items()
            if "diffsamp" in k
        }
        rows = []
        for framework, functions in frameworks.items():
            times = fastest(functions, arguments.seconds, wait)
            bare = times["bare network, 20 times"]
            for name, seconds in times.items():
                difference = ""
                if kind_of(name) in ours:
                    want, got = ours[kind_of(name)], np.asarray(functions[name](), np.float32)
                    difference = f"{np.abs(got - want).max() / np.abs(want).max():.0e}"
                rows.append(
                    [
                        framework,
                        name,
                        f"{seconds / bare:.2f}",
                        f"{1e3 * seconds / model.batch:.3g}",
                        difference,
                    ]
                )
                print(model.name, rows[-1], flush=True)
        text += f"\n## {model.name}\n\n"
        text += table(["framework", "", "over bare", "ms per image", "difference"], rows)
        with open(arguments.out, "w", encoding="utf-8") as file:
            file.write(text)


if __name__ == "__main__":
    main()
