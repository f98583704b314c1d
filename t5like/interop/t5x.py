"""Checkpoints of T5X in, as a run directory with a checkpoint of step 0.

A T5X checkpoint is a directory `checkpoint_<step>` (google-research/t5x, `t5x/checkpoints.py`, version 3):

    checkpoint                          msgpack, as `flax.serialization` writes it: {"version", "optimizer": {"target":
                                        parameters, "state": ...}}. A leaf is an array, or says where there is one:
                                        a TensorStore spec (a dict), or "PLACEHOLDER://NAME"
    target.encoder.encoder_norm.scale/  a zarr array, such as NAME above

Parameters alone are read, one at a time, straight into their place. Everything is data from elsewhere: of a spec only
the array's name is used, which has to be a directory here, and nothing in the files is executed or opened elsewhere.

Three ways to name the layers are known, all of T5's encoder-decoder (`PATHS`): one subtree per layer
(`t5x/examples/t5/network.py`: T5, T5 1.1, mT5, Flan-T5), and two with stacked layers, whose dim comes second:
`t5x/examples/scalable_t5/network.py`, and that of UMT5 (as read by transformers' `convert_umt5_checkpoint_to_pytorch`),
which have a relative bias per layer. Kernels of attention may have heads and head_dim joined or apart.
Called by `main`.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import tensorstore

from t5like import tree
from t5like.checkpoint import run_directory
from t5like.config.schema import Config, MeshConfig
from t5like.data import pipeline
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.errors import CheckpointError, ConfigError, UserError, shorten
from t5like.io.atomic import atomic_directory, check_free
from t5like.io.paths import literal_path
from t5like.optim import step as steps
from t5like.sharding import auto
from t5like.sharding import mesh as meshes
from t5like.types import Array

VERSION = 3  # the newest of T5X (June 2021)
LARGEST_LEAF = 2**31 - 1  # bytes of an array in the index; flax cuts larger ones
LARGEST_CHUNK = 2**31  # bytes of a zarr chunk, which is read as a whole; T5X makes them of 64 MiB
DTYPES = ("float32", "bfloat16", "float16")  # all are exact in float32
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")  # of an array's directory

# Where a parameter of a layer (`{}`: its place in the stack) and the relative bias lie, and whether layers are stacked.
PATHS = {
    "one subtree per layer": ("{side}/layers_{y}/{part}", "{side}/relpos_bias/rel_embedding", False),
    "stacked layers": ("{side}/layers/{part}", "{side}/layers/relative_posemb/rel_embedding", True),
    "stacked layers, as UMT5": ("{side}/{side}/{part}", "{side}/{side}/relpos_bias/rel_embedding", True),
}
# Ours -> theirs, in a layer. "{attention}" and "{norm}" differ by side.
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
MLP = {  # T5X counts: the activated one first
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


class Place(NamedTuple):
    """Where a parameter of ours lies in a T5X checkpoint.

    Attributes:
        names: theirs; one per layer where each layer has its own subtree.
        layers: ours has a leading dim of layers.
        stacked: so has theirs, as its second dim.
        turned: theirs is [N, R], ours [R, N].
    """

    names: tuple[str, ...]
    layers: bool = False
    stacked: bool = False
    turned: bool = False


def import_run(source: Path, workdir: Path, config: Config) -> Iterator[str]:
    """Make a run directory of a T5X checkpoint; yields lines that say what happened.

    Args:
        source: the directory with the file `checkpoint`.
        workdir: absent or empty.
        config: of the model, with `tokenizer.path`: a T5X checkpoint has neither.

    Raises:
        ConfigError: `workdir` is taken, or the config can't be that of such a checkpoint.
        CheckpointError: the checkpoint is damaged, or not that of the config's model.
        DataError: the tokenizer is missing or does not fit.
    """
    check_free(workdir, "--workdir")
    _check_config(config)
    tokenizer = Tokenizer.load(config.tokenizer.path, num_sentinels=config.tokenizer.num_sentinels)
    tokenizer.check(config.tokenizer)
    one = dataclasses.replace(config, mesh=MeshConfig(data=1))
    mesh = meshes.make_mesh(one, jax.devices()[:1])
    shape = steps.abstract_state(auto.resolve_auto(one, mesh), pipeline.spec(one), mesh)
    wanted = tree.flatten(shape.params)
    with atomic_directory(workdir) as made, literal_path(source) as directory:
        layout, leaves = read_params(directory, wanted)
        yield f"model      {tree.num_parameters(wanted):,} parameters, T5X, {layout}"
        params = jax.tree.unflatten(jax.tree.structure(shape.params), leaves)
        own = dataclasses.replace(config.tokenizer, path=str(workdir / "tokenizer.model"))
        config = dataclasses.replace(config, tokenizer=own)
        run_directory.write_imported(params, config, tokenizer, made)
    yield f"tokenizer  {tokenizer.vocab_size:,} ids for {config.vocab_rows:,} rows"
    yield f"imported   {workdir}; t5like generate --workdir={workdir} --prompt=... speaks with it"


def read_params(source: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[str, list[Array]]:
    """The parameters of a checkpoint, in the order of `wanted` and each where it says; and which layout they have.

    Raises:
        CheckpointError: the checkpoint is damaged, or does not fit. Nothing but shapes has been read by then, unless a
            file is damaged inside.
    """
    found = {name: Stored(source, name, leaf) for name, leaf in read_index(source).items()}
    layout, gated = _layout(found), any(name.endswith("mlp/gate/kernel") for name in wanted)
    places = {name: place(name, leaf.shape[0], layout, gated=gated) for name, leaf in wanted.items()}
    _check_fit(places, wanted, found)
    return layout, [_filled(places[name], leaf, found) for name, leaf in wanted.items()]


def _check_config(config: Config) -> None:
    model = config.model
    if not config.tokenizer.path:
        raise ConfigError(
            "tokenizer.path is empty, but a T5X checkpoint has no tokenizer; use --config.tokenizer.path=FILE, its "
            "SentencePiece model"
        )
    if config.init_from.checkpoint:
        raise ConfigError("init_from.checkpoint can't go with an import: the weights come from --input")
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


# ---- The files ----


def read_index(directory: Path) -> dict[str, Any]:
    """The parameters of a checkpoint by name: each an array, or the name of the zarr array that holds it.

    Raises:
        CheckpointError: the directory holds no T5X checkpoint, or a damaged one.
    """
    path = directory / "checkpoint"
    try:
        if not path.is_file():
            raise CheckpointError(f"--input={directory} holds no file `checkpoint`; name a T5X checkpoint_<step>")
        with open(path, "rb") as file:
            if file.read(21) == b"model_checkpoint_path":
                raise CheckpointError(f"{path} is TensorFlow's, not T5X's own; convert it with T5X first")
            file.seek(0)
            target = _target(file)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from None
    except UserError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} is damaged or no T5X checkpoint: {_one_line(error)}") from None
    if not isinstance(target, dict):
        raise CheckpointError(f"{path} has no optimizer/target, where T5X keeps parameters; is it a T5X checkpoint?")
    return _flat(target, path)


def _target(file: BinaryIO) -> Any:
    """optimizer/target of an index; the rest, the optimizer's state, is passed over.

    Data only: msgpack makes dicts, lists, strings, numbers and bytes, and its one extension here becomes an array by
    `_extension`, not by flax, which takes any dtype.
    """
    unpacker = msgpack.Unpacker(file, raw=False, strict_map_key=True, ext_hook=_extension, max_buffer_size=LARGEST_LEAF)
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
    kind = jnp.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    return np.frombuffer(buffer, kind).reshape([int(size) for size in shape])


def _flat(values: Mapping, path: Path, prefix: str = "") -> dict[str, Any]:
    """Leaves by slash-joined name: arrays as they are, references as the name of their array."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and "kvstore" in value:  # a TensorStore spec; of old ones, the path is outside
            store = value["kvstore"] if isinstance(value["kvstore"], dict) else {}
            leaves[name] = _directory_name(store.get("path", value.get("path")), name, path)
        elif isinstance(value, dict) and "__msgpack_chunked_array__" in value:
            leaves[name] = _joined(value, name, path)
        elif isinstance(value, dict):
            leaves |= _flat(value, path, f"{name}/")
        elif isinstance(value, str):
            leaves[name] = _directory_name(value.removeprefix("PLACEHOLDER://"), name, path)
        elif isinstance(value, np.ndarray):
            leaves[name] = value
        elif value is not None:
            raise CheckpointError(f"{path}: target/{name} is a {type(value).__name__}, not an array; is it damaged?")
    return leaves


def _joined(value: Mapping, name: str, path: Path) -> np.ndarray:
    """An array that flax has cut into flat parts: {"shape": {"0": ..}, "chunks": {"0": array, ..}}."""
    try:
        parts = [value["chunks"].pop(str(index)) for index in range(len(value["chunks"]))]
        return np.concatenate(parts).reshape([value["shape"][str(dim)] for dim in range(len(value["shape"]))])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{path}: target/{name} has parts that make no array; is it damaged?") from None


def _directory_name(value: Any, name: str, path: Path) -> str:
    found = value.rstrip("/") if isinstance(value, str) else ""
    if not NAME.fullmatch(found):
        raise CheckpointError(f"{path}: target/{name} lies in {value!r}, which is no directory beside it")
    return found


class Stored:
    """One array of a checkpoint: its shape and dtype, and, when asked for, its values."""

    def __init__(self, directory: Path, name: str, leaf: np.ndarray | str):
        """Opens, but reads nothing.

        Raises:
            CheckpointError: there is no such array, or it can't be one.
        """
        self.name, self._leaf = name, leaf
        if isinstance(leaf, str):
            where = directory / leaf
            if not (where / ".zarray").is_file():
                raise CheckpointError(f"{where} is missing or no zarr array; copy the whole checkpoint")
            spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{where.absolute()}/"}}
            try:
                self._leaf = tensorstore.open(spec, open=True, read=True).result()
            except Exception as error:
                raise CheckpointError(f"{where} can't be read: {_one_line(error)}") from None
            chunk = self._leaf.chunk_layout.read_chunk.shape
            bytes_ = int(np.prod(chunk, dtype=float)) * self._leaf.dtype.numpy_dtype.itemsize
            if bytes_ > LARGEST_CHUNK or any(part > max(size, 1) for part, size in zip(chunk, self.shape, strict=True)):
                raise CheckpointError(f"{where} says of itself chunks of {list(chunk)}, which can't be")
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
            raise CheckpointError(f"target/{self.name} can't be read: {_one_line(error)}") from None


# ---- Names, shapes, values ----


def _layout(found: Mapping[str, Any]) -> str:
    """Which of `PATHS` a checkpoint's names follow."""
    for layout, (layer, _, _) in PATHS.items():
        if layer.format(side="encoder", y=0, part="mlp/wo/kernel") in found:
            return layout
    raise CheckpointError(f"the T5X checkpoint has other layers than T5's; it has {shorten(found)}")


def place(name: str, size: int, layout: str, *, gated: bool) -> Place:
    """Where a parameter of ours lies; `size` is its first dim, `gated` says whether the MLP has a gate."""
    if name in OUTSIDE:
        return Place((OUTSIDE[name],))
    side, rest = name.split("/", 1)
    layer, bias, stacked = PATHS[layout]
    if rest == "relative_bias/table":
        return Place((bias.format(side=side),), turned=True)
    part = rest.removeprefix("layers/")
    numbers = range(1 if stacked else size)
    if part == "relative_bias/table":  # one per layer
        single = "{side}/layers_{y}/relative_posemb/rel_embedding"
        names = tuple((bias if stacked else single).format(side=side, y=y) for y in numbers)
        return Place(names, True, stacked, turned=True)
    theirs = (LAYER | MLP[gated]).get(part, part).format(**SIDES[side])
    return Place(tuple(layer.format(side=side, y=y, part=theirs) for y in numbers), True, stacked)


def _check_fit(
    places: Mapping[str, Place], wanted: Mapping[str, jax.ShapeDtypeStruct], found: Mapping[str, Stored]
) -> None:
    """Refuse a checkpoint that lacks a parameter of the config's model, has one more, or has one of another shape."""
    expected = {theirs for each in places.values() for theirs in each.names}
    missing = sorted(expected - set(found))
    extra = sorted(set(found) - expected)
    wrong = []
    for name, each in places.items():
        shape = wanted[name].shape
        for theirs in each.names if not missing else ():
            if not _fits(found[theirs].shape, each, shape):
                wrong.append(f"{theirs} {list(found[theirs].shape)} for our {name} {list(shape)}")
    for what, names in (
        ("lacks", missing),
        ("holds what the config's model has not:", extra),
        ("has other shapes than the config says:", wrong),
    ):
        if names:
            raise CheckpointError(
                f"the T5X checkpoint {what} {shorten(names)}; use the config that it was trained with"
            )


def _fits(theirs: tuple[int, ...], each: Place, ours: tuple[int, ...]) -> bool:
    """Whether a shape of theirs is ours, but for the place of the layers and heads that are joined or not."""
    if each.stacked:
        if theirs[1:2] != ours[:1]:
            return False
        theirs = theirs[:1] + theirs[2:]
    ours = ours[1:] if each.layers else ours
    if len(theirs) == 3 and "ttention/" in each.names[0]:
        out = "/out/" in each.names[0]
        theirs = (theirs[0] * theirs[1], theirs[2]) if out else (theirs[0], theirs[1] * theirs[2])
    return theirs == (ours[::-1] if each.turned else ours)


def _filled(each: Place, leaf: jax.ShapeDtypeStruct, found: dict[str, Stored]) -> Array:
    """A parameter in float32, each layer read into its place; what is read is given up."""
    array = np.empty(leaf.shape, np.float32)
    if each.stacked:
        parts = iter(np.moveaxis(found.pop(each.names[0]).read(), 1, 0))
    else:
        parts = (found.pop(name).read() for name in each.names)
    for y, part in enumerate(parts):
        into = array[y] if each.layers else array
        into[...] = part.T if each.turned else part.reshape(into.shape)
    if not np.isfinite(array).all():
        raise CheckpointError(f"target/{each.names[0]} has numbers that are not finite; the checkpoint is damaged")
    return jax.device_put(array, leaf.sharding)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
