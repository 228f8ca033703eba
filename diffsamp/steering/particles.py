"""The particle sampler: the rows of any tableau, with weights and resampling between them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import sampling
from diffsamp._core import random
from diffsamp._core.checks import expect_int
from diffsamp._core.numeric import is_concrete, working_dtype
from diffsamp._core.types import Array, Conditions, DType, Key, Network, PyTree, Value
from diffsamp.guidance import Combined, Transform
from diffsamp.predictions import Level
from diffsamp.score import ScoreFn, expect_score_fn, scale_rows
from diffsamp.steering._weights import normalised, particle_keys, resample, spread, take
from diffsamp.steering.potentials import Potential, Told
from diffsamp.tableau import Tableau

__all__ = ["Steered", "sample"]


class Steered(NamedTuple):
    """Weighted particles.

    Attributes:
      x: (batch, particles, ...).
      log_weights: (batch, particles), normalised: exp of them sums to 1.
      log_Z: (batch,), the logarithm of an unbiased estimate of the weights' mean under the chain.
    """

    x: PyTree
    log_weights: jax.Array
    log_Z: jax.Array

    @property
    def ess(self) -> jax.Array:
        """Effective number of particles, (batch,): 1 / sum of squared weights."""
        return jnp.exp(-jax.nn.logsumexp(2 * self.log_weights, axis=-1))


def sample(
    score_fn: ScoreFn | Transform,
    tableau: Tableau,
    x_T: PyTree,
    *,
    key: jax.Array,
    potential: Potential,
    particles: int,
    proposal: Transform | None = None,
    threshold: float = 0.5,
    cond: Conditions | None = None,
    select_one: bool = False,
    own_starts: bool | None = None,
) -> Steered:
    """Sample with particles that carry weights; systematic resampling, weights accumulated between.

    The law that is tilted is that of the chain of these rows, not of the data; with enough rows
    they agree. One call of the network a row, on batch * particles states.

    Examples:
      >>> import jax, jax.numpy as jnp, diffsamp as ds
      >>> process = ds.processes.vp_linear()
      >>> network = ds.targets.gaussian([0.0], 1.0).score_fn(process)
      >>> tableau = ds.solvers.ddpm(process, ds.schedules.logsnr(process, 20))
      >>> def f(x_0, level, cond):
      ...     return x_0[:, 0]
      >>> x_T = process.prior_sample(jax.random.key(0), (2, 16, 1))
      >>> x, log_weights, log_Z = ds.steering.sample(
      ...     network, tableau, x_T, key=jax.random.key(1), particles=16,
      ...     potential=ds.steering.reward(f),
      ... )
      >>> x.shape, log_weights.shape, log_Z.shape
      ((2, 16, 1), (2, 16), (2,))

    Args:
      score_fn: a network or transform with a batch axis; for `scores` a `combine`.
      tableau: a sampler that adds noise, else particles stay copies of each other.
      x_T: starts, (batch, particles, ...); or (batch, ...), from which all particles of a sample
        begin.
      key: one key, or one per sample: a sample does not depend on its batch.
      potential: `scores`, `reward` or `twist`.
      particles: how many per sample.
      proposal: a guided network to move by; the weights then correct for it, row by row, where
        there is noise, and rows without noise are the plain network's. A `loss` or `measurement`
        around `score_fn` itself says both in one call. Needs rows of one state and one output.
      threshold: resample a sample's particles where their effective number is below this share; 1
        always resamples, 0 never does.
      cond: keyword arguments for the network, one entry per sample; also given to f.
      select_one: resample to copies of one particle, drawn by its weight (SVDD's choice among
        proposals); with `threshold=1`.
      own_starts: whether x_T has an axis of particles, (batch, particles, ...). None: where its
        second axis has that length and the network takes what is left of it; say False where it is
        one of the data's.

    Returns:
      (x, log_weights, log_Z), and `.ess`.

    Raises:
      ValueError: a tableau without noise, a proposal or potential that does not fit.

    Reference: Singhal et al. 2025, arXiv:2501.06848; Wu et al. 2023, arXiv:2306.17775; Skreta et
    al. 2025, arXiv:2503.02819; Li et al. 2024 (SVDD), arXiv:2408.08252.
    """
    expect_score_fn(score_fn, cond)
    sampling.expect_tableau(tableau)
    expect_int(particles, "particles", at_least=1)
    if not score_fn.batched:
        raise ValueError("particles need a network with a batch axis, ScoreFn(batched=True).")
    if not is_concrete(tableau):
        raise TypeError(
            "steering.sample reads the tableau's numbers: close over it, outside `jit`."
        )
    if not tableau.stochastic and particles > 1:
        raise ValueError(
            f"tableau {tableau.name!r} adds no noise, so resampled particles would stay copies: "
            "take a stochastic sampler such as solvers.ddpm."
        )
    if proposal is not None and (tableau.p, tableau.q) != (1, 1):
        raise ValueError(
            f"a proposal needs rows of one state and one output; {tableau.name!r} combines several."
        )
    if not 0 <= threshold <= 1:
        raise ValueError(f"`threshold` must lie in [0, 1]; got {threshold}.")
    x_T = jax.tree.map(jnp.asarray, x_T)
    batch = jax.tree.leaves(x_T)[0].shape[0]
    network = score_fn if proposal is None else proposal
    rows = sampling._bind(network, tableau)
    fits = all(v.ndim > 1 and v.shape[1] == particles for v in jax.tree.leaves(x_T))
    if own_starts and not fits:
        raise ValueError(
            f"`own_starts` wants x_T of shape (batch, {particles}, ...), one start for each of "
            f"{particles} particles; got {[v.shape for v in jax.tree.leaves(x_T)]}."
        )
    each = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), x_T) if fits else x_T
    if own_starts is None:
        many = spread(cond, batch, particles)
        own_starts = fits and (
            _takes(network, rows.bound, each, many) or not _takes(network, rows.bound, x_T, cond)
        )
    x_T = each if own_starts else jax.tree.map(lambda v: jnp.repeat(v, particles, axis=0), x_T)
    plain = None if proposal is None or _says_both(proposal, score_fn) else score_fn
    also = None if plain is None else sampling._bind(plain, tableau).bound
    alpha, sigma, times = (np.asarray(v) for v in (tableau.alpha, tableau.sigma, tableau.times))
    w0, w1 = np.asarray(tableau.target).T
    determinant = alpha[:-1] * w1 - sigma[:-1] * w0
    determinant = np.where(determinant == 0, 1.0, determinant)
    numbers = {
        "level": Level(times[:-1], alpha[:-1], sigma[:-1]),
        "to_data": (w1 / determinant, -sigma[:-1] / determinant),
        "potential": potential.rows(score_fn, tableau),
        "also": also,
    }
    numbers = jax.tree.map(sampling._to_default_precision, numbers)
    end = Level(*(float(v[-1]) for v in (times, alpha, sigma)))
    keys = random.sample_keys(key, batch)
    result = _run(
        network,
        plain,
        potential,
        rows,
        numbers,
        end,
        x_T,
        keys,
        cond,
        threshold,
        particles=particles,
        select_one=select_one,
        guided=proposal is not None,
    )
    return Steered(*result)


def _takes(network: Network, bound: PyTree, x: PyTree, cond: Conditions | None) -> bool:
    """Whether the network takes states of this shape."""
    first = jax.tree.map(lambda v: v[0], bound)
    try:
        jax.eval_shape(lambda x: network.predict(x, first, cond), x)
    except Exception:  # it may refuse a shape in any way
        return False
    return True


def _says_both(proposal: PyTree, score_fn: Network) -> bool:
    return hasattr(proposal, "with_plain") and proposal.score_fn is score_fn


@functools.partial(jax.jit, static_argnames=("particles", "select_one", "guided"))
def _run(
    network: Network,
    plain: PyTree,
    potential: Potential,
    rows: Array,
    numbers: Array,
    end: Level,
    x_T: PyTree,
    keys: Key,
    cond: Conditions | None,
    threshold: PyTree,
    *,
    particles: int,
    select_one: bool,
    guided: bool,
) -> tuple[PyTree, PyTree, PyTree]:
    batch = keys.shape[0]
    cond = spread(cond, batch, particles)
    own_keys, draws = particle_keys(keys, particles)
    state = sampling._initial(rows.a.shape[1], rows.b.shape[1], x_T, own_keys)
    dtype = working_dtype(jax.tree.leaves(x_T)[0].dtype)
    start = jnp.zeros(batch * particles, dtype)
    log_Z = jnp.zeros(batch, dtype)

    def call(x: PyTree, row: Array, number: Value) -> Told:
        parts: tuple[PyTree, ...] = ()
        if isinstance(network, Combined):
            output, found = network.with_parts(x, row.bound, cond)
            unguided, parts = output, tuple(found)
        elif guided and plain is None:
            output, unguided = network.with_plain(x, row.bound, cond)
        else:
            output = unguided = network.predict(x, row.bound, cond)
        if plain is not None:
            unguided = plain.predict(x, number["also"], cond)
        on_state, on_output = number["to_data"]
        data = jax.tree.map(
            lambda v, m: (
                scale_rows(on_state, v) * v.astype(dtype)
                + scale_rows(on_output, v) * m.astype(dtype)
            ),
            x,
            unguided,
        )
        if guided:  # where nothing is drawn there is nothing to weigh a shift by
            output = jax.tree.map(lambda q, p: jnp.where(row.c == 0, p, q), output, unguided)
        return Told(output, unguided, data, parts)

    def body(carry: PyTree, given: PyTree) -> PyTree:
        state, log_w, log_Z, memory = carry
        row, number = given
        shapes = jax.eval_shape(call, state.x, row, number)
        told = jax.lax.cond(
            row.evaluates,
            lambda: call(state.x, row, number),
            lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes),
        )
        grown, kept = potential.grow(
            state.x, told, memory, number["level"], number["potential"], cond
        )
        log_w = log_w + jnp.where(row.evaluates, grown, 0)
        memory = jnp.where(row.evaluates, kept, memory)
        log_w, log_Z, index = resample(
            log_w, log_Z, draws, state.row, row.evaluates, threshold, particles, select_one
        )
        chosen = functools.partial(take, index)
        state = state._replace(
            x=jax.tree.map(chosen, state.x),
            points=jax.tree.map(jax.vmap(chosen), state.points),
            outputs=jax.tree.map(jax.vmap(chosen), state.outputs),
        )
        told, memory = jax.tree.map(chosen, (told, memory))
        if guided:
            log_w = log_w + _shift(told, row, state, dtype)
        # the network has been asked; the executor makes the move
        state, _ = sampling._advance(lambda *_: told.output, row, state, None, False)
        return (state, log_w, log_Z, memory), None

    carry = (state, start, log_Z, start)
    (state, log_w, log_Z, memory), _ = jax.lax.scan(body, carry, (rows, numbers))
    if potential.kind == "value":
        wide = jax.tree.map(lambda v: v.astype(dtype), state.x)
        at = jax.tree.map(lambda v: jnp.asarray(v, dtype), end)
        log_w = log_w + potential.value(wide, at, cond) - memory
    x = jax.tree.map(lambda v: v.reshape(batch, particles, *v.shape[1:]), state.x)
    return x, *normalised(log_w, log_Z, particles)


def _shift(told: Told, row: Array, state: PyTree, dtype: DType) -> PyTree:
    """log p - log q of the drawn noise: - z.delta / c - |delta|^2 / (2 c^2)."""
    noise = random.normal_like(state.keys, state.row, state.x)
    c = jnp.where(row.c == 0, 1, row.c)

    def one(q: jax.Array, p: jax.Array, z: jax.Array) -> jax.Array:
        delta = scale_rows(row.b[0] / c, q) * (q.astype(dtype) - p.astype(dtype))
        terms = z.astype(dtype) * delta + 0.5 * delta * delta
        return jnp.sum(terms.reshape(terms.shape[0], -1), axis=1)

    gaps: list[jax.Array] = jax.tree.leaves(jax.tree.map(one, told.output, told.plain, noise))
    return -sum(gaps[1:], gaps[0])
