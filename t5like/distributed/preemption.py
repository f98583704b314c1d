"""Signals that stop a training run: it saves a checkpoint as soon as it can, and ends with exit code 75.

SIGTERM, SIGHUP and SIGUSR1 may arrive in any phase. Python runs signal handlers in the main thread, between two of its
instructions, which may be minutes later while that thread compiles. So a thread of its own receives them at once.

* In the training loop (`catch_preemption`) all processes stop at the same point: before a step or a batch of an
  evaluation. The run saves the state of the last complete step, unless that is saved or being saved already.
* In other phases nothing is lost: `io.signals` raises an exception in the main thread, for its cleanup. If the process
  does not end within `CLEANUP_SECONDS`, it ends here.

Called by `process_group` and by `train.loop`.
"""

import concurrent.futures
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from t5like.distributed import watchdog
from t5like.distributed.activity import activity
from t5like.distributed.processes import current
from t5like.errors import Preempted
from t5like.io.signals import REQUEUE_EXIT_CODE, termination_signals
from t5like.io.streams import write_error

DATA_PHASE = "waiting for data"
CLEANUP_SECONDS = 4.0  # outside of the training loop, until the process ends without cleanup
Value = TypeVar("Value")


class Stopped(BaseException):
    """The run stops at this point. Not an `Exception`: nothing between the point and the loop may handle it."""


class Stop:
    """The request to stop, and the point of the training loop at which all processes do.

    Attributes:
        active: whether the training loop runs.
        requested: whether a signal was received in the loop, by any process.
    """

    def __init__(self):
        self.active = self.requested = self.reached = False
        self.requested_at: float | None = None
        self._passed, self._agreed, self._held = 0, None, False
        self._changed = threading.Condition()  # its lock is reentrant

    def point(self) -> None:
        """A point at which the run can stop; every process passes the same points in the same order.

        Raises:
            Stopped: the run stops here.
        """
        with self._changed:
            while self._held and self._agreed is None:
                self._changed.wait()
            self.raise_if_agreed()
            self._passed += 1
        activity.progress()

    def raise_if_agreed(self) -> None:
        """Stop here if the next point is the one at which all stop.

        Raises:
            Stopped: it is.
        """
        with self._changed:
            if self.active and self._agreed is not None and self._agreed <= self._passed:
                self.reached = True
                raise Stopped

    def request(self) -> None:
        """This process has received a signal."""
        process = current()
        if process is None:
            self.agree(self.vote())
        else:
            process.liveness.request_stop()

    def vote(self) -> int:
        """Return the number of points that this process has passed; it passes no other one until `agree`."""
        with self._changed:
            self.requested = self._held = True
            self.requested_at = self.requested_at or time.monotonic()
            return self._passed

    def agree(self, point: int) -> None:
        """Stop at the point after `point` points."""
        with self._changed:
            self._agreed = point
            self._changed.notify_all()
        if point == 0 and not self.active:
            _end("nothing is lost")


stop = Stop()


def wait_for_data(future: concurrent.futures.Future[Value]) -> Value:
    """Return the result of a future that the next step needs. In the training loop, the run can stop until then.

    Raises:
        Stopped: the run stops here.
    """
    if stop.active and not future.done():
        activity.enter(DATA_PHASE, activity.step)
        while not future.done():
            stop.raise_if_agreed()
            concurrent.futures.wait([future], timeout=0.1)
    return future.result()


def reset() -> None:
    """Forget what an earlier run of this process received."""
    stop.__init__()


@contextlib.contextmanager
def catch_preemption(save: Callable[[], int], workdir: Path) -> Iterator[Stop]:
    """Stop the block at a point when any process receives SIGTERM, SIGHUP, SIGUSR1 or the first Ctrl-C.

    Args:
        save: saves what is not saved yet, in all processes, and returns the number of completed steps.
        workdir: the run directory, for the message.

    Raises:
        Preempted: in all processes, after `save`.
    """

    def record(number, _):  # the thread of `receive_signals` does the rest
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, before[signal.SIGINT])  # a second Ctrl-C stops at once
            write_error("stopping as soon as the state is saved; Ctrl-C again stops at once, without saving\n")

    caught = [signal.SIGUSR1, *termination_signals()]
    with receive_signals():
        before = {number: signal.signal(number, record) for number in caught}
        stop.active = True
        activity.enter("the training loop")
        try:
            yield stop
        except Stopped:
            done = save()
            where = f"after step {done:,}; saved in {workdir}" if done else "before the first step; nothing is lost"
            raise Preempted(f"stopped by a signal {where}; the same command continues") from None
        finally:
            stop.active = False
            activity.enter("the end of the training loop", mode="computing")
            for number, handler in before.items():
                signal.signal(number, handler)


_receiving = False


@contextlib.contextmanager
def receive_signals() -> Iterator[None]:
    """Receive signals in a thread during the block, which must run in the main thread; nested blocks share it."""
    global _receiving
    if _receiving:
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    suspend = signal.getsignal(signal.SIGTSTP)
    if suspend == signal.SIG_DFL:  # Ctrl-Z
        signal.signal(signal.SIGTSTP, lambda *_: None)
    thread = threading.Thread(target=_receive, args=(reader,), daemon=True, name="signals")
    thread.start()
    _receiving = True
    try:
        yield
    finally:
        _receiving = False
        signal.signal(signal.SIGTSTP, suspend)
        signal.set_wakeup_fd(before)
        writer.close()  # ends the thread
        thread.join()
        reader.close()


def _receive(reader: socket.socket) -> None:
    """Main loop of the thread; Python writes the number of each signal to the other end of `reader` at once."""
    received: float | None = None  # when a signal of a scheduler was received, outside of the loop
    reader.settimeout(0.2)
    while True:
        try:
            if not (numbers := reader.recv(64)):
                return
        except TimeoutError:
            numbers = b""
        if signal.SIGTSTP in numbers:
            with watchdog.last_resort().disarmed():  # the time until it continues does not count
                os.kill(os.getpid(), signal.SIGSTOP)
        by_user = signal.SIGINT in numbers
        if by_user or {signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1} & {*numbers}:
            if stop.active and not stop.requested:
                stop.request()
            elif not stop.active and not by_user and received is None:
                received = time.monotonic()
        if received is not None and time.monotonic() - received > CLEANUP_SECONDS:
            _end("nothing is lost")
        if stop.active and stop.requested_at and not stop.reached:
            phase_can_end = activity.mode == "computing" or activity.phase == DATA_PHASE
            if phase_can_end and time.monotonic() - stop.requested_at > watchdog.grace_seconds:
                _end(f"its state could not be saved within {watchdog.grace_seconds:.0f} s")


def _end(consequence: str) -> None:
    watchdog.end(
        REQUEUE_EXIT_CODE, f"stopped by a signal {activity.describe()}; {consequence}: the same command continues"
    )
