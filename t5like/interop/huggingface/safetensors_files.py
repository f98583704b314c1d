"""safetensors files of a model, read and written one tensor at a time, so that memory never holds a second copy.

The safetensors library reads and checks the files (https://huggingface.co/docs/safetensors). A model in several files
has an index that maps each tensor to its file; the index is checked here. The writer is t5like's own, because the
library's writer needs all tensors of a file in memory. PyTorch's `.bin` files are pickles, which can execute code: they
are never opened.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from t5like.errors import CheckpointError
from t5like.io.atomic import atomic_write
from t5like.io.strict_json import InvalidJSON, loads

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {  # supported dtypes of weights; all are exact in float32
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
MAX_JSON_BYTES = 100_000_000


class Tensor(NamedTuple):
    """A tensor in a file; its values are not read yet."""

    name: str
    path: Path
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]


class TensorSpec(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file is absent, too large, or not a JSON object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path} is too large: {path.stat().st_size:,} bytes, the limit is {MAX_JSON_BYTES:,}"
            )
        values = loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from None
    except InvalidJSON as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must contain a JSON object, not {type(values).__name__}")
    return values


def tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a model's files, by name. Only the headers are read.

    Raises:
        CheckpointError: there are no safetensors files, or a file or the index is damaged.
    """
    if (directory / FILE).is_file():
        return header(directory / FILE)
    if not (directory / INDEX).is_file():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{directory / pickles[0]} is a pickle, which can run any code when it is opened: t5like never reads "
                f"it; if you trust it, convert it to {FILE} (transformers: model.save_pretrained)"
            )
        raise CheckpointError(f"--input={directory} contains neither {FILE} nor {INDEX}")
    file_of = read_json(directory / INDEX).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(name, str) for name in file_of.values()):
        raise CheckpointError(f"{directory / INDEX} has no weight_map of file names")
    if not file_of:
        raise CheckpointError(f"{directory / INDEX} names no tensors; download it again")
    tensors_by_name: dict[str, Tensor] = {}
    for file in sorted(set(file_of.values())):
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{directory / INDEX} names {file!r}, which must be a file in this directory, *.safetensors"
            )
        if not (directory / file).is_file():
            raise CheckpointError(f"{directory / INDEX} names {file}, which does not exist; download it")
        in_file = header(directory / file)
        for name in in_file:
            if file_of.get(name) != file:
                raise CheckpointError(f"{directory / file} contains {name}, but {INDEX} names {file_of.get(name)!r}")
        tensors_by_name |= in_file
    if absent := [name for name in file_of if name not in tensors_by_name]:
        raise CheckpointError(
            f"{directory / INDEX} names {absent[0]} in {file_of[absent[0]]}, which does not contain it"
        )
    return tensors_by_name


def header(path: Path) -> dict[str, Tensor]:
    """The tensors of one file. The library checks dtypes, shapes and offsets, and that they cover the file exactly."""
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return {
                name: Tensor(name, path, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None


def read(tensor: Tensor) -> np.ndarray:
    """A tensor's values, in its own dtype.

    Raises:
        CheckpointError: the file can't be read, or the dtype is not in `DTYPES`.
    """
    if tensor.dtype not in DTYPES:
        raise CheckpointError(f"{tensor.path} has weights of dtype {tensor.dtype}; {', '.join(DTYPES)} can be read")
    try:
        with safe_open(tensor.path, framework="np") as file:
            return file.get_tensor(tensor.name)
    except (SafetensorError, OSError) as error:
        raise _unreadable(tensor.path, error) from None


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())
    return CheckpointError(f"{path} is truncated, damaged or no safetensors file: {reason}; download it again")


def write(
    directory: Path, specs: Iterable[TensorSpec], value: Callable[[str], np.ndarray], *, max_shard_size: int
) -> list[str]:
    """Write tensors into one file, or into several with an index, and return the file names, as transformers has them.

    Args:
        specs: all tensors, in the order in which they are written.
        value: returns a tensor, in the dtype of its spec; called once for each, so that one at a time is in memory.
        max_shard_size: bytes that a file may have, unless one tensor alone is larger.
    """
    shards: list[list[TensorSpec]] = [[]]
    for tensor in specs:
        if shards[-1] and sum(other.size for other in shards[-1]) + tensor.size > max_shard_size:
            shards.append([])
        shards[-1].append(tensor)
    count = len(shards)
    files = [FILE] if count == 1 else [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    for file, shard in zip(files, shards, strict=True):
        write_file(directory / file, shard, value)
    if count > 1:
        file_of = {tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": sum(t.size for shard in shards for t in shard)}, "weight_map": file_of}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return files


def write_file(path: Path, shard: Sequence[TensorSpec], value: Callable[[str], np.ndarray]) -> None:
    """Write one file; arguments as in `write`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    end = 0
    for tensor in shard:
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [end, end + tensor.size]}
        end += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in shard:
            array = np.ascontiguousarray(value(tensor.name))
            assert (array.shape, array.dtype) == (tensor.shape, DTYPES[tensor.dtype]), tensor
            file.write(array.reshape(-1).view(np.uint8))
            del array  # before the next one is computed
