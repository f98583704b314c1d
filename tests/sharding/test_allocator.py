"""Memory that is free inside the heap goes back to the kernel."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, os
from pathlib import Path
from t5like.sharding import allocator

PIECE, COUNT = 64 * 2**10, 2000
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
library = ctypes.CDLL(None)
library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
pieces = [library.malloc(PIECE) for _ in range(COUNT)]
for piece in pieces:
    ctypes.memset(piece, 1, PIECE)
with allocator.trimmed():
    for piece in pieces[:-1]:  # the last one keeps the heap from shrinking by itself
        library.free(piece)
    before = resident()
print((before - resident()) / (PIECE * COUNT))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_pieces_of_the_heap_are_returned():
    """In a process of its own: those of other tests keep what is freed."""
    command = [sys.executable, "-c", PROGRAM]
    assert float(subprocess.check_output(command, env={"PATH": os.environ["PATH"]})) > 0.8
