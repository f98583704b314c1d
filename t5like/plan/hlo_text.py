"""Parses a scheduled HLO program (``compiled.as_text()``) into computations and instructions.

The text has no specification. The forms below were found by compiling probes of known size (tests/golden/make_hlo.py).
`hlo_cost` computes the work of a program from it.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

_BITS = {"pred": 8, "token": 0, "c64": 64, "c128": 128}
ARRAY_TYPE = re.compile(r"\b(pred|token|bf16|[suf](?:4|8|16|32|64)|f8\w+|c64|c128)\[([\d,]*)\]")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")


class Instruction(NamedTuple):
    """One line of a computation."""

    type: str  # of its result, layout included
    op: str
    rest: str  # operands and attributes
    is_root: bool


class Frame(NamedTuple):
    """A line of Python that led to an instruction."""

    file: str
    function: str  # qualified: Attention._attend
    line: int


def num_bytes(type_text: str) -> int:
    """Bytes of the arrays in a type, without the padding of their layouts."""
    total = 0
    for name, sizes in ARRAY_TYPE.findall(type_text):
        bits = _BITS.get(name) or (0 if name == "token" else 8 if name.startswith("f8") else int(name.lstrip("bsuf")))
        total += math.prod(map(int, filter(None, sizes.split(",")))) * bits
    return total // 8


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Split a module into computations by name, and return the name of the entry computation."""
    computations, current, entry = {}, {}, ""
    for line in text.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{") and "->" in line:
            header = re.match(r"(ENTRY )?%?([\w.\-]+)", line)
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif match := _LINE.match(line):
            type_text, rest = _split_type(match[3])
            current[match[2]] = Instruction(type_text, rest.partition("(")[0], rest, bool(match[1]))
    return computations, entry


def _split_type(text: str) -> tuple[str, str]:
    if not text.startswith("("):
        type_text, _, rest = text.partition(" ")
        return type_text, rest
    end = _closing(text, 0)
    return text[: end + 1], text[end + 2 :]


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    return len(text) - 1


def operands(instruction: Instruction) -> list[str]:
    """Names of the operands of an instruction."""
    start = instruction.rest.index("(")
    return re.findall(r"%([\w.\-]+)", instruction.rest[start : _closing(instruction.rest, start) + 1])


def attribute(instruction: Instruction, name: str) -> str:
    """The value of ``name=value``; empty if the instruction has no such attribute."""
    match = re.search(rf"\b{name}=%?([\w.\-]+)", instruction.rest)
    return match[1] if match else ""


def called_computation(instruction: Instruction) -> str:
    """Name of the computation that an instruction calls; empty if there is none."""
    match = re.search(r"\bcalled_computations=\{%?([\w.\-]+)", instruction.rest)
    return match[1] if match else attribute(instruction, "calls") or attribute(instruction, "to_apply")


def source_of(instruction: Instruction) -> str:
    """The `op_name` of an instruction: its path in the JAX program."""
    match = re.search(r'op_name="([^"]*)"', instruction.rest)
    return match[1] if match else ""


def stack_frames(text: str) -> Mapping[int, tuple[Frame, ...]]:
    """The Python stacks of a module by ``stack_frame_id``, innermost frame first.

    The module begins with four tables: names of files and functions, locations, and frames. A frame's parent is written
    as its number + 1; a frame that is its own parent's number has none.
    """
    head = text[: text.find("\n%")] if "\nStackFrames" in text else ""
    table = lambda name: re.search(rf"^{name}\n((?:\d+ .*\n)*)", head, re.MULTILINE)[1] if head else ""
    names = {
        each: dict(re.findall(r'^(\d+) "(.*)"$', table(each), re.MULTILINE)) for each in ("FileNames", "FunctionNames")
    }
    location = r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)"
    locations = {
        number: Frame(names["FileNames"][file], names["FunctionNames"][function], int(line))
        for number, file, function, line in re.findall(location, table("FileLocations"), re.MULTILINE)
    }
    stacks: dict[int, tuple[Frame, ...]] = {}
    frame = r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)"
    for number, place, parent in re.findall(frame, table("StackFrames"), re.MULTILINE):
        stacks[int(number)] = (locations[place], *stacks.get(int(parent) - 1, ()))
    return stacks


def frames_of(instruction: Instruction, stacks: Mapping[int, tuple[Frame, ...]]) -> tuple[Frame, ...]:
    """The Python stack of an instruction, innermost frame first; empty if the compiler made the instruction."""
    match = re.search(r"stack_frame_id=(\d+)", instruction.rest)
    return stacks.get(int(match[1]), ()) if match else ()


def _constant(instruction: Instruction | None) -> int | None:
    match = re.match(r"constant\((-?\d+)\)", instruction.rest) if instruction else None
    return int(match[1]) if match else None


def dims(type_text: str) -> list[int]:
    """Sizes of the first array in a type."""
    match = ARRAY_TYPE.search(type_text)
    return [int(size) for size in match[2].split(",") if size] if match else []


def trip_count(
    computations: dict[str, dict[str, Instruction]], parent: dict[str, Instruction], loop: Instruction
) -> int | None:
    """Trips of a while loop in the computation `parent`: the compiler's note, or the counter's limit less its start.

    The start is not always 0: the compiler may take the first trip out of a loop.
    """
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(match[1])
    condition = computations[attribute(loop, "condition")]
    for item in condition.values():
        if item.op == "fusion" and item.is_root:
            inside = computations[attribute(item, "calls")].values()
        elif item.op == "compare" and "direction=LT" in item.rest:
            inside = ()
        else:
            continue
        values = [_constant(each) for each in (*inside, *(condition.get(name) for name in operands(item)))]
        limits = [value for value in values if value is not None]
        counters = [
            attribute(condition[name], "index")
            for name in operands(item)
            if name in condition and condition[name].op == "get-tuple-element"
        ]
        if limits:
            return limits[0] - (_initial_value(parent, loop, int(counters[0])) if len(counters) == 1 else 0)
    return None


def _initial_value(parent: dict[str, Instruction], loop: Instruction, index: int) -> int:
    """The constant initial value of a loop's variable; 0 if it is no constant but a variable of an outer loop."""
    item = parent.get(operands(loop)[0])
    if item is None or item.op != "tuple":
        return 0
    item = parent.get(operands(item)[index])
    while item is not None and item.op in ("copy", "bitcast"):
        item = parent.get(operands(item)[0])
    return _constant(item) or 0


def group_size(rest: str) -> int:
    """Devices in one group of a collective, from any of the notations of XLA; 0 if there is none."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        return math.prod(sizes[axis] for axis in re.findall(r"'(\w+)'", match[2]) if axis in sizes)
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return match[1].count(",") + 1
    if match := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        return 2
    return 0
