"""The processes of a run meet at process 0, before JAX starts: who is there, who is missing, and do all want the same.

JAX's own coordination service answers a missing process, a wrong number of them or two of the same number with an abort
or not at all, and can't say whose fault it is. So everyone first comes here with what it was told, over TCP at the
address where that service will listen; `distributed` starts the service when all have met.

Nothing here authenticates anybody: process 0 listens on one address, which belongs in a private network.
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
from t5like.errors import ConfigError, ProcessLost, shorten

REMEDY = "start all with the same command"
GRACE = 5.0  # seconds that others get to say or to hear why the run ends
LINE = 2.0  # seconds for a guest to say who it is, so that a silent stranger holds up nobody; guests come again


def join(begin: ProcessInfo, facts: Mapping[str, str], *, seconds: float) -> str:
    """Wait until all processes are there and compare what they bring; gives the address to bind to, on process 0.

    Args:
        begin: this process's place.
        facts: by name, what must be the same everywhere; ``config`` is a config's JSON.
        seconds: how long to wait.

    Raises:
        ConfigError: they don't agree, on the facts or on who they are. Everyone gets the same line.
        PeerLost: somebody did not come; the line says who.
    """
    mine = {**begin._asdict(), "host": socket.gethostname(), "facts": dict(facts)}
    if begin.process:
        _visit(begin, mine, seconds)
        return ""
    address = bind_address(begin, seconds)
    guests: dict[int, tuple[dict, socket.socket]] = {}
    try:
        objection = _receive_all(begin, mine, address, guests, time.monotonic() + seconds)
        missing = [str(number) for number in range(1, begin.num_processes) if number not in guests]
        lost = ""
        if missing and not objection:
            lost = (
                f"process 0 on {mine['host']} waited {seconds:.0f} s for {processes(missing)} of "
                f"{begin.num_processes} to start; they are missing: start all of them again"
            )
        for _, connection in guests.values():
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps({"config": objection, "lost": lost}).encode() + b"\n")
    finally:
        for _, connection in guests.values():
            connection.close()
    _raise(objection, lost)
    return address


def _receive_all(begin: ProcessInfo, mine: dict, address: str, guests: dict, until: float) -> str:
    """Let the others in until all are there or time is up; gives what is wrong with them, or nothing."""
    objection, port = "", int(begin.coordinator.rpartition(":")[2])
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        server = socket.create_server((address, port), family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(
            f"process 0 can't listen at {address}:{port} ({begin.launcher}): {os.strerror(error.errno)}; "
            "use a free port and an address of its own host in T5LIKE_COORDINATOR"
        ) from None
    with server:
        while len(guests) < begin.num_processes - 1 and time.monotonic() < until:
            server.settimeout(max(until - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                break
            guest = _read_line(connection, min(until, time.monotonic() + LINE))
            if not guest or not mine.keys() <= guest.keys():
                connection.close()  # a stranger
                continue
            number = guest["process"]
            found = _objection(mine, guest)
            if number in guests or number == 0:
                other = mine if number == 0 else guests[number][0]
                found = (
                    f"two processes are process {number} of {begin.num_processes}, on {other['host']} and on "
                    f"{guest['host']}; give each its own T5LIKE_PROCESS_ID"
                )
                number = -len(guests) - 1
            guests[number] = guest, connection
            if found and not objection:  # those on their way shall hear it too
                objection, until = found, min(until, time.monotonic() + GRACE)
    return objection


def _objection(first: dict, guest: dict) -> str:
    """What keeps a process from running together with process 0; nothing, if they agree."""
    them = f"process {guest['process']} on {guest['host']}", f"process 0 on {first['host']}"
    if guest["num_processes"] != first["num_processes"]:
        return (
            f"{them[0]} is one of {guest['num_processes']} processes, {them[1]} one of {first['num_processes']} "
            f"({first['launcher']}); start as many as all are told of"
        )
    for name, ours in first["facts"].items():
        if (theirs := guest["facts"].get(name, "nothing")) != ours:
            return disagreement(name, *them, theirs, ours)
    return ""


def disagreement(name: str, them: str, us: str, theirs: str, ours: str, remedy: str = REMEDY) -> str:
    """The line that names both sides of it; of configs their hashes and the fields that differ."""
    detail = ""
    if name == "config":
        with contextlib.suppress(ConfigError):
            differs = loader.difference(*map(loader.from_json, (ours, theirs)))
            detail = ": " + "; ".join(differs[:3]) + ("; ..." if differs[3:] else "")
        theirs, ours = (hashlib.sha256(text.encode()).hexdigest()[:8] for text in (theirs, ours))
    return f"{them} has {name} {theirs}, {us} has {ours}{detail}; {remedy}"


def _visit(begin: ProcessInfo, mine: dict, seconds: float) -> None:
    """Go to process 0, say what this process has, and hear whether all is well."""
    host, _, port = begin.coordinator.rpartition(":")
    until, reason, answer = time.monotonic() + seconds, "", None
    while answer is None:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as connection:
                if connection.getsockname() == connection.getpeername():  # TCP can connect a port to itself
                    raise ConnectionRefusedError
                connection.sendall(json.dumps(mine).encode() + b"\n")
                answer = _read_line(connection, max(until, time.monotonic()) + 2 * GRACE)
                reason = "it hung up"
        except OSError as error:
            reason = str(error.strerror or error)
        if answer is None and time.monotonic() > until:
            raise ProcessLost(
                f"process {begin.process} on {mine['host']} waited {seconds:.0f} s to start for process 0 of "
                f"{begin.num_processes} at {begin.coordinator} ({begin.launcher}): {reason}; start all of them again"
            )
        if answer is None:
            time.sleep(0.2)
    _raise(answer["config"], answer["lost"])


def _raise(objection: str, lost: str) -> None:
    if objection:
        raise ConfigError(objection)
    if lost:
        raise ProcessLost(lost)


def _read_line(connection: socket.socket, until: float) -> dict | None:
    """One JSON object, or None if it is not there by then, however slowly it comes."""
    line = b""
    try:
        while not line.endswith(b"\n") and len(line) < 2**22:
            connection.settimeout(max(until - time.monotonic(), 1e-3))
            part = connection.recv(2**16)
            if not part or time.monotonic() > until:
                return None
            line += part
        found = json.loads(line)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def processes(numbers: Sequence[str]) -> str:
    return ("process " if len(numbers) == 1 else "processes ") + shorten(numbers, shown=8)


def bind_address(begin: ProcessInfo, seconds: float) -> str:
    """The one address that process 0 listens on: what the coordinator's name means, never all interfaces.

    A host's own name may mean a loopback address to itself (Debian's /etc/hosts); then it is the address from which it
    reaches others. T5LIKE_BIND overrides.
    """
    host, _, port = begin.coordinator.rpartition(":")
    if chosen := os.environ.get("T5LIKE_BIND"):
        return _one_interface(chosen)
    until = time.monotonic() + seconds
    while True:
        try:
            found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
            break
        except socket.gaierror as error:  # a pod's name may come after the pod
            if time.monotonic() > until:
                raise ConfigError(
                    f"the coordinator's host {host!r} ({begin.launcher}) got no address in {seconds:.0f} s: "
                    f"{error.strerror}; use one that has, such as T5LIKE_COORDINATOR=10.0.0.1:8476"
                ) from None
            time.sleep(1)
    address = found[0][4][0]
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
