"""What exporting a sampler and exporting a network have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from diffsamp._core.types import PyTree, Value

__all__ = [
    "PLATFORMS",
    "each_alone",
    "expect_condition",
    "expect_file",
    "expect_platforms",
    "exported",
    "flatbuffers",
]

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def expect_platforms(platforms: Value) -> tuple[str, ...]:
    """`platforms` as a tuple.

    Raises:
      ValueError: none, or unknown ones.
    """
    if isinstance(platforms, str) or not platforms or not set(platforms) <= set(PLATFORMS):
        raise ValueError(
            f'`platforms` must be some of {PLATFORMS}, such as ("cpu",); got {platforms!r}.'
        )
    return tuple(platforms)


def expect_file(path: Path) -> None:
    """Raise unless a file can be written there.

    Raises:
      IsADirectoryError, FileNotFoundError, NotADirectoryError: what is there, or is not.
    """
    if path.is_dir():
        raise IsADirectoryError(21, "`path` is a folder; give a file's path", str(path))
    if not path.parent.is_dir():
        kind = NotADirectoryError if path.parent.exists() else FileNotFoundError
        raise kind(2, "the folder of `path` does not exist", str(path.parent))


def expect_condition(name: str, value: Value) -> tuple[tuple[int, ...], str]:
    """(shape without the batch axis, dtype) of an example of a condition.

    Raises:
      ValueError: not an array with a batch axis.
    """
    if not hasattr(value, "dtype") or np.ndim(value) < 1:
        raise ValueError(
            f"cond[{name!r}] must be an array with a leading batch axis; got "
            f"{type(value).__name__}."
        )
    return tuple(np.shape(value)[1:]), str(jnp.asarray(value).dtype)


def exported(
    function: Callable[..., PyTree], platforms: tuple[str, ...], *arguments: PyTree
) -> Value:
    """`jax.export` of a function for arguments of these shapes and dtypes.

    Raises:
      ValueError: its program depends on the batch size, or cannot be exported.
    """
    with _in_words():
        return jax_export.export(jax.jit(function), platforms=platforms)(*arguments)


def each_alone(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """`function(weights, *inputs)`, which sees one sample at a time, as a batch of 1.

    For code that wants to know the batch size, as most that comes from PyTorch does, in a program
    that leaves it open: the batch is an axis of `vmap`, and is computed at once all the same.
    """

    def run(weights: PyTree, *inputs: PyTree) -> PyTree:
        def one(*inputs: PyTree) -> PyTree:
            batch = jax.tree.map(lambda a: a[None], inputs)
            return jax.tree.map(lambda a: a[0], function(weights, *batch))

        return jax.vmap(one)(*inputs)

    return run


@contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except (jax.errors.InconclusiveDimensionOperation, TypeError) as error:
        if isinstance(error, TypeError) and "_DimExpr" not in str(error):
            raise
        raise ValueError(f"the network's program depends on the batch size: {error}") from error
    except NotImplementedError as error:
        raise ValueError(f"the network's program cannot be exported: {error}") from error


def flatbuffers() -> None:
    """Raise unless JAX can write programs.

    Raises:
      ModuleNotFoundError: flatbuffers is missing.
    """
    try:
        import flatbuffers  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'export needs flatbuffers: pip install "diffsamp[export]"', name="flatbuffers"
        ) from error
