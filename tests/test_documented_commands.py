"""Commands of `t5like` as the documents have them, each kind once, for real, on the smallest run."""

import functools
import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import write_text
from documents import ROOT, commands, mentions

from t5like.cli.flags import parse

# Every kind of command that documents name: the flags that make it small, or which test runs such a command instead.
SMALL: dict[str, tuple[str, ...] | str] = {
    "train": ("toy",),
    "train on several devices": "tests/test_end_to_end.py",
    "train on other weights": "tests/evaluation/test_task_eval.py",
    "prepare": ("toy",),
    "evaluate": (),
    "evaluate public tasks": "tests/live/test_harness_live.py",
    "generate from a prompt": ("--max_new_tokens=4",),
    "generate from a file": ("--max_new_tokens=4",),
    "export hf": (),
    "export stablehlo": "tests/interop/test_stablehlo.py",
    "import hf": (),
    "import t5x": "tests/interop/test_t5x.py",
    "plan without compiling": (),
    "plan": ("--quick",),  # compiling for a TPU: tests/tpu and make golden
}


def kind_of(words: list[str]) -> str:
    """What a command line of `t5like` does, as a name of `SMALL`."""
    options, overrides = parse(words)
    command, fields = options.command, dict(overrides)
    if command == "train":
        weights, devices = "init_from.checkpoint" in fields, options.fake_devices
        return command + " on other weights" * weights + " on several devices" * bool(devices)
    if command == "generate":
        return f"{command} from a {'file' if options.prompts_file else 'prompt'}"
    if command in ("import", "export"):
        return f"{command} {options.format}"
    return (
        command
        + (" public tasks" if getattr(options, "tasks", None) else "")
        + (" without compiling" if getattr(options, "quick", None) else "")
    )


@functools.cache
def documented() -> dict[str, list[str]]:
    """The first command line of each kind, those of README.md first."""
    lines = [(mention, words) for mention in mentions() for words in commands(mention) if words[0] == "t5like"]
    first = {}
    readme_first = lambda each: not each[0].where.startswith("README.md")
    for _, words in sorted((each for each in lines if each[0].whole), key=readme_first):
        first.setdefault(kind_of(words[1:]), words[1:])
    return first


def test_every_kind_of_command_is_one_that_a_test_runs():
    assert set(documented()) <= set(SMALL), "say in SMALL how a test runs it"
    assert len(documented()) >= 12
    elsewhere = [how for how in SMALL.values() if isinstance(how, str)]
    assert all((ROOT / path).is_file() for path in elsewhere)


# Scripts that documents name, and the test that starts each.
SCRIPTS = {
    "benchmarks/train_step.py": "tests/test_benchmarks.py",
    "benchmarks/input_pipeline.py": "tests/test_benchmarks.py",
    "benchmarks/token_store.py": "tests/test_benchmarks.py",
    "benchmarks/peers.py": "tests/test_benchmarks.py",
    "benchmarks/generate.py": "tests/test_benchmarks.py",
    "run.py": "tests/interop/test_stablehlo.py",
}


def test_every_script_is_one_that_a_test_starts():
    programs = {words[0] for mention in mentions() for words in commands(mention) if words[0].endswith(".py")}
    named = {re.sub("^(/path/to|REPOSITORY)/", "", program) for program in programs}
    named = {name if "/" in name or name == "run.py" else f"benchmarks/{name}" for name in named}
    assert {name for name in named if not name.startswith("tests/")} <= set(SCRIPTS), (
        "say in SCRIPTS which test starts it"
    )
    for script, test in SCRIPTS.items():
        assert Path(script).stem in (ROOT / test).read_text("utf-8"), f"{test} does not start {script}"


@pytest.fixture(scope="module")
def place(trained, tmp_path_factory) -> Path:
    """A folder that has what the documents' commands name: configs, texts, prompts, runs."""
    place = tmp_path_factory.mktemp("place")
    (place / "configs").symlink_to(ROOT / "configs")
    (place / "my_texts").mkdir()
    write_text(place / "my_texts/a.txt", lines=200)
    (place / "F.jsonl").write_text('{"prompt": "ba de"}\n{"prompt": "fi <extra_id_0> go"}\n')
    for name in ("runs/tiny", "RUN"):
        shutil.copytree(trained, place / name)
    return place


@pytest.fixture
def run(place, command, flags, monkeypatch):
    """Run the documents' command of a kind in that folder, small; it must end with 0. Gives what it printed."""
    monkeypatch.chdir(place)

    def run(kind: str, **changes: str) -> str:
        first, *given = documented()[kind]
        given = [f"--{name}={changes[name]}" if (name := name_of(word)) in changes else word for word in given]
        small = [word for more in SMALL[kind] for word in ([*flags[1:], *STEPS] if more == "toy" else [more])]
        settings = [word for word in small if name_of(word) not in map(name_of, given)]
        code, out, err = command(first, *given, *settings)
        assert code == 0, err
        return out

    return run


def name_of(flag: str) -> str:
    return flag.removeprefix("--").partition("=")[0]


STEPS = ("--config.train.num_steps=1", "--config.train.eval_batches=1")


def test_training_and_what_belongs_to_it(run, place):
    assert "held out" in run("prepare")
    assert "held-out loss" in run("train") and (place / "runs/mine/checkpoints/1").is_dir()
    assert json.loads(run("evaluate"))["eval/loss"] > 0


def test_texts_and_exchange(run, place):
    assert "of the program" in run("generate from a prompt", workdir="RUN")
    run("generate from a file")
    answers = [json.loads(line) for line in (place / "OUT.jsonl").read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == ["ba de", "fi <extra_id_0> go"]
    run("export hf", workdir="RUN")
    assert (place / "exported/config.json").is_file()
    run("import hf", input="exported", workdir="IMPORTED")
    assert (place / "IMPORTED/checkpoints/0").is_dir()


def test_plans(run):
    assert "memory" in run("plan").lower()
