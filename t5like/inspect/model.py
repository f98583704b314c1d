"""`t5like inspect model`: every parameter, where it lies on a mesh, how it begins and how it is trained; totals, FLOPs.

All of it comes from shapes: nothing is allocated, compiled or drawn, so a model for thousands of chips takes seconds on
one CPU. The initial mean and standard deviation are those of the initializers (`model.layers.Parameter`), not samples.
The report is one JSON object; `model_text` shows it. Called by `cli.inspections`.
"""

import math
from typing import Any

from t5like import tree
from t5like.config.schema import Config
from t5like.io.storage import format_bytes
from t5like.metrics import flops
from t5like.optim import lora, optimizers, train_state
from t5like.plan import estimate
from t5like.plan.planner import for_slices
from t5like.plan.topology import Topology
from t5like.sharding import auto
from t5like.sharding import mesh as meshes

Report = dict[str, Any]

BIG = 0.01  # share of all parameters from which on one that is not split is mentioned
FULL = 0.7  # share of a chip's memory from which on the state is mentioned
PARTS = dict.fromkeys(
    ("embedding", "decoder_embedding", "positions", "token_types", "embedding_norm"), "embedding"
)  # the part of the model that a parameter belongs to, where it is not the first part of the name


def inspect_model(config: Config, topology: Topology | None) -> Report:
    """The report of a config on a topology; without one, on as many devices as the fixed axes of its mesh have.

    Raises:
        ConfigError: the mesh does not fit the devices or the model, or a pattern of parameters matches none.
    """
    if topology:
        config, devices = for_slices(config, topology), topology.num_devices
        platform = topology.chip.platform
    else:
        devices = math.prod(size for axis in meshes.AXES if (size := getattr(config.mesh, axis)) != -1)
        platform = config.model.kernels if config.model.kernels in auto.FUSED else "cpu"
    sizes = meshes.axis_sizes(config, devices)
    config = auto.resolve_auto_for(config, platform, sizes["context"])
    inputs = estimate.abstract_inputs(config)
    persistent = estimate.persistent_memory(inputs, sizes)
    parameters = _parameters(config, inputs, persistent)
    report = {
        "topology": topology.name if topology else None,
        "devices": devices,
        "mesh": sizes,
        "architecture": config.model.architecture,
        "dtype": config.model.dtype,
        "optimizer": _optimizer(config),
        "parameters": parameters,
        "parts": _parts(config, parameters),
        "total": _total(parameters),
        "memory_per_device": {
            "parameters": persistent.parameters,
            "optimizer": persistent.optimizer,
            "average": persistent.average,
            "batch": persistent.batch,
            "total": persistent.total,
            "available": topology.chip.memory if topology else None,
        },
        "flops": _flops(config),
    }
    return report | {"warnings": _warnings(report)}


def _optimizer(config: Config) -> Report:
    optimizer = config.optimizer
    return {
        "name": optimizer.name,
        "learning_rate": optimizer.learning_rate,
        "schedule": optimizer.schedule,
        "warmup_steps": optimizer.warmup_steps,
        "weight_decay": optimizer.weight_decay,
        "clip_norm": optimizer.clip_norm,
        "ema_decay": optimizer.ema_decay,
    }


# ---- Parameters ----


def _parameters(config: Config, inputs: estimate.AbstractInputs, persistent: estimate.PersistentMemory) -> list[Report]:
    axes = train_state.parameter_axes(config, inputs.batch)
    initial = train_state.initial_values(config, inputs.batch)
    states = [leaf for leaf in persistent.leaves if leaf.name.startswith(("optimizer/", "average/"))]
    rows = []
    for leaf in persistent.leaves:
        kind, _, name = leaf.name.partition("/")
        if kind != "params":
            continue
        own = [state for state in states if _belongs(state.name, name)]
        mean, std = initial[name]
        rows.append(
            {
                "name": name,
                "part": part_of(name),
                "shape": list(leaf.shape),
                "axes": list(axes[name]),
                "split": leaf.split,
                "size": math.prod(leaf.shape),
                "bytes": leaf.bytes,
                "bytes_per_device": leaf.bytes_per_device,
                "mean": mean,
                "std": std,
                "state": [
                    {"name": state.name, "shape": list(state.shape), "split": state.split, "bytes": state.bytes}
                    for state in own
                ],
                "state_bytes_per_device": sum(state.bytes_per_device for state in own),
                **_training(config, name, axes[name], own),
            }
        )
    return rows


def _belongs(state: str, parameter: str) -> bool:
    """Whether an array of the optimizer or the average is that of a parameter."""
    return any(state.endswith(f"/{parameter}{end}") for end in ("", "/row", "/col"))


def _training(config: Config, name: str, axes: tuple[str | None, ...], states: list[estimate.Leaf]) -> Report:
    """How a parameter is trained: update rule, scale of the updates, factor of the learning rate, weight decay."""
    optimizer = config.optimizer
    if tree.matches(name, optimizer.frozen) or not lora.is_trained(config.lora, name):
        return {"frozen": True, "update": "frozen", "rate": "none", "rate_factor": 0.0, "weight_decay": 0.0}
    names = [state.name for state in states]
    update = optimizer.name
    if update == "muon":  # the optimizers of hidden layers, and of the other parameters
        update = "muon" if any("/inner_states/muon/" in each for each in names) else "adam"
    relative = optimizer.name in ("adafactor", "adamw_rms")
    rate = {"muon": "0.2 sqrt(longer side), orthogonal"}.get(update, "relative to its RMS" if relative else "absolute")
    if any(each.endswith("/row") for each in names):
        update += ", factored"
    decay = 0.0 if tree.matches(name, optimizer.no_decay) else optimizer.weight_decay
    factor = optimizers.rate_factor(optimizer, axes)
    return {"frozen": False, "update": update, "rate": rate, "rate_factor": factor, "weight_decay": decay}


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to: embedding, encoder attention, encoder mlp, head, ..."""
    first, *rest = name.split("/")
    if first not in ("encoder", "decoder"):
        return PARTS.get(first, "head")
    for kind in ("attention", "mlp"):
        if any(word in (kind, f"cross_{kind}", "relative_bias") for word in rest):
            return f"{first} {kind}"
    return f"{first} norms"


# ---- Totals and FLOPs ----


def _total(rows: list[Report]) -> Report:
    return {
        "parameters": sum(row["size"] for row in rows),
        "trained": sum(row["size"] for row in rows if not row["frozen"]),
        "bytes": sum(row["bytes"] for row in rows),
        "bytes_per_device": sum(row["bytes_per_device"] for row in rows),
        "state_bytes_per_device": sum(row["state_bytes_per_device"] for row in rows),
    }


def _parts(config: Config, rows: list[Report]) -> list[Report]:
    """Totals by part of the model, with the FLOPs of a training step per token."""
    work = _flops_by_part(config)
    names = dict.fromkeys([*(row["part"] for row in rows), *work])
    order = [name for name in names if name.startswith("embedding")]
    order += [name for stack in ("encoder", "decoder") for name in names if name.startswith(stack)]
    order += [name for name in names if name not in order]
    return [
        {"part": name, **_total([row for row in rows if row["part"] == name]), "flops_per_token": work.get(name, 0.0)}
        for name in order
    ]


def _flops_by_part(config: Config) -> dict[str, float]:
    """FLOPs of a training step by part, over the tokens of the batch: three forward passes, matmuls only.

    Two of kernels that have no gradient, as in `flops.model_flops`.
    """
    rows = config.data.batch_size / estimate.tokens_per_step(config)
    scale, of_kernels = 3 * rows, (2 if config.lora.rank else 3) * rows
    work = {}
    for name, each in flops.flops_by_part(config).items():
        if name == "head":
            work["head"] = of_kernels * each.vocabulary
        else:
            work[f"{name} attention"] = of_kernels * each.projections + scale * each.attention
            work[f"{name} mlp"] = of_kernels * each.mlp
    return work


def _flops(config: Config) -> Report:
    tokens = estimate.tokens_per_step(config)
    return {
        "tokens_per_step": tokens,
        "per_step": flops.model_flops(config),
        "per_token": flops.model_flops(config) / tokens,
    }


# ---- Warnings ----


def _warnings(report: Report) -> list[Report]:
    found = [*_not_split(report), *_dead(report)]
    memory = report["memory_per_device"]
    if memory["available"] and memory["total"] > FULL * memory["available"]:
        text = (
            f"parameters, optimizer state and batch take {format_bytes(memory['total'])} of the "
            f"{format_bytes(memory['available'])} of a device, without activations; use a larger mesh.fsdp or "
            "mesh.tensor"
        )
        found.append({"name": "state_fills_memory", "text": text})
    return found


def _not_split(report: Report) -> list[Report]:
    """Big parameters, and their optimizer state, that axes of the mesh should split and do not."""
    mesh, found = report["mesh"], []
    splitting = {axis: mesh[axis] for axis in ("fsdp", "tensor") if mesh[axis] > 1}
    for row in report["parameters"] if splitting else ():
        if row["size"] < BIG * report["total"]["parameters"]:
            continue
        arrays = [("", row), *((f"the state {each['name']} of ", each) for each in row["state"])]
        for what, array in arrays:
            if array["shape"] != row["shape"]:
                continue  # factors are small
            missing = splitting if array["split"] == "replicated" else {}
            if not missing and "fsdp" in splitting and "fsdp" not in array["split"]:
                missing = {"fsdp": splitting["fsdp"]}
            if not missing:
                continue
            over = " and ".join(f"{axis}={size}" for axis, size in missing.items())
            where = "replicated on every device" if array["split"] == "replicated" else f"not split over {over}"
            axes = ", ".join(str(axis) for axis in row["axes"])
            share = row["size"] / report["total"]["parameters"]
            text = (
                f"{what}{row['name']} ({format_bytes(row['bytes'])}, {share:.1%} of the parameters) is {where}, "
                f"although the mesh has {over}; see the rules of its axes ({axes}) in sharding/logical_axes.py"
            )
            found.append({"name": "not_split", "text": text})
            break
    return found


def _dead(report: Report) -> list[Report]:
    """Matrices that begin as zeros: neither they nor what is before them learn at first."""
    rows = [row for row in report["parameters"] if row["std"] == 0 and row["mean"] == 0 and not row["frozen"]]
    rows = [row for row in rows if "kernel" in row["name"].split("/") or row["name"] in ("embedding", "head")]
    return [
        {
            "name": "starts_at_zero",
            "text": f"{row['name']} begins at 0: its layer gives 0, and what is before it has no gradient; use an "
            "initializer with a standard deviation above 0",
        }
        for row in rows
    ]
