"""Real processes over gloo: they train as one does, stop together, and miss the one that is killed.

One run is handed on: two processes train it until one of them gets SIGTERM, and four go on until one is killed. One
process with eight fake devices trains straight on: they have to equal that.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import small
from test_meeting import free_port

from t5like import distributed
from t5like import mesh as meshes
from t5like.checkpoint import Checkpoints
from t5like.metrics import read
from t5like.run import load
from t5like.types import Batch

ROOT = Path(__file__).parent.parent
STEPS = 60  # enough for JAX to agree on one to stop after; few are done

# `t5like ...` that sends itself a signal when a step has been reported, and goes slowly from there on.
INTERRUPTED = """
import os, sys, time
from t5like import main, metrics

step, number = int(sys.argv[1]), int(sys.argv[2])
show = metrics.Progress.update

def update(self, done, *rest):
    show(self, done, *rest)
    if done == step:
        os.kill(os.getpid(), number)
    if done >= step:
        time.sleep(0.2)

metrics.Progress.update = update
sys.exit(main.main(sys.argv[3:]))
"""


def start_all(count: int, arguments: list, interrupted: tuple[int, int, int]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of so many processes; one, (which, after which step, signal), is told off."""
    victim, step, number = interrupted
    flags = [f"--coordinator=localhost:{free_port()}", f"--num_processes={count}", "--fake_devices=1"]
    environment = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].rpartition(" ")[0]}  # conftest's but the eight
    begun = [
        subprocess.Popen(
            [sys.executable]
            + (["-c", INTERRUPTED, str(step), str(int(number))] if process == victim else ["-m", "t5like"])
            + [*map(str, arguments), *flags, f"--process_id={process}"],
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
    """The smallest run there is; an encoder generates nothing. Its 27 held-out rows don't fill batches of 8."""
    values = {
        "model.architecture": "encoder",
        "data.objective": "mlm",
        "train.num_steps": STEPS,
        "train.eval_every": 1000,
        "train.wait_seconds": 60,
    }
    return ["train", *flags, *(f"--config.{name}={value}" for name, value in values.items())]


@pytest.fixture(scope="module")
def handed_on(arguments, tmp_path_factory):
    """The run directory after two processes and four, what those said, the step saved in between, their metrics."""
    workdir = tmp_path_factory.mktemp("handed_on") / "run"
    two = start_all(2, [*arguments, f"--workdir={workdir}"], (1, 2, signal.SIGTERM))
    steps = Checkpoints(workdir / "checkpoints", keep=1).steps()
    records = read(workdir)
    four = start_all(4, [*arguments, f"--workdir={workdir}"], (2, steps[-1] + 3, signal.SIGKILL))
    return workdir, two, steps, records, four, read(workdir)


def test_sigterm_to_one_process_stops_all_after_the_same_step_and_saves(handed_on):
    workdir, two, steps, records, *_ = handed_on
    assert [code for code, _, _ in two] == [75, 75], two
    [step] = steps
    for _, _, err in two:
        assert f"stopped by a signal after step {step:,}; saved in {workdir}" in err
    assert records[-1]["step"] == step < STEPS
    assert "2 x cpu in 2 processes, data 2" in two[0][1]
    assert not [line for line in two[1][1].splitlines() if "[Gloo]" not in line]  # one process speaks


def test_a_killed_process_makes_the_others_end_with_76(handed_on):
    *_, steps, _, four, records = handed_on
    codes = [code for code, _, _ in four]
    assert codes == [76, 76, -signal.SIGKILL, 76], four
    assert f"after step {steps[-1]}" in four[0][1] and records[-1]["step"] > steps[-1]
    for process in (0, 1, 3):
        said = re.search(r"t5like: process [013] on .*, in .* at step \d+, .*start all of them again", four[process][2])
        assert said, four[process][2]


def test_two_and_four_processes_and_one_train_and_evaluate_alike(handed_on, arguments, command, tmp_path):
    workdir, _, (step,), by_two, _, by_four = handed_on
    code, _, err = command(*arguments, f"--workdir={tmp_path}/run", f"--config.train.num_steps={step + 3}")
    assert code == 0, err
    assert load(workdir).step == step  # one process reads what two have saved, and verifies it
    straight = values(read(tmp_path / "run"))
    for records, done in ((by_two, step), (by_four, step + 2)):
        found = values(records)
        wanted = {key: value for key, value in straight.items() if key[0] <= done}
        assert wanted.keys() <= found.keys() and (0, "eval/bits_per_byte") in wanted
        assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-4)


def values(records) -> dict[tuple[int, str], float]:
    """What must not depend on the processes: losses, gradients, what evaluation counts."""
    speed = ("train/tokens_per_second", "train/step_seconds", "train/mfu", "step")
    return {(record["step"], name): value for record in records for name, value in record.items() if name not in speed}


def test_the_rows_of_all_devices_are_each_batch_once(rng):
    config = small(mesh={"data": 2, "fsdp": 2, "tensor": 2})
    mesh = meshes.make_mesh(config)
    np.testing.assert_array_equal(meshes.local_rows(mesh, 8), np.arange(8))
    batch = rng.integers(0, 9, (8, 4))
    shuffled = jax.sharding.Mesh(rng.permutation(mesh.devices.ravel()).reshape(mesh.devices.shape), mesh.axis_names)
    placed = meshes.to_global(Batch(None, batch, batch.astype(np.float32)), shuffled, 8)
    np.testing.assert_array_equal(placed.targets_BL, batch)


def test_a_process_whose_others_never_come_says_whom_it_waited_for(arguments, command, tmp_path):
    flags = [f"--coordinator=localhost:{free_port()}", "--num_processes=3", "--config.train.wait_seconds=1"]
    code, _, err = command(*arguments, f"--workdir={tmp_path}/run", *flags, "--process_id=0")
    assert code == 76 and "waited 1 s for processes 1, 2 of 3 to start" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_commands_for_one_process_are_refused_where_a_launcher_started_several(command, monkeypatch, tmp_path):
    for name, value in (("COORDINATOR", "localhost:1"), ("NUM_PROCESSES", "2"), ("PROCESS_ID", "0")):
        monkeypatch.setenv(f"T5LIKE_{name}", value)
    code, _, err = command("generate", f"--workdir={tmp_path}", "--prompt=x")
    assert code == 2 and "generate is for one process, and explicit addresses started 2" in err


def test_alone_every_wait_is_nothing_and_every_value_comes_back(tmp_path):
    assert distributed.gather("a name", "x") == ["x"] and distributed.told("a name", "y") == "y"
    assert distributed.primary() and not distributed.several() and distributed.sharers("a name", tmp_path) == [0]
    with distributed.limit("a phase", 3), distributed.joined(None, small(), {}):
        distributed.wait("a name")
        distributed.check_shared(tmp_path)
