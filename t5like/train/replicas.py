"""Compare replicas: parts of the state that several devices hold must be bitwise equal.

A device with silent errors computes other values than its replicas. Here every device computes a digest of its own part
of each leaf, and devices with the same part must have the same digest. So only leaves that several devices hold are
compared: those replicated over the data axis, and those too small to be sharded. Called by `loop` every
`train.compare_replicas_every` steps, and before a checkpoint is saved.
"""

import functools
from collections import Counter, defaultdict
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from t5like import tree
from t5like.checkpoint.digests import digest
from t5like.errors import ProcessLost, shorten
from t5like.sharding import placement
from t5like.types import TrainState


def compare_replicas(state: TrainState, step: int, before_end: Callable[[], None]) -> None:
    """Compare all replicas of a state. All processes call it, and all raise the same error.

    `before_end` is called before the error is raised, to complete the checkpoint that is being saved.

    Raises:
        ProcessLost: a replica differs; names its process and device.
    """
    differ = differing_devices(state)
    if differ:
        before_end()
        devices = [f"process {device.process_index}, {device}: {names}" for device, names in differ.items()]
        raise ProcessLost(
            f"replicas differ after step {step:,}: {shorten(devices, separator='; ')}; nothing is saved; start again "
            "without these devices if it happens twice"
        )


def differing_devices(state: TrainState) -> dict[jax.Device, str]:
    """The devices whose parts differ from those of most of their replicas, and the first leaf in which they do.

    If there are two replicas, it is not known which one is wrong, and both are returned.
    """
    leaves = tree.flatten(state)
    mesh = next(iter(leaves.values())).sharding.mesh
    program = _program(mesh, tuple(leaf.sharding.spec for leaf in leaves.values()))
    digests_ML2 = placement.to_host(program(*leaves.values()))
    rows = dict(zip(mesh.devices.flat, digests_ML2, strict=True))
    differ: dict[jax.Device, str] = {}
    for index, (name, leaf) in enumerate(leaves.items()):
        groups: dict[str, list[jax.Device]] = defaultdict(list)
        for device, part in leaf.sharding.devices_indices_map(leaf.shape).items():
            groups[str(part)].append(device)
        for devices in groups.values():
            values = {device: tuple(int(lane) for lane in rows[device][index]) for device in devices}
            (common, count), *others = Counter(values.values()).most_common()
            clear = not others or count > others[0][1]
            for device, value in values.items() if others else ():
                if value != common or not clear:
                    differ.setdefault(device, name)
    return differ


@functools.lru_cache(maxsize=4)
def _program(mesh: jax.sharding.Mesh, specs: tuple[PartitionSpec, ...]):
    """The function of all leaves -> uint32 [devices, leaves, 2]: each device's digests, in the mesh's order."""
    devices = PartitionSpec(mesh.axis_names)

    def digests(*parts):
        return jnp.stack([jnp.stack(digest(part)) for part in parts])[None]

    # Without the check, JAX does not ask for a proof that the digests differ from device to device.
    program = jax.shard_map(digests, mesh=mesh, in_specs=specs, out_specs=devices, check_vma=False)
    return jax.jit(program, out_shardings=NamedSharding(mesh, devices))
