"""Objects of an answer's process, used by its tests in another process: calls as JSON lines over a socket.

The tests (`Remote`, `Client`) and the answer (`serve`) share no memory. What comes back from the answer is data of
Python's plain types, copied, or a `Remote`: a reference to an object that stays in the answer's process. So an answer
can change neither what an assert means nor how results compare: a class whose objects are equal to everything is a
`Remote` to the tests, which equals only itself.

    tests                                              answer
    {"op": "global", "name": "add"}            ->
                                               <-      {"value": ["remote", 0]}
    {"op": "call", "on": 0, "args": [2, 3]}    ->
                                               <-      {"value": 5}

Only the standard library is imported, because the server of sandboxes has nothing else.
"""

import builtins
import json
import operator
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

HEADER = struct.Struct("!IId")  # of a request to `sandbox_server`: lengths of answer and tests in bytes, seconds
LONGEST_MESSAGE = 2**20  # bytes
_SCALARS = (type(None), bool, int, float, str)
_CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


class Channel:
    """JSON lines over a socket; the other side may send anything, or nothing any more."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._file = connection, connection.makefile("rb")

    def send(self, message: dict[str, Any]) -> None:
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        """Raises EOFError at the end, ValueError for anything that is no JSON object of at most `LONGEST_MESSAGE`."""
        line = self._file.readline(LONGEST_MESSAGE)
        if not line:
            raise EOFError("the process of the answer has ended")
        if not line.endswith(b"\n"):
            raise ValueError(f"a result of more than {LONGEST_MESSAGE} bytes")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError("not a result")
        return message


def encode(value: Any, reference: Callable[[Any], list[Any]]) -> Any:
    """A value as JSON: scalars as they are, containers as [type, items], other objects as `reference` writes them.

    Subclasses of the plain types, such as Counter or a named tuple, are written as their plain type.
    """
    if type(value) in _SCALARS:
        return value
    for plain in (int, float, str):
        if isinstance(value, plain):
            return plain(value)
    for name, container in _CONTAINERS.items():
        if isinstance(value, container):
            return [name, [encode(item, reference) for item in value]]
    if isinstance(value, dict):
        return ["dict", [[encode(key, reference), encode(item, reference)] for key, item in value.items()]]
    if isinstance(value, bytes | bytearray):
        return ["bytes", bytes(value).hex()]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    return reference(value)


def decode(value: Any, resolve: Callable[[str, Any], Any]) -> Any:
    """The inverse of `encode`. Raises an exception of any type for what it can't have written."""
    if type(value) in _SCALARS:
        return value
    kind, content = value
    if kind in _CONTAINERS:
        return _CONTAINERS[kind](decode(item, resolve) for item in content)
    if kind == "dict":
        return {decode(key, resolve): decode(item, resolve) for key, item in content}
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "complex":
        return complex(*content)
    return resolve(kind, content)


# ---- The side of the tests ----


class AnswerError(Exception):
    """An exception in the answer whose type is not one of Python's own."""


class Client:
    """Asks the answer's process for its global names, and for operations on its objects."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._callbacks: list[Callable] = []

    def get_global(self, name: str) -> Any:
        """Raises NameError if the answer does not define the name."""
        return self.request("global", name=name)

    def request(self, op: str, on: int | None = None, args: tuple = (), **details: Any) -> Any:
        """Run an operation in the answer's process; lists, dicts and sets in `args` are changed as it changes them."""
        encoded = [encode(value, self._reference) for value in args]
        named = {name: encode(value, self._reference) for name, value in details.pop("kwargs", {}).items()}
        self._channel.send({"op": op, "on": on, "args": encoded, "kwargs": named, **details})
        while "callback" in (reply := self._channel.receive()):
            self._channel.send(self._call_back(reply))
        for position, changed in reply.get("changed", []):
            _change(args[position], decode(changed, self._resolve))
        if "error" in reply:
            raise _exception(*reply["error"])
        return decode(reply["value"], self._resolve)

    def _call_back(self, message: dict[str, Any]) -> dict[str, Any]:
        """Call a function of the tests that was passed to the answer."""
        try:
            arguments = [decode(value, self._resolve) for value in message["args"]]
            return {"value": encode(self._callbacks[message["callback"]](*arguments), self._reference)}
        except Exception as error:
            return {"error": [type(error).__name__, str(error)]}

    def _reference(self, value: Any) -> list[Any]:
        if isinstance(value, Remote):
            return ["remote", object.__getattribute__(value, "_number")]
        if callable(value):
            self._callbacks.append(value)
            return ["callback", len(self._callbacks) - 1]
        raise TypeError(f"a {type(value).__name__} can't be passed to an answer")

    def _resolve(self, kind: str, content: Any) -> Any:
        if kind != "remote" or type(content) is not int:
            raise ValueError("not a result")
        return Remote(self, content)


class Remote:
    """A reference to an object of the answer's process."""

    __slots__ = ("_client", "_number")

    def __init__(self, client: Client, number: int) -> None:
        self._client, self._number = client, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._client.request("call", self._number, args, kwargs=kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._client.request("getattr", self._number, name=name)

    def __getitem__(self, key: Any) -> Any:
        return self._client.request("getitem", self._number, (key,))

    def __contains__(self, key: Any) -> bool:
        return self._client.request("contains", self._number, (key,)) is True

    def __len__(self) -> int:
        return self._client.request("len", self._number)

    def __bool__(self) -> bool:
        return self._client.request("bool", self._number) is True

    def __str__(self) -> str:
        return str(self._client.request("str", self._number))

    def __repr__(self) -> str:
        return str(self._client.request("repr", self._number))

    def __iter__(self) -> Iterator[Any]:
        iterator = self._client.request("iter", self._number)
        while True:
            try:
                yield iterator._client.request("next", iterator._number)
            except StopIteration:
                return

    def __next__(self) -> Any:
        return self._client.request("next", self._number)


def _change(target: Any, value: Any) -> None:
    if type(target) is list and type(value) is list:
        target[:] = value
    elif type(target) in (dict, set) and type(value) is type(target):
        target.clear()
        target.update(value)


def _exception(name: Any, message: Any) -> Exception:
    """Python's exception of that name. Not of a type that the machinery of the tests uses for itself."""
    kind = getattr(builtins, str(name), None)
    if isinstance(kind, type) and issubclass(kind, Exception) and kind not in (AssertionError, EOFError):
        try:
            return kind(str(message))
        except TypeError:  # UnicodeDecodeError has five arguments
            pass
    return AnswerError(f"{name}: {message}")


# ---- The side of the answer ----


def serve(namespace: dict[str, Any], channel: Channel) -> None:
    """Run operations on an answer's objects until the other side ends."""
    objects: list[Any] = []

    def reference(value: Any) -> list[Any]:
        objects.append(value)
        return ["remote", len(objects) - 1]

    def resolve(kind: str, content: Any) -> Any:
        return objects[content] if kind == "remote" else lambda *args: call_back(content, args)

    def call_back(number: int, args: tuple) -> Any:
        channel.send({"callback": number, "args": [encode(value, reference) for value in args]})
        reply = channel.receive()
        if "error" in reply:
            raise _exception(*reply["error"])
        return decode(reply["value"], resolve)

    while True:
        message = channel.receive()
        try:
            channel.send(_reply(message, namespace, objects, reference, resolve))
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, a list that contains itself
            channel.send({"error": [type(error).__name__, str(error)[:1000]]})


def _reply(
    message: dict[str, Any], namespace: dict[str, Any], objects: list[Any], reference: Callable, resolve: Callable
) -> dict[str, Any]:
    """Run one operation: its value or exception, and the arguments that it has changed."""
    args = [decode(value, resolve) for value in message["args"]]
    kwargs = {name: decode(value, resolve) for name, value in message["kwargs"].items()}
    reply: dict[str, Any] = {}
    try:
        subject = namespace if message["op"] == "global" else objects[message["on"]]
        reply["value"] = encode(_operate(message, subject, args, kwargs), reference)
    except BaseException as error:  # also SystemExit: the call has failed, and the next one may be right
        reply["error"] = [type(error).__name__, str(error)[:1000]]
    reply["changed"] = [
        [position, after]
        for position, value in enumerate(args)
        if isinstance(value, list | dict | set) and (after := encode(value, reference)) != message["args"][position]
    ]
    return reply


def _operate(message: dict[str, Any], subject: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    match message["op"]:
        case "global":
            if message["name"] not in subject:
                raise NameError(f"name {message['name']!r} is not defined")
            return subject[message["name"]]
        case "call":
            return subject(*args, **kwargs)
        case "getattr":
            return getattr(subject, message["name"])
        case "next":
            return next(subject)
    operations = {"getitem": operator.getitem, "contains": operator.contains, "len": len, "bool": bool}
    operations |= {"str": str, "repr": repr, "iter": iter}
    return operations[message["op"]](subject, *args)
