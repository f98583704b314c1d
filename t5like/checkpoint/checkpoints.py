"""Save and restore the training state: async, sharded, strict, verified. What one checkpoint holds, and which are kept.

    WORKDIR/checkpoints/run_id                     the run's id, a random number
                        <step>/state/              Orbax arrays, under the names that `tree.flatten` gives the leaves
                               meta/metadata       JSON: step, run, config, tokenizer, every leaf's shape, dtype, digest
                               commit_success.txt  written last: without it the checkpoint does not exist

Called by the loops (save, restore), and by evaluate, generate and export (restore_params, meta). When to save, and what
to do about a failure, is theirs. Orbax 0.12 writes and reads the bytes; what it leaves open is closed here:

* It takes a directory's name for a checkpoint, and its manager trusts what it remembers. We write in its commit-file
  mode and read the disk.
* It restores flipped bits, casts to the dtype asked for, and merges colliding names, all silently. We compare names,
  shapes and dtypes before reading, and a digest of every leaf after it.
* A failed save leaves its files behind and spoils the next one. Each save gets its own writer and is cleared away.
* It reads a checkpoint wherever it lies. Metadata name the step and the run, and both must be those of the directory.
"""

import contextlib
import functools
import logging
import re
import secrets
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from flax import traverse_util

from t5like import tree
from t5like.checkpoint import metadata
from t5like.checkpoint.digests import Leaf, describe
from t5like.checkpoint.metadata import Meta
from t5like.config.schema import Config
from t5like.errors import CheckpointError, shorten
from t5like.io.atomic import replace_file
from t5like.io.paths import literal
from t5like.io.strict_json import loads
from t5like.types import Array, TrainState, Tree

COMMITTED = "commit_success.txt"
NEEDED = ("_CHECKPOINT_METADATA", "meta/metadata", "state/_METADATA", "state/manifest.ocdbt")  # in each checkpoint
RUN_ID = "run_id"  # beside the checkpoints
SAVE_SECONDS = 600  # a save that takes longer has failed: storage that hangs must not hang the run
# What TensorStore compresses waits in memory until a file is full (2 GiB by default, which is a second copy of a small
# model), and a chunk is packed and unpacked whole.
SHARE = 16  # a file holds that part of all bytes, and so much is read at once beside the largest array
DATA_FILE = 32 * 2**20, 2 * 2**30  # bytes of a file, at least and at most
CHUNK = 16 * 2**20  # bytes of an array, at most
STEP = re.compile("0|[1-9][0-9]{0,17}")  # names of directories that may be checkpoints


class Checkpoints:
    """The checkpoints of one run directory. At most one save is in flight; a reader never changes the directory."""

    def __init__(self, directory: Path, *, keep: int, keep_every: int = 0):
        """Keep the newest `keep` checkpoints, and for good those at multiples of `keep_every` steps."""
        _silence()
        self.directory = Path(directory).absolute()
        self._keep, self._keep_every = keep, keep_every
        self._saving: _Saving | None = None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints on disk, ascending. A save in flight is not one yet."""
        return sorted(step for step, path in self._numbered() if (path / COMMITTED).exists())

    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        return max(self.steps(), default=None)

    def save(self, state: TrainState, *, config: Config, tokenizer: bytes, tokenizer_hash: str) -> None:
        """Begin to save, and return when the state's arrays have been copied and may be donated.

        A step that is already complete on disk is left as it is: its state was restored from there.

        Raises:
            CheckpointError: the earlier save failed (this one is not begun then), or this one can't begin.
        """
        self.wait()
        step = int(state.step)
        if step in self.steps():
            return
        leaves = _leaves(state)
        run, versions = self._begin_run(), metadata.versions()
        meta = Meta(step, run, config, tokenizer, tokenizer_hash, versions, describe(leaves))
        self._saving = _Saving(step, _writer(partial(self._check_written, step)), contextlib.ExitStack())
        with self._clears_up("can't be written"):
            self.directory.mkdir(parents=True, exist_ok=True)
            directory = self._saving.held.enter_context(literal(self.directory))
            self._saving.writer.save(  # plain dicts: on disk no Optax tuple or empty state shapes the tree
                directory / str(step),
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(
                        tree.nested(leaves),
                        tree.nested({name: ocp.SaveArgs(chunk_byte_size=CHUNK) for name in leaves}),
                        ocdbt_target_data_file_size=min(max(_bytes(leaves) // SHARE, DATA_FILE[0]), DATA_FILE[1]),
                    ),
                    meta=ocp.args.JsonSave(metadata.to_dict(meta)),
                ),
                force=True,  # over what a killed save left
            )

    def wait(self) -> None:
        """Wait until the save in flight is complete, then delete what need not be kept.

        Raises:
            CheckpointError: the save failed; its files are gone, the earlier checkpoints are untouched.
        """
        if self._saving is None:
            return
        with self._clears_up("could not be written"):
            self._saving.writer.close()  # waits
            self._saving.held.close()
        self._saving = None
        self._prune()

    def close(self) -> None:
        """As `wait`."""
        self.wait()

    def meta(self, step: int | None = None) -> Meta:
        """Read everything but the arrays; the latest checkpoint by default.

        Raises:
            CheckpointError: there is no such checkpoint, it is damaged or incomplete, or it is of another step or run
                than its place says.
        """
        step = self._complete(step)
        path = self.directory / str(step)
        for name in NEEDED:
            if not (path / name).is_file():
                raise CheckpointError(f"{path} is incomplete: it has no file {name}; {self._without(step)}")
        meta = self._read_meta(step)
        if meta.step != step:
            raise CheckpointError(
                f"{path} was saved as step {meta.step}, not {step}; rename it to {self.directory / str(meta.step)}, or "
                f"{self._without(step)}"
            )
        run = self._run_id()
        if run and meta.run and meta.run != run:
            raise CheckpointError(
                f"{path} is a checkpoint of another run ({meta.run[:8]}, not {run[:8]}); to begin a run with its "
                f"weights, set --config.init_from.checkpoint to its own run directory; here, {self._without(step)}"
            )
        return meta

    def restore(self, abstract_state: TrainState, step: int | None = None) -> TrainState:
        """Read a state onto today's mesh, whatever mesh it was saved from; the latest by default.

        Args:
            abstract_state: leaves are `jax.ShapeDtypeStruct` with the sharding that they should get.
            step: which one; with several processes all must name the same.

        Raises:
            CheckpointError: there is no such checkpoint, it does not fit, or it can't be read or is damaged.
        """
        return self._restore(abstract_state, step, prefix="")

    def restore_params(
        self, abstract_params: Tree, step: int | None = None, *, ema: bool = False, without: Sequence[str] = ()
    ) -> Tree:
        """Read the parameters alone, or their moving average; nothing else is loaded. Arguments as in `restore`.

        Stored parameters whose name matches a regular expression of `without` are not looked at.
        """
        return self._restore(abstract_params, step, "ema/" if ema else "params/", without)

    def _restore(self, abstract: Tree, step: int | None, prefix: str, without: Sequence[str] = ()) -> Tree:
        step = self._complete(step)
        path = self.directory / str(step)
        wanted = {prefix + name: leaf for name, leaf in tree.flatten(abstract).items()}
        stored = {
            name: leaf
            for name, leaf in self.meta(step).leaves.items()
            if name.startswith(prefix) and not tree.matches(name.removeprefix(prefix), without)
        }
        if found := differences(stored, wanted):
            raise CheckpointError(
                f"{path} does not fit: {shorten(found, separator='; ')}; use the config it was saved with"
            )
        assert all(leaf.sharding is not None for leaf in wanted.values()), "else Orbax takes the mesh of the save"
        arguments = {
            name: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
            for name, leaf in wanted.items()
        }
        largest = max(_bytes({name: leaf}) for name, leaf in wanted.items())
        handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=(largest + _bytes(wanted) // SHARE + 2**20) / 10**9)
        request = ocp.args.PyTreeRestore(tree.nested(wanted), tree.nested(arguments), partial_restore=bool(prefix))
        with (
            _one_line(path / "state", "can't be read", self._without(step)),
            literal(self.directory) as directory,
            ocp.Checkpointer(handler) as reader,
        ):
            restored = traverse_util.flatten_dict(
                reader.restore(directory / str(step) / "state", args=request), sep="/"
            )
        damaged = [name for name, leaf in describe(restored).items() if leaf != stored[name]]
        if damaged:
            raise CheckpointError(
                f"{path} is damaged: what was read is not what was saved in {shorten(damaged, separator='; ')}; "
                f"{self._without(step)}"
            )
        return jax.tree.unflatten(jax.tree.structure(abstract), [restored[name] for name in wanted])

    def _numbered(self) -> list[tuple[int, Path]]:
        with _one_line(self.directory, "can't be read"):
            entries = list(self.directory.iterdir()) if self.directory.exists() else []
        return [(int(path.name), path) for path in entries if STEP.fullmatch(path.name)]

    def _complete(self, step: int | None) -> int:
        steps = self.steps()
        if step is None and not steps:
            raise CheckpointError(f"{self.directory} holds no complete checkpoint; train first, or check --workdir")
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.directory} holds no complete checkpoint of step {step}{_among(steps)}")
        return steps[-1] if step is None else step

    def _read_meta(self, step: int) -> Meta:
        file = self.directory / str(step) / "meta" / "metadata"
        with _one_line(file, "can't be read", self._without(step)):
            values = loads(file.read_bytes())
        try:
            return metadata.from_dict(values)
        except CheckpointError as error:
            raise CheckpointError(f"{file} can't be used: {error}; {self._without(step)}") from None

    def _without(self, step: int) -> str:
        """How to go on without a checkpoint."""
        others = _among(self.steps(), but=step)
        return f"move {self.directory / str(step)} away to go on from an earlier one{others}"

    def _run_id(self) -> str:
        """The id of the run whose checkpoints these are; "" if it has none."""
        path, remedy = self.directory / RUN_ID, "remove it to take the newest checkpoint's"
        with _one_line(path, "can't be read", remedy):
            text = path.read_text(encoding="utf-8").strip() if path.exists() else ""
        if path.exists() and not metadata.RUN.fullmatch(text):
            raise CheckpointError(f"{path} is damaged: it must hold 32 hexadecimal digits; {remedy}")
        return text

    def _begin_run(self) -> str:
        """As `_run_id`; a run without one takes over its newest checkpoint's, or gets a new one."""
        if run := self._run_id():
            return run
        steps = self.steps()
        run = (self.meta(steps[-1]).run if steps else "") or secrets.token_hex(16)
        if jax.process_index() == 0:  # the process that writes metadata
            with _one_line(self.directory / RUN_ID, "can't be written"):
                self.directory.mkdir(parents=True, exist_ok=True)
                replace_file(self.directory / RUN_ID, f"{run}\n")
        return run

    @contextlib.contextmanager
    def _clears_up(self, failure: str) -> Iterator[None]:
        """After a failed save remove its files, so that a full disk does not stay full."""
        saving, path = self._saving, self.directory / str(self._saving.step)
        try:
            with _one_line(path, failure):
                yield
        except BaseException:
            self._saving = None
            saving.held.close()
            with contextlib.suppress(OSError):  # what failed to write may fail to delete too; the first error counts
                if jax.process_index() == 0 and not (path / COMMITTED).exists():
                    shutil.rmtree(path)
            raise

    def _check_written(self, step: int) -> None:
        """Read back what a checkpoint consists of, but for the bytes of the arrays. Orbax asks before it commits.

        It merges what the processes wrote into one manifest, and does not mind if it finds nothing to merge.

        Raises:
            CheckpointError: something is missing, or is not what was to be written.
        """
        path = self.directory / str(step)
        if not (path / "state" / "manifest.ocdbt").is_file():
            raise CheckpointError(f"{path} could not be written: its arrays are not there; use another --workdir")
        want = {name: (leaf.shape, leaf.dtype) for name, leaf in self._read_meta(step).leaves.items()}
        with literal(self.directory) as directory:
            read = ocp.PyTreeCheckpointHandler().metadata(directory / str(step) / "state").tree
        got = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in tree.flatten(read).items()}
        if got != want:
            differ = [name for name in {**want, **got} if got.get(name) != want.get(name)]
            raise CheckpointError(
                f"{path} could not be written: {shorten(differ, separator='; ')} can't be read back; use another disk"
            )

    def _prune(self) -> None:
        """Delete old checkpoints and what killed saves and deletions left. The commit file goes first: see `steps`."""
        if jax.process_index() != 0:
            return
        steps = self.steps()
        kept = {*steps[-self._keep :], *(step for step in steps if self._keep_every and step % self._keep_every == 0)}
        for step, path in self._numbered():
            with _one_line(path, "can't be deleted"):
                if step in steps and step not in kept:
                    (path / COMMITTED).unlink()
                if step not in kept and _is_ours(path):
                    shutil.rmtree(path)


def _bytes(leaves: Mapping[str, Array | jax.ShapeDtypeStruct]) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values())


def differences(stored: Mapping[str, Leaf], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> list[str]:
    """What keeps stored leaves from filling the wanted ones: names, shapes and dtypes; empty if they fit."""
    found = [f"{name} is missing" for name in wanted if name not in stored]
    found += [f"{name} is not in this model" for name in stored if name not in wanted]
    return found + [
        f"{name} is {stored[name]}, not {leaf.dtype}{list(leaf.shape)}"
        for name, leaf in wanted.items()
        if name in stored and (stored[name].shape, stored[name].dtype) != (tuple(leaf.shape), str(leaf.dtype))
    ]


def _leaves(state: TrainState) -> dict[str, Array]:
    """Leaves by name. Refuse names that could meet another's on disk: Orbax would keep one of the two, silently."""
    paths = [[tree.name_of([key]) for key in path] for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    bad = ["/".join(path) for path in paths if not all(part and not set(part) & {"/", "."} for part in path)]
    if bad:
        raise CheckpointError(
            f"the state has leaves that could not be told apart on disk: {shorten(bad, separator='; ')}; "
            "no part of a name may be empty or hold a slash or a dot"
        )
    return tree.flatten(state)


class _Saving(NamedTuple):
    """A save in flight; `held` is let go when it ends."""

    step: int
    writer: ocp.AsyncCheckpointer
    held: contextlib.ExitStack


def _writer(before_commit: Callable[[], None]) -> ocp.AsyncCheckpointer:
    return ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(),
        async_options=ocp.AsyncOptions(
            timeout_secs=SAVE_SECONDS,
            create_directories_asynchronously=False,
            post_finalization_callback=before_commit,  # of the arrays; the commit file is written after it
        ),
        atomicity_options=ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE),
    )


@functools.cache
def _silence() -> None:
    """Drop what Orbax tells besides raising: its log, and reports on coroutines and tasks that a failure orphans.

    Those are told of when they are collected: by the hook for what can't be raised, a warning, or asyncio's log.
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


def _is_ours(path: Path) -> bool:
    """Whether a directory holds what Orbax or we write, or nothing: a kill can fall between making it and filling it.

    A stranger's is not deleted.
    """
    ours = any((path / name).exists() for name in ("_CHECKPOINT_METADATA", "state", "meta"))
    return ours or (path.is_dir() and not any(path.iterdir()))


@contextlib.contextmanager
def _one_line(path: Path, failure: str, remedy: str = "") -> Iterator[None]:
    """Turn what Orbax, TensorStore and the file system raise into one line."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        text = " ".join(str(cause).split()) or type(cause).__name__
        if len(text) > 300:  # TensorStore begins with what it did, and ends with why it could not
            text = f"{text[:100]} ... {text[-200:]}"
        raise CheckpointError(f"{path} {failure}: {text}" + f"; {remedy}" * bool(remedy)) from error


def _among(steps: Iterable[int], but: int | None = None) -> str:
    others = [str(step) for step in steps if step != but]
    return f"; there are {', '.join(others)}" if others else "; there is no other"
