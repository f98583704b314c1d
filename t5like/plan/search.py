"""Alternative meshes, remat policies and microbatches for the same step, estimated without compiling.

All candidates compute the same update: the global batch stays that of the config. Called by `planner`.
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
REPLICAS = (1, 2, 4, 8, 16)  # of the parameters, within a slice
MARGIN = 0.95  # of the memory, for an estimate to fit


class Candidate(NamedTuple):
    """A config that computes the same step, with its quick estimate."""

    config: Config
    settings: tuple[str, ...]  # differences from the given config
    persistent: int  # bytes per device: state and batch
    memory: int  # bytes per device in total
    flops: float  # per device and step
    seconds: float | None

    @property
    def cost(self) -> float:
        """Seconds per step, or FLOPs where the chip's speed is not known."""
        return self.flops if self.seconds is None else self.seconds


def list_candidates(config: Config, topology: Topology) -> list[Candidate]:
    """Every candidate that passes the checks of configs and meshes; the config is resolved."""
    inputs = estimate.abstract_inputs(config)
    sizes = meshes.axis_sizes(config, topology.num_devices)  # replaces -1, so that it is not listed as a change
    now = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes))
    candidates = []
    for candidate in _alternatives(config, topology):
        try:
            checks.check(candidate)
            sizes = meshes.axis_sizes(candidate, topology.num_devices)
        except ConfigError:
            continue
        persistent = estimate.persistent_memory(inputs, sizes)
        quick = estimate.quick_estimate(candidate, topology, persistent)
        candidates.append(Candidate(candidate, settings(now, candidate), persistent.total, *quick[1:]))
    return candidates


def _alternatives(config: Config, topology: Topology) -> Iterator[Config]:
    devices, slices, context = topology.num_devices, topology.num_slices, config.mesh.context
    grids = {
        (data, devices // (data * tensor * context), tensor)
        for tensor in TENSOR
        for data in {*(slices * replicas for replicas in REPLICAS), devices // (tensor * context)}
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
    """Mesh, remat and microbatch fields in which another config differs, as ``section.field=value``."""
    fields = [("mesh", axis) for axis in meshes.AXES] + [("model", "remat"), ("train", "microbatches")]
    values = [(f"{section}.{name}", getattr(getattr(other, section), name)) for section, name in fields]
    old = [getattr(getattr(config, section), name) for section, name in fields]
    return tuple(f"{name}={value}" for (name, value), before in zip(values, old, strict=True) if value != before)


def pareto_front(candidates: list[Candidate], memory: int | None) -> list[Candidate]:
    """Candidates that fit and that no other beats in both memory and time, fastest first."""
    fitting = sorted(
        (each for each in candidates if fits(each.memory, memory)), key=lambda each: (each.cost, each.memory)
    )
    front: list[Candidate] = []
    for each in fitting:
        if not front or each.memory < front[-1].memory:
            front.append(each)
    return front


def nearest(config: Config, candidates: list[Candidate], topology: Topology, factor: float) -> list[Candidate]:
    """The three candidates that fit with the fewest changed settings; among equals, the fastest first.

    Args:
        factor: memory of the config's compiled program over its estimate, at least 1.
    """
    fitting = [each for each in candidates if fits(each.memory * factor, topology.chip.memory)]
    # data and fsdp share the devices: a change of both counts once.
    changes = lambda each: len({setting.split("=")[0].replace("data", "fsdp") for setting in each.settings})
    return sorted(fitting, key=lambda each: (changes(each), each.cost))[:3]


def fits(memory: float, limit: int | None) -> bool:
    """Whether an estimate is within a device's memory, with a margin."""
    return limit is None or memory <= MARGIN * limit
