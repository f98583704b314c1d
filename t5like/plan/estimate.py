"""How much memory and time a step takes: from shapes alone (`quick`), and from a compiled program (`predict`).

**Compiled.** Serial time = cycles of all fusions / clock + exposed collectives + custom calls. The prediction is that
over `PESSIMISM`. It was calibrated on three steps whose real time MaxText publishes (src/maxtext/configs/tpu/{v5e,v5p}/
README.md; published with an older compiler and tuned flags), compiled with libtpu 0.0.52 and read in the same way:

    | step                        | published | cycles only | serial       | predicted    |
    |-----------------------------|-----------|-------------|--------------|--------------|
    | 16B, v5e-256, 6 rows a chip | 9.98 s    | 9.87 (0.99) | 10.99 (1.10) | 9.16 (-8 %)  |
    | 32B, v5e-256, 4 rows a chip | 11.89 s   | 14.28 (1.20)| 15.53 (1.31) | 12.94 (+9 %) |
    | 32B, v5p-128, 6 rows a chip | 7.18 s    | 8.40 (1.17) | 9.41 (1.31)  | 7.84 (+9 %)  |

One number for all, the middle of 1.10 and 1.31: nothing is fitted per model or chip. It was chosen on these three. The
middle of two of them misses the third by -16, +8 and +9 %. So take it for +-15 %, and differences between two plans of
one model on one machine for better than that. A step that waits mostly for its network is outside of what was compared.

**Quick.** Matrix products at a fixed share of the peak, softmax at the memory's speed, collectives that nothing hides.
The share is the middle of 0.77, 0.88 and 0.96, with which the products that those three steps run (1,454, 1,939 and
2,862 TFLOP a chip), and their exposed collectives, take the published time: -11, +2 and +9 % of it.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from t5like import tree
from t5like.config.schema import Config
from t5like.data import pipeline
from t5like.metrics import flops
from t5like.model.attention import fused
from t5like.optim import step
from t5like.plan.hlo_cost import Analysis, Collective
from t5like.plan.topology import Topology
from t5like.sharding import mesh as meshes
from t5like.sharding import placement
from t5like.types import Batch, TrainState

SERIAL_TO_REAL_RATIO = 1.2  # serial time over real time
UNCERTAINTY = 0.15  # of a predicted step time
MATMUL_SHARE = 0.87  # of the peak that a step's products reach
WAITED = {"v5e": 0.1, "v5p": 0.1, "v6e": 0.1}  # of the time that gradients take to be reduced, where it is hidden
# Weights that are split over three axes of a torus are gathered, three times a step, by all-reduces of zeros with each
# device's part in its place; that takes as long as reading and writing them so often (7B and T5 XXL on v5p:8x8x8).
ZEROS = 7
CUSTOM_SHARE = 0.5  # of the peak, in a kernel whose cycles the compiler does not give


class Leaf(NamedTuple):
    """One array of the state or the batch."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    split: str  # how it is split: its PartitionSpec, in words
    bytes: int  # of all of it
    bytes_per_device: int  # without the padding of its layout


class PersistentMemory(NamedTuple):
    """What a device holds all the time, bytes, and every array of it."""

    parameters: int
    optimizer: int
    average: int
    batch: int
    leaves: tuple[Leaf, ...]

    @property
    def total(self) -> int:
        """Bytes per device."""
        return self.parameters + self.optimizer + self.average + self.batch


class Quick(NamedTuple):
    """The analytic estimate, per device."""

    activations: int  # bytes: what the backward pass reads, one layer's work, gradients, gathered weights, logits
    total: int  # bytes, with what is held
    flops: float  # of the products that are run, recomputation included
    seconds: float | None  # a step; None where the chip's speed is not known


class Prediction(NamedTuple):
    """The time of one compiled step, seconds; None where the compiler gives no cycles."""

    compute: float  # cycles / clock
    exposed: float  # collectives that nothing hides
    overlapped: float  # collectives behind other work: no part of the time
    custom: float  # kernels without cycles
    serial: float
    seconds: float


class Shapes(NamedTuple):
    """State and batch as shapes, with the axes that each dim goes over: the same for every mesh."""

    config: Config
    state: TrainState
    batch: Batch


def shapes(config: Config) -> Shapes:
    """Trace the initial state once; the config is settled."""
    batch = pipeline.spec(config)
    return Shapes(config, step.abstract_state(config, batch, _abstract_mesh(dict.fromkeys(meshes.AXES, 1))), batch)


def _abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def persistent_memory(shapes: Shapes, sizes: dict[str, int]) -> PersistentMemory:
    """Arrays that live across steps on a mesh of these sizes (`mesh.axis_sizes`): their parts and bytes."""
    mesh = _abstract_mesh(sizes)
    rows = placement.batch_shardings(shapes.batch, mesh)
    state = shapes.state
    parts = [
        [
            _leaf(f"{kind}/{name}", leaf, NamedSharding(mesh, leaf.sharding.spec))
            for name, leaf in tree.flatten(value).items()
        ]
        for kind, value in (("params", state.params), ("optimizer", state.opt_state), ("average", state.ema or {}))
    ]
    names = tree.flatten(shapes.batch)
    parts.append([_leaf(f"batch/{name}", names[name], split) for name, split in tree.flatten(rows).items()])
    sums = [sum(leaf.bytes_per_device for leaf in part) for part in parts]
    return PersistentMemory(*sums, tuple(leaf for part in parts for leaf in part))


def _leaf(name: str, leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> Leaf:
    """One array, and the words for its split: the axes that have more than one device."""
    mesh = sharding.mesh.shape
    axes = [[axis] if isinstance(axis, str) else list(axis or ()) for axis in sharding.spec]
    words = ["+".join(axis for axis in each if mesh[axis] > 1) or "-" for each in axes]
    split = ", ".join(words) if any(word != "-" for word in words) else "whole"
    local, size = sharding.shard_shape(leaf.shape), leaf.dtype.itemsize
    return Leaf(name, leaf.shape, str(leaf.dtype), split, math.prod(leaf.shape) * size, math.prod(local) * size)


# ---- From shapes alone ----


def _written(config: Config, sizes: dict[str, int], stack: flops.StackShape) -> list[int]:
    """Keys of each attention of a layer whose scores don't stay in the core, in training."""
    model, rows = config.model, config.data.batch_size // config.train.microbatches
    biased = [model.positions == "relative", False]  # the first is self-attention
    kernel = partial(fused, model.kernels, model.head_dim, model.dtype, rows, stack.queries)
    with jax.sharding.use_abstract_mesh(_abstract_mesh(sizes)):
        return [n for n, bias in zip(stack.keys, biased, strict=False) if not kernel(n, None, biased=bias)]


def quick(config: Config, topology: Topology, state: PersistentMemory) -> Quick:
    """Estimate memory and time without compiling; the config is settled."""
    sizes = meshes.axis_sizes(config, topology.num_devices)
    model, chip, tensor = config.model, topology.chip, sizes["tensor"]
    width = 2 if model.dtype == "bfloat16" else 4
    rows = config.data.batch_size // (sizes["data"] * sizes["fsdp"]) // config.train.microbatches
    queries, keys = model.num_heads * model.head_dim, model.kv_heads * model.head_dim
    gated = model.mlp.startswith("gated")
    saved = working = scores = 0.0
    for stack in flops.stack_shapes(config):
        tokens = rows * stack.queries // sizes["context"]
        written = sum(_written(config, sizes, stack))
        attention = 4 * rows * model.num_heads * stack.queries * written / tensor / sizes["context"]
        scores += stack.layers * attention
        products = tokens * (len(stack.keys) * (2 * queries + 2 * keys) + (3 if gated else 2) * model.mlp_dim) / tensor
        layer = products * width + (1 + width / 4) * attention + 4 * tokens * model.model_dim * width
        own = len(stack.keys) * (queries + keys)
        kept = {
            "full": tokens * model.model_dim * width,
            "qk": tokens * model.model_dim * width + tokens * own / tensor * width,
            "dots": tokens * model.model_dim * width + products * width,
            "none": layer,
        }[model.remat]
        saved += stack.layers * kept
        if model.positions == "relative":  # a stack's bias, and its gradient in float32
            saved += model.num_heads * stack.queries * stack.keys[0] * (width + 4) / tensor / sizes["context"]
        # In the backward pass a layer's values are alive, and the gradient of its scores.
        working = max(working, layer + attention)
    targets = config.data.inputs_length if model.architecture == "encoder" else flops.stack_shapes(config)[-1].queries
    chunk = min(config.train.loss_chunk or targets, targets)
    logits = rows * chunk * config.vocab_rows * (4 + width) / tensor
    gradients = state.parameters * (2 if config.train.microbatches > 1 else 1)
    weights = sum(leaf.bytes for leaf in state.leaves if leaf.name.startswith("params/")) / 4 * width / tensor
    layers = sum(stack.layers for stack in flops.stack_shapes(config))
    gathered = weights / layers if sizes["fsdp"] > 1 else weights if width == 2 else 0.0
    activations = int(saved + max(working, logits) + gradients + gathered)

    needed = flops.model_flops(config) / topology.num_devices
    # Remat "qk" keeps queries and keys, which half of the projections compute.
    kept_projections = flops.forward_flops(config).projections / 2 * (config.data.batch_size / topology.num_devices)
    recomputed = {"full": needed / 3, "qk": needed / 3 - kept_projections, "dots": 0.0, "none": 0.0}[model.remat]
    total_flops = needed + recomputed
    seconds = None
    if chip.peak:
        softmax = config.train.microbatches * scores * 8 / chip.memory_bandwidth  # written and read in four passes
        seconds = total_flops / (MATMUL_SHARE * chip.peak) + softmax
        seconds += _quick_network(config, topology, sizes, weights, width)
    return Quick(activations, state.total + activations, total_flops, seconds)


def _quick_network(config: Config, topology: Topology, sizes: dict[str, int], weights: float, width: int) -> float:
    """Seconds of collectives that nothing hides: the gradients' reduction, and activations over `tensor`."""
    chip, microbatches = topology.chip, config.train.microbatches
    group = sizes["data"] // topology.num_slices * sizes["fsdp"]
    seconds = 0.0
    if group > 1:  # libtpu reduces gradients over several torus axes whole, in the type they are computed in
        share = WAITED.get(topology.kind, 1.0)
        seconds += share * microbatches * 2 * weights / (chip.ici * torus_axes(topology, group))
    if flat_fsdp(topology, sizes["fsdp"]):
        seconds += microbatches * 3 * weights * ZEROS / chip.memory_bandwidth
    if topology.num_slices > 1:
        seconds += 2 * weights * 4 / width / sizes["fsdp"] / chip.dcn
    if sizes["tensor"] > 1:
        rows = config.data.batch_size / (sizes["data"] * sizes["fsdp"])
        tokens = (
            sum(stack.layers * stack.queries * (1 + len(stack.keys)) for stack in flops.stack_shapes(config)) * rows
        )
        passes = 3 if config.model.remat in ("full", "qk") else 2
        seconds += (
            passes * 2 * tokens * config.model.model_dim * width / (chip.ici * torus_axes(topology, sizes["tensor"]))
        )
    return seconds


# ---- From a compiled program ----


def _spanned(topology: Topology, group: int) -> list[int]:
    """Sides of the torus axes that a group of so many devices lies along, the fewest that hold it."""
    sides = sorted(topology.shape, reverse=True)
    for count in range(1, len(sides) + 1):
        if math.prod(sides[:count]) >= group:
            break
    return sides[:count]


def flat_fsdp(topology: Topology, fsdp: int) -> int:
    """Of an fsdp that lies along three axes of a torus, the largest along two, which is faster (`ZEROS`); else 0."""
    sides = _spanned(topology, fsdp)
    return math.prod(sides[:2]) if topology.chip.platform == "tpu" and len(sides) > 2 else 0


def torus_axes(topology: Topology, group: int) -> float:
    """Torus axes' worth of bandwidth that a group of so many devices has.

    An axis that is no ring has half of it: what goes round a ring in both directions has to go along a line and back.
    """
    return sum(1.0 if side % topology.chip.wrap == 0 else 0.5 for side in _spanned(topology, group))


def wire_seconds(collective: Collective, topology: Topology) -> float:
    """Time on the wire of one run of a collective, at full bandwidth and without latency."""
    ring = topology.chip.ici * torus_axes(topology, collective.group or topology.num_devices)
    if collective.kind == "all-reduce":
        return 2 * collective.bytes / ring
    if collective.kind in ("all-to-all", "ragged-all-to-all"):  # on average a quarter of the way round
        return collective.bytes / 4 / ring
    if collective.kind == "collective-permute":
        return collective.bytes / (topology.chip.ici / 2)
    return collective.bytes / ring


def exposed_seconds(collective: Collective, topology: Topology) -> float:
    """What a step waits for a collective: all its runs, less what is scheduled beside them."""
    wire = collective.runs * wire_seconds(collective, topology)
    return max(0.0, wire - collective.hiding / topology.chip.clock) if collective.asynchronous else wire


def predict(analysis: Analysis, topology: Topology) -> Prediction | None:
    """The time of a compiled step; None where the compiler gives no cycles (CPU)."""
    chip = topology.chip
    if not chip.peak:
        return None
    compute = analysis.cycles()["total"] / chip.clock
    wire = sum(each.runs * wire_seconds(each, topology) for each in analysis.collectives)
    exposed = sum(exposed_seconds(each, topology) for each in analysis.collectives)
    between = analysis.slices_bytes / chip.dcn if chip.dcn else 0.0
    exposed += max(0.0, between - compute)  # sent in the backward pass, behind its other work
    custom = sum(item.flops * item.runs for item in analysis.work if item.category == "custom" and not item.cycles)
    custom /= CUSTOM_SHARE * chip.peak
    serial = compute + exposed + custom
    overlapped = wire + between - exposed
    return Prediction(compute, exposed, overlapped, custom, serial, serial / SERIAL_TO_REAL_RATIO)


def mfu(config: Config, topology: Topology, seconds: float) -> float:
    """Model FLOPs a second over what all chips could do, 0 to 1."""
    return flops.model_flops(config) / seconds / (topology.num_devices * topology.chip.peak)


def tokens_per_step(config: Config) -> int:
    """Places for tokens that a step reads and learns."""
    return config.data.batch_size * sum(stack.queries for stack in flops.stack_shapes(config))
