"""Shell completion: `t5like completion` prints a script for bash or zsh.

The script contains everything that it completes: commands and their flags, from the parsers; config fields and their
values, from the schema; presets. So the shell starts no process when the user presses Tab. zsh runs the same script
with its emulation of bash's completion.
"""

import argparse
from collections.abc import Iterator

from launch import options as launch_options
from t5like.cli import flags
from t5like.cli.parser import subcommands
from t5like.config import field_help, loader, schema

# Shell variables: `words` is the command line up to the cursor, words[0] the program; `current` is completed. bash
# splits words at "=", zsh does not: `flag` is the part before it, and `kept` what of it must stay in a completion.
SCRIPT = r"""
_t5like_flags() {
  case "$1" in
@FLAGS@
  esac
}

_t5like_values() {
  case "$1 $2" in
@VALUES@
    *) return 1 ;;
  esac
}

_t5like() {
  local current="${COMP_WORDS[COMP_CWORD]}" command="" flag="" kept="" found="" index word
  COMPREPLY=()
  for (( index = 1; index < COMP_CWORD; index++ )); do
    word="${COMP_WORDS[index]}"
    if [ "$word" = "--" ]; then
      command=""
    elif [ -z "$command" ]; then
      command="$word"
    elif [ "$command" = launch ] || [ "$command" = inspect ]; then
      command="$command $word"
    fi
  done
  if [ "$current" = "=" ]; then
    flag="${COMP_WORDS[COMP_CWORD-1]}" current=""
  elif [ "$COMP_CWORD" -gt 2 ] && [ "${COMP_WORDS[COMP_CWORD-1]}" = "=" ]; then
    flag="${COMP_WORDS[COMP_CWORD-2]}"
  elif [[ "$current" == --*=* ]]; then
    flag="${current%%=*}" kept="${current%%=*}=" current="${current#*=}"
  fi
  if [ -n "$flag" ]; then
    if found="$(_t5like_values "$command" "$flag")"; then
      found="$(compgen -W "$found" -- "$current")"
    fi
    [ "$flag" = --config ] || [ -z "$found" ] && found="$found
$(compgen -f -- "$current")"
  elif [[ "$current" == --config.*.* ]]; then
    found="$(compgen -W "$(_t5like_flags fields)" -- "$current")"
  else
    found="$(_t5like_flags "$command")"
    [[ "$found" == *--config=* && "$current" == --config* ]] && found="$found $(_t5like_flags sections)"
    found="$(compgen -W "$found" -- "$current")"
  fi
  while IFS= read -r word; do
    [ -z "$word" ] && continue
    case "$word" in
      *=|--config.*.|--config.) ;;
      *) if [ -n "$flag" ] && [ -d "$word" ]; then word="$word/"; else word="$word "; fi ;;
    esac
    COMPREPLY+=("$kept$word")
  done <<< "$found"
}

complete -o nospace -F _t5like t5like
"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def script(shell: str) -> str:
    """The script for a shell: bash or zsh."""
    flag_lines = [_case(f'"{name}"', words) for name, words in _words().items()]
    value_lines = [_case(name, values) for name, values in _values().items()]
    text = SCRIPT.replace("@FLAGS@", "\n".join(flag_lines)).replace("@VALUES@", "\n".join(value_lines))
    return f"# t5like completion {shell}{text}" if shell == "bash" else f"# t5like completion {shell}\n{ZSH}{text}"


def _case(pattern: str, words: list[str]) -> str:
    return f'    {pattern}) echo "{" ".join(words)}" ;;'


def _words() -> dict[str, list[str]]:
    """What may follow each command; "" is the beginning, "fields" and "sections" are those of the config."""
    words = {name.removeprefix("t5like").strip(): _of_parser(parser) for name, parser in _parsers()}
    words["fields"] = [f"--config.{prefix}{name}=" for prefix, name, _ in _fields()]
    top = [f"--config.{name}=" for prefix, name, _ in _fields() if not prefix]
    words["sections"] = [*top, *(f"--config.{prefix}" for prefix, _ in schema.sections() if prefix.count(".") == 1)]
    return words


def _of_parser(parser: argparse.ArgumentParser) -> list[str]:
    words = []
    for action in parser._actions:
        if action.option_strings:
            words.append(action.option_strings[-1] + "=" * (action.nargs != 0))
        elif action.choices:
            words += action.choices
    return words


def _values() -> dict[str, list[str]]:
    """The values of each flag and field that has a list of them, by the shell's pattern of command and flag."""
    values = {'*" --config"': list(loader.presets())}
    for command, parser in _parsers():
        for action in parser._actions:
            if action.option_strings and action.choices:
                name = f"{command.removeprefix('t5like').strip()} {action.option_strings[-1]}"
                values[f'"{name}"'] = [str(choice) for choice in action.choices]
    for prefix, name, kind in _fields():
        if choices := field_help.values(kind):
            values[f'*" --config.{prefix}{name}"'] = list(choices)
    return values


def _fields() -> Iterator[tuple[str, str, object]]:
    """Section, name and type of every field."""
    for prefix, cls in schema.sections():
        for name, kind, _ in field_help.fields(cls):
            yield prefix, name, kind


def _parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The parser of every command by its words: t5like, t5like train, t5like inspect run, t5like launch slurm."""
    todo = [("t5like", flags.build_parser()), ("t5like launch", launch_options.build_parser())]
    while todo:
        name, parser = todo.pop(0)
        yield name, parser
        todo += [(f"{name} {word}", sub) for word, sub in subcommands(parser).items() if word != "launch"]
