"""The analytic first step: the network's first answer taken from the noise itself."""

from __future__ import annotations

import dataclasses

import numpy as np

from diffsamp.tableau import Tableau

__all__ = ["analytic_first_step"]


def analytic_first_step(tableau: Tableau) -> Tableau:
    """AFS: the same sampler with the first evaluation saved.

    At the highest noise a state is nearly all noise, so the first answer is replaced by

        E = u / sqrt(alpha^2 + sigma^2),    D = (u - sigma E) / alpha = alpha u / (m (m + sigma)),

    m that root: EDM's x / sqrt(1 + t^2) on every process, finite at alpha = 0. It is a multiple of
    the state, so whatever row used the answer (history, stages, corrector) uses the state instead;
    the row that would have asked is kept and asks nothing. It pays at few evaluations: n steps cost
    n - 1, so give the sampler one step more. The answer is not consistent: for data whose standard
    deviation is far from 1, or a start at moderate noise, it costs accuracy at once.

    Args:
      tableau: any sampler, its first evaluation at the start.

    Returns:
      A tableau of one evaluation fewer, named "..-afs".

    Raises:
      ValueError: a tableau of one evaluation or none, or one stacked per sample.

    Reference: Dockhorn, Vahdat & Kreis 2022 (GENIE), arXiv:2210.05475; Zhou et al. 2024,
    arXiv:2312.00094, section 3.3.
    """
    if np.ndim(tableau.times) != 1:
        raise ValueError("take the analytic first step of each tableau before stacking them.")
    asked = np.flatnonzero(np.asarray(tableau.evaluates))
    if len(asked) < 2:
        raise ValueError(
            f"an analytic first step leaves nothing to ask of {tableau.name!r}, which makes "
            f"{len(asked)} evaluation; give it at least 2."
        )
    first = int(asked[0])
    alpha, sigma = float(tableau.alpha[first]), float(tableau.sigma[first])
    m = np.hypot(alpha, sigma)
    on_data, on_noise = tableau.target[first]
    said = on_data * alpha / (m * (m + sigma)) + on_noise / m
    lags = range(min(tableau.q, tableau.rows - first))
    used = [j for j in lags if np.any(tableau.b[first + j, j] != 0)]
    new = tableau.pad(p=max(tableau.p, 1 + max(used, default=0)))
    a, b, evaluates = new.a.copy(), new.b.copy(), new.evaluates.copy()
    for j in used:
        a[first + j, j] += said * b[first + j, j]
        b[first + j, j] = 0.0
    evaluates[first] = False
    return dataclasses.replace(
        new,
        a=a,
        b=b,
        evaluates=evaluates,
        name=f"{tableau.name}-afs",
        source="; ".join(filter(None, [tableau.source, "arXiv:2210.05475"])),
        padded=tableau.padded,
    )
