"""What the tasks of `t5like rl` share: prompts from records, the reference, arrays of the last steps."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5like import tree
from t5like.config.schema import Config
from t5like.data.store.verification import Verification
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.distributed import processes
from t5like.distributed.watchdog import watchdog
from t5like.errors import ConfigError
from t5like.io.paths import cache_directory, expand
from t5like.rl import packing
from t5like.rl.experience import Experience
from t5like.rl.objective import loss_fn_of, model_batch
from t5like.rl.packing import NotPacked, Packing
from t5like.rl.prompts import PromptBatches, Prompts
from t5like.rl.reference import reference_params
from t5like.rl.scoring import jit_scores
from t5like.sharding import placement
from t5like.types import Batch, TrainState, Tree

SAMPLES = "samples.txt"  # in a run directory


class RecordTask:
    """The base of tasks that read records; see `train.task.Task` for its attributes and methods."""

    model_batch = staticmethod(model_batch)
    stores = ()

    def __init__(self, config: Config, mesh: jax.sharding.Mesh, workdir: Path, fields: Sequence[str]):
        """Read the prompts.

        Args:
            config: resolved for `mesh`.
            mesh: of the run.
            workdir: the run directory.
            fields: of the records that are needed besides those of the templates.

        Raises:
            ConfigError, DataError: the data can't be used.
        """
        if not config.tokenizer.path:
            raise ConfigError(
                f"rl.method={config.rl.method} needs a model that is trained already; use "
                "--config.init_from.checkpoint=RUN, or a --workdir with imported weights"
            )
        self._config, self._mesh, self._workdir = config, mesh, workdir
        self.directory, self.verification = cache_directory(config.data.cache_directory), Verification(())
        self.tokenizer = Tokenizer.load(expand(config.tokenizer.path), num_sentinels=config.tokenizer.num_sentinels)
        self.tokenizer.check(config.tokenizer)
        self._parts = packing.parts_of(config, mesh)
        self.loss_fn, self.spec = loss_fn_of(config), packing.spec(config, self._parts)
        self.updates_per_batch = config.rl.updates_per_rollout
        self._prompts = Prompts(config, self.tokenizer, fields, primary=processes.is_primary())
        self.data, self.batches = self._prompts.data, PromptBatches(config, len(self._prompts.train))
        self.lines = [
            f"data       {len(self._prompts.train):,} prompts, {len(self._prompts.heldout):,} held out",
            *(f"           {note}" for note in self._prompts.notes),
        ]
        self._scores: Callable[[Tree, Experience], Any] = jit_scores(config, mesh, self.spec)
        self._reference: Tree = None
        self._experiences: dict[int, tuple[Experience, Experience]] = {}

    def start(self, state: TrainState) -> None:
        """Keep the first weights, or read them again, if the loss needs a reference."""
        if self._config.rl.needs_reference:
            self._reference = reference_params(self._config, self.tokenizer, self._workdir, state)

    def rows_of(self, index: int) -> tuple[Experience, Batch]:
        """The arrays of a recent step, and all of its rows on the host: one for each answer."""
        rows, arrays = self._kept(index)
        batch, answers = rows.rows(), rows.mask_BGL.shape[1]
        if rows.encoder_BS is None:
            return arrays, batch
        encoder = {name: getattr(batch, name) for name in ("encoder_BS", "encoder_segments_BS")}
        repeated = {name: np.repeat(x, answers, axis=0) for name, x in encoder.items()}
        return arrays, batch._replace(**repeated)

    def _keep(self, index: int, rows: Experience, arrays: Experience) -> None:
        """Keep host rows and device arrays of a step, and those of the one before: it may not be reported yet."""
        recent = dict(list(self._experiences.items())[-1:])
        self._experiences = {**recent, index // self.updates_per_batch: (rows, arrays)}

    def _has(self, index: int) -> bool:
        return index // self.updates_per_batch in self._experiences

    def _kept(self, index: int) -> tuple[Experience, Experience]:
        return self._experiences[index // self.updates_per_batch]

    def _layout(self, rows: Experience) -> Packing | NotPacked:
        """Where the answers of a step are in the rows that the model reads."""
        return packing.pack(rows, self._parts) if self._config.data.packing else NotPacked()

    def _to_devices(self, rows: Any) -> Any:
        """This process's part of host arrays as global arrays."""
        return placement.all_to_global(rows, self._mesh, len(jax.tree.leaves(rows)[0]))

    def _with_reference(self, arrays: Experience, params: Tree) -> Experience:
        """Device arrays with the log-probabilities of the reference, which has the untrained parts of `params`."""
        reference = tree.merged(params, self._reference)
        with watchdog("scoring answers", times=2, mode="computing"), jax.set_mesh(self._mesh):
            log_p_BGL = self._scores(reference, arrays.answers()).log_p_BGL
        return arrays._replace(reference_log_p_BGL=log_p_BGL)
