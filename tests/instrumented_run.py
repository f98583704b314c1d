"""`t5like ...` that records the batches on its devices, and that interrupts itself after a step.

    python tests/instrumented_run.py [--records FILE] [--step STEP --signal NUMBER [--after PATH]] -- ARGUMENTS...
    python tests/instrumented_run.py --step STEP --failures COUNT -- ARGUMENTS...
    python tests/instrumented_run.py --step STEP --hold gil -- ARGUMENTS...
    python tests/instrumented_run.py --nan_rows FIRST LAST -- ARGUMENTS...

When the metrics of step STEP are reported and PATH exists, the process sends itself the signal; from then on each step
takes 0.2 s longer. Signal 0 sends nothing: from then on the process can't write large files, as on a full disk; with
--failures it can again when it has failed in so many saves. With --hold the main thread hangs after that step instead:
asleep (`python`), or in C code that keeps the GIL (`gil`). With --nan_rows the loss of training batches that begin with
one of these rows is NaN.
"""

import argparse
import ctypes
import os
import pickle
import resource
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

from t5like.checkpoint.agreement import Attempt
from t5like.cli import main
from t5like.data.pipeline import Batches
from t5like.sharding import placement
from t5like.train import loop


def recording(path: Path):
    """A `placement.to_global` that appends each result to a file: the number of host rows, and the parts of each field.

    A part is (field, index, array): the slice of the global array that a device of this process holds, and its values.
    """
    to_global = placement.to_global

    def recorded(batch, mesh, batch_size):
        placed = to_global(batch, mesh, batch_size)
        arrays = {name: x for name, x in placed._asdict().items() if x is not None}
        parts = [(name, s.index, np.asarray(s.data)) for name, x in arrays.items() for s in x.addressable_shards]
        with path.open("ab") as file:
            pickle.dump((len(batch.targets_BL), parts), file)
        return placed

    return recorded


def read_records(path: Path) -> list[tuple[int, list]]:
    """The records that `recording` wrote, one for each batch."""
    records = []
    with path.open("rb") as file:
        while file.peek(1):
            records.append(pickle.load(file))  # noqa: S301, written by this test
    return records


def interrupt(step: int, number: int, after: Path | None, hold: str | None, done: int) -> None:
    """The hook `on_step` of the training loop."""
    if done == step and hold:
        time.sleep(1.2)  # a heartbeat, one each second, has to tell the others that this step was the last
        sleep = ctypes.PyDLL(None).sleep if hold == "gil" else time.sleep  # PyDLL keeps the GIL during a call
        while True:  # a signal ends one sleep
            sleep(1000)
    if done == step:
        while after and not after.exists():
            time.sleep(0.01)
        if number:
            os.kill(os.getpid(), number)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
    if done >= step:
        time.sleep(0.2)


def spoil(first: int, last: int) -> None:
    """Make the loss of training batches NaN, by their rows: in the same batches in every process and after a resume."""
    make = Batches.at

    def at(self, step, rows=None):
        batch = make(self, step, rows)
        if self.heldout or not first <= self.schedule.first_row(step) <= last:
            return batch
        return batch._replace(weights_BL=np.full_like(batch.weights_BL, np.nan))

    Batches.at = at


def write_again_after(failures: int) -> None:
    """Let this process write large files again when it has failed in so many saves."""
    fail, failed = Attempt.fail, []

    def counted(self):
        failed.append(self)
        if len(failed) == failures:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        fail(self)

    Attempt.fail = counted


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=Path)
    parser.add_argument("--step", type=int)
    parser.add_argument("--signal", type=int, default=0)
    parser.add_argument("--after", type=Path)
    parser.add_argument("--failures", type=int)
    parser.add_argument("--nan_rows", type=int, nargs=2)
    parser.add_argument("--hold", choices=("python", "gil"))
    parser.add_argument("arguments", nargs="*")
    options = parser.parse_args()
    if options.records:
        placement.to_global = recording(options.records)
    if options.nan_rows:
        spoil(*options.nan_rows)
    if options.failures:
        write_again_after(options.failures)
    if options.step is not None:
        on_step = partial(interrupt, options.step, options.signal, options.after, options.hold)
        train = loop.train
        loop.train = lambda *arguments, **named: train(*arguments, **named | {"on_step": on_step})
    sys.exit(main.main(options.arguments))
