"""Large sets of samples: batches written as files, resumed after any stop, spread over processes.

Sample i is drawn from `fold_in(key, i)` alone, so the set does not depend on batch, devices or
processes, nor on how often the job was stopped.
"""

from __future__ import annotations

import collections
import functools
import os
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core import random
from diffsamp._core.checks import expect_choice, expect_cond, expect_int
from diffsamp._core.digest import digest, fingerprint, seed_of
from diffsamp._core.files import remove_temporaries, write_atomically
from diffsamp._core.progress import ProgressBar
from diffsamp._core.sharding import expect_sharding, on_mesh, put
from diffsamp._core.types import Array, Conditions, Key, PyTree, Sharding, Value
from diffsamp.jobs._shards import (
    Generated,
    Shard,
    checksum,
    differing,
    file_name,
    manifest_bytes,
    named,
    safetensors,
    scan,
    shard_bytes,
)
from diffsamp.sampling import expect_tableau, sample
from diffsamp.score import ScoreFn, expect_score_fn, for_samples
from diffsamp.tableau import Tableau

__all__ = ["generate"]

Condition = Callable[[np.ndarray], Mapping[str, PyTree]]


def generate(
    score_fn: ScoreFn,
    tableau: Tableau,
    n: int,
    out: str | os.PathLike[str],
    *,
    key: Key,
    shape: tuple[int, ...],
    cond: Condition | None = None,
    finish: Callable[[PyTree], PyTree] | None = None,
    batch: int = 256,
    format: str = "npz",
    sharding: Sharding = None,
    processes: tuple[int, int] | None = None,
    verify: bool = False,
    progress: Callable[[str, int, int], None] | bool = True,
) -> Generated:
    """Draw n samples and write them, a numbered file a batch.

    While a batch is sampled, a thread moves the last one to the host and writes it. A file appears
    whole or not at all, and the manifest names it only then: stopped at any moment and called again
    with the same arguments, it draws what is missing, which is at most the batch that was being
    sampled and the one being written. With a larger n it goes on where it had ended.

    A folder belongs to one job: the network's weights, process and settings, the tableau, key,
    shape, batch and format are compared, and of `cond` and `finish` the names, shapes and dtypes
    (and the whole numbers, such as labels) of the first batch. What functions compute is not: give
    another folder when the code of `apply`, `cond` or `finish` changes.

    Args:
      score_fn: the network, batched.
      tableau: the sampler. Starts are drawn for its first time (`process.start_sample`).
      n: how many samples.
      out: folder, made if needed.
      key: a random key; sample i uses `fold_in(key, i)` for its start and its noise.
      shape: of one sample, without the batch axis. States are one array of JAX's default floating
        dtype.
      cond: function from sample numbers, an integer array, to keyword arguments for the network,
        every array with as many entries; None: no condition.
      finish: applied to each batch of samples on the device before it is written: a decoder, a
        rounding to uint8. It keeps the batch axis; an array or a pytree of them. Give a decoder's
        weights as `jax.tree_util.Partial(decode, weights)`, so that they are no constants of the
        program.
      batch: samples at a time, and in a file.
      format: "npz", or "safetensors" (which needs that package).
      sharding: a `jax.sharding.NamedSharding` over the batch axis, of devices of this process;
        `batch` must divide among them. Weights on other devices are copied to all of these, once.
      processes: (index, count): this process draws every count-th file; None: JAX's own, so that
        after `jax.distributed.initialize` each process takes its share. Each works on devices of
        its own; they meet in the folder. A job may go on with another count.
      verify: read the files that are there already, and draw those again that are not as they were
        written (`Generated.verify`); False: look at their sizes only.
      progress: True: a `diffsamp.ProgressBar`, where tqdm is installed; False: nothing; else
        called with ("generating", samples done, samples of this process), first with what was
        there.

    Returns:
      The `Generated` folder, as it is when this process is done.

    Raises:
      TypeError: arguments of another kind.
      ValueError: arguments that do not fit, a `finish` that drops the batch axis or gives a dtype
        that files do not hold, or a folder of another job; before anything is drawn.
      ModuleNotFoundError: safetensors is missing.
      OSError: a file cannot be written, for want of space or of permission. What was finished
        before stays, and nothing is left half written.

    Warns:
      RuntimeWarning: samples of a batch are NaN or inf; they are written and counted.
    """
    expect_score_fn(score_fn)
    expect_tableau(tableau)
    if np.ndim(tableau.times) != 1:
        raise ValueError("`generate` takes one tableau for all samples, not a stack of them.")
    n, batch = expect_int(n, "n", at_least=1), expect_int(batch, "batch", at_least=1)
    shape = _expect_shape(shape)
    expect_choice(format, "format", ("npz", "safetensors"))
    if format == "safetensors":
        safetensors()
    if score_fn.batched is False:
        raise ValueError("`generate` needs a network with a batch axis, ScoreFn(batched=True).")
    key = _expect_one_key(key)
    index, count = _expect_processes(processes)
    expect_sharding(sharding, batch)
    if sharding is not None and not sharding.is_fully_addressable:
        raise ValueError(
            "`sharding` has devices of other processes. In `generate` each process works on its "
            "own: make the mesh of jax.local_devices()."
        )
    score_fn = on_mesh(score_fn, sharding)

    def conditions(first: int) -> Mapping[str, PyTree] | None:
        # the last batch is filled up, so that one program serves all
        numbers = np.minimum(np.arange(first, first + batch), n - 1)
        return None if cond is None else expect_cond(cond(numbers), batch)

    settings = {
        "n": n,
        "batch": batch,
        "shape": list(shape),
        "format": format,
        "key": seed_of(key),
        "random": str(jax.random.key_impl(key)),
        "network": fingerprint(score_fn),
        "tableau": digest(tableau),
        **_outline(conditions(0), n >= batch),
        "arrays": _expect_arrays(finish, (batch, *shape), format),
    }
    folder = _expect_folder(out)
    found, done = scan(folder)
    if found is not None:
        _expect_same(folder, found, settings)
    if verify:
        failed = Generated(folder, n, done).verify()
        done = tuple(shard for shard in done if shard not in failed)
    mine = range(index * batch, n, count * batch)
    kept = [s for s in done if s.length == min(batch, n - s.first)]  # of other processes, too
    have = {s.first for s in kept}
    remove_temporaries(
        folder, [f"manifest-{index}.json", *(file_name(i, batch, format) for i in mine)]
    )

    def keep(first: int, arrays: Mapping[str, Array], finite: PyTree) -> None:
        size = min(batch, n - first)
        name = file_name(first, batch, format)
        content = shard_bytes({key: np.asarray(v)[:size] for key, v in arrays.items()}, format)
        bad = size - int(np.count_nonzero(np.asarray(finite)[:size]))
        try:
            write_atomically(folder / name, content)
            kept.append(Shard(name, first, size, len(content), bad, checksum(content)))
            write_atomically(folder / f"manifest-{index}.json", manifest_bytes(settings, kept))
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write ({error.strerror}); what was finished before is kept. Make room, or "
                "allow it, and run the same call again",
                error.filename,
            ) from error

    tell = _teller(progress, kept, mine, sum(min(batch, n - first) for first in mine))
    end = None if finish is None else on_mesh(jax.tree_util.Partial(finish), sharding)
    with ThreadPoolExecutor(max_workers=1) as writer:
        waiting: collections.deque[Future[None]] = collections.deque()

        def wait(most: int) -> None:
            while len(waiting) > most:
                waiting.popleft().result()
                tell()

        tell()
        begin = float(tableau.times[0])
        for first in mine:
            if first in have:
                continue
            wait(1)  # one is being written while the next is sampled, and no more
            numbers = np.arange(first, first + batch)
            x_T, keys = _starts(key, jnp.asarray(numbers), score_fn.process, shape=shape, t=begin)
            x_T, keys, given = put((x_T, keys, conditions(first)), sharding)
            x = sample(for_samples(score_fn, numbers), tableau, x_T, key=keys, cond=given)
            finite = _finite(x)
            x = x if end is None else _finished(end, x)
            waiting.append(writer.submit(keep, first, named(x), finite))
        wait(0)
    return Generated(folder, n, scan(folder)[1])


@functools.partial(jax.jit, static_argnames=("shape", "t"))
def _starts(key, numbers, process, *, shape, t):
    """The starts of some samples, and the keys of their noise."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers)
    pair = jax.vmap(jax.random.split)(keys)
    return process.start_sample(pair[:, 0], (numbers.shape[0], *shape), t), pair[:, 1]


@jax.jit
def _finite(x: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)))


@jax.jit
def _finished(finish: Callable[..., PyTree], x: jax.Array) -> PyTree:
    return finish(x)


def _teller(progress: Value, kept: list[Shard], mine: range, total: int) -> Callable[[], None]:
    """A function that reports how much is done, and warns of samples that are not finite."""
    if progress is True:
        try:
            progress = ProgressBar()
        except ModuleNotFoundError:
            progress = None
    warned = sum(shard.not_finite for shard in kept if shard.first in mine)

    def tell() -> None:
        nonlocal warned
        done = [shard for shard in kept if shard.first in mine]
        bad, count = sum(s.not_finite for s in done), sum(s.length for s in done)
        if bad > warned:
            warned = bad
            warnings.warn(
                f"{bad} of {count} samples hold NaN or inf; they are written as they are.",
                RuntimeWarning,
                stacklevel=4,
            )
        if callable(progress):
            progress("generating", count, total)

    return tell


# -- arguments ------------------------------------------------------------------------------------


def _expect_shape(shape: Value) -> tuple[int, ...]:
    if not isinstance(shape, tuple | list):
        raise TypeError(f"`shape` must be a tuple, that of one sample; got {shape!r}.")
    return tuple(expect_int(size, "shape", at_least=1) for size in shape)


def _expect_one_key(key: Key) -> jax.Array:
    if key is None:
        raise ValueError("`generate` draws the starts: pass `key`, such as jax.random.key(0).")
    key = random.typed(key)
    if key.ndim:
        raise ValueError(
            f"`key` must be one key, from which every sample's is made; got {key.shape} keys."
        )
    return key


def _expect_processes(processes: PyTree) -> tuple[int, int]:
    if processes is None:
        return jax.process_index(), jax.process_count()
    if not (isinstance(processes, tuple) and len(processes) == 2):
        raise TypeError(f"`processes` must be (index, count); got {processes!r}.")
    index, count = (expect_int(v, "processes", at_least=0) for v in processes)
    if not index < count:
        raise ValueError(f"`processes` must be (index, count) with index < count; got {processes}.")
    return index, count


def _expect_folder(out: str | os.PathLike[str]) -> Path:
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied", str(folder))
    except OSError as error:
        raise type(error)(
            error.errno, f"`out` cannot be written as a folder ({error.strerror})", str(folder)
        ) from error
    return folder


def _expect_same(folder: Path, found: Mapping[str, PyTree], settings: Mapping[str, Value]) -> None:
    changed = differing(found, settings)
    if changed:
        raise ValueError(
            f"{folder} holds another job: {', '.join(changed)} differ. Give another folder, or "
            "delete it."
        )
    if settings["n"] < found["n"]:
        raise ValueError(
            f"{folder} holds a job of n = {found['n']} samples; got n = {settings['n']}. Ask for "
            "as many or more, or give another folder."
        )


def _expect_arrays(
    finish: Callable[..., PyTree] | None, shape: tuple[int, ...], format: str
) -> dict[str, PyTree]:
    """{name: shape of one entry and dtype} of what is written."""
    x: PyTree = jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(float))
    if finish is not None:
        x = jax.eval_shape(finish, x)
    leaves = named(x)
    if len(leaves) != len(jax.tree.leaves(x)) or not leaves:
        raise ValueError(
            f"`finish` must give arrays with names of their own; got {sorted(leaves)}."
        )
    for name, leaf in leaves.items():
        if leaf.shape[:1] != shape[:1]:
            raise ValueError(
                f"`finish` must keep the batch axis in front, {shape[0]} samples; {name!r} has "
                f"shape {leaf.shape}."
            )
        if np.dtype(leaf.dtype).isbuiltin != 1 or (format, leaf.dtype.kind) == ("safetensors", "c"):
            raise ValueError(
                f'`finish` gives {name!r} as {leaf.dtype}, which format="{format}" does not hold; '
                "convert it, to float32 or uint8 for instance."
            )
    return {name: [list(leaf.shape[1:]), str(leaf.dtype)] for name, leaf in leaves.items()}


def _outline(cond: Conditions | None, whole: bool) -> dict[str, PyTree]:
    """Names, shapes and dtypes of a condition; and a digest of whole numbers, of a whole batch."""
    arrays = {name: np.asarray(value) for name, value in named(cond or {}).items()}
    numbers = {name: array for name, array in arrays.items() if array.dtype.kind in "biu"}
    return {
        "cond": {name: [list(v.shape[1:]), str(v.dtype)] for name, v in arrays.items()},
        "labels": digest(numbers) if whole else None,
    }
