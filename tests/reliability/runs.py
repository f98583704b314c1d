"""Training processes for the tests of this folder: starts them, and waits for moments that their run directory shows.

Nothing inside the processes helps: moments are read from the file system, as often as one core allows.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import one_device

from t5like.checkpoint.checkpoints import Checkpoints
from t5like.checkpoint.metadata import Meta
from t5like.checkpoint.step_directories import COMMITTED, STEP
from t5like.metrics.time_spent import PARTS
from t5like.metrics.writers import read

ROOT = Path(__file__).parents[2]
SPEED = {"train/tokens_per_second", "train/step_seconds", "train/mfu", *(f"time/{part}" for part in PARTS)}
LIMIT = 120.0  # seconds for one start; a test that waits longer fails
LAST = 150  # steps of a run

# The smallest run: an encoder compiles fastest and generates nothing. Checkpoints at multiples of 5, the newest 3 kept.
VALUES = {
    "model.architecture": "encoder",
    "data.objective": "mlm",
    "model.dropout_rate": 0.1,
    "train.num_steps": LAST,
    "train.checkpoint_every": 5,
    "train.keep_checkpoints": 3,
    "train.eval_every": 50,
    "train.process_timeout_seconds": 60,
}


def settings(**values) -> list[str]:
    """Flags of fields; __ stands for the dot in their names."""
    return [f"--config.{name.replace('__', '.')}={value}" for name, value in values.items()]


def smallest(flags: list[str], workdir: Path, **values) -> list[str]:
    """The command line of the smallest run."""
    return ["train", *flags, *settings(**VALUES), f"--workdir={workdir}", *settings(**values)]


class Trainer:
    """A process of `t5like`, with its output in files; it is killed at the end of the block."""

    def __init__(self, arguments: list[str], log: Path, *, hooks: tuple[str, ...] = (), **environment: str):
        program = ["tests/instrumented_run.py", *hooks, "--"] if hooks else ["-m", "t5like"]
        self.log, self.started, self.signalled = log, time.monotonic(), 0.0
        log.parent.mkdir(parents=True, exist_ok=True)
        with Path(f"{log}.out").open("wb") as out, Path(f"{log}.err").open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *program, *map(str, arguments)],
                cwd=ROOT,
                env={**os.environ, "XLA_FLAGS": one_device.XLA_FLAGS, "PYTHONPATH": str(ROOT), **environment},
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_) -> None:
        if self.running():
            self.process.kill()
            self.process.wait()

    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def out(self) -> str:
        return Path(f"{self.log}.out").read_text("utf-8")

    @property
    def err(self) -> str:
        return Path(f"{self.log}.err").read_text("utf-8")

    def wait_for(self, moment: Callable[[], bool], pause: float = 0.0005) -> None:
        """Return when the moment has come; fail if the process ends before."""
        while not moment():
            assert self.running(), f"ended with {self.process.returncode} before the moment came:\n{self.err}"
            assert time.monotonic() - self.started < LIMIT, f"the moment did not come:\n{self.out}\n{self.err}"
            time.sleep(pause)

    def send(self, number: int) -> None:
        self.signalled = time.monotonic()
        self.process.send_signal(number)

    def end(self, seconds: float = LIMIT) -> int:
        """Wait for the end; return the exit code."""
        return self.process.wait(seconds)

    def seconds_since_signal(self) -> float:
        """Wait for the end; return the seconds from the last signal to it."""
        self.end()
        return time.monotonic() - self.signalled


def run_to_end(arguments: list[str], log: Path, **options) -> Trainer:
    """Run a command to its end, which must be exit code 0."""
    with Trainer(arguments, log, **options) as trainer:
        assert trainer.end() == 0, trainer.err
    return trainer


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as bound:
        bound.bind(("localhost", 0))
        return bound.getsockname()[1]


def start_processes(count: int, arguments: list[str], log: Path, hooks: dict[int, tuple[str, ...]] = {}) -> list:  # noqa: B006
    """Start the processes of one run; `hooks`: options of instrumented_run.py by rank."""
    flags = [f"--coordinator=localhost:{free_port()}", f"--num_processes={count}", "--fake_devices=1"]
    return [
        Trainer([*arguments, *flags, f"--process_id={rank}"], Path(f"{log}-{rank}"), hooks=hooks.get(rank, ()))
        for rank in range(count)
    ]


# ---- What a run directory shows ----


def checkpoints(workdir: Path) -> Checkpoints:
    return Checkpoints(workdir / "checkpoints", keep=3)


def step_directories(workdir: Path) -> list[Path]:
    """Directories of checkpoints, complete or not, oldest first."""
    try:
        names = [name for name in os.listdir(workdir / "checkpoints") if STEP.fullmatch(name)]
    except FileNotFoundError:
        names = []
    return [workdir / "checkpoints" / name for name in sorted(names, key=int)]


def last_step(workdir: Path) -> int:
    """The last step in metrics.jsonl; 0 if there is none."""
    try:
        tail = (workdir / "metrics.jsonl").read_bytes()[-4000:].splitlines()[-1:]
        return int(tail[0].split(b'"step": ')[1].split(b",")[0]) if tail else 0
    except (FileNotFoundError, IndexError, ValueError):  # a line that is being written
        return 0


def writing_arrays(workdir: Path) -> bool:
    """Whether a checkpoint has a directory, and its arrays are not complete."""
    paths = step_directories(workdir)[-1:]
    return any(not os.path.exists(path / "state/manifest.ocdbt") and not (path / COMMITTED).exists() for path in paths)


def arrays_without_commit(workdir: Path) -> bool:
    """Whether the newest checkpoint has its arrays and no commit file."""
    paths = step_directories(workdir)[-1:]
    return any(os.path.exists(path / "state/manifest.ocdbt") and not (path / COMMITTED).exists() for path in paths)


def deleting(workdir: Path) -> bool:
    """Whether the newest checkpoint is complete, and an older one is there without its commit file."""
    *older, newest = step_directories(workdir) or [workdir / "none"]
    return (newest / COMMITTED).exists() and any(not os.path.exists(path / COMMITTED) for path in older)


def state_of(workdir: Path, step: int = LAST) -> dict:
    """Shape, dtype and digest of every leaf of a checkpoint: equal only if the states are bitwise equal."""
    meta: Meta = checkpoints(workdir).meta(step)
    return meta.leaves


def metrics_of(workdir: Path) -> list[dict]:
    """The metrics without speed."""
    return [{name: value for name, value in record.items() if name not in SPEED} for record in read(workdir)]


def assert_equal_runs(actual: Path, expected: Path) -> None:
    """Fail unless final state and metrics are bitwise equal, and nothing is left of interrupted saves."""
    assert state_of(actual) == state_of(expected)
    assert metrics_of(actual) == metrics_of(expected)
    assert checkpoints(actual).steps() == [LAST - 10, LAST - 5, LAST]
    assert {path.name for path in step_directories(actual)} == {str(step) for step in (LAST - 10, LAST - 5, LAST)}


def restored(workdir: Path) -> dict[str, np.ndarray]:
    """The arrays of the newest checkpoint, which its digests have verified."""
    step = checkpoints(workdir).latest()
    assert step is not None, f"no checkpoint in {workdir}"
    leaves = checkpoints(workdir).meta(step).leaves
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {name: jax.ShapeDtypeStruct(leaf.shape, np.dtype(leaf.dtype), sharding=one) for name, leaf in leaves.items()}
    return jax.device_get(checkpoints(workdir)._restore(like, step, prefix=""))


def assert_restorable(workdir: Path) -> int:
    """Read and verify the newest checkpoint; returns its step."""
    assert restored(workdir)
    return max(checkpoints(workdir).steps())


def wait_for_end(trainers: list[Trainer], seconds: float) -> list[int]:
    """The exit codes; fails if a process takes longer."""
    until = time.monotonic() + seconds
    while any(trainer.running() for trainer in trainers) and time.monotonic() < until:
        time.sleep(0.01)
    codes = [trainer.process.poll() for trainer in trainers]
    for trainer in trainers:
        trainer.__exit__()
    assert None not in codes, (seconds, codes, [trainer.err for trainer in trainers])
    return codes
