"""Statistics of layers every `train.stats_every` steps, and the thread that compiles the programs of a run.

Called by `loop` and `report`; `optim.layer_statistics` computes them.
"""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from t5like.config.schema import Config
from t5like.distributed.watchdog import watchdog
from t5like.optim import layer_statistics
from t5like.optim.programs import ProgramsByShape
from t5like.train.task import Task
from t5like.types import TrainState

KEY = "statistics"  # of a step, among its metrics
PREFIX = "stats"  # of their names in the metrics


class LayerStatistics:
    """Statistics of the layers at steps that are multiples of `train.stats_every`; none, and no program, if it is 0."""

    def __init__(self, pool: ThreadPoolExecutor, config: Config, task: Task, abstract: TrainState):
        """Compile the program in `pool`, while the first steps run."""
        self._every, self._program = config.train.stats_every, None
        if 0 < self._every <= config.train.num_steps:
            compiled_for = lambda batch: layer_statistics.compile_statistics(
                config, batch, abstract, task.loss_fn, task.model_batch
            )
            self._program = pool.submit(ProgramsByShape, compiled_for, task.spec)

    def __call__(self, state: TrainState, done: int, batch: Any) -> dict[str, Any]:
        """Metrics to add to those of update `done`, which is about to be made from this state on this batch."""
        if self._program is None or done % self._every:
            return {}
        with watchdog("compiling the statistics of layers", done, times=3, mode="computing"):
            program = self._program.result()
            if not program.has(batch):
                program.compile_for(batch)
        return {KEY: program(state, batch)}


def take(sums: dict[str, Any]) -> dict[str, float]:
    """Remove the statistics from the metrics of a step, on the host; returns them by name, none without them."""
    return {f"{PREFIX}/{name}": value for name, value in layer_statistics.by_name(sums.pop(KEY, {})).items()}


@contextlib.contextmanager
def compiling_thread() -> Iterator[ThreadPoolExecutor]:
    """A thread for compiling. Exceptions in the main thread do not wait for it: compiling may take minutes."""
    pool = ThreadPoolExecutor(1)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False)
