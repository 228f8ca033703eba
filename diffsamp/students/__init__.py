"""Students: what a few-step network is trained on, as pure functions.

`students.<method>(network, key, x_0, cond, ..)` draws states and times, asks the teacher (or the
student itself) and returns a `Target`; nothing in it is differentiated. Train with any optimiser on
the mean of `students.loss(student, target)`:

    def objective(params):
        student = dataclasses.replace(score_fn, params=params)
        return jnp.mean(students.loss(student, target))

Policy gradients (`policy_loss`, `shortcut_fine_tuning`), distribution matching (`dmd2`,
`f_distill`) and score mismatching train the sampler's own outcome; their pages say on what.
"""

from diffsamp.students.adversarial import (
    critic_loss,
    mismatching_loss,
    score_mismatching,
    shortcut_fine_tuning,
)
from diffsamp.students.consistency import (
    consistency_distillation,
    ect,
    ict,
    lognormal_times,
    scm,
)
from diffsamp.students.distribution import dmd2, f_distill, f_weight
from diffsamp.students.flow_maps import mean_flow, shortcut
from diffsamp.students.policy import policy_loss
from diffsamp.students.target import Target, loss, pseudo_huber, squared_error
from diffsamp.students.trajectories import boss, perflow, progressive_distillation, reflow, sfd

__all__ = [
    "Target",
    "boss",
    "consistency_distillation",
    "critic_loss",
    "dmd2",
    "ect",
    "f_distill",
    "f_weight",
    "ict",
    "lognormal_times",
    "loss",
    "mean_flow",
    "mismatching_loss",
    "perflow",
    "policy_loss",
    "progressive_distillation",
    "pseudo_huber",
    "reflow",
    "scm",
    "score_mismatching",
    "sfd",
    "shortcut",
    "shortcut_fine_tuning",
    "squared_error",
]
