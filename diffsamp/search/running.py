"""Samplers run over many starts, in batches of bounded size, one at a time or several at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core import random
from diffsamp._core.checks import expect_cond, expect_int, expect_state
from diffsamp._core.sharding import expect_sharding, on_mesh, put
from diffsamp._core.types import Conditions, Key, PyTree, Sharding
from diffsamp.sampling import row_levels, sample
from diffsamp.score import ScoreFn, for_samples
from diffsamp.tableau import Tableau

__all__ = ["Progress", "expect_batch", "run", "run_many", "slice_batch"]

# called with (what is being done, units done, units in all)
Progress = Callable[[str, int, int], None]


def slice_batch(tree: PyTree, start: int, stop: int) -> PyTree:
    """Samples start .. stop - 1 of a batch.

    Args:
      tree: a pytree of arrays with a leading batch axis; None stays None.
      start: the first sample.
      stop: one past the last.
    """
    return jax.tree.map(lambda leaf: leaf[start:stop], tree)


def expect_asked(score_fn: ScoreFn, tableau: Tableau) -> None:
    """Raise unless the network determines what every row of a tableau wants of it.

    Args:
      score_fn: the network.
      tableau: the sampler, of concrete numbers.

    Raises:
      ValueError: it predicts noise, say, and is asked for data where nothing but noise is left.
    """
    level, target = row_levels(tableau), (tableau.target[:, 0], tableau.target[:, 1])
    score_fn.check_bound(score_fn.bind(level, target), level, tableau.evaluates)


def run(
    score_fn: ScoreFn,
    tableau: Tableau,
    x_T: PyTree,
    *,
    key: Key = None,
    cond: Conditions | None = None,
    batch: int | None = None,
    sharding: Sharding = None,
    progress: Progress | None = None,
    what: str = "sampling",
) -> PyTree:
    """`sample` in batches of bounded size.

    Args:
      score_fn: the network, batched.
      tableau: the sampler.
      x_T: (n, ...) starts.
      key: one key or one per sample; sample i gets the same noise whatever `batch` is.
      cond: keyword arguments for the network; every array in it has the leading axis n.
      batch: samples at a time; None: all at once. n need not be a multiple of it.
      sharding: a `jax.sharding.NamedSharding` over the batch axis, into which every batch is put;
        `batch` must divide among its devices (a last batch that does not is sampled whole on each).
        Weights on other devices are copied to all of these. The result is the same.
      progress: called after each batch with (what, samples done, n).
      what: the label for `progress`.

    Returns:
      Samples shaped like x_T.
    """
    size = expect_batch(x_T, cond)
    batch = size if batch is None else expect_int(batch, "batch", at_least=1)
    expect_sharding(sharding, batch if batch < size else None)
    score_fn = on_mesh(score_fn, sharding)
    keys = None if key is None else random.sample_keys(key, size)
    parts = []
    for start in range(0, size, batch):
        stop = min(start + batch, size)
        part = sample(
            for_samples(score_fn, np.arange(start, stop)),
            tableau,
            put(slice_batch(x_T, start, stop), sharding),
            key=None if keys is None else keys[start:stop],
            cond=put(slice_batch(cond, start, stop), sharding),
        )
        if progress is not None:
            part = jax.block_until_ready(part)
            progress(what, stop, size)
        parts.append(part)
    return _joined(parts)


def _joined(parts: list[PyTree]) -> PyTree:
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def expect_batch(x_T: PyTree, cond: Conditions | None) -> int:
    """The number of starts, after checking that every array of `cond` has as many entries."""
    size = expect_state(x_T, "x_T", batched=True)
    assert size is not None
    expect_cond(cond, size)
    return size


def run_many(
    score_fn: ScoreFn,
    tableaux: Sequence[Tableau],
    x_T: PyTree,
    *,
    key: Key = None,
    cond: Conditions | None = None,
    batch: int | None = None,
    population: int = 1,
    sharding: Sharding = None,
) -> Iterator[PyTree]:
    """`run` for many tableaux on the same starts and noise, several at a time.

    Tableaux are padded to one shape, so there is one compilation. With `population` above 1 as many
    share one batch: each sample follows its own tableau (`Tableau.stack`), which fills a device
    that one tableau's batch would not.

    Args:
      score_fn: the network, batched.
      tableaux: the samplers.
      x_T: (n, ...) starts, an array or pytree.
      key: as for `run`; every tableau gets the same noise.
      cond: as for `run`.
      batch: samples of one tableau at a time.
      population: tableaux at a time; `batch` x `population` samples are in memory.
      sharding: over the batch axis, which holds tableaux and samples; as for `run`.

    Yields:
      The samples of each tableau, in order.
    """
    padded = Tableau.pad_together(list(tableaux))
    if population == 1:
        for tableau in padded:
            yield run(score_fn, tableau, x_T, key=key, cond=cond, batch=batch, sharding=sharding)
        return
    size = expect_batch(x_T, cond)
    batch = size if batch is None else min(expect_int(batch, "batch", at_least=1), size)
    expect_sharding(sharding, batch if batch < size else None)
    score_fn = on_mesh(score_fn, sharding)
    keys = None if key is None else random.sample_keys(key, size)
    # rows of similar cost side by side: a row is run while any of its tableaux needs it
    order = sorted(range(len(padded)), key=lambda i: tableaux[i].rows)
    results: dict[int, PyTree] = {}
    for first in range(0, len(order), population):
        group = order[first : first + population]
        filled = group + [group[-1]] * (population - len(group))  # one shape for all groups
        stacked = Tableau.stack([padded[i] for i in filled])
        parts = []
        for start in range(0, size, batch):
            stop = min(start + batch, size)

            def tile(tree: PyTree, start: int = start, stop: int = stop) -> PyTree:
                return jax.tree.map(
                    lambda leaf: jnp.concatenate([leaf[start:stop]] * population), tree
                )

            own = jax.tree.map(lambda array, k=stop - start: np.repeat(array, k, axis=-1), stacked)
            numbers = np.tile(np.arange(start, stop), population)
            x = sample(
                for_samples(score_fn, numbers),
                own,
                put(tile(x_T), sharding),
                key=None if keys is None else tile(keys),
                cond=put(tile(cond), sharding),
            )
            parts.append(
                jax.tree.map(lambda leaf: leaf.reshape(population, -1, *leaf.shape[1:]), x)
            )
        for place, i in enumerate(group):
            results[i] = _joined([jax.tree.map(lambda leaf, p=place: leaf[p], x) for x in parts])
    for i in range(len(padded)):
        yield results.pop(i)
