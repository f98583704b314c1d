"""Answers that try to pass tests without being right, or to break something: name, then code, see `HOSTILE`."""

import re

# PORT and FILE are replaced by a port that listens, and a file that may be written.
HOSTILE_TEXT = r"""
# ---- ends before the tests
import os
os._exit(0)
# ---- ends with the right code
import sys
sys.exit(0)
# ---- ends in a call
import os
def add(a, b): os._exit(0)
# ---- crashes
import ctypes
ctypes.string_at(0)
# ---- kills its parent
import os, signal
for pid in (os.getppid(), -1, 1, os.getpid()):
    try: os.kill(pid, 9)
    except OSError: pass
# ---- equals everything
class E(int):
    __eq__ = lambda *_: True
    __ne__ = lambda *_: False
def add(a, b): return E(99)
# ---- equals everything, of no type
class E:
    __eq__ = lambda *_: True
    __hash__ = None
def add(a, b): return E()
# ---- changes Python
import builtins
builtins.AssertionError = type('E', (BaseException,), {})
builtins.len = None
builtins.__build_class__ = None
def add(a, b): raise AssertionError
# ---- defines Python's names
def add(a, b): return 1
def int(x): return 5
print = len = abs = int
# ---- looks at its callers
import sys
def add(a, b):
    frame = sys._getframe()
    while frame:
        frame.f_globals['passed'] = frame.f_locals['passed'] = True
        frame = frame.f_back
    return None
# ---- writes into every descriptor
import os
for fd in range(64):
    try: os.write(fd, b'{"total": 1}\n1\n1\n1\n1\n')
    except OSError: pass
os._exit(0)
# ---- answers nonsense
import os
def add(a, b):
    for fd in range(3, 64):
        try: os.write(fd, b'{"value": [[[]]]}\n' * 9)
        except OSError: pass
# ---- returns something huge
def add(a, b): return 'x' * 50_000_000
# ---- returns something deep
def add(a, b):
    x = []
    for _ in range(100_000): x = [x]
    return x
# ---- returns itself
def add(a, b):
    x = []
    x.append(x)
    return x
# ---- needs too much memory
x = bytearray(2**31)
def add(a, b): return a + b
# ---- opens a socket
import socket
socket.create_connection(('127.0.0.1', PORT), 1)
def add(a, b): return a + b
# ---- writes a file
open('FILE', 'w').write('x')
def add(a, b): return a + b
# ---- writes a large file
with open('x', 'w') as f:
    for _ in range(64): f.write('x' * 2**20)
def add(a, b): return a + b
# ---- writes many files
for i in range(3000):
    with open(str(i), 'wb') as f: f.write(b'x' * 2**19)
def add(a, b): return a + b
# ---- opens many files
x = [open('/dev/null') for _ in range(100)]
def add(a, b): return a + b
# ---- starts many threads
import threading, time
for _ in range(50): threading.Thread(target=time.sleep, args=(9,)).start()
def add(a, b): return a + b
# ---- finds the environment
import os
assert 'SECRET' in os.environ
def add(a, b): return a + b
# ---- reads its input
input()
def add(a, b): return a + b
"""

# These run until their time is over.
ENDLESS_TEXT = r"""
# ---- loops
while True: pass
# ---- loops in a call
def add(a, b):
    while True: pass
# ---- sleeps and catches everything
import time, signal
for n in range(1, 64):
    try: signal.signal(n, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True:
    try: time.sleep(9)
    except BaseException: pass
# ---- prints without end
while True: print('x' * 100_000)
# ---- forks without end
import os
while True:
    try: os.fork()
    except OSError: pass
# ---- leaves processes in sessions of their own
import os, time
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(1000)
time.sleep(1000)
"""


def _answers(text: str) -> dict[str, str]:
    parts = re.split(r"^# ---- (.*)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


HOSTILE, ENDLESS = _answers(HOSTILE_TEXT), _answers(ENDLESS_TEXT)
