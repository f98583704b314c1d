"""Read a config file, a command line or JSON into a frozen `Config`, and write a `Config` as JSON.

`load` runs a Python file such as those in `configs/`, applies ``--config.section.field=value`` and returns a frozen
`Config`. Unknown names, wrong types and wrong combinations (`config.checks`) are refused before JAX starts. Checks that
need devices are in `sharding.mesh`, those that need the lengths of an objective in `data.pipeline`. Runs and
checkpoints contain their config as JSON: data, no code.
"""

import ast
import contextlib
import copy
import dataclasses
import difflib
import importlib.util
import json
import math
import os
import re
import sys
import traceback
import typing
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import ml_collections

from t5like import __version__
from t5like.config.checks import check
from t5like.config.formats import FORMAT, RENAMED, renamed, upgrade
from t5like.config.schema import Config, flatten
from t5like.errors import LONGEST_VALUE, CheckpointError, ConfigError, one_line, shown
from t5like.io.paths import check_path, expand
from t5like.io.strict_json import InvalidJSON, loads


def load(path: str | Path, overrides: typing.Sequence[tuple[str, str]] = ()) -> Config:
    """Read a config file and resolve it.

    Args:
        path: a preset's name; or a Python file that defines ``get_config() -> ConfigDict``, or a run's config.json.
        overrides: ("section.field", "value as text") pairs from the command line, applied in order.

    Raises:
        ConfigError: the file is missing or broken, or a field is.
    """
    if str(path) in presets():
        path = presets()[str(path)]
    else:
        check_path("--config", str(path))
        path = expand(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.stem, presets(), n=1)
        remedy = f"did you mean --config={near[0]}?" if near else "use --config=tiny; t5like configs lists the others"
        raise ConfigError(f"--config={path}: no such file, and no preset; {remedy}")
    values = _saved(path) if path.suffix == ".json" else _returned(path)
    return _overridden(values, overrides)


def load_run(workdir: Path, overrides: typing.Sequence[tuple[str, str]] = ()) -> Config:
    """Read the config of the run in a directory, and apply overrides.

    Raises:
        ConfigError: the directory has no run.
        CheckpointError: its config.json is damaged.
    """
    path = workdir / "config.json"
    if not os.path.isfile(path):
        raise ConfigError(f"--config is missing, and --workdir={workdir} has no run with a config; use --config=tiny")
    try:
        values = dataclasses.asdict(from_json(path.read_bytes()))
    except (ConfigError, OSError) as error:
        raise CheckpointError(f"{path} can't be read: {error}; each checkpoint below has a copy of it") from None
    return _overridden(values, overrides)


def changed(config: Config, overrides: typing.Sequence[tuple[str, str]]) -> Config:
    """A config with other values, as those of a command line.

    Raises:
        ConfigError: a field, a value or their combination is wrong.
    """
    return _overridden(dataclasses.asdict(config), overrides) if overrides else config


def presets() -> dict[str, Path]:
    """Paths of the configs of the package by name: inside an installed package, or beside it in a clone.

    The name of a config in a folder contains that folder: ``rl/code``.
    """
    package = Path(__file__).parents[1]
    folder = next((folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()), package)
    paths = [*sorted(folder.glob("*.py")), *sorted(folder.glob("*/*.py"))] if folder.name == "configs" else []
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def description(path: Path) -> str:
    """The first line of a config file's docstring."""
    return (ast.get_docstring(ast.parse(path.read_bytes())) or "").partition("\n")[0]


def _overridden(values: dict, overrides: typing.Sequence[tuple[str, str]]) -> Config:
    before = copy.deepcopy(values)
    for name, text in overrides:
        override(values, name, text)
    return resolve(values, before)


def _saved(path: Path) -> dict:
    try:
        return dataclasses.asdict(from_json(path.read_bytes()))
    except OSError as error:
        raise ConfigError(f"--config={path} can't be read: {error.strerror}") from None
    except ConfigError as error:
        raise ConfigError(f"--config={path}: {error}") from None


def _returned(path: Path) -> dict:
    """Run a Python file and return the values of its `get_config`."""
    spec = importlib.util.spec_from_file_location("t5like_config_file", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config={path} must be a Python file, such as configs/tiny.py, or a run's config.json")
    module = importlib.util.module_from_spec(spec)
    search_path, write_no_bytecode = list(sys.path), sys.dont_write_bytecode
    sys.path.insert(0, str(path.resolve().parent))  # a config may import another one of its folder
    sys.dont_write_bytecode = True  # no __pycache__ beside the files of a user
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for results
            spec.loader.exec_module(module)
            config = module.get_config()
        if isinstance(config, ml_collections.ConfigDict):
            return config.to_dict()
        if isinstance(config, Mapping):
            return copy.deepcopy(dict(config))
    except SystemExit as error:
        raise ConfigError(
            f"--config={path} ended the program by sys.exit({shown(error.code)}); define get_config() and return"
        ) from error
    except Exception as error:  # any error is one of the file
        if message := _renamed_in(error):
            raise ConfigError(f"--config={path}: {message}") from error
        reason = one_line(error, longest=LONGEST_VALUE)
        raise ConfigError(f"--config={path} failed: {type(error).__name__}: {reason}") from error
    finally:
        sys.path[:], sys.dont_write_bytecode = search_path, write_no_bytecode
    raise ConfigError(f"--config={path}: get_config() must return a ConfigDict, not {type(config).__name__}")


def _renamed_in(error: Exception) -> str | None:
    """The message for an old field name in an error of a ConfigDict, which quotes the field without its section."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if not isinstance(error, AttributeError | KeyError) or "ml_collections" not in frame.f_code.co_filename:
        return None
    quoted = re.search(r"[\"'](\w+)[\"']", str(error))
    return next((renamed(name) for name in RENAMED if quoted and name.rpartition(".")[2] == quoted[1]), None)


def override(values: dict, name: str, text: str) -> None:
    """Set ``section.field`` of a nested dict to the value of a flag, converted to the type of the field."""
    if message := renamed(name):
        raise ConfigError(message)
    section, cls = values, Config
    *parents, leaf = name.split(".")
    for parent in parents:
        inner = _types(cls).get(parent)
        if inner is None:
            raise ConfigError(_unknown(f"--config.{name}", parent, cls))
        if not dataclasses.is_dataclass(inner):
            raise ConfigError(
                f"--config.{name}: {parent!r} is a field, not a section; use --config.{name.rpartition('.')[0]}=VALUE"
            )
        section, cls = section.setdefault(parent, {}), inner
    field_type = _types(cls).get(leaf)
    if field_type is None:
        raise ConfigError(_unknown(f"--config.{name}", leaf, cls))
    if dataclasses.is_dataclass(field_type):
        raise ConfigError(f"--config.{name} is a section; set one of its fields: {', '.join(_types(field_type))}")
    try:
        section[leaf] = _convert(name, _parse(name, text, field_type), field_type)
    except ConfigError as error:
        value = section.get(leaf)
        works = isinstance(value, int | float) and "; " not in str(error)
        raise ConfigError(f"{error}; use {value}" if works else str(error)) from None


def resolve(values: Mapping, before: Mapping = MappingProxyType({})) -> Config:
    """Build and check the frozen config from nested dicts; missing fields take their default.

    `before` has values that errors suggest: those of a config whose fields the command line has changed.
    """
    config = _build(Config, values, "")
    for section, name in (("init_from", "checkpoint"), ("init_from", "decoder_checkpoint"), ("distill", "teacher")):
        part = getattr(config, section)
        if path := getattr(part, name):
            check_path(f"{section}.{name}", path)
            # The user may continue the run from another working directory.
            part = dataclasses.replace(part, **{name: str(expand(path).absolute())})
            config = dataclasses.replace(config, **{section: part})
    init = config.init_from
    directory = init.checkpoint if "vocabulary" not in init.adapt else ""
    if (directory := directory or config.distill.teacher) and not config.tokenizer.path:
        path = str(Path(directory) / "tokenizer.model")
        config = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, path=path))
    if config.rl.has_scalar_head:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, scalar_head=True))
    check(config, before)
    return config


def to_json(config: Config) -> str:
    """The config as JSON, one field per line, for a run directory or a checkpoint."""
    return json.dumps({"format": FORMAT, **dataclasses.asdict(config)}, indent=1)


def from_json(text: str | bytes) -> Config:
    """Read JSON from `to_json`, of this format or an older one; checks as `resolve` does."""
    try:
        values = loads(text, finite=True)
    except InvalidJSON as error:
        raise ConfigError(f"this is not a saved config: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError("this is not a saved config: it must be a JSON object")
    written = values.pop("format", None)
    if type(written) is not int or written < 1:
        raise ConfigError(f"config format={written!r} is not a format of t5like; they are 1 to {FORMAT}")
    if written > FORMAT:
        raise ConfigError(
            f"config format={written} is newer than {FORMAT}, which t5like {__version__} reads; install a newer t5like"
        )
    return resolve(upgrade(values, written))


_SOURCE_SEPARATOR = r",(?=\w{2,}:|python_stdlib|$)"  # before a source type; another comma is part of a path
_REWARD_SEPARATOR = r",(?=[A-Za-z_][\w.]*(?::|,|$))"  # before the name of a reward; another one is part of a pattern


def difference(old: Config, new: Config) -> list[str]:
    """The fields that differ, as ``section.field: old -> new``."""
    values = flatten(new)
    return [f"{name}: {was!r} -> {values[name]!r}" for name, was in flatten(old).items() if was != values[name]]


def _types(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _unknown(where: str, key: Any, cls: type) -> str:
    names = list(_types(cls))
    near = difflib.get_close_matches(shown(key).strip("'"), names, n=1, cutoff=0.5)
    where = where if where.isprintable() and len(where) < LONGEST_VALUE else shown(where)
    return f"{where}: there is no field {shown(key)}; " + (
        f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
    )


def _build(cls: type, values: Mapping, prefix: str):
    if not isinstance(values, Mapping):
        names = ", ".join(_types(cls))
        raise ConfigError(f"{prefix.rstrip('.')}={shown(values)} must be a section with the fields {names}")
    types = _types(cls)
    for key in values:
        if key not in types:
            if message := renamed(f"{prefix}{key}"):
                raise ConfigError(message)
            raise ConfigError(_unknown(prefix + (key if isinstance(key, str) else shown(key)), key, cls))
    return cls(
        **{
            key: _build(types[key], value, f"{prefix}{key}.")
            if dataclasses.is_dataclass(types[key])
            else _convert(prefix + key, value, types[key])
            for key, value in values.items()
        }
    )


def _describe_type(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        if typing.get_origin(inner) is Literal:
            return "a list of " + ", ".join(map(str, typing.get_args(inner)))
        return "a list of " + {str: "strings", float: "numbers", int: "whole numbers"}[inner]
    return {bool: "true or false", int: "a whole number", float: "a finite number", str: "a string"}[kind]


def _convert(name: str, value: Any, kind: Any) -> Any:
    """Check a value against its annotation; accepts an int for a float, and one value for a list."""
    if typing.get_origin(kind) is Literal:
        if isinstance(value, str) and value in typing.get_args(kind):
            return value
        near = difflib.get_close_matches(shown(value).strip("'"), typing.get_args(kind), n=1)
        raise ConfigError(
            f"{name}={shown(value)} must be {_describe_type(kind)}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    if typing.get_origin(kind) is tuple:
        items = (value,) if isinstance(value, str | int | float) else value
        if isinstance(items, list | tuple):
            return tuple(_convert(name, item, typing.get_args(kind)[0]) for item in items)
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an int beyond the range of floats
            if math.isfinite(value):
                return float(value)
    elif type(value) is kind:
        if kind is str and not _is_text(value):
            raise ConfigError(f"{name}={shown(value)} must be UTF-8 text without NUL characters")
        return value
    raise ConfigError(f"{name}={shown(value)} must be {_describe_type(kind)}")


def _is_text(value: str) -> bool:
    """Whether a string can be saved and be a path; bytes of a command line that are not UTF-8 become surrogates."""
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)


def _parse(name: str, text: str, kind: Any) -> Any:
    """Convert the text of a flag to the annotated type."""
    if typing.get_origin(kind) is tuple:
        separator = {"data.source": _SOURCE_SEPARATOR, "rl.rewards": _REWARD_SEPARATOR}.get(name, ",")
        return tuple(_parse(name, part, typing.get_args(kind)[0]) for part in re.split(separator, text)) if text else ()
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if kind is int:
            number = int(text) if "e" not in text.lower() else float(text)
            if number != int(number):
                raise ValueError
            return int(number)
        if kind is float:
            return float(text)
    except (ValueError, KeyError, OverflowError):
        raise ConfigError(f"{name}={shown(text)} must be {_describe_type(kind)}") from None
    return text
