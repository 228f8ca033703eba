"""What weighs particles: scores of a product, rewards, twists."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from diffsamp._core.numeric import is_concrete, working_dtype
from diffsamp._core.types import Array, Conditions, Network, PyTree
from diffsamp.guidance import Combined
from diffsamp.predictions import Level
from diffsamp.score import scale_rows
from diffsamp.tableau import Tableau

__all__ = ["Potential", "Told", "reward", "scores", "twist"]


class Told(NamedTuple):
    """What one call says of every particle.

    Attributes:
      output: in the row's prediction, what moves the particles.
      plain: the same of the network without the proposal's guidance.
      data: the plain data prediction.
      parts: the terms of a combination, in the row's prediction; else empty.
    """

    output: PyTree
    plain: PyTree
    data: PyTree
    parts: tuple[PyTree, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Potential:
    """How a particle's weight grows; made by `scores`, `reward` and `twist`."""

    f: Partial | None
    betas: Array
    kind: str = dataclasses.field(metadata={"static": True})

    def rows(self, score_fn: Network, tableau: Tableau) -> PyTree:
        """Numbers per row that `grow` needs, float64 on the host."""
        if self.kind != "scores":
            return None
        if not (isinstance(score_fn, Combined) and len(score_fn.terms.which) == len(self.betas)):
            raise ValueError(
                f"scores has {len(self.betas)} powers and needs a `combine` of as many terms, with "
                "these as its weights."
            )
        alpha, sigma = (np.asarray(v, np.float64) for v in (tableau.alpha, tableau.sigma))
        with np.errstate(divide="ignore", invalid="ignore"):
            step = np.diff(np.log(alpha) - np.log(sigma))
            ancestral = sigma[1:] * np.sqrt(-np.expm1(-2 * step))
        inner = np.isfinite(step) & np.asarray(tableau.evaluates)
        if not np.allclose(np.asarray(tableau.c)[inner], ancestral[inner], rtol=1e-6):
            raise ValueError(
                f"the weights of scores belong to ancestral rows, solvers.ddpm; got "
                f"{tableau.name!r}."
            )
        w0, w1 = np.asarray(tableau.target, np.float64).T
        determinant = alpha[:-1] * w1 - sigma[:-1] * w0
        # E = (alpha T - w0 x) / determinant; a row to sigma = 0, or from alpha = 0, adds nothing
        factors = np.where(inner, [alpha[:-1] / determinant, -w0 / determinant], 0.0)
        return np.where(inner, step, 0.0), factors[0], factors[1]

    def grow(
        self,
        x: PyTree,
        told: Told,
        memory: PyTree,
        level: Level,
        numbers: Array,
        cond: Conditions | None,
    ) -> tuple[PyTree, PyTree]:
        """Increment of the log-weights before a row, (batch * particles,), and what is kept."""
        if self.kind == "scores":
            step, on_output, on_state = numbers
            return step * self._gap(x, told, on_output, on_state), memory
        value = self.value(told.data, level, cond)
        return value - memory, value

    def value(self, data: PyTree, level: Level, cond: Conditions | None) -> PyTree:
        """The logarithm of the potential at a (predicted) sample."""
        if self.f is None:
            return 0.0
        value = self.f(data, level, cond)
        size = jax.tree.leaves(data)[0].shape[:1]
        if np.shape(value) != size:
            raise ValueError(
                f"a potential must return one number per sample, shape {size}; got shape "
                f"{np.shape(value)}."
            )
        return value.astype(working_dtype(value.dtype))

    def _gap(self, x: PyTree, told: Told, on_output: PyTree, on_state: Array) -> PyTree:
        def gap(state: jax.Array, *parts: jax.Array) -> jax.Array:
            dtype = working_dtype(state.dtype)
            noises = [
                scale_rows(on_output, state) * part.astype(dtype)
                + scale_rows(on_state, state) * state.astype(dtype)
                for part in parts
            ]
            betas = [jnp.asarray(beta, dtype) for beta in self.betas]
            mixed = sum(b * e for b, e in zip(betas, noises, strict=True))
            own = sum(b * e * e for b, e in zip(betas, noises, strict=True))
            away: PyTree = mixed * mixed - own
            return jnp.sum(away.reshape(state.shape[0], -1), axis=1)

        gaps: list[jax.Array] = jax.tree.leaves(jax.tree.map(gap, x, *told.parts))
        return sum(gaps[1:], gaps[0])


def scores(betas: Array) -> Potential:
    """Weights for prod_i q_i^beta_i: Feynman-Kac correctors.

    With E = sum_i beta_i E_i on ancestral rows the log-weight grows by
    h (|E|^2 - sum_i beta_i |E_i|^2), h the step in log-SNR, from the same calls. One formula for
    guidance (w, 1 - w), annealing (beta,) and products (1, 1). Start from
    N(0, sigma_T^2 / sum beta).

    Args:
      betas: (terms,) powers, the weights of the `combine` that is sampled.

    Reference: Skreta et al. 2025, arXiv:2503.02819.
    """
    if not is_concrete(betas):
        raise TypeError("`betas` must be numbers, known outside `jit`.")
    return Potential(None, tuple(float(b) for b in np.asarray(betas, np.float64)), "scores")


def reward(
    f: Callable[[PyTree, Level, Mapping[str, PyTree] | None], PyTree], temperature: float = 1.0
) -> Potential:
    """Tilt by exp(f(x_0) / temperature): Feynman-Kac steering, no gradient needed.

    The weight grows by the difference of f at the data predictions of two rows, and at the end by
    what the sample itself says, so that all of it is f(x_N) / temperature.

    Args:
      f: (x_0, level, cond) -> (batch,), the reward; asked at data predictions and at the sample.
      temperature: small tilts more.

    Raises:
      ValueError: a temperature that is not positive.

    Reference: Singhal et al. 2025, arXiv:2501.06848.
    """
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive; got {temperature}.")
    return Potential(Partial(_tempered, Partial(f), float(temperature)), None, "value")


def _tempered(
    f: PyTree, temperature: PyTree, data: PyTree, level: Level, cond: Conditions | None
) -> PyTree:
    return f(data, level, cond) / temperature


def twist(f: Callable[[PyTree, Level, Mapping[str, PyTree] | None], PyTree]) -> Potential:
    """Condition on a likelihood: twisted sequential Monte Carlo, exact with many particles.

    The weight grows by log psi(x') - log psi(x), psi the likelihood as the level's data prediction
    sees it, say N(y; A D, s^2 + r^2); at the end, level.sigma = 0, f must be the true likelihood.
    Pass the guided network as `proposal`.

    Args:
      f: (D, level, cond) -> (batch,), log psi.

    Reference: Wu et al. 2023, arXiv:2306.17775.
    """
    return Potential(Partial(f), None, "value")
