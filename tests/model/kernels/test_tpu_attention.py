"""The fused TPU kernel, in Pallas' interpreter, against plain attention; and where a train step has it."""

import functools

import attention_cases
import jax
import numpy as np
import pytest
from conftest import random_batch, small
from model_variants import loss_and_gradients, params_of, with_model

from t5like.data import pipeline
from t5like.errors import ConfigError
from t5like.model import attention
from t5like.model.kernels import tpu_attention
from t5like.model.kernels.fused_attention import KernelSpec
from t5like.optim import step, train_state
from t5like.sharding import auto
from t5like.sharding import mesh as meshes

CASES = {
    "packed": {"queries": 160, "causal": True, "segments": True},
    "relative": {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "rows": 8, "queries": 12, "heads": 4, "relative": True}
    | {"kv_heads": 4},
    "prefix": {"queries": 160, "causal": True, "segments": True, "prefix": True, "window": 7},
    "window": {"queries": 672, "rows": 1, "kv_heads": 1, "causal": True, "window": 100},
    "symmetric_window": {"queries": 300, "window": 9, "ahead": 9, "segments": True, "heads": 4},
    "symmetric_window_context": {"mesh": {"context": 2}, "queries": 32, "heads": 4, "window": 5, "ahead": 5},
    "context": {"mesh": {"data": 2, "tensor": 2, "context": 2}, "queries": 16, "heads": 4, "causal": True}
    | {"segments": True, "prefix": True, "window": 5, "relative": True, "softcap": 0.7},
    "long_context": {"mesh": {"context": 2}, "rows": 1, "queries": 1024, "causal": True, "window": 140},
}


@pytest.mark.parametrize("case", CASES)
def test_the_tpu_kernel_equals_plain_attention_with_gradients(rng, monkeypatch, case):
    monkeypatch.setattr(tpu_attention, "SCORES_PER_BLOCK", 1)  # blocks of 128 queries
    monkeypatch.setattr(tpu_attention, "MAX_UNROLLED_BLOCKS", 2)

    def fused(q, k, v, bias, mask):
        if bias is not None:
            bias = tpu_attention.bias_per_batch_shard(attention_cases.bias_array(bias, q.shape[2], k.shape[2]))
        return tpu_attention.attend(q, k, v, bias, mask, softcap=CASES[case].get("softcap", 0.0), interpret=True)

    attention_cases.compare(rng, fused, **CASES[case])


@pytest.mark.parametrize("window, ahead, limit", [(128, 0, 0.2), (64, 64, 0.2), (512, 0, 0.45), (0, 0, 1.0)])
def test_blocks_of_queries_read_few_keys_outside_of_their_window(window, ahead, limit):
    length, inputs = 2048, tpu_attention.KernelInputs(None, None, None)
    spec = KernelSpec(bool(window and not ahead), window, ahead, interpret=True)
    scores = sum(
        each.blocks * each.size * each.keys for each in tpu_attention._block_groups(spec, inputs, length, length)
    )
    assert limit * 0.75 <= scores / length**2 <= limit


def test_a_step_for_tpus_has_the_kernel_in_every_attention_and_other_devices_refuse_it():
    config = small(model={"num_layers": 1, "kernels": "tpu", "layers": "scan", "dtype": "bfloat16"}, mesh={"fsdp": 8})
    with pytest.raises(ConfigError, match="kernels=auto"):
        auto.resolve_auto_for(config, "cpu")
    mesh, batch = meshes.make_mesh(config), pipeline.spec(config)
    abstract = train_state.abstract_state(config, batch, mesh)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    with jax.set_mesh(mesh):
        lowered = step.jit_train_step(config, abstract).trace(abstract, shapes).lower(lowering_platforms=("tpu",))
    text = lowered.as_text()
    assert (text.count('kernel_name = "attention_forward"'), text.count('kernel_name = "attention_backward"')) == (3, 3)
    # The gradients of gated MLPs' inputs; queries, keys and values of small heads, forward and backward.
    assert text.count("optimization_barrier") == 2 * 2 + 3 * 3 * 2


@pytest.mark.parametrize(
    "variant, layers", [("t5", "unroll"), ("umt5", "scan"), ("pattern", "scan"), ("t5gemma2", "unroll")]
)
def test_a_model_with_the_fused_kernel_equals_the_plain_model(monkeypatch, variant, layers):
    monkeypatch.setattr(attention.tpu_attention, "attend", functools.partial(tpu_attention.attend, interpret=True))
    num_layers = 2 if layers == "scan" else 1
    plain, fused = (
        with_model(variant, layers=layers, num_layers=num_layers, kernels=kernels) for kernels in ("plain", "tpu")
    )
    params, batch = params_of(plain), random_batch(plain)
    expected, computed = (loss_and_gradients(config, params, batch) for config in (plain, fused))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), computed, expected)
