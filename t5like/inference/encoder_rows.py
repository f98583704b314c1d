"""What an encoder computes for single texts: labels of a head, and embeddings. Texts of similar length share a batch.

Used by `t5like predict` and `t5like embed` (`cli.encoder_files`), `run.Run` and `evaluation.label_eval`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5like.config.schema import Config
from t5like.data.objectives.masking import CLS
from t5like.data.store.label_numbers import encode_words
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.errors import ConfigError, shown
from t5like.inference.loglikelihood import bucket
from t5like.model.transformer import Transformer
from t5like.sharding.placement import to_host
from t5like.types import Batch, Tree

TOKENS = 2**14  # of a batch, padding included


class EncoderRow(NamedTuple):
    """One text, or a pair.

    Attributes:
        ids: what the encoder reads, special tokens included.
        second: index of the first token of a pair's second text; the number of tokens if there is none.
        words: index of the first token of each word, -1 for a word without tokens; only for token classification.
    """

    ids: Sequence[int]
    second: int
    words: Sequence[int] = ()


def check_encoder(config: Config) -> None:
    """Raise ConfigError if a model has no encoder."""
    if not config.model.has_encoder:
        raise ConfigError("model.architecture=decoder has no encoder; use a run with one")


def row_of(config: Config, tokenizer: Tokenizer, text: str, second: str = "") -> EncoderRow:
    """A text, or a pair, as the encoder of a model reads it in training: encoders have [CLS] in front of it.

    Raises:
        ConfigError: the model has no encoder, the text is longer than its positions, or there is a second text where
            there should be none, or none where there should be one.
    """
    data = config.data
    check_encoder(config)
    if bool(second) != bool(data.label_objective and data.second_template):
        what = "two texts, with a tab between them" if not second else "one text"
        raise ConfigError(f"text={shown(text)}: this model reads {what}")
    start = [int(tokenizer.sentinel_ids[CLS])] if config.model.architecture == "encoder" else []
    words: list[int] = []
    if data.label_objective == "token_classification":
        ids_T, word_T = encode_words(tokenizer, text.split())
        first_of = {number: len(start) + place for place, number in enumerate(word_T.tolist()) if number}
        words = [first_of.get(number, -1) for number in range(1, len(text.split()) + 1)]
        ids = [*start, *ids_T.tolist(), tokenizer.eos_id]
    else:
        ids = [*start, *tokenizer.encode(text), tokenizer.eos_id]
    border = len(ids)
    if second:
        ids += [*tokenizer.encode(second), tokenizer.eos_id]
    if len(ids) > config.model.longest_text:
        raise ConfigError(
            f"text={shown(text)} has {len(ids)} tokens, more than model.max_length={config.model.max_length}; "
            "shorten it"
        )
    return EncoderRow(ids, border, words)


def label_outputs(
    config: Config, params: Tree, rows: Sequence[EncoderRow], progress: Callable[[int], None] = lambda done: None
) -> list[np.ndarray]:
    """The output of the head for each row: float32 [C]; of token classification [len(ids), C].

    Args:
        config: resolved, of a model with a head for labels.
        rows: see `row_of`.
        progress: called with the number of rows done.
    """
    found = _in_batches(config, partial(_label_outputs, config.of_model(), params), rows, progress)
    if config.data.label_objective == "token_classification":
        return [x_SC[: len(row.ids)] for x_SC, row in zip(found, rows, strict=True)]
    return [x_SC[0] for x_SC in found]


def embeddings(
    config: Config, params: Tree, rows: Sequence[EncoderRow], progress: Callable[[int], None] = lambda done: None
) -> np.ndarray:
    """The mean of the encoder's output over each row's tokens, special ones included: float32 [len(rows), D].

    That is the mean pooling of sentence-transformers (Reimers & Gurevych 2019, section 3). Arguments: `label_outputs`.
    """
    found = _in_batches(config, partial(_embeddings, config.of_model(), params), rows, progress)
    return np.stack(found) if found else np.zeros((0, config.model.model_dim), np.float32)


def _in_batches(
    config: Config,
    compute: Callable[[Batch], jax.Array],
    rows: Sequence[EncoderRow],
    progress: Callable[[int], None],
) -> list[np.ndarray]:
    """`compute` for each row, in their order; rows are sorted by length, and all rows of a batch padded to one."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    mesh, found, done = jax.sharding.get_abstract_mesh(), {}, 0
    shards = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
    while done < len(order):
        width = bucket(len(rows[order[done]].ids))
        most = max(TOKENS // width, 1)
        part = [index for index in order[done : done + most] if len(rows[index].ids) <= width]
        count = min(-(-_power_of_two(len(part)) // shards) * shards, -(-most // shards) * shards)
        outputs = to_host(compute(_batch([rows[index] for index in part], count, width, config)))
        found |= dict(zip(part, outputs, strict=False))
        done += len(part)
        progress(done)
    return [found[index] for index in range(len(rows))]


def _batch(rows: Sequence[EncoderRow], count: int, width: int, config: Config) -> Batch:
    """The rows, and as many rows of padding as are missing."""
    ids_BS, segments_BS, types_BS = (np.zeros((count, width), np.int32) for _ in range(3))
    for index, row in enumerate(rows):
        ids_BS[index, : len(row.ids)], segments_BS[index, : len(row.ids)] = row.ids, 1
        types_BS[index, row.second : len(row.ids)] = 1
    pairs = config.model.token_types > 1
    return Batch(
        None, ids_BS, segments_BS.astype(np.float32), ids_BS, segments_BS, token_types_BS=types_BS if pairs else None
    )


def _power_of_two(number: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (number - 1).bit_length()


@partial(jax.jit, static_argnames="config")
def _label_outputs(config: Config, params: Tree, batch: Batch) -> jax.Array:
    logits_BSC = Transformer(config).apply({"params": params}, batch)
    return logits_BSC if config.data.label_objective == "token_classification" else logits_BSC[:, :1]


@partial(jax.jit, static_argnames="config")
def _embeddings(config: Config, params: Tree, batch: Batch) -> jax.Array:
    model, ids_BS, segments_BS = Transformer(config), batch.encoder_BS, batch.encoder_segments_BS
    if config.model.has_decoder:
        x_BSD = model.apply({"params": params}, ids_BS, segments_BS, method="encode")
    else:  # with the token types of a pair
        x_BSD = model.apply({"params": params}, batch, method="hidden").x_BLD
    real_BS1 = (batch.encoder_segments_BS > 0)[..., None]
    sums_BD = jnp.where(real_BS1, x_BSD.astype(jnp.float32), 0).sum(1)
    return sums_BD / jnp.maximum(real_BS1.sum(1), 1)
