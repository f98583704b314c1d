"""Model FLOPs of a train step, and the peak FLOP rate of devices.

Called by `throughput` for the MFU of a run, and by `plan`.

Sources: FLOPs and MFU as in Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, appendix B), after Kaplan et al. 2020
(arXiv:2001.08361, section 2.1): matmuls only, a training step is three forward passes, and recomputation
(remat) does not count.
"""

import functools
import re
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5like.config.model_schema import ModelConfig
from t5like.config.schema import Config
from t5like.data.objectives.head_length import head_length
from t5like.sharding.mesh import on_cpus


class StackShape(NamedTuple):
    """One stack of layers, and how long its rows are."""

    model: ModelConfig  # with the sizes of this stack
    layers: int
    queries: int  # tokens of a row
    keys: tuple[int, ...]  # tokens that a layer attends to: itself, and in a decoder the encoder
    local_layers: int = 0  # of `layers`: those whose attention to the stack itself has a window
    window_keys: int = 0  # tokens that a query of these attends to, at most keys[0]

    @property
    def attentions(self) -> int:
        """Attentions of a layer, each with its own queries."""
        return 1 if self.model.merged_attention else len(self.keys)

    @property
    def pairs(self) -> int:
        """Pairs of queries and keys, in the sum over all layers."""
        own = (self.layers - self.local_layers) * self.keys[0] + self.local_layers * self.window_keys
        return self.queries * (own + self.layers * sum(self.keys[1:]))


class ForwardFlops(NamedTuple):
    """FLOPs of the matmuls in the forward pass of one row."""

    projections: int  # query, key, value and output kernels
    attention: int  # scores and weighted values
    mlp: int
    vocabulary: int  # output heads


def stack_shapes(config: Config) -> list[StackShape]:
    """The encoder, the decoder, or both in this order."""
    model, data = config.model, config.data
    if model.architecture == "decoder":
        return [_stack_shape(model, model.num_layers, (config.row_length,), causal=True)]
    encoder = _stack_shape(model, model.num_layers, (data.inputs_length,), causal=False)
    if model.architecture == "encoder":
        return [encoder]
    lengths = data.targets_length, data.inputs_length
    return [encoder, _stack_shape(model.in_decoder, model.decoder_layers, lengths, causal=True)]


def _stack_shape(model: ModelConfig, layers: int, keys: tuple[int, ...], *, causal: bool) -> StackShape:
    before, ahead = model.window(causal=causal)  # both contain the query itself
    pattern = model.layer_pattern or ("local",)
    local = layers * pattern.count("local") // len(pattern) if before else 0
    return StackShape(model, layers, keys[0], keys, local, min(before + max(ahead - 1, 0), keys[0]))


def forward_flops(config: Config) -> ForwardFlops:
    """FLOPs of one row's forward pass, summed over the parts of the model."""
    return ForwardFlops(*map(sum, zip(*flops_by_part(config).values(), strict=True)))


def flops_by_part(config: Config) -> dict[str, ForwardFlops]:
    """FLOPs of one row's forward pass in ``encoder``, ``decoder`` and ``head``.

    A matmul of [m, k] and [k, n] takes 2 m k n. With S input and L target tokens (decoder-only: L is the row;
    encoder-only: S is the row):

        |                            | per encoder layer               | per decoder layer | with an encoder  |
        |----------------------------|---------------------------------|-------------------|------------------|
        | query and output kernels   | 2 * 2 S D N H                   | 2 * 2 L D N H     | + 2 * 2 L D N H  |
        | key and value kernels      | 2 * 2 S D K H                   | 2 * 2 L D K H     | + 2 * 2 S D K H  |
        | scores and weighted values | 2 * 2 S S N H                   | 2 * 2 L L N H     | + 2 * 2 L S N H  |
        | MLP                        | 2 * 2 S D F, gated: 3 * 2 S D F | the same with L   |                  |

    and once 2 T D V for the head, T of `head_length`, V with its padding rows; a head of labels has 2 S D C, and for
    those of texts 2 S D D more for its dense layer, and 2 S S D for the mean. The MLM head has 2 T D D more, for its
    dense layer. Pooler and classes have 2 D D + 2 * 2 D, for the first token, if an objective has pairs. D, N, K, H and
    F of a decoder may differ from the encoder's; its key and value kernels for the encoder's output have the encoder's
    D. A local layer has min(S, window) keys for each query, in an encoder those of both sides. Merged attention has no
    second query and output kernels. Conventions: attention counts all pairs of tokens, also those that a causal or
    segment mask removes; embedding look-ups, token types included, norms, softmax and biases count nothing.
    """
    model, parts = config.model, {}
    names = [name for name in ("encoder", "decoder") if getattr(model, f"has_{name}")]
    for name, stack in zip(names, stack_shapes(config), strict=True):
        own = stack.model
        queries, keys = own.num_heads * own.head_dim, own.kv_heads * own.head_dim
        read = sum(dim * length for dim, length in zip((own.model_dim, model.model_dim), stack.keys, strict=False))
        projections = 4 * (stack.attentions * stack.queries * own.model_dim * queries + read * keys)
        mlp = (3 if own.mlp.startswith("gated") else 2) * 2 * stack.queries * own.model_dim * own.mlp_dim
        parts[name] = ForwardFlops(stack.layers * projections, 4 * stack.pairs * queries, stack.layers * mlp, 0)
    targets, dim = head_length(config), stack.model.model_dim  # of the last stack
    vocabulary = 2 * targets * dim * config.vocab_rows
    if config.data.label_objective:
        vocabulary = 2 * targets * dim * config.data.num_outputs
        if config.data.label_objective != "token_classification":
            vocabulary += 2 * targets * dim * (dim + (targets if model.pooling == "mean" else 0))
    elif model.architecture == "encoder":
        vocabulary += 2 * targets * dim**2 if model.head == "mlm" else 0
        vocabulary += 2 * dim**2 + 2 * 2 * dim if "mlm_nsp" in config.data.objective else 0
    return parts | {"head": ForwardFlops(0, 0, 0, vocabulary)}


def model_flops(config: Config) -> int:
    """FLOPs of the matmuls in one training step of the whole batch, without recomputation and the optimizer.

    The backward pass takes twice the forward pass. With LoRA it takes one forward pass less of all kernels, which have
    no gradient; the adapters' own matmuls are not counted.
    """
    forward = forward_flops(config)
    unchanged = sum(forward) - forward.attention if config.lora.rank else 0
    return config.data.batch_size * (3 * sum(forward) - unchanged)


# FLOP/s of one JAX device, bf16 without sparsity, by words of its device_kind (the longest entry that occurs counts).
# TPU: cloud.google.com/tpu/docs, "peak compute per chip", halved where a JAX device is half a chip (v2, v3, 7x).
# GPU: NVIDIA's data sheets, tensor core bf16; half of the figure if they give only that with sparsity.
PEAK_FLOPS = {
    "TPU v2": 46e12 / 2,
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # JAX's name of v5p
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    "A30": 165e12,
    "A100": 312e12,
    "L4": 121e12,
    "L40S": 362e12,
    "H100": 989e12,  # SXM
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "GH200": 989e12,
    "H200": 989e12,  # SXM
    "H200 NVL": 835e12,
    "B200": 2250e12,  # HGX
    "GB200": 2500e12,
}


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """Peak FLOP/s of the devices together, for the MFU; None if a device kind is not in the table.

    Accelerators have their bf16 peak, whatever the dtype of the run, so that MFUs are comparable. All CPU devices
    together count as one machine, with its measured float32 rate.
    """
    if on_cpus(devices):
        return measure_matmul_rate()
    peaks = [_peak(device.device_kind) for device in devices]
    return None if None in peaks else sum(peaks)


def _peak(kind: str) -> float | None:
    if re.search(r"\bMIG\b", kind):  # a MIG slice has the name of the whole GPU
        return None
    names = [name for name in PEAK_FLOPS if re.search(rf"\b{name}\b", kind, re.IGNORECASE)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


@functools.cache
def measure_matmul_rate() -> float:
    """FLOP/s of this machine's CPU in float32 matmuls, the best of several; takes half a second, once.

    Beside other load a single product would show a fraction of the rate.
    """
    size = 2048
    matrix = jax.device_put(jnp.ones((size, size), jnp.float32), jax.local_devices(backend="cpu")[0])
    product = jax.jit(lambda a: a @ a).lower(matrix).compile()
    seconds = []
    while sum(seconds) < 0.3 or len(seconds) < 5:
        start = time.perf_counter()
        product(matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
