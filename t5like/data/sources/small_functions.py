"""Small Python functions with a description in English and unit tests: the task `small_functions` of `python_tasks`.

    inputs   f(x): take x, multiply by 4, then subtract 2
    targets  def f(x): return x * 4 - 2
    tests    assert f(13) == 50
             assert f(2) == 6
             ...

The functions are all combinations of a few templates for numbers, lists and texts. The results in the tests are those
of the target. A function may be written in other ways, which the tests accept, so this is a task for rewards.
"""

import itertools
import random
from collections.abc import Iterator

TESTS = 5  # of a function
NUMBERS = range(2, 13)  # constants
# Each entry: the description, and the expression.
_STEPS = [  # of a number; @ is the expression before
    *(
        (text.format(n), code.format(n))
        for n in NUMBERS
        for text, code in (
            ("add {}", "@ + {}"),
            ("subtract {}", "@ - {}"),
            ("multiply by {}", "@ * {}"),
            ("take the remainder of the division by {}", "@ % {}"),
            ("divide by {}, rounded down", "@ // {}"),
        )
    ),
    ("square it", "@ ** 2"),
    ("negate it", "-@"),
]
_CONDITIONS = [  # of a number n in a list
    *(
        (text.format(number), code.format(number))
        for number in NUMBERS
        for text, code in (
            ("greater than {}", "n > {}"),
            ("less than {}", "n < {}"),
            ("divisible by {}", "n % {} == 0"),
        )
    ),
    ("odd", "n % 2"),
]
_MAPS = [
    ("the numbers", "n"),
    ("the squares of the numbers", "n * n"),
    *((f"{number} times the numbers", f"n * {number}") for number in NUMBERS),
    *((f"{number} plus the numbers", f"n + {number}") for number in NUMBERS),
]
_RESULTS = [
    ("a list of", "[{}]"),
    ("the sum of", "sum({})"),
    ("a sorted list of", "sorted({})"),
    ("a set of", "{{{}}}"),
]
_TEXT_STEPS = [
    ("in upper case", ".upper()"),
    ("in lower case", ".lower()"),
    ("reversed", "[::-1]"),
    ("without spaces", ".replace(' ', '')"),
    *((f"its first {number} letters", f"[:{number}]") for number in NUMBERS),
    *((f"its last {number} letters", f"[-{number}:]") for number in NUMBERS),
    *((f"repeated {number} times", f" * {number}") for number in range(2, 6)),
    *((f"without the letter {letter}", f".replace('{letter}', '')") for letter in "aeiorst"),
]
_WORDS = (
    "River",
    "stone",
    "Apple",
    "tree",
    "Morning",
    "sea",
    "Quiet",
    "house",
    "Rain",
    "Letter",
    "silver",
    "Orange",
    "table",
    "Winter",
    "garden",
    "Music",
)


def functions() -> Iterator[tuple[str, str, str]]:
    """(kind of argument, description, expression of x) of every function, the same ones in the same order."""
    for first, second in itertools.product([("", "x"), *_STEPS], _STEPS):
        inner = first[1].replace("@", "x")
        if first[0] and not second[1].startswith(("@ +", "@ -")):
            inner = f"({inner})"  # other operators bind more tightly than some first steps
        description = f"take x, {first[0]}, then {second[0]}" if first[0] else f"take x, {second[0]}"
        yield "number", description, second[1].replace("@", inner)
    for result, numbers, condition in itertools.product(_RESULTS, _MAPS, _CONDITIONS):
        yield (
            "list",
            f"{result[0]} {numbers[0]} in x that are {condition[0]}",
            result[1].format(f"{numbers[1]} for n in x if {condition[1]}"),
        )
    for first, second in itertools.product([("", ""), *_TEXT_STEPS], _TEXT_STEPS):
        if first != second:
            code = f"(x{first[1]}){second[1]}" if first[1].startswith(" *") else f"x{first[1]}{second[1]}"
            yield "text", f"the text x, {first[0] + ', then ' if first[0] else ''}{second[0]}", code


def examples() -> Iterator[tuple[str, dict[str, str]]]:
    """(unique key, inputs, targets and tests) of every function whose tests tell it from a constant."""
    for kind, description, expression in functions():
        generator = random.Random(description)
        values = [_argument(kind, generator) for _ in range(TESTS)]
        function = eval(f"lambda x: {expression}")  # noqa: S307  made above
        results = [_shown(function(value)) for value in values]
        if len(set(results)) < 3:  # a constant would pass most of the tests
            continue
        tests = "\n".join(f"assert f({value!r}) == {result}" for value, result in zip(values, results, strict=True))
        target = f"def f(x): return {expression}"
        yield description, {"inputs": f"f(x): {description}", "targets": target, "tests": tests}


def _argument(kind: str, generator: random.Random) -> int | list[int] | str:
    if kind == "number":
        return generator.randrange(-20, 100)
    if kind == "list":
        return [generator.randrange(25) for _ in range(generator.randrange(5, 12))]
    return " ".join(generator.sample(_WORDS, 3))


def _shown(value: object) -> str:
    """A value as Python code; sets in order, so that every process writes the same text."""
    if isinstance(value, set):
        return f"{{{', '.join(map(repr, sorted(value)))}}}" if value else "set()"
    return repr(value)
