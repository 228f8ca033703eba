"""A shortcut and a consistency student of the bundled digits, against searched plans.

    python benchmarks/students.py

Trains both from the pretrained weights, in minutes on two cores, and measures them at 1, 2 and 4
evaluations beside the plans that `search.regress` finds for the unchanged network. Writes
`results/students.md` and `docs/plots/students.png`.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _report import RESULTS, heading, table

import diffsamp as ds
from diffsamp.models import digits

BUDGETS = (1, 2, 4)
LARGEST = 4  # 16 smallest steps of the shortcut model
TEACHER = digits.load_digits_model()
FLOW = ds.processes.flow()
IMAGES, LABELS = digits.load_data()
COUNT = 1000
Params = Any


def stepped(
    params: Params, x: jax.Array, t: jax.Array, label: jax.Array, dt: jax.Array
) -> jax.Array:
    """The digits' network with the step's length added to every row of its table of classes."""
    others = {k: v for k, v in params["network"].items() if k != "label_embedding"}
    moved = params["step"][jnp.round(dt).astype(jnp.int32)]
    tables = params["network"]["label_embedding"][None] + moved[:, None]

    def one(table: jax.Array, x: jax.Array, t: jax.Array, label: jax.Array) -> jax.Array:
        own = {**others, "label_embedding": table}
        return digits.apply(own, x[None], t[None], label[None])[0]

    return jax.vmap(one)(tables, x, t, label)


def velocity(
    params: Params, x: jax.Array, t: jax.Array, label: jax.Array, dt: jax.Array
) -> jax.Array:
    """What the network of levels sigma / alpha says, as a flow's velocity."""
    rho = jnp.clip(t / jnp.maximum(1 - t, 1e-6), 0.002, 80.0)
    own = dataclasses.replace(TEACHER, apply=stepped, params=params)
    scale = (rho / t)[:, None, None, None]
    data = own(x * scale, rho, prediction="data", cond={"label": label, "dt": dt})
    return (x - data) / t[:, None, None, None]


def train(
    make: Callable[[Params], ds.ScoreFn],
    target: Callable[[ds.ScoreFn, jax.Array, jax.Array, dict[str, jax.Array]], Any],
    params: Params,
    arguments: argparse.Namespace,
) -> tuple[ds.ScoreFn, float]:
    """The student with its running mean of weights, and the seconds that it took."""
    optimizer = optax.adam(optax.cosine_decay_schedule(arguments.rate, arguments.steps))

    @jax.jit
    def step(carry: Any, number: jax.Array) -> tuple[Any, jax.Array]:
        params, average, state = carry
        pick, key = jax.random.split(jax.random.fold_in(jax.random.key(arguments.seed), number))
        index = jax.random.randint(pick, (arguments.batch,), 0, len(IMAGES))
        cond = {"label": jnp.asarray(LABELS)[index]}
        wanted = target(make(average), key, jnp.asarray(IMAGES)[index], cond)

        def loss(params: Params) -> jax.Array:
            return jnp.mean(ds.students.loss(make(params), wanted))

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: a + 0.01 * (p - a), average, params)
        return (params, average, state), value

    carry, began = (params, params, optimizer.init(params)), time.perf_counter()
    losses = []
    for number in range(arguments.steps):
        carry, value = step(carry, jnp.int32(number))
        losses.append(value)
        if (number + 1) % 100 == 0:
            print(number + 1, float(jnp.mean(jnp.stack(losses[-100:]))), flush=True)
    return make(carry[1]), time.perf_counter() - began


def shortcut(arguments: argparse.Namespace) -> tuple[ds.ScoreFn, float]:
    """Trained on the data and on two of its own half steps."""
    width = TEACHER.params["label_embedding"].shape[1]
    params = {"network": TEACHER.params, "step": jnp.zeros((LARGEST + 1, width))}

    def make(params: Params) -> ds.ScoreFn:
        return ds.ScoreFn(velocity, params, FLOW, prediction="velocity")

    def target(network: ds.ScoreFn, key: jax.Array, x_0: jax.Array, cond: Any) -> Any:
        return ds.students.shortcut(network, key, x_0, cond, largest=LARGEST, bootstrap=0.5)

    return train(make, target, params, arguments)


def consistency(arguments: argparse.Namespace) -> tuple[ds.ScoreFn, float]:
    """Distilled from the pretrained network, a Heun step at a time."""
    times = np.append(ds.schedules.karras(TEACHER.process, 12)[:-1], 0.0)

    def make(params: Params) -> ds.ScoreFn:
        return dataclasses.replace(TEACHER, params=params)

    def target(network: ds.ScoreFn, key: jax.Array, x_0: jax.Array, cond: Any) -> Any:
        return ds.students.consistency_distillation(
            network, key, x_0, cond, teacher=TEACHER, times=times
        )

    return train(make, target, TEACHER.params, arguments)


def measured(x: jax.Array, classes: np.ndarray) -> tuple[float, float, float]:
    """Frechet distance of pixels, energy distance, and the share whose nearest image has the
    class that was asked for."""
    x = np.asarray(x)
    gap = ((x.reshape(len(x), 1, -1) - IMAGES.reshape(1, len(IMAGES), -1)) ** 2).sum(2)
    right = float(np.mean(LABELS[np.argmin(gap, axis=1)] == classes))
    energy = float(ds.metrics.energy_distance(jnp.asarray(x), jnp.asarray(IMAGES)))
    return ds.metrics.frechet_distance(x, IMAGES), energy, right


def main() -> None:
    """Train, search, measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="of the optimiser, each student")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=5e-4, help="of Adam, falling to 0")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    classes = np.arange(COUNT) % 10
    cond = {"label": jnp.asarray(classes, jnp.int32)}
    x_T = TEACHER.process.prior_sample(jax.random.key(1), (COUNT, *digits.IMAGE_SHAPE))
    found: dict[tuple[str, int], tuple[float, float, float]] = {}
    pictures: list[tuple[str, np.ndarray]] = []

    def note(name: str, n: int, network: Any, tableau: ds.Tableau, start: jax.Array) -> None:
        key = jax.random.key(3) if tableau.stochastic else None
        x = ds.search.run(network, tableau, start, key=key, cond=cond, batch=250)
        found[name, n] = measured(x, classes)
        pictures.append((f"{name}, {n}", np.asarray(x)[:10]))
        print(name, n, found[name, n], flush=True)

    flow_start = jax.random.normal(jax.random.key(1), x_T.shape)
    own, second = shortcut(arguments)
    for n in BUDGETS:
        note(
            "shortcut student",
            n,
            ds.few_step.shortcut(own),
            ds.few_step.uniform_tableau(FLOW, n),
            flow_start,
        )
    process = TEACHER.process
    own, third = consistency(arguments)
    for n in BUDGETS:
        times = np.append(ds.schedules.karras(process, 12)[: -1 : 12 // n], 0.0)
        tableau = ds.solvers.consistency(process, times)
        assert tableau.nfe == n
        note("consistency student", n, own, tableau, x_T)

    began, spent = time.perf_counter(), 0.0
    few = process.prior_sample(jax.random.key(0), (64, *digits.IMAGE_SHAPE))
    few_cond = {"label": jnp.arange(64) % 10}
    for n in BUDGETS:
        plan = ds.search.regress(TEACHER, few, nfe=n, key=jax.random.key(2), cond=few_cond)
        spent += plan.settings["evaluations"]
        note("searched plan", n, TEACHER, plan.tableau, x_T)
    searching = time.perf_counter() - began
    for n in BUDGETS:
        note("DDIM", n, TEACHER, ds.solvers.ddim(process, ds.schedules.logsnr(process, n)), x_T)
    fine = ds.search.reference_tableau(process, 40)
    exact = ("teacher's ODE", fine.nfe)
    note(*exact, TEACHER, fine, x_T)
    halves = measured(jnp.asarray(IMAGES[::2]), LABELS[::2])[:2]

    names = list(dict.fromkeys(name for name, n in found if n in BUDGETS))
    cells = {key: f"{a:.2f}, {b:.3f}, {c:.2f}" for key, (a, b, c) in found.items()}
    rows = [[name, *(cells[name, n] for n in BUDGETS)] for name in names]
    text = [
        heading("Students of the digits against searched plans", "optax"),
        f"Frechet distance of the pixels to the data, energy distance to them, and the share of "
        f"{COUNT} samples whose nearest image of the data has the class that was asked for, by "
        "evaluations:\n",
        table(["", *map(str, BUDGETS)], rows),
        f"\nThe teacher's ODE in {fine.nfe} evaluations: {cells[exact]}. "
        f"Half of the data: {halves[0]:.2f}, {halves[1]:.3f}.\n",
        f"Training: {arguments.steps} steps of {arguments.batch} images; the shortcut student "
        f"{second:.0f} s, the consistency student {third:.0f} s, on a machine that others used, "
        f"too. The searches for the plans: {spent:,.0f} evaluations, {searching:.0f} s.",
    ]
    (RESULTS / "students.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    plots = RESULTS.parent.parent / "docs" / "plots"
    shown = [p for p in pictures if not p[0].startswith("DDIM")]
    ds.plot.save(ds.plot.image_grid(shown), plots / "students.png")


if __name__ == "__main__":
    main()
