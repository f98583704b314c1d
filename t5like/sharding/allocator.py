"""Settings of glibc's allocator, from which XLA takes its memory on a CPU. Without glibc they do nothing.

Imported before JAX.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -3, -4, -8  # malloc.h


def keep_freed() -> None:
    """Make glibc keep the memory that XLA:CPU frees, instead of returning it to the kernel and faulting it in again.

    This saves a third of a training step's time and costs resident memory. It does nothing if there is an accelerator.
    Call it before the process starts threads.
    """
    accelerator = any(next(Path("/dev").glob(pattern), None) for pattern in ("nvidia[0-9]*", "accel*", "vfio/[0-9]*"))
    if accelerator and os.environ.get("JAX_PLATFORMS") != "cpu":
        return
    # Never trim: a threshold would have to fit an int, and every step frees 2 GiB.
    _call("mallopt", (ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, -1))


def return_freed() -> None:
    """Make glibc map each allocation of more than 1 MiB separately, so that freeing returns it to the kernel.

    By default that threshold grows with the freed sizes, up to 32 MiB, and parts of weights stay in the heaps of many
    threads.
    """
    _call("mallopt", (MMAP_THRESHOLD, 2**20))


@contextlib.contextmanager
def trimmed() -> Iterator[None]:
    """Context of a compilation. The kernel gets back what it frees: hundreds of MB that a step can't reuse."""
    yield
    _call("malloc_trim", (0,))


def _call(name: str, *arguments: tuple[int, ...]) -> None:
    """Call a function of the C library with each of these arguments, if it has the function."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    for values in arguments if function else ():
        function(*values)
