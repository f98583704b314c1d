"""Save and restore the training state: async, sharded, strict, verified. What one checkpoint holds, and which are kept.

    WORKDIR/checkpoints/<step>/state/              Orbax arrays, under the names that `tree.flatten` gives the leaves
                               meta/metadata       JSON: config, tokenizer, versions, every leaf's shape, dtype, digest
                               commit_success.txt  written last: without it the checkpoint does not exist

Called by the loops (save, restore), and by evaluate, generate and export (restore_params, meta). When to save, and what
to do about a failure, is theirs. Orbax 0.12 writes and reads the bytes; what it leaves open is closed here:

* It takes a directory's name for a checkpoint, and its manager trusts what it remembers. We write in its commit-file
  mode and read the disk.
* It restores flipped bits, casts to the dtype asked for, and merges colliding names, all silently. We compare names,
  shapes and dtypes before reading, and a digest of every leaf after it.
* A failed save leaves its files behind and spoils the next one. Each save gets its own writer and is cleared away.
"""

import base64
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

import t5like
from t5like import tree
from t5like.config import Config
from t5like.config_file import from_json, to_json
from t5like.errors import CheckpointError, ConfigError
from t5like.types import Array, TrainState, Tree

FORMAT = 1  # of a checkpoint; a later version reads older numbers and refuses newer ones
COMMITTED = "commit_success.txt"
SAVE_SECONDS = 600  # a save that takes longer has failed: storage that hangs must not hang the run
# What TensorStore compresses waits in memory until a file is full (2 GiB by default, which is a second copy of a small
# model), and a chunk is packed and unpacked whole.
SHARE = 16  # a file holds that part of all bytes, and so much is read at once beside the largest array
DATA_FILE = 32 * 2**20, 2 * 2**30  # bytes of a file, at least and at most
PART = 8 * 2**20  # bytes whose digest is taken at once
CHUNK = 16 * 2**20  # bytes of an array, at most
SHOWN = 5  # differences named in one message


class Leaf(NamedTuple):
    """What is known of a stored array without reading it."""

    shape: tuple[int, ...]
    dtype: str
    digest: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


class Meta(NamedTuple):
    """All of a checkpoint but its arrays."""

    step: int
    config: Config
    tokenizer: bytes
    tokenizer_hash: str
    versions: dict[str, str]
    leaves: dict[str, Leaf]


class Checkpoints:
    """The checkpoints of one run directory. At most one save is in flight; a reader never changes the directory."""

    def __init__(self, directory: Path, *, keep: int, keep_every: int = 0):
        """Keep the newest `keep` checkpoints, and for good those at multiples of `keep_every` steps."""
        _silence()
        path = epath.Path(directory).expanduser()
        self.directory = path if "://" in str(path) else epath.Path(Path(path).absolute())
        self._keep, self._keep_every = keep, keep_every
        self._saving: tuple[int, ocp.AsyncCheckpointer] | None = None

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
        body = {
            "step": step,
            "config": to_json(config),
            "tokenizer": base64.b64encode(tokenizer).decode(),
            "tokenizer_hash": tokenizer_hash,
            "versions": _versions(),
            "leaves": {name: leaf._asdict() for name, leaf in describe(leaves).items()},
        }
        meta = {"format": FORMAT, "sha256": _sha256(body), "body": body}
        self._saving = step, _writer()
        with self._clears_up("can't be written"):
            self._saving[1].save(  # plain dicts: on disk no Optax tuple or empty state shapes the tree
                self.directory / str(step),
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(
                        tree.nested(leaves),
                        tree.nested({name: ocp.SaveArgs(chunk_byte_size=CHUNK) for name in leaves}),
                        ocdbt_target_data_file_size=min(max(_bytes(leaves) // SHARE, DATA_FILE[0]), DATA_FILE[1]),
                    ),
                    meta=ocp.args.JsonSave(meta),
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
            self._saving[1].close()  # waits
        self._saving = None
        self._prune()

    def close(self) -> None:
        """As `wait`."""
        self.wait()

    def meta(self, step: int | None = None) -> Meta:
        """Read everything but the arrays; the latest checkpoint by default."""
        step = self._complete(step)
        body = self._body(step)
        try:
            config = from_json(body["config"])
        except ConfigError as error:
            raise CheckpointError(f"{self.directory / str(step)} has a config that does not fit: {error}") from None
        tokenizer = base64.b64decode(body["tokenizer"])
        return Meta(step, config, tokenizer, body["tokenizer_hash"], body["versions"], _stored(body))

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
            for name, leaf in _stored(self._body(step)).items()
            if name.startswith(prefix) and not tree.matches(name.removeprefix(prefix), without)
        }
        if found := differences(stored, wanted):
            raise CheckpointError(f"{path} does not fit: {_some(found)}; use the config it was saved with")
        assert all(leaf.sharding is not None for leaf in wanted.values()), "else Orbax takes the mesh of the save"
        arguments = {
            name: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
            for name, leaf in wanted.items()
        }
        largest = max(_bytes({name: leaf}) for name, leaf in wanted.items())
        handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=(largest + _bytes(wanted) // SHARE + 2**20) / 10**9)
        request = ocp.args.PyTreeRestore(tree.nested(wanted), tree.nested(arguments), partial_restore=bool(prefix))
        with _one_line(path / "state", "can't be read"), ocp.Checkpointer(handler) as reader:
            restored = traverse_util.flatten_dict(reader.restore(path / "state", args=request), sep="/")
        damaged = [name for name, leaf in describe(restored).items() if leaf != stored[name]]
        if damaged:
            raise CheckpointError(
                f"{path} is damaged: what was read is not what was saved in {_some(damaged)}; "
                f"move it away to go on from an earlier one{_among(self.steps(), but=step)}"
            )
        return jax.tree.unflatten(jax.tree.structure(abstract), [restored[name] for name in wanted])

    def _numbered(self) -> list[tuple[int, epath.Path]]:
        with _one_line(self.directory, "can't be read"):
            entries = list(self.directory.iterdir()) if self.directory.exists() else []
        return [(int(path.name), path) for path in entries if path.name.isdecimal()]

    def _complete(self, step: int | None) -> int:
        steps = self.steps()
        if step is None and not steps:
            raise CheckpointError(f"{self.directory} holds no complete checkpoint; train first, or check --workdir")
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.directory} holds no complete checkpoint of step {step}{_among(steps)}")
        return steps[-1] if step is None else step

    def _body(self, step: int) -> dict[str, Any]:
        path = self.directory / str(step) / "meta" / "metadata"
        with _one_line(path, "can't be read"):
            meta = json.loads(path.read_text())
            if not isinstance(meta, dict) or not isinstance(meta.get("format"), int):
                raise ValueError("not the metadata of a t5like checkpoint")
        if meta["format"] > FORMAT:
            raise CheckpointError(
                f"{path}: format={meta['format']} is newer than {FORMAT}, which t5like "
                f"{t5like.__version__} reads; install a newer t5like"
            )
        if _sha256(meta.get("body")) != meta.get("sha256"):
            raise CheckpointError(
                f"{path} is damaged: its checksum does not match; move {path.parent.parent} away to "
                f"go on from an earlier one{_among(self.steps(), but=step)}"
            )
        return meta["body"]

    @contextlib.contextmanager
    def _clears_up(self, failure: str) -> Iterator[None]:
        """After a failed save remove its files, so that a full disk does not stay full."""
        path = self.directory / str(self._saving[0])
        try:
            with _one_line(path, failure):
                yield
        except BaseException:
            self._saving = None
            with contextlib.suppress(OSError):  # what failed to write may fail to delete too; the first error counts
                if jax.process_index() == 0 and not (path / COMMITTED).exists():
                    path.rmtree(missing_ok=True)
            raise

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
                    path.rmtree()


def describe(leaves: Mapping[str, Array]) -> dict[str, Leaf]:
    """Shape, dtype and digest of each array.

    On one device leaf by leaf: on a CPU a program for all keeps some of every leaf's bits at once, twice the memory.
    """
    if all(len(leaf.sharding.device_set) == 1 for leaf in leaves.values() if isinstance(leaf, jax.Array)):
        digests = {name: jax.device_get(_digest_in_parts(leaf)) for name, leaf in leaves.items()}
    else:
        digests = jax.device_get(_digests(dict(leaves)))
    return {
        name: Leaf(tuple(leaf.shape), str(leaf.dtype), tuple(int(lane) for lane in digests[name]))
        for name, leaf in leaves.items()
    }


@jax.jit
def _digests(leaves: dict[str, Array]) -> dict[str, tuple[Array, Array]]:
    """One program for all leaves: on many CPU devices, programs in flight together can block each other."""
    return {name: digest(leaf) for name, leaf in leaves.items()}


def _bytes(leaves: Mapping[str, Array | jax.ShapeDtypeStruct]) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values())


def _digest_in_parts(x: Array) -> tuple[Array, Array]:
    """As `digest`, of some MB at a time: what a CPU keeps besides would else be twice the largest leaf."""
    rows = max(PART // max(x.nbytes // max(x.shape[0], 1), 1), 1) if x.ndim else 1
    if not x.ndim or x.shape[0] <= rows:
        return digest(x)
    sums = (0, 0)
    for begin in range(0, x.shape[0], rows):
        part = jax.lax.dynamic_slice_in_dim(x, begin, min(rows, x.shape[0] - begin))
        lanes = jax.device_get(digest(part, np.uint32(begin)))  # waits: else all parts are there at once
        sums = tuple((total + int(lane)) % 2**32 for total, lane in zip(sums, lanes, strict=True))
    return sums


@jax.jit
def digest(x: Array, first: Array | int = 0) -> tuple[Array, Array]:
    """Two uint32 that change with any element's bits or place, and not with the sharding.

    Each lane is the wrapping sum of ``mix(bits ^ key(index))``, where mix is MurmurHash3's 32-bit finalizer. That is a
    bijection, so one changed element always shows. `first` is the place of x's first row in a larger array.
    """
    bits = (
        x.astype(jnp.uint32)
        if x.dtype == bool
        else jax.lax.bitcast_convert_type(
            x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
        ).astype(jnp.uint32)
    )
    index = jnp.zeros(bits.shape, jnp.uint32)
    for dim, size in enumerate(bits.shape):
        place = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim)
        index = index * np.uint32(size % 2**32) + (place if dim else place + jnp.uint32(first))

    def lane(key: int) -> Array:
        mixed = bits ^ (index * np.uint32(key) + np.uint32(key >> 1))
        mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
        mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
        return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)

    return lane(0x9E3779B1), lane(0x7FEB352D)


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
            f"the state has leaves that could not be told apart on disk: {_some(bad)}; "
            "no part of a name may be empty or hold a slash or a dot"
        )
    return tree.flatten(state)


def _stored(body: Mapping[str, Any]) -> dict[str, Leaf]:
    return {
        name: Leaf(tuple(leaf["shape"]), leaf["dtype"], tuple(leaf["digest"])) for name, leaf in body["leaves"].items()
    }


def _sha256(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


@functools.cache
def _versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "t5like": t5like.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def _writer() -> ocp.AsyncCheckpointer:
    return ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(),
        async_options=ocp.AsyncOptions(timeout_secs=SAVE_SECONDS, create_directories_asynchronously=False),
        atomicity_options=ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE),
    )


@functools.cache
def _silence() -> None:
    """Drop what Orbax tells besides raising: its log, and pages of tracebacks of the tasks that a failure orphans."""
    logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())
    report = sys.unraisablehook
    sys.unraisablehook = lambda event: None if str(event.exc_value) == "Event loop is closed" else report(event)


def _is_ours(path: epath.Path) -> bool:
    """Whether a directory holds what Orbax or we write, or nothing: a kill can fall between making it and filling it.

    A stranger's is not deleted.
    """
    ours = any((path / name).exists() for name in ("_CHECKPOINT_METADATA", "state", "meta"))
    return ours or (path.is_dir() and not any(path.iterdir()))


@contextlib.contextmanager
def _one_line(path: epath.Path, failure: str) -> Iterator[None]:
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
        raise CheckpointError(f"{path} {failure}: {text}") from error


def _some(items: Iterable[str]) -> str:
    items = list(items)
    more = f"; and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return "; ".join(items[:SHOWN]) + more


def _among(steps: Iterable[int], but: int | None = None) -> str:
    others = [str(step) for step in steps if step != but]
    return f"; there are {', '.join(others)}" if others else "; there is no other"
