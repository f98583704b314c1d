"""Weights of another run as the beginning of this one: as they are, or adapted to architecture, vocabulary, depth.

`init_from.adapt` lists which differences are adapted; every other difference is refused. The source of each parameter
is chosen by name and shape before anything is read (`ParameterSource`), and reported. Arrays are read once, onto the
mesh of this run, and released one at a time as they are adapted: there is never a second copy of the model.

* architecture: an encoder-decoder from a decoder-only model. Both stacks begin as its layers; cross-attention with its
  norm, and the encoder's relative bias (its buckets look both ways, the decoder's do not) begin at random.
* vocabulary: rows go from tokenizer to tokenizer by piece, sentinels by number; those of pieces that the old one did
  not have begin at the mean of all its rows (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language
  Models").
* depth: the old stack repeated from the bottom, layers 0 1 for 5 give 0 1 0 1 0 (Gong et al. 2019, "Efficient Training
  of BERT by Progressively Stacking").

Called by `train`.
"""

import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from t5like import tree
from t5like.checkpoint.checkpoints import Checkpoints
from t5like.checkpoint.digests import Leaf
from t5like.checkpoint.metadata import Meta
from t5like.config import loader
from t5like.config.schema import Config
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.errors import CheckpointError
from t5like.io.atomic import replace_file
from t5like.io.paths import expand
from t5like.types import Array, TrainState

ROW_DIMS = {"embedding": 0, "head": 1, "head_bias": 0}  # the parameters with a row for each id, and which dim that is
REPORT = "init_from.txt"  # in the run directory
FREE = tuple(  # fields of the model that change no output, and those that `InitialWeights.report` tells of
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
MEAN_ROW = -1  # in a row map: no old row


class ParameterSource(NamedTuple):
    """Where a parameter comes from.

    Attributes:
        source: the old parameter's name; None: it begins at random.
        layers: the old layer of each layer; empty: as they are.
        rows: the dim whose rows are mapped to another vocabulary; None: as they are.
    """

    source: str | None
    layers: tuple[int, ...] = ()
    rows: int | None = None


class VocabularyMap(NamedTuple):
    """A map from a new vocabulary's rows to an old one's.

    Attributes:
        old_V: int32 [new rows], the old row of each, or `MEAN_ROW`; padding rows too have `MEAN_ROW`.
        old_size: rows of the old vocabulary that are ids; those behind them are padding.
        text: how many there are of each kind, in words.
    """

    old_V: np.ndarray
    old_size: int
    text: str


class InitialWeights(NamedTuple):
    """The weights that a run begins with.

    Attributes:
        params: by name, each where the run's mesh has it; without those that begin at random.
        step: of the checkpoint.
        report: a line for each parameter: its name, and how it begins.
        differs: what else of the model is not as it was there, a line for each field: it may be meant.
    """

    params: dict[str, Array]
    step: int
    report: list[str]
    differs: list[str]


def load_initial_weights(config: Config, abstract: TrainState, tokenizer: Tokenizer) -> InitialWeights:
    """Read the weights of `init_from.checkpoint`, adapted as `init_from.adapt` says.

    A parameter whose name matches `init_from.reinitialize` begins at random; every other one has to be there, and
    nothing may be left over. The moving average is taken where that run keeps one.

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
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"init_from.checkpoint={init.checkpoint} holds no run; name the directory of a trained one"
        )
    tree.mask(abstract.params, init.reinitialize, field="init_from.reinitialize")
    checkpoints = Checkpoints(directory / "checkpoints", keep=1)
    meta = checkpoints.meta(None if init.step < 0 else init.step)
    ema = any(name.startswith("ema/") for name in meta.leaves)
    prefix = "ema/" if ema else "params/"
    stored = {name.removeprefix(prefix): leaf for name, leaf in meta.leaves.items() if name.startswith(prefix)}
    wanted = tree.flatten(abstract.params)
    _check_adapted(config, meta, stored, wanted, tokenizer, directory)
    rows = _rows(config, meta, tokenizer) if "vocabulary" in init.adapt else None
    origins = {name: _origin(config, meta.config, name, leaf, stored) for name, leaf in wanted.items()}
    sources = {
        origin.source: _as_stored(wanted[name], origin, stored, meta.config)
        for name, origin in origins.items()
        if origin.source
    }
    read = checkpoints.restore_params(sources, meta.step, ema=ema, without=init.reinitialize)
    last = {origin.source: name for name, origin in origins.items()}  # who uses each source last
    params = {}
    for name, origin in origins.items():
        if origin.source:
            array = read.pop(origin.source) if last[origin.source] == name else jnp.copy(read[origin.source])
            params[name] = _adapted(array, wanted[name].sharding, origin, rows)
            del array
    width = max(map(len, origins))
    report = [f"{name:{width}}  {_words(name, origin, rows)}" for name, origin in origins.items()]
    differs = loader.difference(meta.config, config)
    return InitialWeights(
        params, meta.step, report, [line for line in differs if line.startswith("model.") and not line.startswith(FREE)]
    )


def write_report(workdir: Path, config: Config, weights: InitialWeights) -> None:
    """Write how each parameter began into the run directory, from the first process.

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
    """Map a new tokenizer's ids to an old one's: special ids by their role, sentinels by number, the rest by piece.

    A piece that only the new one has, a sentinel beyond the old ones, and the rows behind the new one's ids map to
    `MEAN_ROW`.
    """
    own = {*old.sentinel_ids.tolist(), old.pad_id, old.eos_id, old.unk_id}
    pieces = {old.name(token): token for token in range(old.vocab_size) if token not in own and old.name(token)}
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
    return VocabularyMap(old_V, old.vocab_size, text + (f", {lost:,} old rows without a place" if lost else ""))


def _rows(config: Config, meta: Meta, tokenizer: Tokenizer) -> VocabularyMap:
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
    found = {}
    if (old.architecture, new.architecture) == ("decoder", "encoder_decoder"):
        found["architecture"] = f"it is a decoder-only model, not model.architecture={new.architecture}"
    if tokenizer.hash != meta.tokenizer_hash and not all(
        tree.matches(name, init.reinitialize) for name in wanted if name in ROW_DIMS
    ):
        found["vocabulary"] = (
            f"its tokenizer is another one ({meta.config.tokenizer.vocab_size:,} ids, not {tokenizer.vocab_size:,})"
        )
    for name, leaf in wanted.items():
        there = stored.get(_source_name(name, old.architecture, new.architecture))
        if there and "/layers/" in name and there.shape[1:] == leaf.shape[1:] and there.shape[0] < leaf.shape[0]:
            found["depth"] = f"it has {there.shape[0]} layers where this model has {leaf.shape[0]}"
    if missing := [name for name in found if name not in init.adapt]:
        raise CheckpointError(
            f"init_from.checkpoint={directory} does not fit: {'; '.join(found[name] for name in missing)}; "
            f"use init_from.adapt={','.join([*init.adapt, *missing])} to begin with it all the same"
        )


def _source_name(name: str, old: str, new: str) -> str | None:
    """The old parameter that a new one begins as; None: the old architecture has none."""
    if (old, new) != ("decoder", "encoder_decoder"):
        return name
    if "/cross_attention" in name or (name.startswith("encoder/") and "relative_bias" in name):
        return None
    return name.replace("encoder/", "decoder/", 1) if name.startswith("encoder/") else name


def _origin(
    config: Config, old: Config, name: str, leaf: jax.ShapeDtypeStruct, stored: Mapping[str, Leaf]
) -> ParameterSource:
    source = _source_name(name, old.model.architecture, config.model.architecture)
    if source is None or tree.matches(name, config.init_from.reinitialize):
        return ParameterSource(None)
    layers: tuple[int, ...] = ()
    count = stored[source].shape[0] if "/layers/" in name and source in stored else leaf.shape[0]
    if "depth" in config.init_from.adapt and count < leaf.shape[0]:
        layers = tuple(y % count for y in range(leaf.shape[0]))
    return ParameterSource(source, layers, ROW_DIMS.get(name) if "vocabulary" in config.init_from.adapt else None)


def _as_stored(
    leaf: jax.ShapeDtypeStruct, origin: ParameterSource, stored: Mapping[str, Leaf], old: Config
) -> jax.ShapeDtypeStruct:
    """What an old parameter has to be, so that it can become `leaf`; split like it as far as its shape allows."""
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


def _adapted(array: Array, sharding: NamedSharding, origin: ParameterSource, rows: VocabularyMap | None) -> Array:
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


def _words(name: str, origin: ParameterSource, rows: VocabularyMap | None) -> str:
    if not origin.source:
        return "new, at random"
    parts = []
    if origin.layers:
        parts.append(f"stacked from layers {' '.join(map(str, origin.layers))}")
    if origin.rows is not None:
        parts.append(rows.text)
    told = ", ".join(parts) or "copied"
    return told if origin.source == name else f"{told}, from {origin.source}"
