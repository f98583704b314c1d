"""Attention in a window by blocks, against attention over all keys with a mask; and what it saves."""

import attention_cases
import jax
import numpy as np
import pytest
from conftest import random_batch
from model_variants import params_of, with_model

from t5like.model.attention import attend
from t5like.model.kernels import local_attention
from t5like.model.masks import MaskSpec
from t5like.model.transformer import Transformer

CASES = {
    "causal": {"queries": 30, "causal": True, "window": 6, "segments": True, "kv_heads": 1},
    "symmetric": {"queries": 31, "window": 5, "ahead": 5, "segments": True, "relative": True, "softcap": 0.5},
    "ahead": {"queries": 32, "window": 1, "ahead": 8, "mesh": {"data": 2, "tensor": 2}},
}


@pytest.mark.parametrize("case", CASES)
def test_attention_by_blocks_equals_a_mask_with_gradients(rng, monkeypatch, case):
    monkeypatch.setattr(local_attention, "BLOCK", 4)

    def by_blocks(q, k, v, bias, mask):
        length = q.shape[2]
        assert local_attention.skips_keys(mask, length, length)
        bias = None if bias is None else attention_cases.bias_array(bias, length, length)
        return attend(q, k, v, bias_1NLS=bias, mask=mask, kernel="cpu", softcap=CASES[case].get("softcap", 0.0))

    attention_cases.compare(rng, by_blocks, **CASES[case])


def test_keys_are_skipped_only_where_a_window_leaves_few_of_them():
    skips = lambda length=2048, **mask: local_attention.skips_keys(MaskSpec(**mask), length, length)
    assert skips(causal=True, window=512) and skips(window=64, window_ahead=64)
    assert not skips(causal=True) and not skips(window=64)
    assert not skips(512, causal=True, window=512)


def test_a_model_with_windows_has_fewer_flops_and_the_same_logits(monkeypatch):
    config = with_model("windowed", num_layers=1)
    params, batch = params_of(config), random_batch(config)

    def run():
        apply = lambda params: Transformer(config).apply({"params": params}, batch)
        program = jax.jit(apply).lower(params).compile()
        return program(params), program.cost_analysis()["flops"]

    expected, all_keys = run()
    monkeypatch.setattr(local_attention, "BLOCK", 2)
    computed, few_keys = run()
    np.testing.assert_allclose(computed, expected, rtol=1e-4, atol=1e-5)
    assert few_keys < all_keys


def test_attention_by_blocks_is_exported_for_any_number_of_rows(monkeypatch):
    monkeypatch.setattr(local_attention, "BLOCK", 4)
    (rows,) = jax.export.symbolic_shape("b")
    q = jax.ShapeDtypeStruct((rows, 2, 30, 8), np.float32)
    exported = jax.export.export(jax.jit(lambda q: attend(q, q, q, mask=MaskSpec(causal=True, window=6))))(q)
    assert exported.out_avals[0].shape == (rows, 2, 30, 8)
