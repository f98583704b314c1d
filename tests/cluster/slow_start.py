"""`python -m t5like ...` in which a job of Slurm trains slowly until it starts again, so that a test can interrupt it.

python tests/cluster/slow_start.py -m t5like ARGUMENTS...
"""

import os
import sys
import time
from functools import partial

from t5like.cli import main
from t5like.train import loop

SLOW_FROM = 6  # after the first checkpoint
SECONDS = 2.5  # all steps together take longer than the shortest time limit, a minute


def delay(done: int) -> None:
    """The hook `on_step` of the training loop."""
    if done >= SLOW_FROM and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        time.sleep(SECONDS)


if __name__ == "__main__":
    loop.train = partial(loop.train, on_step=delay)
    sys.exit(main.main(sys.argv[3:]))
