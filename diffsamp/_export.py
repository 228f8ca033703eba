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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from diffsamp import random
from diffsamp._checks import expect_int
from diffsamp._files import write_atomically
from diffsamp._sampler import Sampler

__all__ = ["ExportedSampler", "export", "load_exported"]

_FORMAT, _VERSION = "diffsamp.exported", 1


@dataclasses.dataclass(frozen=True, eq=False)
class ExportedSampler:
    """What `load_exported` returns: call it with (key, x_T) or (key, batch size).

    Attributes:
      shape: of one sample.
      dtype: of the state.
      nfe: network evaluations.
      platforms: what it was exported for.
      cond: {name: (shape without the batch axis, dtype)} of the condition.
    """

    shape: tuple[int, ...]
    dtype: str
    nfe: int
    platforms: tuple[str, ...]
    cond: Mapping[str, tuple[tuple[int, ...], str]]
    _program: Any
    _prior: Any
    _weights: list[Any]

    def __call__(self, key: Any, x_T: Any, *, cond: Mapping[str, Any] | None = None) -> jax.Array:
        """Sample.

        Args:
          key: a random key, or one per sample. Sample i is the one that `Sampler` gives for it.
          x_T: the start (batch, *shape), or the batch size, to draw it from the prior.
          cond: the arrays named by `cond`, each with the leading axis batch.

        Returns:
          Samples (batch, *shape).

        Raises:
          ValueError: shapes or names that are not those exported.
        """
        drawn = isinstance(x_T, int | np.integer)
        batch = expect_int(x_T, "x_T", at_least=1) if drawn else np.shape(x_T)[:1]
        size = batch if isinstance(batch, int) else (batch[0] if batch else 0)
        if not drawn and np.shape(x_T)[1:] != self.shape:
            raise ValueError(
                f"`x_T` must have shape (batch, {', '.join(map(str, self.shape))}); got "
                f"{np.shape(x_T)}."
            )
        cond = dict(cond or {})
        if set(cond) != set(self.cond):
            raise ValueError(f"`cond` must hold {sorted(self.cond)}; got {sorted(cond)}.")
        given = {}
        for name, (tail, dtype) in self.cond.items():
            given[name] = jnp.asarray(cond[name], dtype)
            if given[name].shape != (size, *tail):
                raise ValueError(
                    f"cond[{name!r}] must have shape {(size, *tail)}; got {given[name].shape}."
                )
        keys = random.sample_keys(key, size)
        if drawn:
            pair = jax.vmap(jax.random.split)(keys)
            x_T, keys = self._prior.call(jax.random.key_data(pair[:, 0])), pair[:, 1]
        x_T = jnp.asarray(x_T, self.dtype)
        return self._program.call(self._weights, jax.random.key_data(keys), x_T, given)


def export(
    sampler: Sampler,
    path: str | os.PathLike[str],
    *,
    shape: Sequence[int],
    cond: Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
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

    Raises:
      ValueError: a network without a batch axis, or one whose program depends on the batch size.
      ModuleNotFoundError: flatbuffers, in which JAX writes programs, is missing.
    """
    _flatbuffers()  # if it is missing, say so before the work
    if sampler.score_fn.batched is False:
        raise ValueError("`export` needs a network with a batch axis, ScoreFn(batched=True).")
    shape = tuple(int(size) for size in shape)
    (batch,) = jax_export.symbolic_shape("batch")
    weights, structure = jax.tree.flatten(sampler.score_fn)
    weights = [jnp.asarray(leaf) for leaf in weights]
    conditions = {
        name: (tuple(np.shape(value)[1:]), str(jnp.asarray(value).dtype))
        for name, value in (cond or {}).items()
    }
    empty = jax.random.key(0)
    width = jax.random.key_data(empty).shape

    def typed(data: Any) -> Any:
        return jax.random.wrap_key_data(data)

    def run(weights: list[Any], keys: Any, x_T: Any, cond: dict[str, Any]) -> Any:
        score_fn = jax.tree.unflatten(structure, weights)
        return Sampler(score_fn, sampler.tableau)(typed(keys), x_T, cond=cond or None)

    process = sampler.score_fn.process

    def prior(keys: Any) -> Any:
        return process.prior_sample(typed(keys), (keys.shape[0], *shape)).astype(dtype)

    keys = jax.ShapeDtypeStruct((batch, *width), jnp.uint32)
    arguments = (
        [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in weights],
        keys,
        jax.ShapeDtypeStruct((batch, *shape), dtype),
        {n: jax.ShapeDtypeStruct((batch, *tail), d) for n, (tail, d) in conditions.items()},
    )
    try:
        program = jax_export.export(jax.jit(run), platforms=tuple(platforms))(*arguments)
        start = jax_export.export(jax.jit(prior), platforms=tuple(platforms))(keys)
    except jax.errors.InconclusiveDimensionOperation as error:
        raise ValueError(f"the network's program depends on the batch size: {error}") from error
    meta = {
        "format": _FORMAT, "version": _VERSION, "shape": list(shape),
        "dtype": str(jnp.dtype(dtype)), "nfe": sampler.tableau.nfe, "cond": conditions,
        "platforms": list(platforms), "weights": [str(leaf.dtype) for leaf in weights],
        "name": sampler.tableau.name,
    }  # fmt: skip
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
    _flatbuffers()
    name = os.fspath(path)
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no file {name}.")
    try:
        with np.load(io.BytesIO(Path(path).read_bytes()), allow_pickle=False) as file:
            arrays = dict(file)
        meta = json.loads(arrays["meta"].tobytes())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{name} is not an exported sampler, or corrupt: {error}.") from error
    if meta.get("format") != _FORMAT or meta.get("version") != _VERSION:
        raise ValueError(
            f"{name} is {meta.get('format')!r} of version {meta.get('version')!r}; this diffsamp "
            f"reads {_FORMAT!r} of version {_VERSION}."
        )
    program = jax_export.deserialize(bytearray(arrays["program"].tobytes()))
    prior = jax_export.deserialize(bytearray(arrays["prior"].tobytes()))
    shapes = [aval.shape for aval in program.in_avals[: len(meta["weights"])]]
    weights = [
        jnp.asarray(np.frombuffer(arrays[f"weight_{i}"].tobytes(), jnp.dtype(d)).reshape(shape))
        for i, (d, shape) in enumerate(zip(meta["weights"], shapes, strict=True))
    ]
    cond = {name: (tuple(tail), d) for name, (tail, d) in meta["cond"].items()}
    return ExportedSampler(
        tuple(meta["shape"]), meta["dtype"], meta["nfe"], tuple(meta["platforms"]), cond, program,
        prior, weights,
    )  # fmt: skip


def _flatbuffers() -> None:
    try:
        import flatbuffers  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'export needs flatbuffers: pip install "diffsamp[export]"', name="flatbuffers"
        ) from error
