"""Word segmentation in any script, and script detection: for metrics that count words.

Called by `text_metrics`. Words follow a simplified form of UAX #29, without dictionaries: a word is a run of letters
and digits with their combining marks, such as Hindi's vowel signs. In scripts without spaces each letter with its marks
is a word, as in MLQA for Chinese (Lewis et al. 2020). Texts are compared in NFC: canonically equivalent texts are
equal. NFKC is not used, because in it 10² equals 102.

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

# Scripts without spaces between words, as ranges of code points (Blocks.txt of Unicode 16): unicodedata does not
# contain scripts.
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
_SEPARATORS = "\u200b\u1361"  # zero width space, Ethiopic word space: they separate words, but str.split ignores them
_ARTICLES = re.compile(r"\b(a|an|the)\b")


class Letters(NamedTuple):
    """Number of letters in texts by type; combining marks are not counted."""

    all: int
    beyond_ascii: int
    han: int
    unspaced: int  # of scripts without spaces except Han


def letters(texts: Sequence[str]) -> Letters:
    """Count the letters of texts by type, to detect the script."""
    counts = [0, 0, 0, 0]
    for text in texts:
        for character in unicodedata.normalize("NFC", text):
            category = _category(character)
            if category in ("han", "unspaced") or (category == "word" and character.isalpha()):
                counts[0] += 1
                counts[1] += not character.isascii()
                counts[2] += category == "han"
                counts[3] += category == "unspaced"
    return Letters(*counts)


def words(text: str) -> list[str]:
    """The words of a text, case folded: see the module docstring."""
    text = unicodedata.normalize("NFC", text)
    return [fold(text[begin:end]) for begin, end in _spans(text)]


def fold(text: str) -> str:
    """A text case folded, in NFC, and without format characters (joiners, soft hyphens)."""
    kept = (character for character in text.casefold() if _category(character) != "format")
    return unicodedata.normalize("NFC", "".join(kept))


def without_punctuation(text: str) -> str:
    """MLQA's normalization, but articles are kept: case folded, no punctuation of any script, single spaces.

    A text of punctuation only is kept. "«Ça va?»" becomes "ça va"; "?" stays.
    """
    folded = " ".join(re.sub(f"[{_SEPARATORS}]", " ", fold(text)).split())
    kept = (c for c in folded if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    return " ".join("".join(kept).split()) or folded


def without_articles(text: str) -> str:
    """SQuAD's normalization: lower case, no ASCII punctuation, no English articles, single spaces, in this order.

    "The U.S.A.'s  end" becomes "usas end". Unlike in SQuAD, a step that would make the text empty is skipped: "A"
    becomes "a" and "?" stays "?", so that such answers differ from an empty one and from each other.
    """
    lower = " ".join(unicodedata.normalize("NFC", text).lower().split())
    bare = "".join(character for character in lower if character not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split()) or " ".join(bare.split()) or lower


def first_words(text: str, count: int) -> str:
    """The first `count` units of a text: words between spaces, or letters of scripts without spaces."""
    units = list(_units(text))
    return " ".join(text[: units[min(count, len(units)) - 1]].split()) if units and count else ""


def num_words(text: str) -> int:
    """Number of units, as in `first_words`."""
    return sum(1 for _ in _units(text))


def _units(text: str) -> Iterator[int]:
    """The end index of each unit of a text."""
    for chunk in re.finditer(r"\S+", text):
        if any(_category(character) in ("han", "unspaced") for character in chunk[0]):
            ends = [chunk.start() + end for _, end in _spans(chunk[0])]
            yield from [*ends[:-1], chunk.end()]  # the last unit includes punctuation at the end
        else:
            yield chunk.end()


def _spans(text: str) -> Iterator[tuple[int, int]]:
    """Begin and end index of each word, in order."""
    begin, before = 0, ""  # start of the current word, and the category of its characters; empty: no current word
    for index, character in enumerate(text):
        category = _category(character)
        if category in ("mark", "format") and before:
            continue
        category = {"mark": "word", "format": ""}.get(category, category)
        if before and not category == before == "word":
            yield begin, index
            before = ""
        if category and not before:
            begin, before = index, category
    if before:
        yield begin, len(text)


@functools.cache
def _category(character: str) -> str:
    """The role of a character in word segmentation.

    word: a letter or digit; mark: part of the character before it; han, unspaced, symbol: a word of its own; format:
    ignored; empty: separates words, as punctuation does.
    """
    code, general = ord(character), unicodedata.category(character)
    if general[0] == "M" or 0x1F3FB <= code <= 0x1F3FF:  # skin tones
        return "mark"
    if general == "Cf":
        return "" if character in _SEPARATORS else "format"
    if general[0] == "S":
        return "" if character.isascii() else "symbol"
    if general[0] not in "LN":
        return ""
    for name, ranges in (("han", HAN), ("unspaced", KANA + OTHERS)):
        if any(low <= code <= high for low, high in ranges):
            return name
    return "word"
