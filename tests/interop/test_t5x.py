"""T5X checkpoints in: written here as T5X writes them, read as our parameters; foreign and damaged ones are refused."""

import functools
import json
import shutil
import zlib
from pathlib import Path

import jax
import ml_dtypes
import msgpack
import numpy as np
import pytest
import tensorstore
from conftest import random_batch, small
from flax import serialization, traverse_util

from t5like import tree
from t5like.checkpoint import run_directory
from t5like.config.schema import Config
from t5like.errors import CheckpointError, ConfigError
from t5like.interop import t5x
from t5like.optim import train_state

MODEL = {"num_layers": 2, "model_dim": 16, "num_heads": 2, "head_dim": 8, "mlp_dim": 24}


# ---- T5X checkpoints, by t5x/checkpoints.py and t5x/examples: names, layouts, files ----


def unscanned(params: dict[str, np.ndarray], *, gated: bool) -> dict[str, np.ndarray]:
    """The names of t5x/examples/t5/network.py, spelled out."""
    arrays = {"token_embedder/embedding": params["embedding"]}
    if "head" in params:
        arrays["decoder/logits_dense/kernel"] = params["head"]
    for side, attention, norm in (
        ("encoder", "attention", "pre_attention_layer_norm"),
        ("decoder", "self_attention", "pre_self_attention_layer_norm"),
    ):
        arrays[f"{side}/{side}_norm/scale"] = params[f"{side}/final_norm/scale"]
        arrays[f"{side}/relpos_bias/rel_embedding"] = params[f"{side}/relative_bias/table"].T
        for y in range(MODEL["num_layers"]):
            layer = lambda name, side=side, y=y: params[f"{side}/layers/{name}"][y]
            at = f"{side}/layers_{y}"
            for kind in ("query", "key", "value", "out"):
                arrays[f"{at}/{attention}/{kind}/kernel"] = layer(f"attention/{kind}/kernel")
                if side == "decoder":
                    cross = layer(f"cross_attention/{kind}/kernel")
                    arrays[f"{at}/encoder_decoder_attention/{kind}/kernel"] = cross
            arrays[f"{at}/{norm}/scale"] = layer("attention_norm/scale")
            if side == "decoder":
                arrays[f"{at}/pre_cross_attention_layer_norm/scale"] = layer("cross_attention_norm/scale")
            arrays[f"{at}/pre_mlp_layer_norm/scale"] = layer("mlp_norm/scale")
            arrays[f"{at}/mlp/wo/kernel"] = layer("mlp/out/kernel")
            if gated:  # mlp_activations = ('gelu', 'linear')
                arrays[f"{at}/mlp/wi_0/kernel"] = layer("mlp/gate/kernel")
                arrays[f"{at}/mlp/wi_1/kernel"] = layer("mlp/in/kernel")
            else:
                arrays[f"{at}/mlp/wi/kernel"] = layer("mlp/in/kernel")
    return arrays


def scanned(params: dict[str, np.ndarray], *, umt5: bool) -> dict[str, np.ndarray]:
    """Layers stacked in the second dim, a relative bias in each: scalable_t5, or UMT5."""
    biases = {side: params[f"{side}/layers/relative_bias/table"] for side in ("encoder", "decoder")}
    single = unscanned(params | {f"{side}/relative_bias/table": table[0] for side, table in biases.items()}, gated=True)
    arrays, inner = {}, {"encoder": "encoder/encoder", "decoder": "decoder/decoder"}
    for name, value in single.items():
        side, _, rest = name.partition("/layers_0/")
        if "/layers_" not in name and "relpos" not in name:
            arrays[name] = value
        if rest:
            whole = np.stack([single[f"{side}/layers_{y}/{rest}"] for y in range(MODEL["num_layers"])], axis=1)
            if umt5 and "ttention/" in rest:
                dims = (2, 8, 16) if "/out/" in rest else (16, 2, 8)
                whole = np.stack([single[f"{side}/layers_{y}/{rest}"].reshape(dims) for y in range(2)], axis=1)
            arrays[f"{inner[side] if umt5 else side + '/layers'}/{rest}"] = whole
    for side, table in biases.items():  # [Y, R, N] -> [N, Y, R]
        at = f"{inner[side]}/relpos_bias" if umt5 else f"{side}/layers/relative_posemb"
        arrays[f"{at}/rel_embedding"] = table.transpose(2, 0, 1)
    return arrays


def write(directory: Path, target: dict[str, np.ndarray], *, inline=(), placeholder: bool = False) -> Path:
    """Write arrays as zarr with gzip beside an index that refers to them, those named `inline` into the index."""
    leaves = {}
    for name, array in target.items():
        if name in inline:
            leaves[name] = array
            continue
        spec = {
            "driver": "zarr",
            "dtype": array.dtype.name,
            "kvstore": {"driver": "file", "path": f"target.{name.replace('/', '.')}"},
            "metadata": {
                "compressor": {"id": "gzip"},
                "shape": array.shape,
                "chunks": [max(size // 2, 1) if size % 2 == 0 else size for size in array.shape],
            },
        }
        at = {**spec, "kvstore": {"driver": "file", "path": f"{directory}/{spec['kvstore']['path']}"}}
        tensorstore.open(at, create=True, open=True).result().write(array).result()
        if placeholder:
            leaves[name] = f"PLACEHOLDER://{spec['kvstore']['path']}"
        else:
            leaves[name] = json.loads(json.dumps(tensorstore.Spec(spec).to_json()))
    state = {"step": np.int32(1000), "param_states": {"token_embedder": {"embedding": {"v_row": np.ones(9)}}}}
    optimizer = {"target": traverse_util.unflatten_dict(leaves, sep="/"), "state": state}
    (directory / "checkpoint").write_bytes(serialization.to_bytes({"version": 3, "optimizer": optimizer}))
    return directory


# ---- t5like ----


@functools.cache
def model_of(tokenizer: Path, **model) -> Config:
    settings = {"tokenizer": {"path": str(tokenizer), "vocab_size": 400, "num_sentinels": 20}}
    return small(model={**MODEL, **model}, **settings)


@functools.cache
def params_of(config: Config) -> dict[str, np.ndarray]:
    """Random parameters by name; including norms, so that swapped arrays are noticed."""
    shapes = jax.eval_shape(lambda: train_state.init_params(config, random_batch(config), jax.random.key(0)))
    rng = np.random.default_rng(0)
    names = tree.flatten(jax.tree.map(lambda box: box.value, shapes, is_leaf=lambda x: hasattr(x, "names")))
    return {name: rng.standard_normal(leaf.shape).astype(np.float32) for name, leaf in names.items()}


@pytest.fixture(scope="module")
def tokenizer(trained) -> Path:
    return trained / "tokenizer.model"


@pytest.fixture(scope="module")
def t5_1_1(tokenizer, tmp_path_factory) -> Path:
    """A checkpoint of a T5 1.1; copy it before changing it."""
    directory = tmp_path_factory.mktemp("t5x") / "checkpoint_1000"
    directory.mkdir()
    return write(
        directory, unscanned(params_of(model_of(tokenizer)), gated=True), inline=("encoder/encoder_norm/scale",)
    )


def read(source: Path, config: Config) -> dict[str, np.ndarray]:
    """The parameters of a checkpoint for a model of the config, by name."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {
        name: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=sharding) for name, x in params_of(config).items()
    }
    return dict(zip(shapes, t5x.read_params(source, shapes)[1], strict=True))


@pytest.mark.parametrize("kind", ["t5_1_0", "scalable", "umt5"])
def test_every_layout_is_read(kind, tokenizer, tmp_path):
    model = {"mlp": "relu", "tied_embeddings": True} if kind == "t5_1_0" else {"relative_bias": "per_layer"}
    config = model_of(tokenizer, **model)
    params = params_of(config)
    if kind == "t5_1_0":
        params = {name: value.astype(ml_dtypes.bfloat16) for name, value in params.items()}
    arrays = unscanned(params, gated=False) if kind == "t5_1_0" else scanned(params, umt5=kind == "umt5")
    source = write(tmp_path, arrays, inline=list(arrays)[::5], placeholder=kind == "umt5")
    for name, leaf in read(source, config).items():
        np.testing.assert_array_equal(leaf, params[name].astype(np.float32), err_msg=name)


def test_the_command_makes_a_run_with_the_same_numbers(command, t5_1_1, tokenizer, tmp_path):
    values = {"tokenizer.path": tokenizer, "tokenizer.vocab_size": 400, "tokenizer.num_sentinels": 20}
    values |= {f"model.{name}": value for name, value in MODEL.items()} | {"mesh.tensor": 2}
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    source = shutil.copytree(t5_1_1, tmp_path / "a\\b [1]")
    begin = ["import", "--format=t5x", f"--input={source}", f"--workdir={tmp_path}/a run"]
    code, out, err = command(*begin, "--config=configs/tiny.py", *flags)
    assert code == 0 and "one subtree per layer" in out, err
    assert f"t5like generate --workdir='{tmp_path}/a run' --prompt" in out
    loaded, params = run_directory.load(tmp_path / "a run"), params_of(model_of(tokenizer))
    assert loaded.step == 0 and loaded.config.tokenizer.path == f"{tmp_path}/a run/tokenizer.model"
    for name, leaf in tree.flatten(loaded.params).items():
        np.testing.assert_array_equal(leaf, params[name], err_msg=name)
    assert command(*begin)[0] == 2 and command(*begin, "--config=configs/tiny.py", *flags)[0] == 2
    begin[-1] = f"--workdir={tmp_path}/other"
    code, _, err = command(*begin, "--config=configs/tiny.py", *flags[1:])
    assert code == 2 and "tokenizer.path is empty" in err and not (tmp_path / "other").exists()
    remove_array(shutil.copytree(t5_1_1, tmp_path / "in"))
    begin[2] = f"--input={tmp_path}/in"
    code, _, err = command(*begin, "--config=configs/tiny.py", *flags)
    assert (
        code == 4
        and "lacks decoder/layers_1" in err
        and {p.name for p in tmp_path.iterdir()} == {source.name, "a run", "in"}
    )


def unpacked(directory: Path) -> dict:
    return serialization.msgpack_restore((directory / "checkpoint").read_bytes())


def repacked(directory: Path, values: dict) -> None:
    (directory / "checkpoint").write_bytes(serialization.msgpack_serialize(values))


def remove_array(directory):
    values = unpacked(directory)
    del values["optimizer"]["target"]["decoder"]["layers_1"]["mlp"]["wi_1"]
    repacked(directory, values)


def add_array(directory):
    values = unpacked(directory)
    values["optimizer"]["target"]["decoder"]["prompt"] = np.ones(3, np.float32)
    repacked(directory, values)


def change_shape(directory):
    values = unpacked(directory)
    values["optimizer"]["target"]["encoder"]["encoder_norm"]["scale"] = np.ones(17, np.float32)
    repacked(directory, values)


def refer_to_parent(directory):
    values = unpacked(directory)
    values["optimizer"]["target"]["token_embedder"]["embedding"]["kvstore"]["path"] = "../../etc"
    repacked(directory, values)


def refer_to_url(directory):
    values = unpacked(directory)
    values["optimizer"]["target"]["token_embedder"]["embedding"]["kvstore"] = {"driver": "http", "path": "http://a/b"}
    repacked(directory, values)


def add_objects(directory):
    array = msgpack.packb(((1,), "object", b"12345678"), use_bin_type=True)
    values = {"version": 3, "optimizer": {"target": {"a": msgpack.ExtType(1, array)}}}
    (directory / "checkpoint").write_bytes(msgpack.packb(values))


def truncate(directory):
    content = (directory / "checkpoint").read_bytes()
    (directory / "checkpoint").write_bytes(content[: len(content) // 2])


def raise_version(directory):
    repacked(directory, unpacked(directory) | {"version": 4})


def add_nan(directory):
    values = unpacked(directory)
    values["optimizer"]["target"]["encoder"]["encoder_norm"]["scale"] = np.full(16, np.nan, np.float32)
    repacked(directory, values)


def remove_directory(directory):
    shutil.rmtree(directory / "target.token_embedder.embedding")


def enlarge_chunks(directory):
    path = directory / "target.token_embedder.embedding" / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chunks": [2**14, 2**14]}))


def damage_chunk(directory):
    path = directory / "target.token_embedder.embedding" / "0.0"
    path.write_bytes(zlib.compress(b"no such size"))


@pytest.mark.parametrize(
    "change, message",
    [
        (remove_array, "lacks decoder/layers_1/mlp/wi_1/kernel"),
        (add_array, "has arrays that the config's model lacks: decoder/prompt"),
        (change_shape, r"shapes that differ .* encoder/encoder_norm/scale \[17\] for encoder/final_norm/scale \[16\]"),
        (refer_to_parent, "token_embedder/embedding is in '../../etc', which is not a directory of the checkpoint"),
        (refer_to_url, "token_embedder/embedding is in 'http://a/b', which is not a directory of the checkpoint"),
        (add_objects, "damaged or not a T5X checkpoint: an array of dtype 'object'"),
        (truncate, "damaged or not a T5X checkpoint"),
        (raise_version, "version=4; up to 3 can be read"),
        (add_nan, "encoder_norm/scale has numbers that are not finite"),
        (remove_directory, "target.token_embedder.embedding is missing or not a zarr array"),
        (enlarge_chunks, "has chunks of"),
        (damage_chunk, "target/token_embedder/embedding can't be read"),
        (lambda directory: (directory / "checkpoint").unlink(), "has no file `checkpoint`"),
    ],
)
def test_a_damaged_or_different_checkpoint_is_refused(change, message, t5_1_1, tokenizer, tmp_path):
    source = shutil.copytree(t5_1_1, tmp_path / "in")
    change(source)
    with pytest.raises(CheckpointError, match=message):
        read(source, model_of(tokenizer))


def test_a_config_without_t5x_checkpoints_is_refused(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="model.norm='layer' is not that of a T5X checkpoint; use model.norm=rms"):
        list(t5x.import_run(tmp_path, tmp_path / "run", model_of(tokenizer, norm="layer")))
