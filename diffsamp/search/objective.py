"""What a search minimises, what it compares with, and how it runs samplers to find out.

The reference is the network's own ODE solution from the same noise. An `Objective` is a function
(samples, reference) -> number, smaller is better: an error at equal noise, in pixels or in features
such as a classifier's, or a distance between distributions that ignores the reference.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import schedules, solvers
from diffsamp._core import random
from diffsamp._core.checks import expect_cond, expect_int, expect_state
from diffsamp._core.sharding import expect_sharding, on_mesh, put
from diffsamp._core.types import Conditions, Key, PyTree, Sharding
from diffsamp.evaluation import metrics
from diffsamp.processes import Process
from diffsamp.sampling import sample
from diffsamp.score import ScoreFn, for_samples
from diffsamp.tableau import Tableau

__all__ = [
    "Objective",
    "Progress",
    "feature_error",
    "frechet",
    "kernel",
    "log_mse",
    "make_reference",
    "psnr",
    "reference_tableau",
    "rmse",
    "run",
    "run_many",
    "slice_batch",
    "sliced_wasserstein",
]

# called with (what is being done, units done, units in all)
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a search minimises: call it with (samples, reference) for a number, smaller is better.

    Attributes:
      name: what it is called in scores and plans.
      function: (samples, reference) -> number.
      loss: (samples, reference) -> (batch,) losses whose mean `distill` descends, differentiable;
        None for an objective that is no mean over samples, which `distill` cannot follow.
    """

    name: str
    function: Callable[[PyTree, PyTree], PyTree]
    loss: Callable[[PyTree, PyTree], jax.Array] | None = None

    def __call__(self, x: PyTree, reference: PyTree) -> float:
        """The value; inf if it is not finite."""
        value = float(self.function(x, reference))
        return value if math.isfinite(value) else math.inf


def _log(error: jax.Array) -> jax.Array:
    return jnp.log(jnp.maximum(error, jnp.finfo(error.dtype).tiny))


def _log_mse(x: PyTree, reference: PyTree) -> jax.Array:
    return _log(metrics.mean_squared_error(x, reference))


@functools.cache
def log_mse() -> Objective:
    """Mean over samples of the log of the mean squared error, as in BNS (arXiv:2403.01329)."""
    return Objective("log_mse", lambda x, r: jnp.mean(_log_mse(x, r)), _log_mse)


@functools.cache
def psnr(data_range: float = 2.0) -> Objective:
    """Minus the PSNR in dB to the reference: `log_mse` in other units.

    Args:
      data_range: largest minus smallest value of the data.
    """
    return Objective("-psnr", lambda x, r: -metrics.psnr(x, r, data_range=data_range), _log_mse)


@functools.cache
def rmse() -> Objective:
    """Root mean squared error to the reference, which large errors dominate."""
    return Objective("rmse", metrics.rmse, metrics.mean_squared_error)


def feature_error(
    features: Callable[[PyTree], PyTree], *, name: str = "feature_error", log: bool = True
) -> Objective:
    """Error to the reference in features: LPIPS, a classifier's, an encoder's.

    Args:
      features: samples -> (batch, ...), differentiable if `distill` is to follow it.
      name: what to call it.
      log: the mean log squared distance, as `log_mse`; False: the mean squared distance.
    """

    def loss(x: PyTree, reference: PyTree) -> jax.Array:
        error = metrics.mean_squared_error(features(x), features(reference))
        return _log(error) if log else error

    return Objective(name, lambda x, r: jnp.mean(loss(x, r)), loss)


def finite_psnr(x: PyTree, reference: PyTree, data_range: float) -> float:
    """`metrics.psnr`, and -inf for samples that are not finite."""
    value = float(metrics.psnr(x, reference, data_range=data_range))
    return value if math.isfinite(value) else -math.inf


def _features(
    features: Callable[[PyTree], PyTree] | None, x: PyTree, size: int = 256
) -> np.ndarray:
    """Features on the host, in batches: a data set's need not fit a device."""
    if features is None:
        return np.asarray(x)
    return np.concatenate([np.asarray(features(x[i : i + size])) for i in range(0, len(x), size)])


def frechet(data: PyTree, features: Callable[[PyTree], PyTree] | None = None) -> Objective:
    """Frechet distance to a data set; compare at equal numbers of samples only.

    Args:
      data: (n, ...).
      features: samples -> (batch, dim); None: the samples themselves.
    """
    known = _features(features, data)
    return Objective(
        "frechet", lambda x, _: metrics.frechet_distance(_features(features, x), known)
    )


def kernel(data: PyTree, features: Callable[[PyTree], PyTree] | None = None) -> Objective:
    """Kernel distance (KID) to a data set: unbiased, so fit for few samples.

    Args:
      data: (n, ...).
      features: samples -> (batch, dim); None: the samples themselves.
    """
    known = _features(features, data)
    return Objective("kernel", lambda x, _: metrics.kernel_distance(_features(features, x), known))


def sliced_wasserstein(
    data: PyTree, key: Key, features: Callable[[PyTree], PyTree] | None = None
) -> Objective:
    """Sliced 2-Wasserstein distance to a data set.

    Args:
      data: (n, ...).
      key: random key of the projections, the same for every call.
      features: samples -> (batch, dim); None: the samples themselves.
    """
    known = _features(features, data)
    return Objective(
        "sliced_wasserstein",
        lambda x, _: metrics.sliced_wasserstein(_features(features, x), known, key),
    )


def reference_tableau(process: Process, nfe: int = 200) -> Tableau:
    """A fine deterministic tableau, whose samples stand for the ODE's solution.

    UniPC of order 3 on Karras's grid; at 200 evaluations its own error is far below that of any
    sampler of 20 (check with twice as many for a new network).
    """
    return solvers.unipc(process, schedules.karras(process, nfe), order=3)


def slice_batch(tree: PyTree, start: int, stop: int) -> PyTree:
    """Samples start .. stop - 1 of a batch.

    Args:
      tree: a pytree of arrays with a leading batch axis; None stays None.
      start: the first sample.
      stop: one past the last.
    """
    return jax.tree.map(lambda leaf: leaf[start:stop], tree)


def teacher(score_fn: ScoreFn) -> ScoreFn:
    """The network that says what is right: the one inside, where known answers replace some."""
    return getattr(score_fn, "teacher", score_fn)


def cost_of_reference(score_fn: ScoreFn, reference: Tableau | PyTree) -> float:
    """Network evaluations per sample of the reference; none if its samples are given."""
    if reference is None:
        reference = reference_tableau(score_fn.process)
    return teacher(score_fn).nfe(reference) if isinstance(reference, Tableau) else 0


def make_reference(
    score_fn: ScoreFn,
    reference: Tableau | PyTree,
    x_T: PyTree,
    *,
    key: Key = None,
    cond: Conditions | None = None,
    batch: int | None = None,
    sharding: Sharding = None,
    progress: Progress | None = None,
) -> PyTree:
    """The samples to compare with, checked.

    Args:
      score_fn: the network.
      reference: samples shaped like x_T, the tableau that makes them, or None:
        `reference_tableau`.
      x_T: the starts.
      key: as for `run`.
      cond: as for `run`.
      batch: as for `run`.
      sharding: as for `run`.
      progress: as for `run`.

    Raises:
      ValueError: the network's samples, or the given ones, are not all finite.
    """
    if reference is None:
        reference = reference_tableau(score_fn.process)
    if isinstance(reference, Tableau):
        reference = run(
            teacher(score_fn),
            reference,
            x_T,
            key=key,
            cond=cond,
            batch=batch,
            sharding=sharding,
            progress=progress,
            what="reference",
        )
    if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(reference)):
        raise ValueError(
            "the reference samples are not all finite: the network returned NaN or inf on the way. "
            "Sample it with a fine solver and look at the samples first."
        )
    return reference


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
