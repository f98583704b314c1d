"""A SentencePiece model as a tokenizer.json: the same ids and texts, read by the `tokenizers` library alone.

`tokenizer_files` adds names and special tokens to it. Three things make it exact:

* Where a model spells U+2581 in bytes (ours do), its pieces are written with real spaces in place of that sign: then
  nothing of a text has to be rewritten, and a real U+2581 is a character like others.
* `tokenizers` looks every piece up in a text, also those that SentencePiece keeps for itself (``</s>``, ``<0x0A>``).
  Text that spells such a name is cut in two where no other piece could lie.
* SentencePiece's BPE merges the pair whose result has the best score. A merge list says the same when every pair that
  makes a piece is in it, in the order of scores.

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
_NEVER = "\U0010ffff"  # no character; before the names of pieces that SentencePiece never finds in a text
_UNKNOWN_TEXT = " \u2047 "  # what SentencePiece decodes an unknown piece to


def convert(model_bytes: bytes, exact: bool) -> dict[str, Any]:
    """The parts of a tokenizer.json that make ids of text and text of ids: normalizer, pre_tokenizer, model, decoder.

    Sentinel pieces lose the space in front that some models give them; ids stay.

    Args:
        exact: whether the model spells U+2581 in bytes, as `Tokenizer` does with it.

    Raises:
        DataError: a kind of model that has no such form.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model_bytes)
    normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
    if trainer.model_type not in (UNIGRAM, BPE) or trainer.treat_whitespace_as_suffix:
        kind = trainer.ModelType.Name(trainer.model_type)
        raise DataError(
            f"this SentencePiece model (model_type={kind}, treat_whitespace_as_suffix="
            f"{trainer.treat_whitespace_as_suffix}) has no form as tokenizer.json; use a unigram or bpe model"
        )
    space = " " if exact else SPACE
    pieces = [(_spelled(piece, space), piece.score, piece.type) for piece in proto.pieces]
    unknown = next(token for token, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN)
    if trainer.model_type == UNIGRAM:
        names = [(name, kind) for name, _, kind in pieces]
        cut = _cut(names)
        model = {
            "type": "Unigram",
            "unk_id": unknown,
            "vocab": [[name, score] for name, score, _ in pieces],
            "byte_fallback": bool(trainer.byte_fallback),
        }
    else:
        cut = None
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
        "pre_tokenizer": cut,
        "model": model,
        "decoder": _decoder(pieces[unknown][0], space, normalizer.add_dummy_prefix),
    }


def differences(model_bytes: bytes) -> str | None:
    """One line on the texts that such a tokenizer.json cuts otherwise; None for models that are trained here."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model_bytes)
    found = []
    scores = [piece.score for piece in proto.pieces if piece.type == NORMAL]
    if proto.trainer_spec.model_type == UNIGRAM and any(score * SCORE_GRID % 1 for score in scores):
        found.append("long runs of one character (####), where equally likely pieces tie and rounding decides")
    if proto.normalizer_spec.precompiled_charsmap:
        found.append("letters with several combining marks, which tokenizers normalizes one by one")
    return f"AutoTokenizer may give other ids than SentencePiece for {' and for '.join(found)}" if found else None


def _spelled(piece, space: str) -> str:
    """A piece's name: text with its spaces, the others as they are called; unused ones so that no text has them."""
    if SENTINEL.fullmatch(piece.piece.removeprefix(SPACE)):
        return piece.piece.removeprefix(SPACE)
    if piece.type == UNUSED:
        return _NEVER + piece.piece
    return piece.piece.replace(SPACE, space) if piece.type in (NORMAL, USER_DEFINED) else piece.piece


def _merges(pieces: Sequence[tuple[str, float, int]]) -> list[list[str]]:
    """Every pair of pieces that makes a piece: the best score first, then the shorter left part."""
    scores = {name: score for name, score, kind in pieces if kind == NORMAL}
    places = {name: token for token, (name, _, _) in enumerate(pieces)}
    found = []
    for name, score in scores.items():
        for split in range(1, len(name)):
            if name[:split] in scores and name[split:] in scores:
                found.append((-score, places[name], split, name))
    return [[name[:split], name[split:]] for _, _, split, name in sorted(found)]


def _cut(names: Sequence[tuple[str, int]]) -> dict[str, Any] | None:
    """A pre-tokenizer that cuts text which spells a control, unknown or byte piece, or a sentinel; None: no need.

    For each name a place inside it is taken that no piece of text can span there.

    Raises:
        DataError: a name has no such place.
    """
    text = [name for name, kind in names if kind in (NORMAL, USER_DEFINED) and not SENTINEL.fullmatch(name)]
    hidden = [name for name, kind in names if kind in (CONTROL, UNKNOWN) or SENTINEL.fullmatch(name)]
    patterns = [_place(name, text) for name in hidden if len(name) > 1]
    if any(kind == BYTE for _, kind in names):
        patterns.append(_place("<0x[0-9A-F][0-9A-F]>", text, ["<", "0", "x", "[0-9A-F]", "[0-9A-F]", ">"]))
    if not patterns:
        return None
    return {"type": "Split", "pattern": {"Regex": "|".join(patterns)}, "behavior": "Isolated", "invert": False}


def _place(name: str, text: Sequence[str], characters: Sequence[str] | None = None) -> str:
    """A regular expression that matches nothing, between two characters of a name (each a regular expression)."""
    characters = characters or [re.escape(character) for character in name]
    for place in range(1, len(characters)):
        before, behind = characters[:place], characters[place:]
        spanning = re.compile(_ends(before) + _starts(behind))
        if not any(spanning.search(piece) for piece in text):
            return f"(?<={''.join(before)})(?={''.join(behind)})"
    raise DataError(
        f"this tokenizer has pieces that span every place inside {name}, which a tokenizer.json could not tell from "
        "that very piece; train it on more ordinary text"
    )


def _ends(characters: Sequence[str]) -> str:
    """Any end of a sequence that a piece may start in, or all of it behind other text."""
    longest = "".join(characters)
    starts = ["".join(characters[start:]) for start in range(1, len(characters))]
    return f"(?:{'|'.join([longest, *(f'^{each}' for each in starts)])})"


def _starts(characters: Sequence[str]) -> str:
    """Any beginning of a sequence that a piece may end in, or all of it before other text."""
    longest = "".join(characters)
    ends = ["".join(characters[:end]) for end in range(1, len(characters))]
    return f"(?:{'|'.join([longest, *(f'{each}$' for each in ends)])})"


def _normalizer(spec, space: str) -> dict[str, Any] | None:
    """What SentencePiece does to a text first: its character map, white space, a space in front, U+2581 for spaces."""
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
