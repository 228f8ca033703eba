"""DPM-Solver-v3: a multistep method with statistics of the network in its coefficients."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import zipfile

import numpy as np
from scipy.interpolate import PchipInterpolator

from diffsamp._core.checks import expect_choice, expect_int, lowers
from diffsamp._core.files import write_atomically
from diffsamp._core.numeric import as_float
from diffsamp._core.types import Array, PyTree, Times
from diffsamp.processes import Process
from diffsamp.solvers._builder import (
    NOISE,
    Answer,
    Builder,
    Combination,
    Point,
    total,
    transfer,
)
from diffsamp.solvers._weights import lagrange
from diffsamp.tableau import Tableau

__all__ = ["ModelStatistics", "dpm_solver_v3"]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(8)


@dataclasses.dataclass(frozen=True)
class ModelStatistics:
    """A network's statistics along its trajectories, for DPM-Solver-v3.

    Attributes:
      log_snr: (M,) rising, the levels; monotone cubics between them (a curve with kinks would
        limit the order to 2), constant beyond.
      l: (M,) or (M, *data): E[sigma d eps / dx], the linear part of the noise prediction.
      s: same shape: the rate at which the rest grows, f' = s f + b in mean square.
      b: same shape: its bias, which is not 0 where the data's mean is not; None: 0.
    """

    log_snr: Array
    l: Array  # noqa: E741 - the paper's letter
    s: Array
    b: Array = None

    def __post_init__(self) -> None:
        if self.b is None:
            object.__setattr__(self, "b", np.zeros(np.shape(self.l)))
        for name in ("log_snr", "l", "s", "b"):
            object.__setattr__(self, name, as_float(getattr(self, name)))
        size = self.log_snr.shape[:1]
        if self.log_snr.ndim != 1 or size[0] < 2 or not np.all(np.diff(self.log_snr) > 0):
            raise ValueError("`log_snr` must hold at least two rising numbers.")
        if not self.l.shape == self.s.shape == self.b.shape or self.l.shape[:1] != size:
            raise ValueError(
                f"`l`, `s` and `b` must have one shape that starts with {size}; got "
                f"{self.l.shape}, {self.s.shape} and {self.b.shape}."
            )
        if not all(np.all(np.isfinite(v)) for v in (self.log_snr, self.l, self.s, self.b)):
            raise ValueError("the statistics must be finite.")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz file, atomically."""
        buffer = io.BytesIO()
        np.savez(buffer, log_snr=self.log_snr, l=self.l, s=self.s, b=self.b)
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ModelStatistics:
        """Read what `save` wrote.

        Raises:
          FileNotFoundError: no such file.
          ValueError: a file of another kind, or a corrupt one.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                names = [n for n in ("log_snr", "l", "s", "b") if n in file]
                return cls(**{name: file[name] for name in names})
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{os.fspath(path)} holds no model statistics: {error}") from error

    def at(self, name: str, log_snr: Array) -> np.ndarray:
        """Statistic "l" or "s" at log-SNR(s)."""
        return self._curve(name)(np.clip(log_snr, self.log_snr[0], self.log_snr[-1]))

    def integral(self, name: str, start: float, end: PyTree) -> np.ndarray:
        """Its integral over log-SNR from `start` to `end`(s)."""
        whole, low, high = self._curve(name).antiderivative(), self.log_snr[0], self.log_snr[-1]

        def up_to(log_snr: Array) -> np.ndarray:
            inside = np.clip(log_snr, low, high)
            beyond = np.asarray(log_snr - inside)
            beyond = beyond.reshape(beyond.shape + (1,) * (self.l.ndim - 1))
            return whole(inside) + beyond * self.at(name, log_snr)

        return up_to(np.asarray(end, np.float64)) - up_to(np.float64(start))

    def bias(self, start: float, end: PyTree) -> np.ndarray:
        """int exp(-S) b over log-SNR from `start` to `end`(s), S = int s from `start`.

        b is taken as 0 beyond the levels. Any smooth curve in its place leaves the solver's order:
        what is subtracted from f is added to the integral.
        """
        inside = np.clip(np.asarray(end, np.float64), self.log_snr[0], self.log_snr[-1])
        first = np.clip(start, self.log_snr[0], self.log_snr[-1])
        grown = np.exp(self.integral("s", self.log_snr[0], np.float64(start)))
        return grown * (self._grown_bias(inside) - self._grown_bias(first))

    @functools.cached_property
    def _grown_bias(self) -> PchipInterpolator:
        count = len(self.log_snr)
        fine = np.interp(np.linspace(0, count - 1, 4 * count), np.arange(count), self.log_snr)
        shrunk = np.exp(-self.integral("s", self.log_snr[0], fine)) * self.at("b", fine)
        return PchipInterpolator(fine, shrunk, axis=0).antiderivative()

    def _curve(self, name: str) -> PchipInterpolator:
        return PchipInterpolator(self.log_snr, getattr(self, name), axis=0)


def dpm_solver_v3(
    process: Process,
    times: Times,
    *,
    statistics: ModelStatistics,
    order: int = 3,
    pseudo: bool = False,
    corrector: bool | str = True,
    lower_order_final: bool | int = True,
) -> Tableau:
    """DPM-Solver-v3: multistep, with the linear part of the network itself integrated exactly.

    With f = (sigma eps - l x) / alpha, L = int l, S = int s and B = int exp(-S) b over log-SNR from
    the present point,

        x_t = alpha_t exp(-L_t) [x_s / alpha_s - sum_j W_j (exp(-S_j) f_j - B_j) - C],
        W_j = int exp(L + S) l_j d lambda,    C = int exp(L + S) B d lambda,

    l_j the Lagrange polynomials on the past log-SNRs. l = 1, s = b = 0 is DPM-Solver++ (data), l =
    0, s = -1, b = 0 DPM-Solver (noise); any statistics converge at order p, `corrector` adds one.
    With a bias the tableau adds a constant to the state. A step to sigma = 0 or from alpha = 0 is
    DDIM's.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim (no rounding to the statistics' levels).
      statistics: of the network, from `diffsamp.search.model_statistics`; with axes of the data the
        coefficients have them too.
      order: p, at least 1; the authors take 3, with guidance 2.
      pseudo: the authors' `p_pseudo`: the k-th derivative is k! times the k-th divided difference,
        without the terms that make order 3 exact; theirs for 5 evaluations.
      corrector: correct each state with the evaluation made there. True: with one node more than
        the predictor had; "pseudo", the authors' `c_pseudo`: likewise, with derivatives as
        `pseudo`; "lower", their mode without it: with the evaluation in place of the oldest node.
      lower_order_final: lower the order over the last steps. A number:
        only if there are fewer steps than that.

    Returns:
      A deterministic tableau of n evaluations, in noise prediction.

    Raises:
      ValueError: times not sorted, an order below 1, an unknown corrector.

    Reference: Zheng et al. 2023, arXiv:2310.13268.
    """
    expect_int(order, "order", at_least=1)
    mode = corrector if isinstance(corrector, str) else "full" if corrector else ""
    expect_choice(mode, "corrector", ("full", "pseudo", "lower", ""))
    builder = Builder(process, times, NOISE)
    steps = len(builder.points) - 1
    biased = bool(np.any(statistics.b != 0))

    def remainder(answer: Answer, s: Point) -> Combination:
        """exp(-S_j) f_j - B_j, from s to the answer's point."""
        point = answer.point
        f = point.sigma * answer.noise - statistics.at("l", point.log_snr) * answer.state
        grown = statistics.integral("s", s.log_snr, point.log_snr)
        rest = np.exp(-grown) / point.alpha * f
        if biased:
            rest = rest - builder.constant(statistics.bias(s.log_snr, point.log_snr))
        return rest

    def weights(
        nodes: list[float], s: Point, t: Point, pseudo: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """The W_j, and C."""
        # Gauss rules between the knots of the statistics, at most 0.25 long
        low, high = sorted([s.log_snr, t.log_snr])
        knots = statistics.log_snr[(statistics.log_snr > low) & (statistics.log_snr < high)]
        even = np.linspace(low, high, int(np.ceil((high - low) / 0.25)) + 1)
        edges = np.union1d(even, knots)
        half = np.diff(edges)[:, None] / 2
        at = ((edges[1:] + edges[:-1])[:, None] / 2 + half * _NODES).reshape(-1)
        measure = (half * _WEIGHTS).reshape(-1) * np.sign(t.log_snr - s.log_snr)
        grown = np.exp(sum(statistics.integral(name, s.log_snr, at) for name in ("l", "s")))
        basis = _newton(nodes, at) if pseudo else lagrange(nodes, at)
        bias = statistics.bias(s.log_snr, at) if biased else 0 * grown
        return np.tensordot(basis * measure, grown, 1), np.tensordot(measure, grown * bias, 1)

    x, history, used, last = builder.start, list[Answer](), list[Answer](), None
    before = np.zeros(0)
    for n in range(steps):
        s, t = builder.points[n], builder.points[n + 1]
        answer = builder.evaluate(x, s)
        x = answer.state
        # the authors' order of the nodes, which the pseudo derivatives depend on
        with_new = [*used[:1], answer, *used[1:]]
        if mode == "lower":
            with_new = with_new[: len(used)]
        if mode and last is not None and len(with_new) > 1:
            nodes = [a.point.log_snr for a in with_new]
            after, _ = weights(nodes, last, s, mode == "pseudo")
            shrink = np.exp(-statistics.integral("l", last.log_snr, s.log_snr))
            predicted = total(before, [remainder(a, last) for a in used])
            corrected = total(after, [remainder(a, last) for a in with_new])
            x = x + s.alpha * shrink * (predicted - corrected)
        history = [answer, *history[: order - 1]]
        if s.alpha == 0 or t.sigma == 0:
            x, last = transfer(answer, t), None
            continue
        now = min(order, steps - n) if lowers(lower_order_final, steps) else order
        used = [a for a in history if a.point.alpha > 0][:now]
        before, bias = weights([a.point.log_snr for a in used], s, t, pseudo)
        shrink = np.exp(-statistics.integral("l", s.log_snr, t.log_snr))
        inner = (1 / s.alpha) * x - total(before, [remainder(a, s) for a in used])
        if biased:
            inner = inner - builder.constant(bias)
        x, last = t.alpha * shrink * inner, s
    name = f"dpm_solver_v3_{order}" + ("c" if mode else "")
    return builder.finish(x, builder.points[-1], name=name, source="arXiv:2310.13268", check="none")


def _newton(nodes: list[float], x: np.ndarray) -> np.ndarray:
    """Like `lagrange`, of the authors' pseudo polynomial: sum_k (x - nodes[0])^k [g_0, .., g_k].

    Newton's has prod_{i<k} (x - nodes[i]) for the power; they agree up to k = 1.
    """
    basis = np.zeros((len(nodes), np.size(x)))
    for k in range(len(nodes)):
        for j in range(k + 1):
            others = [nodes[j] - node for i, node in enumerate(nodes[: k + 1]) if i != j]
            basis[j] += (x - nodes[0]) ** k / np.prod(others)
    return basis
