"""One gradient step of `distill`: the sampler from its learned numbers, the loss, the update."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core.numeric import silence
from diffsamp._core.types import Conditions, Key, PyTree, Value
from diffsamp.processes import Process
from diffsamp.sampling import sample
from diffsamp.search.canonical import from_canonical
from diffsamp.tableau import Tableau

__all__ = ["arrays_of", "default_optimizer", "fit_step", "optax_or_error", "scales_of"]


def optax_or_error() -> Value:
    """The optax module.

    Raises:
      ModuleNotFoundError: it is missing, with what to install.
    """
    try:
        import optax
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'distill needs optax: pip install "diffsamp[search]"', name="optax"
        ) from error
    return optax


@functools.lru_cache(maxsize=16)
def default_optimizer(steps: int, learning_rate: float) -> Value:
    """Made once per setting, so that the compiled step, which holds it statically, is reused."""
    optax = optax_or_error()
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(learning_rate, steps)),
    )


def scales_of(base: Mapping[str, np.ndarray], start: Tableau) -> dict[str, np.ndarray]:
    """How far a unit of each learned number moves: times in units of the smaller adjacent step."""
    alpha, sigma = start.alpha, start.sigma
    log_snr = np.append(
        np.log(np.maximum(alpha[: start.nfe], 1e-4)) - np.log(sigma[: start.nfe]), np.inf
    )
    gap = np.diff(log_snr)
    near = np.minimum(gap[:-1], gap[1:]) if gap.size > 1 else gap[:0]
    one = {name: np.ones_like(value) for name, value in base.items()}
    return {**one, "log_snr": near}


@silence
def arrays_of(
    moved: Mapping[str, PyTree], fixed: PyTree, process: Process, *, host: bool
) -> dict[str, PyTree]:
    """The tableau's arrays for learned changes `moved`, in float64 on the host or in JAX."""
    base, ends, scale = fixed
    if host:
        moved = {name: np.asarray(value, np.float64) for name, value in moved.items()}
    else:
        as_jax = functools.partial(jax.tree.map, lambda v: jnp.asarray(v, jnp.float32))
        base, ends, scale = as_jax(base), as_jax(ends), as_jax(scale)
    numbers = {
        name: value + scale[name] * moved[name] if name in moved else value
        for name, value in base.items()
    }
    return from_canonical(numbers, ends, process)


@functools.partial(
    jax.jit, static_argnames=("loss_of_samples", "optimizer", "checkpoint", "radius", "pieces")
)
def fit_step(
    moved,
    optimizer_state,
    fixed,
    score_fn,
    x_T,
    own,
    cond,
    reference,
    keys,
    *,
    loss_of_samples,
    optimizer,
    checkpoint,
    radius,
    pieces,
):
    """The numbers, the optimizer's state, the loss and the relaxed starts after one step."""

    def loss_of(
        moved: PyTree, x: PyTree, cond: Conditions | None, reference: PyTree, keys: Key
    ) -> jax.Array:
        arrays = arrays_of(moved, fixed, score_fn.process, host=False)
        rows = arrays["a"].shape[0]
        arrays.setdefault("c", jnp.zeros(rows, jnp.float32))
        tableau = Tableau(**arrays, evaluates=np.ones(rows, bool))
        x = sample(score_fn, tableau, x, key=keys, cond=cond, checkpoint=checkpoint)
        return jnp.mean(loss_of_samples(x, reference, cond))

    # the gradient by the starts only where they may move
    value_and_grad = jax.value_and_grad(loss_of, argnums=0 if own is None else (0, 1))

    def of_piece(piece: PyTree) -> PyTree:
        loss, gradient = value_and_grad(moved, *piece)
        return (loss, gradient, None) if own is None else (loss, *gradient)

    whole = (x_T if own is None else own, cond, reference, keys)
    if pieces == 1:
        loss, gradient, toward = of_piece(whole)
    else:
        # every pieces-th sample: each device's share of a sharded batch stays where it is
        cut = jax.tree.map(lambda v: v.reshape(-1, pieces, *v.shape[1:]).swapaxes(0, 1), whole)
        loss, gradient, toward = jax.lax.map(of_piece, cut)
        loss, gradient = jax.tree.map(lambda v: jnp.mean(v, axis=0), (loss, gradient))
        toward = jax.tree.map(lambda v: v.swapaxes(0, 1).reshape(-1, *v.shape[2:]), toward)
    if own is not None:
        own = jax.tree.map(functools.partial(_relax, radius), x_T, own, toward)
    # optax mixes its int32 counters with floats; callers may run with strict promotion
    with jax.numpy_dtype_promotion("standard"):
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, moved)
        moved = optax_or_error().apply_updates(moved, updates)
    return moved, optimizer_state, loss, own


def _relax(radius: float, x_T: jax.Array, own: jax.Array, toward: jax.Array) -> jax.Array:
    """A start moved a tenth of the ball's radius downhill, and back onto the ball around x_T."""
    axes = tuple(range(1, x_T.ndim))
    tiny = jnp.finfo(x_T.dtype).tiny

    def norm(v: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.sum(jnp.square(v), axis=axes, keepdims=True)) + tiny

    largest = radius * norm(x_T)  # the norm of a Gaussian start hardly varies
    step = jnp.where(jnp.isfinite(toward), toward, 0)
    away = own - 0.1 * largest * step / norm(step) - x_T
    return x_T + away * jnp.minimum(1, largest / norm(away))
