"""Time grids and tableaux."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diffsamp._core.types import Times, Value
from diffsamp.evaluation.describe import describe, gaussian_spread
from diffsamp.plot._style import COLORS, color_of, figure, styled
from diffsamp.processes import Process
from diffsamp.tableau import Tableau

__all__ = ["schedule", "tableau"]

_SPREADS = np.geomspace(0.01, 10.0, 121)


@styled
def schedule(process: Process, times: Mapping[str, Times] | Times) -> Value:
    """Where schedules put their points: noise level sigma / alpha by step, and as a strip.

    Args:
      process: the noise process.
      times: {label: (n + 1,) times}, or one such array.

    Returns:
      A matplotlib Figure. The clean end, which no logarithmic axis holds, is left out.
    """
    lines = times if isinstance(times, Mapping) else {"": times}
    drawn = figure(max(2.5, 0.22 * len(lines) + 0.8))
    left, right = drawn.subplots(1, 2)
    for i, (label, values) in enumerate(lines.items()):
        values = np.asarray(values, np.float64)
        with np.errstate(divide="ignore"):
            rho = np.asarray(process.sigma(values) / process.alpha(values))
        kept = np.isfinite(rho) & (rho > 0)
        progress = np.arange(len(values)) / (len(values) - 1)
        color, dashes = color_of(i)
        left.plot(progress[kept], rho[kept], dashes, marker=".", label=label or None, color=color)
        right.plot(rho[kept], np.full(kept.sum(), -i), "|", markersize=12, color=color)
    left.set(xlabel="part of the steps", ylabel="sigma / alpha", yscale="log")
    right.set(xlabel="sigma / alpha", xscale="log", ylim=(-len(lines) + 0.4, 0.6))
    right.set_yticks([-i for i in range(len(lines))], list(lines))
    right.invert_xaxis()
    left.grid()
    right.grid(axis="x")
    return drawn


@styled
def tableau(sampler: Tableau) -> Value:
    """A tableau as four panels: weights of the predictions, noise levels, stability, spread.

    Args:
      sampler: a tableau of plain numbers.

    Returns:
      A matplotlib Figure. The heat map shows `Description.shares`: row n, column j is the weight of
      D_j in what row n adds; "extrapolation" is by how much a row enlarges errors of the
      predictions at worst; the last panel is `describe.gaussian_spread`: the standard deviation of
      the samples over that of Gaussian data, by the latter.
    """
    facts = describe(sampler)
    rows = sampler.rows
    drawn = figure(4.6)
    grid = drawn.add_gridspec(3, 2, width_ratios=(1.25, 1))
    left = drawn.add_subplot(grid[:, 0])
    levels, enlarged, spread = (drawn.add_subplot(grid[i, 1]) for i in range(3))
    largest = max(1.0, float(np.abs(facts.shares).max()))
    shown = np.ma.masked_where(np.triu(np.ones((rows, rows), bool), 1), facts.shares)
    image = left.imshow(shown, cmap="RdBu_r", vmin=-largest, vmax=largest)
    if rows <= 12:
        size = min(7.5, 58 / rows)
        for n, j in zip(*np.tril_indices(rows), strict=True):
            value = facts.shares[n, j]
            dark = "white" if abs(value) > 0.6 * largest else "black"
            text = f"{value:.2f}" if abs(value) >= 0.005 else "0"
            left.text(j, n, text, ha="center", va="center", fontsize=size, color=dark)
    corner = left.inset_axes((0.52, 0.93, 0.42, 0.025))  # of the triangle that is empty
    drawn.colorbar(image, cax=corner, orientation="horizontal")
    left.set(title="weight of each prediction", xlabel="prediction D_j", ylabel="row n")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.yaxis.get_major_locator().set_params(integer=True)
    kept = np.isfinite(facts.rho) & (facts.rho > 0)
    levels.plot(np.arange(rows + 1)[kept], facts.rho[kept], "o-", color=COLORS[0], markersize=3)
    levels.set(ylabel="sigma / alpha", yscale="log")
    levels.tick_params(labelbottom=False)
    enlarged.axhline(1.0, color="0.5", linestyle="--", linewidth=0.9)
    enlarged.plot(facts.extrapolation, "o-", color=COLORS[1], markersize=3)
    enlarged.set(ylabel="extrapolation", xlabel="row", ylim=(0, None))
    spread.axhline(1.0, color="0.5", linestyle="--", linewidth=0.9)
    spread.plot(_SPREADS, gaussian_spread(sampler, _SPREADS), color=COLORS[2])
    spread.set(xscale="log", xlabel="std of Gaussian data", ylabel="made / true std")
    for axis in (levels, enlarged):
        axis.set_xlim(-0.04 * rows, 1.04 * rows)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in (levels, enlarged, spread):
        axis.grid()
    drawn.suptitle(f"{sampler.name or 'tableau'}, {sampler.nfe} evaluations", fontsize=9)
    return drawn
