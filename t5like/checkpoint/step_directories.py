"""The directories of checkpoints on disk: which are complete, and how they are set aside and deleted.

A directory is a checkpoint if its name is a step. It is complete if it contains the commit file, which is written last
and deleted first. A damaged checkpoint gets another name, so that it is no longer a step, and keeps its files. Called
by `checkpoints`, and by `inspect.checkpoint`.
"""

import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

COMMITTED = "commit_success.txt"
REQUIRED_FILES = (
    "_CHECKPOINT_METADATA",
    "meta/metadata",
    "state/_METADATA",
    "state/manifest.ocdbt",
)  # in each checkpoint
STEP = re.compile("0|[1-9][0-9]{0,17}")  # names of directories that may be checkpoints
SET_ASIDE = re.compile(r"(\d+)\.damaged-.*")  # names of those that were damaged


def list_steps(directory: Path) -> dict[int, Path]:
    """Return the directories that have the name of a step, complete or not.

    Raises:
        OSError: the directory can't be read.
    """
    entries = list(directory.iterdir()) if directory.exists() else []
    return {int(path.name): path for path in entries if STEP.fullmatch(path.name)}


def complete_steps(directory: Path) -> list[int]:
    """Return the steps of the complete checkpoints, ascending; raises as `list_steps`."""
    return sorted(step for step, path in list_steps(directory).items() if (path / COMMITTED).exists())


def others(steps: Iterable[int], but: int | None = None) -> str:
    """Return the end of a message that lists the steps that exist, without that of `but`."""
    names = [str(step) for step in steps if step != but]
    return f"; there are {', '.join(names)}" if names else "; there is no other"


def missing_file(path: Path) -> str:
    """Return the first file that a complete checkpoint lacks, or ""."""
    return next((name for name in REQUIRED_FILES if not (path / name).is_file()), "")


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that it is no longer a step; return its new path.

    Raises:
        OSError: it can't be renamed.
    """
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    names = [f"{path.name}.damaged-{stamp}", *(f"{path.name}.damaged-{stamp}-{number}" for number in range(1, 100))]
    target = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    path.rename(target)
    return target


def delete(path: Path) -> None:
    """Delete a checkpoint: first its commit file, so that a killed deletion leaves no complete one.

    Raises:
        OSError: it can't be deleted.
    """
    (path / COMMITTED).unlink(missing_ok=True)
    shutil.rmtree(path)


def delete_incomplete(directory: Path) -> None:
    """Delete what killed saves and deletions have left, while no save is in progress.

    Links and other directories are not touched.

    Raises:
        OSError: a directory can't be deleted.
    """
    for path in list_steps(directory).values():
        if not path.is_symlink() and not (path / COMMITTED).exists() and is_checkpoint(path):
            shutil.rmtree(path)


def is_checkpoint(path: Path) -> bool:
    """Whether a directory contains files of a checkpoint, or nothing, as after a kill during its creation.

    Orbax writes parts under other names first: ``state.orbax-checkpoint-tmp`` becomes ``state``.
    """
    if not path.is_dir():
        return False
    names = [entry.name.partition(".")[0] for entry in path.iterdir()]
    return not names or any(name in ("_CHECKPOINT_METADATA", "state", "meta") for name in names)
