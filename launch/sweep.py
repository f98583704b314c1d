"""Sweeps: several runs of one command that differ in some config fields, from a TOML or JSON file.

A list names each run's fields; a grid combines all values of its fields, the last field varying fastest:

    [[runs]]                          [grid]
    seed = 1                          seed = [1, 2]
    optimizer.learning_rate = 0.01    optimizer.learning_rate = [0.01, 0.003]

In JSON: ``{"runs": [{"seed": 1}]}``, ``{"grid": {"seed": [1, 2]}}``, or the list alone. A run directory is
``WORKDIR/NAME``; the name is made from the values, as in ``seed=1_learning_rate=0.01``, or is the run's own ``name``.
Called by `launch.options`.
"""

import itertools
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launch.job import SweepRun, check_name, check_text
from t5like.errors import ConfigError, one_line, shown
from t5like.io.paths import expand
from t5like.io.strict_json import loads

MOST_RUNS = 1000  # one less than Slurm's default MaxArraySize
LONGEST_NAME = 120  # bytes of a run's name
NAME = r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,119}"
Value = str | int | float | bool | list
Fields = dict[str, Value]


def read_sweep(text: str) -> tuple[SweepRun, ...]:
    """Return the runs of a sweep file; their names are unique.

    Raises:
        ConfigError: the file can't be read, has another form, or two runs have the same fields.
    """
    path = expand(text)
    rows = [(_flatten(path, row), name) for row, name in _rows(path, _content(path))]
    if not 0 < len(rows) <= MOST_RUNS:
        raise ConfigError(f"--sweep={path} has {len(rows)} runs; use at least 1 and at most {MOST_RUNS:,}")
    short = _short_names({field: None for fields, _ in rows for field in fields})
    runs: dict[str, SweepRun] = {}
    seen: dict[tuple[str, ...], int] = {}
    for number, (fields, name) in enumerate(rows, 1):
        overrides = tuple(f"--config.{field}={_text(value)}" for field, value in fields.items())
        first = seen.setdefault(tuple(sorted(overrides)), number)
        if first != number and not name:
            raise ConfigError(f"--sweep={path}: runs {first} and {number} have the same fields; remove one of them")
        name = name or _unique(_name(fields, short), runs)
        if name in runs:
            raise ConfigError(f"--sweep={path}: two runs have the name {name}; give each its own")
        runs[name] = SweepRun(name, tuple(check_text(f"--sweep={path}", each) for each in overrides))
    return tuple(runs.values())


def _content(path: Path) -> Any:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--sweep={path} can't be read: {error.strerror}; name a TOML or JSON file") from None
    try:
        if path.suffix == ".json":
            return loads(content)
        return tomllib.loads(content.decode("utf-8"))
    except ValueError as error:
        kind, remedy = ("JSON", "") if path.suffix == ".json" else ("TOML", ", or use a .json file")
        raise ConfigError(f"--sweep={path} is not {kind}: {one_line(error)}; correct it{remedy}") from None


def _rows(path: Path, content: Any) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield the fields of each run, nested or with dots, and its own name if it has one."""
    runs = content if isinstance(content, list) else content.get("runs") if isinstance(content, dict) else None
    if isinstance(content, dict) and content.keys() == {"grid"} and isinstance(content["grid"], dict):
        grid = _flatten(path, content["grid"])
        for field, values in grid.items():
            if not isinstance(values, list) or not values:
                raise ConfigError(
                    f"--sweep={path}: {field}={shown(values)} must be a list of values; use {field} = [1, 2]"
                )
        if not grid:
            raise ConfigError(f"--sweep={path}: [grid] has no fields; use seed = [1, 2]")
        if math.prod(map(len, grid.values())) > MOST_RUNS:
            raise ConfigError(f"--sweep={path} has more than {MOST_RUNS:,} runs; use fewer values")
        for values in itertools.product(*grid.values()):
            yield dict(zip(grid, values, strict=True)), ""
    elif (
        isinstance(runs, list)
        and all(isinstance(row, dict) for row in runs)
        and (isinstance(content, list) or content.keys() == {"runs"})
    ):
        for row in runs:
            name = row.get("name", "")
            if name != "":
                check_name(f"--sweep={path}: name", str(name), pattern=NAME, example='name = "small-1"')
            if name == "logs":
                raise ConfigError(f"--sweep={path}: name='logs' is the directory of log files; use name = \"small-1\"")
            yield {key: value for key, value in row.items() if key != "name"}, str(name)
    else:
        raise ConfigError(f"--sweep={path} must have [[runs]] or [grid], and nothing else; see docs/launch.md")


def _flatten(path: Path, table: Mapping[str, Any], prefix: str = "") -> Fields:
    """Return nested tables as one level of fields with dots, without a leading ``config.``."""
    fields: Fields = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            fields |= _flatten(path, value, f"{name}.")
        elif isinstance(value, str | int | float | list):
            fields[name.removeprefix("config.")] = value
        else:
            raise ConfigError(
                f"--sweep={path}: {name}={shown(value)} must be a text, a number, true or false, or a list"
            )
    return fields


def _text(value: Value) -> str:
    """Return a value as the text of a flag."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(_text, value)) if isinstance(value, list) else str(value)


def _short_names(fields: Mapping[str, None]) -> dict[str, str]:
    """Return the last part of each field's name, or the whole name where two fields end alike."""
    last = [field.rpartition(".")[2] for field in fields]
    return {field: end if last.count(end) == 1 else field for field, end in zip(fields, last, strict=True)}


def _name(fields: Fields, short: Mapping[str, str]) -> str:
    parts = [f"{short[field]}={_text(value)}" for field, value in fields.items()]
    name = re.sub(r"[^A-Za-z0-9._=+-]+", "-", "_".join(parts)).strip("-.")[: LONGEST_NAME - 5].strip("-.")
    return name or "run"


def _unique(name: str, taken: Mapping[str, Any]) -> str:
    """Return the name with a number if another run has it, as names that were shortened may."""
    numbered = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(each for each in numbered if each not in taken)
