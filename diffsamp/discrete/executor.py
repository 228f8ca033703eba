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
    x = jnp.asarray(x)
    made, number = _prepared(network, rows, x, order, x.ndim == 2)
    return _run(
        network,
        made,
        x.astype(jnp.int32),
        random.sample_keys(key, x.shape[0]),
        number,
        jnp.float32(temperature),
        cond,
        top_k=top_k,
    )


def _prepared(
    network: TokenFn, rows: Rows, x: jax.Array, order: str, fits: bool
) -> tuple[Rows, jax.Array]:
    """The rows on the device and the order's number, after what a call may get wrong."""
    if not isinstance(network, TokenFn):
        raise TypeError(
            f"`network` must be a discrete.TokenFn(apply, params, vocabulary); got "
            f"{type(network).__name__}."
        )
    if order not in ORDERS:
        raise ValueError(f"`order` must be one of {ORDERS}; got {order!r}.")
    if not fits or not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"`x` must be integers (batch, length); got {x.dtype} of shape {x.shape}.")
    single = jax.tree.map(
        lambda v: np.asarray(v, np.float32) if np.asarray(v).dtype == np.float64 else v, rows
    )
    return jax.tree.map(jnp.asarray, single), jnp.int32(ORDERS.index(order))


class _State(NamedTuple):
    x: jax.Array
    t: jax.Array
    said: jax.Array  # log-probability of each token when it was drawn
    evaluations: jax.Array


@functools.partial(jax.jit, static_argnames="top_k")
def _run(network, rows, x, keys, order, temperature, cond, *, top_k):
    count, prompt = rows.unmask.shape[0], x != network.mask
    alive = _alive(rows)

    def body(state: _State, n: jax.Array) -> tuple[_State, None]:
        wants = _wants(network, rows, n, state) & alive[n]

        def go() -> _State:
            asked = _ask(network, rows, n, state, keys, cond)
            return _move(network, rows, n, state, asked, prompt, keys, (order, temperature, top_k))

        new = lax.cond(jnp.any(wants), go, lambda: state)
        return _keep(wants, new, state), None

    final, _ = lax.scan(body, _start(x), jnp.arange(count))
    return Result(final.x, final.evaluations)


def _start(x: jax.Array) -> _State:
    batch = x.shape[0]
    return _State(
        x,
        jnp.ones(batch, jnp.float32),
        jnp.zeros(x.shape, jnp.float32),
        jnp.zeros(batch, jnp.int32),
    )


def _alive(rows: Rows) -> jax.Array:
    """(rows,) whether a row does anything."""
    alive = (rows.unmask > 0) | (rows.remask > 0) | (rows.count > 0)
    return alive | jnp.isfinite(rows.threshold) | jnp.isfinite(rows.bound) | rows.uniform


def _inside(rows: Rows, n: jax.Array, length: int) -> jax.Array:
    place = jnp.arange(length)[None]
    return (place >= rows.block[n, 0]) & (place < rows.block[n, 1])


def _wants(network: TokenFn, rows: Rows, n: jax.Array, state: _State) -> jax.Array:
    """(batch,) whether a sample asks the network in this row."""
    masked = (state.x == network.mask) & _inside(rows, n, state.x.shape[1])
    return jnp.any(masked, axis=1) | rows.uniform[n] | (rows.remask[n] > 0)


def _keep(wants: jax.Array, new: _State, old: _State) -> _State:
    """A sample that asks nothing stays as it is, whatever others of its batch do."""
    new = jax.tree.map(
        lambda a, b: jnp.where(wants.reshape((-1,) + (1,) * (a.ndim - 1)), a, b), new, old
    )
    return new._replace(evaluations=old.evaluations + wants.astype(jnp.int32))


def _uniform(keys: Key, shape: tuple[int, ...]) -> jax.Array:
    """(batch, *shape) uniform numbers of one of a row's streams."""
    return jax.vmap(lambda k: jax.random.uniform(k, shape, jnp.float32))(keys)


def _order_noise(keys: Key, length: int) -> jax.Array:
    """(batch, length) noise of the order."""
    return -jnp.log(-jnp.log(jnp.clip(_uniform(keys, (length,)), 1e-7, 1 - 1e-7)))


def _streams(keys: Key, n: jax.Array) -> Key:
    """(batch, 4): of tokens, of the order's noise, of coins, of the time."""
    return jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, n), 4))(keys)


def _ask(
    network: TokenFn,
    rows: Rows,
    n: jax.Array,
    state: _State,
    keys: Key,
    cond: Conditions | None,
) -> tuple[jax.Array, jax.Array]:
    """What the network says, and the time: the row's, or each sample's own first-hitting time."""
    masked = state.x == network.mask
    # (1 - alpha) U^(1 / masked)
    left = jnp.maximum(jnp.sum(masked, axis=1), 1).astype(jnp.float32)
    hit = state.t * _uniform(_streams(keys, n)[:, 3], ()) ** (1 / left)
    told = network(state.x, jnp.where(rows.hitting[n], hit, rows.times[n]), cond)
    return told.astype(jnp.float32), hit


def _move(network, rows, n, state, asked, prompt, keys, settings):
    """The rest of a row: draw tokens, choose positions, mask again."""
    row = jax.tree.map(lambda v: v[n], rows)
    told, hit = asked
    streams = _streams(keys, n)

    def anew() -> tuple[jax.Array, jax.Array]:
        drawn = _posterior(told, state.x, rows, n, streams[:, 0])
        return jnp.where(_inside(rows, n, state.x.shape[1]), drawn, state.x), state.said

    def unmasked() -> tuple[jax.Array, jax.Array]:
        return _unmasked(network, rows, n, state, told, prompt, streams, settings)

    x, said = lax.cond(row.uniform, anew, unmasked)
    return _State(x, jnp.where(row.hitting, hit, state.t), said, state.evaluations)


def _unmasked(network, rows, n, state, told, prompt, streams, settings):
    """Tokens after a row that unmasks and masks again, and what the network said of them."""
    row, (order, temperature, top_k) = jax.tree.map(lambda v: v[n], rows), settings
    mask, length = network.mask, state.x.shape[1]
    masked, inside = state.x == mask, _inside(rows, n, length)
    free = masked & inside
    tokens, log_p = _tokens(told, streams[:, 0], temperature, top_k)

    # what a row does not ask is not computed: beside a small network, sorting and entropies show
    def first() -> jax.Array:
        noise = _order_noise(streams[:, 1], length)
        score = _scores(told, noise, log_p, order) + jnp.where(order == 0, 0.0, row.noise) * noise
        ranked = jnp.argsort(-jnp.where(free, score, _FAR), axis=1)
        return _put_back(ranked, jnp.arange(length)[None] < row.count)

    def certain() -> jax.Array:
        return jnp.exp(jnp.max(told, axis=-1)) >= row.threshold

    def bounded() -> jax.Array:
        entropy = _entropy(told)
        by_entropy = jnp.argsort(jnp.where(free, entropy, jnp.inf), axis=1)
        rising = jnp.take_along_axis(jnp.where(free, entropy, 0.0), by_entropy, axis=1)
        within = jnp.cumsum(rising, axis=1) - lax.cummax(rising, axis=1) <= row.bound
        return _put_back(by_entropy, within)

    def none() -> jax.Array:
        return jnp.zeros(free.shape, bool)

    coin = _uniform(streams[:, 2], (2, length))
    chosen = coin[:, 0] < row.unmask
    chosen |= lax.cond(row.count > 0, first, none)
    chosen |= lax.cond(jnp.isfinite(row.threshold), certain, none)
    chosen |= lax.cond(jnp.isfinite(row.bound), bounded, none)
    chosen &= free
    x = jnp.where(chosen, tokens, state.x)
    said = jnp.where(chosen, log_p, state.said)

    # tokens that were there before the row, and no prompt, may be masked again
    earlier = ~masked & ~prompt & inside
    weight = jax.nn.softmax(jnp.where(earlier, -jnp.exp(state.said), -jnp.inf), axis=1)
    again = jnp.where(row.confident, jnp.nan_to_num(weight) * row.remask, row.remask)
    return jnp.where(earlier & (coin[:, 1] < again), mask, x), said


def _put_back(index: jax.Array, values: jax.Array) -> jax.Array:
    """What is in the order of `index`, (batch, length), at its own positions."""
    values = jnp.broadcast_to(values, index.shape)
    return jnp.put_along_axis(jnp.zeros_like(values), index, values, axis=1, inplace=False)


def _entropy(told: jax.Array) -> jax.Array:
    return -jnp.sum(jnp.exp(told) * jnp.maximum(told, _FAR), axis=-1)


def _scores(told: jax.Array, noise: jax.Array, log_p: jax.Array, order: jax.Array) -> jax.Array:
    """(batch, length) what positions are ranked by, the largest first."""

    def margin() -> jax.Array:
        top = lax.top_k(jnp.exp(told), 2)[0]
        return top[..., 0] - top[..., 1]

    ways = (lambda: noise, lambda: jnp.max(told, axis=-1), margin)
    return lax.switch(order, (*ways, lambda: -_entropy(told), lambda: log_p))


def _tokens(
    told: jax.Array, keys: Key, temperature: jax.Array, top_k: int | None
) -> tuple[jax.Array, jax.Array]:
    """Tokens drawn at a temperature, and their untempered log-probability."""
    logits = told
    if top_k is not None:
        least = lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < least, _FAR, logits)
    # the noise by itself: fused into the search for the largest it is made one number at a time
    scores = lax.cond(
        temperature > 0,
        lambda: logits / jnp.maximum(temperature, 1e-6) + _gumbels(keys, logits),
        lambda: logits,
    )
    drawn = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    return drawn, jnp.take_along_axis(told, drawn[..., None], axis=-1)[..., 0]


def _categorical(keys: Key, logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits + _gumbels(keys, logits), axis=-1).astype(jnp.int32)


def _gumbels(keys: Key, like: jax.Array) -> jax.Array:
    """Without the bias of single-precision Gumbel noise, which cuts off probabilities of 1e-7."""
    draw = functools.partial(jax.random.gumbel, shape=like.shape[1:], dtype=like.dtype, mode="high")
    return jax.vmap(lambda k: draw(k))(keys)


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
