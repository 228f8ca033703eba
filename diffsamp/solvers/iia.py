"""IIA: a solver's step corrected by a fitted combination of what is already known."""

from __future__ import annotations

import numpy as np

from diffsamp._core.checks import expect_choice
from diffsamp._core.types import Array, Times
from diffsamp.processes import Process
from diffsamp.solvers._builder import (
    DATA,
    NOISE,
    Answer,
    Builder,
    Combination,
    total,
    transfer,
)
from diffsamp.solvers.dpmpp import multistep_weights
from diffsamp.tableau import Tableau

__all__ = ["FEATURES", "iia", "iia_features"]

# features of IIA: how many coefficients a step has
FEATURES = {"ddim": 2, "guided": 1, "heun": 4, "dpmpp": 2, "dpm_solver": 4}


def iia(
    process: Process,
    times: Times,
    *,
    coefficients: Array,
    method: str = "ddim",
    check: str = "none",
) -> Tableau:
    """IIA: a solver's step plus a fitted combination of what is known already.

    "ddim": x_t = DDIM + c_0 (D_n - D_{n-1}) + c_1 (E_n - E_{n-1}); "guided": DDIM + c_0 E_n;
    (around DPM-Solver++ 2M "ddim" is the same method: 2M's step is DDIM's and a multiple of the
    first difference, and a fit finds the same sum);
    "heun": Heun's step plus c times (x_n - D_n, D'_n - D_n, x_{n-1} - D_{n-1}, D'_{n-1} - D_{n-1}),
    D' the data prediction at a step's end and x scaled by 1 / alpha. "dpmpp" has the features of
    "ddim" around DPM-Solver++ 2M, "dpm_solver" those of "heun" around DPM-Solver-2, D' that of its
    stage halfway in log-SNR. The first step, and one to sigma = 0, is the solver's own. All
    coefficients 0 is the solver. They are least squares fits to a fine solution from the same
    state: `diffsamp.search.fit_iia`.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.
      coefficients: (n, 2) for "ddim" and "dpmpp", (n, 1) for "guided", (n, 4) for the others.
      method: "ddim", "guided", "heun", "dpmpp" or "dpm_solver".
      check: as for `Tableau.create`; only "ddim" and "dpmpp" keep a constant data prediction exact.

    Returns:
      A deterministic tableau of n evaluations ("heun", "dpm_solver": two a step, one on a step to
      sigma = 0).

    Raises:
      ValueError: times not sorted, an unknown method, coefficients of another shape.

    Reference: Zhang, Niwa & Kleijn 2023, arXiv:2304.11328.
    """
    return iia_features(process, times, coefficients, method, check)[0]


def iia_features(
    process: Process, times: Times, coefficients: Array, method: str, check: str = "none"
) -> tuple[Tableau, list[list[Combination]], list[int]]:
    """What `iia` is made of, for the fit of its coefficients.

    Args:
      process: as for `iia`, and the other arguments.
      times: as there.
      coefficients: as there.
      method: as there.
      check: as there.

    Returns:
      The tableau; each step's features, combinations of the states u_k and outputs m_k; and the
      number of the state each step ends with.
    """
    expect_choice(method, "method", tuple(FEATURES))
    staged = FEATURES[method] == 4
    builder = Builder(process, times, NOISE if staged else DATA)
    values = np.asarray(coefficients, np.float64)
    shape = (len(builder.points) - 1, FEATURES[method])
    if values.shape != shape or not np.all(np.isfinite(values)):
        raise ValueError(f"`coefficients` must be finite, of shape {shape}; got {values.shape}.")
    x, features, rows = builder.start, list[list[Combination]](), list[int]()
    answers, pairs = list[Answer](), list[list[Combination]]()
    for s, t in zip(builder.points, builder.points[1:], strict=False):
        answer = builder.evaluate(x, s)
        x, own = transfer(answer, t), list[Combination]()
        if t.sigma == 0 or s.alpha == 0:
            pairs = []
        elif staged:
            scaled = (1 / s.alpha) * answer.state
            if method == "heun":
                other = builder.evaluate(x, t)
                slope = (answer.noise + other.noise) / 2
            else:
                middle = builder.point_at((s.log_snr + t.log_snr) / 2)
                other = builder.evaluate(transfer(answer, middle), middle)
                slope = other.noise
            x = t.alpha * (scaled + (t.rho - s.rho) * slope)
            pairs = [[scaled - answer.data, other.data - answer.data], *pairs[:1]]
            own = [*pairs[0], *pairs[1]] if len(pairs) == 2 else []
        elif answers and method == "guided":
            own = [answer.noise]
        elif answers:
            own = [answer.data - answers[-1].data, answer.noise - answers[-1].noise]
            if method == "dpmpp" and t != builder.points[-1] and answers[-1].point.alpha > 0:
                last = [answer, answers[-1]]
                weights = multistep_weights(last, t.log_snr - s.log_snr)
                x = (t.sigma / s.sigma) * answer.state
                x = x + t.alpha * total(weights, [a.data for a in last])
        answers.append(answer)
        x = x + total(values[len(features)][: len(own)], own)
        features.append(own)
        rows.append(builder.rows + 1)
    tableau = builder.finish(
        x, builder.points[-1], name=f"iia_{method}", source="arXiv:2304.11328", check=check
    )
    return tableau, features, rows
