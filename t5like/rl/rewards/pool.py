"""Processes that compute rewards beside the devices.

    with RewardPool(rewards, workers=2, timeout_seconds=10.0, failed="exclude") as pool:
        rewards_RBG = pool.score(rows, answers)

The rewards of an answer do not depend on the number of processes or on which of them computes it. An answer whose
reward raises, is no finite number, takes too long or ends its process costs this one reward: its process is replaced
if necessary, and the failure is counted.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Literal

import numpy as np

from t5like.errors import ConfigError
from t5like.rl.rewards.reward import Reward
from t5like.rl.rewards.worker import pickled

START_SECONDS = 120.0  # until a process is ready: it imports the packages of its rewards
MOST_ITEMS = 64  # rewards in a message to a process, at most
_Item = tuple[int, int, int]  # (reward, row, answer of the row)


@dataclasses.dataclass
class _Worker:
    """A process.

    Attributes:
        items: rewards that it has been sent and has not answered.
        since: time when it began with the first of them, or was started.
        ready: whether it has started.
        ended: whether it has ended, with the text that it has sent instead of becoming ready.
    """

    process: subprocess.Popen
    connection: socket.socket
    since: float
    items: deque[_Item] = dataclasses.field(default_factory=deque)
    ready: bool = False
    ended: bool = False
    refusal: str = ""
    _text: bytes = b""

    def send(self, items: Sequence[_Item], rows: Sequence[Mapping[str, Any]], answers: Sequence[Sequence[str]]) -> None:
        needed = sorted({row for _, row, _ in items})
        places = {row: place for place, row in enumerate(needed)}
        message = (
            [dict(rows[row]) for row in needed],
            [(reward, places[row], answers[row][answer]) for reward, row, answer in items],
        )
        self.items, self.since = deque(items), time.monotonic()
        with contextlib.suppress(OSError):  # it has ended; `receive` finds that
            self.connection.sendall(pickled(message))

    def receive(self) -> list[tuple[_Item, float | str]]:
        """The values that have arrived, or how they have failed."""
        try:
            part = self.connection.recv(2**16)
        except OSError:
            part = b""
        self.ended = not part
        *lines, self._text = (self._text + part).split(b"\n")
        values = [json.loads(line) for line in lines]
        if values and not self.ready:
            first = values.pop(0)
            self.ready = isinstance(first, float)
            self.refusal = "" if self.ready else first
        if values:
            self.since = time.monotonic()
        return [(self.items.popleft(), value) for value in values]

    def limit(self, timeout: float) -> float:
        """When it has failed, if nothing arrives until then; infinite if nothing is expected."""
        if not self.ready:
            return self.since + START_SECONDS
        return self.since + timeout if self.items else float("inf")

    def end(self) -> int:
        """End the process and return its exit code, negative for a signal."""
        if self.ended:  # give it time for the code of its own
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        self.process.kill()  # before its connection is closed, which it would report as an error
        self.connection.close()
        return self.process.wait()


class RewardPool:
    """A context manager; its processes end with the with statement, and when this process ends in any way.

    Attributes:
        names: of the rewards, in order.
        failures: for each reward's name, how many of its values have failed so far.
        first_failures: for each reward that has failed, what the first failure was, as one line.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        workers: int,
        timeout_seconds: float,
        failed: Literal["exclude", "zero"] = "exclude",
    ) -> None:
        """
        Args:
            rewards: those of functions; a `ModelReward` is scored elsewhere.
            workers: number of processes; 0: one per CPU core of this process.
            timeout_seconds: of one reward of one answer.
            failed: `rl.failed_reward`.
        """
        self.names = tuple(reward.name for reward in rewards)
        self.failures = dict.fromkeys(self.names, 0)
        self.first_failures: dict[str, str] = {}
        self._functions = pickled([reward.function for reward in rewards])
        self._count = workers or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [0])
        self._timeout, self._failed_value = timeout_seconds, 0.0 if failed == "zero" else np.nan
        self._workers: list[_Worker] = []
        # Linux ends a process with the thread that started it, so one thread, which lives as long as the pool, does.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="reward-processes")
        self._lock = threading.Lock()

    def __enter__(self) -> "RewardPool":
        self._workers = [self._start() for _ in range(self._count if self.names else 0)]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for worker in self._workers:
            worker.end()
        self._workers = []
        self._starter.shutdown()

    def score(self, rows: Sequence[Mapping[str, Any]], answers: Sequence[Sequence[str]]) -> np.ndarray:
        """The rewards of G answers to each of B rows. Equal answers to equal rows are scored once.

        Args:
            rows: per prompt, the fields of its record, and its text of `data.targets_template` under ``targets``.
            answers: per prompt, G texts.

        Returns:
            float64 [rewards, B, G]; NaN for those that failed, or 0 if `failed` is "zero".

        Raises:
            ConfigError: the processes can't be started, for instance because a package is missing there.
        """
        shape = (len(self.names), len(rows), len(answers[0]) if answers else 0)
        if len(answers) != len(rows) or any(len(each) != shape[2] for each in answers):
            raise ValueError(f"{len(rows)} rows need as many lists of answers, of equal length")
        values_RBG = np.full(shape, self._failed_value)
        failures: dict[_Item, str] = {}
        first = _first_of_equals(rows, answers)
        waiting = _chunks(shape[0], [place for place in first if first[place] == place], self._count)
        with self._lock:
            while waiting or any(worker.items for worker in self._workers):
                for worker in self._workers:
                    if waiting and worker.ready and not worker.items:
                        worker.send(waiting.popleft(), rows, answers)
                for worker in self._arrived():
                    for item, value in worker.receive():
                        if isinstance(value, str):
                            failures[item] = value
                        else:
                            values_RBG[item] = value
                for worker in [*self._workers]:
                    if worker.ended or time.monotonic() >= worker.limit(self._timeout):
                        self._replace(worker, waiting, failures)
        for (row, answer), (first_row, first_answer) in first.items():
            values_RBG[:, row, answer] = values_RBG[:, first_row, first_answer]
            failures |= {
                (reward, row, answer): failures[reward, first_row, first_answer]
                for reward in range(shape[0])
                if (reward, first_row, first_answer) in failures
            }
        self._count_failures(failures)
        return values_RBG

    def _arrived(self) -> list[_Worker]:
        """The processes that have sent something or ended, after waiting for the first, or for the first time limit."""
        limit = min(worker.limit(self._timeout) for worker in self._workers)
        seconds = None if limit == float("inf") else max(0.0, limit - time.monotonic())
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.connection, selectors.EVENT_READ, worker)
            return [key.data for key, _ in selector.select(seconds)]

    def _replace(self, worker: _Worker, waiting: deque[tuple[_Item, ...]], failures: dict[_Item, str]) -> None:
        """Replace a process that has ended or takes too long; the reward that it was computing has failed."""
        code = worker.end()
        why = f"its process ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"
        if not worker.ended:
            why = f"TimeoutError: no value after rl.reward_timeout_seconds={self._timeout:g}"
        if not worker.ready:
            raise ConfigError(f"rl.rewards={','.join(self.names)}: a process can't start ({worker.refusal or why})")
        if worker.items:
            failures[worker.items.popleft()] = why
            if worker.items:
                waiting.appendleft(tuple(worker.items))
        self._workers[self._workers.index(worker)] = self._start()

    def _count_failures(self, failures: Mapping[_Item, str]) -> None:
        for item in sorted(failures):  # in order, so that the first one does not depend on the processes
            name = self.names[item[0]]
            self.failures[name] += 1
            self.first_failures.setdefault(name, failures[item])

    # ---- Processes ----

    def _start(self) -> _Worker:
        return self._starter.submit(self._start_process).result()

    def _start_process(self) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            descriptor = theirs.fileno()
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "t5like.rl.rewards.worker", str(descriptor), str(os.getpid())],
                pass_fds=[descriptor],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONHASHSEED": "0"},  # the same order of sets in every process and run
                start_new_session=True,  # Ctrl-C in a terminal is for this process
            )
        with contextlib.suppress(OSError):  # it has ended already
            ours.sendall(self._functions)
        return _Worker(process, ours, time.monotonic())


def _first_of_equals(
    rows: Sequence[Mapping[str, Any]], answers: Sequence[Sequence[str]]
) -> dict[tuple[int, int], tuple[int, int]]:
    """For each (row, answer of the row) the first one that has equal fields and an equal text."""
    known: dict[tuple[bytes, str], tuple[int, int]] = {}
    first = {}
    for row, texts in enumerate(answers):
        fields = pickled(dict(rows[row]))
        for answer, text in enumerate(texts):
            first[row, answer] = known.setdefault((fields, text), (row, answer))
    return first


def _chunks(rewards: int, places: Sequence[tuple[int, int]], workers: int) -> deque[tuple[_Item, ...]]:
    """All rewards of (row, answer) pairs, in messages that are small enough to keep all processes busy to the end."""
    items = [(reward, *place) for place in places for reward in range(rewards)]
    size = min(MOST_ITEMS, max(1, len(items) // (4 * workers)))
    return deque(tuple(items[begin : begin + size]) for begin in range(0, len(items), size))
