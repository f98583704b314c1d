"""How messages name processes and what differs between them. Used by `rendezvous` and `processes`."""

import contextlib
import hashlib
from collections.abc import Sequence

from t5like.config import loader
from t5like.errors import UserError, printable

REMEDY = "start all with the same command"
REPORT_SECONDS = 5.0  # for the processes to exchange the reason why the run ends


def describe_difference(name: str, peer: tuple[str, str], primary: tuple[str, str], remedy: str = REMEDY) -> str:
    """Return the message about a value that differs between two processes; each is (process, value).

    Configs are represented by their hashes and the fields that differ.
    """
    values, detail = tuple(printable(value, longest=200) for value in (peer[1], primary[1])), ""
    if name == "config":
        with contextlib.suppress(UserError):
            fields = loader.difference(loader.from_json(primary[1]), loader.from_json(peer[1]))
            detail = ": " + "; ".join(fields[:3]) + ("; ..." if fields[3:] else "")
        values = tuple(hashlib.sha256(text.encode()).hexdigest()[:8] for text in (peer[1], primary[1]))
    return f"{peer[0]} has {name} {values[0]}, {primary[0]} has {values[1]}{detail}; {remedy}"


def describe_processes(ranks: Sequence[str]) -> str:
    """Return ranks as text, at most eight of them: ``processes 1, 3``."""
    shown = ", ".join(ranks[:8]) + (f" and {len(ranks) - 8} more" if ranks[8:] else "")
    return f"process {shown}" if len(ranks) == 1 else f"processes {shown}"
