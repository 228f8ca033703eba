"""Noise processes: how much signal and how much noise a state holds at time t.

A process is the pair of functions in

    x_t = alpha(t) x_0 + sigma(t) eps,      eps ~ N(0, I),

with t falling from noise to data along a sampling run, for every process, flow matching included.
From the pair follow

    log-SNR   lambda(t) = log(alpha / sigma)          (nats; rises towards the data)
    rho(t)    = sigma / alpha = exp(-lambda)          (the noise level of x / alpha)

and the inverse map `time(log_snr)`. Each process knows three times: `t_max`, where sampling starts;
`t_min`, the smallest time at which its network is asked; `t_clean`, where sigma is exactly 0.

The methods take NumPy arrays or floats, and then answer in float64 on the host, or JAX arrays, and
then answer in their dtype inside a traced program. A process is a pytree whose leaves are its
numbers. Nothing here knows of networks or solvers.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import math
import weakref
from collections.abc import Hashable
from typing import TypeAlias, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from scipy.interpolate import CubicSpline

from diffsamp._core import random
from diffsamp._core.checks import expect_int
from diffsamp._core.numeric import as_float, is_concrete, namespace, silence
from diffsamp._core.types import Apply, Array, DType, PyTree, Value

__all__ = [
    "EDM",
    "OUVE",
    "PFGMPP",
    "VE",
    "Flow",
    "Process",
    "Table",
    "Trig",
    "VPCosine",
    "VPDiscrete",
    "VPLinear",
    "beta_table",
    "edm",
    "expect_process",
    "flow",
    "ouve",
    "pfgmpp",
    "reversed_flow_apply",
    "table",
    "time_by_bisection",
    "trig",
    "ve",
    "vp_cosine",
    "vp_discrete",
    "vp_linear",
]

_T = TypeVar("_T")


@dataclass_transform(frozen_default=True)
def _pytree(cls: type[_T]) -> type[_T]:
    """Register a frozen dataclass whose fields are all numbers (leaves)."""
    new: Array = dataclasses.dataclass(frozen=True)(cls)
    fields = [field.name for field in dataclasses.fields(new)]
    jax.tree_util.register_dataclass(new, data_fields=fields, meta_fields=[])
    return new


def _positive(**values: Value) -> None:
    for name, value in values.items():
        try:
            number = math.nan if isinstance(value, str) else float(value)
        except (TypeError, ValueError):
            raise TypeError(f"`{name}` must be a number; got {value!r}.") from None
        if not (math.isfinite(number) and number > 0):
            raise ValueError(f"`{name}` must be a positive, finite number; got {value!r}.")


class Process(abc.ABC):
    """A Gaussian noise process x_t = alpha(t) x_0 + sigma(t) eps.

    Subclasses give `alpha`, `sigma`, `time`, the two derivatives and the three times; the rest is
    derived. Not enforced: that sigma / alpha rises with t.
    """

    @abc.abstractmethod
    def alpha(self, t: Array) -> Array:
        """Signal coefficient at times t; same shape as t."""

    @abc.abstractmethod
    def sigma(self, t: Array) -> Array:
        """Noise standard deviation at times t; same shape as t."""

    @abc.abstractmethod
    def alpha_dot(self, t: Array) -> Array:
        """d alpha / dt at times t."""

    @abc.abstractmethod
    def sigma_dot(self, t: Array) -> Array:
        """d sigma / dt at times t; infinite at t_clean for variance-preserving processes."""

    @abc.abstractmethod
    def time(self, log_snr: Array) -> Array:
        """Inverse of `log_snr`: the time with the given log-SNR (nats); +inf gives `t_clean`."""

    @property
    @abc.abstractmethod
    def t_max(self) -> float:
        """The time sampling starts from."""

    @property
    @abc.abstractmethod
    def t_min(self) -> float:
        """The default smallest time at which the network is asked."""

    @property
    def t_clean(self) -> float:
        """The time at which sigma is exactly 0 and alpha exactly 1."""
        return 0.0

    @silence
    def log_snr(self, t: Array) -> Array:
        """log(alpha / sigma) at times t, in nats; +inf where sigma = 0, -inf where alpha = 0."""
        xp = namespace(t, *jax.tree.leaves(self))
        return xp.log(self.alpha(t)) - xp.log(self.sigma(t))

    def uniform_time(self, u: Array) -> Array:
        """Map u in [0, 1] (0 clean, 1 noise) to the time a grid "uniform in t" puts it at."""
        return self.t_clean + (self.t_max - self.t_clean) * u

    @property
    def prior_std(self) -> float:
        """Standard deviation of the Gaussian prior: 1 if variance preserving, else sigma(t_max).

        The usual convention; it neglects what is left of the data's own shape at t_max.
        """
        return self.sigma(self.t_max)

    def prior_sample(
        self, key: jax.Array, shape: tuple[int, ...], dtype: DType = float
    ) -> jax.Array:
        """Draw x_T ~ N(0, prior_std^2 I).

        Args:
          key: one key, or one key per sample. Sample i depends on its own key (or on `key` and i)
            only, never on how many others are drawn.
          shape: (batch, ...).
          dtype: floating dtype of the result; `float` is JAX's default one.

        Returns:
          An array of `shape`.
        """
        if np.ndim(shape) != 1 or len(shape) < 1:
            raise ValueError(f"`shape` must have a leading batch axis; got {shape!r}.")
        keys, dtype = random.sample_keys(key, shape[0]), jax.dtypes.canonicalize_dtype(dtype)
        noise = jax.vmap(lambda k: jax.random.normal(k, tuple(shape[1:]), dtype))(keys)
        return noise * jnp.asarray(self.prior_std, dtype)

    def start_sample(
        self, key: jax.Array, shape: tuple[int, ...], t: Array, dtype: DType = float
    ) -> jax.Array:
        """Draw the start of a sampler whose first time is t: the prior, scaled to sigma(t).

        x = x_T sigma(t) / sigma(t_max), which is the prior itself at t_max. Below it the start is
        noise alone: what alpha(t) x_0 would add, the data's mean and shape at that level, is not
        in it. That is little while alpha(t) is small against sigma(t) / std(x_0), as for grids
        that leave out the noisiest labels; else start from data that was noised to t.

        Args:
          key: as for `prior_sample`.
          shape: (batch, ...).
          t: the first time of the sampler, () or (batch,).
          dtype: floating dtype of the result; `float` is JAX's default one.
        """
        dtype = jax.dtypes.canonicalize_dtype(dtype)
        x = self.prior_sample(key, shape, dtype)
        ratio = jnp.asarray(self.sigma(t) / self.sigma(self.t_max), dtype)
        return x * ratio.reshape(ratio.shape + (1,) * (x.ndim - ratio.ndim if ratio.ndim else 0))


@silence
def time_by_bisection(process: Process, log_snr: Array) -> Array:
    """Where a process has the given log-SNR, between t_clean and t_max, to the last digit.

    For processes of one's own whose log-SNR has no inverse in closed form.

    Args:
      process: one whose `log_snr` falls with t.
      log_snr: nats, of any shape.
    """
    log_snr = as_float(log_snr)
    xp = namespace(log_snr, *jax.tree.leaves(process))
    low = xp.zeros_like(log_snr) + as_float(process.t_clean, log_snr)
    high = xp.zeros_like(log_snr) + as_float(process.t_max, log_snr)
    for _ in range(60):
        middle = (low + high) / 2
        noisier = process.log_snr(middle) < log_snr
        low, high = xp.where(noisier, low, middle), xp.where(noisier, middle, high)
    return (low + high) / 2


def expect_process(process: object) -> None:
    """Raise unless it is a noise process that can be sampled; one of the user's own is tried once.

    What a subclass of `Process` must give: `alpha`, `sigma` and `time` for NumPy and JAX arrays, of
    the shape of t; alpha = 1 and sigma = 0 at t_clean exactly; log-SNR that falls to t_max, with
    `time` its inverse; and at t_max an alpha that is exactly 0 or at least 1e-9 sigma.

    Raises:
      TypeError: no `Process`.
      ValueError: what the process gives, where, and what is wanted.
    """
    if not isinstance(process, Process):
        raise TypeError(
            "`process` must be a diffsamp process, such as diffsamp.processes.vp_linear(), or a "
            f"subclass of Process; got {type(process).__name__}."
        )
    kind = type(process)
    if kind.__module__.partition(".")[0] == "diffsamp" or not is_concrete(process):
        return
    leaves, structure = jax.tree.flatten(process)
    if any(leaf is process for leaf in leaves):  # no pytree: known by itself
        known: _Known = _TRIED_OBJECTS
        key: Hashable = process
    else:
        known, key = _TRIED, (structure, *(np.asarray(leaf).tobytes() for leaf in leaves))
    with contextlib.suppress(TypeError):  # unhashable, or never weakly held: tried every time
        if key in known:
            return
    _try(process)
    with contextlib.suppress(TypeError):
        known.add(key)


# Objects are held weakly, not known by their addresses: an address is given again.
_Known: TypeAlias = "set[Hashable] | weakref.WeakSet[Hashable]"
_TRIED: set[Hashable] = set()
_TRIED_OBJECTS: weakref.WeakSet[Hashable] = weakref.WeakSet()


@silence
def _try(process: Process) -> None:
    name = type(process).__name__
    clean, t_max = float(process.t_clean), float(process.t_max)
    t = clean + (t_max - clean) * np.linspace(0, 1, 33)
    arrays: dict[str, Array] = {"NumPy": t, "JAX": jnp.asarray(t[1:-1], jnp.float32)}
    for where, times in arrays.items():
        for method in ("alpha", "sigma", "log_snr"):
            try:
                found: Array = getattr(process, method)(times)
                shape = np.shape(found)
            except Exception as error:
                raise ValueError(f"{name}.{method} fails on a {where} array: {error}") from error
            if shape != np.shape(times):
                raise ValueError(
                    f"{name}.{method} must give the shape of t; for {np.shape(times)} it gave "
                    f"{shape}, on a {where} array."
                )
    alpha, sigma = (np.asarray(f(t), np.float64) for f in (process.alpha, process.sigma))
    if alpha[0] != 1 or sigma[0] != 0:
        raise ValueError(
            f"at t_clean = {clean:g} {name} must have alpha = 1 and sigma = 0 exactly; it has "
            f"{alpha[0]:.17g} and {sigma[0]:.17g}. Write them so that they are, or set t_clean."
        )
    if not (np.all(np.isfinite(alpha)) and np.all(alpha >= 0) and np.all(sigma[1:] > 0)):
        raise ValueError(f"{name} must have alpha >= 0 and sigma > 0 for t_clean < t <= t_max.")
    if 0 < alpha[-1] < 1e-9 * sigma[-1]:
        raise ValueError(
            f"{name} has alpha(t_max) = {alpha[-1]:.3g}: rounding, neither 0 nor a signal. It must "
            "be exactly 0, xp.where(t >= t_max, 0.0, ..), or at least 1e-9 sigma: end at a smaller "
            "t_max."
        )
    snr = np.log(alpha) - np.log(sigma)
    if not np.all(np.diff(snr) < 0):
        bad = int(np.argmax(~(np.diff(snr) < 0)))
        raise ValueError(
            f"{name}'s log-SNR must fall with t; between t = {t[bad]:g} and {t[bad + 1]:g} it goes "
            f"from {snr[bad]:g} to {snr[bad + 1]:g}."
        )
    inner = slice(1, -1)
    back = np.asarray(process.time(snr[inner]), np.float64)
    if back.shape != t[inner].shape or not np.allclose(back, t[inner], atol=1e-6 * (t_max - clean)):
        worst = int(np.argmax(np.abs(back - t[inner]))) if back.shape == t[inner].shape else 0
        raise ValueError(
            f"{name}.time must be the inverse of log_snr: for t = {t[inner][worst]:g} it gives "
            f"{back.reshape(-1)[worst]:g}."
        )


class _VariancePreserving(Process):
    """alpha^2 + sigma^2 = 1: sigma and both derivatives follow from log alpha."""

    @silence
    def sigma_dot(self, t: Array) -> Array:
        return -self.alpha(t) * self.alpha_dot(t) / self.sigma(t)

    @property
    def prior_std(self) -> float:
        return 1.0

    @property
    def t_max(self) -> float:
        return 1.0

    @property
    def t_min(self) -> float:
        return 1e-3


@_pytree
class VPLinear(_VariancePreserving):
    """Variance preserving with beta(t) linear in t in [0, 1].

    Song et al. 2021, arXiv:2011.13456, eq. 32:

    log alpha(t) = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2.
    """

    beta_min: float
    beta_max: float

    def _log_alpha(self, t: Array) -> Array:
        t = as_float(t, self.beta_min)
        low, high = as_float(self.beta_min, t), as_float(self.beta_max, t)
        return -t * t * (high - low) / 4 - t * low / 2

    def alpha(self, t: Array) -> Array:
        return namespace(t, self.beta_min).exp(self._log_alpha(t))

    def sigma(self, t: Array) -> Array:
        xp = namespace(t, self.beta_min)
        return xp.sqrt(-xp.expm1(2 * self._log_alpha(t)))

    def alpha_dot(self, t: Array) -> Array:
        t = as_float(t, self.beta_min)
        low, high = as_float(self.beta_min, t), as_float(self.beta_max, t)
        return -self.alpha(t) * (t * (high - low) + low) / 2

    def time(self, log_snr: Array) -> Array:
        log_snr = as_float(log_snr, self.beta_min)
        xp = namespace(log_snr)
        low, high = as_float(self.beta_min, log_snr), as_float(self.beta_max, log_snr)
        # L = -2 log alpha; the quadratic's root in the form that does not cancel for small L.
        level = xp.logaddexp(xp.zeros_like(log_snr), -2 * log_snr)
        return 2 * level / (xp.sqrt(low * low + 2 * (high - low) * level) + low)


@_pytree
class VPCosine(_VariancePreserving):
    """Variance preserving, cosine alpha. Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17.

    alpha(t) = cos(pi/2 (t + s) / (1 + s)) / cos(pi/2 s / (1 + s)), t in [0, 1].

    At t = 1 alpha is exactly 0 and the log-SNR is -inf; sampling therefore starts at the time
    where the log-SNR is -5.1 (t = 0.9946), as DPM-Solver does.
    """

    s: float

    def _angles(self, t: Array) -> tuple[Array, Array]:
        """(angle of t, angle of 0)."""
        s = as_float(self.s, t)
        return (t + s) / (1 + s) * (math.pi / 2), s / (1 + s) * (math.pi / 2)

    def alpha(self, t: Array) -> Array:
        t = as_float(t, self.s)
        xp = namespace(t)
        s = as_float(self.s, t)
        # sin of the complement: exactly 0 at t = 1
        return xp.sin((1 - t) / (1 + s) * (math.pi / 2)) / xp.cos(self._angles(t)[1])

    def sigma(self, t: Array) -> Array:
        t = as_float(t, self.s)
        xp = namespace(t)
        angle, start = self._angles(t)
        difference = t / (1 + as_float(self.s, t)) * (math.pi / 2)  # angle - start
        # 1 - alpha^2 as a product, which keeps its relative accuracy for t -> 0
        square = xp.sin(difference) * xp.sin(angle + start) / xp.cos(start) ** 2
        return xp.sqrt(xp.maximum(square, 0))

    def alpha_dot(self, t: Array) -> Array:
        t = as_float(t, self.s)
        xp = namespace(t)
        angle, start = self._angles(t)
        return -xp.sin(angle) / xp.cos(start) * (math.pi / 2) / (1 + as_float(self.s, t))

    @silence
    def time(self, log_snr: Array) -> Array:
        log_snr = as_float(log_snr, self.s)
        xp = namespace(log_snr)
        zero = xp.zeros_like(log_snr)
        s = as_float(self.s, log_snr)
        start = s / (1 + s) * (math.pi / 2)
        alpha = xp.exp(-xp.logaddexp(zero, -2 * log_snr) / 2)
        square = xp.exp(-xp.logaddexp(zero, 2 * log_snr))  # sigma^2
        # near the data solve sin(angle - start) sin(angle + start) = sigma^2 cos^2(start), which is
        # well conditioned there; near the noise invert the cosine, which is well conditioned there
        near = xp.arcsin(xp.sqrt(xp.sin(start) ** 2 + square * xp.cos(start) ** 2))
        ratio = square * xp.cos(start) ** 2 / xp.sin(near + start)
        difference = xp.where(
            square < 0.5,
            xp.arcsin(xp.clip(ratio, 0, 1)),
            xp.arccos(xp.clip(alpha * xp.cos(start), 0, 1)) - start,
        )
        return difference * (1 + s) / (math.pi / 2)

    @property
    def t_max(self) -> float:
        return 0.9946


@_pytree
class VPDiscrete(_VariancePreserving):
    """Variance preserving, trained on a table of T noise levels; t is the table's (real) index.

    t = 0 .. T-1 are the levels the network was trained at, and the label it expects. Between them
    the log-SNR is interpolated linearly. t = -1 is the clean end, and between -1 and 0 sigma is
    linear in t. A table with zero terminal SNR has alpha = 0 at T-1; between T-2 and T-1 alpha is
    then linear in t, since the log-SNR has no finite value to interpolate to.
    """

    log_snrs: Array  # (T,), falling

    def __repr__(self) -> str:  # a thousand numbers say less
        levels = f"{np.shape(self.log_snrs)[-1]} levels"
        if isinstance(self.log_snrs, np.ndarray) and self.log_snrs.ndim == 1:
            levels += f", log-SNR {self.log_snrs[0]:.4g} to {self.log_snrs[-1]:.4g}"
        return f"VPDiscrete({levels})"

    def _table(self, like: Array) -> Array:
        return as_float(self.log_snrs, like)

    def _parts(self, t: Array) -> tuple[Array, Array, Array, Array]:
        """(alpha, sigma, d alpha/dt, d sigma/dt) from the three pieces of the definition."""
        t = as_float(t, self.log_snrs)
        xp = namespace(t, self.log_snrs)
        table = self._table(t)
        last = table.shape[0] - 1
        left = xp.clip(xp.floor(t), 0, last - 1)
        index = left.astype(np.int32)
        below, above = table[index], table[index + 1]
        ends_at_zero_snr = xp.isneginf(above)
        slope = xp.where(ends_at_zero_snr, 0.0, above - below)
        log_snr = below + slope * (t - left)
        zero = xp.zeros_like(log_snr)
        alpha = xp.exp(-xp.logaddexp(zero, -2 * log_snr) / 2)
        sigma = xp.exp(-xp.logaddexp(zero, 2 * log_snr) / 2)
        alpha_dot, sigma_dot = alpha * sigma**2 * slope, -sigma * alpha**2 * slope

        # last piece of a zero-terminal-SNR table: alpha falls linearly to 0
        # (each piece stays in its own range elsewhere: a NaN there would spoil the gradient here)
        linear = alpha * (1 - xp.where(t < 0, 0.0, t - left))
        linear_sigma = xp.sqrt(1 - linear**2)
        linear_dot = linear * alpha / linear_sigma
        # clean piece: sigma falls linearly to 0 at t = -1
        first = xp.exp(-xp.logaddexp(xp.zeros_like(table[0]), 2 * table[0]) / 2)
        clean = first * xp.where(t < 0, xp.where(t < -1, 0.0, 1 + t), 1.0)
        clean_alpha = xp.sqrt(1 - clean**2)

        def pick(inner: Array, zero_snr: Array, near_clean: Array) -> Array:
            return xp.where(t < 0, near_clean, xp.where(ends_at_zero_snr, zero_snr, inner))

        return (
            pick(alpha, linear, clean_alpha),
            pick(sigma, linear_sigma, clean),
            pick(alpha_dot, -alpha, -clean * first / clean_alpha),
            pick(sigma_dot, linear_dot, first * xp.ones_like(t)),
        )

    @silence
    def alpha(self, t: Array) -> Array:
        return self._parts(t)[0]

    @silence
    def sigma(self, t: Array) -> Array:
        return self._parts(t)[1]

    @silence
    def alpha_dot(self, t: Array) -> Array:
        return self._parts(t)[2]

    @silence
    def sigma_dot(self, t: Array) -> Array:
        return self._parts(t)[3]

    @silence
    def time(self, log_snr: Array) -> Array:
        log_snr = as_float(log_snr, self.log_snrs)
        xp = namespace(log_snr, self.log_snrs)
        table = self._table(log_snr)
        zero = xp.zeros_like(log_snr)
        last = table.shape[0] - 1
        # a zero-SNR last entry has no finite value: interpolate up to the one before it
        finite = xp.where(xp.isneginf(table), table[last - 1] - 1, table)
        index = xp.arange(last + 1, dtype=finite.dtype)
        inner = xp.interp(-log_snr, -finite, index)
        alpha = xp.exp(-xp.logaddexp(zero, -2 * log_snr) / 2)
        sigma = xp.exp(-xp.logaddexp(zero, 2 * log_snr) / 2)
        tail = xp.exp(-xp.logaddexp(xp.zeros_like(table[0]), -2 * table[last - 1]) / 2)
        first = xp.exp(-xp.logaddexp(xp.zeros_like(table[0]), 2 * table[0]) / 2)
        in_tail = xp.isneginf(table[last]) & (log_snr < table[last - 1])
        inner = xp.where(in_tail, last - alpha / tail, inner)
        return xp.where(log_snr > table[0], sigma / first - 1, inner)

    @property
    def t_max(self) -> float:
        return float(np.shape(self.log_snrs)[0] - 1)

    @property
    def t_min(self) -> float:
        return 0.0

    @property
    def t_clean(self) -> float:
        return -1.0


@_pytree
class VE(Process):
    """Variance exploding: alpha = 1, sigma(t) = sigma_min (sigma_max / sigma_min)^t, t in (0, 1].

    Song et al. 2021, arXiv:2011.13456, eq. 31. As there, sigma jumps to exactly 0 at t = 0: no
    time lies between the clean end and t = 1e-5.
    """

    sigma_min: float
    sigma_max: float

    def alpha(self, t: Array) -> Array:
        t = as_float(t, self.sigma_min)
        return namespace(t).ones_like(t)

    def _growth(self, like: Array) -> Array:
        low, high = as_float(self.sigma_min, like), as_float(self.sigma_max, like)
        return namespace(low, high).log(high / low)

    def sigma(self, t: Array) -> Array:
        t = as_float(t, self.sigma_min)
        xp = namespace(t)
        value = as_float(self.sigma_min, t) * xp.exp(t * self._growth(t))
        return xp.where(t <= 0, xp.zeros_like(t), value)

    def alpha_dot(self, t: Array) -> Array:
        return namespace(t, self.sigma_min).zeros_like(as_float(t, self.sigma_min))

    def sigma_dot(self, t: Array) -> Array:
        return self.sigma(t) * self._growth(as_float(t, self.sigma_min))

    @silence
    def time(self, log_snr: Array) -> Array:
        log_snr = as_float(log_snr, self.sigma_min)
        xp = namespace(log_snr)
        low = as_float(self.sigma_min, log_snr)
        t = (-log_snr - xp.log(low)) / self._growth(log_snr)
        return xp.where(xp.isposinf(log_snr), xp.zeros_like(t), xp.maximum(t, self.t_min))

    @property
    def t_max(self) -> float:
        return 1.0

    @property
    def t_min(self) -> float:
        return 1e-5


@_pytree
class EDM(Process):
    """alpha = 1, sigma(t) = t: time is the noise level. Karras et al. 2022, arXiv:2206.00364."""

    sigma_min: float
    sigma_max: float

    def alpha(self, t: Array) -> Array:
        t = as_float(t, self.sigma_min)
        return namespace(t).ones_like(t)

    def sigma(self, t: Array) -> Array:
        return as_float(t, self.sigma_min)

    def alpha_dot(self, t: Array) -> Array:
        return namespace(t, self.sigma_min).zeros_like(as_float(t, self.sigma_min))

    def sigma_dot(self, t: Array) -> Array:
        return namespace(t, self.sigma_min).ones_like(as_float(t, self.sigma_min))

    def time(self, log_snr: Array) -> Array:
        log_snr = as_float(log_snr, self.sigma_min)
        return namespace(log_snr).exp(-log_snr)

    @property
    def t_max(self) -> float:
        return self.sigma_max

    @property
    def t_min(self) -> float:
        return self.sigma_min


@_pytree
class PFGMPP(EDM):
    """PFGM++: EDM's process, whose prior is not Gaussian. Xu et al. 2023, arXiv:2302.04265.

    Data of N dimensions is augmented by `dimension` further ones; r = sigma sqrt(dimension) is the
    distance in those. Everything but the prior is EDM's with sigma = r / sqrt(dimension), and as
    the dimension grows the prior becomes Gaussian. Churn and Restart with this process add Gaussian
    noise, as the authors' samplers do for churn.
    """

    dimension: float

    def prior_sample(
        self, key: jax.Array, shape: tuple[int, ...], dtype: DType = float
    ) -> jax.Array:
        """Draw x_T = R u, u uniform on the sphere, R^2 / r_max^2 = B / (1 - B), B ~ Beta.

        B ~ Beta(N / 2, dimension / 2) for N elements a sample, so that E |x|^2 / N = sigma_max^2
        dimension / (dimension - 2). Arguments as for any process.
        """
        if np.ndim(shape) != 1 or len(shape) < 1:
            raise ValueError(f"`shape` must have a leading batch axis; got {shape!r}.")
        keys, dtype = random.sample_keys(key, shape[0]), jax.dtypes.canonicalize_dtype(dtype)
        size = math.prod(shape[1:])
        radius = as_float(self.sigma_max) * namespace(self.dimension).sqrt(self.dimension)

        def draw(key: jax.Array) -> jax.Array:
            key_direction, key_data, key_rest = jax.random.split(key, 3)
            u = jax.random.normal(key_direction, (size,), jnp.float32)
            # B / (1 - B) is a ratio of two gamma variables
            data = jax.random.gamma(key_data, size / 2, dtype=jnp.float32)
            rest = jax.random.gamma(
                key_rest, jnp.asarray(self.dimension, jnp.float32) / 2, dtype=jnp.float32
            )
            x = u / jnp.linalg.norm(u) * jnp.sqrt(data / rest)
            return (x * jnp.asarray(radius, jnp.float32)).astype(dtype).reshape(shape[1:])

        return jax.vmap(draw)(keys)


@_pytree
class Flow(Process):
    """Flow matching on the straight path: alpha = 1 - t, sigma = t; velocity = eps - x_0.

    Lipman et al. 2023, arXiv:2210.02747; Liu et al. 2023, arXiv:2209.03003. Time falls from 1
    (noise) to 0 (data); see `reversed_flow_apply` for models trained the other way round.

    `shift` is the resolution shift of Esser et al. 2024 (arXiv:2403.03206, eq. 23): it moves the
    points of a grid that is uniform in t towards the noise, t' = shift t / (1 + (shift - 1) t). It
    changes where schedules put their points, not what t means to the network.
    """

    shift: float

    def alpha(self, t: Array) -> Array:
        return 1 - as_float(t, self.shift)

    def sigma(self, t: Array) -> Array:
        return as_float(t, self.shift)

    def alpha_dot(self, t: Array) -> Array:
        return -namespace(t, self.shift).ones_like(as_float(t, self.shift))

    def sigma_dot(self, t: Array) -> Array:
        return namespace(t, self.shift).ones_like(as_float(t, self.shift))

    @silence
    def time(self, log_snr: Array) -> Array:
        log_snr = as_float(log_snr, self.shift)
        xp = namespace(log_snr)
        return xp.exp(-xp.logaddexp(xp.zeros_like(log_snr), log_snr))

    def uniform_time(self, u: Array) -> Array:
        return self.shift * u / (1 + (self.shift - 1) * u)

    @property
    def t_max(self) -> float:
        return 1.0

    @property
    def t_min(self) -> float:
        return 1e-3


@_pytree
class Trig(Process):
    """alpha = cos(angle), sigma = sigma_data sin(angle), angle = (pi / 2) t / end, t in [0, end].

    v-diffusion (Salimans & Ho 2022, arXiv:2202.00512), the GVP interpolant of SiT
    (arXiv:2401.08740) and TrigFlow (Lu & Song 2024, arXiv:2410.11081). With `end` = pi / 2 the
    time is the angle and the velocity dx/dt = sigma_data cos(t) eps - sin(t) x_0 is TrigFlow's, in
    units of its data; with `sigma_data` = 1 that is "v", whatever `end` is.

    At t = end alpha is exactly 0 and the log-SNR is -inf, as for `Flow`.
    """

    sigma_data: float
    end: float

    def _angles(self, t: Array) -> tuple[Array, Array, Array]:
        """(angle, its complement, d angle / dt); the complement is exactly 0 at t = end."""
        t = as_float(t, self.end)
        end = as_float(self.end, t)
        rate = math.pi / 2 / end
        return t * rate, (end - t) * rate, rate * namespace(t).ones_like(t)

    def alpha(self, t: Array) -> Array:
        return namespace(t, self.end).sin(self._angles(t)[1])

    def sigma(self, t: Array) -> Array:
        angle = self._angles(t)[0]
        return as_float(self.sigma_data, angle) * namespace(angle).sin(angle)

    def alpha_dot(self, t: Array) -> Array:
        angle, _, rate = self._angles(t)
        return -rate * namespace(angle).sin(angle)

    def sigma_dot(self, t: Array) -> Array:
        _, complement, rate = self._angles(t)
        return as_float(self.sigma_data, rate) * rate * namespace(rate).sin(complement)

    @silence
    def time(self, log_snr: Array) -> Array:
        log_snr = as_float(log_snr, self.end)
        xp = namespace(log_snr)
        shifted = log_snr + xp.log(as_float(self.sigma_data, log_snr))
        # the tangent or the cotangent, whichever is below 1
        small = xp.exp(-xp.abs(shifted))
        angle = xp.where(shifted > 0, xp.arctan(small), math.pi / 2 - xp.arctan(small))
        return angle * (as_float(self.end, log_snr) / (math.pi / 2))

    @property
    def t_max(self) -> float:
        return self.end

    @property
    def t_min(self) -> float:
        return 1e-3 * self.end


@_pytree
class OUVE(Process):
    """Speech enhancement's process around a known mean y: dx = theta (y - x) dt + g(t) dw.

    g = sigma_min (sigma_max / sigma_min)^t sqrt(2 L), L = log(sigma_max / sigma_min), t in [0, 1].
    This is the law of x - y, and `ds.known_mean.around` puts y back:

        alpha = exp(-theta t),  sigma^2 = sigma_min^2 L / (theta + L) (exp(2 L t) - exp(-2 theta t))

    SGMSE: Richter et al. 2022, arXiv:2208.05830, eq. 10; StoRM: Lemercier et al. 2022,
    arXiv:2212.11851.
    """

    theta: float
    sigma_min: float
    sigma_max: float

    def _numbers(self, like: Array) -> tuple[Array, Array, Array]:
        """theta, L and the variance's factor."""
        theta, low, high = (as_float(v, like) for v in (self.theta, self.sigma_min, self.sigma_max))
        growth = namespace(low, high).log(high / low)
        return theta, growth, low * low * growth / (theta + growth)

    def alpha(self, t: Array) -> Array:
        t = as_float(t, self.theta)
        return namespace(t).exp(-self._numbers(t)[0] * t)

    def sigma(self, t: Array) -> Array:
        t = as_float(t, self.theta)
        theta, growth, factor = self._numbers(t)
        xp = namespace(t)
        return xp.exp(-theta * t) * xp.sqrt(factor * xp.expm1(2 * (theta + growth) * t))

    def alpha_dot(self, t: Array) -> Array:
        t = as_float(t, self.theta)
        return -self._numbers(t)[0] * self.alpha(t)

    @silence
    def sigma_dot(self, t: Array) -> Array:
        t = as_float(t, self.theta)
        theta, growth, factor = self._numbers(t)
        squared = 2 * (theta + growth) * factor * namespace(t).exp(2 * growth * t)  # g^2
        sigma = self.sigma(t)
        return squared / (2 * sigma) - theta * sigma

    @silence
    def time(self, log_snr: Array) -> Array:
        log_snr = as_float(log_snr, self.theta)
        theta, growth, factor = self._numbers(log_snr)
        xp = namespace(log_snr)
        return xp.log1p(xp.exp(-2 * log_snr) / factor) / (2 * (theta + growth))

    @property
    def t_max(self) -> float:
        return 1.0

    @property
    def t_min(self) -> float:
        return 0.03


def _piece(index: Array, knots: Array, values: Array, slopes: Array) -> tuple[Array, ...]:
    """Hermite's cubic between two knots: value + s (left + s (bend + s twist)), and the width."""
    width = knots[index + 1] - knots[index]
    rise = values[index + 1] - values[index]
    left, right = slopes[index] * width, slopes[index + 1] * width
    return values[index], left, 3 * rise - 2 * left - right, left + right - 2 * rise, width


def _cubic(x: Array, knots: Array, values: Array, slopes: Array) -> tuple[Array, Array]:
    """Hermite's cubic through the knots and its derivative; straight beyond the outer ones."""
    xp = namespace(x, knots)
    inner = xp.clip(x, knots[0], knots[-1])
    index = xp.clip(xp.searchsorted(knots, inner, side="right") - 1, 0, len(knots) - 2)
    value, left, bend, twist, width = _piece(index, knots, values, slopes)
    s = (inner - knots[index]) / width
    slope = (left + s * (2 * bend + 3 * s * twist)) / width
    return value + s * (left + s * (bend + s * twist)) + (x - inner) * slope, slope


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table(Process):
    """A process from numbers; made by `table`.

    The log-SNR is a cubic of z = log((t - t_clean) / (t_max - t)), or of log(t - t_clean) where
    alpha does not end at 0, and straight in z beyond the outermost levels: there rho is a power of
    the distance to the end. log(alpha^2 + sigma^2) / 2 is a cubic of t. Everything else follows
    from the two, so that derivatives and the inverse belong to the same path.

    Attributes:
      z: (n,) z of the levels with both signal and noise.
      log_snrs: (n,) nats there, falling.
      log_snr_slopes: (n,) its derivative by z.
      times: (m,) all times, rising.
      norms: (m,) log(alpha^2 + sigma^2) / 2 there.
      norm_slopes: (m,) its derivative by t.
      t_first: the smallest time at which the network is asked.
    """

    z: Array
    log_snrs: Array
    log_snr_slopes: Array
    times: Array
    norms: Array
    norm_slopes: Array
    t_first: Array

    @property
    def pure(self) -> bool:
        """Whether alpha(t_max) = 0."""
        return np.shape(self.times)[-1] == np.shape(self.z)[-1] + 2

    def __repr__(self) -> str:
        return f"Table({np.shape(self.times)[-1]} levels)"

    def _ends(self, t: Array) -> tuple[Array, Array, Array]:
        """t, and its distances to the clean end and to t_max."""
        t = as_float(t, self.times)
        times = as_float(self.times, t)
        return t, t - times[0], times[-1] - t

    def _log_snr(self, t: Array, *, inside: bool = False) -> tuple[Array, Array]:
        """Log-SNR and its derivative by t; `inside` keeps off ends where they are infinite."""
        t, below, above = self._ends(t)
        xp = namespace(t)
        clean, noise = below <= 0, (above <= 0) & self.pure
        least = 1e-9 * (below + above) if inside else below + above
        below = xp.where(clean, least, below)
        above = xp.where(noise, least, above)
        z = xp.log(below) - (xp.log(above) if self.pure else 0.0)
        rate = 1 / below + (1 / above if self.pure else 0.0)
        parts = (as_float(v, t) for v in (self.z, self.log_snrs, self.log_snr_slopes))
        value, slope = _cubic(z, *parts)
        if not inside:
            value = xp.where(clean, math.inf, xp.where(noise, -math.inf, value))
        return value, slope * rate

    def _norm(self, t: Array) -> tuple[Array, Array]:
        t = as_float(t, self.times)
        parts = (as_float(v, t) for v in (self.times, self.norms, self.norm_slopes))
        return _cubic(t, *parts)

    def _part(self, t: Array, sign: int, *, inside: bool = False) -> Array:
        snr, norm = self._log_snr(t, inside=inside)[0], self._norm(t)[0]
        xp = namespace(norm)
        return xp.exp(norm - xp.logaddexp(xp.zeros_like(snr), -2 * sign * snr) / 2)

    def _part_dot(self, t: Array, sign: int) -> Array:
        snr, rate = self._log_snr(t, inside=True)
        xp = namespace(snr)
        other = xp.exp(-xp.logaddexp(xp.zeros_like(snr), 2 * sign * snr))
        return self._part(t, sign, inside=True) * (self._norm(t)[1] + sign * rate * other)

    @silence
    def alpha(self, t: Array) -> Array:
        return self._part(t, 1)

    @silence
    def sigma(self, t: Array) -> Array:
        return self._part(t, -1)

    @silence
    def alpha_dot(self, t: Array) -> Array:
        return self._part_dot(t, 1)

    @silence
    def sigma_dot(self, t: Array) -> Array:
        return self._part_dot(t, -1)

    @silence
    def log_snr(self, t: Array) -> Array:
        return self._log_snr(t)[0]

    @silence
    def time(self, log_snr: Array) -> Array:
        log_snr = as_float(log_snr, self.times)
        xp = namespace(log_snr)
        z, snrs, slopes, times = (
            as_float(v, log_snr) for v in (self.z, self.log_snrs, self.log_snr_slopes, self.times)
        )
        inner = xp.clip(log_snr, snrs[-1], snrs[0])
        index = xp.clip(xp.searchsorted(-snrs, -inner, side="right") - 1, 0, len(snrs) - 2)
        value, left, bend, twist, width = _piece(index, z, snrs, slopes)
        low, high = xp.zeros_like(inner), xp.ones_like(inner)
        for _ in range(20):
            s = (low + high) / 2
            noisier = value + s * (left + s * (bend + s * twist)) < inner
            low, high = xp.where(noisier, low, s), xp.where(noisier, s, high)
        for _ in range(3):  # Newton's last digits
            off = value - inner + s * (left + s * (bend + s * twist))
            s = xp.clip(s - off / (left + s * (2 * bend + 3 * s * twist)), 0, 1)
        found = z[index] + s * width
        end = xp.where(log_snr > snrs[0], slopes[0], slopes[-1])
        found = found + xp.where(log_snr == inner, 0.0, (log_snr - inner) / end)
        if not self.pure:
            return xp.minimum(times[0] + xp.exp(found), times[-1])
        share = xp.exp(-xp.logaddexp(xp.zeros_like(found), -found))
        return times[0] + (times[-1] - times[0]) * share

    @property
    def t_max(self) -> float:
        return self.times[-1]

    @property
    def t_min(self) -> float:
        return self.t_first

    @property
    def t_clean(self) -> float:
        return self.times[0]


def vp_linear(beta_min: float = 0.1, beta_max: float = 20.0) -> VPLinear:
    """The linear-beta variance-preserving process of ScoreSDE; t in [0, 1]."""
    _positive(beta_min=beta_min, beta_max=beta_max)
    if beta_max < beta_min:
        raise ValueError(f"`beta_max` must be at least `beta_min`; got {beta_max} < {beta_min}.")
    return VPLinear(float(beta_min), float(beta_max))


def vp_cosine(s: float = 0.008) -> VPCosine:
    """The cosine variance-preserving process of improved DDPM; t in [0, 1]."""
    _positive(s=s)
    return VPCosine(float(s))


def beta_table(
    name: str, num_levels: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> np.ndarray:
    """The named table of per-step betas, shape (num_levels,), float64.

    "linear": uniform between the two ends (Ho et al. 2020, arXiv:2006.11239);
    "scaled_linear": uniform in sqrt(beta) (latent diffusion);
    "squaredcos_cap_v2": from the cosine alpha-bar, capped at 0.999 (improved DDPM).

    Args:
      name: one of the three.
      num_levels: number of betas.
      beta_start: the first beta; not used by "squaredcos_cap_v2".
      beta_end: the last beta; likewise.

    Raises:
      ValueError: an unknown name, fewer than 2 levels, or an end that is not positive.
    """
    expect_int(num_levels, "num_levels", at_least=2)
    _positive(beta_start=beta_start, beta_end=beta_end)
    if name == "linear":
        return np.linspace(beta_start, beta_end, num_levels)
    if name == "scaled_linear":
        return np.linspace(beta_start**0.5, beta_end**0.5, num_levels) ** 2
    if name == "squaredcos_cap_v2":
        u = np.arange(num_levels + 1) / num_levels
        alpha_bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    raise ValueError(
        f'`betas` must be "linear", "scaled_linear", "squaredcos_cap_v2" or an array; got {name!r}.'
    )


@silence
def vp_discrete(
    betas: Array = "linear",
    *,
    alphas_cumprod: Array = None,
    log_snr: Array = None,
    num_levels: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    zero_terminal_snr: bool = False,
) -> VPDiscrete:
    """A variance-preserving process given by a table, the cleanest level first; t is the index.

    t = 0 .. T-1 are the trained levels, t = -1 is the clean end (see `VPDiscrete`). Give one of the
    three tables.

    Args:
      betas: an array of T betas in (0, 1), or the name of a table (see `beta_table`).
      alphas_cumprod: an array of T products alpha-bar = alpha^2, falling within (0, 1]; 0 at the
        last for zero terminal SNR. What checkpoints call `alphas_cumprod` or `alphas_bar`.
      log_snr: an array of T values log(alpha / sigma) in nats, falling; -inf at the last for zero
        terminal SNR.
      num_levels: T, for a named table.
      beta_start: first beta of a named table.
      beta_end: last beta of a named table.
      zero_terminal_snr: shift and scale sqrt(alpha-bar) so that the last is 0 and the first
        unchanged (Lin et al. 2023, arXiv:2305.08891, algorithm 1).

    Returns:
      A `VPDiscrete` whose times are real; round them with `ds.schedules.rounded` if the network
      takes integer labels only.

    Raises:
      ValueError: more than one table, values outside their range, fewer than 2, or a table that
        looks like another one: betas that start near 1 or fall like alpha-bar, a table that is
        reversed.
    """
    given = {"alphas_cumprod": alphas_cumprod, "log_snr": log_snr}
    names = [name for name, table in given.items() if table is not None]
    if names and not (isinstance(betas, str) and betas == "linear"):
        names = ["betas", *names]
    if len(names) > 1:
        raise ValueError(f"give one table; got {' and '.join(f'`{name}`' for name in names)}.")
    if not names:
        if isinstance(betas, str):
            betas = beta_table(betas, num_levels, beta_start, beta_end)
        log_alpha_bar = np.cumsum(np.log1p(-_betas(betas)))
    elif names == ["alphas_cumprod"]:
        log_alpha_bar = np.log(_falling(alphas_cumprod, "alphas_cumprod", 0.0, 1.0))
    else:
        snr = 2 * _falling(log_snr, "log_snr", -np.inf, np.inf)
        log_alpha_bar = -np.logaddexp(0.0, -snr)
    if zero_terminal_snr:
        root = np.exp(log_alpha_bar / 2)
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        log_alpha_bar = 2 * np.log(root)
    return VPDiscrete((log_alpha_bar - np.log(-np.expm1(log_alpha_bar))) / 2)


def _table(values: Value, name: str) -> np.ndarray:
    table = np.asarray(values, np.float64)
    if table.ndim != 1 or table.shape[0] < 2:
        raise ValueError(f"`{name}` must have shape (T,) with T >= 2; got shape {table.shape}.")
    return table


def _betas(values: Value) -> np.ndarray:
    """A table of betas, and not one of alpha-bar, alpha or sigma."""
    betas = _table(values, "betas")
    if betas[0] > 0.5 and betas[0] > betas[-1]:
        raise ValueError(
            f"`betas` starts at {betas[0]:.4g} and falls to {betas[-1]:.4g}: that is a table of "
            "alpha-bar (or of 1 - beta), not of betas. Pass it as `alphas_cumprod=` (alpha^2, the "
            "products of 1 - beta)."
        )
    if not np.all((betas > 0) & (betas < 1)):
        bad = int(np.argmin((betas > 0) & (betas < 1)))
        raise ValueError(f"`betas` must lie in (0, 1); got betas[{bad}] = {betas[bad]}.")
    if betas[0] > 0.5:
        raise ValueError(
            f"`betas` starts at {betas[0]:.4g}: one step would leave nothing of the data. Betas "
            "start near 1e-4; pass alpha-bar as `alphas_cumprod=`."
        )
    if np.all(np.diff(betas) < 0):
        raise ValueError(
            f"`betas` falls from {betas[0]:.4g} to {betas[-1]:.4g}: the cleanest level comes "
            "first, so betas rise. Reverse the table, or pass it as what it is: "
            "`alphas_cumprod=` or `log_snr=`."
        )
    return betas


def _falling(values: Value, name: str, low: float, high: float) -> np.ndarray:
    """A table that falls within [low, high], the cleanest level first; `low` itself only last."""
    table = _table(values, name)
    inside = (table > low) & (table < high)
    inside[-1] |= table[-1] == low
    if not np.all(inside):
        bad = int(np.argmin(inside))
        limits = f" in ({low:g}, {high:g})" if np.isfinite(high) else ""
        raise ValueError(
            f"`{name}` must be numbers{limits} (the lower end at the last level only); got "
            f"{name}[{bad}] = {table[bad]}."
        )
    if not np.all(np.diff(table) < 0):
        if np.all(np.diff(table) > 0):
            hint = (
                "It rises: reverse it, the cleanest level comes first"
                + (", or pass it as `betas=`" if name == "alphas_cumprod" else "")
                + "."
            )
        else:
            bad = int(np.argmax(np.diff(table) >= 0))
            hint = f"{name}[{bad}] = {table[bad]} is followed by {table[bad + 1]}."
        raise ValueError(f"`{name}` must fall from the cleanest level to the noisiest. {hint}")
    return table


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> VE:
    """The variance-exploding process of ScoreSDE; t in (0, 1], sigma geometric in t."""
    _positive(sigma_min=sigma_min, sigma_max=sigma_max)
    if sigma_max <= sigma_min:
        raise ValueError(f"`sigma_max` must exceed `sigma_min`; got {sigma_max} <= {sigma_min}.")
    return VE(float(sigma_min), float(sigma_max))


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> EDM:
    """The EDM process: alpha = 1 and t = sigma, from `sigma_max` down to `sigma_min`, then 0."""
    _positive(sigma_min=sigma_min, sigma_max=sigma_max)
    if sigma_max <= sigma_min:
        raise ValueError(f"`sigma_max` must exceed `sigma_min`; got {sigma_max} <= {sigma_min}.")
    return EDM(float(sigma_min), float(sigma_max))


def pfgmpp(dimension: float, sigma_min: float = 0.002, sigma_max: float = 80.0) -> PFGMPP:
    """PFGM++ with `dimension` augmented dimensions (the paper's D); see `PFGMPP`.

    Args:
      dimension: above 2; 128 and 2048 are the paper's for FFHQ and CIFAR-10.
      sigma_min: as for `edm`.
      sigma_max: as for `edm`.

    Raises:
      ValueError: a dimension of at most 2, where the prior has no variance.
    """
    _positive(dimension=dimension)
    if not dimension > 2:
        raise ValueError(f"`dimension` must be above 2; got {dimension}.")
    base = edm(sigma_min, sigma_max)
    return PFGMPP(base.sigma_min, base.sigma_max, float(dimension))


def flow(shift: float = 1.0) -> Flow:
    """The straight flow-matching path; t falls from 1 (noise) to 0 (data)."""
    _positive(shift=shift)
    return Flow(float(shift))


def trig(sigma_data: float = 1.0, *, end: float = 1.0) -> Trig:
    """alpha = cos, sigma = sin: v-diffusion, SiT's GVP path, TrigFlow; see `Trig`.

    Args:
      sigma_data: standard deviation of the data in the units of x; sigma(end) is as large.
      end: the time of pure noise: 1, or pi / 2 for networks whose time is the angle (TrigFlow).

    Raises:
      ValueError: a number that is not positive.
    """
    _positive(sigma_data=sigma_data, end=end)
    return Trig(float(sigma_data), float(end))


def ouve(theta: float = 1.5, sigma_min: float = 0.05, sigma_max: float = 0.5) -> OUVE:
    """The law of x - y in speech enhancement (SGMSE, StoRM); see `OUVE`.

    Args:
      theta: stiffness, how fast the mean goes to y.
      sigma_min: as for `ve`.
      sigma_max: as for `ve`.

    Raises:
      ValueError: a number that is not positive, or no growth of the noise.
    """
    _positive(theta=theta)
    base = ve(sigma_min, sigma_max)
    return OUVE(float(theta), base.sigma_min, base.sigma_max)


def table(times: Array, alpha: Array, sigma: Array, *, t_min: float | None = None) -> Table:
    """A process from a table of its two coefficients, such as a learned or an optimised path.

    What lies between the levels is smooth and strictly noisier with t; see `Table`.

    Examples:
      >>> import numpy as np, diffsamp as ds
      >>> t = np.linspace(0, 1, 33)
      >>> process = ds.processes.table(t, (1 - t) ** 2, t)
      >>> float(np.round(process.alpha(0.4), 5)), float(process.alpha(1.0))
      (0.36, 0.0)

    Args:
      times: (n,) rising, from the clean end to t_max; at least 5.
      alpha: (n,) signal coefficients: 1 at first, then positive; 0 at most at the last.
      sigma: (n,) noise standard deviations: 0 at first, then positive.
      t_min: the smallest time at which the network is asked; None: the second one.

    Raises:
      ValueError: another shape, a first level that is not clean, or a log-SNR that does not fall.
    """
    times, alpha, sigma = (
        _table(v, n) for v, n in ((times, "times"), (alpha, "alpha"), (sigma, "sigma"))
    )
    if len(times) < 5 or not len(times) == len(alpha) == len(sigma):
        raise ValueError(
            "`times`, `alpha` and `sigma` must be as long as each other, 5 levels or more; got "
            f"{len(times)}, {len(alpha)} and {len(sigma)}."
        )
    if not (np.all(np.isfinite([times, alpha, sigma])) and np.all(np.diff(times) > 0)):
        raise ValueError("`times` must rise, and all three tables be finite.")
    if alpha[0] != 1 or sigma[0] != 0:
        raise ValueError(
            "the table must begin at the clean end, with alpha = 1 and sigma = 0 exactly; it "
            f"begins with {alpha[0]:g} and {sigma[0]:g}. Put that level in front, or divide by "
            "alpha[0]."
        )
    pure = bool(alpha[-1] == 0)
    inner = slice(1, -1 if pure else None)
    if not (np.all(alpha[inner] > 0) and np.all(sigma[1:] > 0)):
        raise ValueError("`alpha` must be positive before the last level, `sigma` after the first.")
    snr = np.log(alpha[inner]) - np.log(sigma[inner])
    if not np.all(np.diff(snr) < 0):
        bad = int(np.argmax(np.diff(snr) >= 0)) + 1
        raise ValueError(
            f"the log-SNR must fall from level to level; it does not from {bad} to {bad + 1} (t = "
            f"{times[bad]:g} and {times[bad + 1]:g})."
        )
    first = times[1] if t_min is None else float(t_min)
    if not times[0] < first < times[-1]:
        raise ValueError(f"`t_min` must lie between the first and the last time; got {t_min}.")
    z = np.log(times[inner] - times[0]) - (np.log(times[-1] - times[inner]) if pure else 0.0)
    norms = np.log(np.hypot(alpha, sigma))
    return Table(z, snr, _slopes(z, snr, falls=True), times, norms, _slopes(times, norms), first)


def _slopes(x: np.ndarray, y: np.ndarray, *, falls: bool = False) -> np.ndarray:
    """A spline's derivatives at its knots; `falls`: held where Hermite's cubics fall (Fritsch and
    Carlson), at least a tenth as steep as the neighbouring secants."""
    slopes = CubicSpline(x, y)(x, 1)
    if falls:
        steep = np.abs(np.diff(y) / np.diff(x))
        least = np.minimum(np.append(steep[0], steep), np.append(steep, steep[-1]))
        slopes = -np.clip(-slopes, 0.1 * least, 3 * least)
    return slopes


def reversed_flow_apply(apply: Apply, *, offset: float = 0.0) -> Apply:
    """Adapt a flow model trained with t = 0 noise, t = 1 data, velocity = x_0 - eps.

    Returns `apply` with t replaced by 1 - t and the output negated, which is the convention of
    `flow`: t = 1 noise, velocity = eps - x_0. Call it once and keep the result: a new function
    each time would compile anew each time.

    Args:
      apply: (params, x, t, **cond) -> velocity, of the network's own time.
      offset: in [0, 1): the network is asked at offset + (1 - offset) (1 - t), which starts at
        `offset` instead of 0, while the state steps over all of [0, 1]. Rectified flow's code does
        so with 0.001 (Liu et al. 2022, arXiv:2209.03003).

    Raises:
      ValueError: an offset outside [0, 1).
    """
    if not 0 <= offset < 1:
        raise ValueError(f"`offset` must lie in [0, 1); got {offset}.")

    def adapted(params: PyTree, x: PyTree, t: Array, **cond: PyTree) -> PyTree:
        own = 1 - t if offset == 0 else offset + (1 - offset) * (1 - t)
        return jax.tree.map(jnp.negative, apply(params, x, own, **cond))

    return adapted
