"""Which job runs in a run directory: ``launch.json``, and the names of jobs on the command line.

A job is named by its run directory or as ``BACKEND:ID``: ``slurm:1234``, ``kubernetes:NAMESPACE/NAME``,
``tpu_vm:ZONE/NAME``, ``local:PID``. Called by `launch.main`; the backends read the record that it returns.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

from t5like.errors import CheckpointError, ConfigError, shown
from t5like.io.atomic import replace_file
from t5like.io.paths import expand
from t5like.io.strict_json import loads

BACKENDS = ("local", "slurm", "kubernetes", "tpu_vm")
FILE = "launch.json"
ID_EXAMPLES = "a run directory, slurm:1234, kubernetes:NAMESPACE/NAME, tpu_vm:ZONE/NAME or local:PID"


class Submission(NamedTuple):
    """What a backend returns for a job that it has submitted.

    Attributes:
        id: of the job, without the backend: ``1234``, ``NAMESPACE/NAME``.
        lines: shell commands by what they do: ``follow``, ``status``, ``cancel``.
        logs: path of the log file or directory; empty: the backend keeps the log.
        details: what the backend needs later to find the job, such as the zone. No secrets.
    """

    id: str
    lines: dict[str, str]
    logs: str = ""
    details: dict[str, str] = {}


class Record(NamedTuple):
    """A submitted job, as ``launch.json`` contains it.

    Attributes:
        backend: one of `BACKENDS`.
        id: of the job, without the backend.
        name: of the job; empty, as all that follows, if the job was named as ``BACKEND:ID``.
        workdir: run directory of the job.
        logs: as in `Submission`.
        details: as in `Submission`.
    """

    backend: str
    id: str
    name: str = ""
    workdir: str = ""
    logs: str = ""
    details: dict[str, str] = {}

    @property
    def full_id(self) -> str:
        """The job's name for `launch status`, `logs` and `cancel`."""
        return f"{self.backend}:{self.id}"


def write(record: Record) -> None:
    """Write ``launch.json`` into the run directory, if that is a path of this machine; replace an earlier one.

    A path of pods or TPU VMs is one of this machine if the directory above it exists here.

    Raises:
        CheckpointError: it can't be written.
    """
    directory = Path(record.workdir)
    if "://" in record.workdir or (record.backend in ("kubernetes", "tpu_vm") and not directory.parent.is_dir()):
        return
    text = json.dumps(record._asdict(), indent=1, ensure_ascii=False) + "\n"
    remedy = f"the job is {record.full_id}; keep this id"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{directory} can't be created: {error.strerror}; {remedy}") from None
    replace_file(directory / FILE, text, CheckpointError, remedy)


def find(text: str) -> Record:
    """Return the record of a job that the command line names.

    Raises:
        ConfigError: the text names no job, or its run directory has no record.
        CheckpointError: the record can't be read.
    """
    match = re.fullmatch(f"({'|'.join(BACKENDS)}):(.+)", text)
    if match:
        return Record(match[1], match[2])
    path = expand(text) / FILE
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{shown(text)} is no job: there is no {path}; use {ID_EXAMPLES}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path} can't be read: {reason}; use one of the other names of the job") from None
    try:
        record = Record(**loads(content))
        texts = (*record[:-1], *record.details, *record.details.values())
        if record.backend not in BACKENDS or not record.id or not all(isinstance(text, str) for text in texts):
            raise ValueError
    except (ValueError, TypeError, AttributeError):
        raise CheckpointError(f"{path} is not a record of t5like launch; use {ID_EXAMPLES}") from None
    return record
