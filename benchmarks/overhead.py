"""What `ds.sample` costs over as many jitted calls of the network, in time and in memory.

    python benchmarks/overhead.py            # sizes for a CPU, in minutes
    python benchmarks/overhead.py --full     # for a GPU

Both are warmed up and run alternately in one process; the ratio of their fastest times is reported,
for 20 network evaluations. N jitted calls are a loop in Python around `jax.jit(apply)`, each call's
output the next one's input: what a user has without a sampler. Samplers with noise are held against
calls that draw noise, too. A bare `lax.scan` of the network stands beside them. Gradients, by the
weights and the start, are held against as many jitted gradients of the network. Memory: what the
compiled program needs besides its arguments, less what the bare scan needs, in states. What is put
around the network, and the runs that are no scan of a tableau, are held against as many jitted
calls at the batch that they make.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _around import NFE, around, score_fn_of
from _report import RESULTS, heading, table
from _timing import fastest
from networks import CONVOLUTIONS, COUNT, Network, convolutional, network

import diffsamp as ds

COPIES = 4  # of the calls, compiled apart: their median counts, and their spread is noise
ROUNDS = 5  # at least
# one or more of every family; those of the last lines add noise
SOLVERS = (
    "ddim",
    "conjugate_ddim",
    "dpm_solver_2s",
    "dpmpp_2m",
    "dpmpp_3m",
    "res_2s",
    "etdrk4",
    "dpm_solver_v3",
    "iia",
    "rx_ddim",
    "stork4",
    "deis_tab3",
    "ipndm4",
    "pndm",
    "heun",
    "dpm2",
    "rho_rk4",
    "epd",
    "unipc3",
    "dual_solver",
    "dc_solver",
    "rbf_solver",
    "ghvb2.8",
    "heavy_ball",
    "mixed",
    "analytic_first_step",
    "cached_first_answer",
    "skip",
    "bdia",
    "belm",
    "ddpm",
    "accelerated_ddpm",
    "dpmpp_2m_sde",
    "dpmpp_sde",
    "sa_solver",
    "er_sde3",
    "seeds2",
    "dpm2_ancestral",
    "interpolant_em",
    "consistency",
    "restart",
)


def composed(name: str, process: Any) -> ds.Tableau | None:
    """A sampler outside the registry with 20 evaluations; fitted numbers are made up."""
    times = ds.schedules.logsnr(process, NFE)
    solvers = ds.solvers
    if name == "heavy_ball":
        return solvers.heavy_ball(solvers.dpmpp(process, times, order=2))
    if name == "restart":  # Heun's 8 steps, and 2 more on the way down again
        low, high = 0.14, 0.3
        short = ds.schedules.logsnr(process, 8, final="t_min")
        return solvers.restart(process, short, intervals=[(3, 1, low, high)])
    if name in ("analytic_first_step", "cached_first_answer"):
        longer = solvers.dpmpp(process, ds.schedules.logsnr(process, NFE + 1), order=2)
        if name == "cached_first_answer":
            return solvers.cached_first_answer(longer, 0.1)
        return solvers.analytic_first_step(longer)
    if name == "skip":
        longer = solvers.dpmpp(process, ds.schedules.logsnr(process, NFE + 5), order=2)
        return solvers.skip(longer, range(3, 18, 3))
    if name == "epd":  # 3 points in each of 5 steps
        return solvers.epd(process, ds.schedules.logsnr(process, 5, final="t_min"), points=3)
    if name == "mixed":
        return solvers.mixed(process, times, steps=[solvers.MixedStep()] * NFE)
    if name == "dc_solver":
        return solvers.dc_solver(process, times, ratios=np.full(NFE, 1.01))
    if name == "rbf_solver":
        return solvers.rbf_solver(process, times, shapes=1.0)
    if name == "iia":
        return solvers.iia(process, times, coefficients=np.full((NFE, 2), 0.01))
    if name == "dpm_solver_v3":
        levels = np.array([-20.0, 20.0])
        made_up = solvers.ModelStatistics(levels, np.array([0.4, 0.6]), np.array([0.0, 0.1]))
        return solvers.dpm_solver_v3(process, times, statistics=made_up)
    if name == "consistency":
        return solvers.consistency(process, times, rho_min=0.0)
    return None


def tableau_of(name: str, process: Any) -> ds.Tableau:
    """A solver with 20 evaluations."""
    found = composed(name, process)
    if found is not None:
        return found
    solver = ds.solvers.get(name)
    for final in ("clean", "t_min"):
        for steps in range(NFE, 0, -1):
            tableau = solver(process, ds.schedules.logsnr(process, steps, final=final))
            if tableau.nfe == NFE:
                return tableau
    raise ValueError(f"{name} cannot make {NFE} evaluations.")


def labels_of(net: Network, calls: int) -> list[jax.Array]:
    """A time for every call and sample."""
    return [jnp.full(net.batch, t) for t in np.linspace(1.0, 0.0, calls)]


def bare_scan(net: Network, dtype: Any, nfe: int = NFE) -> Any:
    """A jitted scan of the network alone, (params, x, key=None) -> x; a key adds noise."""
    labels = jnp.linspace(1.0, 0.0, nfe)

    @jax.jit
    def bare(params: Any, x: jax.Array, key: Any = None) -> jax.Array:
        def body(x: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
            return called(net, params, x, jnp.broadcast_to(t, x.shape[:1]), key), None

        return jax.lax.scan(body, x.astype(dtype), labels)[0]

    return bare


def called(net: Network, params: Any, x: jax.Array, t: jax.Array, key: Any = None) -> jax.Array:
    """The network's output, and some noise if there is a key."""
    out = net.apply(params, x, t)
    if key is None:
        return out
    own = jax.random.fold_in(key, (1e3 * t[0]).astype(jnp.int32))
    return out + 0.01 * jax.random.normal(own, x.shape, x.dtype)


def jitted_calls(
    net: Network, nfe: int = NFE, copies: int = 1, key: Any = None, pulls: int = 0
) -> Any:
    """() -> the state after so many jitted calls of the network, one after the other.

    With `pulls`, each call also takes as many vector-Jacobian products, of its own output first.
    """

    def call(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
        if not pulls:
            return called(net, params, x, t, key)
        out, back = jax.vjp(lambda v: called(net, params, v, t, key), x)
        vector = out
        for _ in range(pulls):
            (vector,) = back(vector)
        return out + 1e-3 * vector

    one = jax.jit(call)
    params = jax.tree.map(jnp.asarray, net.params)
    start = jnp.concatenate([net.start()] * copies).astype(jax.tree.leaves(params)[0].dtype)
    labels = [jnp.concatenate([t] * copies) for t in labels_of(net, nfe)]

    def calls() -> jax.Array:
        x = start
        for t in labels:
            x = one(params, x, t)
        return x

    return calls


def jitted_gradients(net: Network, nfe: int = NFE) -> Any:
    """() -> the last of so many jitted gradients of the network, by its weights and input."""

    def loss(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.sum(net.apply(params, x, t).astype(jnp.float32) ** 2)

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    params, x = jax.tree.map(jnp.asarray, net.params), net.start()
    x = x.astype(jax.tree.leaves(params)[0].dtype)
    labels = labels_of(net, nfe)

    def gradients() -> Any:
        for t in labels:
            found = gradient(params, x, t)
        return found

    return gradients


def gradient_through_calls(net: Network, nfe: int = NFE) -> Any:
    """() -> the gradient by weights and start through so many jitted calls, one after the other.

    What `ds.sample` saves somebody: an Euler loop around the jitted network.
    """
    one = jax.jit(net.apply)
    params, x = jax.tree.map(jnp.asarray, net.params), net.start()
    x = x.astype(jax.tree.leaves(params)[0].dtype)
    labels = labels_of(net, nfe)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        for t in labels:
            x = x + 0.1 * one(params, x, t)
        return jnp.sum(x.astype(jnp.float32) ** 2)

    gradient = jax.grad(loss, (0, 1))
    return lambda: gradient(params, x)


def measure_gradients(nets: list[Network], seconds: float) -> list[list[str]]:
    """Rows: sampling and its gradients over as many calls and gradients of each network."""
    process, rows = ds.processes.flow(), []
    tableau = ds.solvers.dpmpp(process, ds.schedules.logsnr(process, NFE), order=2)
    everything = jax.checkpoint_policies.everything_saveable
    for net in nets:
        score_fn, x_T = score_fn_of(net, process), net.start()
        params = jax.tree.map(jnp.asarray, net.params)

        def loss(params: Any, x: jax.Array, keep: Any, f: ds.ScoreFn = score_fn) -> jax.Array:
            f = dataclasses.replace(f, params=params)
            return jnp.sum(ds.sample(f, tableau, x, checkpoint=keep) ** 2)

        whole = jax.jit(lambda f, x: ds.sample(f, tableau, x))
        functions = {
            "calls": jitted_calls(net),
            "sample": lambda w=whole, f=score_fn, x=x_T: w(f, x),
            "gradients": jitted_gradients(net),
            "through": gradient_through_calls(net),
        }
        needs = {}
        for name, keep in (("default", False), ("all", everything), ("True", True)):
            gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
            program = gradient.lower(params, x_T, keep).compile()
            needs[name] = program.memory_analysis().temp_size_in_bytes / 2**20
            functions[name] = lambda g=program, p=params, x=x_T: g(p, x)
        times = fastest(functions, seconds, rounds=ROUNDS)
        loop = f"{times['default'] / times['through']:.3f}"
        cells = [f"{times[k] / times['gradients']:.3f}, {needs[k]:.0f} MiB" for k in needs]
        call, gradient = (f"{times[k] * 1e3 / NFE:.2f}" for k in ("calls", "gradients"))
        ratio = f"{times['sample'] / times['calls']:.3f}"
        rows.append([net.name, call, ratio, loop, gradient, *cells])
        print(*rows[-1], flush=True)
    return rows


def memory(function: Any, *arguments: Any) -> int:
    """Bytes that a jitted function needs besides its arguments."""
    analysis = function.lower(*arguments).compile().memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes


def draws(tableau: ds.Tableau) -> bool:
    """Whether it adds noise in half of its rows or more, and is held against a scan that does."""
    return int(np.count_nonzero(tableau.c)) >= tableau.rows / 2


def measure(net: Network, names: tuple[str, ...], seconds: float) -> dict[str, Any]:
    """{sampler: (time over calls, states over a bare scan, p + q)}, and the rows above them."""
    process = ds.processes.flow()
    score_fn = score_fn_of(net, process)
    x_T, key = net.start(), jax.random.key(1)
    bare = bare_scan(net, score_fn.dtype)
    tableaux = {name: tableau_of(name, process) for name in names}
    functions: dict[str, Callable[[], Any]] = {}
    base = {noisy: memory(bare, score_fn.params, x_T, key if noisy else None) for noisy in (0, 1)}
    extra = {}
    every = -(-len(tableaux) // COPIES)
    for place, (name, tableau) in enumerate(tableaux.items()):
        if place % every == 0:  # the same several times over, among the others
            functions[f"calls {place}"] = jitted_calls(net)
            functions[f"noisy {place}"] = jitted_calls(net, key=key)
        needed = key if tableau.stochastic else None
        whole = jax.jit(lambda f, x, k, t=tableau: ds.sample(f, t, x, key=k))
        extra[name] = (memory(whole, score_fn, x_T, needed) - base[draws(tableau)]) / x_T.nbytes
        functions[name] = lambda f=whole, k=needed: f(score_fn, x_T, k)
    first = tableaux[names[0]]
    functions["scan"] = lambda: bare(score_fn.params, x_T)
    functions["unjitted"] = lambda: ds.sample(score_fn, first, x_T)
    # of one output or a few: a dense sampler would make all of them keep twenty
    one = jax.jit(ds.sample)
    quiet = [t for t in tableaux.values() if not t.stochastic and t.p + t.q <= 6]
    for i, t in enumerate(ds.Tableau.pad_together(quiet)):
        functions[f"one {i}"] = lambda t=t: one(score_fn, t, x_T)
    times = fastest(functions, seconds, rounds=ROUNDS)
    calls, noisies = (
        [times[name] for name in times if name.startswith(kind)] for kind in ("calls", "noisy")
    )
    times |= {"calls": float(np.median(calls)), "noisy": float(np.median(noisies))}
    result: dict[str, Any] = {
        name: (times[name] / times["noisy" if draws(t) else "calls"], extra[name], t.p + t.q)
        for name, t in tableaux.items()
    }
    result |= {name: times[name] for name in ("calls", "noisy")}
    result["least"], result["most"] = min(calls) / times["calls"], max(calls) / times["calls"]
    result |= {name: times[name] / times["calls"] for name in ("scan", "unjitted")}
    result["one"] = max(times[f"one {i}"] for i in range(len(quiet))) / times["calls"]
    return result


def measure_around(net: Network, seconds: float, only: str = "") -> dict[str, tuple[float, str]]:
    """{name: (time over jitted calls, what these are)}."""
    functions: dict[str, Callable[[], Any]] = {}
    chosen = {name: one for name, one in around(net).items() if only in name}
    key = jax.random.key(1)
    for name, one in chosen.items():
        functions[name] = lambda o=one: o.run(o.argument)
        functions[f"calls {name}"] = jitted_calls(
            net, one.calls, one.copies, key if one.noisy else None, one.pulls
        )
    times = fastest(functions, seconds, rounds=ROUNDS)
    return {name: (times[name] / times[f"calls {name}"], one.cost) for name, one in chosen.items()}


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="sizes for a GPU")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each network and table")
    parser.add_argument("--networks", type=int, default=COUNT, help="only the first few")
    parser.add_argument(
        "--skip", type=int, nargs="*", default=[], help="networks by number, from 0"
    )
    parser.add_argument("--kinds", nargs="*", default=list(CONVOLUTIONS), help="of convolutions")
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS))
    parser.add_argument("--out", default=str(RESULTS / "overhead.md"))
    arguments = parser.parse_args()

    names = tuple(arguments.solvers)
    chosen = [
        network(i, arguments.full) for i in range(arguments.networks) if i not in arguments.skip
    ]
    small = [convolutional(kind, 64 if arguments.full else 8) for kind in arguments.kinds]
    gradients = measure_gradients(small + chosen, arguments.seconds / 3)
    found, beside = [], []
    for each in chosen:
        found.append(measure(each, names, arguments.seconds))
        beside.append(measure_around(each, arguments.seconds))
        print(each.name, found[-1], beside[-1], flush=True)
    head = [each.name for each in chosen]
    text = heading("Overhead over jitted calls of the network")
    text += (
        f"\nTime of `ds.sample` in a `jit` over the time of {NFE} jitted calls of the network, the "
        f"fastest of alternating runs, {NFE} evaluations; for samplers that add noise in half of "
        "their rows or more (marked z) over calls that draw noise. Every sampler in its own shape. "
        "One program: all deterministic ones with p + q of at most 6, padded to one shape, the "
        f"slowest of them. Without a `jit`: `{names[0]}` as a plain call, which checks and binds "
        "its arguments every time. The calls are the median of "
        f"{COPIES} copies, compiled apart and run among the others; how far they lie apart is what "
        "a ratio here can be wrong by.\n\n"
    )
    noisy = {name: draws(tableau_of(name, ds.processes.flow())) for name in names}
    rows = [
        [f"{NFE} jitted calls, ms", *(f"{r['calls'] * 1e3:.2f}" for r in found)],
        [f"{NFE} with noise, ms", *(f"{r['noisy'] * 1e3:.2f}" for r in found)],
        ["copies of the calls", *(f"{r['least']:.3f} to {r['most']:.3f}" for r in found)],
        ["bare scan", *(f"{r['scan']:.3f}" for r in found)],
    ]
    rows += [
        [f"`{name}`" + " z" * noisy[name], *(f"{r[name][0]:.3f}" for r in found)] for name in names
    ]
    rows.append(["one program", *(f"{r['one']:.3f}" for r in found)])
    rows.append(["without `jit`", *(f"{r['unjitted']:.3f}" for r in found)])
    text += table(["", *head], rows)
    text += (
        f"\nConvolutions of all kinds, and gradients: `ds.sample` of DPM-Solver++ 2M over {NFE} "
        f"jitted calls, its gradient by the weights and the start over that of an Euler loop "
        f"around {NFE} jitted calls, and over {NFE} jitted gradients of the network by its weights "
        "and input, which no loop has to do with; with the memory that the gradient needs. "
        "Default: products, convolutions and sums are kept for the gradient. All: everything is "
        "(`jax.checkpoint_policies.everything_saveable`). True: the states only.\n\n"
    )
    text += table(
        [
            "network",
            "a call, ms",
            "`ds.sample`",
            "gradient over loop",
            "a gradient, ms",
            "gradient of `ds.sample`",
            "`checkpoint`: all",
            "`checkpoint=True`",
        ],
        gradients,
    )
    text += (
        "\nMemory over a bare scan, in states, as the compiler counts it; p + q is what the "
        "equation refers to.\n\n"
    )
    rows = [
        [f"`{name}`", str(found[0][name][2]), *(f"{r[name][1]:+.2f}" for r in found)]
        for name in names
    ]
    text += table(["", "p + q", *head], rows)
    text += (
        "\nWhat is put around the network, and runs that are no scan of a tableau: time over as "
        "many jitted calls, at the batch they make (in brackets). VJP: every call takes so many "
        "vector-Jacobian products, too; z: it draws noise.\n\n"
    )
    rows = [[name, *(f"{r[name][0]:.3f} ({r[name][1]})" for r in beside)] for name in beside[0]]
    text += table(["", *head], rows)
    with open(arguments.out, "w", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    main()
