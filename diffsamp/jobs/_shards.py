"""The files of `generate`: numbered shards of samples, and the manifests that name them."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from diffsamp._core.files import read_json
from diffsamp._core.types import PyTree, Value

__all__ = [
    "Generated",
    "Shard",
    "checksum",
    "differing",
    "file_name",
    "manifest_bytes",
    "named",
    "safetensors",
    "scan",
    "shard_bytes",
]

_FORMAT, _VERSION = "diffsamp.generated", 3
_READABLE = (2, 3)  # version 2 had no checksums
_FILE = re.compile(r"samples-\d{6,}\.(npz|safetensors)")


class Shard(NamedTuple):
    """A finished file.

    Attributes:
      file: its name.
      first: number of its first sample.
      length: samples in it.
      size: of the file, in bytes.
      not_finite: samples in it with NaN or inf, before `finish`.
      checksum: of its bytes; "" in a folder of before there were any.
    """

    file: str
    first: int
    length: int
    size: int
    not_finite: int
    checksum: str = ""


@dataclasses.dataclass(frozen=True)
class Generated:
    """A folder that `generate` wrote.

    Attributes:
      folder: its path.
      n: samples asked for.
      shards: every finished `Shard`, in order; files that are gone or cut short are left out.
    """

    folder: Path
    n: int
    shards: tuple[Shard, ...]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Generated:
        """What is in a folder.

        Raises:
          FileNotFoundError: it holds no manifest.
          ValueError: a manifest is corrupt, of another version, or of another job than the others.
        """
        folder = Path(folder)
        settings, shards = scan(folder)
        if settings is None:
            raise FileNotFoundError(f"{folder} holds no manifest of `generate`.")
        return cls(folder, settings["n"], shards)

    @property
    def complete(self) -> bool:
        """Whether all n samples are there."""
        return self._have() == self.n

    @property
    def not_finite(self) -> int:
        """Samples with NaN or inf, before `finish`."""
        return sum(shard.not_finite for shard in self.shards)

    def _have(self) -> int:
        return sum(shard.length for shard in self.shards)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """The arrays of each file, by name; a state that is one array is called "x".

        Raises:
          FileNotFoundError: a file was removed since the folder was opened.
          ValueError: a file is corrupt; the message names it.
        """
        for shard in self.shards:
            yield _load(self.folder / shard.file)

    def verify(self, *, remove: bool = False) -> tuple[Shard, ...]:
        """Read every finished file and compare it with what was written.

        Args:
          remove: delete the files that fail, so that the next `generate` with the job's arguments
            draws them again.

        Returns:
          The shards that fail: gone, cut short, with other bytes (a flipped one is enough), or, in
          a folder without checksums, unreadable. Empty if all is well.
        """
        failed = tuple(shard for shard in self.shards if not _is_whole(self.folder, shard))
        if remove:
            for shard in failed:
                (self.folder / shard.file).unlink(missing_ok=True)
        return failed

    def load(self) -> dict[str, np.ndarray]:
        """All samples in memory, in order.

        Raises:
          FileNotFoundError: as for the iteration.
          ValueError: some are missing still, or a file is corrupt.
        """
        if not self.complete:
            raise ValueError(
                f"{self.folder} holds {self._have()} of {self.n} samples; run `generate` again."
            )
        parts = list(self)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def checksum(content: bytes) -> str:
    """Of a file's bytes."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _is_whole(folder: Path, shard: Shard) -> bool:
    try:
        content = (folder / shard.file).read_bytes()
        if shard.checksum:
            return checksum(content) == shard.checksum
        arrays = _load(folder / shard.file)
    except (OSError, ValueError):
        return False
    return all(len(array) == shard.length for array in arrays.values())


def file_name(first: int, batch: int, format: str) -> str:
    """Of the shard that starts with sample `first`."""
    return f"samples-{first // batch:06d}.{format}"


def named(x: PyTree) -> dict[str, PyTree]:
    """The arrays of a pytree by their path; one that is alone is "x"."""
    leaves = jax.tree_util.tree_flatten_with_path(x)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/") or "x": v for path, v in leaves}


def shard_bytes(arrays: dict[str, np.ndarray], format: str) -> bytes:
    """What a shard's file holds."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    if format == "safetensors":
        return safetensors().save(arrays)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:  # np.savez does not take every name
        for name, array in arrays.items():
            with file.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)
    return buffer.getvalue()


def _load(path: Path) -> dict[str, np.ndarray]:
    content = path.read_bytes()
    try:
        if path.suffix == ".npz":
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                return dict(file)
        return safetensors().load(content)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # whatever the reader says of a broken file
        raise ValueError(
            f"{path} is corrupt ({error}). Delete it and run `generate` again."
        ) from error


def safetensors(what: str = 'format="safetensors"') -> PyTree:
    """That package's functions for NumPy.

    Raises:
      ModuleNotFoundError: it is not installed.
    """
    try:
        from safetensors import numpy as safetensors_numpy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{what} needs that package: pip install "diffsamp[models]"',
            name="safetensors",
        ) from error
    return safetensors_numpy


def manifest_bytes(settings: Mapping[str, Value], shards: list[Shard]) -> bytes:
    """What a manifest's file holds: JSON, a line per shard."""
    head = {"format": _FORMAT, "version": _VERSION, "settings": settings}
    lines = ",\n  ".join(json.dumps(shard) for shard in shards)
    return (json.dumps(head)[:-1] + f',\n "shards": [\n  {lines}\n ]}}\n').encode()


def differing(one: Mapping[str, PyTree], other: Mapping[str, PyTree]) -> list[str]:
    """The settings in which two jobs differ; n may, and what one does not know (None)."""
    return sorted(
        name
        for name in one.keys() | other.keys()
        if name != "n"
        and one.get(name) != other.get(name)
        and not (name == "labels" and None in (one.get(name), other.get(name)))
    )


def scan(folder: Path) -> tuple[dict[str, PyTree] | None, tuple[Shard, ...]]:
    """The settings of the job that a folder holds, and the files that are there and whole.

    Raises:
      ValueError: a manifest is corrupt, of another version, or of another job than the others.
    """
    settings: dict[str, Value] | None = None
    shards: dict[int, Shard] = {}
    for path in sorted(folder.glob("manifest-*.json")):
        own, listed = _read(path)
        if settings is not None:
            differ = differing(own, settings)
            if differ:
                raise ValueError(
                    f"the manifests of {folder} are of different jobs: {', '.join(differ)} differ "
                    f"in {path.name}. Each process must be called with the same arguments."
                )
            own["n"] = max(own["n"], settings["n"])
            own["labels"] = own["labels"] or settings["labels"]
        settings = own
        for shard in listed:
            file = folder / shard.file
            if file.exists() and file.stat().st_size == shard.size:
                shards[shard.first] = shard
    return settings, tuple(sorted(shards.values(), key=lambda shard: shard.first))


def _read(path: Path) -> tuple[dict[str, PyTree], list[Shard]]:
    data = read_json(path)
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise ValueError(f"{path} is no manifest of `generate`.")
    if data.get("version") not in _READABLE:
        raise ValueError(
            f"{path} has version {data.get('version')!r}; this diffsamp reads versions {_READABLE}."
        )
    try:
        settings, shards = data["settings"], [Shard(*row) for row in data["shards"]]
        whole = all(
            _FILE.fullmatch(shard.file)
            and all(type(v) is int for v in shard[1:5])
            and type(shard.checksum) is str
            for shard in shards
        )
        if not whole or type(settings["n"]) is not int or "labels" not in settings:
            raise ValueError("a file's name or numbers are not what `generate` writes")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is corrupt ({error}). Delete it; the files it names are drawn again."
        ) from error
    return settings, shards
