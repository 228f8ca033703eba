"""Write a sampler as its algorithm reads, and get its tableau.

A solver walks through its steps with linear combinations of symbols: the points u_k where the
network was called, what it said there (m_k), and fresh noises. `Builder.evaluate(x, level)` makes
the combination x the next point u_{k+1}, that is one row of the tableau, and returns the network's
answer as two combinations, data and noise. Lags, columns and the number of rows follow from what
was written, so a corrector, a stage or a momentum needs no bookkeeping of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from diffsamp._core.checks import expect_times
from diffsamp._core.numeric import is_concrete
from diffsamp._core.types import Array, Times, Value
from diffsamp.processes import Process, expect_process
from diffsamp.tableau import Tableau

__all__ = [
    "DATA",
    "FLOW",
    "NOISE",
    "Answer",
    "Builder",
    "Combination",
    "Point",
    "expect_falling_rows",
    "total",
    "transfer",
]

DATA, NOISE, FLOW = (1.0, 0.0), (0.0, 1.0), (-1.0, 1.0)  # weights of (x_0, eps)

# Noise form multiplies the state by alpha' / alpha and subtracts nearly all of it again. Where that
# is more than this, float32 loses three digits of seven, and stages multiply the loss.
_EPS = np.finfo(float).eps
_GROWTH = 200.0  # just above the published processes of ScoreSDE and EDM


@dataclasses.dataclass(frozen=True)
class Combination:
    """A linear combination of symbols ("u", k), ("m", k) and ("z", k).

    A weight is a number, or an array with one number per element of the data.
    """

    terms: dict[tuple[str, int], Array]
    __array_ufunc__ = None  # array * combination is ours, not NumPy's element by element

    def __add__(self, other: Combination) -> Combination:
        terms = dict(self.terms)
        for symbol, weight in other.terms.items():
            terms[symbol] = terms.get(symbol, 0.0) + weight
        return Combination(terms)

    def __mul__(self, number: Value) -> Combination:
        return Combination({s: w * np.float64(number) for s, w in self.terms.items()})

    __rmul__ = __mul__

    def __truediv__(self, number: Value) -> Combination:
        return self * (1.0 / np.float64(number))

    def __neg__(self) -> Combination:
        return self * -1.0

    def __sub__(self, other: Combination) -> Combination:
        return self + -other


@dataclasses.dataclass(frozen=True)
class Point:
    """A time, the process's numbers there, in float64, and two derived ones.

    log_snr is +inf at the clean end and -inf where alpha = 0; rho = sigma / alpha likewise 0, inf.
    """

    t: float
    alpha: float
    sigma: float
    log_snr: float

    @property
    def rho(self) -> float:
        return self.sigma / self.alpha if self.alpha > 0 else math.inf


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the network says at a point: its data and its noise prediction, and the state there."""

    state: Combination
    data: Combination
    noise: Combination
    point: Point


class Builder:
    """Rows of a tableau, written step by step.

    Attributes:
      points: the given times as `Point`s, n + 1 of them.
      start: the combination u_0 = x_T.
    """

    def __init__(
        self,
        process: Process,
        times: Times,
        target: tuple[float, float] = DATA,
        *,
        reduce: bool = True,
    ) -> None:
        """Start at the first time.

        Args:
          process: the noise process.
          times: (n + 1,), falling or rising.
          target: the prediction that rows ask for.
          reduce: write rows in data predictions where noise form would spoil them (`grows`); False
            for methods whose rows must stay as they are written, to be inverted.
        """
        expect_process(process)
        if not is_concrete(process):
            raise TypeError("solvers are host functions: build the tableau outside `jit`.")
        times = expect_times(times, may_rise=True)
        low, high = process.t_clean, process.t_max
        if times.min() < low or times.max() > high * (1 + 1e-9):
            raise ValueError(
                f"`times` must lie between t_clean = {low} and t_max = {high} of "
                f"{type(process).__name__}; got {times[0]:g} .. {times[-1]:g}."
            )
        self.process = process
        self.target, self._reduces = target, reduce
        self.points = [self.point(t) for t in times]
        if self.rising and self.points[-1].alpha == 0:
            raise ValueError(
                f"the times rise to t = {times[-1]:g}, where alpha = 0 and nothing is left of the "
                "data; encode to a time before it."
            )
        self._levels = [self.points[0]]
        self._states: list[Combination] = []  # u_1, u_2, ..
        self.start = self.symbol(0)
        self._targets: dict[int, tuple[float, float]] = {}  # rows that evaluate
        self._noises = 0
        # every state in terms of u_0, or the last noisy one, and the answers; see `_reduce`
        self._expanded = [self.start]

    def unit_time(self, t: Array) -> Array:
        """Time(s) t, counted from 0 at the data to 1 at the noise."""
        return (t - self.process.t_clean) / (self.process.t_max - self.process.t_clean)

    @property
    def rows(self) -> int:
        """How many states have been written: u_1 .. u_rows."""
        return len(self._states)

    @property
    def rising(self) -> bool:
        """Whether the times go from data to noise: encoding."""
        return self.points[0].t < self.points[-1].t

    @functools.cached_property
    def _growth(self) -> float:
        """By what noise form multiplies a state between two of the points, at most."""
        alpha = np.array([p.alpha for p in self.points if p.alpha > 0])
        return float(np.max(alpha / np.minimum.accumulate(alpha), initial=0.0))

    @property
    def grows(self) -> bool:
        """Whether noise form would multiply a state by so much that rounding spoils it.

        Rows that ask for the noise are then written in data predictions, which is the same method
        with other numbers; see `_reduce`.
        """
        return self._reduces and self._growth > _GROWTH

    @staticmethod
    def is_long(s: Point, t: Point) -> bool:
        """Whether noise form is of no use for a step from s to t.

        Its variable is rho, nearly all of whose range then lies where nothing is left of the data:
        methods of order 2 and more weight what is told at the end by half of rho_s / rho_t, and
        multiply the network's errors by as much. From alpha = 0 the factor is infinite.
        """
        return t.alpha > _GROWTH * s.alpha

    def expect_falling(self, what: str) -> None:
        """Raise if the times rise: fresh noise cannot be added on the way to the noise."""
        if self.rising:
            raise ValueError(
                f"{what} adds noise, and so cannot encode: its times must decrease. Encode with a "
                "deterministic solver."
            )

    def point(self, t: float) -> Point:
        """The point at time t."""
        t = float(t)
        return Point(
            t,
            float(self.process.alpha(t)),
            float(self.process.sigma(t)),
            float(self.process.log_snr(t)),
        )

    def point_at(self, log_snr: float) -> Point:
        """The point with the given log-SNR."""
        return self.point(float(self.process.time(np.float64(log_snr))))

    def symbol(self, k: int, *, written: bool = True) -> Combination:
        """The state u_k, one already written."""
        if written and not 0 <= k <= len(self._states):
            raise IndexError(f"there is no u_{k} yet.")
        return Combination({("u", k): 1.0})

    def constant(self, value: Value) -> Combination:
        """A number, or one per element of the data, whatever the state is."""
        return Combination({("1", 0): np.asarray(value, np.float64)})

    def fresh_noise(self) -> Combination:
        """A new standard normal; it can enter one row only."""
        self._noises += 1
        return Combination({("z", self._noises): 1.0})

    def evaluate(
        self, x: Combination, point: Point, target: tuple[float, float] | None = None
    ) -> Answer:
        """Call the network at state x, which lives at `point`; this ends the row of x.

        The answer is recorded as the `target` prediction, except where that one does not
        determine the data (noise at alpha = 0): there it is recorded as data.
        """
        target = self.target if target is None else target
        if point.sigma == 0 and target != FLOW:  # which a velocity network determines there, too
            raise ValueError(
                f"the network would be evaluated at t = {point.t:g}, where sigma = 0. Falling "
                "times may end there; rising ones start later, at the process's t_min."
            )
        reduced = target == NOISE and self.grows
        if reduced or (point.alpha == 0 and target == NOISE):
            target = DATA
        current = self.symbol(len(self._states))
        latest = self._levels[-1]
        own = (current.terms, self._expanded[-1].terms)
        if x.terms not in own or point != latest or len(self._states) in self._targets:
            current = self.move(x, point)
        k = len(self._states)
        if reduced:
            current = self._expanded[k]
        self._targets[k] = target
        said = Combination({("m", k): 1.0})
        w0, w1 = target
        determinant = point.alpha * w1 - point.sigma * w0
        # solve x = alpha D + sigma E, m = w0 D + w1 E for D and E; exact symbols where they are
        data = said if target == DATA else (w1 * current - point.sigma * said) / determinant
        noise = said if target == NOISE else (point.alpha * said - w0 * current) / determinant
        return Answer(current, data, noise, point)

    def move(self, x: Combination, point: Point) -> Combination:
        """Make x the next state without calling the network on it (yet); returns its symbol."""
        if self.target == NOISE and self.grows:
            x = self._reduce(x, point)
        else:
            self._expanded.append(self.symbol(len(self._states) + 1, written=False))
        self._states.append(x)
        self._levels.append(point)
        return self.symbol(len(self._states))

    def _reduce(self, x: Combination, point: Point) -> Combination:
        """The row of x as a multiple of the present state and answers, without cancellation.

        With every state expanded in one earlier state u_k and the answers, the factors alpha' /
        alpha meet their opposites before anything is rounded to float32. What is left of u_k in a
        consistent sampler is known, sigma / sigma_k.
        """
        full = Combination({})
        for (kind, k), weight in x.terms.items():
            known = self._expanded[k] if kind == "u" else Combination({(kind, k): 1.0})
            full = full + weight * known
        kinds = [kind for kind, _ in full.terms]
        current = self._expanded[-1]
        base = max(symbol for symbol in current.terms if symbol[0] == "u")
        alone = kinds.count("u") == 1 and "z" not in kinds and base in full.terms
        if alone and all(target == DATA for target in self._targets.values()):
            full = self._without_rounding(full, base, point)
        self._expanded.append(
            self.symbol(len(self._states) + 1, written=False) if "z" in kinds else full
        )
        factor = full.terms.get(base, 0.0) / current.terms[base]
        row = full - factor * current
        size = {s: np.abs(w) for s, w in full.terms.items()}
        for symbol, weight in current.terms.items():
            size[symbol] = size.get(symbol, 0.0) + np.abs(factor * weight)
        kept = {
            symbol: weight
            for symbol, weight in row.terms.items()
            if symbol != base and np.any(np.abs(weight) > 8 * _EPS * size[symbol])
        }
        return Combination(kept) + factor * self.symbol(len(self._states))

    def _without_rounding(
        self, full: Combination, base: tuple[str, int], point: Point
    ) -> Combination:
        """The state at `point` with its share of u_k, and the sum of its answers, exact.

        What they are in a consistent sampler is known. Only what rounding can explain is changed:
        a wrong coefficient stays, for the tableau's check to find.
        """
        start = self._levels[base[1]]
        left = point.sigma / start.sigma
        terms = dict(full.terms)
        allowed = 32 * _EPS * self._growth
        if np.all(np.abs(terms[base] - left) <= allowed + 1e-12 * left):
            terms[base] = left
        answers = [symbol for symbol in terms if symbol[0] == "m"]
        if answers:
            weights = [terms[symbol] for symbol in answers]
            missing = point.alpha - start.alpha * left - sum(weights)
            if np.all(np.abs(missing) <= allowed + 32 * _EPS * sum(np.abs(w) for w in weights)):
                terms[max(answers)] = terms[max(answers)] + missing
        return Combination(terms)

    def finish(
        self, x: Combination, point: Point, *, name: str, source: str, check: str = "full"
    ) -> Tableau:
        """The tableau whose sample is x, at `point`."""
        self.move(x, point)
        rows = len(self._states)
        entries = [
            (n, kind, k, weight)
            for n, state in enumerate(self._states)
            for (kind, k), weight in state.terms.items()
            if np.any(weight != 0)
        ]
        p = max((n - k + 1 for n, kind, k, _ in entries if kind == "u"), default=1)
        q = max((n - k + 1 for n, kind, k, _ in entries if kind == "m"), default=1)
        tail = np.broadcast_shapes(*(np.shape(weight) for *_, weight in entries))
        tail = (1, *tail) if tail else ()  # weights per element broadcast over the batch
        a, b, c = np.zeros((rows, p, *tail)), np.zeros((rows, q, *tail)), np.zeros((rows, *tail))
        d = np.zeros((rows, *tail)) if any(kind == "1" for _, kind, *_ in entries) else None
        used: set[int] = set()
        for n, kind, k, weight in entries:
            if kind == "u":
                a[n, n - k] = weight
            elif kind == "m":
                b[n, n - k] = weight
            elif d is not None and kind == "1":
                d[n] += weight
            elif k in used:
                raise RuntimeError("one fresh noise entered two rows of a tableau.")
            else:
                used.add(k)
                c[n] = np.hypot(c[n], weight)
        return Tableau.create(
            times=[p.t for p in self._levels],
            alpha=[p.alpha for p in self._levels],
            sigma=[p.sigma for p in self._levels],
            target=[self._targets.get(n, DATA) for n in range(rows)],
            a=a,
            b=b,
            c=c,
            evaluates=[n in self._targets for n in range(rows)],
            d=d,
            name=name,
            source=source,
            check=check,
        )


def transfer(answer: Answer, to: Point) -> Combination:
    """The DDIM step from the answer's point to `to`: alpha D + sigma E.

    Exact when D and E are constant. At sigma = 0 it is the data prediction itself.
    """
    return to.alpha * answer.data + to.sigma * answer.noise


def expect_falling_rows(tableau: Tableau, what: str) -> None:
    """Raise unless the tableau is deterministic with one evaluation a step, as `what` needs."""
    rows = tableau.nfe
    rho = tableau.sigma[:rows] / np.maximum(tableau.alpha[:rows], 1e-300)
    if tableau.stochastic or not np.all(tableau.evaluates[:rows]) or np.any(np.diff(rho) >= 0):
        raise ValueError(
            f"{what} needs a deterministic tableau of one evaluation a step, whose noise level "
            f"falls from row to row; got {tableau.name!r}."
        )


def total(weights: Array, parts: Sequence[Combination]) -> Combination:
    """sum_j weights[j] parts[j]."""
    result = Combination({})
    for weight, part in zip(weights, parts, strict=True):
        result = result + weight * part
    return result
