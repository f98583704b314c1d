"""Memory checks before anything is allocated: lower bounds of the memory that a run needs, from shapes alone.

A lower bound counts arrays that must exist at the same time: state and batch, the hidden values of one layer, the
attention scores of one head. A run that passes may still be too large; `t5like plan` predicts the memory of a step.
Called by `train` and by generation.
"""

import contextlib
import math
import os
from collections.abc import Sequence
from pathlib import Path

import jax

from t5like import tree
from t5like.config.schema import Config
from t5like.errors import ConfigError
from t5like.types import Batch, TrainState, Tree

# Limits of control groups: of version 2, and of version 1, whose number is very large where there is no limit.
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def host() -> int | None:
    """Bytes of memory that this process may use: the machine's, or its container's; None if unknown."""
    sizes = []
    with contextlib.suppress(ValueError, OSError, AttributeError):
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in LIMITS:
        with contextlib.suppress(ValueError, OSError):  # no such file, or "max"
            sizes.append(int(Path(path).read_text(encoding="utf-8")))
    return min((size for size in sizes if size > 0), default=None)


def of_devices(devices: Sequence[jax.Device]) -> int | None:
    """Total bytes of those of the devices that belong to this process; None if unknown."""
    devices = [device for device in devices if device.process_index == jax.process_index()]
    if all(device.platform == "cpu" for device in devices):
        return host()
    sizes = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    return sum(sizes) if sizes and all(sizes) else None


def check_training(config: Config, batch: Batch, abstract: TrainState, mesh: jax.sharding.Mesh) -> None:
    """Refuse a run that does not fit on this process's devices.

    Args:
        config: resolved for the mesh.
        batch: shapes of a global batch.
        abstract: the state's shapes and shardings.

    Raises:
        ConfigError: with the needed and the available bytes, and the fields that determine them.
    """
    if not (available := of_devices(mesh.devices.flatten())):
        return
    local = len(mesh.local_devices)
    state = {
        "parameters": local * _bytes_per_device(abstract.params),
        f"state of optimizer.name={config.optimizer.name}": local * _bytes_per_device(abstract.opt_state),
        "moving average (optimizer.ema_decay)": local * _bytes_per_device(abstract.ema or {}),
    }
    share = local / mesh.size
    rows = {
        "batch": share * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(batch)),
        "hidden values and scores of a microbatch": share * _hidden(config),
    }
    needed = {name: int(size) for name, size in (state | rows).items() if size}
    if sum(needed.values()) <= available:
        return
    if sum(state.values()) > available:
        count = tree.num_parameters(abstract.params)
        fields = {"model": ("num_layers", "model_dim", "mlp_dim", "num_heads", "head_dim")}
        fields |= {"tokenizer": ("vocab_size",)}
        reason, remedy = f"a model of {count:,} parameters", "use a smaller model, or more devices with mesh.fsdp"
    else:
        fields = {"data": ("batch_size", "inputs_length", "targets_length"), "train": ("microbatches",)}
        fields |= {"model": ("model_dim",)}
        reason, remedy = "a batch", f"use data.batch_size={max(1, config.data.batch_size // 1024)}, or shorter rows"
    values = [
        f"{section}.{name}={getattr(getattr(config, section), name)}" for section in fields for name in fields[section]
    ]
    raise ConfigError(
        f"{', '.join(values)}: {reason} needs at least {gigabytes(sum(needed.values()))} of memory ("
        + ", ".join(f"{name} {gigabytes(size)}" for name, size in needed.items() if size > sum(needed.values()) / 100)
        + f"), and {'this machine has' if mesh.devices.flat[0].platform == 'cpu' else 'its devices have'} "
        f"{gigabytes(available)}; {remedy}; t5like plan predicts the memory of a step"
    )


def check_texts(config: Config, *, prompt: int, new: int, texts: int) -> None:
    """Refuse to generate texts whose key-value cache does not fit in memory, even for one prompt.

    Args:
        config: resolved.
        prompt: its number of tokens.
        new: tokens to generate per text.
        texts: number generated in parallel: beams, or samples.

    Raises:
        ConfigError: with the needed and the available bytes.
    """
    model, width = config.model, _width(config)
    layers = model.decoder_layers
    positions = new * texts + prompt * (model.architecture == "decoder")
    keys = 2 * layers * positions * model.kv_heads * model.head_dim * width
    logits = 4 * texts * config.vocab_rows
    scores = prompt**2 * width * (model.kernels != "tpu")
    needed, available = keys + logits + scores, of_devices(jax.local_devices())
    if available and needed > available:
        raise ConfigError(
            f"a prompt of {prompt:,} tokens with {texts:,} texts of {new:,} tokens needs at least "
            f"{gigabytes(needed)} of memory, and there are {gigabytes(available)}; "
            "use a smaller --max_new_tokens, such as 64, or fewer texts"
        )


def gigabytes(size: int) -> str:
    """Bytes as text in gigabytes."""
    return f"{size / 1e9:,.1f} GB" if size < 1e15 else f"{size / 1e9:.3g} GB"


def _bytes_per_device(leaves: Tree) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(leaves)
    )


def _width(config: Config) -> int:
    return 2 if config.model.dtype == "bfloat16" else 4


def _hidden(config: Config) -> int:
    """Bytes of a microbatch's hidden values between two layers, and of one head's scores, of the longest stack."""
    model, data = config.model, config.data
    length = {"decoder": config.row_length, "encoder": data.inputs_length}.get(
        model.architecture, max(data.inputs_length, data.targets_length)
    )
    rows = data.batch_size // config.train.microbatches
    return rows * length * (model.model_dim + length * (model.kernels != "tpu")) * _width(config)
