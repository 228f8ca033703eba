"""Programs of an exported network, called like the network itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core.types import Array, PyTree, Value
from diffsamp.predictions import Level

__all__ = ["LoadedProgram", "LoadedTime", "is_real"]


class LoadedTime:
    """What the network takes as its time, where that was a function of the level."""

    def __init__(self, program: Value) -> None:
        self.program = program

    def __call__(self, level: Level) -> jax.Array:
        shape = jnp.shape(level.t)
        numbers = [
            jnp.broadcast_to(jnp.asarray(v, aval.dtype), shape).ravel()
            for v, aval in zip(level[:3], self.program.in_avals, strict=True)
        ]
        return self.program.call(*numbers).reshape(shape)


class _Inputs(NamedTuple):
    """What has a batch axis."""

    x: Array
    t: Array
    cond: Mapping[str, PyTree]


class LoadedProgram:
    """`apply(params, x, t, **cond)` of an exported network.

    `jax.export` gives programs that cannot be vectorised, and differentiated only through another
    one. Here the derivative is the program that was written beside it, and an axis of `vmap`
    becomes part of the batch.
    """

    def __init__(
        self,
        forward: Value,
        backward: Value | None,
        names: tuple[str, ...],
        shape: tuple[int, ...],
        batch: int | None,
        cond: Mapping[str, tuple[tuple[int, ...], str]],
    ) -> None:
        self.names, self.shape, self.cond = names, shape, cond
        self._dtypes = _Inputs(*jax.tree.unflatten(*_inputs_of(forward)))
        run = _vectorised(functools.partial(_in_calls, forward, batch), summed=False)

        @jax.custom_vjp
        def call(weights: list[Array], inputs: _Inputs) -> Array:
            return run(weights, inputs)

        def ahead(weights: list[Array], inputs: _Inputs) -> tuple[Array, PyTree]:
            return run(weights, inputs), (weights, inputs)

        def back(kept: PyTree, output: Array) -> PyTree:
            if backward is None:
                raise ValueError(
                    "this network was written without its gradient: "
                    "export_network(.., with_gradient=True)."
                )
            leaves, structure = jax.tree.flatten(kept)
            pull = _vectorised(functools.partial(_pulled, backward, batch), summed=True)
            slopes = iter(pull(*kept, output))
            every = [
                next(slopes) if is_real(v) else np.zeros(jnp.shape(v), jax.dtypes.float0)
                for v in leaves
            ]
            return jax.tree.unflatten(structure, every)

        call.defvjp(ahead, back)
        self._call = call

    def __call__(self, params: Mapping[str, Array], x: Array, t: Array, **cond: PyTree) -> Array:
        """The network's output.

        Raises:
          ValueError: shapes or conditions that are not those it was written for.
        """
        if x.shape[1:] != self.shape:
            raise ValueError(
                f"this network was written for states of shape (batch, "
                f"{', '.join(map(str, self.shape))}); got {x.shape}."
            )
        given = jax.tree_util.tree_leaves_with_path(cond)
        found = {jax.tree_util.keystr(path): jnp.shape(leaf)[1:] for path, leaf in given}
        wanted = {name: tail for name, (tail, _) in self.cond.items()}
        if found != wanted:
            raise ValueError(
                f"this network was written for conditions {wanted} (shapes without the batch "
                f"axis); got {found}."
            )
        inputs = jax.tree.map(
            lambda leaf, dtype: jnp.asarray(leaf, dtype), _Inputs(x, t, cond), self._dtypes
        )
        return self._call([params[name] for name in self.names], inputs)


def is_real(leaf: Array) -> bool:
    """Whether it has a derivative."""
    return bool(jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact))


def _inputs_of(program: Value) -> tuple[Value, list[Value]]:
    """(structure, dtypes) of (x, t, cond)."""
    arguments, _ = jax.tree.unflatten(program.in_tree, [aval.dtype for aval in program.in_avals])
    leaves, structure = jax.tree.flatten(arguments[1:])
    return structure, leaves


def _in_calls(program: Value, size: int | None, weights: list[Array], inputs: _Inputs) -> Array:
    """The program on a batch of any size, in calls of `size`."""
    if size is None:
        return program.call(weights, *inputs)
    parts, count = _split(inputs, size)
    output = jax.lax.map(lambda part: program.call(weights, *part), parts)
    return output.reshape(-1, *output.shape[2:])[:count]


def _pulled(
    program: Value, size: int | None, weights: list[Array], inputs: _Inputs, output: Array
) -> list[Array]:
    """The gradients by weights, a sum over the batch, and by inputs."""
    if size is None:
        return program.call(weights, *inputs, output)
    count = output.shape[0]
    pad = [(0, -count % size)] + [(0, 0)] * (output.ndim - 1)
    # what is padded pulls nothing
    parts, _ = _split((*inputs, jnp.pad(output, pad)), size)

    def one(total: list[Array], part: PyTree) -> tuple[list[Array], list[Array]]:
        slopes = program.call(weights, *part)
        mine = [a + b for a, b in zip(total, slopes[: len(total)], strict=True)]
        return mine, slopes[len(total) :]

    zeros = [jnp.zeros_like(w) for w in weights if is_real(w)]
    total, slopes = jax.lax.scan(one, zeros, parts)
    return [*total, *(s.reshape(-1, *s.shape[2:])[:count] for s in slopes)]


def _split(tree: PyTree, size: int) -> tuple[PyTree, int]:
    """Arrays (batch, ..) as (calls, size, ..), the last samples repeated; and the batch."""
    count = jax.tree.leaves(tree)[0].shape[0]
    calls = -(-count // size)

    def cut(leaf: Array) -> Array:
        pad = [(0, calls * size - leaf.shape[0])] + [(0, 0)] * (leaf.ndim - 1)
        return jnp.pad(leaf, pad, mode="edge").reshape(calls, size, *leaf.shape[1:])

    return jax.tree.map(cut, tree), count


def _vectorised(function: Callable[..., PyTree], summed: bool) -> Callable[..., PyTree]:
    """`function(weights, *inputs)`, whose axis under `vmap` becomes part of the batch.

    Where its results are summed over the batch, or each entry has weights of its own, the entries
    are computed one after the other instead.
    """

    @jax.custom_batching.custom_vmap
    def run(weights: list[Array], *inputs: PyTree) -> PyTree:
        return function(weights, *inputs)

    @run.def_vmap
    def _(size: int, batched: PyTree, weights: list[Array], *inputs: PyTree) -> PyTree:
        flags = jax.tree.leaves(batched[1:])
        leaves, structure = jax.tree.flatten(inputs)
        whole = [
            leaf if own else jnp.broadcast_to(leaf, (size, *leaf.shape))
            for leaf, own in zip(leaves, flags, strict=True)
        ]
        own_weights = any(jax.tree.leaves(batched[0]))
        if summed or own_weights:
            weights = [
                w if own else jnp.broadcast_to(w, (size, *w.shape))
                for w, own in zip(weights, batched[0], strict=True)
            ]
            stacked = weights, *jax.tree.unflatten(structure, whole)
            output = jax.lax.map(lambda one: run(*one), stacked)
        else:
            flat = [leaf.reshape(-1, *leaf.shape[2:]) for leaf in whole]
            output = run(weights, *jax.tree.unflatten(structure, flat))
            output = jax.tree.map(lambda a: a.reshape(size, -1, *a.shape[1:]), output)
        return output, jax.tree.map(lambda _: True, output)

    return run
