"""Auxiliary losses and statistics of blocks."""

from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_batch, small
from model_variants import params_of, with_model

from t5like.model import block
from t5like.model.mlp import Mlp
from t5like.optim import step
from t5like.types import Auxiliary, Sum


class MlpWithAuxiliary(Mlp):
    """An MLP with an auxiliary loss: the mean square of its input, over all tokens."""

    def __call__(self, x_BLD, *, train):
        y_BLD, _ = super().__call__(x_BLD, train=train)
        tokens, square = jnp.float32(x_BLD.shape[0] * x_BLD.shape[1]), jnp.square(x_BLD).mean(-1)
        auxiliary = Auxiliary({"square_loss": Sum(square.sum(), tokens)}, {"calls": Sum(tokens, tokens)})
        return y_BLD, auxiliary


@pytest.mark.parametrize(
    "variant, model, layers",
    [("t5", {"remat": "full"}, "unroll"), ("t5", {"remat": "full"}, "scan"), ("pattern", {"num_layers": 4}, "scan")],
)
def test_auxiliary_sums_of_all_layers_reach_objective_and_metrics(monkeypatch, variant, model, layers):
    config = with_model(variant, layers=layers, **model)
    params, batch = params_of(config), random_batch(config)
    rest, layers = params["decoder"], params["decoder"]["layers"]

    def objective(scale):
        changed = {**rest, "layers": {**layers, "mlp_norm": {**layers["mlp_norm"], "scale": scale}}}
        loss = step.pretrain_loss(config, {**params, "decoder": changed}, batch, None)
        return loss.objective, loss.metrics

    # Of one parameter: those of all take much longer to compile. Traced anew each time.
    gradient_of = lambda: jax.jit(jax.value_and_grad(lambda p: objective(p), has_aux=True))(layers["mlp_norm"]["scale"])
    (plain, metrics), gradient = gradient_of()
    assert "square_loss" not in metrics
    monkeypatch.setattr(block, "Mlp", MlpWithAuxiliary)
    (total, metrics), with_auxiliary = gradient_of()
    tokens = sum(x.size * config.model.num_layers for x in (batch.encoder_BS, batch.decoder_BL) if x is not None)
    assert metrics["square_loss"].weight == metrics["calls"].total == tokens
    np.testing.assert_allclose(metrics["square_loss"].total, tokens, rtol=0.01)  # of inputs behind a norm
    np.testing.assert_allclose(total, plain + metrics["square_loss"].total, rtol=1e-6)
    assert np.abs(with_auxiliary).max((0, 1)) > np.abs(gradient).max((0, 1))


def test_auxiliary_sums_are_added_over_microbatches(monkeypatch):
    monkeypatch.setattr(block, "Mlp", MlpWithAuxiliary)
    config = small()
    params, batch = params_of(config), random_batch(config)
    sums_of = jax.jit(lambda batch: step.pretrain_loss(config, params, batch, None).metrics["square_loss"])
    whole = sums_of(batch)
    halves = [sums_of(jax.tree.map(itemgetter(part), batch)) for part in (slice(None, 4), slice(4, None))]
    for index in range(2):
        np.testing.assert_allclose(sum(half[index] for half in halves), whole[index], rtol=1e-5)


def test_a_model_without_auxiliary_sums_has_the_metrics_of_the_loss_alone():
    config = small()
    params, batch = params_of(config), random_batch(config)
    metrics = jax.eval_shape(lambda: step.pretrain_loss(config, params, batch, None).metrics)
    assert set(metrics) == {"loss", "z_loss", "accuracy"}
