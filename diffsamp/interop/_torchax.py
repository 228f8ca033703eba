"""torchax, imported with the operations that newer versions of torch no longer have.

torchax 0.0.13 lists, while it is imported, overloads of torch's operations for named tensors,
which torch 2.13 removed. Nobody can call what does not exist:
while torchax is imported, such a name is a placeholder. tests/networks/test_torch.py fails once
torchax imports by itself; then this file is one line.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import threading
from collections.abc import Callable, Iterator
from types import ModuleType

from diffsamp._core.types import Value

__all__ = ["torchax_of_torch"]

_FIX = 'pip install "diffsamp[torch]" (torch 2.13, torchax 0.0.13)'
_importing = threading.Lock()


class _Absent:
    """Stands for an operation that this torch does not have; a key of tables, never called."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.name}.{name}")


@contextlib.contextmanager
def _absent_operations() -> Iterator[None]:
    """`torch.ops.aten.<name>.<overload>` is a placeholder where torch has no such thing."""
    from torch import _ops

    def tolerant(original: Callable[..., Value]) -> Callable[..., Value]:
        def look_up(self: Value, name: str) -> Value:
            try:
                return original(self, name)
            except AttributeError:
                # other namespaces are probed with hasattr, and dunders by Python itself
                aten = isinstance(self, _ops.OpOverloadPacket) or vars(self).get("name") == "aten"
                if name.startswith("__") or not aten:
                    raise
                return _Absent(name)

        return look_up

    classes = (_ops.OpOverloadPacket, _ops._OpNamespace)
    originals = [cls.__getattr__ for cls in classes]
    for cls, original in zip(classes, originals, strict=True):
        cls.__getattr__ = tolerant(original)
    try:
        yield
    finally:
        for cls, original in zip(classes, originals, strict=True):
            cls.__getattr__ = original


@functools.cache
def torchax_of_torch() -> ModuleType:
    """The module torchax, ready to run.

    Raises:
      ModuleNotFoundError: torch or torchax is missing.
      ImportError: this pair of versions does not work; the message says which does.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"from_torch needs torch: {_FIX}", name="torch") from error
    try:
        with _importing, _absent_operations():
            import torchax

            torchax.default_env()  # loads its tables, which name operations too
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"from_torch needs {error.name}: {_FIX}", name=error.name
        ) from error
    except Exception as error:  # whatever its import says
        raise ImportError(
            f"torchax {_version('torchax')} does not work with torch {torch.__version__} "
            f"({error}). Install a pair that does: {_FIX}.",
            name="torchax",
        ) from error
    return torchax


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
