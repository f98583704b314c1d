"""The reward `python_tests`: the share of unit tests that an answer, a piece of Python code, passes.

Answer and tests run in two sandboxes (`sandbox`, `sandbox_server`). The tests are asserts, as one text or as a list of
texts, such as ``assert add(2, 3) == 5``; names that they don't define are those of the answer (`remote_objects`). An
answer that does not compile, fails, ends its process, runs for too long or uses too much of something passes no test
from then on: that costs this answer its reward, and nothing else happens.
"""

import contextlib
import dataclasses
import functools
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from t5like.rl.rewards.functions import Row, texts_of
from t5like.rl.rewards.remote_objects import HEADER

SHARE_OF_TIME = 0.8  # of rl.reward_timeout_seconds, so that endless loops end here, and not the process of rewards
LONGEST_ANSWER = 2**20  # bytes
_ROOT = Path(__file__).parents[3]
_PROGRAM = (
    "import sys; sys.path.append(sys.argv[1]); from t5like.rl.rewards.sandbox_server import main; "
    "main(namespaces=sys.argv[2] == 'namespaces')"
)


@dataclasses.dataclass(frozen=True)
class PythonTests:
    """The share of tests that the answer passes, from 0 to 1.

    Attributes:
        field: of the tests in a row.
        timeout_seconds: `rl.reward_timeout_seconds`.
    """

    field: str
    timeout_seconds: float

    def __call__(self, row: Row, answer: str) -> float:
        verdict = sandbox_server().run(answer, texts_of(row, self.field), SHARE_OF_TIME * self.timeout_seconds)
        if "error" in verdict:
            raise ValueError(f"{self.field}: {verdict['error']}")
        return verdict["passed"] / verdict["total"]

    def prepare(self) -> None:
        sandbox_server()


class SandboxServer:
    """The server process of this process; it ends with it.

    Args:
        namespaces: whether to use them where they are possible.

    Attributes:
        protection: what the sandboxes are made of, ``namespaces`` or ``limits``; see `sandbox`.
    """

    def __init__(self, *, namespaces: bool = True) -> None:
        self._namespaces = namespaces
        self._process: subprocess.Popen | None = None
        self.protection = self._start()

    def run(self, answer: str, tests: list[str], seconds: float) -> dict[str, Any]:
        """``{"passed": N, "total": N}``, or ``{"error": MESSAGE}`` if the tests can't be run."""
        code, texts = answer.encode(errors="replace"), json.dumps(tests).encode()
        if len(code) > LONGEST_ANSWER:
            code = b"raise MemoryError"
        for attempt in range(2):
            try:
                self._control.sendall(HEADER.pack(len(code), len(texts), seconds) + code + texts)
                if line := self._file.readline():
                    return json.loads(line)
            except OSError:  # the server has been killed, for instance because the machine has no memory left
                pass
            self.close()
            if attempt == 0:
                self._start()
        return {"error": "the sandbox ends; is there enough memory?"}

    def close(self) -> None:
        """End the server and its sandboxes."""
        self._control.close()
        self._file.close()
        with contextlib.suppress(OSError):
            self._process.kill()
        self._process.wait()

    def _start(self) -> str:
        self._control, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-I", "-S", "-B", "-c", _PROGRAM, str(_ROOT)]
            command.append("namespaces" if self._namespaces else "limits")
            self._process = subprocess.Popen(command, stdin=theirs, env={}, cwd="/", start_new_session=True)
        self._file = self._control.makefile("rb")
        line = self._file.readline()
        if not line:
            raise RuntimeError("the sandbox for Python tests does not start")
        return json.loads(line)["protection"]


@functools.cache
def sandbox_server() -> SandboxServer:
    """The server of this process, started on first use."""
    return SandboxServer()
