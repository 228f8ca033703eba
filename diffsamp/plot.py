"""Pictures, with matplotlib (extra "demo"). Functions return a Figure; `save` writes it."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence

import numpy as np

from diffsamp._core.files import write_atomically
from diffsamp._core.types import Array, Times, Value
from diffsamp.evaluation.describe import describe
from diffsamp.processes import Process
from diffsamp.search.compare import Comparison
from diffsamp.tableau import Tableau

__all__ = [
    "error_against_nfe",
    "image_grid",
    "quality_against_nfe",
    "save",
    "schedule",
    "tableau",
]


def _figure(**options: Value) -> Value:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'plots need matplotlib: pip install "diffsamp[demo]"', name="matplotlib"
        ) from error
    return Figure(layout="constrained", **options)


def save(figure: Value, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomically(path, buffer.getvalue())


def quality_against_nfe(
    comparison: Comparison,
    *,
    found: Sequence[tuple[int, float, float | None]] = (),
    score: str | None = None,
    score_label: str = "",
    most: int = 7,
) -> Value:
    """PSNR (and one further score) of each solver on its best schedule, against NFE.

    Args:
      comparison: what `diffsamp.search.compare` returned.
      found: searched samplers to mark, as (nfe, PSNR, score).
      score: a further score of the comparison, drawn in a second panel.
      score_label: that panel's axis label.
      most: how many solvers to draw, the best first.

    Returns:
      A matplotlib Figure.
    """
    panels: list[tuple[str, str]] = [("psnr", "PSNR to the ODE's solution (dB)")]
    if score is not None:
        panels.append((score, score_label or score))
    figure = _figure(figsize=(5.2 * len(panels), 4.0))
    axes = np.atleast_1d(figure.subplots(1, len(panels)))
    solvers = list(dict.fromkeys(entry.solver for entry in comparison.entries))
    budgets = sorted({entry.nfe for entry in comparison.entries})

    def value(entry: Value, name: str) -> float:
        return entry.psnr if name == "psnr" else entry.scores[name]

    def curve(solver: str, name: str) -> tuple[list[int], list[float]]:
        pick = max if name == "psnr" else min
        own = [e for e in comparison.entries if e.solver == solver]
        have = sorted({e.nfe for e in own})
        return have, [pick(value(e, name) for e in own if e.nfe == n) for n in have]

    ranked = sorted(solvers, key=lambda s: -float(np.mean(curve(s, "psnr")[1])))[:most]
    for axis, (name, label) in zip(axes, panels, strict=True):
        for solver in ranked:
            axis.plot(*curve(solver, name), marker="o", markersize=3.5, linewidth=1.2, label=solver)
        for i, (nfe, psnr, other) in enumerate(found):
            height = psnr if name == "psnr" else other
            if height is not None:
                axis.plot(
                    [nfe],
                    [height],
                    marker="*",
                    markersize=13,
                    color="black",
                    linestyle="",
                    label="distilled" if i == 0 else None,
                )
        axis.set_xlabel("network evaluations (NFE)")
        axis.set_ylabel(label)
        axis.set_xticks(budgets)
        if name != "psnr":
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, loc="lower right", markerscale=0.7)
    return figure


def image_grid(rows: Sequence[tuple[str, Array]], *, title: str = "") -> Value:
    """A grid of grey images in [-1, 1], one labelled row after another.

    Args:
      rows: (label, images (n, height, width, 1)) with one n for all.
      title: above the grid.

    Returns:
      A matplotlib Figure.
    """
    columns = len(rows[0][1])
    figure = _figure(figsize=(0.62 * columns + 2.4, 0.66 * len(rows) + 0.5))
    axes = np.atleast_2d(figure.subplots(len(rows), columns, squeeze=False))
    for line, (label, images) in zip(axes, rows, strict=True):
        for axis, image in zip(line, np.asarray(images), strict=True):
            axis.imshow(image[..., 0], cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def error_against_nfe(
    panels: Sequence[tuple[str, str, dict[str, Sequence[tuple[float, float]]], float | None]],
) -> Value:
    """Curves of an error over the number of evaluations, on logarithmic axes.

    Args:
      panels: for each, its title, the label of the error, {name: points (nfe, error)}, and a level
        that none can be below (drawn dashed) or None. Values that are not finite are left out.

    Returns:
      A matplotlib Figure, two panels a row.
    """
    rows = -(-len(panels) // 2)
    figure = _figure(figsize=(5.2 * min(len(panels), 2), 4.0 * rows))
    axes = figure.subplots(rows, min(len(panels), 2), squeeze=False).reshape(-1)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, label, lines, floor) in zip(axes, panels, strict=False):
        ticks: set[int] = set()
        for i, (name, points) in enumerate(lines.items()):
            kept = [(n, e) for n, e in points if np.isfinite(e) and e > 0]
            ticks |= {round(n) for n, _ in kept}
            style = ("-", "--", ":")[i // 10 % 3]
            axis.plot(*zip(*kept, strict=True), style, marker=".", label=name, color=f"C{i % 10}")
        if floor:
            axis.axhline(floor, color="0.6", linestyle="--", linewidth=1)
        axis.set(xscale="log", yscale="log", title=title, xlabel="evaluations", ylabel=label)
        chosen: list[int] = []
        for n in sorted(ticks):  # none closer than their labels are wide
            if not chosen or n > 1.13 * chosen[-1]:
                chosen.append(n)
        axis.set_xticks(chosen, [str(n) for n in chosen])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
        if len(lines) < 9:
            axis.legend(fontsize=7)
        else:  # beside the curves: it would lie on some of them
            axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def schedule(process: Process, times: Mapping[str, Times] | Times) -> Value:
    """Where schedules put their points: noise level sigma / alpha by step, and as a strip.

    Args:
      process: the noise process.
      times: {label: (n + 1,) times}, or one such array.

    Returns:
      A matplotlib Figure. The clean end, which no logarithmic axis holds, is left out.
    """
    lines = times if isinstance(times, Mapping) else {"": times}
    figure = _figure(figsize=(10.4, 4.0))
    left, right = figure.subplots(1, 2)
    for i, (label, values) in enumerate(lines.items()):
        values = np.asarray(values, np.float64)
        with np.errstate(divide="ignore"):
            rho = np.asarray(process.sigma(values) / process.alpha(values))
        kept = np.isfinite(rho) & (rho > 0)
        progress = np.arange(len(values)) / (len(values) - 1)
        color = f"C{i % 10}"
        left.plot(progress[kept], rho[kept], marker=".", label=label or None, color=color)
        right.plot(rho[kept], np.full(kept.sum(), -i), "|", markersize=14, color=color)
    left.set(xlabel="part of the steps", ylabel="sigma / alpha", yscale="log")
    right.set(xlabel="sigma / alpha", xscale="log", ylim=(-len(lines) + 0.4, 0.6))
    right.set_yticks([-i for i in range(len(lines))], list(lines))
    right.invert_xaxis()
    left.grid(alpha=0.3)
    right.grid(alpha=0.3, axis="x")
    if any(lines):
        left.legend(fontsize=8)
    return figure


def tableau(sampler: Tableau) -> Value:
    """A tableau as three panels: weights of the predictions, noise levels, stability.

    Args:
      sampler: a tableau of plain numbers.

    Returns:
      A matplotlib Figure. The heat map shows `Description.shares`: row n, column j is the weight of
      D_j in what row n adds; the last panel its `extrapolation`.
    """
    facts = describe(sampler)
    rows = sampler.rows
    figure = _figure(figsize=(14.0, 4.2))
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    largest = max(1.0, float(np.abs(facts.shares).max()))
    shown = np.ma.masked_where(np.triu(np.ones((rows, rows), bool), 1), facts.shares)
    image = left.imshow(shown, cmap="RdBu_r", vmin=-largest, vmax=largest)
    if rows <= 12:
        for n in range(rows):
            for j in range(n + 1):
                value = facts.shares[n, j]
                dark = abs(value) > 0.6 * largest
                left.text(
                    j,
                    n,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if dark else "black",
                )
    figure.colorbar(image, ax=left, shrink=0.8)
    left.set(title="weight of each prediction", xlabel="prediction D_j", ylabel="row n")
    kept = np.isfinite(facts.rho) & (facts.rho > 0)
    middle.plot(np.arange(rows + 1)[kept], facts.rho[kept], marker="o", markersize=4)
    middle.set(title="noise level", xlabel="row", ylabel="sigma / alpha", yscale="log")
    right.plot(facts.extrapolation, marker="o", markersize=4)
    right.set(title="extrapolation (1: none)", xlabel="row", ylim=(0, None))
    for axis in (middle, right):
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(f"{sampler.name or 'tableau'}, {sampler.nfe} evaluations", fontsize=10)
    return figure
