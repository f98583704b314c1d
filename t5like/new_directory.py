"""A directory that appears whole: filled beside its place, and renamed when that ends well. What exports write into."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from t5like.errors import CheckpointError, ConfigError
from t5like.paths import temporary_beside


def check_free(place: Path, flag: str) -> None:
    """Refuse a place that holds anything; an empty directory will do.

    Raises:
        ConfigError: it is taken. `flag` is what named it.
    """
    try:
        free = not place.exists() or (place.is_dir() and not any(place.iterdir()))
    except OSError as error:
        raise CheckpointError(f"{flag}={place} can't be used: {error.strerror}; name another one") from None
    if not free:
        raise ConfigError(f"{flag}={place} exists and is not an empty directory; name another one")


@contextlib.contextmanager
def made_whole(place: Path) -> Iterator[Path]:
    """A directory to fill in a with statement; it appears at `place` when that ends well, and not at all otherwise.

    Raises:
        CheckpointError: it can't be made or written.
    """
    beside = temporary_beside(place)
    try:
        beside.mkdir(parents=True)
        yield beside
        beside.replace(place)
    except OSError as error:
        raise CheckpointError(f"{place} can't be written: {error.strerror or error}; name another one") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
