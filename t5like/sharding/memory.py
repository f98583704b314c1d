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
from t5like.sharding.auto import FUSED
from t5like.sharding.mesh import on_cpus
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
    if on_cpus(devices):
        return host()
    sizes = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    return sum(sizes) if sizes and all(sizes) else None


def check_training(
    config: Config, batch: Batch, abstract: TrainState, mesh: jax.sharding.Mesh, teacher: Tree | None = None
) -> None:
    """Refuse a run that does not fit on this process's devices.

    Args:
        config: resolved for the mesh.
        batch: shapes of a global batch.
        abstract: the state's shapes and shardings.
        mesh: of the run.
        teacher: shapes and shardings of the parameters of `distill.teacher`, if they are known.

    Raises:
        ConfigError: with the needed and the available bytes, and the fields that determine them.
    """
    if not (available := of_devices(mesh.devices.flatten())):
        return
    local = len(mesh.local_devices)
    state = {
        "parameters": local * _bytes_per_device((abstract.params, abstract.base)),
        f"state of optimizer.name={config.optimizer.name}": local * _bytes_per_device(abstract.opt_state),
        "moving average (optimizer.ema_decay)": local * _bytes_per_device(abstract.ema or {}),
        "teacher (distill.teacher)": local * _bytes_per_device(teacher or {}),
        "reference (rl.reference)": local * _bytes_per_device(abstract.params if config.rl.needs_reference else {}),
    }
    share = local / mesh.size
    rows = {"batch": share * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(batch))}
    update, sampling = _hidden(config), sampling_cache(config) + _sampling_scores(config)
    if update >= sampling:  # t5like rl does one after the other
        rows["hidden values and scores of a microbatch"] = share * update
    else:
        rows["keys, values and scores of sampled answers"] = share * sampling
    needed = {name: int(size) for name, size in (state | rows).items() if size}
    if sum(needed.values()) <= available:
        return
    if sum(state.values()) > available:
        count = tree.num_parameters((abstract.params, abstract.base))
        fields = {"model": ("num_layers", "model_dim", "mlp_dim", "num_heads", "head_dim")}
        fields |= {"tokenizer": ("vocab_size",)}
        reason, remedy = f"a model of {count:,} parameters", "use a smaller model, or more devices with mesh.fsdp"
    else:
        fields = {"data": ("batch_size", "inputs_length", "targets_length"), "train": ("microbatches",)}
        fields |= {"model": ("model_dim",)} | ({"rl": ("answers_per_prompt",)} if config.rl.method == "policy" else {})
        fewer = ", fewer rl.answers_per_prompt" if config.rl.method == "policy" else ""
        remedy = f"use data.batch_size={max(1, config.data.batch_size // 1024)}{fewer}, or shorter rows"
        reason = "a batch"
    values = [
        f"{section}.{name}={getattr(getattr(config, section), name)}" for section in fields for name in fields[section]
    ]
    raise ConfigError(
        f"{', '.join(values)}: {reason} needs at least {gigabytes(sum(needed.values()))} of memory ("
        + ", ".join(f"{name} {gigabytes(size)}" for name, size in needed.items() if size > sum(needed.values()) / 100)
        + f"), and {'this machine has' if mesh.devices.flat[0].platform == 'cpu' else 'its devices have'} "
        f"{gigabytes(available)}; {remedy}; t5like plan predicts the memory of a step"
    )


def sampling_cache(config: Config) -> int:
    """Bytes of the decoder's keys and values while a step of `t5like rl` samples its answers; 0 for other runs."""
    data, rl = config.data, config.rl
    if rl.method != "policy":
        return 0
    cross = data.inputs_length * (config.model.architecture == "encoder_decoder")
    positions = cross + _cached_positions(config, data.inputs_length, data.targets_length, rl.answers_per_prompt)
    return data.batch_size * positions * _bytes_per_position(config)


def _sampling_scores(config: Config) -> int:
    """Bytes of one head's scores in a step of sampling: all answers to a prompt are queries of one row of keys."""
    data, rl = config.data, config.rl
    if rl.method != "policy":
        return 0
    keys = _cached_positions(config, data.inputs_length, data.targets_length, rl.answers_per_prompt)
    return data.batch_size * rl.answers_per_prompt * keys * _width(config)


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
    keys = _cached_positions(config, prompt, new, texts) * _bytes_per_position(config)
    logits = 4 * texts * config.vocab_rows
    scores = prompt**2 * _width(config) * (config.model.kernels not in FUSED)
    needed, available = keys + logits + scores, of_devices(jax.local_devices())
    if available and needed > available:
        raise ConfigError(
            f"a prompt of {prompt:,} tokens with {texts:,} texts of {new:,} tokens needs at least "
            f"{gigabytes(needed)} of memory, and there are {gigabytes(available)}; "
            "use a smaller --max_new_tokens, such as 64, or fewer texts"
        )


def _cached_positions(config: Config, prompt: int, new: int, texts: int) -> int:
    """Positions of self-attention in the cache of a prompt and its texts."""
    return new * texts + prompt * (config.model.architecture == "decoder")


def _bytes_per_position(config: Config) -> int:
    """Bytes of keys and values of one position, in all layers of the decoder."""
    model = config.model.in_decoder
    return 2 * model.decoder_layers * model.kv_heads * model.head_dim * _width(config)


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
    answers = config.rl.answers
    shapes = {  # rows of each prompt, and their length
        "decoder": [(answers, config.row_length)],
        "encoder": [(answers, data.inputs_length)],
        "encoder_decoder": [(1, data.inputs_length), (answers, data.targets_length)],
    }[model.architecture]
    rows = data.batch_size // config.train.microbatches
    local = model.attention_window > 0 and "global" not in model.layer_pattern  # then not all scores exist
    scores = model.kernels not in FUSED and not local
    dim = min(model.model_dim, model.in_decoder.model_dim)
    values = [count * length * (dim + length * scores) for count, length in shapes]
    return rows * max(values) * _width(config)
