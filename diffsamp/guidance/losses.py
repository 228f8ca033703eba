"""Guidance by the gradient of a loss, through the network or around it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import predictions
from diffsamp._core import random
from diffsamp._core.checks import expect_choice, expect_int
from diffsamp._core.numeric import as_float, is_concrete, namespace, silence, working_dtype
from diffsamp._core.types import Array, Bound, Conditions, Key, Network, PyTree, Value
from diffsamp.guidance._numbers import Numbers, as_partial, scale_numbers
from diffsamp.guidance._terms import without
from diffsamp.guidance.data import keep_noise
from diffsamp.guidance.transform import Transform, per_row
from diffsamp.predictions import Level
from diffsamp.score import ScoreFn, scale_rows
from diffsamp.tableau import Tableau

__all__ = ["Loss", "dps", "freedom", "loss", "posterior_std", "step_units"]

_THROUGH = ("network", "data", "state")


def posterior_std(level: Level, std: PyTree = 1.0) -> PyTree:
    """The standard deviation of x_0 given x for Gaussian data of that standard deviation.

    sigma std / sqrt(sigma^2 + std^2 alpha^2); at sigma = 0 it is 0, at alpha = 0 `std`.

    Args:
      level: arrays of one shape.
      std: of the data, a number.
    """
    std = as_float(std, level.alpha)
    return level.sigma * std / namespace(level.alpha, std).hypot(level.sigma, std * level.alpha)


class _LossBound(NamedTuple):
    inner: Bound
    level: Level
    row: Array
    scale: Array
    spread: Array
    gain: PyTree
    r: Array
    s: Array
    of_noise: PyTree
    descent: PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Loss(Transform):
    """A network that descends a loss; made by `loss` and what stands on it.

    With `descent` and `steps` the data prediction itself also takes so many steps of that length
    down the loss (`tfg`); through="data" then means these steps alone.
    """

    score_fn: Network
    f: jax.tree_util.Partial
    scale: Numbers
    spread: Numbers | None
    gain: PyTree
    key: Key
    through: str = dataclasses.field(metadata={"static": True})
    samples: int = dataclasses.field(metadata={"static": True})
    normalise: str | None = dataclasses.field(metadata={"static": True})
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    descent: Numbers | None = None
    steps: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def gradients_per_call(self) -> float:
        """Vector-Jacobian products of the network per call; those of the loss are not counted."""
        inner = getattr(self.score_fn, "gradients_per_call", 0)
        return inner + (self.score_fn.nfe_factor if self.through == "network" else 0)

    def for_samples(self, numbers: Array) -> Loss:
        """As `Transform.for_samples`, with the keys of these samples."""
        new: Loss = super().for_samples(numbers)
        key = new.key
        if key is not None:
            key = random.typed(key)
            fold = jax.vmap(jax.random.fold_in, (None, 0))
            key = key[numbers] if key.ndim else fold(key, numbers)
        return dataclasses.replace(new, key=key, scale=new.scale.for_samples(numbers))

    @silence
    def bind(self, level: Level, target: tuple[Array, Array]) -> _LossBound:
        """The data prediction, and what the row's own gains from a change of the noise."""
        xp = namespace(level.alpha, level.sigma)
        zero, one = xp.zeros_like(level.alpha), xp.ones_like(level.alpha)
        w0, w1 = (as_float(w, level.alpha) for w in target)
        r, s = predictions.conversion((one, zero, one), (w0, w1, one), level.alpha, level.sigma)
        # T = w_0 D + w_1 E moves by this for a change of E; with no signal there is no gradient
        # through the network, and what is 0 / 0 is left out
        of_noise = xp.where(level.alpha == 0, zero, (w1 * level.alpha - w0 * level.sigma))
        of_noise = of_noise / xp.where(level.alpha == 0, one, level.alpha)
        rows = np.arange(np.shape(level.t)[0], dtype=np.int32) if np.ndim(level.t) else None
        gain = None if self.gain is None else per_row(level, "a gain by row", self.gain)[0]
        at = jax.tree.map(lambda v: as_float(v, level.alpha), level)
        spread = None if self.spread is None else self.spread.bind(at)
        inner = self.score_fn.bind(level, (one, zero))
        scale = self.scale.bind(level)
        descent = None if self.descent is None else self.descent.bind(level)
        return _LossBound(inner, at, rows, scale, spread, gain, r, s, of_noise, descent)

    def check_bound(self, bound: _LossBound, level: Level, evaluates: Array) -> None:
        """As `ScoreFn.check_bound`."""
        self.score_fn.check_bound(bound.inner, level, evaluates)
        if self.key is not None and bound.row is None:
            per_row(level, "a loss with samples")
        if not is_concrete(bound.r, bound.s, evaluates):
            return
        bad = ~(np.isfinite(np.asarray(bound.r)) & np.isfinite(np.asarray(bound.s)))
        if np.any(bad & np.asarray(evaluates, bool)):
            raise ValueError("a loss cannot be taken at sigma = 0: evaluate away from that end.")

    def predict(self, x: PyTree, bound: _LossBound, cond: Conditions | None = None) -> PyTree:
        """The row's prediction from the changed one."""
        return self.with_plain(x, bound, cond)[0]

    def with_plain(
        self, x: PyTree, bound: _LossBound, cond: Conditions | None = None
    ) -> tuple[PyTree, PyTree]:
        """The changed prediction and the network's own, from one call."""
        own = without(cond, (*self.names, *self.scale.names))
        wide = jax.tree.map(lambda v: v.astype(working_dtype(v.dtype)), x)

        def ask(state: PyTree) -> PyTree:
            narrow = jax.tree.map(lambda v, like: v.astype(like.dtype), state, x)
            said = self.score_fn.predict(narrow, bound.inner, own)
            return jax.tree.map(lambda v, like: v.astype(like.dtype), said, state)

        data, change = self._change(ask, wide, bound, cond)
        if self.descent is not None:
            moved = self._descended(data, bound, cond)
            change = jax.tree.map(
                lambda delta, new, d: delta + scale_rows(bound.s, d) * (new - d),
                change,
                moved,
                data,
            )

        def convert(d: jax.Array, state: jax.Array, delta: jax.Array, like: jax.Array) -> jax.Array:
            if bound.gain is not None:
                delta = delta * scale_rows(bound.gain, d)
            value = scale_rows(bound.r, d) * state + scale_rows(bound.s, d) * d
            return (value + delta).astype(like.dtype)

        none = jax.tree.map(jnp.zeros_like, change)
        changed, plain = (jax.tree.map(convert, data, wide, v, x) for v in (change, none))
        return changed, plain

    def _change(
        self,
        ask: Callable[[PyTree], PyTree],
        x: PyTree,
        bound: _LossBound,
        cond: Conditions | None,
    ) -> tuple[PyTree, PyTree]:
        """What the network says of the data, and how the row's prediction moves down the loss."""
        if self.through == "network":
            data, back = jax.vjp(ask, x)
            value, slope = self._slope(data, bound, cond)
            gradient = back(slope)[0]
        else:
            data = ask(x)
            if self.through == "data" and self.descent is not None:
                return data, jax.tree.map(jnp.zeros_like, data)
            value, gradient = self._slope(data if self.through == "data" else x, bound, cond)
        # the change of E: scale sigma grad, or for grad_D the same with sigma^2 / alpha J = r^2
        by, weigh = bound.level.sigma, bound.of_noise
        if self.through == "data" and bound.spread is not None:
            by, weigh = bound.spread[0] ** 2, -bound.s  # of a change of D
        change = jax.tree.map(lambda g: g * scale_rows(by, g), gradient)
        change = self._normalised(change, value, x, data, bound.level)
        factor = self.scale.read(bound.scale, x, cond)[0]
        return data, jax.tree.map(
            lambda g: g * (scale_rows(factor, g) * scale_rows(weigh, g)), change
        )

    def _descended(self, data: PyTree, bound: _LossBound, cond: Conditions | None) -> PyTree:
        """The data prediction after its own steps down the loss."""
        assert self.descent is not None
        length = self.descent.read(bound.descent, data, cond)[0]

        def body(turn: Array, d: PyTree) -> PyTree:
            _, gradient = self._slope(d, bound, cond, turn + 1)
            return jax.tree.map(lambda v, g: v - scale_rows(length, g) * g, d, gradient)

        return jax.lax.fori_loop(0, self.steps, body, data)

    def _slope(
        self, at: PyTree, bound: _LossBound, cond: Conditions | None, turn: Array = 0
    ) -> tuple[PyTree, PyTree]:
        """The loss per sample, and its gradient; every turn of a row has draws of its own."""
        batch = jax.tree.leaves(at)[0].shape[0] if self.score_fn.batched else None

        def one(d: Array) -> jax.Array:
            value = self.f(d, bound.level, cond)
            want = () if batch is None else (batch,)
            if np.shape(value) != want:
                raise ValueError(
                    f"a loss must return one number per sample, shape {want}; got shape "
                    f"{np.shape(value)}. Sum over the sample's own axes, not over the batch."
                )
            return value

        def total(d: Array) -> tuple[jax.Array, jax.Array]:
            if self.key is None:
                value = one(d)
            else:
                keys, spread = random.sample_keys(self.key, batch), bound.spread

                def noisy(i: PyTree) -> jax.Array:
                    row = (bound.row * (self.steps + 1) + turn) * self.samples + i
                    z = random.normal_like(keys, row, d)
                    return one(jax.tree.map(lambda v, e: v + scale_rows(spread[0], v) * e, d, z))

                values = jax.vmap(noisy)(jnp.arange(self.samples, dtype=jnp.int32))
                value = -jax.nn.logsumexp(-values, axis=0) + jnp.log(
                    jnp.asarray(self.samples, values.dtype)
                )
            return jnp.sum(value), value

        gradient, value = jax.grad(total, has_aux=True)(at)
        return value, gradient

    def _normalised(
        self, change: PyTree, value: Value, x: PyTree, data: PyTree, level: Level
    ) -> PyTree:
        if self.normalise == "residual":  # the gradient of sqrt(f)
            root = 2 * jnp.sqrt(jnp.where(value > 0, value, 1))
            return jax.tree.map(lambda g: g / scale_rows(root, g), change)
        if self.normalise == "noise":  # as large as the noise prediction
            noise = jax.tree.map(
                lambda v, d: (v - scale_rows(level.alpha, v) * d) / scale_rows(level.sigma, v),
                x,
                data,
            )
            ratio = _size(noise, self.batched) / jnp.maximum(_size(change, self.batched), 1e-30)
            return jax.tree.map(lambda g: g * scale_rows(ratio, g), change)
        return change


def _size(tree: PyTree, batched: bool) -> jax.Array:
    """Every sample's norm."""
    first = 1 if batched else 0
    squares = [jnp.sum(v * v, axis=tuple(range(first, v.ndim))) for v in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares[1:], squares[0]))


def loss(
    score_fn: ScoreFn | Transform,
    f: Callable[[PyTree, Level, Mapping[str, PyTree] | None], PyTree],
    scale: Array = 1.0,
    *,
    through: str = "network",
    samples: int | None = None,
    spread: float | Callable[[Level], Array] | None = None,
    normalise: str | None = None,
    gain: PyTree = None,
    key: jax.Array | None = None,
    names: Sequence[str] = (),
) -> Loss:
    """Descend a loss along the way: E -> E + scale sigma grad_x f(D(x)).

    With f = -log p(y | x_0) and scale 1 this is the score of the posterior, as far as D stands for
    x_0; samples around D (`samples`, `spread`) make it better. What it costs is counted apart:
    `nfe_factor` forward evaluations and `gradients_per_call` vector-Jacobian products of the
    network a call.

    Args:
      score_fn: a network or transform.
      f: (D, level, cond) -> (batch,), one loss per sample (() without a batch axis), in nats if
        `scale` is to be 1. D is in at least float32; the numbers of `level` are scalars or one per
        sample. Compared by identity; `jax.tree_util.Partial` binds arrays.
      scale: a number; (rows,), one per row of the tableau, see `step_units`; a function of the
        `Level`; or the name of an entry of `cond` with one per sample.
      through: "network" differentiates D(x), one vector-Jacobian product a call; "data" takes
        grad_D f alone, with r^2 for the covariance: D -> D - scale r^2 grad_D f; "state" calls f
        with x itself, for a classifier of noised states.
      samples: number of draws in -log mean_i exp(-f(D + r z_i)); None: f(D).
      spread: the standard deviation r of x_0 given x that the draws and "data" take: a function of
        the `Level`, or a number, the data's own standard deviation (see `posterior_std`). None: 1.
      normalise: "residual" descends sqrt(f), for f a squared norm; "noise" gives the change of E
        the norm of E times `scale`. Both per sample.
      gain: (rows,), such as `keep_noise(tableau)`: multiplies the change, to keep the noise as it
        was; None: 1.
      key: for the draws, one or one per sample.
      names: entries of `cond` that are for f alone.

    Raises:
      ValueError: an unknown name, draws without a key, or f of a wrong shape (at trace time).

    Reference: Dhariwal & Nichol 2021, arXiv:2105.05233; Chung et al. 2023, arXiv:2209.14687; Song
    et al. 2023 (LGD-MC), PMLR 202.
    """
    expect_choice(through, "through", _THROUGH)
    if normalise is not None:
        expect_choice(normalise, "normalise", ("residual", "noise"))
    count = 1 if samples is None else expect_int(samples, "samples", at_least=1)
    if samples is not None and (key is None or through == "state"):
        raise ValueError(
            "`samples` draws around the data prediction: pass `key`, and through='network' or "
            "'data'."
        )
    numbers: Numbers | None = None
    if samples is not None or through == "data":
        spread = 1.0 if spread is None else spread
        wide = spread if callable(spread) else jax.tree_util.Partial(posterior_std, std=spread)
        numbers = scale_numbers(wide, "spread")
    elif spread is not None:
        raise ValueError("`spread` is for `samples` and for through='data'.")
    return Loss(
        score_fn,
        as_partial(f, "f"),
        scale_numbers(scale, rows=True),
        numbers,
        gain,
        key if samples is not None else None,
        through,
        count,
        normalise,
        tuple(names),
    )


def step_units(tableau: Tableau, step: float) -> np.ndarray:
    """Scales with which a row moves the state by -step grad_x f: step alpha / (b_D sigma^2).

    b_D is the row's weight on the data prediction, the noise following from it. The step sizes of
    papers that correct x after a sampler's row (DPS) are in these units. Rows with alpha = 0 get 0.

    Args:
      tableau: a sampler whose rows use one state and one output each.
      step: the paper's zeta.

    Returns:
      (rows,), float64.

    Raises:
      ValueError: rows that use earlier states or outputs.
    """
    weight = tableau.alpha[1:] / keep_noise(tableau)
    sigma = np.where(tableau.sigma[:-1] > 0, tableau.sigma[:-1], 1.0)
    scale = step * tableau.alpha[:-1] / (weight * sigma**2)
    return np.where(tableau.evaluates, scale, 0.0)


def dps(
    score_fn: ScoreFn | Transform,
    tableau: Tableau,
    f: Callable[[PyTree, Level, Mapping[str, PyTree] | None], PyTree],
    step: float = 1.0,
    *,
    names: Sequence[str] = (),
) -> Loss:
    """DPS: after every row, x' <- x' - step grad_x |y - A D(x)|, the norm, per sample.

    Args:
      score_fn: a network or transform.
      tableau: the sampler to be used, of one output per row; the paper's is `solvers.ddpm`.
      f: (D, level, cond) -> (batch,), the squared norm |y - A D|^2.
      step: zeta, 0.3 to 1 for data in [-1, 1] and 1000 rows.
      names: entries of `cond` for f alone.

    Reference: Chung et al. 2023, arXiv:2209.14687, algorithm 1.
    """
    scale = step_units(tableau, step)
    return loss(score_fn, f, scale, normalise="residual", names=names)


def freedom(
    score_fn: ScoreFn | Transform,
    f: Callable[[PyTree, Level, Mapping[str, PyTree] | None], PyTree],
    step: float = 0.02,
    *,
    names: Sequence[str] = (),
) -> Loss:
    """FreeDoM: a change of the noise prediction of `step` times its own norm, down the loss.

    Args:
      score_fn: a network or transform.
      f: (D, level, cond) -> (batch,), any loss.
      step: the paper's factor. Its travel in time is `solvers.restart`.
      names: entries of `cond` for f alone.

    Reference: Yu et al. 2023, arXiv:2303.09833.
    """
    return loss(score_fn, f, step, normalise="noise", names=names)
