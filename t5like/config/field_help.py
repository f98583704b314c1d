"""The help text of all config fields for `t5like train --help`, from the annotations and comments in `schema`."""

import dataclasses
import inspect
import re
import textwrap
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from t5like.config import checks, schema

FIELD = re.compile(r"    (\w+): [^#]*= [^#]*?(?:  # (.*))?")
WIDTH = 100  # characters of a line


def text() -> str:
    """All fields by section, each with its default, its allowed values, and its comment."""
    lines = ["fields of the config, with their defaults; --config.SECTION.FIELD=VALUE sets one:"]
    for prefix, cls in schema.sections():
        hints, ranges, help_of = get_type_hints(cls), checks.ranges(cls), comments(cls)
        for field in dataclasses.fields(cls):
            if dataclasses.is_dataclass(hints[field.name]):
                continue
            values = _values(hints[field.name]) or (f"{ranges[field.name][0]}" if field.name in ranges else "")
            lines += ["", f"--config.{prefix}{field.name}={_flag_value(field.default)}"]
            for part in (values, help_of.get(field.name, "")):
                lines += textwrap.wrap(part, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines) + "\n"


@cache
def comments(cls: type) -> dict[str, str]:
    """The comment of each field of a section: the lines above it, then the end of its own line."""
    comment_of, above = {}, []
    for line in inspect.getsource(cls).splitlines():
        if line.startswith("    # "):
            above.append(line.removeprefix("    # "))
            continue
        if field := FIELD.fullmatch(line):
            comment_of[field[1]] = " ".join([*above, *filter(None, [field[2]])])
        above = []
    return comment_of


def _values(kind: Any) -> str:
    """The values of an enumerated or boolean field; empty for text and numbers."""
    if get_origin(kind) is tuple:
        inner = _values(get_args(kind)[0])
        return f"one or several, with commas: {inner}" if inner else ""
    if get_origin(kind) is Literal:
        return " | ".join(get_args(kind))
    return "true | false" if kind is bool else ""


def _flag_value(default: Any) -> str:
    """A default in the form that the command line accepts."""
    if isinstance(default, tuple):
        return ",".join(map(_flag_value, default))
    return str(default).lower() if isinstance(default, bool) else str(default)
