"""What every target distribution has: exact posterior means, and the network that says them."""

from __future__ import annotations

import abc

import jax

from diffsamp import predictions
from diffsamp._core.numeric import as_float
from diffsamp._core.types import Array, Key, PyTree, Value
from diffsamp.predictions import Level
from diffsamp.processes import Process
from diffsamp.score import ScoreFn

__all__ = ["Target", "column"]


class Target(abc.ABC):
    """A distribution of vectors with exact posterior means. A pytree."""

    @abc.abstractmethod
    def posterior(self, x: PyTree, alpha: Array, sigma: Array) -> tuple[Array, Array]:
        """E[x_0 | x] and E[eps | x] at x = alpha x_0 + sigma eps.

        Args:
          x: (batch, dim), NumPy (float64 on the host) or JAX.
          alpha: scalar or (batch,).
          sigma: scalar or (batch,), positive.

        Returns:
          Two arrays of shape (batch, dim).
        """

    @abc.abstractmethod
    def log_prob(self, x: PyTree, alpha: Array = 1.0, sigma: Array = 0.0) -> Array:
        """Log density of alpha x_0 + sigma eps at x (batch, dim); shape (batch,), nats."""

    @abc.abstractmethod
    def sample(self, key: Key, n: int) -> jax.Array:
        """n samples, (n, dim)."""

    def score_fn(self, process: Process, prediction: str = "data") -> ScoreFn:
        """The perfect network: a `ScoreFn` with this target's exact predictions.

        It takes states (batch, ..) whose trailing axes flatten to dim.
        """
        return ScoreFn(
            _APPLY[predictions.canonical_name(prediction)],
            (self, process),
            process,
            prediction,
            time="t",
            scale_input=False,
        )


def _make_apply(name: str) -> Array:
    def apply(params: PyTree, x: jax.Array, t: jax.Array) -> jax.Array:
        target, process = params
        level = Level(t, process.alpha(t), process.sigma(t))
        flat = x.reshape(x.shape[0], -1)
        data, noise = target.posterior(flat, level.alpha, level.sigma)
        w0, w1, g = (w[:, None] for w in predictions.weights(name, process, level))
        return ((w0 * data + w1 * noise) / g).astype(x.dtype).reshape(x.shape)

    return apply


# one function per prediction, made once: ScoreFn compares them by identity
_APPLY = {name: _make_apply(name) for name in predictions.NAMES}


def column(value: Value, x: PyTree) -> Array:
    """A scalar or per-sample number as (1,) or (batch,) of x's dtype."""
    value = as_float(value, x)
    return value.reshape(-1)
