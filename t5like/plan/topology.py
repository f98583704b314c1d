"""Topologies to plan for: their names, properties of their chips, and JAX devices that need not be attached.

    v5e:16x16  v6e:8x8      a slice of a TPU torus, by its sides
    v5p:8x8x8  v4:4x4x8
    h100:8  a100:4x8  h200:1  b200:8   GPUs of a host, or hosts x GPUs per host
    cpu:8                   that many CPU devices of this machine: memory and collectives, no time

Only `devices` loads a compiler; only the compiling process calls it (`plan.compile`).
"""

import math
import os
import re
from typing import NamedTuple

from t5like.errors import ConfigError

GIB = 2**30


class Chip(NamedTuple):
    """One JAX device, which is a whole chip on every TPU below (v4 and v5p in megacore mode)."""

    platform: str  # tpu | gpu | cpu, JAX's names
    memory: int | None  # bytes available to a program; None: unknown
    peak: float = 0.0  # FLOP/s, bf16; 0: unknown, no time is predicted
    flops_per_cycle: int = 1  # of its matrix units; peak / this is the clock. Of a GPU: 1e-9 of the peak, see `clock`
    ici: float = 0.0  # bytes/s along one torus axis, both directions together; of a GPU: NVLink, one direction
    memory_bandwidth: float = 0.0  # bytes/s
    dcn: float = 0.0  # bytes/s per chip between slices, or of a GPU to other hosts, each direction
    wrap: int = 1  # an axis is a ring if its side is a multiple of this
    largest: tuple[int, ...] = ()  # the longest sides of a slice

    @property
    def clock(self) -> float:
        """Cycles per second at which the matrix units reach the peak; 1e9 for a GPU: its cycles are nanoseconds."""
        return self.peak / self.flops_per_cycle


# peak, memory bandwidth, network between slices (the pod's figure per chip, of v4 taken like v5p's):
# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; matrix units, same pages: 4 of 128 x 128 (v5e), 8 (v4, v5p: two cores), 2
# of 256 x 256 (v6e), 2 FLOP a cell and cycle.
# ici: 4.5e10 bytes/s a link and direction on v4 and v5e, 9e10 on v5p and v6e ("How to Scale Your Model", Austin et al.
# 2025, chapter 2), twice that for both. Rings, same chapter: axes of 16 on v5e and v6e, multiples of 4 on v4 and v5p.
# memory: libtpu 0.0.52's figure in its message for a program that needs more ("exceeds available HBM").
CHIPS = {
    "v4": Chip("tpu", int(30.75 * GIB), 275e12, 8 * 2 * 128**2, 9e10, 1228e9, 6.25e9, 4, (16, 16, 16)),
    "v5e": Chip("tpu", int(15.75 * GIB), 197e12, 4 * 2 * 128**2, 9e10, 819e9, 3.125e9, 16, (16, 16)),
    "v5p": Chip("tpu", int(95.73 * GIB), 459e12, 8 * 2 * 128**2, 1.8e11, 2765e9, 6.25e9, 4, (16, 16, 24)),
    "v6e": Chip("tpu", int(31.24 * GIB), 918e12, 2 * 2 * 256**2, 1.8e11, 1640e9, 12.5e9, 16, (16, 16)),
}
TPU_NAMES = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}  # JAX's
# XLA compiles for a GPU from its description: openxla/xla, xla/backends/gpu/target_config/specs/*.txtpb. These are the
# fields that differ: name, cores, units, shared memory of a core and of a block, L2 bytes, GHz, memory bytes
# and bytes/s, compute capability.
GPUS = {
    "a100": ("NVIDIA A100-SXM4-80GB", 108, 64, 167936, 166912, 41943040, 1.41, 85100068864, 2039040000000, 8),
    "h100": ("NVIDIA H100 80GB HBM3", 132, 128, 233472, 232448, 52428800, 1.98, 84942979072, 3352320000000, 9),
    "h200": ("NVIDIA H200 141GB HBM3e", 132, 128, 233472, 232448, 52428800, 1.98, 151397597184, 4800000000000, 9),
    "b200": ("NVIDIA B200", 148, 128, 233472, 232448, 132644864, 1.965, 191514411008, 7672320000000, 10),
}
# Bytes/s of a GPU, each direction. NVLink to the other GPUs of its host: half of the total bandwidth in NVIDIA's data
# sheets of A100 (600 GB/s), H100 and H200 (900) and HGX B200 (1,800). InfiniBand adapters, one for each GPU, in those
# of DGX A100 (200 Gb/s), DGX H100, H200 and B200 (400 Gb/s). The peak is that of `metrics.flops`.
GPU_LINKS = {"a100": (300e9, 25e9), "h100": (450e9, 50e9), "h200": (450e9, 50e9), "b200": (900e9, 50e9)}
GPU_SHARE = 0.75  # of a GPU's memory that JAX allocates by default (XLA_PYTHON_CLIENT_MEM_FRACTION)
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # slices of v5e and v6e
EXAMPLES = "v5e:16x16, v6e:8x8, v5p:8x8x8, v4:4x4x8, h100:4x8 or cpu:8"


class Topology(NamedTuple):
    """A machine to plan for."""

    kind: str  # a key of CHIPS or GPUS, or cpu
    shape: tuple[int, ...]  # of one slice, in devices; of GPUs: hosts x GPUs of each
    num_slices: int
    chip: Chip

    @property
    def num_devices(self) -> int:
        """All devices, of all slices."""
        return math.prod(self.shape) * self.num_slices

    @property
    def name(self) -> str:
        """The name on the command line, with the number of slices."""
        slices = f"{self.num_slices} x " if self.num_slices > 1 else ""
        shape = self.shape[1:] if self.kind in GPUS and self.shape[0] == 1 else self.shape
        return f"{slices}{self.kind}:{'x'.join(map(str, shape))}"


def parse(text: str, num_slices: int = 1) -> Topology:
    """Parse `--topology`, which names one of `num_slices` slices.

    Raises:
        ConfigError: there is no such topology.
    """
    kind, _, sides = text.strip().lower().partition(":")
    if not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*)*", sides) or kind not in ("cpu", *CHIPS, *GPUS):
        raise ConfigError(f"--topology={text} must name a machine and its size; use {EXAMPLES}")
    shape = tuple(int(side) for side in sides.split("x"))
    if num_slices < 1:
        raise ConfigError(f"--num_slices={num_slices} must be at least 1; use --num_slices=2")
    if kind == "cpu":
        if len(shape) > 1 or shape[0] > 512:
            raise ConfigError(f"--topology={text} must be a number of devices up to 512; use cpu:8")
        return Topology(kind, shape, num_slices, Chip("cpu", _machine_memory() // (shape[0] * num_slices)))
    if kind in GPUS:
        if len(shape) > 2 or shape[-1] > 8:
            raise ConfigError(f"--topology={text} must be GPUs of a host, at most 8, or hosts x GPUs; use {kind}:4x8")
        return Topology(kind, (1, *shape)[-2:], num_slices, gpu(kind))
    chip = CHIPS[kind]
    if len(chip.largest) == 2 and sides not in FLAT:
        raise ConfigError(f"--topology={text} is no slice of {kind}; use {kind}: with {', '.join(FLAT)}")
    if len(chip.largest) == 3 and not is_block(shape, chip.largest):
        raise ConfigError(
            f"--topology={text} is no slice of {kind}: three sides in rising order, multiples of 4 up to "
            f"{'x'.join(map(str, chip.largest))}, or 2x2x1, 2x2x2, 2x2x4, 2x4x4; use {kind}:4x4x8"
        )
    return Topology(kind, shape, num_slices, chip)


def one_chip(kind: str) -> Topology:
    """A single accelerator of this kind, a key of `CHIPS` or `GPUS`.

    Raises:
        ConfigError: there is no such kind.
    """
    if kind not in (*CHIPS, *GPUS):
        raise ConfigError(f"chip={kind} must be one of {', '.join((*CHIPS, *GPUS))}; use h100")
    return Topology(kind, (1, 1), 1, CHIPS[kind] if kind in CHIPS else gpu(kind))


def kind_of_device(device_kind: str) -> str | None:
    """The kind of JAX's device ``NVIDIA H100 80GB HBM3`` is h100; None for others, and for a part of one (MIG)."""
    if device_kind in TPU_NAMES:
        return TPU_NAMES[device_kind]
    found = re.search(rf"\b({'|'.join(GPUS)})\b", device_kind, re.IGNORECASE)
    other = re.search(r"\b(MIG|PCIe|NVL)\b", device_kind, re.IGNORECASE)
    return found[1].lower() if found and not other else None


def is_block(shape: tuple[int, ...], largest: tuple[int, ...]) -> bool:
    """Return whether a slice of three sides exists."""
    if shape in ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)):
        return True
    fits = len(shape) == 3 and all(side % 4 == 0 and side <= most for side, most in zip(shape, largest, strict=True))
    return fits and list(shape) == sorted(shape)


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gpu(kind: str) -> Chip:
    """One GPU of this kind, of which a program has JAX's default share of the memory."""
    from t5like.metrics.flops import PEAK_FLOPS  # it imports JAX, without which commands about jobs start sooner

    memory, bandwidth = GPUS[kind][7:9]
    peak, (nvlink, network) = PEAK_FLOPS[kind.upper()], GPU_LINKS[kind]
    return Chip("gpu", int(GPU_SHARE * memory), peak, round(peak / 1e9), nvlink, bandwidth, network)


def _gpu_target(kind: str) -> str:
    """XLA's description of a GPU as a text protocol buffer."""
    name, cores, units, core_shared, block_shared, l2, clock, memory, bandwidth, capability = GPUS[kind]
    return f"""gpu_device_info {{
      core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock}
      cuda_compute_capability {{ major: {capability} }}
      device_memory_size: {memory} memory_bandwidth: {bandwidth} l2_cache_size: {l2}
      shared_memory_per_core: {core_shared} shared_memory_per_block: 49152 shared_memory_per_block_optin: {block_shared}
      threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{name}"
    """


def devices(topology: Topology) -> list:
    """JAX devices to compile for; for `cpu` those of this process, whose number XLA_FLAGS must set.

    Raises:
        ConfigError: the compiler does not know the slice.
    """
    import jax

    if topology.kind == "cpu":
        return jax.devices("cpu")[: topology.num_devices]
    from jax.experimental import topologies

    sides = "x".join(map(str, topology.shape))
    if sides == "1x1":  # libtpu describes no single chip; a program for one of four is the same
        return devices(topology._replace(shape=(2, 2)))[:1]
    name = f"{topology.kind}:{sides}"
    if topology.kind in GPUS:
        options = {"target_config": _gpu_target(topology.kind), "topology": f"{topology.num_slices}x{sides}"}
    else:
        options = {"num_slices": topology.num_slices}
    if topology.kind == "v4":  # its chips are two devices by default, one with megacore, as on Cloud TPU
        options |= {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
    platform = "cuda" if topology.kind in GPUS else "tpu"
    try:
        described = topologies.get_topology_desc(platform=platform, topology_name=name, **options).devices
    except Exception as error:  # jaxlib raises several types without a common base
        reason = str(error).strip().split("\n")[0][:200]
        raise ConfigError(f"--topology={name} is not known to this compiler: {reason}; use {EXAMPLES}") from None
    assert len(described) == topology.num_devices, (len(described), topology)
    return list(described)
