"""The parser of all command lines: errors in one line, values that are paths, flags that every command has."""

import argparse
from pathlib import Path

from t5like.config import field_help
from t5like.errors import ConfigError
from t5like.io.paths import expand, why_no_path


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are a `ConfigError`: one line, exit code 2."""

    shows_fields = False  # whether its help ends with the fields of the config

    def format_help(self) -> str:
        return super().format_help() + (f"\n{field_help.text()}" if self.shows_fields else "")

    def error(self, message: str) -> None:
        raise ConfigError(f"{message}; see {self.prog} --help")


def parse_path(text: str) -> Path:
    """Convert the value of a flag that is a path."""
    if why := why_no_path(text):
        raise argparse.ArgumentTypeError(f"{text} {why}")
    path = expand(text)
    return path.absolute() if str(path).startswith("~") else path  # of ./~name: later expansion must not change it


def add_command(commands: "argparse._SubParsersAction[Parser]", name: str, text: str) -> Parser:
    """Add a command with the flags that all commands have."""
    sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    sub.add_argument("--fake_devices", type=int, metavar="N", help="simulate N CPU devices in this process")
    sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return sub
