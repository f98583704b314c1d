"""A few modules of Python's standard library in place of all of it, which takes seconds to parse."""

import contextlib
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from t5like.data.sources import python_tasks

MODULES = ("json", "logging", "difflib.py", "heapq.py", "statistics.py", "textwrap.py")


@contextlib.contextmanager
def small_library(directory: Path) -> Iterator[Path]:
    """Copy `MODULES` to a directory, and let the data sources of this process read it as the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    for name in MODULES:
        copy = directory / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (root / name).is_dir() else shutil.copy)(root / name, copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sysconfig, "get_path", lambda _: str(directory))
        python_tasks.library.cache_clear()
        yield directory
        python_tasks.library.cache_clear()
