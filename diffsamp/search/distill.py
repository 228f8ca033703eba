"""`distill`: learn a tableau's times and coefficients by gradient descent, in canonical form.

The start is reproduced exactly at step 0, weights are in units of the step, and a constant data
prediction stays exact whatever is learned (see `canonical`).

Reference: Shaul et al. 2024 (BNS, arXiv:2403.01329): all coefficients and times free, mean
log-error to a fine solution at equal noise, warm start from a known solver.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import metrics, solvers
from diffsamp._checks import expect_int, expect_state
from diffsamp._numeric import silence
from diffsamp.processes import Process
from diffsamp.sampling import sample
from diffsamp.score import ScoreFn
from diffsamp.search.canonical import can_distill, canonical, from_canonical
from diffsamp.search.compare import Comparison, compare
from diffsamp.search.objective import Progress, reference_tableau, run, slice_batch
from diffsamp.tableau import Tableau

__all__ = ["Plan", "candidates", "distill"]


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


def distill(
    score_fn: ScoreFn,
    x_T: Any,
    *,
    nfe: int | None = None,
    start: Tableau | Sequence[Tableau] | None = None,
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
      start: the tableau to start from: deterministic, one evaluation a row, falling levels. Of
        several, each is tried for an eighth of the steps and the one that got furthest is taken.
        None: the best of each of four families of solvers in `compare`, on the fit noise.
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
    if reference is None:
        reference = reference_tableau(score_fn.process)
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
        starts = candidates(found, nfe)
    else:
        starts = [start] if isinstance(start, Tableau) else list(start)
    for one in starts:
        if nfe is not None and one.nfe != nfe:
            raise ValueError(f"`start` makes {one.nfe} evaluations, not the {nfe} asked for.")
    if not starts:
        raise ValueError("`start` must hold at least one tableau.")
    if optimizer is None:
        optimizer = _default_optimizer(steps, float(learning_rate))
    problem = _Problem(
        score_fn, x_T, cond, reference, fit, fit + held // 2, batch, data_range, key, optimizer,
        checkpoint, consistent, evaluate_every,
    )  # fmt: skip
    if len(starts) > 1:
        # a short run from each: what is best to start from is not what is best as it stands
        trial = max(evaluate_every, steps // 8)
        reached = []
        for i, one in enumerate(starts):
            reached.append(problem.descend(one, trial).psnr)
            if progress is not None:
                progress("trying starts", i + 1, len(starts))
        starts = [starts[int(np.argmax(reached))]]
    best = problem.descend(starts[0], steps, patience, progress)

    chosen = starts[0]
    tableau = Tableau.create(
        **problem.arrays(best),
        name=f"distilled from {chosen.name}, {chosen.nfe} NFE",
        source=f"diffsamp.search.distill (after arXiv:2403.01329); start: {chosen.source}",
        check="full" if consistent and _is_consistent(chosen) else "none",
    )
    zero = dataclasses.replace(best, moved=jax.tree.map(jnp.zeros_like, best.moved))
    report = {
        name: {"start": problem.psnr(zero, *span), "found": problem.psnr(best, *span)}
        for name, span in {"fit": (0, min(fit, held)), "held_out": (problem.stop, size)}.items()
    }
    seconds = time.perf_counter() - began
    return Plan(tableau, chosen.nfe, chosen.name, report, best.history, seconds)


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """Learned changes `moved` of a start whose numbers are `fixed`, and how good they are."""

    fixed: Any
    moved: Any
    psnr: float
    history: tuple[tuple[int, float, float], ...]


@dataclasses.dataclass(frozen=True)
class _Problem:
    """What stays the same over the starts of one search: fit on [0, fit), stop on [fit, stop)."""

    score_fn: ScoreFn
    x_T: Any
    cond: Any
    reference: Any
    fit: int
    stop: int
    batch: int
    data_range: float
    key: Any
    optimizer: Any
    checkpoint: bool
    consistent: bool
    evaluate_every: int

    def arrays(self, candidate: _Candidate) -> dict[str, Any]:
        """The tableau's arrays, float64 on the host."""
        return _arrays(candidate.moved, candidate.fixed, self.score_fn.process, host=True)

    def psnr(self, candidate: _Candidate, first: int, last: int) -> float:
        """PSNR on samples first .. last - 1; -inf if anything is not finite."""
        arrays = self.arrays(candidate)
        if not all(np.all(np.isfinite(array)) for array in arrays.values()):
            return -np.inf
        tableau = Tableau.create(**arrays, check="none")
        part = slice_batch(self.cond, first, last)
        x = run(self.score_fn, tableau, self.x_T[first:last], cond=part, batch=self.batch)
        if not bool(jnp.all(jnp.isfinite(x))):
            return -np.inf
        return float(metrics.psnr(x, self.reference[first:last], data_range=self.data_range))

    def descend(
        self,
        start: Tableau,
        steps: int,
        patience: int | None = None,
        progress: Progress | None = None,
    ) -> _Candidate:
        """Gradient descent from `start`; the best candidate seen on the stopping samples."""
        base = canonical(start)
        ends = {
            k: np.asarray(getattr(start, k))[[0, start.nfe]] for k in ("times", "alpha", "sigma")
        }
        free = {"log_snr", "weights"} if self.consistent else set(base)
        moved = {name: jnp.zeros(base[name].shape, jnp.float32) for name in sorted(free)}
        state = self.optimizer.init(moved)
        best = _Candidate((base, ends, _scales(base, start)), moved, -np.inf, ())
        best = dataclasses.replace(best, psnr=self.psnr(best, self.fit, self.stop))
        history = [(0, float("nan"), best.psnr)]
        key, since_gain, order = self.key, 0, np.arange(0)
        for step in range(1, steps + 1):
            if order.size < self.batch:
                key, key_epoch = jax.random.split(key)
                order = np.asarray(jax.random.permutation(key_epoch, self.fit))
            index, order = order[: self.batch], order[self.batch :]
            moved, state, loss = _fit_step(
                moved,
                state,
                best.fixed,
                self.score_fn,
                self.x_T[index],
                jax.tree.map(lambda leaf, at=index: leaf[at], self.cond),
                self.reference[index],
                optimizer=self.optimizer,
                checkpoint=self.checkpoint,
            )
            if step % self.evaluate_every == 0 or step == steps:
                now = dataclasses.replace(best, moved=moved)
                value = self.psnr(now, self.fit, self.stop)
                history.append((step, float(loss), value))
                since_gain = 0 if value > best.psnr else since_gain + 1
                if value > best.psnr:
                    best = dataclasses.replace(now, psnr=value)
                lost = not np.isfinite(float(loss))  # nothing finite comes after
                if lost or (patience is not None and since_gain >= patience):
                    break
            if progress is not None:
                progress("distilling", step, steps)
        return dataclasses.replace(best, history=tuple(history))


def candidates(found: Comparison, nfe: int, *, most: int = 4) -> list[Tableau]:
    """Samplers to `start` from: the best at a budget, no two of one family of solvers.

    Args:
      found: what `compare` returned.
      nfe: the budget.
      most: how many.

    Raises:
      ValueError: nothing of this budget can be distilled.
    """
    starts: dict[Any, Tableau] = {}
    for entry in sorted(found.entries, key=lambda e: -e.psnr):
        family = solvers.get(entry.solver).function
        if entry.nfe == nfe and family not in starts and can_distill(entry.tableau):
            starts[family] = entry.tableau
    if not starts:
        raise ValueError(f"no sampler of {nfe} evaluations can be distilled; give a `start`.")
    return list(starts.values())[:most]


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
