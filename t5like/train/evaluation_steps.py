"""The steps after which the training loop evaluates. Called by `loop`."""

from pathlib import Path

from t5like.config.schema import TrainConfig
from t5like.distributed import processes
from t5like.metrics import writers


def early_evaluations(config: TrainConfig) -> set[int]:
    """Steps before `train.eval_every` that are evaluated too, because the loss curve is steep at its beginning."""
    every, count = config.eval_every, config.early_evals
    return {-(-every // 2**halving) for halving in range(1, min(count, every.bit_length()) + 1)} - {every}


def is_missing(config: TrainConfig, step: int, workdir: Path) -> bool:
    """Whether a signal interrupted the evaluation after a completed step; the same value in all processes."""
    if step != config.num_steps and step % config.eval_every and step not in early_evaluations(config):
        return False
    done = processes.is_primary() and any(
        row["step"] == step and any(name.startswith("eval/") for name in row) for row in writers.read(workdir)
    )
    return bool(processes.broadcast("the interrupted evaluation", "" if done else "missing"))
