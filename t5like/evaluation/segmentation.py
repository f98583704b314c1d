"""Words of a text in any script, and which script a set of texts is in: for measures that count words.

Called by `scores`. Words follow Unicode's rules in outline (UAX #29, without its dictionaries): letters and digits with
the combining marks on them, such as Hindi's vowel signs. In scripts without spaces each letter with its marks is one,
as MLQA has it for Chinese (Lewis et al. 2020). Texts are compared in NFC: what Unicode calls canonically equivalent is
the same text. Not in NFKC, which makes 10² the same as 102.

    | text                | words                             |
    |---------------------|-----------------------------------|
    | L'été, enfin!       | l été enfin                       |
    | हिन्दी में            | हिन्दी में                          |
    | 東京2020へ          | 東 京 2020 へ                     |
    | ที่นี่                 | ที่ นี่                              |
"""

import functools
import re
import string
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

# Scripts without spaces between words, as ranges of code points (Blocks.txt of Unicode 16). Python's unicodedata has no
# scripts.
HAN = ((0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3021, 0x3029), (0x3100, 0x312F), (0x3400, 0x4DBF), (0x4E00, 0x9FFF))
HAN += ((0xF900, 0xFAFF), (0x20000, 0x3FFFF))
KANA = ((0x3041, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F), (0x1AFF0, 0x1B16F))
OTHERS = (
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Myanmar, with the next two
    (0xA9E0, 0xA9FF),
    (0xAA60, 0xAA7F),
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19FF),  # Tai Le, New Tai Lue, symbols of Khmer
    (0x1A20, 0x1AAF),  # Tai Tham
    (0xA980, 0xA9DF),  # Javanese
    (0xAA80, 0xAADF),  # Tai Viet
)
_SEPARATORS = "\u200b\u1361"  # zero width space, Ethiopic word space: they separate words, but are no white space
_ARTICLES = re.compile(r"\b(a|an|the)\b")


class Letters(NamedTuple):
    """How many letters of texts are of which kind; marks are not counted."""

    all: int
    beyond_ascii: int
    han: int
    unspaced: int  # of scripts without spaces, Han not among them


def letters(texts: Sequence[str]) -> Letters:
    """Count the letters of texts by what tells how to measure them."""
    counts = [0, 0, 0, 0]
    for text in texts:
        for character in unicodedata.normalize("NFC", text):
            kind = _kind(character)
            if kind in ("han", "unspaced") or (kind == "word" and character.isalpha()):
                counts[0] += 1
                counts[1] += not character.isascii()
                counts[2] += kind == "han"
                counts[3] += kind == "unspaced"
    return Letters(*counts)


def words(text: str) -> list[str]:
    """The words of a text, case folded: see the module."""
    text = unicodedata.normalize("NFC", text)
    return [fold(text[begin:end]) for begin, end in _spans(text)]


def fold(text: str) -> str:
    """A text without case, in NFC, and without characters that only format (joiners, soft hyphens)."""
    kept = (character for character in text.casefold() if _kind(character) != "format")
    return unicodedata.normalize("NFC", "".join(kept))


def without_punctuation(text: str) -> str:
    """MLQA's normalisation without its articles: folded, no punctuation of any script, single spaces.

    A text that is nothing but punctuation keeps it. "«Ça va?»" becomes "ça va"; "?" stays.
    """
    folded = " ".join(re.sub(f"[{_SEPARATORS}]", " ", fold(text)).split())
    kept = (c for c in folded if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    return " ".join("".join(kept).split()) or folded


def without_articles(text: str) -> str:
    """SQuAD's normalisation: lower case, no ASCII punctuation, no English articles, single spaces, in this order.

    "The U.S.A.'s  end" becomes "usas end". Unlike SQuAD's, a text keeps what would leave nothing of it: "A" stays "a"
    and "?" stays "?", so that such an answer is not the same as none, nor as each other.
    """
    lower = " ".join(unicodedata.normalize("NFC", text).lower().split())
    bare = "".join(character for character in lower if character not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split()) or " ".join(bare.split()) or lower


def first_words(text: str, count: int) -> str:
    """The beginning of a text up to so many units: what spaces separate, or letters of scripts without spaces."""
    units = list(_units(text))
    return " ".join(text[: units[min(count, len(units)) - 1]].split()) if units and count else ""


def num_words(text: str) -> int:
    """How many units, as `first_words` counts them."""
    return sum(1 for _ in _units(text))


def _units(text: str) -> Iterator[int]:
    """Where each unit of a text ends."""
    for chunk in re.finditer(r"\S+", text):
        if any(_kind(character) in ("han", "unspaced") for character in chunk[0]):
            ends = [chunk.start() + end for _, end in _spans(chunk[0])]
            yield from [*ends[:-1], chunk.end()]  # punctuation at the end belongs to the last
        else:
            yield chunk.end()


def _spans(text: str) -> Iterator[tuple[int, int]]:
    """Begin and end of each word, in order."""
    begin, before = 0, ""  # the word that may go on, and the kind of what it is made of; empty: none
    for place, character in enumerate(text):
        kind = _kind(character)
        if kind in ("mark", "format") and before:
            continue
        kind = {"mark": "word", "format": ""}.get(kind, kind)
        if before and not kind == before == "word":
            yield begin, place
            before = ""
        if kind and not before:
            begin, before = place, kind
    if before:
        yield begin, len(text)


@functools.cache
def _kind(character: str) -> str:
    """What a character does in a word.

    word: a letter or digit; mark: belongs to what is before it; han, unspaced, symbol: a word by itself; format: not
    seen; empty: it parts words, as punctuation does.
    """
    code, category = ord(character), unicodedata.category(character)
    if category[0] == "M" or 0x1F3FB <= code <= 0x1F3FF:  # skin tones
        return "mark"
    if category == "Cf":
        return "" if character in _SEPARATORS else "format"
    if category[0] == "S":
        return "" if character.isascii() else "symbol"
    if category[0] not in "LN":
        return ""
    for name, ranges in (("han", HAN), ("unspaced", KANA + OTHERS)):
        if any(low <= code <= high for low, high in ranges):
            return name
    return "word"
