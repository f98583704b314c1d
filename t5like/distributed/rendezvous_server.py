"""Process 0's side of the rendezvous: accept connections, authenticate them, and compare what must be equal.

Every client of the network can connect. Many of them at once, silent or slow ones, and any bytes that they send delay
nobody: all connections are read in one loop, and one that has not introduced itself in `HELLO_SECONDS` is closed.
"""

import contextlib
import ipaddress
import json
import os
import re
import selectors
import socket
import sys
import time
from typing import NamedTuple

from t5like.distributed.authentication import VARIABLE, challenge, is_proof, prove, shared_secret
from t5like.distributed.descriptions import REPORT_SECONDS, describe_difference
from t5like.distributed.launchers import ProcessInfo
from t5like.distributed.messages import Connection
from t5like.errors import ConfigError, printable
from t5like.io.strict_json import loads

HELLO_SECONDS = 5.0  # for a client to introduce itself; processes of the run try again
MOST_UNKNOWN = 1000  # clients that have not introduced themselves; of more, the first is closed
MOST_WARNINGS = 3  # lines about refused clients
PROCESS_0, OTHERS = "process 0", "another process"  # roles in a proof
FIELDS = {"process": int, "num_processes": int, "host": str, "launcher": str, "facts": dict}


class Peer(NamedTuple):
    """A process that has introduced itself; `challenges`: see `authentication.prove`."""

    hello: dict
    connection: Connection
    challenges: tuple[str, str]


class Server:
    """Accepts the other processes.

    Attributes:
        peers: by rank; a process whose rank is impossible or occurs twice has a negative one.
    """

    def __init__(self, info: ProcessInfo, hello: dict, address: str):
        """Listen.

        Raises:
            ConfigError: the address is in use, or is none of this host.
        """
        self.peers: dict[int, Peer] = {}
        self._info, self._hello, self._secret = info, hello, shared_secret()
        self._unknown: dict[Connection, tuple[str, float]] = {}  # challenge, deadline
        self._objection, self._warnings = "", 0
        port, family = int(info.coordinator.rpartition(":")[2]), socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            self._server = socket.create_server((address, port), family=family, backlog=1024)
        except OSError as error:
            raise ConfigError(
                f"process 0 can't listen at {address}:{port} ({info.launcher}): {os.strerror(error.errno)}; "
                "use a free port and an address of its own host in T5LIKE_COORDINATOR"
            ) from None
        self._server.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)

    def accept_all(self, deadline: float) -> str:
        """Accept connections until all peers are connected or time is over; returns the first difference, or ""."""
        with self._server:
            while len(self.peers) < self._info.num_processes - 1 and time.monotonic() < deadline:
                before = self._objection
                for key, _ in self._selector.select(min(max(deadline - time.monotonic(), 0.01), 0.5)):
                    if key.data is None:
                        self._accept()
                    elif key.data in self._unknown:
                        self._introduced(key.data)
                    elif key.data.receive() or key.data.closed:  # it ended before the others came, or says too much
                        self._drop(key.data)
                for connection in [each for each, (_, end) in self._unknown.items() if time.monotonic() > end]:
                    self._drop(connection)
                if self._objection and not before:  # peers that are about to connect receive it too
                    deadline = min(deadline, time.monotonic() + REPORT_SECONDS)
        for connection in [*self._unknown]:
            self._drop(connection)
        self._selector.close()
        if not self._secret and not self._objection and len(self.peers) == self._info.num_processes - 1:
            self._warn(f"{VARIABLE} is not set: the processes of this run do not authenticate each other")
        return self._objection

    def send_result(self, objection: str, lost: str) -> None:
        """Send to all peers how they differ, or which are missing; nothing if they form the run."""
        text = json.dumps({"config": objection, "lost": lost, "host": self._hello["host"]})
        for peer in self.peers.values():
            proof = prove(self._secret, PROCESS_0, peer.challenges, text) if self._secret else ""
            peer.connection.send(text=text, proof=proof)

    def close(self) -> None:
        """Close all connections."""
        for peer in self.peers.values():
            peer.connection.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection = Connection(self._server.accept()[0])
            self._unknown[connection] = (own := challenge()), time.monotonic() + HELLO_SECONDS
            self._selector.register(connection.socket, selectors.EVENT_READ, connection)
            connection.send(challenge=own, secret=bool(self._secret))
            if len(self._unknown) > MOST_UNKNOWN:
                self._drop(next(iter(self._unknown)))

    def _drop(self, connection: Connection) -> None:
        self._unknown.pop(connection, None)
        self.peers = {rank: peer for rank, peer in self.peers.items() if peer.connection is not connection}
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection.socket)
        connection.close()

    def _introduced(self, connection: Connection) -> None:
        """Read what a client has sent; if it is a process of this run, it becomes a peer."""
        messages = connection.receive()
        if not messages:
            if connection.closed:
                self._drop(connection)
            return
        own, _ = self._unknown[connection]
        other, text = messages[0].get("challenge"), messages[0].get("text")
        if not isinstance(other, str) or not isinstance(text, str):
            self._drop(connection)
            return
        challenges = own, other
        if self._secret and not is_proof(messages[0].get("proof"), self._secret, OTHERS, challenges, text):
            with contextlib.suppress(OSError):
                self._warn(f"a client at {connection.socket.getpeername()[0]} has another {VARIABLE}; it was refused")
            connection.send(refused=True)
            self._drop(connection)
            return
        if (hello := self._hello_of(text)) is None:
            self._drop(connection)
            return
        del self._unknown[connection]
        rank, difference = hello["process"], _difference(self._hello, hello)
        if rank in self.peers or not 0 < rank < self._info.num_processes:
            other_hello = self._hello if rank not in self.peers else self.peers[rank].hello
            difference = difference or (
                f"two processes are process {rank} of {self._info.num_processes}, on {other_hello['host']} and on "
                f"{hello['host']}; give each its own T5LIKE_PROCESS_ID"
            )
            rank = -len(self.peers) - 1
        self.peers[rank] = Peer(hello, connection, challenges)
        self._objection = self._objection or difference

    def _hello_of(self, text: str) -> dict | None:
        """Return what a client sent, if it has the fields of `rendezvous`."""
        try:
            hello = loads(text)
        except ValueError:
            return None
        if not isinstance(hello, dict) or any(type(hello.get(name)) is not kind for name, kind in FIELDS.items()):
            return None
        facts = hello["facts"]
        if (
            not all(isinstance(value, str) for value in facts.values())
            or not self._hello["facts"].keys() <= facts.keys()
        ):
            return None
        hello["host"] = printable(hello["host"], longest=100)
        return hello

    def _warn(self, text: str) -> None:
        self._warnings += 1
        if self._warnings <= MOST_WARNINGS:
            print(f"t5like: {text}", file=sys.stderr, flush=True)


def _difference(hello: dict, peer: dict) -> str:
    """Return why a peer can't run together with process 0, or nothing."""
    names = f"process {peer['process']} on {peer['host']}", f"process 0 on {hello['host']}"
    if peer["num_processes"] != hello["num_processes"]:
        return (
            f"{names[0]} is one of {peer['num_processes']} processes, {names[1]} one of {hello['num_processes']} "
            f"({hello['launcher']}); start all with the same number of processes"
        )
    for name, expected in hello["facts"].items():
        if (value := peer["facts"].get(name, "nothing")) != expected:
            return describe_difference(name, (names[0], value), (names[1], expected))
    return ""


def bind_address(info: ProcessInfo, seconds: float) -> str:
    """Return the one address that process 0 listens on: that of the coordinator's name, never all interfaces.

    A host's own name may resolve to a loopback address on the host itself (Debian's /etc/hosts); then it is the address
    from which the host reaches others. T5LIKE_BIND overrides.
    """
    host, _, port = info.coordinator.rpartition(":")
    if chosen := os.environ.get("T5LIKE_BIND"):
        return _one_interface(chosen)
    deadline = time.monotonic() + seconds
    while True:
        try:
            addresses = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
            break
        except socket.gaierror as error:  # a pod's name may be registered after the pod has started
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"the coordinator's host {host!r} ({info.launcher}) got no address in {seconds:.0f} s: "
                    f"{error.strerror}; use one that has, such as T5LIKE_COORDINATOR=10.0.0.1:8476"
                ) from None
            time.sleep(1)
    address = addresses[0][4][0]
    if ipaddress.ip_address(address).is_loopback and not re.match(r"127\.|\[?::1|localhost", host):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
            outward.connect(("192.0.2.1", 9))  # an address for documentation; nothing is sent
            address = outward.getsockname()[0]
    return _one_interface(address)


def _one_interface(address: str) -> str:
    """Refuse the address that means all interfaces."""
    with contextlib.suppress(ValueError):  # a name
        if ipaddress.ip_address(address.strip("[]")).is_unspecified:
            raise ConfigError(
                f"process 0 can't listen at {address}, which means all interfaces; use the address of the one that the "
                "others reach, in T5LIKE_COORDINATOR or T5LIKE_BIND"
            )
    return address.strip("[]")
