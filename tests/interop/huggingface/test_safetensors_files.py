"""safetensors files compared with the safetensors library; damaged files."""

import json
import struct
import weakref

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from t5like.errors import CheckpointError
from t5like.interop.huggingface import safetensors_files
from t5like.interop.huggingface.safetensors_files import TensorSpec


def values(rng) -> dict[str, np.ndarray]:
    made = {name: rng.normal(size=(3, 4)) for name in ("a", "b", "c")}
    kinds = {"a": np.float32, "b": np.float16, "c": ml_dtypes.bfloat16}
    return {name: made[name].astype(kinds[name]) for name in made} | {"empty": np.zeros((0, 2), np.float32)}


def specs(values) -> list[TensorSpec]:
    names = {dtype: name for name, dtype in safetensors_files.DTYPES.items()}
    return [TensorSpec(name, names[value.dtype], value.shape) for name, value in values.items()]


def test_the_safetensors_library_reads_what_is_written_and_its_files_are_read(rng, tmp_path):
    given = values(rng)
    assert safetensors_files.write(tmp_path, specs(given), given.__getitem__, max_shard_size=10**9) == [
        "model.safetensors"
    ]
    by_library = load_file(tmp_path / "model.safetensors")
    by_t5like = {name: safetensors_files.read(tensor) for name, tensor in safetensors_files.tensors(tmp_path).items()}
    save_file(given, tmp_path / "model.safetensors")
    from_library = {
        name: safetensors_files.read(tensor) for name, tensor in safetensors_files.tensors(tmp_path).items()
    }
    for read in (by_library, by_t5like, from_library):
        assert read.keys() == given.keys()
        for name in given:
            np.testing.assert_array_equal(read[name], given[name], strict=True)


def test_a_large_model_is_written_in_parts_with_an_index(rng, tmp_path):
    given = values(rng)
    files = safetensors_files.write(tmp_path, specs(given), given.__getitem__, max_shard_size=60)
    assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads((tmp_path / safetensors_files.INDEX).read_text())
    assert index["weight_map"] == {"a": files[0], "b": files[1], "c": files[1], "empty": files[1]}
    assert index["metadata"]["total_size"] == 48 + 24 + 24
    for name, tensor in safetensors_files.tensors(tmp_path).items():
        np.testing.assert_array_equal(safetensors_files.read(tensor), given[name], strict=True)


def test_one_tensor_at_a_time_is_in_memory_while_a_file_is_written(rng, tmp_path):
    given, alive = values(rng), []

    def value(name):
        assert not any(reference() is not None for reference in alive)
        array = given[name].copy()
        alive.append(weakref.ref(array))
        return array

    safetensors_files.write(tmp_path, specs(given), value, max_shard_size=60)
    assert len(alive) == len(given)


def file_of(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"\x01\x02", "header too small"),
        (struct.pack("<Q", 2**60) + b"{}", "header too large"),
        (file_of(b"[1]"), "invalid JSON in header"),
        (file_of(b'{"a": 1}'), "invalid JSON in header"),
        (file_of({"a": entry()}, b"\0" * 4), "file not fully covered"),
        (file_of({"a": entry()}, b"\0" * 12), "file not fully covered"),
        (file_of({"a": entry(shape=(3,))}, b"\0" * 8), "invalid shape, data type, or offset"),
        (file_of({"a": entry(shape=(-1, -2))}, b"\0" * 8), "invalid value: integer `-1`"),
        (file_of({"a": entry(dtype="X9")}, b"\0" * 8), "unknown variant `X9`"),
        (file_of({"a": entry(offsets=(8, 16))}, b"\0" * 16), "invalid offset for tensor `a`"),
        (file_of({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12), "invalid offset for tensor `b`"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, content, complaint):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        safetensors_files.tensors(tmp_path)
    assert complaint in str(error.value) and "truncated, damaged or no safetensors" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "placed, complaint",
    [
        ({"a": "../model.safetensors"}, "names '../model.safetensors', which must be a file in this directory"),
        ({"a": "/etc/passwd"}, "must be a file in this directory"),
        ({"a": "b.safetensors"}, "names b.safetensors, which does not exist"),
        ({"a": "one.safetensors", "z": "one.safetensors"}, "names z in one.safetensors, which does not contain it"),
        ({}, "names no tensors"),
        ({"b": "one.safetensors"}, "contains a, but"),
        (["a"], "has no weight_map"),
    ],
)
def test_an_invalid_index_is_refused(tmp_path, placed, complaint):
    (tmp_path / "one.safetensors").write_bytes(file_of({"a": entry()}, b"\0" * 8))
    (tmp_path / safetensors_files.INDEX).write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(CheckpointError) as error:
        safetensors_files.tensors(tmp_path)
    assert complaint in str(error.value)


def test_a_pickle_an_empty_directory_and_an_unsupported_dtype_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="contains neither model.safetensors"):
        safetensors_files.tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="a pickle, which can run any code"):
        safetensors_files.tensors(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(file_of({"a": entry("I32")}, b"\0" * 8))
    with pytest.raises(CheckpointError, match="dtype I32; F32, F16, BF16"):
        safetensors_files.read(safetensors_files.tensors(tmp_path)["a"])
