"""Model FLOPs of a train step, and the peak FLOP rate of devices."""

import functools
import math
import re
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from t5like.config.schema import Config


def model_flops(config: Config) -> int:
    """Floating-point operations of the matrix products in one training step of the whole batch.

    A product of [m, k] and [k, n] is 2 m k n. Per row, with S input and L target tokens (decoder-only: L is the row;
    encoder-only: S is the row, and the head reads all of it, L = S):

        | per encoder layer          |                                 | per decoder layer | with an encoder  |
        |----------------------------|---------------------------------|-------------------|------------------|
        | query and output kernels   | 2 * 2 S D N H                   | 2 * 2 L D N H     | + 2 * 2 L D N H  |
        | key and value kernels      | 2 * 2 S D K H                   | 2 * 2 L D K H     | + 2 * 2 S D K H  |
        | scores and weighted values | 2 * 2 S S N H                   | 2 * 2 L L N H     | + 2 * 2 L S N H  |
        | MLP                        | 2 * 2 S D F, gated: 3 * 2 S D F | the same with L   |                  |

    and once 2 L D V for the head, V with its padding rows. The MLM head has 2 S D D more, for its dense layer. Pooler
    and classes have 2 D D + 2 * 2 D, for the first token, if an objective has pairs. The backward pass is twice the
    forward pass. Conventions: attention counts all pairs of tokens, also those that a causal or segment mask removes;
    looking embeddings up is free, token types included; so are norms, softmax, biases and the optimizer.
    """
    model, data = config.model, config.data
    queries = model.num_heads * model.head_dim
    keys = model.kv_heads * model.head_dim
    mlp_kernels = 3 if model.mlp.startswith("gated") else 2

    def attention(num_queries: int, num_keys: int) -> int:
        projections = num_queries * model.model_dim * queries + num_keys * model.model_dim * keys
        return 4 * (projections + num_queries * num_keys * queries)

    def layer(length: int) -> int:
        return attention(length, length) + mlp_kernels * 2 * length * model.model_dim * model.mlp_dim

    heads = 0
    if model.architecture == "decoder":
        targets = config.row_length
        layers = model.num_layers * layer(targets)
    elif model.architecture == "encoder":
        targets = data.inputs_length
        layers = model.num_layers * layer(targets)
        heads += 2 * targets * model.model_dim**2 if model.head == "mlm" else 0
        heads += 2 * model.model_dim**2 + 2 * 2 * model.model_dim if "mlm_nsp" in data.objective else 0
    else:
        targets = data.targets_length
        decoder_layer = layer(targets) + attention(targets, data.inputs_length)
        layers = model.num_layers * layer(data.inputs_length)
        layers += model.decoder_layers * decoder_layer
    heads += 2 * targets * model.model_dim * config.vocab_rows
    return 3 * data.batch_size * (layers + heads)


# FLOP/s of one JAX device, bf16 without sparsity, by words of its device_kind (the longest entry that occurs counts).
# TPU: cloud.google.com/tpu/docs, "peak compute per chip", halved where a JAX device is half a chip (v2, v3, 7x).
# GPU: NVIDIA's data sheets, tensor core bf16; where they give the sparse figure only, half of it.
PEAK_FLOPS = {
    "TPU v2": 46e12 / 2,
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p calls itself so
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
    """FLOP/s that the devices could do together, for the MFU; None if a kind is not in the table.

    On accelerators that is their bf16 peak, whatever the dtype of the run, so that MFUs compare. CPU devices share
    one machine, however many they are: they count once, with the float32 rate that is measured on it.
    """
    if all(device.platform == "cpu" for device in devices):
        return measure_matmul_rate()
    peaks = [_peak(device.device_kind) for device in devices]
    return None if None in peaks else sum(peaks)


def _peak(kind: str) -> float | None:
    if re.search(r"\bMIG\b", kind):  # a slice of a GPU carries the name of the whole
        return None
    found = [name for name in PEAK_FLOPS if re.search(rf"\b{name}\b", kind, re.IGNORECASE)]
    return PEAK_FLOPS[max(found, key=len)] if found else None


@functools.cache
def measure_matmul_rate() -> float:
    """FLOP/s of this machine's CPU in float32 matrix products, the best of a few; takes half a second, once."""
    size = 2048
    matrix = jax.device_put(jnp.ones((size, size), jnp.float32), jax.local_devices(backend="cpu")[0])
    product = jax.jit(lambda a: a @ a).lower(matrix).compile()
    best, begin = math.inf, time.perf_counter()
    while time.perf_counter() - begin < 0.3:
        start = time.perf_counter()
        product(matrix).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
