"""Memory that is free inside the heap goes back to the kernel."""

import ctypes
import os
import sys
from pathlib import Path

import pytest

from t5like.sharding import allocator

PIECE, COUNT = 64 * 2**10, 2000


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_pieces_of_the_heap_are_returned():
    library = ctypes.CDLL(None)
    library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    pieces = [library.malloc(PIECE) for _ in range(COUNT)]
    for piece in pieces:
        ctypes.memset(piece, 1, PIECE)
    with allocator.trimmed():
        for piece in pieces[:-1]:  # the last one keeps the heap from shrinking by itself
            library.free(piece)
        before = resident()
    assert before - resident() > 0.8 * PIECE * COUNT
    library.free(pieces[-1])
