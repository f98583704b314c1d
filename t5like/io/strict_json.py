"""JSON from outside of the program, parsed with one type of error.

Python's `json.loads` fails on hostile or damaged text with many exceptions (`RecursionError`, `UnicodeDecodeError`, a
limit on digits) and accepts text that fails later (a duplicate key, half of a surrogate pair). Every module reads JSON
files of users, of runs and of other programs with `loads`, and turns `InvalidJSON` into its own one-line error.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

MAX_LEVELS = 100  # of nested lists and objects; files of tokenizers and models have about ten
# A string ends at its quote or at the end of the text, so that the search takes linear time in any text.
STRING_OR_BRACKET = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\Z)|[][{}]', re.DOTALL)


class InvalidJSON(ValueError):
    """Text that is not valid JSON; the message is one line, without the file's name."""


def loads(text: str | bytes, *, unique: bool = True, finite: bool = False) -> Any:
    """Parse a JSON text; a byte-order mark at its start is skipped.

    Args:
        text: bytes must be UTF-8.
        unique: refuse an object with a duplicate key, of which Python would use the last one. It takes about twice as
            long, so it is off for rows of data.
        finite: refuse NaN and Infinity, which are not JSON but which Python writes.

    Raises:
        InvalidJSON: syntax, encoding, more than `MAX_LEVELS` levels, a number of thousands of digits, half of a
            surrogate pair, or what `unique` and `finite` refuse.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode()
        else:
            text.encode()
        text = text.removeprefix("\ufeff")
        # The number of levels is at most that of brackets; most texts have few, and need no search.
        if text.count("[") + text.count("{") > MAX_LEVELS and _levels(text) > MAX_LEVELS:
            raise InvalidJSON(f"it has more than {MAX_LEVELS} levels of lists and objects")
        hooks = {"object_pairs_hook": _unique} if unique else {}
        value = json.loads(text, parse_constant=_not_finite if finite else None, **hooks)
        if "\\ud" in text or "\\uD" in text:  # an escaped surrogate; most are halves of a pair
            json.dumps(value, ensure_ascii=False).encode()
    except InvalidJSON:
        raise
    except UnicodeDecodeError as error:
        raise InvalidJSON(f"byte {error.start} is not UTF-8") from None
    except UnicodeEncodeError:
        raise InvalidJSON("a string has half of a surrogate pair, which is no character") from None
    except RecursionError:  # less is left of the stack than MAX_LEVELS needs
        raise InvalidJSON("it has too many levels of lists and objects") from None
    except json.JSONDecodeError as error:
        raise InvalidJSON(str(error)) from None
    except ValueError:  # Python converts at most 4,300 digits
        raise InvalidJSON("a number has too many digits") from None
    return value


def _levels(text: str) -> int:
    """Return the largest number of open brackets outside of strings; the search ends above `MAX_LEVELS`."""
    depth = deepest = 0
    for match in STRING_OR_BRACKET.finditer(text):
        if match[0] in "[{":
            depth += 1
            deepest = max(deepest, depth)
            if deepest > MAX_LEVELS:
                break
        elif match[0] in "]}":
            depth -= 1
    return deepest


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for index, name in enumerate(names) if name in names[:index])
        raise InvalidJSON(f"the key {duplicate[:80]!r} occurs twice")
    return values


def _not_finite(constant: str) -> float:
    raise InvalidJSON(f"{constant} is no JSON number")
