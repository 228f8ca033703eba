"""Search: find the best sampler for a given network under an NFE budget.

`compare` measures fixed solvers on fixed schedules; `distill` starts from one and learns its times
and coefficients. Both judge a sampler by its distance to a fine solution from the same noise.
"""

from diffsamp.search.canonical import can_distill, canonical, from_canonical
from diffsamp.search.compare import Comparison, Entry, compare
from diffsamp.search.distill import Plan, candidates, distill
from diffsamp.search.fit import Fit, fit_dc, fit_iia, model_statistics
from diffsamp.search.objective import reference_tableau, run

__all__ = [
    "Comparison",
    "Entry",
    "Fit",
    "Plan",
    "can_distill",
    "candidates",
    "canonical",
    "compare",
    "distill",
    "fit_dc",
    "fit_iia",
    "from_canonical",
    "model_statistics",
    "reference_tableau",
    "run",
]
