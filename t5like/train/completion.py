"""The end of a run: its summary, and whether a run that is started again is already complete.

A run is complete when the checkpoint of its last step has been read and every byte of it is good, and loss.png and
samples.txt exist. After a kill between the last checkpoint and these files, they are made when the run is started
again. Called by `loop` and `pretraining`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from t5like import tree
from t5like.checkpoint import base_weights
from t5like.checkpoint.checkpoints import Checkpoints, report
from t5like.checkpoint.step_directories import COMMITTED
from t5like.config.schema import Config, TrainConfig
from t5like.data.pipeline import Batches
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.distributed import processes
from t5like.distributed.watchdog import watchdog
from t5like.errors import CheckpointError, DamagedCheckpoint
from t5like.evaluation.samples import samples
from t5like.inference.generate import Generator
from t5like.io.atomic import replace_file
from t5like.metrics.loss_curve import draw_loss_curve
from t5like.train import evaluation_steps
from t5like.train.expected_loss import summary
from t5like.types import TrainState, Tree

SAMPLES = "samples.txt"  # in a run directory
SAMPLES_OF_STEPS = "samples"  # folder of the samples of evaluations, as STEP.txt (`evaluate.samples`)


def write_samples(
    config: Config, mesh: jax.sharding.Mesh, tokenizer: Tokenizer, heldout: Batches, params: Tree, path: Path
) -> str:
    """Write samples of the held-out passages to a file, from process 0, and return them.

    Raises:
        CheckpointError: the file can't be written.
    """
    with watchdog("showing samples", times=2, mode="computing"):
        text = samples(Generator(config, params, tokenizer), heldout, mesh)
    if processes.is_primary():
        path.parent.mkdir(exist_ok=True)
        replace_file(path, text, CheckpointError, "move it away")
    return text


def write_summary(
    config: Config,
    mesh: jax.sharding.Mesh,
    tokenizer: Tokenizer,
    heldout: Batches,
    workdir: Path,
    fingerprints: dict[str, Any],
    params: Tree,
) -> list[str]:
    """Write samples.txt and loss.png, from process 0; return the lines to print: samples, result, path of the curve.

    Raises:
        CheckpointError: they can't be written.
    """
    text = write_samples(config, mesh, tokenizer, heldout, params, workdir / SAMPLES)
    if not processes.is_primary():
        return []
    picture = draw_loss_curve(workdir)
    return [*f"\n{text}\n{summary(workdir, config, fingerprints)}".split("\n"), f"loss curve  {picture}"]


def complete_run(
    checkpoints: Checkpoints,
    step: int,
    train: TrainConfig,
    abstract: TrainState,
    workdir: Path,
    open_directory: Callable[[], None],
    summary_files: Sequence[str],
    summarize: Callable[[Tree], list[str]],
) -> list[str] | None:
    """Return the lines to print about a run that is complete; None if it is not.

    The last checkpoint may be damaged, or a signal may have interrupted the last evaluation.

    Args:
        checkpoints: of the run.
        step: of the newest checkpoint, at least `num_steps`.
        train: section of the config.
        abstract: shape, dtype and sharding of every leaf of the state.
        workdir: the run directory.
        open_directory: locks the run directory; called before something is written.
        summary_files: names of the files that `summarize` writes.
        summarize: writes them for the parameters of the run; returns the lines to print.
    """
    with watchdog("verifying the last checkpoint", step, mode="computing"):  # process 0 reads all of it
        if reason := processes.broadcast("the last checkpoint", _damage(checkpoints, step)):
            report(f"WARNING: {reason.partition('; ')[0]}; the run is not complete")
            return None
    num_steps = train.num_steps
    if step == num_steps and evaluation_steps.is_missing(train, step, workdir):
        return None
    lines = []
    unfinished = str(int(step == num_steps and not _has_summary(workdir, step, summary_files)))
    if processes.broadcast("the summary", unfinished) == "1":
        open_directory()
        ema = abstract.ema is not None
        with watchdog("reading a checkpoint", step, times=3):
            params = checkpoints.restore_params(abstract.ema if ema else abstract.params, step, ema=ema)
            if abstract.base is not None:
                meta = checkpoints.meta(step)
                params = tree.merged(base_weights.read_again(meta.config, abstract, meta.history.base), params)
        lines = summarize(params)
    done = f"{step:,} of {num_steps:,} steps are done"
    return [*lines, f"complete   {done}; nothing is left to train in {workdir}"]


def _damage(checkpoints: Checkpoints, step: int) -> str:
    if not processes.is_primary():
        return ""
    try:
        checkpoints.verify(step)
        return ""
    except DamagedCheckpoint as error:
        return str(error)


def _has_summary(workdir: Path, step: int, names: Sequence[str]) -> bool:
    """Whether the files of the summary are not older than the last checkpoint, as after a run that was extended."""
    committed = workdir / "checkpoints" / str(step) / COMMITTED
    try:
        since = committed.stat().st_mtime
        return all((workdir / name).stat().st_mtime >= since for name in names)
    except OSError:
        return False
