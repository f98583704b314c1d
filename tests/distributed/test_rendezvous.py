"""The rendezvous of processes, run as threads: complete, one missing, one too many, one with another config."""

import contextlib
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import small

from t5like.config.loader import to_json
from t5like.distributed import authentication, rendezvous, rendezvous_server
from t5like.distributed.launchers import ProcessInfo
from t5like.distributed.rendezvous_server import bind_address
from t5like.errors import ConfigError, ProcessLost


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def outcomes(starts, facts=lambda process: {}, seconds=20.0):
    """Run the rendezvous in all processes at once; returns the group or the exception of each."""
    with ThreadPoolExecutor(len(starts)) as pool:
        jobs = [pool.submit(rendezvous.rendezvous, start, facts(start.process), seconds=seconds) for start in starts]
        results = [job.exception() or job.result() for job in jobs]
    for result in results:
        for connection in result.connections.values() if isinstance(result, rendezvous.Group) else ():
            connection.close()
    return results


def infos(count, *processes, port=None, counts=None):
    address = f"localhost:{port or free_port()}"
    return [ProcessInfo("a test", address, (counts or {}).get(p, count), p) for p in processes]


def test_all_connect_and_process_0_returns_the_address_to_listen_on():
    results = outcomes(infos(4, 3, 1, 0, 2), lambda process: {"versions": "1"})
    assert results[2].address in ("127.0.0.1", "::1") and sorted(results[2].connections) == [1, 2, 3]
    here = socket.gethostname()
    assert [(group.address, group.hosts) for group in (*results[:2], results[3])] == [("", {0: here})] * 3


def test_all_processes_raise_the_same_message_about_another_config():
    configs = [to_json(small(seed=seed)) for seed in (0, 0, 7)]
    results = outcomes(infos(3, 0, 1, 2), lambda process: {"config": configs[process]})
    assert {type(error) for error in results} == {ConfigError} and len({str(error) for error in results}) == 1
    here = socket.gethostname()
    assert str(results[0]).startswith(f"process 2 on {here} has config ") and "seed: 0 -> 7" in str(results[0])
    assert f"process 0 on {here} has " in str(results[0])


def test_a_missing_process_is_named(monkeypatch):
    results = outcomes(infos(4, 0, 2), seconds=0.5)
    assert {type(error) for error in results} == {ProcessLost}
    assert all("for processes 1, 3 of 4 to start" in str(error) for error in results)
    monkeypatch.setattr(rendezvous, "REPORT_SECONDS", 0.0)
    [alone] = outcomes(infos(4, 2), seconds=0.3)
    assert isinstance(alone, ProcessLost) and "waited 0 s to start for process 0 of 4 at localhost:" in str(alone)


@pytest.mark.parametrize(
    "counts, processes, message",
    [
        ({1: 3}, (0, 1), "process 1 on .* is one of 3 processes, process 0 on .* one of 2"),
        ({}, (0, 1, 1), "two processes are process 1 of 3, on .* and on "),
    ],
)
def test_different_numbers_of_processes_and_equal_ranks_are_refused(counts, processes, message, monkeypatch):
    monkeypatch.setattr(rendezvous_server, "REPORT_SECONDS", 0.5)
    count = 2 if counts else 3
    results = outcomes(infos(count, *processes, counts=counts))
    assert {type(error) for error in results} == {ConfigError}
    assert all(re.search(message, str(error)) for error in results)


def test_unknown_clients_are_ignored_and_a_port_in_use_is_refused():
    starts = infos(2, 0, 1)
    port = int(starts[0].coordinator.rpartition(":")[2])
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(rendezvous.rendezvous, starts[0], {}, seconds=20)
        while True:
            try:
                with socket.create_connection(("localhost", port), timeout=1) as client:
                    client.sendall(b'{"process": 1}\n')
                break
            except OSError:
                pass
        assert rendezvous.rendezvous(starts[1], {}, seconds=20).hosts and first.result().address
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = ProcessInfo("a test", f"127.0.0.1:{server.getsockname()[1]}", 2, 0)
        with pytest.raises(ConfigError, match="can't listen at .*: Address already in use; use a free port"):
            rendezvous.rendezvous(taken, {}, seconds=1)


def test_a_slow_unknown_client_delays_nobody(monkeypatch):
    monkeypatch.setattr(rendezvous_server, "HELLO_SECONDS", 0.3)
    port, done = free_port(), threading.Event()

    def drip():
        while not done.is_set():
            with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=5) as client:
                while not done.wait(0.05):
                    client.sendall(b"x")

    client = threading.Thread(target=drip)
    client.start()
    try:
        begun = time.monotonic()
        [alone] = outcomes(infos(2, 0, port=port), seconds=1.0)
        assert isinstance(alone, ProcessLost) and time.monotonic() - begun < 2
        assert outcomes(infos(2, 0, 1, port=port))[1].hosts
    finally:
        done.set()
        client.join()


NESTED = b"[" * 10_000 + b"]" * 10_000
STRANGERS = {
    "bytes": bytes(range(256)) * 100 + b"\n",
    "nested lists": NESTED + b"\n",
    "nested lists in a field": b'{"challenge": "a", "text": ' + NESTED + b"}\n",
    "nested lists in the text": json.dumps({"challenge": "a", "text": NESTED.decode(), "proof": ""}).encode() + b"\n",
    "no fields": b"{}\n",
    "a list": b"[1]\n",
    "a number for the text": b'{"challenge": "a", "text": 1}\n',
    **{
        f"{value!r} as {name}": json.dumps(
            {
                "challenge": "a",
                "text": json.dumps(
                    {"process": 1, "num_processes": 2, "host": "h", "launcher": "l", "facts": {"config": "x"}}
                    | {name: value}
                ),
            }
        ).encode()
        + b"\n"
        for name, value in [
            ("process", "1"),
            ("process", True),
            ("process", None),
            ("num_processes", [2]),
            ("host", 1),
            ("facts", []),
            ("facts", {"config": 1}),
            ("facts", {}),
        ]
    },
    "a line without an end": b"x" * 2**23,
}


def test_nothing_that_a_stranger_sends_ends_or_delays_the_rendezvous():
    starts = infos(2, 0, 1)
    port = int(starts[0].coordinator.rpartition(":")[2])
    facts = {"config": to_json(small())}
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as clients:
        first = pool.submit(rendezvous.rendezvous, starts[0], facts, seconds=20)
        for name, data in STRANGERS.items():
            while not first.done():
                with contextlib.suppress(ConnectionRefusedError):
                    client = clients.enter_context(socket.create_connection(("localhost", port), timeout=5))
                    break
            with contextlib.suppress(ConnectionError):  # it may be closed before all is sent
                client.sendall(data)
            assert not first.done(), (name, first.result())
        silent = [clients.enter_context(socket.create_connection(("localhost", port), timeout=5)) for _ in range(50)]
        begun = time.monotonic()
        group = rendezvous.rendezvous(starts[1], facts, seconds=20)
        assert time.monotonic() - begun < 1 and first.result().connections.keys() == {1} and silent
        for each in (group, first.result()):
            each.connections.popitem()[1].close()


def test_processes_with_the_same_secret_connect_and_never_send_it(monkeypatch, capsys):
    sent = []
    send = rendezvous.Connection.send
    monkeypatch.setattr(rendezvous.Connection, "send", lambda self, **m: (sent.append(m), send(self, **m))[1])
    monkeypatch.setenv(authentication.VARIABLE, "correct horse")
    assert {type(result) for result in outcomes(infos(3, 0, 1, 2))} == {rendezvous.Group}
    assert len(sent) >= 6 and "correct horse" not in json.dumps(sent) and capsys.readouterr().err == ""
    proofs = [message["proof"] for message in sent if "proof" in message]
    assert len({*proofs}) == len(proofs) == 4 and all(len(proof) == 64 for proof in proofs)
    monkeypatch.delenv(authentication.VARIABLE)
    outcomes(infos(3, 0, 1, 2))
    assert capsys.readouterr().err == (
        "t5like: T5LIKE_RENDEZVOUS_SECRET is not set: the processes of this run do not authenticate each other\n"
    )


@pytest.mark.parametrize(
    "secrets, message",
    [
        (("a", "b"), "process 1 on .* has another T5LIKE_RENDEZVOUS_SECRET than process 0 at "),
        (("a", ""), "process 0 at .* has T5LIKE_RENDEZVOUS_SECRET, and process 1 on .* has none; give"),
        (("", "b"), "process 1 on .* has T5LIKE_RENDEZVOUS_SECRET, and process 0 at .* has none; give"),
    ],
)
def test_a_process_with_another_secret_is_refused_and_the_others_go_on(secrets, message, monkeypatch, capsys):
    asked = {"MainThread": secrets[1]}  # process 0 runs in another thread
    monkeypatch.setattr(
        rendezvous, "shared_secret", lambda: asked.get(threading.current_thread().name, secrets[0]).encode()
    )
    monkeypatch.setattr(rendezvous_server, "shared_secret", lambda: secrets[0].encode())
    starts = infos(2, 0, 1)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(rendezvous.rendezvous, starts[0], {}, seconds=20)
        with pytest.raises(ConfigError, match=message):
            rendezvous.rendezvous(starts[1], {}, seconds=20)
        assert not first.done()
        asked["MainThread"] = secrets[0]  # it is started again
        for group in (rendezvous.rendezvous(starts[1], {}, seconds=20), first.result()):
            group.connections.popitem()[1].close()
    if secrets[0] and secrets[1]:
        assert "has another T5LIKE_RENDEZVOUS_SECRET; it was refused" in capsys.readouterr().err


def test_a_proof_is_valid_for_its_own_connection_side_and_text_only():
    proof = authentication.prove(b"secret", "process 0", ("a", "b"), "text")
    valid = lambda *changed: authentication.is_proof(proof, *changed)
    assert valid(b"secret", "process 0", ("a", "b"), "text")
    assert not any(
        (
            valid(b"other", "process 0", ("a", "b"), "text"),
            valid(b"secret", "another process", ("a", "b"), "text"),
            valid(b"secret", "process 0", ("c", "b"), "text"),
            valid(b"secret", "process 0", ("ab", ""), "text"),
            valid(b"secret", "process 0", ("a", "b"), "text "),
            authentication.is_proof(None, b"secret", "process 0", ("a", "b"), "text"),
        )
    )


def test_a_process_that_ends_while_it_waits_can_be_started_again():
    starts = infos(3, 0, 1, 2)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(rendezvous.rendezvous, starts[0], {}, seconds=20)
        killed = None
        while killed is None:
            with contextlib.suppress(OSError):
                killed = socket.create_connection(("localhost", starts[0].coordinator.rpartition(":")[2]), timeout=5)
        hello = {**starts[1]._asdict(), "host": "h", "facts": {}}
        killed.sendall(json.dumps({"challenge": "", "text": json.dumps(hello), "proof": ""}).encode() + b"\n")
        time.sleep(0.2)
        killed.close()
        second = pool.submit(rendezvous.rendezvous, starts[2], {}, seconds=20)
        groups = rendezvous.rendezvous(starts[1], {}, seconds=20), second.result(), first.result()
        assert groups[2].hosts[1] == socket.gethostname()
        for group in groups:
            for connection in group.connections.values():
                connection.close()


def test_the_coordinator_never_listens_on_all_interfaces(monkeypatch):
    assert bind_address(ProcessInfo("a test", "127.0.0.1:5", 2, 0), 1) == "127.0.0.1"
    # A host whose own name means a loopback address to itself, as on Debian.
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("127.0.1.1", 5))])
    assert bind_address(ProcessInfo("a test", "node7:5", 2, 0), 1) not in ("127.0.1.1", "0.0.0.0", "::")
    monkeypatch.setenv("T5LIKE_BIND", "0.0.0.0")
    with pytest.raises(ConfigError, match="means all interfaces; use the address of the one"):
        bind_address(ProcessInfo("a test", "node7:5", 2, 0), 1)
