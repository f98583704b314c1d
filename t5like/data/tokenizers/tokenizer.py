"""Text to token ids and back: SentencePiece models, trained here or loaded, tokenizer.json files, and sentinels.

`sentencepiece_model` and `huggingface_model` encode and decode; this module has their common interface, and trains
models that preserve text exactly: ``decode(encode(text)) == text``.

Sentinels follow T5 (Raffel et al. 2020, section 3.1.4; `T5Tokenizer` of transformers): ``<extra_id_0>`` has the highest
id, and they count down. A tokenizer like BERT's has [MASK] and [CLS] as its only two sentinels.

Called by `store.preparation` (batches of texts), `generate` (single texts) and `checkpoint` (`model_bytes`, `hash`).
"""

import hashlib
import io
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from t5like.config.schema import TokenizerConfig
from t5like.data.tokenizers import huggingface_model
from t5like.data.tokenizers.huggingface_model import LARGEST_FILE, JsonModel
from t5like.data.tokenizers.sentencepiece_model import SENTINEL, SentencePieceModel
from t5like.errors import DataError
from t5like.io.atomic import replace_file
from t5like.io.paths import expand
from t5like.io.regular_files import read_regular
from t5like.io.strict_json import loads

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2  # of trained models, as in T5
_BYTE = re.compile("<0x[0-9A-F]{2}>")
SCORE_GRID = (
    64  # scores of trained models are multiples of 1 / 64, so sums of about 15,000 of them are exact in float32
)
_TRAINING_LINE = 16_384  # characters; longer lines are split for training, because SentencePiece would drop them


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig, path: Path) -> None:
    """Train a SentencePiece model on the texts and write it atomically.

    The same texts in the same order give the same file on every machine: the number of threads, which affects the order
    of floating-point sums, is fixed.

    Raises:
        DataError: there is too little text for `config.vocab_size`, or too many different characters.
    """
    model, failures = io.BytesIO(), []
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=_record_failures(_training_lines(texts), failures),
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
        if failures:
            raise failures[0] from None
        raise DataError(_training_failure(str(error), config)) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, _exact_scores(model.getvalue()))


def _exact_scores(model_bytes: bytes) -> bytes:
    """Round a unigram model's scores (log probabilities) so that their sums are exact in float32.

    SentencePiece sums them in float32. If two segmentations of a run like ``######`` are equally likely, rounding would
    decide, and programs that use float64 (`tokenizers`) would decide differently; exact sums are a tie in both. Newline
    is a user-defined piece with a score that is not a multiple; as a normal piece it is segmented as reliably.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model_bytes)
    if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
        for piece in proto.pieces:
            if piece.type == piece.USER_DEFINED:
                piece.type = piece.NORMAL
            piece.score = round(piece.score * SCORE_GRID) / SCORE_GRID
    return proto.SerializeToString(deterministic=True)


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _TRAINING_LINE):
                yield line[start : start + _TRAINING_LINE]


def _record_failures(texts: Iterator[str], failures: list[BaseException]) -> Iterator[str]:
    """Yield the texts, and record an exception of their iterator: SentencePiece replaces it by a RuntimeError."""
    try:
        yield from texts
    except BaseException as error:  # Ctrl-C among them
        failures.append(error)
        raise


def _training_failure(message: str, config: TokenizerConfig) -> str:
    """SentencePiece's error message, which contains the limit, in terms of config fields."""
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
    """A SentencePiece model or a tokenizer.json, with sentinels. Pickles as its bytes, for worker processes.

    Attributes:
        model_bytes: the model file; of a tokenizer.json with the files beside it, see `huggingface_model.bundle`.
        hash: hex sha256 of the model file and the number of sentinels, which determine the token ids.
        vocab_size: number of ids, sentinels included.
        pad_id, eos_id, unk_id: special ids; BERT's [SEP] is EOS. A tokenizer without pad id 0 (Llama, GPT-2) also
            pads with id 0: no objective for decoders reads tokens after a row's end.
        pads_with_a_token: whether `pad_id` is a padding token; otherwise id 0 is a token of text.
        files: only for a tokenizer.json: that file and those beside it, name to text; see `huggingface_model`.
        bos_id: the token that its model family prepends to a text (Llama's <s>), or None.
        sentinel_ids: int32, [0] is <extra_id_0>. For BERT: [MASK] and [CLS], in the order that `masking` expects.
        sentinel_names: their names in decoded text.
        ordinary_V: bool [vocab_size], True for ids of text: neither special nor a sentinel.
        bytes_V: float64 [vocab_size], bytes of UTF-8 of an id; 0 for special ids and sentinels.
        byte_fallback_V: bool [vocab_size], True for ids of single bytes, which encode characters without a piece.
        begins_word_V: bool [vocab_size], True for pieces that begin with a space, or are white space.
    """

    def __init__(self, model_bytes: bytes, *, num_sentinels: int | None, origin: str = "tokenizer") -> None:
        """Check and load a model.

        Args:
            num_sentinels: None, only for a tokenizer.json: as many as it has.
            origin: the name of the model in messages.

        Raises:
            DataError: it is neither kind of model, or its special ids or sentinels are not as expected.
        """
        self.is_json = huggingface_model.is_json(model_bytes)
        self._model = (JsonModel if self.is_json else SentencePieceModel)(model_bytes, num_sentinels, origin)
        self.model_bytes = model_bytes
        self.num_sentinels = len(self._model.sentinel_ids)
        self.hash = hashlib.sha256(model_bytes + b"sentinels %d" % self.num_sentinels).hexdigest()
        self._origin = origin
        self.vocab_size: int = self._model.vocab_size
        self.pad_id: int = self._model.pad_id
        self.eos_id: int = self._model.eos_id
        self.unk_id: int | None = self._model.unk_id
        self.bos_id: int | None = self._model.bos_id
        self.sentinel_ids: np.ndarray = self._model.sentinel_ids
        self.sentinel_names: tuple[str, ...] = self._model.sentinel_names
        self.pads_with_a_token: bool = self._model.pads_with_a_token
        self.files: dict[str, str] = self._model.files if self.is_json else {}

    @cached_property
    def ordinary_V(self) -> np.ndarray:
        return self._model.ordinary_V()

    @cached_property
    def bytes_V(self) -> np.ndarray:
        return self._model.bytes_V()

    @cached_property
    def begins_word_V(self) -> np.ndarray:
        return self._model.begins_word_V()

    @cached_property
    def byte_fallback_V(self) -> np.ndarray:
        byte_fallback_V = np.zeros(self.vocab_size, bool)
        for token in np.flatnonzero(self.ordinary_V).tolist():
            byte_fallback_V[token] = bool(_BYTE.fullmatch(self._model.name(token)))
        return byte_fallback_V

    @property
    def exact(self) -> bool:
        """Whether a SentencePiece model encodes U+2581 as bytes: see `SentencePieceModel`."""
        return not self.is_json and self._model.exact

    def __reduce__(self):
        return _rebuild, (self.model_bytes, self.num_sentinels, self._origin)

    @classmethod
    def load(cls, path: str | Path, *, num_sentinels: int | None) -> "Tokenizer":
        """Read a SentencePiece model, or a tokenizer.json with the special tokens of the files beside it.

        Raises:
            DataError: see `__init__`; also when the file is missing or can't be read.
        """
        path = expand(path)
        name = f"tokenizer.path={path}"
        if path.name == "tokenizer.model" and (path.parent / "config.json").is_file():
            name = str(path)  # a run's copy: no field names it
            if not path.exists():
                raise DataError(f"{path.parent} lacks its tokenizer.model; {_restoring(path.parent)}")
        model_bytes = read_regular(path, name, LARGEST_FILE)
        if huggingface_model.is_json(model_bytes):
            model_bytes = huggingface_model.bundle(path, model_bytes)
        return cls(model_bytes, num_sentinels=num_sentinels, origin=name)

    def check(self, config: TokenizerConfig) -> None:
        """Raise DataError if the config has another vocabulary size: model shapes follow from the config alone."""
        if self.vocab_size != config.vocab_size:
            raise DataError(
                f"tokenizer.vocab_size={config.vocab_size}, but {self._origin} has {self.vocab_size} ids (sentinels "
                f"included); use tokenizer.vocab_size={self.vocab_size}"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS or EOS. Text never becomes a special token: ``</s>`` is four characters.

        Raises:
            DataError: the text has a lone surrogate, which is not a character.
        """
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` many texts on one thread; returns int32 arrays that must not be modified."""
        try:
            return self._model.encode_batch(texts)
        except (TypeError, UnicodeEncodeError):  # raised for a string without UTF-8 encoding
            refuse_surrogates(texts)
            raise

    def encode_with_sentinels(self, text: str) -> list[int]:
        """Like `encode`, but ``<extra_id_N>`` (or BERT's [MASK]) in the text becomes that sentinel; for prompts."""
        for number in SENTINEL.findall(text):
            if int(number) >= self.num_sentinels:
                raise DataError(f"<extra_id_{number}> is not one of the tokenizer's {self.num_sentinels} sentinels")
        refuse_surrogates([text])
        return self._model.encode_with_sentinels(text)

    def decode(self, token_ids: Iterable[int], *, keep_special: bool = False) -> str:
        """Text of token ids, with the names of sentinels; pad and EOS are dropped, or kept by name."""
        return self._model.decode(token_ids, keep_special)

    def name(self, token: int) -> str:
        """A special id's or sentinel's name, such as ``</s>``."""
        names = dict(zip(self.sentinel_ids.tolist(), self.sentinel_names, strict=True))
        return names.get(token) or self._model.name(token)


def refuse_surrogates(texts: Sequence[str]) -> None:
    """Raise DataError if a text has half a surrogate pair, which is not a character and has no UTF-8 encoding."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"text has the lone surrogate {text[error.start]!a}, which is not a character") from None


def _restoring(workdir: Path) -> str:
    """How the file of a run's tokenizer can be restored, for a message."""
    copy = "copy that of another run with the same tokenizer"
    try:
        first = loads((workdir / "config.json").read_bytes())["tokenizer"]["path"]
    except (OSError, ValueError, LookupError, TypeError):
        return copy
    if first and not expand(first).is_file():  # such as the file itself, in a run of imported weights
        return copy
    place = shlex.quote(str(workdir))
    return f"{copy}, or use t5like prepare --config={place}/config.json --workdir={place}, which writes it again"


def _rebuild(model_bytes: bytes, num_sentinels: int, origin: str) -> Tokenizer:
    return Tokenizer(model_bytes, num_sentinels=num_sentinels, origin=origin)
