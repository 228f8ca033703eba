"""What `import diffsamp` offers, in one place; imported with the first name that is used."""

from diffsamp import (
    discrete,
    guidance,
    inverse,
    plot,
    predictions,
    processes,
    schedules,
    search,
    solvers,
    steering,
    students,
)
from diffsamp._core import random
from diffsamp._core.convolution import fast_convolutions
from diffsamp._core.progress import ProgressBar
from diffsamp.evaluation import metrics, targets
from diffsamp.evaluation.check import Check, check
from diffsamp.evaluation.cite import cite
from diffsamp.evaluation.describe import describe
from diffsamp.guidance import time_shift
from diffsamp.interop.diffusers import from_diffusers
from diffsamp.interop.torch import from_torch
from diffsamp.jobs._shards import Generated, Shard
from diffsamp.jobs.export import ExportedSampler, export, load_exported
from diffsamp.jobs.generate import generate
from diffsamp.jobs.network import export_network, load_network
from diffsamp.jobs.pretrained import Pretrained, from_pretrained
from diffsamp.jobs.sampler import Sampler, sampler
from diffsamp.kinds import bridges, few_step, joint, known_mean, phase_space
from diffsamp.loops import adaptive, inversion, parallel
from diffsamp.loops.brownian import brownian_key
from diffsamp.loops.policies import log_prob, replay, row_kl
from diffsamp.processes import reversed_flow_apply
from diffsamp.sampling import State, Trajectory, init, resume, sample, step, trajectory
from diffsamp.score import ScoreFn
from diffsamp.search.suggest import Suggestion, suggest
from diffsamp.tableau import Tableau

__all__ = [
    "Check",
    "ExportedSampler",
    "Generated",
    "Pretrained",
    "ProgressBar",
    "Sampler",
    "ScoreFn",
    "Shard",
    "State",
    "Suggestion",
    "Tableau",
    "Trajectory",
    "adaptive",
    "bridges",
    "brownian_key",
    "check",
    "cite",
    "describe",
    "discrete",
    "export",
    "export_network",
    "fast_convolutions",
    "few_step",
    "from_diffusers",
    "from_pretrained",
    "from_torch",
    "generate",
    "guidance",
    "init",
    "inverse",
    "inversion",
    "joint",
    "known_mean",
    "load_exported",
    "load_network",
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
    "students",
    "suggest",
    "targets",
    "time_shift",
    "trajectory",
]
