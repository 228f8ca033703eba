"""What a search minimises, and what it compares with.

The reference is the network's own ODE solution from the same noise. An `Objective` is a function
(samples, reference) -> number, smaller is better: an error at equal noise, in pixels or in features
such as a classifier's, or a distance between distributions that ignores the reference.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import schedules, solvers
from diffsamp._core.types import Array, Conditions, Key, PyTree, Sharding
from diffsamp.evaluation import metrics
from diffsamp.predictions import level_at
from diffsamp.processes import Process
from diffsamp.score import ScoreFn
from diffsamp.search.explicit import from_largest_level
from diffsamp.search.running import Progress, run
from diffsamp.tableau import Tableau

__all__ = [
    "Objective",
    "classifier",
    "energy",
    "feature_error",
    "frechet",
    "kernel",
    "log_mse",
    "make_reference",
    "psnr",
    "reference_tableau",
    "reward",
    "rmse",
    "sliced_wasserstein",
]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a search minimises: call it with (samples, reference) for a number, smaller is better.

    Attributes:
      name: what it is called in scores and plans.
      function: (samples, reference) -> number.
      loss: (samples, reference) -> (batch,) losses whose mean `distill` descends, differentiable;
        None for an objective that is no mean over samples, which `distill` cannot follow.
      conditioned: both take the network's keyword arguments as a third argument.
    """

    name: str
    function: Callable[..., PyTree]
    loss: Callable[..., jax.Array] | None = None
    conditioned: bool = False

    def __call__(self, x: PyTree, reference: PyTree, cond: Conditions | None = None) -> float:
        """The value; inf if it is not finite."""
        more = (cond,) if self.conditioned else ()
        value = float(self.function(x, reference, *more))
        return value if math.isfinite(value) else math.inf

    def loss_of(self, x: PyTree, reference: PyTree, cond: Conditions | None) -> jax.Array:
        """`loss`, with the conditions where it wants them."""
        assert self.loss is not None
        return self.loss(x, reference, *((cond,) if self.conditioned else ()))


def _log(error: jax.Array) -> jax.Array:
    return jnp.log(jnp.maximum(error, jnp.finfo(error.dtype).tiny))


def _log_mse(x: PyTree, reference: PyTree) -> jax.Array:
    return _log(metrics.mean_squared_error(x, reference))


@functools.cache
def log_mse() -> Objective:
    """Mean over samples of the log of the mean squared error, as in BNS (arXiv:2403.01329)."""
    return Objective("log_mse", jax.jit(lambda x, r: jnp.mean(_log_mse(x, r))), _log_mse)


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


def classifier(
    logits: Callable[[PyTree], jax.Array], label: str = "label", *, name: str = "classifier"
) -> Objective:
    """Cross-entropy of the class that was asked for: an objective without a teacher.

    What matters is what a classifier sees, not where the network's own solution ends (Dual-Solver,
    arXiv:2603.03973).

    Args:
      logits: samples -> (batch, classes), differentiable if `distill` is to follow it.
      label: the network's keyword argument that holds the classes, (batch,) integers.
      name: what to call it.
    """

    def loss(x: PyTree, _: PyTree, cond: Conditions | None) -> jax.Array:
        if not cond or label not in cond:
            raise ValueError(
                f"the objective {name!r} wants the classes as cond={{{label!r}: (batch,)}}."
            )
        scores = jax.nn.log_softmax(logits(x), axis=-1)
        return -jnp.take_along_axis(scores, jnp.asarray(cond[label])[:, None], axis=-1)[:, 0]

    return Objective(name, lambda x, r, cond: jnp.mean(loss(x, r, cond)), loss, conditioned=True)


def reward(score: Callable[[PyTree], Array], *, name: str = "-reward") -> Objective:
    """Minus the mean of a score of samples, which need not be differentiable.

    Args:
      score: samples -> (batch,), larger is better; on the host or in JAX.
      name: what to call it.
    """
    return Objective(name, lambda x, _: -np.mean(np.asarray(score(x), np.float64)))


def energy(
    features: Callable[[PyTree], PyTree] | None = None, *, name: str = "energy"
) -> Objective:
    """Energy distance between the samples and the reference, as sets: which is which is ignored.

    The only built-in distance between distributions that `distill` can follow, and the objective
    for samplers that add noise, whose samples have no counterpart in the reference. The loss is its
    part that the samples move, over the pairs of a minibatch.

    Args:
      features: samples -> (batch, ...), differentiable; None: the samples themselves.
      name: what to call it.
    """
    own = (lambda x: x) if features is None else features

    def loss(x: PyTree, reference: PyTree) -> jax.Array:
        return metrics.energy_terms(own(x), own(reference))

    def value(x: PyTree, reference: PyTree) -> jax.Array:
        return metrics.energy_distance(own(x), own(reference))

    return Objective(name, value, loss)


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


def reference_tableau(process: Process, nfe: int = 100, *, first: float | None = None) -> Tableau:
    """A fine deterministic tableau, whose samples stand for the ODE's solution.

    UniPC of order 3 on Karras's grid, from t_max on: at 100 evaluations 88 to 104 dB from the
    solution on four networks, and its own error is far below that of any sampler of 20 (check with
    twice as many for a new network).

    Args:
      process: the noise process.
      nfe: evaluations.
      first: where it begins, see `first_time`; None: at t_max.
    """
    first = float(process.t_max) if first is None else first
    times = schedules.karras(process, nfe)
    if times[0] < first * (1 - 1e-12):  # no schedule begins where there is no signal left
        later = schedules.karras(process, nfe - 1) if nfe > 1 else times[-1:]
        times = np.append(first, later)
    return from_largest_level(solvers.unipc(process, times, order=3), process)


def first_time(score_fn: ScoreFn) -> float:
    """The largest time at which the network says anything about the data.

    t_max, but for a network that predicts noise where nothing else is left (alpha = 0): there the
    largest that schedules use.
    """
    process = score_fn.process
    largest = float(process.t_max)
    if float(process.alpha(largest)) > 0:
        return largest
    network, level = teacher(score_fn), level_at(process, np.array([largest]))
    try:
        bound = network.bind(level, (np.ones(1), np.zeros(1)))
        network.check_bound(bound, level, np.ones(1, bool))
    except ValueError:
        return float(schedules.logsnr(process, 2)[0])
    return largest


def teacher(score_fn: ScoreFn) -> ScoreFn:
    """The network that says what is right: the one inside, where known answers replace some."""
    return getattr(score_fn, "teacher", score_fn)


def cost_of_reference(score_fn: ScoreFn, reference: Tableau | PyTree) -> float:
    """Network evaluations per sample of the reference; none if its samples are given."""
    if reference is None:
        reference = reference_tableau(score_fn.process, first=first_time(score_fn))
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
        reference = reference_tableau(score_fn.process, first=first_time(score_fn))
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
