"""The rendezvous of processes, run as threads: complete, one missing, one too many, one with another config."""

import contextlib
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import small

from t5like.config.loader import to_json
from t5like.distributed import rendezvous
from t5like.distributed.launchers import ProcessInfo
from t5like.distributed.rendezvous import bind_address
from t5like.errors import ConfigError, ProcessLost


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def outcomes(starts, facts=lambda process: {}, seconds=20.0):
    """Run the rendezvous in all processes at once; returns what it returns or raises in each."""
    with ThreadPoolExecutor(len(starts)) as pool:
        jobs = [pool.submit(rendezvous.rendezvous, start, facts(start.process), seconds=seconds) for start in starts]
        return [job.exception() or job.result() for job in jobs]


def infos(count, *processes, port=None, counts=None):
    address = f"localhost:{port or free_port()}"
    return [ProcessInfo("a test", address, (counts or {}).get(p, count), p) for p in processes]


def test_all_connect_and_process_0_returns_the_address_to_listen_on():
    results = outcomes(infos(4, 3, 1, 0, 2), lambda process: {"versions": "1"})
    assert results[2] in ("127.0.0.1", "::1") and [*results[:2], results[3]] == ["", "", ""]


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
    monkeypatch.setattr(rendezvous, "REPORT_SECONDS", 0.5)
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
        assert rendezvous.rendezvous(starts[1], {}, seconds=20) == "" and first.result()
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = ProcessInfo("a test", f"127.0.0.1:{server.getsockname()[1]}", 2, 0)
        with pytest.raises(ConfigError, match="can't listen at .*: Address already in use; use a free port"):
            rendezvous.rendezvous(taken, {}, seconds=1)


def test_a_slow_unknown_client_delays_nobody(monkeypatch):
    monkeypatch.setattr(rendezvous, "HELLO_SECONDS", 0.3)
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
        assert outcomes(infos(2, 0, 1, port=port))[1] == ""
    finally:
        done.set()
        client.join()


def test_the_coordinator_never_listens_on_all_interfaces(monkeypatch):
    assert bind_address(ProcessInfo("a test", "127.0.0.1:5", 2, 0), 1) == "127.0.0.1"
    # A host whose own name means a loopback address to itself, as on Debian.
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("127.0.1.1", 5))])
    assert bind_address(ProcessInfo("a test", "node7:5", 2, 0), 1) not in ("127.0.1.1", "0.0.0.0", "::")
    monkeypatch.setenv("T5LIKE_BIND", "0.0.0.0")
    with pytest.raises(ConfigError, match="means all interfaces; use the address of the one"):
        bind_address(ProcessInfo("a test", "node7:5", 2, 0), 1)
