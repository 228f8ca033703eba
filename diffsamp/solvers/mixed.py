"""A sampler put together step by step: the search space of the unified sampling framework.

Every step chooses its order, what it interpolates and in which variable, whether it spends a second
evaluation inside the step, whether the state is corrected by the next evaluation, and by how much
its higher-order terms count. Solvers of different cost mix in one tableau.

Reference: Liu et al. 2023, USF (arXiv:2312.07243), section 4.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from diffsamp._core.checks import expect_choice, expect_int
from diffsamp._core.types import Times
from diffsamp.processes import Process
from diffsamp.solvers._builder import (
    DATA,
    NOISE,
    Answer,
    Builder,
    Combination,
    Point,
    total,
    transfer,
)
from diffsamp.solvers._weights import adams_weights, diffusion_time, exponential_weights
from diffsamp.tableau import Tableau

__all__ = ["MixedStep", "mixed"]

_BASES = ("data", "noise", "rho", "t", "adams")
# Adams-Bashforth and, with the coming point first, Adams-Moulton for equal steps
_EXPLICIT = {1: (1.0,), 2: (1.5, -0.5), 3: (23 / 12, -16 / 12, 5 / 12)}
_EXPLICIT[4] = (55 / 24, -59 / 24, 37 / 24, -9 / 24)
_IMPLICIT = {2: (1 / 2, 1 / 2), 3: (5 / 12, 8 / 12, -1 / 12), 4: (9 / 24, 19 / 24, -5 / 24, 1 / 24)}


@dataclasses.dataclass(frozen=True)
class MixedStep:
    """One step's choices.

    Attributes:
      basis: what is interpolated, and in what: "data" the data prediction in log-SNR (as
        DPM-Solver++, UniPC); the noise prediction in log-SNR ("noise": DPM-Solver), in "rho" or in
        "t" (DEIS; which t, `deis` says), or in "adams" the step number (iPNDM).
      order: points used, 1 to 4; fewer while there are fewer.
      stages: 1, or 2: a second evaluation at the middle of the step in log-SNR.
      corrector: redo the step once the network has answered at its end (UniC), at no evaluation.
      scale: factor of what the step adds to its first-order form.
    """

    basis: str = "data"
    order: int = 2
    stages: int = 1
    corrector: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        expect_choice(self.basis, "basis", _BASES)
        expect_int(self.order, "order", 1, 4)
        expect_int(self.stages, "stages", 1, 2)
        if not 0 <= self.scale <= 2:
            raise ValueError(f"`scale` must lie between 0 and 2; got {self.scale}.")


def mixed(process: Process, times: Times, *, steps: Sequence[MixedStep]) -> Tableau:
    """A tableau whose every step is of its own kind.

    The step to sigma = 0 is of order 1 unless its basis stays finite there ("rho", "adams").

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.
      steps: n choices.

    Returns:
      A deterministic tableau of as many evaluations as the steps have stages.

    Raises:
      ValueError: times not sorted, another number of steps, or two stages in a step that starts at
        alpha = 0 or ends at sigma = 0, where it has no middle.

    Reference: Liu et al. 2023, arXiv:2312.07243.
    """
    builder = Builder(process, times)
    points = builder.points
    if len(steps) != len(points) - 1:
        raise ValueError(f"`steps` must be {len(points) - 1}, one per step; got {len(steps)}.")
    x, history = builder.start, list[Answer]()
    last: tuple[Combination, Point, list[Answer], MixedStep] | None = None
    for step, s, t in zip(steps, points, points[1:], strict=False):
        target = DATA if step.basis == "data" else NOISE
        answer = builder.evaluate(x, s, target)
        x = answer.state
        if last is not None and last[3].corrector:
            origin, start, used, before = last
            x = _step(process, origin, start, [answer, *used], s, before, implicit=True)
        origin = x
        history = [answer, *history[:3]]
        used = history[: step.order]
        if step.stages == 2:
            if not (math.isfinite(s.log_snr) and math.isfinite(t.log_snr)):
                raise ValueError(
                    "a step from alpha = 0 or to sigma = 0 has no middle in log-SNR; give it one "
                    "stage."
                )
            middle = builder.point_at((s.log_snr + t.log_snr) / 2)
            halfway = _step(process, origin, s, used, middle, step)
            history = [builder.evaluate(halfway, middle, target), *history[:3]]
            used = history[: step.order]  # order 1: the middle alone, the midpoint rule
        last = (origin, s, used, step) if math.isfinite(s.log_snr) else None
        x = _step(process, origin, s, used, t, step)
    return builder.finish(x, points[-1], name="mixed", source="arXiv:2312.07243")


def _step(
    process: Process,
    x: Combination,
    s: Point,
    used: list[Answer],
    t: Point,
    step: MixedStep,
    implicit: bool = False,
) -> Combination:
    """The state at t from the state x at s; `implicit` if the first answer was made at t itself."""
    if not math.isfinite(s.log_snr):
        return transfer(used[0], t)
    used = [a for a in used if math.isfinite(a.point.log_snr)]
    basis = step.basis
    if t.sigma == 0 and basis not in ("rho", "adams"):
        used = used[:1]
    if basis == "data":
        first = -math.expm1(s.log_snr - t.log_snr)
        nodes = [a.point.log_snr - s.log_snr for a in used]
        weights = exponential_weights(nodes, t.log_snr - s.log_snr)
    else:
        first = t.rho - s.rho
        constant = (_IMPLICIT if implicit else _EXPLICIT).get(len(used))
        if basis == "adams" and constant is not None and step.stages == 1:
            weights = first * np.array(constant)
        else:
            if basis == "noise":
                weights = adams_weights([-a.point.log_snr for a in used], s.rho, t.rho, _itself)
            elif basis == "t":
                time = diffusion_time(process)
                at = list(time(np.array([-a.point.log_snr for a in used])))
                weights = adams_weights(at, s.rho, t.rho, time)
            else:
                weights = adams_weights([a.point.rho for a in used], s.rho, t.rho)
    plain = np.zeros(len(used))
    newest = min(int(implicit), len(used) - 1)
    plain[newest] = first
    weights = plain + step.scale * (weights - plain)
    # exact for a constant prediction even where far extrapolation has lost digits
    weights[newest] += first - math.fsum(weights)
    if basis == "data":
        return (t.sigma / s.sigma) * x + t.alpha * total(weights, [a.data for a in used])
    return (t.alpha / s.alpha) * x + t.alpha * total(weights, [a.noise for a in used])


def _itself(log_rho: np.ndarray) -> np.ndarray:
    return log_rho
