"""Tasks of the package reasoning-gym as records and as rewards; which of its scorers pay for junk."""

import subprocess
import sys

import pytest
from reasoning_gym.factory import DATASETS

from t5like.config.rl_schema import RLConfig
from t5like.config.schema import Config, DataConfig
from t5like.data.sources import reasoning_gym
from t5like.data.sources.files import RequiredFields
from t5like.data.sources.source import open_source
from t5like.errors import ConfigError, DataError
from t5like.rl.rewards.audit import audit
from t5like.rl.rewards.reward import open_rewards

FIELDS = RequiredFields(("inputs", "targets", "entry"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return DataConfig(cache_directory=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def generated_here(monkeypatch):
    """Records are generated in this process, which has imported the package; another one takes seconds to do so."""
    generate = lambda spec, path, arguments: reasoning_gym.write_records(path, arguments)
    monkeypatch.setattr(reasoning_gym, "_generate", generate)


def rows_of(spec, data):
    source = open_source(spec, data, FIELDS)
    return [source.record(index).fields for index in range(len(source))]


def reward(entry):
    [reward] = open_rewards(Config(rl=RLConfig(rewards=(entry,))))
    return reward


def test_records_follow_the_parameters_and_the_right_answer_gets_1(data, generated_here):
    rows = rows_of("reasoning_gym:gcd?size=50&seed=3&max_numbers=2&max_value=30", data)
    assert len(rows) == 50 and len({row["inputs"] for row in rows}) > 40
    for entry in ("reasoning_gym:gcd", "reasoning_gym"):
        assert [reward(entry).function(row, row["targets"]) for row in rows] == [1.0] * 50
        assert reward(entry).function(rows[0], "31") < 0.1 and reward(entry).fields == ("entry",)
    with pytest.raises(ValueError, match="the row is of the task gcd"):
        reward("reasoning_gym:chain_sum").function(rows[0], "1")
    assert rows != rows_of("reasoning_gym:gcd?size=50&seed=4&max_numbers=2&max_value=30", data)


@pytest.mark.parametrize("task", ["list_functions", "ransom_note"])  # use the global generator, the hash seed
def test_another_process_generates_the_same_records(task, data, tmp_path):
    spec = f"reasoning_gym:{task}?size=3&seed=2"
    elsewhere = DataConfig(cache_directory=str(tmp_path))
    assert rows_of(spec, data) == rows_of(spec, elsewhere)
    assert open_source(spec, data, FIELDS).fingerprint() == open_source(spec, elsewhere, FIELDS).fingerprint()


def test_the_scorer_of_every_task_scores_stored_entries_as_fresh_ones():
    different = []
    for task in sorted(set(DATASETS) - {"composite"}):
        opened = reasoning_gym.open_task(task, {}, size=1, seed=5)
        entry = opened[0]
        _, _, stored = reasoning_gym.decode(reasoning_gym.encode(task, {}, entry))
        answer = entry["answer"]
        if opened.score_answer(answer, stored) != opened.score_answer(answer, entry):
            different.append(task)
        if answer is not None and opened.score_answer(answer, stored) < 1:
            different.append(f"{task}: the right answer gets less than 1")
    assert different == []


@pytest.mark.parametrize(
    ("task", "warning"),
    [
        ("game_of_life_halting", 'PAYS FOR JUNK: "x" gets 1, the right answer 1'),
        ("propositional_logic", 'PAYS FOR JUNK: "x" gets'),
        ("prime_factorization", "FAILS for 40 of 100 rewards; the first: ValueError: invalid literal for int"),
        ("count_bits", 'PAYS FOR JUNK: "7919" gets 0.1, the right answer 1'),  # a text that contains the answer
    ],
)
def test_the_audit_finds_the_holes_of_scorers(task, warning, data, generated_here):
    result = audit([reward(f"reasoning_gym:{task}")], rows_of(f"reasoning_gym:{task}?size=20", data))
    assert not result.passed and any(line.startswith(f"reasoning_gym: {warning}") for line in result.lines)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("reasoning_gym:nope", "there is no task 'nope'; use one of ab, acre, "),
        ("reasoning_gym:gcd?most=3", "gcd has no parameter 'most'; use size, seed, or one of min_numbers, "),
        ("reasoning_gym:gcd?min_numbers=0", "gcd with the parameters .* is not possible"),
        ("reasoning_gym:composite", "composite without parameters is not possible .*; use reasoning_gym:gcd"),
        ("reasoning_gym:gcd?size=0", "size=0 must be a whole number from 1 to"),
        ("reasoning_gym:gcd?size", "'size' must be NAME=VALUE"),
    ],
)
def test_a_source_that_cant_work_is_refused_in_one_line(spec, message, data):
    with pytest.raises(ConfigError, match=message) as caught:
        open_source(spec, data, FIELDS)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("data.source=reasoning_gym:")


def test_a_missing_package_is_named_with_its_extra(data, monkeypatch):
    monkeypatch.setattr(reasoning_gym.importlib.metadata, "version", fails)
    with pytest.raises(DataError, match=r"needs the package reasoning-gym; pip install 't5like\[rl\]'"):
        open_source("reasoning_gym:gcd", data, FIELDS)


def fails(name):
    raise reasoning_gym.importlib.metadata.PackageNotFoundError(name)


def test_the_trainer_does_not_import_the_package_for_records_that_exist(data, generated_here):
    rows_of("reasoning_gym:gcd?size=5", data)
    program = (
        "import sys; from t5like.config.schema import DataConfig; from t5like.data.sources.source import open_source;"
        f"open_source('reasoning_gym:gcd?size=5', DataConfig(cache_directory={data.cache_directory!r}), "
        "__import__('t5like.data.sources.files', fromlist=['x']).RequiredFields(('inputs',)));"
        "assert 'reasoning_gym' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
