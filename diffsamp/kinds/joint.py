"""Several noise processes in one state: one per leaf, or one per frequency.

Every element of the state has a law of its own, alpha_k(t) and sigma_k(t), at a common time t, and
one network is asked about all of them. A solver is linear and works element by element, so it is
built once per law, by the same function as ever, and the tables become one whose coefficients have
axes of the data. What the network says is turned into what each law's table wants by numbers with
the same axes, in a transform; leaves are kept side by side in one flat array, and frequencies are
coordinates in an orthonormal basis, in which white noise is white.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import solvers
from diffsamp._core import random
from diffsamp._core.checks import expect_times
from diffsamp._core.numeric import is_concrete, silence, to_host
from diffsamp._core.types import Array, Bound, Conditions, DType, Key, Network, PyTree, Times, Value
from diffsamp.guidance import Transform, per_row
from diffsamp.kinds._blurring import Blurred, blurring
from diffsamp.kinds._s4 import s4
from diffsamp.predictions import Level, conversion, level_at, weights
from diffsamp.processes import Process, expect_process
from diffsamp.score import bind_as, expect_score_fn, scale_rows
from diffsamp.tableau import Tableau

__all__ = [
    "Blurred",
    "Joint",
    "JointSampler",
    "JointSteps",
    "blurring",
    "cosine_basis",
    "per_frequency",
    "per_leaf",
    "s4",
]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Leaves:
    """A pytree as one flat array, (batch, elements)."""

    structure: PyTree
    shapes: tuple[tuple[int, ...], ...]

    def out(self, x: Array) -> PyTree:
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])[:-1]
        parts = jnp.split(x, ends, axis=1)
        leaves = [v.reshape(len(x), *s) for v, s in zip(parts, self.shapes, strict=True)]
        return jax.tree.unflatten(self.structure, leaves)

    def into(self, tree: PyTree) -> jax.Array:
        leaves = self.structure.flatten_up_to(tree)
        found = tuple(tuple(np.shape(leaf)[1:]) for leaf in leaves)
        if found != self.shapes:
            raise ValueError(f"the leaves must have the shapes {self.shapes}; got {found}.")
        return jnp.concatenate([jnp.reshape(v, (np.shape(v)[0], -1)) for v in leaves], axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Rotated:
    """Coordinates in an orthonormal basis along each of the sample's first axes."""

    bases: tuple[Array, ...]

    def _along(self, x: Array, *, back: bool) -> jax.Array:
        for axis, basis in enumerate(self.bases, start=1):
            matrix = jnp.asarray(basis, x.dtype)
            moved = jnp.tensordot(
                jnp.moveaxis(x, axis, -1), matrix, (-1, 0 if back else 1), precision="highest"
            )
            x = jnp.moveaxis(moved, -1, axis)
        return x

    def out(self, x: Array) -> jax.Array:
        return self._along(x, back=True)

    def into(self, x: Array) -> jax.Array:
        return self._along(jnp.asarray(x), back=False)


class _JointBound(NamedTuple):
    inner: Bound
    row: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class JointSteps(Transform):
    """A network that says what every law's table wants; made by `Joint.sampler`.

    Attributes:
      score_fn: the network, of the state as it was trained.
      r: (N, laws) weights of the state in the answer.
      s: (N, laws) weights of what the network emits.
      index: the law of every element, (1, ...).
      frame: how the sampler's state is the network's.
    """

    score_fn: Network
    r: Array
    s: Array
    index: Array
    frame: PyTree

    def bind(self, level: Level, target: tuple[Array, Array]) -> _JointBound:
        """As `ScoreFn.bind`, with the numbers of every row and law."""
        if is_concrete(target) and np.any([to_host(v) != 0 for v in target]):
            raise ValueError(
                "a joint network is sampled with the tableau it came with, from Joint.sampler: one "
                "of a single process does not fit its other laws."
            )
        (row,) = per_row(level, "Joint.sampler", np.arange(np.shape(self.r)[0]))
        return _JointBound(bind_as(self.score_fn, level, self.prediction), row)

    def predict(self, x: PyTree, bound: _JointBound, cond: Conditions | None = None) -> PyTree:
        """The prediction of every element, as its law's table wants it."""
        answer = self.frame.into(self.score_fn.predict(self.frame.out(x), bound.inner, cond))
        r, s = (
            scale_rows(jnp.take(jnp.asarray(v)[bound.row], self.index), x) for v in (self.r, self.s)
        )
        return (r * x + s * answer).astype(x.dtype)


class JointSampler(NamedTuple):
    """What `Joint.sampler` returns: give both to `ds.sample`.

    Attributes:
      network: the transform of the ScoreFn.
      tableau: coefficients with axes of the data.
    """

    network: JointSteps
    tableau: Tableau


@dataclasses.dataclass(frozen=True, eq=False)
class Joint:
    """A network whose state has several laws; made by `per_leaf` or `per_frequency`.

    Attributes:
      score_fn: the network; its process is the one its time label follows.
      laws: the processes.
      names: what they are called, for errors.
      index: the law of every element of the sampler's state, (1, ...).
      frame: how the sampler's state is the network's.
    """

    score_fn: Network
    laws: tuple[Process, ...]
    names: tuple[str, ...]
    index: np.ndarray
    frame: PyTree

    def sampler(
        self, solver: str | Callable[..., Tableau], times: Times, **options: Value
    ) -> JointSampler:
        """The tables of one solver for every law, as one.

        Args:
          solver: a name of `ds.solvers`, or a function (process, times, **options) -> Tableau.
          times: (n + 1,) decreasing times, common to all laws.
          **options: of the solver.

        Returns:
          A `JointSampler`; its state is `frame`'s: `prior_sample` draws it, `parts` reads it.

        Raises:
          ValueError: a solver that asks the laws at different times (stages at a fraction of the
            log-SNR), or what the network does not determine at some level of some law.
        """
        build = solvers.get(solver) if isinstance(solver, str) else solver
        times = expect_times(times)
        tables = []
        for name, law in zip(self.names, self.laws, strict=True):
            try:
                tables.append(build(law, times, **options))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        first, *others = tables = Tableau.pad_together(tables)
        for name, other in zip(self.names[1:], others, strict=True):
            same = all(
                np.allclose(getattr(other, key), getattr(first, key), rtol=1e-9, atol=1e-12)
                for key in ("times", "evaluates", *(["asked"] if first.asked is not None else []))
            )
            if not same:
                raise ValueError(
                    f"{first.name!r} asks {name} at other times than {self.names[0]}: its stages "
                    "lie at a fraction of the log-SNR. Take a method of one evaluation a step, or "
                    "one with stages at the steps' own times, such as heun."
                )
        pairs = [self._numbers(*pair) for pair in zip(self.names, self.laws, tables, strict=True)]
        r, s = (np.stack(part, axis=1) for part in zip(*pairs, strict=True))
        rows, clock = first.rows, level_at(self.score_fn.process, np.asarray(first.times))

        def spread(key: str) -> np.ndarray:
            return np.stack([getattr(t, key) for t in tables], axis=-1)[..., self.index]

        tableau = Tableau.create(
            times=first.times,
            alpha=clock.alpha,
            sigma=clock.sigma,
            target=np.zeros((rows, 2)),
            a=spread("a"),
            b=spread("b"),
            c=spread("c"),
            evaluates=first.evaluates,
            d=None if first.d is None else spread("d"),
            asked=first.asked,
            name=first.name,
            source=first.source,
            check="none",
        )
        network = JointSteps(self.score_fn, r, s, self.index, self.frame)
        return JointSampler(network, tableau)

    @silence
    def _numbers(self, name: str, law: Process, table: Tableau) -> tuple[np.ndarray, np.ndarray]:
        """r and s of every row, (N,): what a law's table wants, of the state and the answer."""
        level = level_at(law, np.asarray(table.times)[:-1])
        source = weights(self.score_fn.prediction, law, level, self.score_fn.sigma_data)
        target = (*np.asarray(table.target).T, np.ones(table.rows))
        r, s = conversion(source, target, level.alpha, level.sigma)
        asks = np.asarray(table.evaluates)
        bad = asks & ~(np.isfinite(r) & np.isfinite(s))
        if np.any(bad):
            row = int(np.argmax(bad))
            raise ValueError(
                f"{name}: a network that predicts {self.score_fn.prediction!r} does not determine "
                f"what {table.name!r} wants at t = {table.times[row]:g} (row {row}). Start or end "
                "away from this end of the process."
            )
        return np.where(asks, r, 0.0), np.where(asks, s, 0.0)

    def prior_sample(self, key: Key, n: int, t: Array = None, dtype: DType = float) -> jax.Array:
        """Draw the sampler's start: white noise, as wide as every element's law says.

        Args:
          key: one key, or one per sample.
          n: how many.
          t: the first time of the sampler; None: t_max. See `Process.start_sample`.
          dtype: floating dtype of the result.
        """
        widths = []
        for law in self.laws:
            part = 1.0 if t is None else float(law.sigma(t)) / float(law.sigma(law.t_max))
            widths.append(float(law.prior_std) * part)
        dtype = jax.dtypes.canonicalize_dtype(dtype)
        shape = self.index.shape[1:]
        noise = jax.vmap(lambda k: jax.random.normal(k, shape, dtype))(random.sample_keys(key, n))
        return noise * jnp.asarray(np.array(widths)[self.index], dtype)

    def parts(self, x: Array) -> PyTree:
        """The sampler's state, or a sample, as the network sees it: leaves, or pixels."""
        return self.frame.out(x)

    def state(self, tree: PyTree) -> jax.Array:
        """The inverse of `parts`."""
        return self.frame.into(tree)


def _joint(
    score_fn: Network, laws: Sequence[Process], names: Sequence[str], index: Array, frame: PyTree
) -> Joint:
    expect_score_fn(score_fn)
    for law in laws:
        expect_process(law)
    if getattr(score_fn, "scale_input", False) or not score_fn.batched:
        raise ValueError(
            "a joint network takes a batch and scales its own input: build its ScoreFn with "
            "scale_input=False and batched=True, and scale every part in `apply`."
        )
    return Joint(score_fn, tuple(laws), tuple(names), np.asarray(index), frame)


def per_leaf(score_fn: Network, laws: PyTree, shapes: PyTree) -> Joint:
    """A process for every leaf of the state, such as nodes and edges of a graph.

    Examples:
      >>> import jax, numpy as np, diffsamp as ds
      >>> laws = {"nodes": ds.processes.vp_linear(0.1, 1.0), "edges": ds.processes.ve(0.1, 1.0)}
      >>> def apply(params, x, t):
      ...     return x  # stands for a network that predicts the noise of both
      >>> score_fn = ds.ScoreFn(apply, None, laws["nodes"], prediction="noise")
      >>> graph = ds.joint.per_leaf(score_fn, laws, {"nodes": (9, 4), "edges": (9, 9)})
      >>> network, tableau = graph.sampler("dpmpp_2m", np.linspace(1.0, 0.01, 11))
      >>> x = ds.sample(network, tableau, graph.prior_sample(jax.random.key(0), 3))
      >>> graph.parts(x)["edges"].shape
      (3, 9, 9)

    Args:
      score_fn: a network of the pytree, which predicts the same thing of every leaf; its process
        gives the time label. A transform of a ScoreFn that acts leaf by leaf will do.
      laws: the processes, a pytree with the state's structure.
      shapes: each leaf's shape without the batch axis, likewise.

    Returns:
      A `Joint`, whose state is all leaves in one array, (batch, elements).

    Raises:
      TypeError: a leaf of `laws` that is no process.
      ValueError: shapes of another structure, a network that scales its input.

    Reference: Jo, Lee & Hwang 2022 (GDSS), arXiv:2202.02514.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(
        laws, is_leaf=lambda v: isinstance(v, Process)
    )
    structure: PyTree = treedef
    try:
        sizes = tuple(tuple(int(n) for n in s) for s in structure.flatten_up_to(shapes))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`shapes` must give a shape for every process of `laws`, {structure}: {error}"
        ) from error
    names = [f"laws{jax.tree_util.keystr(path)}" for path, _ in leaves]
    counts = [math.prod(size) for size in sizes]
    index = np.repeat(np.arange(len(counts)), counts)[None]
    return _joint(score_fn, [law for _, law in leaves], names, index, Leaves(structure, sizes))


def cosine_basis(size: int) -> np.ndarray:
    """The orthonormal cosines (DCT-II), (size, size), a row each, the lowest frequency first."""
    frequency, place = np.arange(size)[:, None], np.arange(size)[None]
    rows = np.cos(np.pi * frequency * (2 * place + 1) / (2 * size)) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    return rows


def per_frequency(
    score_fn: Network,
    laws: Sequence[Process],
    index: Array,
    shape: tuple[int, ...],
    *,
    bases: Sequence[Array] | None = None,
) -> Joint:
    """A process for every frequency, or every coordinate of another orthonormal basis.

    Args:
      score_fn: a network of samples as they are (pixels), that predicts there what it was trained
        to; its process gives the time label.
      laws: the distinct processes.
      index: integers that broadcast against `shape`: the law of every coordinate, such as
        (height, width, 1).
      shape: of a sample.
      bases: orthonormal matrices for the first axes, a vector of the basis in each row; None:
        cosines (`cosine_basis`) along the first two, or the only one.

    Returns:
      A `Joint`, whose state has the coordinates in place of the pixels.

    Raises:
      ValueError: an index without a law, a basis that is not orthonormal or of another size.

    References: Hoogeboom & Salimans 2022, arXiv:2209.05557; Lee et al. 2022, arXiv:2207.11192.
    """
    shape = tuple(shape)
    if bases is None:
        bases = [cosine_basis(size) for size in shape[:2]]
    for axis, basis in enumerate(bases):
        square = np.shape(basis) == (shape[axis],) * 2 if axis < len(shape) else False
        if not (
            square and np.allclose(np.asarray(basis) @ np.asarray(basis).T, np.eye(len(basis)))
        ):
            raise ValueError(
                f"bases[{axis}] must be orthonormal rows, {shape[axis : axis + 1] * 2}; got shape "
                f"{np.shape(basis)}."
            )
    index = np.broadcast_to(np.asarray(index), shape)
    if index.dtype.kind not in "iu" or index.min() < 0 or index.max() >= len(laws):
        raise ValueError(f"`index` must hold integers from 0 to {len(laws) - 1}, one per law.")
    names = [f"laws[{k}]" for k in range(len(laws))]
    return _joint(score_fn, laws, names, index[None], Rotated(tuple(np.asarray(b) for b in bases)))
