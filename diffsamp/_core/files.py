"""Reading and writing files."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from diffsamp._core.types import Value

__all__ = ["read_json", "remove_temporaries", "write_atomically"]


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file so that it is either the old one or the whole new one, never a part.

    Raises:
      OSError: the folder does not exist or cannot be written; nothing is left behind.
    """
    target = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:  # in the name of the file, not of the temporary one
        if error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, str(target)) from error


def remove_temporaries(folder: Path, names: Iterable[str]) -> None:
    """Remove what a kill in the middle of `write_atomically` left of some files of a folder."""
    wanted = set(names)
    for path in folder.glob(".*.*"):
        if path.name[1:].rpartition(".")[0] in wanted:
            path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(path: str | os.PathLike[str]) -> Value:
    """What a JSON file holds.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is not JSON; the message names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{os.fspath(path)} is corrupt: not JSON ({error}).") from error
