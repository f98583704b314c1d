"""A process that runs answers against tests: for each request two sandboxes, one for the answer and one for the tests.

`python_tests` starts it in an interpreter without packages, and keeps it: a fork of this small process takes about a
tenth of the time of a new interpreter. It reads only the lengths of a request. Each sandbox reads its own part of it,
so the tests are never in the memory of the answer's process, and the answer can't look the results up.

    request    HEADER (length of the answer, length of the tests, seconds), the answer, the tests as a JSON list
    response   one JSON line: {"passed": 2, "total": 3} or {"error": MESSAGE}
"""

import ast
import json
import os
import select
import socket
import sys
import time
from typing import Any

from t5like.rl.rewards import sandbox
from t5like.rl.rewards.remote_objects import HEADER, Channel, Client, serve

MOST_TESTS = 10_000


def main(*, namespaces: bool) -> None:
    """Serve requests from the socket that is standard input until its other side is closed; see `sandbox`."""
    sandbox.die_with_parent()
    with socket.socket(fileno=os.dup(0)) as control:
        _only_descriptors(control.fileno())
        kind = sandbox.protection(namespaces=namespaces)
        sandbox.check(kind)
        control.sendall(json.dumps({"protection": kind}).encode() + b"\n")
        while header := _read(control, HEADER.size):
            answer_length, tests_length, seconds = HEADER.unpack(header)
            verdict = _judge(control, kind, answer_length, tests_length, seconds)
            control.sendall(json.dumps(verdict).encode() + b"\n")


def _judge(control: socket.socket, kind: str, answer_length: int, tests_length: int, seconds: float) -> dict[str, Any]:
    until = time.monotonic() + seconds
    ours, theirs = socket.socketpair()
    ready, has_read = os.pipe()
    results, writes = os.pipe()

    def answer() -> None:
        source = _read(control, answer_length)
        os.write(has_read, b"1")
        channel = Channel(theirs)
        _only_descriptors(theirs.fileno())
        _use_library()
        run_answer(source.decode(), channel)

    def tests() -> None:
        texts = json.loads(_read(control, tests_length))
        os.write(has_read, b"1")
        client = Client(Channel(ours))
        _only_descriptors(ours.fileno(), writes)
        _use_library()
        run_tests(texts, client, lambda line: os.write(writes, line.encode() + b"\n"))

    boxes = []
    try:
        for part in (answer, tests):
            boxes.append(sandbox.start(kind, part, seconds))
            if not select.select([ready], [], [], 30.0)[0] or not os.read(ready, 1):
                raise RuntimeError("no process can be started")  # what it has not read would be the next request
        for descriptor in (writes, has_read):
            os.close(descriptor)
        ours.close()
        theirs.close()
        return _verdict(results, until)
    finally:
        sandbox.end(boxes)
        for descriptor in (ready, results):
            os.close(descriptor)


def _verdict(results: int, until: float) -> dict[str, Any]:
    """Read the results of tests until they are complete, their process ends, or the time is over."""
    text, verdict = b"", {"error": "the tests did not start"}
    while (left := until - time.monotonic()) > 0 and select.select([results], [], [], left)[0]:
        part = os.read(results, 2**16)
        text += part
        first, *rest = text.decode().split("\n")
        if rest:
            verdict = {"passed": rest.count("1"), **json.loads(first)}
        if not part or len(rest) > verdict.get("total", 0):
            break
    return verdict


def _read(control: socket.socket, length: int) -> bytes:
    """Exactly so many bytes; none at the end of the stream."""
    parts, missing = [], length
    while missing and (part := control.recv(min(missing, 2**16))):
        parts.append(part)
        missing -= len(part)
    return b"" if missing else b"".join(parts)


def _only_descriptors(*kept: int) -> None:
    """Connect the standard streams with nothing, and close everything else but `kept`."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    limit = os.sysconf("SC_OPEN_MAX")
    before = 3
    for descriptor in sorted({sandbox.LIBRARY_DESCRIPTOR, *kept}):
        os.closerange(before, descriptor)
        before = descriptor + 1
    os.closerange(before, min(limit, 2**16))


# ---- In the sandboxes ----


def _use_library() -> None:
    """Import from the standard library only."""
    sys.path[:] = [sandbox.LIBRARY, f"{sandbox.LIBRARY}/lib-dynload"]
    sys.path_importer_cache.clear()


def run_answer(source: str, channel: Channel) -> None:
    """Execute an answer, then serve its objects to the tests. It may end this process at any point."""
    namespace: dict[str, Any] = {"__name__": "answer"}
    exec(compile(source, "answer", "exec", dont_inherit=True), namespace)  # noqa: S102
    serve(namespace, channel)


class Names(dict):
    """The global names of tests: their own, Python's, then those of the answer."""

    def __init__(self, client: Client) -> None:
        super().__init__(__name__="tests", __builtins__=__builtins__)
        self._client = client

    def __missing__(self, name: str) -> Any:
        if name in vars(sys.modules["builtins"]) or name.startswith("__"):
            raise KeyError(name)  # Python looks there next
        return self._client.get_global(name)


def run_tests(texts: list[str], client: Client, report) -> None:
    """Report ``{"total": N}``, then "1" or "0" for each test; or ``{"error": MESSAGE}``.

    Args:
        texts: of tests. If there is only one, its statements are tests, apart from definitions, imports and
            assignments; otherwise each text is one test.
        client: for names that the tests don't define.
        report: writes a line.
    """
    try:
        trees = [ast.parse(text) for text in texts]
        units = [(ast.Module([statement], []), _is_test(statement)) for tree in trees[:1] for statement in tree.body]
        if len(texts) != 1:
            units = [(tree, True) for tree in trees if tree.body]
        codes = [(compile(tree, "tests", "exec", dont_inherit=True), is_test) for tree, is_test in units]
        total = sum(is_test for _, is_test in codes)
        if not 1 <= total <= MOST_TESTS:
            raise ValueError(f"{total} tests instead of 1 to {MOST_TESTS}")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        report(json.dumps({"error": f"the tests can't be run: {type(error).__name__}: {error}"}))
        return
    report(json.dumps({"total": total}))
    names = Names(client)
    for code, is_test in codes:
        passed = True
        try:
            exec(code, names if len(texts) == 1 else Names(client))  # noqa: S102
        except BaseException:  # also SystemExit
            passed = False
        if is_test:
            report(str(int(passed)))


def _is_test(statement: ast.stmt) -> bool:
    setup = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom
    setup |= ast.Assign | ast.AnnAssign | ast.AugAssign
    return not isinstance(statement, setup) and not _is_text(statement)


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
