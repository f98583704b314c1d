"""The checkpoint that is used when the newest one is damaged: the newest that can be read, the same in all processes.

A damaged checkpoint is never the end of a run as long as an earlier one is good, and never silent: a line on standard
error names it. Training sets it aside (renames it), but only after an earlier one has been read: if nothing can be
read, the reason may be the storage, and nothing is renamed. Commands that only read rename nothing. Without any good
checkpoint there is an error, never a fresh start. Called by `train.initial_state` and `run_directory.load`.
"""

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from t5like.checkpoint import step_directories
from t5like.checkpoint.agreement import same_failure
from t5like.checkpoint.checkpoints import Checkpoints, report
from t5like.distributed import processes
from t5like.errors import CheckpointError, DamagedCheckpoint

Value = TypeVar("Value")


class Readable(NamedTuple):
    """The newest checkpoint that could be read.

    Attributes:
        step: of the checkpoint.
        value: what was read from it.
        damaged: why each later one could not be read, by step, the newest first.
    """

    step: int
    value: object
    damaged: dict[int, str]


def newest_readable(checkpoints: Checkpoints, steps: Sequence[int], read: Callable[[int], Value]) -> Readable:
    """Read the newest of some checkpoints that is not damaged; all processes choose the same.

    Args:
        checkpoints: of the run.
        steps: steps to choose from, at least one; those of process 0 are used.
        read: called with a step, after its metadata were checked; raises DamagedCheckpoint in all processes or in none.

    Raises:
        DamagedCheckpoint: none can be read.
        CheckpointError: one does not belong to this run.
    """
    damaged: dict[int, str] = {}
    steps = json.loads(processes.broadcast("the checkpoints", json.dumps(list(steps))))
    for step in sorted(steps, reverse=True):
        try:
            with same_failure("checking a checkpoint", step):
                checkpoints.meta(step)
            return Readable(step, read(step), damaged)
        except DamagedCheckpoint as error:
            damaged[step] = str(error)
    first, *others = damaged.values()
    if not others:
        raise DamagedCheckpoint(first)
    raise DamagedCheckpoint(
        f"no checkpoint can be read: {first.partition('; ')[0]}; the others neither ({', '.join(map(str, damaged))}); "
        "restore one of them from a copy, or use another --workdir"
    )


def set_aside(checkpoints: Checkpoints, readable: Readable) -> None:
    """Rename the damaged checkpoints that are newer than the one that was read. All processes call it.

    Raises:
        CheckpointError: one can't be renamed.
    """
    for step, reason in readable.damaged.items():
        if processes.is_primary():
            path = checkpoints.set_aside(step)
            report(
                f"WARNING: {reason.partition('; ')[0]}; it is kept as {path.name}, "
                f"and the run continues after step {readable.step}"
            )
    if readable.damaged:
        processes.barrier("setting a checkpoint aside")


def warn(readable: Readable) -> None:
    """Report the damaged checkpoints that are newer than the one that was read, without changing them."""
    for reason in readable.damaged.values():
        report(f"WARNING: {reason.partition('; ')[0]}; the checkpoint of step {readable.step} is used instead")


def report_incomplete(checkpoints: Checkpoints) -> None:
    """Report what killed saves and deletions have left after the newest complete checkpoint; the next save removes it.

    Raises:
        CheckpointError: the directory can't be read.
    """
    newest = checkpoints.latest()
    try:
        later = [
            step
            for step, path in step_directories.list_steps(checkpoints.directory).items()
            if (newest is None or step > newest) and step_directories.is_checkpoint(path)
        ]
    except OSError as error:
        raise CheckpointError(f"{checkpoints.directory} can't be read: {error.strerror}; check the disk") from None
    for step in sorted(later):
        report(
            f"{checkpoints.directory / str(step)} is incomplete: its save or its deletion was interrupted; "
            "it is not used, and the next save removes it"
        )
