"""`t5like ...` as one of several processes that writes down what its devices hold, and may send itself a signal.

    python tests/recorded.py FILE STEP SIGNAL ARGUMENTS...

When a step has been reported it gets the signal, and goes slowly from there on; step -1 never comes. Signal 0 is none:
from there on its files can't become large, as on a full disk.
"""

import os
import pickle
import resource
import sys
import time
from pathlib import Path

import numpy as np

from t5like.cli import main
from t5like.metrics import progress
from t5like.sharding import placement


def recorded(path: Path):
    """A `mesh.to_global` that appends to a file what it gives: how many rows were made here, and all parts of fields.

    A part is (name, index, array): where it lies in the global array, and what a device of this process holds of it.
    """
    place = placement.to_global

    def to_global(batch, mesh, batch_size):
        placed = place(batch, mesh, batch_size)
        arrays = {name: x for name, x in placed._asdict().items() if x is not None}
        parts = [(name, s.index, np.asarray(s.data)) for name, x in arrays.items() for s in x.addressable_shards]
        with path.open("ab") as file:
            pickle.dump((len(batch.targets_BL), parts), file)
        return placed

    return to_global


def held(path: Path) -> list[tuple[int, list]]:
    """What `recorded` wrote: a record for each batch."""
    records = []
    with path.open("rb") as file:
        while file.peek(1):
            records.append(pickle.load(file))  # noqa: S301, our own
    return records


if __name__ == "__main__":
    path, step, number = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    show = progress.Progress.update

    def update(self, done, *rest):
        show(self, done, *rest)
        if done == step and number == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
        elif done == step:
            os.kill(os.getpid(), number)
        if done >= step >= 0:
            time.sleep(0.2)

    progress.Progress.update = update
    placement.to_global = recorded(path)
    sys.exit(main.main(sys.argv[4:]))
