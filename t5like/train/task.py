"""What the training loop trains: batches, their loss, evaluation, summary.

`loop.train` is the same for every task. `pretraining.Pretraining` trains on rows of text and on supervised examples;
`rl` has the tasks of `t5like rl`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from t5like.data.pipeline import StepBatches
from t5like.data.store.token_store import TokenStore
from t5like.data.store.verification import Verification
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.optim.step import LossFn, ModelBatch
from t5like.types import Batch, Metrics, TrainState, Tree


class Task(Protocol):
    """A task, opened for one run on one mesh.

    Attributes:
        tokenizer: of the run.
        stores: token stores of the data, one for each of `data.source`; empty if the task reads records.
        data: what identifies the data, by source (`data.store.fingerprints.describe`).
        verification: of the stores.
        directory: where the prepared data are.
        batches: the batch of each step.
        lines: facts about the data, to print.
        spec: shapes and dtypes of what the train step takes (`device_batch`), as arrays of zeros without memory.
        loss_fn, model_batch: see `optim.step.make_train_step`.
        updates_per_batch: consecutive steps with the same batch. A run stops and saves only between batches.
        summary_files: names of the files that `summarize` writes into the run directory.
    """

    tokenizer: Tokenizer
    stores: Sequence[TokenStore]
    data: Mapping[str, str]
    verification: Verification
    directory: Path
    batches: StepBatches
    lines: Sequence[str]
    spec: Any
    loss_fn: LossFn
    model_batch: ModelBatch
    updates_per_batch: int
    summary_files: Sequence[str]

    def start(self, state: TrainState) -> None:
        """Called once with the first state, before the first step."""

    def device_batch(self, state: TrainState, index: int, batch: Any) -> tuple[Any, Metrics]:
        """The global arrays that the step after `index` updates takes, and metrics of how they were made.

        Args:
            state: before the step.
            index: number of completed updates.
            batch: of `batches` for this step.
        """

    def rows_of(self, index: int) -> tuple[Any, Batch]:
        """What `device_batch` returned for a recent step again, and all of its rows on the host, for the evidence."""

    def baselines(self) -> tuple[dict[str, float], str]:
        """Metrics that need no model, and a line that shows them; called by process 0."""

    def evaluate(self, params: Tree, done: int, point: Callable[[], None], *, early: bool) -> tuple[dict, str]:
        """Held-out metrics, and the text of the line that shows them; all processes call it.

        Args:
            params: of the model, or their moving average.
            done: number of completed updates.
            point: called often; it ends the process if a signal has asked for that.
            early: one of the additional evaluations at the start of a run, which are short.
        """

    def summarize(self, params: Tree, fingerprints: Mapping[str, Any]) -> list[str]:
        """Write `summary_files`, from process 0; return the lines to print.

        Args:
            params: of the model, or their moving average.
            fingerprints: `checkpoint.provenance.fingerprints` of the run.
        """
