"""Processes that run to a known mean: speech enhancement, restoration, residual shifting.

    x_t = alpha x_0 + (w - alpha) y + sigma eps,    so    u = x - w y = alpha (x_0 - y) + sigma eps

is an ordinary process of the residual x_0 - y, which every solver samples from noise alone. w = 1
for all that end at y plus noise: SGMSE and StoRM (`processes.ouve`), IR-SDE, ResShift.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core.numeric import as_float, namespace, silence
from diffsamp._core.types import Array, Bound, Conditions, Network, PyTree
from diffsamp.guidance import Transform
from diffsamp.predictions import Level, conversion, weights
from diffsamp.score import bind_as, expect_score_fn, scale_rows

__all__ = ["AroundMean", "around", "with_mean"]


class _AroundBound(NamedTuple):
    inner: Bound
    on_mean: Array
    in_answer: Array
    r: Array
    s: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class AroundMean(Transform):
    """A network of x as a network of u = x - w y; made by `around`."""

    score_fn: Network
    weight: Callable[[Array], Array] | None = dataclasses.field(metadata={"static": True})

    def share(self, t: Array) -> Array:
        """w at times t."""
        one = namespace(t).ones_like(as_float(t))
        return one if self.weight is None else self.weight(as_float(t)) * one

    @silence
    def bind(self, level: Level, target: tuple[Array, Array]) -> _AroundBound:
        """As `ScoreFn.bind`, with the mean's weight in the state and in the network's answer."""
        own = weights(self.prediction, self.process, level, self.sigma_data)
        one = namespace(level.alpha).ones_like(level.alpha)
        r, s = conversion(own, (*target, one), level.alpha, level.sigma)
        # the answer is about x_0, that of u about x_0 - y; dx/dt is du/dt where w is constant
        moved = 0 * one if self.prediction == "velocity" else own[0] / own[2]
        inner = bind_as(self.score_fn, level, self.prediction)
        return _AroundBound(inner, self.share(level.t), moved, r, s)

    def predict(self, x: PyTree, bound: _AroundBound, cond: Conditions | None = None) -> PyTree:
        """The prediction for u, from the network at x; cond holds "mean", which it gets, too."""
        mean = _mean(x, cond)
        state = _add(x, bound.on_mean, mean)
        answer = _add(self.score_fn.predict(state, bound.inner, cond), -bound.in_answer, mean)

        def convert(u: jax.Array, f: jax.Array) -> jax.Array:
            return (scale_rows(bound.r, u) * u + scale_rows(bound.s, u) * f).astype(u.dtype)

        return jax.tree.map(convert, x, answer)

    def check_bound(self, bound: _AroundBound, level: Level, evaluates: Array) -> None:
        """As `ScoreFn.check_bound`."""
        inner: PyTree = bound.inner
        if hasattr(inner, "r"):  # what a row wants must follow from u and the answer
            inner = inner._replace(r=bound.r, s=bound.s)
        self.score_fn.check_bound(inner, level, evaluates)


def around(score_fn: Network, *, weight: Callable[[Array], Array] | None = None) -> AroundMean:
    """Make a network of a process around a known mean ready for every solver.

    Examples:
      >>> import jax, jax.numpy as jnp, diffsamp as ds
      >>> def apply(params, x, t, mean):
      ...     return x - mean  # stands for a network that predicts the score
      >>> network = ds.ScoreFn(apply, None, ds.processes.ouve(), prediction="score")
      >>> residual = ds.known_mean.around(network)
      >>> process, y = residual.process, jnp.ones((4, 2))
      >>> tableau = ds.solvers.ddpm(process, ds.schedules.uniform(process, 5, final="t_min"))
      >>> u_T = process.prior_sample(jax.random.key(0), (4, 2))
      >>> u = ds.sample(residual, tableau, u_T, key=jax.random.key(1), cond={"mean": y})
      >>> ds.known_mean.with_mean(residual, u, tableau.times[-1], y).shape
      (4, 2)

    Args:
      score_fn: the network of x, on the process of x - y. It gets cond["mean"], y, among its
        conditions; a transform of a ScoreFn (guidance) will do.
      weight: w, a function of times (NumPy or JAX) for processes whose mean for x_0 = y is not y,
        such as CDiffuSE's; None: 1.

    Returns:
      A transform whose state is u = x - w y: sample it from the process's prior with cond={"mean":
      y}, and add w y at the end (`with_mean`), which is y itself for w = 1.

    Raises:
      ValueError: weights that change with t and a network that predicts the velocity, whose own
        share of y is then not known.

    References: SGMSE, arXiv:2208.05830; StoRM, arXiv:2212.11851; IR-SDE, arXiv:2301.11699;
    ResShift, arXiv:2307.12348; CDiffuSE, arXiv:2202.05256.
    """
    expect_score_fn(score_fn)
    if weight is not None and score_fn.prediction == "velocity":
        raise ValueError(
            "a network that predicts the velocity needs weight=None: what it says of a mean whose "
            "weight changes with t is not known. Wrap it with another prediction."
        )
    if isinstance(score_fn, AroundMean):
        raise ValueError("this network is around its mean already.")
    return AroundMean(score_fn, weight)


def with_mean(network: AroundMean, u: PyTree, t: Array, mean: PyTree) -> PyTree:
    """x = u + w(t) y, the state of the process that the network was trained on.

    Args:
      network: what `around` made.
      u: samples of it.
      t: their time, such as the tableau's last.
      mean: y, shaped like u.
    """
    return _add(u, network.share(t), _mean(u, {"mean": mean}))


def _add(x: PyTree, weight: Array, mean: PyTree) -> PyTree:
    def add(v: jax.Array, y: jax.Array) -> jax.Array:
        return (v + scale_rows(weight, v) * jnp.asarray(y, v.dtype)).astype(v.dtype)

    return jax.tree.map(add, x, mean)


def _mean(x: PyTree, cond: Conditions | None) -> PyTree:
    if not cond or "mean" not in cond:
        raise ValueError(
            'a known mean must be given: pass cond={"mean": y}, shaped like the state.'
        )
    mean = cond["mean"]
    if jax.tree.map(np.shape, mean) != jax.tree.map(np.shape, x):
        raise ValueError(
            f'cond["mean"] must be shaped like the state, {jax.tree.map(np.shape, x)}; got '
            f"{jax.tree.map(np.shape, mean)}."
        )
    return mean
