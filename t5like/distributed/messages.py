"""Messages between processes: JSON objects, one per line, over TCP. Used by `rendezvous` and `liveness`.

Bytes may come from unknown clients of the network, so a line has a maximum length, and its JSON is parsed strictly.
"""

import json
import socket
import threading
import time
from typing import Any

from t5like.io.strict_json import loads

LONGEST = 2**22  # bytes of a line; a config has a few thousand
SEND_SECONDS = 5.0  # for the operating system to accept a message; a receiver that is stopped does not empty its buffer


class Connection:
    """A TCP connection that carries messages. Any thread may send; one thread receives.

    Attributes:
        socket: for `select`; it has a time limit of `SEND_SECONDS`.
        closed: whether the other side has closed it, failed, or sent what is no message.
    """

    def __init__(self, connected: socket.socket):
        connected.settimeout(SEND_SECONDS)
        if connected.family in (socket.AF_INET, socket.AF_INET6):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.closed = connected, False
        self._received, self._lock = bytearray(), threading.Lock()

    def send(self, **message: Any) -> bool:
        """Send a message; returns whether the operating system accepted it."""
        try:
            with self._lock:
                self.socket.sendall(json.dumps(message).encode() + b"\n")
        except (OSError, ValueError):
            return False
        return True

    def receive(self) -> list[dict[str, Any]]:
        """Receive what has arrived; returns the complete messages. Call it when the socket is readable."""
        try:
            part = self.socket.recv(2**16)
        except (BlockingIOError, InterruptedError):
            return []
        except (OSError, ValueError):
            part = b""
        self.closed = not part
        self._received += part
        if b"\n" not in part:
            self.closed |= len(self._received) > LONGEST
            return []
        *lines, rest = self._received.split(b"\n")
        self._received = rest
        messages = []
        for line in lines:
            try:
                message = loads(bytes(line))
            except ValueError:
                message = None
            if not isinstance(message, dict):
                self.closed = True
                break
            messages.append(message)
        return messages

    def receive_one(self, deadline: float) -> dict[str, Any] | None:
        """Wait for one message until `deadline` (`time.monotonic`); None: it did not arrive."""
        while not self.closed and (remaining := deadline - time.monotonic()) > 0:
            try:
                self.socket.settimeout(max(remaining, 1e-3))
                if not self.socket.recv(1, socket.MSG_PEEK):
                    break
            except OSError:
                break
            finally:
                self.socket.settimeout(SEND_SECONDS)
            if messages := self.receive():
                return messages[0]
        return None

    def close(self) -> None:
        """Close the connection."""
        self.closed = True
        self.socket.close()
