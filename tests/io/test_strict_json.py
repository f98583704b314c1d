"""JSON from outside: every error is one exception type with a message of one line."""

import json

import pytest

from t5like.io.strict_json import MAX_LEVELS, InvalidJSON, loads

REFUSED = {
    "nothing": ("", "Expecting value"),
    "half an object": ('{"a": [1,', "Expecting value"),
    "an open string of escaped quotes": ('"' + '\\"[{' * 50_000, "Unterminated string"),
    "lists in lists": ("[" * 100_000, f"it has more than {MAX_LEVELS} levels"),
    "objects in objects": ('{"a":' * 100_000, f"it has more than {MAX_LEVELS} levels"),
    "one level too many": ("[" * (MAX_LEVELS + 1) + "]" * (MAX_LEVELS + 1), f"it has more than {MAX_LEVELS} levels"),
    "a name twice": ('{"b": {"a": 1, "a": 2}}', "the key 'a' occurs twice"),
    "Latin-1": ('"é"'.encode("latin-1"), "byte 1 is not UTF-8"),
    "half of a pair": ('["\\ud83d"]', "a string has half of a surrogate pair"),
    "half of a pair in a name": ('{"\\uDE00": 1}', "a string has half of a surrogate pair"),
    "half of a pair, not escaped": ('"\ud800"', "a string has half of a surrogate pair"),
    "thousands of digits": ("1" * 5000, "a number has too many digits"),
    "NaN": ('{"a": NaN}', "NaN is no JSON number"),
    "infinity": ("[-Infinity]", "-Infinity is no JSON number"),
}


@pytest.mark.parametrize("text, message", REFUSED.values(), ids=REFUSED)
def test_invalid_json_raises_one_exception_type_with_one_line(text, message):
    with pytest.raises(InvalidJSON) as refusal:
        loads(text, finite=True)
    assert str(refusal.value).startswith(message) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, None, True, "é \U0001f600"], "b": {}},
        '\\"[' * 500 + "\\",  # brackets in strings, behind quotes and backslashes, open no level
        [[["{"], {"[": 1}]] * 200,
        json.loads("[" * MAX_LEVELS + "]" * MAX_LEVELS),
        2**200,
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("ascii", [True, False])
def test_valid_json_has_the_values_of_the_standard_library(value, ascii):
    text = json.dumps(value, ensure_ascii=ascii)
    assert loads(text) == loads(text.encode(), unique=False, finite=True) == loads("\ufeff" + text) == value
