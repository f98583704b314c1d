"""Save and restore the training state: asynchronous, sharded, strict, verified.

    WORKDIR/checkpoints/run_id                     the run's id, a random number
                        <step>/state/              Orbax arrays, under the names that `tree.flatten` gives the leaves
                               meta/metadata       JSON: step, run, config, tokenizer, every leaf's shape, dtype, digest
                               commit_success.txt  written last: without it the checkpoint is incomplete

Called by the training loop (save, restore), and by evaluate, generate and export (restore_params, meta), which decide
when to save and what to do after a failure. Orbax 0.12 writes and reads the bytes. This module adds:

* Orbax recognizes a checkpoint by its directory's name, and its manager caches the list of steps. Here checkpoints are
  written in its commit-file mode, and the list is always read from the disk.
* Orbax restores flipped bits, casts to the requested dtype, and merges colliding names, all silently. Here names,
  shapes and dtypes are compared before reading, and a digest of every leaf after it.
* After a failed save, Orbax leaves files that make the next save fail. Here each save has its own writer, and the files
  of a failed one are removed.
* Orbax reads a checkpoint from any path. Here the metadata contain the step and the run, which must be those of the
  directory.
"""

import contextlib
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp
from flax import traverse_util

from t5like import tree
from t5like.checkpoint import metadata
from t5like.checkpoint.digests import Leaf, describe
from t5like.checkpoint.metadata import History, Meta
from t5like.checkpoint.orbax_adapter import checkpoint_errors, make_writer, silence_logs
from t5like.config.schema import Config
from t5like.errors import CheckpointError, shorten
from t5like.io.atomic import replace_file
from t5like.io.paths import literal_path
from t5like.io.strict_json import loads
from t5like.types import Array, TrainState, Tree

COMMITTED = "commit_success.txt"
REQUIRED_FILES = (
    "_CHECKPOINT_METADATA",
    "meta/metadata",
    "state/_METADATA",
    "state/manifest.ocdbt",
)  # in each checkpoint
RUN_ID = "run_id"  # beside the checkpoints
# TensorStore keeps compressed data in memory until a file is full (2 GiB by default, which is a second copy of a small
# model), and compresses a chunk as a whole.
NUM_DATA_FILES = 16  # a file contains 1/16 of all bytes; as much is read in parallel besides the largest array
MIN_FILE_BYTES, MAX_FILE_BYTES = 32 * 2**20, 2 * 2**30
CHUNK_BYTES = 16 * 2**20  # of an array, at most
STEP = re.compile("0|[1-9][0-9]{0,17}")  # names of directories that may be checkpoints


class Checkpoints:
    """The checkpoints of one run directory. At most one save is in progress; reading never changes the directory."""

    def __init__(self, directory: Path, *, keep: int, keep_every: int = 0):
        """Keep the newest `keep` checkpoints, and permanently those at multiples of `keep_every` steps."""
        silence_logs()
        self.directory = Path(directory).absolute()
        self._keep, self._keep_every = keep, keep_every
        self._saving: _Saving | None = None

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints on disk, ascending; a save in progress is not complete."""
        return sorted(step for step, path in self._step_directories() if (path / COMMITTED).exists())

    def latest(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None."""
        return max(self.steps(), default=None)

    def save(
        self,
        state: TrainState,
        *,
        config: Config,
        tokenizer: bytes,
        tokenizer_hash: str,
        history: History | None = None,
    ) -> None:
        """Start to save, and return when the state's arrays have been copied and may be donated.

        A step that is already complete on disk is not saved again: its state was restored from there. Without `history`
        it is that of a run that starts.

        Raises:
            CheckpointError: the previous save failed (then this one is not started), or this one can't start.
        """
        self.wait()
        step = int(state.step)
        if step in self.steps():
            return
        leaves = _leaves(state)
        run, versions = self._make_run_id(), metadata.versions()
        history = history or metadata.first_history(config)
        meta = Meta(step, run, config, tokenizer, tokenizer_hash, versions, describe(leaves), history)
        self._saving = _Saving(step, make_writer(partial(self._check_written, step)), contextlib.ExitStack())
        with self._remove_on_failure("can't be written"):
            self.directory.mkdir(parents=True, exist_ok=True)
            directory = self._saving.resources.enter_context(literal_path(self.directory))
            self._saving.writer.save(  # plain dicts: on disk no Optax tuple or empty state shapes the tree
                directory / str(step),
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(
                        tree.nested(leaves),
                        tree.nested({name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in leaves}),
                        ocdbt_target_data_file_size=min(
                            max(_bytes(leaves) // NUM_DATA_FILES, MIN_FILE_BYTES), MAX_FILE_BYTES
                        ),
                    ),
                    meta=ocp.args.JsonSave(metadata.to_dict(meta)),
                ),
                force=True,  # over the files of a killed save
            )

    def wait(self) -> None:
        """Wait until the save in progress is complete, then delete the checkpoints that need not be kept.

        Raises:
            CheckpointError: the save failed; its files are removed, the earlier checkpoints are unchanged.
        """
        if self._saving is None:
            return
        with self._remove_on_failure("could not be written"):
            self._saving.writer.close()  # waits
            self._saving.resources.close()
        self._saving = None
        self._prune()

    def close(self) -> None:
        """The same as `wait`."""
        self.wait()

    def meta(self, step: int | None = None) -> Meta:
        """Read everything but the arrays, by default of the newest checkpoint.

        Raises:
            CheckpointError: there is no such checkpoint, it is damaged or incomplete, or its step or run are not those
                of the directory.
        """
        step = self._check_complete(step)
        path = self.directory / str(step)
        for name in REQUIRED_FILES:
            if not (path / name).is_file():
                raise CheckpointError(f"{path} is incomplete: it has no file {name}; {self._advice(step)}")
        meta = self._read_meta(step)
        if meta.step != step:
            raise CheckpointError(
                f"{path} was saved as step {meta.step}, not {step}; rename it to {self.directory / str(meta.step)}, or "
                f"{self._advice(step)}"
            )
        run = self._run_id()
        if run and meta.run and meta.run != run:
            raise CheckpointError(
                f"{path} is a checkpoint of another run ({meta.run[:8]}, not {run[:8]}); to start a run from its "
                f"weights, set --config.init_from.checkpoint to its own run directory; here, {self._advice(step)}"
            )
        return meta

    def restore(self, abstract_state: TrainState, step: int | None = None) -> TrainState:
        """Read a state onto the given shardings, whatever mesh it was saved from.

        Args:
            abstract_state: leaves are `jax.ShapeDtypeStruct` with shardings.
            step: default: the newest; with several processes all must use the same.

        Raises:
            CheckpointError: there is no such checkpoint, it does not fit, it can't be read, or it is damaged.
        """
        return self._restore(abstract_state, step, prefix="")

    def restore_params(
        self, abstract_params: Tree, step: int | None = None, *, ema: bool = False, without: Sequence[str] = ()
    ) -> Tree:
        """Read only the parameters, or their moving average. Arguments as in `restore`.

        Stored parameters whose name matches a regular expression of `without` are ignored.
        """
        return self._restore(abstract_params, step, "ema/" if ema else "params/", without)

    def _restore(self, abstract: Tree, step: int | None, prefix: str, without: Sequence[str] = ()) -> Tree:
        step = self._check_complete(step)
        path = self.directory / str(step)
        wanted = {prefix + name: leaf for name, leaf in tree.flatten(abstract).items()}
        stored = {
            name: leaf
            for name, leaf in self.meta(step).leaves.items()
            if name.startswith(prefix) and not tree.matches(name.removeprefix(prefix), without)
        }
        if unfit := differences(stored, wanted):
            raise CheckpointError(
                f"{path} does not fit: {shorten(unfit, separator='; ')}; use the config it was saved with"
            )
        assert all(leaf.sharding is not None for leaf in wanted.values()), (
            "without shardings Orbax uses the mesh of the save"
        )
        arguments = {
            name: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
            for name, leaf in wanted.items()
        }
        largest = max(_bytes({name: leaf}) for name, leaf in wanted.items())
        handler = ocp.PyTreeCheckpointHandler(
            restore_concurrent_gb=(largest + _bytes(wanted) // NUM_DATA_FILES + 2**20) / 10**9
        )
        request = ocp.args.PyTreeRestore(tree.nested(wanted), tree.nested(arguments), partial_restore=bool(prefix))
        with (
            checkpoint_errors(path / "state", "can't be read", self._advice(step)),
            literal_path(self.directory) as directory,
            ocp.Checkpointer(handler) as reader,
        ):
            restored = traverse_util.flatten_dict(
                reader.restore(directory / str(step) / "state", args=request), sep="/"
            )
        damaged = [name for name, leaf in describe(restored).items() if leaf != stored[name]]
        if damaged:
            raise CheckpointError(
                f"{path} is damaged: what was read is not what was saved in {shorten(damaged, separator='; ')}; "
                f"{self._advice(step)}"
            )
        return jax.tree.unflatten(jax.tree.structure(abstract), [restored[name] for name in wanted])

    def _step_directories(self) -> list[tuple[int, Path]]:
        with checkpoint_errors(self.directory, "can't be read"):
            entries = list(self.directory.iterdir()) if self.directory.exists() else []
        return [(int(path.name), path) for path in entries if STEP.fullmatch(path.name)]

    def _check_complete(self, step: int | None) -> int:
        steps = self.steps()
        if step is None and not steps:
            raise CheckpointError(f"{self.directory} holds no complete checkpoint; train first, or check --workdir")
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.directory} holds no complete checkpoint of step {step}{_list_steps(steps)}")
        return steps[-1] if step is None else step

    def _read_meta(self, step: int) -> Meta:
        file = self.directory / str(step) / "meta" / "metadata"
        with checkpoint_errors(file, "can't be read", self._advice(step)):
            values = loads(file.read_bytes())
        try:
            return metadata.from_dict(values)
        except CheckpointError as error:
            raise CheckpointError(f"{file} can't be used: {error}; {self._advice(step)}") from None

    def _advice(self, step: int) -> str:
        """Return the advice how to continue without a checkpoint."""
        others = _list_steps(self.steps(), but=step)
        return f"move {self.directory / str(step)} away to continue from an earlier one{others}"

    def _run_id(self) -> str:
        """Read the id of the run; "" if it has none."""
        path, remedy = self.directory / RUN_ID, "remove it to use the newest checkpoint's"
        with checkpoint_errors(path, "can't be read", remedy):
            text = path.read_text(encoding="utf-8").strip() if path.exists() else ""
        if path.exists() and not metadata.RUN.fullmatch(text):
            raise CheckpointError(f"{path} is damaged: it must contain 32 hexadecimal digits; {remedy}")
        return text

    def _make_run_id(self) -> str:
        """Read the id of the run; a run without one gets that of its newest checkpoint, or a new one."""
        if run := self._run_id():
            return run
        steps = self.steps()
        run = (self.meta(steps[-1]).run if steps else "") or secrets.token_hex(16)
        if jax.process_index() == 0:  # the process that writes metadata
            with checkpoint_errors(self.directory / RUN_ID, "can't be written"):
                self.directory.mkdir(parents=True, exist_ok=True)
                replace_file(self.directory / RUN_ID, f"{run}\n")
        return run

    @contextlib.contextmanager
    def _remove_on_failure(self, failure: str) -> Iterator[None]:
        """Remove the files of a failed save, so that a full disk does not stay full."""
        saving, path = self._saving, self.directory / str(self._saving.step)
        try:
            with checkpoint_errors(path, failure):
                yield
        except BaseException:
            self._saving = None
            saving.resources.close()
            with contextlib.suppress(OSError):  # deleting may fail as well; the first error is raised
                if jax.process_index() == 0 and not (path / COMMITTED).exists():
                    shutil.rmtree(path)
            raise

    def _check_written(self, step: int) -> None:
        """Read back a written checkpoint except the bytes of its arrays. Orbax calls this before it commits.

        Orbax merges the files of all processes into one manifest, and raises no error if there are none.

        Raises:
            CheckpointError: something is missing or different.
        """
        path = self.directory / str(step)
        if not (path / "state" / "manifest.ocdbt").is_file():
            raise CheckpointError(f"{path} could not be written: its arrays are missing; use another --workdir")
        expected = {name: (leaf.shape, leaf.dtype) for name, leaf in self._read_meta(step).leaves.items()}
        with literal_path(self.directory) as directory:
            read = ocp.PyTreeCheckpointHandler().metadata(directory / str(step) / "state").tree
        actual = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in tree.flatten(read).items()}
        if actual != expected:
            differ = [name for name in {**expected, **actual} if actual.get(name) != expected.get(name)]
            raise CheckpointError(
                f"{path} could not be written: {shorten(differ, separator='; ')} can't be read back; use another disk"
            )

    def _prune(self) -> None:
        """Delete old checkpoints, and the rest of killed saves and deletions. The commit file is deleted first."""
        if jax.process_index() != 0:
            return
        steps = self.steps()
        kept = {*steps[-self._keep :], *(step for step in steps if self._keep_every and step % self._keep_every == 0)}
        self._delete(path for step, path in self._step_directories() if step not in kept)

    def delete_after(self, step: int) -> None:
        """Delete the checkpoints of later steps, for a run that goes back to `step`; no save is in progress."""
        if jax.process_index() == 0:
            self._delete(path for later, path in self._step_directories() if later > step)

    def _delete(self, paths: Iterable[Path]) -> None:
        for path in paths:
            with checkpoint_errors(path, "can't be deleted"):
                (path / COMMITTED).unlink(missing_ok=True)
                if _is_checkpoint(path):
                    shutil.rmtree(path)


def _bytes(leaves: Mapping[str, Array | jax.ShapeDtypeStruct]) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values())


def differences(stored: Mapping[str, Leaf], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> list[str]:
    """Return how names, shapes and dtypes of stored leaves differ from the wanted ones; empty if they fit."""
    names = [f"{name} is missing" for name in wanted if name not in stored]
    names += [f"{name} is not in this model" for name in stored if name not in wanted]
    return names + [
        f"{name} is {stored[name]}, not {leaf.dtype}{list(leaf.shape)}"
        for name, leaf in wanted.items()
        if name in stored and (stored[name].shape, stored[name].dtype) != (tuple(leaf.shape), str(leaf.dtype))
    ]


def _leaves(state: TrainState) -> dict[str, Array]:
    """Return leaves by name. Refuse names that may collide on disk: Orbax would keep only one of them, silently."""
    paths = [[tree.name_of([key]) for key in path] for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    bad = ["/".join(path) for path in paths if not all(part and not set(part) & {"/", "."} for part in path)]
    if bad:
        raise CheckpointError(
            f"the state has leaves whose names may collide on disk: {shorten(bad, separator='; ')}; "
            "no part of a name may be empty or contain a slash or a dot"
        )
    return tree.flatten(state)


class _Saving(NamedTuple):
    """A save in progress; `resources` are released at its end."""

    step: int
    writer: ocp.AsyncCheckpointer
    resources: contextlib.ExitStack


def _is_checkpoint(path: Path) -> bool:
    """Whether a directory contains files of a checkpoint, or nothing, as after a kill during its creation.

    Other directories are not deleted.
    """
    has_files = any((path / name).exists() for name in ("_CHECKPOINT_METADATA", "state", "meta"))
    return has_files or (path.is_dir() and not any(path.iterdir()))


def _list_steps(steps: Iterable[int], but: int | None = None) -> str:
    others = [str(step) for step in steps if step != but]
    return f"; there are {', '.join(others)}" if others else "; there is no other"
