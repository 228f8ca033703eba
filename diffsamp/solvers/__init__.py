"""Solvers: pure host functions (process, times, **options) -> Tableau, and the list of them.

`SOLVERS` holds each named configuration once: `get("unipc")` in a config file, the table of
`names()`, the searches and the tests all read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from diffsamp._checks import expect_choice, expect_int
from diffsamp.processes import Process
from diffsamp.solvers.adams import deis, ipndm
from diffsamp.solvers.ddim import ddim, ddpm
from diffsamp.solvers.dpmpp import dpmpp
from diffsamp.solvers.edm import euler, heun
from diffsamp.solvers.unipc import unipc
from diffsamp.tableau import Tableau

__all__ = [
    "SOLVERS",
    "Solver",
    "ddim",
    "ddpm",
    "deis",
    "dpmpp",
    "euler",
    "get",
    "heun",
    "ipndm",
    "names",
    "unipc",
]


@dataclasses.dataclass(frozen=True)
class Solver:
    """A named solver: a function of this module with its options.

    Attributes:
      name: its name in configurations.
      function: (process, times, **options) -> Tableau.
      options: keyword arguments that make it this solver.
      order: order of convergence with exact starting values, on smooth deterministic problems; for
        a stochastic solver its weak order.
      source: paper, as arXiv id and equation or algorithm.
      aliases: what other libraries call it.
      stages: evaluations per step; the step to sigma = 0 takes one.
      stochastic: whether it draws noise.
    """

    name: str
    function: Callable[..., Tableau]
    options: Mapping[str, Any]
    order: int
    source: str
    aliases: tuple[str, ...] = ()
    stages: int = 1
    stochastic: bool = False

    def __call__(self, process: Process, times: Any, **options: Any) -> Tableau:
        """The tableau on these times; `options` override the solver's own."""
        return self.function(process, times, **{**self.options, **options})

    def steps(self, nfe: int, *, closed: bool = True) -> int | None:
        """How many steps make exactly `nfe` evaluations; None if no number does.

        Args:
          nfe: the budget, at least 1.
          closed: whether the times end at the clean end, where the last step takes one evaluation.
        """
        expect_int(nfe, "nfe", at_least=1)
        used = nfe + self.stages - 1 if closed else nfe
        return used // self.stages if used % self.stages == 0 else None


def _listed(*solvers: Solver) -> dict[str, Solver]:
    return {solver.name: solver for solver in solvers}


SOLVERS: dict[str, Solver] = _listed(
    Solver("ddim", ddim, {}, 1, "arXiv:2010.02502, eq. 12", ("DDIMScheduler", "ddim")),
    Solver(
        "ddpm", ddpm, {}, 1, "arXiv:2006.11239, eq. 7", ("DDPMScheduler", "ddpm"), stochastic=True
    ),
    Solver("euler", euler, {}, 1, "arXiv:2206.00364, alg. 2", ("EulerDiscreteScheduler", "euler")),
    Solver(
        "heun",
        heun,
        {},
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
    Solver("dpmpp_2m_heun", dpmpp, {"order": 2, "variant": "heun"}, 2, "arXiv:2211.01095, app. B"),
    Solver("dpmpp_3m", dpmpp, {"order": 3}, 3, "arXiv:2211.01095, app. B"),
    Solver("deis_tab1", deis, {"order": 1}, 2, "arXiv:2204.13902, eq. 15"),
    Solver("deis_tab2", deis, {"order": 2}, 3, "arXiv:2204.13902, eq. 15"),
    Solver("deis_tab3", deis, {"order": 3}, 4, "arXiv:2204.13902, eq. 15"),
    Solver("deis_rhoab2", deis, {"order": 2, "variable": "rho"}, 3, "arXiv:2204.13902, app. B"),
    Solver(
        "deis_rhoab3",
        deis,
        {"order": 3, "variable": "rho"},
        4,
        "arXiv:2204.13902",
        ("lms", "ipndm_v"),
    ),
    Solver(
        "deis_logrhoab1",
        deis,
        {"order": 1, "variable": "log_rho"},
        2,
        "arXiv:2204.13902",
        ("DEISMultistepScheduler",),
    ),
    Solver("ipndm2", ipndm, {"order": 2}, 2, "arXiv:2202.09778, eq. 9"),
    Solver("ipndm3", ipndm, {"order": 3}, 2, "arXiv:2202.09778, eq. 9"),
    Solver(
        "ipndm4", ipndm, {"order": 4}, 2, "arXiv:2202.09778, eq. 9", ("IPNDMScheduler", "ipndm")
    ),
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
)

_ALIASES = {alias: s.name for s in SOLVERS.values() for alias in s.aliases if alias not in SOLVERS}


def names() -> tuple[str, ...]:
    """Names of all solvers."""
    return tuple(SOLVERS)


def get(name: str) -> Solver:
    """The solver called `name`, or known by that name elsewhere.

    Raises:
      ValueError: an unknown name.
    """
    name = _ALIASES.get(name, name)
    return SOLVERS[expect_choice(name, "solver", tuple(SOLVERS))]
