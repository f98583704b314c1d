"""One decision about a checkpoint in all processes: it is damaged for all if it is damaged for one.

Each process reads only its part of the arrays, and the following step needs all processes. Called by `checkpoints` and
`recovery`.
"""

import contextlib
from collections.abc import Iterator

from t5like.distributed import processes
from t5like.errors import DamagedCheckpoint


@contextlib.contextmanager
def same_failure(name: str, step: int) -> Iterator[None]:
    """Raise a DamagedCheckpoint of the block in all processes if one of them has raised it. All must call it."""
    failure = ""
    try:
        yield
    except DamagedCheckpoint as error:
        failure = str(error)
    failures = list(filter(None, processes.all_gather(name, failure, step=step)))
    if failures:
        raise DamagedCheckpoint(failures[0])
