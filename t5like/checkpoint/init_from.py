"""Initial weights from another run: unchanged, or adapted to another architecture, vocabulary or depth.

`init_from.adapt` lists which differences are adapted; every other difference is refused. The source of each parameter
is chosen by name and shape before anything is read (`parameter_sources`), and reported. Arrays are read once, onto the
mesh of this run, and released one at a time as they are adapted: there is never a second copy of the model.

With `init_from.decoder_checkpoint` there are two: the encoder comes from one, everything else from the other.

Called by `train.initial_state`.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from t5like import tree
from t5like.checkpoint import base_weights, parameter_sources, recovery
from t5like.checkpoint.allowed_changes import initial_fields
from t5like.checkpoint.checkpoints import Checkpoints
from t5like.checkpoint.digests import Leaf
from t5like.checkpoint.metadata import Meta
from t5like.checkpoint.parameter_sources import (
    FROM_PAIR,
    MEAN_ROW,
    ROW_DIMS,
    ParameterSource,
    VocabularyMap,
    map_vocabulary,
)
from t5like.checkpoint.run_directory import check_initial_run
from t5like.config import loader
from t5like.config.model_schema import DECODER_SIZES
from t5like.config.schema import Config, get
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.errors import CheckpointError
from t5like.io.atomic import replace_file
from t5like.io.paths import expand
from t5like.optim import new_parameters
from t5like.types import Array, TrainState, Tree

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
        "separate_embeddings",
        "merged_attention",
        *(f"decoder_{size}" for size in DECODER_SIZES),
    )
)


class InitialWeights(NamedTuple):
    """The weights that a run starts from.

    Attributes:
        params: by name, with the shardings of the run; without the random ones.
        source: steps and run directories, in words.
        report: a line for each parameter: its name and its source.
        differs: other fields of the model that differ from the checkpoint's, a line for each; they may be intended.
        base, record: of a LoRA run: `TrainState.base`, and what identifies it (`base_weights.record`).
    """

    params: dict[str, Array]
    source: str
    report: list[str]
    differs: list[str]
    base: Tree | None = None
    record: Mapping[str, str] = {}


class Part(NamedTuple):
    """A checkpoint, and what is taken from it.

    Attributes:
        field: of the config, with the run directory.
        step: of the checkpoint; -1: the newest one that can be read.
        wanted: shape, dtype and sharding of the parameters of this run that come from it, by name.
        whole: whether it must contain nothing else.
    """

    field: str
    step: int
    wanted: dict[str, jax.ShapeDtypeStruct]
    whole: bool


def load_initial_weights(config: Config, abstract: TrainState, tokenizer: Tokenizer) -> InitialWeights:
    """Read the weights of `init_from.checkpoint`, adapted as `init_from.adapt` says.

    A parameter whose name matches `init_from.reinitialize` is random. The checkpoint must contain all other ones, and
    no more. The moving average is used if that run has one. If `init_from.step` names no step, damaged checkpoints are
    reported, and the newest one before them is used. The same holds for `init_from.decoder_checkpoint`.

    Args:
        config: of this run.
        abstract: shape, dtype and sharding of every parameter of this run.
        tokenizer: this run's.

    Raises:
        CheckpointError: there is no such checkpoint, or it does not fit; with a list of the differences.
        ConfigError: a pattern of `init_from.reinitialize` matches no parameter, or `init_from.warmup_steps` has no
            parameter to train.
    """
    init = config.init_from
    check_initial_run(config, None)
    tree.mask(abstract.params, init.reinitialize, field="init_from.reinitialize")
    new_parameters.check(config, abstract.params)
    if config.lora.rank:
        read_base = lambda checkpoints, step: _read_base(config, abstract, tokenizer, checkpoints, step)
        return _load("init_from.checkpoint", config, init.step, read_base)
    parts = [
        _load(part.field, config, part.step, partial(_read, config, tokenizer, part))
        for part in _parts(config, tree.flatten(abstract.params))
    ]
    params = {name: array for part in parts for name, array in part.params.items()}
    join = lambda field: [line for part in parts for line in getattr(part, field)]
    return InitialWeights(params, " and ".join(part.source for part in parts), join("report"), join("differs"))


def _parts(config: Config, wanted: dict[str, jax.ShapeDtypeStruct]) -> list[Part]:
    """The checkpoints of a run's initial weights."""
    init = config.init_from
    if not init.decoder_checkpoint:
        return [Part("init_from.checkpoint", init.step, wanted, whole=True)]
    own = ("encoder/", "embedding") if config.model.separate_embeddings else ("encoder/",)
    of_encoder = {name: leaf for name, leaf in wanted.items() if name.startswith(own)}
    rest = {name: leaf for name, leaf in wanted.items() if name not in of_encoder}
    return [
        Part("init_from.checkpoint", init.step, of_encoder, whole=False),
        Part("init_from.decoder_checkpoint", init.decoder_step, rest, whole=False),
    ]


def _load(
    field: str, config: Config, step: int, read_step: Callable[[Checkpoints, int], InitialWeights]
) -> InitialWeights:
    """Read the step of the run that a field of the config names; if it is -1, the newest one that is not damaged."""
    checkpoints = Checkpoints(expand(get(config, field)) / "checkpoints", keep=1, flag=f"{field}=")
    read = partial(read_step, checkpoints)
    if step >= 0:
        return read(step)
    readable = recovery.newest_readable(checkpoints, checkpoints.steps() or [checkpoints.meta().step], read)
    recovery.warn(readable)
    return readable.value


def _read(config: Config, tokenizer: Tokenizer, part: Part, checkpoints: Checkpoints, step: int) -> InitialWeights:
    """Read a part from one checkpoint; errors as in `load_initial_weights`."""
    init, meta, wanted = config.init_from, checkpoints.meta(step), part.wanted
    base_weights.refuse_adapters(meta, part.field, checkpoints.directory.parent)
    stored = {name.partition("/")[2]: leaf for name, leaf in meta.weights().items()}
    names = parameter_sources.source_names(config, meta.config, wanted, stored)
    _check_adapted(config, meta, stored, part, names, tokenizer)
    rows = _map_from(config, meta, tokenizer) if "vocabulary" in init.adapt else None
    origins = {
        name: parameter_sources.choose_source(config, name, leaf, names[name], stored) for name, leaf in wanted.items()
    }
    sources = {
        origin.source: _as_stored(wanted[name], origin, stored, meta.config)
        for name, origin in origins.items()
        if origin.source
    }
    left_out = parameter_sources.ignored(config, meta.config, stored, sources)
    if not part.whole:
        left_out += parameter_sources.unused(stored, sources)
    without = (*init.reinitialize, *map(re.escape, left_out))
    read = checkpoints.restore_params(sources, meta.step, ema=meta.has_average, without=without)
    last = {origin.source: name for name, origin in origins.items()}  # the last parameter that uses each source
    params = {}
    for name, origin in origins.items():
        if origin.source:
            array = read.pop(origin.source) if last[origin.source] == name else jnp.copy(read[origin.source])
            params[name] = _adapt(array, wanted[name].sharding, origin, rows)
            del array
    directory = get(config, part.field)
    of = "" if part.whole else f", of {directory}"
    width = max(map(len, origins))
    report = [
        f"{name:{width}}  {parameter_sources.describe(name, origin, rows, of)}" for name, origin in origins.items()
    ]
    model = config.model.in_decoder if part.field == "init_from.decoder_checkpoint" else config.model
    differs = _other_differences(meta.config, dataclasses.replace(config, model=model))
    return InitialWeights(params, f"step {meta.step:,} of {directory}", report, [line + of for line in differs])


def _read_base(
    config: Config, abstract: TrainState, tokenizer: Tokenizer, checkpoints: Checkpoints, step: int
) -> InitialWeights:
    """Read one checkpoint as the base of a LoRA run; errors as in `load_initial_weights`."""
    meta, directory = checkpoints.meta(step), config.init_from.checkpoint
    if tokenizer.hash != meta.tokenizer_hash:
        raise CheckpointError(
            f"init_from.checkpoint={directory} has another tokenizer than tokenizer.path={config.tokenizer.path}, "
            "which adapters can't change; leave tokenizer.path out"
        )
    params, base = base_weights.read(config, abstract, checkpoints, meta)
    kinds = {name: "copied, trained" if name in params else "new, random" for name in tree.flatten(abstract.params)}
    kinds |= {name: f"unchanged, {leaf.dtype}" for name, leaf in tree.flatten(base).items()}
    report = [f"{name:{max(map(len, kinds))}}  {kind}" for name, kind in kinds.items()]
    source, differs = f"step {meta.step:,} of {directory}", _other_differences(meta.config, config)
    return InitialWeights(params, source, report, differs, base, base_weights.record(meta))


def _other_differences(old: Config, new: Config) -> list[str]:
    """Fields of the model that differ, and are not a part of the report of parameters."""
    lines = loader.difference(old, new)
    without = UNREPORTED_FIELDS + initial_fields(old, new)
    return [line for line in lines if line.startswith("model.") and not line.startswith(without)]


def write_report(workdir: Path, config: Config, weights: InitialWeights) -> None:
    """Write the source of each parameter into the run directory, from process 0.

    Raises:
        CheckpointError: it can't be written.
    """
    if jax.process_index() != 0:
        return
    init = config.init_from
    adapted = f", init_from.adapt={','.join(init.adapt)}" if init.adapt else ""
    text = "\n".join([f"{weights.source}{adapted}", "", *weights.report, *weights.differs]) + "\n"
    replace_file(workdir / REPORT, text, CheckpointError)


def _map_from(config: Config, meta: Meta, tokenizer: Tokenizer) -> VocabularyMap:
    old = Tokenizer(meta.tokenizer, num_sentinels=meta.config.tokenizer.num_sentinels, origin="the old tokenizer")
    return map_vocabulary(old, tokenizer, config.vocab_rows)


def _check_adapted(
    config: Config,
    meta: Meta,
    stored: Mapping[str, Leaf],
    part: Part,
    names: Mapping[str, str | None],
    tokenizer: Tokenizer,
) -> None:
    """Refuse a difference that could be adapted but is not named in `init_from.adapt`; `names`: `source_names`."""
    init, old, new = config.init_from, meta.config.model, config.model
    differences = {}
    if (old.architecture, new.architecture) == ("decoder", "encoder_decoder"):
        differences["architecture"] = f"it is a decoder-only model, not model.architecture={new.architecture}"
    if (old.architecture, new.architecture) == FROM_PAIR:
        differences["architecture"] = f"it is an encoder-decoder, not model.architecture={new.architecture}"
    if part.field == "init_from.decoder_checkpoint" and old.architecture != "decoder":
        raise CheckpointError(
            f"{part.field}={init.decoder_checkpoint} has model.architecture={old.architecture}, and must be "
            "decoder-only; use the directory of a run with model.architecture=decoder"
        )
    if tokenizer.hash != meta.tokenizer_hash and not all(
        tree.matches(name, init.reinitialize) for name in part.wanted if name in ROW_DIMS
    ):
        differences["vocabulary"] = (
            f"its tokenizer is different ({meta.config.tokenizer.vocab_size:,} ids, not {tokenizer.vocab_size:,})"
        )
    for name, leaf in part.wanted.items():
        source = stored.get(names[name])
        if source and "/layers/" in name and source.shape[1:] == leaf.shape[1:] and source.shape[0] < leaf.shape[0]:
            differences["depth"] = f"it has {source.shape[0]} layers where this model has {leaf.shape[0]}"
    if missing := [name for name in differences if name not in init.adapt]:
        raise CheckpointError(
            f"{part.field}={get(config, part.field)} does not fit: "
            f"{'; '.join(differences[name] for name in missing)}; "
            f"use init_from.adapt={','.join([*init.adapt, *missing])} to adapt it"
        )


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
