"""The uninterrupted run with which the runs of this folder are compared."""

from pathlib import Path

import pytest
from runs import run_to_end, smallest
from shared_directories import made_once


@pytest.fixture(scope="session")
def straight(flags, tmp_path_factory) -> Path:
    """A run that nothing interrupts."""
    make = lambda place: run_to_end(smallest(flags, place / "run"), place / "log")
    return made_once(tmp_path_factory, "uninterrupted", make) / "run"
