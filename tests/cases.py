"""The one table of solver cases: what every cross-cutting test runs over.

`test_contract.py` asserts that no solver of the registry is missing here, so a new solver gets all
those tests by adding its row.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

import diffsamp as ds
from diffsamp import processes


@dataclasses.dataclass(frozen=True)
class Case:
    """A solver and the facts its tests need.

    Attributes:
      name: the registry's name.
      order: order of convergence to be measured, with exact starting values.
      free: options that let it keep that order to the last step.
      exact_start: how many starting states must be exact to see the order.
      steps: the numbers of steps at which the order is measured.
      levels: "given" where the rows stand at the given times; "more" where there are others, or a
        time is visited twice; "between" where the network is asked inside the given steps.
      uniform: the order where the test's grid is uniform in the method's variable, by process.
      check: what a tableau checks of itself, as for `Tableau.create`.
    """

    name: str
    order: int
    free: dict[str, Any] = dataclasses.field(default_factory=dict)
    exact_start: int = 0
    steps: tuple[int, ...] = (80, 160, 320, 640)
    check: str = "full"
    uniform: dict[str, int] = dataclasses.field(default_factory=dict)
    levels: str = "given"

    @property
    def solver(self) -> ds.solvers.Solver:
        return ds.solvers.get(self.name)

    def __str__(self) -> str:
        return self.name


_FREE = {"lower_order_final": False}

CASES = [
    Case("ddim", 1),
    Case("ddpm", 1),
    Case("euler", 1),
    Case("heun", 2),
    Case("dpmpp_2m", 2, _FREE),
    Case("dpmpp_2m_heun", 2, _FREE),
    Case("dpmpp_2m_hb", 1, _FREE, steps=(80, 160, 320)),
    Case("dpmpp_3m", 3, _FREE, exact_start=2),
    Case("deis_tab1", 2),
    Case("deis_tab2", 3, exact_start=2),
    Case("deis_tab3", 4, exact_start=3),
    Case("deis_rhoab2", 3, exact_start=2),
    Case("deis_rhoab3", 4, exact_start=3),
    Case("deis_logrhoab1", 2),
    Case("ipndm2", 2),
    Case("ipndm3", 2),
    Case("ipndm4", 2),
    Case("pndm", 2, uniform={"flow": 4}, levels="more"),
    Case("s_pndm", 2, levels="more"),
    Case("accelerated_ddim", 2),
    Case("gradient_estimation", 1),
    Case("pfdiff1_1", 2, levels="between"),
    Case("pfdiff2_1", 1, levels="between"),
    Case("forward_ddim", 1),
    Case("rx_ddim", 2),
    Case("stork2", 2),
    Case("stork4", 3, exact_start=2),
    # whose orders show late
    Case("dual_solver", 2, _FREE, steps=(640, 1280)),
    Case("dual_solver0", 2, _FREE, steps=(640, 1280)),
    Case("unipc1", 2, _FREE),
    Case("unipc2", 3, _FREE),
    Case("unipc3", 4, _FREE, exact_start=3),
    Case("unipc3_bh1", 4, _FREE, exact_start=3),
    Case("unipc4", 5, _FREE, exact_start=4),
    Case("unip3", 3, _FREE, exact_start=2),
    Case("dpm_solver_2s", 2),
    # numbers of evaluations after which the last step is not of order 1
    Case("dpm_solver_3s", 3, steps=(80, 161, 320, 641)),
    Case("dpmpp_2s", 2),
    Case("dpmpp_3s", 3, steps=(80, 161, 320, 641)),
    Case("res_2s", 2),
    Case("res_3s", 3),
    Case("abnorsett3", 3, exact_start=2),
    Case("abnorsett4", 4, exact_start=3),
    Case("etdrk2", 2),
    Case("etdrk3", 3),
    Case("etdrk4", 4),
    Case("krogstad", 4),
    Case("strehmel_weiner", 4),
    Case("friedli", 4),
    Case("hochbruck_ostermann", 4),
    Case("lawson2", 2, check="none"),
    Case("lawson4", 4, check="none"),
    Case("epd", 2, levels="more"),
    Case("dpm2", 2),
    Case("rho_midpoint2", 2),
    Case("rho_kutta3", 3),
    Case("rho_heun3", 3),
    Case("rho_rk4", 4),
    Case("ghvb1.8", 2),
    Case("ghvb2.8", 3, exact_start=2),
    Case("ghvb3.8", 4, exact_start=3),
    Case("bdia", 2),
    Case("belm", 2),
    Case("conjugate_ddim", 1, check="none"),
    Case("dpmpp_2m_sde", 2, _FREE),
    Case("dpmpp_3m_sde", 2, _FREE),
    Case("dpmpp_sde", 1),
    Case("sa_solver", 2, _FREE),
    Case("er_sde1", 1),
    Case("er_sde2", 2),
    Case("er_sde3", 2),
    Case("seeds2", 2),
    Case("seeds3", 2),
    Case("dpm2_ancestral", 2),
    Case("accelerated_ddpm", 2, check="mean", levels="more"),
    Case("interpolant_em", 1, check="mean"),
    Case("interpolant_heun", 1, check="mean"),
]

DETERMINISTIC = [case for case in CASES if not case.solver.stochastic]


def all_processes() -> dict[str, processes.Process]:
    """Every process, by name, with the flow's shift and zero terminal SNR among them."""
    return {
        "vp_linear": processes.vp_linear(),
        "vp_cosine": processes.vp_cosine(),
        "vp_discrete": processes.vp_discrete(),
        "vp_zero_snr": processes.vp_discrete("scaled_linear", zero_terminal_snr=True),
        "ve": processes.ve(),
        "edm": processes.edm(),
        "flow": processes.flow(),
        "flow_shift": processes.flow(shift=3.0),
        "trig": processes.trig(0.5, end=np.pi / 2),
    }


def skewed_mixture() -> Any:
    """A one-dimensional mixture without symmetry, whose ODE has an exact solution."""
    return ds.targets.gaussian_mixture(
        [0.3, 0.5, 0.2], [[-1.0], [0.4], [1.5]], np.array([0.04, 0.09, 0.25])
    )


def twin(
    tableau: ds.Tableau, posterior: Any, x: np.ndarray, exact: Any = (), noises: Any = ()
) -> np.ndarray:
    """The executor's docstring in NumPy, float64: the oracle of the tests.

    Args:
      tableau: the sampler.
      posterior: (x, alpha, sigma) -> (data, noise).
      x: u_0.
      exact: states that replace u_1, u_2, .. (exact starting values).
      noises: the fresh noise of each row that adds some, in order.
    """
    u, m, drawn = [x], [], iter(noises)
    for n in range(tableau.rows):
        if tableau.evaluates[n]:
            data, noise = posterior(u[n], tableau.alpha[n], tableau.sigma[n])
            m.append(tableau.target[n, 0] * data + tableau.target[n, 1] * noise)
        else:
            m.append(np.zeros_like(x))
        u.append(
            sum(tableau.a[n, i] * u[n - i] for i in range(min(tableau.p, n + 1)))
            + sum(tableau.b[n, j] * m[n - j] for j in range(min(tableau.q, n + 1)))
            + (0.0 if tableau.d is None else tableau.d[n])
        )
        if tableau.c[n] != 0:
            u[n + 1] = u[n + 1] + tableau.c[n] * next(drawn)
        if n < len(exact):
            u[n + 1] = exact[n]
    return u[-1]


def gaussian_moments(
    tableau: ds.Tableau, mean: float, variance: float, start: tuple[float, float] | None = None
) -> tuple[float, float]:
    """Exact mean and variance of u_N for one-dimensional Gaussian data.

    The perfect network is then linear, so every u_n is a constant plus a combination of the start
    and the fresh noises, which is propagated in float64; no sampling.

    Args:
      tableau: any tableau.
      mean: of the data.
      variance: of the data.
      start: mean and variance of u_0; None: those of the process at its level.
    """
    alpha, sigma = tableau.alpha[0], tableau.sigma[0]
    if start is None:
        start = (alpha * mean, alpha**2 * variance + sigma**2)
    u, m = [np.zeros(tableau.rows + 2)], []
    u[0][:2] = start[0], np.sqrt(start[1])
    for n in range(tableau.rows):
        alpha, sigma = tableau.alpha[n], tableau.sigma[n]
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        data = gain * u[n]
        data[0] += mean * (1 - gain * alpha)
        noise = (u[n] - alpha * data) / sigma
        m.append(tableau.target[n, 0] * data + tableau.target[n, 1] * noise)
        new = sum(tableau.a[n, i] * u[n - i] for i in range(min(tableau.p, n + 1)))
        new = new + sum(tableau.b[n, j] * m[n - j] for j in range(min(tableau.q, n + 1)))
        new[2 + n] += tableau.c[n]
        u.append(new)
    return float(u[-1][0]), float(np.sum(u[-1][1:] ** 2))
