"""Other ways to run the same step: meshes, remat policies and microbatches, estimated without compiling.

What a step learns stays as it is: the batch is the config's own.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from t5like.config import checks
from t5like.config.schema import Config
from t5like.errors import ConfigError
from t5like.plan import estimate
from t5like.plan.topology import Topology
from t5like.sharding import mesh as meshes

MICROBATCHES = (1, 2, 4, 8, 16, 32)
REMAT = ("none", "dots", "qk", "full")
TENSOR = (1, 2, 4, 8, 16)
COPIES = (1, 2, 4, 8, 16)  # of the parameters, in a slice
MARGIN = 0.95  # of the memory that an estimate may fill


class Candidate(NamedTuple):
    """One way to run the step, by the quick estimate."""

    config: Config
    settings: tuple[str, ...]  # the flags that make it of the given config
    held: int  # bytes per device: state and batch
    memory: int  # bytes per device, all in all
    flops: float  # per device and step
    seconds: float | None

    @property
    def cost(self) -> float:
        """What a step takes: seconds, or FLOPs where the chip's speed is not known."""
        return self.flops if self.seconds is None else self.seconds


def list_candidates(config: Config, topology: Topology) -> list[Candidate]:
    """Every way that the config's rules and the mesh allow; the config is settled."""
    shapes = estimate.shapes(config)
    sizes = meshes.axis_sizes(config, topology.num_devices)  # -1 filled in: it is no other setting
    now = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes))
    found = []
    for candidate in _candidates(config, topology):
        try:
            checks.check(candidate)
            sizes = meshes.axis_sizes(candidate, topology.num_devices)
        except ConfigError:
            continue
        held = estimate.persistent_memory(shapes, sizes)
        quick = estimate.quick(candidate, topology, held)
        found.append(Candidate(candidate, settings(now, candidate), held.total, *quick[1:]))
    return found


def _candidates(config: Config, topology: Topology) -> Iterator[Config]:
    devices, slices, context = topology.num_devices, topology.num_slices, config.mesh.context
    grids = {
        (data, devices // (data * tensor * context), tensor)
        for tensor in TENSOR
        for data in {*(slices * copies for copies in COPIES), devices // (tensor * context)}
        if data and devices % (data * tensor * context) == 0
    }
    for (data, fsdp, tensor), remat, microbatches in itertools.product(sorted(grids), REMAT, MICROBATCHES):
        yield dataclasses.replace(
            config,
            mesh=dataclasses.replace(config.mesh, data=data, fsdp=fsdp, tensor=tensor),
            model=dataclasses.replace(config.model, remat=remat),
            train=dataclasses.replace(config.train, microbatches=microbatches),
        )


def settings(config: Config, other: Config) -> tuple[str, ...]:
    """The fields in which another config differs that this module changes, as ``section.field=value``."""
    fields = [("mesh", axis) for axis in meshes.AXES] + [("model", "remat"), ("train", "microbatches")]
    values = [(f"{section}.{name}", getattr(getattr(other, section), name)) for section, name in fields]
    old = [getattr(getattr(config, section), name) for section, name in fields]
    return tuple(f"{name}={value}" for (name, value), before in zip(values, old, strict=True) if value != before)


def pareto(found: list[Candidate], memory: int | None) -> list[Candidate]:
    """Those that fit and that no other one beats in both memory and time, the fastest first."""
    fitting = sorted((each for each in found if fits(each.memory, memory)), key=lambda each: (each.cost, each.memory))
    front: list[Candidate] = []
    for each in fitting:
        if not front or each.memory < front[-1].memory:
            front.append(each)
    return front


def nearest(config: Config, found: list[Candidate], topology: Topology, factor: float) -> list[Candidate]:
    """The ways that fit with the fewest changed settings, the fastest first among equals.

    Args:
        factor: what the compiler needs for the config's own program over its estimate, at least 1.
    """
    fitting = [each for each in found if fits(each.memory * factor, topology.chip.memory)]
    # Axes that only follow from others (data, fsdp) count as one change.
    changes = lambda each: len({setting.split("=")[0].replace("data", "fsdp") for setting in each.settings})
    return sorted(fitting, key=lambda each: (changes(each), each.cost))[:3]


def fits(memory: float, limit: int | None) -> bool:
    """Whether an estimate stays below what a device has, with a margin."""
    return limit is None or memory <= MARGIN * limit
