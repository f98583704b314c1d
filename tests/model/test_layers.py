"""Initializers and dropout."""

import jax
import jax.numpy as jnp
import pytest
from conftest import random_batch, small
from model_variants import VARIANTS, init, mean_loss, params_of

from t5like import tree


def test_bert_is_initialized_as_in_its_released_code():
    for name, leaf in tree.flatten(
        init(small(**VARIANTS["bert"], tokenizer={"vocab_size": 500, "num_sentinels": 20}))
    ).items():
        if name.endswith(("scale", "bias")):
            assert (leaf == name.endswith("scale")).all(), name
        else:
            assert float(jnp.std(leaf)) == pytest.approx(0.02, rel=0.3), name


def test_dropout_is_random_in_training_and_absent_in_evaluation():
    config = small(model={"num_layers": 1, "dropout_rate": 0.5})
    params, batch = params_of(config), random_batch(config)

    def loss(key):
        return float(mean_loss(config, params, batch, key))

    assert loss(jax.random.key(0)) == loss(jax.random.key(0)) != loss(jax.random.key(1))
    assert loss(None) == loss(None) != loss(jax.random.key(0))
