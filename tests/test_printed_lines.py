"""What `train` prints and does on other devices. Runs that are killed and started again: tests/reliability."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import one_device

from t5like.checkpoint.checkpoints import Checkpoints
from t5like.metrics.writers import read

ROOT = Path(__file__).parent.parent


def test_the_lines_that_a_new_run_prints(command, decoder_flags, tmp_path):
    evaluated = ["--config.train.eval_every=4", f"--config.data.cache_directory={tmp_path}/prepared"]
    code, out, err = command("train", *decoder_flags, *evaluated, f"--workdir={tmp_path}/run")
    assert code == 0, err
    beginnings = [line.split()[0] for line in out.split("\n\n")[0].splitlines()]
    assert beginnings == ["model", "devices", "data", beginnings[3], "run", "machine", "start"]
    shown = [line.split()[0] for line in err.splitlines()]
    training = shown.index("baselines:")  # lines before it are the progress of data preparation
    assert {"reading", "training", "tokenizing"} >= set(shown[: training - 1]) and shown[training - 1] == "compiling"
    assert shown[training:] == ["baselines:", *["step"] * (12 + 4)]


def leaves(workdir: Path, step: int) -> dict:
    return Checkpoints(workdir / "checkpoints", keep=1).meta(step).leaves


def test_fake_devices_make_a_mesh_and_a_complete_run_prints_that_it_is_complete(flags, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    mesh = ["--fake_devices=8", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    process = subprocess.run(
        [sys.executable, "-m", "t5like", "train", *flags, f"--workdir={tmp_path}/run", *mesh]
        + ["--config.train.num_steps=2"],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": one_device.XLA_FLAGS},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0 and process.stderr == ""
    assert "8 x cpu, data 2 x fsdp 2 x tensor 2" in process.stdout and process.stdout.splitlines()[-1].startswith(
        "complete   2 of 2 steps"
    )
    assert leaves(tmp_path / "run", 2) == leaves(trained, 2) and read(tmp_path / "run") == read(trained)
