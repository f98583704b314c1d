"""The machine that is planned for: its name, the facts of its chips, and JAX devices that need not be there.

    v5e:16x16  v6e:8x8      a slice of a TPU torus, by its sides
    v5p:8x8x8  v4:4x4x8
    cpu:8                   that many devices of this machine's processor: memory and collectives, no time

Nothing here imports libtpu but `devices`, which only the process that compiles calls (`plan.compile`).
"""

import math
import os
import re
from typing import NamedTuple

from t5like.errors import ConfigError

GIB = 2**30


class Chip(NamedTuple):
    """One JAX device, which is a whole chip on every TPU below (v4 and v5p in megacore mode)."""

    platform: str  # tpu | cpu, as JAX says
    memory: int | None  # bytes that a program may use; None: not known
    peak: float = 0.0  # FLOP/s, bf16; 0: unknown, so that no time is predicted
    flops_per_cycle: int = 1  # of its matrix units; peak / this is the clock
    ici: float = 0.0  # bytes/s along one torus axis, both directions together
    memory_bandwidth: float = 0.0  # bytes/s
    dcn: float = 0.0  # bytes/s a chip between slices, each way
    wrap: int = 1  # an axis closes to a ring if its side is a multiple of this
    largest: tuple[int, ...] = ()  # the longest sides of a slice

    @property
    def clock(self) -> float:
        """Cycles per second at which the matrix units reach the peak."""
        return self.peak / self.flops_per_cycle


# peak, memory bandwidth, network between slices (the pod's figure per chip, of v4 taken like v5p's):
# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; matrix units, same pages: 4 of 128 x 128 (v5e), 8 (v4, v5p: two cores), 2
# of 256 x 256 (v6e), 2 FLOP a cell and cycle.
# ici: 4.5e10 bytes/s a link and direction on v4 and v5e, 9e10 on v5p and v6e ("How to Scale Your Model", Austin et al.
# 2025, chapter 2), twice that for both. Rings, same chapter: axes of 16 on v5e and v6e, multiples of 4 on v4 and v5p.
# memory: what libtpu 0.0.52 says is available when a program needs more ("exceeds available HBM"), asked of each.
CHIPS = {
    "v4": Chip("tpu", int(30.75 * GIB), 275e12, 8 * 2 * 128**2, 9e10, 1228e9, 6.25e9, 4, (16, 16, 16)),
    "v5e": Chip("tpu", int(15.75 * GIB), 197e12, 4 * 2 * 128**2, 9e10, 819e9, 3.125e9, 16, (16, 16)),
    "v5p": Chip("tpu", int(95.73 * GIB), 459e12, 8 * 2 * 128**2, 1.8e11, 2765e9, 6.25e9, 4, (16, 16, 24)),
    "v6e": Chip("tpu", int(31.24 * GIB), 918e12, 2 * 2 * 256**2, 1.8e11, 1640e9, 12.5e9, 16, (16, 16)),
}
FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # every slice of v5e and v6e; 1x1 libtpu can't describe
EXAMPLES = "v5e:16x16, v6e:8x8, v5p:8x8x8, v4:4x4x8 or cpu:8"


class Topology(NamedTuple):
    """A machine to plan for."""

    kind: str  # a key of CHIPS, or cpu
    shape: tuple[int, ...]  # of one slice, in devices
    num_slices: int
    chip: Chip

    @property
    def num_devices(self) -> int:
        """All devices, of all slices."""
        return math.prod(self.shape) * self.num_slices

    @property
    def name(self) -> str:
        """As on the command line, slices included."""
        slices = f"{self.num_slices} x " if self.num_slices > 1 else ""
        return f"{slices}{self.kind}:{'x'.join(map(str, self.shape))}"


def parse(text: str, num_slices: int = 1) -> Topology:
    """Read `--topology`, one slice, of which there are `num_slices`.

    Raises:
        ConfigError: there is no such machine.
    """
    kind, _, sides = text.strip().lower().partition(":")
    if not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*)*", sides) or (kind != "cpu" and kind not in CHIPS):
        raise ConfigError(f"--topology={text} must name a machine and its size; use {EXAMPLES}")
    shape = tuple(int(side) for side in sides.split("x"))
    if num_slices < 1:
        raise ConfigError(f"--num_slices={num_slices} must be at least 1; use --num_slices=2")
    if kind == "cpu":
        if len(shape) > 1 or shape[0] > 512:
            raise ConfigError(f"--topology={text} must be a number of devices up to 512; use cpu:8")
        return Topology(kind, shape, num_slices, Chip("cpu", _machine_memory() // (shape[0] * num_slices)))
    chip = CHIPS[kind]
    if len(chip.largest) == 2 and sides not in FLAT:
        raise ConfigError(f"--topology={text} is no slice of {kind}; use {kind}: with {', '.join(FLAT)}")
    if len(chip.largest) == 3 and not _is_block(shape, chip.largest):
        raise ConfigError(
            f"--topology={text} is no slice of {kind}: three sides in rising order, multiples of 4 up to "
            f"{'x'.join(map(str, chip.largest))}, or 2x2x1, 2x2x2, 2x2x4, 2x4x4; use {kind}:4x4x8"
        )
    return Topology(kind, shape, num_slices, chip)


def _is_block(shape: tuple[int, ...], largest: tuple[int, ...]) -> bool:
    if shape in ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)):
        return True
    fits = len(shape) == 3 and all(side % 4 == 0 and side <= most for side, most in zip(shape, largest, strict=True))
    return fits and list(shape) == sorted(shape)


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def devices(topology: Topology) -> list:
    """JAX devices to compile for; those of `cpu` are this process's own, and must have been asked for (XLA_FLAGS).

    Raises:
        ConfigError: libtpu is not installed, or does not know the slice.
    """
    import jax

    if topology.kind == "cpu":
        return jax.devices("cpu")[: topology.num_devices]
    from jax.experimental import topologies

    # By default a v4 chip is two devices; megacore makes it one, as on Cloud TPU.
    extra = {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)} if topology.kind == "v4" else {}
    name = f"{topology.kind}:{'x'.join(map(str, topology.shape))}"
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=name, num_slices=topology.num_slices, **extra
        ).devices
    except Exception as error:  # jaxlib's own kinds of errors, which name no cause of their own
        reason = str(error).strip().split("\n")[0][:200]
        raise ConfigError(f"--topology={name} is not known to this libtpu: {reason}; use {EXAMPLES}") from None
    assert len(found) == topology.num_devices, (len(found), topology)
    return list(found)
