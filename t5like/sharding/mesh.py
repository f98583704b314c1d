"""The device mesh: its axes, how devices are arranged on it, and the checks of its sizes.

`make_mesh` is called by every command that loads a model; `t5like plan` calls `axis_sizes` without devices.

    data     replicas of the parameters, each with its own rows
    fsdp     rows and every parameter are split; a parameter is gathered where it is used (ZeRO-3)
    tensor   heads, MLP dim and vocabulary are split inside a layer (Megatron-LM)
    context  the row length is split; attention gathers keys and values, and a device computes the scores of its queries

Where slices of a machine are connected by a slower network (`mesh.slices`), `data` is split over the slices first, so
that only gradients cross that network.
"""

import math
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from t5like.config.schema import Config
from t5like.errors import ConfigError, one_line

AXES = ("data", "fsdp", "tensor", "context")


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange devices (default: all) on the config's axes.

    Raises:
        ConfigError: the product of the axes is not the number of devices, or an axis does not divide a dim it splits.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = axis_sizes(config, len(devices), len({device.process_index for device in devices}))
    grid = arrange(devices, tuple(sizes.values()), config.mesh.slices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(devices: Sequence[jax.Device], shape: tuple[int, ...], slices: int) -> np.ndarray:
    """The devices as a grid of this shape, whose first dim (`data`) goes over the slices first.

    Raises:
        ConfigError: the devices have another number of slices.
    """
    platform, indices = devices[0].platform, {getattr(device, "slice_index", 0) for device in devices}
    # A JAX slice of GPUs is an NVLink domain, mostly a host; one of `mesh.slices` may have several. CPUs have none.
    fits = {"tpu": len(indices) == slices, "cpu": True}.get(platform, len(indices) % slices == 0)
    if not fits:
        raise ConfigError(
            f"mesh.slices={slices} does not fit the {len(indices)} slices of these devices; use {len(indices)}"
        )
    if platform == "tpu" and len(devices) > 1:
        # Only a TPU has a physical torus.
        from jax.experimental import mesh_utils

        for split in (False, True):  # first whole torus axes, then parts of them, such as 2 of 4 x 4
            try:
                if slices == 1:
                    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=split)
                within_slice, across_slices = (shape[0] // slices, *shape[1:]), (slices, *[1] * (len(AXES) - 1))
                return mesh_utils.create_hybrid_device_mesh(
                    within_slice, across_slices, devices, allow_split_physical_axes=split
                )
            except NotImplementedError as error:
                if split:
                    raise ConfigError(
                        f"mesh {' x '.join(map(str, shape))} can't be arranged on this TPU's torus "
                        f"({one_line(error, longest=120)}); use --config.mesh.fsdp=-1 and 1 for the other axes"
                    ) from None
    if platform != "cpu":
        devices = sorted(devices, key=lambda device: getattr(device, "slice_index", 0))
    grid = np.empty(len(devices), object)
    grid[:] = devices
    return grid.reshape(shape)


def num_slices(devices: Sequence[jax.Device]) -> int:
    """The value that `mesh.slices` must have: the slices of a TPU; 1 elsewhere, where other values are valid too."""
    return len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1


def axis_sizes(config: Config, num_devices: int, num_processes: int = 1) -> dict[str, int]:
    """Devices per axis, -1 replaced by what is left over.

    Raises:
        ConfigError: the product of the axes is not `num_devices`, or an axis does not divide the dims it splits.
    """
    sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    axes = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    if free and num_devices % fixed == 0:
        sizes[free[0]] = num_devices // fixed
    elif free or fixed != num_devices:
        processes = f" ({num_processes} processes x {num_devices // num_processes})" if num_processes > 1 else ""
        raise ConfigError(
            f"mesh {axes} does not fit {num_devices} devices{processes}: the product must be {num_devices}; "
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
    decoder = model.in_decoder
    for field, value, axis in (
        ("model.model_dim", model.model_dim, "fsdp"),
        ("model.num_heads", model.num_heads, "tensor"),
        ("model.num_kv_heads", model.kv_heads, "tensor"),
        ("model.mlp_dim", model.mlp_dim, "tensor"),
        ("model.decoder_model_dim", decoder.model_dim, "fsdp"),
        ("model.decoder_num_heads", decoder.num_heads, "tensor"),
        ("model.decoder_num_kv_heads", decoder.kv_heads, "tensor"),
        ("model.decoder_mlp_dim", decoder.mlp_dim, "tensor"),
        ("vocabulary rows", config.vocab_rows, "tensor"),
        (*length, "context"),
    ):
        if value % sizes[axis]:
            raise ConfigError(
                f"mesh.{axis}={sizes[axis]} must divide {field}={value}; use mesh.{axis}={math.gcd(value, sizes[axis])}"
                + (f" or a length of {-(-value // sizes[axis]) * sizes[axis]}" if axis == "context" else "")
            )
    field = "encoder_window" if model.has_encoder and model.encoder_window else "attention_window"
    if sizes["context"] > 1 and getattr(model, field) >= length[1]:
        raise ConfigError(
            f"model.{field}={getattr(model, field)} must be less than {length[0]}={length[1]}, the length "
            f"that mesh.context={sizes['context']} splits; use {length[1] // sizes['context']}, or mesh.context=1"
        )


def unsplit_lengths(config: Config, mesh: Mesh) -> list[str]:
    """Warnings about lengths that `context` does not divide, which are therefore not split."""
    context, length = mesh.shape["context"], config.data.targets_length
    if config.model.architecture != "encoder_decoder" or length % context == 0:
        return []
    up = -(-length // context) * context
    return [f"data.targets_length={length} is not split over context {context}: only a multiple is, such as {up}"]


def on_cpus(devices: Iterable[jax.Device]) -> bool:
    """Whether all devices are CPUs."""
    return all(device.platform == "cpu" for device in devices)
