"""Trackers get the metrics of a run; one that fails, hangs, is slow or is missing never stops or slows down the run.

The packages wandb, mlflow and trackio stand for themselves here as small modules on the path of the tracker's process,
with the functions that t5like calls. The real packages were tried by hand (docs/debugging.md).
"""

import dataclasses
import json
import sys
import time

import pytest

from t5like.config import loader
from t5like.metrics import trackers, writers
from t5like.metrics.tracker_process import OPEN, without_secrets

GOOD = """
import json, pathlib
class Run:
    url = "https://example.org/run"
    def __init__(self, **values): self.write(values)
    def write(self, values):
        with pathlib.Path({record!r}).open("a") as file: file.write(json.dumps(values, default=str) + "\\n")
    def define_metric(self, *_, **__): pass
    def log(self, values): self.write(values)
    def finish(self): self.write("finished")
init, Settings = lambda **values: Run(**values), lambda **values: None
"""
RAISES = """
import os
def set_tracking_uri(uri): raise ConnectionError("no route for key " + os.environ["MLFLOW_API_KEY"])
"""
HANGS = """
import time
def init(*_, **__): time.sleep(100)
"""
REFUSES = GOOD.replace("def log(self, values): self.write(values)", "def log(self, values): raise ValueError('full')")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A function that installs modules by name for the processes of trackers, and for the check before a run."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(str(folder))

    def install(**texts):
        for name, text in texts.items():
            (folder / f"{name}.py").write_text(text)

    return install


def config_with(*names):
    config = loader.load("tiny")
    return dataclasses.replace(config, metrics=dataclasses.replace(config.metrics, trackers=names))


def write_all(tmp_path, *names, steps=3):
    """Metrics of some steps through a `Writer` with trackers; returns how long `write` and `close` took."""
    (tmp_path / "run").mkdir(exist_ok=True)
    started = time.monotonic()
    opened = trackers.start(config_with(*names), tmp_path / "run")
    writer = writers.Writer(tmp_path / "run", tensorboard="tensorboard" in names, trackers=opened)
    for step in range(1, steps + 1):
        writer.write(step, {"train/loss": 1.0 / step})
    written = time.monotonic()
    writer.close()
    return written - started, time.monotonic() - written


def test_a_tracker_gets_config_and_all_steps_and_is_ended(tmp_path, packages, capfd):
    packages(wandb=GOOD.format(record=str(tmp_path / "record")))
    write_all(tmp_path, "wandb")
    first, *steps, last = [json.loads(line) for line in (tmp_path / "record").read_text().splitlines()]
    assert first["project"] == "t5like" and first["name"] == "run" and first["resume"] == "allow"
    assert first["config"]["optimizer.name"] == "muon" and first["id"] == trackers.run_id(tmp_path / "run")
    assert steps == [{"step": step, "train/loss": 1.0 / step} for step in (1, 2, 3)] and last == "finished"
    assert capfd.readouterr().err == "tracker    wandb: run at https://example.org/run\n"
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_trackers_that_fail_or_hang_are_named_once_and_cost_no_time(tmp_path, packages, capfd, monkeypatch):
    monkeypatch.setenv("MLFLOW_API_KEY", "hunter2hunter2")
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 2.0)
    packages(wandb=REFUSES.format(record=str(tmp_path / "record")), mlflow=RAISES, trackio=HANGS)
    writing, closing = write_all(tmp_path, "tensorboard", "wandb", "mlflow", "trackio")
    assert writing < 1 and closing < 4
    lines = sorted(capfd.readouterr().err.splitlines())
    assert lines == [
        "tracker    mlflow: it can't be used: ConnectionError: no route for key ***",
        "tracker    trackio: it did not end in time; its last steps may be missing",
        "tracker    wandb: 3 steps were not accepted",
        "tracker    wandb: run at https://example.org/run",
        "tracker    wandb: step 1 was not accepted: ValueError: full",
    ]
    assert len(writers.read(tmp_path / "run")) == 3 and list((tmp_path / "run" / "tensorboard").iterdir())


def test_a_slow_tracker_drops_steps_and_says_how_many(tmp_path, packages, capfd, monkeypatch):
    monkeypatch.setattr(trackers, "QUEUE_LINES", 5)
    packages(wandb="import time; time.sleep(0.5)\n" + GOOD.format(record=str(tmp_path / "record")))
    writing, _ = write_all(tmp_path, "wandb", steps=3000)
    assert writing < 3
    err = capfd.readouterr().err
    assert "wandb: it is slower than the run; from step" in err and "steps were left out" in err


def test_a_run_goes_on_when_its_tracker_fails(decoder_flags, command, tmp_path, packages):
    packages(wandb="raise ImportError('libfoo.so is missing')")
    settings = ["--config.metrics.trackers=wandb", "--config.train.num_steps=2", "--config.train.eval_batches=1"]
    code, out, err = command("train", *decoder_flags, *settings, f"--workdir={tmp_path}/run")
    assert code == 0 and err.count("tracker ") == 1
    assert "tracker    wandb: it can't be used: ImportError: libfoo.so is missing" in err
    assert writers.read(tmp_path / "run")[-1]["step"] == 2 and not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.parametrize("name", list(OPEN))
def test_a_package_that_is_missing_is_refused_before_anything_starts(flags, refused, tmp_path, name):
    code, text = refused("train", *flags, f"--config.metrics.trackers={name}", f"--workdir={tmp_path}/run")
    assert code == 2 and not (tmp_path / "run").exists() and name not in sys.modules
    assert text == f"metrics.trackers={name} needs the package {name}; pip install 't5like[{name}]', or leave it out"


def test_messages_have_no_secrets(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "abcdef123456")
    text = "https://user:pass@host/x failed for abcdef123456"
    assert without_secrets(text) == "https://***@host/x failed for ***"
