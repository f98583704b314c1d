"""The GPU kernels with NVIDIA's compiler, for an H100 and without one: `make gpu`. Not part of `make test`.

A program that needs more registers or shared memory than a core has is refused; nothing is run.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from t5like.model.kernels import gpu_attention
from t5like.model.masks import MaskSpec
from t5like.plan import topology

CASES = {  # B, heads of queries and keys, L, H, dtype, causal, relative bias
    "t5": (8, 12, 12, 512, 64, jnp.bfloat16, False, True),
    "t5 decoder": (8, 12, 12, 114, 64, jnp.bfloat16, True, True),
    "llama": (2, 16, 4, 2048, 128, jnp.bfloat16, True, False),
    "float32": (2, 4, 4, 512, 64, jnp.float32, True, True),
    "heads of 256": (2, 4, 2, 512, 256, jnp.bfloat16, True, False),
}


@pytest.mark.parametrize("kind", ["h100", "a100"])
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_compile_forward_and_backward_and_no_scores_are_in_memory(case, kind):
    rows, heads, kv_heads, length, head_dim, dtype, causal, relative = CASES[case]
    mesh = jax.sharding.Mesh(topology.devices(topology.parse(f"{kind}:1")), "data")
    array = lambda shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    q, k = (array((rows, n, length, head_dim)) for n in (heads, kv_heads))
    bias = array((1, heads, gpu_attention.distances(length, length).shape[1]), jnp.float32) if relative else None

    def total(q, k, v, bias, segments):
        bias = None if bias is None else gpu_attention.bias_per_shard(bias)
        mask = MaskSpec(causal, segments, segments, window=128 if head_dim == 256 else 0)
        softcap = 50.0 if head_dim == 256 else 0.0  # as in Gemma 2
        return gpu_attention.attend(q, k, v, bias, mask, softcap=softcap).astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(total, (0, 1, 2, 3) if relative else (0, 1, 2)))
    program = gradient.lower(q, k, k, bias, array((rows, length), jnp.int32)).compile()
    kernels = set(re.findall(r'name = "attention_([a-z]+)', program.as_text()))
    assert kernels == {"forward", "queries", "keys"} | ({"bias"} if relative else set())
    if length >= 512:  # below, the sums of blocks for the bias's gradient are as large
        assert program.memory_analysis().temp_size_in_bytes < 4 * rows * heads * length**2
