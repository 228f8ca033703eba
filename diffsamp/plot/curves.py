"""What was measured, by the number of evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from diffsamp._core.types import Value
from diffsamp.plot._style import (
    COLORS,
    GREY,
    WIDTH,
    color_of,
    evaluations_axis,
    figure,
    styled,
)
from diffsamp.search.compare import Comparison, Entry
from diffsamp.search.plan import Front, Plan

__all__ = ["comparison", "error_against_nfe", "front"]

_BEST = "best of all"


@styled
def error_against_nfe(
    panels: Sequence[tuple[str, str, dict[str, Sequence[tuple[float, float]]], float | None]],
    *,
    log: bool = True,
    columns: int = 2,
    strong: str | None = None,
) -> Value:
    """Curves of an error over the number of evaluations, one colour a name in all panels.

    Args:
      panels: for each, its title, the label of the error, {name: points (nfe, error)}, and a level
        to compare with (drawn dashed), such as one that none can be below, or None. Values that are
        not finite are left out; with `log` those that are not positive, too.
      log: a logarithmic axis of the error.
      columns: panels in a row.
      strong: the name that is drawn in black, or None.

    Returns:
      A matplotlib Figure.
    """
    columns = min(len(panels), columns)
    rows = -(-len(panels) // columns)
    names = list(dict.fromkeys(name for panel in panels for name in panel[2] if name != strong))
    across = 5 if columns > 1 else 3
    width = WIDTH if columns > 1 else 0.62 * WIDTH
    drawn = figure(2.7 * rows + 0.17 * -(-len(names) // across), width)
    axes = drawn.subplots(rows, columns, squeeze=False).reshape(-1)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    handles: dict[str, Value] = {}
    for axis, (title, label, lines, level) in zip(axes, panels, strict=False):
        counts: list[float] = []
        for name, points in lines.items():
            kept = [(n, e) for n, e in points if np.isfinite(e) and (e > 0 or not log)]
            if not kept:
                continue
            counts += [n for n, _ in kept]
            color, dashes = ("black", "-") if name == strong else color_of(names.index(name))
            x, y = zip(*kept, strict=True)
            (line,) = axis.plot(x, y, dashes, marker="o", markersize=3, label=name, color=color)
            handles.setdefault(name, line)
        if level is not None:
            axis.axhline(level, color="0.5", linestyle="--", linewidth=1)
        axis.set(title=title, ylabel=label, yscale="log" if log else "linear")
        evaluations_axis(axis, counts)
        axis.grid()
    drawn.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=across)
    return drawn


def _score(entry: Entry, name: str) -> float:
    return entry.psnr if name == "psnr" else entry.scores[name]


@styled
def comparison(
    found: Comparison,
    *,
    marks: Mapping[str, Sequence[tuple[int, float, float | None]]] | None = None,
    score: str | None = None,
    score_label: str = "",
    most: int = 4,
) -> Value:
    """Small multiples: a panel a solver, its schedules against the best of all at each budget.

    Args:
      found: what `diffsamp.search.compare` returned.
      marks: samplers to mark in every panel, such as searched ones: {name: (nfe, PSNR, score)}.
      score: a further score of the comparison, smaller is better, drawn in a second row.
      score_label: that row's axis label.
      most: how many solvers to draw, the best first.

    Returns:
      A matplotlib Figure.
    """
    kinds = [("psnr", "PSNR to the ODE's solution, dB")]
    kinds += [] if score is None else [(score, score_label or score)]
    entries = [e for e in found.entries if np.isfinite(e.psnr)]
    budgets = sorted({e.nfe for e in entries})

    def best(own: Sequence[Entry], kind: str) -> list[tuple[int, float]]:
        pick = max if kind == "psnr" else min
        have = sorted({e.nfe for e in own})
        return [(n, pick(_score(e, kind) for e in own if e.nfe == n)) for n in have]

    def mean(solver: str) -> float:
        top = dict(best(entries, "psnr"))
        own = best([e for e in entries if e.solver == solver], "psnr")
        return float(np.mean([value - top[n] for n, value in own]))

    solvers = sorted({e.solver for e in entries}, key=mean, reverse=True)[:most]
    grids = list(dict.fromkeys(e.schedule for e in entries if e.solver in solvers))
    drawn = figure(2.1 * len(kinds) + 0.6)
    axes = drawn.subplots(len(kinds), len(solvers), squeeze=False, sharex=True, sharey="row")
    handles: dict[str, Value] = {}
    for (row, column), axis in np.ndenumerate(axes):
        (kind, label), solver = kinds[row], solvers[column]
        x, y = zip(*best(entries, kind), strict=True)
        (handles[_BEST],) = axis.plot(x, y, color=GREY, linewidth=3.2, solid_capstyle="round")
        for i, grid in enumerate(grids):
            points = best([e for e in entries if (e.solver, e.schedule) == (solver, grid)], kind)
            if points:
                color, dashes = color_of(i)
                x, y = zip(*points, strict=True)
                options: dict[str, Value] = {"color": color, "marker": "o", "markersize": 2.5}
                (handles[grid],) = axis.plot(x, y, dashes, linewidth=1.1, **options)
        for name, triples in (marks or {}).items():
            kept = [(n, p if kind == "psnr" else s) for n, p, s in triples]
            x, y = zip(*[(n, v) for n, v in kept if v is not None], strict=True)
            (handles[name],) = axis.plot(x, y, "*", markersize=9, color="black", markeredgewidth=0)
        axis.grid()
        if kind != "psnr":
            axis.set_yscale("log")
        evaluations_axis(axis, budgets, apart=1.2)
        if row == 0:
            axis.set_title(solver)
        if row < len(kinds) - 1:
            axis.set_xlabel("")
        if column == 0:
            axis.set_ylabel(label)
    order = [_BEST, *(marks or {}), *grids]
    shown = {name: handles[name] for name in order if name in handles}
    drawn.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=6)
    return drawn


@styled
def front(found: Front | Mapping[int, Plan], *, score: str = "psnr") -> Value:
    """A plan per budget on noise that took no part, against the best fixed sampler there.

    Args:
      found: what `diffsamp.search.best` returned, or {nfe: plan}.
      score: which of the plans' scores.

    Returns:
      A matplotlib Figure. Plans that a cheaper one equals are hollow.

    Raises:
      ValueError: the plans were not held against anything, or not by this score.
    """
    plans = dict(found.plans) if isinstance(found, Front) else dict(found)
    keep = set(found.pareto) if isinstance(found, Front) else set(plans)
    budgets = sorted(plans)

    def values(which: str) -> list[float]:
        try:
            own = [plans[n].scores[score] for n in budgets]
            return [one.get("held_out", one.get("compared", {}))[which] for one in own]
        except KeyError as error:
            raise ValueError(f"a plan has no {score!r} on held-out noise: {error}.") from error

    starts, ends = values("start"), values("found")
    drawn = figure(2.9, 0.62 * WIDTH)
    axis = drawn.subplots()
    against = "best fixed sampler" if isinstance(found, Front) else "start of the search"
    axis.plot(budgets, starts, "o-", color=GREY, label=against)
    axis.plot(budgets, ends, "-", color=COLORS[0], label="found")
    for n, low, high in zip(budgets, starts, ends, strict=True):
        axis.plot([n, n], [low, high], ":", color="0.5", linewidth=0.8)
        fill = COLORS[0] if n in keep else "white"
        axis.plot([n], [high], "o", color=COLORS[0], markerfacecolor=fill, markersize=5)
        axis.annotate(
            f"{high - low:+.1f}", (n, high), (0, 5), textcoords="offset points", ha="center"
        )
    evaluations_axis(axis, budgets)
    axis.set_ylabel("PSNR to the ODE's solution, dB" if score == "psnr" else score)
    axis.margins(y=0.14)
    axis.grid()
    axis.legend(loc="best")
    return drawn
