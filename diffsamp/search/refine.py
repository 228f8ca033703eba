"""`refine`: Levenberg-Marquardt on all numbers of a sampler, from forward evaluations alone.

A sampler of N evaluations is a few dozen numbers, so a second-order method fits. The residual of
start k is (u_N - reference) / sqrt(mse_k), with mse_k of the present table kept fixed within an
iteration, so that an iteration descends the mean log squared error, which is what is reported, and
no start dominates. The Jacobian is by forward differences, one run of the sampler a number; its
normal equations are summed over batches of starts.

References: Marquardt 1963 (doi:10.1137/0111030) for the iteration; Shaul et al. 2024
(arXiv:2403.01329) for the free numbers and the error.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from diffsamp._core.checks import expect_int
from diffsamp._core.digest import seed_of
from diffsamp._core.types import Conditions, Key, PyTree, Sharding
from diffsamp.processes import Process
from diffsamp.score import ScoreFn
from diffsamp.search._cost import expect_limit
from diffsamp.search._network import describe_network
from diffsamp.search.explicit import Explicit, from_largest_level, label_offsets, told_times
from diffsamp.search.objective import cost_of_reference
from diffsamp.search.plan import Plan
from diffsamp.search.running import Progress, run_many, slice_batch
from diffsamp.search.starts import Starts
from diffsamp.tableau import Tableau

__all__ = ["NUMBERS", "refine"]

NUMBERS = ("times", "labels", "weights", "sums")
"""What `refine` can free: times of the states, times that the network is told, and weights.

"sums" gives up that a constant data prediction stays exact.
"""

_DIFFERENCE = 2e-3  # of log-SNR and of weights in units of the step: far above float32's rounding


def refine(
    score_fn: ScoreFn,
    tableau: Tableau,
    x_T: PyTree,
    *,
    key: Key,
    cond: Conditions | None = None,
    reference: Tableau | PyTree = None,
    held_out: int | None = None,
    batch: int = 64,
    numbers: Sequence[str] = ("times", "labels", "weights"),
    iterations: int = 8,
    evaluations: int | None = None,
    together: int = 1,
    data_range: float = 2.0,
    sharding: Sharding = None,
    progress: Progress | None = None,
) -> Plan:
    """Improve a sampler for this network by Gauss-Newton steps on its times and weights.

    Args:
      score_fn: the network, batched; only ever called forward.
      tableau: any deterministic sampler, multi-stage ones and those of `regress` included.
      x_T: (n, ...) starts at the process's t_max, an array. 32 that fit are enough for small N.
      key: random key for which of the starts fit, decide and report; the same key as for `regress`
        keeps its split.
      cond: keyword arguments for the network, every array with the leading axis n.
      reference: the samples to come close to, shaped like x_T, or the tableau that makes them;
        None: `reference_tableau`.
      held_out: how many of the n starts are kept from fitting, half of them to decide when to stop
        and half to report; at least 2. None: a quarter.
      batch: samples at a time.
      numbers: of `NUMBERS`.
      iterations: at most so many steps that are taken.
      evaluations: stop once so many network evaluations were spent, the reference included.
      together: samplers in one batch, for a device that `batch` samples do not fill.
      data_range: largest minus smallest value of the data, for the PSNR.
      sharding: over the batch axis, as for `run`.
      progress: called with (what, done, total).

    Returns:
      A `Plan` for starts at t_max. Its tableau is never worse on the deciding starts than the one
      given. Its settings say how many evaluations were spent.

    Raises:
      ValueError: a stochastic tableau, unknown numbers, too few starts, or a tableau whose samples
        are not finite.
    """
    began = time.perf_counter()
    unknown = [name for name in numbers if name not in NUMBERS]
    if unknown or not numbers:
        raise ValueError(f"`numbers` must be of {NUMBERS}; got {tuple(numbers)}.")
    iterations = expect_int(iterations, "iterations", at_least=1)
    process = score_fn.process
    given = from_largest_level(tableau, process)
    table = _Numbers.of(Explicit.of(given), process, tuple(numbers))
    starts = Starts.split(score_fn, x_T, cond, key, held_out, batch, sharding)
    limit = expect_limit(evaluations)
    fit, cost = starts.fit, starts.cost(given)
    likely = cost * fit * iterations * (len(table.start) + 2)
    if reference is None or isinstance(reference, Tableau):
        likely += cost_of_reference(score_fn, reference) * starts.size
    estimate = starts.announce(f"refine, {given.nfe} NFE", min(likely, limit), 2.0, given)
    starts.expect_reference(reference, progress)

    present = table.start
    value = starts.value(table.tableau(present), 0, fit)
    if not np.isfinite(value):
        raise ValueError(
            f"tableau {tableau.name!r} gives samples that are not finite on this network; refine "
            "one that works."
        )
    best, least = present, starts.decide(table.tableau(present))
    history = [(0, value, least)]
    damping, taken = 1e-2, 0
    while taken < iterations and starts.spent < limit and damping < 1e8:
        normal, gradient = _equations(starts, table, present, together)
        while damping < 1e8:
            move = _solve(normal, gradient, damping)
            trial = present + move
            new = np.inf
            if table.is_valid(trial) and starts.cost(table.tableau(trial)) <= cost:
                new = starts.value(table.tableau(trial), 0, fit)
            if new < value - 1e-6:
                break
            damping *= 4
        else:
            break
        gain = value - new
        present, value, damping, taken = trial, new, damping / 4, taken + 1
        decided = starts.decide(table.tableau(present))
        history.append((taken, value, decided))
        if decided < least:
            best, least = present, decided
        if progress is not None:
            progress("refining", taken, iterations)
        if gain < 1e-3:
            break

    found = given
    if best is not table.start:
        found = table.tableau(
            best,
            name=f"{tableau.name}, refined",
            source=f"diffsamp.search.refine (after arXiv:2403.01329); start: {tableau.source}",
        )
    scores = starts.scores(given, found, data_range)
    settings = {
        "nfe": given.nfe,
        "cost": cost,
        "starts": starts.size,
        "held_out": starts.size - fit,
        "numbers": list(numbers),
        "iterations": taken,
        "evaluations": starts.spent,
        "estimate": estimate.settings,
    }
    return Plan(
        found,
        "refine",
        tableau.name,
        scores,
        tuple(history),
        time.perf_counter() - began,
        settings,
        seed_of(key),
        network=describe_network(score_fn, found, x_T=x_T, data_range=data_range),
    )


def _solve(normal: np.ndarray, gradient: np.ndarray, damping: float) -> np.ndarray:
    """(J'J + damping diag(J'J)) d = -J'r; numbers that move nothing stay."""
    diagonal = np.diag(normal)
    scale = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
    scaled = normal * scale[:, None] * scale[None, :]
    scaled[np.diag_indices_from(scaled)] += damping
    return -scale * np.linalg.solve(scaled, scale * gradient)


@dataclasses.dataclass(frozen=True)
class _Numbers:
    """The free numbers of a sampler, as one vector, and the sampler that they make."""

    base: Explicit
    process: Process
    free: tuple[str, ...]
    log_snr: np.ndarray
    offsets: np.ndarray
    units: np.ndarray

    @classmethod
    def of(cls, base: Explicit, process: Process, free: tuple[str, ...]) -> _Numbers:
        with np.errstate(divide="ignore"):
            log_snr = np.log(base.alpha[:-1]) - np.log(base.sigma[:-1])
        offsets = np.zeros(base.nfe)
        if base.asked is not None:
            offsets = label_offsets(process, base.times[:-1], base.asked)
        return cls(base, process, free, log_snr, offsets, base.weights / _unit(base)[:, None])

    @property
    def _movable(self) -> np.ndarray:
        """Times that may move: those where alpha > 0."""
        return np.flatnonzero(np.isfinite(self.log_snr))

    @property
    def start(self) -> np.ndarray:
        """The vector of the sampler itself."""
        parts = []
        if "times" in self.free:
            parts.append(self.log_snr[self._movable])
        if "labels" in self.free:
            parts.append(self.offsets[self._movable])
        if "weights" in self.free:
            parts.append(self.units[np.tril_indices(self.base.nfe, -1)])
        if "sums" in self.free:
            parts.append(np.zeros(self.base.nfe))
        return np.concatenate(parts)

    def _split(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        count = self.base.nfe
        sizes = dict.fromkeys(("times", "labels"), len(self._movable))
        sizes |= {"weights": count * (count - 1) // 2, "sums": count}
        parts, at = {}, 0
        for name in NUMBERS:
            if name in self.free:
                parts[name] = vector[at : at + sizes[name]]
                at += sizes[name]
        return parts

    def _log_snrs(self, vector: np.ndarray) -> np.ndarray:
        log_snr = self.log_snr.copy()
        if "times" in self.free:
            log_snr[self._movable] = self._split(vector)["times"]
        return log_snr

    def is_valid(self, vector: np.ndarray) -> bool:
        """Whether the times keep their order and their range, and all is finite."""
        if not np.all(np.isfinite(vector)):
            return False
        log_snr = self._log_snrs(vector)
        low = float(self.process.log_snr(self.process.t_max))
        end = self.base.sigma[-1]
        high = np.inf if end == 0 else np.log(self.base.alpha[-1]) - np.log(end)
        rising = np.diff(self.log_snr) > 0
        with np.errstate(invalid="ignore"):
            ordered = np.all(np.diff(log_snr)[rising] > 1e-4)
        return bool(ordered and log_snr.min() >= low - 1e-9 and log_snr.max() < high)

    def tableau(self, vector: np.ndarray, *, name: str = "", source: str = "") -> Tableau:
        """The sampler of a vector, for starts at t_max."""
        base, parts = self.base, self._split(vector)
        levels = {"times": base.times, "alpha": base.alpha, "sigma": base.sigma}
        if "times" in parts:
            moved = np.asarray(self.process.time(parts["times"]), np.float64)
            low, high = float(self.process.t_clean), float(self.process.t_max)
            times = base.times.copy()
            times[self._movable] = np.clip(moved, low, high)
            levels["times"] = times
            for key in ("alpha", "sigma"):
                function = getattr(self.process, key)
                own = levels[key].copy()
                own[:-1] = np.where(
                    times[:-1] == base.times[:-1], own[:-1], np.asarray(function(times[:-1]))
                )
                levels[key] = own
        asked = None
        if "labels" in parts or base.asked is not None:
            offsets = self.offsets.copy()
            offsets[self._movable] = parts.get("labels", offsets[self._movable])
            asked = told_times(self.process, levels["times"][:-1], offsets)
        explicit = Explicit(**levels, weights=np.zeros_like(base.weights), asked=asked)
        units = self.units.copy()
        if "weights" in parts:
            units[np.tril_indices(base.nfe, -1)] = parts["weights"]
        weights = np.tril(units, -1) * _unit(explicit)[:, None]
        wanted = explicit.kappa * (1 + parts.get("sums", 0.0))
        weights[np.diag_indices_from(weights)] = wanted - weights.sum(axis=1)
        return dataclasses.replace(explicit, weights=weights).tableau(
            self.process, name=name, source=source, check="none"
        )


def _unit(table: Explicit) -> np.ndarray:
    """(N,) in what a row's weights are counted: its step, or alpha where it returns to a level."""
    size = np.abs(table.kappa)
    return np.where(size > 1e-3 * table.alpha[1:], size, table.alpha[1:])


def _equations(
    starts: Starts, table: _Numbers, vector: np.ndarray, together: int
) -> tuple[np.ndarray, np.ndarray]:
    """J'J and J'r over the fitting starts, in float64, a batch of starts at a time."""
    vectors = [vector]
    for i in range(len(vector)):
        shifted = vector.copy()
        shifted[i] += _DIFFERENCE
        vectors.append(shifted)
    tableaux = [table.tableau(v) for v in vectors]
    starts.spent += sum(starts.cost(t) for t in tableaux) * starts.fit
    normal, gradient = np.zeros((len(vector),) * 2), np.zeros(len(vector))
    for low in range(0, starts.fit, starts.batch):
        high = min(low + starts.batch, starts.fit)
        x, cond, reference = (
            slice_batch(v, low, high) for v in (starts.x_T, starts.cond, starts.reference)
        )
        ends = run_many(
            starts.score_fn,
            tableaux,
            x,
            cond=cond,
            batch=starts.batch,
            population=together,
            sharding=starts.sharding,
        )
        base, *moved = (np.asarray(end, np.float64).reshape(high - low, -1) for end in ends)
        residual = base - np.asarray(reference, np.float64).reshape(base.shape)
        size = np.linalg.norm(residual, axis=1, keepdims=True)
        size = np.sqrt(starts.fit) * np.maximum(size, np.finfo(np.float32).tiny)
        rows = np.stack([((m - base) / (size * _DIFFERENCE)).reshape(-1) for m in moved])
        rows = np.where(np.isfinite(rows), rows, 0.0)  # a number at the edge of what works
        normal += rows @ rows.T
        gradient += rows @ (residual / size).reshape(-1)
    return normal, gradient
