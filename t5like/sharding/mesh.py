"""Devices as a mesh, logical axes as shardings, and rows on hosts as global arrays.

Words: an *axis* belongs to the mesh, a *dim* to a tensor, a *logical axis* is the name that joins them. Parameters and
activations name their dims; `RULES` says which mesh axes each name is split over; `jax.jit` does the rest. The model
calls `constrain` on activations, `step` takes `state_shardings`, the loop feeds batches through `to_global`.

    data     copies of the parameters, each with its own rows
    fsdp     rows too, and every parameter split as well: it is gathered where it is used (ZeRO-3)
    tensor   heads, MLP dim and vocabulary split inside a layer (Megatron-LM)
    context  the length of a row split; attention gathers keys and values, and a device makes the scores of its queries

Where a slower network joins parts of the machine (`mesh.slices`), `data` is split over them first: gradients cross it.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from t5like.config.schema import Config
from t5like.errors import ConfigError

AXES = ("data", "fsdp", "tensor", "context")

# Logical axis -> mesh axes. Parameters above, activations below.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "vocab": "tensor",
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",  # query heads and their head_dim, joined
    "kv_heads": "tensor",
    "layers": None,
    "norm": None,
    "buckets": None,
    "positions": None,
    "token_types": None,
    "features": None,  # of BERT's heads, D -> D: too little work to split it twice
    "classes": None,
    "batch": ("data", "fsdp"),
    "length": "context",
    "parts": "context",  # a dim with one entry for each part of a split length
    "act_embed": None,
    "act_mlp": "tensor",
    "act_heads": "tensor",
    "act_vocab": "tensor",
}


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange devices (default: all there are) on the config's axes.

    Raises:
        ConfigError: the axes don't multiply to the number of devices, or a dim can't be split as they say.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = axis_sizes(config, len(devices), len({device.process_index for device in devices}))
    grid = arrange(devices, tuple(sizes.values()), config.mesh.slices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(devices: Sequence[jax.Device], shape: tuple[int, ...], slices: int) -> np.ndarray:
    """The devices as a grid of this shape, whose first dim (`data`) goes over the slices first.

    Raises:
        ConfigError: the devices are in another number of slices.
    """
    platform, found = devices[0].platform, {getattr(device, "slice_index", 0) for device in devices}
    # A GPU's slice is what NVLink joins, mostly a host: several of them may make up one of ours. CPUs are as fake as
    # their slices.
    fits = {"tpu": len(found) == slices, "cpu": True}.get(platform, len(found) % slices == 0)
    if not fits:
        raise ConfigError(
            f"mesh.slices={slices} does not fit the {len(found)} slices of these devices; use {len(found)}"
        )
    if platform == "tpu" and len(devices) > 1:
        # Only a TPU has a physical torus to follow.
        from jax.experimental import mesh_utils

        for split in (False, True):  # an axis along a part of the torus's, such as 2 of 4 x 4, only if it must be
            try:
                if slices == 1:
                    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=split)
                inside, across = (shape[0] // slices, *shape[1:]), (slices, 1, 1, 1)
                return mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=split)
            except NotImplementedError as error:
                if split:
                    raise ConfigError(
                        f"mesh {' x '.join(map(str, shape))} can't be laid along this TPU's torus "
                        f"({' '.join(str(error).split())[:120]}); use --config.mesh.fsdp=-1 and 1 for the other axes"
                    ) from None
    if platform != "cpu":
        devices = sorted(devices, key=lambda device: getattr(device, "slice_index", 0))
    grid = np.empty(len(devices), object)
    grid[:] = devices
    return grid.reshape(shape)


def num_slices(devices: Sequence[jax.Device]) -> int:
    """The slices that `mesh.slices` has to name: a TPU's; elsewhere any number that divides them will do, 1 too."""
    return len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1


def axis_sizes(config: Config, num_devices: int, num_processes: int = 1) -> dict[str, int]:
    """Devices per axis, the free one filled in; pure arithmetic, and every refusal that it can make."""
    sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    wanted = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    if free and num_devices % fixed == 0:
        sizes[free[0]] = num_devices // fixed
    elif free or fixed != num_devices:
        counted = f" ({num_processes} processes x {num_devices // num_processes})" if num_processes > 1 else ""
        raise ConfigError(
            f"mesh {wanted} does not fit {num_devices} devices{counted}: the product must be {num_devices}; "
            f"use --config.mesh.data=-1 and for the other axes divisors of {num_devices}: "
            f"{', '.join(str(d) for d in range(1, num_devices + 1) if num_devices % d == 0)}"
        )
    if sizes["data"] % config.mesh.slices:
        raise ConfigError(
            f"mesh.slices={config.mesh.slices} must divide mesh.data={sizes['data']}, which goes over the slices; "
            f"use --config.mesh.data={config.mesh.slices} --config.mesh.fsdp=-1, or on one slice --config.mesh.slices=1"
        )
    _check_divisible(config, sizes)
    return sizes


def _check_divisible(config: Config, sizes: dict[str, int]) -> None:
    model, rows = config.model, sizes["data"] * sizes["fsdp"]
    if config.data.batch_size % (step := rows * config.train.microbatches):
        low = config.data.batch_size // step * step
        raise ConfigError(
            f"data.batch_size={config.data.batch_size} must be a multiple of {step} (data {sizes['data']} x fsdp "
            f"{sizes['fsdp']} x train.microbatches {config.train.microbatches}); use "
            + (f"{low} or {low + step}" if low else f"{step}")
        )
    length = "data.inputs_length", config.data.inputs_length
    if model.architecture == "decoder":
        length = "data.inputs_length + data.targets_length", config.row_length
    for field, value, axis in (
        ("model.model_dim", model.model_dim, "fsdp"),
        ("model.num_heads", model.num_heads, "tensor"),
        ("model.num_kv_heads", model.kv_heads, "tensor"),
        ("model.mlp_dim", model.mlp_dim, "tensor"),
        ("vocabulary rows", config.vocab_rows, "tensor"),
        (*length, "context"),
    ):
        if value % sizes[axis]:
            raise ConfigError(
                f"mesh.{axis}={sizes[axis]} must divide {field}={value}; use mesh.{axis}={math.gcd(value, sizes[axis])}"
                + (f" or a length of {-(-value // sizes[axis]) * sizes[axis]}" if axis == "context" else "")
            )


def unsplit_lengths(config: Config, mesh: Mesh) -> list[str]:
    """What the user should know of lengths that `context` does not split."""
    context, length = mesh.shape["context"], config.data.targets_length
    if config.model.architecture != "encoder_decoder" or length % context == 0:
        return []
    up = -(-length // context) * context
    return [f"data.targets_length={length} is not split over context {context}: only a multiple is, such as {up}"]


def spec(logical: Sequence[str | None], shape: Sequence[int] | None = None) -> PartitionSpec:
    """The partition of a tensor whose dims have these logical axes.

    With its shape, a length that `context` does not divide stays whole (T5's 114 targets beside 512 inputs, say).
    """
    if shape is not None:
        assert len(logical) == len(shape), (logical, shape)
        stays = lambda name, size: name == "length" and size % context_size() > 0
        logical = [None if stays(name, size) else name for name, size in zip(logical, shape, strict=True)]
    return PartitionSpec(*(None if name is None else RULES[name] for name in logical))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Tell the compiler how an activation is split; without a mesh (`jax.set_mesh`) do nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(logical, x.shape))


def context_size() -> int:
    """Over how many devices the length of a row is split where this is traced; 1 without a mesh (`jax.set_mesh`)."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["context"]


def batch_parts() -> int:
    """Over how many devices the rows of a batch are split where this is traced; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in RULES["batch"])


def device_kind() -> str:
    """JAX's name of the chips that this is for; empty if they are not known."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else ""
