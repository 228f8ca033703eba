"""Particles of token sequences: a discrete model's rows, weighed and resampled between them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from diffsamp._core import random
from diffsamp._core.checks import expect_int
from diffsamp._core.types import Array, Conditions, Key, PyTree
from diffsamp.discrete import Rows, TokenFn, executor
from diffsamp.predictions import Level
from diffsamp.steering._weights import normalised, particle_keys, resample, spread, take
from diffsamp.steering.particles import Steered
from diffsamp.steering.potentials import Potential

__all__ = ["sample_tokens"]

_FORESEEN = 0xF0  # the first stream of completions, beside a row's four


def sample_tokens(
    network: TokenFn,
    rows: Rows,
    x: Array,
    *,
    key: Key,
    potential: Potential,
    particles: int,
    completions: int = 0,
    threshold: float = 0.5,
    order: str = "random",
    temperature: float = 1.0,
    top_k: int | None = None,
    cond: Conditions | None = None,
    select_one: bool = False,
) -> Steered:
    """Sample tokens with particles that carry weights, as `sample` does for tableaux.

    The law that is tilted is that of the rows (`discrete.law`), not of the data; one position a row
    makes them agree. One call of the network a row, on batch * particles sequences. Whatever the
    potential foresees, the weights at the end hold what it says of the finished sequence, so that
    log Z is unbiased for any number of particles.

    Examples:
      >>> import jax, jax.numpy as jnp, diffsamp as ds
      >>> def apply(params, x, t):
      ...     return jnp.broadcast_to(params, (*x.shape, 3))
      >>> network = ds.discrete.TokenFn(apply, jnp.log(jnp.array([0.5, 0.3, 0.2])), 3)
      >>> def zeros(x_0, level, cond):
      ...     return jnp.sum(x_0 == 0, axis=1).astype(jnp.float32)
      >>> x, log_weights, log_Z = ds.steering.sample_tokens(
      ...     network, ds.discrete.ancestral("linear", 4), jnp.full((2, 8), network.mask),
      ...     key=jax.random.key(0), potential=ds.steering.reward(zeros), particles=16,
      ... )
      >>> x.shape, log_weights.shape, log_Z.shape
      ((2, 16, 8), (2, 16), (2,))

    Args:
      network: what tokens may be; a guided one is a network like any other.
      rows: the sampler.
      x: (batch, length) integers with the mask id where a token is wanted, from which all particles
        of a sample begin; or (batch, particles, length).
      key: one key, or one per sample: a sample does not depend on its batch.
      potential: `reward` or `twist`, whose f is given whole sequences, (batch * particles, length),
        and the level of the row: t, alpha the share that is unmasked, sigma = 1 - alpha.
      particles: how many per sample.
      completions: what f is asked before the end: 0, with the likeliest token at each masked
        position; n, the mean of exp f over n sequences whose masked tokens are drawn, each from its
        own distribution.
      threshold: resample a sample's particles where their effective number is below this share; 1
        always resamples, 0 never does.
      order: as for `discrete.sample`.
      temperature: as for `discrete.sample`; positive, else particles stay copies of each other.
      top_k: as for `discrete.sample`.
      cond: keyword arguments for the network, one entry per sample; also given to f.
      select_one: resample to copies of one particle, drawn by its weight: with `threshold=1` SVDD,
        `particles` proposals a row of which the value chooses one.

    Returns:
      (x, log_weights, log_Z), and `.ess`.

    Raises:
      TypeError: no TokenFn, or x not integers.
      ValueError: an unknown order, `scores`, a temperature that is not positive.

    Reference: Singhal et al. 2025, arXiv:2501.06848; Li et al. 2024 (SVDD), arXiv:2408.08252,
    sections 4 and 5.
    """
    expect_int(particles, "particles", at_least=1)
    expect_int(completions, "completions", at_least=0)
    x = jnp.asarray(x)
    whole = x.ndim == 3 and x.shape[1] == particles
    made, number = executor._prepared(network, rows, x, order, x.ndim == 2 or whole)
    if potential.kind != "value":
        raise ValueError("tokens have no scores to compose: take steering.reward or twist.")
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive, for particles; got {temperature}.")
    if not 0 <= threshold <= 1:
        raise ValueError(f"`threshold` must lie in [0, 1]; got {threshold}.")
    x = x.reshape(-1, x.shape[-1]) if whole else jnp.repeat(x, particles, axis=0)
    keys = random.sample_keys(key, x.shape[0] // particles)
    found = _run(
        network,
        potential,
        made,
        x.astype(jnp.int32),
        keys,
        cond,
        jnp.float32(threshold),
        (number, jnp.float32(temperature)),
        top_k=top_k,
        particles=particles,
        completions=completions,
        select_one=select_one,
    )
    return Steered(*found)


@functools.partial(jax.jit, static_argnames=("top_k", "particles", "completions", "select_one"))
def _run(
    network: TokenFn,
    potential: Potential,
    rows: Rows,
    x: jax.Array,
    keys: Key,
    cond: Conditions | None,
    threshold: Array,
    settings: tuple[Array, Array],
    *,
    top_k: int | None,
    particles: int,
    completions: int,
    select_one: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    batch, count, prompt = keys.shape[0], rows.unmask.shape[0], x != network.mask
    alive = executor._alive(rows)
    cond = spread(cond, batch, particles)
    own_keys, draws = particle_keys(keys, particles)

    def value(state: PyTree, told: jax.Array, n: jax.Array, level: Level) -> jax.Array:
        """What the potential says of the sequences as they can be foreseen."""
        free = (state.x == network.mask) | rows.uniform[n]

        def of(tokens: jax.Array) -> jax.Array:
            seen: jax.Array = potential.value(jnp.where(free, tokens, state.x), level, cond)
            return seen

        if completions == 0:
            return of(jnp.argmax(told, axis=-1).astype(jnp.int32))
        rows_own = jax.vmap(jax.random.fold_in, (0, None))(own_keys, n)

        def drawn(i: int) -> jax.Array:
            streams = jax.vmap(jax.random.fold_in, (0, None))(rows_own, _FORESEEN + i)
            return executor._categorical(streams, told)

        several = [of(drawn(i)) for i in range(completions)]
        mean: jax.Array = jax.nn.logsumexp(jnp.stack(several), axis=0) - jnp.log(
            jnp.asarray(completions, several[0].dtype)
        )
        return mean

    def row(carry: PyTree, wants: jax.Array, n: jax.Array) -> PyTree:
        state, log_w, log_Z, memory = carry
        asked = executor._ask(network, rows, n, state, own_keys, cond)
        level = Level(rows.times[n], rows.alpha[n], 1 - rows.alpha[n])
        seen = value(state, asked[0], n, level)
        log_w = log_w + jnp.where(wants, seen - memory, 0)
        memory = jnp.where(wants, seen, memory)
        any_asks = jnp.any(wants.reshape(batch, particles), axis=1)
        log_w, log_Z, index = resample(
            log_w, log_Z, draws, n, any_asks, threshold, particles, select_one
        )
        state, asked, memory, wants = jax.tree.map(
            functools.partial(take, index), (state, asked, memory, wants)
        )
        new = executor._move(network, rows, n, state, asked, prompt, own_keys, (*settings, top_k))
        return executor._keep(wants, new, state), log_w, log_Z, memory

    def body(carry: PyTree, n: jax.Array) -> tuple[PyTree, None]:
        wants = executor._wants(network, rows, n, carry[0]) & alive[n]
        go = functools.partial(row, carry, wants, n)
        return jax.lax.cond(jnp.any(wants), go, lambda: carry), None

    start = jnp.zeros(batch * particles, jnp.float32)
    carry = (executor._start(x), start, jnp.zeros(batch, jnp.float32), start)
    (state, log_w, log_Z, memory), _ = jax.lax.scan(body, carry, jnp.arange(count))
    end = Level(rows.times[-1], rows.alpha[-1], 1 - rows.alpha[-1])
    log_w = log_w + potential.value(state.x, end, cond) - memory
    x = state.x.reshape(batch, particles, -1)
    return x, *normalised(log_w, log_Z, particles)
