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
import itertools
import math
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core.numeric import as_float, is_concrete, namespace, silence
from diffsamp._core.types import Array, Bound, Conditions, PyTree, Times
from diffsamp.guidance import Transform, per_row
from diffsamp.predictions import Level
from diffsamp.processes import Process
from diffsamp.score import ScoreFn, scale_rows
from diffsamp.solvers._builder import Builder, Combination, Point
from diffsamp.tableau import Tableau

__all__ = ["Bridge", "Bridged", "Ended", "HybridHeun", "bridge", "hybrid_heun", "times"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bridge(Process):
    """The bridge of a process, as an ordinary process in u; alpha = 0 at t_max.

    Attributes:
      base: the process that is pinned at its own t_max.
    """

    base: Process

    @silence
    def _share(self, t: Array) -> tuple[Array, Array]:
        """rho_t / rho_T and sqrt(1 - its square)."""
        t = as_float(t, *jax.tree.leaves(self.base)[:1])
        end = as_float(self.base.t_max, t)
        xp = namespace(t)
        share = xp.exp(self.base.log_snr(end) - self.base.log_snr(t))
        share = xp.where(t >= end, xp.ones_like(share), share)
        return share, xp.sqrt((1 - share) * (1 + share))

    def _parts(self, t: Array) -> tuple[Array, Array, Array]:
        """b / alpha_t, c / alpha_t and the norm of the two; at T their limits, over sqrt."""
        share, root = self._share(t)
        rho_T = namespace(share).exp(-as_float(self.base.log_snr(self.base.t_max), share))
        # both divided by root: b = root^2, c = rho root
        b, c = root, rho_T * share
        norm = namespace(b).sqrt(b * b + c * c)
        return b / norm, c / norm, root * norm

    def alpha(self, t: Array) -> Array:
        return self._parts(t)[0]

    def sigma(self, t: Array) -> Array:
        return self._parts(t)[1]

    @silence
    def alpha_dot(self, t: Array) -> Array:
        # alpha = 1 / sqrt(1 + r^2), r = c / b: alpha' = -alpha^3 r r', r' / r from log rho_B
        return -self.alpha(t) * self.sigma(t) ** 2 * self._log_rho_dot(t)

    @silence
    def sigma_dot(self, t: Array) -> Array:
        return self.sigma(t) * self.alpha(t) ** 2 * self._log_rho_dot(t)

    def _log_rho_dot(self, t: Array) -> Array:
        """d/dt log(c / b) = rho' / rho / (1 - rho^2 / rho_T^2)."""
        base = self.base
        own = base.sigma_dot(t) / base.sigma(t) - base.alpha_dot(t) / base.alpha(t)
        return own / self._share(t)[1] ** 2

    @silence
    def time(self, log_snr: Array) -> Array:
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

    def numbers(self, t: Array) -> tuple[Array, Array]:
        """a, the weight of x_T, and the norm of (b, c): x = a x_T + norm u."""
        share, _ = self._share(t)
        alpha = as_float(self.base.alpha(t), share)
        alpha_T = as_float(self.base.alpha(self.base.t_max), share)
        return alpha / alpha_T * share**2, alpha * self._parts(t)[2]


class _BridgedBound(NamedTuple):
    inner: Bound
    on_end: Array
    on_state: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Bridged(Transform):
    """A bridge network as a network of u; made by `bridge`."""

    score_fn: ScoreFn

    def bind(self, level: Level, target: tuple[Array, Array]) -> _BridgedBound:
        """As `ScoreFn.bind`, with the numbers of x = a x_T + norm u."""
        process = cast(Bridge, self.process)
        return _BridgedBound(self.score_fn.bind(level, target), *process.numbers(level.t))

    def predict(self, x: PyTree, bound: _BridgedBound, cond: Conditions | None = None) -> PyTree:
        """The prediction for u, from the network at x; cond holds "x_T", the known end."""
        end = _known_end(x, cond)

        def mix(u: jax.Array, known: jax.Array) -> jax.Array:
            known = jnp.asarray(known, u.dtype)
            state = scale_rows(bound.on_end, u) * known + scale_rows(bound.on_state, u) * u
            return state.astype(u.dtype)

        # the network is asked at x, and what it says is a data prediction: x_0 is u's x_0
        network = self.score_fn
        inner = bound.inner._replace(
            r=jnp.zeros_like(jnp.asarray(bound.inner.r)),
            s=jnp.ones_like(jnp.asarray(bound.inner.s)),
        )
        data = network.predict(jax.tree.map(mix, x, end), inner, cond)

        def convert(u: jax.Array, d: jax.Array) -> jax.Array:
            value = scale_rows(bound.inner.r, u) * u + scale_rows(bound.inner.s, u) * d
            return value.astype(u.dtype)

        return jax.tree.map(convert, x, data)


def bridge(score_fn: ScoreFn) -> Bridged:
    """Make a bridge network ready for every solver.

    Examples:
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
      end: the last time; None: t_clean, where the last step ends at the data prediction. The
        authors end at 1e-4, where a little noise is left.

    Returns:
      (nfe + 1,) times from t_max to `end`.

    Raises:
      ValueError: fewer than 2 evaluations, ends that leave nothing between them.
    """
    if not (is_concrete(process) and nfe >= 2):
        raise ValueError(f"`nfe` must be at least 2 (the first is at T); got {nfe}.")
    high, low = float(process.t_max), float(process.t_clean) if end is None else float(end)
    if not process.t_clean <= low < high - start_gap < high:
        raise ValueError(
            f"`start_gap` must be positive and `end` in [{process.t_clean:g}, {high:g} - start_gap)"
            f"; got {start_gap:g} and {low:g}."
        )
    return np.concatenate([[high], np.linspace(high - start_gap, low, nfe)])


class _EndedBound(NamedTuple):
    inner: Bound
    on_end: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Ended(Transform):
    """A bridge network that says D + a x_T with every row's own a; made by `hybrid_heun`.

    Attributes:
      score_fn: the network.
      on_end: (N,) a.
    """

    score_fn: ScoreFn
    on_end: Array

    def bind(self, level: Level, target: tuple[Array, Array]) -> _EndedBound:
        """As `ScoreFn.bind`, with the weight of x_T of every row."""
        (on_end,) = per_row(level, "bridges.hybrid_heun", self.on_end)
        return _EndedBound(self.score_fn.bind(level, target), on_end)

    def predict(self, x: PyTree, bound: _EndedBound, cond: Conditions | None = None) -> PyTree:
        """The network's data prediction at x, and a x_T; cond holds "x_T"."""
        end = _known_end(x, cond)

        def add(data: jax.Array, known: jax.Array) -> jax.Array:
            known = jnp.asarray(known, data.dtype)
            return (data + scale_rows(bound.on_end, data) * known).astype(data.dtype)

        return jax.tree.map(add, self.score_fn.predict(x, bound.inner, cond), end)


class HybridHeun(NamedTuple):
    """What `hybrid_heun` returns: give both to `ds.sample`.

    Attributes:
      network: the transform of the ScoreFn.
      tableau: of the state x; start it at x_T.
    """

    network: Ended
    tableau: Tableau


def hybrid_heun(score_fn: ScoreFn, times: Times, *, churn: float = 0.33) -> HybridHeun:
    """DDBM's sampler: part of a step by Euler on the bridge's SDE, then Heun on its ODE.

    With s the bridge's score and h = grad log p(x_T | x),

        dx = (alpha'/alpha x - g^2 (s - h)) dt + g dw,    dx = (alpha'/alpha x - g^2 (s/2 - h)) dt.

    It starts at x_T itself, so `times` start a little below T (the authors: 1e-4), on Karras's grid
    in t. Three evaluations a step with churn, two without, and one fewer for a last step to
    t_clean, whose ODE part is Euler's.

    Examples:
      >>> import jax, jax.numpy as jnp, numpy as np, diffsamp as ds
      >>> def apply(params, x, t, x_T):
      ...     return 0.5 * (x + x_T)  # stands for a network that predicts x_0
      >>> network = ds.ScoreFn(apply, None, ds.processes.vp_linear(0.1, 2.0), prediction="data")
      >>> times = np.append(np.linspace(0.9999 ** (1 / 7), 1e-4 ** (1 / 7), 6) ** 7, 0.0)
      >>> steps, tableau = ds.bridges.hybrid_heun(network, times)
      >>> end = jnp.ones((4, 2))
      >>> x_0 = ds.sample(steps, tableau, end, key=jax.random.key(0), cond={"x_T": end})
      >>> tableau.nfe, x_0.shape
      (17, (4, 2))

    Args:
      score_fn: as for `bridge`.
      times: (n + 1,) decreasing times of the process, from below its t_max.
      churn: the SDE's part of every step, in [0, 1); 0 is deterministic.

    Returns:
      A `HybridHeun`; sample it from x_T with cond={"x_T": x_T}, and with a key if churn > 0.

    Raises:
      ValueError: another prediction than "data", times that start at T, churn outside [0, 1).

    Reference: Zhou et al. 2023 (DDBM), arXiv:2309.16948, algorithm 1, guidance weight 1.
    """
    process = cast(Bridge, bridge(score_fn).process)
    network = dataclasses.replace(score_fn, process=process)
    if not 0 <= churn < 1:
        raise ValueError(f"`churn` must lie in [0, 1); got {churn}.")
    builder = Builder(process, times)
    builder.expect_falling("hybrid_heun")
    if builder.points[0].t >= process.t_max:
        raise ValueError(
            f"`times` must start below T = {process.t_max:g}, where the bridge's drift is infinite;"
            f" got {builder.points[0].t:g}. The authors start at T - 1e-4."
        )
    x, weights = builder.start, list[float]()

    def drift(x: Combination, point: Point, share: float) -> tuple[Combination, Combination]:
        """The state that is asked, and dx/dt there: `share` 1 of the SDE, 1/2 of the ODE."""
        answer = builder.evaluate(x, point)
        on_x, on_data, on_end, _ = _bridge_drift(process, point.t, share)
        weights.append(on_end / on_data)
        return answer.state, on_x * answer.state + on_data * answer.data

    for s, t in itertools.pairwise(builder.points):
        middle = s
        if churn:
            middle = builder.point(s.t + churn * (t.t - s.t))
            state, slope = drift(x, s, 1.0)
            spread = math.sqrt((s.t - middle.t) * _bridge_drift(process, s.t, 1.0)[3])
            x = state + (middle.t - s.t) * slope + spread * builder.fresh_noise()
        state, slope = drift(x, middle, 0.5)
        x = state + (t.t - middle.t) * slope
        if t.t > process.t_clean:
            other = drift(x, t, 0.5)[1]
            x = state + (t.t - middle.t) / 2 * (slope + other)
    tableau = builder.finish(
        x, builder.points[-1], name="hybrid_heun", source="arXiv:2309.16948", check="none"
    )
    return HybridHeun(Ended(network, np.array(weights)), tableau)


def _bridge_drift(process: Bridge, t: float, share: float) -> tuple[float, float, float, float]:
    """alpha'/alpha x - g^2 (share s - h) as weights of x, D and x_T, and g^2, at t."""
    base, at = process.base, np.float64(t)
    alpha, sigma = float(base.alpha(at)), float(base.sigma(at))
    slope = float(base.alpha_dot(at)) / alpha
    squared = 2 * sigma * (float(base.sigma_dot(at)) - slope * sigma)  # g^2
    alpha_T, sigma_T = (float(v(np.float64(base.t_max))) for v in (base.alpha, base.sigma))
    rho, rho_T = sigma / alpha, sigma_T / alpha_T
    left = (1 - rho / rho_T) * (1 + rho / rho_T)
    on_score, on_guide = (
        -share * squared / (sigma**2 * left),
        squared / (alpha**2 * rho_T**2 * left),
    )
    a, b = alpha / alpha_T * (rho / rho_T) ** 2, alpha * left
    on_x = slope - on_score - on_guide
    return on_x, on_score * b, on_score * a + on_guide * alpha / alpha_T, squared


def _known_end(x: PyTree, cond: Conditions | None) -> PyTree:
    if not cond or "x_T" not in cond:
        raise ValueError('a bridge needs its end: pass cond={"x_T": ..}, shaped like the state.')
    end = cond["x_T"]
    if jax.tree.map(np.shape, end) != jax.tree.map(np.shape, x):
        raise ValueError(
            f'cond["x_T"] must be shaped like the state, {jax.tree.map(np.shape, x)}; got '
            f"{jax.tree.map(np.shape, end)}."
        )
    return end
