"""Rows of a batch as JSON values: what each token is, which targets carry weight, segments, fill and waste.

A row has one or two sequences: ``encoder`` and ``targets``, or ``decoder`` and ``targets``; an encoder-only row has
``encoder`` with the targets of its masked places. Called by `inspect.data`; `data_text` and `data_page` show them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from t5like.config.schema import Config, DataConfig
from t5like.data.pipeline import Component
from t5like.data.sources.names import source_names
from t5like.data.tokenizers.tokenizer import Tokenizer
from t5like.data.tokenizers.vocabulary import DECODER_START_ID
from t5like.types import Array, Batch

PARTIAL = "\ufffd"  # what a part of a character decodes to
SENTINEL, SPECIAL, UNKNOWN, BYTE, TEXT = "sentinel", "special", "unknown", "byte", "text"


class TokenTexts:
    """The text and the kind of single tokens, with the space that a token begins with."""

    def __init__(self, tokenizer: Tokenizer, data: DataConfig | None = None):
        """`data`: the section of the config, whose objective decides what targets are; None: tokens."""
        self._tokenizer, self._data = tokenizer, data
        self._sentinels = dict(zip(tokenizer.sentinel_ids.tolist(), tokenizer.sentinel_names, strict=True))
        self._anchor = tokenizer.encode("a")[-1]  # without a token before it, some tokenizers drop that space
        self._before = tokenizer.decode([self._anchor])
        self._texts: dict[int, str] = {}

    def kind(self, token: int) -> str:
        """One of the kinds of this module."""
        if token in self._sentinels:
            return SENTINEL
        if token == self._tokenizer.unk_id:
            return UNKNOWN
        if not 0 <= token < self._tokenizer.vocab_size or not self._tokenizer.ordinary_V[token]:
            return SPECIAL
        return BYTE if self._tokenizer.byte_fallback_V[token] or PARTIAL in self._ordinary(token) else TEXT

    def text(self, token: int) -> str:
        """A token of text as text, another one by its name."""
        if token not in self._texts:
            self._texts[token] = self._text(token)
        return self._texts[token]

    def target_text(self, target: float) -> str:
        """A target of an encoder: a token, the name of a label, or a number."""
        if self._data is None or self._data.label_objective is None:
            return self.text(int(target))
        return self._data.labels[int(target)] if self._data.labels else f"{target:g}"

    def decoder_text(self, token: int) -> str:
        """The text of a decoder's input; the id of padding is START there, unless it is a token of text."""
        return "START" if token == DECODER_START_ID and self.kind(token) == SPECIAL else self.text(token)

    def _text(self, token: int) -> str:
        if token in self._sentinels:
            return self._sentinels[token]
        if not 0 <= token < self._tokenizer.vocab_size:
            return f"<{token}: not in the vocabulary>"
        if not self._tokenizer.ordinary_V[token] or self._tokenizer.byte_fallback_V[token]:
            return self._tokenizer.name(token) or f"<{token}>"
        return self._ordinary(token)

    def _ordinary(self, token: int) -> str:
        """The text of a token of text; U+FFFD for a part of a character, in byte-level tokenizers."""
        joined = self._tokenizer.decode([self._anchor, token])
        if joined.startswith(self._before):
            return joined.removeprefix(self._before)
        return self._tokenizer.decode([token])


def real_positions(ids_BL: Array, segments_BL: Array | None, weights_BL: Array | None = None) -> np.ndarray:
    """bool [B, L]: positions that are not padding: those with a segment; without segments, up to the last token.

    A position with weight is never padding here, so that weight on padding can be found.
    """
    if segments_BL is not None:
        return segments_BL > 0
    used_BL = ids_BL != 0
    if weights_BL is not None:
        used_BL = used_BL | (weights_BL > 0)
    return np.flip(np.maximum.accumulate(np.flip(used_BL, axis=1), axis=1), axis=1)


def describe_rows(
    config: Config,
    tokenizer: Tokenizer,
    components: Sequence[Component],
    batch: Batch,
    component_B: np.ndarray,
    number_B: np.ndarray,
) -> list[dict[str, Any]]:
    """The rows of a batch.

    Args:
        config: of the step.
        tokenizer: of the run.
        components: of the config.
        batch: in numpy, with exactly the rows to describe.
        component_B: their components.
        number_B: their numbers in the run.
    """
    texts, sources = TokenTexts(tokenizer, config.data), source_names(config.data)
    rows = []
    for index, number in enumerate(number_B.tolist()):
        component = components[component_B[index]]
        row = {
            "row": number,
            "source": sources[component.source],
            "objective": config.data.objective[component.objective],
            "denoiser": component.name,
            "sequences": _sequences(Batch(*(None if x is None else x[index] for x in batch)), texts),
        }
        if batch.follows_B1 is not None and (follows := int(batch.follows_B1[index, 0])) >= 0:
            row["second_text_follows"] = bool(follows)
        rows.append(row)
    return rows


def _sequences(row: Batch, texts: TokenTexts) -> list[dict[str, Any]]:
    """The sequences of one row; the arrays of `row` have no batch dim."""
    if row.decoder_BL is None:
        targets = {"weights": row.weights_BL, "targets": row.targets_BL, "types": row.token_types_BS}
        return [_sequence("encoder", texts, row.encoder_BS, row.encoder_segments_BS, None, **targets)]
    segments, positions = row.decoder_segments_BL, row.decoder_positions_BL
    target = _sequence("targets", texts, row.targets_BL, segments, positions, row.weights_BL, reads=row.decoder_BL)
    if row.encoder_BS is None:
        real = real_positions(row.targets_BL[None], None if segments is None else segments[None], row.weights_BL[None])
        return [
            _sequence("decoder", texts, row.decoder_BL, segments, positions, prefix=row.prefix_BL, real=real[0]),
            target,
        ]
    encoder = _sequence("encoder", texts, row.encoder_BS, row.encoder_segments_BS, row.encoder_positions_BS)
    return [encoder, target]


def _sequence(
    name: str,
    texts: TokenTexts,
    ids: np.ndarray,
    segments: np.ndarray | None,
    positions: np.ndarray | None,
    weights: np.ndarray | None = None,
    *,
    targets: np.ndarray | None = None,
    reads: np.ndarray | None = None,
    prefix: np.ndarray | None = None,
    types: np.ndarray | None = None,
    real: np.ndarray | None = None,
) -> dict[str, Any]:
    """One sequence up to its last position that is not padding."""
    if real is None:
        two_dims = lambda x: None if x is None else x[None]
        real = real_positions(ids[None], two_dims(segments), two_dims(weights if targets is None else None))[0]
    end = int(np.flatnonzero(real)[-1]) + 1 if real.any() else 0
    tokens = ids[:end].tolist()
    sequence: dict[str, Any] = {
        "name": name,
        "length": len(ids),
        "tokens": int(real.sum()),
        "ids": tokens,
        "texts": [texts.text(token) for token in tokens],
        "kinds": [texts.kind(token) for token in tokens],
        "segments": _segments(segments, positions, end),
    }
    if name == "decoder" and tokens:
        sequence["texts"] = [texts.decoder_text(token) for token in tokens]
    if weights is not None:
        sequence |= {"weights": weights[:end].tolist(), "weighted": int((weights > 0).sum())}
    if targets is not None:
        sequence["targets"] = [
            texts.target_text(token) if weight > 0 else None
            for token, weight in zip(targets[:end].tolist(), weights[:end].tolist(), strict=True)
        ]
    if reads is not None:
        sequence["reads"] = [texts.decoder_text(token) for token in reads[:end].tolist()]
    if prefix is not None:
        sequence["prefix"] = int((prefix[:end] & real[:end]).sum())
    if types is not None:
        sequence["types"] = types[:end].tolist()
    return sequence


def _segments(segments: np.ndarray | None, positions: np.ndarray | None, end: int) -> list[dict[str, int]]:
    """The runs of equal segment numbers: number, first index, tokens, and first and last position; [] without."""
    if segments is None or not end:
        return []
    starts = np.flatnonzero(np.diff(segments[:end], prepend=-1))
    stops = np.append(starts[1:], end)
    place = np.arange(end) if positions is None else positions
    return [
        {
            "segment": int(segments[start]),
            "start": int(start),
            "tokens": int(stop - start),
            "first_position": int(place[start]),
            "last_position": int(place[stop - 1]),
        }
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)
    ]


def fill(batch: Batch) -> dict[str, dict[str, float]]:
    """Of encoder and decoder: positions, tokens that are not padding, and their share; of targets those with weight.

    For packed rows also ``tokens_per_segment``, the mean.
    """
    parts: dict[str, dict[str, float]] = {}
    if batch.encoder_BS is not None:
        segments_BS = batch.encoder_segments_BS
        parts["encoder"] = _share(real_positions(batch.encoder_BS, segments_BS), segments_BS)
    if batch.decoder_BL is not None:
        real_BL = real_positions(batch.targets_BL, batch.decoder_segments_BL, batch.weights_BL)
        parts["decoder"] = _share(real_BL, batch.decoder_segments_BL)
    weighted = int((batch.weights_BL > 0).sum())
    parts["targets"] = {
        "positions": batch.targets_BL.size,
        "tokens": weighted,
        "share": weighted / max(batch.targets_BL.size, 1),
    }
    return parts


def _share(real_BL: np.ndarray, segments_BL: np.ndarray | None) -> dict[str, float]:
    tokens = int(real_BL.sum())
    share = {"positions": real_BL.size, "tokens": tokens, "share": tokens / max(real_BL.size, 1)}
    if segments_BL is not None:
        begins = (np.diff(segments_BL, axis=1, prepend=0) != 0) & (segments_BL > 0)
        share["tokens_per_segment"] = tokens / max(int(begins.sum()), 1)
    return share
