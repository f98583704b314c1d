"""The steps after which the training loop evaluates. Called by `loop`."""

from t5like.config.schema import TrainConfig
from t5like.distributed import processes
from t5like.metrics.writers import Writer


def early_evaluations(config: TrainConfig) -> set[int]:
    """Steps before `train.eval_every` that are evaluated too, because the loss curve is steep at its beginning."""
    every, count = config.eval_every, config.early_evals
    return {-(-every // 2**halving) for halving in range(1, min(count, every.bit_length()) + 1)} - {every}


def is_missing(config: TrainConfig, start: int, writer: Writer) -> bool:
    """Whether the evaluation of the step after which a run continues was interrupted by a signal, in all processes."""
    if start % config.eval_every and start not in early_evaluations(config):
        return False
    return bool(processes.broadcast("the interrupted evaluation", "" if writer.has(start, "eval/loss") else "missing"))
