"""Solvers: pure host functions (process, times, **options) -> Tableau, and the list of them.

`SOLVERS` holds each named configuration once: `get("unipc")` in a config file, the table of
`names()`, the searches and the tests all read it.
"""

from __future__ import annotations

from diffsamp.solvers._builder import Builder
from diffsamp.solvers._registry import SOLVERS, Solver, get, names
from diffsamp.solvers.adams import accelerated_ddim, deis, gradient_estimation, ipndm
from diffsamp.solvers.afs import analytic_first_step, cached_first_answer
from diffsamp.solvers.consistency import CONSISTENCY_INDICES, consistency
from diffsamp.solvers.ddim import accelerated_ddpm, conjugate_ddim, ddim, ddpm
from diffsamp.solvers.dpm import dpm_solver, exponential_rk
from diffsamp.solvers.dpmpp import dpmpp
from diffsamp.solvers.dual import dual_solver
from diffsamp.solvers.edm import dpm2, euler, heun, runge_kutta
from diffsamp.solvers.epd import epd
from diffsamp.solvers.etdrk import abnorsett, etdrk, lawson
from diffsamp.solvers.iia import iia
from diffsamp.solvers.interpolant import interpolant
from diffsamp.solvers.invertible import bdia, belm
from diffsamp.solvers.langevin import langevin, predictor_corrector, renoise, ula
from diffsamp.solvers.lookahead import forward_ddim, pfdiff, richardson
from diffsamp.solvers.mixed import MixedStep, mixed
from diffsamp.solvers.momentum import ghvb, heavy_ball
from diffsamp.solvers.pndm import pndm
from diffsamp.solvers.rbf import rbf_solver
from diffsamp.solvers.restart import PUBLISHED as RESTART_CONFIGURATIONS
from diffsamp.solvers.restart import RestartInterval, restart, travel
from diffsamp.solvers.sde import er_sde, sa_solver
from diffsamp.solvers.sde_stages import dpm2_ancestral, dpmpp_sde, seeds
from diffsamp.solvers.skip import skip
from diffsamp.solvers.stork import stork
from diffsamp.solvers.unipc import dc_solver, unipc
from diffsamp.solvers.v3 import ModelStatistics, dpm_solver_v3

__all__ = [
    "AT_ONE_LEVEL",
    "COMPOSED",
    "CONSISTENCY_INDICES",
    "FEW_STEP",
    "FITTED",
    "RESTART_CONFIGURATIONS",
    "SOLVERS",
    "Builder",
    "MixedStep",
    "ModelStatistics",
    "RestartInterval",
    "Solver",
    "abnorsett",
    "accelerated_ddim",
    "accelerated_ddpm",
    "analytic_first_step",
    "bdia",
    "belm",
    "cached_first_answer",
    "conjugate_ddim",
    "consistency",
    "dc_solver",
    "ddim",
    "ddpm",
    "deis",
    "dpm2",
    "dpm2_ancestral",
    "dpm_solver",
    "dpm_solver_v3",
    "dpmpp",
    "dpmpp_sde",
    "dual_solver",
    "epd",
    "er_sde",
    "etdrk",
    "euler",
    "exponential_rk",
    "forward_ddim",
    "get",
    "ghvb",
    "gradient_estimation",
    "heavy_ball",
    "heun",
    "iia",
    "interpolant",
    "ipndm",
    "langevin",
    "lawson",
    "mixed",
    "names",
    "pfdiff",
    "pndm",
    "predictor_corrector",
    "rbf_solver",
    "renoise",
    "restart",
    "richardson",
    "runge_kutta",
    "sa_solver",
    "seeds",
    "skip",
    "stork",
    "travel",
    "ula",
    "unipc",
]

# functions without a row in the registry: they make a sampler from other samplers or steps,
COMPOSED = ("analytic_first_step", "cached_first_answer", "heavy_ball", "mixed", "restart", "skip")
# from numbers that were fitted to a network,
FITTED = ("dc_solver", "dpm_solver_v3", "iia", "rbf_solver")
# that stay at a noise level, or go back to one,
AT_ONE_LEVEL = ("langevin", "predictor_corrector", "renoise", "travel", "ula")
# or for a network that is no diffusion model
FEW_STEP = ("consistency",)
