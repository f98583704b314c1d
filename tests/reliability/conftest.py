"""The uninterrupted run with which the runs of this folder are compared."""

from pathlib import Path

import pytest
from runs import run_to_end, smallest


@pytest.fixture(scope="session")
def straight(flags, tmp_path_factory) -> Path:
    """A run that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    run_to_end(smallest(flags, workdir), workdir.parent / "log")
    return workdir
