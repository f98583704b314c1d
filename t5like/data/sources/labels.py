"""Examples of classification, regression and token classification: from a record to its texts and its label.

    objective              label in the record                          text of the label's part
    classification         a name of data.labels, or its index          the index
    regression             a number                                     the number, in float32
    token_classification   a list of labels, one for each word          the indices, with spaces between them

A list of words or labels may also be a text with white space between them. `example_format` chooses what turns records
into parts: this, or templates and conversations (`templates`). `store.label_numbers` stores the labels.
"""

import math
from collections.abc import Sequence

import numpy as np

from t5like.config.schema import DataConfig
from t5like.data.sources.files import Record, check_fields
from t5like.data.sources.templates import Chat, Part, Templates, value_of
from t5like.errors import ConfigError, DataError, shown


class Labelled:
    """What turns records into the parts of a labelled example: one or two texts, then the label."""

    def __init__(self, data: DataConfig) -> None:
        """Raises ConfigError if a template is malformed, or is more than a field where that names words or labels."""
        self.objective, self.labels = data.label_objective, data.labels
        second = ["second_template"] if data.second_template else []
        self._templates = Templates(data, ["inputs_template", *second, "targets_template"])
        self.required = self._templates.required
        if self.objective == "token_classification":
            self._fields = {setting: _only_field(setting, tokens) for setting, tokens in self._templates.parsed.items()}

    def parts(self, record: Record) -> tuple[Part, ...]:
        """The parts; empty if there is no label.

        Raises:
            DataError: a field is missing or has another type, a label is not one of `data.labels` or no number, or
                there is not one label for each word.
        """
        if self.objective == "token_classification":
            return self._words(record)
        *texts, label = self._templates.texts(record)
        if not label.strip():
            return ()
        target = _number(record, label) if self.objective == "regression" else self._index(record, label.strip())
        return (*map(Part, texts), Part(target, is_target=True))

    def _words(self, record: Record) -> tuple[Part, ...]:
        check_fields(record.where, record.fields, self.required)
        words, labels = (_items(record, path, setting) for setting, path in self._fields.items())
        if len(words) != len(labels):
            raise DataError(f"{record.where}: {len(words)} words have {len(labels)} labels; write one for each word")
        target = " ".join(self._index(record, label) for label in labels)
        return (Part(" ".join(words)), Part(target, is_target=True)) if words else ()

    def _index(self, record: Record, label: str) -> str:
        if label in self.labels:
            return str(self.labels.index(label))
        if label.isdecimal() and len(label) < 10 and int(label) < len(self.labels):  # int() has a limit
            return str(int(label))
        names = ",".join(self.labels[:5]) + (",..." if len(self.labels) > 5 else "")
        raise DataError(
            f"{record.where}: the label {shown(label)} is not one of data.labels={names}, nor the index of one; "
            "add it to data.labels"
        )


def example_format(data: DataConfig) -> Templates | Chat | Labelled | None:
    """What turns records into parts under this config; None for running text."""
    if data.label_objective:
        return Labelled(data)
    if not data.has_examples:
        return None
    return Chat(data) if data.messages_field else Templates(data)


def _number(record: Record, label: str) -> str:
    try:
        number = float(np.float32(label))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(
            f"{record.where}: the target {shown(label)} must be a finite number for data.objective=regression; correct "
            "it, or name another field in data.targets_template"
        )
    return repr(number)


def _only_field(setting: str, tokens: Sequence[str]) -> str:
    """The field of a template that consists of one."""
    if len(tokens) != 3 or tokens[0] or tokens[2]:
        raise ConfigError(f"{setting} must be one field for data.objective=token_classification; use {{{tokens[1]}}}")
    return tokens[1]


def _items(record: Record, path: str, setting: str) -> list[str]:
    """The words at a path: the elements of a list, or the parts of a text between white space."""
    value = value_of(record, path, setting)
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(each, str | int) for each in words):
        raise DataError(
            f"{record.where}: {path!r} must be a list of words, or a text with white space between them; use another "
            f"field in {setting}"
        )
    words = [str(each).lower() if isinstance(each, bool) else str(each) for each in words]  # true as in JSON
    if wrong := [each for each in words if len(each.split()) != 1]:
        raise DataError(f"{record.where}: {path!r} has the word {shown(wrong[0])}; words must not have white space")
    return words
