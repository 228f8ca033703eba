"""Search: find the best sampler for a given network under an NFE budget.

`regress` fits times and weights by least squares and `refine` by Gauss-Newton steps, from forward
evaluations alone; `compare` measures fixed solvers on fixed schedules, and `suggest` the few among
which the best is; `step_costs` and `align_steps` optimise the schedule, `tors` and `sharp_euler`
read it off the trajectory; `evolve` mixes solvers step by step; `distill` learns times and
coefficients by gradient; `best` runs them one after another and returns a plan per budget. All
judge a sampler by an `Objective`, by default its distance to a fine solution from the same noise.
`tfg` looks for the strengths of training-free guidance, `unmasking` for how many tokens a masked
model unmasks when.
"""

from diffsamp._core.paths import shortest_path
from diffsamp.search import objective
from diffsamp.search._cost import Estimate
from diffsamp.search.align import align_costs, align_steps
from diffsamp.search.answers import first_answers
from diffsamp.search.best import STAGES, best
from diffsamp.search.canonical import can_distill, canonical, from_canonical
from diffsamp.search.compare import Comparison, Entry, candidates, compare
from diffsamp.search.distill import distill
from diffsamp.search.dynamic import Costs, step_costs
from diffsamp.search.evolve import Evolution, evolve
from diffsamp.search.fine import fine_times
from diffsamp.search.fit import (
    Fit,
    RatioPolynomial,
    fit_dc,
    fit_dc_cascade,
    fit_iia,
    model_statistics,
)
from diffsamp.search.fit_null import fit_null
from diffsamp.search.genome import Genome
from diffsamp.search.objective import Objective, reference_tableau
from diffsamp.search.plan import Front, Plan
from diffsamp.search.profile import Profile, sharp_euler, tors
from diffsamp.search.refine import refine
from diffsamp.search.regress import regress
from diffsamp.search.running import run, run_many
from diffsamp.search.skipping import skip_rows
from diffsamp.search.strategy import evolution_strategy
from diffsamp.search.strength import Strength, TrainingFree, tfg
from diffsamp.search.suggest import Suggestion, suggest
from diffsamp.search.transfer import interpolate, transfer
from diffsamp.search.unmasking import Unmasking, unmasking

__all__ = [
    "STAGES",
    "Comparison",
    "Costs",
    "Entry",
    "Estimate",
    "Evolution",
    "Fit",
    "Front",
    "Genome",
    "Objective",
    "Plan",
    "Profile",
    "RatioPolynomial",
    "Strength",
    "Suggestion",
    "TrainingFree",
    "Unmasking",
    "align_costs",
    "align_steps",
    "best",
    "can_distill",
    "candidates",
    "canonical",
    "compare",
    "distill",
    "evolution_strategy",
    "evolve",
    "fine_times",
    "first_answers",
    "fit_dc",
    "fit_dc_cascade",
    "fit_iia",
    "fit_null",
    "from_canonical",
    "interpolate",
    "model_statistics",
    "objective",
    "reference_tableau",
    "refine",
    "regress",
    "run",
    "run_many",
    "sharp_euler",
    "shortest_path",
    "skip_rows",
    "step_costs",
    "suggest",
    "tfg",
    "tors",
    "transfer",
    "unmasking",
]
