"""The state that training starts from, chosen in a fixed order; see `initial_state`. Called by `loop`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from t5like.checkpoint.checkpoints import Checkpoints
from t5like.checkpoint.init_from import InitialWeights, load_initial_weights
from t5like.checkpoint.run_directory import check_checkpoint, imported_params
from t5like.config.schema import Config
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.distributed import processes
from t5like.errors import ConfigError
from t5like.optim import train_state
from t5like.types import Batch, TrainState


class InitialState(NamedTuple):
    """A chosen source of the first state.

    Attributes:
        checkpoint: step of the run directory's own newest checkpoint, or None.
        step: number of updates that this run has already completed.
        source: where the state comes from, as the line `start` prints it.
        make: makes the state on the devices; call it once.
        previous_config: resolved config of the newest checkpoint; without one that of this run.
        weights: what was read from `init_from.checkpoint`, or None.
    """

    checkpoint: int | None
    step: int
    source: str
    make: Callable[[], TrainState]
    previous_config: Config
    weights: InitialWeights | None = None


def initial_state(
    requested: Config,
    config: Config,
    batch: Batch,
    abstract: TrainState,
    tokenizer: Tokenizer,
    checkpoints: Checkpoints,
    workdir: Path,
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
        checkpoints: this run's.
        workdir: this run's directory.

    Raises:
        CheckpointError, ConfigError, DataError: the source does not fit this run, or can't be read.
    """
    saved, init_from = checkpoints.latest(), config.init_from.checkpoint
    processes.assert_equal("checkpoint", str(saved), "use a --workdir on a file system that all share")
    previous = config
    if saved is not None:
        meta = checkpoints.meta(saved)
        check_checkpoint(meta, requested, tokenizer, workdir)
        previous = meta.config
    random = partial(train_state.new_state, config, batch, abstract)  # all parameters but those that it is given

    # The first of these that applies:
    # 1. The run's own checkpoint: parameters, optimizer state, moving average and step.
    # 2. Imported weights, which `t5like import` stores as the checkpoint of step 0: parameters only.
    # 3. init_from.checkpoint: parameters of another run; those that it does not have are random.
    # 4. Random parameters.
    if saved:
        restore = partial(checkpoints.restore, abstract, saved)
        return InitialState(saved, saved, f"after step {saved:,}", restore, previous)
    if saved == 0:
        if init_from:
            raise ConfigError(
                f"init_from.checkpoint={init_from}, but --workdir={workdir} holds imported weights; "
                "use another --workdir"
            )
        params = imported_params(workdir, abstract)
        return InitialState(saved, 0, "from the import", partial(random, params), previous)
    if init_from:
        weights = load_initial_weights(config, abstract, tokenizer)
        source = f"from step {weights.step:,} of {init_from}"
        return InitialState(saved, 0, source, partial(random, weights.params), previous, weights)
    return InitialState(saved, 0, "from random parameters", random, previous)
