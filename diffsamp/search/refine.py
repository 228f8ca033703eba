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
from collections.abc import Sequence

import numpy as np

from diffsamp._core.checks import expect_int
from diffsamp._core.types import Conditions, Key, PyTree, Sharding
from diffsamp.processes import Process
from diffsamp.score import ScoreFn
from diffsamp.search._cost import expect_limit
from diffsamp.search._tails import Path, count_tail, run_table, run_variants
from diffsamp.search.explicit import Explicit, from_largest_level, label_offsets, told_times
from diffsamp.search.objective import cost_of_reference
from diffsamp.search.plan import Plan
from diffsamp.search.running import Progress
from diffsamp.search.starts import Starts
from diffsamp.tableau import Tableau

__all__ = ["NUMBERS", "refine"]

NUMBERS = ("times", "labels", "weights", "sums")
"""What `refine` can free: times of the states, times that the network is told, and weights.

"sums" gives up that a constant data prediction stays exact.
"""

_GAIN = 0.01  # 0.04 dB: an iteration that gains less is the last,
_WORTH = 60  # where it takes up to so many evaluations of a start; in proportion where more
_FARTHEST = 0.5  # in log-SNR, in an iteration
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
    keep_waves: bool = False,
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
      keep_waves: free only weights that leave `Tableau.waves` as they are, so that parallel stages
        stay parallel.
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
      ValueError: a stochastic tableau, unknown numbers, too few starts, waves that cannot be kept,
        or a tableau whose samples are not finite.
    """
    starts = Starts.split(score_fn, x_T, cond, key, held_out, batch, sharding)
    return refine_on(
        starts,
        tableau,
        reference=reference,
        numbers=numbers,
        keep_waves=keep_waves,
        iterations=iterations,
        evaluations=evaluations,
        together=together,
        data_range=data_range,
        progress=progress,
    )


def refine_on(
    starts: Starts,
    tableau: Tableau,
    *,
    reference: Tableau | PyTree = None,
    numbers: Sequence[str],
    keep_waves: bool = False,
    iterations: int = 8,
    evaluations: int | None,
    together: int,
    data_range: float,
    progress: Progress | None,
) -> Plan:
    """`refine` on starts that are split, whose reference is made if they have none."""
    unknown = [name for name in numbers if name not in NUMBERS]
    if unknown or not numbers:
        raise ValueError(f"`numbers` must be of {NUMBERS}; got {tuple(numbers)}.")
    iterations = expect_int(iterations, "iterations", at_least=1)
    process = starts.score_fn.process
    given = from_largest_level(tableau, process)
    table = _Numbers.of(Explicit.of(given), process, tuple(numbers), _used(given, keep_waves))
    limit = starts.counted + expect_limit(evaluations)
    fit, cost = starts.fit, starts.cost(given)
    present = table.start
    whole = table.explicit(present)
    tails = sum(count_tail(table.explicit(v), whole) for v in table.moved(present))
    enough = _GAIN * max(1.0, tails / _WORTH)
    likely = cost * fit * iterations * (2 + tails / given.nfe)
    starts.widen(max(given.nfe, starts.shape[2]))
    wanted = starts.reference is None
    if wanted and (reference is None or isinstance(reference, Tableau)):
        likely += cost_of_reference(starts.score_fn, reference) * starts.size
    starts.announce(f"refine, {given.nfe} NFE", min(likely, limit), 2.0 * given.nfe)
    if wanted:
        starts.expect_reference(reference, progress)

    path = run_table(starts, whole, 0, fit)
    value = starts.judge(path.end, 0, fit)
    if not np.isfinite(value):
        raise ValueError(
            f"tableau {tableau.name!r} gives samples that are not finite on this network; refine "
            "one that works."
        )
    best, least = present, starts.decide(table.tableau(present))
    history = [(0, value, least)]
    damping, taken = 1e-2, 0
    while taken < iterations and starts.spent < limit and damping < 1e8:
        normal, gradient = _equations(starts, table, present, path, together)
        while damping < 1e8:
            move = _solve(normal, gradient, damping)
            trial = present + np.clip(move, -table.farthest, table.farthest)
            new, tried = np.inf, path
            if table.is_valid(trial) and starts.cost(table.tableau(trial)) <= cost:
                tried = run_table(starts, table.explicit(trial), 0, fit)
                new = starts.judge(tried.end, 0, fit)
            if new < value - 1e-6:
                break
            damping *= 4
        else:
            break
        gain = value - new
        present, path, value, damping, taken = trial, tried, new, damping / 4, taken + 1
        decided = starts.decide(table.tableau(present))
        history.append((taken, value, decided))
        if decided < least:
            best, least = present, decided
        if progress is not None:
            progress("refining", taken, iterations)
        if gain < enough:
            break

    found = given
    if best is not table.start:
        found = table.tableau(
            best,
            name=f"{tableau.name}, refined",
            source=f"diffsamp.search.refine (after arXiv:2403.01329); start: {tableau.source}",
        )
    return starts.plan(
        "refine",
        found,
        given,
        settings={"numbers": list(numbers), "keep_waves": keep_waves, "iterations": taken},
        history=history,
        data_range=data_range,
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
    sums: np.ndarray  # (N,) what rows sum to beyond kappa, in their units; 0: consistent
    learned: np.ndarray  # (N, N) which weights are numbers of their own
    rest: np.ndarray  # (N,) the newest answer of each row, whose weight makes the sum right

    @classmethod
    def of(
        cls, base: Explicit, process: Process, free: tuple[str, ...], used: np.ndarray
    ) -> _Numbers:
        with np.errstate(divide="ignore"):
            log_snr = np.log(base.alpha[:-1]) - np.log(base.sigma[:-1])
        offsets = np.zeros(base.nfe)
        if base.asked is not None:
            offsets = label_offsets(process, base.times[:-1], base.asked)
        units = base.weights / _unit(base)[:, None]
        rest = base.nfe - 1 - np.argmax(used[:, ::-1], axis=1)
        learned = used.copy()
        learned[np.arange(base.nfe), rest] = False
        sums = units.sum(axis=1) - base.kappa / _unit(base)
        return cls(base, process, free, log_snr, offsets, units, sums, learned, rest)

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
            parts.append(self.units[self.learned])
        if "sums" in self.free:
            parts.append(self.sums)
        return np.concatenate(parts)

    @property
    def farthest(self) -> np.ndarray:
        """How far each may move at once: times and labels not far, weights, on which all is linear.

        One of little effect would be sent to where it has none at all, and stay there.
        """
        parts = self._split(self.start)
        far = {"times": _FARTHEST, "labels": _FARTHEST}
        return np.concatenate([np.full(len(v), far.get(name, np.inf)) for name, v in parts.items()])

    def moved(self, vector: np.ndarray) -> np.ndarray:
        """The vector with each of its numbers moved a little, one row each."""
        return vector + _DIFFERENCE * np.eye(len(vector))

    def _split(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        count = self.base.nfe
        sizes = dict.fromkeys(("times", "labels"), len(self._movable))
        sizes |= {"weights": int(self.learned.sum()), "sums": count}
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
        table = self.explicit(vector)
        return table.tableau(self.process, name=name, source=source, check="none")

    def explicit(self, vector: np.ndarray) -> Explicit:
        """The table of a vector."""
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
            units[self.learned] = parts["weights"]
        weights = np.where(self.learned, units, 0.0) * _unit(explicit)[:, None]
        wanted = explicit.kappa + _unit(explicit) * parts.get("sums", self.sums)
        weights[np.arange(base.nfe), self.rest] = wanted - weights.sum(axis=1)
        return dataclasses.replace(explicit, weights=weights)


def _used(tableau: Tableau, keep_waves: bool) -> np.ndarray:
    """(N, N) which answers a row may weigh: all before it, or those of waves before its own."""
    count = tableau.nfe
    used = np.tril(np.ones((count, count), bool))
    if not keep_waves:
        return used
    waves = tableau.waves[np.asarray(tableau.evaluates)]
    if np.any(np.diff(waves) < 0) or np.any(waves[1:] == 1):
        raise ValueError(
            f"the waves of tableau {tableau.name!r} cannot be kept: its rows must be in the order "
            "of their waves, and all but the first use an answer."
        )
    return used & (waves < np.append(waves[1:], count + 1)[:, None])


def _unit(table: Explicit) -> np.ndarray:
    """(N,) in what a row's weights are counted: its step, or alpha where it returns to a level."""
    size = np.abs(table.kappa)
    return np.where(size > 1e-3 * table.alpha[1:], size, table.alpha[1:])


def _equations(
    starts: Starts, table: _Numbers, vector: np.ndarray, path: Path, together: int
) -> tuple[np.ndarray, np.ndarray]:
    """J'J and J'r over the fitting starts, in float64, a batch of starts at a time."""
    tables = [table.explicit(v) for v in table.moved(vector)]
    normal, gradient = np.zeros((len(vector),) * 2), np.zeros(len(vector))
    for low in range(0, starts.fit, starts.batch):
        high = min(low + starts.batch, starts.fit)
        reference = starts.reference[low:high]
        part = path.part(low, high)
        ends = run_variants(starts, part, tables, together=together)
        moved = (np.asarray(end, np.float64).reshape(high - low, -1) for end in ends)
        base = np.asarray(part.end, np.float64).reshape(high - low, -1)
        residual = base - np.asarray(reference, np.float64).reshape(base.shape)
        size = np.linalg.norm(residual, axis=1, keepdims=True)
        size = np.sqrt(starts.fit) * np.maximum(size, np.finfo(np.float32).tiny)
        rows = np.stack([((m - base) / (size * _DIFFERENCE)).reshape(-1) for m in moved])
        rows = np.where(np.isfinite(rows), rows, 0.0)  # a number at the edge of what works
        normal += rows @ rows.T
        gradient += rows @ (residual / size).reshape(-1)
    return normal, gradient
