"""Masked and other discrete diffusion models: samplers as rows, one executor, exact laws.

A masked model says, for a sequence in which some tokens are masked, what each masked token may be.
What tells samplers apart is which positions are unmasked at each call: `Rows` hold that, built on
the host, checked and padded to one shape, and `sample` runs them, one network call a row. `law` is
the exact distribution of what a sampler makes of an exact network, on small spaces.
"""

from diffsamp.discrete.executor import Result, run, sample
from diffsamp.discrete.guided import classifier_guided, guided
from diffsamp.discrete.information import best_counts, excess, token_entropies
from diffsamp.discrete.laws import conditionals, law
from diffsamp.discrete.network import TokenFn
from diffsamp.discrete.rows import SCHEDULES, Rows
from diffsamp.discrete.samplers import (
    SAMPLERS,
    ancestral,
    blocks,
    entropy_bounded,
    first_hitting,
    flow_matching,
    maskgit,
    parallel,
    remdm,
    remdm_loop,
    tau_leaping,
    threshold,
    uniform,
)

__all__ = [
    "SAMPLERS",
    "SCHEDULES",
    "Result",
    "Rows",
    "TokenFn",
    "ancestral",
    "best_counts",
    "blocks",
    "classifier_guided",
    "conditionals",
    "entropy_bounded",
    "excess",
    "first_hitting",
    "flow_matching",
    "guided",
    "law",
    "maskgit",
    "parallel",
    "remdm",
    "remdm_loop",
    "run",
    "sample",
    "tau_leaping",
    "threshold",
    "token_entropies",
    "uniform",
]
