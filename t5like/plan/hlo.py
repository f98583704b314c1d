"""Reads a scheduled HLO program (``compiled.as_text()``): what one run of it does, loops times their trips.

`cost_analysis()` counts the body of a loop once, however often it runs, has no network time, and charges a second for
some copies: 1/21 of the FLOPs of a scanned 7B model. So the text is read instead. On a TPU each fusion carries the
compiler's own estimate of its cycles (``estimated_cycles``); collectives and custom calls carry none: `plan.estimate`
gives them a time. A CPU's program has no cycles at all. What the forms below mean was found by compiling probes of
known size (tests/golden/make_hlo.py): there is no specification.

    while                      trips: ``known_trip_count``, or the constant that its condition compares with
    fusion                     cycles, and the matrix products inside; a TPU writes these as convolutions
    all-gather(...)            nothing else happens meanwhile: exposed
    x-start ... x-done         what is scheduled between the two hides it
    async_collective_fusion    parts of one collective (one channel_id) inside the fusions that hide it
    send ... is_host_transfer  between slices, over the data-center network
    sparsecore                 a thread beside the others (v5p), whose work has no cycles: look-ups in embeddings, and
                               collectives, which what is scheduled from their data to their done hides
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

_BITS = {"pred": 8, "token": 0, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"\b(pred|token|bf16|[suf](?:4|8|16|32|64)|f8\w+|c64|c128)\[([\d,]*)\]")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_FREE = (
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "constant",
    "while",
    "conditional",
    "call",
    "opt-barrier",
)


class Instruction(NamedTuple):
    """One line of a computation."""

    type: str  # of its result, layout included
    op: str
    rest: str  # operands and attributes
    is_root: bool


class Loop(NamedTuple):
    """A while instruction."""

    trips: int | None  # of one run; None: they could not be told, and count as 1
    depth: int  # loops around it
    source: str


class Collective(NamedTuple):
    """A transfer among devices."""

    kind: str
    bytes: int  # of one run, per device: the larger one of what goes in and what comes out
    runs: int  # a step
    in_loop: bool
    asynchronous: bool
    hiding: float  # cycles a step of what runs meanwhile; 0 if it is exposed
    group: int  # devices that take part
    source: str


class Work(NamedTuple):
    """An instruction that takes time, other than a collective."""

    category: str  # matmul, other, copy, custom
    cycles: float  # of one run; 0: the compiler does not say
    flops: float  # of the matrix products in it, one run
    runs: int
    op: str
    source: str


class Tensor(NamedTuple):
    """A value that the program computes and keeps in the device's main memory for a while."""

    bytes: int
    shape: str
    source: str


class Analysis(NamedTuple):
    """What one run of a program does on one device."""

    loops: tuple[Loop, ...]
    work: tuple[Work, ...]
    collectives: tuple[Collective, ...]
    slices_bytes: float  # sent to other slices in a step
    custom_calls: dict[str, int]  # target -> runs a step
    tensors: tuple[Tensor, ...]  # the largest values, each shape and source once

    @property
    def flops(self) -> float:
        """Of all matrix products, recomputation included."""
        return sum(item.flops * item.runs for item in self.work)

    def cycles(self) -> dict[str, float]:
        """Cycles a step by category, and `total`."""
        found = defaultdict(float)
        for item in self.work:
            found[item.category] += item.cycles * item.runs
        return {**found, "total": sum(found.values())}


def num_bytes(type_text: str) -> int:
    """Bytes of the arrays in a type, without the padding of their layouts."""
    total = 0
    for name, dims in _SHAPE.findall(type_text):
        bits = _BITS.get(name) or (0 if name == "token" else 8 if name.startswith("f8") else int(name.lstrip("bsuf")))
        total += math.prod(map(int, filter(None, dims.split(",")))) * bits
    return total // 8


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Split a module into computations by name, and give the name of the one that is run."""
    computations, current, entry = {}, {}, ""
    for line in text.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{") and "->" in line:
            found = re.match(r"(ENTRY )?%?([\w.\-]+)", line)
            current = computations[found[2]] = {}
            entry = found[2] if found[1] else entry
        elif found := _LINE.match(line):
            type_text, rest = _split_type(found[3])
            current[found[2]] = Instruction(type_text, rest.partition("(")[0], rest, bool(found[1]))
    return computations, entry


def _split_type(text: str) -> tuple[str, str]:
    if not text.startswith("("):
        type_text, _, rest = text.partition(" ")
        return type_text, rest
    end = _closing(text, 0)
    return text[: end + 1], text[end + 2 :]


def _closing(text: str, start: int) -> int:
    """Where the parenthesis closes that opens at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    return len(text) - 1


def operands(instruction: Instruction) -> list[str]:
    """Names of what an instruction reads."""
    start = instruction.rest.index("(")
    return re.findall(r"%([\w.\-]+)", instruction.rest[start : _closing(instruction.rest, start) + 1])


def _attribute(instruction: Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", instruction.rest)
    return found[1] if found else ""


def _called(instruction: Instruction) -> str:
    """The computation that an instruction runs; empty if there is none."""
    found = re.search(r"\bcalled_computations=\{%?([\w.\-]+)", instruction.rest)
    return found[1] if found else _attribute(instruction, "calls") or _attribute(instruction, "to_apply")


def _source(instruction: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', instruction.rest)
    return found[1] if found else ""


def _constant(instruction: Instruction | None) -> int | None:
    found = re.match(r"constant\((-?\d+)\)", instruction.rest) if instruction else None
    return int(found[1]) if found else None


def trip_count(
    computations: dict[str, dict[str, Instruction]], holder: dict[str, Instruction], loop: Instruction
) -> int | None:
    """How often a while loop in `holder` runs: what the compiler notes, or from the counter's start to its limit.

    The start is not always 0: the compiler may take the first trip out of a loop.
    """
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(found[1])
    condition = computations[_attribute(loop, "condition")]
    for item in condition.values():
        if item.op == "fusion" and item.is_root:
            inside = computations[_attribute(item, "calls")].values()
        elif item.op == "compare" and "direction=LT" in item.rest:
            inside = ()
        else:
            continue
        values = [_constant(each) for each in (*inside, *(condition.get(name) for name in operands(item)))]
        limits = [value for value in values if value is not None]
        counters = [
            _attribute(condition[name], "index")
            for name in operands(item)
            if name in condition and condition[name].op == "get-tuple-element"
        ]
        if limits:
            return limits[0] - (_start(holder, loop, int(counters[0])) if len(counters) == 1 else 0)
    return None


def _start(holder: dict[str, Instruction], loop: Instruction, index: int) -> int:
    """The constant that a loop's value begins with; 0 if it is none, as where an outer loop hands it on."""
    item = holder.get(operands(loop)[0])
    if item is None or item.op != "tuple":
        return 0
    item = holder.get(operands(item)[index])
    while item is not None and item.op in ("copy", "bitcast"):
        item = holder.get(operands(item)[0])
    return _constant(item) or 0


def product_flops(computation: dict[str, Instruction], item: Instruction) -> float:
    """2 m n k of a dot, or of a convolution that stands for one (on a TPU spatial dims stand for batches)."""
    if item.op not in ("dot", "convolution"):
        return 0.0
    read = [computation.get(name) for name in operands(item)[:2]]
    if len(read) < 2 or None in read:
        return 0.0
    out, left, right = _dims(item.type), _dims(read[0].type), _dims(read[1].type)
    if item.op == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", item.rest)[1]
        return 2.0 * math.prod(out) * math.prod(left[int(dim)] for dim in contracted.split(",") if dim)
    left_labels, right_labels, out_labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", item.rest).groups()
    window = re.search(r"window=\{[^}]*size=([\dx]+)", item.rest)
    taps = 1
    for number, size in enumerate(int(size) for size in window[1].split("x")) if window else ():
        label = str(number)
        # A spatial dim of the output that is 1 was summed over; otherwise it is a batch, one tap for each output.
        if out[out_labels.index(label)] == 1 and left[left_labels.index(label)] == size:
            taps *= size
    return 2.0 * math.prod(out) * right[right_labels.index("i")] * taps


def _attention_flops(computation: dict[str, Instruction], item: Instruction) -> float:
    """Of a Pallas kernel that says so itself (`model.tpu`), or of one that libtpu makes of plain softmax.

    The latter reads queries [B, N, L, H], keys and values [B, K, S, H].
    """
    if 'custom_call_target="tpu_custom_call"' not in item.rest:
        return 0.0
    if found := re.search(r'"cost_estimate":\s*\{[^}]*"flops":\s*"?(\d+)', item.rest):
        return float(found[1])
    shapes = [_dims(computation[name].type) for name in operands(item)[:3] if name in computation]
    if len(shapes) < 3 or {len(shape) for shape in shapes} != {4} or len({shape[-1] for shape in shapes[:2]}) > 1:
        return 0.0
    return 2.0 * math.prod(shapes[0][:3]) * shapes[1][2] * (shapes[0][3] + shapes[2][3])


def _library_flops(computation: dict[str, Instruction], item: Instruction) -> float:
    """Of a product that a GPU's program leaves to cuBLAS."""
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', item.rest)
    first = computation.get(next(iter(operands(item)), ""))
    if 'custom_call_target="__cublas' not in item.rest or not contracted or first is None:
        return 0.0
    left = _dims(first.type)
    return 2.0 * math.prod(_dims(item.type)) * math.prod(left[int(dim)] for dim in re.findall(r"\d+", contracted[1]))


def _dims(type_text: str) -> list[int]:
    found = _SHAPE.search(type_text)
    return [int(size) for size in found[2].split(",") if size] if found else []


class _Reader:
    """Walks a module once: how often each computation runs, then what each instruction in it is."""

    def __init__(self, text: str):
        self.computations, entry = parse(text)
        self.runs: dict[str, int] = defaultdict(int)
        self.in_loop: dict[str, bool] = defaultdict(bool)
        self.loops: list[Loop] = []
        self._inner: dict[str, list[tuple[dict, Instruction]]] = {}
        self._walk(entry, 1, 0)

    def _walk(self, name: str, runs: int, depth: int) -> None:
        self.runs[name] += runs
        self.in_loop[name] |= depth > 0
        for item in self.computations[name].values():
            if item.op == "while":
                trips = trip_count(self.computations, self.computations[name], item)
                self.loops.append(Loop(trips, depth, _source(item)))
                self._walk(_attribute(item, "body"), runs * (1 if trips is None else trips), depth + 1)
            elif item.op in ("call", "async-start"):
                called = _called(item)
                if called in self.computations and not (item.op == "async-start" and self.threaded(item)):
                    self._walk(called, runs, depth)
            elif item.op == "conditional":
                branches = re.findall(r"(?:true_computation|false_computation)=%([\w.\-]+)", item.rest)
                if found := re.search(r"branch_computations=\{([^}]*)\}", item.rest):
                    branches += re.findall(r"%([\w.\-]+)", found[1])
                for branch in branches:  # which one is taken is not known: all of them count
                    self._walk(branch, runs, depth)

    def inside(self, name: str) -> list[tuple[dict[str, Instruction], Instruction]]:
        """All instructions of a computation and of those that it calls, each with the computation that holds it."""
        if name not in self._inner:
            found = []
            for item in self.computations.get(name, {}).values():
                found.append((self.computations[name], item))
                if item.op in ("fusion", "call", "custom-call"):
                    found += self.inside(_called(item))
            self._inner[name] = found
        return self._inner[name]

    def threaded(self, start: Instruction) -> list[tuple[dict[str, Instruction], Instruction]]:
        """Collectives that another thread runs from this start on, each with the computation that holds it."""
        return [each for each in self.inside(_called(start)) if each[1].op.removesuffix("-start") in _COLLECTIVES]

    def flops(self, computation: dict[str, Instruction], item: Instruction) -> float:
        """Of the products in an instruction, fused ones included."""
        if item.op == "custom-call":
            return _attention_flops(computation, item) + _library_flops(computation, item)
        if item.op == "fusion":
            return sum(product_flops(holder, inner) for holder, inner in self.inside(_attribute(item, "calls")))
        return product_flops(computation, item)


def _cycles(item: Instruction) -> float:
    found = re.search(r'"estimated_cycles":"(\d+)"', item.rest)
    return float(found[1]) if found else 0.0


def _category(item: Instruction, flops: float) -> str:
    if item.op == "custom-call":
        return "custom"
    if item.op.startswith(("copy", "slice-start")):
        return "copy"
    return "matmul" if flops else "other"


def analyze(text: str) -> Analysis:
    """Read a program."""
    reader = _Reader(text)
    work, collectives, custom, tensors = [], _Collectives(reader), defaultdict(int), {}
    slices_bytes = 0.0
    for name, runs in list(reader.runs.items()):
        computation = reader.computations[name]
        for item in computation.values():
            if item.op in _FREE:
                continue
            flops, cycles, source = reader.flops(computation, item), _cycles(item), _source(item)
            base = re.sub("-(start|done)$", "", item.op)
            if item.op == "custom-call":
                target = re.search(r'custom_call_target="([^"]*)"', item.rest)
                custom[target[1] if target else "?"] += runs
            if base in _COLLECTIVES:
                if not item.op.endswith("-done"):
                    collectives.plain(name, item)
            elif item.op in ("async-start", "call-start"):
                collectives.threaded(name, item)
            elif item.op == "fusion":
                collectives.fused(name, item, cycles)
            elif item.op == "send" and "is_host_transfer=true" in item.rest:
                slices_bytes += runs * sum(num_bytes(computation[one].type) for one in operands(item)[:1])
            if flops or cycles or item.op == "custom-call":
                work.append(Work(_category(item, flops), cycles, flops, runs, item.op, source))
            _note_tensor(tensors, item, source)
    largest = sorted(tensors.values(), key=lambda tensor: -tensor.bytes)[:20]
    return Analysis(
        tuple(reader.loops), tuple(work), tuple(collectives.found()), slices_bytes, dict(custom), tuple(largest)
    )


def _note_tensor(tensors: dict[tuple[str, str], Tensor], item: Instruction, source: str) -> None:
    for name, dims in _SHAPE.findall(item.type) if item.op not in ("copy-start", "copy-done", "send", "recv") else ():
        size = num_bytes(shape := f"{name}[{dims}]")
        if size >= 2**16 and "S(1)" not in item.type:  # S(1): the small memory beside the cores
            tensors.setdefault((shape, source), Tensor(size, shape, source))


class _Collectives:
    """Gathers collectives, those that are spread over several fusions as one."""

    def __init__(self, reader: _Reader):
        self._reader = reader
        self._plain: list[Collective] = []
        self._fused: dict[str, Collective] = {}  # by channel

    def found(self) -> Iterator[Collective]:
        yield from self._plain
        yield from self._fused.values()

    def plain(self, name: str, item: Instruction) -> None:
        """One that is an instruction of its own, exposed or from its start to its done."""
        computation = self._reader.computations[name]
        asynchronous = item.op.endswith("-start")
        hiding = self._between(computation, item) * self._reader.runs[name] if asynchronous else 0.0
        self._plain.append(self._make(name, computation, item, asynchronous, hiding))

    def threaded(self, name: str, start: Instruction) -> None:
        """Those that another thread runs, from ``async-start`` or ``call-start`` to its done."""
        hiding = self._between(self._reader.computations[name], start) * self._reader.runs[name]
        self._plain += [self._make(name, *each, True, hiding) for each in self._reader.threaded(start)]

    def _between(self, computation: dict[str, Instruction], start: Instruction) -> float:
        """Cycles of what is scheduled between a start and its done.

        A start without operands only prepares a thread: what runs begins with the ``async-update`` that has its data.
        """
        names = list(computation)
        begin = next(place for place, name in enumerate(names) if computation[name] is start)
        own, cycles = names[begin], 0.0
        for name in names[begin + 1 :]:
            item = computation[name]
            if item.op.endswith("-done") and own in operands(item):
                break
            if item.op == "async-update" and own in (read := operands(item)):
                own, cycles = name, 0.0 if len(read) > 1 else cycles
            cycles += _cycles(item)
        return cycles

    def fused(self, name: str, fusion: Instruction, cycles: float) -> None:
        """Those inside a fusion: alone in it they are exposed; the fusions of an asynchronous one hide it."""
        called = _attribute(fusion, "calls")
        inside = self._reader.inside(called)
        for holder, item in inside:
            base = item.op.removesuffix("-start")
            if base not in _COLLECTIVES:
                continue
            spread = "async_collective_fusion" in called + item.rest or any(
                "AsyncCollective" in inner.rest for _, inner in inside
            )
            if not spread:
                made = self._make(name, holder, item, False, 0.0)
                # libtpu's spelling of a reduce-scatter over one ring: an all-reduce whose slice is fused with it.
                scatters = "all-reduce-scatter" in called or "AllReduceScatter" in fusion.rest
                self._plain.append(made._replace(kind="reduce-scatter") if scatters else made)
                continue
            channel = _attribute(item, "channel_id") or item.rest
            hiding = cycles * self._reader.runs[name]
            starts = any("AsyncCollectiveStart" in inner.rest for _, inner in inside)
            known = self._fused.get(channel)
            if known is None:
                self._fused[channel] = self._make(name, holder, item, True, hiding)
            elif starts:  # it runs as often as it is begun
                self._fused[channel] = self._make(name, holder, item, True, known.hiding + hiding)
            else:
                self._fused[channel] = known._replace(hiding=known.hiding + hiding)

    def _make(self, name: str, holder: dict, item: Instruction, asynchronous: bool, hiding: float) -> Collective:
        kind = item.op.removesuffix("-start")
        read = sum(num_bytes(holder[one].type) for one in operands(item) if one in holder)
        made = num_bytes(item.type)
        # The result of a start holds its operands too.
        size = max(read, made - read) if item.op.endswith("-start") else max(read, made)
        runs, in_loop = self._reader.runs[name], self._reader.in_loop[name]
        return Collective(kind, size, runs, in_loop, asynchronous, hiding, group_size(item.rest), _source(item))


def group_size(rest: str) -> int:
    """Devices in one group of a collective, from any of the three ways to write it; 0 if it says nothing."""
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(found[2])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        return math.prod(sizes[axis] for axis in re.findall(r"'(\w+)'", found[2]) if axis in sizes)
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return found[1].count(",") + 1
    if found := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        return 2
    return 0
