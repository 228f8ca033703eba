"""Transforms of a ScoreFn: guidance and thresholding.

What is not linear in the network's outputs, or needs more than one of them, is put around the
network, not into the sampler. A transform has the same two methods as `ScoreFn` (`bind` and
`predict`), so it can be sampled, searched for and wrapped again. `nfe_factor` says how many network
evaluations one of its own costs: a tableau's `nfe` counts calls of the transform.
"""

from diffsamp.guidance.data import Thresholded, dynamic_thresholding, static_thresholding
from diffsamp.guidance.learned_range import LearnedRange, learned_range
from diffsamp.guidance.linear import Guided, cfg
from diffsamp.guidance.transform import Transform, per_row

__all__ = [
    "Guided",
    "LearnedRange",
    "Thresholded",
    "Transform",
    "cfg",
    "dynamic_thresholding",
    "learned_range",
    "per_row",
    "static_thresholding",
]
