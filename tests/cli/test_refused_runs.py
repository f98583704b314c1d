"""A run directory or checkpoint that can't be used is refused in one line, and stays as it is."""

import json
import shlex
import shutil
import sys

from conftest import contents


def test_a_file_at_the_path_of_the_run_directory_is_refused(refused, flags, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below" / "run"):
        code, said = refused("train", *flags, f"--workdir={workdir}")
        assert code == 4 and said.startswith(f"--workdir={workdir} can't be ") and "use another --workdir" in said
    assert contents(tmp_path) == {"file": b"in the way"}


def test_a_directory_with_other_files_is_refused(refused, flags, tmp_path):
    (tmp_path / "thesis.tex").write_text("dear")
    code, said = refused("train", *flags, f"--workdir={tmp_path}")
    assert code == 2 and said == f"--workdir={tmp_path} is not empty and holds no run; use another --workdir"
    assert contents(tmp_path) == {"thesis.tex": b"dear"}


def test_the_directory_of_another_run_is_refused_by_field_and_both_values(refused, flags, trained):
    before = contents(trained)
    code, said = refused(
        "train", *flags, f"--workdir={trained}", "--config.optimizer.learning_rate=0.5", "--config.train.num_steps=9"
    )
    assert code == 2 and said == (
        f"--workdir={trained} holds another run: optimizer.learning_rate: 0.01 -> 0.5; "
        "add --allow_change=optimizer.learning_rate to change it from here on, or use another --workdir"
    )
    assert contents(trained) == before


def test_a_missing_package_for_tasks_is_refused_with_the_command_that_installs_it(refused, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):  # set for the process that asks
        monkeypatch.setenv(name, "1")
    monkeypatch.delitem(sys.modules, "t5like.evaluation.lm_eval", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    code, said = refused("evaluate", "--workdir=/proc/nowhere", "--tasks=lambada_openai")
    assert code == 2 and said.startswith("--tasks needs the package lm-eval")
    assert said.endswith("pip install 't5like[harness]'")


def test_a_damaged_config_of_a_run_is_refused(refused, flags, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("{")
    for arguments in (["train", *flags], ["evaluate"], ["generate", "--prompt=a"]):
        code, said = refused(*arguments, f"--workdir={tmp_path}/run")
        assert code == 4 and said.startswith(f"{tmp_path}/run/config.json can't be read: ")


def test_a_directory_without_a_run_can_not_be_evaluated(refused, tmp_path):
    for arguments in (["evaluate"], ["generate", "--prompt=a"]):
        for workdir in (tmp_path, tmp_path / "nowhere"):
            code, said = refused(*arguments, f"--workdir={workdir}")
            assert code == 4 and said == f"--workdir={workdir} holds no run; train first, or check the path"
    assert contents(tmp_path) == {}


def test_a_step_without_a_checkpoint_is_refused(refused, trained):
    for arguments in (["evaluate"], ["generate", "--prompt=a"]):
        code, said = refused(*arguments, f"--workdir={trained}", "--step=7")
        assert code == 4 and said == f"--workdir={trained} holds no complete checkpoint of step 7; there are 1, 2"


def test_a_run_without_its_tokenizer_is_refused_with_the_command_that_writes_it(refused, command, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "a run")
    (run / "tokenizer.model").unlink()
    said = f"{run} lacks its tokenizer.model; copy that of another run with the same tokenizer"
    code, message = refused("evaluate", f"--workdir={run}")
    assert code == 3 and message.startswith(f"{said}, or use t5like prepare --config='{run}'/config.json --workdir=")
    words = shlex.split(message.partition("use t5like ")[2].partition(", which")[0])
    assert command(*words)[0] == 0
    assert (run / "tokenizer.model").read_bytes() == (trained / "tokenizer.model").read_bytes()
    (run / "tokenizer.model").unlink()
    values = json.loads((run / "config.json").read_text())
    values["tokenizer"]["path"] = f"{run}/tokenizer.model"  # as of imported weights
    (run / "config.json").write_text(json.dumps(values))
    assert refused("evaluate", f"--workdir={run}") == (3, said)


def test_a_damaged_checkpoint_is_refused_if_it_is_named_or_the_last_good_one(
    refused, command, flags, trained, tmp_path
):
    shutil.copytree(trained, tmp_path / "run")

    def damage(step):
        for path in (tmp_path / "run/checkpoints" / step / "state").rglob("d/*"):
            path.write_bytes(bytes(byte ^ (index % 4096 == 2000) for index, byte in enumerate(path.read_bytes())))

    damage("2")
    before = contents(tmp_path)
    for arguments in (["evaluate"], ["generate", "--prompt=a"], ["export", "--format=hf", f"--output={tmp_path}/out"]):
        code, said = refused(*arguments, f"--workdir={tmp_path}/run", "--step=2")
        assert code == 4 and said.startswith(f"{tmp_path}/run/checkpoints/2"), said
    code, out, err = command("generate", "--prompt=a", f"--workdir={tmp_path}/run")
    assert code == 0 and "WARNING" in err and "the checkpoint of step 1 is used instead" in err
    assert contents(tmp_path) == before
    damage("1")
    for arguments in (["evaluate"], ["train", *flags, "--config.train.num_steps=4"]):
        code, said = refused(*arguments, f"--workdir={tmp_path}/run")
        assert code == 4 and said.startswith(f"no checkpoint can be read: {tmp_path}/run/checkpoints/2"), said


def test_metrics_that_can_not_be_written_are_printed(command, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "evaluations").write_text("in the way")
    code, out, err = command("evaluate", f"--workdir={tmp_path}/run")
    assert (
        code == 4
        and json.loads(out)["step"] == 2
        and err.splitlines()[-1].startswith(f"t5like: {tmp_path}/run/evaluations/2.json can't be written")
    )
