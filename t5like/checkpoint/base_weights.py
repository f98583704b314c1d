"""The weights that the adapters of a LoRA run belong to: read from another run, and recognized when read again.

A checkpoint of a LoRA run has no copy of its base. Its metadata contain the base's step and a digest, `record`, and
every command reads the base from `init_from.checkpoint`. One that is gone or has changed is refused.

Called by `init_from` when a run starts, by `initial_state` when it continues, and by `run_directory.load`.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from t5like import tree
from t5like.checkpoint import parameter_sources
from t5like.checkpoint.agreement import same_failure
from t5like.checkpoint.checkpoints import Checkpoints
from t5like.checkpoint.metadata import Meta
from t5like.checkpoint.state_leaves import differences
from t5like.config.schema import Config
from t5like.errors import CheckpointError, DamagedCheckpoint, shorten
from t5like.io.paths import expand
from t5like.optim import lora
from t5like.types import Array, TrainState, Tree


def record(meta: Meta) -> dict[str, str]:
    """What identifies the weights of a checkpoint: its step, and the sha256 of the digests of all parameters."""
    leaves = [(name, *leaf) for name, leaf in sorted(meta.weights().items())]
    return {"step": str(meta.step), "sha256": hashlib.sha256(json.dumps(leaves).encode()).hexdigest()}


def refuse_adapters(meta: Meta, field: str, directory: Path) -> None:
    """Raise CheckpointError for a checkpoint of a LoRA run: another run can't begin with it."""
    if meta.config.lora.rank:
        raise CheckpointError(
            f"{field}={directory} is a LoRA run, whose checkpoints contain adapters only; "
            "t5like export merges them: use the run that t5like import makes of the export"
        )


def read(
    config: Config, abstract: TrainState, checkpoints: Checkpoints, meta: Meta
) -> tuple[dict[str, Array], Tree | None]:
    """Parameters of a checkpoint: those of the new run's `params` that it has, by name, and the run's base.

    They are read one at a time, the largest first, and each is stored in the run's dtype before the next one is read:
    at no time is the whole model in float32 in memory.

    Args:
        config: of the LoRA run.
        abstract: shape, dtype and sharding of every leaf of its state.
        checkpoints: of the run with the weights.
        meta: of the checkpoint.

    Raises:
        CheckpointError: the checkpoint does not fit, or is that of another LoRA run.
    """
    directory = checkpoints.directory.parent
    refuse_adapters(meta, "init_from.checkpoint", directory)
    stored = {name.partition("/")[2]: leaf for name, leaf in meta.weights().items()}
    base, trained = tree.flatten(abstract.base), tree.flatten(abstract.params)
    wanted = {name: base[name] for name in lora.base_names(abstract.base)}
    copied = {parameter_sources.own_or_pooler(name, stored): name for name in trained}  # by the name in the checkpoint
    copied = {source: name for source, name in copied.items() if source in stored}
    wanted |= {source: trained[name] for source, name in copied.items()}
    shapes = {
        name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding) for name, leaf in wanted.items()
    }
    unused = parameter_sources.ignored(config, meta.config, stored, shapes)
    stored = {name: leaf for name, leaf in stored.items() if name not in unused}
    if unfit := differences(stored, shapes):
        raise CheckpointError(
            f"init_from.checkpoint={directory} does not fit: {shorten(unfit, separator='; ')}; "
            f"use --config={directory}/config.json"
        )
    places = {name: leaf.sharding for name, leaf in base.items()}
    params, leaves = {}, {}
    for name in sorted(shapes, key=lambda name: -math.prod(shapes[name].shape)):
        others = [rf"(?!{re.escape(name)}$).*"]
        array = checkpoints.restore_params({name: shapes[name]}, meta.step, ema=meta.has_average, without=others)[name]
        if name in copied:
            params[copied[name]] = array
        else:
            leaves |= lora.stored(config.lora, name, array, places)
        del array
    return params, tree.nested(leaves)


def read_again(config: Config, abstract: TrainState, recorded: Mapping[str, str]) -> Tree:
    """The base of a LoRA run that has begun.

    Args:
        config: of a checkpoint of the run.
        abstract: of the run, on the devices where the base is needed.
        recorded: `record` of the base when the run began.

    Raises:
        CheckpointError: it is gone or damaged, or it is not what it was.
    """
    path, step = expand(config.init_from.checkpoint), int(recorded["step"])
    checkpoints = Checkpoints(path / "checkpoints", keep=1, flag="init_from.checkpoint=")
    try:
        with same_failure("checking the base of adapters", step):
            if step not in checkpoints.steps():
                raise CheckpointError(
                    f"init_from.checkpoint={path} has no checkpoint of step {step}, to which the adapters of this run "
                    "belong; put it back, or a symbolic link to it"
                )
            meta = checkpoints.meta(step)
            if record(meta) != recorded:
                raise CheckpointError(
                    f"init_from.checkpoint={path}: the weights of step {step} are not those to which the adapters of "
                    "this run belong; put those back"
                )
        return read(config, abstract, checkpoints, meta)[1]
    except DamagedCheckpoint as error:  # of the base: no checkpoint of this run is damaged
        reason = str(error).partition("; ")[0]
        raise CheckpointError(
            f"init_from.checkpoint={path}, the base of this run's adapters: {reason}; put back a copy of it"
        ) from error
