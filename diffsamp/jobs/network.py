"""A network as files: its compiled program and that of its gradient, and its weights beside them.

`export` writes a whole sampler; this writes the network, to be sampled, guided and searched where
neither its code nor its framework is. The programs are StableHLO made by `jax.export`, with the
weights as arguments; the weights are a safetensors file; what was said of the network is JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from diffsamp import processes
from diffsamp._core.checks import expect_int
from diffsamp._core.files import read_json, write_atomically
from diffsamp._core.numeric import working_dtype
from diffsamp._core.types import Array, Conditions, DType, PyTree, Value
from diffsamp.jobs._loaded import LoadedProgram, LoadedTime, is_real
from diffsamp.jobs._programs import (
    each_alone,
    expect_condition,
    expect_platforms,
    exported,
    flatbuffers,
)
from diffsamp.jobs._shards import checksum, named, safetensors
from diffsamp.predictions import Level
from diffsamp.processes import Process
from diffsamp.score import ScoreFn, expect_score_fn

__all__ = ["export_network", "load_network"]

_FORMAT, _VERSION = "diffsamp.network", 1
_ABOUT, _FORWARD, _BACKWARD, _TIME, _WEIGHTS = (
    "network.json",
    "network.stablehlo",
    "gradient.stablehlo",
    "time.stablehlo",
    "weights.safetensors",
)


def export_network(
    score_fn: ScoreFn,
    path: str | os.PathLike[str],
    *,
    shape: Sequence[int],
    cond: Conditions | None = None,
    dtype: DType = None,
    batch: int | None = None,
    with_gradient: bool = True,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> None:
    """Write a network as a folder of programs and weights that `load_network` reads.

    Examples:
      >>> import diffsamp as ds
      >>> ds.export_network(score_fn, "unet", shape=(3, 32, 32))  # doctest: +SKIP
      >>> again = ds.load_network("unet")  # where the network's code is not  # doctest: +SKIP

    Args:
      score_fn: the network itself, batched; guidance goes around what `load_network` returns.
      path: the folder, made if needed; each file is written atomically, `network.json` last.
      shape: of one state, without the batch axis; states are one array.
      cond: an example of the network's keyword arguments, arrays (or dicts of them) with a leading
        batch axis of any size; only their shapes and dtypes count.
      dtype: of what the network is given. None: its own `dtype`, else JAX's default.
      batch: samples of one call. None: any number; code that needs to know it (most that comes
        from PyTorch) is shown one sample, and vectorised. Loaded, a network takes batches of any
        size in any case: they are split into calls of `batch`.
      with_gradient: also write the program of its vector-Jacobian product, by weights, state, time
        and conditions: what `search.distill` and gradient guidance need.
      platforms: of "cpu", "cuda", "rocm" and "tpu".

    Raises:
      TypeError: not a ScoreFn, or a dtype that is not floating.
      ValueError: a network without a batch axis; whose program cannot be exported (it calls back
        to Python), or not for this batch; whose process has fields other than numbers.
      ModuleNotFoundError: flatbuffers (extra "export") or safetensors (extra "models") is missing.
      NotADirectoryError: `path` is a file.
      OSError: it cannot be written.
    """
    flatbuffers()
    writer = safetensors("export_network")
    if not isinstance(score_fn, ScoreFn):
        expect_score_fn(score_fn)
        raise TypeError(
            "`score_fn` must be a diffsamp.ScoreFn; got the transform "
            f"{type(score_fn).__name__}. Export the network inside, and put the transform around "
            "what `load_network` returns."
        )
    if not score_fn.batched:
        raise ValueError("`export_network` needs a network with a batch axis (batched=True).")
    targets = expect_platforms(platforms)
    shape = tuple(expect_int(size, "shape", at_least=1) for size in shape)
    dtype = jnp.zeros((), dtype or score_fn.dtype or float).dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`dtype` must be floating; got {dtype}.")
    forward = functools.partial(_forward, score_fn)
    ways: list[tuple[int | None, Callable[..., Array]]] = [(batch, forward)]
    if batch is None:
        ways += [(None, each_alone(forward)), (1, forward)]
    else:
        expect_int(batch, "batch", 1)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    about: dict[str, Value] = {"process": _process_said(score_fn.process)}

    leaves = {name: jnp.asarray(leaf) for name, leaf in named(_weights(score_fn)).items()}
    for size, way in ways:
        arguments = _arguments(score_fn, leaves, shape, cond, dtype, size)
        try:
            programs = {_FORWARD: exported(way, targets, *arguments)}
            if with_gradient:
                gradient = functools.partial(_backward, way)
                kind = programs[_FORWARD].out_avals[0].dtype
                output = jax.ShapeDtypeStruct(arguments[1].shape, kind)
                programs[_BACKWARD] = exported(gradient, targets, *arguments, output)
            batch = size
            break
        except Exception:  # code that asks for the batch size says so in many ways
            if size is not None:  # the last
                raise
    time = score_fn.time
    if callable(time):
        (rows,) = jax_export.symbolic_shape("rows")
        numbers = [jax.ShapeDtypeStruct((rows,), jnp.zeros(()).dtype)] * 3
        of_level = time
        programs[_TIME] = exported(lambda t, a, s: of_level(Level(t, a, s)), targets, *numbers)
    content = writer.save({name: np.asarray(leaf) for name, leaf in leaves.items()})
    about |= {
        "format": _FORMAT,
        "version": _VERSION,
        "shape": list(shape),
        "dtype": str(dtype),
        "batch": batch,
        "cond": _described(cond),
        "prediction": score_fn.prediction,
        "time": None if callable(time) else time,
        "scale_input": score_fn.scale_input,
        "sigma_data": score_fn.sigma_data,
        "with_gradient": with_gradient,
        "platforms": list(targets),
        "weights": {n: [list(leaf.shape), str(leaf.dtype)] for n, leaf in leaves.items()},
        "checksum": checksum(content),
    }
    write_atomically(folder / _WEIGHTS, content)
    for name, program in programs.items():
        write_atomically(folder / name, bytes(program.serialize()))
    write_atomically(folder / _ABOUT, json.dumps(about, indent=1).encode())


def _weights(score_fn: ScoreFn) -> PyTree:
    """The arrays of `params`, with None for what is static."""
    children, _ = score_fn.tree_flatten_with_keys()
    return children[0][1]


def _forward(
    score_fn: ScoreFn, weights: list[Array], x: Array, t: Array, cond: Conditions
) -> Array:
    """The network's own function of its weights in order."""
    old, structure = jax.tree.flatten(score_fn)
    leaves = [*weights, *old[len(weights) :]]
    whole: ScoreFn = jax.tree.unflatten(structure, leaves)
    output = whole.apply(whole.params, x, t, **cond)
    if jnp.shape(output) != jnp.shape(x):
        raise ValueError(
            f"the network's output must have the shape of x, {jnp.shape(x)}; got "
            f"{jnp.shape(output)}. Split a second head off in `apply`."
        )
    return output


def _backward(
    forward: Callable[..., Array],
    weights: list[Array],
    x: Array,
    t: Array,
    cond: Conditions,
    output: Array,
) -> list[Array]:
    """The gradients by all floating arguments, in the order of their leaves."""
    leaves, structure = jax.tree.flatten((weights, x, t, cond))
    real = [is_real(leaf) for leaf in leaves]

    def by_real(values: list[Array]) -> Array:
        given = iter(values)
        every = [next(given) if r else leaf for r, leaf in zip(real, leaves, strict=True)]
        return forward(*jax.tree.unflatten(structure, every))

    _, pull = jax.vjp(by_real, [leaf for r, leaf in zip(real, leaves, strict=True) if r])
    return pull(output)[0]


def _arguments(
    score_fn: ScoreFn,
    leaves: Mapping[str, Array],
    shape: tuple[int, ...],
    cond: Conditions | None,
    dtype: DType,
    size: int | None,
) -> tuple[PyTree, ...]:
    """(weights, x, t, cond) as descriptions, for a batch of this size, or of any."""
    label = working_dtype(dtype)
    (batch,) = jax_export.symbolic_shape("batch") if size is None else (size,)
    conditions = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(
            (batch, *expect_condition(jax.tree_util.keystr(path), leaf)[0]),
            jnp.asarray(leaf).dtype,
        ),
        dict(cond or {}),
    )
    return (
        [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves.values()],
        jax.ShapeDtypeStruct((batch, *shape), dtype),
        jax.ShapeDtypeStruct((batch,), label),
        conditions,
    )


def _described(cond: Conditions | None) -> dict[str, Value]:
    paths = jax.tree_util.tree_leaves_with_path(dict(cond or {}))
    return {
        jax.tree_util.keystr(path): list(expect_condition(jax.tree_util.keystr(path), leaf))
        for path, leaf in paths
    }


def _process_said(process: Process) -> list[Value]:
    """Its class and numbers, exactly.

    Raises:
      ValueError: fields that are no arrays of numbers.
    """
    try:
        fields = {
            field.name: np.asarray(getattr(process, field.name), np.float64).tolist()
            for field in dataclasses.fields(process)  # type: ignore[arg-type]
        }
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the process must be a dataclass of numbers to be written; {type(process).__name__} "
            "is not."
        ) from error
    return [type(process).__name__, fields]


def load_network(path: str | os.PathLike[str], *, process: Process | None = None) -> ScoreFn:
    """Read what `export_network` wrote; neither the network's code nor its framework is needed.

    The result is a `ScoreFn` like the one written: sampled, guided and searched. It has
    reverse-mode derivatives (if written with its gradient), no forward-mode ones.

    Args:
      path: the folder.
      process: a noise process of one's own, where the network's was not one of
        `diffsamp.processes`.

    Returns:
      A `ScoreFn`. Its params are {name: array}, the names those of the weights' file.

    Raises:
      FileNotFoundError: no such folder, or a file of it is missing.
      ValueError: another kind of file or version, a corrupt one, weights of another network, or a
        process that is not known here.
      ModuleNotFoundError: flatbuffers or safetensors is missing.
    """
    flatbuffers()
    safetensors("load_network")
    folder = Path(path)
    for name in (_ABOUT, _FORWARD, _WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} is no network of `export_network`: there is no file {name} in it."
            )
    about = read_json(folder / _ABOUT)
    said = about if isinstance(about, dict) else {}
    if said.get("format") != _FORMAT or said.get("version") != _VERSION:
        raise ValueError(
            f"{folder} is {said.get('format')!r} of version {said.get('version')!r}; this diffsamp "
            f"reads {_FORMAT!r} of version {_VERSION}."
        )
    content = (folder / _WEIGHTS).read_bytes()
    if checksum(content) != about["checksum"]:
        raise ValueError(
            f"{folder / _WEIGHTS} is corrupt, or holds the weights of another network."
        )
    if process is None:
        process = _process_read(*about["process"])
    program = LoadedProgram(
        _program(folder / _FORWARD),
        _program(folder / _BACKWARD) if about["with_gradient"] else None,
        tuple(about["weights"]),
        tuple(about["shape"]),
        about["batch"],
        {name: (tuple(tail), kind) for name, (tail, kind) in about["cond"].items()},
    )
    time = about["time"]
    if time is None:
        time = LoadedTime(_program(folder / _TIME))
    return ScoreFn(
        program,
        _read_weights(content, about["weights"]),
        process,
        prediction=about["prediction"],
        time=time,
        scale_input=about["scale_input"],
        sigma_data=about["sigma_data"],
        dtype=jnp.dtype(about["dtype"]),
    )


def _program(file: Path) -> Value:
    if not file.is_file():
        raise FileNotFoundError(f"the file {file} of an exported network is missing.")
    try:
        return jax_export.deserialize(bytearray(file.read_bytes()))
    except Exception as error:  # whatever JAX says of a program that is none
        raise ValueError(f"{file} is corrupt: {error!r}.") from error


def _read_weights(content: bytes, about: Mapping[str, Value]) -> dict[str, jax.Array]:
    """Arrays by name, in the order in which the program takes them."""
    import safetensors as library

    # not by its NumPy reader, which does not know bfloat16
    found = {name: bytes(entry["data"]) for name, entry in library.deserialize(content)}
    return {
        name: jnp.asarray(np.frombuffer(found[name], jnp.dtype(kind)).reshape(shape))
        for name, (shape, kind) in about.items()
    }


def _process_read(name: str, fields: Mapping[str, Value]) -> Process:
    kind = getattr(processes, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Process)):
        raise ValueError(
            f"the network's process is {name}, which diffsamp does not have: pass it as "
            "load_network(.., process=..)."
        )
    return kind(**{n: np.asarray(v) if isinstance(v, list) else v for n, v in fields.items()})
