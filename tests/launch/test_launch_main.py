"""`t5like launch` from the command line: dry runs of the documented commands, refusals, names of jobs."""

import subprocess
import sys
from pathlib import Path

import pytest
from documents import ROOT, commands, mentions

from launch import main, programs, record
from launch.record import BACKENDS, Record
from t5like.errors import ConfigError


def documented() -> list[list[str]]:
    """The submissions that the documents show, as complete command lines, with names for what the reader fills in."""
    fill = lambda word: (
        word.replace("IMAGE:TAG", "registry.example/t5like:0.1.0").replace("BUCKET", "bucket").replace("CLAIM", "claim")
    )
    lines = [
        list(map(fill, words[1:]))
        for mention in mentions("t5like launch")
        if mention.whole
        for words in commands(mention)
    ]
    return [words for words in lines if words[:1] == ["launch"] and words[1] in main.BACKENDS]


def config_of(words: list[str]) -> str:
    """The config of a command line."""
    return next(word for word in words if word.startswith("--config=")).partition("=")[2]


def test_every_backend_has_the_functions_that_the_command_calls():
    assert set(main.BACKENDS) == set(BACKENDS)
    for name, backend in main.BACKENDS.items():
        functions = ["check", "render", "run" if name == "local" else "submit", "status", "logs", "cancel"]
        assert all(callable(getattr(backend, function)) for function in functions), name


@pytest.mark.parametrize("words", documented(), ids=lambda words: words[1])
def test_every_documented_submission_can_be_rendered(words, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, out, err = command(words[0], words[1], "--dry_run", "--skip_plan", *words[2:])
    assert code == 0, err
    assert f"--config={config_of(words)}" in out and Path(words[-1].partition("=")[2]).name in out
    assert err.splitlines()[0].startswith("t5like: the checks of t5like plan were skipped")


def test_a_dry_run_prints_the_script_alone_and_writes_nothing(command, tmp_path):
    flags = ["--", "train", "--config=tiny", f"--workdir={tmp_path}/run"]
    code, out, err = command("launch", "local", "--nodes=2", "--dry_run", *flags)
    assert code == 0 and out.startswith("#!/usr/bin/env bash\n") and out.endswith(f"--workdir={tmp_path}/run\n")
    assert subprocess.run(["bash", "-n"], input=out, text=True, check=False).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_submitted_after_a_failed_check(refused, tmp_path):
    flags = ["--", "train", "--config=tiny", f"--workdir={tmp_path}/run", "--config.data.batch_size=7"]
    code, message = refused("launch", "local", "--nodes=2", *flags)
    assert code == 2 and message.startswith("data.batch_size=7 must be a multiple of 2")
    assert list(tmp_path.iterdir()) == []


def test_jobs_are_named_by_their_run_directory(refused, command, tmp_path):
    assert refused("launch", "status", tmp_path)[1].startswith(f"'{tmp_path}' is no job")
    record.write(Record("local", "1", "a", str(tmp_path), str(tmp_path / "logs"), {"started": "never"}))
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/process-0.log").write_text("a line\n")
    assert command("launch", "logs", tmp_path)[:2] == (0, "[0] a line\n")
    assert "the launcher was killed" in command("launch", "status", tmp_path)[1]
    assert refused("launch", "cancel", tmp_path) == (2, "local:1 does not run any more; there is nothing to cancel")
    assert refused("launch", "logs", "local:999999999")[1].startswith("local:999999999 is not a running job")


def test_a_missing_client_program_is_refused_by_its_name():
    with pytest.raises(ConfigError, match="no-such-program is needed for tests and is not on PATH"):
        programs.run(["no-such-program"], needed_for="tests")


def test_the_commands_that_look_after_jobs_do_not_import_jax():
    code = "import sys, launch.main, t5like.cli.main; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
