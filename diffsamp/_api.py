"""What `import diffsamp` offers, in one place; imported with the first name that is used."""

from diffsamp import (
    guidance,
    inverse,
    plot,
    predictions,
    processes,
    schedules,
    search,
    solvers,
    steering,
)
from diffsamp._core import random
from diffsamp._core.convolution import fast_convolutions
from diffsamp._core.progress import ProgressBar
from diffsamp.evaluation import metrics, targets
from diffsamp.evaluation.cite import cite
from diffsamp.evaluation.describe import describe
from diffsamp.guidance import time_shift
from diffsamp.interop.diffusers import from_diffusers
from diffsamp.jobs._shards import Generated, Shard
from diffsamp.jobs.export import ExportedSampler, export, load_exported
from diffsamp.jobs.generate import generate
from diffsamp.jobs.sampler import Sampler, sampler
from diffsamp.kinds import bridges, few_step, phase_space
from diffsamp.loops import adaptive, inversion, parallel
from diffsamp.loops.brownian import brownian_key
from diffsamp.loops.policies import log_prob, replay, row_kl
from diffsamp.processes import reversed_flow_apply
from diffsamp.sampling import State, Trajectory, init, resume, sample, step, trajectory
from diffsamp.score import ScoreFn
from diffsamp.tableau import Tableau

__all__ = [
    "ExportedSampler",
    "Generated",
    "ProgressBar",
    "Sampler",
    "ScoreFn",
    "Shard",
    "State",
    "Tableau",
    "Trajectory",
    "adaptive",
    "bridges",
    "brownian_key",
    "cite",
    "describe",
    "export",
    "fast_convolutions",
    "few_step",
    "from_diffusers",
    "generate",
    "guidance",
    "init",
    "inverse",
    "inversion",
    "load_exported",
    "log_prob",
    "metrics",
    "parallel",
    "phase_space",
    "plot",
    "predictions",
    "processes",
    "random",
    "replay",
    "resume",
    "reversed_flow_apply",
    "row_kl",
    "sample",
    "sampler",
    "schedules",
    "search",
    "solvers",
    "steering",
    "step",
    "targets",
    "time_shift",
    "trajectory",
]
