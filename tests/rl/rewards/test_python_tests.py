"""The reward python_tests: the share of tests that an answer passes, and answers that try to get or break something."""

import socket
import time

import pytest
from hostile_answers import ENDLESS, HOSTILE
from process_tree import descendants

from t5like.rl.rewards import python_tests
from t5like.rl.rewards.python_tests import PythonTests, SandboxServer

TESTS = "assert add(2, 3) == 5\nassert add(1, 1) == 2\nassert add(0, 7) == 7\nassert add(-1, 1) == 0"
RIGHT = "def add(a, b):\n    return a + b"
STACK = """
class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x)
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
"""
VALUES = "{1: {2}, 'x': b'y', 2.5: (None, True, 1j), (): frozenset({3})}"


@pytest.fixture(scope="module", params=["namespaces", "limits"])
def server(request):
    """A server, in each of the two ways that it has to protect the machine."""
    server = SandboxServer(namespaces=request.param == "namespaces")
    yield server
    server.close()


@pytest.fixture(scope="module")
def namespaces():
    server = SandboxServer()
    yield server
    server.close()


@pytest.mark.parametrize(
    ("answer", "tests", "share"),
    [
        (RIGHT, TESTS, 1),
        ("def add(a, b): return 2 * a + 1", TESTS, 0.25),
        ("def add(a, b): return", TESTS, 0),
        ("def add(a, b) return", TESTS, 0),
        ("", TESTS, 0),
        (RIGHT, TESTS.split("\n"), 1),
        ("add = lambda a, b: 5", TESTS.split("\n"), 0.25),
        ("def f(x): x.sort(); x.append(0)", "x = [3, 1]\nf(x)\nassert x == [1, 3, 0]", 1),
        (
            "def f(g, x): return g(g(x))",
            "import math\nassert f(lambda x: x + 1, 3) == 5\nassert f(math.sqrt, 16) == 2",
            1,
        ),
        ("def f(x): raise ValueError('no')", "try: f(1)\nexcept ValueError as error: assert 'no' in str(error)", 1),
        (STACK, "s = Stack()\ns.push(3)\ns.push((4, 'x'))\nassert len(s) == 2 and s.pop() == (4, 'x')", 1),
        ("def f(n):\n    for i in range(n): yield i", "assert list(f(3)) == [0, 1, 2]\nassert next(f(1)) == 0", 1),
        (f"def f(): return {VALUES}", f"assert f() == {VALUES}", 1),
        ("def f(): return float('inf'), float('nan')", "a, b = f()\nassert a > 1e308\nassert b != b", 1),
        ("x = 3\ndef f(): global x; x += 1", "assert x == 3\nf()\nassert x == 4", 1),
        ("import statistics\nf = statistics.Counter", "import fractions\nassert f('aab') == {'a': 2, 'b': 1}", 1),
        ("def f(x): return x", "def check(candidate):\n    assert candidate(2) == 2\ncheck(f)", 1),
    ],
)
def test_the_reward_is_the_share_of_tests_that_pass(namespaces, monkeypatch, answer, tests, share):
    monkeypatch.setattr(python_tests, "sandbox_server", lambda: namespaces)
    assert PythonTests("task/tests", 10.0)({"task": {"tests": tests}}, answer) == share


@pytest.mark.parametrize("tests", ["assert add(", "x = 1", "", [], "import os\ndef f(): pass\n'text'", {"a": 1}])
def test_tests_that_cant_be_run_are_a_failure_of_the_reward(namespaces, monkeypatch, tests):
    monkeypatch.setattr(python_tests, "sandbox_server", lambda: namespaces)
    with pytest.raises(ValueError, match="tests"):
        PythonTests("tests", 10.0)({"tests": tests}, RIGHT)


@pytest.mark.parametrize("name", [*HOSTILE, *ENDLESS])
def test_a_hostile_answer_gets_nothing_and_costs_only_itself(server, name, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        tmp_path.chmod(0o777)
        answer = {**HOSTILE, **ENDLESS}[name]
        answer = answer.replace("PORT", str(listener.getsockname()[1])).replace("FILE", str(tmp_path / "written"))
        began = time.monotonic()
        assert server.run(answer, [TESTS], 0.3 if name in ENDLESS else 10.0) == {"passed": 0, "total": 4}
        assert time.monotonic() - began < 10
        assert list(tmp_path.iterdir()) == []
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert descendants(server._process.pid) == []


def test_an_endless_test_keeps_the_results_before_it(namespaces):
    tests = "assert add(2, 3) == 5\nwhile True: pass\nassert add(1, 1) == 2"
    assert namespaces.run(RIGHT, [tests], 0.3) == {"passed": 1, "total": 3}


def test_a_killed_server_is_started_again():
    server = SandboxServer()
    server._process.kill()
    server._process.wait()
    assert server.run(RIGHT, [TESTS], 10.0) == {"passed": 4, "total": 4}
    server.close()
    assert server._process.returncode is not None
