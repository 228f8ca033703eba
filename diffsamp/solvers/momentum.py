"""Momentum: heavy-ball on any method, and GHVB.

Both average the direction of a step with the one before it, v_n = (1 - beta) v_{n-1} + beta P_n.
The last velocity is the last change of state, so no velocity has to be kept: it is a combination
of u_n and u_{n-1}.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from diffsamp._core.checks import expect_choice
from diffsamp._core.types import Array, Times
from diffsamp.processes import Process
from diffsamp.solvers._builder import (
    NOISE,
    Answer,
    Builder,
    Combination,
    expect_falling_rows,
    total,
    transfer,
)
from diffsamp.solvers._weights import lagrange
from diffsamp.tableau import Tableau

__all__ = ["ghvb", "heavy_ball"]


def heavy_ball(tableau: Tableau, *, beta: float = 0.8, prediction: str = "data") -> Tableau:
    """Polyak's heavy-ball momentum on a sampler of one evaluation a step.

    With kappa the exact weight of a constant prediction over a step, u_{n+1} = ratio u_n +
    kappa P_n defines the direction P_n of the given method; it is replaced by v_n =
    (1 - beta) v_{n-1} + beta P_n, v_0 = P_0. Damps the oscillation of large steps under strong
    guidance, at the price of order 1 for any beta < 1. beta = 1 gives the method back.

    Args:
      tableau: a deterministic sampler of one evaluation a step.
      beta: in (0, 1].
      prediction: "data" (for DPM-Solver++; its authors' 2M-HB starts in another way, see `beta` of
        `solvers.dpmpp`) or "noise" (as PLMS-HB): what P is.

    Returns:
      A tableau of as many evaluations.

    Raises:
      ValueError: beta outside (0, 1], or a tableau of another kind.

    Reference: Wizadwongsa et al. 2024, arXiv:2307.11118.
    """
    if not 0 < beta <= 1:
        raise ValueError(f"`beta` must lie in (0, 1]; got {beta}.")
    expect_choice(prediction, "prediction", ("data", "noise"))
    expect_falling_rows(tableau, "heavy-ball momentum")
    new = tableau.pad(p=max(tableau.p, 2))
    kept, other = (new.sigma, new.alpha) if prediction == "data" else (new.alpha, new.sigma)
    a, b = new.a.copy(), new.b.copy()
    for n in range(1, tableau.nfe):
        if kept[n - 1] == 0:
            continue  # no ratio from alpha = 0 in the noise form
        ratio, before = kept[n + 1] / kept[n], kept[n] / kept[n - 1]
        kappa, kappa_before = other[n + 1] - other[n] * ratio, other[n] - other[n - 1] * before
        a[n] *= beta
        b[n] *= beta
        # (1 - beta) [ratio u_n + kappa v_{n-1}], v_{n-1} = (u_n - before u_{n-1}) / kappa_before
        a[n, 0] += (1 - beta) * (ratio + kappa / kappa_before)
        a[n, 1] -= (1 - beta) * kappa / kappa_before * before
    name = f"{tableau.name}-hb({beta:g})"
    source = "; ".join(filter(None, [tableau.source, "arXiv:2307.11118"]))
    changed = dataclasses.replace(new, a=a, b=b, name=name, source=source, padded=False)
    changed.check()
    return changed


def ghvb(
    process: Process,
    times: Times,
    *,
    order: int = 2,
    beta: float = 0.8,
    variable_step: bool = True,
) -> Tableau:
    """Generalised heavy ball: Adams-Bashforth of order r corrected for its momentum.

    x'_{n+1} = x'_n + delta_n [(1 - beta) (x'_n - x'_{n-1}) / delta_{n-1} + sum_j d_j E_{n-j}] in
    x' = x / alpha, delta the steps of rho = sigma / alpha. Unlike plain momentum it keeps order r
    for any beta. The authors' name "k.b" is order k + 1 with beta = 0.b (3.8: order 4, beta 0.8).
    beta = 1 is Adams-Bashforth: with `variable_step` rhoAB-DEIS, without it iPNDM.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.
      order: r, 1 to 5.
      beta: in (0, 1].
      variable_step: weights for the grid's own steps; False: the authors' fixed weights and start,
        which on a graded grid make it a method of order 2 at most.

    Returns:
      A deterministic tableau of n evaluations, in noise prediction.

    Raises:
      ValueError: times not sorted, another order or beta.

    Reference: Wizadwongsa et al. 2024, arXiv:2307.11118.
    """
    if order not in range(1, 6):
        raise ValueError(f"`order` must be from 1 to 5; got {order}.")
    if not 0 < beta <= 1:
        raise ValueError(f"`beta` must lie in (0, 1]; got {beta}.")
    builder = Builder(process, times, NOISE)
    points = builder.points
    x, history, velocities = builder.start, list[Answer](), list[Combination]()
    for n in range(len(points) - 1):
        s, t = points[n], points[n + 1]
        history = [builder.evaluate(x, s), *history[: order - 1]]
        usable = [a for a in history if a.point.alpha > 0]
        previous = points[n - 1] if n and points[n - 1].alpha > 0 else None
        if previous is None or not usable:  # v_0 = E_0; also after a start at rho = inf
            velocities = [a.noise for a in usable]
            x = transfer(history[0], t)
            continue
        delta, delta_before = t.rho - s.rho, s.rho - previous.rho
        if variable_step:
            nodes = [(a.point.rho - s.rho) / delta for a in usable]
            back = -delta_before / delta
        else:
            nodes, back = [-float(j) for j in range(len(usable))], -1.0
        weights = _mean(nodes, 0.0, 1.0) - (1 - beta) * _mean(nodes, back, 0.0)
        if not variable_step and len(velocities) < order:
            # the authors' velocities v_n = (1 - beta) v_{n-1} + beta E_n while the order rises;
            # the last change of state, of another order, is none of them
            newest = beta * usable[0].noise + (1 - beta) * velocities[0]
            velocities = [newest, *velocities]
            x = (t.alpha / s.alpha) * history[0].state
            x = x + t.alpha * delta / beta * total(weights, velocities)
            continue
        velocity = (history[0].state / s.alpha - _state(builder, n - 1, previous)) / delta_before
        direction = (1 - beta) * velocity + total(weights, [a.noise for a in usable])
        x = t.alpha * (history[0].state / s.alpha + delta * direction)
    label = f"ghvb({order}, beta={beta:g})"
    return builder.finish(x, points[-1], name=label, source="arXiv:2307.11118")


def _state(builder: Builder, n: int, point: Array) -> Array:
    """u_n / alpha_n, by its symbol."""
    return builder.symbol(n) / point.alpha


def _mean(nodes: list[float], start: float, end: float) -> np.ndarray:
    """Mean of each Lagrange polynomial over [start, end]; exact, they are of degree 4 at most."""
    x, w = np.polynomial.legendre.leggauss(4)
    return lagrange(nodes, start + (end - start) * (x + 1) / 2) @ w / 2
