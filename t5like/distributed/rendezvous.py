"""Rendezvous: the processes of a run connect to process 0 before JAX starts, and compare what must be equal.

JAX's own coordination service reacts to a missing process, a wrong number of processes or a rank that occurs twice with
an abort or not at all, and can't report which process caused it. So every process first connects over TCP to the
address where that service will listen, and sends its rank, its host and its config. `process_group` starts the service
when all processes are connected.

Nothing is authenticated: process 0 listens on one address, which must be in a private network.
"""

import contextlib
import hashlib
import ipaddress
import json
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence

from t5like.config import loader
from t5like.distributed.launchers import ProcessInfo
from t5like.errors import ConfigError, ProcessLost

REMEDY = "start all with the same command"
REPORT_SECONDS = 5.0  # for the processes to exchange the reason why the run ends
HELLO_SECONDS = 2.0  # for a client to send its line, so that a silent unknown client delays nobody; peers retry


def rendezvous(info: ProcessInfo, facts: Mapping[str, str], *, seconds: float) -> str:
    """Wait until all processes are connected and compare their facts; returns the address to bind to, on process 0.

    Args:
        info: this process.
        facts: by name, what must be equal in all processes; ``config`` is a config's JSON.
        seconds: time limit.

    Raises:
        ConfigError: facts, ranks or numbers of processes differ. All processes raise the same message.
        ProcessLost: a process did not connect; the message contains its rank.
    """
    hello = {**info._asdict(), "host": socket.gethostname(), "facts": dict(facts)}
    if info.process:
        _connect(info, hello, seconds)
        return ""
    address = bind_address(info, seconds)
    peers: dict[int, tuple[dict, socket.socket]] = {}
    try:
        objection = _accept_all(info, hello, address, peers, time.monotonic() + seconds)
        missing = [str(rank) for rank in range(1, info.num_processes) if rank not in peers]
        lost = ""
        if missing and not objection:
            lost = (
                f"process 0 on {hello['host']} waited {seconds:.0f} s for {describe_processes(missing)} of "
                f"{info.num_processes} to start; they are missing: start all of them again"
            )
        for _, connection in peers.values():
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps({"config": objection, "lost": lost}).encode() + b"\n")
    finally:
        for _, connection in peers.values():
            connection.close()
    _raise(objection, lost)
    return address


def _accept_all(info: ProcessInfo, hello: dict, address: str, peers: dict, deadline: float) -> str:
    """Accept connections until all peers are connected or time is over; returns the first difference, or nothing."""
    objection, port = "", int(info.coordinator.rpartition(":")[2])
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        server = socket.create_server((address, port), family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(
            f"process 0 can't listen at {address}:{port} ({info.launcher}): {os.strerror(error.errno)}; "
            "use a free port and an address of its own host in T5LIKE_COORDINATOR"
        ) from None
    with server:
        while len(peers) < info.num_processes - 1 and time.monotonic() < deadline:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                break
            peer = _read_line(connection, min(deadline, time.monotonic() + HELLO_SECONDS))
            if not peer or not hello.keys() <= peer.keys():
                connection.close()  # an unknown client
                continue
            rank = peer["process"]
            difference = _difference(hello, peer)
            if rank in peers or rank == 0:
                other = hello if rank == 0 else peers[rank][0]
                difference = (
                    f"two processes are process {rank} of {info.num_processes}, on {other['host']} and on "
                    f"{peer['host']}; give each its own T5LIKE_PROCESS_ID"
                )
                rank = -len(peers) - 1
            peers[rank] = peer, connection
            if difference and not objection:  # peers that are about to connect receive it too
                objection, deadline = difference, min(deadline, time.monotonic() + REPORT_SECONDS)
    return objection


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


def describe_difference(name: str, peer: tuple[str, str], primary: tuple[str, str], remedy: str = REMEDY) -> str:
    """Return the message about a value that differs between two processes; each is (process, value).

    Configs are represented by their hashes and the fields that differ.
    """
    values, detail = (peer[1], primary[1]), ""
    if name == "config":
        with contextlib.suppress(ConfigError):
            fields = loader.difference(loader.from_json(primary[1]), loader.from_json(peer[1]))
            detail = ": " + "; ".join(fields[:3]) + ("; ..." if fields[3:] else "")
        values = tuple(hashlib.sha256(text.encode()).hexdigest()[:8] for text in values)
    return f"{peer[0]} has {name} {values[0]}, {primary[0]} has {values[1]}{detail}; {remedy}"


def _connect(info: ProcessInfo, hello: dict, seconds: float) -> None:
    """Connect to process 0, send this process's line, and wait for the result of the comparison."""
    host, _, port = info.coordinator.rpartition(":")
    deadline, reason, result = time.monotonic() + seconds, "", None
    while result is None:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as connection:
                if connection.getsockname() == connection.getpeername():  # TCP can connect a port to itself
                    raise ConnectionRefusedError
                connection.sendall(json.dumps(hello).encode() + b"\n")
                result = _read_line(connection, max(deadline, time.monotonic()) + 2 * REPORT_SECONDS)
                reason = "it closed the connection"
        except OSError as error:
            reason = str(error.strerror or error)
        if result is None and time.monotonic() > deadline:
            raise ProcessLost(
                f"process {info.process} on {hello['host']} waited {seconds:.0f} s to start for process 0 of "
                f"{info.num_processes} at {info.coordinator} ({info.launcher}): {reason}; start all of them again"
            )
        if result is None:
            time.sleep(0.2)
    _raise(result["config"], result["lost"])


def _raise(objection: str, lost: str) -> None:
    if objection:
        raise ConfigError(objection)
    if lost:
        raise ProcessLost(lost)


def _read_line(connection: socket.socket, deadline: float) -> dict | None:
    """Read one JSON object; None if it is not complete at the deadline, even if bytes still arrive."""
    line = b""
    try:
        while not line.endswith(b"\n") and len(line) < 2**22:
            connection.settimeout(max(deadline - time.monotonic(), 1e-3))
            part = connection.recv(2**16)
            if not part or time.monotonic() > deadline:
                return None
            line += part
        value = json.loads(line)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def describe_processes(ranks: Sequence[str]) -> str:
    """Return ranks as text, at most eight of them: ``processes 1, 3``."""
    shown = ", ".join(ranks[:8]) + (f" and {len(ranks) - 8} more" if ranks[8:] else "")
    return f"process {shown}" if len(ranks) == 1 else f"processes {shown}"


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
