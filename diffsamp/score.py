"""`ScoreFn`: a pretrained network, told once how it was trained, asked for any prediction.

A ScoreFn is a pytree. Its leaves are the network's arrays and the process's numbers, so it can be
passed through `jax.jit` without a weight becoming a constant of the program; how to call the
network and what it predicts are static.

Two methods are all the executor uses, so that a wrapper (guidance, thresholding) is any pytree
with the same two:

    bound = score_fn.bind(level, target)      numbers, for all rows at once, before the loop
    m     = score_fn.predict(x, bound, cond)  the one call of the network, inside the loop
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import diffsamp._core.convolution  # noqa: F401 - fast ones, wherever a network is wrapped
from diffsamp import predictions
from diffsamp._core.checks import expect_choice, expect_state
from diffsamp._core.numeric import (
    as_float,
    is_concrete,
    namespace,
    silence,
    to_host,
    working_dtype,
)
from diffsamp._core.types import Array, Conditions, DType, Network, PyTree, Value
from diffsamp.predictions import Level
from diffsamp.processes import Process, expect_process
from diffsamp.tableau import Tableau

__all__ = ["Bound", "ScoreFn", "ask", "expect_score_fn", "for_samples", "scale_rows"]

_TIME_NAMES = ("t", "sigma", "label", "log_snr", "c_noise", "rho")


class Bound(NamedTuple):
    """What one evaluation needs besides x: the network's time input and three numbers.

    The network is called at (scale * x, label), and the prediction is r * x + s * F.
    """

    label: PyTree
    scale: Array
    r: Array
    s: Array


def scale_rows(number: Value, leaf: jax.Array) -> jax.Array:
    """`number`, a scalar, one per sample or of the data's rank, shaped to multiply `leaf`.

    It is cast to the dtype in which the leaf's states are combined.
    """
    number = jnp.asarray(number, working_dtype(leaf.dtype))
    return number.reshape(number.shape + (1,) * (leaf.ndim - number.ndim))


def expect_score_fn(score_fn: Network, cond: Conditions | None = None) -> None:
    """Raise unless it is a ScoreFn or a transform of one, and `cond` holds arrays.

    Raises:
      TypeError: something else, such as the network's own function, or a condition that is text.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(cond):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, bool | int | float | complex):
            raise TypeError(
                f"cond{jax.tree_util.keystr(path)} must be an array or a number; got "
                f"{type(leaf).__name__}. Static arguments belong into `apply`: make the ScoreFn "
                "with functools.partial(apply, name=value), made once."
            )
    if not (hasattr(score_fn, "bind") and hasattr(score_fn, "predict")):
        raise TypeError(
            "`score_fn` must be a diffsamp.ScoreFn, ScoreFn(apply, params, process), or a "
            f"transform of one; got {type(score_fn).__name__}."
        )


def for_samples(score_fn: Network, numbers: Array) -> PyTree:
    """The same network for a batch of a larger set, whose samples have these numbers.

    Only a transform that draws random numbers itself depends on them: see
    `diffsamp.guidance.Transform.for_samples`.

    Args:
      score_fn: a ScoreFn or a transform of one.
      numbers: (batch,) integers.
    """
    own = getattr(score_fn, "for_samples", None)
    return score_fn if own is None else own(numbers)


def _static_leaves(params: PyTree) -> PyTree:
    """(tree, its leaves with None for every array), or None if all leaves are arrays."""
    leaves, treedef = jax.tree.flatten(params)
    arrays = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]
    others = tuple(
        None if is_array else leaf for leaf, is_array in zip(leaves, arrays, strict=True)
    )
    return None if all(arrays) else (treedef, others)


def bind_as(score_fn: Network, level: Level, name: str) -> PyTree:
    """`bind` for a named prediction; a network's own is its output, whatever the level says."""
    w0, w1, g = predictions.weights(name, score_fn.process, level, score_fn.sigma_data)
    with np.errstate(divide="ignore", invalid="ignore"):  # the score at sigma = 0
        bound = score_fn.bind(level, (w0 / g, w1 / g))
    if name == score_fn.prediction and isinstance(bound, Bound):
        bound = bound._replace(r=0 * level.alpha, s=0 * level.alpha + 1)
    return bound


def ask(
    score_fn: Network, x: PyTree, t: Array, prediction: str | None, cond: Conditions | None
) -> PyTree:
    """What a network, or a transform of one, predicts at state x and time t.

    Args:
      score_fn: the network.
      x: the state.
      t: a scalar or one per sample.
      prediction: as for `ScoreFn.__call__`.
      cond: keyword arguments for the network.
    """
    expect_state(x, "x", score_fn.batched)
    x = jax.tree.map(jnp.asarray, x)
    level = predictions.level_at(score_fn.process, t)
    bound = bind_as(score_fn, level, predictions.canonical_name(prediction or score_fn.prediction))
    score_fn.check_bound(bound, level, np.ones(np.shape(t), bool))
    return score_fn.predict(x, bound, cond)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class ScoreFn:
    """A pretrained diffusion or flow model.

    Examples:
      >>> import jax.numpy as jnp, diffsamp as ds
      >>> def apply(params, x, t):
      ...     return params["w"] * x
      >>> score_fn = ds.ScoreFn(apply, {"w": jnp.ones(())}, ds.processes.flow(),
      ...                       prediction="velocity")
      >>> score_fn(jnp.ones((2, 3)), 0.5, prediction="data").shape
      (2, 3)

    Attributes:
      apply: `apply(params, x, t, **cond) -> F`, any JAX framework. x is the state (an array or a
        pytree) and t has shape (batch,), or () when `batched` is False; F has the structure and
        shapes of x. Compared by identity: pass the same function object each time, since a new
        lambda compiles anew.
      params: the network's pytree. Its arrays are leaves of this pytree; whatever else it holds
        (an equinox module's activation functions, flags) is static and must be hashable.
      process: the noise process the network was trained on.
      prediction: "data", "noise", "v", "score", "velocity" or "edm_f" (see
        `diffsamp.predictions`).
      time: what the network takes as its time: "t" (the process's own time), "sigma", "rho"
        (sigma / alpha), "log_snr" (nats), "label" (the index 0..T-1 of a discrete process, else
        1000 t; real, so round the times themselves, with `ds.schedules.rounded`, for a network
        that needs integers), "c_noise" (log(rho) / 4, EDM), or a function of a `Level`. None:
        "c_noise" for "edm_f", else "t".
      scale_input: multiply x by EDM's c_in, 1 / sqrt(sigma^2 + sigma_data^2 alpha^2), before the
        network. None: only for "edm_f".
      sigma_data: standard deviation of the training data, used by EDM's preconditioning.
      batched: whether the network takes a leading batch axis. If False it takes one sample and a
        scalar time, and so does everything that is called with this ScoreFn; vmap for batches.
      dtype: cast x to this before the network (say bfloat16). The state, the time and the
        coefficients keep their own precision. None: leave x as it is.
    """

    apply: Callable[..., PyTree]
    params: PyTree
    process: Process
    prediction: str = "noise"
    time: str | Callable[[Level], PyTree] | None = None
    scale_input: bool | None = None
    sigma_data: float = 0.5
    batched: bool = True
    dtype: DType = None
    _others: ClassVar[PyTree] = None  # of every instance: what of `params` is static

    def __post_init__(self) -> None:
        object.__setattr__(self, "_others", _static_leaves(self.params))
        if not callable(self.apply):
            raise TypeError(f"`apply` must be a function; got {type(self.apply).__name__}.")
        name = predictions.canonical_name(self.prediction)
        object.__setattr__(self, "prediction", name)
        expect_process(self.process)
        if not (np.isfinite(self.sigma_data) and self.sigma_data > 0):
            raise ValueError(
                f"`sigma_data` must be a positive, finite number; got {self.sigma_data!r}."
            )
        if self.time is None:
            object.__setattr__(self, "time", "c_noise" if name == "edm_f" else "t")
        elif not callable(self.time):
            expect_choice(self.time, "time", _TIME_NAMES)
        if self.scale_input is None:
            object.__setattr__(self, "scale_input", name == "edm_f")

    # -- pytree -----------------------------------------------------------------------------------

    def tree_flatten_with_keys(self):
        # which leaves are arrays was seen at construction: JAX also flattens what it has filled
        # with placeholders, such as descriptions of arguments
        others, arrays = self._others, self.params
        if others is not None:
            treedef, static_leaves = others
            leaves = treedef.flatten_up_to(self.params)
            arrays = jax.tree.unflatten(
                treedef,
                [a if s is None else None for a, s in zip(leaves, static_leaves, strict=True)],
            )
        static = (
            self.apply,
            others,
            self.prediction,
            self.time,
            self.scale_input,
            self.sigma_data,
            self.batched,
            self.dtype,
        )
        key = jax.tree_util.GetAttrKey
        return ((key("params"), arrays), (key("process"), self.process)), static

    @classmethod
    def tree_unflatten(cls, static, children):
        apply, others, prediction, time, scale_input, sigma_data, batched, dtype = static
        params, process = children
        if others is not None:
            treedef, leaves = others
            arrays = iter(jax.tree.leaves(params))
            params = jax.tree.unflatten(
                treedef, [next(arrays, None) if leaf is None else leaf for leaf in leaves]
            )
        new = object.__new__(cls)
        for name, value in zip(
            (f.name for f in dataclasses.fields(cls)),
            (apply, params, process, prediction, time, scale_input, sigma_data, batched, dtype),
            strict=True,
        ):
            object.__setattr__(new, name, value)
        object.__setattr__(new, "_others", others)
        return new

    @property
    def nfe_factor(self) -> int:
        """Network evaluations per call: 1; guidance around it costs more."""
        return 1

    # -- the two methods the executor uses --------------------------------------------------------

    @silence
    def bind(self, level: Level, target: tuple[Array, Array]) -> Bound:
        """The numbers for evaluations at `level` that should return the prediction `target`.

        Args:
          level: t, alpha and sigma, arrays of one shape, and the times that the network is told,
            if other ones. On host arrays the work is done in float64 on the host.
          target: (v_0, v_1): the wanted prediction is v_0 x_0 + v_1 eps. Same shape each.

        Returns:
          A `Bound` of arrays of the level's shape, with NaN or inf where the network's prediction
          does not determine the target.
        """
        source = predictions.weights(self.prediction, self.process, level, self.sigma_data)
        one = namespace(level.alpha).ones_like(level.alpha)
        r, s = predictions.conversion(source, (*target, one), level.alpha, level.sigma)
        scale = one
        if self.scale_input:
            width = as_float(self.sigma_data, level.alpha) * level.alpha
            scale = 1 / namespace(level.alpha).sqrt(level.sigma**2 + width**2)
        told = level if level.asked is None else predictions.level_at(self.process, level.asked)
        return Bound(self._label(told), scale, r, s)

    def predict(self, x: PyTree, bound: Bound, cond: Conditions | None = None) -> PyTree:
        """Call the network once at state x and return the bound prediction, shaped like x.

        Raises:
          ValueError: at trace time, when the network's output is not shaped like x.
        """
        batch = expect_state(x, "x", self.batched)
        state = jax.tree.map(lambda leaf: leaf.astype(working_dtype(leaf.dtype)), x)
        inputs = state
        if self.scale_input:
            inputs = jax.tree.map(lambda leaf: scale_rows(bound.scale, leaf) * leaf, inputs)
        inputs = jax.tree.map(lambda i, leaf: i.astype(self.dtype or leaf.dtype), inputs, x)
        # in the state's own precision: a float64 time would make a float32 network a float64 one
        label = jnp.asarray(bound.label, jax.tree.leaves(state)[0].dtype)
        if label.shape not in ((), () if batch is None else (batch,)):
            raise ValueError(
                "the time must be a scalar"
                + ("" if batch is None else f" or one per sample, shape ({batch},)")
                + f"; got shape {label.shape}."
            )
        if batch is not None:
            label = jnp.broadcast_to(label, (batch,))
        output = self.apply(self.params, inputs, label, **(cond or {}))
        _expect_like(output, x)

        def convert(leaf: jax.Array, raw: jax.Array, like: jax.Array) -> jax.Array:
            value = scale_rows(bound.r, leaf) * leaf
            value = value + scale_rows(bound.s, leaf) * raw.astype(leaf.dtype)
            return value.astype(like.dtype)

        return jax.tree.map(convert, state, output, x)

    # -- for people -------------------------------------------------------------------------------

    def __call__(
        self,
        x: PyTree,
        t: Array,
        *,
        prediction: str | None = None,
        cond: Conditions | None = None,
    ) -> PyTree:
        """The network's prediction at state x and time t.

        Args:
          x: the state, (batch, ...) or a pytree of such; no batch axis if `batched` is False.
          t: the process's time, a scalar or one per sample, shape (batch,).
          prediction: what to return, any of the six names. None: what the network emits.
          cond: keyword arguments for the network.

        Returns:
          An array or pytree shaped like x.

        Raises:
          ValueError: an unknown name, or a prediction that is not determined at t.
        """
        return ask(self, x, t, prediction, cond)

    def nfe(self, tableau: Tableau) -> int:
        """Network evaluations of a run, per sample: those of the tableau.

        Args:
          tableau: the sampler.
        """
        return tableau.nfe

    def check_bound(self, bound: Bound, level: Level, evaluates: Array) -> None:
        """Raise if rows that evaluate do not fit this network; traced values pass unchecked.

        Raises:
          ValueError: levels of another process, or a prediction that is not determined there.
        """
        if not is_concrete(bound, level, evaluates, self.process):
            return
        self._expect_own_levels(level, evaluates)
        bad = ~(np.isfinite(to_host(bound.r)) & np.isfinite(to_host(bound.s)))
        bad = bad & np.asarray(evaluates, bool)
        if np.any(bad):
            where = tuple(int(i) for i in np.argwhere(bad)[0])
            alpha, sigma, t = (
                float(to_host(v)[where]) for v in (level.alpha, level.sigma, level.t)
            )
            raise ValueError(
                f"a network that predicts {self.prediction!r} does not determine the wanted "
                f"prediction at t = {t:g} (alpha = {alpha:g}, sigma = {sigma:g})"
                + (f", row {where[0]}" if where else "")
                + ". Evaluate away from this end of the process, or use a solver in the network's "
                "own prediction."
            )

    def _expect_own_levels(self, level: Level, evaluates: Array) -> None:
        t, alpha, sigma = (to_host(v) for v in level[:3])
        own_alpha, own_sigma = (to_host(v) for v in (self.process.alpha(t), self.process.sigma(t)))
        distance = np.hypot(own_alpha - alpha, own_sigma - sigma)
        # float32 times and levels agree to 1e-5; two processes differ by far more
        bad = (distance > 1e-3 * np.hypot(own_alpha, own_sigma)) & np.asarray(evaluates, bool)
        if np.any(bad):
            where = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ValueError(
                f"the tableau was built for another process: at t = {t[where]:g} it has alpha = "
                f"{alpha[where]:g} and sigma = {sigma[where]:g}; the network's "
                f"{type(self.process).__name__} has {own_alpha[where]:g} and "
                f"{own_sigma[where]:g}. Build it with score_fn.process."
            )

    def _label(self, level: Level) -> PyTree:
        xp = namespace(level.alpha, level.sigma)
        if callable(self.time):
            return self.time(level)
        if self.time == "t":
            return level.t
        if self.time == "label":
            # a discrete process's time is already its index; elsewhere the common 0..1000 scale
            return level.t if self.process.t_clean < 0 else level.t * 1000
        if self.time == "sigma":
            return level.sigma
        if self.time == "rho":
            return level.sigma / level.alpha
        log_snr = xp.log(level.alpha) - xp.log(level.sigma)
        return log_snr if self.time == "log_snr" else -log_snr / 4


def _expect_like(output: PyTree, x: PyTree) -> None:
    """Raise at trace time if the network's output does not look like x."""
    got: PyTree = jax.tree.structure(output)
    want: PyTree = jax.tree.structure(x)
    if got != want:
        raise ValueError(
            f"the network's output must have the structure of x, {want}; got {got}. Return one "
            "array per array of x."
        )
    for out, leaf in zip(jax.tree.leaves(output), jax.tree.leaves(x), strict=True):
        if jnp.shape(out) != jnp.shape(leaf):
            raise ValueError(
                f"the network's output must have the shape of x, {jnp.shape(leaf)}; got "
                f"{jnp.shape(out)}. If it holds a second head (a learned variance), split it off "
                "in `apply`."
            )
