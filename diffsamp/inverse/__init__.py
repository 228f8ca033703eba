"""Inverse problems: operators, and the methods that are loops around a network's calls.

`guidance.measurement`, `ddnm`, `dps` and the others take these operators as well.
"""

from diffsamp.inverse.distillation import ddcm, dmd, sds, vsd
from diffsamp.inverse.loops import daps, ddnm, diffpir, red_diff, repaint
from diffsamp.inverse.noisy import ddnm_plus, ddrm
from diffsamp.inverse.operators import Operator, blur, downsample, linear, mask, nonlinear

__all__ = [
    "Operator",
    "blur",
    "daps",
    "ddcm",
    "ddnm",
    "ddnm_plus",
    "ddrm",
    "diffpir",
    "dmd",
    "downsample",
    "linear",
    "mask",
    "nonlinear",
    "red_diff",
    "repaint",
    "sds",
    "vsd",
]
