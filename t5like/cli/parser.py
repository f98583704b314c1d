"""The parser of all command lines: errors in one line with hints, values that are paths, flags of every command."""

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from t5like.config import field_help, schema
from t5like.errors import ConfigError, shown
from t5like.io.paths import expand, why_no_path


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are a `ConfigError`: one line, exit code 2.

    Attributes:
        shows_fields: whether its help ends with the fields of the config.
        knows_all_flags: whether a flag that it does not have is refused with a hint, before flags that are missing.
    """

    shows_fields = False
    knows_all_flags = False

    def format_help(self) -> str:
        return super().format_help() + (f"\n{field_help.text()}" if self.shows_fields else "")

    def error(self, message: str) -> None:
        raise ConfigError(message if message.endswith("?") else f"{message}; see {self.prog} --help")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        for argument in args if self.knows_all_flags and args else ():
            if argument == "--" or (self._subparsers and not argument.startswith("-")):  # the flags of a command follow
                break
            flag = argument.partition("=")[0]
            if re.fullmatch(r"--?[A-Za-z][^\s]*", flag) and flag not in self._option_string_actions:
                self.error(f"unrecognized arguments: {shown(argument)[1:-1]}{self._hint(argument)}")
        return super().parse_known_args(args, namespace)

    def _hint(self, argument: str) -> str:
        """What was probably meant by an argument that is no flag: a field of the config, or another flag; or ""."""
        flag, equals, value = argument.partition("=")
        name = flag.lstrip("-")
        fields = list(schema.flatten(schema.Config())) if "--config" in self._option_string_actions else []
        found = [f"--config.{field}" for field in fields if name in (field, field.rpartition(".")[2])]
        if not found:
            known = {flag.lstrip("-"): flag for flag in self._option_string_actions}
            names = [(each, field) for field in fields for each in (f"config.{field}", field.rpartition(".")[2])]
            known = {each: f"--config.{field}" for each, field in names} | known
            found = [known[near] for near in difflib.get_close_matches(name, known, n=1)]
        given = shown(equals + value)[1:-1]
        return f"; did you mean {' or '.join(each + given for each in found[:3])}?" if found else ""

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            near = difflib.get_close_matches(str(value), [str(choice) for choice in action.choices], n=1)
            rest = f"; did you mean {near[0]}?" if near else f" (choose from {', '.join(map(str, action.choices))})"
            raise argparse.ArgumentError(action, f"invalid choice: {shown(value)}{rest}")


def subcommands(parser: argparse.ArgumentParser) -> dict[str, Parser]:
    """The parsers of a parser's commands by name."""
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return {name: sub for action in actions for name, sub in action.choices.items()}


def parse_path(text: str) -> Path:
    """Convert the value of a flag that is a path."""
    if why := why_no_path(text):
        raise argparse.ArgumentTypeError(f"{text} {why}")
    path = expand(text)
    return path.absolute() if str(path).startswith("~") else path  # of ./~name: later expansion must not change it


def add_command(commands: "argparse._SubParsersAction[Parser]", name: str, text: str) -> Parser:
    """Add a command with the flags that all commands have."""
    sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    sub.knows_all_flags = True
    sub.add_argument("--fake_devices", type=int, metavar="N", help="simulate N CPU devices in this process")
    sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return sub
