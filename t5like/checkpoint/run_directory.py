"""What a run directory holds, and how a finished or running run is opened again by another command.

    config.json  tokenizer.model  checkpoints/<step>/  metrics.jsonl  provenance.jsonl  tensorboard/  loss.png
    samples.txt  profile/

`train` writes it; `main`'s other commands read it through `load`.
"""

import contextlib
import dataclasses
import math
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5like import tree
from t5like.checkpoint.checkpoints import Checkpoints
from t5like.checkpoint.metadata import Meta
from t5like.checkpoint.run_lock import lock
from t5like.config import loader
from t5like.config.schema import Config, MeshConfig
from t5like.data import pipeline
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.distributed import processes, shared_file_systems
from t5like.distributed.watchdog import watchdog
from t5like.errors import CheckpointError, ConfigError, DataError, shorten
from t5like.io.atomic import replace_file
from t5like.optim import step as steps
from t5like.sharding import auto
from t5like.sharding import mesh as meshes
from t5like.types import Array, TrainState, Tree

# What may differ when a run continues: how it runs and what it reports, not what it learns. A longer num_steps
# stretches schedules that depend on it; the loop says so.
MUTABLE_FIELDS = (
    "mesh.",
    "train.num_steps",
    "train.log_every",
    "train.eval_every",
    "train.early_evals",
    "train.eval_batches",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.profile_step",
    "train.process_timeout_seconds",
    "train.max_skipped_updates",
    "train.microbatches",
    "train.loss_chunk",
    "train.compiler_options",
    "data.cache_directory",
    "data.source_names",
    "data.num_workers",
    "data.prefetch",
    "model.layers",
    "model.remat",
    "model.kernels",
    "tokenizer.path",
    "tokenizer.extra_eos_ids",
    "evaluate.",
)


# What may differ, with all that isn't the model, as long as nothing was learned since an import.
MUTABLE_AFTER_IMPORT = ("dropout_rate", "dtype", "layers", "kernels", "remat", "max_length")


class Run(NamedTuple):
    """A trained model with all that belongs to it."""

    step: int
    config: Config  # settled on `mesh`
    mesh: jax.sharding.Mesh
    params: Tree  # the moving average, where the run keeps one
    tokenizer: Tokenizer


def checkpoints_of(workdir: Path, config: Config) -> Checkpoints:
    """The run's checkpoints, kept as its config says."""
    return Checkpoints(workdir / "checkpoints", keep=config.train.keep_checkpoints, keep_every=config.train.keep_every)


def load(workdir: Path, step: int | None = None, *, all_devices: bool = False) -> Run:
    """Open a run at a checkpoint (default: the latest), whatever it was trained on.

    On one device, or on all devices of all processes: on the run's own mesh if they fit it, else split by fsdp as far
    as it goes; the batch is then rounded up to what they can share.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    saved = config_of(workdir)
    checkpoints = checkpoints_of(workdir, saved)
    meta = checkpoints.meta(step)
    tokenizer = Tokenizer.load(workdir / "tokenizer.model", num_sentinels=meta.config.tokenizer.num_sentinels)
    check_checkpoint(meta, saved, tokenizer, workdir)
    devices = jax.devices() if all_devices else jax.devices()[:1]
    config = on_devices(meta.config, len(devices), meshes.num_slices(devices))
    mesh = meshes.make_mesh(config, devices)
    config = auto.resolve_auto(config, mesh)
    shape = steps.abstract_state(config, pipeline.spec(config), mesh)
    with watchdog("reading a checkpoint", meta.step, times=3):
        params = checkpoints.restore_params(shape.params, meta.step, ema=shape.ema is not None)
    return Run(meta.step, config, mesh, params, tokenizer)


def check_checkpoint(meta: Meta, config: Config, tokenizer: Tokenizer, workdir: Path) -> None:
    """Refuse a checkpoint that does not belong to the run in whose directory it lies.

    Raises:
        CheckpointError: it was saved with a config that can't be an earlier one of the run.
        DataError: it was saved with another tokenizer than the run's tokenizer.model.
    """
    path = workdir / "checkpoints" / str(meta.step)
    if config.model.dtype == "auto":  # a checkpoint has what that was on the run's devices
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=meta.config.model.dtype))
    if differs := _what_differs(meta.config, config, imported=meta.step == 0):
        raise CheckpointError(
            f"{path} is not of the run in {workdir}, whose config differs: {shorten(differs, separator='; ')}; "
            "move it away, or put the run's own config.json back"
        )
    if tokenizer.hash != meta.tokenizer_hash:
        raise DataError(
            f"{workdir / 'tokenizer.model'} is not the tokenizer of checkpoint {meta.step}; put that one back"
        )


def on_devices(config: Config, count: int, slices: int = 1) -> Config:
    """A config for evaluation on so many devices in so many slices: its own mesh if that fits, else one that does."""
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, microbatches=1),
        mesh=dataclasses.replace(config.mesh, slices=slices),
    )
    with contextlib.suppress(ConfigError):
        meshes.axis_sizes(config, count)
        return config
    fsdp = math.gcd(config.model.model_dim, count // slices)
    rows = -(-config.data.batch_size // count) * count
    return dataclasses.replace(
        config,
        mesh=MeshConfig(data=count // fsdp, fsdp=fsdp, slices=slices),
        data=dataclasses.replace(config.data, batch_size=rows),
    )


def write_imported(params: Tree, config: Config, tokenizer: Tokenizer, workdir: Path) -> None:
    """Make a run directory of weights from elsewhere: a checkpoint of step 0 without an optimizer's state."""
    open_run_directory(config, tokenizer, workdir)
    checkpoints = checkpoints_of(workdir, config)
    checkpoints.save(
        TrainState(jnp.zeros((), jnp.int32), params, None),
        config=config,
        tokenizer=tokenizer.model_bytes,
        tokenizer_hash=tokenizer.hash,
    )
    checkpoints.close()


def imported(workdir: Path) -> bool:
    """Whether a run directory holds weights from elsewhere, with which nothing was learned yet: those of step 0."""
    return (workdir / "checkpoints" / "0").is_dir() and Checkpoints(workdir / "checkpoints", keep=1).latest() == 0


def with_run_tokenizer(config: Config, workdir: Path) -> Config:
    """The config with what it does not name itself: the tokenizer of imported weights, and the ids that end a text.

    The ids are those of the run that continues, or of the one that `init_from.checkpoint` begins with.
    """
    tokenizer, init = config.tokenizer, config.init_from
    if not tokenizer.path and imported(workdir):
        tokenizer = dataclasses.replace(tokenizer, path=str(workdir / "tokenizer.model"))
    origins = [workdir]
    if init.checkpoint and "vocabulary" not in init.adapt:
        origins.append(Path(init.checkpoint))
    origin = next((path for path in origins if (path / "config.json").is_file()), None)
    if origin and not tokenizer.extra_eos_ids:
        tokenizer = dataclasses.replace(tokenizer, extra_eos_ids=saved_config(origin).tokenizer.extra_eos_ids)
    return dataclasses.replace(config, tokenizer=tokenizer)


def imported_params(workdir: Path, abstract: TrainState) -> dict[str, Array]:
    """The weights of an imported run by name, each where `abstract` says it lives."""
    return Checkpoints(workdir / "checkpoints", keep=1).restore_params(tree.flatten(abstract.params), 0)


def _differs(config: Config, workdir: Path) -> list[str]:
    """The fields that keep a config from going on with a run directory."""
    if imported(workdir):
        return _what_differs(Checkpoints(workdir / "checkpoints", keep=1).meta(0).config, config, imported=True)
    return _what_differs(saved_config(workdir), config)


def _what_differs(old: Config, new: Config, *, imported: bool = False) -> list[str]:
    """What keeps `new` from going on where `old` stopped; imported: `old` is of weights from elsewhere."""
    lines = loader.difference(old, new)
    if not imported:
        return [line for line in lines if not line.startswith(MUTABLE_FIELDS)]
    fixed = ("model.", "tokenizer.vocab_size", "tokenizer.num_sentinels")
    free = tuple(f"model.{name}:" for name in MUTABLE_AFTER_IMPORT)
    if new.model.positions == "learned":
        free = tuple(name for name in free if name != "model.max_length:")
    free += ("model.vocab_multiple:",) if old.vocab_rows == new.vocab_rows else ()
    return [line for line in lines if line.startswith(fixed) and not line.startswith(free)]


def check_run_directory(config: Config, workdir: Path) -> None:
    """Refuse a directory that could not take this run. Changes nothing, so that a run that can't begin leaves no trace.

    Raises:
        ConfigError: it holds a run that learns something else, or a stranger's files.
        CheckpointError: it can't be written, or its config.json is damaged.
    """
    try:
        if (workdir / "config.json").exists():
            if differs := _differs(config, workdir):
                born = imported(workdir)
                raise ConfigError(
                    f"--workdir={workdir} holds {'weights of another model' if born else 'another run'}: "
                    + shorten(differs, separator="; ")
                    + (f"; use its model and tokenizer sections, or --config={workdir}/config.json" if born else "")
                    + "; use another --workdir" * (not born)
                )
        elif workdir.exists() and any(not entry.name.startswith(".") for entry in workdir.iterdir()):
            raise ConfigError(f"--workdir={workdir} is not empty and holds no run of ours; use another --workdir")
        parent = next(path for path in (workdir, *workdir.parents) if path.exists())
        if not parent.is_dir():
            raise CheckpointError(f"--workdir={workdir} can't be written: {parent} is a file; use another --workdir")
        try:  # permissions alone don't tell: a file system may be full, or mounted for reading
            with tempfile.TemporaryFile(dir=parent):
                pass
        except OSError as error:
            raise CheckpointError(
                f"--workdir={workdir} can't be written: {parent}: {error.strerror}; use another --workdir"
            ) from None
    except OSError as error:
        raise CheckpointError(f"--workdir={workdir} can't be used: {error.strerror}; use another --workdir") from None


def open_run_directory(config: Config, tokenizer: Tokenizer, workdir: Path) -> None:
    """Make the run directory with its config.json and tokenizer, or check that it holds this very run; lock it.

    Raises:
        DataError: the run began with another tokenizer.
        ConfigError, CheckpointError: see `check_run_directory`; also if another process has the lock.
    """
    if not processes.is_primary():
        shared_file_systems.check_shared(
            workdir
        )  # after process 0: half of what it writes would look like a stranger's files
    check_run_directory(config, workdir)
    path = workdir / "tokenizer.model"
    if path.exists() and Tokenizer.load(path, num_sentinels=len(tokenizer.sentinel_ids)).hash != tokenizer.hash:
        raise DataError(
            f"{path} is not the tokenizer that the config gives; set --config.tokenizer.path={path} to go on with it"
        )
    if not processes.is_primary():
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock(workdir)
        for name, content in (
            ("config.json", loader.to_json(config).encode()),
            ("tokenizer.model", tokenizer.model_bytes),
        ):
            replace_file(workdir / name, content)
    except OSError as error:
        raise CheckpointError(
            f"--workdir={workdir} can't be written: {error.strerror}; use another --workdir"
        ) from None
    shared_file_systems.check_shared(workdir)


def config_of(workdir: Path) -> Config:
    """As `saved_config`, of a directory that a user names.

    Raises:
        CheckpointError: there is no run, or it is damaged.
    """
    if not os.path.isfile(workdir / "config.json"):  # also of a name that is too long for any file
        raise CheckpointError(f"--workdir={workdir} holds no run; train first, or check the path")
    return saved_config(workdir)


def saved_config(workdir: Path) -> Config:
    """The config of the run in a directory.

    Raises:
        CheckpointError: its config.json is damaged, or of another version.
    """
    try:
        return loader.from_json((workdir / "config.json").read_bytes())
    except ConfigError as error:
        raise CheckpointError(
            f"{workdir / 'config.json'} can't be read: {error}; each checkpoint below has a copy of it"
        ) from None
