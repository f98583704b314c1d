"""The teacher of a distillation: another run, read once onto the mesh of this one, and never saved by it.

A run is distilled from the same parameters throughout. The step of the teacher's checkpoint becomes a field of the
config when the run begins, and each checkpoint of the run identifies the teacher's parameters by their digests, beside
the data (`History.data`). Called by `train.distillation`, `inspect.replay` and `plan`.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from t5like import tree
from t5like.checkpoint import base_weights
from t5like.checkpoint.checkpoints import Checkpoints
from t5like.checkpoint.digests import Leaf
from t5like.checkpoint.metadata import Meta
from t5like.checkpoint.run_directory import check_initial_run, saved_config
from t5like.config.checks import check
from t5like.config.schema import Config
from t5like.data import pipeline
from t5like.data.store.fingerprints import fingerprint
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.distributed import processes
from t5like.distributed.watchdog import watchdog
from t5like.errors import CheckpointError, ConfigError, DamagedCheckpoint, DataError
from t5like.io.paths import expand
from t5like.optim import train_state
from t5like.sharding import auto
from t5like.sharding import mesh as meshes
from t5like.types import Tree

FIELD = "distill.teacher"


class Teacher(NamedTuple):
    """A teacher whose parameters are not in memory.

    Attributes:
        config: its model with the data and the mesh of the run, resolved.
        abstract: shape, dtype and sharding of each parameter on the mesh.
        meta: of its checkpoint.
        identity: its step and what identifies its parameters, in words.
    """

    config: Config
    abstract: Tree
    meta: Meta
    identity: str


def with_teacher_step(config: Config, workdir: Path | None) -> Config:
    """Fill in the step of the teacher's checkpoint: that of the run in `workdir`, or the newest one.

    Raises:
        CheckpointError: the teacher is no run, or has no checkpoint.
    """
    distill = config.distill
    if not distill.teacher or distill.teacher_step >= 0:
        return config
    check_initial_run(config, workdir)
    begun = workdir is not None and (workdir / "config.json").is_file()
    step = saved_config(workdir).distill.teacher_step if begun else -1
    if step < 0:  # a teacher that is still trained may have a new one by the time another process looks
        step = int(processes.broadcast("the teacher's step", str(_checkpoints(config).meta().step)))
    return dataclasses.replace(config, distill=dataclasses.replace(distill, teacher_step=step))


def open_teacher(config: Config, mesh: Mesh) -> Teacher:
    """Read what describes the teacher; `config` is resolved for `mesh` and has the teacher's step.

    Raises:
        CheckpointError: its checkpoint is missing or damaged.
        ConfigError: its model can't read the batches of the run, or does not fit on the mesh.
    """
    distill = config.distill
    saved = saved_config(expand(distill.teacher))
    model = saved.model
    if config.data.label_objective and saved.data.labels != config.data.labels:
        raise ConfigError(
            f"{FIELD}={distill.teacher} has data.labels={','.join(saved.data.labels) or 'none'}, and the run "
            f"{','.join(config.data.labels)}; use a teacher with the same labels in the same order"
        )
    if saved.data.label_objective and not config.data.label_objective:
        raise ConfigError(
            f"{FIELD}={distill.teacher} has data.objective={saved.data.label_objective} and predicts labels, and the "
            "run tokens; use a teacher that predicts tokens"
        )
    if model.architecture != config.model.architecture:
        raise ConfigError(
            f"{FIELD}={distill.teacher} has model.architecture={model.architecture}, and the run "
            f"{config.model.architecture}; batches must have the same form; use a teacher of that architecture"
        )
    free = {"dtype": config.model.dtype, "kernels": "auto", "layers": "auto", "remat": "none", "dropout_rate": 0.0}
    own = Config(
        model=dataclasses.replace(model, **free),
        tokenizer=config.tokenizer,
        data=config.data,
        train=config.train,
        mesh=config.mesh,
    )
    try:
        check(own)
        meshes.axis_sizes(own, mesh.size)
        own = auto.resolve_auto(own, mesh)
    except ConfigError as error:
        raise ConfigError(f"{FIELD}={distill.teacher}: of its model, {error}") from None
    meta = _checkpoints(config).meta(distill.teacher_step)
    base_weights.refuse_adapters(meta, FIELD, expand(distill.teacher))
    abstract = train_state.abstract_state(own, pipeline.spec(own), mesh).params
    digests = {name: leaf.digest for name, leaf in meta.weights().items()}
    identity = f"step {meta.step:,} of run {meta.run[:12]}, parameters {fingerprint(digests)}"
    return Teacher(own, tree.map_named(partial(_computed, own.model.dtype), abstract), meta, identity)


def parameters(config: Config) -> dict[str, Leaf]:
    """The stored parameters of the teacher, or their moving average if it has one.

    Raises:
        CheckpointError: its checkpoint is missing or damaged.
    """
    return _checkpoints(config).meta(config.distill.teacher_step).weights()


def check_tokenizer(config: Config, teacher: Teacher, tokenizer: Tokenizer) -> None:
    """Refuse a teacher whose tokens are others.

    Raises:
        DataError: with the tokenizer to use.
    """
    if teacher.meta.tokenizer_hash != tokenizer.hash:
        path = config.distill.teacher
        raise DataError(
            f"{FIELD}={path} has another tokenizer ({teacher.meta.config.tokenizer.vocab_size:,} ids) than the run "
            f"({tokenizer.vocab_size:,} ids), and probabilities of other tokens can't be compared; use "
            f"--config.tokenizer.path={path}/tokenizer.model"
        )


def read_params(config: Config, teacher: Teacher) -> Tree:
    """The teacher's parameters, its moving average if it has one: matrices in the dtype of the computation.

    Raises:
        CheckpointError: they are damaged, or not those of the teacher's config.
    """
    meta = teacher.meta
    stored = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding), teacher.abstract
    )
    without = () if teacher.config.model.scalar_head else ("scalar_head/.*",)
    try:
        with watchdog("reading the teacher", times=3):
            read = _checkpoints(config).restore_params(stored, meta.step, ema=meta.has_average, without=without)
    except DamagedCheckpoint as error:  # its advice is about the run of that directory
        reason = str(error).partition("; move ")[0]
        raise CheckpointError(f"{FIELD}: {reason}; use another one with --config.distill.teacher_step") from error
    leaves, wanted = tree.flatten(read), tree.flatten(teacher.abstract)
    del read  # one array at a time is cast and released
    for name, like in wanted.items():
        leaves[name] = _cast(leaves[name], like.dtype)
    return jax.tree.unflatten(jax.tree.structure(teacher.abstract), [leaves[name] for name in wanted])


def _cast(leaf: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return leaf if leaf.dtype == dtype else jax.jit(lambda x: x.astype(dtype), out_shardings=leaf.sharding)(leaf)


def _computed(dtype: str, name: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """A parameter in memory. Vectors, such as norm scales, stay in float32, in which they are used."""
    is_vector = leaf.ndim - ("/layers/" in name) < 2
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if is_vector else jnp.dtype(dtype), sharding=leaf.sharding)


def _checkpoints(config: Config) -> Checkpoints:
    return Checkpoints(expand(config.distill.teacher) / "checkpoints", keep=1, flag=f"{FIELD}=")
