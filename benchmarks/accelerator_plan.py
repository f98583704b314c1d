"""What `t5like plan` says of a step that `accelerator.py` measures: memory before it is compiled, and its time."""

from typing import Any

import jax

from t5like.config.schema import Config
from t5like.plan import estimate, gpu_time, hlo_cost
from t5like.plan import topology as topologies
from t5like.plan.topology import Topology
from t5like.sharding import auto
from t5like.sharding import mesh as meshes

TPU_KINDS = {"v5 lite": "v5e", "v5e": "v5e", "v5p": "v5p", "v5": "v5p", "v6 lite": "v6e", "v6e": "v6e", "v4": "v4"}
SPARE = 1.3  # an estimate of memory that is so much too high still lets a batch be tried


def tokens_per_step(config: Config) -> int:
    """Positions of a batch."""
    return estimate.tokens_per_step(config)


def topology_of(device: jax.Device) -> Topology | None:
    """One device of this kind as `t5like plan` knows it; None for others."""
    kind = device.device_kind.lower()
    if device.platform == "gpu":
        names = [name for name in topologies.GPUS if name in kind]
        return topologies.parse(f"{names[0]}:1") if names else None
    names = [name for words, name in TPU_KINDS.items() if words in kind] if device.platform == "tpu" else []
    if not names:
        return None
    chip = topologies.CHIPS[names[0]]
    return Topology(names[0], (1,) * len(chip.largest), 1, chip)


def may_fit(config: Config) -> bool:
    """Whether a step may fit in the memory of the first device, by the estimate; True where its memory is unknown."""
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None or (topology := topology_of(device)) is None:
        return True
    config = auto.resolve_auto(config, meshes.make_mesh(config, [device]))
    return quick(config, topology).total <= SPARE * limit


def quick(config: Config, topology: Topology) -> estimate.QuickEstimate:
    """The estimate of `t5like plan --quick` for a resolved config."""
    inputs = estimate.abstract_inputs(config)
    persistent = estimate.persistent_memory(inputs, meshes.axis_sizes(config, topology.num_devices))
    return estimate.quick_estimate(config, topology, persistent)


def predictions(config: Config, compiled: jax.stages.Compiled, device: jax.Device) -> dict[str, Any]:
    """Milliseconds of the step by `t5like plan`, from the program and from shapes; None where it predicts no time."""
    result: dict[str, Any] = {"plan_ms": None, "quick_ms": None}
    if (topology := topology_of(device)) is None:
        return result
    try:
        seconds = quick(config, topology).seconds
        rates = gpu_time.rates(topology) if device.platform == "gpu" else None
        prediction = estimate.predict(hlo_cost.analyze(compiled.as_text(), rates), topology)
    except Exception as error:  # a program in a form that the planner does not know: the step was measured all the same
        return result | {"plan_error": f"{type(error).__name__}: {error}"[:200]}
    return {"plan_ms": prediction and 1e3 * prediction.seconds, "quick_ms": seconds and 1e3 * seconds}
