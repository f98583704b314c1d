"""Paths that users name: `~` in them, names beside them, and how a library that reads patterns gets them literally.

In a container that runs as some user there may be no home directory: HOME is unset and the user id has no
account, or HOME is ``/``, which only root can write. A path that the user gave is then refused. What only saves time,
the cache, is kept below the system's directory for temporary files, and a line on standard error says where.
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
_told: set[Path] = set()
_LITERAL = re.compile(r"(?!/(gs|s3|az|hf)(/|$))[\w/ .,+=@~^&()#%'\"-]*")


def expand(text: str | os.PathLike) -> Path:
    """The path with a leading ``~`` or ``~user`` replaced; ``./~name`` is a file of that name.

    Raises:
        ConfigError: there is no such home directory.
    """
    path = os.path.expanduser(text)
    if os.fspath(path).startswith("~"):
        raise ConfigError(f"{path}: there is no home directory {path.split('/')[0]}; write the whole path, or ./{path}")
    return Path(path)


def why_no_path(text: str) -> str:
    """Why a text can't be the path of a file or directory here, and what could be; empty if it can."""
    if not text or "\0" in text:
        return "must be a path, without NUL characters; use runs/mine"
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        return "must be a path, not a URL; mount that storage and use /mnt/NAME"
    if not text.startswith(CACHE) and os.path.expanduser(text).startswith("~"):  # see `cache_directory`
        return f"names a home directory that is not known; use an absolute path, or ./{text}"
    whole = os.fsencode(os.path.abspath(os.path.expanduser(text)))
    try:
        whole.decode()
    except UnicodeDecodeError:
        return "must be UTF-8, because it is written into files that are; rename it, or name a link to it"
    name = max(whole.split(b"/"), key=len)
    if len(name) > LONGEST_NAME:
        return f"has a name of {len(name)} bytes, and at most {LONGEST_NAME} are possible; use a shorter one"
    if len(whole) > LONGEST_PATH:
        return f"is a path of {len(whole)} bytes, and at most {LONGEST_PATH} are possible; use a shorter one"
    return ""


def check_path(field: str, text: str) -> None:
    """Refuse what can't be a path.

    Raises:
        ConfigError: see `why_no_path`.
    """
    if why := why_no_path(text):
        raise ConfigError(f"{field}={text} {why}")


def temporary_beside(path: Path, *marks: object) -> Path:
    """A hidden path in the same directory for one writer, told by `marks` and its process; of possible length."""
    ending = "." + "-".join(map(str, (*marks, os.getpid())))
    stem = os.fsencode(path.name)[: LONGEST_NAME - 1 - len(os.fsencode(ending))]
    return path.with_name(f".{os.fsdecode(stem)}{ending}")


def cache_directory(path: str | Path) -> Path:
    """Like `expand`, for a directory that may be made again. One in ``~/.cache`` that can't be made lies elsewhere.

    Raises:
        ConfigError: as `expand`, for other directories.
    """
    if not str(path).startswith(CACHE):
        return expand(path)
    home = os.path.expanduser("~")
    if home != "~" and _writable(expand(path)):
        return expand(path)
    elsewhere = Path(os.environ.get("XDG_CACHE_HOME") or _temporary())
    if elsewhere not in _told:
        _told.add(elsewhere)
        reason = "there is no home directory" if home == "~" else f"{home} can't be written"
        print(
            f"t5like: {reason}: the cache is in {elsewhere}; set HOME or data.cache_directory to keep it",
            file=sys.stderr,
        )
    return elsewhere / str(path).removeprefix(CACHE)


def _writable(path: Path) -> bool:
    """Whether a directory is there, in whatever state, or could be made."""
    if os.path.lexists(path):
        return True
    parent = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    return os.access(parent, os.W_OK | os.X_OK)


def _temporary() -> Path:
    """This user's own directory for temporary files: nobody else may put compiled programs there.

    Raises:
        ConfigError: somebody else has made it.
    """
    path = Path(tempfile.gettempdir()) / f"t5like-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if status.st_uid != os.getuid() or not path.is_dir() or path.is_symlink() or status.st_mode & 0o022:
        raise ConfigError(f"{path} belongs to somebody else; set HOME or XDG_CACHE_HOME to a directory of your own")
    return path


@contextlib.contextmanager
def literal(directory: Path) -> Iterator[Path]:
    """A path to the same directory that Orbax and TensorStore take as it stands, for the length of a with statement.

    Orbax looks for what it wrote by `glob` of the whole path (etils.epath.Path.glob), so that ``runs/a[b]c`` is never
    found and ``runs/a*b`` finds the files of ``runs/axb`` too. TensorStore turns a backslash into a slash, and takes
    UTF-8 only. epath takes ``/gs/...`` for a bucket. For such names the path leads through a symbolic link in the
    temporary directory; others stay as they are.

    Raises:
        CheckpointError: no link can be made.
    """
    if _LITERAL.fullmatch(str(directory)):
        yield directory
        return
    with contextlib.ExitStack() as stack:
        try:
            temporary = tempfile.TemporaryDirectory(prefix="t5like-", ignore_cleanup_errors=True)
            beside = Path(stack.enter_context(temporary))
            if not _LITERAL.fullmatch(str(beside)):
                raise OSError(0, "the temporary directory's name has such characters too")
            link = beside / "checkpoints"
            link.symlink_to(directory, target_is_directory=True)
        except OSError as error:
            raise CheckpointError(
                f"{directory} has characters that need a link in the temporary directory, which can't be made: "
                f"{error.strerror}; use a name of letters, digits, '-' and '_', or set TMPDIR=/tmp"
            ) from None
        yield link
