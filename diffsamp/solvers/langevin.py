"""Rows at one noise level, and rows that put new noise in: MCMC as tableaux.

The Langevin row at (alpha, sigma) keeps a share kappa of the state,

    x' = kappa x + (1 - kappa) alpha D + sigma sqrt(1 - kappa^2) z,

which is a step of size eps = (1 - kappa) sigma^2 along the score, -E / sigma, with the noise that
makes it exact for a point mass; so it passes the tableau's own check.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from diffsamp._core.checks import expect_int
from diffsamp._core.numeric import is_concrete
from diffsamp._core.types import Array, Times
from diffsamp.processes import Process
from diffsamp.solvers._builder import Builder
from diffsamp.solvers._rows import spread_rows
from diffsamp.tableau import Tableau

__all__ = ["langevin", "predictor_corrector", "renoise", "ula"]


def langevin(process: Process, t: float, steps: int, *, keep: Array) -> Tableau:
    """Langevin steps at one level: samples of the noised distribution, by MCMC.

    For Gaussian data, S^2 the state's variance at the level, the stationary variance is
    S^2 (1 + kappa) / (2 - (1 - kappa) sigma^2 / S^2). Walk-jump is these rows and then a step to
    sigma = 0.

    Args:
      process: the noise process.
      t: the level's time, sigma > 0.
      steps: how many, one evaluation each.
      keep: kappa in [0, 1), a number or one per step; the corrector of score-based models with
        signal-to-noise ratio r is about 1 - 2 r^2.

    Returns:
      A stochastic tableau of `steps` evaluations, in data prediction, whose times are all t.

    Raises:
      ValueError: no steps, a level without noise, kappa outside [0, 1).

    Reference: Song et al. 2021, arXiv:2011.13456, algorithm 4; Frey et al. 2023, arXiv:2306.12360.
    """
    expect_int(steps, "steps", at_least=1)
    alpha, sigma, kappa = _level(process, t, steps, keep)
    return Tableau.create(
        times=np.full(steps + 1, float(t)),
        alpha=np.full(steps + 1, alpha),
        sigma=np.full(steps + 1, sigma),
        target=np.tile([1.0, 0.0], (steps, 1)),
        a=kappa[:, None],
        b=((1 - kappa) * alpha)[:, None],
        c=sigma * np.sqrt(1 - kappa**2),
        name=f"langevin({steps})",
        source="arXiv:2011.13456, algorithm 4",
    )


def _level(process: Process, t: float, steps: int, keep: Array) -> tuple[float, float, np.ndarray]:
    point = Builder(process, [t, process.t_clean] if t > process.t_clean else [t]).points[0]
    kappa = np.broadcast_to(np.asarray(keep, np.float64), (steps,))
    if not np.all((kappa >= 0) & (kappa < 1)):
        raise ValueError(f"`keep` must lie in [0, 1); got {keep}.")
    return point.alpha, point.sigma, kappa


def ula(process: Process, t: float, steps: int, *, step: float) -> Tableau:
    """The unadjusted Langevin algorithm, x' = x + step score + sqrt(2 step) z, at one level.

    `langevin` is the better row; this is the one of papers. On Gaussian data its stationary
    variance is S^2 / (1 - step / (2 S^2)), S^2 the state's variance there. It adds more noise
    than a point mass has, so the tableau does not check itself.

    Args:
      process: the noise process.
      t: the level's time, sigma > 0.
      steps: how many, one evaluation each.
      step: step size, in units of the state's variance.

    Returns:
      A stochastic tableau, in noise prediction.

    Raises:
      ValueError: no steps, a step that is not positive.

    Reference: Du et al. 2023, arXiv:2302.11552, algorithm 1.
    """
    expect_int(steps, "steps", at_least=1)
    if not (np.isfinite(step) and step > 0):
        raise ValueError(f"`step` must be positive; got {step}.")
    alpha, sigma, _ = _level(process, t, steps, 0.0)
    return Tableau.create(
        times=np.full(steps + 1, float(t)),
        alpha=np.full(steps + 1, alpha),
        sigma=np.full(steps + 1, sigma),
        target=np.tile([0.0, 1.0], (steps, 1)),
        a=np.ones((steps, 1)),
        b=np.full((steps, 1), -step / sigma),
        c=np.full(steps, np.sqrt(2 * step)),
        name=f"ula({steps})",
        source="arXiv:2302.11552, algorithm 1",
        check="none",
    )


def predictor_corrector(tableau: Tableau, steps: int, *, keep: Array) -> Tableau:
    """Any sampler with Langevin rows at the level where each of its rows arrives.

    With guidance in the corrector alone this is classifier-free guidance as a predictor-corrector:
    `combine` with weights by row, (1, 0) on the sampler's own rows and (w, 1 - w) on those that
    `times[n] == times[n + 1]`.

    Args:
      tableau: a sampler whose rows use one state each, such as DDIM or a multistep method.
      steps: Langevin rows after each of its rows; none where it ends at sigma = 0.
      keep: as for `langevin`: a number, or one per row of the tableau.

    Returns:
      A stochastic tableau; every added row evaluates.

    Raises:
      ValueError: rows that combine several states (stages) or past noise predictions, kappa
        outside [0, 1).

    Reference: Song et al. 2021, arXiv:2011.13456, algorithm 1; Bradley & Nakkiran 2024,
    arXiv:2408.09000.
    """
    if not is_concrete(tableau):
        raise TypeError("predictor_corrector is a host function: build the tableau outside `jit`.")
    expect_int(steps, "steps", at_least=0)
    if np.ndim(tableau.times) != 1 or np.ndim(tableau.a) != 2:
        raise ValueError("predictor_corrector takes a tableau of plain numbers, before stacking.")
    if np.any(np.asarray(tableau.a)[:, 1:] != 0):
        raise ValueError(
            f"predictor_corrector needs rows of one state each; those of {tableau.name!r} are "
            "stages, with levels between that are no steps' ends."
        )
    kappa = np.broadcast_to(np.asarray(keep, np.float64), (tableau.rows,))
    if not np.all((kappa >= 0) & (kappa < 1)):
        raise ValueError(f"`keep` must lie in [0, 1); got {keep}.")
    noisy = np.asarray(tableau.sigma)[1:] > 0
    added = np.where(noisy, steps, 0)
    at = np.arange(tableau.rows) + np.concatenate([[0], np.cumsum(added)[:-1]])
    rows = tableau.rows + int(added.sum())
    new = spread_rows(tableau, at, rows)
    for n in range(tableau.rows):
        alpha, sigma, k = tableau.alpha[n + 1], tableau.sigma[n + 1], kappa[n]
        for row in range(int(at[n]) + 1, int(at[n] + added[n]) + 1):
            new.times[row], new.alpha[row], new.sigma[row] = tableau.times[n + 1], alpha, sigma
            new.target[row], new.evaluates[row] = (1.0, 0.0), True
            if new.asked is not None:
                new.asked[row] = tableau.times[n + 1]
            new.a[row, 0], new.b[row, 0] = k, (1 - k) * alpha
            new.c[row] = sigma * np.sqrt(1 - k**2)
    if _consistent(tableau) and not _consistent(new):
        raise ValueError(
            f"{tableau.name!r} reuses noise predictions from before the new noise, which no longer "
            "fit the state: take a sampler in data predictions, such as solvers.dpmpp or unipc."
        )
    source = "; ".join(s for s in (tableau.source, "arXiv:2011.13456, algorithm 1") if s)
    return dataclasses.replace(new, name=f"{tableau.name} + langevin({steps})", source=source)


def _consistent(tableau: Tableau) -> bool:
    try:
        tableau.check()
    except ValueError:
        return False
    return True


def renoise(process: Process, times: Times, *, share: Array) -> Tableau:
    """Rows that draw a constant share of each level's noise anew.

    x' = alpha' D + sqrt(1 - share^2) sigma' E + share sigma' z. share = 0 is DDIM, 1 draws all
    (multistep consistency, inversion-free editing); DDNM and DDRM take 0.85, DiffPIR sqrt(zeta).
    With a diffusion network it needs few rows: as they become many the variance of Gaussian data
    tends to (1 + sqrt(1 - share^2)) / 2 times its own.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.
      share: in [0, 1], a number or one per row.

    Returns:
      A tableau of n evaluations, in data prediction; stochastic unless share is 0.

    Raises:
      ValueError: times that do not decrease, a share outside [0, 1].

    Reference: Wang et al. 2023, arXiv:2212.00490; Kawar et al. 2022, arXiv:2201.11793.
    """
    builder = Builder(process, times)
    shares = np.broadcast_to(np.asarray(share, np.float64), (len(builder.points) - 1,))
    if not np.all((shares >= 0) & (shares <= 1)):
        raise ValueError(f"`share` must lie in [0, 1]; got {share}.")
    if np.any(shares > 0):
        builder.expect_falling("renoise")
    x = builder.start
    pairs = zip(builder.points, builder.points[1:], shares, strict=False)
    for s, t, part in pairs:
        answer = builder.evaluate(x, s)
        x = t.alpha * answer.data + np.sqrt(1 - part**2) * t.sigma * answer.noise
        if part * t.sigma > 0:
            x = x + part * t.sigma * builder.fresh_noise()
    name = f"renoise({share:g})" if np.ndim(share) == 0 else "renoise"
    return builder.finish(x, builder.points[-1], name=name, source="arXiv:2212.00490")
