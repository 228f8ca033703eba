"""Large sets of samples: batches written as files, resumed after any stop, spread over processes.

Sample i is drawn from `fold_in(key, i)` alone, so the set does not depend on batch, devices or
processes, nor on how often the job was stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._checks import expect_choice, expect_int
from diffsamp._files import read_json, write_atomically
from diffsamp.sampling import expect_key, sample
from diffsamp.score import ScoreFn
from diffsamp.tableau import Tableau

__all__ = ["Generated", "generate"]

_FORMAT, _VERSION = "diffsamp.generated", 1
Condition = Callable[[np.ndarray], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Generated:
    """A folder that `generate` wrote.

    Attributes:
      folder: it.
      n: samples asked for.
      shards: (file name, first sample, number of samples) of every finished file, in order.
    """

    folder: Path
    n: int
    shards: tuple[tuple[str, int, int], ...]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Generated:
        """What is in a folder.

        Raises:
          FileNotFoundError: it holds no manifest.
          ValueError: a manifest is corrupt, or of another version.
        """
        folder = Path(folder)
        paths = sorted(folder.glob("manifest-*.json"))
        if not paths:
            raise FileNotFoundError(f"{folder} holds no manifest of `generate`.")
        manifests = [_read(path) for path in paths]
        shards = sorted({tuple(s) for m in manifests for s in m["shards"]}, key=lambda s: s[1])
        return cls(folder, manifests[0]["settings"]["n"], tuple(shards))

    @property
    def complete(self) -> bool:
        """Whether all n samples are there."""
        return sum(count for _, _, count in self.shards) == self.n

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """The arrays of each file, by name; a state that is one array is called "x"."""
        for name, _, _ in self.shards:
            yield _load(self.folder / name)

    def load(self) -> dict[str, np.ndarray]:
        """All samples in memory, in order.

        Raises:
          ValueError: some are missing still.
        """
        if not self.complete:
            have = sum(count for _, _, count in self.shards)
            raise ValueError(
                f"{self.folder} holds {have} of {self.n} samples; run `generate` again."
            )
        parts = list(self)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def generate(
    score_fn: ScoreFn,
    tableau: Tableau,
    n: int,
    out: str | os.PathLike[str],
    *,
    key: Any,
    shape: tuple[int, ...],
    cond: Condition | None = None,
    finish: Callable[[Any], Any] | None = None,
    batch: int = 256,
    format: str = "npz",
    sharding: Any = None,
    processes: tuple[int, int] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Generated:
    """Draw n samples and write them, a numbered file a batch.

    While a batch is sampled, a thread moves the last one to the host and writes it. A file appears
    whole or not at all, and the manifest names it only then: stopped at any moment and called again
    with the same arguments, it draws what is missing.

    Args:
      score_fn: the network, batched.
      tableau: the sampler.
      n: how many samples.
      out: folder, made if needed.
      key: a random key; sample i uses `fold_in(key, i)` for its start and its noise.
      shape: of one sample, without the batch axis.
      cond: function from sample numbers, an integer array, to keyword arguments for the network,
        every array with as many entries; None: no condition.
      finish: applied to each batch of samples on the device before it is written: a decoder, a
        rounding to uint8.
      batch: samples at a time, and in a file.
      format: "npz", or "safetensors" (which needs that package).
      sharding: a `jax.sharding.Sharding` over the batch axis; `batch` must divide among its
        devices.
      processes: (index, count): this process writes every count-th file; None: JAX's own, so that
        after `jax.distributed.initialize` each process takes its share. Each works on devices of
        its own; they meet in the folder.
      progress: called with ("generating", samples done, samples of this process).

    Returns:
      The `Generated` folder, as it is when this process is done.

    Raises:
      ValueError: arguments that do not fit, or a folder of another job.
      OSError: a file cannot be written, for want of space or of permission. What was finished
        before stays, and nothing is left half written.
    """
    expect_int(n, "n", at_least=1)
    expect_int(batch, "batch", at_least=1)
    expect_choice(format, "format", ("npz", "safetensors"))
    if key is None:
        expect_key(tableau, key)
        raise ValueError("`generate` draws the starts: pass `key`, such as jax.random.key(0).")
    if score_fn.batched is False:
        raise ValueError("`generate` needs a network with a batch axis, ScoreFn(batched=True).")
    index, count = processes or (jax.process_index(), jax.process_count())
    if not 0 <= index < count:
        raise ValueError(f"`processes` must be (index, count) with index < count; got {processes}.")
    typed = jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
    settings = {
        "n": n, "batch": batch, "shape": list(shape), "format": format,
        "key": np.asarray(jax.random.key_data(key) if typed else key).ravel().tolist(),
        "tableau": _digest(tableau), "processes": count,
    }  # fmt: skip
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / f"manifest-{index}.json"
    done: list[tuple[str, int, int]] = []
    if manifest.exists():
        found = _read(manifest)
        if found["settings"] != settings:
            changed = sorted(k for k in settings if found["settings"].get(k) != settings[k])
            raise ValueError(
                f"{folder} holds another job: {', '.join(changed)} differ. Give another folder, or "
                "delete it."
            )
        done = [tuple(s) for s in found["shards"] if (folder / s[0]).exists()]
    write_atomically(manifest, _manifest(settings, done))
    have = {first for _, first, _ in done}
    mine = list(range(index * batch, n, count * batch))
    total = sum(min(batch, n - first) for first in mine)
    written = sum(size for _, _, size in done)

    def keep(name: str, first: int, size: int, arrays: Mapping[str, Any]) -> None:
        nonlocal written
        host = {key: np.asarray(value)[:size] for key, value in arrays.items()}
        write_atomically(folder / name, _bytes(host, format))
        done.append((name, first, size))
        write_atomically(manifest, _manifest(settings, done))
        written += size
        if progress is not None:
            progress("generating", written, total)

    with _Writer(keep) as writer:
        for first in mine:
            if first in have:
                continue
            size = min(batch, n - first)
            # the last batch is filled up, so that one program serves all
            numbers = np.arange(first, first + batch)
            x = _draw(
                score_fn, tableau, key, jnp.asarray(numbers),
                None if cond is None else cond(np.minimum(numbers, n - 1)), tuple(shape), finish,
                sharding,
            )  # fmt: skip
            name = f"samples-{first // batch:06d}.{format}"
            writer.put(name, first, size, _named(x))
    return Generated.open(folder)


def _draw(score_fn, tableau, key, numbers, cond, shape, finish, sharding):
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers)
    pair = jax.vmap(jax.random.split)(keys)
    if sharding is not None:
        pair, cond = jax.device_put((pair, cond), sharding)
    x_T = score_fn.process.prior_sample(pair[:, 0], (len(numbers), *shape))
    x = sample(score_fn, tableau, x_T, key=pair[:, 1], cond=cond)
    return x if finish is None else jax.jit(finish)(x)


class _Writer:
    """A thread that writes what is put, two batches behind at most; its errors reach the caller."""

    def __init__(self, keep: Callable[..., None]) -> None:
        self.keep = keep
        self.error: BaseException | None = None
        self.queue: queue.Queue[Any] = queue.Queue(maxsize=2)
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while (item := self.queue.get()) is not None:
            if self.error is None:
                try:
                    self.keep(*item)
                except BaseException as error:
                    self.error = error

    def put(self, *item: Any) -> None:
        self._raise()
        self.queue.put(item)

    def _raise(self) -> None:
        if isinstance(self.error, OSError):
            raise OSError(
                self.error.errno,
                f"cannot write ({self.error.strerror}); what was finished before is kept. Make "
                "room, or allow it, and run the same call again",
                self.error.filename,
            ) from self.error
        if self.error is not None:
            raise self.error

    def __enter__(self) -> _Writer:
        self.thread.start()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.queue.put(None)
        self.thread.join()
        if kind is None:
            self._raise()


def _named(x: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(x)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/") or "x": v for path, v in leaves}


def _digest(tableau: Tableau) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tableau):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _bytes(arrays: dict[str, np.ndarray], format: str) -> bytes:
    if format == "npz":
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        return buffer.getvalue()
    return _safetensors().save({k: np.ascontiguousarray(v) for k, v in arrays.items()})


def _load(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    return _safetensors().load(path.read_bytes())


def _safetensors() -> Any:
    try:
        from safetensors import numpy as safetensors_numpy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'format="safetensors" needs that package: pip install "diffsamp[models]"',
            name="safetensors",
        ) from error
    return safetensors_numpy


def _manifest(settings: Mapping[str, Any], shards: list[tuple[str, int, int]]) -> bytes:
    head = {"format": _FORMAT, "version": _VERSION, "settings": settings}
    lines = ",\n  ".join(json.dumps(shard) for shard in shards)
    return (json.dumps(head)[:-1] + f',\n "shards": [\n  {lines}\n ]}}\n').encode()


def _read(path: Path) -> dict[str, Any]:
    data = read_json(path)
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise ValueError(f"{path} is no manifest of `generate`.")
    if data.get("version") != _VERSION:
        raise ValueError(
            f"{path} has version {data.get('version')!r}; this diffsamp reads version {_VERSION}."
        )
    return data
