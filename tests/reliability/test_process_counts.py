"""Several real processes over gloo: they train like one process, stop together, and detect a killed one.

One run is handed on: two processes, which split rows and parameters (`fsdp`), train it until one of them gets SIGTERM,
and four, which split heads and lengths (`tensor`, `context`), go on until one is killed. One process with eight fake
devices trains straight on: they have to equal that.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import one_device
import pytest
from instrumented_run import read_records, recording
from runs import free_port

from t5like.checkpoint.checkpoints import Checkpoints
from t5like.checkpoint.run_directory import load
from t5like.metrics.writers import read
from t5like.sharding import placement

ROOT = Path(__file__).parents[2]
STEPS = 60  # few are trained


def start_all(
    count: int, arguments: list, interrupted: tuple[int, int, int], records: Path
) -> list[tuple[int, str, str]]:
    """Start processes and return exit code, stdout and stderr of each; `interrupted`: (rank, step, signal)."""
    victim, step, number = interrupted
    flags = [f"--coordinator=localhost:{free_port()}", f"--num_processes={count}", "--fake_devices=1"]
    environment = {**os.environ, "XLA_FLAGS": one_device.XLA_FLAGS}  # conftest's but the eight
    environment["PYTHONPATH"] = str(ROOT)
    begun = [
        subprocess.Popen(
            [sys.executable, "tests/instrumented_run.py", f"--records={records}-{process}"]
            + [f"--step={step}", f"--signal={int(number)}"] * (process == victim)
            + ["--", *map(str, arguments), *flags, f"--process_id={process}"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(count)
    ]
    try:
        texts = [each.communicate(timeout=240) for each in begun]
    finally:
        for each in begun:
            each.kill()
    return [(each.returncode, *text) for each, text in zip(begun, texts, strict=True)]


@pytest.fixture(scope="module")
def arguments(flags) -> list[str]:
    """The smallest possible run; an encoder generates nothing."""
    values = {
        "model.architecture": "encoder",
        "data.objective": "mlm",
        "train.num_steps": STEPS,
        "train.eval_every": 1000,
        "train.process_timeout_seconds": 60,
    }
    return ["train", *flags, *(f"--config.{name}={value}" for name, value in values.items())]


@pytest.fixture(scope="module")
def handed_on(arguments, tmp_path_factory):
    """The run directory after two and four processes, their output, the step saved in between, their metrics."""
    workdir = tmp_path_factory.mktemp("handed_on") / "run"
    arguments, held = [*arguments, f"--workdir={workdir}"], workdir.parent
    two = start_all(2, [*arguments, "--config.mesh.fsdp=2"], (1, 2, signal.SIGTERM), held / "two")
    steps = Checkpoints(workdir / "checkpoints", keep=1).steps()
    records = read(workdir)
    axes = ["--config.mesh.tensor=2", "--config.mesh.context=2"]
    four = start_all(4, [*arguments, *axes], (2, steps[-1] + 3, signal.SIGKILL), held / "four")
    return workdir, two, steps, records, four, read(workdir)


def test_sigterm_to_one_process_stops_all_after_the_same_step_and_saves(handed_on):
    workdir, two, steps, records, *_ = handed_on
    assert [code for code, _, _ in two] == [75, 75], two
    [step] = steps
    for _, _, err in two:
        assert f"stopped by a signal after step {step:,}; saved in {workdir}" in err
    assert records[-1]["step"] == step < STEPS
    assert "2 x cpu in 2 processes, fsdp 2" in two[0][1]
    assert not [line for line in two[1][1].splitlines() if "[Gloo]" not in line]  # only process 0 prints


def test_a_killed_process_makes_the_others_end_with_76(handed_on):
    *_, steps, _, four, records = handed_on
    codes = [code for code, _, _ in four]
    assert codes == [76, 76, -signal.SIGKILL, 76], four
    assert "4 x cpu in 4 processes, tensor 2 x context 2" in four[0][1]
    assert f"after step {steps[-1]}" in four[0][1] and records[-1]["step"] > steps[-1]
    for process in (0, 1, 3):
        message = r"t5like: process 2 on .*, in .*, is lost: its connection was closed: .*start all of them again\n"
        assert re.search(message, four[process][2]), four[process][2]


@pytest.fixture
def straight(handed_on, arguments, command, monkeypatch, tmp_path):
    """The metrics of one process that trains as far as the four, and the complete batches on its devices."""
    [step] = handed_on[2]
    monkeypatch.setattr(placement, "to_global", recording(tmp_path / "one"))
    settings = [f"--config.train.num_steps={step + 3}", "--fake_devices=8"]
    code, _, err = command(*arguments, f"--workdir={tmp_path}/run", *settings)
    assert code == 0, err
    batches = []
    for _, parts in read_records(tmp_path / "one"):
        rows: dict[str, list] = {}
        for name, _, data in sorted(parts, key=lambda part: part[1][0].start or 0):
            rows.setdefault(name, []).append(data)
        batches.append({name: np.concatenate(each) for name, each in rows.items()})
    return read(tmp_path / "run"), batches


def test_two_and_four_processes_and_one_have_the_same_batches_losses_and_scores(handed_on, straight):
    workdir, _, (step,), by_two, _, by_four = handed_on
    assert load(workdir).step == step  # one process reads what two have saved, and verifies it
    metrics, batches = straight
    metrics = values(metrics)
    for actual, done in ((values(by_two), step), (values(by_four), step + 2)):
        wanted = {key: value for key, value in metrics.items() if key[0] <= done}
        assert wanted.keys() <= actual.keys() and (0, "eval/bits_per_byte") in wanted
        assert {key: actual[key] for key in wanted} == pytest.approx(wanted, rel=1e-4)

    # Held-out rows first, which do not fill the last batch; each process makes the rows that its devices hold.
    evaluated = (len(batches) - (step + 3)) // 2  # batches, at the beginning and at the end
    weights_BL = np.concatenate([batch["weights_BL"] for batch in batches[:evaluated]])
    real_B = weights_BL.any(axis=1)
    assert real_B[: real_B.sum()].all() and 8 * evaluated - 8 < real_B.sum() < 8 * evaluated
    assert metrics[0, "eval/tokens"] == weights_BL.sum()
    for name, count, rows, copies, begin, end in (
        ("two", 2, 4, 1, 0, evaluated + step),
        ("four", 4, 8, 2, evaluated + step, evaluated + step + 2),
    ):
        records = [read_records(workdir.parent / f"{name}-{process}")[: end - begin] for process in range(count)]
        for wanted, *of_each in zip(batches[begin:end], *records, strict=True):
            covered = {field: np.zeros(array.shape, int) for field, array in wanted.items()}
            for num_rows, parts in of_each:
                assert num_rows == rows
                for field, index, data in parts:
                    assert data.dtype == wanted[field].dtype and data.tobytes() == wanted[field][index].tobytes()
                    covered[field][index] += 1
            assert all((array == copies).all() for array in covered.values())


def values(records) -> dict[tuple[int, str], float]:
    """Metrics that must not depend on the number of processes: losses, gradients, evaluation."""
    speed = ("train/tokens_per_second", "train/step_seconds", "train/mfu", "time/", "step")
    return {
        (record["step"], name): value
        for record in records
        for name, value in record.items()
        if not name.startswith(speed)
    }


def test_a_storage_failure_of_process_0_ends_all_processes_with_its_reason(handed_on, arguments, tmp_path):
    shutil.copytree(handed_on[0], workdir := tmp_path / "run")
    [step] = handed_on[2]
    arguments = [*arguments, f"--workdir={workdir}", "--config.mesh.fsdp=2", f"--config.train.num_steps={step + 1}"]
    results = start_all(2, arguments, (0, step + 1, 0), tmp_path / "held")
    assert [code for code, _, _ in results] == [4, 4], results
    for _, _, err in results:
        reason = rf"t5like: process 0: .*/{step + 1} could not be written: .*File too large"
        assert re.match(reason, err.splitlines()[-1]), err
    assert Checkpoints(workdir / "checkpoints", keep=1).steps() == [step]
