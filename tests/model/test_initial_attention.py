"""Patterns in the initial values of attention: what heads read at first, and that nothing else changes."""

import jax
import numpy as np
import pytest
from conftest import random_batch, small

from t5like.interop.huggingface.families import numeric_fields
from t5like.model.initial_attention import BIAS, EqualInputs, nearest_tokens
from t5like.model.positions import relative_buckets
from t5like.optim import train_state


@pytest.mark.parametrize(("bidirectional", "preferred"), [(True, (-1, 1, -2, None)), (False, (-1, 0, -2, None))])
def test_of_four_heads_three_prefer_a_token_near_the_query(bidirectional, preferred):
    config = small(model={"attention_init": "local", "num_heads": 8}).model
    distances = np.arange(-64 if bidirectional else -127, 64 if bidirectional else 1)
    buckets = lambda distance: relative_buckets(
        distance,
        buckets=config.relative_buckets,
        max_distance=config.relative_max_distance,
        bidirectional=bidirectional,
    )
    table_RN = nearest_tokens(config, buckets, bidirectional=bidirectional)((config.relative_buckets, 8))
    weights_NS = np.asarray(jax.nn.softmax(table_RN[buckets(distances)].T, axis=-1))
    for head, weights_S in enumerate(weights_NS):
        if preferred[head % 4] is None:
            np.testing.assert_allclose(weights_S, 1 / 128, rtol=1e-6)
        else:
            assert distances[weights_S.argmax()] == preferred[head % 4]
            assert weights_S.max() == pytest.approx(np.exp(BIAS) / (np.exp(BIAS) + 127), rel=1e-5)


def test_queries_prefer_keys_whose_inputs_equal_theirs_also_where_heads_share_keys():
    heads, kv_heads, size, dim = 4, 2, 16, 48
    x_LD = np.random.default_rng(0).normal(size=(20, dim))
    q_LNH = (x_LD @ EqualInputs(heads, kv_heads, 3.0)((dim, heads * size))).reshape(20, heads, size)
    k_LKH = (x_LD @ EqualInputs(kv_heads, kv_heads, 1.0)((dim, kv_heads * size))).reshape(20, kv_heads, size)
    scores_NLS = np.einsum("lnh,snh->nls", q_LNH, np.repeat(k_LKH, heads // kv_heads, axis=1))
    assert (scores_NLS.argmax(-1) == np.arange(20)).mean() > 0.95
    np.testing.assert_allclose(scores_NLS[0, 3, 3], 3 * (x_LD[3, :size] ** 2).sum())
    np.testing.assert_allclose(scores_NLS[3, 3, 3], 3 * (x_LD[3, size : 2 * size] ** 2).sum())


def test_local_changes_attention_alone_and_equally_on_any_mesh():
    draw = lambda config, **rest: train_state.random_params(config, random_batch(config), jax.random.key(1), **rest)
    local = small(model={"attention_init": "local"})
    random, found = draw(small()), draw(local)
    changed = {name for name in random if not np.array_equal(random[name], found[name])}
    query, key = (f"decoder/layers/cross_attention/{name}/kernel" for name in ("query", "key"))
    assert changed == {query, key, "encoder/relative_bias/table", "decoder/relative_bias/table"}
    np.testing.assert_array_equal(found[key], np.broadcast_to(np.eye(32), (2, 32, 32)))
    np.testing.assert_allclose(found[query], 3 * 8**-0.5 * found[key], rtol=1e-6)  # heads of 8
    mean, std = train_state.initial_values(local, random_batch(local))[key]
    assert (mean, std) == pytest.approx((float(np.mean(found[key])), float(np.std(found[key]))))
    place = jax.sharding.NamedSharding(jax.make_mesh((8,), ("data",)), jax.sharding.PartitionSpec(None, "data"))
    split = draw(local, shardings={key: place})[key]
    assert split.sharding == place and np.array_equal(split, found[key])
    assert numeric_fields(local.model) == numeric_fields(small().model)  # exports do not depend on it
    decoder = [small(model={"attention_init": init, "architecture": "decoder"}) for init in ("random", "local")]
    before, after = map(draw, decoder)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    boxes = train_state.init_params(local, random_batch(local), jax.random.key(1))
    np.testing.assert_array_equal(
        boxes["decoder"]["relative_bias"]["table"].value, found["decoder/relative_bias/table"]
    )
