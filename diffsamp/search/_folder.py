"""How a search of several stages runs, and its finished stages as files, so that it goes on."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from diffsamp._core.files import read_json, write_atomically
from diffsamp._core.types import PyTree, Sharding, Value
from diffsamp.search.plan import decoded, encoded
from diffsamp.search.running import Progress

__all__ = ["Folder", "Running"]


@dataclasses.dataclass(frozen=True)
class Running:
    """How all searches run.

    Attributes:
      batch: samples of one candidate at a time.
      together: candidates at a time.
      sharding: over the batch axis.
      data_range: largest minus smallest value of the data.
      progress: called with (what, done, total).
    """

    batch: int
    together: int
    sharding: Sharding
    data_range: float
    progress: Progress | None

    @property
    def options(self) -> dict[str, Value]:
        """What every search takes by these names."""
        return {"batch": self.batch, "sharding": self.sharding, "progress": self.progress}


class Folder:
    """Finished stages as files; without a path, nothing is kept."""

    def __init__(self, path: Value, settings: Mapping[str, Value]) -> None:
        self.folder = None if path is None else Path(path)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "settings.json"
        text = json.dumps(settings, indent=1)
        if not file.exists():
            write_atomically(file, text.encode())
        elif file.read_text(encoding="utf-8") != text:
            found = read_json(file)
            changed = sorted(k for k, v in json.loads(text).items() if found.get(k) != v)
            raise ValueError(
                f"{self.folder} holds another search: {', '.join(changed)} differ. Give another "
                "folder, or delete it."
            )

    def path(self, name: str) -> Path | None:
        """The file of a stage."""
        return None if self.folder is None else self.folder / f"{name}.json"

    def array(self, name: str, run: Callable[[], PyTree]) -> PyTree:
        """What `run` returns, an array, kept as .npy."""
        path = None if self.folder is None else self.folder / f"{name}.npy"
        if path is not None and path.exists():
            try:
                return jnp.asarray(np.load(io.BytesIO(path.read_bytes()), allow_pickle=False))
            except (ValueError, EOFError) as error:
                raise ValueError(
                    f"{path} is corrupt: {error}. Delete it to make it again."
                ) from error
        array = run()
        if path is not None and np.asarray(array).dtype.kind == "f":  # not bfloat16, as NumPy sees
            buffer = io.BytesIO()
            np.save(buffer, np.asarray(array))
            write_atomically(path, buffer.getvalue())
        return array

    def stage(self, name: str, run: Callable[[], PyTree]) -> PyTree:
        """What `run` returns, from the file if the stage was finished before.

        It goes through JSON either way, so that a resumed run sees what the first one saw.
        """
        path = self.path(name)
        if path is not None and path.exists():
            return decoded(read_json(path))
        text = json.dumps(encoded(run()), allow_nan=False)
        if path is not None:
            write_atomically(path, text.encode())
        return decoded(json.loads(text))
