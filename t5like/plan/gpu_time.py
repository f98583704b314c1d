"""Time of a GPU's kernels and collectives, for which its compiler gives no cycles: a roofline for each instruction.

    kernel      max(FLOPs / (0.8 x peak), bytes / (0.8 x memory bandwidth)) + 6 microseconds
    collective  bytes of a ring on its slowest link / (0.75 x the link's bandwidth) + 30 microseconds

**Fitted to measurements of an H100** that XLA contains for its own cost model (openxla/xla, xla/service/gpu/model,
sm_90; some of them are in tests/plan/test_gpu_time.py). Of 51 bfloat16 matmuls (matmul_interpolator_data.h: one to four
of sides 256 to 4,096) the error is 9 % (root mean square), -17 to +25 %. Copies reach 0.79 of the bandwidth, and
collectives of 512 MiB on 8 GPUs 0.70 to 0.85 of NVLink's (collective_interpolator_data.h). The shares are assumed for
the other GPUs and for the network between hosts.

**A step is not calibrated.** Its kernels and exposed collectives are summed. No step of t5like was measured on a GPU,
so it is not known what the sum leaves out or counts twice: `estimate` has the error that is assumed.

A kernel's bytes are its operands and results, each once: what fits in the L2 cache is overestimated, and what a kernel
reads twice is underestimated. Of an operand that a fusion only slices, or updates in place, the slice counts.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from t5like.plan.hlo_text import Instruction, called_computation, num_bytes, operands
from t5like.plan.topology import Topology

MATMUL_SHARE = 0.8  # of the peak, in a large matmul
ATTENTION_SHARE = 0.35  # in fused attention: FlashAttention-2 on an H100 (Shah et al. 2024, arXiv:2407.08608)
BANDWIDTH_SHARE = 0.8  # of the memory's bandwidth, in a kernel that moves much
KERNEL_SECONDS = 6e-6  # of each kernel: its start, and the time until all cores work
LINK_SHARE = 0.75
COLLECTIVE_SECONDS = 30e-6
TRITON = "__gpu$xla.gpu.triton"  # a Pallas kernel
_PRODUCTS = {"forward": 2, "queries": 3, "keys": 4, "bias": 2}  # matmuls of `model.kernels.gpu_attention`, by kernel
_VIEWS = ("bitcast", "reshape")
_SLICES = ("dynamic-slice", "slice", "gather")

Computation = Mapping[str, Instruction]


class Rates(NamedTuple):
    """What a kernel reaches, per nanosecond (`topology.Chip.clock`)."""

    flops: float
    bytes: float
    start: float  # nanoseconds of each kernel

    def nanoseconds(self, flops: float, size: int, *, fused: bool = False) -> float:
        """Time of a kernel that computes so many FLOPs and reads and writes so many bytes; fused: of attention."""
        rate = self.flops * (ATTENTION_SHARE / MATMUL_SHARE if fused else 1.0)
        return max(flops / rate, size / self.bytes) + self.start


def rates(topology: Topology) -> Rates:
    """The rates of this topology's GPUs."""
    chip = topology.chip
    return Rates(MATMUL_SHARE * chip.peak / 1e9, BANDWIDTH_SHARE * chip.memory_bandwidth / 1e9, 1e9 * KERNEL_SECONDS)


def attention_flops(source: str, shapes: Sequence[Sequence[int]]) -> float:
    """FLOPs of a kernel of `model.kernels.gpu_attention`, of all pairs or of a window; 0 for another kernel.

    Args:
        source: its path in the JAX program, which contains the kernel's name.
        shapes: of queries [B, N, L, H] and keys [B, K, S, H].
    """
    name = re.search(rf"attention_({'|'.join(_PRODUCTS)})(?:_of_(\d+)_keys)?\b", source)
    return 2.0 * _PRODUCTS[name[1]] * math.prod(shapes[0]) * int(name[2] or shapes[1][2]) if name else 0.0


def kernel_bytes(computations: Mapping[str, Computation], parent: Computation, item: Instruction) -> int:
    """Bytes that an instruction reads from the device's main memory and writes to it."""
    sizes = [num_bytes(parent[name].type) for name in operands(item) if name in parent]
    if item.op in _SLICES:
        return 2 * num_bytes(item.type)
    if item.op == "dynamic-update-slice":
        return 2 * sizes[1]
    if item.op == "custom-call" and "__cublas" in item.rest:  # (product, workspace)
        return sum(sizes) + num_bytes(item.type.split("}")[0])
    if item.op != "fusion":
        return sum(sizes) + num_bytes(item.type)
    inside = computations[called_computation(item)]
    read = sum(_bytes_read(inside, name) for name, each in inside.items() if each.op == "parameter")
    return read + sum(_bytes_written(inside, name) for name in _results(inside))


def _results(inside: Computation) -> list[str]:
    root = next(name for name, each in inside.items() if each.is_root)
    return operands(inside[root]) if inside[root].op == "tuple" else [root]


def _bytes_read(inside: Computation, name: str) -> int:
    """Bytes of an operand that a fusion reads: its slices, if nothing else of it is used."""
    total = 0
    for reader in inside.values():
        if reader.op == "parameter" or name not in (used := operands(reader)):
            continue
        if reader.op in _VIEWS:
            total += _bytes_read(inside, next(key for key, each in inside.items() if each is reader))
        elif reader.op in _SLICES and used[0] == name:
            total += num_bytes(reader.type)
        elif not (reader.op == "dynamic-update-slice" and used[0] == name):  # which writes in place
            return num_bytes(inside[name].type)
    return min(total, num_bytes(inside[name].type))


def _bytes_written(inside: Computation, name: str) -> int:
    """Bytes of a result that a fusion writes: the updated slice, if the rest is in place already."""
    item = inside[name]
    while item.op in _VIEWS:
        item = inside[operands(item)[0]]
    return num_bytes(inside[operands(item)[1]].type if item.op == "dynamic-update-slice" else item.type)


def hosts_of_group(topology: Topology, group: int, stride: int = 1) -> int:
    """Number of hosts that a group of a collective's devices spans; neighbors in it are `stride` devices apart."""
    return max(1, min(group, group * stride // topology.shape[-1]))


def wire_seconds(kind: str, size: int, topology: Topology, group: int, stride: int = 1) -> float:
    """Time of one run of a collective: of NCCL's rings, over NVLink and between hosts over all adapters of the group.

    Args:
        kind: an opcode of `hlo_cost.COLLECTIVES`; a permutation has groups of two.
        size: bytes of the larger of its operand and its result, per device.
        topology: GPUs.
        group: number of participating devices.
        stride: devices from one of them to the next.
    """
    hosts = hosts_of_group(topology, group, stride)
    link = min(topology.chip.ici, group / hosts * topology.chip.dcn) if hosts > 1 else topology.chip.ici
    if kind in ("all-to-all", "ragged-all-to-all") and hosts > 1:  # no ring: each sends through its own adapter
        link = topology.chip.dcn
    sent = {"all-reduce": 2 * size, "collective-permute": 2 * size}.get(kind, size) * (group - 1) / group
    return sent / link / LINK_SHARE + COLLECTIVE_SECONDS


def group_stride(rest: str) -> int:
    """Devices from one participant of a collective to the next, from its attributes; 1 if they are neighbors."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        axes, named = re.findall(r"'(\w+)'=(\d+)", match[1]), re.findall(r"'(\w+)'", match[2])
        stride = 1
        for axis, size in reversed(axes):
            if axis in named:
                return stride
            stride *= int(size)
    if match := re.search(r"replica_groups=\{\{(\d+),(\d+)", rest):
        return int(match[2]) - int(match[1])
    if match := re.search(r"replica_groups=\[\d+,\d+\]<=\[(\d+),(\d+)\]T\(1,0\)", rest):
        return int(match[2])
    return 1
