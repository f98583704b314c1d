"""Where each parameter of a run that starts from another run comes from, chosen by name and shape before reading.

* architecture: an encoder-decoder from a decoder-only model, as T5Gemma (Zhang et al. 2025, arXiv:2504.06225). Both
  stacks start as its layers, and cross-attention with its norms as its self-attention. If one of these has another
  shape, because the encoder and the decoder differ in size, all of cross-attention is random. The encoder's relative
  bias is random: its buckets are bidirectional, the decoder's are not.
  An encoder from an encoder-decoder is its encoder.
* vocabulary: rows are mapped from tokenizer to tokenizer by piece, sentinels by index. Rows of pieces that the old
  tokenizer does not have are the mean of all old rows (Hewitt 2021, "Initializing New Word Embeddings for Pretrained
  Language Models").
* depth: the old stack is repeated from the bottom, layers 0 1 for 5 give 0 1 0 1 0 (Gong et al. 2019, "Efficient
  Training of BERT by Progressively Stacking").

Called by `init_from`.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from t5like import tree
from t5like.checkpoint.digests import Leaf
from t5like.config.schema import Config
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.optim.new_parameters import NEW_HEADS

ROW_DIMS = {
    "embedding": 0,
    "decoder_embedding": 0,
    "head": 1,
    "head_bias": 0,
}  # parameters with a row for each token id, and the dim of the rows
UNUSED_BY_LABELS = ("mlm/.*", "head", "head_bias", "pairs/.*")  # ignored by a model that predicts labels
MEAN_ROW = -1  # in a VocabularyMap: there is no old row
STACKS = ("encoder/", "decoder/")
FROM_PAIR = ("encoder_decoder", "encoder")  # an encoder from that of an encoder-decoder
POOLERS = ("label_head/pooler/", "pairs/pooler/")  # BERT's classifiers begin with the pooler of its pretraining


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


def is_new_head(name: str, stored: Mapping[str, Leaf]) -> bool:
    """Whether a parameter is part of a head of `NEW_HEADS` that the checkpoint does not have: it is then random."""
    return tree.matches(name, NEW_HEADS) and name not in stored


def own_or_pooler(name: str, stored: Collection[str]) -> str:
    """The name of a parameter in a checkpoint: its own, or for a classifier's pooler that of BERT's pretraining."""
    pretrained = name.replace(*POOLERS)
    return pretrained if name not in stored and pretrained in stored else name


def ignored(config: Config, old: Config, stored: Iterable[str], sources: Collection[str]) -> list[str]:
    """Old parameters that are left out, because this model has no use for them: heads, or the decoder.

    Args:
        config, old, stored: as in `source_names`.
        sources: old parameters that are used.
    """
    unused = [*NEW_HEADS]
    unused += UNUSED_BY_LABELS if config.data.label_objective else ()
    unused += ["decoder/.*"] if (old.model.architecture, config.model.architecture) == FROM_PAIR else []
    return [name for name in stored if name not in sources and tree.matches(name, unused)]


def source_names(
    config: Config, old: Config, wanted: Mapping[str, jax.ShapeDtypeStruct], stored: Mapping[str, Leaf]
) -> dict[str, str | None]:
    """The old parameter of each new one, by name; None: the old model has none for it.

    Args:
        config: of the run.
        old: of the checkpoint.
        wanted: new parameters.
        stored: old parameters.
    """
    if config.model.architecture != "encoder_decoder" or old.model.architecture == "encoder_decoder":
        return {name: own_or_pooler(name, stored) for name in wanted}
    stack = "decoder/" if old.model.has_decoder else "encoder/"
    names: dict[str, str | None] = {}
    for name in wanted:
        moved = f"{stack}{name.removeprefix('encoder/')}" if name.startswith("encoder/") else name
        new_bias = "relative_bias" in name and moved != name
        names[name] = None if new_bias else moved.replace("/cross_attention", "/attention", 1)
    if "decoder_embedding" in names:
        names["decoder_embedding"] = "embedding"
    crossed = [name for name in wanted if "/cross_attention" in name]
    fits = lambda leaf, source: source is not None and source.shape[1:] == leaf.shape[1:]  # whatever the depth
    if not all(fits(wanted[name], stored.get(names[name])) for name in crossed):
        names |= dict.fromkeys(crossed)
    return names


def choose_source(
    config: Config, name: str, leaf: jax.ShapeDtypeStruct, source: str | None, stored: Mapping[str, Leaf]
) -> ParameterSource:
    """How a parameter is made of the old one that `source_names` gives it."""
    if source is None or is_new_head(source, stored) or tree.matches(name, config.init_from.reinitialize):
        return ParameterSource(None)
    layers: tuple[int, ...] = ()
    count = stored[source].shape[0] if "/layers/" in name and source in stored else leaf.shape[0]
    if "depth" in config.init_from.adapt and count < leaf.shape[0]:
        layers = tuple(y % count for y in range(leaf.shape[0]))
    return ParameterSource(source, layers, ROW_DIMS.get(name) if "vocabulary" in config.init_from.adapt else None)


def unused(stored: Mapping[str, Leaf], sources: Mapping[str, object]) -> list[str]:
    """Old parameters that one of two checkpoints may have without use: those outside of the stack that is taken.

    Also the relative bias of that stack, as a decoder's does not fit an encoder.
    """
    taken = tuple(stack for stack in STACKS if any(source.startswith(stack) for source in sources))
    return [
        name
        for name in stored
        if name not in sources and ("relative_bias" in name or not (taken and name.startswith(taken)))
    ]


def describe(name: str, origin: ParameterSource, rows: VocabularyMap | None, of: str = "") -> str:
    """The source of a parameter in words; `of` names the checkpoint, where there are two."""
    if not origin.source:
        return "new, random"
    parts = []
    if origin.layers:
        parts.append(f"stacked from layers {' '.join(map(str, origin.layers))}")
    if origin.rows is not None:
        parts.append(rows.text)
    text = ", ".join(parts) or "copied"
    return text + (f", from {origin.source}" if origin.source != name else "") + of
