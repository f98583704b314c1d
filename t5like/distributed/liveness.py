"""Connections between process 0 and all others for the whole run: heartbeats, the end of the run, and a common stop.

The connections are those of the rendezvous. When a process is killed, the operating system closes its connection: the
others know it at once. A process that sends no heartbeat for `train.heartbeat_timeout_seconds` is stopped, its host is
lost, or its interpreter does not run. Heartbeats are sent by a thread of their own, so they do not depend on progress;
they contain the phase, which messages about a lost process name, and the time without progress. Time is counted while
this process runs, by the monotonic clock: a job that is stopped and continued as a whole, or a clock that is set, loses
nobody.

A stop: the process that received a signal asks process 0, which asks all; each answers with the number of points of the
training loop that it has passed, and passes none until process 0 has sent the largest number to all.
"""

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from t5like.distributed.activity import LONGEST_TICK, activity, describe_phase
from t5like.distributed.messages import Connection
from t5like.errors import printable

RESTART = "start all of them again"


class End(NamedTuple):
    """Why the run ends: the exit code, the message, and whether another process has sent it."""

    code: int
    message: str
    from_other: bool


class _Peer:
    """The other end of a connection: what its last heartbeat contained, and for how many seconds it is silent."""

    def __init__(self, rank: int, host: str, connection: Connection):
        self.rank, self.host, self.connection = rank, host, connection
        self.phase, self.step, self.idle, self.waiting = "start", None, 0.0, False
        self.silent, self.left = 0.0, False

    def describe(self) -> str:
        return f"process {self.rank} on {self.host}, {describe_phase(self.phase, self.step)}"


class Liveness:
    """The connections of this process and the thread that serves them.

    Attributes:
        end: why the run ends, or None.
    """

    def __init__(
        self,
        rank: int,
        connections: Mapping[int, Connection],
        hosts: Mapping[int, str],
        seconds: float,
        *,
        on_end: Callable[[End], None],
        vote: Callable[[], int],
        on_agreed: Callable[[int], None],
    ):
        """Start the thread.

        Args:
            rank: of this process.
            connections: by rank, from `rendezvous.Group`.
            hosts: by rank.
            seconds: `train.heartbeat_timeout_seconds`.
            on_end: called once, in a thread of its own, when the run ends because of another process.
            vote: returns how many points this process has passed, and holds it until `on_agreed`.
            on_agreed: called with the number of points after which all stop.
        """
        self.rank, self.end = rank, None
        self._closed, self._known = threading.Event(), threading.Event()
        self._peers = {rank: _Peer(rank, hosts[rank], connection) for rank, connection in connections.items()}
        self._seconds = seconds
        self._interval = min(seconds / 5, max(1.0, len(connections) / 200))
        self._on_end, self._vote, self._on_agreed = on_end, vote, on_agreed
        self._votes: dict[int, int] | None = None  # process 0 during a stop
        self._least_idle, self._leaving, self._lock = 0.0, False, threading.RLock()
        self._selector = selectors.DefaultSelector()
        for peer in self._peers.values():
            self._selector.register(peer.connection.socket, selectors.EVENT_READ, peer)
        self._thread = threading.Thread(target=self._serve, daemon=True, name="liveness")
        self._thread.start()

    def least_idle(self) -> float:
        """Seconds in which no process that does not wait for others has made progress."""
        return self._least_idle

    def request_stop(self) -> None:
        """Ask all processes to agree on a point to stop at; see `on_agreed`."""
        if self.rank:
            self._send_all(stop=True)
        else:
            self._start_vote()

    def publish_end(self, code: int, message: str) -> None:
        """Send the reason why this process ends to all others; process 0 sends it on."""
        with self._lock:
            if self.end is None:
                self.end = End(code, message, from_other=False)
        self._send_all(end=[code, message])

    def wait_until_received(self, seconds: float) -> None:
        """Wait until all processes know why the run ends, at most `seconds`.

        The others wait for process 0, which sends the reason back to them; process 0 waits until their connections are
        closed, because JAX's coordination service ends with it.
        """
        if self.rank:
            self._known.wait(seconds)
            return
        deadline = time.monotonic() + seconds
        while any(not peer.connection.closed for peer in self._peers.values()) and time.monotonic() < deadline:
            time.sleep(0.01)

    def leave(self) -> None:
        """Announce the regular end: from now on, a closed connection is no failure."""
        self._leaving = True
        self._send_all(leave=True)

    def close(self) -> None:
        """End the thread and close the connections."""
        self._leaving = True
        self._closed.set()
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.connection.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join(timeout=5)
        for peer in self._peers.values():
            peer.connection.close()

    def _send_all(self, **message: Any) -> None:
        for peer in self._peers.values():
            if not peer.connection.closed:
                peer.connection.send(**message)

    def _serve(self) -> None:
        ticked = beat_at = time.monotonic()
        while not self._closed.is_set():
            for key, _ in self._selector.select(min(self._interval, 0.5)):
                peer: _Peer = key.data
                for message in peer.connection.receive():
                    peer.silent = 0.0
                    self._handle(peer, message)
                if peer.connection.closed:
                    self._selector.unregister(peer.connection.socket)
                    if not (peer.left or self._leaving):
                        self._lost(peer, "its connection was closed: it was killed, or its host failed")
            now = time.monotonic()
            passed, ticked = min(now - ticked, LONGEST_TICK), now
            for peer in self._peers.values():
                peer.silent += passed
                peer.idle += passed
                if peer.silent > self._seconds and not (peer.left or self._leaving or peer.connection.closed):
                    what = f"has sent no heartbeat for {peer.silent:.0f} s: it is stopped, or its host failed"
                    self._lost(peer, what)
            if now >= beat_at:
                beat_at = now + self._interval
                self._beat()

    def _beat(self) -> None:
        if self.rank == 0:
            idle = [(peer.idle, peer.waiting) for peer in self._peers.values()]
            idle.append((activity.idle, activity.mode == "waiting"))
            self._least_idle = min([time for time, waiting in idle if not waiting] or [time for time, _ in idle])
        waiting = activity.mode == "waiting"
        beat = [activity.phase, activity.step, activity.idle, waiting, self._least_idle]
        self._send_all(beat=beat)

    def _handle(self, peer: _Peer, message: dict[str, Any]) -> None:
        """Handle a message. The sender was compared and, with a secret, authenticated in the rendezvous."""
        match message:
            case {"beat": [str(phase), step, int() | float() as idle, bool(waiting), int() | float() as least]}:
                peer.phase, peer.step = printable(phase, longest=100), step if isinstance(step, int) else None
                peer.idle, peer.waiting = idle, waiting
                if self.rank:
                    self._least_idle = least
            case {"end": [int(code), str(text)]}:
                self._known.set()
                if self.rank == 0:
                    self._send_all(end=[code, text])
                self._end(code, printable(text, longest=2000), from_other=True)
            case {"leave": True}:
                peer.left = True
            case {"stop": True} if self.rank == 0:
                self._start_vote()
            case {"vote?": True} if self.rank:
                self._send_all(vote=self._vote())
            case {"vote": int(count)} if self.rank == 0:
                self._count(peer.rank, count)
            case {"agreed": int(count)} if self.rank:
                self._on_agreed(count)

    def _start_vote(self) -> None:
        with self._lock:
            if self._votes is not None:
                return
            self._votes = {}
        self._send_all(**{"vote?": True})
        self._count(self.rank, self._vote())

    def _count(self, rank: int, count: int) -> None:
        with self._lock:
            self._votes[rank] = count
            if len(self._votes) <= len(self._peers):
                return
            agreed = max(self._votes.values())
        self._send_all(agreed=agreed)
        self._on_agreed(agreed)

    def _lost(self, peer: _Peer, what: str) -> None:
        if self.end is not None:
            return
        message = f"{peer.describe()}, is lost: {what}; start all of them again"
        self._send_all(end=[76, message])
        self._end(76, message, from_other=False)

    def _end(self, code: int, message: str, *, from_other: bool) -> None:
        with self._lock:
            if self.end is not None:
                return
            self.end = End(code, message, from_other)
        # In a thread of its own: this one notes when the others have received the reason.
        threading.Thread(target=self._on_end, args=(self.end,), daemon=True, name="end").start()
