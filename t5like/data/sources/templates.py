"""From a record to what is read and what is learned of it: templates of inputs and targets, and conversations.

Both give `Part`s, texts that follow each other; each is tokenized by itself and ends in EOS, as T5 ends inputs and
targets (Raffel et al. 2020, section 2.4). `data.corpus` stores them; who writes prompts for a model that was trained
on conversations gets the same text from `render_prompt`. Pure functions of text; no tokens here.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from t5like.config.schema import DataConfig
from t5like.data.sources.files import Record, Wanted, require_fields
from t5like.errors import ConfigError, DataError

ROLES = ("system", "user", "assistant")


class Part(NamedTuple):
    """A text that EOS is put behind; learned: the loss counts its tokens and that EOS."""

    text: str
    learned: bool = False


def inputs_of(parts: Iterable[Part]) -> str:
    """What is read before anything is learned; of running text, which has one part, the whole. Splits go by it."""
    return "\0".join(part.text for part in takewhile(lambda part: not part.learned, parts))


def render_turn(role: str, content: str) -> str:
    """The text of one turn: ``system: CONTENT`` or ``user: CONTENT``; of the assistant CONTENT alone."""
    return content if role == "assistant" else f"{role}: {content}"


def render_prompt(messages: Sequence[Mapping[str, str]]) -> list[str]:
    """The texts of a conversation, one for each turn; EOS behind each. The assistant answers what follows the last.

        {"role": "system", "content": "Be brief."}      system: Be brief.</s>
        {"role": "user", "content": "2 + 2?"}           user: 2 + 2?</s>
        {"role": "assistant", "content": "4"}           4</s>

    An encoder reads all turns before the answer. A decoder-only model reads START (id 0), then all turns.
    """
    return [render_turn(message["role"], message["content"]) for message in messages]


class Templates:
    """``data.inputs_template`` and ``data.targets_template``: text with fields in braces, ``{{`` and ``}}`` for braces.

    A field inside others is addressed by slashes, an element of a list by its number from 0: ``{answers/text/0}``.
    Numbers are written as Python does, true and false in lower case.
    """

    def __init__(self, data: DataConfig) -> None:
        """Raises ConfigError if a brace is alone, or if a template has no field."""
        self._templates = [
            (setting, _parse(setting, template))
            for setting, template in (
                ("data.inputs_template", data.inputs_template),
                ("data.targets_template", data.targets_template),
            )
        ]
        roots = {field.partition("/")[0]: None for _, pieces in self._templates for field in pieces[1::2]}
        self.wanted = Wanted(tuple(roots), "name in data.inputs_template and data.targets_template")

    def parts(self, record: Record) -> tuple[Part, ...]:
        """Inputs and targets; nothing if the targets are empty: there is nothing to learn then.

        Raises:
            DataError: a field is not there, or is not one text or number; with record, field, and what there is.
        """
        require_fields(record.where, record.fields, self.wanted)
        inputs, targets = (
            "".join(
                _text(record, piece, setting) if number % 2 else piece  # text, field, text, ..., text
                for number, piece in enumerate(pieces)
            )
            for setting, pieces in self._templates
        )
        return (Part(inputs), Part(targets, learned=True)) if targets else ()


class Chat:
    """``data.messages_field``: a list of ``{"role": "system" | "user" | "assistant", "content": TEXT}``.

    What the assistant says is learned, unless nothing comes before it. Other keys of a message are not read. Also
    understood: one dict with a list of roles and a list of contents, which is how TFDS gives lists of dicts.
    """

    def __init__(self, data: DataConfig) -> None:
        self.field = data.messages_field
        self.wanted = Wanted((data.messages_field,), "set data.messages_field to")

    def parts(self, record: Record) -> tuple[Part, ...]:
        """The turns, as `render_turn` writes them; nothing if one that would be learned is empty.

        Raises:
            DataError: this is no conversation, or has a role of another name, or nothing that can be learned.
        """
        require_fields(record.where, record.fields, self.wanted)
        where = f"{record.where}: {self.field!r}"
        messages = self._messages(record.fields[self.field], where)
        parts = tuple(
            Part(text, learned=number > 0 and message["role"] == "assistant")
            for number, (message, text) in enumerate(zip(messages, render_prompt(messages), strict=True))
        )
        if not any(part.learned for part in parts):
            raise DataError(f"{where} has no assistant's message behind another one, so nothing to learn; remove it")
        return parts if all(part.text for part in parts if part.learned) else ()

    def _messages(self, value: Any, where: str) -> list[Mapping[str, str]]:
        columns = [value.get(name) for name in ("role", "content")] if isinstance(value, Mapping) else []
        if columns and all(isinstance(each, list) for each in columns) and len(columns[0]) == len(columns[1]):
            value = [{"role": role, "content": content} for role, content in zip(*columns, strict=True)]
        if not isinstance(value, list) or not value:
            kind = "an empty list" if value == [] else f"a {type(value).__name__}"
            raise DataError(f'{where} is {kind}, but must be a list of {{"role": ..., "content": ...}}')
        for number, message in enumerate(value):
            if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
                raise DataError(f'{where}: message {number} has no text; write {{"role": "user", "content": "..."}}')
            if message.get("role") not in ROLES:
                raise DataError(f"{where}: message {number} has role={message.get('role')!r}; use {', '.join(ROLES)}")
        return value


def form_of(data: DataConfig) -> Templates | Chat | None:
    """How records become parts under this config; None for running text."""
    if "supervised" not in data.objective:
        return None
    return Chat(data) if data.messages_field else Templates(data)


def _parse(setting: str, template: str) -> list[str]:
    """Text, field, text, ..., text of a template."""
    pieces = [""]
    for token in re.split(r"(\{\{|\}\}|\{[^{}]*\})", template):
        if token in ("{{", "}}"):
            pieces[-1] += token[0]
        elif token.startswith("{") and len(token) > 2:
            pieces += [token[1:-1], ""]
        elif "{" in token or "}" in token:
            raise ConfigError(f"{setting}={template!r} must have fields as {{name}}; write {{{{ or }}}} for a brace")
        else:
            pieces[-1] += token
    if len(pieces) == 1:
        raise ConfigError(f"{setting}={template!r} must name a field in braces, such as {{question}}")
    return pieces


def _text(record: Record, path: str, setting: str) -> str:
    """The value at a path of fields and numbers, as text."""
    value, walked = record.fields, []
    for name in path.split("/"):
        where, inside = record.where, f" in {'/'.join(walked)!r}" if walked else ""
        if isinstance(value, Mapping):
            if name not in value:
                names = ", ".join(map(repr, value))
                raise DataError(f"{where}: there is no field {name!r}{inside}; name one of {names} in {setting}")
            value = value[name]
        elif isinstance(value, list):
            if not name.isdecimal():
                raise DataError(f"{where}: {'/'.join(walked)!r} is a list; use {{{'/'.join(walked)}/0}} in {setting}")
            if int(name) >= len(value):
                raise DataError(
                    f"{where}: there is no element {name}{inside}, which has {len(value)}; remove the example, or use "
                    f"another field in {setting}"
                )
            value = value[int(name)]
        else:
            kind = type(value).__name__
            raise DataError(
                f"{where}: {'/'.join(walked)!r} is a {kind} without fields; shorten {{{path}}} in {setting}"
            )
        walked.append(name)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    fix = {list: f"use {{{path}/0}} for its first element", dict: f"use {{{path}/NAME}} for one of its fields"}
    raise DataError(
        f"{record.where}: {path!r} is a {type(value).__name__}, not a text or number; "
        + fix.get(type(value), f"remove the example, or use another field in {setting}")
    )
