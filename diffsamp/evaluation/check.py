"""`check`: does what was said of a network fit it? Measured on a few data, in seconds.

A network trained to denoise has, at every level, a smaller mean squared error than any other
function of the same input (Vincent 2011; Ho et al. 2020, arXiv:2006.11239, eq. 12), so also than
itself called in another way. Data are noised, the network is asked for them under the declared
convention and under those that are easily mistaken for it, and the errors are compared on the same
noise, each in units of the best linear denoiser's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import predictions
from diffsamp._core.checks import expect_int
from diffsamp._core.numeric import to_host, working_dtype
from diffsamp._core.types import Apply, Array, Conditions, Key, PyTree
from diffsamp.evaluation._conventions import DECLARED, Convention, others, shifted
from diffsamp.predictions import Level
from diffsamp.processes import Process
from diffsamp.score import ScoreFn, expect_score_fn

__all__ = ["Check", "check"]

# levels in units of sigma / (alpha std): beyond, no network knows more than a linear filter, or
# the data are what it is given
_LOW, _HIGH = 0.02, 20.0
_SURE = 4.0  # standard errors by which another convention must be better
_GAIN = 0.02  # and by how much of the error; a trained network is better by 1 % here and there
_POOR = 1.5  # times the linear denoiser's error: nobody would use such a network
_AGAIN = 3  # mistakes made together, at most


@dataclasses.dataclass(frozen=True)
class Check:
    """What `check` found; `str` gives it as text.

    Attributes:
      fits: whether the declared convention is the best one, and better than a linear filter or
        about as good.
      best: the name of the convention that fits best, "as declared" or what is to be changed.
      losses: {convention: mean squared error of the data prediction in units of the best linear
        denoiser's, the geometric mean over the levels}; 1 is a network that knows the data's mean
        and variance only. The smallest first.
      levels: (L,) sigma / alpha at which it was measured, under the declared convention.
      by_level: (L,) the declared convention's error at each level, in the same units.
    """

    fits: bool
    best: str
    losses: Mapping[str, float]
    levels: np.ndarray
    by_level: np.ndarray

    def __bool__(self) -> bool:
        return self.fits

    def __str__(self) -> str:
        declared = self.losses[DECLARED]
        if self.fits:
            verdict = "The declared convention fits."
        elif self.best == DECLARED:
            verdict = (
                "No convention fits: the network denoises no better than a linear filter. Look at "
                "its weights, at `x_0` (layout, scale), at its conditions."
            )
        else:
            verdict = f"The declared convention does not fit. What does: {self.best}."
        lines = [verdict, "", "error / best linear denoiser's, mean over levels:"]
        shown = list(self.losses.items())[:6]
        if DECLARED not in dict(shown):
            shown.append((DECLARED, declared))
        lines += [f"  {loss:10.4g}  {name}" for name, loss in shown]
        lines += ["", "as declared, by sigma / alpha:"]
        lines += [
            f"  {rho:10.4g}  {loss:.4g}"
            for rho, loss in zip(self.levels, self.by_level, strict=True)
        ]
        return "\n".join(lines)


def check(
    score_fn: ScoreFn,
    x_0: Array,
    *,
    cond: Conditions | None = None,
    key: Key = None,
    levels: int = 10,
    samples: int = 64,
) -> Check:
    """Does the declared convention fit the network? If not, which does.

    The conventions tried differ from the declared one in the prediction (the six, and those with
    the other sign), the time (each of `ScoreFn`'s names; times 1000 or a thousandth; reversed; the
    index shifted by one), EDM's input scaling, the noise process (published tables of as many
    levels), or the scale of the data ([0, 1], [-1, 1], [-.5, .5], 0 to 255); and in what two or
    three of these give together.

    Examples:
      >>> import jax, numpy as np, diffsamp as ds
      >>> from diffsamp.models.digits import load_data, load_digits_model
      >>> images, labels = load_data()
      >>> found = ds.check(load_digits_model(), images[:64], cond={"label": labels[:64]})
      >>> found.fits, found.best
      (True, 'as declared')

    Args:
      score_fn: the network itself; guidance goes around it later.
      x_0: (n, ...) data as the network's states are: a few images, or their latents. 16 are
        enough for most mistakes. An index shifted by one takes more: 64 pictures, or hundreds of
        small vectors.
      cond: keyword arguments for the network, arrays (n, ...).
      key: of the noise. None: the same noise in each call.
      levels: how many noise levels, from where the data are almost whole to where they are lost.
      samples: noised data per level; with fewer data each is used several times.

    Returns:
      A `Check`; print it.

    Raises:
      TypeError: not a ScoreFn, or data that are no array.
      ValueError: no data, or constant ones.
    """
    expect_score_fn(score_fn, cond)
    if not isinstance(score_fn, ScoreFn):
        raise TypeError(
            f"`score_fn` must be a diffsamp.ScoreFn; got the transform {type(score_fn).__name__}. "
            "Check the network inside."
        )
    if not hasattr(x_0, "shape") or not np.issubdtype(np.asarray(x_0).dtype, np.number):
        raise TypeError(f"`x_0` must be an array of data; got {type(x_0).__name__}.")
    expect_int(levels, "levels", at_least=2)
    measure = _Measure(score_fn, np.asarray(x_0, np.float64), cond, key, levels, samples)
    found = {DECLARED: (Convention(score_fn), measure(Convention(score_fn)))}
    best = DECLARED
    for _ in range(_AGAIN):
        for convention in others(found[best][0]):
            if convention.name not in found:
                found[convention.name] = convention, measure(convention)
        simplest = _simplest(found)
        if simplest == best or not found[simplest][1].better_than(found[best][1]):
            break
        best = simplest
    best = _shift(measure, found, best)
    own = found[DECLARED][1]
    leader = _leader(found)
    order = sorted(found, key=lambda name: found[name][1].against(leader))
    return Check(
        fits=best == DECLARED and own.mean < _POOR,
        best=best,
        losses={name: found[name][1].mean for name in order},
        levels=own.rho,
        by_level=own.ratio.mean(-1),
    )


def _simplest(found: Mapping[str, tuple[Convention, _Loss]]) -> str:
    """The convention with the fewest mistakes of those that no other one beats."""
    leader = _leader(found)
    level = [name for name, (_, loss) in found.items() if not leader.better_than(loss)]
    return min(level, key=lambda name: (found[name][0].mistakes, found[name][1].against(leader)))


def _leader(found: Mapping[str, tuple[Convention, _Loss]]) -> _Loss:
    """The one with the smallest error, each pair compared at the levels that both have."""
    losses = iter([loss for _, loss in found.values()])
    leader = next(losses)
    for loss in losses:
        if loss.against(leader) < 0:
            leader = loss
    return leader


def _shift(measure: _Measure, found: dict[str, tuple[Convention, _Loss]], best: str) -> str:
    """The index shifted by one, if that is better beyond chance and the other way is worse."""
    center = found[best][1]
    pair = [(convention, measure(convention)) for convention in shifted(found[best][0])]
    found |= {convention.name: (convention, loss) for convention, loss in pair}
    for (convention, one), (_, other) in zip(pair, pair[::-1], strict=True):
        if one.better_than(center, gain=0.0) and center.better_than(other, gain=0.0):
            return convention.name
    return best


@dataclasses.dataclass(frozen=True)
class _Loss:
    """Errors of one convention.

    Attributes:
      rho: (L,) levels.
      ratio: (L, samples) squared errors over the linear denoiser's; NaN at levels that the
        convention's process does not have.
    """

    rho: np.ndarray
    ratio: np.ndarray

    @property
    def logs(self) -> np.ndarray:
        """(L,) logarithms of the mean errors, no more than e^50; NaN where not measured."""
        mean = self.ratio.mean(-1)
        asked = ~np.isnan(self.rho)
        return np.where(asked, np.log(np.where(mean < math.exp(50), mean, math.exp(50))), np.nan)

    @property
    def mean(self) -> float:
        """Geometric, over the levels; infinite where there are none."""
        logs = self.logs[~np.isnan(self.logs)]
        return float(np.exp(logs.mean())) if logs.size else math.inf

    def against(self, other: _Loss) -> float:
        """The logarithm of this error over another's, at the levels both have."""
        difference = self.logs - other.logs
        difference = difference[~np.isnan(difference)]
        if difference.size:
            return float(difference.mean())
        if math.isinf(self.mean) or math.isinf(other.mean):
            return math.inf if math.isinf(self.mean) else -math.inf
        return math.log(self.mean / other.mean)

    def better_than(self, other: _Loss, gain: float = _GAIN) -> bool:
        """By this part of the error and beyond chance, on the same data and noise."""
        both = ~np.isnan(self.logs - other.logs)
        pair = [loss.ratio[both] for loss in (other, self)]
        if not both.any() or not all(np.all(np.isfinite(ratio)) for ratio in pair):
            return self.against(other) < 0
        shares = [ratio / ratio.mean(-1, keepdims=True) for ratio in pair]
        each = (shares[0] - shares[1]).mean(0)  # a sample's part in the difference of logarithms
        chance = _SURE * each.std(ddof=1) / math.sqrt(each.size)
        return -self.against(other) > max(chance, math.log1p(gain))


class _Measure:
    """The loss of a convention on fixed data and noise; one compiled call of the network."""

    def __init__(
        self,
        score_fn: ScoreFn,
        x_0: np.ndarray,
        cond: Conditions | None,
        key: Key,
        levels: int,
        samples: int,
    ) -> None:
        if x_0.ndim < 1 or not x_0.shape[0] or not np.all(np.isfinite(x_0)) or not x_0.std():
            raise ValueError(
                "`x_0` must hold data, (n, ...), that are finite and differ; got shape "
                f"{x_0.shape}."
            )
        self.size = max(x_0.shape[0], expect_int(samples, "samples", at_least=2))
        rows = np.arange(self.size) % x_0.shape[0]
        self.x_0, self.levels = x_0[rows], levels
        self.cond = jax.tree.map(lambda a: jnp.asarray(a)[rows], dict(cond or {}))
        shape = (levels, *self.x_0.shape)
        if key is None:
            self.noise = np.random.default_rng(0).normal(size=shape)
        else:
            self.noise = np.asarray(jax.random.normal(key, shape), np.float64)
        self.low = jnp.zeros(()).dtype
        self.ratios = self._own_levels(score_fn.process)
        self.kept: dict[tuple[float, ...], np.ndarray] = {}

    def __call__(self, convention: Convention) -> _Loss:
        score_fn = convention.score_fn
        factor, offset = convention.data
        x_0 = factor * self.x_0 + offset
        variance = x_0.var()
        level, inside = self._levels(score_fn.process, math.sqrt(variance))
        bound = score_fn.bind(level, (np.ones_like(level.t), np.zeros_like(level.t)))
        label, scale, r, s = (np.asarray(to_host(v), np.float64) for v in bound)
        if convention.label is not None:
            label = convention.label(label)
        ratios = []
        for n in range(self.levels):
            alpha, sigma = level.alpha[n], level.sigma[n]
            if not inside[n]:
                ratios.append(np.full(self.size, np.nan))
                continue
            asked = (*convention.data, alpha, sigma, scale[n], label[n], n)
            if asked not in self.kept:
                x = alpha * x_0 + sigma * self.noise[n]
                raw = self._raw(score_fn, scale[n] * x, label[n])
                self.kept[asked] = self._products((x, raw, -x_0))
            with np.errstate(over="ignore", invalid="ignore"):
                weights = np.array([r[n], convention.sign * s[n], 1.0])
                squared = weights @ self.kept[asked] @ weights
            linear = variance * sigma**2 / (alpha**2 * variance + sigma**2)
            ratios.append(squared / linear)
        rho = np.where(inside, level.sigma / level.alpha, np.nan)
        return _Loss(rho, np.stack(ratios))

    def _products(self, arrays: tuple[np.ndarray, ...]) -> np.ndarray:
        """(samples, 3, 3) mean products: the squared error for any conversion of the answer."""
        flat = np.stack([a.reshape(self.size, -1) for a in arrays], 1)
        with np.errstate(over="ignore", invalid="ignore"):
            return flat @ np.swapaxes(flat, 1, 2) / flat.shape[-1]

    def _own_levels(self, process: Process) -> np.ndarray:
        """(L,) sigma / alpha over the data's std: where the declared process has its levels."""
        std = self.x_0.std()
        low, high = (float(to_host(process.log_snr(t))) for t in (process.t_max, process.t_min))
        ends = max(-math.log(_HIGH * std), low), min(-math.log(_LOW * std), high)
        if not ends[0] < ends[1]:
            ends = max(low, -30.0), min(high, 30.0)
        log_snr = np.linspace(ends[1], ends[0], self.levels)
        if process.t_clean < 0:  # a table: the levels it was trained at, the first ones too
            t = np.round(np.asarray(to_host(process.time(log_snr)), np.float64))
            t[: self.levels // 2] = t[0] + np.arange(self.levels // 2)
            log_snr = np.asarray(to_host(process.log_snr(np.clip(t, 0.0, process.t_max))))
        return np.exp(-log_snr.astype(np.float64)) / std

    def _levels(self, process: Process, std: float) -> tuple[Level, np.ndarray]:
        """The same levels, for data of this std, of another process; and which it has."""
        log_snr = -np.log(self.ratios * std)
        t = np.asarray(to_host(process.time(log_snr)), np.float64)
        if process.t_clean < 0:
            t = np.where(abs(t - np.round(t)) < 1e-6, np.round(t), t)
        low, high = (float(to_host(process.log_snr(t))) for t in (process.t_max, process.t_min))
        ends = sorted((process.t_min, process.t_max))
        level = predictions.level_at(process, np.clip(t, ends[0], ends[1]))
        inside = (log_snr >= low - 1e-6) & (log_snr <= high + 1e-6)
        return jax.tree.map(lambda v: np.asarray(to_host(v), np.float64), level), inside

    def _raw(self, score_fn: ScoreFn, inputs: np.ndarray, label: float) -> np.ndarray:
        """The network's answer, in float64."""
        dtype = jnp.dtype(score_fn.dtype or self.low)
        x = jnp.asarray(inputs, dtype)
        t = jnp.full((self.size,), label, working_dtype(dtype))
        output = _called(score_fn.apply, score_fn.batched, score_fn.params, x, t, self.cond)
        if jnp.shape(output) != x.shape:
            raise ValueError(
                f"the network's output must have the shape of x_0, {x.shape}; got "
                f"{jnp.shape(output)}."
            )
        return np.asarray(output, np.float64)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _called(
    apply: Apply, batched: bool, params: PyTree, x: Array, t: Array, cond: Conditions
) -> PyTree:
    def call(x: Array, t: Array, cond: Conditions) -> PyTree:
        return apply(params, x, t, **cond)

    return (call if batched else jax.vmap(call))(x, t, cond)
