"""Fingerprints, by which a folder knows the job it belongs to."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import jax
import numpy as np

from diffsamp._core.types import Key, Network, PyTree, Value

__all__ = ["digest", "fingerprint", "seed_of"]


def digest(*trees: PyTree) -> str:
    """SHA-256 over the paths, shapes, dtypes and values of all arrays."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(trees)[0]:
        if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        head = jax.tree_util.keystr(path), array.shape, str(array.dtype)
        found.update(str(head).encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def fingerprint(score_fn: Network) -> str:
    """Of a network: its weights, its process and what was said of it; functions are not seen."""
    return digest(score_fn, np.frombuffer(json.dumps(_said(score_fn)).encode(), np.uint8))


def _said(value: Value) -> Value:
    """Names and flags of a ScoreFn and of what is around it."""
    if isinstance(value, str | int | float | bool | None):
        return value
    if not dataclasses.is_dataclass(value):
        return None
    fields = [f.name for f in dataclasses.fields(value) if f.name != "params"]
    return [type(value).__name__, {name: _said(getattr(value, name)) for name in fields}]


def seed_of(key: Key) -> list[int]:
    """The numbers of a random key, to be written down."""
    if key is None:
        return []
    typed = jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
    return [int(v) for v in np.ravel(np.asarray(jax.random.key_data(key) if typed else key))]
