"""Computes FLOPs, cycles and collectives of a scheduled HLO program; the body of a loop counts once per trip.

`cost_analysis()` counts the body of a loop once, however often it runs, has no network time, and charges a second for
some copies: 1/21 of the FLOPs of a scanned 7B model. So the text is parsed instead (`hlo_text`). On a TPU each fusion
has the compiler's own estimate of its cycles (``estimated_cycles``); collectives and custom calls have none, `estimate`
computes their time. A GPU's come from a roofline (`gpu_time`). A CPU's program has none. `planner` calls `analyze`.

    while                      trips: ``known_trip_count``, or the constant that its condition compares with
    fusion                     cycles, and the matmuls inside; a TPU writes these as convolutions
    all-gather(...)            nothing runs concurrently: exposed
    x-start ... x-done         the work that is scheduled between the two hides it
    async_collective_fusion    parts of one collective (one channel_id) inside the fusions that hide it
    send ... is_host_transfer  between slices, over the data-center network
    sparsecore                 a separate thread (v5p), whose work has no cycles: embedding look-ups, and collectives,
                               which are hidden by the work that is scheduled between their data and their done
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from t5like.plan import gpu_time
from t5like.plan.hlo_text import (
    ARRAY_TYPE,
    Instruction,
    attribute,
    called_computation,
    dims,
    group_size,
    num_bytes,
    operands,
    parse,
    source_of,
    trip_count,
)

COLLECTIVES = (  # opcodes
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
FREE = (  # opcodes that take no time of their own
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
NO_KERNEL = ("async", "copy-start", "copy-done", "send", "recv", "partition-id", "replica-id", "after-all")  # on a GPU


class Loop(NamedTuple):
    """A while instruction."""

    trips: int | None  # of one run; None: unknown, counted as 1
    depth: int  # number of enclosing loops
    source: str


class Collective(NamedTuple):
    """A transfer among devices."""

    kind: str
    bytes: int  # of one run, per device: the larger of its operands and its result
    runs: int  # per step
    in_loop: bool
    asynchronous: bool
    hiding: float  # cycles per step of concurrent work; 0 if the collective is exposed
    group: int  # number of participating devices
    source: str
    stride: int = 1  # devices from one participant to the next


class Work(NamedTuple):
    """An instruction that takes time, other than a collective."""

    category: str  # matmul, other, copy, custom
    cycles: float  # of one run; 0: the compiler gives no estimate
    flops: float  # of its matmuls, one run
    runs: int
    op: str
    source: str


class Tensor(NamedTuple):
    """A value that the program computes and stores in the device's main memory."""

    bytes: int
    shape: str
    source: str


class Analysis(NamedTuple):
    """What one run of a program does on one device."""

    loops: tuple[Loop, ...]
    work: tuple[Work, ...]
    collectives: tuple[Collective, ...]
    slices_bytes: float  # sent to other slices per step
    custom_calls: dict[str, int]  # target -> runs per step
    tensors: tuple[Tensor, ...]  # the largest values, one per shape and source

    @property
    def flops(self) -> float:
        """FLOPs of all matmuls, recomputation included."""
        return sum(item.flops * item.runs for item in self.work)

    def cycles(self) -> dict[str, float]:
        """Cycles per step by category, and their `total`."""
        by_category = defaultdict(float)
        for item in self.work:
            by_category[item.category] += item.cycles * item.runs
        return {**by_category, "total": sum(by_category.values())}


def matmul_flops(computation: dict[str, Instruction], item: Instruction) -> float:
    """2 m n k of a dot, or of a convolution that replaces one (on a TPU its spatial dims are batch dims)."""
    if item.op not in ("dot", "convolution"):
        return 0.0
    factors = [computation.get(name) for name in operands(item)[:2]]
    if len(factors) < 2 or None in factors:
        return 0.0
    out, left, right = dims(item.type), dims(factors[0].type), dims(factors[1].type)
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
    """FLOPs of attention: of the kernel for TPUs, which declares them, of that for GPUs, or of libtpu's.

    The latter reads queries [B, N, L, H], keys and values [B, K, S, H].
    """
    if gpu_time.TRITON in item.rest:
        return gpu_time.attention_flops(source_of(item), [dims(computation[name].type) for name in operands(item)[:2]])
    if 'custom_call_target="tpu_custom_call"' not in item.rest:
        return 0.0
    if match := re.search(r'"cost_estimate":\s*\{[^}]*"flops":\s*"?(\d+)', item.rest):
        return float(match[1])
    shapes = [dims(computation[name].type) for name in operands(item)[:3] if name in computation]
    if len(shapes) < 3 or {len(shape) for shape in shapes} != {4} or len({shape[-1] for shape in shapes[:2]}) > 1:
        return 0.0
    return 2.0 * math.prod(shapes[0][:3]) * shapes[1][2] * (shapes[0][3] + shapes[2][3])


def _library_flops(computation: dict[str, Instruction], item: Instruction) -> float:
    """FLOPs of a matmul for which a GPU's program calls cuBLAS."""
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', item.rest)
    first = computation.get(next(iter(operands(item)), ""))
    if 'custom_call_target="__cublas' not in item.rest or not contracted or first is None:
        return 0.0
    left = dims(first.type)
    return 2.0 * math.prod(dims(item.type)) * math.prod(left[int(dim)] for dim in re.findall(r"\d+", contracted[1]))


class Module:
    """The computations of a module, how often each of them runs, and its loops; FLOPs of any instruction."""

    def __init__(self, text: str, rates: gpu_time.Rates | None = None):
        self.computations, entry = parse(text)
        self._rates = rates
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
                self.loops.append(Loop(trips, depth, source_of(item)))
                self._walk(attribute(item, "body"), runs * (1 if trips is None else trips), depth + 1)
            elif item.op in ("call", "async-start"):
                name_called = called_computation(item)
                if name_called in self.computations and not (item.op == "async-start" and self.threaded(item)):
                    self._walk(name_called, runs, depth)
            elif item.op == "conditional":
                branches = re.findall(r"(?:true_computation|false_computation)=%([\w.\-]+)", item.rest)
                if match := re.search(r"branch_computations=\{([^}]*)\}", item.rest):
                    branches += re.findall(r"%([\w.\-]+)", match[1])
                for branch in branches:  # which one runs is not known: all of them count
                    self._walk(branch, runs, depth)

    def inside(self, name: str) -> list[tuple[dict[str, Instruction], Instruction]]:
        """All instructions of a computation and of those that it calls, each with the computation that contains it."""
        if name not in self._inner:
            instructions = []
            for item in self.computations.get(name, {}).values():
                instructions.append((self.computations[name], item))
                if item.op in ("fusion", "call", "custom-call"):
                    instructions += self.inside(called_computation(item))
            self._inner[name] = instructions
        return self._inner[name]

    def inside_of(self, item: Instruction) -> list[tuple[dict[str, Instruction], Instruction]]:
        """What an instruction calls, as `inside`; empty for one that calls nothing, such as an addition."""
        return self.inside(called_computation(item)) if "%" in item.rest else []

    def threaded(self, start: Instruction) -> list[tuple[dict[str, Instruction], Instruction]]:
        """Collectives that this instruction starts on another thread, each with the computation that contains it."""
        return [
            each for each in self.inside(called_computation(start)) if each[1].op.removesuffix("-start") in COLLECTIVES
        ]

    def flops(self, computation: dict[str, Instruction], item: Instruction) -> float:
        """FLOPs of the matmuls in an instruction, fused ones included."""
        if item.op == "custom-call":
            return _attention_flops(computation, item) + _library_flops(computation, item)
        if item.op == "fusion":
            return sum(matmul_flops(parent, inner) for parent, inner in self.inside(attribute(item, "calls")))
        return matmul_flops(computation, item)

    def cycles(self, computation: dict[str, Instruction], item: Instruction) -> float:
        """Cycles of an instruction: the compiler's estimate, or on a GPU the roofline's nanoseconds; 0: unknown."""
        if match := re.search(r'"estimated_cycles":"(\d+)"', item.rest):
            return float(match[1])
        if self._rates is None or item.op in FREE or _collective(item.op) in (*COLLECTIVES, *NO_KERNEL):
            return 0.0
        size = gpu_time.kernel_bytes(self.computations, computation, item)
        return self._rates.nanoseconds(self.flops(computation, item), size, fused=gpu_time.TRITON in item.rest)


def _collective(opcode: str) -> str:
    return re.sub("-(start|done|update)$", "", opcode)


def _category(item: Instruction, flops: float) -> str:
    if item.op == "custom-call":
        return "custom"
    if item.op.startswith(("copy", "slice-start")):
        return "copy"
    return "matmul" if flops else "other"


def analyze(text: str, rates: gpu_time.Rates | None = None) -> Analysis:
    """Compute what one run of a program does on one device, from its text; of a GPU with its `rates`."""
    module = Module(text, rates)
    work, collectives, custom, tensors = [], _Collectives(module), defaultdict(int), {}
    slices_bytes = 0.0
    for name, runs in list(module.runs.items()):
        computation = module.computations[name]
        for item in computation.values():
            if item.op in FREE:
                continue
            flops, cycles, source = module.flops(computation, item), module.cycles(computation, item), source_of(item)
            base = _collective(item.op)
            if item.op == "custom-call":
                target = re.search(r'custom_call_target="([^"]*)"', item.rest)
                custom[target[1] if target else "?"] += runs
            if base in COLLECTIVES:
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
        tuple(module.loops), tuple(work), tuple(collectives.all()), slices_bytes, dict(custom), tuple(largest)
    )


def _note_tensor(tensors: dict[tuple[str, str], Tensor], item: Instruction, source: str) -> None:
    if item.op in ("copy-start", "copy-done", "send", "recv"):
        return
    for dtype, sizes in ARRAY_TYPE.findall(item.type):
        size = num_bytes(shape := f"{dtype}[{sizes}]")
        if size >= 2**16 and "S(1)" not in item.type:  # S(1): the core's own memory
            tensors.setdefault((shape, source), Tensor(size, shape, source))


class _Collectives:
    """All collectives of a program. One that is distributed over several fusions counts once."""

    def __init__(self, module: Module):
        self._module = module
        self._plain: list[Collective] = []
        self._fused: dict[str, Collective] = {}  # by channel

    def all(self) -> Iterator[Collective]:
        yield from self._plain
        yield from self._fused.values()

    def plain(self, name: str, item: Instruction) -> None:
        """Add a collective that is an instruction of its own: exposed, or hidden from its start to its done."""
        computation = self._module.computations[name]
        asynchronous = item.op.endswith("-start") and '"is_sync":true' not in item.rest
        hiding = self._between(computation, item) * self._module.runs[name] if asynchronous else 0.0
        self._plain.append(self._make(name, computation, item, asynchronous, hiding))

    def threaded(self, name: str, start: Instruction) -> None:
        """Add collectives that run on another thread, from ``async-start`` or ``call-start`` to its done."""
        hiding = self._between(self._module.computations[name], start) * self._module.runs[name]
        self._plain += [self._make(name, *each, True, hiding) for each in self._module.threaded(start)]

    def _between(self, computation: dict[str, Instruction], start: Instruction) -> float:
        """Cycles of the work that is scheduled between a start and its done.

        A start without operands only prepares a thread: its work begins with the ``async-update`` that passes its data.
        """
        names = list(computation)
        begin = next(index for index, name in enumerate(names) if computation[name] is start)
        own, cycles = names[begin], 0.0
        for name in names[begin + 1 :]:
            item = computation[name]
            if item.op.endswith("-done") and own in operands(item):
                break
            if item.op == "async-update" and own in (names_read := operands(item)):
                own, cycles = name, 0.0 if len(names_read) > 1 else cycles
            cycles += self._module.cycles(computation, item)
        return cycles

    def fused(self, name: str, fusion: Instruction, cycles: float) -> None:
        """Add collectives inside a fusion: exposed if synchronous, hidden by their fusions if asynchronous."""
        fused = attribute(fusion, "calls")
        inside = self._module.inside(fused)
        for parent, item in inside:
            base = item.op.removesuffix("-start")
            if base not in COLLECTIVES:
                continue
            is_async = "async_collective_fusion" in fused + item.rest or any(
                "AsyncCollective" in inner.rest for _, inner in inside
            )
            if not is_async:
                collective = self._make(name, parent, item, False, 0.0)
                # libtpu writes a reduce-scatter over one ring as an all-reduce whose slice is fused with it.
                scatters = "all-reduce-scatter" in fused or "AllReduceScatter" in fusion.rest
                self._plain.append(collective._replace(kind="reduce-scatter") if scatters else collective)
                continue
            channel = attribute(item, "channel_id") or item.rest
            hiding = cycles * self._module.runs[name]
            starts = any("AsyncCollectiveStart" in inner.rest for _, inner in inside)
            known = self._fused.get(channel)
            if known is None:
                self._fused[channel] = self._make(name, parent, item, True, hiding)
            elif starts:  # it runs as often as it is started
                self._fused[channel] = self._make(name, parent, item, True, known.hiding + hiding)
            else:
                self._fused[channel] = known._replace(hiding=known.hiding + hiding)

    def _make(self, name: str, parent: dict, item: Instruction, asynchronous: bool, hiding: float) -> Collective:
        kind = item.op.removesuffix("-start")
        read = sum(num_bytes(parent[one].type) for one in operands(item) if one in parent)
        written = num_bytes(item.type)
        # The result of a start contains its operands.
        size = max(read, written - read) if item.op.endswith("-start") else max(read, written)
        runs, in_loop = self._module.runs[name], self._module.in_loop[name]
        group, stride = group_size(item.rest), gpu_time.group_stride(item.rest)
        return Collective(kind, size, runs, in_loop, asynchronous, hiding, group, source_of(item), stride)
