"""Memory and time of a step: from shapes alone (`quick_estimate`), and from a compiled program (`predict`).

**Compiled.** Serial time = cycles of all fusions / clock + exposed collectives + custom calls. The prediction is the
serial time over `SERIAL_TO_REAL_RATIO`. The ratio was calibrated on three steps whose real time MaxText publishes
(src/maxtext/configs/tpu/{v5e,v5p}/README.md, with an older compiler and tuned flags), compiled with libtpu 0.0.52 and
analyzed in the same way:

    | step                        | published | cycles only | serial       | predicted    |
    |-----------------------------|-----------|-------------|--------------|--------------|
    | 16B, v5e-256, 6 rows a chip | 9.98 s    | 9.87 (0.99) | 10.99 (1.10) | 9.16 (-8 %)  |
    | 32B, v5e-256, 4 rows a chip | 11.89 s   | 14.28 (1.20)| 15.53 (1.31) | 12.94 (+9 %) |
    | 32B, v5p-128, 6 rows a chip | 7.18 s    | 8.40 (1.17) | 9.41 (1.31)  | 7.84 (+9 %)  |

The ratio is one number for all models and chips, the middle of 1.10 and 1.31, chosen on these three steps. The middle
of two of them misses the third by -16, +8 and +9 %. So the uncertainty is +-15 %; the difference between two plans of
one model on one machine is more accurate. The calibration has no step that is bound by its network.

**Quick.** Matmuls at a fixed share of the peak, softmax at the memory's bandwidth, exposed collectives. The share is
the middle of 0.77, 0.88 and 0.96: with these, the matmuls of the three steps (1,454, 1,939 and 2,862 TFLOP per chip)
and their exposed collectives take the published time. With the middle the error is -11, +2 and +9 %.

**GPUs.** No step of t5like was measured on a GPU. A compiled step takes the sum of its kernels and exposed collectives
(`gpu_time`), to which +-35 % is only a guess. One outside check: with the shapes of MPT 7B, 128 rows of 4,096 tokens,
full remat and 8 H100s, the sum is 6.86 s; with PyTorch the published step takes 7.61 s.

The shares of the quick estimate contain all other work. They are the middle of what published steps of another program
reach: MPT with PyTorch, FSDP and FlashAttention, 760 million to 70 billion parameters, on 8 to 64 GPUs, of which model,
rows and remat are published (mosaicml/llm-foundry, scripts/train/benchmarking/README.md). Seven on A100s reach 0.57 to
0.77, ten on H100s 0.38 to 0.59, the larger the model and the rows the more. So the estimate misses these steps by -21
to +22 %. H200 and B200 have the H100's share.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding

from t5like import tree
from t5like.config.schema import Config, MeshConfig
from t5like.data import pipeline
from t5like.data.objectives.head_length import head_length
from t5like.metrics import flops
from t5like.model.attention_plan import plan_attention
from t5like.model.kernels import local_attention
from t5like.model.masks import MaskSpec
from t5like.optim import lora, train_state
from t5like.plan import gpu_time
from t5like.plan.hlo_cost import Analysis, Collective
from t5like.plan.topology import TPU_NAMES, Topology, one_chip
from t5like.sharding import auto, placement
from t5like.sharding import mesh as meshes
from t5like.sharding.auto import FUSED
from t5like.types import Batch, TrainState

SERIAL_TO_REAL_RATIO = 1.2  # serial time over real time, on TPUs
UNCERTAINTY = 0.15  # of a predicted step time on TPUs
CALIBRATION = {"tpu": (SERIAL_TO_REAL_RATIO, UNCERTAINTY), "gpu": (1.0, 0.35)}
MATMUL_SHARE = 0.87  # of the peak that a step's matmuls reach, on TPUs
STEP_SHARE = {"a100": 0.66, "h100": 0.48, "h200": 0.48, "b200": 0.48}  # the same on GPUs, all other work included
EXPOSED_REDUCTION_SHARE = {"v5e": 0.1, "v5p": 0.1, "v6e": 0.1}  # of the gradients' reduction, on chips that overlap it
# libtpu gathers weights that are split over three axes of a torus, three times a step, by all-reduces of zero-padded
# shards. Measured as so many passes over the gathered weights in memory (7B and T5 XXL on v5p:8x8x8).
ALL_REDUCE_GATHER_PASSES = 7
CUSTOM_CALL_SHARE = 0.5  # of the peak, in a kernel for which the compiler gives no cycles


class Leaf(NamedTuple):
    """One array of the state or the batch."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    split: str  # its PartitionSpec as text
    bytes: int  # of the global array
    bytes_per_device: int  # without the padding of its layout


class PersistentMemory(NamedTuple):
    """Bytes per device of the arrays that live across steps, and these arrays."""

    parameters: int
    optimizer: int
    average: int
    batch: int
    leaves: tuple[Leaf, ...]

    @property
    def params(self) -> dict[str, Leaf]:
        """The parameters by name."""
        return {name: leaf for leaf in self.leaves if (name := leaf.name.removeprefix("params/")) != leaf.name}

    @property
    def total(self) -> int:
        """Bytes per device."""
        return self.parameters + self.optimizer + self.average + self.batch


class QuickEstimate(NamedTuple):
    """The analytic estimate, per device."""

    activations: int  # bytes: saved for the backward pass, one layer's temporaries, gradients, gathered weights, logits
    total: int  # bytes, persistent memory included
    flops: float  # of all matmuls, recomputation included
    seconds: float | None  # per step; None where the chip's speed is not known


class Prediction(NamedTuple):
    """The time of one compiled step, seconds."""

    compute: float  # cycles / clock
    exposed: float  # collectives that no other work hides
    overlapped: float  # collectives that other work hides: not part of the time
    custom: float  # kernels without cycles
    serial: float
    seconds: float
    ratio: float  # serial time over the predicted one
    uncertainty: float  # of the predicted time, as a share of it


class AbstractInputs(NamedTuple):
    """State and batch as shapes, with the mesh axes of each dim, which are the same for every mesh size."""

    config: Config
    state: TrainState
    batch: Batch


def abstract_inputs(config: Config) -> AbstractInputs:
    """Trace the initial state; the config is resolved."""
    batch = pipeline.spec(config)
    return AbstractInputs(
        config, train_state.abstract_state(config, batch, _abstract_mesh(dict.fromkeys(meshes.AXES, 1))), batch
    )


def _abstract_mesh(sizes: dict[str, int], chip: str = "") -> AbstractMesh:
    """A mesh of these sizes, of TPUs if `chip` is their kind: it decides which lengths fit the kernels."""
    kind = next((name for name, short in TPU_NAMES.items() if short == chip), "")
    device = AbstractDevice(kind, None, "tpu") if kind else None
    axes = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=axes, abstract_device=device)


def persistent_memory(inputs: AbstractInputs, sizes: dict[str, int]) -> PersistentMemory:
    """The arrays that live across steps on a mesh of these sizes (`mesh.axis_sizes`), and their bytes per device."""
    mesh = _abstract_mesh(sizes)
    rows = placement.batch_shardings(inputs.batch, mesh)
    state = inputs.state
    parts = [
        [
            _leaf(f"{kind}/{name}", leaf, NamedSharding(mesh, leaf.sharding.spec))
            for name, leaf in tree.flatten(value).items()
        ]
        for kind, value in (
            ("params", tree.merged(state.base, state.params)),
            ("optimizer", state.opt_state),
            ("average", state.ema or {}),
        )
    ]
    names = tree.flatten(inputs.batch)
    parts.append([_leaf(f"batch/{name}", names[name], split) for name, split in tree.flatten(rows).items()])
    sums = [sum(leaf.bytes_per_device for leaf in part) for part in parts]
    return PersistentMemory(*sums, tuple(leaf for part in parts for leaf in part))


def _leaf(name: str, leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> Leaf:
    """Describe one array; its split names the axes that have more than one device."""
    mesh = sharding.mesh.shape
    axes = [[axis] if isinstance(axis, str) else list(axis or ()) for axis in sharding.spec]
    words = ["+".join(axis for axis in each if mesh[axis] > 1) or "-" for each in axes]
    split = ", ".join(words) if any(word != "-" for word in words) else "replicated"
    local, size = sharding.shard_shape(leaf.shape), leaf.dtype.itemsize
    return Leaf(name, leaf.shape, str(leaf.dtype), split, math.prod(leaf.shape) * size, math.prod(local) * size)


# ---- From shapes alone ----


class _Materialized(NamedTuple):
    """Keys of each query whose scores are written to main memory in training."""

    all_layers: int
    largest_layer: int


def _materialized_keys(
    config: Config, topology: Topology, sizes: dict[str, int], stack: flops.StackShape
) -> _Materialized:
    rows = config.data.batch_size // config.train.microbatches
    causal = len(stack.keys) > 1 or not config.model.has_encoder
    with jax.sharding.use_abstract_mesh(_abstract_mesh(sizes, topology.kind)):
        plan = plan_attention(stack.model, rows, stack.queries, *stack.keys, one_mask=True)
        window, ahead = stack.model.window(causal=causal)
        mask = MaskSpec(causal=causal, window=window, window_ahead=ahead)
        by_blocks = stack.attentions == len(stack.keys) and plan.by_blocks(mask)
    every, local = stack.keys[0], local_attention.keys_of_block(mask) if by_blocks else stack.keys[0]
    if plan.self_attention in FUSED:
        every = local = 0
    cross = 0 if plan.cross_attention in FUSED else sum(stack.keys[1:])
    total = (stack.layers - stack.local_layers) * every + stack.local_layers * local + stack.layers * cross
    return _Materialized(total, (every if stack.layers > stack.local_layers else local) + cross)


def quick_estimate(config: Config, topology: Topology, state: PersistentMemory) -> QuickEstimate:
    """Estimate memory and time without compiling; the config is resolved."""
    sizes = meshes.axis_sizes(config, topology.num_devices)
    model, chip, tensor = config.model, topology.chip, sizes["tensor"]
    width = 2 if model.dtype == "bfloat16" else 4
    rows = config.data.batch_size // (sizes["data"] * sizes["fsdp"]) // config.train.microbatches
    saved = working = scores = 0.0
    for stack in flops.stack_shapes(config):
        own = stack.model
        queries, keys = own.num_heads * own.head_dim, own.kv_heads * own.head_dim
        tokens = rows * stack.queries // sizes["context"]
        score_bytes = 4 * rows * own.num_heads * stack.queries / tensor / sizes["context"]  # float32, for each key
        materialized = _materialized_keys(config, topology, sizes, stack)
        scores += score_bytes * materialized.all_layers
        heads = stack.attentions * 2 * queries + len(stack.keys) * 2 * keys
        matmul_outputs = tokens * (heads + (3 if own.mlp.startswith("gated") else 2) * own.mlp_dim) / tensor
        sums = 4 + (stack.attentions + 1) * (own.norm_position == "sandwich")  # of the size of the residual stream
        layer = matmul_outputs * width + sums * tokens * own.model_dim * width
        queries_and_keys = stack.attentions * queries + len(stack.keys) * keys
        saved_per_layer = {
            "full": tokens * own.model_dim * width,
            "qk": tokens * own.model_dim * width + tokens * queries_and_keys / tensor * width,
            "dots": tokens * own.model_dim * width + matmul_outputs * width,
            "none": layer,
        }[model.remat]
        saved += stack.layers * saved_per_layer
        if model.remat == "none":
            saved += (1 + width / 4) * score_bytes * materialized.all_layers
        if model.positions == "relative":  # a stack's bias, and its gradient in float32
            saved += own.num_heads * stack.queries * stack.keys[0] * (width + 4) / tensor / sizes["context"]
        # The backward pass keeps one layer's values, its scores, and the gradient of these.
        working = max(working, layer + (2 + width / 4) * score_bytes * materialized.largest_layer)
    targets = head_length(config)
    chunk = min(config.train.loss_chunk or targets, targets)
    logits = rows * chunk * config.vocab_rows * (4 + width) / tensor
    trained = sum(leaf.bytes_per_device for name, leaf in state.params.items() if lora.is_trained(config.lora, name))
    gradients = trained * (2 if config.train.microbatches > 1 else 1)
    weights = sum(math.prod(leaf.shape) for leaf in state.params.values()) * width / tensor
    layers = sum(stack.layers for stack in flops.stack_shapes(config))
    cast = sum(math.prod(leaf.shape) for leaf in state.params.values() if leaf.dtype == "float32") * width / tensor
    gathered = weights / layers if sizes["fsdp"] > 1 or cast < weights / 2 else weights if width == 2 else 0.0
    activations = int(saved + max(working, logits) + gradients + gathered)

    needed = flops.model_flops(config) / topology.num_devices
    # Remat "qk" keeps queries and keys, which half of the projections compute.
    kept_projections = flops.forward_flops(config).projections / 2 * (config.data.batch_size / topology.num_devices)
    forward = needed / (flops.model_flops(config) / (config.data.batch_size * sum(flops.forward_flops(config))))
    recomputed = {"full": forward, "qk": forward - kept_projections, "dots": 0.0, "none": 0.0}[model.remat]
    total_flops = needed + recomputed
    seconds = None
    if chip.peak:
        softmax = config.train.microbatches * scores * 8 / chip.memory_bandwidth  # four passes that read and write
        seconds = total_flops / (STEP_SHARE.get(topology.kind, MATMUL_SHARE) * chip.peak) + softmax
        if chip.platform == "gpu":
            seconds = max(seconds, _quick_gpu_network(config, topology, sizes, weights))
        else:
            seconds += _quick_network(config, topology, sizes, weights, width)
    return QuickEstimate(activations, state.total + activations, total_flops, seconds)


def _quick_network(config: Config, topology: Topology, sizes: dict[str, int], weights: float, width: int) -> float:
    """Seconds of exposed collectives: the reduction of gradients, and activations over `tensor`."""
    chip, microbatches = topology.chip, config.train.microbatches
    group = sizes["data"] // topology.num_slices * sizes["fsdp"]
    seconds = 0.0
    if group > 1:  # libtpu reduces whole gradients over several torus axes, in the dtype of computation
        share = EXPOSED_REDUCTION_SHARE.get(topology.kind, 1.0)
        seconds += share * microbatches * 2 * weights / (chip.ici * torus_axes(topology, group))
    if two_axis_fsdp(topology, sizes["fsdp"]):
        seconds += microbatches * 3 * weights * ALL_REDUCE_GATHER_PASSES / chip.memory_bandwidth
    if topology.num_slices > 1:
        seconds += 2 * weights * 4 / width / sizes["fsdp"] / chip.dcn
    if sizes["tensor"] > 1:
        rows = config.data.batch_size / (sizes["data"] * sizes["fsdp"])
        tokens = (
            sum(stack.layers * stack.queries * (1 + stack.attentions) for stack in flops.stack_shapes(config)) * rows
        )
        passes = 3 if config.model.remat in ("full", "qk") else 2
        seconds += (
            passes * 2 * tokens * config.model.model_dim * width / (chip.ici * torus_axes(topology, sizes["tensor"]))
        )
    return seconds


def _quick_gpu_network(config: Config, topology: Topology, sizes: dict[str, int], weights: float) -> float:
    """Seconds of collectives of weights and gradients, which GPUs transfer while they compute.

    Args:
        config: resolved.
        topology: GPUs.
        sizes: devices by mesh axis.
        weights: bytes of the gathered weights, in the dtype of computation.
    """
    inner = sizes["tensor"] * sizes["context"]  # devices between two neighbors of the fsdp axis
    wire = lambda kind, size, axis, stride: (
        gpu_time.wire_seconds(kind, int(size), topology, sizes[axis], stride) if sizes[axis] > 1 else 0.0
    )
    gathers = wire("all-gather", weights, "fsdp", inner) * (3 if config.model.remat in ("full", "qk") else 2)
    reductions = wire("reduce-scatter", weights, "fsdp", inner)
    reductions += wire("all-reduce", weights / sizes["fsdp"], "data", inner * sizes["fsdp"])
    return config.train.microbatches * (gathers + reductions)


# ---- From a compiled program ----


def _sides_of_group(topology: Topology, group: int) -> list[int]:
    """Sides of the fewest torus axes that together have so many devices."""
    sides = sorted(topology.shape, reverse=True)
    for count in range(1, len(sides) + 1):
        if math.prod(sides[:count]) >= group:
            break
    return sides[:count]


def two_axis_fsdp(topology: Topology, fsdp: int) -> int:
    """If `fsdp` needs three torus axes: the largest fsdp that needs two, which is faster; else 0."""
    sides = _sides_of_group(topology, fsdp)
    return math.prod(sides[:2]) if topology.chip.platform == "tpu" and len(sides) > 2 else 0


def torus_axes(topology: Topology, group: int) -> float:
    """Bandwidth of a group of so many devices, in units of one torus axis that is a ring.

    An axis that is not a ring has half the bandwidth: data must travel along the line and back.
    """
    return sum(1.0 if side % topology.chip.wrap == 0 else 0.5 for side in _sides_of_group(topology, group))


def wire_seconds(collective: Collective, topology: Topology) -> float:
    """Time on the wire of one run of a collective; of a TPU at full bandwidth and without latency."""
    if topology.chip.platform == "gpu":
        group = collective.group or topology.num_devices
        return gpu_time.wire_seconds(collective.kind, collective.bytes, topology, group, collective.stride)
    ring = topology.chip.ici * torus_axes(topology, collective.group or topology.num_devices)
    if collective.kind == "all-reduce":
        return 2 * collective.bytes / ring
    if collective.kind in ("all-to-all", "ragged-all-to-all"):  # on average a quarter of the ring
        return collective.bytes / 4 / ring
    if collective.kind == "collective-permute":
        return collective.bytes / (topology.chip.ici / 2)
    return collective.bytes / ring


def exposed_seconds(collective: Collective, topology: Topology) -> float:
    """Seconds per step that a collective is exposed: all its runs, less the concurrent work."""
    wire = collective.runs * wire_seconds(collective, topology)
    return max(0.0, wire - collective.hiding / topology.chip.clock) if collective.asynchronous else wire


def predict(analysis: Analysis, topology: Topology) -> Prediction | None:
    """The time of a compiled step; None where no cycles are known (CPU)."""
    chip = topology.chip
    if not chip.peak:
        return None
    compute = analysis.cycles()["total"] / chip.clock
    wire = sum(each.runs * wire_seconds(each, topology) for each in analysis.collectives)
    exposed = sum(exposed_seconds(each, topology) for each in analysis.collectives)
    between = analysis.slices_bytes / chip.dcn if chip.dcn else 0.0
    exposed += max(0.0, between - compute)  # sent during the backward pass, concurrently with its other work
    custom = sum(item.flops * item.runs for item in analysis.work if item.category == "custom" and not item.cycles)
    custom /= CUSTOM_CALL_SHARE * chip.peak
    serial = compute + exposed + custom
    overlapped = wire + between - exposed
    ratio, uncertainty = CALIBRATION[chip.platform]
    return Prediction(compute, exposed, overlapped, custom, serial, serial / ratio, ratio, uncertainty)


def step_seconds(config: Config, chip: str) -> float:
    """The estimate for one accelerator of this kind, without compiling; see `quick_estimate`.

    Args:
        config: `auto` fields may be unresolved; its mesh is replaced by one of a single device.
        chip: `h100`, `v5e` and the other kinds of `topology`.

    Raises:
        ConfigError: there is no such chip, or the config can't run on it.
    """
    topology = one_chip(chip)
    config = dataclasses.replace(config, mesh=MeshConfig())
    config = auto.resolve_auto_for(config, topology.chip.platform)
    held = persistent_memory(abstract_inputs(config), meshes.axis_sizes(config, 1))
    return quick_estimate(config, topology, held).seconds


def mfu(config: Config, topology: Topology, seconds: float) -> float:
    """Model FLOPs per second over the peak of all chips, 0 to 1."""
    return flops.model_flops(config) / seconds / (topology.num_devices * topology.chip.peak)


def tokens_per_step(config: Config) -> int:
    """Token positions of a step: inputs and targets, padding included."""
    return config.data.batch_size * sum(stack.queries for stack in flops.stack_shapes(config))
