"""Experiment trackers by name (`metrics.trackers`): wandb, mlflow, trackio. TensorBoard is in `metrics.writers`.

A tracker must not stop or slow down a run. Its package is imported in a process of its own (`metrics.tracker_process`),
which a thread feeds through a bounded queue. What the tracker does not take is dropped and counted; a tracker that
fails is named once on standard error; at the end all trackers together have `CLOSE_SECONDS`. Only process 0 has them.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t5like.config.schema import Config, flatten
from t5like.errors import ConfigError, printable
from t5like.metrics.tracker_process import without_secrets

QUEUE_LINES = 1000  # of metrics that wait for a tracker
CLOSE_SECONDS = 20.0  # at the end of a run
PROVENANCE = "provenance.jsonl"  # in a run directory; its first record is that of the first start


def check(config: Config) -> None:
    """Refuse trackers whose packages are not installed; nothing is imported.

    Raises:
        ConfigError: with the command that installs the package.
    """
    for name in config.metrics.trackers:
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"metrics.trackers={name} needs the package {name}; pip install 't5like[{name}]', or leave it out"
            )


def start(config: Config, workdir: Path) -> list["Tracker"]:
    """Start the trackers of a run besides TensorBoard; called by process 0 when the run directory exists."""
    names = [name for name in dict.fromkeys(config.metrics.trackers) if name != "tensorboard"]
    if not names:
        return []
    values = {name: _plain(value) for name, value in flatten(config).items()}
    run = {
        "project": config.metrics.project,
        "name": workdir.name,
        "id": run_id(workdir),
        "directory": str(workdir.absolute()),
        "config": values,
    }
    return [Tracker(name, run) for name in names]


def run_id(workdir: Path) -> str:
    """A name by which a restart finds its run in a tracker: made of the first start of the run and its path."""
    try:
        with (workdir / PROVENANCE).open("rb") as file:
            first = file.readline()
    except OSError:
        first = b""
    return hashlib.sha256(first + os.fsencode(workdir.absolute())).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """A value of a config without passwords in it."""
    if isinstance(value, str):
        return without_secrets(value)
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


class Tracker:
    """One tracker: `send` and `close` never raise and never wait for it longer than they say."""

    def __init__(self, name: str, run: Mapping[str, Any]):
        """Start to send to the tracker, in a thread.

        Args:
            name: of the tracker, a key of `tracker_process.OPEN`.
            run: project, name, id, directory and config of the run.
        """
        self._name, self._run = name, run
        self._queue: queue.Queue[str] = queue.Queue(QUEUE_LINES)
        self._closing = threading.Event()
        self._process: subprocess.Popen | None = None
        self._dropped = 0
        self._failed = False
        self._thread = threading.Thread(target=self._serve, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values of a step, unless the tracker is too slow."""
        try:
            self._queue.put_nowait(json.dumps([step, values]) + "\n")
        except queue.Full:
            self._dropped += 1
            if self._dropped == 1 and not self._failed:
                self._say(f"it is slower than the run; from step {step:,} on some steps are left out")

    def begin_to_close(self) -> None:
        """Send what waits, then end the tracker's run; does not wait."""
        self._closing.set()

    def close(self, deadline: float) -> None:
        """Wait until the tracker has ended or the deadline, of `time.monotonic`, has passed; then it is left alone."""
        self.begin_to_close()
        self._thread.join(max(deadline - time.monotonic(), 0.0))
        if self._thread.is_alive():
            if self._process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)  # with the processes that the package has started
            self._say("it did not end in time; its last steps may be missing")
        elif self._dropped and not self._failed:
            self._say(f"{self._dropped:,} steps were left out")

    def _serve(self) -> None:
        """The thread: start the process, pass lines on, end it."""
        try:
            command = [sys.executable, "-m", "t5like.metrics.tracker_process", self._name]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            # A session of its own: signals for the run are not for its trackers, which end with their input.
            self._process = subprocess.Popen(command, **pipes, encoding="utf-8", start_new_session=True)
            reader = threading.Thread(target=self._pass_messages, args=(self._process.stdout,), daemon=True)
            reader.start()
            self._process.stdin.write(json.dumps(self._run) + "\n")
            while (line := self._next_line()) is not None:
                self._process.stdin.write(line)
                self._process.stdin.flush()
            self._process.stdin.close()
            code = self._process.wait()
            reader.join()
        except OSError:  # a closed pipe: the process has ended and has said why, or close() has ended it
            code = 1
        if code and not self._failed and not self._closing.is_set():
            self._say(f"its process ended with code {code}")
        self._failed = self._failed or bool(code)

    def _next_line(self) -> str | None:
        """The next line; None when the run has ended and all lines are sent."""
        while True:
            try:
                return self._queue.get(timeout=0.1 if not self._closing.is_set() else 0.0)
            except queue.Empty:
                if self._closing.is_set():
                    return None

    def _pass_messages(self, messages: Sequence[str]) -> None:
        for line in messages:
            self._failed = self._failed or line.startswith("it can't be used")
            self._say(line.strip())

    def _say(self, text: str) -> None:
        print(printable(f"tracker    {self._name}: {text}"), file=sys.stderr, flush=True)


def close(trackers: Sequence[Tracker]) -> None:
    """End all trackers at the same time."""
    for tracker in trackers:
        tracker.begin_to_close()
    deadline = time.monotonic() + CLOSE_SECONDS
    for tracker in trackers:
        tracker.close(deadline)
