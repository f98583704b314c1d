"""A run that is started again: with a damaged newest checkpoint, with files of its summary missing, or complete."""

import shutil

import pytest
from conftest import contents

from t5like.checkpoint.run_directory import checkpoints_of, saved_config
from t5like.metrics import writers


@pytest.fixture
def workdir(trained_decoder, tmp_path):
    return shutil.copytree(trained_decoder, tmp_path / "run")


@pytest.fixture
def train(decoder_flags, workdir, command):
    steps = ["--config.train.num_steps=2", "--config.train.checkpoint_every=1"]
    return lambda: command("train", *decoder_flags, f"--workdir={workdir}", *steps)


def truncate(workdir, step: int) -> None:
    for path in (workdir / "checkpoints" / str(step) / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_run_whose_last_checkpoint_is_damaged_is_not_complete_and_repeats_the_steps_exactly(
    trained_decoder, workdir, train
):
    truncate(workdir, 2)
    code, out, err = train()
    assert code == 0 and "start      after step 1" in out and "complete " not in out, out + err
    assert "checkpoints/2 is damaged: " in err and "and the run continues after step 1" in err
    [kept] = (workdir / "checkpoints").glob("2.damaged-*")
    assert (kept / "commit_success.txt").exists()
    leaves = [checkpoints_of(run, saved_config(run)).meta(2).leaves for run in (trained_decoder, workdir)]
    assert leaves[0] == leaves[1]  # digests of all arrays
    losses = [[record.get("train/loss") for record in writers.read(run)] for run in (trained_decoder, workdir)]
    assert losses[0] == losses[1]


def test_without_a_good_checkpoint_the_run_ends_with_4_and_does_not_start_anew(workdir, train):
    truncate(workdir, 1)
    truncate(workdir, 2)
    before = {name for name in contents(workdir) if name.startswith("checkpoints")}
    code, _, err = train()
    assert code == 4 and "no checkpoint can be read" in err.splitlines()[-1]
    assert {name for name in contents(workdir) if name.startswith("checkpoints")} == before


def test_a_stray_directory_with_only_a_commit_file_does_not_complete_a_run(workdir, train):
    stray = workdir / "checkpoints" / "9"
    stray.mkdir()
    (stray / "commit_success.txt").write_text("")
    code, out, err = train()
    assert code == 0 and "complete   2 of 2 steps are done" in out
    assert "checkpoints/9 is incomplete: it has no file _CHECKPOINT_METADATA; the checkpoint of step 2 is used" in err


def test_what_a_kill_after_the_last_checkpoint_has_prevented_is_made_up_for(trained_decoder, workdir, train):
    for name in ("samples.txt", "loss.png"):
        (workdir / name).unlink()
    code, out, _ = train()
    assert code == 0 and "complete   2 of 2 steps are done" in out and "held-out loss" in out
    for name in ("samples.txt", "loss.png"):
        assert (workdir / name).read_bytes() == (trained_decoder / name).read_bytes()
    before = contents(workdir)
    code, out, _ = train()
    assert code == 0 and "held-out loss" not in out and contents(workdir) == before


def test_a_signal_during_the_last_evaluation_leaves_it_to_the_run_that_continues(trained_decoder, workdir, train):
    lines = (workdir / "metrics.jsonl").read_text("utf-8").splitlines(keepends=True)
    kept = [line for line in lines if '"step": 2' not in line or "eval/loss" not in line]
    assert len(kept) < len(lines)
    (workdir / "metrics.jsonl").write_text("".join(kept), "utf-8")
    code, out, err = train()
    assert code == 0 and "step 2: held-out loss" in err, out + err
    values = [
        [record["eval/loss"] for record in writers.read(run) if "eval/loss" in record]
        for run in (trained_decoder, workdir)
    ]
    assert values[0] == values[1]
    assert "nothing is left to train" in train()[1]
