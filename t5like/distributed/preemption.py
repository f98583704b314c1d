"""Signals that stop a training run: it saves a checkpoint after the current step. Called by `train.loop`."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

from t5like.distributed import processes
from t5like.io.signals import termination_signals
from t5like.io.streams import write_error


@contextlib.contextmanager
def catch_preemption() -> Iterator[Callable[[int], bool]]:
    """Record SIGTERM, SIGHUP, SIGUSR1 and the first Ctrl-C, instead of `signals.raise_on_signals`.

    Yields a function of the completed step that returns whether to stop after it. With several processes it returns
    True in all of them after the same step, whichever received the signal; JAX then handles SIGTERM.
    """
    received = []
    multi_process = processes.is_multi_process()

    def record(number, _):
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, before[signal.SIGINT])  # a second Ctrl-C stops at once
            write_error("stopping after this step; Ctrl-C again stops at once, without saving\n")
        if multi_process:
            os.kill(os.getpid(), signal.SIGTERM)

    caught = [signal.SIGUSR1, *termination_signals()]
    if multi_process:
        caught.remove(signal.SIGTERM)
    before = {number: signal.signal(number, record) for number in caught}
    try:
        yield processes.should_stop if multi_process else (lambda done: bool(received))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
