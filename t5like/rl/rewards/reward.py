"""The entries of `rl.rewards` as functions: ``NAME``, ``NAME:ARGUMENT`` or ``MODULE:FUNCTION``; docs/rl.md has a table.

`open_rewards` refuses what can't work before anything is trained. A `Reward` is scored by `pool`. A `ModelReward` is a
trained reward model, which is scored on the devices.
"""

import dataclasses
import difflib
import importlib.util
import os
import re
from collections.abc import Sequence

from t5like.config.schema import Config
from t5like.data.sources.files import RequiredFields
from t5like.data.sources.reasoning_gym import task_error
from t5like.errors import ConfigError, one_line, shown
from t5like.evaluation.text_metrics import score_answer
from t5like.io.paths import expand, why_no_path
from t5like.rl.rewards.functions import (
    TARGETS,
    Length,
    ReasoningGym,
    Regex,
    RewardFunction,
    TextMetric,
    UserFunction,
)
from t5like.rl.rewards.python_tests import PythonTests

TEXT_METRICS = ("exact_match", "f1", "rougeL", "bleu", "chrf")
NAMES = (*TEXT_METRICS, "regex", "length", "python_tests", "reasoning_gym", "run")
FORMS = f"{', '.join(NAMES)}, or MODULE:FUNCTION"


@dataclasses.dataclass(frozen=True)
class Reward:
    """A reward that the processes of `pool` compute.

    Attributes:
        name: of its metrics, such as ``rewards/NAME/mean``; different for each reward of a run.
        weight: in the sum of rewards.
        function: of a row and an answer.
        fields: fields of a record that the function reads, apart from the text of `data.targets_template`.
    """

    name: str
    weight: float
    function: RewardFunction
    fields: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ModelReward:
    """A trained reward model (`rl.method=reward_model`); its run directory contains a config.

    Attributes:
        directory: its run directory.
    """

    name: str
    weight: float
    directory: str
    fields: tuple[str, ...] = ()


def open_rewards(config: Config) -> list[Reward | ModelReward]:
    """The rewards of a config, in its order.

    Raises:
        ConfigError: there are none, a name or argument is wrong, a package is missing, or the number of weights is not
            that of the rewards.
    """
    entries, weights = config.rl.rewards, config.rl.reward_weights or (1.0,) * len(config.rl.rewards)
    if not entries:
        raise ConfigError(f"rl.rewards is empty and must name a reward: {FORMS}; use exact_match")
    if len(weights) != len(entries):
        use = ",".join(["1.0"] * len(entries))
        rule = f"must be empty, or one weight for each of the {len(entries)} rewards"
        raise ConfigError(f"rl.reward_weights={','.join(map(str, weights))} {rule}; use {use}")
    names = _unique_names(entries)
    return [_open(entry, *rest, config) for entry, *rest in zip(entries, names, weights, strict=True)]


def required_fields(rewards: Sequence[Reward | ModelReward]) -> RequiredFields:
    """The fields that all rewards need of a record."""
    names = dict.fromkeys(name for reward in rewards for name in reward.fields if name != TARGETS)
    return RequiredFields(tuple(names), "name in rl.rewards")


def _unique_names(entries: Sequence[str]) -> list[str]:
    """The part of each entry before the colon; if several have the same, with a number behind it from the second on."""
    names: list[str] = []
    for entry in entries:
        name, _, argument = entry.partition(":")
        name = name if name in NAMES else f"{name}.{argument}"
        name, number = re.sub(r"[^\w.-]+", "_", name), 1
        while (unique := name if number == 1 else f"{name}-{number}") in names:
            number += 1
        names.append(unique)
    return names


def _open(entry: str, name: str, weight: float, config: Config) -> Reward | ModelReward:
    kind, colon, argument = entry.partition(":")
    if colon and not argument:
        raise ConfigError(f"rl.rewards={entry} must have an argument after the colon; use {_example(kind)}")
    if kind in TEXT_METRICS:
        field = argument or TARGETS
        _check_package(entry, kind)
        fields = (field.partition("/")[0],) if argument else ()
        return Reward(name, weight, TextMetric(kind, field, config.evaluate.language), fields)
    match kind:
        case "regex":
            return Reward(name, weight, _regex(entry, argument))
        case "length":
            if argument:
                raise ConfigError(f"rl.rewards={entry} must have no argument; use length")
            return Reward(name, weight, Length())
        case "python_tests":
            field = argument or "tests"
            return Reward(name, weight, PythonTests(field, config.rl.reward_timeout_seconds), (field.split("/")[0],))
        case "reasoning_gym":
            return Reward(name, weight, _reasoning_gym(entry, argument), ("entry",))
        case "run":
            return ModelReward(name, weight, _run(entry, argument))
    if not argument:
        raise ConfigError(_without_function(entry))
    return _user_reward(entry, name, weight)


def _without_function(entry: str) -> str:
    """The message about an entry that is no reward's name and has no colon."""
    for module, function in ((entry, "FUNCTION"), (entry.rpartition(".")[0], entry.rpartition(".")[2])):
        if _is_module(module):
            return f"rl.rewards={entry} must be MODULE:FUNCTION, as {module} is a module; use {module}:{function}"
    return f"rl.rewards={shown(entry)} must be {FORMS}; {_nearest(entry)}"


def _is_module(name: str) -> bool:
    """Whether a module exists in the working directory, or is installed; nothing is imported."""
    if not all(part.isidentifier() for part in name.split(".")):
        return False
    path = os.path.join(os.getcwd(), *name.split("."))
    installed = "." not in name and importlib.util.find_spec(name) is not None
    return installed or os.path.isfile(f"{path}.py") or os.path.isfile(f"{path}/__init__.py")


def _nearest(kind: str, rest: str = "") -> str:
    near = difflib.get_close_matches(kind, NAMES, n=1)
    return f"did you mean {near[0]}{rest}?" if near else "use exact_match"


def _example(kind: str) -> str:
    examples = {"regex": "regex:[0-9]+", "run": "run:runs/reward_model", "reasoning_gym": "reasoning_gym:gcd"}
    return examples.get(kind, kind if kind in NAMES else "my_rewards:score")


def _check_package(entry: str, metric: str) -> None:
    try:
        score_answer(metric, "a", ["a"], "en")
    except ConfigError as error:
        message = str(error).partition(" needs ")[2]
        raise ConfigError(f"rl.rewards={entry} needs {message}") from None


def _regex(entry: str, pattern: str) -> Regex:
    if not pattern:
        raise ConfigError(f"rl.rewards={entry} must have a pattern; use regex:[0-9]+")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"rl.rewards={shown(entry)} must be a regular expression of Python ({one_line(error)}); use regex:[0-9]+"
        ) from None
    return Regex(pattern)


def _reasoning_gym(entry: str, task: str) -> ReasoningGym:
    try:
        wrong = task_error(task or "gcd", {})
    except ImportError:
        raise ConfigError(f"rl.rewards={entry} needs the package reasoning-gym; pip install 't5like[rl]'") from None
    if wrong:
        raise ConfigError(f"rl.rewards={entry}: {wrong}")
    return ReasoningGym(task)


def _run(entry: str, directory: str) -> str:
    if not directory:
        raise ConfigError("rl.rewards=run must name the run directory of a reward model; use run:runs/reward_model")
    if why := why_no_path(directory):
        raise ConfigError(f"rl.rewards={entry}: the directory {why}")
    path = os.path.abspath(expand(directory))
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise ConfigError(
            f"rl.rewards={entry} must name the run directory of a reward model, with a config.json; train one with "
            "--config.rl.method=reward_model"
        )
    return path


def _user_reward(entry: str, name: str, weight: float) -> Reward:
    module, _, function = entry.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), function)):
        raise ConfigError(f"rl.rewards={shown(entry)} must be {FORMS}; use exact_match")
    reward = UserFunction(module, function, os.getcwd())
    hint = f"rl.rewards={entry} must be {FORMS}, with MODULE in the working directory or installed"
    try:
        fields = getattr(reward.function, "fields", ())
    except ModuleNotFoundError as error:
        raise ConfigError(f"{hint} ({one_line(error)}); {_nearest(module, f':{function}')}") from None
    except AttributeError as error:
        raise ConfigError(f"{hint} ({one_line(error)}); define {function}(row, answer)") from None
    except (Exception, SystemExit) as error:  # whatever the user's module does
        raise ConfigError(f"{hint}: {type(error).__name__}: {one_line(error)}; mend {module}") from None
    if isinstance(fields, str) or not all(isinstance(field, str) for field in fields):
        raise ConfigError(f"rl.rewards={entry}: {function}.fields must be a tuple of names; use ('answer',)")
    return Reward(name, weight, reward, tuple(fields))
