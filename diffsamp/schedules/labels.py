"""Grids of integer labels, for networks trained on a table of T levels.

Each takes a discrete process and n, and gives n labels and then -1, the clean end. They are the
conventions of other libraries, without their off-by-one errors, which are:

- ComfyUI's `ddim_uniform` counts up in strides of T // n from label 1 and takes what fits below T:
  for n = 30 of 1000 that is 31 labels. Here it is n, the lowest ones.
- ComfyUI's `normal` adds a step to sigma = 0 after label 0, and one more if label 0 is already
  clean. Here the labels are n and the clean end follows.
- diffusers' "trailing" gives one label too many, -1, for 62 of the n up to 1000, by rounding.
- diffusers' multistep schedulers space n + 1 points and drop the last; its other schedulers space
  n. `linspace` and `leading` here space n; `points=n + 1` gives the former.
"""

from __future__ import annotations

import numpy as np

from diffsamp._core.checks import expect_int, expect_times
from diffsamp._core.types import Array, Times
from diffsamp.processes import Process
from diffsamp.schedules.grids import with_end

__all__ = ["ddim_uniform", "leading", "linspace", "rounded", "sgm_uniform", "simple", "trailing"]


def _levels(process: Process, n: int) -> int:
    """T of a discrete process, with n checked against it."""
    if process.t_clean >= 0:
        raise ValueError(
            f"only a discrete process has integer labels; got {type(process).__name__}. Use a grid "
            "of times such as uniform, logsnr or karras, or processes.vp_discrete."
        )
    levels = round(process.t_max) + 1
    expect_int(n, "n", at_least=1, at_most=levels)
    return levels


def _finish(process: Process, labels: Array, final: str) -> np.ndarray:
    return with_end(process, np.asarray(labels, np.float64), final)


def rounded(process: Process, times: Times) -> np.ndarray:
    """Times rounded to the integer labels of a discrete process, for networks that need them.

    Raises:
      ValueError: the process is not a table, or two times round to one label (ask for fewer).
    """
    _levels(process, 1)
    return expect_times(np.round(np.asarray(times, np.float64)))


def trailing(process: Process, n: int, *, final: str = "clean") -> np.ndarray:
    """round(T - i T / n) - 1: from the last label in equal strides.

    Lin et al. 2023 (arXiv:2305.08891, table 2), who found it the only one of the three that starts
    at the noise the network was trained on.

    Args:
      process: a discrete process.
      n: number of labels, at most T.
      final: "clean", or "t_min" to end at label 0 where the last label is above it.

    Returns:
      float64 labels and the end, shape (n + 1,), decreasing.

    Raises:
      ValueError: the process is not a table.
    """
    levels = _levels(process, n)
    return _finish(process, np.round(levels - np.arange(n) * (levels / n)) - 1, final)


def leading(
    process: Process, n: int, *, offset: int = 0, points: int | None = None, final: str = "clean"
) -> np.ndarray:
    """offset + i (T // n), reversed: DDIM's and DDPM's in diffusers; offset 1 for Stable Diffusion.

    Args:
      process: a discrete process.
      n: number of labels, at most T.
      offset: added to every label.
      final: as for `trailing`.
      points: space this many and keep the n noisiest; None: n.

    Returns:
      As `trailing`.

    Raises:
      ValueError: the process is not a table, or labels beyond its last.
    """
    levels = _levels(process, n)
    points = n if points is None else expect_int(points, "points", at_least=n, at_most=levels)
    labels = (np.arange(points) * (levels // points))[::-1][:n] + offset
    if labels[0] > levels - 1 or labels[-1] < 0:
        raise ValueError(f"`offset` = {offset} puts labels outside 0 .. {levels - 1}.")
    return _finish(process, labels, final)


def linspace(
    process: Process, n: int, *, points: int | None = None, final: str = "clean"
) -> np.ndarray:
    """round(linspace(0, T - 1, n)), reversed: both ends included; ComfyUI's `normal`, unrounded.

    Args:
      process: a discrete process.
      n: number of labels, at most T; a single one is T - 1.
      final: as for `trailing`.
      points: space this many and keep the n noisiest; None: n.

    Returns:
      As `trailing`.

    Raises:
      ValueError: the process is not a table.
    """
    levels = _levels(process, n)
    points = n if points is None else expect_int(points, "points", at_least=n, at_most=levels)
    # counted up, so that ties round as elsewhere
    labels = np.round(np.linspace(0, levels - 1, points))[::-1][:n]
    return _finish(process, labels if points > 1 else [levels - 1], final)


def sgm_uniform(process: Process, n: int, *, final: str = "clean") -> np.ndarray:
    """linspace(T - 1, 0, n + 1) without its last: ComfyUI's and Stability's "sgm_uniform".

    Real labels, as there: round them with `rounded` if the network needs it. Arguments and result
    as `trailing`.
    """
    levels = _levels(process, n)
    return _finish(process, np.linspace(levels - 1, 0, n + 1)[:-1], final)


def simple(process: Process, n: int, *, final: str = "clean") -> np.ndarray:
    """T - 1 - floor(i T / n): ComfyUI's "simple". Arguments and result as `trailing`."""
    levels = _levels(process, n)
    return _finish(process, levels - 1 - np.floor(np.arange(n) * (levels / n)), final)


def ddim_uniform(process: Process, n: int, *, final: str = "clean") -> np.ndarray:
    """1 + i (T // n), reversed: ComfyUI's "ddim_uniform"; it starts well below the last label.

    Arguments and result as `trailing`.

    Raises:
      ValueError: the process is not a table, or so many labels that the last is beyond it.
    """
    levels = _levels(process, n)
    if 1 + (n - 1) * (levels // n) > levels - 1:
        raise ValueError(
            f"ddim_uniform counts its labels from 1 and has no room for `n` = {n} of {levels}; "
            f"ask for at most {levels - 1}, or use leading or trailing."
        )
    return leading(process, n, offset=1, final=final)
