"""Orbax as checkpoints use it: its writer, its log, and its errors as one line. Called by `checkpoints`."""

import contextlib
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from t5like.checkpoint.agreement import Attempt
from t5like.distributed import processes
from t5like.errors import CheckpointError
from t5like.io.storage import error_number

SAVE_SECONDS = 600  # a save that takes longer has failed: a run must not wait for ever for its storage
MIN_SLICE_BYTES = 64 * 1024  # of a replica; of smaller arrays one replica writes all


class Writer(ocp.AsyncCheckpointer):
    """An asynchronous writer in which all processes fail if one does; it writes into a directory that does not exist.

    In Orbax's own barriers the other processes would wait for one that has failed.
    """

    def __init__(self, attempt: Attempt, before_commit: Callable[[], None]):
        """Call `before_commit` in process 0 before the commit file is written."""
        super().__init__(
            ocp.CompositeCheckpointHandler(
                state=ocp.PyTreeCheckpointHandler(type_handler_registry=_handlers()), meta=ocp.JsonCheckpointHandler()
            ),
            async_options=ocp.AsyncOptions(
                timeout_secs=SAVE_SECONDS,
                barrier_sync_fn=attempt.barrier,
                create_directories_asynchronously=False,
                post_finalization_callback=before_commit,  # of the arrays; the commit file is written after it
            ),
            file_options=ocp.options.FileOptions(skip_sync_file_validations=True),
            atomicity_options=ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE),
        )
        self._attempt = attempt

    async def create_temporary_path(self, temporary_path: Any) -> None:
        """Create the checkpoint's directory in process 0; Orbax calls this before anything is written.

        Raises:
            SaveFailed: in all processes.
        """
        failure = None
        if processes.is_primary():
            try:
                with checkpoint_errors(temporary_path.get_final(), "can't be made"):
                    await temporary_path.create()
            except CheckpointError as error:
                failure = error
        if shared := self._attempt.outcome("making a checkpoint's directory", failure):
            raise shared


@functools.cache
def _handlers() -> ocp.type_handlers.TypeHandlerRegistry:
    """Orbax's handlers, which divide only arrays of some size among the devices that hold copies of them.

    A slice of each shape is a program of its own, which the first save would compile while the run waits.
    """
    kinds = (int, float, bytes, np.number, np.ndarray)  # an import has NumPy's, also numbers
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=MIN_SLICE_BYTES)
    pairs = ((kind, ocp.type_handlers.get_type_handler(kind)) for kind in kinds)
    return ocp.type_handlers.create_type_handler_registry(*pairs, (jax.Array, arrays))


@functools.cache
def silence_logs() -> None:
    """Drop what Orbax prints besides raising: its log, and reports on coroutines and tasks that a failure orphans.

    These are reported when they are garbage collected: by `sys.unraisablehook`, by a warning, or by asyncio's log.
    """
    orphaned = ("exception was never retrieved", "Task was destroyed but it is pending")
    logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: not any(text in record.getMessage() for text in orphaned))
    warnings.filterwarnings("ignore", r"coroutine '.*' was never awaited", RuntimeWarning)
    report = sys.unraisablehook

    def report_others(event: Any) -> None:
        code = getattr(event.object, "cr_code", None)
        orphan = code is not None and "/orbax/" in code.co_filename and isinstance(event.exc_value, Exception)
        if not orphan and str(event.exc_value) != "Event loop is closed":
            report(event)

    sys.unraisablehook = report_others


@contextlib.contextmanager
def checkpoint_errors(
    path: Path, failure: str, remedy: str = "", error: type[CheckpointError] = CheckpointError
) -> Iterator[None]:
    """Raise errors of Orbax, TensorStore and the file system as `error`, with a message of one line."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as failed:
        cause = failed
        while cause.__cause__ is not None:
            cause = cause.__cause__
        text = " ".join(str(cause).split()) or type(cause).__name__
        if len(text) > 300:  # TensorStore nests messages: the system's reason may stand anywhere behind the operation
            number = error_number(failed)
            text = f"{text[:100]} ... {os.strerror(number) if number else text[-200:]}"
        raise error(f"{path} {failure}: {text}" + f"; {remedy}" * bool(remedy)) from failed
