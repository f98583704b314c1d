"""Initial weights from another run: unchanged, or adapted to another architecture, vocabulary or depth.

`init_from.adapt` lists which differences are adapted; every other difference is refused. The source of each parameter
is chosen by name and shape before anything is read (`ParameterSource`), and reported. Arrays are read once, onto the
mesh of this run, and released one at a time as they are adapted: there is never a second copy of the model.

* architecture: an encoder-decoder from a decoder-only model. Both stacks start as its layers. Cross-attention with its
  norm, and the encoder's relative bias (its buckets are bidirectional, the decoder's are not), are random.
* vocabulary: rows are mapped from tokenizer to tokenizer by piece, sentinels by index. Rows of pieces that the old
  tokenizer does not have are the mean of all old rows (Hewitt 2021, "Initializing New Word Embeddings for Pretrained
  Language Models").
* depth: the old stack is repeated from the bottom, layers 0 1 for 5 give 0 1 0 1 0 (Gong et al. 2019, "Efficient
  Training of BERT by Progressively Stacking").

Called by `train.initial_state`.
"""

import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from t5like import tree
from t5like.checkpoint import recovery
from t5like.checkpoint.checkpoints import Checkpoints
from t5like.checkpoint.digests import Leaf
from t5like.checkpoint.metadata import Meta
from t5like.checkpoint.run_directory import check_initial_run
from t5like.config import loader
from t5like.config.schema import Config
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.errors import CheckpointError
from t5like.io.atomic import replace_file
from t5like.io.paths import expand
from t5like.types import Array, TrainState

ROW_DIMS = {
    "embedding": 0,
    "head": 1,
    "head_bias": 0,
}  # parameters with a row for each token id, and the dim of the rows
SCALAR_HEAD = "scalar_head/"  # random if the checkpoint has none, ignored if the model has none
REPORT = "init_from.txt"  # in the run directory
UNREPORTED_FIELDS = tuple(  # fields of the model that change no output, or are part of `InitialWeights.report`
    f"model.{name}:"
    for name in (
        "architecture",
        "num_layers",
        "num_decoder_layers",
        "dtype",
        "layers",
        "kernels",
        "remat",
        "vocab_multiple",
    )
)
MEAN_ROW = -1  # in a VocabularyMap: there is no old row


class ParameterSource(NamedTuple):
    """The source of a parameter.

    Attributes:
        source: the old parameter's name; None: it is random.
        layers: the old layer of each layer; empty: unchanged.
        rows: the dim whose rows are mapped to another vocabulary; None: unchanged.
    """

    source: str | None
    layers: tuple[int, ...] = ()
    rows: int | None = None


class VocabularyMap(NamedTuple):
    """A map from a new vocabulary's rows to an old one's.

    Attributes:
        old_V: int32 [new rows], the old row of each, or `MEAN_ROW`, also for padding rows.
        old_size: rows of the old vocabulary that are ids; the rows after them are padding.
        text: the number of rows of each type, in words.
    """

    old_V: np.ndarray
    old_size: int
    text: str


class InitialWeights(NamedTuple):
    """The weights that a run starts from.

    Attributes:
        params: by name, with the shardings of the run; without the random ones.
        step: of the checkpoint.
        report: a line for each parameter: its name and its source.
        differs: other fields of the model that differ from the checkpoint's, a line for each; they may be intended.
    """

    params: dict[str, Array]
    step: int
    report: list[str]
    differs: list[str]


def load_initial_weights(config: Config, abstract: TrainState, tokenizer: Tokenizer) -> InitialWeights:
    """Read the weights of `init_from.checkpoint`, adapted as `init_from.adapt` says.

    A parameter whose name matches `init_from.reinitialize` is random. The checkpoint must contain all other ones, and
    no more. The moving average is used if that run has one. If `init_from.step` names no step, damaged checkpoints are
    reported, and the newest one before them is used.

    Args:
        config: of this run.
        abstract: shape, dtype and sharding of every parameter of this run.
        tokenizer: this run's.

    Raises:
        CheckpointError: there is no such checkpoint, or it does not fit; with a list of the differences.
        ConfigError: a pattern of `init_from.reinitialize` matches no parameter.
    """
    init = config.init_from
    directory = expand(init.checkpoint)
    check_initial_run(config, None)
    tree.mask(abstract.params, init.reinitialize, field="init_from.reinitialize")
    checkpoints = Checkpoints(directory / "checkpoints", keep=1)
    read = partial(_read, config, abstract, tokenizer, checkpoints)
    if init.step >= 0:
        return read(init.step)
    readable = recovery.newest_readable(checkpoints, checkpoints.steps() or [checkpoints.meta().step], read)
    recovery.warn(readable)
    return readable.value


def _read(
    config: Config, abstract: TrainState, tokenizer: Tokenizer, checkpoints: Checkpoints, step: int
) -> InitialWeights:
    """Read the weights of one checkpoint; arguments and errors as in `load_initial_weights`."""
    init, meta = config.init_from, checkpoints.meta(step)
    ema = any(name.startswith("ema/") for name in meta.leaves)
    prefix = "ema/" if ema else "params/"
    stored = {name.removeprefix(prefix): leaf for name, leaf in meta.leaves.items() if name.startswith(prefix)}
    wanted = tree.flatten(abstract.params)
    _check_adapted(config, meta, stored, wanted, tokenizer, checkpoints.directory.parent)
    rows = _map_from(config, meta, tokenizer) if "vocabulary" in init.adapt else None
    origins = {name: _origin(config, meta.config, name, leaf, stored) for name, leaf in wanted.items()}
    sources = {
        origin.source: _as_stored(wanted[name], origin, stored, meta.config)
        for name, origin in origins.items()
        if origin.source
    }
    without = init.reinitialize if config.model.scalar_head else (*init.reinitialize, f"{SCALAR_HEAD}.*")
    read = checkpoints.restore_params(sources, meta.step, ema=ema, without=without)
    last = {origin.source: name for name, origin in origins.items()}  # the last parameter that uses each source
    params = {}
    for name, origin in origins.items():
        if origin.source:
            array = read.pop(origin.source) if last[origin.source] == name else jnp.copy(read[origin.source])
            params[name] = _adapt(array, wanted[name].sharding, origin, rows)
            del array
    width = max(map(len, origins))
    report = [f"{name:{width}}  {_describe(name, origin, rows)}" for name, origin in origins.items()]
    differs = loader.difference(meta.config, config)
    return InitialWeights(
        params,
        meta.step,
        report,
        [line for line in differs if line.startswith("model.") and not line.startswith(UNREPORTED_FIELDS)],
    )


def write_report(workdir: Path, config: Config, weights: InitialWeights) -> None:
    """Write the source of each parameter into the run directory, from process 0.

    Raises:
        CheckpointError: it can't be written.
    """
    if jax.process_index() != 0:
        return
    init = config.init_from
    adapted = f", init_from.adapt={','.join(init.adapt)}" if init.adapt else ""
    text = (
        "\n".join([f"step {weights.step:,} of {init.checkpoint}{adapted}", "", *weights.report, *weights.differs])
        + "\n"
    )
    replace_file(workdir / REPORT, text, CheckpointError)


def map_vocabulary(old: Tokenizer, new: Tokenizer, num_rows: int) -> VocabularyMap:
    """Map a new tokenizer's ids to an old one's: special ids by their role, sentinels by index, the rest by piece.

    A piece that only the new one has, a sentinel beyond the old ones, and the padding rows map to `MEAN_ROW`.
    """
    special = {*old.sentinel_ids.tolist(), old.pad_id, old.eos_id, old.unk_id}
    pieces = {old.name(token): token for token in range(old.vocab_size) if token not in special and old.name(token)}
    roles = {new.pad_id: old.pad_id, new.eos_id: old.eos_id}
    if new.unk_id is not None and old.unk_id is not None:
        roles[new.unk_id] = old.unk_id
    roles |= dict(zip(new.sentinel_ids.tolist(), old.sentinel_ids.tolist(), strict=False))
    sentinels = set(new.sentinel_ids.tolist())
    old_V = np.full(num_rows, MEAN_ROW, np.int32)
    for token in range(new.vocab_size):
        if token in roles:
            old_V[token] = roles[token]
        elif token not in sentinels:
            old_V[token] = pieces.get(new.name(token), MEAN_ROW)
    kept = int((old_V != MEAN_ROW).sum())
    lost = old.vocab_size - len(set(old_V[old_V != MEAN_ROW].tolist()))
    text = f"{kept:,} of {new.vocab_size:,} rows by piece, {new.vocab_size - kept:,} at the mean"
    return VocabularyMap(old_V, old.vocab_size, text + (f", {lost:,} unused old rows" if lost else ""))


def _map_from(config: Config, meta: Meta, tokenizer: Tokenizer) -> VocabularyMap:
    old = Tokenizer(meta.tokenizer, num_sentinels=meta.config.tokenizer.num_sentinels, origin="the old tokenizer")
    return map_vocabulary(old, tokenizer, config.vocab_rows)


def _check_adapted(
    config: Config,
    meta: Meta,
    stored: Mapping[str, Leaf],
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    tokenizer: Tokenizer,
    directory: Path,
) -> None:
    """Refuse a difference that could be adapted but is not named in `init_from.adapt`."""
    init, old, new = config.init_from, meta.config.model, config.model
    differences = {}
    if (old.architecture, new.architecture) == ("decoder", "encoder_decoder"):
        differences["architecture"] = f"it is a decoder-only model, not model.architecture={new.architecture}"
    if tokenizer.hash != meta.tokenizer_hash and not all(
        tree.matches(name, init.reinitialize) for name in wanted if name in ROW_DIMS
    ):
        differences["vocabulary"] = (
            f"its tokenizer is different ({meta.config.tokenizer.vocab_size:,} ids, not {tokenizer.vocab_size:,})"
        )
    for name, leaf in wanted.items():
        source = stored.get(_source_name(name, old.architecture, new.architecture))
        if source and "/layers/" in name and source.shape[1:] == leaf.shape[1:] and source.shape[0] < leaf.shape[0]:
            differences["depth"] = f"it has {source.shape[0]} layers where this model has {leaf.shape[0]}"
    if missing := [name for name in differences if name not in init.adapt]:
        raise CheckpointError(
            f"init_from.checkpoint={directory} does not fit: {'; '.join(differences[name] for name in missing)}; "
            f"use init_from.adapt={','.join([*init.adapt, *missing])} to adapt it"
        )


def _source_name(name: str, old: str, new: str) -> str | None:
    """Return the old parameter that a new one is initialized with; None: the old architecture has none."""
    if (old, new) != ("decoder", "encoder_decoder"):
        return name
    if "/cross_attention" in name or (name.startswith("encoder/") and "relative_bias" in name):
        return None
    return name.replace("encoder/", "decoder/", 1) if name.startswith("encoder/") else name


def _origin(
    config: Config, old: Config, name: str, leaf: jax.ShapeDtypeStruct, stored: Mapping[str, Leaf]
) -> ParameterSource:
    source = _source_name(name, old.model.architecture, config.model.architecture)
    if _is_new_head(name, stored) or source is None or tree.matches(name, config.init_from.reinitialize):
        return ParameterSource(None)
    layers: tuple[int, ...] = ()
    count = stored[source].shape[0] if "/layers/" in name and source in stored else leaf.shape[0]
    if "depth" in config.init_from.adapt and count < leaf.shape[0]:
        layers = tuple(y % count for y in range(leaf.shape[0]))
    return ParameterSource(source, layers, ROW_DIMS.get(name) if "vocabulary" in config.init_from.adapt else None)


def _is_new_head(name: str, stored: Mapping[str, Leaf]) -> bool:
    """Whether a parameter is part of a scalar head that the checkpoint does not have."""
    return name.startswith(SCALAR_HEAD) and name not in stored


def _as_stored(
    leaf: jax.ShapeDtypeStruct, origin: ParameterSource, stored: Mapping[str, Leaf], old: Config
) -> jax.ShapeDtypeStruct:
    """Return the shape that an old parameter must have to become `leaf`, sharded like it as far as possible."""
    shape = list(leaf.shape)
    if origin.layers:
        shape[0] = stored[origin.source].shape[0]
    if origin.rows is not None:
        shape[origin.rows] = old.vocab_rows
    mesh, spec = leaf.sharding.mesh, leaf.sharding.spec
    axes = [(part,) if isinstance(part, str) else part or () for part in spec]
    fitting = [
        part if size % math.prod(mesh.shape[axis] for axis in names) == 0 else None
        for part, names, size in zip(spec, axes, shape, strict=False)
    ]
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*fitting)))


def _adapt(array: Array, sharding: NamedSharding, origin: ParameterSource, rows: VocabularyMap | None) -> Array:
    if origin.layers:
        array = _stacker(origin.layers, sharding)(array)
    if origin.rows is not None:
        known = (rows.old_V != MEAN_ROW).reshape([-1 if dim == origin.rows else 1 for dim in range(array.ndim)])
        array = _mapper(origin.rows, rows.old_size, sharding)(array, np.maximum(rows.old_V, 0), known)
    return array


@cache  # one program for all parameters of a shape
def _stacker(layers: tuple[int, ...], sharding: NamedSharding) -> Callable[[Array], Array]:
    return jax.jit(lambda x: x[np.array(layers)], out_shardings=sharding)


@cache
def _mapper(dim: int, old_size: int, sharding: NamedSharding) -> Callable[[Array, np.ndarray, np.ndarray], Array]:
    def mapped(x: Array, old_V: Array, known: Array) -> Array:
        mean = jax.lax.slice_in_dim(x, 0, old_size, axis=dim).mean(dim, keepdims=True)
        taken = jnp.take(x, old_V, axis=dim)
        return jnp.where(jnp.broadcast_to(known, taken.shape), taken, jnp.broadcast_to(mean, taken.shape))

    return jax.jit(mapped, out_shardings=sharding)


def _describe(name: str, origin: ParameterSource, rows: VocabularyMap | None) -> str:
    if not origin.source:
        return "new, random"
    parts = []
    if origin.layers:
        parts.append(f"stacked from layers {' '.join(map(str, origin.layers))}")
    if origin.rows is not None:
        parts.append(rows.text)
    text = ", ".join(parts) or "copied"
    return text if origin.source == name else f"{text}, from {origin.source}"
