"""Densities known up to a constant: posterior means by short chains, and so a network for samplers.

Reverse diffusion Monte Carlo: the score of p noised to (alpha, sigma) needs only E[x_0 | x], a mean
under p(x_0) N(x; alpha x_0, sigma^2), which is easier to sample than p: at high noise the Gaussian
is flat and the chains begin from the prior, at low noise it is narrow and they hardly move.

Reference: Huang et al. 2023, arXiv:2307.02037.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffsamp._core import random
from diffsamp._core.checks import expect_int
from diffsamp._core.types import Array, Key, PyTree
from diffsamp.evaluation._target import Target, column

__all__ = ["Unnormalised", "unnormalised"]

_STEP = 0.5  # of the Langevin proposal, in units of the chain's own variance


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Unnormalised(Target):
    """A density known up to a constant; build it with `unnormalised`."""

    key: Key
    mean: Array
    scale: Array
    log_density: Callable[[jax.Array], jax.Array] = dataclasses.field(metadata={"static": True})
    chains: int = dataclasses.field(metadata={"static": True})
    steps: int = dataclasses.field(metadata={"static": True})

    def posterior(self, x: PyTree, alpha: Array, sigma: Array) -> tuple[Array, Array]:
        x = jnp.asarray(x, jnp.float32)
        alpha, sigma = (jnp.broadcast_to(column(v, x), x.shape[:1]) for v in (alpha, sigma))
        # every state and level has random numbers of its own, whatever else is in the batch
        bits = jax.lax.bitcast_convert_type(jnp.concatenate([x, sigma[:, None]], 1), jnp.uint32)
        place = jnp.arange(1, bits.shape[1] + 1, dtype=jnp.uint32)
        mixed = jnp.sum(bits * place[None], axis=1)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(random.typed(self.key), mixed)
        data = jax.vmap(self._mean)(keys, x, alpha, sigma)
        return data, (x - alpha[:, None] * data) / sigma[:, None]

    def _mean(self, key: Key, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        """E[x_0 | x] of one sample: importance sampling, then Metropolis-adjusted Langevin."""
        mean, scale = (jnp.asarray(v, x.dtype) for v in (self.mean, self.scale))
        # were the target N(mean, scale^2), this would be its posterior
        total = alpha**2 * scale**2 + sigma**2
        centre = mean + alpha * scale**2 / total * (x - alpha * mean)
        variance = scale**2 * sigma**2 / total
        keys = jax.random.split(key, 3)
        z = jax.random.normal(keys[0], (self.chains, x.shape[0]), x.dtype)
        start = centre[None] + jnp.sqrt(variance)[None] * z

        def joint(x_0: jax.Array) -> jax.Array:
            away = x[None] - alpha * x_0
            return self.log_density(x_0) - 0.5 * jnp.sum(away**2, axis=1) / sigma**2

        guess = -0.5 * jnp.sum(z**2, axis=1)
        share = jax.nn.softmax(jnp.nan_to_num(joint(start) - guess, nan=-jnp.inf, neginf=-1e30))
        places = jnp.arange(self.chains, dtype=x.dtype) + jax.random.uniform(keys[1], dtype=x.dtype)
        index = jnp.searchsorted(jnp.cumsum(share), places / self.chains)
        z = start[jnp.minimum(index, self.chains - 1)]
        both = jax.value_and_grad(lambda v: jnp.sum(joint(v)))
        step = _STEP * variance[None]

        def slope(v: jax.Array) -> tuple[jax.Array, jax.Array]:
            return joint(v), both(v)[1]

        def body(n: Array, carry: PyTree) -> PyTree:
            z, value, gradient, added = carry
            own = jax.random.split(jax.random.fold_in(keys[2], n), 2)
            noise = jax.random.normal(own[0], z.shape)
            ahead = z + step * gradient
            new = ahead + jnp.sqrt(2 * step) * noise
            new_value, new_gradient = slope(new)
            back = z - new - step * new_gradient
            ratio = new_value - value - jnp.sum(back**2 / (4 * step) - 0.5 * noise**2, axis=1)
            go = jnp.log(jax.random.uniform(own[1], ratio.shape)) < ratio
            z, gradient = (
                jnp.where(go[:, None], a, b) for a, b in ((new, z), (new_gradient, gradient))
            )
            return z, jnp.where(go, new_value, value), gradient, added + jnp.mean(z, axis=0)

        begin = (z, *slope(z), jnp.mean(z, axis=0))
        *_, added = jax.lax.fori_loop(0, self.steps, body, begin)
        return added / (self.steps + 1)

    def log_prob(self, x: PyTree, alpha: Array = 1.0, sigma: Array = 0.0) -> Array:
        """The density up to its constant; without noise only."""
        if jnp.ndim(sigma) or jnp.ndim(alpha) or sigma != 0 or alpha != 1:
            raise ValueError("the noised density of an unnormalised target is not known.")
        return self.log_density(jnp.asarray(x))

    def sample(self, key: Key, n: int) -> jax.Array:
        """Not known: sample its network, with `ds.sample` and `score_fn(process)`."""
        raise NotImplementedError(
            "an unnormalised target has no sampler of its own: run ds.sample on its "
            "score_fn(process), with a stochastic tableau."
        )


def unnormalised(
    log_prob: Callable[[jax.Array], jax.Array],
    *,
    key: Key,
    mean: Array,
    scale: Array,
    chains: int = 64,
    steps: int = 16,
) -> Unnormalised:
    """A target known by its log-density up to a constant; its network costs chains, no training.

    Examples:
      >>> import jax, jax.numpy as jnp, diffsamp as ds
      >>> def log_prob(x):  # two modes, three to one
      ...     one, two = (-8 * jnp.sum((x - m) ** 2, axis=1) for m in (1.0, -1.0))
      ...     return jnp.logaddexp(one + jnp.log(3.0), two)
      >>> target = ds.targets.unnormalised(
      ...     log_prob, key=jax.random.key(0), mean=jnp.zeros(2), scale=jnp.full(2, 1.2)
      ... )
      >>> process = ds.processes.edm(0.05, 10.0)
      >>> tableau = ds.solvers.ddpm(process, ds.schedules.logsnr(process, 20))
      >>> x_T = process.prior_sample(jax.random.key(1), (4, 2))
      >>> ds.sample(target.score_fn(process), tableau, x_T, key=jax.random.key(2)).shape
      (4, 2)

    Args:
      log_prob: (n, dim) -> (n,), differentiable; compared by identity.
      key: of the chains: the network is a fixed function, with other random numbers at every state.
      mean: (dim,) roughly the target's.
      scale: (dim,) or a number: roughly its standard deviation, rather too large; where chains
        begin when there is no signal yet.
      chains: for each sample, at every call.
      steps: of each chain, a gradient of log_prob each.

    Raises:
      ValueError: a scale that is not positive, or numbers below 1.
    """
    chains, steps = (
        expect_int(v, n, at_least=1) for v, n in ((chains, "chains"), (steps, "steps"))
    )
    mean = jnp.asarray(mean, jnp.float32)
    scale = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), mean.shape)
    if mean.ndim != 1 or not bool(jnp.all(scale > 0)):
        raise ValueError("`mean` must have shape (dim,), and `scale` be positive.")
    return Unnormalised(key, mean, scale, log_prob, chains, steps)
