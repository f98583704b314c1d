"""The connections of a run's processes, in one process: a lost one is named to all, and all stop together."""

import contextlib
import socket
import threading
import time

import pytest

from t5like.distributed import activity
from t5like.distributed.liveness import Liveness
from t5like.distributed.messages import Connection


class Group:
    """Three processes; `ends`, `stops`: what each was told."""

    def __init__(self, seconds=60.0, passed=(0, 0, 0)):
        self.ends, self.stops, self.held = {}, {}, set()
        pairs = {rank: socket.socketpair() for rank in (1, 2)}
        sides = [{rank: pair[0] for rank, pair in pairs.items()}, {0: pairs[1][1]}, {0: pairs[2][1]}]
        self.processes = [
            Liveness(
                rank,
                {other: Connection(end) for other, end in side.items()},
                {other: f"node{other}" for other in side},
                seconds,
                on_end=lambda end, rank=rank: self.ends.update({rank: end}),
                vote=lambda rank=rank: (self.held.add(rank), passed[rank])[1],
                on_agreed=lambda point, rank=rank: self.stops.update({rank: point}),
            )
            for rank, side in enumerate(sides)
        ]

    def wait(self, condition, seconds=30.0):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def kill(self, rank: int) -> None:
        """Close the sockets as the operating system does; it tells nobody itself."""
        self.processes[rank]._leaving = True
        for peer in self.processes[rank]._peers.values():
            with contextlib.suppress(OSError):
                peer.connection.socket.shutdown(socket.SHUT_RDWR)

    def close(self):
        for process in self.processes:
            process.close()


@pytest.fixture
def group():
    groups = []

    def make(**arguments):
        groups.append(Group(**arguments))
        return groups[-1]

    yield make
    for each in groups:
        each.close()


@pytest.fixture(autouse=True)
def phase():
    with activity.in_phase("a training step", 7):
        yield


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_named_to_all_long_before_a_heartbeat_is_missing(victim, group):
    processes = group()
    known = lambda process: all(peer.phase == "a training step" for peer in process._peers.values())
    processes.wait(lambda: all(map(known, processes.processes)))  # by heartbeats
    begun = time.monotonic()
    processes.kill(victim)
    others = {0, 1, 2} - {victim}
    processes.wait(lambda: others <= processes.ends.keys())
    assert time.monotonic() - begun < 5
    expected = (
        f"process {victim} on node{victim}, in a training step at step 7, is lost: its connection was closed: it was "
        "killed, or its host failed; start all of them again"
    )
    assert {(processes.ends[rank].code, processes.ends[rank].message) for rank in others} == {(76, expected)}


def test_a_process_without_heartbeats_is_named(group, monkeypatch):
    monkeypatch.setattr(Liveness, "_beat", lambda self: self.rank == 2 or beat(self))
    processes = group(seconds=0.6)
    processes.wait(lambda: processes.ends.keys() >= {0, 1, 2})
    assert {end.code for end in processes.ends.values()} == {76}
    assert "process 2 on node2, in start, is lost: has sent no heartbeat for 1 s" in processes.ends[0].message
    assert processes.ends[0].message == processes.ends[1].message


beat = Liveness._beat


def test_a_run_that_was_stopped_as_a_whole_or_whose_clock_jumps_loses_nobody(group, monkeypatch):
    processes = group(seconds=5)
    shift = [0.0]
    monotonic = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + shift[0])
    shift[0] = 1000.0  # all were stopped for so long
    time.sleep(1.2)
    assert not processes.ends


def test_an_error_of_one_process_ends_all_with_its_code(group):
    processes = group()
    processes.processes[2].publish_end(4, "process 2: full")
    processes.wait(lambda: processes.ends.keys() >= {0, 1})
    assert {(end.code, end.message, end.from_other) for end in processes.ends.values()} == {
        (4, "process 2: full", True)
    }
    assert 2 not in processes.ends  # it ends by itself


@pytest.mark.parametrize("asked", [0, 2])
def test_all_stop_after_the_largest_number_of_points_that_one_has_passed(asked, group):
    processes = group(passed=(4, 6, 5))
    for _ in range(2):  # a second signal changes nothing
        processes.processes[asked].request_stop()
    processes.wait(lambda: len(processes.stops) == 3)
    assert processes.stops == {0: 6, 1: 6, 2: 6} and processes.held == {0, 1, 2} and not processes.ends


def test_a_regular_end_loses_nobody(group):
    processes = group(seconds=1)
    for process in processes.processes:
        process.leave()
    processes.close()
    assert not processes.ends


def test_what_is_no_message_closes_a_connection():
    for data in (b"\xff\n", b"[1]\n", b"[" * 10_000 + b"\n"):
        here, there = socket.socketpair()
        connection = Connection(here)
        there.sendall(b'{"a": 1}\n' + data)
        there.close()
        received = []
        while not connection.closed:
            received += connection.receive()
        assert received == [{"a": 1}] or not received
        connection.close()


def test_messages_arrive_complete_and_in_order():
    here, there = (Connection(end) for end in socket.socketpair())
    received = []

    def receive():
        while len(received) < 200:
            received.extend(there.receive())

    thread = threading.Thread(target=receive)
    thread.start()
    for number in range(200):
        assert here.send(number=number, text="é" * 3000)
    thread.join(timeout=10)
    assert [message["number"] for message in received] == list(range(200))
