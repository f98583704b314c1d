"""The files of a T5X checkpoint.

A T5X checkpoint is a directory `checkpoint_<step>` (google-research/t5x, `t5x/checkpoints.py`, version 3):

    checkpoint                          msgpack, as `flax.serialization` writes it: {"version", "optimizer": {"target":
                                        parameters, "state": ...}}. A leaf is an array, or a reference to one: a
                                        TensorStore spec (a dict), or "PLACEHOLDER://NAME"
    target.encoder.encoder_norm.scale/  a zarr array, such as NAME above

Only the parameters are read, one array at a time. The files are not trusted: of a spec only the array's name is used,
which must be a directory in the checkpoint, and no content is executed or causes access to other paths. Called by
`t5x`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import msgpack
import numpy as np
import tensorstore

from t5like.errors import CheckpointError, UserError, one_line

VERSION = 3  # the newest of T5X (June 2021)
MAX_LEAF_BYTES = 2**31 - 1  # of an array in the index; flax splits larger ones
MAX_CHUNK_BYTES = 2**31  # of a zarr chunk, which is read at once; T5X writes chunks of 64 MiB
DTYPES = ("float32", "bfloat16", "float16")  # all are exact in float32
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")  # of an array's directory


def read_index(directory: Path) -> dict[str, Any]:
    """The parameters of a checkpoint by name: each an array, or the name of its zarr array.

    Raises:
        CheckpointError: the directory has no T5X checkpoint, or a damaged one.
    """
    path = directory / "checkpoint"
    try:
        if not path.is_file():
            raise CheckpointError(
                f"--input={directory} has no file `checkpoint`; use the directory checkpoint_<step> of T5X"
            )
        with open(path, "rb") as file:
            if file.read(21) == b"model_checkpoint_path":
                raise CheckpointError(f"{path} is a TensorFlow checkpoint, not one of T5X; convert it with T5X first")
            file.seek(0)
            target = _target(file)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from None
    except UserError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged or not a T5X checkpoint: {one_line(error) or type(error).__name__}"
        ) from None
    if not isinstance(target, dict):
        raise CheckpointError(
            f"{path} has no optimizer/target, the parameters of a T5X checkpoint; use a checkpoint of T5X"
        )
    return _flatten(target, path)


def _target(file: BinaryIO) -> Any:
    """optimizer/target of an index; the optimizer's state is skipped.

    msgpack only creates dicts, lists, strings, numbers and bytes. `_extension` decodes arrays, and not flax, which
    accepts any dtype.
    """
    unpacker = msgpack.Unpacker(
        file, raw=False, strict_map_key=True, ext_hook=_extension, max_buffer_size=MAX_LEAF_BYTES
    )
    target = None
    for _ in range(unpacker.read_map_header()):
        if (key := unpacker.unpack()) == "optimizer":
            for _ in range(unpacker.read_map_header()):
                if unpacker.unpack() == "target":
                    target = unpacker.unpack()
                else:
                    unpacker.skip()
        elif key == "version" and (version := unpacker.unpack()) > VERSION:
            raise CheckpointError(f"the T5X checkpoint has version={version}; up to {VERSION} can be read")
        elif key != "version":
            unpacker.skip()
    return target


def _extension(code: int, data: bytes) -> Any:
    """An array (1) or scalar (3) of `flax.serialization`: msgpack of shape, dtype's name, bytes."""
    if code not in (1, 3):
        raise ValueError(f"msgpack extension {code}, not an array")
    shape, name, buffer = msgpack.unpackb(data, raw=True)
    dtype = name.decode()
    if not re.fullmatch(r"(bfloat16|float(16|32|64)|u?int(8|16|32|64)|bool)", dtype):
        raise ValueError(f"an array of dtype {dtype!r}")
    scalar = jnp.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    return np.frombuffer(buffer, scalar).reshape([int(size) for size in shape])


def _flatten(values: Mapping, path: Path, prefix: str = "") -> dict[str, Any]:
    """Leaves by slash-joined name: arrays, or the names of referenced arrays."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if (
            isinstance(value, dict) and "kvstore" in value
        ):  # a TensorStore spec; older ones have the path outside of kvstore
            store = value["kvstore"] if isinstance(value["kvstore"], dict) else {}
            leaves[name] = _directory_name(store.get("path", value.get("path")), name, path)
        elif isinstance(value, dict) and "__msgpack_chunked_array__" in value:
            leaves[name] = _concatenate(value, name, path)
        elif isinstance(value, dict):
            leaves |= _flatten(value, path, f"{name}/")
        elif isinstance(value, str):
            leaves[name] = _directory_name(value.removeprefix("PLACEHOLDER://"), name, path)
        elif isinstance(value, np.ndarray):
            leaves[name] = value
        elif value is not None:
            raise CheckpointError(
                f"{path}: target/{name} is a {type(value).__name__}, not an array; copy the checkpoint again"
            )
    return leaves


def _concatenate(value: Mapping, name: str, path: Path) -> np.ndarray:
    """An array that flax has split into flat parts: {"shape": {"0": ..}, "chunks": {"0": array, ..}}."""
    try:
        parts = [value["chunks"].pop(str(index)) for index in range(len(value["chunks"]))]
        return np.concatenate(parts).reshape([value["shape"][str(dim)] for dim in range(len(value["shape"]))])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(
            f"{path}: target/{name} has parts that do not form an array; copy the checkpoint again"
        ) from None


def _directory_name(value: Any, name: str, path: Path) -> str:
    directory = value.rstrip("/") if isinstance(value, str) else ""
    if not NAME.fullmatch(directory):
        raise CheckpointError(f"{path}: target/{name} is in {value!r}, which is not a directory of the checkpoint")
    return directory


class StoredArray:
    """One array of a checkpoint: its shape and dtype; `read` returns its values."""

    def __init__(self, directory: Path, name: str, leaf: np.ndarray | str):
        """Open the array without reading its values.

        Raises:
            CheckpointError: the array is missing, damaged, or has an unsupported dtype.
        """
        self.name, self._leaf = name, leaf
        if isinstance(leaf, str):
            array_directory = directory / leaf
            if not (array_directory / ".zarray").is_file():
                raise CheckpointError(f"{array_directory} is missing or not a zarr array; copy the complete checkpoint")
            spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{array_directory.absolute()}/"}}
            try:
                self._leaf = tensorstore.open(spec, open=True, read=True).result()
            except Exception as error:
                raise CheckpointError(
                    f"{array_directory} can't be read: {one_line(error) or type(error).__name__}"
                ) from None
            chunk = self._leaf.chunk_layout.read_chunk.shape
            bytes_ = int(np.prod(chunk, dtype=float)) * self._leaf.dtype.numpy_dtype.itemsize
            if bytes_ > MAX_CHUNK_BYTES or any(
                part > max(size, 1) for part, size in zip(chunk, self.shape, strict=True)
            ):
                raise CheckpointError(f"{array_directory} has chunks of {list(chunk)}, which are too large")
        if self.dtype not in DTYPES:
            raise CheckpointError(f"target/{name} has dtype {self.dtype}; {', '.join(DTYPES)} can be read")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._leaf.shape)

    @property
    def dtype(self) -> str:
        dtype = self._leaf.dtype
        return dtype.name if isinstance(self._leaf, np.ndarray) else dtype.numpy_dtype.name

    def read(self) -> np.ndarray:
        """All values, in the stored dtype."""
        if isinstance(self._leaf, np.ndarray):
            return self._leaf
        try:
            return self._leaf.read().result()
        except Exception as error:
            raise CheckpointError(
                f"target/{self.name} can't be read: {one_line(error) or type(error).__name__}"
            ) from None
