"""A deterministic sampler as one table of weights: what regression and Newton steps work on.

With u_0 the state of the first evaluation and D_j what evaluation j says about the data,

    u_{n+1} = (sigma_{n+1} / sigma_n) u_n + sum_{j<=n} w[n, j] D_j,      n = 0 .. N-1,

and a constant data prediction is integrated exactly if row n of w sums to kappa_n = alpha_{n+1} -
alpha_n sigma_{n+1} / sigma_n. Unlike the canonical form (`canonical`) it needs no falling levels:
every deterministic tableau, multi-stage ones too, has exactly one such table.

The start is given at the process's largest level. A sampler whose first evaluation is at a lower
one scales it, u_0 = x_T sigma_0 / sigma(t_max), by a first row that asks nothing.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from diffsamp._core.numeric import as_float, namespace, silence
from diffsamp._core.types import Array
from diffsamp.processes import Process
from diffsamp.tableau import Tableau

__all__ = ["Explicit", "from_largest_level", "label_offsets", "own_start", "told_times"]


@dataclasses.dataclass(frozen=True)
class Explicit:
    """A deterministic sampler of N evaluations.

    Attributes:
      times: (N + 1,) of the evaluations, then of the sample.
      alpha: (N + 1,) there.
      sigma: (N + 1,) there.
      weights: (N, N), lower triangular: w.
      asked: (N,) the times that the network is told, or None: those of the states.
    """

    times: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    weights: np.ndarray
    asked: np.ndarray | None = None

    @property
    def nfe(self) -> int:
        """N."""
        return len(self.weights)

    @property
    def kappa(self) -> np.ndarray:
        """(N,) what the rows of a consistent table sum to."""
        return self.alpha[1:] - self.alpha[:-1] * self.sigma[1:] / self.sigma[:-1]

    @classmethod
    def of(cls, tableau: Tableau) -> Explicit:
        """The table of a deterministic tableau.

        Raises:
          ValueError: it adds noise, makes no evaluation, or weighs the start otherwise than a
            consistent sampler does.
        """
        if tableau.stochastic:
            raise ValueError(
                f"tableau {tableau.name!r} adds noise; only deterministic samplers are one table."
            )
        asked = np.flatnonzero(tableau.evaluates)
        if asked.size == 0:
            raise ValueError(f"tableau {tableau.name!r} makes no evaluation.")
        at = np.append(asked, tableau.rows)
        on_start, on_data, _ = tableau.unroll(prediction="data")
        on_start, on_data = on_start[at], on_data[at][:, asked]
        sigma = tableau.sigma[at]
        if not np.allclose(on_start, sigma / tableau.sigma[0], rtol=1e-6, atol=1e-9):
            raise ValueError(
                f"tableau {tableau.name!r} does not carry its start as a consistent sampler does "
                "(sigma_n / sigma_0 of it in u_n)."
            )
        ratio = sigma[1:] / sigma[:-1]
        weights = on_data[1:] - ratio[:, None] * on_data[:-1]
        told = None if tableau.asked is None else np.asarray(tableau.asked)[asked]
        return cls(tableau.times[at], tableau.alpha[at], sigma, np.tril(weights), told)

    def tableau(self, process: Process, *, name: str, source: str, check: str = "full") -> Tableau:
        """The table as a tableau that takes its start at the process's t_max.

        Args:
          process: the noise process.
          name: for people.
          source: for people.
          check: as for `Tableau.create`; the first row, which only scales, is not checked.
        """
        count = self.nfe
        lag = np.subtract.outer(np.arange(count), np.arange(count))
        b = np.where(lag >= 0, np.take_along_axis(self.weights, np.maximum(lag, 0), axis=1), 0.0)
        tableau = Tableau.create(
            times=self.times,
            alpha=self.alpha,
            sigma=self.sigma,
            target=np.tile([1.0, 0.0], (count, 1)),
            a=(self.sigma[1:] / self.sigma[:-1])[:, None],
            b=b,
            asked=self.asked,
            name=name,
            source=source,
            check=check,
        )
        return from_largest_level(tableau, process)


def from_largest_level(tableau: Tableau, process: Process) -> Tableau:
    """The same sampler for starts at t_max: a first row scales them to where it begins.

    A start below t_max takes the noise for all there is, u_0 = x_T sigma_0 / sigma(t_max): what is
    left of the data at t_max, and what came between, is lost. That is why the row is not consistent
    and the self-check ends before it.

    Args:
      tableau: the sampler.
      process: the noise process.
    """
    largest = float(process.t_max)
    if tableau.times[0] >= largest * (1 - 1e-12):
        return tableau
    alpha, sigma = float(process.alpha(largest)), float(process.sigma(largest))

    def before(first: float | np.ndarray, array: np.ndarray) -> np.ndarray:
        return np.concatenate([np.asarray(first, array.dtype)[None], array])

    nothing, keep = np.zeros(tableau.q), np.zeros(tableau.p)
    keep[0] = tableau.sigma[0] / sigma
    return dataclasses.replace(
        tableau,
        times=before(largest, tableau.times),
        alpha=before(alpha, tableau.alpha),
        sigma=before(sigma, tableau.sigma),
        target=before(np.array([1.0, 0.0]), tableau.target),
        a=before(keep, tableau.a),
        b=before(nothing, tableau.b),
        c=before(0.0, tableau.c),
        evaluates=before(False, tableau.evaluates),
        d=None if tableau.d is None else before(np.zeros(np.shape(tableau.d)[1:]), tableau.d),
        asked=None if tableau.asked is None else before(largest, tableau.asked),
    )


def label_offsets(process: Process, times: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """How far in log-SNR the times that a network is told lie from its states'; 0 at alpha = 0.

    Args:
      process: the noise process.
      times: (N,) of the states.
      asked: (N,) conditioning times.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        offsets = np.asarray(process.log_snr(asked)) - np.asarray(process.log_snr(times))
    return np.where(np.isfinite(offsets), offsets, 0.0)


@silence
def told_times(process: Process, times: Array, offsets: Array) -> Array:
    """(N,) conditioning times: the inverse of `label_offsets`, within the process's range.

    On the host in float64, or in JAX and differentiable. Where alpha = 0 it is the state's own.

    Args:
      process: the noise process.
      times: (N,) of the states.
      offsets: (N,) in log-SNR.
    """
    xp = namespace(times, offsets)
    own = process.log_snr(times)
    inside = xp.isfinite(own)
    moved = process.time(xp.where(inside, own, 0) + offsets)
    low, high = (as_float(v, moved) for v in (process.t_clean, process.t_max))
    return xp.where(inside, xp.clip(moved, low, high), times)


def own_start(tableau: Tableau) -> tuple[Tableau, float]:
    """The sampler without a first row that only scales the start, and that scale; else 1.

    The inverse of `from_largest_level`.
    """
    live = np.asarray(tableau.evaluates)
    scales = (
        tableau.rows > 1
        and not live[0]
        and bool(np.any(live))
        and np.all(tableau.b[0] == 0)
        and np.all(tableau.a[0, 1:] == 0)
        and np.all(tableau.c[0] == 0)
        and (tableau.d is None or np.all(np.asarray(tableau.d)[0] == 0))
        and np.size(tableau.a[0, 0]) == 1
    )
    if not scales:
        return tableau, 1.0
    names = ("times", "alpha", "sigma", "target", "a", "b", "c", "evaluates", "d", "asked")
    rest = {k: v[1:] for k in names if (v := getattr(tableau, k)) is not None}
    return dataclasses.replace(tableau, **rest), float(tableau.a[0, 0])
