"""Several states per sample: particles with weights, best-of-n, searches over noise, MCMC.

Where a density is not that of any diffusion (a reward, a product of experts, guidance as a tilt),
particles carry weights that correct the sampler's own law, and are resampled where these differ.
"""

from diffsamp.steering.mcmc import hmc, mala
from diffsamp.steering.particles import Steered, sample
from diffsamp.steering.potentials import Potential, reward, scores, twist
from diffsamp.steering.selection import best_of, search_noise
from diffsamp.steering.tokens import sample_tokens

__all__ = [
    "Potential",
    "Steered",
    "best_of",
    "hmc",
    "mala",
    "reward",
    "sample",
    "sample_tokens",
    "scores",
    "search_noise",
    "twist",
]
