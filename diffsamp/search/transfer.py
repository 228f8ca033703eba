"""Plans for budgets, guidance scales and noise levels that were not searched.

A sampler found for one setting says something of the next one: where its times lie, as a curve over
the run, and how its rows weigh what the network said before, as a function of the lag. `transfer`
reads both curves off one sampler at another number of evaluations; `interpolate` reads them off two
samplers and goes between. DC-Solver's ratios as a polynomial of budget and guidance scale (Zhao et
al. 2024, arXiv:2409.03755, section 3.3) are the same idea with one number a row; schedules with a
few numbers are resampled so (Sabour et al. 2024, arXiv:2404.14507).

Neither asks the network. What is lost against a search of its own is in docs/search.md; `refine`
from here costs less than from anywhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from diffsamp._core.checks import expect_int
from diffsamp._core.types import Array
from diffsamp.processes import Process, expect_process
from diffsamp.search.canonical import canonical, from_canonical
from diffsamp.search.explicit import from_largest_level, own_start
from diffsamp.search.plan import Plan
from diffsamp.tableau import Tableau

__all__ = ["interpolate", "transfer"]

Found = Tableau | Plan


def transfer(
    found: Found, process: Process, *, nfe: int | None = None, log_snr_shift: float = 0.0
) -> Tableau:
    """The sampler with another number of evaluations, or with its levels moved.

    Args:
      found: a plan, or any sampler of one evaluation a row.
      process: its noise process.
      nfe: evaluations wanted; None: as many as it has.
      log_snr_shift: added to the log-SNR of every time but those at the ends, in nats. An image of
        r times the resolution shows as much structure at a log-SNR lower by log r (Hoogeboom et
        al. 2023, arXiv:2301.11093, section 3.1, whose log-SNR is twice ours): -0.69 for twice the
        width. For flow matching it is the shift of `schedules.flow_shift`, -log(shift).

    Returns:
      A tableau for starts at t_max, unchanged numbers if neither is given.

    Raises:
      ValueError: a sampler that has no canonical form (`canonical`), or times that leave the range
        of the process.
    """
    expect_process(process)
    curves = _Curves.of(found, process)
    count = curves.nfe if nfe is None else expect_int(nfe, "nfe", at_least=1)
    numbers = curves.at(count)
    tableau = found.tableau if isinstance(found, Plan) else found
    return _built(
        numbers, curves.end, process, float(log_snr_shift), f"{tableau.name}, transferred"
    )


def interpolate(
    found: Mapping[float, Found], process: Process, at: float, *, nfe: int | None = None
) -> Tableau:
    """The sampler between those that were found, for a setting that was not searched.

    Args:
      found: by a number, at least two samplers for the same process: {4: .., 8: ..} by their
        evaluations, or {1.0: .., 4.0: ..} by guidance scale, or by anything else that varies.
      process: their noise process.
      at: the number wanted, between the least and the largest of `found`.
      nfe: evaluations wanted. None: `at` where the numbers are those of evaluations, else those of
        the two neighbours, which must agree.

    Returns:
      A tableau for starts at t_max: exactly the one found where `at` is one of the numbers.

    Raises:
      ValueError: fewer than two samplers, an `at` outside, ends that differ, or samplers that have
        no canonical form.
    """
    expect_process(process)
    if len(found) < 2:
        raise ValueError(f"`found` must hold at least two samplers; got {len(found)}.")
    knots = sorted(found)
    if not knots[0] <= at <= knots[-1]:
        raise ValueError(
            f"`at` must lie between {knots[0]:g} and {knots[-1]:g}, the numbers of `found`; got "
            f"{at:g}. One sampler is extended by `transfer`."
        )
    high = int(np.clip(np.searchsorted(knots, at), 1, len(knots) - 1))
    below, above = knots[high - 1], knots[high]
    one, two = _Curves.of(found[below], process), _Curves.of(found[above], process)
    budgets = all(found[k].nfe == k for k in (below, above))
    if nfe is None and budgets:
        nfe = expect_int(at, "at", at_least=1)
    elif nfe is None:
        if one.nfe != two.nfe:
            raise ValueError(
                f"the neighbours of {at:g} make {one.nfe} and {two.nfe} evaluations: say `nfe`."
            )
        nfe = one.nfe
    if not np.allclose(one.end, two.end, rtol=1e-6):
        raise ValueError("the samplers of `found` end at different levels.")
    # what a step costs goes with its length, so budgets are counted in steps: 1 / N
    place = (lambda k: 1 / k) if budgets else float
    part = (place(at) - place(below)) / (place(above) - place(below))
    first, last = one.at(nfe), two.at(nfe)
    numbers = {name: (1 - part) * first[name] + part * last[name] for name in first}
    return _built(numbers, one.end, process, 0.0, f"between {below:g} and {above:g}, at {at:g}")


@dataclasses.dataclass(frozen=True)
class _Curves:
    """A sampler over the run: row n of N at s = n / N.

    Attributes:
      log_snr: (N,) of the evaluations.
      first: time of the first evaluation.
      lags: (N, N) what row n gives to the answer of j rows before, in units of its step.
      offsets: (N,) conditioning times from the states', in log-SNR.
      state: (N,) change of the state's own coefficient.
      noise: (N,) angles of the noise that rows add; 0 for deterministic samplers.
      end: (3,) time, alpha and sigma of the sample.
      process: the noise process.
    """

    log_snr: np.ndarray
    first: float
    lags: np.ndarray
    offsets: np.ndarray
    state: np.ndarray
    noise: np.ndarray
    end: np.ndarray
    process: Process

    @classmethod
    def of(cls, found: Found, process: Process) -> _Curves:
        tableau = found.tableau if isinstance(found, Plan) else found
        numbers = canonical(tableau, process)
        tableau, _ = own_start(tableau)
        count = tableau.nfe
        weights = numbers["weights"]
        square = weights + np.diag(1 + numbers["sums"] - weights.sum(axis=1))
        index = np.subtract.outer(np.arange(count), np.arange(count))
        lags = np.where(index >= 0, np.take_along_axis(square, np.maximum(index, 0), axis=1), 0.0)
        first = float(tableau.times[0])
        noise = numbers.get("noise", np.zeros(count))
        if count > 1 and tableau.sigma[count] == 0:
            noise[-1] = noise[-2]  # the last row has no noise to say anything by
        with np.errstate(divide="ignore"):
            start = np.log(tableau.alpha[0]) - np.log(tableau.sigma[0])
        end = [getattr(tableau, name)[count] for name in ("times", "alpha", "sigma")]
        return cls(
            np.append(start, numbers["log_snr"]),
            first,
            lags,
            numbers.get("labels", np.zeros(count)),
            numbers["state"],
            noise,
            np.asarray(end, np.float64),
            process,
        )

    @property
    def nfe(self) -> int:
        """N."""
        return len(self.log_snr)

    def at(self, count: int) -> dict[str, np.ndarray]:
        """The canonical numbers of `count` rows, with the time of the first."""
        own, place = np.arange(self.nfe) / self.nfe, np.arange(count) / count
        ratio = self.nfe / count
        return {
            "first": np.asarray(self.first),
            "log_snr": self._levels(place)[1:],
            "labels": np.interp(place, own, self.offsets) * ratio,
            "state": np.interp(place, own, self.state) * ratio,
            "noise": self._angles(np.interp(place, own, self.noise), ratio),
            **self._weights(own, place),
        }

    @staticmethod
    def _angles(angles: np.ndarray, ratio: float) -> np.ndarray:
        """Angles of steps of `ratio` of the length: what steps in a row keep is multiplied."""
        return np.sign(angles) * np.arccos(np.abs(np.cos(angles)) ** ratio)

    def _levels(self, place: np.ndarray) -> np.ndarray:
        """(count,) log-SNR; beyond the last evaluation along the last step.

        Where that leaves the process's range, all steps give a part of theirs.
        """
        log_snr = self.log_snr.copy()
        last = self.nfe - 1
        at_once = not np.isfinite(log_snr[0])  # alpha = 0: the first step has no length in log-SNR
        if at_once:
            after = log_snr[2] - log_snr[1] if self.nfe > 2 else 1.0
            log_snr[0] = log_snr[1] - after if last else 0.0
        room = self._most() - log_snr[-1]
        step = log_snr[-1] - log_snr[-2] if last else room
        rows = place * self.nfe
        more = int(np.sum(rows > last))
        if more:
            ahead = min(rows[-1] - last, room / step * more / (more + 1))
            rows = rows * ((last + ahead) / rows[-1])
        levels = np.interp(rows, np.arange(self.nfe), log_snr) + np.maximum(rows - last, 0.0) * step
        if at_once:
            second = self._time(log_snr[1]) if last else 0.0
            inside = (rows > 0) & (rows < 1)
            times = self.first + rows[inside] * (second - self.first)
            levels[inside] = np.asarray(self.process.log_snr(times))
        return levels

    def _most(self) -> float:
        """The largest log-SNR at which to ask: that of t_min, or of the sample if it is lower."""
        end = np.log(self.end[1]) - np.log(self.end[2]) if self.end[2] > 0 else np.inf
        return float(min(self.process.log_snr(self.process.t_min), end))

    def _time(self, log_snr: float) -> float:
        return float(self.process.time(np.float64(log_snr)))

    def _weights(self, own: np.ndarray, place: np.ndarray) -> dict[str, np.ndarray]:
        """Strictly lower part and row sums of G."""
        count = len(place)
        known = min(self.nfe, count)
        rows = np.stack([np.interp(place, own, self.lags[:, j]) for j in range(self.nfe)], axis=1)
        lags = np.zeros((count, count))
        lags[:, :known] = rows[:, :known]
        late = np.arange(count)[None, :] > np.arange(count)[:, None]  # before the first answer
        lost = np.where(late, lags, 0.0).sum(axis=1) + rows[:, known:].sum(axis=1)
        lags = np.where(late, 0.0, lags)
        lags[:, 0] += lost
        index = np.subtract.outer(np.arange(count), np.arange(count))
        square = np.where(index >= 0, np.take_along_axis(lags, np.maximum(index, 0), axis=1), 0.0)
        return {"weights": np.tril(square, -1), "sums": lags.sum(axis=1) - 1}


def _built(
    numbers: Mapping[str, np.ndarray], end: np.ndarray, process: Process, shift: float, name: str
) -> Tableau:
    numbers = dict(numbers)
    first = float(numbers.pop("first"))
    log_snr = numbers["log_snr"] + shift
    inner = np.asarray(process.time(log_snr), np.float64)
    times = np.concatenate([[first], inner, end[:1]])
    if not (np.all(np.isfinite(times)) and np.all(np.diff(times) < 0)):
        raise ValueError(
            f"the times {np.array2string(times, precision=4)} do not fall within the process's "
            f"range: `log_snr_shift` = {shift:g} moves them too far."
        )
    ends: dict[str, Array] = {
        "times": np.array([first, end[0]]),
        "alpha": np.array([float(process.alpha(first)), end[1]]),
        "sigma": np.array([float(process.sigma(first)), end[2]]),
    }
    for name in ("labels", "noise"):
        if not np.any(numbers[name]):
            del numbers[name]
    arrays = from_canonical({**numbers, "log_snr": log_snr}, ends, process)
    consistent = np.allclose(numbers["sums"], 0, atol=1e-10) and np.allclose(
        numbers["state"], 0, atol=1e-10
    )
    tableau = Tableau.create(
        **arrays,
        name=name,
        source="diffsamp.search.transfer",
        check="full" if consistent else "none",
    )
    return from_largest_level(tableau, process)
