"""What is put around the network, and runs that are no scan of a tableau, for `overhead.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from networks import Network

import diffsamp as ds
from diffsamp import guidance, steering

NFE = 20
WINDOW = 4  # rows of `sample_parallel` that are evaluated together
PARTICLES = 4


class Around(NamedTuple):
    """One thing to be timed, and what it is held against.

    Attributes:
      run: compiled, argument -> samples.
      argument: what it is called with.
      calls: jitted calls of the network.
      copies: of the batch in each.
      pulls: vector-Jacobian products of the network in each.
      noisy: the calls draw noise, too.
    """

    run: Callable[[Any], Any]
    argument: Any
    calls: int
    copies: int = 1
    pulls: int = 0
    noisy: bool = False

    @property
    def cost(self) -> str:
        """As the table says it."""
        pulls = f", {self.pulls} VJP" if self.pulls else ""
        return f"{self.calls} x {self.copies}{pulls}" + " z" * self.noisy


def score_fn_of(net: Network, process: Any) -> ds.ScoreFn:
    """The network as one that predicts velocity."""
    dtype = jax.tree.leaves(net.params)[0].dtype
    return ds.ScoreFn(net.apply, net.params, process, prediction="velocity", dtype=dtype)


def around(net: Network) -> dict[str, Around]:
    """By name: transforms, and other ways to run."""
    return {**_transforms(net), **_losses(net), **_noisy(net), **_runs(net)}


def _scanned(tableau: ds.Tableau, x_T: Any, cond: Any = None, key: Any = None) -> Any:
    return jax.jit(lambda f: ds.sample(f, tableau, x_T, cond=cond, key=key))


def _conditional(net: Network, process: Any) -> tuple[ds.ScoreFn, dict[str, Any]]:
    """The network with a label that shifts its time, and the conditions."""

    def apply(params: Any, x: Any, t: Any, label: Any) -> Any:
        return net.apply(params, x, t + label.astype(t.dtype))

    given = dataclasses.replace(score_fn_of(net, process), apply=apply)
    return given, {"label": jnp.zeros(net.batch)}


def _ode(process: Any, rows: int = NFE) -> ds.Tableau:
    return ds.solvers.dpmpp(process, ds.schedules.logsnr(process, rows), order=2)


def _transforms(net: Network) -> dict[str, Around]:
    """Without gradients or noise."""
    process = ds.processes.flow()
    score_fn, x_T, tableau = score_fn_of(net, process), net.start(), _ode(process)
    given, label = _conditional(net, process)
    unfolded, which = guidance.unfold(_ode(process, NFE // 2), 3.0)

    def positive(data: Any, level: Any, cond: Any) -> Any:
        return jnp.maximum(data, 0)

    plain, guided = _scanned(tableau, x_T), _scanned(tableau, x_T, label)
    null = {"label": 0.0}
    three = [(given, {}), (given, null), (given, {"label": 1.0})]
    known = guidance.first_answer(score_fn, "linear")
    found = {
        "cfg": Around(guided, guidance.cfg(given, 3.0, null), NFE, 2),
        "combine": Around(guided, guidance.combine(three, [3.0, -1.0, -1.0]), NFE, 3),
        "apg": Around(guided, guidance.apg(given, 3.0, null), NFE, 2),
        "rescale": Around(guided, guidance.rescale(given, 3.0, null), NFE, 2),
        "tcfg": Around(guided, guidance.tcfg(given, 3.0, null), NFE, 2),
        "cfg_zero_star": Around(guided, guidance.cfg_zero_star(given, 3.0, null), NFE, 2),
        "select` of `unfold": Around(
            _scanned(unfolded, x_T, label), guidance.select(given, null, which), unfolded.nfe
        ),
        "static_thresholding": Around(plain, guidance.static_thresholding(score_fn), NFE),
        "dynamic_thresholding": Around(plain, guidance.dynamic_thresholding(score_fn), NFE),
        "on_data": Around(plain, guidance.on_data(score_fn, positive), NFE),
        "first_answer": Around(plain, known, int(known.nfe(tableau))),
    }
    return {f"`guidance.{name}`": one for name, one in found.items()}


def _losses(net: Network) -> dict[str, Around]:
    """Losses and measurements: calls and vector-Jacobian products."""
    process = ds.processes.flow()
    score_fn, x_T, tableau = score_fn_of(net, process), net.start(), _ode(process)
    mask = (jnp.arange(x_T[0].size) % 2).reshape(x_T.shape[1:]).astype(jnp.float32)
    y = 0.1 * mask * jnp.ones(x_T.shape)

    def seen(data: Any) -> Any:
        return data * mask.astype(data.dtype)

    def misfit(data: Any, level: Any, cond: Any) -> Any:
        return jnp.sum((seen(data) - y.astype(data.dtype)).reshape(len(data), -1) ** 2, axis=1)

    ddim = ds.solvers.ddim(process, ds.schedules.logsnr(process, NFE))
    plain = _scanned(tableau, x_T)
    iterations = 3
    measured = {
        kind: guidance.measurement(
            score_fn, seen, y, 0.1, covariance=kind, iterations=iterations, spread=0.5
        )
        for kind in ("jacobian", "isotropic", "scalar")
    }
    through = guidance.loss(score_fn, misfit, 0.1)
    data = guidance.loss(score_fn, misfit, 0.1, through="data")
    found = {
        "loss` through the network": Around(plain, through, NFE, pulls=1),
        "loss` through the data": Around(plain, data, NFE),
        "tfg": Around(
            _scanned(ddim, x_T), guidance.tfg(score_fn, misfit, ddim, 0.01, 0.01), NFE, pulls=1
        ),
        "measurement`, jacobian, 3 iterations": Around(
            plain, measured["jacobian"], NFE, pulls=iterations + 1
        ),
        "measurement`, isotropic": Around(plain, measured["isotropic"], NFE, pulls=1),
        "measurement`, scalar": Around(plain, measured["scalar"], NFE),
    }
    return {f"`guidance.{name}" + "`" * ("`" not in name): one for name, one in found.items()}


def _noisy(net: Network) -> dict[str, Around]:
    """What draws noise: annealed conditions, a learned variance, particles."""
    process, key = ds.processes.vp_linear(), jax.random.key(1)
    x_T, tableau = net.start(), _ode(process)
    score_fn = dataclasses.replace(score_fn_of(net, process), prediction="noise")
    times = ds.schedules.logsnr(process, NFE)

    def embedded(params: Any, x: Any, t: Any, text: Any) -> Any:
        return net.apply(params, x, t + text.mean(1).astype(t.dtype))

    def ranged(params: Any, x: Any, t: Any) -> Any:
        return net.apply(params, x, t), 0 * x

    texts = dataclasses.replace(score_fn, apply=embedded)
    cond = {"text": jnp.ones((net.batch, 64))}
    learned = ds.solvers.ddpm(process, times, variance="learned")
    pair = dataclasses.replace(score_fn, apply=ranged)
    ddpm = ds.solvers.ddpm(process, times)
    starts = jnp.stack([x_T] * PARTICLES, axis=1)

    def ink(data: Any, level: Any, cond: Any) -> Any:
        return jnp.mean(data.reshape(len(data), -1), axis=1)

    def steered(score_fn: Any) -> Any:
        potential = steering.reward(ink, 0.1)
        return steering.sample(
            score_fn, ddpm, starts, key=key, potential=potential, particles=PARTICLES
        )

    return {
        "`guidance.anneal_condition`": Around(
            _scanned(tableau, x_T, cond), guidance.anneal_condition(texts, "text", key), NFE
        ),
        "`guidance.learned_range`": Around(
            _scanned(learned, x_T), guidance.learned_range(pair, learned, key), NFE, noisy=True
        ),
        "`steering.sample`": Around(jax.jit(steered), score_fn, NFE, PARTICLES, noisy=True),
    }


def _runs(net: Network) -> dict[str, Around]:
    """Other kinds of model, and other ways to run."""
    process = ds.processes.flow()
    score_fn, x_T, tableau = score_fn_of(net, process), net.start(), _ode(process)
    given, _ = _conditional(net, process)
    steps = ds.few_step.uniform_tableau(process, 16)

    def in_pairs(params: Any, z: Any, t: Any) -> Any:
        return net.apply(params, z.reshape(-1, *net.shape), t).reshape(z.shape)

    pairs = x_T.reshape(net.batch, -1, 2)  # data and momentum in place of neighbours
    phase, rows = ds.phase_space.sampler(
        ds.ScoreFn(in_pairs, net.params, ds.phase_space.psld(), dtype=score_fn.dtype),
        np.linspace(1.0, 1e-3, NFE // 2 + 1),
    )

    def parallel(score_fn: Any) -> Any:
        return ds.parallel.sample_parallel(score_fn, tableau, x_T, window=WINDOW, tolerance=0.0)

    def adaptive(score_fn: Any) -> Any:
        return ds.adaptive.ode_solution(score_fn, x_T, process.t_max, 1e-3, rtol=1e-2, atol=1e-2)

    sweeps = int(jnp.max(parallel(score_fn).sweeps))
    calls = int(jnp.max(adaptive(score_fn).nfe))
    shifted = ds.time_shift.time_shift(score_fn, window=0.1, cutoff=0.2)
    return {
        "`time_shift.time_shift`": Around(_scanned(tableau, x_T), shifted, NFE),
        "`few_step.shortcut`": Around(
            _scanned(steps, x_T), ds.few_step.shortcut(given, name="label"), steps.nfe
        ),
        "`phase_space.sampler`": Around(_scanned(rows, pairs), phase, NFE),
        "`parallel.sample_parallel`": Around(jax.jit(parallel), score_fn, sweeps, WINDOW),
        "`adaptive.ode_solution`": Around(adaptive, score_fn, calls),  # compiled inside
    }
