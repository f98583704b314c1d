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
TYPES = {int: "whole number", float: "number", str: "text"}
SECTIONS = {
    "": "the whole run",
    "tokenizer.": "how text becomes token ids",
    "data.": "texts, objectives, rows of a batch",
    "model.": "architecture and sizes",
    "model.rotary.": "rotary position embeddings",
    "optimizer.": "updates and learning rate",
    "train.": "steps, evaluation, checkpoints, failures",
    "mesh.": "devices of each axis",
    "init_from.": "initial parameters from another run",
    "evaluate.": "predictions for held-out supervised examples",
    "metrics.": "where metrics go",
    "distill.": "learning from the predictions of a trained model",
    "rl.": "t5like rl: rewards and pairs",
    "lora.": "low-rank adapters, trained instead of the parameters",
}


def text() -> str:
    """All fields by section, each with default, type, allowed values, and its comment, which contains its unit."""
    lines = ["fields of the config by section; --config.SECTION.FIELD=VALUE sets one:"]
    for prefix, cls in schema.sections():
        lines += ["", f"---- {prefix.rstrip('.') or 'no section'}: {SECTIONS[prefix]} ----"]
        ranges, help_of = checks.ranges(cls), comments(cls)
        for name, kind, default in fields(cls):
            limits = f"{ranges[name][0]}" if name in ranges else ""
            lines += ["", f"--config.{prefix}{name}={_flag_value(default)}"]
            for part in (_type_and_values(kind, limits), help_of.get(name, "")):
                lines += textwrap.wrap(part, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines) + "\n"


def fields(cls: type) -> list[tuple[str, Any, Any]]:
    """Name, type and default of each field of a section, without the sections in it."""
    hints = get_type_hints(cls)
    every = [(field.name, hints[field.name], field.default) for field in dataclasses.fields(cls)]
    return [each for each in every if not dataclasses.is_dataclass(each[1])]


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


def values(kind: Any) -> tuple[str, ...]:
    """The values of an enumerated or boolean field, or of the items of a list; empty for text and numbers."""
    if get_origin(kind) is tuple:
        return values(get_args(kind)[0])
    return get_args(kind) if get_origin(kind) is Literal else ("true", "false") if kind is bool else ()


def _type_and_values(kind: Any, limits: str) -> str:
    """What a field accepts, such as "whole number, at least 1"."""
    if several := get_origin(kind) is tuple:
        kind = get_args(kind)[0]
    accepted = " | ".join(values(kind)) or ", ".join(filter(None, [TYPES[kind], limits]))
    return f"one or several, with commas: {accepted}" if several else accepted


def _flag_value(default: Any) -> str:
    """A default in the form that the command line accepts."""
    if isinstance(default, tuple):
        return ",".join(map(_flag_value, default))
    return str(default).lower() if isinstance(default, bool) else str(default)
