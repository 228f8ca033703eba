"""The style that all pictures share."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from diffsamp._core.files import write_atomically
from diffsamp._core.types import Value

__all__ = ["COLORS", "GREY", "WIDTH", "color_of", "evaluations_axis", "figure", "save", "styled"]

P = ParamSpec("P")
R = TypeVar("R")

WIDTH = 7.2  # inches: a column of text, or of a page of documentation
# told apart by most people who see few colours (Okabe & Ito 2008), then two more
COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#6A3D9A",
    "#8C6D31",
)
GREY = "0.72"
_STYLE = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "grid.alpha": 0.3,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "figure.dpi": 110,
}


def _matplotlib() -> Value:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'plots need matplotlib: pip install "diffsamp[demo]"', name="matplotlib"
        ) from error
    return matplotlib


def styled(function: Callable[P, R]) -> Callable[P, R]:
    """A function that draws, with the common style while it does."""

    @functools.wraps(function)
    def drawing(*args: P.args, **kwargs: P.kwargs) -> R:
        with _matplotlib().rc_context(_STYLE):
            return function(*args, **kwargs)

    return drawing


@functools.cache
def _class() -> Value:
    """Figures that a notebook shows, whether or not pyplot was imported in it."""
    _matplotlib()
    from matplotlib.figure import Figure

    class Picture(Figure):
        def _repr_png_(self) -> bytes:
            return _png(self)

    return Picture


def figure(height: float, width: float = WIDTH) -> Value:
    """An empty figure that lays itself out; inches."""
    return _class()(figsize=(width, height), layout="constrained")


def _png(figure: Value) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def save(figure: Value, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, atomically."""
    write_atomically(path, _png(figure))


def color_of(i: int) -> tuple[str, str]:
    """Colour and dashes of the i-th thing of a picture."""
    return COLORS[i % len(COLORS)], ("-", "--", ":", "-.")[i // len(COLORS) % 4]


def evaluations_axis(axis: Value, counts: Sequence[float], apart: float = 1.13) -> None:
    """A logarithmic axis of evaluations, with as many of the counts as ticks as have room.

    Args:
      axis: its `xscale` is set.
      counts: evaluations that occur.
      apart: no tick is less than so many times the one before.
    """
    axis.set(xscale="log", xlabel="evaluations")
    chosen: list[int] = []
    for n in sorted({round(count) for count in counts}):
        if not chosen or n > apart * chosen[-1]:
            chosen.append(n)
    axis.set_xticks(chosen, [str(n) for n in chosen])
    axis.set_xticks([], minor=True)
