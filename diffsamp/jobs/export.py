"""A sampler as one file: the compiled program's source and the weights, without the model's code.

The program is StableHLO made by `jax.export`, with the batch size left open; the weights lie beside
it as arrays, so they are no constants of the program. The file is a zip of .npy arrays and is read
without pickle.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from diffsamp._core import random
from diffsamp._core.checks import expect_int
from diffsamp._core.files import write_atomically
from diffsamp._core.types import Array, Conditions, DType, Key, PyTree, Value
from diffsamp.jobs._programs import (
    each_alone,
    expect_condition,
    expect_file,
    expect_platforms,
    exported,
    flatbuffers,
)
from diffsamp.jobs.sampler import Sampler

__all__ = ["ExportedSampler", "export", "load_exported"]

_FORMAT, _VERSION = "diffsamp.exported", 2


@dataclasses.dataclass(frozen=True, eq=False)
class ExportedSampler:
    """What `load_exported` returns: call it with (key, x_T) or (key, batch size).

    May be called under `jit`, also with sharded arrays; JAX has no `vmap` or `grad` of it. The
    weights lie on JAX's default device.

    Attributes:
      shape: of one sample.
      dtype: of the state.
      nfe: network evaluations.
      platforms: what it was exported for.
      cond: {name: (shape without the batch axis, dtype)} of the condition.
      random: the kind of random keys it takes, such as "threefry2x32".
    """

    shape: tuple[int, ...]
    dtype: str
    nfe: int
    platforms: tuple[str, ...]
    cond: Mapping[str, tuple[tuple[int, ...], str]]
    random: str
    _program: PyTree = dataclasses.field(repr=False)
    _prior: PyTree = dataclasses.field(repr=False)
    _weights: list[Array] = dataclasses.field(repr=False)

    def __call__(self, key: Key, x_T: PyTree, *, cond: Conditions | None = None) -> jax.Array:
        """Sample.

        Args:
          key: a random key, or one per sample. Sample i is the one that `Sampler` gives for it.
          x_T: the start (batch, *shape); or the batch size, or that shape, to draw it from the
            prior, scaled to where the tableau begins.
          cond: the arrays named by `cond`, each with the leading axis batch.

        Returns:
          Samples (batch, *shape).

        Raises:
          TypeError: no key, or dtypes that do not convert without loss of their kind.
          ValueError: shapes, names or a kind of key that are not those exported.
        """
        drawn = isinstance(x_T, int | np.integer | tuple)
        given_shape = np.shape(x_T)
        if isinstance(x_T, tuple):
            given_shape = x_T
        elif drawn:
            given_shape = (expect_int(x_T, "x_T", at_least=1), *self.shape)
        if given_shape[1:] != self.shape or not given_shape or given_shape[0] < 1:
            raise ValueError(
                f"`x_T` must have shape ({', '.join(map(str, ('batch', *self.shape)))}) with a "
                f"batch of at least 1; got {given_shape}."
            )
        size = given_shape[0]
        cond = dict(cond or {})
        if set(cond) != set(self.cond):
            raise ValueError(f"`cond` must hold {sorted(self.cond)}; got {sorted(cond)}.")
        given = {}
        for name, (tail, dtype) in self.cond.items():
            given[name] = _converted(cond[name], dtype, f"cond[{name!r}]")
            if given[name].shape != (size, *tail):
                raise ValueError(
                    f"cond[{name!r}] must have shape {(size, *tail)}; got {given[name].shape}."
                )
        keys = random.sample_keys(key, size)
        if str(jax.random.key_impl(keys)) != self.random:
            raise ValueError(
                f"`key` must be of the kind {self.random!r}, as when this was exported; got "
                f"{str(jax.random.key_impl(keys))!r}."
            )
        if drawn:
            pair = jax.vmap(jax.random.split)(keys)
            x_T, keys = self._prior.call(jax.random.key_data(pair[:, 0])), pair[:, 1]
        x_T = _converted(x_T, self.dtype, "x_T")
        return self._program.call(self._weights, jax.random.key_data(keys), x_T, given)


def _converted(value: Value, dtype: str, name: str) -> jax.Array:
    array = jnp.asarray(value)
    if not jnp.can_cast(array.dtype, dtype, "same_kind"):
        raise TypeError(f"`{name}` must be of dtype {dtype}; got {array.dtype}.")
    return array.astype(dtype)


def export(
    sampler: Sampler,
    path: str | os.PathLike[str],
    *,
    shape: Sequence[int],
    cond: Conditions | None = None,
    dtype: DType = jnp.float32,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> None:
    """Write a sampler as one file that runs without the model's code.

    Args:
      sampler: from `diffsamp.sampler`, or `Sampler(score_fn, tableau)`; a batched network whose
        state is one array.
      path: the file to write, atomically.
      shape: of one sample, without the batch axis.
      cond: an example of the network's keyword arguments, arrays with a leading batch axis of any
        size; only their shapes and dtypes count.
      dtype: of the state.
      platforms: of "cpu", "cuda", "rocm" and "tpu".

    The batch size is left open; code that needs to know it (most that comes from PyTorch) is shown
    one sample, and vectorised. The program can be read by later versions of JAX for as long as
    `jax.export` promises (six months at least).

    Raises:
      TypeError: not a `Sampler`, a dtype that is not floating.
      FileNotFoundError: the path's folder does not exist; NotADirectoryError, IsADirectoryError.
      ValueError: a network without a batch axis, or whose program depends on the batch size or
        cannot be exported (calls back to Python); an unknown platform; a condition without a batch
        axis.
      ModuleNotFoundError: flatbuffers, in which JAX writes programs, is missing.
    """
    # what can be said before the work
    flatbuffers()
    if not isinstance(sampler, Sampler):
        raise TypeError(
            "`sampler` must be a diffsamp.Sampler, such as Sampler(score_fn, tableau); got "
            f"{type(sampler).__name__}."
        )
    platforms = expect_platforms(platforms)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`dtype` must be floating; got {jnp.dtype(dtype)}.")
    expect_file(Path(path))
    if sampler.score_fn.batched is False:
        raise ValueError("`export` needs a network with a batch axis, ScoreFn(batched=True).")
    shape = tuple(expect_int(size, "shape", at_least=1) for size in shape)
    (batch,) = jax_export.symbolic_shape("batch")
    weights, structure = jax.tree.flatten(sampler.score_fn)
    weights = [jnp.asarray(leaf) for leaf in weights]
    # a transform may hold random keys, which a file holds as plain numbers
    kinds = [
        jax.random.key_impl(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else None
        for leaf in weights
    ]
    weights = [
        leaf if kind is None else jax.random.key_data(leaf)
        for leaf, kind in zip(weights, kinds, strict=True)
    ]
    conditions = {name: expect_condition(name, value) for name, value in (cond or {}).items()}
    empty = jax.random.key(0)
    width = jax.random.key_data(empty).shape

    def typed(data: Value) -> PyTree:
        return jax.random.wrap_key_data(data)

    def run(weights: list[Array], keys: Key, x_T: PyTree, cond: dict[str, PyTree]) -> PyTree:
        leaves = [
            leaf if kind is None else jax.random.wrap_key_data(leaf, impl=kind)
            for leaf, kind in zip(weights, kinds, strict=True)
        ]
        score_fn = jax.tree.unflatten(structure, leaves)
        return Sampler(score_fn, sampler.tableau)(typed(keys), x_T, cond=cond or None)

    process = sampler.score_fn.process

    def prior(keys: Key) -> PyTree:
        first = sampler.tableau.times[0]
        return process.start_sample(typed(keys), (keys.shape[0], *shape), first).astype(dtype)

    keys = jax.ShapeDtypeStruct((batch, *width), jnp.uint32)
    arguments = (
        [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in weights],
        keys,
        jax.ShapeDtypeStruct((batch, *shape), dtype),
        {n: jax.ShapeDtypeStruct((batch, *tail), d) for n, (tail, d) in conditions.items()},
    )
    try:
        program = exported(run, platforms, *arguments)
    except Exception as error:  # code that asks for the batch size says so in many ways
        try:
            program = exported(each_alone(run), platforms, *arguments)
        except Exception:
            raise error from error.__cause__
    start = exported(prior, platforms, keys)
    meta = {
        "format": _FORMAT,
        "version": _VERSION,
        "shape": list(shape),
        "dtype": str(jnp.dtype(dtype)),
        "nfe": sampler.tableau.nfe,
        "cond": conditions,
        "platforms": list(platforms),
        "weights": [str(leaf.dtype) for leaf in weights],
        "name": sampler.tableau.name,
        "random": str(jax.random.key_impl(empty)),
    }
    arrays = {
        "meta": np.frombuffer(json.dumps(meta).encode(), np.uint8),
        "program": np.frombuffer(program.serialize(), np.uint8),
        "prior": np.frombuffer(start.serialize(), np.uint8),
        # as bytes: NumPy's files do not know bfloat16 and its like
        **{
            f"weight_{i}": np.frombuffer(np.ascontiguousarray(leaf).tobytes(), np.uint8)
            for i, leaf in enumerate(weights)
        },
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_atomically(path, buffer.getvalue())


def load_exported(path: str | os.PathLike[str]) -> ExportedSampler:
    """Read what `export` wrote; neither the network's code nor its framework is needed.

    Args:
      path: the file.

    Returns:
      An `ExportedSampler`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another kind of file, another version, or a corrupt one.
      ModuleNotFoundError: flatbuffers, in which JAX writes programs, is missing.
    """
    flatbuffers()
    name = os.fspath(path)
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no file {name}.")
    content = io.BytesIO(Path(path).read_bytes())
    if not zipfile.is_zipfile(content):
        raise ValueError(f"{name} is not an exported sampler, or cut short.")
    try:
        with np.load(content, allow_pickle=False) as file:
            arrays = dict(file)
        meta = json.loads(arrays["meta"].tobytes())
        if not isinstance(meta, dict):
            raise TypeError("its description is no mapping")
    except Exception as error:  # whatever NumPy, zipfile and json say of a broken file
        raise ValueError(f"{name} is not an exported sampler, or corrupt: {error}.") from error
    if meta.get("format") != _FORMAT or meta.get("version") != _VERSION:
        raise ValueError(
            f"{name} is {meta.get('format')!r} of version {meta.get('version')!r}; this diffsamp "
            f"reads {_FORMAT!r} of version {_VERSION}."
        )
    try:
        return _built(meta, arrays)
    except Exception as error:  # whatever JAX says of a program that is none
        raise ValueError(f"{name} is corrupt: {error!r}.") from error


def _built(meta: dict[str, PyTree], arrays: dict[str, np.ndarray]) -> ExportedSampler:
    program = jax_export.deserialize(bytearray(arrays["program"].tobytes()))
    prior = jax_export.deserialize(bytearray(arrays["prior"].tobytes()))
    shapes = [aval.shape for aval in program.in_avals[: len(meta["weights"])]]
    weights = [
        jnp.asarray(np.frombuffer(arrays[f"weight_{i}"].tobytes(), jnp.dtype(d)).reshape(shape))
        for i, (d, shape) in enumerate(zip(meta["weights"], shapes, strict=True))
    ]
    cond = {name: (tuple(tail), d) for name, (tail, d) in meta["cond"].items()}
    return ExportedSampler(
        tuple(meta["shape"]),
        meta["dtype"],
        meta["nfe"],
        tuple(meta["platforms"]),
        cond,
        meta["random"],
        program,
        prior,
        weights,
    )
