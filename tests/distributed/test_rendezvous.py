"""Processes that meet, as threads: all there, one missing, one too many, one with another config."""

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
from t5like.distributed.rendezvous import bind_address, join
from t5like.errors import ConfigError, ProcessLost


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def outcomes(starts, facts=lambda process: {}, seconds=20.0):
    """What `meet` gives or raises in each process, all at once."""
    with ThreadPoolExecutor(len(starts)) as pool:
        jobs = [pool.submit(join, start, facts(start.process), seconds=seconds) for start in starts]
        return [job.exception() or job.result() for job in jobs]


def of(count, *processes, port=None, told=None):
    address = f"localhost:{port or free_port()}"
    return [ProcessInfo("a test", address, (told or {}).get(p, count), p) for p in processes]


def test_all_meet_and_process_0_knows_the_one_address_to_listen_on():
    found = outcomes(of(4, 3, 1, 0, 2), lambda process: {"versions": "1"})
    assert found[2] in ("127.0.0.1", "::1") and [*found[:2], found[3]] == ["", "", ""]


def test_another_config_is_told_to_everyone_in_the_same_line():
    configs = [to_json(small(seed=seed)) for seed in (0, 0, 7)]
    found = outcomes(of(3, 0, 1, 2), lambda process: {"config": configs[process]})
    assert {type(error) for error in found} == {ConfigError} and len({str(error) for error in found}) == 1
    here = socket.gethostname()
    assert str(found[0]).startswith(f"process 2 on {here} has config ") and "seed: 0 -> 7" in str(found[0])
    assert f"process 0 on {here} has " in str(found[0])


def test_a_missing_process_is_named(monkeypatch):
    found = outcomes(of(4, 0, 2), seconds=0.5)
    assert {type(error) for error in found} == {ProcessLost}
    assert all("for processes 1, 3 of 4 to start" in str(error) for error in found)
    monkeypatch.setattr(rendezvous, "GRACE", 0.0)
    [alone] = outcomes(of(4, 2), seconds=0.3)
    assert isinstance(alone, ProcessLost) and "waited 0 s to start for process 0 of 4 at localhost:" in str(alone)


@pytest.mark.parametrize(
    "told, processes, message",
    [
        ({1: 3}, (0, 1), "process 1 on .* is one of 3 processes, process 0 on .* one of 2"),
        ({}, (0, 1, 1), "two processes are process 1 of 3, on .* and on "),
    ],
)
def test_a_wrong_number_of_processes_and_two_of_the_same_number_are_refused(told, processes, message, monkeypatch):
    monkeypatch.setattr(rendezvous, "GRACE", 0.5)
    count = 2 if told else 3
    found = outcomes(of(count, *processes, told=told))
    assert {type(error) for error in found} == {ConfigError}
    assert all(re.search(message, str(error)) for error in found)


def test_strangers_are_sent_away_and_a_port_in_use_is_refused():
    starts = of(2, 0, 1)
    port = int(starts[0].coordinator.rpartition(":")[2])
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(join, starts[0], {}, seconds=20)
        while True:
            try:
                with socket.create_connection(("localhost", port), timeout=1) as stranger:
                    stranger.sendall(b'{"process": 1}\n')
                break
            except OSError:
                pass
        assert join(starts[1], {}, seconds=20) == "" and first.result()
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = ProcessInfo("a test", f"127.0.0.1:{server.getsockname()[1]}", 2, 0)
        with pytest.raises(ConfigError, match="can't listen at .*: Address already in use; use a free port"):
            join(taken, {}, seconds=1)


def test_a_stranger_who_talks_slowly_and_without_end_holds_up_nobody(monkeypatch):
    monkeypatch.setattr(rendezvous, "LINE", 0.3)
    port, done = free_port(), threading.Event()

    def drip():
        while not done.is_set():
            with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=5) as stranger:
                while not done.wait(0.05):
                    stranger.sendall(b"x")

    stranger = threading.Thread(target=drip)
    stranger.start()
    try:
        begun = time.monotonic()
        [alone] = outcomes(of(2, 0, port=port), seconds=1.0)
        assert isinstance(alone, ProcessLost) and time.monotonic() - begun < 2
        assert outcomes(of(2, 0, 1, port=port))[1] == ""
    finally:
        done.set()
        stranger.join()


def test_the_coordinator_never_listens_on_all_interfaces(monkeypatch):
    assert bind_address(ProcessInfo("a test", "127.0.0.1:5", 2, 0), 1) == "127.0.0.1"
    # A host whose own name means a loopback address to itself, as on Debian.
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("127.0.1.1", 5))])
    assert bind_address(ProcessInfo("a test", "node7:5", 2, 0), 1) not in ("127.0.1.1", "0.0.0.0", "::")
    monkeypatch.setenv("T5LIKE_BIND", "0.0.0.0")
    with pytest.raises(ConfigError, match="means all interfaces; use the address of the one"):
        bind_address(ProcessInfo("a test", "node7:5", 2, 0), 1)
