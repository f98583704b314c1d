"""The end of a process whose Python interpreter does not run any more: a native timer, which needs no interpreter lock.

A process that is wedged while it holds the interpreter lock runs no Python thread and no Python signal handler. `arm`
starts timers whose end runs in the C library: the first prints all stacks (`faulthandler`), the second a line
(`warnx`), the third calls ``_exit(76)``. The watchdog arms them again every second, so they only end when it can't.
They use the monotonic clock, so setting the system's clock changes nothing. A process that was stopped for longer than
the limit and continues may end as well; stopping it with Ctrl-Z disarms them first (`preemption`).

POSIX timers with SIGEV_THREAD exist on Linux only (timer_create(2)). Elsewhere `faulthandler` alone prints the stacks
and exits with code 1.
"""

import contextlib
import ctypes
import faulthandler
import sys
import threading
from collections.abc import Iterator

EXIT_CODE = 76
CLOCK_MONOTONIC, SIGEV_THREAD = 1, 2  # <time.h>, <signal.h> of Linux
REPORT_SECONDS = 1.0  # after the stacks, until the exit


class _Event(ctypes.Structure):
    """``struct sigevent``, 64 bytes."""

    _fields_ = [
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("unused", ctypes.c_char * 32),
    ]


class _Times(ctypes.Structure):
    """``struct itimerspec``: no interval, and the time until the end."""

    _fields_ = [(name, ctypes.c_long) for name in ("interval", "interval_ns", "seconds", "nanoseconds")]


class LastResort:
    """The timers of this process."""

    def __init__(self):
        self._library, self._timers, self._message = None, [], None
        self._lock = threading.Lock()
        if sys.platform != "linux":
            return
        library = ctypes.CDLL(None)
        if not hasattr(library, "timer_create"):
            return
        # The C library's own writer of one line to standard error; it begins with the name of the program.
        self._name = ctypes.c_char_p(b"t5like")
        ctypes.c_void_p.in_dll(library, "program_invocation_short_name").value = ctypes.cast(
            self._name, ctypes.c_void_p
        ).value
        self._library, self._message = library, ctypes.create_string_buffer(1000)
        for function, value in (("warnx", ctypes.addressof(self._message)), ("_exit", EXIT_CODE)):
            event = _Event(
                value=value,
                notify=SIGEV_THREAD,
                function=ctypes.cast(getattr(library, function), ctypes.c_void_p),
            )
            timer = ctypes.c_void_p()
            if library.timer_create(CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)):
                self._library = None
                return
            self._timers.append(timer)

    def set_message(self, message: str) -> None:
        """Set the line that is printed at the end."""
        if self._message is not None:
            self._message.value = message.encode()[: len(self._message) // 2].replace(b"%", b"%%")  # printf's format

    def arm(self, seconds: float) -> None:
        """End this process with code 76 and the message after `seconds`, unless this is called again before."""
        with self._lock:
            exits = self._library is None
            faulthandler.dump_traceback_later(seconds, exit=exits, file=2)
            if exits:
                return
            for timer, later in zip(self._timers, (REPORT_SECONDS / 2, REPORT_SECONDS), strict=True):
                self._set(timer, seconds + later)

    def disarm(self) -> None:
        """Stop the timers."""
        with self.disarmed():
            pass

    @contextlib.contextmanager
    def disarmed(self) -> Iterator[None]:
        """Stop the timers; `arm` waits until the end of the block."""
        with self._lock:
            faulthandler.cancel_dump_traceback_later()
            for timer in self._timers:
                self._set(timer, 0.0)
            yield

    def _set(self, timer: ctypes.c_void_p, seconds: float) -> None:
        whole = int(seconds)
        times = _Times(seconds=whole, nanoseconds=int((seconds - whole) * 1e9))
        self._library.timer_settime(timer, 0, ctypes.byref(times), None)
