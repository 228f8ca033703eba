"""Adams-Bashforth methods on dx/drho = E: DEIS, iPNDM, accelerated DDIM, gradient estimation.

In coordinates x / alpha and rho = sigma / alpha the ODE has no linear part:

    x_t / alpha_t = x_s / alpha_s + sum_j C_j E_{n-j},     C_j = int l_j d rho,

with E interpolated over the last evaluations in the variable that names the method.
"""

from __future__ import annotations

import math

import numpy as np

from diffsamp._core.checks import expect_choice, expect_int, lowers
from diffsamp._core.types import Array, Times
from diffsamp.processes import Process
from diffsamp.solvers._builder import (
    NOISE,
    Answer,
    Builder,
    Point,
    total,
    transfer,
)
from diffsamp.solvers._weights import adams_weights, diffusion_time
from diffsamp.tableau import Tableau

__all__ = ["accelerated_ddim", "deis", "gradient_estimation", "ipndm"]

FIXED = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}

# Where the weights add up to this many times their sum, a step extrapolates far beyond what the
# evaluations before it span, and multiplies their rounding: its order is lowered.
_WORN = 1e3


def deis(
    process: Process,
    times: Times,
    *,
    order: int = 3,
    variable: str = "t",
    lower_order_final: bool | int = False,
) -> Tableau:
    """DEIS: exponential integrator with polynomial extrapolation; one evaluation a step.

    `order` is the paper's: the degree of the polynomial. Order r uses r + 1 evaluations and
    converges at order r + 1 (from a cold start, at order 2). Order 0 is DDIM. "t" is the paper's
    tAB-DEIS, in the process's time, or where alpha is constant (EDM, VE), whose times are rho and
    log rho, in that of the variance-preserving process fitted to the noise levels at t_min and
    t_max, as its published results on EDM's models are made; "rho" its rhoAB-DEIS, which equals LMS
    of k-diffusion and the variable-step iPNDM; "log_rho" is what diffusers calls DEIS, and at order
    1 DPM-Solver's noise-form 2M (heun). The weights are integrated to float64 accuracy; the
    authors' code has them to about 1e-4. (diff-sampler's "ipndm_v" is "rho" with a parenthesis
    misplaced from order 3 on: on levels 10, 6, 3 and then 1 its weights are 1.802, -1.153, .351 for
    1.540, -.694, .155, and its samples up to .42 away.)

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim. The paper's grid is `quadratic`.
      order: 0 to 3.
      variable: "t", "rho" or "log_rho". With "t" and "log_rho" a step to sigma = 0, where the
        integrand is singular, is of order 0.
      lower_order_final: lower the order over the last steps, to 0 in the last. A number:
        only if there are fewer steps than that.

    Returns:
      A deterministic tableau of n evaluations, in noise prediction.

    Raises:
      ValueError: times not sorted, another order or variable.

    Reference: Zhang & Chen 2023, arXiv:2204.13902.
    """
    expect_int(order, "order", 0, 3)
    expect_choice(variable, "variable", ("t", "rho", "log_rho"))

    function = {"t": diffusion_time(process), "rho": None, "log_rho": np.asarray}[variable]

    def weights(history: list[Answer], to: Point) -> np.ndarray:
        if to.sigma == 0 and variable != "rho":
            history = history[:1]
        rho = np.array([a.point.rho for a in history])
        nodes = list(rho if function is None else function(np.log(rho)))
        return adams_weights(nodes, history[0].point.rho, to.rho, function)

    name = f"deis_{ {'t': 'tab', 'rho': 'rhoab', 'log_rho': 'logrhoab'}[variable] }{order}"
    source = "arXiv:2204.13902"
    return _adams(process, times, order + 1, weights, name, source, lower_order_final)


def ipndm(process: Process, times: Times, *, order: int = 4) -> Tableau:
    """iPNDM: DDIM steps along Adams-Bashforth's fixed-step mean of the noise predictions.

    One evaluation a step; the order ramps up over the first ones. On a grid that is not uniform in
    sigma / alpha the fixed weights make it a method of order 2 whatever `order` says, but it is
    among the best at 5 to 10 evaluations on EDM's grid. Unlike PNDM it spends no extra
    evaluations on a start.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.
      order: 1 to 4, the number of evaluations in the mean.

    Returns:
      A deterministic tableau of n evaluations, in noise prediction.

    Raises:
      ValueError: times not sorted, another order.

    Reference: Zhang & Chen 2023, arXiv:2204.13902; Liu et al. 2022,
    arXiv:2202.09778.
    """
    expect_int(order, "order", 1, 4)

    def weights(history: list[Answer], to: Point) -> np.ndarray:
        return (to.rho - history[0].point.rho) * np.array(FIXED[len(history)])

    source = "arXiv:2202.09778"
    return _adams(process, times, order, weights, f"ipndm{order}", source, False)


def accelerated_ddim(process: Process, times: Times) -> Tableau:
    """Accelerated DDIM: the noise prediction extrapolated linearly in abar = alpha^2.

    A DEIS of order 1 in the variable abar (variance-preserving, alpha^2 / (alpha^2 + sigma^2)
    elsewhere), whose integral is elementary: with a = atan(1 / rho),

        x_t / alpha_t = x_s / alpha_s + (rho_t - rho_s) E_n
                        + (abar_s (rho_t - rho_s) + a_t - a_s) / (abar_s - abar_p) (E_p - E_n).

    Order 2, one evaluation a step, and finite at sigma = 0, so the last step keeps its order. The
    first step, and one whose past lies at alpha = 0, is DDIM's.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.

    Returns:
      A deterministic tableau of n evaluations, in noise prediction.

    Raises:
      ValueError: times not sorted.

    Reference: Li, Huang, Efimov et al. 2024, arXiv:2403.03852.
    """

    def weights(history: list[Answer], to: Point) -> np.ndarray:
        s = history[0].point
        step = to.rho - s.rho
        if len(history) == 1:
            return np.array([step])
        abar, before = (1 / (1 + a.point.rho**2) for a in history)
        angle = math.atan2(1, to.rho) - math.atan2(1, s.rho)
        slope = (abar * step + angle) / (abar - before)
        return np.array([step - slope, slope])

    return _adams(process, times, 2, weights, "accelerated_ddim", "arXiv:2403.03852", False)


def gradient_estimation(process: Process, times: Times, *, gamma: float = 2.0) -> Tableau:
    """Gradient estimation: DDIM along gamma E_n + (1 - gamma) E_{n-1}. One evaluation a step.

    The noise prediction is read as the direction to the data, estimated with a delay that is taken
    back. gamma = 1 is DDIM, 3/2 iPNDM of order 2; any other converges at order 1. The first step is
    DDIM's, and so is one to sigma = 0.

    Args:
      process: the noise process.
      times: (n + 1,) decreasing times, used verbatim.
      gamma: weight of the newest answer, finite; the authors take 2.

    Returns:
      A deterministic tableau of n evaluations, in noise prediction.

    Raises:
      ValueError: times not sorted, gamma not finite.

    Reference: Permenter & Yuan 2024, arXiv:2306.04848.
    """
    if not np.isfinite(gamma):
        raise ValueError(f"`gamma` must be finite; got {gamma}.")

    def weights(history: list[Answer], to: Point) -> np.ndarray:
        plain = to.sigma == 0 or len(history) == 1
        shares = [1.0] if plain else [gamma, 1 - gamma]
        return (to.rho - history[0].point.rho) * np.array(shares)

    name = f"gradient_estimation({gamma:g})"
    return _adams(process, times, 2, weights, name, "arXiv:2306.04848", False)


def _adams(
    process: Process,
    times: Times,
    history_length: int,
    weights: Array,
    name: str,
    source: str,
    lower_order_final: bool | int,
) -> Tableau:
    builder = Builder(process, times, NOISE)
    steps = len(builder.points) - 1
    x, history = builder.start, list[Answer]()
    for n in range(steps):
        s, t = builder.points[n], builder.points[n + 1]
        history = [builder.evaluate(x, s), *history[: history_length - 1]]
        x = history[0].state
        usable = [a for a in history if math.isfinite(a.point.rho)]
        if lowers(lower_order_final, steps):
            usable = usable[: steps - n]
        if not usable or usable[0] is not history[0]:  # a start at alpha = 0, where rho = inf
            x = transfer(history[0], t)
            continue
        values = weights(usable, t)
        while len(values) > 1 and np.abs(values).sum() > _WORN * abs(values.sum()):
            usable = usable[: len(values) - 1]
            values = weights(usable, t)
        x = (t.alpha / s.alpha) * x + t.alpha * total(
            values, [a.noise for a in usable[: len(values)]]
        )
    return builder.finish(x, builder.points[-1], name=name, source=source)
