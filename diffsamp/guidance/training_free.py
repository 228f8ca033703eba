"""Training-free guidance: the union of DPS, LGD, MPGD, FreeDoM and universal guidance."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.tree_util import Partial

from diffsamp._core.checks import expect_choice, expect_int
from diffsamp._core.numeric import namespace
from diffsamp._core.types import PyTree
from diffsamp.guidance._numbers import scale_numbers
from diffsamp.guidance.data import keep_noise
from diffsamp.guidance.losses import Loss, loss
from diffsamp.guidance.transform import Transform
from diffsamp.predictions import Level
from diffsamp.score import ScoreFn
from diffsamp.tableau import Tableau

__all__ = ["tfg"]

_SHAPES = ("increase", "decrease", "constant")


def tfg(
    score_fn: ScoreFn | Transform,
    f: Callable[[PyTree, Level, Mapping[str, PyTree] | None], PyTree],
    tableau: Tableau,
    rho: float,
    mu: float,
    *,
    steps: int = 4,
    shape: str = "increase",
    smooth: float = 0.0,
    samples: int = 1,
    key: jax.Array | None = None,
    names: Sequence[str] = (),
) -> Loss:
    """Training-free guidance: a gradient through the network, and steps of the data prediction.

    x' = the tableau's row - (alpha' / alpha) rho_n grad_x f~(D(x)) + alpha' (D_K - D), where D_0 =
    D and D_{k+1} = D_k - mu_n grad f~(D_k); the noise is kept. f~ is f, or with `smooth` the mean
    of exp(-f) over draws around its argument. Its recurrence, N, are the rows:
    `solvers.travel(tableau, N)`, given here and to `ds.sample`. mu = 0 is DPS without its norm, or
    LGD with `smooth`; rho = 0 is MPGD, without a gradient of the network; `search.tfg` looks for
    rho, mu and N.

    Args:
      score_fn: a network or transform.
      f: (D, level, cond) -> (batch,), one loss per sample, as for `loss`.
      tableau: the sampler to be used, of one state and one output a row; the paper's is
        `solvers.ddim`.
      rho: step through the network, not negative; the mean over rows.
      mu: step on the data prediction, not negative; the mean over rows.
      steps: how many of the latter, each one gradient of f.
      shape: how rho_n and mu_n follow the rows: "increase" as q, the signal's share of the variance
        before a row over that after it, "decrease" as 1 - q, or "constant".
      smooth: the draws' standard deviation, in units of sigma / sqrt(alpha^2 + sigma^2).
      samples: how many draws; each gradient has its own.
      key: for the draws, one or one per sample.
      names: entries of `cond` that are for f alone.

    Raises:
      ValueError: negative numbers, an unknown shape, draws without a key, or rows that use earlier
        states or outputs.

    Reference: Ye et al. 2024, arXiv:2409.15761, algorithm 1.
    """
    for name, value in (("rho", rho), ("mu", mu), ("smooth", smooth)):
        if isinstance(value, jax.core.Tracer):
            raise TypeError(f"`{name}` is read on the host: pass a number, outside `jit`.")
        if not (np.isfinite(value) and value >= 0):
            raise ValueError(f"`{name}` must not be negative; got {value}.")
    expect_int(steps, "steps", at_least=1)
    expect_choice(shape, "shape", _SHAPES)
    if smooth > 0 and key is None:
        raise ValueError("`smooth` draws around the data prediction: pass `key`.")
    along = _along(tableau, shape)
    sigma = np.asarray(tableau.sigma)[:-1]
    square = np.where(sigma > 0, sigma, 1.0) ** 2
    through = "network" if rho > 0 else "data"
    spread = Partial(_share, float(smooth)) if smooth > 0 or through == "data" else None
    made = loss(
        score_fn,
        f,
        np.where(tableau.evaluates, rho * along / square, 0.0),
        through=through,
        samples=samples if smooth > 0 else None,
        spread=spread,
        gain=keep_noise(tableau),
        key=key,
        names=names,
    )
    if mu == 0 and rho > 0:
        return made
    return dataclasses.replace(
        made, descent=scale_numbers(mu * along, "mu", rows=True), steps=steps
    )


def _share(smooth: PyTree, level: Level) -> PyTree:
    return smooth * level.sigma / namespace(level.alpha).hypot(level.alpha, level.sigma)


def _along(tableau: Tableau, shape: str) -> np.ndarray:
    """(rows,), of mean 1 over those that evaluate."""
    alpha, sigma = (np.asarray(v, np.float64) for v in (tableau.alpha, tableau.sigma))
    signal = alpha**2 / (alpha**2 + sigma**2)
    one = np.ones(tableau.rows)
    ratio = signal[:-1] / signal[1:]
    along = {"increase": ratio, "decrease": one - ratio, "constant": one}[shape]
    asked = np.asarray(tableau.evaluates)
    along = np.where(asked, along, 0.0)
    mean = along[asked].mean()
    if not mean > 0:
        raise ValueError(f"the shape {shape!r} is 0 in every row of {tableau.name!r}.")
    return along / mean
