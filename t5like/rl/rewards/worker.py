"""The program of a process that computes rewards for `pool`.

    pool -> this process    LENGTH, then by pickle: once a list of `RewardFunction`; then (rows, items), each item
                            (index of the function, index of the row, answer)
    this process -> pool    one JSON line when it is ready, then one for each item, in order: a number, or the text of
                            a failure

A process of its own program, not of `multiprocessing`, whose processes import the command that started them, and so
JAX. It ends when the pool closes the socket, and on Linux also when the pool's process is killed while it computes.
"""

import json
import math
import os
import pickle
import signal
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from t5like.errors import one_line, printable
from t5like.rl.rewards.functions import RewardFunction
from t5like.rl.rewards.sandbox import die_with_parent

LENGTH = struct.Struct("!Q")  # bytes of the pickle that follows
LONGEST_FAILURE = 300  # characters
LARGEST = 1e20  # of a reward: sums of weighted rewards stay finite in float32


def main(descriptor: int, parent: int) -> None:
    """Serve a pool; `descriptor` is the socket, `parent` the process id of the pool's process."""
    die_with_parent()
    if os.getppid() != parent:  # it ended before
        return
    # A scheduler's signals are sent to every process of a job. The pool's process decides when this one ends.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what rewards print is no output of the command
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rb") as file:
        functions = _receive(file)
        try:
            for function in functions:
                function.prepare()
        except Exception as error:
            _send(connection, _describe(error))
            return
        _send(connection, 0.0)
        while (chunk := _receive(file)) is not None:
            rows, items = chunk
            for number, row, answer in items:
                _send(connection, evaluate(functions[number], MappingProxyType(rows[row]), answer))


def evaluate(function: RewardFunction, row: Mapping[str, Any], answer: str) -> float | str:
    """The reward, or how it has failed. Numbers of other types, such as NumPy's and bools, are converted."""
    try:
        value = function(row, answer)
        if not hasattr(value, "__float__"):
            raise TypeError(f"the reward is a {type(value).__name__}, not a number")
        number = float(value)
        if not abs(number) <= LARGEST:  # nor NaN
            raise ValueError(f"the reward is {number}" + (", more than 1e20" if math.isfinite(number) else ""))
        return number
    except BaseException as error:  # also SystemExit and KeyboardInterrupt: signals are ignored here
        return _describe(error)


def _describe(error: BaseException) -> str:
    return printable(f"{type(error).__name__}: {one_line(error)}".rstrip(": "), longest=LONGEST_FAILURE)


def _receive(file: Any) -> Any:
    """The next object, or None at the end of the stream."""
    try:
        header = file.read(LENGTH.size)
    except ConnectionError:  # the pool has ended without reading everything
        return None
    if len(header) < LENGTH.size:
        return None
    data = file.read(LENGTH.unpack(header)[0])
    return pickle.loads(data)  # noqa: S301  from the process that started this one


def _send(connection: socket.socket, value: float | str) -> None:
    connection.sendall(json.dumps(value).encode() + b"\n")


def pickled(value: Sequence[Any]) -> bytes:
    """An object as `main` reads it."""
    data = pickle.dumps(value)
    return LENGTH.pack(len(data)) + data


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
