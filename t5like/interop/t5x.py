"""Import of T5X checkpoints as runs with a checkpoint of step 0.

Three layouts of the layers are supported, all of T5's encoder-decoder (`LAYOUTS`): one subtree per layer
(`t5x/examples/t5/network.py`: T5, T5 1.1, mT5, Flan-T5), and two with stacked layers, in the second dim:
`t5x/examples/scalable_t5/network.py`, and that of UMT5 (as read by transformers' `convert_umt5_checkpoint_to_pytorch`),
which have a relative bias per layer. Attention kernels may have heads and head_dim in one dim or in two. Parameters are
read one at a time (`t5x_files`). Called by `cli.commands`.
"""

import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from t5like import tree
from t5like.checkpoint import run_directory
from t5like.config.schema import Config, MeshConfig
from t5like.data import pipeline
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.errors import CheckpointError, ConfigError, shorten
from t5like.interop.t5x_files import StoredArray, read_index
from t5like.io.atomic import atomic_directory, check_free
from t5like.io.paths import literal_path
from t5like.optim import train_state
from t5like.sharding import auto
from t5like.sharding import mesh as meshes
from t5like.types import Array

# Paths of a layer's parameter and of the relative bias, and whether layers are stacked. {y} is the layer's number.
LAYOUTS = {
    "one subtree per layer": ("{side}/layers_{y}/{part}", "{side}/relpos_bias/rel_embedding", False),
    "stacked layers": ("{side}/layers/{part}", "{side}/layers/relative_posemb/rel_embedding", True),
    "stacked layers, as UMT5": ("{side}/{side}/{part}", "{side}/{side}/relpos_bias/rel_embedding", True),
}
# t5like -> T5X, in a layer. "{attention}" and "{norm}" differ by side.
LAYER = {
    "attention/query/kernel": "{attention}/query/kernel",
    "attention/key/kernel": "{attention}/key/kernel",
    "attention/value/kernel": "{attention}/value/kernel",
    "attention/out/kernel": "{attention}/out/kernel",
    "attention_norm/scale": "{norm}/scale",
    "cross_attention/query/kernel": "encoder_decoder_attention/query/kernel",
    "cross_attention/key/kernel": "encoder_decoder_attention/key/kernel",
    "cross_attention/value/kernel": "encoder_decoder_attention/value/kernel",
    "cross_attention/out/kernel": "encoder_decoder_attention/out/kernel",
    "cross_attention_norm/scale": "pre_cross_attention_layer_norm/scale",
    "mlp/out/kernel": "mlp/wo/kernel",
    "mlp_norm/scale": "pre_mlp_layer_norm/scale",
}
MLP = {  # in T5X wi_0 has the activation
    False: {"mlp/in/kernel": "mlp/wi/kernel"},
    True: {"mlp/gate/kernel": "mlp/wi_0/kernel", "mlp/in/kernel": "mlp/wi_1/kernel"},
}
SIDES = {
    "encoder": {"attention": "attention", "norm": "pre_attention_layer_norm"},
    "decoder": {"attention": "self_attention", "norm": "pre_self_attention_layer_norm"},
}
OUTSIDE = {
    "embedding": "token_embedder/embedding",
    "encoder/final_norm/scale": "encoder/encoder_norm/scale",
    "decoder/final_norm/scale": "decoder/decoder_norm/scale",
    "head": "decoder/logits_dense/kernel",
}


class Source(NamedTuple):
    """The T5X arrays of a t5like parameter.

    Attributes:
        names: of the arrays; one per layer if each layer has its own subtree.
        layers: the parameter has a leading dim of layers.
        stacked: the array has a dim of layers, its second.
        transposed: the array is [N, R], the parameter [R, N].
    """

    names: tuple[str, ...]
    layers: bool = False
    stacked: bool = False
    transposed: bool = False


def import_run(source: Path, workdir: Path, config: Config) -> Iterator[str]:
    """Write a run directory from a T5X checkpoint; yields lines that report the result.

    Args:
        source: the directory with the file `checkpoint`.
        workdir: absent or empty.
        config: of the model, with `tokenizer.path`: a T5X checkpoint contains neither.

    Raises:
        ConfigError: `workdir` exists, or T5X has no checkpoints of such a model.
        CheckpointError: the checkpoint is damaged, or not that of the config's model.
        DataError: the tokenizer is missing or does not fit.
    """
    check_free(workdir, "--workdir")
    _check_config(config)
    tokenizer = Tokenizer.load(config.tokenizer.path, num_sentinels=config.tokenizer.num_sentinels)
    tokenizer.check(config.tokenizer)
    single = dataclasses.replace(config, mesh=MeshConfig(data=1))
    mesh = meshes.make_mesh(single, jax.devices()[:1])
    shape = train_state.abstract_state(auto.resolve_auto(single, mesh), pipeline.spec(single), mesh)
    abstract = tree.flatten(shape.params)
    with atomic_directory(workdir) as target, literal_path(source) as directory:
        layout, leaves = read_params(directory, abstract)
        yield f"model      {tree.num_parameters(abstract):,} parameters, T5X, {layout}"
        params = jax.tree.unflatten(jax.tree.structure(shape.params), leaves)
        own = dataclasses.replace(config.tokenizer, path=str(workdir / "tokenizer.model"))
        config = dataclasses.replace(config, tokenizer=own)
        run_directory.write_imported(params, config, tokenizer, target)
    yield f"tokenizer  {tokenizer.vocab_size:,} ids for {config.vocab_rows:,} rows"
    yield f"imported   {workdir}; t5like generate --workdir={shlex.quote(str(workdir))} --prompt=... generates text"


def read_params(directory: Path, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[str, list[Array]]:
    """The layout of a checkpoint, and its parameters in the order and with the sharding of `abstract`.

    Raises:
        CheckpointError: the checkpoint is damaged or does not match; shapes are checked before values are read.
    """
    arrays = {name: StoredArray(directory, name, leaf) for name, leaf in read_index(directory).items()}
    layout, gated = _layout(arrays), any(name.endswith("mlp/gate/kernel") for name in abstract)
    sources = {name: source_of(name, leaf.shape[0], layout, gated=gated) for name, leaf in abstract.items()}
    _check_shapes(sources, abstract, arrays)
    return layout, [_read_param(sources[name], leaf, arrays) for name, leaf in abstract.items()]


def _check_config(config: Config) -> None:
    model = config.model
    if not config.tokenizer.path:
        raise ConfigError(
            "tokenizer.path is empty, but a T5X checkpoint has no tokenizer; use --config.tokenizer.path=FILE, its "
            "SentencePiece model"
        )
    if config.init_from.checkpoint:
        raise ConfigError("init_from.checkpoint can't be combined with an import, whose weights are those of --input")
    for field, value in (
        ("architecture", "encoder_decoder"),
        ("positions", "relative"),
        ("norm", "rms"),
        ("norm_position", "pre"),
        ("biases", False),
        ("num_kv_heads", 0),
        ("scale_attention", False),
        ("embedding_norm", False),
    ):
        if getattr(model, field) != value:
            raise ConfigError(
                f"model.{field}={getattr(model, field)!r} is not that of a T5X checkpoint; use model.{field}={value}"
            )


# ---- Names, shapes, values ----


def _layout(arrays: Mapping[str, Any]) -> str:
    """The key of `LAYOUTS` for the names of a checkpoint."""
    for layout, (layer, _, _) in LAYOUTS.items():
        if layer.format(side="encoder", y=0, part="mlp/wo/kernel") in arrays:
            return layout
    raise CheckpointError(f"the T5X checkpoint has other layers than T5's; it has {shorten(arrays)}")


def source_of(name: str, size: int, layout: str, *, gated: bool) -> Source:
    """The arrays of a parameter. `size` is its first dim; `gated`: the MLP has a gate."""
    if name in OUTSIDE:
        return Source((OUTSIDE[name],))
    side, rest = name.split("/", 1)
    layer, bias, stacked = LAYOUTS[layout]
    if rest == "relative_bias/table":
        return Source((bias.format(side=side),), transposed=True)
    part = rest.removeprefix("layers/")
    numbers = range(1 if stacked else size)
    if part == "relative_bias/table":  # one per layer
        single = "{side}/layers_{y}/relative_posemb/rel_embedding"
        names = tuple((bias if stacked else single).format(side=side, y=y) for y in numbers)
        return Source(names, True, stacked, transposed=True)
    t5x_part = (LAYER | MLP[gated]).get(part, part).format(**SIDES[side])
    return Source(tuple(layer.format(side=side, y=y, part=t5x_part) for y in numbers), True, stacked)


def _check_shapes(
    sources: Mapping[str, Source], abstract: Mapping[str, jax.ShapeDtypeStruct], arrays: Mapping[str, StoredArray]
) -> None:
    """Refuse a checkpoint with missing arrays, unexpected arrays, or arrays of a wrong shape."""
    expected = {name for source in sources.values() for name in source.names}
    missing = sorted(expected - set(arrays))
    unexpected = sorted(set(arrays) - expected)
    wrong = []
    for param, source in sources.items():
        shape = abstract[param].shape
        for name in source.names if not missing else ():
            if not _shape_matches(arrays[name].shape, source, shape):
                wrong.append(f"{name} {list(arrays[name].shape)} for {param} {list(shape)}")
    for problem, names in (
        ("lacks", missing),
        ("has arrays that the config's model lacks:", unexpected),
        ("has shapes that differ from the config:", wrong),
    ):
        if names:
            raise CheckpointError(
                f"the T5X checkpoint {problem} {shorten(names)}; use the config that it was trained with"
            )


def _shape_matches(array: tuple[int, ...], source: Source, param: tuple[int, ...]) -> bool:
    """Whether the shape of an array is that of its parameter, up to the dim of layers and separate heads."""
    if source.stacked:
        if array[1:2] != param[:1]:
            return False
        array = array[:1] + array[2:]
    param = param[1:] if source.layers else param
    if len(array) == 3 and "ttention/" in source.names[0]:
        out = "/out/" in source.names[0]
        array = (array[0] * array[1], array[2]) if out else (array[0], array[1] * array[2])
    return array == (param[::-1] if source.transposed else param)


def _read_param(source: Source, leaf: jax.ShapeDtypeStruct, arrays: dict[str, StoredArray]) -> Array:
    """A parameter in float32, read layer by layer; removes its arrays from `arrays`."""
    param = np.empty(leaf.shape, np.float32)
    if source.stacked:
        parts = iter(np.moveaxis(arrays.pop(source.names[0]).read(), 1, 0))
    else:
        parts = (arrays.pop(name).read() for name in source.names)
    for y, part in enumerate(parts):
        into = param[y] if source.layers else param
        into[...] = part.T if source.transposed else part.reshape(into.shape)
    if not np.isfinite(param).all():
        raise CheckpointError(f"target/{source.names[0]} has numbers that are not finite; the checkpoint is damaged")
    return jax.device_put(param, leaf.sharding)
