"""Names of TPU slices on Google Cloud: accelerator types of TPU VMs, node labels of Kubernetes, hosts of a slice.

Sources: cloud.google.com/tpu/docs/runtimes (runtime versions), cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} (accelerator
types, hosts), cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus (labels of node pools).
"""

import math
from typing import NamedTuple

from t5like.errors import ConfigError
from t5like.plan.topology import Topology, is_block


class Accelerator(NamedTuple):
    """How Google Cloud names one generation of TPUs.

    Attributes:
        prefix: of the accelerator type, before the number.
        cores_per_chip: the number counts TensorCores; it counts chips where this is 1.
        runtime_version: software of TPU VMs for JAX.
        kubernetes_label: value of ``cloud.google.com/gke-tpu-accelerator``.
    """

    prefix: str
    cores_per_chip: int
    runtime_version: str
    kubernetes_label: str


ACCELERATORS = {
    "v4": Accelerator("v4", 2, "tpu-ubuntu2204-base", "tpu-v4-podslice"),
    "v5e": Accelerator("v5litepod", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice"),
    "v5p": Accelerator("v5p", 2, "v2-alpha-tpuv5", "tpu-v5p-slice"),
    "v6e": Accelerator("v6e", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice"),
}
CHIPS_PER_HOST = 4  # of slices with several hosts; v5e:2x4 and v6e:2x4 are one host with 8


def chips_per_host(topology: Topology) -> int:
    """Return the chips of one host of a TPU slice."""
    chips = math.prod(topology.shape)
    return 8 if topology.kind in ("v5e", "v6e") and chips == 8 else min(CHIPS_PER_HOST, chips)


def hosts_per_slice(topology: Topology) -> int:
    """Return the hosts of one TPU slice."""
    return math.prod(topology.shape) // chips_per_host(topology)


def accelerator_type(topology: Topology) -> str:
    """Return the accelerator type of one slice, such as ``v5litepod-256`` or ``v5p-512``.

    Raises:
        ConfigError: the type of that size has another shape.
    """
    accelerator, chips = ACCELERATORS[topology.kind], math.prod(topology.shape)
    if (shape := default_shape(topology)) != topology.shape:
        sides = "x".join(map(str, topology.shape))
        usual = "x".join(map(str, shape))
        raise ConfigError(
            f"--accelerator={topology.kind}:{sides} can't be requested by accelerator type, whose shape for {chips} "
            f"chips is {usual}; use --accelerator={topology.kind}:{usual}, or the backend kubernetes"
        )
    return f"{accelerator.prefix}-{chips * accelerator.cores_per_chip}"


def default_shape(topology: Topology) -> tuple[int, ...]:
    """Return the shape that the accelerator type of this size has: the one whose sides differ least."""
    if len(topology.shape) == 2:
        return topology.shape
    chips = math.prod(topology.shape)
    first = [side for side in range(1, chips + 1) if chips % side == 0]
    shapes = [(a, b, chips // a // b) for a in first for b in first if chips % (a * b) == 0]
    return min((shape for shape in shapes if is_block(shape, topology.chip.largest)), key=sum)
