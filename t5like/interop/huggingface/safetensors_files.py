"""safetensors files, read and written one tensor at a time: no framework, no second copy of a model in memory.

A file is eight bytes of length, that many bytes of JSON (name -> dtype, shape, place), and the tensors' bytes; a model
in several files has an index of which tensor lies where (https://huggingface.co/docs/safetensors). Everything in a file
from elsewhere is checked before it is used. PyTorch's own `.bin` files are pickles, which are programs: never opened.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from t5like.errors import CheckpointError
from t5like.io.atomic import atomic_write
from t5like.io.strict_json import InvalidJSON, loads

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {  # those that weights come in; all are exact in float32
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64, "F64": 64}
BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "F32": 32, "F16": 16, "BF16": 16}  # what a file may hold besides weights
LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
LONGEST_JSON = 100_000_000  # bytes of another JSON file


class Tensor(NamedTuple):
    """Where a tensor lies."""

    path: Path
    dtype: str  # safetensors' name of it
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    size: int  # bytes


class Wanted(NamedTuple):
    """A tensor that is to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        CheckpointError: it is absent, too large, or something else.
    """
    try:
        if path.stat().st_size > LONGEST_JSON:
            raise CheckpointError(f"{path} is too large: {path.stat().st_size:,} bytes, the limit is {LONGEST_JSON:,}")
        values = loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from None
    except InvalidJSON as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return values


def tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a model's files, by name; nothing but headers is read.

    Raises:
        CheckpointError: there are no safetensors, or they or their index are damaged.
    """
    if (directory / FILE).is_file():
        return _header(directory / FILE)
    if not (directory / INDEX).is_file():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{directory / pickles[0]} is a pickle, which can run any code when it is opened: it is never read; "
                f"convert it to {FILE} where you trust it (transformers: model.save_pretrained)"
            )
        raise CheckpointError(f"--input={directory} holds no {FILE} and no {INDEX}")
    placed = read_json(directory / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
        raise CheckpointError(f"{directory / INDEX} has no weight_map of file names")
    if not placed:
        raise CheckpointError(f"{directory / INDEX} names nothing; download it again")
    found: dict[str, Tensor] = {}
    for file in sorted(set(placed.values())):
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{directory / INDEX} names {file!r}; a file in this directory, *.safetensors, only")
        if not (directory / file).is_file():
            raise CheckpointError(f"{directory / INDEX} names {file}, which is not there; download it")
        inside = _header(directory / file)
        for name in inside:
            if placed.get(name) != file:
                raise CheckpointError(f"{directory / file} holds {name}, but {INDEX} says {placed.get(name)!r}")
        found |= inside
    if absent := [name for name in placed if name not in found]:
        raise CheckpointError(f"{directory / INDEX} names {absent[0]} in {placed[absent[0]]}, which does not hold it")
    return found


def _header(path: Path) -> dict[str, Tensor]:
    """The tensors of one file: every place checked against its dtype, its shape, its neighbors and the file's end."""
    length = path.stat().st_size
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if length < 8 or size > min(length - 8, LONGEST_HEADER):
            raise CheckpointError(f"{path} is truncated or no safetensors file: {length:,} bytes; download it again")
        try:
            header = loads(file.read(size))
        except InvalidJSON:
            header = None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a damaged header; download it again")
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        try:
            dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            whole = all(type(number) is int and number >= 0 for number in (*shape, start, stop))
            right = whole and math.prod(shape) * BITS[dtype] == (stop - start) * 8
        except (TypeError, KeyError, ValueError):
            right = False
        if not right:
            raise CheckpointError(f"{path}: the header says of {name} what can't be; download it again")
        found[name] = Tensor(path, dtype, shape, 8 + size + start, stop - start)
    end = 8 + size
    for name, tensor in sorted(found.items(), key=lambda item: item[1].start):
        if tensor.start != end and tensor.size:
            raise CheckpointError(f"{path}: {name} does not begin where the tensor before it ends")
        end = max(end, tensor.start + tensor.size)
    if end != length:
        raise CheckpointError(
            f"{path} is truncated or too long: {length:,} bytes, its header says {end:,}; download it again"
        )
    return found


def read(tensor: Tensor) -> np.ndarray:
    """A tensor's values, in its own dtype.

    Raises:
        CheckpointError: the file can't be read, or the dtype is not one of weights.
    """
    if tensor.dtype not in DTYPES:
        raise CheckpointError(f"{tensor.path} has weights of dtype {tensor.dtype}; {', '.join(DTYPES)} can be read")
    array = np.empty(tensor.shape, DTYPES[tensor.dtype])
    try:
        with open(tensor.path, "rb") as file:
            file.seek(tensor.start)
            if file.readinto(array.reshape(-1).view(np.uint8)) != tensor.size:
                raise CheckpointError(f"{tensor.path} is truncated; download it again")
    except OSError as error:
        raise CheckpointError(f"{tensor.path} can't be read: {error.strerror}") from None
    return array


def write(
    directory: Path, wanted: Iterable[Wanted], value: Callable[[str], np.ndarray], *, max_shard_size: int
) -> list[str]:
    """Write tensors into one file, or into several with an index, as transformers names them; the names of the files.

    Args:
        wanted: all tensors, in the order in which they are written.
        value: gives a tensor, in the dtype that is wanted; called once for each, so one at a time has to exist.
        max_shard_size: bytes that a file may have, unless one tensor alone is larger.
    """
    shards: list[list[Wanted]] = [[]]
    for tensor in wanted:
        if shards[-1] and sum(other.size for other in shards[-1]) + tensor.size > max_shard_size:
            shards.append([])
        shards[-1].append(tensor)
    count = len(shards)
    files = [FILE] if count == 1 else [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    for file, shard in zip(files, shards, strict=True):
        _write_file(directory / file, shard, value)
    if count > 1:
        placed = {tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": sum(t.size for shard in shards for t in shard)}, "weight_map": placed}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return files


def _write_file(path: Path, shard: Sequence[Wanted], value: Callable[[str], np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
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
            del array  # before the next one is made
