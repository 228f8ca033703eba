"""Multistep consistency sampling, for networks that jump to the data in one evaluation."""

from __future__ import annotations

import math

from diffsamp._core.types import Times
from diffsamp.processes import Process
from diffsamp.solvers._builder import Builder, transfer
from diffsamp.tableau import Tableau

__all__ = ["CONSISTENCY_INDICES", "consistency"]

# model: (indices of the levels used, steps of the Karras grid they count on), noise to data
CONSISTENCY_INDICES: dict[str, tuple[tuple[int, ...], int]] = {
    "imagenet64-cd-2": ((0, 22, 39), 40),
    "imagenet64-ct-2": ((0, 106, 200), 201),
    "lsun-cd-2": ((0, 17, 39), 40),
}


def consistency(process: Process, times: Times, *, rho_min: float = 0.002) -> Tableau:
    """Jump to the data, add noise of the next level, jump again.

    x_t = alpha_t D + sqrt(sigma_t^2 - alpha_t^2 rho_min^2) z, and D itself at the end: D of a
    consistency model is a sample at level rho_min, not a mean. For such models only: with the
    data prediction of a diffusion network it does not converge.

    Args:
      process: the noise process, EDM's for the published models.
      times: (n + 1,) decreasing times; the last level is taken without noise, whatever it is. See
        `CONSISTENCY_INDICES` for published choices on a Karras grid.
      rho_min: the level the network jumps to, in sigma / alpha; 0 for latent consistency models.

    Returns:
      A stochastic tableau of n evaluations (deterministic for n = 1), in data prediction.

    Raises:
      ValueError: times that do not decrease, or an inner level below rho_min.

    Reference: Song et al. 2023, arXiv:2303.01469, algorithm 1.
    """
    builder = Builder(process, times)
    builder.expect_falling("consistency")
    x = builder.start
    for n, (s, t) in enumerate(zip(builder.points, builder.points[1:], strict=False)):
        answer = builder.evaluate(x, s)
        if n == len(builder.points) - 2:
            x = t.alpha * answer.data if t.sigma else transfer(answer, t)
            continue
        if not t.rho >= rho_min >= 0:
            raise ValueError(
                f"`rho_min` = {rho_min:g} must not be negative, nor above an inner level; got "
                f"sigma / alpha = {t.rho:g} at t = {t.t:g}."
            )
        std = math.sqrt(t.sigma**2 - (t.alpha * rho_min) ** 2)
        x = t.alpha * answer.data + std * builder.fresh_noise()
    return builder.finish(
        x, builder.points[-1], name="consistency", source="arXiv:2303.01469", check="mean"
    )
