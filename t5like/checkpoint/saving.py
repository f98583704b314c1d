"""One save of a checkpoint: start to write, verify, commit, flush; after a failure its files are removed.

The order makes every moment safe for a kill and for a loss of power: arrays and metadata are written, read again and
compared with the digests, and flushed; then the commit file is written and flushed. `checkpoints` decides when to save,
tries again after a failure, and deletes older checkpoints only after `complete` has returned.
"""

import contextlib
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from t5like import tree
from t5like.checkpoint import metadata, step_directories
from t5like.checkpoint.agreement import Attempt, OtherFailed
from t5like.checkpoint.digests import describe
from t5like.checkpoint.metadata import Meta
from t5like.checkpoint.orbax_adapter import Writer, checkpoint_errors
from t5like.checkpoint.step_directories import COMMITTED
from t5like.checkpoint.verification import damaged_leaves
from t5like.distributed import processes
from t5like.errors import CheckpointError, shorten
from t5like.io.paths import literal_path
from t5like.io.storage import format_bytes, sync, sync_tree
from t5like.io.strict_json import loads
from t5like.types import Array, TrainState

# TensorStore keeps compressed data in memory until a file is full (2 GiB by default, which is a second copy of a small
# model), and compresses a chunk as a whole.
NUM_DATA_FILES = 16  # a file contains 1/16 of all bytes; as much is read in parallel besides the largest array
MIN_FILE_BYTES, MAX_FILE_BYTES = 32 * 2**20, 2 * 2**30
DISCARD_SECONDS = 5.0  # for removing the files of a failed save
CHUNK_BYTES = 16 * 2**20  # of an array, at most


class Saving:
    """A save in progress.

    Attributes:
        state: the state that is saved; its arrays may have been donated after the constructor has returned.
        rest: config, tokenizer, its hash, and history, which are saved with it.
    """

    def __init__(self, directory: Path, state: TrainState, leaves: Mapping[str, Array], meta: Meta):
        """Start to save, and return when the arrays have been copied.

        Args:
            directory: of the checkpoints.
            state: the state.
            leaves: its leaves by name.
            meta: the metadata to save. If they contain no leaves, a thread computes the digests and starts to write;
                then `leaves` must not be donated.

        Raises:
            SaveFailed: it can't start; of the thread, `complete` raises it.
        """
        self.state, self._meta = state, meta
        self.rest = meta.config, meta.tokenizer, meta.tokenizer_hash, meta.history
        self._directory, self._path = directory, directory / str(meta.step)
        self._bytes = num_bytes(leaves)
        self._attempt, self._resources = Attempt(meta.step), contextlib.ExitStack()
        self._writer = Writer(self._attempt, self._check_written)
        self._started: Future[None] = Future()
        if meta.leaves:
            self._start(leaves)
            self._started.set_result(None)
        else:
            threading.Thread(target=self._start_later, args=(leaves,), daemon=True, name="save").start()

    def _start_later(self, leaves: Mapping[str, Array]) -> None:
        """Main function of the thread."""
        try:
            self._meta = self._meta._replace(leaves=describe(leaves))
            self._start(leaves)
            self._started.set_result(None)
        except BaseException as error:
            self._started.set_exception(error)

    def _start(self, leaves: Mapping[str, Array]) -> None:
        directory, meta = self._directory, self._meta
        with self._same_outcome("can't be written"):
            directory.mkdir(exist_ok=True)
            if jax.process_index() == 0:  # free space, before it is needed; also from a killed save of this step
                step_directories.delete_incomplete(directory)
            literal = self._resources.enter_context(literal_path(directory))
        with self._same_outcome("can't be written"):
            self._writer.save(  # plain dicts: on disk no Optax tuple or empty state shapes the tree
                literal / str(meta.step),
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(
                        tree.nested(leaves),
                        tree.nested({name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in leaves}),
                        ocdbt_target_data_file_size=min(
                            max(self._bytes // NUM_DATA_FILES, MIN_FILE_BYTES), MAX_FILE_BYTES
                        ),
                    ),
                    meta=ocp.args.JsonSave(metadata.to_dict(meta)),
                ),
            )

    def complete(self) -> None:
        """Wait until the checkpoint is committed and flushed to the disk.

        Raises:
            SaveFailed: it could not be written.
        """
        self._started.result()
        with self._same_outcome("could not be written"):
            self._writer.close()  # waits
            self._resources.close()
            if jax.process_index() == 0:  # everything else was flushed before the commit
                for written in (self._path / COMMITTED, self._path, self._directory, self._directory.parent):
                    sync(written)

    @contextlib.contextmanager
    def _same_outcome(self, failure: str) -> Iterator[None]:
        """Raise SaveFailed in all processes if the block fails in one, and remove the files: a full disk must not stay
        full.
        """
        own = None
        try:
            with checkpoint_errors(self._path, failure):
                yield
        except OtherFailed:
            pass
        except CheckpointError as error:
            own = CheckpointError(f"{error}{self._missing_space()}")
            own.__cause__ = error
            self._attempt.fail()
        except BaseException:
            self._discard()
            raise
        if shared := self._attempt.outcome("writing a checkpoint", own):
            with contextlib.suppress(Exception):  # all have failed
                self._writer.close()  # waits
            processes.barrier("removing a checkpoint")
            self._discard()
            raise shared from own

    def _discard(self) -> None:
        """Remove what was written, from process 0.

        After an error, Orbax's other writes go on for a moment and make directories again. So this looks twice. It may
        fail as well; then the next save removes the files.
        """
        self._resources.close()
        deadline, gone = time.monotonic() + DISCARD_SECONDS, 0
        while jax.process_index() == 0 and gone < 2 and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if step_directories.is_checkpoint(self._path):
                    gone = 0
                    step_directories.delete(self._path)
                else:
                    gone += 1
            time.sleep(0.1)

    def _missing_space(self) -> str:
        try:
            free = shutil.disk_usage(self._directory).free
        except OSError:
            return ""
        if free >= self._bytes:
            return ""
        return f"; a checkpoint needs up to {format_bytes(self._bytes)}, {format_bytes(free)} are free"

    def _check_written(self) -> None:
        """Read what was written, compare it with what was to be saved, flush it; Orbax calls this before it commits.

        Orbax merges the files of all processes into one manifest, and raises no error if there are none.

        Raises:
            CheckpointError: something is missing or different.
            OSError: the disk has failed.
        """
        path, meta = self._path, self._meta
        if not (path / "state" / "manifest.ocdbt").is_file():
            raise CheckpointError(f"{path} could not be written: its arrays are missing; use another --workdir")
        stored = loads((path / "meta" / "metadata").read_bytes())
        if metadata.from_dict(stored) != meta:
            raise CheckpointError(f"{path} could not be written: its metadata can't be read back; use another disk")
        with literal_path(self._directory) as directory:
            names = tree.flatten(ocp.PyTreeCheckpointHandler().metadata(directory / str(meta.step) / "state").tree)
        differ = [f"{name} can't be read back" for name in meta.leaves if name not in names]
        if differ := differ or damaged_leaves(path, meta.leaves):
            raise CheckpointError(f"{path} could not be written: {shorten(differ, separator='; ')}; use another disk")
        sync_tree(path)


def num_bytes(leaves: Mapping[str, Array | jax.ShapeDtypeStruct]) -> int:
    """Return the size of arrays without compression."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values())
