"""The executor of discrete models: one `lax.scan` over rows, whose body calls the network once."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from diffsamp._core import random
from diffsamp._core.types import Array, Conditions, Key, PyTree
from diffsamp.discrete.network import TokenFn
from diffsamp.discrete.rows import Rows

__all__ = ["ORDERS", "Result", "run", "sample"]

ORDERS = ("random", "max", "margin", "entropy", "sampled")
"""How positions are ranked. All but "sampled" look at the network's distributions only."""

_FAR = -1e30


class Result(NamedTuple):
    """What a run gives.

    Attributes:
      x: (batch, length) tokens.
      evaluations: (batch,) network calls in which a sample took part.
    """

    x: jax.Array
    evaluations: jax.Array


def sample(
    network: TokenFn,
    rows: Rows,
    x: Array,
    *,
    key: Key,
    order: str = "random",
    temperature: float = 1.0,
    top_k: int | None = None,
    cond: Conditions | None = None,
) -> jax.Array:
    """Run the rows: tokens for every masked position.

    Compiled once per network, shape and number of rows: samplers and budgets padded to one length
    (`Rows.pad_together`) share the program.

    Examples:
      >>> import jax, jax.numpy as jnp, diffsamp as ds
      >>> def apply(params, x, t):
      ...     return jnp.broadcast_to(params, (*x.shape, 3))
      >>> network = ds.discrete.TokenFn(apply, jnp.log(jnp.array([0.5, 0.3, 0.2])), 3)
      >>> x = jnp.full((2, 8), network.mask)
      >>> rows = ds.discrete.ancestral("cosine", 4)
      >>> ds.discrete.sample(network, rows, x, key=jax.random.key(0)).shape
      (2, 8)

    Args:
      network: what tokens may be.
      rows: the sampler.
      x: (batch, length) integers, the network's mask id where a token is wanted; the others are a
        prompt and stay. For uniform noise: random tokens, which all may change.
      key: one key, or one per sample; a sample depends on nothing else.
      order: of `ORDERS`, for rows that count. "random"; "max", the probability of the likeliest
        token; "margin", its distance to the second; "entropy", the smallest; "sampled", the
        probability of the token that was drawn (MaskGIT, LLaDA with temperature), which favours
        likely tokens: with one position a row the others give the network's law exactly, this one
        does not.
      temperature: of the tokens' distribution; 0 takes the likeliest. Confidences are untempered.
      top_k: keep so many of the likeliest tokens; None: all.
      cond: keyword arguments for the network.

    Returns:
      (batch, length) int32; positions that no row has unmasked keep the mask.

    Raises:
      TypeError: no TokenFn, or x not integers.
      ValueError: an unknown order.
    """
    return run(
        network, rows, x, key=key, order=order, temperature=temperature, top_k=top_k, cond=cond
    ).x


def run(
    network: TokenFn,
    rows: Rows,
    x: Array,
    *,
    key: Key,
    order: str = "random",
    temperature: float = 1.0,
    top_k: int | None = None,
    cond: Conditions | None = None,
) -> Result:
    """`sample`, with the evaluations that each sample took; arguments as there."""
    if not isinstance(network, TokenFn):
        raise TypeError(
            f"`network` must be a discrete.TokenFn(apply, params, vocabulary); got "
            f"{type(network).__name__}."
        )
    if order not in ORDERS:
        raise ValueError(f"`order` must be one of {ORDERS}; got {order!r}.")
    x = jnp.asarray(x)
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"`x` must be integers (batch, length); got {x.dtype} of shape {x.shape}.")
    single = jax.tree.map(
        lambda v: np.asarray(v, np.float32) if np.asarray(v).dtype == np.float64 else v, rows
    )
    return _run(
        network,
        jax.tree.map(jnp.asarray, single),
        x.astype(jnp.int32),
        random.sample_keys(key, x.shape[0]),
        jnp.int32(ORDERS.index(order)),
        jnp.float32(temperature),
        cond,
        top_k=top_k,
    )


class _State(NamedTuple):
    x: jax.Array
    t: jax.Array
    said: jax.Array  # log-probability of each token when it was drawn
    evaluations: jax.Array


@functools.partial(jax.jit, static_argnames="top_k")
def _run(network, rows, x, keys, order, temperature, cond, *, top_k):
    mask, count = network.mask, rows.unmask.shape[0]
    prompt = x != mask
    settings = (order, temperature, top_k)
    alive = (rows.unmask > 0) | (rows.remask > 0) | (rows.count > 0)
    alive |= jnp.isfinite(rows.threshold) | jnp.isfinite(rows.bound) | rows.uniform

    def body(state: _State, n: jax.Array) -> tuple[_State, None]:
        row = jax.tree.map(lambda v: v[n], rows)
        masked = state.x == mask
        place = jnp.arange(x.shape[1])[None]
        inside = (place >= row.block[0]) & (place < row.block[1])
        wants = jnp.any(masked & inside, axis=1) | row.uniform | (row.remask > 0)
        wants = wants & alive[n]

        def go() -> _State:
            return _row(network, rows, n, state, (prompt, inside), keys, settings, cond)

        new = lax.cond(jnp.any(wants), go, lambda: state)
        # a sample that asks nothing stays as it is, whatever others of its batch do
        new = jax.tree.map(
            lambda a, b: jnp.where(wants.reshape((-1,) + (1,) * (a.ndim - 1)), a, b), new, state
        )
        evaluations = state.evaluations + wants.astype(jnp.int32)
        return new._replace(evaluations=evaluations), None

    start = _State(
        x,
        jnp.ones(x.shape[0], jnp.float32),
        jnp.zeros(x.shape, jnp.float32),
        jnp.zeros(x.shape[0], jnp.int32),
    )
    final, _ = lax.scan(body, start, jnp.arange(count))
    return Result(final.x, final.evaluations)


def _row(network, rows, n, state, places, keys, settings, cond):
    """One row of every sample: ask, draw tokens, choose positions, mask again."""
    row = jax.tree.map(lambda v: v[n], rows)
    (prompt, inside), (order, temperature, top_k) = places, settings
    mask, length = network.mask, state.x.shape[1]
    masked = state.x == mask
    own = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, n), 4))(keys)

    def uniforms(i: int, shape: tuple[int, ...]) -> jax.Array:
        return jax.vmap(lambda k: jax.random.uniform(k, shape, jnp.float32))(own[:, i])

    # the time: the row's, or each sample's own first-hitting time, (1 - alpha) U^(1 / masked)
    left = jnp.maximum(jnp.sum(masked, axis=1), 1).astype(jnp.float32)
    hit = state.t * uniforms(3, ()) ** (1 / left)
    t = jnp.where(row.hitting, hit, row.times)
    told = network(state.x, t, cond)
    tokens, log_p = _tokens(told, own[:, 0], temperature, top_k)

    # how sure the network is, position by position
    top = jnp.sort(jnp.exp(told), axis=-1)
    entropy = -jnp.sum(jnp.exp(told) * jnp.maximum(told, _FAR), axis=-1)
    noise = -jnp.log(-jnp.log(jnp.clip(uniforms(1, (length,)), 1e-7, 1 - 1e-7)))
    scores = jnp.stack([noise, jnp.log(top[..., -1]), top[..., -1] - top[..., -2], -entropy, log_p])
    score = scores[order] + jnp.where(order == 0, 0.0, row.noise) * noise
    free = masked & inside
    score = jnp.where(free, score, _FAR)
    rank = jnp.argsort(jnp.argsort(-score, axis=1), axis=1)
    sure = jnp.where(free, entropy, jnp.inf)
    by_entropy = jnp.argsort(sure, axis=1)
    rising = jnp.take_along_axis(jnp.where(free, entropy, 0.0), by_entropy, axis=1)
    within = jnp.cumsum(rising, axis=1) - lax.cummax(rising, axis=1) <= row.bound
    within = jnp.take_along_axis(within, jnp.argsort(by_entropy, axis=1), axis=1)
    coin = uniforms(2, (2, length))
    chosen = (coin[:, 0] < row.unmask) | (rank < row.count)
    chosen |= (top[..., -1] >= row.threshold) | within
    chosen &= free
    x = jnp.where(chosen, tokens, state.x)
    said = jnp.where(chosen, log_p, state.said)

    # tokens that were there before the row, and no prompt, may be masked again
    earlier = ~masked & ~prompt & inside
    weight = jax.nn.softmax(jnp.where(earlier, -jnp.exp(state.said), -jnp.inf), axis=1)
    again = jnp.where(row.confident, jnp.nan_to_num(weight) * row.remask, row.remask)
    x = jnp.where(earlier & (coin[:, 1] < again), mask, x)
    drawn = _posterior(told, state.x, rows, n, own[:, 0])
    x = jnp.where(row.uniform, jnp.where(inside, drawn, state.x), x)
    return _State(x, jnp.where(row.hitting, hit, state.t), said, state.evaluations)


def _tokens(
    told: jax.Array, keys: Key, temperature: jax.Array, top_k: int | None
) -> tuple[jax.Array, jax.Array]:
    """Tokens drawn at a temperature, and their untempered log-probability."""
    logits = told
    if top_k is not None:
        least = lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < least, _FAR, logits)
    tempered = logits / jnp.maximum(temperature, 1e-6)
    drawn = _categorical(keys, tempered)
    drawn = jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1))
    return drawn, jnp.take_along_axis(told, drawn[..., None], axis=-1)[..., 0]


def _categorical(keys: Key, logits: jax.Array) -> jax.Array:
    """Without the bias of single-precision Gumbel noise, which cuts off probabilities of 1e-7."""
    draw = functools.partial(jax.random.categorical, mode="high")
    return jax.vmap(lambda k, v: draw(k, v))(keys, logits).astype(jnp.int32)


def _posterior(told: jax.Array, x: jax.Array, rows: PyTree, n: jax.Array, keys: Key) -> jax.Array:
    """Tokens of the next level under uniform noise; see `samplers.uniform`."""
    alpha, above = rows.alpha[n], rows.alpha[n + 1]
    size = told.shape[-1]
    here = jax.nn.one_hot(x, size, dtype=told.dtype)
    a = alpha / jnp.maximum(above, 1e-30)
    ratio = jnp.exp(told) / jnp.maximum(alpha * here + (1 - alpha) / size, 1e-30)
    total = jnp.sum(ratio, axis=-1, keepdims=True)
    law = (a * here + (1 - a) / size) * (above * ratio + (1 - above) / size * total)
    return _categorical(keys, jnp.log(jnp.maximum(law, 1e-37)))
