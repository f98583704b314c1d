"""SentencePiece models: encoding, decoding, and the properties of each id.

A model trained here preserves text exactly: identity normalization, no dummy prefix, extra white space kept, unknown
characters encoded as bytes, newline a separate piece. So ``decode(encode(text)) == text`` for every text. Other models
preserve what their normalization preserves (T5's collapses white space).

Sentinels are ids above the model's pieces (T5: 32,000 pieces, 100 sentinels, <extra_id_0> = 32,099), or pieces of the
model if it has them (mT5, UMT5).
"""

import itertools
import re
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece

from t5like.errors import DataError

SPACE = "\u2581"  # SentencePiece writes spaces as U+2581, and so would decode a real U+2581 as a space
SENTINEL = re.compile(r"<extra_id_([0-9]+)>")


class SentencePieceModel:
    """A SentencePiece model with sentinels; attributes and methods are those of `tokenizer.Tokenizer`.

    Attributes:
        exact: whether U+2581 is encoded as bytes, so that it is decoded correctly. False for models that add a space
            before a text (Llama's): every part of a text that is split at U+2581 would get a space.
    """

    def __init__(self, model_bytes: bytes, num_sentinels: int, origin: str) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model_bytes or b"empty")
        except (RuntimeError, TypeError):
            size = len(model_bytes)
            raise DataError(f"{origin} is not a SentencePiece model, or is truncated ({size} bytes)") from None
        model = self._model
        _check_special_ids(model, num_sentinels, origin)
        pieces = model.get_piece_size()
        inside = sentinel_pieces(model)
        _check_sentinels(inside, num_sentinels, origin)
        self.sentinel_ids = np.array(inside or range(pieces + num_sentinels - 1, pieces - 1, -1), np.int32)
        self.sentinel_names = tuple(f"<extra_id_{number}>" for number in range(num_sentinels))
        self.vocab_size = pieces if inside else pieces + num_sentinels
        self.eos_id, self.pad_id, self.unk_id = model.eos_id(), max(model.pad_id(), 0), model.unk_id()
        self.pads_with_a_token = model.pad_id() == 0
        self.bos_id = model.bos_id() if model.bos_id() >= 0 else None
        # With a dummy prefix, decoding strips the first space; that is correct only at the start of a text.
        spaced = next((token for token in range(pieces) if model.id_to_piece(token)[0] == SPACE), None)
        self._strips = spaced is not None and model.decode([spaced])[:1] != " "
        self._number_of_sentinel = {int(token): number for number, token in enumerate(self.sentinel_ids)}
        self._hidden = {self.eos_id} | ({self.pad_id} if model.pad_id() == 0 else set())
        space_bytes = [model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self.exact = all(map(model.is_byte, space_bytes)) and model.normalize("a") == "a"
        self._space_bytes = np.array(space_bytes, np.int32)
        # Text is split where no piece may span: at U+2581, and inside text that looks like a sentinel.
        splits = [f"({SPACE})"] * self.exact + [r"(?<=<)(?=extra_id_[0-9]+>)"] * bool(inside)
        self._split_pattern = re.compile("|".join(splits))
        self._split_markers = [SPACE] * self.exact + ["<extra_id_"] * bool(inside)

    def ordinary_V(self) -> np.ndarray:
        ordinary_V = np.ones(self.vocab_size, bool)
        ordinary_V[self.sentinel_ids] = False
        pieces = range(self._model.get_piece_size())
        special = [token for token in pieces if self._model.is_control(token) or self._model.is_unknown(token)]
        ordinary_V[special] = False
        return ordinary_V

    def bytes_V(self) -> np.ndarray:
        bytes_V = np.zeros(self.vocab_size)
        for token in np.flatnonzero(self.ordinary_V()).tolist():
            piece = self._model.id_to_piece(token).replace(SPACE, " ")
            bytes_V[token] = 1 if self._model.is_byte(token) else len(piece.encode())
        return bytes_V

    def begins_word_V(self) -> np.ndarray:
        begins_word_V = np.zeros(self.vocab_size, bool)
        pieces = [self._model.id_to_piece(token) for token in range(self._model.get_piece_size())]
        begins_word_V[: len(pieces)] = [piece[0] == SPACE or piece.isspace() for piece in pieces]
        return begins_word_V

    def name(self, token: int) -> str:
        return self._model.id_to_piece(token)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if not any(marker in text for text in texts for marker in self._split_markers):
            return self._encode_plain(texts)
        parts = [[part for part in self._split_pattern.split(text) if part] or [""] for text in texts]
        encoded = iter(self._encode_plain(list(itertools.chain.from_iterable(parts))))
        spelled = {SPACE: self._space_bytes} if self.exact else {}
        return [
            np.concatenate([spelled.get(part, ids) for part, ids in zip(row, encoded, strict=False)]) for row in parts
        ]  # `encoded` is consumed row by row

    def encode_with_sentinels(self, text: str) -> list[int]:
        ids = []
        for position, part in enumerate(SENTINEL.split(text)):  # text, number, text, number, ..., text
            ids += [int(self.sentinel_ids[int(part)])] if position % 2 else self.encode_batch([part])[0].tolist()
        return ids

    def decode(self, token_ids: Iterable[int], keep_special: bool) -> str:
        parts, run = [], []
        for token in [*map(int, token_ids), None]:
            if token is not None and token not in self._number_of_sentinel and token not in self._hidden:
                run.append(token)
                continue
            if run:
                text = self._model.decode(run)
                stripped = self._strips and bool(parts) and self._model.id_to_piece(run[0])[0] == SPACE
                parts.append(" " * stripped + text)
                run = []
            if token in self._number_of_sentinel:
                parts.append(self.sentinel_names[self._number_of_sentinel[token]])
            elif token is not None and keep_special:
                parts.append(self.name(token))
        return "".join(parts)

    def _encode_plain(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self._model.encode(list(texts), return_type="numpy", num_threads=1)


def sentinel_pieces(model: sentencepiece.SentencePieceProcessor) -> list[int]:
    """Ids of the <extra_id_N> pieces of a model, ordered by N."""
    id_by_number = {}
    for token in range(model.get_piece_size()):
        if match := SENTINEL.fullmatch(model.id_to_piece(token).removeprefix(SPACE)):
            id_by_number[int(match[1])] = token
    return [id_by_number[number] for number in sorted(id_by_number)]


def _check_special_ids(model: sentencepiece.SentencePieceProcessor, num_sentinels: int, origin: str) -> None:
    if model.eos_id() < 0:
        raise DataError(f"{origin} has no end-of-sequence piece; train it with eos_id=1")
    if model.pad_id() != 0 and (num_sentinels or model.pad_id() > 0):
        raise DataError(f"{origin} has pad id {model.pad_id()}, but that must be 0; train it with pad_id=0")


def _check_sentinels(inside: list[int], num_sentinels: int, origin: str) -> None:
    if inside and len(inside) != num_sentinels:
        raise DataError(
            f"tokenizer.num_sentinels={num_sentinels}, but {origin} has {len(inside)} <extra_id_N> "
            f"pieces; use tokenizer.num_sentinels={len(inside)}"
        )
    if inside and inside != list(range(inside[0], inside[0] - len(inside), -1)):
        raise DataError(f"{origin}: the <extra_id_N> pieces must count down from <extra_id_0>")
