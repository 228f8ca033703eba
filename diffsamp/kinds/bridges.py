"""Diffusion bridges: from a known end x_T to the data, with every solver there is (DBIM).

A bridge of a process (alpha, rho = sigma / alpha) pinned at x_T has the marginal

    x_t = a x_T + b x_0 + c eps,    a = (alpha_t / alpha_T) rho_t^2 / rho_T^2,
    b = alpha_t (1 - rho_t^2 / rho_T^2),    c = alpha_t rho_t sqrt(1 - rho_t^2 / rho_T^2).

So u = (x - a x_T) / sqrt(b^2 + c^2) is an ordinary variance-preserving diffusion of x_0 with
log-SNR log(b / c), which starts from pure noise (b = 0 and c = 0 at T). `Bridge` is that process,
and the transform `bridge` turns u into x before the network: DBIM of order 1 is `solvers.ddim`
(its eta too), orders 2 and 3 are `solvers.dpmpp`'s, and the booting noise is the start u_T.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core.numeric import as_float, is_concrete, namespace, silence
from diffsamp.guidance import Transform
from diffsamp.predictions import Level
from diffsamp.processes import Process
from diffsamp.score import ScoreFn, scale_rows

__all__ = ["Bridge", "Bridged", "bridge", "times"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bridge(Process):
    """The bridge of a process, as an ordinary process in u; alpha = 0 at t_max.

    Attributes:
      base: the process that is pinned at its own t_max.
    """

    base: Process

    @silence
    def _share(self, t: Any) -> tuple[Any, Any]:
        """rho_t / rho_T and sqrt(1 - its square)."""
        t = as_float(t, *jax.tree.leaves(self.base)[:1])
        end = as_float(self.base.t_max, t)
        xp = namespace(t)
        share = xp.exp(self.base.log_snr(end) - self.base.log_snr(t))
        share = xp.where(t >= end, xp.ones_like(share), share)
        return share, xp.sqrt((1 - share) * (1 + share))

    def _parts(self, t: Any) -> tuple[Any, Any, Any]:
        """b / alpha_t, c / alpha_t and the norm of the two; at T their limits, over sqrt."""
        share, root = self._share(t)
        rho_T = namespace(share).exp(-as_float(self.base.log_snr(self.base.t_max), share))
        # both divided by root: b = root^2, c = rho root
        b, c = root, rho_T * share
        norm = namespace(b).sqrt(b * b + c * c)
        return b / norm, c / norm, root * norm

    def alpha(self, t: Any) -> Any:
        return self._parts(t)[0]

    def sigma(self, t: Any) -> Any:
        return self._parts(t)[1]

    @silence
    def alpha_dot(self, t: Any) -> Any:
        # alpha = 1 / sqrt(1 + r^2), r = c / b: alpha' = -alpha^3 r r', r' / r from log rho_B
        return -self.alpha(t) * self.sigma(t) ** 2 * self._log_rho_dot(t)

    @silence
    def sigma_dot(self, t: Any) -> Any:
        return self.sigma(t) * self.alpha(t) ** 2 * self._log_rho_dot(t)

    def _log_rho_dot(self, t: Any) -> Any:
        """d/dt log(c / b) = rho' / rho / (1 - rho^2 / rho_T^2)."""
        base = self.base
        own = base.sigma_dot(t) / base.sigma(t) - base.alpha_dot(t) / base.alpha(t)
        return own / self._share(t)[1] ** 2

    @silence
    def time(self, log_snr: Any) -> Any:
        log_snr = as_float(log_snr, *jax.tree.leaves(self.base)[:1])
        xp = namespace(log_snr)
        rho_T = xp.exp(-as_float(self.base.log_snr(self.base.t_max), log_snr))
        # c / b = rho_T share / root: share / root = exp(-log_snr) / rho_T
        ratio = xp.exp(-log_snr) / rho_T
        inner = self.base.time(-xp.log(rho_T * ratio / xp.sqrt(1 + ratio * ratio)))
        return xp.where(xp.isinf(ratio), as_float(self.base.t_max, ratio), inner)

    @property
    def t_max(self) -> float:
        return self.base.t_max

    @property
    def t_min(self) -> float:
        return self.base.t_min

    @property
    def t_clean(self) -> float:
        return self.base.t_clean

    @property
    def prior_std(self) -> float:
        return 1.0

    def numbers(self, t: Any) -> tuple[Any, Any]:
        """a, the weight of x_T, and the norm of (b, c): x = a x_T + norm u."""
        share, _ = self._share(t)
        alpha = as_float(self.base.alpha(t), share)
        alpha_T = as_float(self.base.alpha(self.base.t_max), share)
        return alpha / alpha_T * share**2, alpha * self._parts(t)[2]


class _BridgedBound(NamedTuple):
    inner: Any
    on_end: Any
    on_state: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Bridged(Transform):
    """A bridge network as a network of u; made by `bridge`."""

    score_fn: ScoreFn

    def bind(self, level: Level, target: tuple[Any, Any]) -> _BridgedBound:
        """As `ScoreFn.bind`, with the numbers of x = a x_T + norm u."""
        process: Any = self.process
        return _BridgedBound(self.score_fn.bind(level, target), *process.numbers(level.t))

    def predict(self, x: Any, bound: _BridgedBound, cond: Mapping[str, Any] | None = None) -> Any:
        """The prediction for u, from the network at x; cond holds "x_T", the known end."""
        if not cond or "x_T" not in cond:
            raise ValueError(
                'a bridge needs its end: pass cond={"x_T": ..}, shaped like the state.'
            )
        end = cond["x_T"]
        if jax.tree.map(np.shape, end) != jax.tree.map(np.shape, x):
            raise ValueError(
                f'cond["x_T"] must be shaped like the state, {jax.tree.map(np.shape, x)}; got '
                f"{jax.tree.map(np.shape, end)}."
            )

        def mix(u: jax.Array, known: jax.Array) -> jax.Array:
            known = jnp.asarray(known, u.dtype)
            state = scale_rows(bound.on_end, u) * known + scale_rows(bound.on_state, u) * u
            return state.astype(u.dtype)

        # the network is asked at x, and what it says is a data prediction: x_0 is u's x_0
        network = self.score_fn
        inner = bound.inner._replace(r=jnp.zeros_like(jnp.asarray(bound.inner.r)),
                                     s=jnp.ones_like(jnp.asarray(bound.inner.s)))  # fmt: skip
        data = network.predict(jax.tree.map(mix, x, end), inner, cond)

        def convert(u: jax.Array, d: jax.Array) -> jax.Array:
            value = scale_rows(bound.inner.r, u) * u + scale_rows(bound.inner.s, u) * d
            return value.astype(u.dtype)

        return jax.tree.map(convert, x, data)


def bridge(score_fn: ScoreFn) -> Bridged:
    """Make a bridge network ready for every solver.

    Example:
      >>> import jax, jax.numpy as jnp, diffsamp as ds
      >>> def apply(params, x, t, x_T):
      ...     return 0.5 * (x + x_T)  # stands for a network that predicts x_0
      >>> network = ds.ScoreFn(apply, None, ds.processes.vp_linear(0.1, 2.0), prediction="data")
      >>> bridged = ds.bridges.bridge(network)
      >>> times = ds.bridges.times(bridged.process, 5)
      >>> tableau = ds.solvers.dpmpp(bridged.process, times, order=2, variant="heun")
      >>> noise = bridged.process.prior_sample(jax.random.key(0), (4, 2))
      >>> ds.sample(bridged, tableau, noise, cond={"x_T": jnp.ones((4, 2))}).shape
      (4, 2)

    Args:
      score_fn: a network of the bridge's state x that predicts the data; its process is the one
        that is pinned. It gets cond["x_T"] among its conditions.

    Returns:
      A transform whose process is the `Bridge`; sample it from noise, with cond={"x_T": ..}.

    Raises:
      ValueError: another prediction than "data".

    Reference: Zheng et al. 2024 (DBIM), arXiv:2405.15885; Zhou et al. 2023 (DDBM),
    arXiv:2309.16948.
    """
    if score_fn.prediction != "data" or score_fn.scale_input:
        raise ValueError(
            'a bridge network must be wrapped as ScoreFn(.., prediction="data"): its x_0 '
            f"prediction after any preconditioning of its own; got {score_fn.prediction!r}."
        )
    if isinstance(score_fn.process, Bridge):
        raise ValueError("this network is bridged already.")
    return Bridged(dataclasses.replace(score_fn, process=Bridge(score_fn.process)))


def times(
    process: Bridge, nfe: int, *, start_gap: float = 1e-3, end: float | None = None
) -> np.ndarray:
    """DBIM's grid: one evaluation at T for the booting noise, then uniform in t.

    Args:
      process: the bridge.
      nfe: evaluations, at least 2.
      start_gap: how far below t_max the second evaluation is.
      end: the last time; None: t_clean. The authors end at 1e-4, where a little noise is left.

    Returns:
      (nfe + 1,) times from t_max to `end`.

    Raises:
      ValueError: fewer than 2 evaluations, or an end outside the process's times.
    """
    if not (is_concrete(process) and nfe >= 2):
        raise ValueError(f"`nfe` must be at least 2 (the first is at T); got {nfe}.")
    high, clean = float(process.t_max), float(process.t_clean)
    low = clean if end is None else float(end)
    if not clean <= low < high - start_gap:
        raise ValueError(
            f"`end` must lie between t_clean = {clean:g} and t_max - start_gap = "
            f"{high - start_gap:g}; got {low:g}."
        )
    return np.concatenate([[high], np.linspace(high - start_gap, low, nfe)])
