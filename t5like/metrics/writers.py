"""Metric files of a run: metrics.jsonl and TensorBoard event files.

Called by `train`, which decides which values are written; `types.host_metrics` converts device sums to floats. Names:
``train/loss``, ``train/accuracy``, ``train/grad_norm``, ``train/learning_rate``, ``train/tokens_per_second``,
``train/step_seconds``, ``train/mfu`` (0 to 1), ``train/packing_efficiency`` (0 to 1: share of token positions that are
not padding), ``eval/loss``, ``eval/accuracy``, ``eval/perplexity``, ``eval/bits_per_byte``, ``baseline/uniform``,
``baseline/unigram``, ``stats/...`` (`optim.layer_statistics`), those of `time_spent` and `by_component`, and the scores
of `evaluation.task_eval`.
"""

import contextlib
import json
import math
import os
import socket
import struct
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t5like.errors import CheckpointError, DataError
from t5like.io.appending import AppendingFile
from t5like.io.atomic import replace_file
from t5like.io.strict_json import loads
from t5like.metrics.time_spent import PREFIX
from t5like.metrics.trackers import Tracker, close
from t5like.types import COMPONENT_METRICS, Metrics

FILE = "metrics.jsonl"  # in a run directory
LINE = b'{"step": '  # prefix of each of its lines
TENSORBOARD = "tensorboard"


# ---- Values ----


def by_component(
    prefix: str, names: Sequence[Mapping[str, str]], sums: Metrics, bytes_C: np.ndarray | None = None
) -> dict[str, float]:
    """Loss, target tokens and share of the rows for each source, objective and denoiser.

    Args:
        prefix: "train" or "eval".
        names: `pipeline.component_names`.
        sums: `types.COMPONENT_METRICS` as numpy arrays [components].
        bytes_C: UTF-8 bytes of each component's targets; adds perplexity and bits per byte to each loss.

    Returns:
        ``train/loss/objective/ul2``, ``train/tokens/denoiser/X3_50``, ``train/share/source/wiki``, ...; a loss
        only with target tokens; bits per byte only if its targets are text.
    """
    nats, rows = (sums[name] for name in COMPONENT_METRICS)
    values = {}
    for kind in names[0]:
        for name in dict.fromkeys(each[kind] for each in names):
            selected = np.array([each[kind] == name for each in names])
            if weight := float(nats.weight[selected].sum()):
                total = float(nats.total[selected].sum())
                values[f"{prefix}/loss/{kind}/{name}"] = total / weight
                if bytes_C is not None:
                    values[f"{prefix}/perplexity/{kind}/{name}"] = perplexity(total / weight)
                    if size := float(bytes_C[selected].sum()):
                        values[f"{prefix}/bits_per_byte/{kind}/{name}"] = total / math.log(2) / size
            values[f"{prefix}/tokens/{kind}/{name}"] = weight
            values[f"{prefix}/share/{kind}/{name}"] = float(rows.total[selected].sum() / rows.total.sum())
    return values


def perplexity(nats: float) -> float:
    """exp of a loss; a large number instead of an overflow."""
    return math.exp(min(nats, 700.0))


# ---- Files ----


def read(workdir: Path) -> list[dict[str, float | None]]:
    """The records of a run's metrics.jsonl, without a last line that was cut off; none if there is no file.

    Raises:
        DataError: a line is no JSON object with a step and numbers.
        CheckpointError: the file can't be read.
    """
    path = workdir / FILE
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}; move it away") from None
    cut_off = LINE.startswith(rest[: len(LINE)]) or (lines and not rest.strip(b"\0"))  # zeros: the machine crashed
    records = [_record(line) for line in (lines if cut_off else [*lines, rest])]
    if None in records:
        number = records.index(None) + 1
        raise DataError(
            f"{path}:{number} must be a JSON object with a step and numbers; delete that line, or move the file away"
        )
    return records


def _record(line: bytes) -> dict[str, float | None] | None:
    """The values of a line; None if `Writer` can't have written it."""
    try:
        record = loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    fits = lambda value: value is None or type(value) is float or (type(value) is int and abs(value) < 2**63)
    return record if all(map(fits, record.values())) else None


def seconds_spent(records: Iterable[Mapping[str, float | None]]) -> float:
    """The sum of all parts of `time_spent` in some records."""
    return math.fsum(
        value for record in records for name, value in record.items() if name.startswith(PREFIX) and value is not None
    )


class Writer:
    """Writes values to metrics.jsonl and to TensorBoard events, in the run directory, from one process.

    Each line is ``{"step": 20, "train/loss": 4.81}``. A value that is not finite is null there, because JSON has no
    NaN; TensorBoard gets the value itself. On resume both drop all later steps, and a value that the file already has
    for the resumed step is not written again: each name occurs once per step. A run continues without these files as
    long as they can't be written (`io.appending`).

    Attributes:
        undone_seconds: of the later steps that were dropped, all parts of `time_spent` together.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        step: int = 0,
        primary: bool = True,
        tensorboard: bool = True,
        trackers: Sequence[Tracker] = (),
    ):
        """Open the files of a run that continues after `step` updates; unless primary, nothing is ever written.

        Args:
            tensorboard: whether events are written.
            trackers: which also get all values; `close` closes them.

        Raises:
            CheckpointError: they can't be created.
            DataError: see `read`.
        """
        self._file = self._events = None
        self.undone_seconds = 0.0
        self._workdir, self._tensorboard, self._trackers = workdir, tensorboard, trackers
        if primary:
            self._open(step)

    def go_back(self, step: int) -> None:
        """Continue after an earlier step, as a new `Writer` would."""
        if self._file is not None:
            self._close_files()
            self._open(step)

    def _open(self, step: int) -> None:
        workdir = self._workdir
        records = read(workdir)
        kept = [record for record in records if record["step"] <= step]
        self.undone_seconds = seconds_spent(record for record in records if record["step"] > step)
        self._known = {(step, name) for record in kept if record["step"] == step for name in record}
        self._step = step
        text = "".join(json.dumps(record) + "\n" for record in kept)
        path = workdir / FILE
        with _writing(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            self._identity = workdir.stat()
            if path.exists() and path.read_bytes() != text.encode():
                replace_file(path, text)
            self._file = AppendingFile(path, _report)
            self._events = EventFile(workdir / TENSORBOARD, step) if self._tensorboard else None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one line. Steps must not decrease.

        Raises:
            CheckpointError: the run directory was removed or renamed.
        """
        if self._file is None:
            return
        assert step >= self._step, f"step {step} after {self._step}"
        self._step = step
        values = {name: float(value) for name, value in values.items() if (step, name) not in self._known}
        if not values:
            return
        self._check_workdir()
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.append(json.dumps({"step": step, **finite}).encode() + b"\n")
        if self._events is not None:
            self._events.write(step, values)
        for tracker in self._trackers:
            tracker.send(step, values)

    def close(self) -> None:
        """Close the files, and end the trackers."""
        self._close_files()
        close(self._trackers)

    def _close_files(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()

    def _check_workdir(self) -> None:
        try:
            same = os.path.samestat(self._workdir.stat(), self._identity)
        except FileNotFoundError:
            same = False
        except OSError:  # the storage does not respond; `AppendingFile` reports that
            return
        if not same:
            raise CheckpointError(
                f"{self._workdir} is not there any more: the run directory was removed or renamed while the run wrote "
                "to it; the same command continues after the last checkpoint if it is put back"
            )


class EventFile:
    """TensorBoard's events: a new file for each start of the run, in the TFRecord format, written by this thread.

    The writer of tensorboardX has a thread and a queue; when its disk is full the thread ends, and the queue blocks the
    run. Only its messages are used here.
    """

    def __init__(self, directory: Path, step: int):
        """Create a file whose events replace those after `step`.

        Raises:
            OSError: it can't be created.
        """
        with _without_torch():
            from tensorboardX.proto.event_pb2 import Event, SessionLog  # imported here: it takes 0.2 s

        directory.mkdir(exist_ok=True)
        # The time has a resolution of a second: a quick restart must not append to the last file.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{step}"
        self._file = AppendingFile(directory / name, _report)
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._append(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append an event for each value."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        now = time.time()
        for name, value in values.items():
            self._append(Event(wall_time=now, step=step, summary=scalar(name, value)))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, event: Any) -> None:
        from tensorboardX.record_writer import masked_crc32c

        data = event.SerializeToString()
        size = struct.pack("<Q", len(data))
        checksums = (struct.pack("<I", masked_crc32c(part)) for part in (size, data))
        self._file.append(size + next(checksums) + data + next(checksums))


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Import tensorboardX as where PyTorch is not installed: it would import it, and that takes longer than JAX."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # an import of it fails
    try:
        yield
    finally:
        del sys.modules["torch"]


def _report(text: str) -> None:
    print(f"t5like: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        name = error.filename2 or error.filename or path
        raise CheckpointError(f"{name} can't be written: {error.strerror or error}; move it away") from None
