"""Save and restore the training state: asynchronous, sharded, strict, verified.

    WORKDIR/checkpoints/run_id                     the run's id, a random number
                        <step>/state/              Orbax arrays, under the names that `tree.flatten` gives the leaves
                               meta/metadata       JSON: step, run, config, tokenizer, every leaf's shape, dtype, digest
                               commit_success.txt  written last: without it the checkpoint is incomplete
                        <step>.damaged-<time>/     a damaged checkpoint that was set aside

Called by the training loop (save, restore), and by evaluate, generate and export (restore_params, meta). `recovery`
chooses the checkpoint when the newest is damaged. Orbax 0.12 writes and reads the bytes. This module adds:

* Orbax recognizes a checkpoint by its directory's name, and its manager caches the list of steps. Here checkpoints are
  written in its commit-file mode, and the list is always read from the disk.
* Orbax restores flipped bits, casts to the requested dtype, and merges colliding names, all silently. Here names,
  shapes and dtypes are compared before reading, and a digest of every leaf after it.
* A new checkpoint is read again, compared with these digests and flushed to the disk before it is committed, and only
  then an older one is deleted. A state with NaN or infinity is not saved.
* After a failed save, Orbax leaves files that make the next save fail. Here each save has its own writer, the files of
  a failed one are removed, and it is tried again.
* Orbax reads a checkpoint from any path. Here the metadata contain the step and the run, which must be those of the
  directory.
"""

import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import orbax.checkpoint as ocp
from flax import traverse_util

from t5like import tree
from t5like.checkpoint import metadata, step_directories
from t5like.checkpoint.agreement import SaveFailed, same_failure
from t5like.checkpoint.digests import describe, examine, not_finite, on_one_cpu, snapshot
from t5like.checkpoint.metadata import History, Meta
from t5like.checkpoint.orbax_adapter import checkpoint_errors, silence_logs
from t5like.checkpoint.saving import NUM_DATA_FILES, Saving, num_bytes
from t5like.checkpoint.state_leaves import differences, leaves_of
from t5like.checkpoint.step_directories import others
from t5like.checkpoint.verification import damaged_leaves
from t5like.config.schema import Config
from t5like.distributed import processes
from t5like.errors import CheckpointError, DamagedCheckpoint, StateNotFinite, printable, shorten
from t5like.io.atomic import replace_file
from t5like.io.paths import literal_path
from t5like.io.storage import is_transient
from t5like.io.strict_json import loads
from t5like.types import Array, TrainState, Tree

RUN_ID = "run_id"  # beside the checkpoints
# Pauses in seconds before a failed operation is tried again: if the storage does not respond, and if it is full,
# read-only or not permitted, where one more try follows because the files of the failed save are gone.
PAUSES, PAUSES_IF_FULL = (0.5, 2.0, 8.0), (0.5,)
TRAINED = ("params/", "opt_state/", "ema/")  # leaves that must be finite
Value = TypeVar("Value")


class Checkpoints:
    """The checkpoints of one run directory. At most one save is in progress; reading never changes the directory."""

    def __init__(
        self, directory: Path, *, keep: int, keep_every: int = 0, on_failed_save: str = "stop", flag: str = "--workdir="
    ):
        """Keep the newest `keep` checkpoints, and permanently those at multiples of `keep_every` steps."""
        silence_logs()
        self.directory = Path(directory).absolute()
        self._keep, self._keep_every, self._continue = keep, keep_every, on_failed_save == "continue"
        self._flag = flag  # with which the user named the run directory, for messages
        self._saving: Saving | None = None
        self._workdir: os.stat_result | None = None  # the run directory, when it was first seen

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints on disk, ascending; a save in progress is not complete."""
        with checkpoint_errors(self.directory, "can't be read"):
            if self._workdir is None and self.directory.parent.exists():
                self._workdir = self.directory.parent.stat()
            return _retry(lambda: step_directories.complete_steps(self.directory))

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

        A step that is already complete on disk is not saved again: its state was restored from there. If the previous
        save has failed, this one is completed before the method returns. Without `history` it is that of a run that
        starts.

        Raises:
            StateNotFinite: a parameter or a part of the optimizer state is NaN or infinite.
            CheckpointError: this save can't start, or the previous one has failed and this one too. With
                `on_failed_save="continue"` that is reported, and nothing is raised.
        """
        rest = config, tokenizer, tokenizer_hash, history or metadata.first_history(config)
        state = state._replace(base=None)  # the run that it was read from has it
        try:
            self._complete()
            self._begin(state, rest)
        except SaveFailed as failure:
            try:
                self._save_again(state, rest, failure)
            except SaveFailed as last:
                if not self._continue:
                    raise
                report(f"{last}; training continues, the next checkpoint is tried in any case")

    def wait(self) -> None:
        """Wait until the save in progress is complete, then delete the checkpoints that need not be kept.

        Raises:
            CheckpointError: the save failed, also when it was tried again, which needs that the arrays of the state
                still exist. Its files are removed, the earlier checkpoints are unchanged.
        """
        saving = self._saving
        try:
            self._complete()
        except SaveFailed as failure:
            self._save_again(saving.state, saving.rest, failure)

    def _save_again(self, state: TrainState, rest: tuple[Config, bytes, str, History], failure: SaveFailed) -> None:
        """Complete a save after a failure, with a bounded number of tries; raises the last failure.

        A failure is the same in all processes, so all of them try again as often.
        """
        for pause in PAUSES if failure.transient else PAUSES_IF_FULL:
            if any(leaf.is_deleted() for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)):
                break  # donated to a later step
            report(f"{failure}; saving again in {pause:g} s")
            time.sleep(pause)
            try:
                self._begin(state, rest)
                self._complete()
                return
            except SaveFailed as again:
                failure = again
        raise failure

    def _begin(self, state: TrainState, rest: tuple[Config, bytes, str, History]) -> None:
        step = int(state.step)
        if step in self.steps():
            return
        leaves = leaves_of(state)
        if on_one_cpu(leaves):  # the thread that writes computes the digests
            described, wrong, leaves = {}, not_finite(leaves), snapshot(leaves)
        else:
            described, wrong = examine(leaves)
        if bad := [name for name in wrong if name.startswith(TRAINED)]:
            newest = self.latest()
            after = "no checkpoint exists" if newest is None else f"the newest checkpoint is that of step {newest}"
            raise StateNotFinite(
                f"the state after step {step} is not finite in {shorten(bad, separator='; ')}; it is not saved, and "
                f"{after}; lower optimizer.learning_rate or raise optimizer.warmup_steps",
                step,
                bad,
            )
        self._check_workdir()
        *saved, history = rest
        meta = Meta(step, self._make_run_id(), *saved, metadata.versions(), described, history)
        self._saving = Saving(self.directory, state, leaves, meta)

    def _complete(self) -> None:
        saving, self._saving = self._saving, None
        if saving is not None:
            self._check_workdir()
            saving.complete()
            self._prune()

    def _check_workdir(self) -> None:
        """Refuse a run directory that was removed, renamed or replaced: it would be made again, without its files.

        Raises:
            CheckpointError: it is not the one of the first save.
        """
        workdir = self.directory.parent
        with checkpoint_errors(workdir, "is not there any more", "the run directory was removed or renamed"):
            if self._workdir is None:
                self.directory.mkdir(parents=True, exist_ok=True)
            now = _retry(workdir.stat)
        self._workdir = self._workdir or now
        if not os.path.samestat(now, self._workdir):
            raise CheckpointError(f"{workdir} was replaced by another directory while the run wrote to it")

    def close(self) -> None:
        """The same as `wait`."""
        self.wait()

    def meta(self, step: int | None = None) -> Meta:
        """Read everything but the arrays, by default of the newest checkpoint.

        Raises:
            DamagedCheckpoint: it is damaged or incomplete.
            CheckpointError: there is no such checkpoint, or its step or run are not those of the directory.
        """
        step = self._check_complete(step)
        path = self.directory / str(step)
        if name := step_directories.missing_file(path):
            raise DamagedCheckpoint(f"{path} is incomplete: it has no file {name}; {self._advice(step)}")
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

    def verify(self, step: int) -> None:
        """Read everything in a checkpoint, without devices, and compare it with the digests.

        Raises:
            CheckpointError: as `meta`; DamagedCheckpoint also if an array is not what was saved.
        """
        self._refuse_damaged(step, damaged_leaves(self.directory / str(step), self.meta(step).leaves))

    def restore(self, abstract_state: TrainState, step: int | None = None) -> TrainState:
        """Read a state onto the given shardings, whatever mesh it was saved from.

        Args:
            abstract_state: leaves are `jax.ShapeDtypeStruct` with shardings.
            step: default: the newest; with several processes all must use the same.

        Raises:
            DamagedCheckpoint: it can't be read, or it is damaged; in all processes if it is in one.
            CheckpointError: there is no such checkpoint, or it does not fit.
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
        with same_failure("reading a checkpoint", step):
            stored = {
                name: leaf
                for name, leaf in self.meta(step).leaves.items()
                if name.startswith(prefix) and not tree.matches(name.removeprefix(prefix), without)
            }
            if unfit := differences(stored, wanted):
                raise CheckpointError(
                    f"{path} does not fit: {shorten(unfit, separator='; ')}; use the config it was saved with"
                )
            with checkpoint_errors(path / "state", "can't be read", self._advice(step), DamagedCheckpoint):
                restored = _retry(lambda: self._read(step, wanted, partial=bool(prefix)))
        self._refuse_damaged(step, [name for name, leaf in describe(restored).items() if leaf != stored[name]])
        return jax.tree.unflatten(jax.tree.structure(abstract), [restored[name] for name in wanted])

    def _read(self, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct], *, partial: bool) -> dict[str, Array]:
        assert all(leaf.sharding is not None for leaf in wanted.values()), (
            "without shardings Orbax uses the mesh of the save"
        )
        arguments = {
            name: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
            for name, leaf in wanted.items()
        }
        largest = max(num_bytes({name: leaf}) for name, leaf in wanted.items())
        # Without Orbax's Checkpointer, which would wait for all processes, also for one that can't read its part.
        handler = ocp.PyTreeCheckpointHandler(
            restore_concurrent_gb=(largest + num_bytes(wanted) // NUM_DATA_FILES + 2**20) / 10**9
        )
        request = ocp.args.PyTreeRestore(tree.nested(wanted), tree.nested(arguments), partial_restore=partial)
        with literal_path(self.directory) as directory:
            restored = handler.restore(directory / str(step) / "state", args=request)
        return traverse_util.flatten_dict(restored, sep="/")

    def _refuse_damaged(self, step: int, names: Sequence[str]) -> None:
        if names:
            raise DamagedCheckpoint(
                f"{self.directory / str(step)} is damaged: what was read is not what was saved in "
                f"{shorten(names, separator='; ')}; {self._advice(step)}"
            )

    def set_aside(self, step: int) -> Path:
        """Rename a damaged checkpoint, so that it is no longer a step, from process 0; return its new path.

        Raises:
            CheckpointError: it can't be renamed.
        """
        path = self.directory / str(step)
        with checkpoint_errors(path, "is damaged and can't be renamed"):
            return step_directories.set_aside(path)

    def _check_complete(self, step: int | None) -> int:
        steps = self.steps()
        refusal = f"{self._flag}{self.directory.parent} holds no complete checkpoint"
        if not steps:
            raise CheckpointError(f"{refusal}; train that run first, or use another one")
        if step is not None and step not in steps:
            raise CheckpointError(f"{refusal} of step {step}{others(steps)}")
        return steps[-1] if step is None else step

    def _read_meta(self, step: int) -> Meta:
        file = self.directory / str(step) / "meta" / "metadata"
        with checkpoint_errors(file, "can't be read", self._advice(step), DamagedCheckpoint):
            values = loads(_retry(file.read_bytes))
        try:
            return metadata.from_dict(values)
        except CheckpointError as error:
            raise type(error)(f"{file} can't be used: {error}; {self._advice(step)}") from None

    def _advice(self, step: int) -> str:
        """Return the advice how to continue without a checkpoint."""
        return f"move {self.directory / str(step)} away to continue from an earlier one{others(self.steps(), but=step)}"

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

    def _prune(self) -> None:
        """Delete old checkpoints; a failure is reported, and they are deleted after a later save."""
        if jax.process_index() != 0:
            return
        steps = self.steps()
        kept = {*steps[-self._keep :], *(step for step in steps if self._keep_every and step % self._keep_every == 0)}
        self._delete(step for step in steps if step not in kept)

    def delete_after(self, step: int) -> None:
        """Delete the checkpoints of later steps, for a run that goes back to `step`; no save is in progress.

        Raises:
            CheckpointError: one can't be deleted: a run that is started again would continue after it.
        """
        if jax.process_index() == 0:
            self._delete((later for later in self.steps() if later > step), required=True)

    def _delete(self, steps: Iterable[int], *, required: bool = False) -> None:
        for step in steps:
            path = self.directory / str(step)
            if path.is_symlink():
                continue
            try:
                with checkpoint_errors(path, "can't be deleted"):
                    _retry(lambda path=path: step_directories.delete(path))
            except CheckpointError as error:
                if required:
                    raise
                report(f"{error}; it is tried again after the next save")


def report(text: str) -> None:
    """Print a line about a checkpoint on standard error, from process 0."""
    if processes.is_primary():
        print(f"t5like: {printable(text, longest=2000)}", file=sys.stderr, flush=True)


def _retry(operation: Callable[[], Value]) -> Value:
    """Call a function again after a pause if the storage does not respond; the last error is raised."""
    for pause in PAUSES:
        try:
            return operation()
        except Exception as error:
            if not is_transient(error):
                raise
        time.sleep(pause)
    return operation()
