"""The entries of rl.rewards: what each is worth for an answer, and one line for each that can't work."""

import json
import pickle
import sys

import pyarrow
import pytest
from pyarrow import parquet

from t5like.config import loader
from t5like.config.rl_schema import RLConfig
from t5like.config.schema import Config, DataConfig
from t5like.errors import ConfigError, DataError
from t5like.rl.prompts import first_rows
from t5like.rl.rewards.functions import texts_of
from t5like.rl.rewards.reward import ModelReward, open_rewards, required_fields

MODULE = """
def score(row, answer):
    return len(row["answers"])
score.fields = ("answers",)
number = 3
def wrong(row, answer): return 0.0
wrong.fields = "answers"
"""


def opened(*entries, **fields):
    return open_rewards(Config(rl=RLConfig(rewards=entries, **fields)))


@pytest.fixture
def my_rewards(tmp_path, monkeypatch):
    """A module of the user's in the working directory."""
    (tmp_path / "my_rewards_of_tests.py").write_text(MODULE)
    (tmp_path / "fails_on_import.py").write_text("raise SystemExit('two\\nlines')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "my_rewards_of_tests"
    sys.modules.pop("my_rewards_of_tests", None)


ROW = {"targets": "the cat sat", "answers": ["a dog", "Cats!"], "number": 42, "deep": {"list": ["x", "yes"]}}


@pytest.mark.parametrize(
    ("entry", "answer", "value", "fields"),
    [
        ("exact_match", "The cat sat.", 1, ()),
        ("exact_match", "cat", 0, ()),
        ("exact_match:answers", "cats", 1, ("answers",)),
        ("exact_match:number", "42", 1, ("number",)),
        ("exact_match:deep/list/1", "yes", 1, ("deep",)),
        ("f1", "cat", 2 / 3, ()),
        ("rougeL", "the cat", 0.8, ()),
        ("bleu", "the cat sat", 1, ()),
        ("bleu:number", "42", 1, ("number",)),
        ("bleu", "", 0, ()),
        ("chrf", "the cat sat", 1, ()),
        ("chrf", "xyz", 0, ()),
        ("regex:^[0-9]{1,3}$", "12", 1, ()),
        ("regex:^[0-9]{1,3}$", "1234", 0, ()),
        ("length", "naïve 日本", 8, ()),
    ],
)
def test_a_reward_of_an_answer(entry, answer, value, fields):
    [reward] = opened(entry)
    function = pickle.loads(pickle.dumps(reward.function))  # noqa: S301
    function.prepare()
    assert function(ROW, answer) == pytest.approx(value) and reward.fields == fields


def test_a_function_of_the_user_is_imported_from_the_working_directory(my_rewards):
    [reward] = opened(f"{my_rewards}:score")
    assert reward.function(ROW, "x") == 2 and reward.fields == ("answers",) and reward.name == f"{my_rewards}.score"


def test_names_are_unique_and_weights_follow_the_entries():
    rewards = opened("chrf", "chrf:answers", "regex:a", "regex:b", reward_weights=(1.0, 2.0, -1.0, 0.5))
    assert [(each.name, each.weight) for each in rewards] == [
        ("chrf", 1.0), ("chrf-2", 2.0), ("regex", -1.0), ("regex-2", 0.5)
    ]  # fmt: skip
    assert required_fields(rewards).names == ("answers",)


def test_a_reward_model_is_a_directory_with_a_config(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert opened(f"run:{tmp_path}") == [ModelReward("run", 1.0, str(tmp_path))]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ((), "rl.rewards is empty and must name a reward: .*; use exact_match"),
        (("exactmatch",), r"rl.rewards='exactmatch' must be exact_match, .*:FUNCTION; did you mean exact_match\?"),
        (("nothing",), "rl.rewards='nothing' must be exact_match, .*MODULE:FUNCTION; use exact_match"),
        (("pyhton_tests:tests",), "did you mean python_tests:tests\\?"),
        (("MINE",), "rl.rewards=(.*) must be MODULE:FUNCTION, as (.*) is a module; use \\1:FUNCTION"),
        (("MINE.other",), "rl.rewards=(.*).other must be MODULE:FUNCTION, as .* is a module; use \\1:other"),
        (("chrf:",), "rl.rewards=chrf: must have an argument after the colon; use chrf"),
        (("regex",), "rl.rewards=regex must have a pattern; use regex:"),
        (("regex:(",), r"rl.rewards='regex:\(' must be a regular expression of Python \(.*\); use regex:"),
        (("length:3",), "rl.rewards=length:3 must have no argument; use length"),
        (("run",), "rl.rewards=run must name the run directory"),
        (
            ("run:/nowhere",),
            "rl.rewards=run:/nowhere must name the run directory of a reward model, with a config.json",
        ),
        (("no_such_module:score",), r"rl.rewards=no_such_module:score must be .* \(No module named 'no_such_module'\)"),
        (("MINE:other",), "rl.rewards=.*no attribute 'other'.*; define other"),
        (("MINE:number",), "rl.rewards=.*number is a int, not a function"),
        (("MINE:wrong",), "rl.rewards=.*: wrong.fields must be a tuple of names"),
        (("fails_on_import:score",), "rl.rewards=fails_on_import:score must be .*SystemExit: two lines; mend"),
        (("my module:score",), "rl.rewards='my module:score' must be"),
    ],
)
def test_a_reward_that_cant_work_is_refused_in_one_line(my_rewards, entries, message):
    with pytest.raises(ConfigError, match=message) as caught:
        opened(*(entry.replace("MINE", my_rewards) for entry in entries))
    assert "\n" not in str(caught.value)


def test_weights_that_dont_fit_the_rewards_are_refused():
    with pytest.raises(ConfigError, match=r"rl.reward_weights=1.0 must be .* each of the 2 rewards; use 1.0,1.0"):
        opened("chrf", "length", reward_weights=(1.0,))


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    for package in ("reasoning_gym", "sacrebleu"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ConfigError, match=r"rl.rewards=reasoning_gym:gcd needs the package reasoning-gym; .*t5like\[rl"
    ):
        opened("reasoning_gym:gcd")
    with pytest.raises(ConfigError, match="rl.rewards=chrf needs the package sacrebleu"):
        opened("chrf")


@pytest.mark.parametrize("path", ["none", "targets/0", "deep", "answers/7", "empty"])
def test_a_field_without_texts_is_a_failure_with_its_name(path):
    with pytest.raises(ValueError, match=path.partition("/")[0]):
        texts_of({**ROW, "empty": []}, path)


def test_a_flag_splits_rewards_at_their_names_only():
    config = loader.load(
        "tiny",
        [
            ("data.objective", "supervised"),
            ("rl.method", "policy"),
            ("rl.rewards", "regex:[0-9]{1,3},chrf:answers,my_rewards:score,length"),
        ],
    )
    assert config.rl.rewards == ("regex:[0-9]{1,3}", "chrf:answers", "my_rewards:score", "length")


def test_entries_of_reasoning_gym_keep_their_tuples():
    from t5like.data.sources import reasoning_gym

    entry = {"question": "q", "metadata": {"grid": ((1, 2), [3, (4,)]), "text": None}}
    text = reasoning_gym.encode("arc_agi", {"size": 1}, entry)
    assert reasoning_gym.decode(text) == ("arc_agi", {"size": 1}, entry) and json.loads(text)
    for other in ("", "[]", "{}", 3):
        with pytest.raises(ValueError, match="not from data.source=reasoning_gym"):
            reasoning_gym.decode(other)


@pytest.mark.parametrize(
    ("method", "fields", "named"),
    [
        ("policy", ["solution"], "'solution'; name in rl.rewards one of 'chosen', 'inputs'"),
        ("dpo", ["chosen", "rejected"], "'rejected'; set rl.rejected_field to one of 'chosen', 'inputs'"),
    ],
)
def test_a_missing_column_is_named_with_the_setting_that_needs_it(tmp_path, method, fields, named):
    parquet.write_table(pyarrow.table({"chosen": ["a"], "inputs": ["b"]}), tmp_path / "a.parquet")
    data = DataConfig(source=(f"parquet:{tmp_path}/a.parquet",), objective=("supervised",), targets_template="{chosen}")
    with pytest.raises(DataError, match=f"there is no field {named}"):
        first_rows(Config(data=data, rl=RLConfig(method=method)), fields, 1)
