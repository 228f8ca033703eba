"""What `ds.sample` costs over a bare scan of the network, in time and in memory.

    python benchmarks/overhead.py            # sizes for a CPU, in minutes
    python benchmarks/overhead.py --full     # for a GPU

Both are jitted, warmed up, and run alternately in one process; the ratio of their fastest times is
reported, for 20 network evaluations. The bare scan feeds the network's output back as its input
and does nothing else; samplers with noise are held against one that draws noise, too. Memory:
what the compiled program needs besides its arguments, less what the bare scan needs, in states.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from _report import RESULTS, heading, table
from _timing import fastest
from networks import COUNT, Network, network

import diffsamp as ds

NFE = 20
# at least one of every family; the last three carry noise of their own
SOLVERS = (
    "ddim", "dpm_solver_2s", "dpmpp_2m", "dpmpp_3m", "deis_tab3", "ipndm4", "heun", "unipc3",
    "ghvb2.8", "bdia", "belm", "ddpm", "dpmpp_2m_sde", "sa_solver",
)  # fmt: skip


def tableau_of(name: str, process: Any) -> ds.Tableau:
    """A registered solver with 20 evaluations."""
    solver = ds.solvers.get(name)
    for final in ("clean", "t_min"):
        for steps in range(NFE, 0, -1):
            tableau = solver(process, ds.schedules.logsnr(process, steps, final=final))
            if tableau.nfe == NFE:
                return tableau
    raise ValueError(f"{name} cannot make {NFE} evaluations.")


def bare_scan(net: Network, dtype: Any, nfe: int = NFE) -> Any:
    """A jitted scan of the network alone, (params, x, key=None) -> x; a key adds noise."""
    labels = jnp.linspace(1.0, 0.0, nfe)

    @jax.jit
    def bare(params: Any, x: jax.Array, key: Any = None) -> jax.Array:
        def body(x: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
            out = net.apply(params, x, jnp.broadcast_to(t, x.shape[:1]))
            if key is not None:
                own = jax.random.fold_in(key, (1e3 * t).astype(jnp.int32))
                out = out + 0.01 * jax.random.normal(own, x.shape, x.dtype)
            return out, None

        return jax.lax.scan(body, x.astype(dtype), labels)[0]

    return bare


def memory(function: Any, *arguments: Any) -> int:
    """Bytes that a jitted function needs besides its arguments."""
    analysis = function.lower(*arguments).compile().memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes


def measure(net: Network, names: tuple[str, ...], seconds: float) -> dict[str, Any]:
    """{sampler: (time over bare, states over bare, p + q)}, and the rows below them."""
    dtype = jax.tree.leaves(net.params)[0].dtype
    process = ds.processes.flow()
    score_fn = ds.ScoreFn(net.apply, net.params, process, prediction="velocity", dtype=dtype)
    x_T, key = net.start(), jax.random.key(1)
    bare = bare_scan(net, dtype)
    tableaux = {name: tableau_of(name, process) for name in names}
    functions = {
        "bare": lambda: bare(score_fn.params, x_T),
        "noisy": lambda: bare(score_fn.params, x_T, key),
    }
    base = {noisy: memory(bare, score_fn.params, x_T, key if noisy else None) for noisy in (0, 1)}
    extra = {}
    for name, tableau in tableaux.items():
        needed = key if tableau.stochastic else None
        whole = jax.jit(lambda f, x, k, t=tableau: ds.sample(f, t, x, key=k))
        extra[name] = (memory(whole, score_fn, x_T, needed) - base[tableau.stochastic]) / x_T.nbytes
        functions[name] = lambda f=whole, k=needed: f(score_fn, x_T, k)
    first = tableaux[names[0]]
    functions["unjitted"] = lambda: ds.sample(score_fn, first, x_T)
    one, quiet = jax.jit(ds.sample), [t for t in tableaux.values() if not t.stochastic]
    for i, t in enumerate(ds.Tableau.pad_together(quiet)):
        functions[f"one {i}"] = lambda t=t: one(score_fn, t, x_T)
    times = fastest(functions, seconds)
    result: dict[str, Any] = {
        name: (times[name] / times["noisy" if t.stochastic else "bare"], extra[name], t.p + t.q)
        for name, t in tableaux.items()
    }
    result |= {name: times[name] for name in ("bare", "noisy")}
    result["host"] = times["unjitted"] - times[names[0]]
    result["one"] = max(times[f"one {i}"] for i in range(len(quiet))) / times["bare"]
    return result


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="sizes for a GPU")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each network")
    parser.add_argument("--networks", type=int, default=COUNT, help="only the first few")
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS))
    parser.add_argument("--out", default=str(RESULTS / "overhead.md"))
    arguments = parser.parse_args()

    names = tuple(arguments.solvers)
    chosen = [network(i, arguments.full) for i in range(arguments.networks)]
    found = []
    for each in chosen:
        found.append(measure(each, names, arguments.seconds))
        print(each.name, found[-1], flush=True)
    text = heading("Overhead over a bare scan of the network")
    text += (
        "\nTime of `ds.sample` in a `jit` over the time of a bare `lax.scan` of the network, "
        f"{NFE} evaluations, the fastest of alternating runs; for the last three, which add noise, "
        "over a bare scan with a draw of noise in every step. Every sampler in its own shape. One "
        "program: all deterministic ones padded to one shape, the slowest of them. Without a `jit` "
        "around it, `ds.sample` checks and binds its arguments at every call: the last row.\n\n"
    )
    rows = [
        ["bare scan, ms", *(f"{r['bare'] * 1e3:.2f}" for r in found)],
        ["bare scan with noise, ms", *(f"{r['noisy'] * 1e3:.2f}" for r in found)],
    ]
    rows += [[f"`{name}`", *(f"{r[name][0]:.3f}" for r in found)] for name in names]
    rows.append(["one program", *(f"{r['one']:.3f}" for r in found)])
    rows.append(["without `jit`, ms more", *(f"{r['host'] * 1e3:+.2f}" for r in found)])
    text += table(["", *(each.name for each in chosen)], rows)
    text += (
        "\nMemory over the bare scan, in states, as the compiler counts it; p + q is what the "
        "equation refers to.\n\n"
    )
    rows = [
        [f"`{name}`", str(found[0][name][2]), *(f"{r[name][1]:+.2f}" for r in found)]
        for name in names
    ]
    text += table(["", "p + q", *(each.name for each in chosen)], rows)
    with open(arguments.out, "w", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    main()
