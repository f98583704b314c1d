"""A run as its directory shows it: config, metrics, state, starts, checkpoints. Nothing is changed or computed.

Runs may still go on: files are read as they are. Called by `inspect.run`, `inspect.run_page` and `inspect.compare`.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from t5like.checkpoint import provenance, run_lock
from t5like.checkpoint.metadata import History
from t5like.checkpoint.run_directory import checkpoints_of
from t5like.config import loader
from t5like.config.schema import Config
from t5like.errors import CheckpointError, ConfigError, DamagedCheckpoint
from t5like.inspect.checkpoint import Row, inspect_checkpoints
from t5like.metrics import writers
from t5like.train.evidence import FOLDER, read_record


class Run(NamedTuple):
    """Config and metrics of a run directory."""

    name: str  # the shortest path that tells runs apart
    path: Path
    config: Config
    records: list[dict[str, float | None]]  # of metrics.jsonl
    is_running: bool

    @property
    def step(self) -> int:
        """The last step with metrics; 0 without any."""
        return int(self.records[-1]["step"]) if self.records else 0


class Events(NamedTuple):
    """What happened in a run.

    Attributes:
        starts: the records of provenance.jsonl.
        checkpoints: what is in checkpoints/, ascending by step.
        history: of the newest checkpoint that can be read; None without one.
        bad_steps: what was wrong, by step.
    """

    starts: list[dict[str, Any]]
    checkpoints: list[Row]
    history: History | None
    bad_steps: dict[int, str]


def read(path: Path, name: str = "") -> Run:
    """Read config and metrics of a run.

    Raises:
        CheckpointError: there is no run, or its config or metrics can't be read.
        DataError: the metrics are damaged.
    """
    try:
        config = loader.from_json((path / "config.json").read_bytes())
    except ConfigError as error:
        raise CheckpointError(f"{path / 'config.json'} can't be read: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path / 'config.json'} can't be read: {error.strerror}; check the path") from None
    return Run(name or path.name, path, config, writers.read(path), run_lock.is_locked(path))


def state(run: Run) -> str:
    """Return ``running``, ``done``, ``diverged``, ``stopped`` (it can be continued), or ``no metrics yet``."""
    if run.is_running:
        return "running"
    if not run.records:
        return "no metrics yet"
    if run.step >= run.config.train.num_steps:
        return "done"
    skipped = [record["train/skipped_updates"] for record in run.records if "train/skipped_updates" in record]
    most = run.config.train.max_skipped_updates
    return "diverged" if len(skipped) >= most and all(skipped[-most:]) else "stopped"


def events(run: Run, *, verify: bool = False) -> Events:
    """Read what happened in a run; `verify` reads all arrays of its checkpoints and compares their digests.

    Raises:
        CheckpointError: a file can't be read. A damaged checkpoint is no error, but a row.
    """
    rows, _ = inspect_checkpoints(run.path, verify=verify)
    checkpoints, history = checkpoints_of(run.path, run.config), None
    for row in reversed(rows):
        try:
            history = checkpoints.meta(row.step).history
            break
        except (CheckpointError, DamagedCheckpoint):  # `rows` names it
            continue
    numbers = sorted(int(path.name) for path in (run.path / FOLDER).glob("*") if path.name.isdigit())
    records = {number: read_record(run.path, number) for number in numbers}
    reasons = {number: record["reason"] for number, record in records.items() if record}
    return Events(starts(run.path), rows, history, reasons)


def starts(workdir: Path) -> list[dict[str, Any]]:
    """The records of provenance.jsonl, without a last line that was cut off."""
    path = workdir / provenance.FILE
    try:
        text = path.read_text("utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {error}; move it away") from None
