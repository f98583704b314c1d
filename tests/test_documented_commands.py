"""Runs the commands of `t5like` that the documents contain: each type once, on the smallest run."""

import functools
import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import write_text
from documents import ROOT, commands, mentions

from t5like.cli.flags import parse
from t5like.config import loader

# Every type of command in the documents: the flags that make it small, or the test that runs such a command instead.
SMALL: dict[str, tuple[str, ...] | str] = {
    "train": ("toy",),
    "train on several devices": "tests/test_end_to_end.py",
    "train on other weights": "tests/evaluation/test_task_eval.py",
    "train with a teacher": "tests/checkpoint/test_teacher.py",
    "prepare": ("toy",),
    "rl": "tests/rl/test_rl_runs.py",
    "rl from pairs": "tests/rl/test_pairs.py",
    "rl audit": "tests/rl/rewards/test_audit.py",
    "evaluate": (),
    "evaluate public tasks": "tests/live/test_harness_live.py",
    "generate from a prompt": ("--max_new_tokens=4",),
    "generate from a file": ("--max_new_tokens=4",),
    "predict": "tests/evaluation/test_label_eval.py",
    "embed": "tests/evaluation/test_label_eval.py",
    "export hf": (),
    "export peft": "tests/live/test_peft_live.py",
    "export stablehlo": "tests/interop/test_stablehlo.py",
    "import hf": (),
    "import t5x": "tests/interop/test_t5x.py",
    "plan without compiling": (),
    "launch": "tests/launch/test_launch_main.py",
    "compare": "tests/inspect/test_compare.py",
    "inspect run": (),
    "compare-steps": "tests/inspect/test_compare_steps.py",
    "train on the same batches": "tests/inspect/test_overfit.py",
    "inspect data": "tests/inspect/test_inspect_data.py",
    "inspect model": "tests/inspect/test_inspect_model.py",
    "plan": ("--quick",),  # compiling for a TPU: tests/tpu and make golden
}


def type_of(words: list[str]) -> str:
    """The type of a command line of `t5like`: a key of `SMALL`."""
    if words[0] == "launch":
        return "launch"
    options, overrides = parse(words)
    command, fields = options.command, dict(overrides)
    if command == "train":
        weights, devices = "init_from.checkpoint" in fields, options.fake_devices
        if options.overfit:
            return f"{command} on the same batches"
        if "distill.teacher" in fields:
            return f"{command} with a teacher"
        return command + " on other weights" * weights + " on several devices" * bool(devices)
    if command == "rl":
        pairs = loader.load(options.config, overrides).rl.uses_pairs
        return command + " from pairs" * pairs + " audit" * options.audit
    if command == "generate":
        return f"{command} from a {'file' if options.prompts_file else 'prompt'}"
    if command in ("import", "export"):
        return f"{command} {options.format}"
    if command == "inspect":
        return f"{command} {options.subject}"
    return (
        command
        + (" public tasks" if getattr(options, "tasks", None) else "")
        + (" without compiling" if getattr(options, "quick", None) else "")
    )


@functools.cache
def documented() -> dict[str, list[str]]:
    """The first command line of each type; README.md comes first."""
    lines = [(mention, words) for mention in mentions() for words in commands(mention) if words[0] == "t5like"]
    first = {}
    readme_first = lambda each: not each[0].where.startswith("README.md")
    for _, words in sorted((each for each in lines if each[0].whole), key=readme_first):
        first.setdefault(type_of(words[1:]), words[1:])
    return first


def test_every_type_of_command_is_run_by_a_test():
    assert set(documented()) <= set(SMALL), "add it to SMALL"
    assert len(documented()) >= 12
    elsewhere = [how for how in SMALL.values() if isinstance(how, str)]
    assert all((ROOT / path).is_file() for path in elsewhere)


# Scripts that documents name, and the test that starts each.
SCRIPTS = {
    "benchmarks/train_step.py": "tests/benchmarks/test_benchmarks.py",
    "benchmarks/input_pipeline.py": "tests/benchmarks/test_benchmarks.py",
    "benchmarks/token_store.py": "tests/benchmarks/test_benchmarks.py",
    "benchmarks/peers.py": "tests/benchmarks/test_benchmarks.py",
    "benchmarks/generate.py": "tests/benchmarks/test_benchmarks.py",
    "benchmarks/accelerator.py": "tests/benchmarks/test_accelerator.py",
    "benchmarks/learning.py": "tests/benchmarks/test_benchmarks.py",
    "benchmarks/sweep.py": "tests/benchmarks/test_benchmarks.py",
    "benchmarks/widths.py": "tests/benchmarks/test_benchmarks.py",
    "benchmarks/windows.py": "tests/benchmarks/test_benchmarks.py",
    "benchmarks/checks.py": "tests/benchmarks/test_benchmarks.py",
    "benchmarks/rollouts.py": "tests/benchmarks/test_benchmarks.py",
    "benchmarks/saving.py": "tests/benchmarks/test_benchmarks.py",
    "run.py": "tests/interop/test_stablehlo.py",
}


def test_every_script_is_started_by_a_test():
    programs = {words[0] for mention in mentions() for words in commands(mention) if words[0].endswith(".py")}
    named = {re.sub("^(/path/to|REPOSITORY)/", "", program) for program in programs}
    named = {name if "/" in name or name == "run.py" else f"benchmarks/{name}" for name in named}
    assert {name for name in named if not name.startswith("tests/")} <= set(SCRIPTS), "add it to SCRIPTS"
    for script, test in SCRIPTS.items():
        assert Path(script).stem in (ROOT / test).read_text("utf-8"), f"{test} does not start {script}"


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory) -> Path:
    """A folder with what the commands of the documents name: configs, texts, prompts, runs."""
    folder = tmp_path_factory.mktemp("folder")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "my_texts").mkdir()
    write_text(folder / "my_texts/a.txt", lines=200)
    (folder / "F.jsonl").write_text('{"prompt": "ba de"}\n{"prompt": "fi <extra_id_0> go"}\n')
    for name in ("runs/tiny", "RUN"):
        shutil.copytree(trained, folder / name)
    return folder


@pytest.fixture
def run(folder, command, flags, monkeypatch):
    """Run the documented command of a type in that folder with small sizes. It must end with 0; returns its output."""
    monkeypatch.chdir(folder)

    def run(command_type: str, **changes: str) -> str:
        first, *given = documented()[command_type]
        given = [f"--{name}={changes[name]}" if (name := name_of(word)) in changes else word for word in given]
        small = [word for more in SMALL[command_type] for word in ([*flags[1:], *STEPS] if more == "toy" else [more])]
        settings = [word for word in small if name_of(word) not in map(name_of, given)]
        code, out, err = command(first, *given, *settings)
        assert code == 0, err
        return out

    return run


def name_of(flag: str) -> str:
    return flag.removeprefix("--").partition("=")[0]


STEPS = ("--config.train.num_steps=1", "--config.train.eval_batches=1")


def test_preparation_training_and_evaluation(run, folder):
    assert "held out" in run("prepare")
    assert "held-out loss" in run("train") and (folder / "runs/mine/checkpoints/1").is_dir()
    assert json.loads(run("evaluate", workdir="runs/mine"))["eval/loss"] > 0


def test_texts_and_exchange(run, folder):
    assert "of the program" in run("generate from a prompt", workdir="RUN")
    run("generate from a file")
    predictions = [json.loads(line) for line in (folder / "OUT.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in predictions] == ["ba de", "fi <extra_id_0> go"]
    run("export hf", workdir="RUN")
    assert (folder / "exported/config.json").is_file()
    run("import hf", input="exported", workdir="IMPORTED")
    assert (folder / "IMPORTED/checkpoints/0").is_dir()


def test_plans(run):
    assert "memory" in run("plan").lower()
