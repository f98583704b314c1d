"""Output heads: padding rows of the vocabulary, token types."""

import numpy as np
import pytest
from conftest import random_batch, small
from model_variants import VARIANTS, logits, mean_loss, params_of


def test_without_token_types_all_tokens_have_type_0_and_type_1_changes_the_logits():
    config = small(**VARIANTS["bert"])
    params, batch = params_of(config), random_batch(config)
    none, first, second = (
        logits(config, params, batch._replace(token_types_BS=types))
        for types in (None, np.zeros_like(batch.encoder_BS), np.ones_like(batch.encoder_BS))
    )
    np.testing.assert_array_equal(none, first)
    assert np.abs(none - second).max() > 1e-3


def test_padding_rows_of_the_vocabulary_never_win():
    padded, exact = (small(model={"num_layers": 1, **more}) for more in ({}, {"vocab_multiple": 1}))
    params = params_of(padded)
    cut = {**params, "embedding": params["embedding"][:500], "head": params["head"][:, :500]}
    batch = random_batch(padded)
    padded_logits = logits(padded, params, batch)
    assert padded_logits.shape[-1] == 512 and (padded_logits[..., 500:] < -1e8).all()
    assert mean_loss(padded, params, batch) == pytest.approx(float(mean_loss(exact, cut, batch)), rel=1e-6)
