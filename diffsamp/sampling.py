"""The executor: one `lax.scan` over the rows of a tableau, whose body calls the network once.

It equals this program, in which u and m are the lists of all states and outputs:

    u = [x_T]; m = []
    for n in range(N):
        m.append(predict(u[n], n) if evaluates[n] else 0)
        u.append(sum(a[n, i] * u[n - i] for i in range(p))
                 + sum(b[n, j] * m[n - j] for j in range(q))
                 + c[n] * noise(n) + d[n])
    return u[N]

Only the last p states and q outputs are kept, in ring buffers, so that a dense tableau (q = N)
moves no more memory than a banded one; a method of one state or one output keeps none. Nothing here
knows of solvers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from diffsamp._core import random
from diffsamp._core.checks import expect_state
from diffsamp._core.numeric import is_concrete, namespace, silence, to_host, working_dtype
from diffsamp._core.types import Array, Bound, Conditions, Key, Network, PyTree, Times, Value
from diffsamp.predictions import Level
from diffsamp.score import ScoreFn, expect_score_fn, scale_rows
from diffsamp.tableau import Tableau

__all__ = ["State", "Trajectory", "init", "resume", "sample", "step", "trajectory"]


class State(NamedTuple):
    """What the next row needs.

    Attributes:
      row: () int32, the row that comes next.
      x: u_row, the present state.
      points: the states before x, stacked in front: u_n in slot n mod p, no slots if p = 1.
      outputs: the outputs so far, stacked in front: m_n in slot n mod q, no slots if q = 1.
      keys: the samples' keys, or None.
    """

    row: Array
    x: PyTree
    points: PyTree
    outputs: PyTree
    keys: Key


class Trajectory(NamedTuple):
    """Every state and output of a run.

    Attributes:
      times: (N + 1,) the time of each state.
      points: pytree like x_T with N + 1 in front, u_0 .. u_N.
      outputs: pytree like x_T with N in front, m_0 .. m_{N-1}; 0 where a row made no evaluation.
    """

    times: Times
    points: PyTree
    outputs: PyTree


# which values of the network a gradient keeps: (primitive, *inputs, **parameters) -> bool
Policy = Callable[..., bool]
KEPT = ("conv_general_dilated", "dot_general", "add")


class _Row(NamedTuple):
    a: Array
    b: Array
    c: Array
    evaluates: Array
    bound: Bound
    d: Array = None


def sample(
    score_fn: ScoreFn,
    tableau: Tableau,
    x_T: PyTree,
    *,
    key: Key = None,
    cond: Conditions | None = None,
    checkpoint: bool | Policy = False,
) -> PyTree:
    """Sample: run every row of `tableau` on x_T.

    Compiled once per network, state shape and tableau *shape*: another solver, schedule or number
    of evaluations padded to the same shape (`Tableau.pad`) reuses the program. May itself be
    called under `jit`, `vmap` and `grad`, with the tableau's arrays as arguments if wanted.

    Args:
      score_fn: the network.
      tableau: the sampler.
      x_T: the start, u_0: an array or pytree of floating arrays, (batch, ...); without the batch
        axis if `score_fn.batched` is False. See `process.prior_sample`.
      key: a random key, or one key per sample; needed if the tableau is stochastic. Sample i of a
        batch depends on its own key (for a single key, on `fold_in(key, i)`) and the row only.
      cond: keyword arguments for the network, such as {"label": ...}.
      checkpoint: what a gradient keeps of the network's intermediate values. False: the results
        of matrix products, convolutions and sums; what lies between them is cheaper to compute
        again than to store (0.7 to 1.0 of the time, a quarter to a half of the memory:
        docs/performance.md). True: nothing but the state before each row. A policy of
        `jax.checkpoint_policies` says it otherwise.

    Returns:
      u_N, with the structure, shapes and dtypes of x_T.

    Raises:
      TypeError: x_T not floating, no valid key.
      ValueError: a stochastic tableau without key, shapes that do not agree, a tableau built for
        another process, or a prediction that the network does not determine at some row. Where
        the tableau is traced its values cannot be seen: without a key a stochastic one then gives
        NaN.
    """
    return _start(score_fn, tableau, x_T, key, cond, checkpoint=checkpoint, record=False)


def trajectory(
    score_fn: ScoreFn,
    tableau: Tableau,
    x_T: PyTree,
    *,
    key: Key = None,
    cond: Conditions | None = None,
    checkpoint: bool | Policy = False,
) -> Trajectory:
    """Every u_n and m_n of the run that `sample` makes; arguments as there."""
    points, outputs = _start(score_fn, tableau, x_T, key, cond, checkpoint=checkpoint, record=True)
    return Trajectory(tableau.times, points, outputs)


def init(tableau: Tableau, x_T: PyTree, key: Key = None, *, batched: bool = True) -> State:
    """The state before the first row, for a loop of one's own with `step`.

    Args:
      tableau: the sampler.
      x_T: the start, as for `sample`.
      key: as for `sample`.
      batched: whether x_T has a leading batch axis.
    """
    batch = expect_state(x_T, "x_T", batched)
    expect_key(tableau, key)
    x_T = jax.tree.map(jnp.asarray, x_T)
    keys = None if key is None else random.sample_keys(key, batch)
    return _initial(np.shape(tableau.a)[1], np.shape(tableau.b)[1], x_T, keys)


def step(
    score_fn: ScoreFn,
    tableau: Tableau,
    state: State,
    *,
    cond: Conditions | None = None,
) -> State:
    """Run row `state.row` of the tableau; N times `step` is `sample`.

    Pure, and meant to be jitted in a loop of one's own. The state may be changed in between.

    Args:
      score_fn: the network.
      tableau: the sampler.
      state: from `init` or the last `step`.
      cond: keyword arguments for the network.

    Returns:
      The state after the row; `state.x` is u_{row + 1}.

    Raises:
      ValueError: no row left (when the row number is a concrete value), or a state made for another
        tableau.
    """
    if is_concrete(state.row) and int(state.row) >= np.shape(tableau.a)[0]:
        raise ValueError(
            f"the tableau has {np.shape(tableau.a)[0]} rows and all have been run; start again "
            "with `init`."
        )
    _expect_fit(tableau, state)
    rows = _bind(score_fn, tableau)
    row = jax.tree.map(
        lambda array: lax.dynamic_index_in_dim(jnp.asarray(array), state.row, keepdims=False), rows
    )
    # as a plain call it would be traced again for every row, for a gradient that nobody takes
    predict = score_fn.predict if is_concrete(state.x) else _network(score_fn)
    return _advance(predict, row, state, cond, _is_plain(tableau, state.keys))[0]


def resume(
    score_fn: ScoreFn,
    tableau: Tableau,
    state: State,
    *,
    cond: Conditions | None = None,
) -> State:
    """Run the rows that are left: `step` until the end, in one compiled loop.

    Args:
      score_fn: the network.
      tableau: the sampler.
      state: from `init`, `step` or `diffsamp.inversion.encode`; changed in between if wanted.
      cond: keyword arguments for the network.

    Returns:
      The state after the last row; its `x` is the sample.

    Raises:
      ValueError: a state made for another tableau, or without the key this one needs.
    """
    _expect_fit(tableau, state)
    return _rest(
        score_fn, _bind(score_fn, tableau), state, cond, plain=_is_plain(tableau, state.keys)
    )


@functools.partial(jax.jit, static_argnames=("plain",))
def _rest(score_fn, rows, state, cond, *, plain):
    def body(n, state):
        row = jax.tree.map(lambda array: lax.dynamic_index_in_dim(array, n, keepdims=False), rows)
        return _advance(_network(score_fn), row, state, cond, plain)[0]

    rows = jax.tree.map(jnp.asarray, rows)
    return lax.fori_loop(state.row, rows.a.shape[0], body, state)


def _start(score_fn, tableau, x_T, key, cond, *, checkpoint, record):
    """Check what can be checked, bind model and tableau, and enter the compiled part."""
    expect_score_fn(score_fn, cond)
    expect_tableau(tableau)
    batch = expect_state(x_T, "x_T", score_fn.batched)
    expect_key(tableau, key)
    _expect_per_sample(tableau, batch)
    keys = None if key is None else random.sample_keys(key, batch)
    if not tableau.padded and is_concrete(tableau.c) and not np.any(to_host(tableau.c) != 0):
        keys = None  # checked, and not needed
    plain = _is_plain(tableau, keys)
    rows = _bind(score_fn, tableau)
    x_T = jax.tree.map(jnp.asarray, x_T)
    return _run(score_fn, rows, x_T, keys, cond, plain=plain, checkpoint=checkpoint, record=record)


def _is_plain(tableau: Tableau, keys: Key) -> bool:
    """Whether every row evaluates and uses the keys there are: the program needs no branches.

    A branch costs a few percent of a network of 0.2 ms on CPU, and a synchronisation on GPU. A
    padded tableau keeps them, so that all that were padded together share one program.
    """
    if tableau.padded or not is_concrete(tableau.evaluates, tableau.c):
        return False
    noisy = bool(np.any(to_host(tableau.c) != 0))
    return bool(np.all(to_host(tableau.evaluates))) and (keys is None or noisy)


def expect_tableau(tableau: PyTree) -> None:
    """Raise unless it is a tableau."""
    if not isinstance(tableau, Tableau):
        raise TypeError(
            f"`tableau` must be a diffsamp.Tableau; got {type(tableau).__name__}. Build one with "
            "diffsamp.solvers."
        )


def expect_key(tableau: Tableau, key: Key) -> None:
    """Raise if the tableau is seen to add noise and there is no key for it."""
    if key is None and is_concrete(tableau.c) and np.any(to_host(tableau.c) != 0):
        raise ValueError(
            f"tableau {tableau.name!r} adds noise and needs a random key: pass `key`, such as "
            "jax.random.key(0)."
        )


def _expect_fit(tableau: Tableau, state: State) -> None:
    if state.keys is None:
        expect_key(tableau, None)
    held = [max(jax.tree.leaves(slots)[0].shape[0], 1) for slots in (state.points, state.outputs)]
    if held != [np.shape(tableau.a)[1], np.shape(tableau.b)[1]]:
        raise ValueError(
            f"the state is one for p = {held[0]} states and q = {held[1]} outputs; tableau "
            f"{tableau.name!r} has p = {np.shape(tableau.a)[1]} and q = {np.shape(tableau.b)[1]}. "
            "Make it with init(tableau, ..) of the same tableau."
        )


def _expect_per_sample(tableau: Tableau, batch: int | None) -> None:
    tail = np.shape(tableau.times)[1:]
    if tail and tail != (batch,):
        raise ValueError(
            f"the tableau is stacked for {tail[0]} samples; x_T has "
            + ("no batch axis." if batch is None else f"a batch of {batch}.")
        )


@silence
def _bind(score_fn: ScoreFn, tableau: Tableau) -> _Row:
    """Rows with the numbers that turn the network's output into what each row wants.

    On the host, in float64, whenever tableau and process are concrete; else in the program.
    """
    level = row_levels(tableau)
    target = (tableau.target[:, 0], tableau.target[:, 1])
    bound = score_fn.bind(level, target)
    evaluates = tableau.evaluates
    score_fn.check_bound(bound, level, evaluates)
    # padding and noise-only rows have no meaningful level: their numbers must not make NaN
    xp = jnp if not is_concrete(bound, evaluates) else np
    bound = jax.tree.map(
        lambda v: xp.where(xp.asarray(evaluates), v, xp.zeros((), xp.asarray(v).dtype)), bound
    )
    rows = _Row(_by_slot(tableau.a), _by_slot(tableau.b), tableau.c, evaluates, bound, tableau.d)
    # float64 -> float32 here, not at dispatch, where an overflow warns from inside compiled code
    return jax.tree.map(_to_default_precision, rows)


def row_levels(tableau: Tableau) -> Level:
    """Where each row evaluates, and what time the network is told there; (N,) each."""
    times, alpha, sigma = (v[:-1] for v in (tableau.times, tableau.alpha, tableau.sigma))
    return Level(times, alpha, sigma, tableau.asked)


def _to_default_precision(array: Array) -> PyTree:
    if isinstance(array, np.ndarray) and array.dtype == np.float64:
        return array.astype(jax.dtypes.canonicalize_dtype(np.float64))
    return array


@functools.partial(jax.jit, static_argnames=("plain", "checkpoint", "record"))
def _run(score_fn, rows, x_T, keys, cond, *, plain, checkpoint, record):
    count, p = rows.a.shape[:2]
    state = _initial(p, rows.b.shape[1], x_T, keys)
    predict = score_fn.predict if checkpoint is True else _network(score_fn, checkpoint)

    def body(state, row):
        state, output = _advance(predict, row, state, cond, plain)
        return state, (state.x, output) if record else None

    body = jax.checkpoint(body, prevent_cse=False) if checkpoint is True else body
    state, recorded = lax.scan(body, state, rows, length=count)
    if keys is None and not plain:
        # with a traced tableau a missing key cannot be an error; it must not pass in silence either
        spoiled = jnp.any(rows.c != 0)
        state = state._replace(
            x=jax.tree.map(lambda x: jnp.where(spoiled, jnp.asarray(jnp.nan, x.dtype), x), state.x)
        )
    if not record:
        return state.x
    points, outputs = recorded
    first = jax.tree.map(lambda x: x[None], x_T)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), first, points), outputs


def _initial(p: int, q: int, x_T: PyTree, keys: Key) -> State:
    def empty(size: int) -> PyTree:
        slots = size if size > 1 else 0
        return jax.tree.map(lambda x: jnp.zeros((slots, *x.shape), x.dtype), x_T)

    return State(jnp.zeros((), jnp.int32), x_T, empty(p), empty(q), keys)


def _network(score_fn: ScoreFn, policy: bool | Policy = False) -> Callable[..., PyTree]:
    """Its `predict`, of which a gradient keeps what the policy says; nothing else changes."""

    def kept(primitive: PyTree, *_: PyTree, **__: PyTree) -> bool:
        return primitive.name in KEPT

    def predict(x: PyTree, bound: Bound, cond: Conditions | None) -> PyTree:
        # conditions need not be arrays: only x is an argument
        keep = policy if callable(policy) else kept
        call = functools.partial(score_fn.predict, bound=bound, cond=cond)
        return jax.checkpoint(call, policy=keep, prevent_cse=False)(x)

    return predict


def _advance(
    predict: Callable[..., Network],
    row: _Row,
    state: State,
    cond: Conditions | None,
    plain: bool,
) -> tuple[State, PyTree]:
    """One row: the state after it, and the output m_n; `plain` if every row evaluates."""
    n, x = state.row, state.x

    def call() -> PyTree:
        output = predict(x, row.bound, cond)
        if row.evaluates.ndim == 0:
            return output
        # stacked tableaux: a sample that is done must not see what the network says
        return jax.tree.map(
            lambda m: jnp.where(row.evaluates.reshape((-1,) + (1,) * (m.ndim - 1)), m, 0), output
        )

    def draw() -> PyTree:
        return random.normal_like(state.keys, n, x)

    def nothing() -> PyTree:
        return jax.tree.map(jnp.zeros_like, x)

    output = call() if plain else lax.cond(jnp.any(row.evaluates), call, nothing)
    # stored before they are combined: the other way round XLA copies the buffers at every row
    points, outputs = _store(state.points, x, n), _store(state.outputs, output, n)
    new = jax.tree.map(lambda u, m: _combine(row.a, u) + _combine(row.b, m), points, outputs)
    if state.keys is not None:
        noise = draw() if plain else lax.cond(jnp.any(row.c != 0), draw, nothing)
        new = jax.tree.map(lambda v, z: v + scale_rows(row.c, v) * z.astype(v.dtype), new, noise)
    shift = (lambda v: v) if row.d is None else lambda v: v + scale_rows(row.d, v)
    new = jax.tree.map(lambda v, old: shift(v).astype(old.dtype), new, x)
    points, outputs = _kept(points, state.points), _kept(outputs, state.outputs)
    return State(n + 1, new, points, outputs, state.keys), output


def _store(slots: PyTree, value: Value, n: Array) -> PyTree:
    """`value` put in slot n mod size; in front of itself where there are no slots."""

    def put(held: jax.Array, v: jax.Array) -> jax.Array:
        size = held.shape[0]
        return lax.dynamic_update_index_in_dim(held, v, n % size, 0) if size else v[None]

    return jax.tree.map(put, slots, value)


def _kept(slots: PyTree, before: Array) -> PyTree:
    return jax.tree.map(lambda s, b: s[: b.shape[0]], slots, before)


def _combine(weights: Array, slots: jax.Array) -> jax.Array:
    """sum_i weights[i] slots[i], in at least float32.

    Written out term by term, so that it becomes one loop over the elements. A reduction over the
    leading axis is 10 times slower on CPU, and a dot product rounds its inputs on matrix units.
    """
    dtype = working_dtype(slots.dtype)
    weights = jnp.asarray(weights, dtype)
    terms = (
        scale_rows(weights[i], slots[i]) * slots[i].astype(dtype) for i in range(slots.shape[0])
    )
    return functools.reduce(jnp.add, terms)


def _by_slot(weights: Array) -> PyTree:
    """Every row's weights in the order of the ring buffer: slot i holds lag (n - i) mod size."""
    rows, size = np.shape(weights)[:2]
    xp = namespace(weights)
    row = xp.arange(rows)[:, None]
    return weights[row, (row - xp.arange(size)[None]) % size] if size > 1 else weights
