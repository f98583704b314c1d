"""Verification of a checkpoint on disk: its arrays are read again, and their digests compared with the metadata.

It needs no device, no model and no mesh: one block of an array is in memory at a time, and the digest is computed on
the host, at about 0.6 GB/s. Called by `checkpoints` before a new checkpoint is committed, and thus before an older one
is deleted; by `train.completion` before a run is reported as complete; and by `t5like inspect checkpoint --verify`.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from t5like.checkpoint.digests import Leaf, digest_block
from t5like.io.paths import literal_path

BLOCK_BYTES = 16 * 2**20  # of an array that are read at once, unless one of its chunks is larger


def damaged_leaves(path: Path, leaves: Mapping[str, Leaf]) -> list[str]:
    """Return the names of the leaves whose stored values are not those that were saved, each with the reason.

    Args:
        path: directory of a checkpoint.
        leaves: from its metadata.
    """
    with literal_path(path) as directory:
        context = tensorstore.Context({"file_io_concurrency": {"limit": 4}, "data_copy_concurrency": {"limit": 1}})
        reasons = {name: _damage(directory, name, leaf, context) for name, leaf in leaves.items()}
    return [f"{name} {reason}" for name, reason in reasons.items() if reason]


def _damage(directory: Path, name: str, leaf: Leaf, context: Any) -> str:
    try:
        array = _open(directory, name, context)
        if (tuple(array.shape), array.dtype.name) != (leaf.shape, leaf.dtype):
            return f"is {array.dtype.name}{list(array.shape)}, not {leaf}"
        return "" if _digest(array, leaf.shape) == leaf.digest else "is not what was saved"
    except (ValueError, OSError, RuntimeError, NotImplementedError) as error:  # TensorStore raises all of these
        text = " ".join(str(error).split())
        return f"can't be read ({text if len(text) <= 200 else f'{text[:80]} ... {text[-120:]}'})"


def _open(directory: Path, name: str, context: Any) -> tensorstore.TensorStore:
    store = {"driver": "ocdbt", "base": f"file://{directory}/state", "path": f"{name.replace('/', '.')}/"}
    return tensorstore.open({"driver": "zarr", "kvstore": store}, context=context, open=True, read=True).result()


def _digest(array: tensorstore.TensorStore, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the digest of a stored array, read in blocks of whole chunks: each chunk is decompressed once."""
    chunk = array.chunk_layout.read_chunk.shape or shape
    step = list(chunk)
    for dim in reversed(range(len(shape))):  # chunks that are adjacent in memory first
        others = int(np.prod(step)) // max(step[dim], 1) * array.dtype.numpy_dtype.itemsize
        count = max(BLOCK_BYTES // max(others * max(chunk[dim], 1), 1), 1)
        step[dim] = min(chunk[dim] * count, shape[dim])
    sums = np.zeros(2, np.uint64)
    for offset in itertools.product(
        *(range(0, size, width) if size else () for size, width in zip(shape, step, strict=True))
    ):
        region = tuple(
            slice(start, min(start + width, size)) for start, width, size in zip(offset, step, shape, strict=True)
        )
        sums += np.array(digest_block(array[region].read().result(), offset, shape), np.uint64)
    return int(sums[0] % 2**32), int(sums[1] % 2**32)
