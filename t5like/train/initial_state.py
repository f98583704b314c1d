"""The state that training starts from, chosen in a fixed order; see `initial_state`. Called by `loop`."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5like.checkpoint import base_weights, recovery
from t5like.checkpoint.allowed_changes import CHANGEABLE_FIELDS, DATA
from t5like.checkpoint.checkpoints import Checkpoints
from t5like.checkpoint.init_from import InitialWeights, load_initial_weights
from t5like.checkpoint.metadata import History, Meta, first_history
from t5like.checkpoint.run_directory import check_checkpoint, imported_params
from t5like.config import loader
from t5like.config.schema import Config
from t5like.data.store.fingerprints import data_differences
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.distributed import processes
from t5like.distributed.watchdog import watchdog
from t5like.errors import ConfigError, DataError, shorten
from t5like.optim import bad_steps, train_state
from t5like.types import Batch, TrainState, Tree


class InitialState(NamedTuple):
    """A chosen source of the first state.

    Attributes:
        checkpoint: step of the run directory's own newest checkpoint, or None.
        step: number of updates that this run has already completed; fewer if that checkpoint turns out to be damaged.
        make: makes the state on the devices; call it once.
        previous_config: resolved config of the newest checkpoint; without one that of this run.
        weights: what was read from `init_from.checkpoint`, or None.
        changes: how config and data differ from those of the checkpoint, as ``field: old -> new``.
    """

    checkpoint: int | None
    step: int
    make: Callable[[], "FirstState"]
    previous_config: Config
    weights: InitialWeights | None = None
    changes: tuple[str, ...] = ()


class FirstState(NamedTuple):
    """A state on the devices.

    Attributes:
        state: parameters, optimizer state and step.
        source: where it comes from, as the line `start` prints it.
        history: of that state; its rows are those of this run's batch size from its step on.
    """

    state: TrainState
    source: str
    history: History


def initial_state(
    requested: Config,
    config: Config,
    batch: Batch,
    abstract: TrainState,
    tokenizer: Tokenizer,
    checkpoints: Checkpoints,
    workdir: Path,
    data: Mapping[str, str],
    allowed: Sequence[str] = (),
) -> InitialState:
    """Choose the source of the first state and check that it fits. Weights from elsewhere are read here.

    Nothing is written, so that a run that can't start leaves no trace; `InitialState.make` makes the state later,
    while the train step compiles. Only parameters that no source contains are initialized at random.

    Args:
        requested: the config as the run directory stores it.
        config: the resolved config.
        batch: gives shapes only.
        abstract: shape, dtype and sharding of every leaf of the state.
        tokenizer: this run's.
        checkpoints, workdir: this run's.
        data: of this run, see `History.data`.
        allowed: what may differ from the checkpoint, see `allowed_changes`.

    Raises:
        CheckpointError, ConfigError, DataError: the source does not fit this run, or can't be read.
    """
    init_from, steps = config.init_from.checkpoint, checkpoints.steps()
    newest = max(steps, default=None)
    processes.assert_equal("checkpoint", str(newest), "use a --workdir on a file system that all share")
    recovery.report_incomplete(checkpoints)
    random = partial(train_state.new_state, config, batch, abstract)  # all parameters but those that it is given
    history = first_history(config)._replace(data=data)

    # The first of these that applies:
    # 1. The run's own checkpoint: parameters, optimizer state, moving average and step.
    # 2. Imported weights, which `t5like import` stores as the checkpoint of step 0: parameters only.
    # 3. init_from.checkpoint: parameters of another run; those that it does not have are random.
    # 4. Random parameters.
    if steps:

        def check(step: int) -> tuple[Meta, History, tuple[str, ...]]:
            meta = checkpoints.meta(step)
            check_checkpoint(meta, requested, tokenizer, workdir)
            return meta, *_continued(meta, config, data, allowed, workdir)

        def read(step: int) -> TrainState:
            if step:
                return restore_state(checkpoints, abstract, step)
            return random(imported_params(workdir, abstract))

        return _from_checkpoints(config, checkpoints, steps, check, read, workdir)
    if init_from:
        weights = load_initial_weights(config, abstract, tokenizer)
        start = history._replace(base=weights.record)
        make = lambda: FirstState(random(weights.params, weights.base), f"from {weights.source}", start)
        return InitialState(None, 0, make, config, weights)
    return InitialState(None, 0, lambda: FirstState(random(), "from random parameters", history), config)


def _from_checkpoints(
    config: Config,
    checkpoints: Checkpoints,
    steps: Sequence[int],
    check: Callable[[int], tuple[Meta, History, tuple[str, ...]]],
    read: Callable[[int], TrainState],
    workdir: Path,
) -> InitialState:
    """Choose the newest checkpoint whose metadata are good; if its arrays turn out to be damaged, one before it.

    Args:
        config: the resolved config.
        checkpoints: this run's.
        steps: of the complete checkpoints.
        check: returns metadata, history and changes of a checkpoint that fits.
        read: returns its state.
        workdir: this run's directory.
    """

    def checked_read(step: int) -> FirstState:
        _, history, _ = check(step)
        with watchdog("reading a checkpoint", step, times=3):
            return FirstState(read(step), f"after step {step:,}" if step else "from the import", history)

    def make() -> FirstState:
        readable = recovery.newest_readable(checkpoints, steps, checked_read)
        recovery.set_aside(checkpoints, readable)
        return readable.value

    readable = recovery.newest_readable(checkpoints, steps, check)
    if readable.step == 0 and (init_from := config.init_from.checkpoint):
        text = f"init_from.checkpoint={init_from}, but --workdir={workdir} holds imported weights"
        raise ConfigError(f"{text}; use another --workdir")
    if readable.step >= config.train.num_steps:  # otherwise a line is printed when they are set aside
        recovery.warn(readable)
    meta, _, changes = readable.value
    return InitialState(max(steps), readable.step, make, meta.config, changes=changes if readable.step else ())


def _continued(
    meta: Meta, config: Config, data: Mapping[str, str], allowed: Sequence[str], workdir: Path
) -> tuple[History, tuple[str, ...]]:
    """The history of a run that continues from a checkpoint, and how its config and data differ from those of that.

    Raises:
        DataError: the data differ, and `allowed` does not contain them.
    """
    changed = data_differences(meta.history.data, data)
    if changed and DATA not in allowed:
        raise DataError(
            f"the data differ from those that the run in {workdir} was trained on: "
            f"{shorten(changed, separator='; ')}; put them back, or add --allow_change={DATA} to continue"
        )
    changes = (*loader.difference(meta.config, config), *(f"{DATA}: {line}" for line in changed))
    rows = meta.history.rows.with_batch_size(meta.step, config.data.batch_size)
    history = meta.history._replace(rows=rows, data=data)
    if any(line.startswith(CHANGEABLE_FIELDS) for line in changes):
        history = history._replace(rewinds=0, bad_steps=0)  # the counts are of the settings that were changed
    return history, changes


def restore_state(checkpoints: Checkpoints, abstract: TrainState, step: int, base: Tree | None = None) -> TrainState:
    """Read the state of a checkpoint with or without `recent`, because `train.spike_factor` may have changed.

    The base of a LoRA run is read from where its weights are, unless it is given.
    """
    meta = checkpoints.meta(step)
    if abstract.base is not None:
        base = base_weights.read_again(meta.config, abstract, meta.history.base) if base is None else base
        return restore_state(checkpoints, abstract._replace(base=None), step)._replace(base=base)
    stored = "recent" in meta.leaves
    sharding = abstract.step.sharding
    window = jax.ShapeDtypeStruct((2, bad_steps.WINDOW), jnp.float32, sharding=sharding)
    state = checkpoints.restore(abstract._replace(recent=window if stored else None), step)
    if abstract.recent is None:
        return state._replace(recent=None)
    return state if stored else state._replace(recent=jax.device_put(bad_steps.new_window(), sharding))
