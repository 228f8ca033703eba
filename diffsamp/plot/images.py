"""States and samples as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from diffsamp._core.checks import expect_int
from diffsamp._core.types import Array, Value
from diffsamp.plot._style import COLORS, WIDTH, figure, styled
from diffsamp.sampling import Trajectory

__all__ = ["channels_last", "image_grid", "inverse", "trajectory"]

_LETTER = 0.068  # inches that a letter of a row's name takes
_CAPTION = 0.13  # inches for a line under a picture


def channels_last(images: Array) -> np.ndarray:
    """Pictures with their channels last, whatever they were.

    Args:
      images: (n, height, width, channels) or (n, channels, height, width), with 1 or 3 channels.

    Raises:
      ValueError: another shape.
    """
    images = np.asarray(images, np.float32)
    if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[-1] not in (1, 3):
        images = np.moveaxis(images, 1, -1)
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            "pictures must be (n, height, width, channels) or (n, channels, height, width), with 1 "
            f"or 3 channels; got {images.shape}."
        )
    return images


def _cells(
    rows: Sequence[tuple[str, np.ndarray, Sequence[str] | None]],
    limits: tuple[float, float] | None,
    heads: Sequence[str] = (),
    title: str = "",
) -> Value:
    """One axis of pictures: (label, (n, height, width, channels), captions or None) a row.

    Args:
      rows: from top to bottom.
      limits: the values of white and black; None: of each picture its own, at least -1 and 1.
      heads: over the columns.
      title: over the figure.
    """
    columns = max(len(images) for _, images, _ in rows)
    labels = 0.15 + _LETTER * max(len(label) for label, _, _ in rows)
    unit = min(0.68, (WIDTH - labels) / columns)
    width = unit * columns
    gap, caption = 0.05, _CAPTION / unit
    heights = [images.shape[1] / images.shape[2] for _, images, _ in rows]
    total = sum(heights) + gap * len(rows) + caption * sum(r[2] is not None for r in rows)
    above = 0.04 + 0.22 * bool(title) + 0.18 * bool(heads)
    tall, wide = total * unit + above, width + labels
    drawn = figure(tall, wide)
    drawn.set_layout_engine("none")  # all sizes are known
    axis = drawn.add_axes((labels / wide, 0.0, width / wide, 1 - above / tall))
    top = 0.0
    for (label, images, captions), height in zip(rows, heights, strict=True):
        for i, image in enumerate(images):
            low, high = limits or (-1.0, 1.0)
            if limits is None:
                high = max(1.0, float(np.quantile(np.abs(image[np.isfinite(image)]), 0.99)))
                low = -high
            edges = (i + gap / 2, i + 1 - gap / 2, top + height, top)
            options: dict[str, Value] = {"extent": edges, "interpolation": "nearest"}
            if image.shape[-1] == 3:
                axis.imshow(np.clip((image - low) / (high - low), 0, 1), **options)
            else:
                axis.imshow(image[..., 0], cmap="gray_r", vmin=low, vmax=high, **options)
            if captions is not None:
                middle = top + height + caption / 2
                axis.text(i + 0.5, middle, captions[i], ha="center", va="center", fontsize=6.5)
        axis.text(-0.06 / unit, top + height / 2, label, ha="right", va="center")
        top += height + gap + (caption if captions is not None else 0.0)
    for i, head in enumerate(heads):
        axis.text(i + 0.5, -0.08, head, ha="center", va="bottom", fontsize=6.5)
    axis.set(xlim=(0, columns), ylim=(total, 0), aspect="auto")
    axis.set_axis_off()
    if title:
        drawn.text(0.5, 1 - 0.03 / tall, title, ha="center", va="top", fontsize=9)
    return drawn


@styled
def image_grid(
    rows: Sequence[tuple[str, Array]],
    *,
    title: str = "",
    limits: tuple[float, float] = (-1.0, 1.0),
) -> Value:
    """A grid of pictures, one labelled row after another; grey ones are dark where they are high.

    Args:
      rows: (label, images (n, height, width, channels) or with the channels first); rows may have
        other sizes of pictures.
      title: above the grid.
      limits: values of white and of black.

    Returns:
      A matplotlib Figure.
    """
    return _cells([(label, channels_last(x), None) for label, x in rows], limits, title=title)


@styled
def inverse(
    truth: Array,
    measured: Array | None,
    found: Mapping[str, Array],
    *,
    limits: tuple[float, float] = (-1.0, 1.0),
    title: str = "",
) -> Value:
    """What was there, what was seen of it, what was found, with the PSNR of every picture.

    Args:
      truth: (n, height, width, channels) pictures.
      measured: what was seen, as pictures of any size, or None.
      found: {method: pictures shaped like `truth`}.
      limits: values of white and of black; their distance is the range of the PSNR.
      title: above the panels.

    Returns:
      A matplotlib Figure: a row for the truth, the measurement, and every method.

    Raises:
      ValueError: pictures of another shape than the truth's.
    """
    truth = channels_last(truth)
    rows: list[tuple[str, np.ndarray, Sequence[str] | None]] = [("truth", truth, None)]
    if measured is not None:
        rows.append(("measured", channels_last(measured), None))
    span = limits[1] - limits[0]
    for name, images in found.items():
        images = channels_last(images)
        if images.shape != truth.shape:
            raise ValueError(
                f"{name!r} must be shaped like `truth`, {truth.shape}; got {images.shape}."
            )
        error = ((images - truth) ** 2).mean(axis=(1, 2, 3))
        with np.errstate(divide="ignore"):
            psnr = 20 * np.log10(span) - 10 * np.log10(error)
        rows.append((name, images, [f"{value:.1f} dB" for value in psnr]))
    return _cells(rows, limits, title=title)


@styled
def trajectory(
    run: Trajectory, *, samples: int = 4, columns: int = 9, outputs: bool = False, title: str = ""
) -> Value:
    """A run from noise to sample: a filmstrip of pictures, or the paths of points in the plane.

    Args:
      run: what `diffsamp.trajectory` returned, of states (n, height, width, channels) or (n, 2).
      samples: how many of the batch to show; of points in the plane ten times as many.
      columns: at most so many states of a filmstrip, the first and the last always.
      outputs: also what the network said at each state, below it.
      title: above the figure.

    Returns:
      A matplotlib Figure. Every picture is scaled to its own range, at least [-1, 1], so that it is
      seen under the noise; over the columns stand the times.

    Raises:
      ValueError: states of another shape.
    """
    expect_int(samples, "samples", at_least=1)
    points, told = np.asarray(run.points), np.asarray(run.outputs)
    times = np.asarray(run.times, np.float64)
    if points.ndim == 3 and points.shape[-1] == 2:
        return _paths(points[:, : 10 * samples], title)
    steps = len(points) - 1
    chosen = np.unique(np.linspace(0, steps, min(columns, steps + 1)).round().astype(int))
    rows: list[tuple[str, np.ndarray, Sequence[str] | None]] = []
    for i in range(min(samples, points.shape[1])):
        rows.append((f"state {i}", channels_last(points[chosen, i]), None))
        if outputs:  # the network says nothing at the last state
            said = channels_last(told[chosen[chosen < steps], i])
            rows.append(("network", said, None))
    return _cells(rows, None, [f"t = {times[n]:.3g}" for n in chosen], title)


def _paths(points: np.ndarray, title: str) -> Value:
    drawn = figure(0.5 * WIDTH, 0.55 * WIDTH)
    axis = drawn.subplots()
    for i in range(points.shape[1]):
        path = points[:, i]
        axis.plot(*path.T, "-", color=COLORS[0], alpha=0.35, linewidth=0.8)
        axis.plot(*path[1:-1].T, ".", color=COLORS[0], alpha=0.5, markersize=2.5)
    for where, name, color in ((0, "start", COLORS[4]), (-1, "sample", COLORS[1])):
        axis.plot(*points[where].T, "o", color=color, markersize=3.5, label=name)
    axis.set(title=title, aspect="equal")
    axis.set_xlabel("$x_1$")
    axis.set_ylabel("$x_2$")
    axis.grid()
    axis.legend()
    return drawn
