"""`distill`: learn a tableau's times and coefficients by gradient descent.

Every deterministic, consistent tableau of N evaluations on falling levels has one canonical form
in data prediction,

    u_{n+1} = (sigma_{n+1}/sigma_n) u_n + kappa_n sum_{j<=n} G[n,j] D_j,
    kappa_n = alpha_{n+1} - alpha_n sigma_{n+1}/sigma_n,      sum_j G[n,j] = 1,

because its own x_T coefficient is sigma_n/sigma_0 (the tableau's self-check). The free numbers are
the log-SNRs of the inner points and the off-diagonal part of the lower triangular G: N - 1 and
N (N - 1) / 2. Any start is reproduced exactly, the weights are in units of the step, and a constant
data prediction stays exact whatever is learned. With consistent=False the row sums of G and the
coefficient of u_n are free as well (3 N - 2 numbers more in all, as in bespoke non-stationary
solvers).

References: Shaul et al. 2024 (BNS, arXiv:2403.01329): all coefficients and times free, mean
log-error to a fine solution at equal noise, warm start from a known solver.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import metrics
from diffsamp._checks import expect_int, expect_state
from diffsamp._numeric import as_float, namespace, silence
from diffsamp.processes import Process
from diffsamp.sampling import sample
from diffsamp.score import ScoreFn
from diffsamp.search.compare import compare
from diffsamp.search.objective import Progress, reference_tableau, run, slice_batch
from diffsamp.tableau import Tableau

__all__ = ["Plan", "can_distill", "canonical", "distill"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A sampler that was searched for, and what is known of it.

    Attributes:
      tableau: the sampler.
      nfe: its evaluations.
      start: name of the tableau the search started from.
      psnr: PSNR in dB to the reference at equal noise, by set and sampler: {"fit": {"start": ..,
        "found": ..}, "held_out": {..}}. The held-out noise took no part in the search.
      history: (step, training loss, PSNR on the stopping noise) at every evaluation.
      seconds: wall-clock time of the search, compilation included.
    """

    tableau: Tableau
    nfe: int
    start: str
    psnr: dict[str, dict[str, float]]
    history: tuple[tuple[int, float, float], ...]
    seconds: float


def canonical(tableau: Tableau) -> dict[str, np.ndarray]:
    """The numbers of the canonical form of a deterministic tableau; float64.

    Returns:
      "log_snr" (N - 1,) of the inner points, "weights" (N, N) strictly lower part of G, "sums"
      (N,) row sums of G minus 1 and "state" (N,) change of u_n's coefficient; the last two are 0
      up to rounding for a consistent tableau.

    Raises:
      ValueError: a stochastic tableau, rows without evaluation other than trailing padding, or
        levels that do not fall (multi-stage methods revisit one).
    """
    rows = tableau.nfe
    live = np.asarray(tableau.evaluates)
    if tableau.stochastic or not np.all(live[:rows]):
        raise ValueError(
            f"tableau {tableau.name!r} cannot be distilled: it must be deterministic, with every "
            "row making an evaluation."
        )
    alpha, sigma = tableau.alpha[: rows + 1], tableau.sigma[: rows + 1]
    rho = sigma[:-1] / np.maximum(alpha[:-1], 1e-300)
    if not (np.all(np.diff(rho) < 0) and sigma[-1] / alpha[-1] < rho[-1]):
        raise ValueError(
            f"tableau {tableau.name!r} cannot be distilled: its noise level must fall from row to "
            "row. Start from a method of one evaluation a step."
        )
    # u_n as weights on (x_T, D_0 .. D_{N-1}); m_j = w0 D_j + w1 (u_j - alpha_j D_j) / sigma_j
    full, outputs = np.zeros((rows + 1, rows + 1)), np.zeros((rows, rows + 1))
    full[0, 0] = 1.0
    for n in range(rows):
        w0, w1 = tableau.target[n]
        outputs[n] = w1 / sigma[n] * full[n]
        outputs[n, 1 + n] += w0 - w1 * alpha[n] / sigma[n]
        for i in range(min(tableau.p, n + 1)):
            full[n + 1] += tableau.a[n, i] * full[n - i]
        for j in range(min(tableau.q, n + 1)):
            full[n + 1] += tableau.b[n, j] * outputs[n - j]
    on_start, on_data = full[:, 0], full[:, 1:]
    ratio = sigma[1:] / sigma[:-1]
    kappa = alpha[1:] - alpha[:-1] * ratio
    state = on_start[1:] / on_start[:-1] - ratio
    weights = (on_data[1:] - (ratio + state)[:, None] * on_data[:-1]) / kappa[:, None]
    return {
        "log_snr": np.log(alpha[1:-1]) - np.log(sigma[1:-1]),
        "weights": np.tril(weights, -1),
        "sums": weights.sum(axis=1) - 1,
        "state": state,
    }


def from_canonical(
    numbers: Mapping[str, Any], ends: Mapping[str, Any], process: Process
) -> dict[str, Any]:
    """Arrays of the tableau with these numbers: the inverse of `canonical`.

    Works on the host in float64 and, differentiably, on JAX arrays.

    Args:
      numbers: as `canonical` returns them.
      ends: "times", "alpha" and "sigma", each (2,): the first and the last level, kept as given.
      process: the noise process.
    """
    xp = namespace(numbers["weights"])
    weights = as_float(numbers["weights"])
    rows = weights.shape[0]
    inner = process.time(numbers["log_snr"])
    levels = {"times": inner, "alpha": process.alpha(inner), "sigma": process.sigma(inner)}
    for name, value in levels.items():
        first_last = as_float(ends[name], weights)
        levels[name] = xp.concatenate([first_last[:1], value, first_last[1:]])
    alpha, sigma = levels["alpha"], levels["sigma"]
    ratio = sigma[1:] / sigma[:-1]
    kappa = alpha[1:] - alpha[:-1] * ratio
    lower = xp.tril(weights, -1)
    diagonal = 1 + as_float(numbers["sums"], weights) - xp.sum(lower, axis=1)
    square = (lower + diagonal[:, None] * xp.eye(rows, dtype=weights.dtype)) * kappa[:, None]
    # column j of `square` belongs to D_j; a tableau's column is the lag n - j
    lag = np.arange(rows)[:, None] - np.arange(rows)[None, :]
    b = xp.where(lag >= 0, xp.take_along_axis(square, np.maximum(lag, 0), axis=1), 0)
    target = xp.stack([xp.ones_like(ratio), xp.zeros_like(ratio)], axis=1)
    a = (ratio + as_float(numbers["state"], weights))[:, None]
    return {**levels, "target": target, "a": a, "b": b.astype(weights.dtype)}


def distill(
    score_fn: ScoreFn,
    x_T: Any,
    *,
    nfe: int | None = None,
    start: Tableau | None = None,
    key: Any,
    cond: Mapping[str, Any] | None = None,
    reference: Tableau | Any = None,
    held_out: int | None = None,
    steps: int = 400,
    batch: int = 64,
    learning_rate: float = 1e-2,
    optimizer: Any = None,
    consistent: bool = True,
    evaluate_every: int = 20,
    patience: int | None = None,
    checkpoint: bool = True,
    data_range: float = 2.0,
    progress: Progress | None = None,
) -> Plan:
    """Learn a sampler of `nfe` evaluations for this network.

    Gradient descent on the mean log squared error to a fine solution from the same noise, through
    the sampler. The samples are split in three: to fit, to stop (the numbers kept are the best
    there), and held out to report.

    Args:
      score_fn: the network.
      x_T: (n, ...) starts at the process's t_max, an array.
      nfe: the budget. May be left out if `start` is given.
      start: the tableau to start from: deterministic, one evaluation a row, falling levels. None:
        the best of `compare` on the fit noise.
      key: random key for the order of the minibatches.
      cond: keyword arguments for the network, every array with the leading axis n.
      reference: the samples to come close to, shaped like x_T, or the tableau that makes them;
        None: `reference_tableau`.
      held_out: how many of the n starts are kept from fitting, half of them to stop and half to
        report; at least 2. None: a quarter.
      steps: gradient steps.
      batch: samples a step, also the largest number run at once.
      learning_rate: peak of Adam's rate, which decays to 0 along a cosine.
      optimizer: an optax GradientTransformation; None: Adam as said, gradients clipped to norm 1.
      consistent: keep a constant data prediction exact; False frees more numbers.
      evaluate_every: steps between looks at the stopping noise.
      patience: stop after this many looks without a gain; None: never.
      checkpoint: recompute the network in the backward pass, to bound memory.
      data_range: largest minus smallest value of the data, for the PSNR.
      progress: called with (what, done, total).

    Returns:
      A `Plan`. Its tableau is never worse on the stopping noise than the start, which is the
      first candidate; a run that diverges ends there and keeps what was best before.

    Raises:
      ValueError: no budget, a start of another budget, too few starts, or a reference that is not
        finite.
      ModuleNotFoundError: optax is missing.
    """
    began = time.perf_counter()
    _optax()  # if it is missing, say so before the work
    size = expect_state(x_T, "x_T", batched=True)
    assert size is not None
    steps = expect_int(steps, "steps", at_least=1)
    evaluate_every = expect_int(evaluate_every, "evaluate_every", at_least=1)
    held = max(2, size // 4) if held_out is None else expect_int(held_out, "held_out", at_least=2)
    fit = size - held
    if fit < 1:
        raise ValueError(f"`x_T` has {size} starts, of which {held} are held out: none is left.")
    batch = min(expect_int(batch, "batch", at_least=1), fit)
    process = score_fn.process
    if reference is None:
        reference = reference_tableau(process)
    if isinstance(reference, Tableau):
        reference = run(
            score_fn, reference, x_T, cond=cond, batch=batch, progress=progress, what="reference"
        )
    if not bool(jnp.all(jnp.isfinite(reference))):
        raise ValueError("the reference samples are not all finite; look at the network first.")
    if start is None:
        if nfe is None:
            raise ValueError("give `nfe`, the budget, or a tableau to `start` from.")
        found = compare(
            score_fn, x_T[:batch], nfe=[nfe], cond=slice_batch(cond, 0, batch),
            reference=reference[:batch], data_range=data_range, progress=progress,
        )  # fmt: skip
        start = found.best(nfe, where=lambda entry: can_distill(entry.tableau)).tableau
    if nfe is not None and start.nfe != nfe:
        raise ValueError(f"`start` makes {start.nfe} evaluations, not the {nfe} asked for.")

    base = canonical(start)
    rows = start.nfe
    ends = {k: np.asarray(getattr(start, k))[[0, rows]] for k in ("times", "alpha", "sigma")}
    scale = _scales(base, start)
    free = {"log_snr", "weights"} if consistent else set(base)
    moved = {name: jnp.zeros(base[name].shape, jnp.float32) for name in sorted(free)}
    if optimizer is None:
        optimizer = _default_optimizer(steps, float(learning_rate))
    optimizer_state = optimizer.init(moved)
    fixed = (base, ends, scale)

    def psnr(moved: Mapping[str, Any], first: int, last: int) -> float:
        arrays = _arrays(moved, fixed, process, host=True)
        if not all(np.all(np.isfinite(array)) for array in arrays.values()):
            return -np.inf
        tableau = Tableau.create(**arrays, check="none")
        part = slice_batch(cond, first, last)
        x = run(score_fn, tableau, x_T[first:last], cond=part, batch=batch)
        if not bool(jnp.all(jnp.isfinite(x))):
            return -np.inf
        return float(metrics.psnr(x, reference[first:last], data_range=data_range))

    stop_end = fit + held // 2
    key_order = key
    best, best_moved = psnr(moved, fit, stop_end), moved
    history = [(0, float("nan"), best)]
    since_gain, order, loss = 0, np.arange(0), float("nan")
    for step in range(1, steps + 1):
        if order.size < batch:
            key_order, key_epoch = jax.random.split(key_order)
            order = np.asarray(jax.random.permutation(key_epoch, fit))
        index, order = order[:batch], order[batch:]
        moved, optimizer_state, loss = _fit_step(
            moved,
            optimizer_state,
            fixed,
            score_fn,
            x_T[index],
            jax.tree.map(lambda leaf, at=index: leaf[at], cond),
            reference[index],
            optimizer=optimizer,
            checkpoint=checkpoint,
        )
        if step % evaluate_every == 0 or step == steps:
            value = psnr(moved, fit, stop_end)
            history.append((step, float(loss), value))
            since_gain = 0 if value > best else since_gain + 1
            if value > best:
                best, best_moved = value, moved
            lost = not np.isfinite(float(loss))  # nothing finite comes after
            if lost or (patience is not None and since_gain >= patience):
                break
        if progress is not None:
            progress("distilling", step, steps)

    arrays = _arrays(best_moved, fixed, process, host=True)
    tableau = Tableau.create(
        **arrays,
        name=f"distilled from {start.name}, {rows} NFE",
        source=f"diffsamp.search.distill (after arXiv:2403.01329); start: {start.source}",
        check="full" if consistent and _is_consistent(start) else "none",
    )
    zero = jax.tree.map(jnp.zeros_like, moved)
    report = {
        name: {"start": psnr(zero, *span), "found": psnr(best_moved, *span)}
        for name, span in {"fit": (0, min(fit, held)), "held_out": (stop_end, size)}.items()
    }
    return Plan(tableau, rows, start.name, report, tuple(history), time.perf_counter() - began)


def _optax() -> Any:
    try:
        import optax
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'distill needs optax: pip install "diffsamp[search]"', name="optax"
        ) from error
    return optax


@functools.lru_cache(maxsize=16)
def _default_optimizer(steps: int, learning_rate: float) -> Any:
    """Made once per setting, so that the compiled step, which holds it statically, is reused."""
    optax = _optax()
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(learning_rate, steps)),
    )


def can_distill(tableau: Tableau) -> bool:
    """Whether `distill` can start from this tableau (see `canonical`)."""
    try:
        canonical(tableau)
    except ValueError:
        return False
    return True


def _is_consistent(tableau: Tableau) -> bool:
    try:
        tableau.check()
    except ValueError:
        return False
    return True


def _scales(base: Mapping[str, np.ndarray], start: Tableau) -> dict[str, np.ndarray]:
    """How far a unit of each learned number moves: times in units of the smaller adjacent step."""
    alpha, sigma = start.alpha, start.sigma
    log_snr = np.append(
        np.log(np.maximum(alpha[: start.nfe], 1e-4)) - np.log(sigma[: start.nfe]), np.inf
    )
    gap = np.diff(log_snr)
    near = np.minimum(gap[:-1], gap[1:]) if gap.size > 1 else gap[:0]
    one = {name: np.ones_like(value) for name, value in base.items()}
    return {**one, "log_snr": near}


@silence
def _arrays(
    moved: Mapping[str, Any], fixed: Any, process: Process, *, host: bool
) -> dict[str, Any]:
    """The tableau's arrays for learned changes `moved`, in float64 on the host or in JAX."""
    base, ends, scale = fixed
    if host:
        moved = {name: np.asarray(value, np.float64) for name, value in moved.items()}
    else:
        as_jax = functools.partial(jax.tree.map, lambda v: jnp.asarray(v, jnp.float32))
        base, ends, scale = as_jax(base), as_jax(ends), as_jax(scale)
    numbers = {
        name: value + scale[name] * moved[name] if name in moved else value
        for name, value in base.items()
    }
    return from_canonical(numbers, ends, process)


@functools.partial(jax.jit, static_argnames=("optimizer", "checkpoint"))
def _fit_step(
    moved, optimizer_state, fixed, score_fn, x_T, cond, reference, *, optimizer, checkpoint
):
    def loss_of(moved: Any) -> jax.Array:
        arrays = _arrays(moved, fixed, score_fn.process, host=False)
        rows = arrays["a"].shape[0]
        tableau = Tableau(**arrays, c=jnp.zeros(rows, jnp.float32), evaluates=np.ones(rows, bool))
        x = sample(score_fn, tableau, x_T, cond=cond, checkpoint=checkpoint)
        error = metrics.mean_squared_error(x, reference)
        return jnp.mean(jnp.log(jnp.maximum(error, jnp.finfo(error.dtype).tiny)))

    loss, gradient = jax.value_and_grad(loss_of)(moved)
    # optax mixes its int32 counters with floats; callers may run with strict promotion
    with jax.numpy_dtype_promotion("standard"):
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, moved)
        moved = _optax().apply_updates(moved, updates)
    return moved, optimizer_state, loss
