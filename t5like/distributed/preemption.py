"""Signals that ask a training run to stop: it saves a checkpoint after the current step."""

import contextlib
import os
import signal
from collections.abc import Iterator

from t5like.distributed import processes
from t5like.io.signals import termination_signals
from t5like.io.streams import write_error


@contextlib.contextmanager
def catch_preemption() -> Iterator:
    """Note SIGTERM, SIGHUP, SIGUSR1 and the first Ctrl-C, instead of `interrupts.raised`.

    Yields a function of the step that has been done, which says whether to stop after it. Of several processes all say
    so after the same step, whichever got the signal; there JAX keeps the watch for SIGTERM.
    """
    received = []
    several = processes.is_multi_process()

    def note(number, _):
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, old[signal.SIGINT])  # a second Ctrl-C stops at once
            write_error("stopping after this step; Ctrl-C again stops at once, without saving\n")
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    caught = [signal.SIGUSR1, *termination_signals()]
    if several:
        caught.remove(signal.SIGTERM)
    old = {number: signal.signal(number, note) for number in caught}
    try:
        yield processes.should_stop if several else (lambda done: bool(received))
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
