"""The reference of a KL divergence or of DPO: the first weights of the run, kept in its directory.

    reference/0/   a checkpoint of the parameters alone, with digests

It is written before the first step and never deleted, so that a run can be resumed when `init_from.checkpoint` is gone.
"""

from pathlib import Path

import jax
import jax.numpy as jnp

from t5like.checkpoint.checkpoints import Checkpoints
from t5like.config.schema import Config
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.distributed import processes
from t5like.distributed.watchdog import watchdog
from t5like.errors import CheckpointError, DamagedCheckpoint
from t5like.types import TrainState, Tree

FOLDER = "reference"  # in a run directory


def reference_params(config: Config, tokenizer: Tokenizer, workdir: Path, state: TrainState) -> Tree:
    """The run's first parameters, read from its directory, or written there before the first step.

    Args:
        config: of the run.
        tokenizer: of the run.
        workdir: the run directory.
        state: the state that the run starts or continues with; it is not kept.

    Raises:
        CheckpointError: the reference is damaged or missing, or can't be written.
    """
    checkpoints = Checkpoints(workdir / FOLDER, keep=1)
    with watchdog("keeping the reference", times=3):
        exists = processes.broadcast("the reference", "yes" if checkpoints.latest() == 0 else "")
        if not exists and int(state.step) > 0:
            raise CheckpointError(f"{workdir / FOLDER} is missing; put it back, it has the run's first weights")
        if not exists:
            zero = jax.jit(jnp.zeros_like, out_shardings=state.step.sharding)(state.step)  # on all processes
            checkpoints.save(
                TrainState(zero, state.params, None),
                config=config,
                tokenizer=tokenizer.model_bytes,
                tokenizer_hash=tokenizer.hash,
            )
            checkpoints.close()
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.params)
        try:
            return Checkpoints(workdir / FOLDER, keep=1).restore_params(abstract, 0)
        except DamagedCheckpoint as error:  # there is no earlier one, which its advice is about
            reason = str(error).partition("; move ")[0]
            raise CheckpointError(f"{reason}; put a copy of it back, it has the run's first weights") from error
