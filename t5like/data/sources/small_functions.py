"""Small Python functions with a description in English and unit tests: the task `small_functions` of `python_tasks`.

    inputs   f(x): take x, multiply by 4, then subtract 2
    targets  def f(x): return x * 4 - 2
    tests    assert f(13) == 50
             assert f(2) == 6
             ...
    rejected def f(x): return x // 7 + 3

The functions are all combinations of a few templates for numbers, lists and texts. The results in the tests are those
of the target. A function may be written in other ways, which the tests accept, so this is a task for rewards.
`rejected` is the target of another description for the same type of argument, for training from pairs. Each target is
rejected once, so that neither an answer alone nor its length tells which of two is right.
"""

import itertools
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

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


class Example(NamedTuple):
    """A function with the arguments and results of its tests."""

    description: str
    expression: str
    arguments: list[Any]
    results: list[Any]

    def accepts(self, other: "Example") -> bool:
        """Whether another function passes the tests of this one."""
        return self.results == _results(other.expression, self.arguments)

    @property
    def target(self) -> str:
        """The function as code."""
        return f"def f(x): return {self.expression}"

    @property
    def tests(self) -> str:
        """An assert for each argument."""
        pairs = zip(self.arguments, self.results, strict=True)
        return "\n".join(f"assert f({argument!r}) == {_shown(result)}" for argument, result in pairs)


def examples() -> Iterator[tuple[str, dict[str, str]]]:
    """(unique key, inputs, targets, tests and rejected) of every function whose tests tell it from a constant."""
    by_kind: dict[str, list[Example]] = {}
    for kind, description, expression in functions():
        generator = random.Random(description)
        arguments = [_argument(kind, generator) for _ in range(TESTS)]
        results = _results(expression, arguments)
        if len(set(map(_shown, results))) >= 3:  # else a constant would pass most of the tests
            by_kind.setdefault(kind, []).append(Example(description, expression, arguments, results))
    for right in by_kind.values():
        for each, rejected in zip(right, _wrong(right), strict=True):
            inputs, fields = f"f(x): {each.description}", {"tests": each.tests, "rejected": rejected.target}
            yield each.description, {"inputs": inputs, "targets": each.target, **fields}


def _wrong(examples: list[Example]) -> list[Example]:
    """A permutation of the examples; the function at each place does not pass the tests of the example there."""
    others = random.Random(0).sample(examples, len(examples))
    for index, example in enumerate(examples):
        if example.accepts(others[index]):
            can_swap = lambda j, i=index: not (examples[i].accepts(others[j]) or examples[j].accepts(others[i]))
            swap = next(filter(can_swap, range(len(examples))))
            others[index], others[swap] = others[swap], others[index]
    return others


def _results(expression: str, arguments: list[Any]) -> list[Any]:
    function = eval(f"lambda x: {expression}")  # noqa: S307  of `functions`
    return [function(argument) for argument in arguments]


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
