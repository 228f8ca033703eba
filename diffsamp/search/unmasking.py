"""`unmasking`: how many tokens a masked model should unmask in each row, under a budget."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core import random
from diffsamp._core.checks import expect_choice, expect_cond, expect_int
from diffsamp._core.paths import shortest_path
from diffsamp._core.types import Array, Conditions, Key
from diffsamp.discrete import Rows, TokenFn, best_counts, executor, parallel
from diffsamp.search._cost import Estimate, affordable, expect_limit
from diffsamp.search.running import Progress, slice_batch

__all__ = ["Unmasking", "unmasking"]

logger = logging.getLogger("diffsamp.search")

_PASSES = 4  # for orders by confidence


@dataclasses.dataclass(frozen=True)
class Unmasking:
    """What `unmasking` found.

    Attributes:
      rows: {evaluations: the sampler}, for `discrete.sample` with `order`.
      order: in which positions are unmasked.
      nats: {evaluations: held-out nats per token} under the sampler's law, for a random order a
        bound on them (of the law given the order).
      cosine: the same of as many rows with the cosine's counts.
      deviation: {evaluations: standard error of the mean of nats - cosine}, sequence by sequence.
      cost: (length + 1, length + 1), [i, j] the nats of unmasking from i tokens to j in one row.
      evaluations: of the network, per sequence.
      seconds: wall-clock time, compilation included.
      estimate: what was said of the cost before it began.
    """

    rows: dict[int, Rows]
    order: str
    nats: dict[int, float]
    cosine: dict[int, float]
    deviation: dict[int, float]
    cost: np.ndarray
    evaluations: float
    seconds: float
    estimate: Estimate

    def counts(self, nfe: int) -> np.ndarray:
        """(nfe,) tokens that each row unmasks."""
        return np.asarray(self.rows[nfe].count)

    def __str__(self) -> str:
        lines = [f"order {self.order}, held-out nats per token:"]
        for n, nats in self.nats.items():
            lines.append(
                f"{n:4d} evaluations: {nats:.4f}, the cosine {self.cosine[n]:.4f} "
                f"(difference {nats - self.cosine[n]:+.4f} +- {self.deviation[n]:.4f})"
            )
        return "\n".join(lines)


def unmasking(
    network: TokenFn,
    x_0: Array,
    *,
    nfe: int | Sequence[int],
    key: Key,
    order: str = "random",
    cond: Conditions | None = None,
    held_out: int | None = None,
    moves: int = 16,
    batch: int = 256,
    evaluations: int | None = None,
    progress: Progress | None = None,
) -> Unmasking:
    """The counts of each budget under which data are likeliest, by dynamic programming.

    Every sequence of the data is unmasked one token after another in the sampler's order, and at
    each state the network is asked what unmasking 1, 2, .. tokens there would cost: minus the
    log-probability of these tokens, each by itself. The path of n rows that costs least is exact
    for a random order. In an order by confidence the states of a path that unmasks many at once
    differ from those that were measured: so costs are measured again along the cosine and along
    what was found, and what did best is changed by moving tokens from one row to another. It needs
    data and forward evaluations only, `length` a sequence for all budgets together, and at most
    4 + `moves` times their sum for orders by confidence. What it costs is logged as INFO to
    "diffsamp.search" before it begins.

    Example:
      >>> import jax, jax.numpy as jnp, diffsamp as ds
      >>> def apply(params, x, t):
      ...     return jnp.broadcast_to(params, (*x.shape, 3))
      >>> network = ds.discrete.TokenFn(apply, jnp.log(jnp.array([0.5, 0.3, 0.2])), 3)
      >>> x_0 = jax.random.randint(jax.random.key(0), (16, 6), 0, 3)
      >>> found = ds.search.unmasking(network, x_0, nfe=3, key=jax.random.key(1))
      >>> int(found.counts(3).sum())
      6

    Args:
      network: the masked model.
      x_0: (n, length) data, whole sequences.
      nfe: evaluations of the sampler, at most `length`; or several.
      key: random key of the order and of what is held out.
      order: "random", "max", "margin" or "entropy", as for `discrete.sample`.
      cond: keyword arguments for the network, every array with the leading axis n.
      held_out: how many sequences only report; None: a quarter, at least 1.
      moves: changes that are tried for each budget, for orders by confidence.
      batch: sequences at a time.
      evaluations: spend at most so many network evaluations, on fewer sequences; None: all.
      progress: called with (what, done, total).

    Raises:
      TypeError: no TokenFn, or data that are no integers.
      ValueError: masked tokens in the data, an unknown order, more rows than tokens, nothing left
        to fit, or a limit that is too low.
    """
    began = time.perf_counter()
    if not isinstance(network, TokenFn):
        raise TypeError(f"`network` must be a discrete.TokenFn; got {type(network).__name__}.")
    expect_choice(order, "order", executor.ORDERS[:-1])
    expect_int(batch, "batch", at_least=1)
    expect_int(moves, "moves", at_least=0)
    x_0 = jnp.asarray(x_0)
    if x_0.ndim != 2 or not jnp.issubdtype(x_0.dtype, jnp.integer):
        raise TypeError(f"`x_0` must be integers (n, length); got {x_0.dtype}, {x_0.shape}.")
    if bool(jnp.any((x_0 < 0) | (x_0 >= network.vocabulary))):
        raise ValueError("`x_0` must be whole sequences, every token below the vocabulary.")
    size, length = x_0.shape
    expect_cond(cond, size)
    budgets = [nfe] if isinstance(nfe, int | np.integer) else list(nfe)
    budgets = [expect_int(n, "nfe", at_least=1, at_most=length) for n in budgets]
    held = max(1, size // 4) if held_out is None else expect_int(held_out, "held_out", at_least=1)
    if held >= size:
        raise ValueError(f"`x_0` has {size} sequences, of which {held} are held out.")
    reports = 2 * sum(budgets) * held
    limit = expect_limit(evaluations) - reports
    again = 0 if order == "random" else (_PASSES + moves) * sum(budgets)
    fit = affordable("unmasking", size - held, length + again, limit - 2)
    shuffle, draws = jax.random.split(random.typed(key))
    chosen = np.asarray(jax.random.permutation(shuffle, size))
    x_0, cond = jax.tree.map(lambda v: jnp.asarray(v)[chosen], (x_0.astype(jnp.int32), cond))
    keys = random.sample_keys(draws, size)
    number = jnp.int32(executor.ORDERS.index(order))

    spent = 2  # evaluations that were timed

    def measure(counts: np.ndarray, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows, length) mean cost of k tokens at each state, (high - low,) nats in all."""
        nonlocal spent
        spent += len(counts) * (high - low)
        costs, nats = np.zeros((len(counts), length)), []
        for start in range(low, high, batch):
            stop = min(start + batch, high)
            part = slice_batch((x_0, keys, cond), start, stop)
            mean, own = _teacher(network, *part, number, jnp.asarray(counts, jnp.int32))
            costs += np.asarray(mean, np.float64) * (stop - start) / (high - low)
            nats.append(np.asarray(own, np.float64))
            if progress is not None:
                progress("unmasking data", stop, size)
        return costs, np.concatenate(nats)

    seconds = _timed(network, x_0[:1], slice_batch(cond, 0, 1))
    total = fit * (length + again) + reports
    estimate = Estimate(total, seconds * total, x_0.nbytes / 1e6)
    logger.info("%s: %s", "unmasking", estimate)

    told, _ = measure(np.ones(length, int), 0, fit)
    if not np.all(np.isfinite(told)):
        raise ValueError("the network's log-probabilities of the data are not finite.")
    cost = np.zeros((length + 1, length + 1))
    left = length - np.arange(length)
    # all that are masked there, in the mean: less noise than those that a random order takes
    curve = np.append(told[:, -1] / left, 0.0)[::-1]
    for i in range(length):
        k = np.arange(1, left[i] + 1)
        cost[i, i + 1 :] = k * curve[left[i]] if order == "random" else told[i, : left[i]]

    def along(counts: np.ndarray) -> np.ndarray:
        """The best of what costs along the paths that are found, and single moves, lead to."""
        known, tried = cost.copy(), {}

        def judge(counts: np.ndarray) -> np.ndarray:
            told, paid = measure(counts, 0, fit)
            tried[tuple(int(c) for c in counts)] = float(paid.mean())
            return told

        while len(tried) < _PASSES and tuple(counts) not in tried:
            for i, row in zip(np.cumsum(counts) - counts, judge(counts), strict=True):
                known[i, i + 1 :] = row[: length - i]
            counts = np.diff(shortest_path(known, len(counts)))
        rng = np.random.default_rng(np.asarray(jax.random.key_data(draws)))
        for _ in range(moves if len(counts) > 1 else 0):
            new = np.array(min(tried, key=lambda c: tried[c]))
            give, take = rng.choice(len(new), 2, replace=False)
            size = rng.integers(1, max(2, new[give] // 3 + 1))
            new[give], new[take] = new[give] - size, new[take] + size
            if new.min() > 0 and tuple(new) not in tried:
                judge(new)
        return np.array(min(tried, key=lambda c: tried[c]))

    made, nats, others, deviation = {}, {}, {}, {}
    for n in budgets:
        rivals = np.asarray(parallel(length, n, law="cosine").count)
        counts = best_counts(curve, n) if order == "random" else along(rivals)
        made[n] = parallel(length, n, law=counts)
        own, other = (measure(c, size - held, size)[1] / length for c in (counts, rivals))
        nats[n], others[n] = float(own.mean()), float(other.mean())
        deviation[n] = float(np.std(own - other) / np.sqrt(held))
    return Unmasking(
        made,
        order,
        nats,
        others,
        deviation,
        cost,
        spent,
        time.perf_counter() - began,
        estimate,
    )


def _timed(network: TokenFn, x_0: jax.Array, cond: Conditions | None) -> float:
    """Seconds of one evaluation."""
    call = jax.jit(lambda f, x, c: f(x, jnp.float32(1), c))
    x = jnp.full_like(x_0, network.mask)
    jax.block_until_ready(call(network, x, cond))
    began = time.perf_counter()
    jax.block_until_ready(call(network, x, cond))
    return time.perf_counter() - began


@jax.jit
def _teacher(
    network: TokenFn,
    x_0: jax.Array,
    keys: Key,
    cond: Conditions | None,
    order: jax.Array,
    counts: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Rows that unmask `counts` tokens of the data, in the order that a sampler would take.

    Returns:
      (rows, length) the mean over sequences of what the first k tokens in the order cost at each
      state, and (batch,) what those that were unmasked did.
    """
    batch, length = x_0.shape
    # one random order a sequence, so that two ways to cut it are compared in the same order
    noise = executor._uniform(executor._streams(keys, jnp.int32(0))[:, 1], (length,))

    def row(x: jax.Array, count: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        masked = x == network.mask
        told = network(x, jnp.mean(masked.astype(jnp.float32), axis=1), cond).astype(jnp.float32)
        said = jnp.take_along_axis(told, x_0[..., None], axis=2)[..., 0]
        score = executor._scores(told, noise, said, order)
        ranked = jnp.argsort(-jnp.where(masked, score, executor._FAR), axis=1)
        lost = jnp.where(masked, -said, 0.0)
        rising = jnp.cumsum(jnp.take_along_axis(lost, ranked, axis=1), axis=1)
        rank = jnp.argsort(ranked, axis=1)
        paid = jnp.sum(jnp.where(rank < count, lost, 0.0), axis=1)
        return jnp.where(masked & (rank < count), x_0, x), (jnp.mean(rising, axis=0), paid)

    start = jnp.full((batch, length), network.mask, jnp.int32)
    _, (mean, paid) = jax.lax.scan(row, start, counts)
    return mean, jnp.sum(paid, axis=0)
