"""Host rows as global arrays, and the shardings of batches and train states."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5like import tree
from t5like.sharding.logical_axes import spec
from t5like.types import Batch, LogicalAxes, TrainState


def batch_shardings(batch: Batch, mesh: Mesh) -> Batch:
    """Rows over data and fsdp, their length over context where it divides; None stays None."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.tree.map(lambda leaf: NamedSharding(mesh, spec(("batch", "length"), leaf.shape)), batch)


def state_shardings(state: TrainState, axes: LogicalAxes, mesh: Mesh) -> TrainState:
    """A sharding for each leaf of a (possibly abstract) state.

    Args:
        state: parameters and all that mirrors them.
        axes: logical axes of each parameter by name.
        mesh: today's mesh.

    Optimizer state with a parameter's name and shape is split like it (moments); what is smaller, such as Adafactor's
    row and column statistics, is copied to every device.
    """
    specs = {name: spec(logical) for name, logical in axes.items()}
    shapes = {name: leaf.shape for name, leaf in tree.flatten(state.params).items()}

    def place(name: str, leaf) -> NamedSharding:
        parts = name.split("/")
        for start in range(len(parts)):
            owner = "/".join(parts[start:])
            if shapes.get(owner) == leaf.shape:
                return NamedSharding(mesh, specs[owner])
        return NamedSharding(mesh, PartitionSpec())

    return tree.map_named(place, state)


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The numbers of a global batch's rows that this process's devices hold, ascending."""
    sharding = NamedSharding(mesh, spec(("batch",)))
    held = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for (rows,) in held]))


def to_global(batch: Batch, mesh: Mesh, batch_size: int) -> Batch:
    """Put this process's rows (those of `local_rows`) on its devices as part of one global batch."""
    held = local_rows(mesh, batch_size)

    def place(sharding: NamedSharding, rows: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            first, last = np.searchsorted(held, (start, stop))
            return rows[(slice(first, last), *index[1:])]

        return jax.make_array_from_callback((batch_size, *rows.shape[1:]), sharding, part)

    return jax.tree.map(place, batch_shardings(batch, mesh), batch)


def to_host(x: jax.Array) -> np.ndarray:
    """A whole array as numpy in every process, wherever its parts are; all processes must call it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)
