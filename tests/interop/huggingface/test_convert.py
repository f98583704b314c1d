"""Import and export of model directories: there and back bit for bit, and what is refused leaves nothing behind."""

import dataclasses
import json
import os
import shutil
import signal
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import contents, small

from t5like import tree
from t5like.checkpoint import run_directory
from t5like.config import loader
from t5like.config.schema import Config
from t5like.data import pipeline
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.errors import CheckpointError, ConfigError
from t5like.interop.huggingface import convert, families, safetensors_files, tokenizer_files, weight_maps
from t5like.interop.huggingface.convert import export_run, import_run
from t5like.optim import train_state
from t5like.sharding import auto
from t5like.sharding import mesh as meshes
from t5like.types import TrainState

IDS = {"vocab_size": 400, "num_sentinels": 20}
DECODER = {"architecture": "decoder", "scale_attention": True, "init": "gpt2", "num_layers": 2}
WINDOWS = {"num_layers": 2, "layer_pattern": ("local", "global"), "attention_window": 6}
MODELS = {
    "llama": {**DECODER, "positions": "rotary", "mlp": "gated_silu", "num_kv_heads": 2},
    "gpt2": {
        **DECODER,
        "positions": "learned",
        "norm": "layer",
        "biases": True,
        "mlp": "gelu",
        "tied_embeddings": True,
    },
    "umt5": {"relative_bias": "per_layer", "num_layers": 1},
    "modernbert": {**families.FIXED["modernbert"], "num_layers": 2, "mlp": "gated_gelu_exact", "norm_bias": False},
    "eurobert": {**families.FIXED["eurobert"], "num_layers": 1, "num_kv_heads": 1, "mlp": "gated_silu"},
    "gemma2": {**families.FIXED["gemma2"], **WINDOWS, "attention_softcap": 50.0, "attention_scale_dim": 12},
    "gemma3_text": {**families.FIXED["gemma3_text"], **WINDOWS, "rotary": {"local_base": 100.0}},
    "t5gemma": {**families.FIXED["t5gemma"], "num_layers": 1, "decoder_model_dim": 16, "tied_embeddings": True},
    "t5gemma2": {
        **families.FIXED["t5gemma2"],
        **WINDOWS,
        "encoder_window": 3,
        "encoder_window_ahead": 4,
        "rotary": {"local_base": 100.0},
    },
    "bert": {**families.FIXED["bert"], "num_layers": 1, "mlp": "gelu_exact", "token_types": 2, "init": "bert"},
}


@pytest.fixture(scope="module")
def tokenizer(trained) -> Tokenizer:
    return Tokenizer.load(trained / "tokenizer.model", num_sentinels=20)


def config_of(family: str) -> Config:
    return small(model={"vocab_multiple": 1, **MODELS[family]}, tokenizer=IDS)


def model_directory(family: str, place: Path, tokenizer: Tokenizer, dtype: str = "BF16", rows: int = 400) -> Path:
    """A directory of random weights of a family, in several files, as somebody else might have written it."""
    config = config_of(family)
    shape = jax.eval_shape(lambda: train_state.init_params(config, pipeline.spec(config), jax.random.key(0)))
    shapes = {name.removesuffix("/value"): leaf for name, leaf in tree.flatten(shape).items()}
    table = weight_maps.weight_map(family, config.model)
    wanted = {name: weight_maps.shape_of(row, shapes) for row in table for name, _ in row.names()}
    vocabulary = {row.hf_name for row in table if row.vocabulary}
    wanted = {name: (rows, *shape[1:]) if name in vocabulary else shape for name, shape in wanted.items()}
    rng = np.random.default_rng(0)
    random = {name: rng.normal(size=shape).astype(safetensors_files.DTYPES[dtype]) for name, shape in wanted.items()}
    place.mkdir(parents=True)
    tensors = [safetensors_files.TensorSpec(name, dtype, value.shape) for name, value in random.items()]
    safetensors_files.write(place, tensors, random.__getitem__, max_shard_size=40_000)
    hf = families.config_of(family, config, rows=rows, eos=1, pad=0, dtype="bfloat16")
    (place / "config.json").write_text(json.dumps({**hf, "auto_map": {"AutoModel": "evil.Model"}, "kept": 7}))
    tokenizer_files.write(tokenizer, place, family=family, max_length=64)
    return place


def tensors_of(place: Path) -> dict[str, np.ndarray]:
    return {name: safetensors_files.read(tensor) for name, tensor in safetensors_files.tensors(place).items()}


def assert_same_tensors(one: Path, other: Path) -> None:
    left, right = tensors_of(one), tensors_of(other)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], strict=True)


@pytest.mark.parametrize(
    "family, dtype",
    [
        ("llama", "BF16"),
        ("gpt2", "F16"),
        ("umt5", "F32"),
        ("bert", "BF16"),
        ("modernbert", "F32"),
        ("eurobert", "BF16"),
        ("gemma2", "BF16"),
        ("gemma3_text", "F32"),
        ("t5gemma", "BF16"),
        ("t5gemma2", "F16"),
    ],
)
def test_an_export_of_an_import_has_the_same_tensors_bit_for_bit_and_the_same_settings(
    family, dtype, tokenizer, tmp_path
):
    rows = 405 if family != "llama" else 400
    source = model_directory(family, tmp_path / "in", tokenizer, dtype, rows)
    lines = list(import_run(source, tmp_path / "run"))
    assert f"tokenizer  400 ids for {rows} rows" in lines
    assert ("t5like embed" if "bert" in family else "t5like generate") in lines[-1]
    imported = loader.load(tmp_path / "run" / "config.json").model
    assert families.numeric_fields(imported) == families.numeric_fields(config_of(family).model)
    lines = list(export_run(tmp_path / "run", tmp_path / "out", max_shard_size=30_000))
    assert_same_tensors(source, tmp_path / "out")
    wanted = json.loads((source / "config.json").read_text())
    del wanted["auto_map"]
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == wanted
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert ((tmp_path / "out" / "generation_config.json").exists()) == ("bert" not in family)
    assert (tmp_path / "out" / "README.md").exists() and len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_exported_and_reimported_run_is_equal_except_padding_rows(trained, tmp_path, command):
    code, out, err = command("export", "--format=hf", f"--workdir={trained}", f"--output={tmp_path}/out")
    assert code == 0, err
    assert "compared" in out and "exported" in out
    code, out, err = command("import", "--format=hf", f"--input={tmp_path}/out", f"--workdir={tmp_path}/a run")
    assert code == 0 and f"t5like generate --workdir='{tmp_path}/a run' --prompt" in out, err
    before, after = run_directory.load(trained), run_directory.load(tmp_path / "a run")
    assert after.step == 0 and after.tokenizer.hash == before.tokenizer.hash
    assert (before.config.vocab_rows, after.config.vocab_rows) == (512, 400)
    there = tree.flatten(after.params)
    for name, leaf in tree.flatten(before.params).items():
        cut = leaf[:400] if name == "embedding" else leaf[:, :400] if name == "head" else leaf
        np.testing.assert_array_equal(cut, there[name], strict=True)
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (hf["model_type"], hf["vocab_size"], hf["architectures"]) == ("t5", 400, ["T5ForConditionalGeneration"])
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings == {"eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0, "max_new_tokens": 64}


def test_imported_weights_can_be_trained_with_another_config_but_not_with_another_model(trained, tmp_path):
    list(export_run(trained, tmp_path / "out"))
    list(import_run(tmp_path / "out", workdir := tmp_path / "run"))
    load = lambda **changes: loader.load(
        workdir / "config.json", [(name.replace("__", "."), value) for name, value in changes.items()]
    )
    free = {"model__dropout_rate": "0.1", "data__batch_size": "16", "model__vocab_multiple": "200", "seed": "3"}
    config = load(**free)
    run_directory.check_run_directory(config, workdir)
    with pytest.raises(ConfigError, match="holds weights of another model: model.mlp_dim: 64 -> 32; use its model"):
        run_directory.check_run_directory(load(**free, model__mlp_dim="32"), workdir)
    bare = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, path=""))
    assert run_directory.with_run_tokenizer(bare, workdir).tokenizer.path == str(workdir / "tokenizer.model")
    assert run_directory.with_run_tokenizer(bare, trained) == bare

    settled = auto.resolve_auto(config, mesh := meshes.make_mesh(config, jax.devices()[:1]))
    abstract = train_state.abstract_state(settled, pipeline.spec(settled), mesh)
    params = tree.flatten(abstract.params)
    begun = run_directory.imported_params(workdir, abstract)
    loaded = run_directory.load(workdir)
    assert begun.keys() == params.keys()
    jax.tree.map(np.testing.assert_array_equal, begun, tree.flatten(loaded.params))

    # One step later it is a run as any other, and its export says what it learned.
    run_directory.open_run_directory(config, loaded.tokenizer, workdir)
    learned = jax.tree.map(lambda x: x + 1, loaded.params)
    checkpoints = run_directory.checkpoints_of(workdir, config)
    meta = {"config": config, "tokenizer": loaded.tokenizer.model_bytes, "tokenizer_hash": loaded.tokenizer.hash}
    checkpoints.save(TrainState(np.int32(1), learned, None), **meta)
    checkpoints.close()
    with pytest.raises(ConfigError, match="holds another run: seed: 3 -> 0"):
        run_directory.check_run_directory(load(seed="0"), workdir)
    list(export_run(workdir, tmp_path / "again", step=0))
    assert_same_tensors(tmp_path / "out", tmp_path / "again")
    list(export_run(workdir, tmp_path / "half", dtype="bfloat16"))
    there, half = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "half")
    for name, value in half.items():
        np.testing.assert_array_equal(value, (there[name] + 1).astype(ml_dtypes.bfloat16), strict=True)
    hf = json.loads((tmp_path / "half" / "config.json").read_text())
    assert (hf["dtype"], hf["torch_dtype"], hf["dropout_rate"]) == ("bfloat16", "bfloat16", 0.1)


def edit(source: Path, **changes) -> None:
    """Change tensors of a model directory; None takes one away."""
    values = {**tensors_of(source), **changes}
    values = {name: value for name, value in values.items() if value is not None}
    for path in source.glob("model*"):
        path.unlink()
    names = {dtype: name for name, dtype in safetensors_files.DTYPES.items()}
    wanted = [safetensors_files.TensorSpec(name, names[value.dtype], value.shape) for name, value in values.items()]
    safetensors_files.write(source, wanted, values.__getitem__, max_shard_size=10**9)


NORM = "transformer.ln_f.weight"


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({NORM: None}, f"the gpt2 weights lack {NORM}"),
        ({"score.weight": np.zeros(2, np.float32)}, "have tensors that the model of config.json lacks: score.weight"),
        ({NORM: np.zeros(31, np.float32)}, f"have shapes that differ from config.json: {NORM} [31], not [32]"),
        ({"lm_head.weight": np.zeros((400, 32), np.float16)}, "must be a copy of"),
    ],
)
def test_files_that_do_not_match_their_config_are_refused_and_nothing_is_written(
    changes, complaint, tokenizer, tmp_path, command
):
    source = model_directory("gpt2", tmp_path / "in", tokenizer, "F16")
    edit(source, **changes)
    code, _, err = command("import", "--format=hf", f"--input={source}", f"--workdir={tmp_path}/run")
    assert (code, err.count("\n")) == (4, 1) and complaint in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_an_existing_workdir_and_a_too_small_vocabulary_are_refused(tokenizer, tmp_path):
    source = model_directory("gpt2", tmp_path / "in", tokenizer)
    with pytest.raises(ConfigError, match="is not an empty directory"):
        list(import_run(source, source))
    with pytest.raises(CheckpointError, match="is not a directory"):
        list(import_run(tmp_path / "none", tmp_path / "run"))
    hf = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**hf, "vocab_size": 399}))
    with pytest.raises(CheckpointError, match="vocab_size=399 must be at least 400"):
        list(import_run(source, tmp_path / "run"))


@pytest.mark.parametrize(
    "number, code, handler",
    [(signal.SIGTERM, 143, signal.SIG_IGN), (signal.SIGINT, 130, signal.default_int_handler)],
)
def test_a_stopped_export_leaves_no_files(number, code, handler, trained, tmp_path, command, monkeypatch):
    class Garbage:  # what is raised in its end is ignored
        def __del__(self):
            os.kill(os.getpid(), number)

    written = lambda *_: (Garbage() and None, time.sleep(2))  # the weights are
    monkeypatch.setattr(convert, "_write_json", written)
    before = signal.signal(number, handler)
    try:
        found, _, err = command("export", "--format=hf", f"--workdir={trained}", f"--output={tmp_path}/out")
        assert signal.getsignal(number) == handler
    finally:
        signal.signal(number, before)
    assert found == code and err == "t5like: stopped\n" and not list(tmp_path.iterdir())


def test_a_failed_export_leaves_no_files(trained, tmp_path, command, monkeypatch):
    before = contents(trained)
    export = ["export", "--format=hf", f"--workdir={trained}", f"--output={tmp_path}/out"]
    code, _, err = command(*export, "--family=llama")
    assert code == 4 and "model.architecture=encoder_decoder can't be represented by llama" in err
    code, _, err = command(*export, "--step=7")
    assert code == 4 and "no complete checkpoint of step 7" in err
    code, _, err = command(*export, "--max_shard_size=many")
    assert code == 2 and "--max_shard_size=many" in err
    code, _, err = command("export", "--format=onnx", *export[2:])
    assert code == 2 and "onnx" in err
    write = safetensors_files.write_file

    def damaged(path, *rest):  # one bit on its way to the disk
        write(path, *rest)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(safetensors_files, "write_file", damaged)
    code, _, err = command(*export)
    assert code == 4 and "was not written correctly" in err
    assert not list(tmp_path.iterdir()) and contents(trained) == before


def test_float16_is_refused_where_it_would_overflow(trained, tmp_path):
    loaded = run_directory.load(trained)
    huge = {**loaded.params, "embedding": loaded.params["embedding"] * 1e6}
    export = convert.Export(loaded._replace(params=huge), "t5", None, "float16")
    with pytest.raises(CheckpointError, match="--dtype=float16 can't represent shared.weight"):
        export.value("shared.weight")


def test_a_tampered_record_is_refused(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "hf").mkdir()
    (tmp_path / "run" / "hf" / "import.json").write_text('{"family": "t5"}')
    with pytest.raises(CheckpointError, match="is not a record of an import"):
        list(export_run(tmp_path / "run", tmp_path / "out"))
