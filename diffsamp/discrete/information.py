"""How many tokens to unmask together: what it costs, measured, and the best counts under a budget.

With e(m) the mean entropy (the network's loss) of a masked token where m are masked, unmasking k of
m at random together costs k e(m) nats where one after another would cost e(m) + e(m - 1) + .. +
e(m - k + 1). The difference is the total correlation that is lost: for an exact network the sum
over rows is exactly the divergence of the sampler's law from the data's, for random order. So the
best counts are a shortest path.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core import random
from diffsamp._core.checks import expect_int
from diffsamp._core.paths import shortest_path
from diffsamp._core.types import Array, Conditions, Key
from diffsamp.discrete.network import TokenFn

__all__ = ["best_counts", "excess", "token_entropies"]


def token_entropies(
    network: TokenFn,
    x_0: Array,
    *,
    key: Key,
    cond: Conditions | None = None,
    repeats: int = 1,
) -> np.ndarray:
    """e(m) for m = 1 .. L: the network's mean loss of a masked token where m are masked, nats.

    Args:
      network: the masked model.
      x_0: (n, length) data. L x n x `repeats` sequences are asked, in L calls.
      key: which positions are masked.
      cond: keyword arguments for the network, (n, ...).
      repeats: masks per sequence and m.

    Returns:
      (L + 1,), e(0) = 0.

    Reference: the curve is that of Austin et al. 2021's bound in order-agnostic form (Hoogeboom et
    al. 2021, arXiv:2110.02037, section 3.2), where it is used for the same dynamic programme.
    """
    x_0 = jnp.asarray(x_0)
    batch, length = x_0.shape
    repeats = expect_int(repeats, "repeats", at_least=1)
    keys = random.sample_keys(key, batch)

    @jax.jit
    def loss(network: TokenFn, m: jax.Array, number: jax.Array) -> jax.Array:
        def scores(k: jax.Array) -> jax.Array:
            return jax.random.uniform(jax.random.fold_in(k, number), (length,))

        rank = jnp.argsort(jnp.argsort(jax.vmap(scores)(keys), axis=1), axis=1)
        masked = rank < m.astype(jnp.int32)
        x = jnp.where(masked, network.mask, x_0)
        told = network(x, jnp.full(batch, m / length), cond)
        said = jnp.take_along_axis(told, x_0[..., None], axis=2)[..., 0]
        return -jnp.sum(jnp.where(masked, said, 0.0)) / (m * batch)

    curve = np.zeros(length + 1)
    for m in range(1, length + 1):
        curve[m] = np.mean(
            [float(loss(network, jnp.float32(m), m * repeats + i)) for i in range(repeats)]
        )
    return curve


def excess(curve: np.ndarray) -> np.ndarray:
    """(L + 1, L + 1): [i, j] is what unmasking from i tokens done to j done at once loses, nats.

    Args:
      curve: e(0) .. e(L), as `token_entropies` gives it.
    """
    curve = np.asarray(curve, np.float64)
    length = len(curve) - 1
    total = np.concatenate([[0.0], np.cumsum(curve[1:])])  # sum of e(1) .. e(m)
    cost = np.zeros((length + 1, length + 1))
    for i in range(length):
        m = length - i
        for j in range(i + 1, length + 1):
            k = j - i
            cost[i, j] = k * curve[m] - (total[m] - total[m - k])
    return cost


def best_counts(curve: np.ndarray, n: int) -> np.ndarray:
    """(n,) how many tokens each row should unmask, in random order, to lose least.

    Args:
      curve: e(0) .. e(L).
      n: rows, at most L.

    Returns:
      Counts that add up to L, for `parallel(length, n, law=counts)`.

    Raises:
      ValueError: more rows than tokens.
    """
    length = len(curve) - 1
    if expect_int(n, "n", at_least=1) > length:
        raise ValueError(f"{n} rows cannot each unmask one of {length} tokens.")
    # a measured curve may fall by noise; a negative cost would be no cost at all
    cost = np.maximum(excess(np.maximum.accumulate(curve)), 0.0)
    return np.diff(shortest_path(cost, n))
