"""Paths from users: home directories, checks, temporary names, and paths for libraries that interpret patterns.

A container that runs as an arbitrary user may have no home directory: HOME is unset and the user id has no account, or
HOME is ``/``, which only root can write. A user's path with `~` is then refused. The cache, which only saves time, is
then kept below the system's directory for temporary files, and a line on standard error contains its path.
"""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from t5like.errors import CheckpointError, ConfigError

LONGEST_NAME = 255  # bytes of one name in a path, on nearly every file system
LONGEST_PATH = 4096 - 256  # bytes of a path: Linux takes 4,096, and the files of a run directory need some of them
CACHE = "~/.cache/"
_reported: set[Path] = set()
_LITERAL = re.compile(r"(?!/(gs|s3|az|hf)(/|$))[\w/ .,+=@~^&()#%'\"-]*")


def expand(text: str | os.PathLike) -> Path:
    """Replace a leading ``~`` or ``~user``; ``./~name`` is a file of that name.

    Raises:
        ConfigError: there is no such home directory.
    """
    path = os.path.expanduser(text)
    if os.fspath(path).startswith("~"):
        raise ConfigError(f"{path}: there is no home directory {path.split('/')[0]}; write the whole path, or ./{path}")
    return Path(path)


def why_no_path(text: str) -> str:
    """Return why a text can't be the path of a file or directory, with a path that can; empty if it can be one."""
    if not text or "\0" in text:
        return "must be a path, without NUL characters; use runs/mine"
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        return "must be a path, not a URL; mount that storage and use /mnt/NAME"
    if not text.startswith(CACHE) and os.path.expanduser(text).startswith("~"):  # see `cache_directory`
        return f"names a home directory that is not known; use an absolute path, or ./{text}"
    encoded = os.fsencode(os.path.abspath(os.path.expanduser(text)))
    try:
        encoded.decode()
    except UnicodeDecodeError:
        return "must be UTF-8, because it is written into UTF-8 files; rename it, or use a link to it"
    name = max(encoded.split(b"/"), key=len)
    if len(name) > LONGEST_NAME:
        return f"has a name of {len(name)} bytes, and at most {LONGEST_NAME} are possible; use a shorter one"
    if len(encoded) > LONGEST_PATH:
        return f"is a path of {len(encoded)} bytes, and at most {LONGEST_PATH} are possible; use a shorter one"
    return ""


def check_path(field: str, text: str) -> None:
    """Refuse a text that can't be a path.

    Raises:
        ConfigError: see `why_no_path`.
    """
    if why := why_no_path(text):
        raise ConfigError(f"{field}={text} {why}")


def temporary_beside(path: Path, *marks: object) -> Path:
    """Return a hidden path in the same directory, unique by `marks` and process id, not longer than names may be."""
    ending = "." + "-".join(map(str, (*marks, os.getpid())))
    stem = os.fsencode(path.name)[: LONGEST_NAME - 1 - len(os.fsencode(ending))]
    return path.with_name(f".{os.fsdecode(stem)}{ending}")


def cache_directory(path: str | Path) -> Path:
    """Expand the path of a cache; one in ``~/.cache`` that can't be created is moved to a temporary directory.

    Raises:
        ConfigError: as `expand`, for paths outside of ``~/.cache``.
    """
    if not str(path).startswith(CACHE):
        return expand(path)
    home = os.path.expanduser("~")
    if home != "~" and _writable(expand(path)):
        return expand(path)
    elsewhere = Path(os.environ.get("XDG_CACHE_HOME") or _temporary())
    if elsewhere not in _reported:
        _reported.add(elsewhere)
        reason = "there is no home directory" if home == "~" else f"{home} can't be written"
        print(
            f"t5like: {reason}: the cache is in {elsewhere}; set HOME or data.cache_directory to keep it",
            file=sys.stderr,
        )
    return elsewhere / str(path).removeprefix(CACHE)


def _writable(path: Path) -> bool:
    """Whether a directory exists, in any state, or could be created."""
    if os.path.lexists(path):
        return True
    parent = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    return os.access(parent, os.W_OK | os.X_OK)


def _temporary() -> Path:
    """Return this user's own directory for temporary files; no other user may put compiled programs there.

    Raises:
        ConfigError: another user has created it.
    """
    path = Path(tempfile.gettempdir()) / f"t5like-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if status.st_uid != os.getuid() or not path.is_dir() or path.is_symlink() or status.st_mode & 0o022:
        raise ConfigError(f"{path} belongs to another user; set HOME or XDG_CACHE_HOME to a directory of your own")
    return path


@contextlib.contextmanager
def literal_path(directory: Path) -> Iterator[Path]:
    """Yield a path to the directory in which Orbax and TensorStore interpret no character.

    Orbax searches its files by `glob` of the whole path (etils.epath.Path.glob): it never finds ``runs/a[b]c``, and for
    ``runs/a*b`` it also finds the files of ``runs/axb``. TensorStore replaces a backslash by a slash, and accepts UTF-8
    only. epath interprets ``/gs/...`` as a bucket. For such names the yielded path is a symbolic link in the temporary
    directory, removed at the end of the block; other paths are yielded unchanged.

    Raises:
        CheckpointError: the link can't be created.
    """
    if _LITERAL.fullmatch(str(directory)):
        yield directory
        return
    with contextlib.ExitStack() as stack:
        try:
            temporary = tempfile.TemporaryDirectory(prefix="t5like-", ignore_cleanup_errors=True)
            beside = Path(stack.enter_context(temporary))
            if not _LITERAL.fullmatch(str(beside)):
                raise OSError(0, "the temporary directory's name contains such characters")
            link = beside / "checkpoints"
            link.symlink_to(directory, target_is_directory=True)
        except OSError as error:
            raise CheckpointError(
                f"{directory} has characters that need a link in the temporary directory, which can't be created: "
                f"{error.strerror}; use a name of letters, digits, '-' and '_', or set TMPDIR=/tmp"
            ) from None
        yield link
