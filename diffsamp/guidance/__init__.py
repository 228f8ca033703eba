"""Transforms of a ScoreFn: guidance and everything else that changes what a network says.

What is not linear in the network's outputs, or needs more than one of them, is put around the
network, not into the sampler. A transform has the same two methods as `ScoreFn` (`bind` and
`predict`), so it can be sampled, searched for and wrapped again. `nfe_factor` says how many network
evaluations one of its own costs, `gradients_per_call` how many vector-Jacobian products: a
tableau's `nfe` counts calls of the transform.
"""

from diffsamp.guidance._numbers import mixture
from diffsamp.guidance.conditions import Annealed, anneal_condition
from diffsamp.guidance.data import (
    Rule,
    dynamic_thresholding,
    keep_noise,
    on_data,
    on_noise,
    rule,
    static_thresholding,
)
from diffsamp.guidance.first_answer import FirstAnswer, first_answer
from diffsamp.guidance.learned_range import LearnedRange, learned_range
from diffsamp.guidance.linear import Combined, cfg, cfg_pp, combine
from diffsamp.guidance.losses import Loss, dps, freedom, loss, posterior_std, step_units
from diffsamp.guidance.measurements import Measurement, measurement
from diffsamp.guidance.methods import bias_table, calibrate, ddnm, inpaint, mpgd, omegance
from diffsamp.guidance.rules import apg, cfg_zero_star, rescale, tcfg, zero_first
from diffsamp.guidance.training_free import tfg
from diffsamp.guidance.transform import Transform, per_row
from diffsamp.guidance.unfolded import Selected, select, unfold

__all__ = [
    "Annealed",
    "Combined",
    "FirstAnswer",
    "LearnedRange",
    "Loss",
    "Measurement",
    "Rule",
    "Selected",
    "Transform",
    "anneal_condition",
    "apg",
    "bias_table",
    "calibrate",
    "cfg",
    "cfg_pp",
    "cfg_zero_star",
    "combine",
    "ddnm",
    "dps",
    "dynamic_thresholding",
    "first_answer",
    "freedom",
    "inpaint",
    "keep_noise",
    "learned_range",
    "loss",
    "measurement",
    "mixture",
    "mpgd",
    "omegance",
    "on_data",
    "on_noise",
    "per_row",
    "posterior_std",
    "rescale",
    "rule",
    "select",
    "static_thresholding",
    "step_units",
    "tcfg",
    "tfg",
    "unfold",
    "zero_first",
]
