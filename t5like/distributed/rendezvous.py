"""Rendezvous: the processes of a run connect to process 0 before JAX starts, and compare what must be equal.

JAX's own coordination service reacts to a missing process, a wrong number of processes or a rank that occurs twice with
an abort or not at all, and can't report which process caused it. So every process first connects over TCP to the
address where that service will listen, and sends its rank, its host and its config. `process_group` starts the service
when all processes are connected; `liveness` uses the connections until the run ends.

With `T5LIKE_RENDEZVOUS_SECRET` each side proves that it knows the secret (`authentication`). Nothing is encrypted, and
JAX's service has no authentication at all: process 0 listens on one address, which must be in a private network.
"""

import errno
import json
import os
import socket
import time
from collections.abc import Mapping
from typing import NamedTuple

from t5like.distributed.authentication import VARIABLE, challenge, is_proof, prove, shared_secret
from t5like.distributed.descriptions import REPORT_SECONDS, describe_processes
from t5like.distributed.launchers import ProcessInfo
from t5like.distributed.messages import Connection
from t5like.distributed.rendezvous_server import OTHERS, PROCESS_0, Server, bind_address
from t5like.errors import ConfigError, ProcessLost
from t5like.io.strict_json import loads


class Group(NamedTuple):
    """The result of a rendezvous.

    Attributes:
        address: on process 0, the address to listen on.
        connections: by rank; on process 0 to all others, on these to process 0.
        hosts: the name of each rank's host, of the same ranks.
    """

    address: str
    connections: dict[int, Connection]
    hosts: dict[int, str]


def rendezvous(info: ProcessInfo, facts: Mapping[str, str], *, seconds: float) -> Group:
    """Wait until all processes are connected and compare their facts; returns the connections, which stay open.

    Args:
        info: this process.
        facts: by name, what must be equal in all processes; ``config`` is a config's JSON.
        seconds: time limit.

    Raises:
        ConfigError: facts, ranks, numbers of processes or secrets differ. All processes raise the same message, except
            that a wrong secret is reported by the process that has it.
        ProcessLost: a process did not connect; the message contains its rank.
    """
    hello = {**info._asdict(), "host": socket.gethostname(), "facts": dict(facts)}
    if info.process:
        return _connect(info, hello, seconds)
    address = bind_address(info, seconds)
    server = Server(info, hello, address)
    try:
        objection = server.accept_all(time.monotonic() + seconds)
        missing = [str(rank) for rank in range(1, info.num_processes) if rank not in server.peers]
        lost = ""
        if missing and not objection:
            lost = (
                f"process 0 on {hello['host']} waited {seconds:.0f} s for {describe_processes(missing)} of "
                f"{info.num_processes} to start; they are missing: start all of them again"
            )
        server.send_result(objection, lost)
        _raise(objection, lost)
    except BaseException:
        server.close()
        raise
    return Group(
        address,
        {rank: peer.connection for rank, peer in server.peers.items()},
        {rank: peer.hello["host"] for rank, peer in server.peers.items()},
    )


def _connect(info: ProcessInfo, hello: dict, seconds: float) -> Group:
    """Connect to process 0, send this process's message, and wait for the result of the comparison."""
    host, _, port = info.coordinator.rpartition(":")
    deadline, reason = time.monotonic() + seconds, ""
    while True:
        try:
            connected = socket.create_connection((host.strip("[]"), int(port)), timeout=5)
            if connected.getsockname() == connected.getpeername():  # TCP can connect a port to itself
                connected.close()
                raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
            connection = Connection(connected)
            try:
                result = _introduce(info, hello, connection, max(deadline, time.monotonic()) + 2 * REPORT_SECONDS)
                if result is not None:
                    _raise(result["config"], result["lost"])
                    return Group("", {0: connection}, {0: result["host"]})
            except BaseException:
                connection.close()
                raise
            connection.close()
            reason = "it closed the connection"
        except OSError as error:
            reason = str(error.strerror or error)
        if time.monotonic() > deadline:
            raise ProcessLost(
                f"process {info.process} on {hello['host']} waited {seconds:.0f} s to start for process 0 of "
                f"{info.num_processes} at {info.coordinator} ({info.launcher}): {reason}; start all of them again"
            )
        time.sleep(0.2)


def _introduce(info: ProcessInfo, hello: dict, connection: Connection, deadline: float) -> dict[str, str] | None:
    """Answer the challenge of process 0, and return its result; None: the connection was lost.

    Raises:
        ConfigError: process 0 has another secret, or one of the two has none.
    """
    greeting = connection.receive_one(deadline)
    if greeting is None or not isinstance(greeting.get("challenge"), str):
        return None
    secret, own = shared_secret(), challenge()
    names = f"process {info.process} on {hello['host']}", f"process 0 at {info.coordinator}"
    if bool(secret) != bool(greeting.get("secret")):
        (has, lacks), remedy = names if secret else names[::-1], f"give all processes the same {VARIABLE}"
        raise ConfigError(f"{has} has {VARIABLE}, and {lacks} has none; {remedy}, or none")
    challenges, text = (greeting["challenge"], own), json.dumps(hello)
    connection.send(challenge=own, text=text, proof=prove(secret, OTHERS, challenges, text) if secret else "")
    if (answer := connection.receive_one(deadline)) is None:
        return None
    if answer.get("refused"):
        raise ConfigError(f"{names[0]} has another {VARIABLE} than {names[1]}; give all processes the same one")
    if secret and not is_proof(answer.get("proof"), secret, PROCESS_0, challenges, str(answer.get("text"))):
        raise ConfigError(f"{names[1]} does not know the {VARIABLE} of {names[0]}; give all processes the same one")
    try:
        result = loads(str(answer.get("text")))
    except ValueError:
        return None
    fits = isinstance(result, dict) and all(isinstance(result.get(name), str) for name in ("config", "lost", "host"))
    return result if fits else None


def _raise(objection: str, lost: str) -> None:
    if objection:
        raise ConfigError(objection)
    if lost:
        raise ProcessLost(lost)
