"""Text to token ids and back: SentencePiece models, trained or loaded, and the sentinels of span corruption.

A trained model keeps text exactly: identity normalisation, no dummy prefix, extra white space kept, unknown characters
spelled in bytes, newline a piece of its own. So ``decode(encode(text)) == text`` for every text. A model from elsewhere
keeps what its own normalisation keeps (T5's folds white space).

Sentinels follow T5 (Raffel et al. 2020, section 3.1.4; `T5Tokenizer` of transformers): ``<extra_id_0>`` has the highest
id, and they count down. They lie above the model's pieces (T5: 32,000 pieces, 100 sentinels, <extra_id_0> = 32,099),
or among them where the model has such pieces (mT5, UMT5).

Called by `data.corpus` (bulk), `generate` and `inspect` (single texts) and `checkpoint` (`model_bytes`, `hash`).
"""

import hashlib
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from t5like.config import TokenizerConfig
from t5like.errors import DataError

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2  # of trained models, as in T5
SPACE = "\u2581"  # stands for a space inside SentencePiece, which would therefore decode a real U+2581 as a space
SENTINEL = re.compile(r"<extra_id_([0-9]+)>")
_TRAINING_LINE = 16_384  # characters; longer lines are cut for training, SentencePiece would leave them out


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig, path: Path) -> None:
    """Train a SentencePiece model on the texts and write it, whole or not at all.

    The same texts in the same order give the same file: the number of threads, which decides the order of
    floating-point sums, is fixed whatever the machine has.

    Raises:
        DataError: there is too little text for `config.vocab_size`, or too many different characters.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=_training_lines(texts),
            model_writer=model,
            vocab_size=config.vocab_size - config.num_sentinels,
            model_type=config.model_type,
            character_coverage=config.character_coverage,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            bos_id=-1,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indentation
            user_defined_symbols=["\n"],
            max_sentence_length=4 * _TRAINING_LINE,  # bytes
            num_threads=8,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise DataError(_training_failure(str(error), config)) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(model.getvalue())
    temporary.replace(path)


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _TRAINING_LINE):
                yield line[start : start + _TRAINING_LINE]


def _training_failure(message: str, config: TokenizerConfig) -> str:
    """SentencePiece's complaint, which holds the limit, in terms of our fields."""
    field = f"tokenizer.vocab_size={config.vocab_size}"
    if limit := re.search(r"Vocabulary size too high.*<= ([0-9]+)", message):
        largest = int(limit[1]) + config.num_sentinels
        return f"{field} is too large for so little text; use tokenizer.vocab_size={largest} or less, or more text"
    if limit := re.search(r"smaller than required_chars\. [0-9]+ vs ([0-9]+)", message):
        smallest = int(limit[1]) + config.num_sentinels
        return (
            f"{field} is too small for the characters of the text; use tokenizer.vocab_size={smallest + 1000} (above "
            f"{smallest}), or a tokenizer.character_coverage below {config.character_coverage}"
        )
    if "sentences_.empty()" in message:
        return "there is no text to train a tokenizer on; see data.source"
    return f"{field}: SentencePiece could not train a model: {' '.join(message.split())}"


class Tokenizer:
    """A SentencePiece model with sentinels. Pickles as its bytes, so that worker processes can have it.

    Attributes:
        model_bytes: the model file.
        hash: sha256, in hex, of the model file and the number of sentinels: what token ids depend on.
        vocab_size: number of ids, sentinels included.
        pad_id, eos_id, unk_id: special ids. A model without a pad id (Llama) pads with id 0, which it never predicts.
        sentinel_ids: int32, [0] is <extra_id_0>.
        ordinary_V: bool [vocab_size], True for ids of text: neither special nor a sentinel.
        bytes_V: float64 [vocab_size], bytes of UTF-8 that an id stands for; 0 for special ids and sentinels.
        begins_word_V: bool [vocab_size], True for pieces that begin with a space, or are white space themselves.
    """

    def __init__(self, model_bytes: bytes, *, num_sentinels: int, origin: str = "tokenizer") -> None:
        """Check a model and make it ready.

        Args:
            origin: what to call the model in messages.

        Raises:
            DataError: it is no SentencePiece model, or its special ids or sentinels are not as expected.
        """
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model_bytes or b"empty")
        except (RuntimeError, TypeError):
            size = len(model_bytes)
            raise DataError(f"{origin} is not a SentencePiece model, or is truncated ({size} bytes)") from None
        self.model_bytes = model_bytes
        self.num_sentinels = num_sentinels
        self.hash = hashlib.sha256(model_bytes + b"sentinels %d" % num_sentinels).hexdigest()
        self._origin = origin
        self._check_special_ids()
        pieces = self._model.get_piece_size()
        inside = self._sentinel_pieces()
        self._sentinels_inside = bool(inside)
        self.sentinel_ids = np.array(inside or range(pieces + num_sentinels - 1, pieces - 1, -1), np.int32)
        self.vocab_size = pieces if inside else pieces + num_sentinels
        self.eos_id = self._model.eos_id()
        self.pad_id = max(self._model.pad_id(), 0)
        self.unk_id = self._model.unk_id()
        self._number_of_sentinel = {int(token): number for number, token in enumerate(self.sentinel_ids)}
        self._hidden = {self.eos_id} | ({self.pad_id} if self._model.pad_id() == 0 else set())
        space_bytes = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._spells_bytes = all(map(self._model.is_byte, space_bytes))
        self._space_bytes = np.array(space_bytes, np.int32)
        # Where text must be cut, so that no piece can span the place: at U+2581, and inside what looks like a sentinel.
        cuts = [f"({SPACE})"] * self._spells_bytes + [r"(?<=<)(?=extra_id_[0-9]+>)"] * self._sentinels_inside
        self._cut = re.compile("|".join(cuts))
        self._signs = [SPACE] * self._spells_bytes + ["<extra_id_"] * self._sentinels_inside

    @cached_property
    def ordinary_V(self) -> np.ndarray:
        ordinary_V = np.ones(self.vocab_size, bool)
        ordinary_V[self.sentinel_ids] = False
        pieces = range(self._model.get_piece_size())
        ordinary_V[[token for token in pieces if self._model.is_control(token) or self._model.is_unknown(token)]] = (
            False
        )
        return ordinary_V

    @cached_property
    def bytes_V(self) -> np.ndarray:
        bytes_V = np.zeros(self.vocab_size)
        for token in np.flatnonzero(self.ordinary_V).tolist():
            piece = self._model.id_to_piece(token).replace(SPACE, " ")
            bytes_V[token] = 1 if self._model.is_byte(token) else len(piece.encode())
        return bytes_V

    @cached_property
    def begins_word_V(self) -> np.ndarray:
        begins_word_V = np.zeros(self.vocab_size, bool)
        pieces = [self._model.id_to_piece(token) for token in range(self._model.get_piece_size())]
        begins_word_V[: len(pieces)] = [piece[0] == SPACE or piece.isspace() for piece in pieces]
        return begins_word_V

    def __reduce__(self):
        return _rebuild, (self.model_bytes, self.num_sentinels, self._origin)

    @classmethod
    def load(cls, path: str | Path, *, num_sentinels: int) -> "Tokenizer":
        """Read a model file.

        Raises:
            DataError: see `__init__`; also when the file is missing or can't be read.
        """
        try:
            model_bytes = Path(path).expanduser().read_bytes()
        except OSError as error:
            raise DataError(f"tokenizer.path={path} can't be read: {error.strerror}") from None
        return cls(model_bytes, num_sentinels=num_sentinels, origin=f"tokenizer.path={path}")

    def check(self, config: TokenizerConfig) -> None:
        """Refuse a config of another size: model shapes follow from the config alone."""
        if self.vocab_size != config.vocab_size:
            raise DataError(
                f"tokenizer.vocab_size={config.vocab_size}, but {self._origin} has {self.vocab_size} ids (sentinels "
                f"included); use tokenizer.vocab_size={self.vocab_size}"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without beginning or end. Nothing in it is special: ``</s>`` is four characters.

        Raises:
            DataError: the text has a lone surrogate, which is no character.
        """
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` many texts on one thread, at the speed of SentencePiece itself; int32 arrays, to be read only."""
        if not any(sign in text for text in texts for sign in self._signs):
            return self._encode_plain(texts)
        parts = [[part for part in self._cut.split(text) if part] or [""] for text in texts]
        encoded = iter(self._encode_plain(list(itertools.chain.from_iterable(parts))))
        spelled = {SPACE: self._space_bytes} if self._spells_bytes else {}
        return [
            np.concatenate([spelled.get(part, ids) for part, ids in zip(row, encoded, strict=False)]) for row in parts
        ]  # each row takes its own from `encoded`

    def encode_with_sentinels(self, text: str) -> list[int]:
        """Like `encode`, but ``<extra_id_N>`` in the text becomes that sentinel: for prompts."""
        token_ids = []
        for position, part in enumerate(SENTINEL.split(text)):  # text, number, text, number, ..., text
            if position % 2 == 0:
                token_ids += self.encode(part)
            elif int(part) < self.num_sentinels:
                token_ids.append(int(self.sentinel_ids[int(part)]))
            else:
                raise DataError(f"<extra_id_{part}> is not one of the tokenizer's {self.num_sentinels} sentinels")
        return token_ids

    def decode(self, token_ids: Iterable[int], *, keep_special: bool = False) -> str:
        """Text of token ids: sentinels as ``<extra_id_N>``; pad and eos left out, or kept under their names."""
        parts, run = [], []
        for token in [*map(int, token_ids), None]:
            if token is not None and token not in self._number_of_sentinel and token not in self._hidden:
                run.append(token)
                continue
            if run:
                text = self._model.decode(run)
                # A model with a dummy prefix strips the first space, wanted only at the very beginning.
                lost = bool(parts) and self._model.id_to_piece(run[0])[0] == SPACE and text[:1] != " "
                parts.append(" " * lost + text)
                run = []
            if token in self._number_of_sentinel:
                parts.append(f"<extra_id_{self._number_of_sentinel[token]}>")
            elif token is not None and keep_special:
                parts.append(self._model.id_to_piece(token))
        return "".join(parts)

    def _encode_plain(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            return self._model.encode(list(texts), return_type="numpy", num_threads=1)
        except TypeError:  # what SentencePiece says of a string that has no UTF-8 form
            refuse_surrogates(texts)
            raise

    def _check_special_ids(self) -> None:
        model = self._model
        if model.eos_id() < 0:
            raise DataError(f"{self._origin} has no end-of-sequence piece; train it with eos_id=1")
        if model.pad_id() != 0 and (self.num_sentinels or model.pad_id() > 0):
            raise DataError(f"{self._origin} has pad id {model.pad_id()}, but that must be 0; train it with pad_id=0")

    def _sentinel_pieces(self) -> list[int]:
        """Ids of the <extra_id_N> pieces inside the model, by N; checked."""
        found = {}
        for token in range(self._model.get_piece_size()):
            if match := SENTINEL.fullmatch(self._model.id_to_piece(token).removeprefix(SPACE)):
                found[int(match[1])] = token
        token_ids = [found[number] for number in sorted(found)]
        if found and len(found) != self.num_sentinels:
            raise DataError(
                f"tokenizer.num_sentinels={self.num_sentinels}, but {self._origin} has {len(found)} <extra_id_N> "
                f"pieces; use tokenizer.num_sentinels={len(found)}"
            )
        if found and token_ids != list(range(token_ids[0], token_ids[0] - len(found), -1)):
            raise DataError(f"{self._origin}: the <extra_id_N> pieces must count down from <extra_id_0>")
        return token_ids


def refuse_surrogates(texts: Sequence[str]) -> None:
    """Raise DataError if a text has half a surrogate pair: no character, and nothing that UTF-8 can spell."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"text has the lone surrogate {text[error.start]!a}, which is no character") from None


def _rebuild(model_bytes: bytes, num_sentinels: int, origin: str) -> Tokenizer:
    return Tokenizer(model_bytes, num_sentinels=num_sentinels, origin=origin)
