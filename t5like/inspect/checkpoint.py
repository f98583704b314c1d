"""`t5like inspect checkpoint`: the checkpoints of a run directory, their sizes and dates, and which of them are good.

Nothing is changed, and neither devices nor the model are needed. Without --verify only the metadata are read; with it
all arrays are read and compared with their digests. Called by `cli.commands`.
"""

import os
import time
from pathlib import Path
from typing import NamedTuple

from t5like.checkpoint import step_directories
from t5like.checkpoint.checkpoints import Checkpoints
from t5like.checkpoint.run_directory import checkpoints_of, config_of
from t5like.checkpoint.step_directories import COMMITTED, SET_ASIDE
from t5like.errors import CheckpointError
from t5like.io.storage import format_bytes


class Row(NamedTuple):
    """A directory below checkpoints/.

    Attributes:
        step: of the checkpoint.
        size: bytes of all its files.
        saved: when it was saved, in seconds since 1970.
        state: what is known about it, in words.
        damaged: whether it is a step that can't be used.
    """

    step: int
    size: int
    saved: float
    state: str
    damaged: bool = False


def inspect_checkpoints(workdir: Path, *, verify: bool) -> tuple[list[Row], CheckpointError | None]:
    """Describe the checkpoints of a run, ascending by step.

    Returns:
        The rows, and an error that names the damaged checkpoints, or None.

    Raises:
        CheckpointError: there is no run, or its directory can't be read.
    """
    checkpoints = checkpoints_of(workdir, config_of(workdir))
    rows = []
    try:
        entries = sorted(checkpoints.directory.iterdir()) if checkpoints.directory.exists() else []
    except OSError as error:
        raise CheckpointError(f"{checkpoints.directory} can't be read: {error.strerror}; check the disk") from None
    for path in entries:
        if step_directories.STEP.fullmatch(path.name):
            rows.append(_step_row(checkpoints, path, verify=verify))
        elif match := SET_ASIDE.fullmatch(path.name):
            rows.append(Row(int(match[1]), *_size_and_time(path), f"set aside as {path.name}"))
    rows.sort(key=lambda row: row.step)
    damaged = [str(row.step) for row in rows if row.damaged]
    good = [str(row.step) for row in rows if row.state == "good"]
    if not damaged:
        return rows, None
    usable = (
        f"good: {', '.join(good)}" if good else "no other is good" if verify else "use --verify to check the others"
    )
    return rows, CheckpointError(f"{checkpoints.directory} has damaged checkpoints: {', '.join(damaged)}; {usable}")


def _step_row(checkpoints: Checkpoints, path: Path, *, verify: bool) -> Row:
    size, saved = _size_and_time(path)
    step = int(path.name)
    if not (path / COMMITTED).exists():
        return Row(step, size, saved, "incomplete: a save or a deletion was interrupted; the next save removes it")
    try:
        if verify:
            checkpoints.verify(step)
        else:
            checkpoints.meta(step)
    except CheckpointError as error:
        return Row(step, size, saved, str(error).removeprefix(f"{path} "), damaged=True)
    return Row(step, size, saved, "good" if verify else "complete, its arrays were not read (use --verify)")


def _size_and_time(path: Path) -> tuple[int, float]:
    """Return the size of all files below a directory, and when the last of them was written."""
    size, latest = 0, 0.0
    for parent, _, files in os.walk(path):
        for name in files:
            try:
                status = os.lstat(os.path.join(parent, name))
            except OSError:  # deleted by a running save or deletion
                continue
            size += status.st_size
            latest = max(latest, status.st_mtime)
    return size, latest


def table(rows: list[Row]) -> str:
    """Return the rows as text."""
    header = ("step", "size", "saved", "state")
    cells = [
        (
            str(row.step),
            format_bytes(row.size),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row.saved)) if row.saved else "-",
            row.state,
        )
        for row in rows
    ]
    widths = [max(len(row[column]) for row in [header, *cells]) for column in range(3)]
    return "\n".join(
        f"{step:>{widths[0]}}  {size:>{widths[1]}}  {saved:{widths[2]}}  {state}".rstrip()
        for step, size, saved, state in [header, *cells]
    )
