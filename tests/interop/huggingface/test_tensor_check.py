"""What an import of a model directory reads, and what it refuses: tensors, heads, sizes, ids that end a text."""

import dataclasses
import functools
import json
import re
import shutil

import numpy as np
import pytest
from test_convert import MODELS, model_directory, tensors_of

from t5like.checkpoint import run_directory
from t5like.data.store import preparation
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.errors import CheckpointError
from t5like.interop.huggingface import eos_ids, safetensors_files, tensor_check
from t5like.interop.huggingface.convert import export_run, import_run


@pytest.fixture(scope="module")
def tokenizer(trained) -> Tokenizer:
    return Tokenizer.load(trained / "tokenizer.model", num_sentinels=20)


def test_an_import_without_any_one_of_its_tensors_is_refused_by_name(tokenizer, tmp_path):
    for family in MODELS:
        source = model_directory(family, tmp_path / family, tokenizer)
        values = tensors_of(source)
        found = safetensors_files.tensors(source)
        for path in source.glob("model*.safetensors*"):
            path.unlink()
        names = {dtype: name for name, dtype in safetensors_files.DTYPES.items()}
        for name in found:
            if re.search(r"(layers|\.h)\.1\.", name):  # the second of two alike
                continue
            rest = {other: value for other, value in values.items() if other != name}
            specs = [safetensors_files.TensorSpec(key, names[value.dtype], value.shape) for key, value in rest.items()]
            safetensors_files.write(source, specs, rest.__getitem__, max_shard_size=10**9)
            with pytest.raises(CheckpointError, match=re.escape(name)) as error:
                list(import_run(source, tmp_path / "run"))
            assert f"the {family} weights lack" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


HEADS = (
    "lm_head.weight must be a copy of shared.weight, but they differ; if the model has both, set tie_word_embeddings to"
)


@pytest.mark.parametrize(
    "family, keys, head, outcome",
    [
        ("t5", {}, None, False),
        ("t5", {"tie_word_embeddings": True}, "same", False),
        ("t5", {"tie_word_embeddings": False}, "other", True),
        ("t5", {"tie_word_embeddings": False}, None, "the t5 weights lack lm_head.weight, but config.json has"),
        ("t5", {}, "other", HEADS),
        ("mt5", {"tie_word_embeddings": True}, "other", HEADS),
        ("mt5", {"transformers_version": "4.57.1"}, "other", HEADS),
        # transformers 5 writes tie_word_embeddings=true whatever it was.
        ("mt5", {"tie_word_embeddings": True, "transformers_version": "5.24.0"}, "other", True),
        ("umt5", {"scale_decoder_outputs": False, "transformers_version": "5.24.0"}, "other", True),
        ("umt5", {"scale_decoder_outputs": True, "transformers_version": "5.24.0"}, "other", HEADS),
        ("llama", {"tie_word_embeddings": False}, None, False),
    ],
)
def test_the_heads_of_a_t5_match_its_config(family, keys, head, outcome, tmp_path):
    values = {"shared.weight": np.ones((4, 2), np.float32)}
    if head:
        values["lm_head.weight"] = np.full((4, 2), 1 + (head == "other"), np.float32)
    specs = [safetensors_files.TensorSpec(name, "F32", value.shape) for name, value in values.items()]
    safetensors_files.write(tmp_path, specs, values.__getitem__, max_shard_size=10**9)
    said = lambda: tensor_check.has_own_head({"model_type": family, **keys}, safetensors_files.tensors(tmp_path))
    if isinstance(outcome, bool):
        assert said() is outcome
    else:
        with pytest.raises(CheckpointError, match=re.escape(outcome)):
            said()


def test_the_next_sentence_head_of_a_bert_matches_its_class():
    pretraining, masked = (
        {"model_type": "bert", "architectures": [f"BertFor{name}"]} for name in ("PreTraining", "MaskedLM")
    )
    head = dict.fromkeys(tensor_check.PAIRS)
    assert tensor_check.has_next_sentence_head(pretraining, head) and tensor_check.has_next_sentence_head(masked, head)
    assert not tensor_check.has_next_sentence_head(masked, {}) and not tensor_check.has_next_sentence_head(
        {"model_type": "bert"}, {}
    )
    with pytest.raises(
        CheckpointError, match=r"the bert weights lack cls\.seq_relationship\.weight, .*BertForPreTraining"
    ):
        tensor_check.has_next_sentence_head(pretraining, {})


@pytest.fixture(scope="module")
def directory_of(tokenizer, tmp_path_factory):
    """A model directory of a family, written once."""
    return functools.cache(lambda family: model_directory(family, tmp_path_factory.mktemp(family) / "in", tokenizer))


@pytest.mark.parametrize(
    "family, changes, complaint",
    [
        ("gpt2", {"vocab_size": 10**12}, "vocab_size is 1,000,000,000,000, but the largest tensor has 32,768 numbers"),
        ("gpt2", {"vocab_size": None}, "vocab_size=None must be at least 400"),
        ("gpt2", {"n_embd": 10**12}, "n_embd=1000000000000 must be a whole number from 1 to 2,147,483,647"),
        ("gpt2", {"n_embd": 10**9}, "model_dim is 1,000,000,000, but the largest tensor has 32,768 numbers"),
        ("gpt2", {"n_positions": 2**31 - 1}, "max_length is 2,147,483,647, but the largest tensor has 32,768 numbers"),
        ("gpt2", {"n_layer": 10**9}, "num_layers is 1,000,000,000, but there are 28 tensors"),
        ("gpt2", {"layer_norm_epsilon": 10**400}, "layer_norm_epsilon=1000000"),
        ("umt5", {"num_decoder_layers": 10**6}, "num_decoder_layers is 1,000,000, but there are"),
        ("umt5", {"relative_attention_num_buckets": 10**9}, "relative_buckets is 1,000,000,000, but the largest"),
        ("umt5", {"d_model": ...}, "d_model=None must be a whole number"),
        ("llama", {"num_attention_heads": ...}, "num_attention_heads=None must be a whole number"),
        ("llama", {"max_position_embeddings": 10**12}, "max_position_embeddings=1000000000000 must be a whole"),
        ("llama", {"model_type": "mamba"}, "model_type='mamba' is not one of t5, mt5, umt5, llama"),
        ("llama", {"model_type": ["llama"]}, "model_type=['llama'] is not one of t5"),
        ("bert", {"intermediate_size": 2**31 - 1}, "mlp_dim is 2,147,483,647, but the largest tensor has"),
        ("bert", {"type_vocab_size": 2**31 - 1}, "token_types is 2,147,483,647, but the largest tensor has"),
        ("llama", {"eos_token_id": "</s>"}, "eos_token_id='</s>' must be a token id, at least 0, or a list of token"),
        ("llama", {"eos_token_id": [1, -5]}, "eos_token_id=[1, -5] must be a token id, at least 0, or a list of"),
        ("llama", {"eos_token_id": True}, "eos_token_id=True must be a token id, at least 0, or a list of token ids"),
    ],
)
def test_a_config_with_larger_sizes_than_the_files_is_refused_before_memory_is_allocated(
    family, changes, complaint, directory_of, tmp_path
):
    source = directory_of(family)
    kept = (source / "config.json").read_text()
    values = {**json.loads(kept), **changes}
    (source / "config.json").write_text(json.dumps({key: x for key, x in values.items() if x is not ...}))
    try:
        with pytest.raises(CheckpointError, match=re.escape(complaint)) as error:
            list(import_run(source, tmp_path / "run"))
    finally:
        (source / "config.json").write_text(kept)
    assert "\n" not in str(error.value) and len(str(error.value)) < 250 and not list(tmp_path.iterdir())


def test_all_eos_ids_are_imported_and_exported(tokenizer, tmp_path):
    source = model_directory("llama", tmp_path / "in", tokenizer)
    hf = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**hf, "eos_token_id": [1, 9, 11]}))
    read = lambda: eos_ids.extra_ids(source, json.loads((source / "config.json").read_text()), tokenizer)
    assert read() == ([9, 11], [])
    for listed, known, unknown in ((7, [7], []), (1, [], []), ([], [], []), ([400, 5, 1, 5, 0], [5, 0], [400])):
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": listed, "other": 3}))
        assert read() == (known, unknown)
    lines = list(import_run(source, tmp_path / "run"))
    assert "           texts also end with 5, 0, by eos_token_id" in lines
    assert "           not in the vocabulary, ignored in eos_token_id: 400" in lines
    config = run_directory.load(tmp_path / "run").config
    assert config.tokenizer.extra_eos_ids == (5, 0)
    list(export_run(tmp_path / "run", tmp_path / "out"))
    for name in ("generation_config.json", "config.json"):  # as they were
        there, here = (json.loads((place / name).read_text()) for place in (tmp_path / "out", source))
        assert there["eos_token_id"] == here["eos_token_id"], name
    shutil.rmtree(tmp_path / "run" / "hf")  # as of a run that began with these weights
    list(export_run(tmp_path / "run", tmp_path / "new"))
    for name in ("generation_config.json", "config.json"):
        assert json.loads((tmp_path / "new" / name).read_text())["eos_token_id"] == [1, 5, 0], name

    # A tokenizer that is trained here does not depend on them. Another config goes on with them, and so does a run that
    # begins with these weights.
    plain = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, extra_eos_ids=()))
    assert preparation._own_tokenizer_path(plain) == preparation._own_tokenizer_path(config)
    run_directory.check_run_directory(plain, tmp_path / "run")
    assert run_directory.with_run_tokenizer(plain, tmp_path / "run").tokenizer == config.tokenizer
    begin = lambda **init: dataclasses.replace(
        plain, init_from=dataclasses.replace(plain.init_from, checkpoint=str(tmp_path / "run"), **init)
    )
    assert run_directory.with_run_tokenizer(begin(), tmp_path / "next").tokenizer == config.tokenizer
    assert (
        run_directory.with_run_tokenizer(begin(adapt=("vocabulary",)), tmp_path / "next").tokenizer == plain.tokenizer
    )
