"""Files of a model directory from elsewhere: none outside of it is read, and none with NaN becomes a run."""

import os
import shutil

import numpy as np
import pytest
from conftest import contents
from test_convert import model_directory, tensors_of
from test_convert import tokenizer as tokenizer  # the fixture

from t5like.errors import CheckpointError
from t5like.interop.huggingface import safetensors_files, side_files
from t5like.interop.huggingface.convert import import_run


@pytest.fixture
def source(tokenizer, tmp_path):
    return model_directory("llama", tmp_path / "in", tokenizer)


@pytest.mark.parametrize("name", ["special_tokens_map.json", "chat_template.jinja", "config.json", "spiece.model"])
def test_a_link_to_a_file_of_this_machine_is_refused_and_nothing_is_copied(source, tmp_path, name):
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match=f"{name} is a link to .*/secret, outside of the model's directory"):
        list(import_run(source, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_links_in_weights_and_links_that_lead_out_by_a_directory_are_refused(source, tmp_path):
    weights = next(source.glob("*.safetensors"))
    (tmp_path / "elsewhere").mkdir()
    weights.rename(tmp_path / "elsewhere" / weights.name)
    (source / "inside").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    weights.symlink_to(source / "inside" / weights.name)
    with pytest.raises(CheckpointError, match="is a link to .*/elsewhere/"):
        side_files.check_files(source)


def test_a_pipe_in_the_place_of_a_file_is_refused_instead_of_waited_for(source):
    (source / "generation_config.json").unlink(missing_ok=True)
    os.mkfifo(source / "generation_config.json")
    with pytest.raises(CheckpointError, match="generation_config.json is not a regular file"):
        side_files.check_files(source)


def test_the_links_of_the_hugging_face_cache_are_read(source, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1f"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert any("imported" in line for line in import_run(snapshot, tmp_path / "run"))


def test_only_files_of_known_names_are_kept(source, tmp_path):
    (source / "notes.json").write_text("{}")
    (source / "merges.txt").write_text("a b\n")
    list(import_run(source, tmp_path / "run"))
    kept = {path.name for path in (tmp_path / "run" / "hf").iterdir()}
    assert (
        "merges.txt" in kept and "notes.json" not in kept and kept - {side_files.RECORD} <= set(side_files.KEPT_FILES)
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(source, tmp_path, value):
    arrays = tensors_of(source)
    name = sorted(arrays)[-1]
    arrays[name] = arrays[name].copy()
    arrays[name].reshape(-1)[-1] = value
    for path in source.glob("*.safetensors*"):
        path.unlink()
    specs = [safetensors_files.TensorSpec(each, "BF16", array.shape) for each, array in arrays.items()]
    safetensors_files.write(source, specs, arrays.__getitem__, max_shard_size=10**9)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: the weights {name} have NaN or infinity") as error:
        list(import_run(source, tmp_path / "run"))
    assert "\n" not in str(error.value) and contents(tmp_path) == before
