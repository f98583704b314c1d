"""Rewards that are functions of texts: each takes a row and an answer and returns a number.

A row is a record's fields, and under ``targets`` the text of `data.targets_template`. The functions are pure, and are
sent by pickle to the processes that call them (`pool`), where `prepare` is called once. They raise any exception to
report a failure. Sandboxed Python tests are in `python_tests`.
"""

import dataclasses
import functools
import importlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from t5like.evaluation.text_metrics import score_answer

Row = Mapping[str, Any]
INPUTS, TARGETS = "inputs", "targets"  # keys of the texts of the templates in a row


class RewardFunction(Protocol):
    """A reward as a function; it is picklable."""

    def __call__(self, row: Row, answer: str) -> float: ...

    def prepare(self) -> None:
        """Import and start what the calls need, so that it does not count towards the first answer's time limit."""


@dataclasses.dataclass(frozen=True)
class TextMetric:
    """A metric of `text_metrics` against the texts of a field: the best value over its references, from 0 to 1.

    Attributes:
        metric: its name.
        field: of the references, a path with slashes: a text, a number, or a list of texts.
        language: `evaluate.language`.
    """

    metric: str
    field: str
    language: str

    def __call__(self, row: Row, answer: str) -> float:
        return score_answer(self.metric, answer, texts_of(row, self.field), self.language)

    def prepare(self) -> None:
        score_answer(self.metric, "a", ["a"], "en")  # imports its package


@dataclasses.dataclass(frozen=True)
class Regex:
    """1 if the pattern matches anywhere in the answer (`re.search`), else 0."""

    pattern: str

    def __call__(self, row: Row, answer: str) -> float:
        return float(re.search(self.pattern, answer) is not None)

    def prepare(self) -> None:
        re.compile(self.pattern)


@dataclasses.dataclass(frozen=True)
class Length:
    """The number of characters of the answer, for tests of what a run does with a reward that does not help."""

    def __call__(self, row: Row, answer: str) -> float:
        return float(len(answer))

    def prepare(self) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class UserFunction:
    """``MODULE:FUNCTION``, imported with the working directory of the command in front of the path.

    Attributes:
        module: dotted name.
        name: of the function in the module.
        directory: the working directory.
    """

    module: str
    name: str
    directory: str

    def __call__(self, row: Row, answer: str) -> float:
        return self.function(row, answer)

    def prepare(self) -> None:
        _ = self.function

    @property
    def function(self) -> Callable[[Row, str], float]:
        """The function itself. Raises what its module raises when it is imported; TypeError if it can't be called."""
        return _imported(self.module, self.name, self.directory)


@functools.cache
def _imported(module: str, name: str, directory: str) -> Callable[[Row, str], float]:
    if directory not in sys.path:
        sys.path.insert(0, directory)
    function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{name} is a {type(function).__name__}, not a function")
    return function


@dataclasses.dataclass(frozen=True)
class ReasoningGym:
    """The score that a task of reasoning-gym gives to an answer, see `data.sources.reasoning_gym`.

    Attributes:
        task: of all records; empty: each record's own.
    """

    task: str

    def __call__(self, row: Row, answer: str) -> float:
        from t5like.data.sources import reasoning_gym

        if "entry" not in row:
            raise ValueError("the row has no field 'entry'; use data.source=reasoning_gym:TASK")
        task, parameters, entry = reasoning_gym.decode(row["entry"])
        if self.task and task != self.task:
            raise ValueError(f"the row is of the task {task}")
        scorer = _scorer(task, json.dumps(parameters, sort_keys=True))
        return scorer.score_answer(answer, entry)

    def prepare(self) -> None:
        if self.task:
            import reasoning_gym  # noqa: F401  its first import takes seconds


@functools.lru_cache(64)
def _scorer(task: str, parameters: str) -> Any:
    from t5like.data.sources import reasoning_gym

    return reasoning_gym.open_task(task, json.loads(parameters))


def texts_of(row: Row, path: str) -> list[str]:
    """The texts at a path of field names: of a text or number itself, of a list its elements.

    Raises:
        ValueError: there is no such field, or it contains anything else; the message is one line.
    """
    value: Any = row
    for name in path.split("/"):
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            names = f"; it has {', '.join(map(str, row))}" if value is row else ""
            raise ValueError(f"the row has no field {path!r}{names}")
    items = value if isinstance(value, list) else [value]
    if not items or not all(isinstance(item, str | int | float) for item in items):
        raise ValueError(f"the field {path!r} must be a text, a number, or a list of texts")
    return [str(item) for item in items]
