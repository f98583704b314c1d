"""The defaults of a site, ``launch.toml``: account, partition, image, modules to load, so that a job is one short line.

It is searched in the current directory, then in ``~/.config/t5like``; `--site=FILE` names another one. The table
``[default]`` applies to all backends that have an option; ``[slurm]``, ``[kubernetes]``, ``[tpu_vm]`` and ``[local]``
apply to one. A key is the name of a flag, its value what the flag takes; flags that may be repeated take a list:

    [default]
    env = ["HTTPS_PROXY"]

    [slurm]
    partition = "gpu"
    time_limit = "12h"
    setup = ["module load cuda/12"]

`launch.options` puts these flags before those of the command line, which win.
"""

import difflib
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path

from launch.record import BACKENDS
from t5like.errors import ConfigError, one_line, shown
from t5like.io.paths import expand

PLACES = ("launch.toml", "~/.config/t5like/launch.toml")
TABLES = ("default", *BACKENDS)


def find(path: str | None) -> Path | None:
    """Return the site's file: `path` if it is given, else the first that exists; None: there is none."""
    if path:
        return expand(path)
    return next((place for place in map(_expanded, PLACES) if place and place.is_file()), None)


def _expanded(text: str) -> Path | None:
    try:
        return expand(text)
    except ConfigError:  # no home directory
        return None


def flags(path: Path, backend: str, known: Mapping[str, Collection[str]]) -> list[str]:
    """Return the file's values for a backend as flags: those of ``[default]``, then those of the backend's table.

    Args:
        path: the file.
        backend: one of `BACKENDS`.
        known: the flags of each backend that the file may set.

    Raises:
        ConfigError: the file can't be read, or a table, a key or a type is wrong.
    """
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"--site={path} can't be read: {error.strerror}; name another file") from None
    except ValueError as error:  # no TOML, or no UTF-8
        raise ConfigError(f"{path} is not TOML: {one_line(error)}; correct that line") from None
    every = {name: True for names in known.values() for name in names}
    for table, values in tables.items():
        if table not in TABLES or not isinstance(values, dict):
            if table in TABLES:
                raise ConfigError(f"{path}: {table}={shown(values)} must be a table; use [{table}]")
            if table in every:
                raise ConfigError(f"{path}: {table} must be in a table; put it below [default] or [{backend}]")
            raise ConfigError(f"{path}: [{table}] is no table of it; {_nearest(table, TABLES)}")
        names = every if table == "default" else known[table]
        for key, value in values.items():
            if key not in names:
                raise ConfigError(f"{path}: {key} is no option of [{table}]; {_nearest(key, names)}")
            _texts(path, table, key, value)
    result = []
    for table in ("default", backend):
        for key, value in tables.get(table, {}).items():
            if key in known[backend]:
                result += [f"--{key}={text}" for text in _texts(path, table, key, value)]
    return result


def _nearest(name: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else f"use one of {', '.join(names)}"


def _texts(path: Path, table: str, key: str, value: object) -> list[str]:
    """Return a value as the texts that its flag takes."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str | int) for each in values):
        raise ConfigError(
            f"{path}: {key}={shown(value)} in [{table}] must be a text, a whole number, true, false, or a list of "
            f'texts; use {key} = "TEXT"'
        )
    return [str(each).lower() if isinstance(each, bool) else str(each) for each in values]
