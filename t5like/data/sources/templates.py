"""From a record to the texts of an example: templates of inputs and targets, or a conversation.

Both give `Part`s, consecutive texts. Each part is tokenized separately and ends in EOS, as T5 ends inputs and targets
(Raffel et al. 2020, section 2.4). `preparation` stores them. Prompts for a model that was trained on conversations get
the same text from `render_prompt`. Pure functions of text; no token ids here.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from t5like.config.schema import DataConfig
from t5like.data.sources.files import Record, RequiredFields, check_fields, refuse_not_finite
from t5like.errors import ConfigError, DataError

ROLES = ("system", "user", "assistant")


class Part(NamedTuple):
    """A text that EOS is appended to; if it is a target, the loss counts its tokens and the EOS."""

    text: str
    is_target: bool = False


def inputs_text(parts: Iterable[Part]) -> str:
    """The text before the first target; the whole document for running text. It decides the split (`shards`)."""
    return "\0".join(part.text for part in takewhile(lambda part: not part.is_target, parts))


def render_turn(role: str, content: str) -> str:
    """The text of one turn: ``system: CONTENT``, ``user: CONTENT``, or CONTENT alone for the assistant."""
    return content if role == "assistant" else f"{role}: {content}"


def render_prompt(messages: Sequence[Mapping[str, str]]) -> list[str]:
    """The texts of a conversation, one per turn; EOS is appended to each. The model then generates the next turn.

        {"role": "system", "content": "Be brief."}      system: Be brief.</s>
        {"role": "user", "content": "2 + 2?"}           user: 2 + 2?</s>
        {"role": "assistant", "content": "4"}           4</s>

    The encoder gets all turns before the answer. A decoder-only model gets START (id 0), then all turns.
    """
    return [render_turn(message["role"], message["content"]) for message in messages]


class Templates:
    """``data.inputs_template`` and ``data.targets_template``: text with fields in braces, ``{{`` and ``}}`` for braces.

    A field inside others is addressed by slashes, an element of a list by its index: ``{answers/text/0}``.
    Numbers are written as Python does, true and false in lower case.
    """

    def __init__(self, data: DataConfig, names: Sequence[str] = ("inputs_template", "targets_template")) -> None:
        """`names` are the templates' fields of the section. Raises ConfigError if a brace is unpaired, or a template
        has no field.
        """
        settings = {f"data.{name}": getattr(data, name) for name in names}
        self.parsed = {setting: _parse(setting, template) for setting, template in settings.items()}
        roots = {field.partition("/")[0]: None for tokens in self.parsed.values() for field in tokens[1::2]}
        self.required = RequiredFields(tuple(roots), "name in data.inputs_template and data.targets_template")

    def parts(self, record: Record) -> tuple[Part, ...]:
        """Inputs and targets; empty if the targets are empty.

        Raises:
            DataError: a field is missing, or is not a text or number; names the record, the field, and what exists.
        """
        inputs, targets = self.texts(record)
        return (Part(inputs), Part(targets, is_target=True)) if targets else ()

    def texts(self, record: Record) -> list[str]:
        """The text of each template; errors as in `parts`."""
        check_fields(record.where, record.fields, self.required)
        return [
            "".join(
                text_of(record, token, setting) if index % 2 else token  # text, field, text, ..., text
                for index, token in enumerate(tokens)
            )
            for setting, tokens in self.parsed.items()
        ]


class Chat:
    """``data.messages_field``: a list of ``{"role": "system" | "user" | "assistant", "content": TEXT}``.

    The assistant's turns are targets, except at the start of a conversation. Other keys of a message are ignored. A
    dict with a list of roles and a list of contents is accepted as well: TFDS represents a list of dicts that way.
    """

    def __init__(self, data: DataConfig) -> None:
        self.field = data.messages_field
        self.required = RequiredFields((data.messages_field,), "set data.messages_field to")

    def parts(self, record: Record) -> tuple[Part, ...]:
        """The turns, formatted by `render_turn`; empty if one of the targets is empty.

        Raises:
            DataError: the field is not a conversation, has an unknown role, or has no target.
        """
        check_fields(record.where, record.fields, self.required)
        where = f"{record.where}: {self.field!r}"
        messages = self._messages(record.fields[self.field], where)
        parts = tuple(
            Part(text, is_target=number > 0 and message["role"] == "assistant")
            for number, (message, text) in enumerate(zip(messages, render_prompt(messages), strict=True))
        )
        if not any(part.is_target for part in parts):
            raise DataError(f"{where} has no assistant message after another message, so no targets; remove it")
        return parts if all(part.text for part in parts if part.is_target) else ()

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


def _parse(setting: str, template: str) -> list[str]:
    """Split a template into text, field, text, ..., text."""
    tokens = [""]
    for token in re.split(r"(\{\{|\}\}|\{[^{}]*\})", template):
        if token in ("{{", "}}"):
            tokens[-1] += token[0]
        elif token.startswith("{") and len(token) > 2:
            tokens += [token[1:-1], ""]
        elif "{" in token or "}" in token:
            raise ConfigError(f"{setting}={template!r} must have fields as {{name}}; write {{{{ or }}}} for a brace")
        else:
            tokens[-1] += token
    if len(tokens) == 1:
        raise ConfigError(f"{setting}={template!r} must name a field in braces, such as {{question}}")
    return tokens


def text_of(record: Record, path: str, setting: str) -> str:
    """The value at a path of field names and list indices, as text; `setting` names the path.

    Raises:
        DataError: there is no such field, or it is not a text or number; the message names record, field and setting.
    """
    value = value_of(record, path, setting)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        refuse_not_finite(record.where, path, value)
        return str(value)
    fix = {list: f"use {{{path}/0}} for its first element", dict: f"use {{{path}/NAME}} for one of its fields"}
    raise DataError(
        f"{record.where}: {path!r} is a {type(value).__name__}, not a text or number; "
        + fix.get(type(value), f"remove the example, or use another field in {setting}")
    )


def value_of(record: Record, path: str, setting: str) -> Any:
    """The value at a path; raises DataError if there is none, see `text_of`."""
    value, parents = record.fields, []
    for name in path.split("/"):
        where, inside = record.where, f" in {'/'.join(parents)!r}" if parents else ""
        if isinstance(value, Mapping):
            if name not in value:
                names = ", ".join(map(repr, value))
                raise DataError(f"{where}: there is no field {name!r}{inside}; name one of {names} in {setting}")
            value = value[name]
        elif isinstance(value, list):
            if not name.isdecimal():
                raise DataError(f"{where}: {'/'.join(parents)!r} is a list; use {{{'/'.join(parents)}/0}} in {setting}")
            if int(name) >= len(value):
                raise DataError(
                    f"{where}: there is no element {name}{inside}, which has {len(value)}; remove the example, or use "
                    f"another field in {setting}"
                )
            value = value[int(name)]
        else:
            kind = type(value).__name__
            raise DataError(
                f"{where}: {'/'.join(parents)!r} is a {kind} without fields; shorten {{{path}}} in {setting}"
            )
        parents.append(name)
    return value
