"""The plots of docs/performance.md and docs/choosing.md, drawn from the committed tables.

python benchmarks/draw.py
"""

from __future__ import annotations

import argparse
import re
import textwrap
from pathlib import Path
from typing import Any

from _report import RESULTS

from diffsamp import plot
from diffsamp.plot._style import COLORS, figure, styled

PLOTS = Path(__file__).resolve().parent.parent / "docs" / "plots"
# one of every family that a user would think of
DRAWN = (
    "ddim",
    "heun",
    "dpm_solver_2s",
    "dpmpp_2m",
    "dpmpp_3m",
    "deis_tab3",
    "ipndm3",
    "unipc2",
    "unipc3",
)
COLOURS = dict(zip(("JAX", "PyTorch eager", "PyTorch compiled"), COLORS, strict=False))
FOUND = "found by ds.search"


def read(path: Path) -> dict[str, list[list[str]]]:
    """{heading: rows of its table, the head first} of a result."""
    found: dict[str, list[list[str]]] = {}
    title = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            title = line.lstrip("# ")
        elif line.startswith("|") and "---" not in line:
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            found.setdefault(title, []).append(cells)
    return found


def origin(path: Path, width: int) -> str:
    """Date, machine and versions, from the line under the title."""
    line = path.read_text(encoding="utf-8").splitlines()[2]
    return textwrap.fill(re.sub(r"^`.*?`, ", "", line), width)


@styled
def peers(path: Path) -> Any:
    """Bars: time over the bare network of the same framework, one panel a network."""
    panels = {title: rows[1:] for title, rows in read(path).items()}
    lines = -(-len(panels) // 2)
    drawn = figure(2.9 * lines)
    axes = drawn.subplots(lines, 2, squeeze=False, sharey=True).reshape(-1)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, rows) in zip(axes, panels.items(), strict=False):
        shown = [row for row in rows if "bare" not in row[1]][::-1]
        ratios = [float(row[2]) for row in shown]
        labels = [row[1] + (", compiled" if "compiled" in row[0] else "") for row in shown]
        axis.barh(labels, ratios, color=[COLOURS[row[0]] for row in shown])
        for i, ratio in enumerate(ratios):
            axis.text(ratio + 0.02, i, f"{ratio:.2f}", va="center", fontsize=6)
        axis.axvline(1.0, color="0.4", linewidth=1)
        axis.set(title=title, xlabel="time over the bare network")
        axis.set_xlim(0, 1.15 * max(ratios))
        axis.tick_params(axis="y", labelsize=6.5)
    drawn.supxlabel(origin(path, 140), fontsize=6)
    return drawn


@styled
def overhead(path: Path) -> Any:
    """Points: time over jitted calls of the network by sampler, one series a network."""
    table, *_ = read(path).values()
    head = table[0]
    rows = [row for row in table if row[0].startswith("`")]
    rows = rows[: next(i for i, r in enumerate(rows) if r[0] == rows[0][0] and i) or None]
    drawn = figure(3.2)
    axis = drawn.subplots()
    names = [row[0].replace("`", "") for row in rows]
    for i, name in enumerate(head[1:], 1):
        axis.plot([float(row[i]) for row in rows], "o", label=name, color=COLORS[i - 1])
    axis.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axis.axhline(1.0, color="0.4", linewidth=1)
    axis.axhline(1.05, color="0.4", linewidth=1, linestyle="--")
    axis.set_ylabel("time over jitted calls")
    axis.set_xlabel("z: adds noise, over calls that do")
    axis.grid()
    drawn.legend(loc="outside upper center", ncols=len(head) - 1)
    drawn.supxlabel(origin(path, 140), fontsize=6)
    return drawn


def accuracy(path: Path) -> Any:
    """Curves: error against evaluations of some samplers, one panel a network."""
    panels = []
    for title, (head, *rows) in read(path).items():
        if not head[1].startswith("NFE"):
            continue
        cells = {row[0].replace("`", ""): row[1:] for row in rows}
        names = [name for name in (*DRAWN, FOUND) if name in cells]
        curves = {
            name: [
                (float(label.removeprefix("NFE ")), float(cell.split()[0]))
                for label, cell in zip(head[1:], cells[name], strict=True)
                if cell
            ]
            for name in names
        }
        panels.append((title, "RMSE to the ODE's solution", curves, None))
    return plot.error_against_nfe(panels, columns=3, strong=FOUND)


def main() -> None:
    """Draw them all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--plots", type=Path, default=PLOTS)
    arguments = parser.parse_args()
    for draw in (overhead, peers, accuracy):
        path = arguments.results / f"{draw.__name__}.md"
        plot.save(draw(path), arguments.plots / f"{draw.__name__}.png")


if __name__ == "__main__":
    main()
