"""Which inputs move which outputs, by gradients: causal, windowed, prefix and segment masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_batch, small
from model_variants import VARIANTS, logits, params_of, with_model

from t5like.config.schema import Config
from t5like.model.transformer import Transformer
from t5like.types import Batch


def influence(config: Config, batch: Batch, row: int = 0) -> np.ndarray:
    """How much decoder (encoder-only: encoder) input j moves output i, by gradients: [L outputs, L inputs].

    Each position reads another id, and the encoder reads none of them, so that each embedding row belongs to one
    position.
    """
    params, model = params_of(config), Transformer(config)
    ids_L = 3 + np.arange(batch.targets_BL.shape[1])
    one = jax.tree.map(lambda x: x[row : row + 1], batch)
    if one.decoder_BL is None:
        one = one._replace(encoder_BS=ids_L[None])
    else:
        encoder_BS = None if one.encoder_BS is None else np.full_like(one.encoder_BS, 2)
        one = one._replace(decoder_BL=ids_L[None], encoder_BS=encoder_BS)
    weights_D = jnp.cos(jnp.arange(config.model.model_dim))  # the plain sum of a layer norm's output is constant

    @jax.jit
    @jax.jacobian
    def gradient(rows_LD):
        changed = {**params, "embedding": params["embedding"].at[ids_L].set(rows_LD)}
        return model.apply({"params": changed}, one, method="hidden").x_BLD[0] @ weights_D

    return np.abs(np.asarray(gradient(params["embedding"][ids_L]))).sum(-1)


def test_no_future_token_changes_a_causal_output():
    for model in ({}, {"architecture": "decoder"}, {"architecture": "decoder", "positions": "rotary"}):
        config = small(model={"num_layers": 1, **model})
        matrix = influence(config, random_batch(config))
        assert (matrix[np.triu_indices(len(matrix), 1)] == 0).all()
        assert (matrix[np.tril_indices(len(matrix))] > 0).all()


def test_a_token_attends_to_its_window_wherever_its_document_begins():
    config = small(model={**VARIANTS["windowed"]["model"], "num_layers": 1}, data={"cross_document_attention": False})
    batch = random_batch(config)
    index, segments = np.arange(batch.targets_BL.shape[1]), batch.decoder_segments_BL[0]
    distance = index[:, None] - index[None]
    visible = (distance >= 0) & (distance < 6) & (segments[:, None] == segments[None])
    np.testing.assert_array_equal(influence(config, batch) > 0, visible)


def test_all_tokens_attend_to_a_prefix_and_the_rest_is_causal():
    config = with_model("prefix", num_layers=1)
    batch = random_batch(config)
    matrix = influence(config, batch)
    index = np.arange(len(matrix))
    visible = (index[None] <= index[:, None]) | (index[None] < batch.prefix_BL[0].sum())
    assert ((matrix > 0) == visible).all()


@pytest.mark.parametrize("model", [{}, {"architecture": "decoder"}])
def test_no_token_attends_to_another_document(model):
    config = small(model={"num_layers": 1, **model}, data={"cross_document_attention": False})
    batch = random_batch(config)
    segments = batch.decoder_segments_BL[0]
    matrix = influence(config, batch)
    assert (matrix[segments[:, None] != segments[None]] == 0).all()
    if model:
        return
    # and the encoder: inputs of other documents do not change a target's logits
    params = params_of(config)
    index = int(np.flatnonzero(batch.encoder_segments_BS[0] == 1)[0])
    changed = batch._replace(encoder_BS=batch.encoder_BS.copy())
    changed.encoder_BS[0, index] += 1
    a, b = logits(config, params, batch)[0], logits(config, params, changed)[0]
    assert (np.abs(a - b).max(-1)[segments != 1] == 0).all() and np.abs(a - b).max(-1)[segments == 1].max() > 0


@pytest.mark.parametrize("variant", ["bert", "encoder", "modernbert"])
def test_an_encoder_attends_in_both_directions_inside_a_document_and_never_to_padding(variant):
    config = with_model(variant, num_layers=1, layer_pattern=(), attention_window=0, rotary={})
    batch = random_batch(config)
    segments_S = np.repeat([1, 2, 0], [12, 10, 10])
    batch = batch._replace(encoder_segments_BS=np.tile(segments_S, (len(batch.targets_BL), 1)))
    visible = (segments_S[:, None] == segments_S[None]) & (segments_S != 0)[None]
    np.testing.assert_array_equal(influence(config, batch) > 0, visible | np.eye(32, dtype=bool))
