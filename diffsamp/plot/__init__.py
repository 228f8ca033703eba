"""Pictures, with matplotlib (extra "demo"). Functions return a Figure; `save` writes it.

One style for all: they are as wide as a column of text, and what stands for one thing has one
colour in every panel.

    schedule, tableau                          a time grid; a sampler's numbers
    trajectory, image_grid, inverse            states of a run; samples; inverse problems
    comparison, front, error_against_nfe       what was measured, by evaluations
"""

from diffsamp.plot._style import save
from diffsamp.plot.curves import comparison, error_against_nfe, front
from diffsamp.plot.images import image_grid, inverse, trajectory
from diffsamp.plot.numbers import schedule, tableau

__all__ = [
    "comparison",
    "error_against_nfe",
    "front",
    "image_grid",
    "inverse",
    "save",
    "schedule",
    "tableau",
    "trajectory",
]
