"""Batches over a mesh of devices: where the arrays of a job lie."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from diffsamp._core.types import Network, PyTree, Sharding

__all__ = ["expect_sharding", "on_mesh", "pieces_of", "put"]


def expect_sharding(sharding: Sharding, batch: int | None = None) -> None:
    """Raise unless `sharding` is None, or spreads a batch axis, of `batch` samples, over a mesh.

    Raises:
      TypeError: something else.
      ValueError: a batch that does not divide among the devices.
    """
    if sharding is None:
        return
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            "`sharding` must be a jax.sharding.NamedSharding, such as NamedSharding(mesh, "
            f'PartitionSpec("batch")); got {type(sharding).__name__}.'
        )
    pieces = pieces_of(sharding)
    if batch is not None and batch % pieces:
        raise ValueError(
            f"`batch` = {batch} must divide among the {pieces} devices of `sharding`; take "
            f"{max(batch // pieces, 1) * pieces}."
        )


def put(tree: PyTree, sharding: Sharding) -> PyTree:
    """The arrays of a batch, in a sharding if there is one.

    A batch that does not divide among the devices, such as the last of a set, is put whole on each.
    """
    if sharding is None:
        return tree
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(tree)}
    whole = any(not size or size[0] % pieces_of(sharding) for size in sizes)
    return jax.device_put(tree, _everywhere(sharding) if whole else sharding)


def on_mesh(score_fn: Network, sharding: Sharding) -> PyTree:
    """The network with its weights on the mesh, so that they are moved once and not at every call.

    Weights that lie on these devices already, such as those of a model that is sharded itself, stay
    as they are; numbers on the host do, too.
    """
    if sharding is None:
        return score_fn

    def move(leaf: PyTree) -> PyTree:
        if not isinstance(leaf, jax.Array) or leaf.sharding.device_set == sharding.device_set:
            return leaf
        return jax.device_put(leaf, _everywhere(sharding))

    return jax.tree.map(move, score_fn)


def pieces_of(sharding: Sharding) -> int:
    """Into how many parts the first axis is cut; 1 for None."""
    if sharding is None:
        return 1
    axes = sharding.spec[0] if len(sharding.spec) else None
    names = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
    return int(np.prod([sharding.mesh.shape[name] for name in names], dtype=int))


def _everywhere(sharding: NamedSharding) -> NamedSharding:
    return NamedSharding(sharding.mesh, PartitionSpec())
