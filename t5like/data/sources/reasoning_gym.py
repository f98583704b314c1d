"""Procedural tasks of the package reasoning-gym, as records: ``reasoning_gym:TASK?size=N&seed=N&PARAMETER=VALUE``.

The records are generated once, into a JSON-lines file below `data.cache_directory`, and read from there by `lines`.
A process of its own generates them, because some tasks use Python's hash seed or the global random number generators:
the file is then a function of the source's name and of the versions of Python and reasoning-gym.

    inputs   Find the Greatest Common Divisor (GCD) of these numbers: 26, 760. Give only the GCD as your final answer.
    targets  2
    entry    {"task": "gcd", "parameters": {}, "entry": {"question": "Find ...", "answer": "2", "metadata": {...}}}

`entry` is what the task's scorer needs, as JSON (`decode`). Tasks that list no answer have the targets "". Records
with empty targets are left out, so these tasks need another `data.targets_template`, such as ``{inputs}``.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import subprocess
import sys
import urllib.parse
from pathlib import Path
from typing import Any

import numpy as np

from t5like.data.sources.files import RequiredFields
from t5like.data.sources.lines import JsonLines
from t5like.errors import ConfigError, DataError, one_line, shown
from t5like.io.atomic import atomic_write
from t5like.io.paths import cache_directory
from t5like.io.strict_json import loads

EXAMPLE = "reasoning_gym:gcd?size=1000&seed=1"
SIZE, MOST = 5_000, 10_000_000  # default and largest number of records
_TUPLE = "__tuple__"  # the key of a tuple in JSON, which has lists only; some scorers tell them apart


def open_reasoning_gym(spec: str, directory: str, required: RequiredFields) -> JsonLines:
    """Open the records of a source; they are generated if they do not exist yet.

    Args:
        spec: the entry of `data.source`.
        directory: `data.cache_directory`.
        required: fields that the caller reads.

    Raises:
        ConfigError: there is no such task, or a parameter is wrong.
        DataError: reasoning-gym is not installed, fails, or the directory can't be written.
    """
    task, size, seed, parameters = parse(spec)
    key = json.dumps([task, size, seed, parameters, platform.python_version(), _version(spec)], sort_keys=True)
    folder = cache_directory(directory) / "reasoning_gym"
    path = folder / f"{task}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.jsonl"
    if not path.exists():
        _check(spec, task, parameters)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"data.cache_directory={directory} can't be written: {one_line(error)}") from None
        _generate(spec, path, json.dumps([task, size, seed, parameters]))
    return JsonLines(spec, [str(path)], required)


def parse(spec: str) -> tuple[str, int, int, dict[str, Any]]:
    """Task, number of records, seed, and the task's parameters, each a JSON value or a text.

    Raises:
        ConfigError: the text after the question mark is not as in `EXAMPLE`.
    """
    task, _, query = spec.partition(":")[2].partition("?")
    parameters: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        name, equals, value = part.partition("=")
        if not name.isidentifier() or not equals or name in parameters:
            raise ConfigError(f"data.source={spec}: {part!r} must be NAME=VALUE, each name once; use {EXAMPLE}")
        value = urllib.parse.unquote(value)
        try:
            parameters[name] = loads(value, finite=True)
        except ValueError:
            parameters[name] = value
    numbers = []
    for name, fallback, least, most in (("size", SIZE, 1, MOST), ("seed", 0, 0, 2**32 - 1)):
        number = parameters.pop(name, fallback)
        if type(number) is not int or not least <= number <= most:
            rule = f"must be a whole number from {least} to {most}; use {EXAMPLE}"
            raise ConfigError(f"data.source={spec}: {name}={shown(number)} {rule}")
        numbers.append(number)
    return task, *numbers, parameters


def open_task(task: str, parameters: dict[str, Any], *, size: int = 1, seed: int = 0) -> Any:
    """The task of reasoning-gym: ``[index]`` is an entry, `score_answer` scores an answer.

    Raises:
        ImportError: reasoning-gym is not installed.
        LookupError: there is no such task, or it has no such parameter; the message is one line.
        Exception: of any type; it refuses the values.
    """
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise LookupError(f"there is no task {task!r}; use one of {', '.join(sorted(DATASETS))}")
    names = [field.name for field in dataclasses.fields(DATASETS[task][1]) if field.name not in ("size", "seed")]
    if unknown := [name for name in parameters if name not in names]:
        raise LookupError(f"{task} has no parameter {unknown[0]!r}; use size, seed, or one of {', '.join(names)}")
    return reasoning_gym.create_dataset(task, size=size, seed=seed, **parameters)


def task_error(task: str, parameters: dict[str, Any]) -> str:
    """Why a task can't be opened, with a remedy, in one line; empty if it can.

    Raises:
        ImportError: reasoning-gym is not installed.
    """
    try:
        open_task(task, parameters)
    except ImportError:
        raise
    except LookupError as error:
        return str(error.args[0])
    except Exception as error:  # the package checks parameters by assert, and by type errors from inside
        given = f"{task} with the parameters {json.dumps(parameters)}" if parameters else f"{task} without parameters"
        return f"{given} is not possible ({one_line(error) or type(error).__name__}); use {EXAMPLE}"
    return ""


def _check(spec: str, task: str, parameters: dict[str, Any]) -> None:
    if wrong := task_error(task, parameters):
        raise ConfigError(f"data.source={spec}: {wrong}")


def _version(spec: str) -> str:
    try:
        return importlib.metadata.version("reasoning-gym")
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"data.source={spec} needs the package reasoning-gym; pip install 't5like[rl]'") from None


def _generate(spec: str, path: Path, arguments: str) -> None:
    command = [sys.executable, "-P", "-m", "t5like.data.sources.reasoning_gym", str(path), arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "0"}, capture_output=True, encoding="utf-8")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise DataError(f"data.source={spec} can't be generated: {last[:300]}")


def write_records(path: Path, arguments: str) -> None:
    """Write the records of a task; `arguments` is a JSON list of task, size, seed and parameters."""
    task, size, seed, parameters = json.loads(arguments)
    entries = open_task(task, parameters, size=size, seed=seed)
    with atomic_write(path) as file:
        for index in range(size):
            random.seed(f"{seed}-{index}")  # of the few tasks that do not use their own generator
            np.random.seed((seed + index) % 2**32)
            entry = entries[index]
            answer = entry["answer"]
            record = {
                "inputs": entry["question"],
                "targets": "" if answer is None else str(answer),
                "entry": encode(task, parameters, entry),
            }
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def encode(task: str, parameters: dict[str, Any], entry: dict[str, Any]) -> str:
    """An entry with its task, as JSON; `decode` is the inverse, tuples included.

    Raises:
        TypeError: the entry contains something else than numbers, texts, lists, tuples and dicts with texts as keys.
    """
    return json.dumps({"task": task, "parameters": parameters, "entry": _with_tuples_marked(entry)}, ensure_ascii=False)


def decode(text: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Task, parameters and entry.

    Raises:
        ValueError: the text is not from `encode`.
    """
    try:
        value = json.loads(text, object_hook=lambda found: tuple(found[_TUPLE]) if _TUPLE in found else found)
        return value["task"], value["parameters"], value["entry"]
    except (TypeError, KeyError, ValueError):
        raise ValueError("the field 'entry' is not from data.source=reasoning_gym:TASK") from None


def _with_tuples_marked(value: Any) -> Any:
    if isinstance(value, tuple):
        return {_TUPLE: [_with_tuples_marked(item) for item in value]}
    if isinstance(value, list):
        return [_with_tuples_marked(item) for item in value]
    if isinstance(value, dict):
        return {name: _with_tuples_marked(item) for name, item in value.items()}
    return value


if __name__ == "__main__":
    write_records(Path(sys.argv[1]), sys.argv[2])
