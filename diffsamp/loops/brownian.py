"""Noise that runs of different step counts share: one Brownian path per sample key."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from diffsamp._core.numeric import silence
from diffsamp._core.random import Brownian
from diffsamp._core.types import Key
from diffsamp.tableau import Tableau

__all__ = ["brownian_key"]


@silence
def brownian_key(key: Key, tableau: Tableau) -> Brownian:
    """A key whose noise does not depend on how many steps a sampler takes.

    With it a row draws the increment of a Brownian path, fixed by the sample's key, over the levels
    that the row crosses, in place of a number of its own. Samples of one key at 20, 40 and 80 steps
    are then close, and converge to the solution of one stochastic equation; their law is what it
    was. A sampler whose only noise is the reverse SDE's own (`ddpm`, the SDE forms of DPM-Solver++
    and SEEDS at tau = 1) draws the same increments summed, whatever its steps.

    Rows that go up in noise (Restart), over levels that are already used, or by less than the grid
    of the path, 0.0004 in log-SNR, draw as with the key itself. A row's noise costs 32 draws.

    Examples:
      >>> import jax, diffsamp as ds
      >>> process = ds.processes.edm()
      >>> network = ds.targets.gaussian([0.0, 1.0], 0.1).score_fn(process)
      >>> x_T = process.prior_sample(jax.random.key(0), (4, 2))
      >>> tableau = ds.solvers.ddpm(process, ds.schedules.karras(process, 40))
      >>> key = ds.brownian_key(jax.random.key(1), tableau)
      >>> ds.sample(network, tableau, x_T, key=key).shape
      (4, 2)

    Args:
      key: a key, or one per sample, as for `diffsamp.sample`.
      tableau: the sampler it is for; its levels may be traced.

    Returns:
      What to pass as `key` to `sample`, `trajectory`, `init` and `parallel.sample_parallel`.

    Raises:
      ValueError: tableaux stacked per sample.
    """
    if np.ndim(tableau.times) != 1:
        raise ValueError("brownian_key takes one tableau; make it before stacking them.")
    log_snr = jnp.log(jnp.asarray(tableau.alpha)) - jnp.log(jnp.asarray(tableau.sigma))
    last, reach = 2**Brownian.LEVELS - 1, Brownian.REACH
    place = jnp.clip((log_snr + reach) / (2 * reach), 0, 1) * (last + 1)
    index = jnp.minimum(jnp.round(jnp.nan_to_num(place, nan=0.0)), last).astype(jnp.int32)
    c = jnp.asarray(tableau.c)
    noisy = jnp.any(c.reshape(c.shape[0], -1) != 0, axis=1)
    end = jnp.where(noisy & (index[:-1] < index[1:]), index[1:], -1)
    used = lax.cummax(jnp.concatenate([index[:1], end[:-1]]))
    return Brownian(key, used, end)
