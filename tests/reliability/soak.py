"""The long form of the tests of this folder: one run under random faults until the time is over; then its final state
is compared with that of an uninterrupted run.

    make soak ARGS="--seed=1 --minutes=10"

Prints a table of the faults, and goodput: the seconds of all steps, each counted once, divided by the seconds of the
run with its faults, restarts and repeated steps. The same seed has the same faults. Exit code 1: a fault was not
survived.
"""

import argparse
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).parents[1])]

import conftest  # sets XLA's flags  # noqa: E402
from runs import (  # noqa: E402
    Trainer,
    arrays_without_commit,
    checkpoints,
    deleting,
    last_step,
    metrics_of,
    run_to_end,
    smallest,
    state_of,
    writing_arrays,
)

from t5like.metrics.writers import read  # noqa: E402

ENDLESS = 1_000_000  # steps, until the time is over
EVERY = 20  # steps between checkpoints
LAYOUT = {"train__checkpoint_every": EVERY, "train__eval_every": ENDLESS, "train__heartbeat_timeout_seconds": 20}


class Fault(NamedTuple):
    """A fault.

    Attributes:
        apply: acts on the trainer and its run directory; the trainer then ends.
        codes: exit codes that are right after it.
    """

    apply: Callable[[Trainer, Path], None]
    codes: tuple[int, ...]
    hooks: tuple[str, ...] = ()


def send(*numbers: int, moment: Callable[[Path], bool] = lambda workdir: True) -> Callable[[Trainer, Path], None]:
    def apply(trainer: Trainer, workdir: Path) -> None:
        trainer.wait_for(lambda: moment(workdir), pause=0)
        for number in numbers:
            trainer.send(number)

    return apply


def damage(change: Callable[[Path], object]) -> Callable[[Trainer, Path], None]:
    """Kill, then damage the newest of at least two checkpoints: the next start has to use the one before."""

    def apply(trainer: Trainer, workdir: Path) -> None:
        trainer.wait_for(lambda: len(checkpoints(workdir).steps()) >= 2)
        send(signal.SIGKILL)(trainer, workdir)
        trainer.end()
        change(workdir / "checkpoints" / str(checkpoints(workdir).latest()))

    return apply


def flip(path: Path) -> None:
    for data in path.rglob("d/*"):
        raw = bytearray(data.read_bytes())
        raw[500::1024] = bytes(byte ^ 1 for byte in raw[500::1024])
        data.write_bytes(raw)


def truncate(path: Path) -> None:
    for data in path.rglob("d/*"):
        os.truncate(data, data.stat().st_size // 2)


def pause(trainer: Trainer, workdir: Path) -> None:
    """Stop the process for longer than a step, as a suspended machine does; it goes on, and is then preempted."""
    trainer.send(signal.SIGSTOP)
    time.sleep(3)
    trainer.send(signal.SIGCONT)
    step = last_step(workdir)
    trainer.wait_for(lambda: last_step(workdir) > step)
    trainer.send(signal.SIGTERM)


def wait_for_end(trainer: Trainer, workdir: Path) -> None:
    trainer.end()


KILLED, PREEMPTED, STUCK = (-signal.SIGKILL,), (75,), (76,)
FAULTS = {
    "kill -9 in a step": Fault(send(signal.SIGKILL), KILLED),
    "kill -9 while arrays are written": Fault(send(signal.SIGKILL, moment=writing_arrays), KILLED),
    "kill -9 before the commit file": Fault(send(signal.SIGKILL, moment=arrays_without_commit), KILLED),
    "kill -9 in retention": Fault(send(signal.SIGKILL, moment=deleting), KILLED),
    "SIGTERM": Fault(send(signal.SIGTERM), PREEMPTED),
    "SIGUSR1, then SIGTERM": Fault(send(signal.SIGUSR1, signal.SIGTERM), PREEMPTED),
    "stopped for 3 s, then SIGTERM": Fault(pause, PREEMPTED),
    "newest checkpoint: bits flipped": Fault(damage(flip), KILLED),
    "newest checkpoint: cut off": Fault(damage(truncate), KILLED),
    "newest checkpoint: half deleted": Fault(damage(lambda path: shutil.rmtree(path / "state")), KILLED),
    "hangs with the GIL held": Fault(wait_for_end, STUCK, ("--hold", "gil")),
}


class Survived(NamedTuple):
    """What happened after a fault."""

    name: str
    seconds: float  # from the fault to the first new step
    repeated: int  # steps that were trained again


def soak(flags: list[str], place: Path, seed: int, minutes: float) -> tuple[list[Survived], int, float]:
    """Run under faults; returns them, the number of steps, and the seconds from the first start to the end."""
    chosen, workdir, survived = random.Random(seed), place / "run", []
    arguments = smallest(flags, workdir, **LAYOUT, train__num_steps=ENDLESS)
    started, names, last = time.monotonic(), [], None
    while time.monotonic() - started < 60 * minutes:
        names = names or chosen.sample([*FAULTS], len(FAULTS))  # each once, before one comes again
        name, reached = names.pop(), last_step(workdir)
        fault, first = FAULTS[name], reached + chosen.randint(1, 4 * EVERY)
        hooks = (f"--step={first}", *fault.hooks) if fault.hooks else ()
        with Trainer(arguments, place / f"log-{len(survived)}", hooks=hooks) as trainer:
            if last:  # the fault before this start
                trainer.wait_for(lambda reached=reached: last_step(workdir) > reached)
                survived.append(Survived(last[0], time.monotonic() - last[1], reached - last[2]))
            before = first - len(hooks[:1])  # the process that hangs does so before it reports that step
            trainer.wait_for(lambda before=before: last_step(workdir) >= before)
            fault.apply(trainer, workdir)
            code = trainer.end()
            assert code in fault.codes, f"seed {seed}, {name}: exit code {code}\n{trainer.err}"
        print(f"{time.monotonic() - started:6.0f} s  step {last_step(workdir):7,}  {name}", file=sys.stderr, flush=True)
        last = (name, time.monotonic(), checkpoints(workdir).latest() or 0)
    steps = (last_step(workdir) // EVERY + 1) * EVERY
    run_to_end(smallest(flags, workdir, **LAYOUT, train__num_steps=steps), place / "log-last")
    return survived, steps, time.monotonic() - started


def table(survived: list[Survived]) -> str:
    """The faults as Markdown."""
    lines = ["| fault | times | median seconds to the next new step | most steps repeated |", "|---|---:|---:|---:|"]
    for name in FAULTS:
        if of_name := [each for each in survived if each.name == name]:
            seconds = statistics.median(each.seconds for each in of_name)
            lines.append(f"| {name} | {len(of_name)} | {seconds:.1f} | {max(each.repeated for each in of_name)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="t5like-soak-") as directory:
        place = Path(directory)
        (place / "texts").mkdir()
        conftest.write_text(place / "texts" / "a.txt", seed=1)
        flags = conftest.smallest_flags(place / "texts")
        survived, steps, seconds = soak(flags, place, options.seed, options.minutes)
        straight = place / "straight"
        run_to_end(smallest(flags, straight, **LAYOUT, train__num_steps=steps), place / "log-straight")
        assert state_of(place / "run", steps) == state_of(straight, steps), f"seed {options.seed}: another final state"
        assert metrics_of(place / "run") == metrics_of(straight), f"seed {options.seed}: other metrics"
        productive = sum(record.get("train/step_seconds", 0) for record in read(place / "run"))
    print(table(survived))
    print(f"\nseed {options.seed}: {len(survived)} faults in {seconds:,.0f} s, {steps:,} steps; goodput ", end="")
    print(f"{100 * productive / seconds:.0f} %; final state and metrics equal those of an uninterrupted run")


if __name__ == "__main__":
    main()
