"""The list of named solvers: what `solvers.get`, the searches, the tests and the README read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from diffsamp._core.checks import expect_choice, expect_int
from diffsamp._core.types import Array, Times, Value
from diffsamp.processes import Process
from diffsamp.solvers.adams import accelerated_ddim, deis, gradient_estimation, ipndm
from diffsamp.solvers.ddim import accelerated_ddpm, conjugate_ddim, ddim, ddpm
from diffsamp.solvers.dpm import dpm_solver, exponential_rk
from diffsamp.solvers.dpmpp import dpmpp
from diffsamp.solvers.dual import dual_solver
from diffsamp.solvers.edm import dpm2, euler, heun, runge_kutta
from diffsamp.solvers.epd import epd
from diffsamp.solvers.etdrk import abnorsett, etdrk, lawson
from diffsamp.solvers.interpolant import interpolant
from diffsamp.solvers.invertible import bdia, belm
from diffsamp.solvers.lookahead import forward_ddim, pfdiff, richardson
from diffsamp.solvers.momentum import ghvb
from diffsamp.solvers.pndm import pndm
from diffsamp.solvers.sde import er_sde, sa_solver
from diffsamp.solvers.sde_stages import dpm2_ancestral, dpmpp_sde, seeds
from diffsamp.solvers.stork import stork
from diffsamp.solvers.unipc import unipc
from diffsamp.tableau import Tableau

__all__ = ["ALIASES", "SOLVERS", "Solver", "get", "names"]


@dataclasses.dataclass(frozen=True)
class Solver:
    """A named solver: a function of this module with its options.

    Attributes:
      name: its name in configurations.
      function: (process, times, **options) -> Tableau.
      options: keyword arguments that make it this solver.
      order: measured order of convergence: to the ODE's solution, with exact starting values; for a
        stochastic solver that of the variance on Gaussian data, from its own start.
      source: paper, as arXiv id and equation or algorithm.
      aliases: what other libraries call it.
      stages: evaluations per step; the step to sigma = 0 takes one.
      stochastic: whether it draws noise.
      extra: evaluations that the start takes beyond `stages` a step.
      least: the smallest number of steps.
      schedule: a name in `diffsamp.schedules.NAMES`: the grid that its authors made for it, where
        it needs one of its own, else log-SNR.
    """

    name: str
    function: Callable[..., Tableau]
    options: Mapping[str, Value]
    order: int
    source: str
    aliases: tuple[str, ...] = ()
    stages: int = 1
    stochastic: bool = False
    extra: int = 0
    least: int = 1
    schedule: str = "logsnr"

    def __call__(self, process: Process, times: Times, **options: Value) -> Tableau:
        """The tableau on these times; `options` override the solver's own.

        Falling times sample. Deterministic solvers also take rising ones, which encode.
        """
        return self.function(process, times, **{**self.options, **options})

    def steps(self, nfe: int, *, closed: bool = True) -> int | None:
        """How many steps make exactly `nfe` evaluations; None if no number does.

        Args:
          nfe: the budget, at least 1.
          closed: whether the times end at the clean end, where the last step takes one evaluation.
        """
        expect_int(nfe, "nfe", at_least=1)
        used = nfe - self.extra + (self.stages - 1 if closed else 0)
        steps = used // self.stages
        return steps if used % self.stages == 0 and steps >= self.least else None


def _listed(*solvers: Solver) -> dict[str, Solver]:
    return {solver.name: solver for solver in solvers}


def _euler_end(**options: Value) -> dict[str, Array]:
    """What the registry counts on: one evaluation for the step to sigma = 0."""
    return {**options, "clean_end": "euler"}


_LAWSON = "doi:10.1137/0704033"


def _etdrk(*entries: tuple[str, int, str]) -> list[Solver]:
    """Exponential Runge-Kutta methods: name, stages, what RES4LYF calls it."""
    return [
        Solver(
            name,
            etdrk,
            {"method": name},
            min(stages, 4),
            "doi:10.1137/040611434",
            (alias,),
            stages=stages,
        )
        for name, stages, alias in entries
    ]


SOLVERS: dict[str, Solver] = _listed(
    Solver("ddim", ddim, {}, 1, "arXiv:2010.02502, eq. 12", ("DDIMScheduler", "ddim")),
    Solver(
        "ddpm",
        ddpm,
        {},
        1,
        "arXiv:2006.11239, eq. 7",
        ("DDPMScheduler", "EulerAncestralDiscreteScheduler", "euler_ancestral"),
        stochastic=True,
    ),
    Solver(
        "euler",
        euler,
        {},
        1,
        "arXiv:2206.00364, alg. 2",
        ("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"),
    ),
    Solver(
        "heun",
        heun,
        _euler_end(),
        2,
        "arXiv:2206.00364, alg. 1",
        ("HeunDiscreteScheduler", "heun"),
        stages=2,
    ),
    Solver(
        "dpmpp_2m",
        dpmpp,
        {"order": 2},
        2,
        "arXiv:2211.01095, alg. 2",
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
    ),
    Solver(
        "dpmpp_2m_heun",
        dpmpp,
        {"order": 2, "variant": "heun"},
        2,
        "arXiv:2211.01095",
        ("res_multistep", "res_2m", "abnorsett_2m"),
    ),
    Solver("dpmpp_2m_hb", dpmpp, {"order": 2, "beta": 0.8}, 1, "arXiv:2307.11118"),
    Solver("dpmpp_3m", dpmpp, {"order": 3}, 3, "arXiv:2211.01095"),
    Solver("deis_tab1", deis, {"order": 1}, 2, "arXiv:2204.13902"),
    Solver("deis_tab2", deis, {"order": 2}, 3, "arXiv:2204.13902"),
    Solver("deis_tab3", deis, {"order": 3}, 4, "arXiv:2204.13902"),
    Solver("deis_rhoab2", deis, {"order": 2, "variable": "rho"}, 3, "arXiv:2204.13902"),
    Solver(
        "deis_rhoab3",
        deis,
        {"order": 3, "variable": "rho"},
        4,
        "arXiv:2204.13902",
        ("lms",),
    ),
    Solver(
        "deis_logrhoab1",
        deis,
        {"order": 1, "variable": "log_rho", "lower_order_final": 15},
        2,
        "arXiv:2204.13902",
        ("DEISMultistepScheduler",),
    ),
    Solver("ipndm2", ipndm, {"order": 2}, 2, "arXiv:2202.09778"),
    Solver("ipndm3", ipndm, {"order": 3}, 2, "arXiv:2202.09778"),
    Solver("ipndm4", ipndm, {"order": 4}, 2, "arXiv:2202.09778", ("ipndm",)),
    Solver(
        "pndm",
        pndm,
        {},
        2,
        "arXiv:2202.09778",
        ("PNDMScheduler",),
        extra=9,
        least=4,
    ),
    Solver("s_pndm", pndm, {"start": "heun"}, 2, "arXiv:2202.09778", extra=1, least=2),
    Solver("accelerated_ddim", accelerated_ddim, {}, 2, "arXiv:2403.03852"),
    Solver("gradient_estimation", gradient_estimation, {}, 1, "arXiv:2306.04848", ("euler_ge",)),
    Solver("pfdiff1_1", pfdiff, {}, 2, "arXiv:2408.08822"),
    Solver("pfdiff2_1", pfdiff, {"skip": 2}, 1, "arXiv:2408.08822"),
    Solver("forward_ddim", forward_ddim, {}, 1, "arXiv:2512.24927"),
    Solver("rx_ddim", richardson, {}, 2, "arXiv:2504.01855"),
    Solver("stork2", stork, {"order": 2, "derivatives": 1}, 2, "arXiv:2505.24210"),
    Solver("stork4", stork, {}, 3, "arXiv:2505.24210"),
    Solver("dual_solver", dual_solver, {}, 2, "arXiv:2603.03973"),
    Solver("dual_solver0", dual_solver, {"gamma": 0.0, "tau": 0.0}, 2, "arXiv:2603.03973"),
    Solver("unipc1", unipc, {"order": 1}, 2, "arXiv:2302.04867, alg. 1"),
    Solver(
        "unipc2",
        unipc,
        {"order": 2},
        3,
        "arXiv:2302.04867, alg. 1",
        ("UniPCMultistepScheduler", "uni_pc_bh2"),
    ),
    Solver("unipc3", unipc, {"order": 3}, 4, "arXiv:2302.04867, alg. 1", ("unipc",)),
    Solver("unipc3_bh1", unipc, {"order": 3, "variant": "bh1"}, 4, "arXiv:2302.04867", ("uni_pc",)),
    Solver("unipc4", unipc, {"order": 4}, 5, "arXiv:2302.04867, alg. 1"),
    Solver("unip3", unipc, {"order": 3, "corrector": False}, 3, "arXiv:2302.04867, alg. 2"),
    Solver(
        "dpm_solver_2s",
        dpm_solver,
        {"order": 2},
        2,
        "arXiv:2206.00927, alg. 1",
        schedule="dpm_fast_2s",
    ),
    Solver(
        "dpm_solver_3s",
        dpm_solver,
        {"order": 3},
        3,
        "arXiv:2206.00927, alg. 2",
        ("dpm_fast",),
        schedule="dpm_fast",
    ),
    Solver(
        "dpmpp_2s",
        dpm_solver,
        {"order": 2, "prediction": "data"},
        2,
        "arXiv:2211.01095, alg. 1",
        ("DPMSolverSinglestepScheduler",),
        schedule="dpm_fast_2s",
    ),
    Solver(
        "dpmpp_3s",
        dpm_solver,
        {"order": 3, "prediction": "data"},
        3,
        "arXiv:2211.01095",
        schedule="dpm_fast",
    ),
    Solver("res_2s", exponential_rk, {"stages": 2}, 2, "arXiv:2308.02157", stages=2),
    Solver("res_3s", exponential_rk, {"stages": 3}, 3, "arXiv:2308.02157", stages=3),
    Solver("abnorsett3", abnorsett, {}, 3, "doi:10.1137/100810722", ("abnorsett_3m",)),
    Solver("abnorsett4", abnorsett, {"order": 4}, 4, "doi:10.1137/100810722", ("abnorsett_4m",)),
    *_etdrk(
        ("etdrk2", 2, "etdrk2_2s"),
        ("etdrk3", 3, "etdrk3_a_3s"),
        ("etdrk4", 4, "etdrk4_4s"),
        ("krogstad", 4, "res_4s_krogstad"),
        ("strehmel_weiner", 4, "res_4s_strehmel_weiner"),
        ("friedli", 4, "res_4s_friedli"),
        ("hochbruck_ostermann", 5, "res_5s_hochbruck-ostermann"),
    ),
    Solver("lawson2", lawson, {"method": "midpoint2"}, 2, _LAWSON, ("lawson2a_2s",), stages=2),
    Solver("lawson4", lawson, {}, 4, _LAWSON, ("lawson4_4s",), stages=4),
    Solver("epd", epd, {}, 2, "arXiv:2507.14797", stages=3),
    Solver("dpm2", dpm2, {}, 2, "arXiv:2206.00927", ("KDPM2DiscreteScheduler", "dpm_2"), stages=2),
    Solver(
        "rho_midpoint2",
        runge_kutta,
        _euler_end(method="midpoint2"),
        2,
        "arXiv:2204.13902",
        stages=2,
    ),
    Solver("rho_kutta3", runge_kutta, _euler_end(method="kutta3"), 3, "arXiv:2204.13902", stages=3),
    Solver("rho_heun3", runge_kutta, _euler_end(method="heun3"), 3, "arXiv:2204.13902", stages=3),
    Solver("rho_rk4", runge_kutta, _euler_end(method="rk4"), 4, "arXiv:2204.13902", stages=4),
    Solver("ghvb1.8", ghvb, {"order": 2, "beta": 0.8}, 2, "arXiv:2307.11118"),
    Solver("ghvb2.8", ghvb, {"order": 3, "beta": 0.8}, 3, "arXiv:2307.11118"),
    Solver("ghvb3.8", ghvb, {"order": 4, "beta": 0.8}, 4, "arXiv:2307.11118"),
    Solver("bdia", bdia, {}, 2, "arXiv:2307.10829"),
    Solver("belm", belm, {}, 2, "arXiv:2410.07273"),
    Solver("conjugate_ddim", conjugate_ddim, {}, 1, "arXiv:2310.07894"),
    Solver(
        "dpmpp_2m_sde",
        dpmpp,
        {"order": 2, "eta": 1.0},
        2,
        "arXiv:2211.01095",
        ("dpmpp_2m_sde",),
        stochastic=True,
    ),
    Solver("dpmpp_3m_sde", dpmpp, {"order": 3, "eta": 1.0}, 2, "arXiv:2211.01095", stochastic=True),
    Solver(
        "dpmpp_sde",
        dpmpp_sde,
        {},
        1,
        "arXiv:2211.01095",
        ("DPMSolverSDEScheduler",),
        stages=2,
        stochastic=True,
    ),
    Solver(
        "sa_solver",
        sa_solver,
        {},
        2,
        "arXiv:2309.05019, alg. 1",
        stochastic=True,
    ),
    Solver("er_sde1", er_sde, {"order": 1}, 1, "arXiv:2309.06169", stochastic=True),
    Solver("er_sde2", er_sde, {"order": 2}, 2, "arXiv:2309.06169", stochastic=True),
    Solver("er_sde3", er_sde, {}, 2, "arXiv:2309.06169", ("er_sde",), stochastic=True),
    Solver("seeds2", seeds, {}, 2, "arXiv:2305.14267", ("seeds_2",), stages=2, stochastic=True),
    Solver(
        "seeds3",
        seeds,
        {"order": 3},
        2,
        "arXiv:2305.14267",
        ("seeds_3",),
        stages=3,
        stochastic=True,
    ),
    Solver(
        "dpm2_ancestral",
        dpm2_ancestral,
        {},
        2,
        "arXiv:2206.00927",
        ("KDPM2AncestralDiscreteScheduler", "dpm_2_ancestral"),
        stages=2,
        stochastic=True,
    ),
    Solver("accelerated_ddpm", accelerated_ddpm, {}, 2, "arXiv:2403.03852", stochastic=True),
    Solver("interpolant_em", interpolant, {}, 1, "arXiv:2401.08740", stochastic=True),
    Solver(
        "interpolant_heun",
        interpolant,
        {"method": "heun"},
        1,
        "arXiv:2401.08740",
        stages=2,
        stochastic=True,
    ),
)

ALIASES = {alias: s.name for s in SOLVERS.values() for alias in s.aliases if alias not in SOLVERS}


def names() -> tuple[str, ...]:
    """Names of all solvers."""
    return tuple(SOLVERS)


def get(name: str) -> Solver:
    """The solver called `name`, or known by that name elsewhere.

    Raises:
      ValueError: an unknown name.
    """
    if name.endswith("Scheduler") and name not in ALIASES:
        known = sorted(alias for alias in ALIASES if alias.endswith("Scheduler"))
        raise ValueError(
            f"{name!r} with its default fields is no solver of the registry; of diffusers' classes "
            f'{known} are. ds.from_diffusers({{"_class_name": {name!r}}}) reads those that can be.'
        )
    name = ALIASES.get(name, name)
    return SOLVERS[expect_choice(name, "solver", tuple(SOLVERS))]
