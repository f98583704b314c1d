"""The run directory: its files, the checks before it is written, and how other commands load a run from it.

    config.json  tokenizer.model  checkpoints/<step>/  metrics.jsonl  provenance.jsonl  tensorboard/  loss.png
    samples.txt  profile/  launch.json  logs/

`train` writes it; `t5like launch` writes launch.json and logs/ before it; the other commands read it with `load`.
"""

import contextlib
import dataclasses
import functools
import math
import os
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5like import tree
from t5like.checkpoint import base_weights, recovery
from t5like.checkpoint.allowed_changes import CHANGEABLE_FIELDS, forbidden_differences, remedy
from t5like.checkpoint.checkpoints import Checkpoints
from t5like.checkpoint.metadata import Meta
from t5like.checkpoint.run_lock import lock
from t5like.config import loader
from t5like.config.lora_schema import LoRAConfig
from t5like.config.schema import Config, MeshConfig, get
from t5like.data import pipeline
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.distributed import processes, shared_file_systems
from t5like.distributed.watchdog import end, watchdog
from t5like.errors import CheckpointError, ConfigError, DataError, shorten
from t5like.io.atomic import remove_stale_temporaries, replace_file
from t5like.io.paths import expand
from t5like.io.storage import sync
from t5like.optim import lora, train_state
from t5like.sharding import auto
from t5like.sharding import mesh as meshes
from t5like.types import Array, TrainState, Tree

LAUNCH_FILES = ("launch.json", "logs")  # written by `t5like launch` before the run starts


class Run(NamedTuple):
    """A trained model with its config and tokenizer, loaded on a mesh."""

    step: int
    config: Config  # resolved on `mesh`
    mesh: jax.sharding.Mesh
    params: Tree  # the moving average if the run has one
    tokenizer: Tokenizer


def checkpoints_of(workdir: Path, config: Config, flag: str = "--workdir=") -> Checkpoints:
    """Return the checkpoints of a run, which are kept as its config requires."""
    train = config.train
    return Checkpoints(
        workdir / "checkpoints",
        keep=train.keep_checkpoints,
        keep_every=train.keep_every,
        on_failed_save=train.on_failed_save,
        flag=flag,
    )


def load(
    workdir: Path,
    step: int | None = None,
    *,
    all_devices: bool = False,
    merged: bool = False,
    flag: str = "--workdir=",
) -> Run:
    """Load a run at a checkpoint (default: the newest that is not damaged), on any devices.

    It is loaded on one device, or on all devices of all processes: with the run's own mesh if that fits, otherwise
    sharded by fsdp as far as possible, with the batch size rounded up to a multiple of the devices. With `merged`, the
    adapters of a LoRA run are added to its kernels, and config and parameters are those of a plain model. `flag` is the
    one that named the directory, for messages.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or all are.
    """
    saved = config_of(workdir, flag)
    checkpoints = checkpoints_of(workdir, saved, flag)
    read = functools.partial(_load_step, workdir, saved, checkpoints, all_devices)
    steps = checkpoints.steps()
    if step is not None or not steps:
        run = read(step)
    else:
        readable = recovery.newest_readable(checkpoints, steps, read)
        recovery.warn(readable)
        run = readable.value
    if merged and run.config.lora.rank:
        plain = dataclasses.replace(run.config, lora=LoRAConfig())
        run = run._replace(config=plain, params=lora.merge(run.params))
    return run


def _load_step(workdir: Path, saved: Config, checkpoints: Checkpoints, all_devices: bool, step: int | None) -> Run:
    meta = checkpoints.meta(step)
    tokenizer = Tokenizer.load(workdir / "tokenizer.model", num_sentinels=meta.config.tokenizer.num_sentinels)
    check_checkpoint(meta, saved, tokenizer, workdir)
    devices = jax.devices() if all_devices else jax.devices()[:1]
    config = on_devices(meta.config, len(devices), meshes.num_slices(devices))
    mesh = meshes.make_mesh(config, devices)
    config = auto.resolve_auto(config, mesh)
    shape = train_state.abstract_state(config, pipeline.spec(config), mesh)
    with watchdog("reading a checkpoint", meta.step, times=3):
        params = checkpoints.restore_params(shape.params, meta.step, ema=shape.ema is not None)
        if config.lora.rank:
            params = tree.merged(base_weights.read_again(config, shape, meta.history.base), params)
    return Run(meta.step, config, mesh, params, tokenizer)


def check_checkpoint(meta: Meta, config: Config, tokenizer: Tokenizer, workdir: Path) -> None:
    """Refuse a checkpoint that does not belong to the run of its directory.

    Raises:
        CheckpointError: its config can't be an earlier config of the run.
        DataError: its tokenizer is not the run's tokenizer.model.
    """
    path = workdir / "checkpoints" / str(meta.step)
    if config.model.dtype == "auto":  # a checkpoint contains the resolved dtype
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=meta.config.model.dtype))
    if differs := forbidden_differences(meta.config, config, imported=meta.step == 0, allowed=CHANGEABLE_FIELDS):
        raise CheckpointError(
            f"{path} does not belong to the run in {workdir}, whose config differs: "
            f"{shorten(differs, separator='; ')}; move it away, or put the run's own config.json back"
        )
    if tokenizer.hash != meta.tokenizer_hash:
        raise DataError(
            f"{workdir / 'tokenizer.model'} is not the tokenizer of checkpoint {meta.step}; put that one back"
        )


def on_devices(config: Config, count: int, slices: int = 1) -> Config:
    """Return a config for evaluation on `count` devices: with its own mesh if that fits, otherwise with another one."""
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
    """Create a run directory from imported weights: a checkpoint of step 0 without an optimizer state."""
    open_run_directory(config, tokenizer, workdir)
    checkpoints = checkpoints_of(workdir, config)
    checkpoints.save(
        TrainState(jnp.zeros((), jnp.int32), params, None),
        config=config,
        tokenizer=tokenizer.model_bytes,
        tokenizer_hash=tokenizer.hash,
    )
    checkpoints.close()


def is_imported(workdir: Path) -> bool:
    """Whether a run directory contains imported weights that have not been trained: its newest checkpoint is step 0."""
    return (workdir / "checkpoints" / "0").is_dir() and Checkpoints(workdir / "checkpoints", keep=1).latest() == 0


def with_run_tokenizer(config: Config, workdir: Path) -> Config:
    """Fill in fields that the config leaves empty: the tokenizer of imported weights, and the ids that end a text.

    The ids are those of the run that continues, or of the run in `init_from.checkpoint`. A run that continues has a
    copy of its tokenizer, which replaces a file that is gone, such as that of weights it began with.

    Raises:
        CheckpointError: see `check_initial_run`.
        ConfigError: the run has adapters, and `init_from.checkpoint` is empty.
    """
    if config.lora.rank and not config.init_from.checkpoint:
        raise ConfigError(
            f"lora.rank={config.lora.rank} needs init_from.checkpoint, the run whose weights the adapters change; use "
            "the directory of a trained or imported run, and another --workdir"
        )
    check_initial_run(config, workdir)
    tokenizer, init, own = config.tokenizer, config.init_from, workdir / "tokenizer.model"
    gone = tokenizer.path and not expand(tokenizer.path).exists() and (workdir / "config.json").is_file()
    if (own.is_file() and gone) or (not tokenizer.path and is_imported(workdir)):
        tokenizer = dataclasses.replace(tokenizer, path=str(own))
    directories = [workdir]
    if init.checkpoint and "vocabulary" not in init.adapt:
        directories.append(Path(init.checkpoint))
    source = next((path for path in directories if (path / "config.json").is_file()), None)
    names = [name for name in ("extra_eos_ids", "decoder_start_id") if not getattr(tokenizer, name)]
    if source and names:
        saved = saved_config(source).tokenizer
        tokenizer = dataclasses.replace(tokenizer, **{name: getattr(saved, name) for name in names})
    return dataclasses.replace(config, tokenizer=tokenizer)


def imported_params(workdir: Path, abstract: TrainState) -> dict[str, Array]:
    """Read the weights of an imported run by name, with the shardings in `abstract`."""
    return Checkpoints(workdir / "checkpoints", keep=1).restore_params(tree.flatten(abstract.params), 0)


def _directory_differences(config: Config, workdir: Path, allowed: Sequence[str]) -> list[str]:
    """Return the fields that prevent a config from continuing the run of a directory."""
    if is_imported(workdir):
        return forbidden_differences(Checkpoints(workdir / "checkpoints", keep=1).meta(0).config, config, imported=True)
    return forbidden_differences(saved_config(workdir), config, allowed=allowed)


def check_run_directory(config: Config, workdir: Path, allowed: Sequence[str] = ()) -> None:
    """Refuse a directory that can't become this run's. Nothing is written, so that a refused run leaves no trace.

    `allowed`: fields of `CHANGEABLE_FIELDS` that may differ (`--allow_change`).

    Raises:
        ConfigError: it contains a run with another config, or files of another program.
        CheckpointError: it can't be written, or its config.json is damaged.
    """
    try:
        if (workdir / "config.json").exists():
            if differs := _directory_differences(config, workdir, allowed):
                imported = is_imported(workdir)
                raise ConfigError(
                    f"--workdir={workdir} holds {'weights of another model' if imported else 'another run'}: "
                    + shorten(differs, separator="; ")
                    + (f"; use its model and tokenizer sections, or --config={workdir}/config.json" if imported else "")
                    + ("" if imported else remedy(differs))
                )
        elif workdir.exists() and any(
            not entry.name.startswith(".") and entry.name not in LAUNCH_FILES for entry in workdir.iterdir()
        ):
            raise ConfigError(f"--workdir={workdir} is not empty and holds no run; use another --workdir")
        parent = next(path for path in (workdir, *workdir.parents) if path.exists())
        if not parent.is_dir():
            raise CheckpointError(f"--workdir={workdir} can't be written: {parent} is a file; use another --workdir")
        try:  # permissions are not enough: a file system may be full or read-only
            with tempfile.TemporaryFile(dir=parent):
                pass
        except OSError as error:
            raise CheckpointError(
                f"--workdir={workdir} can't be written: {parent}: {error.strerror}; use another --workdir"
            ) from None
    except OSError as error:
        raise CheckpointError(f"--workdir={workdir} can't be used: {error.strerror}; use another --workdir") from None


def check_initial_run(config: Config, workdir: Path | None) -> None:
    """Refuse a config whose teacher, or whose initial weights if the run in `workdir` has not begun, do not exist.

    Called before anything of that run is read, such as its tokenizer, so that the message names the field to change.

    Raises:
        CheckpointError: `distill.teacher`, or a checkpoint of `init_from`, holds no run.
    """
    begun = workdir and (workdir / "config.json").is_file()
    for field in ("distill.teacher", *(() if begun else ("init_from.checkpoint", "init_from.decoder_checkpoint"))):
        path = get(config, field)
        if path and not (expand(path) / "config.json").is_file():
            raise CheckpointError(f"{field}={path} contains no run; use the directory of a trained one")


def open_run_directory(config: Config, tokenizer: Tokenizer, workdir: Path, allowed: Sequence[str] = ()) -> None:
    """Create the run directory with config.json and tokenizer, or check that it contains this run; lock it.

    Raises:
        DataError: the run was started with another tokenizer.
        ConfigError, CheckpointError: see `check_run_directory`; also if another process has the lock.
    """
    if not processes.is_primary():
        # After process 0: a directory with a part of its files would be refused as that of another program.
        shared_file_systems.check_shared(workdir)
    check_run_directory(config, workdir, allowed)
    path = workdir / "tokenizer.model"
    if path.exists() and Tokenizer.load(path, num_sentinels=len(tokenizer.sentinel_ids)).hash != tokenizer.hash:
        raise DataError(
            f"{path} is not the tokenizer of the config; set --config.tokenizer.path={path} to continue with it"
        )
    if not processes.is_primary():
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        sync(workdir.parent)
        lock(workdir, on_taken=partial(end, CheckpointError.exit_code))
        remove_stale_temporaries(workdir)
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


def config_of(workdir: Path, flag: str = "--workdir=") -> Config:
    """Like `saved_config`, for a directory that a user names with `flag`.

    Raises:
        CheckpointError: there is no run, or it is damaged.
    """
    if not os.path.isfile(workdir / "config.json"):  # also of a name that is too long for any file
        raise CheckpointError(f"{flag}{workdir} holds no run; train first, or check the path")
    return saved_config(workdir)


def saved_config(workdir: Path) -> Config:
    """Read the config of the run in a directory.

    Raises:
        CheckpointError: its config.json is damaged, or of another version.
    """
    try:
        return loader.from_json((workdir / "config.json").read_bytes())
    except ConfigError as error:
        raise CheckpointError(
            f"{workdir / 'config.json'} can't be read: {error}; each checkpoint below has a copy of it"
        ) from None
