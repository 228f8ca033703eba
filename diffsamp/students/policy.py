"""Policy gradients on the rows of a stochastic sampler: DDPO, DPPO, SFT-PG."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffsamp._core.types import Conditions
from diffsamp.loops.policies import log_prob
from diffsamp.sampling import Trajectory
from diffsamp.score import ScoreFn
from diffsamp.tableau import Tableau

__all__ = ["policy_loss"]


def policy_loss(
    score_fn: ScoreFn,
    tableau: Tableau,
    trajectory: Trajectory,
    advantages: jax.Array,
    *,
    cond: Conditions | None = None,
    old: jax.Array | None = None,
    clip: float | None = 0.1,
    discount: float = 1.0,
) -> jax.Array:
    """(batch,) what policy gradients descend; differentiable in the network.

    Per row, -advantage times the ratio of probabilities, clipped as in PPO; with `clip=None` the
    score-function estimator, -advantage log p. Log-probabilities are sums over a sample's elements:
    the authors' codes take means, which is the d-th root of the ratio and why they clip at 1e-4.

    Args:
      score_fn: the network, asked again at the recorded states.
      tableau: the sampler of the run, such as `solvers.ddpm`.
      trajectory: from `diffsamp.trajectory`, by the network as it was.
      advantages: (batch,) rewards less their mean, in units of their standard deviation; per
        prompt, if there are several. Or (rows, batch), with a baseline of each row's own.
      cond: conditions, (batch, ...).
      old: (rows, batch) log-probabilities under the network as it was; None: the recorded outputs'.
      clip: how far from 1 a ratio still has a gradient.
      discount: factor from one row to the one before it: 1 for DDPO; DPPO weighs late rows more.

    Reference: Black et al. 2023 (DDPO), arXiv:2305.13301; Ren et al. 2024 (DPPO), arXiv:2409.00588;
    Fan & Lee 2023 (SFT-PG), arXiv:2301.13362.
    """
    now = log_prob(tableau, trajectory, score_fn, cond=cond)
    rows = now.shape[0]
    factor = discount ** jnp.arange(rows - 1, -1, -1, dtype=now.dtype)[:, None]
    advantages = jnp.asarray(advantages, now.dtype)
    advantages = advantages[None] if advantages.ndim == 1 else advantages
    if clip is None:
        return -jnp.sum(factor * advantages * now, axis=0)
    before = log_prob(tableau, trajectory) if old is None else old
    ratio = jnp.exp(now - jax.lax.stop_gradient(before))
    plain = advantages * ratio
    clipped = advantages * jnp.clip(ratio, 1 - clip, 1 + clip)
    return -jnp.sum(factor * jnp.minimum(plain, clipped), axis=0)
