"""Sweep files."""

import json
import re

import pytest

from launch.job import JobSpec, t5like_command
from launch.sweep import read_sweep
from t5like.errors import ConfigError


def runs(path, text: str, suffix: str = ".toml"):
    file = path / f"sweep{suffix}"
    file.write_text(text, "utf-8")
    return read_sweep(str(file))


def test_a_grid_has_all_combinations_with_the_last_field_varying_fastest(tmp_path):
    made = runs(tmp_path, "[grid]\nseed = [1, 2]\noptimizer.learning_rate = [0.01, 3e-3]")
    assert [run.name for run in made] == [
        "seed=1_learning_rate=0.01",
        "seed=1_learning_rate=0.003",
        "seed=2_learning_rate=0.01",
        "seed=2_learning_rate=0.003",
    ]
    assert made[1].overrides == ("--config.seed=1", "--config.optimizer.learning_rate=0.003")


def test_json_and_toml_lists_are_the_same(tmp_path):
    toml = runs(
        tmp_path, '[[runs]]\nseed = 1\nmodel.scan = true\n[[runs]]\nname = "b"\ndata.source = ["text:a", "text:b"]'
    )
    rows = [{"seed": 1, "model": {"scan": True}}, {"name": "b", "config.data.source": ["text:a", "text:b"]}]
    assert toml == runs(tmp_path, json.dumps(rows), ".json") == runs(tmp_path, json.dumps({"runs": rows}), ".json")
    assert [run.name for run in toml] == ["seed=1_scan=true", "b"]
    assert toml[1].overrides == ("--config.data.source=text:a,text:b",)


def test_names_are_unique_valid_file_names(tmp_path):
    long = "x" * 300
    values = ["/data/*.txt", "/data/?.txt", "../..", "$(id)", "é", "-", long + "1", long + "2", "a b"]
    made = runs(tmp_path, json.dumps([{"data.source": f"text:{value}"} for value in values]), ".json")
    names = [run.name for run in made]
    assert len(set(names)) == len(values) and all(re.fullmatch(r"[A-Za-z0-9][\w.=+-]{0,119}", name) for name in names)
    assert [run.overrides[0] for run in made] == [f"--config.data.source=text:{value}" for value in values]


def test_fields_that_end_alike_keep_their_sections(tmp_path):
    [run] = runs(tmp_path, "[grid]\nmodel.dropout_rate = [0]\ndata.dropout_rate = [1]")
    assert run.name == "model.dropout_rate=0_data.dropout_rate=1"


def test_a_run_is_the_command_with_its_own_directory_and_fields(tmp_path):
    [run] = runs(tmp_path, "[[runs]]\nseed = 1")
    job = JobSpec("a", ("train", "--config=tiny", "--workdir=/runs/s"), "/runs/s", runs=(run,))
    assert t5like_command(job, run)[3:] == ["train", "--config=tiny", "--workdir=/runs/s/seed=1", "--config.seed=1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[runs]]\nseed = 1\n[[runs]]\nseed = 1", "runs 1 and 2 have the same fields"),
        ('[[runs]]\nname = "a"\n[[runs]]\nname = "a"\nseed = 1', "two runs have the name a"),
        ('[[runs]]\nname = "../a"', "must match"),
        ("[grid]\nseed = 1", "seed=1 must be a list of values; use seed = [1, 2]"),
        ('[[runs]]\nname = "logs"', "name='logs' is the directory of log files"),
        ("[grid]", "[grid] has no fields"),
        ("[grid]\nseed = []", "must be a list"),
        ("[grid]\nseed = " + str(list(range(1001))), "more than 1,000 runs"),
        ("seed = 1", "must have [[runs]] or [grid]"),
        ("runs = []", "has 0 runs"),
        ("[[runs]]\nseed = 2020-01-01", "must be a text, a number"),
        ('[[runs]]\ndata.source = "a\\nb"', "must be one line of text"),
        ("[[runs", "is not TOML"),
    ],
)
def test_a_wrong_sweep_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        runs(tmp_path, text)


def test_a_missing_or_damaged_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="can't be read"):
        read_sweep(str(tmp_path / "none.toml"))
    with pytest.raises(ConfigError, match="is not JSON"):
        runs(tmp_path, "[", ".json")
