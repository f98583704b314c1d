"""A SentencePiece model as a tokenizer.json with the same ids and texts, for the `tokenizers` library.

`tokenizer_files` adds names and special tokens to it. Three measures make it exact:

* If a model encodes U+2581 in bytes (as those of t5like do), its pieces are written with spaces in place of that
  character. Then texts need no normalization, and U+2581 is an ordinary character.
* `tokenizers` matches every piece in a text, including those that SentencePiece reserves (``</s>``, ``<0x0A>``). A
  pre-tokenizer splits a text that contains such a name at an index that no other piece can span.
* SentencePiece's BPE merges the pair whose result has the best score. A merge list is equivalent if it has every pair
  that forms a piece, sorted by score.

Sources: Kudo and Richardson 2018 (SentencePiece); sentencepiece_model.proto; the file format is that of `tokenizers`.
"""

import base64
import re
from collections.abc import Sequence
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from t5like.data.tokenizers.sentencepiece_model import SENTINEL, SPACE
from t5like.data.tokenizers.tokenizer import SCORE_GRID
from t5like.errors import DataError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # sentencepiece_model.proto, Type
UNIGRAM, BPE = 1, 2  # ModelType
_NEVER = "\U0010ffff"  # not a character; prefix of pieces that SentencePiece never matches in a text
_UNKNOWN_TEXT = " \u2047 "  # SentencePiece decodes an unknown piece to it


def convert(model_bytes: bytes, exact: bool) -> dict[str, Any]:
    """The parts of a tokenizer.json that encode and decode: normalizer, pre_tokenizer, model, decoder.

    Sentinel pieces are written without the leading space that they have in some models; ids are unchanged.

    Args:
        exact: whether the model encodes U+2581 in bytes (`Tokenizer.exact`).

    Raises:
        DataError: a type of model that a tokenizer.json can't represent.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model_bytes)
    normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
    if trainer.model_type not in (UNIGRAM, BPE) or trainer.treat_whitespace_as_suffix:
        model_type = trainer.ModelType.Name(trainer.model_type)
        raise DataError(
            f"this SentencePiece model (model_type={model_type}, treat_whitespace_as_suffix="
            f"{trainer.treat_whitespace_as_suffix}) can't be written as tokenizer.json; use a unigram or bpe model"
        )
    space = " " if exact else SPACE
    pieces = [(_piece_name(piece, space), piece.score, piece.type) for piece in proto.pieces]
    unknown = next(token for token, (_, _, type_) in enumerate(pieces) if type_ == UNKNOWN)
    if trainer.model_type == UNIGRAM:
        names = [(name, type_) for name, _, type_ in pieces]
        pre_tokenizer = _pre_tokenizer(names)
        model = {
            "type": "Unigram",
            "unk_id": unknown,
            "vocab": [[name, score] for name, score, _ in pieces],
            "byte_fallback": bool(trainer.byte_fallback),
        }
    else:
        pre_tokenizer = None
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[unknown][0],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": bool(trainer.byte_fallback),
            "ignore_merges": False,
            "vocab": {name: token for token, (name, _, _) in enumerate(pieces)},
            "merges": _merges(pieces),
        }
    return {
        "normalizer": _normalizer(normalizer, space),
        "pre_tokenizer": pre_tokenizer,
        "model": model,
        "decoder": _decoder(pieces[unknown][0], space, normalizer.add_dummy_prefix),
    }


def differences(model_bytes: bytes) -> str | None:
    """A line about texts that the tokenizer.json may encode differently; None for models trained by t5like."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model_bytes)
    texts = []
    scores = [piece.score for piece in proto.pieces if piece.type == NORMAL]
    if proto.trainer_spec.model_type == UNIGRAM and any(score * SCORE_GRID % 1 for score in scores):
        texts.append("long runs of one character (####), where equally likely pieces tie and rounding decides")
    if proto.normalizer_spec.precompiled_charsmap:
        texts.append("letters with several combining marks, which tokenizers normalizes one by one")
    return f"AutoTokenizer may give other ids than SentencePiece for {' and for '.join(texts)}" if texts else None


def _piece_name(piece, space: str) -> str:
    """The name of a piece: pieces of text with spaces, others unchanged; unused ones so that no text matches."""
    if SENTINEL.fullmatch(piece.piece.removeprefix(SPACE)):
        return piece.piece.removeprefix(SPACE)
    if piece.type == UNUSED:
        return _NEVER + piece.piece
    return piece.piece.replace(SPACE, space) if piece.type in (NORMAL, USER_DEFINED) else piece.piece


def _merges(pieces: Sequence[tuple[str, float, int]]) -> list[list[str]]:
    """Every pair of pieces that forms a piece: sorted by score, then by the length of the left part."""
    scores = {name: score for name, score, type_ in pieces if type_ == NORMAL}
    ids = {name: token for token, (name, _, _) in enumerate(pieces)}
    pairs = []
    for name, score in scores.items():
        for split in range(1, len(name)):
            if name[:split] in scores and name[split:] in scores:
                pairs.append((-score, ids[name], split, name))
    return [[name[:split], name[split:]] for _, _, split, name in sorted(pairs)]


def _pre_tokenizer(names: Sequence[tuple[str, int]]) -> dict[str, Any] | None:
    """A pre-tokenizer that splits names of control, unknown and byte pieces and sentinels in a text; None: not needed.

    Each name is split at an index that no piece of text can span.

    Raises:
        DataError: a name has no such index.
    """
    text = [name for name, type_ in names if type_ in (NORMAL, USER_DEFINED) and not SENTINEL.fullmatch(name)]
    reserved = [name for name, type_ in names if type_ in (CONTROL, UNKNOWN) or SENTINEL.fullmatch(name)]
    patterns = [_split_pattern(name, text) for name in reserved if len(name) > 1]
    if any(type_ == BYTE for _, type_ in names):
        patterns.append(_split_pattern("<0x[0-9A-F][0-9A-F]>", text, ["<", "0", "x", "[0-9A-F]", "[0-9A-F]", ">"]))
    if not patterns:
        return None
    return {"type": "Split", "pattern": {"Regex": "|".join(patterns)}, "behavior": "Isolated", "invert": False}


def _split_pattern(name: str, text: Sequence[str], characters: Sequence[str] | None = None) -> str:
    """A zero-width regular expression for the split of a name; each character may be a regular expression."""
    characters = characters or [re.escape(character) for character in name]
    for index in range(1, len(characters)):
        before, after = characters[:index], characters[index:]
        spanning = re.compile(_suffixes(before) + _prefixes(after))
        if not any(spanning.search(piece) for piece in text):
            return f"(?<={''.join(before)})(?={''.join(after)})"
    raise DataError(
        f"this tokenizer has pieces that span every index in {name}, so that a tokenizer.json would encode that text "
        "as the special piece; train it on more ordinary text"
    )


def _suffixes(characters: Sequence[str]) -> str:
    """A regular expression of the suffixes of a sequence at the start of a piece, or of all of it anywhere."""
    longest = "".join(characters)
    starts = ["".join(characters[start:]) for start in range(1, len(characters))]
    return f"(?:{'|'.join([longest, *(f'^{each}' for each in starts)])})"


def _prefixes(characters: Sequence[str]) -> str:
    """A regular expression of the prefixes of a sequence at the end of a piece, or of all of it anywhere."""
    longest = "".join(characters)
    ends = ["".join(characters[:end]) for end in range(1, len(characters))]
    return f"(?:{'|'.join([longest, *(f'{each}$' for each in ends)])})"


def _normalizer(spec, space: str) -> dict[str, Any] | None:
    """SentencePiece's normalization: its character map, white space, a leading space, U+2581 for spaces."""
    steps = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Replace", "pattern": {"Regex": "^ +| +$"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": " "})
    if space != " ":
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": space})
    return {"type": "Sequence", "normalizers": steps} if steps else None


def _decoder(unknown: str, space: str, dummy_prefix: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if space != " ":
        steps.append({"type": "Replace", "pattern": {"String": space}, "content": " "})
    steps.append({"type": "Replace", "pattern": {"Regex": f"^{re.escape(unknown)}$"}, "content": _UNKNOWN_TEXT})
    steps += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}
