"""Shardings of batches and train states, and conversion between host rows and global arrays.

The train loop passes batches through `to_global`; `step` calls `state_shardings`.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5like import tree
from t5like.sharding.logical_axes import spec
from t5like.types import Batch, LogicalAxes, Taught, TrainState


def batch_shardings(batch: Batch, mesh: Mesh) -> Batch:
    """Shardings of a batch: rows over data and fsdp, length over context if divisible; None stays None.

    An array between them, as of the answers to a prompt, is not split along its inner dims.
    """
    logical = lambda dims: ("batch", *[None] * (dims - 2), "length")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.tree.map(lambda leaf: NamedSharding(mesh, spec(logical(leaf.ndim), leaf.shape)), batch)


def abstract_batch(batch: Batch | Taught, mesh: Mesh) -> Batch | Taught:
    """Shapes, dtypes and shardings of a batch, of which only shapes and dtypes are read; a teacher has shardings."""
    if isinstance(batch, Taught):
        return batch._replace(rows=abstract_batch(batch.rows, mesh))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), batch, batch_shardings(batch, mesh)
    )


def state_shardings(state: TrainState, axes: LogicalAxes, mesh: Mesh) -> TrainState:
    """A sharding for each leaf of a (possibly abstract) state.

    Args:
        state: parameters, optimizer state and moving average.
        axes: logical axes of each parameter by name.
        mesh: the mesh of this run.

    Optimizer state with a parameter's name and shape has its sharding (moments); smaller arrays, such as Adafactor's
    row and column statistics, are replicated.
    """
    specs = {name: spec(logical) for name, logical in axes.items()}
    shapes = {name: leaf.shape for name, leaf in tree.flatten(tree.merged(state.base, state.params)).items()}

    def sharding(name: str, leaf) -> NamedSharding:
        parts = name.split("/")
        for start in range(len(parts)):
            parameter = "/".join(parts[start:])
            if shapes.get(parameter) == leaf.shape:
                return NamedSharding(mesh, specs[parameter])
        return NamedSharding(mesh, PartitionSpec())

    return tree.map_named(sharding, state)


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Indices of the rows of a global batch that are on this process's devices, ascending."""
    sharding = NamedSharding(mesh, spec(("batch",)))
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for (rows,) in slices]))


def to_global(batch: Batch, mesh: Mesh, batch_size: int) -> Batch:
    """Put this process's rows (those of `local_rows`) on its devices as part of one global batch."""
    row_indices = local_rows(mesh, batch_size)

    def to_array(sharding: NamedSharding, rows: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            first, last = np.searchsorted(row_indices, (start, stop))
            return rows[(slice(first, last), *index[1:])]

        return jax.make_array_from_callback((batch_size, *rows.shape[1:]), sharding, shard)

    return jax.tree.map(to_array, batch_shardings(batch, mesh), batch)


def all_to_global(batch: Batch, mesh: Mesh, batch_size: int) -> Batch:
    """Like `to_global`, of a batch that every process has all rows of."""
    rows = local_rows(mesh, batch_size)
    return to_global(jax.tree.map(lambda x: x[rows], batch), mesh, batch_size)


def to_host(x: jax.Array) -> np.ndarray:
    """A global array as numpy in every process; all processes must call it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)
