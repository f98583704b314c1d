"""Blocks of Gemma 2 and 3 and T5Gemma 1 and 2; `test_families.py` compares them with transformers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import random_batch, small
from model_variants import VARIANTS, decoded_by_steps, logits, params_of

from t5like.config.schema import Config
from t5like.errors import ConfigError
from t5like.model.attention import attend
from t5like.optim import step
from t5like.types import Batch

START = 9


def packed(variant: str) -> tuple[Config, Batch]:
    """A variant with several texts in each row, and a batch."""
    config = small(**VARIANTS[variant], data={"cross_document_attention": False}, tokenizer={"decoder_start_id": START})
    return config, random_batch(config)


@pytest.mark.parametrize("variant", ["gemma2", "gemma_encoder", "t5gemma", "t5gemma2"])
def test_each_shape_with_these_blocks_learns_a_batch_in_30_steps(variant):
    config, batch = packed(variant)
    optimizer = optax.adam(5e-3)

    @jax.jit
    def train(params):
        def update(carry, _):
            params, state = carry
            loss = lambda p: step.pretrain_loss(config, p, batch, None).objective / batch.weights_BL.sum()
            value, gradient = jax.value_and_grad(loss)(params)
            changes, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, changes), state), value

        return jax.lax.scan(update, (params, optimizer.init(params)), length=30)[1]

    losses = train(params_of(config))
    assert abs(losses[0] - math.log(config.tokenizer.vocab_size)) < 1 and losses[-1] < losses[0] - 1.5


def test_merged_attention_stays_inside_a_text_and_serves_several_rows_of_one_source():
    config, batch = packed("t5gemma2")
    params = params_of(config)
    first_BL = np.asarray(batch.decoder_segments_BL) == 1
    changed_BS = np.where(np.asarray(batch.encoder_segments_BS) == 1, batch.encoder_BS, 7)
    before, after = (logits(config, params, each) for each in (batch, batch._replace(encoder_BS=changed_BS)))
    np.testing.assert_array_equal(before[first_BL], after[first_BL])
    assert np.abs(before - after)[~first_BL].max() > 0.1
    started_BL = np.where(np.asarray(batch.decoder_BL) == 0, START, batch.decoder_BL)  # it is read in place of 0
    np.testing.assert_array_equal(logits(config, params, batch._replace(decoder_BL=started_BL)), before)
    of_decoder = ("decoder_BL", "targets_BL", "weights_BL", "decoder_segments_BL", "decoder_positions_BL")
    twice = {name: None if (x := getattr(batch, name)) is None else np.repeat(x, 2, axis=0) for name in of_decoder}
    np.testing.assert_allclose(logits(config, params, batch._replace(**twice))[::2], before, atol=1e-5)


@pytest.mark.parametrize("variant", ["t5gemma", "t5gemma2"])
def test_cached_decoding_equals_the_full_forward(variant):
    config = small(**VARIANTS[variant])
    batch = random_batch(config)
    full, decoded = decoded_by_steps(config, params_of(config), batch)
    np.testing.assert_allclose(decoded, full, atol=2e-5, rtol=1e-4)


def test_a_soft_cap_bounds_attention_scores_in_every_kernel():
    q, k, v = (np.float32(x) for x in 10 * np.random.default_rng(0).normal(size=(3, 1, 4, 5, 8)))
    k, v = k[:, :2], v[:, :2]
    scores = np.einsum("bnlh,bnsh->bnls", q, np.repeat(k, 2, axis=1))
    weights = np.exp(2 * np.tanh(scores / 2))
    expected = np.einsum("bnls,bnsh->bnlh", weights / weights.sum(-1, keepdims=True), np.repeat(v, 2, axis=1))
    for kernel in ("plain", "cpu"):
        computed = [attend(q[:, :, rows], k, v, kernel=kernel, softcap=2.0) for rows in (slice(0, 4), slice(4, 5))]
        np.testing.assert_allclose(jnp.concatenate(computed, axis=2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "sections, complaint",
    [
        ({"architecture": "decoder", "merged_attention": True}, "model.merged_attention=True needs model.architecture"),
        ({"decoder_model_dim": 64}, "model.decoder_model_dim=64 must be model.model_dim=32 with model.separate_emb"),
        ({"decoder_num_heads": 3, "num_kv_heads": 2}, "model.decoder_num_kv_heads=0 gives the decoder 2 key heads"),
        ({"attention_scale_dim": 8}, "model.attention_scale_dim=8 needs model.scale_attention=True; use 0"),
        ({"encoder_window": 8}, "model.encoder_window=8 needs an encoder and model.attention_window; use 0"),
    ],
)
def test_combinations_that_do_not_fit_are_refused_in_one_line(sections, complaint):
    with pytest.raises(ConfigError) as error:
        small(model=sections)
    assert complaint in str(error.value) and "\n" not in str(error.value)
