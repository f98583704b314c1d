"""The head for labels: packed texts have the outputs of single ones, and padding counts nowhere."""

import jax
import numpy as np
import pytest
from conftest import small
from model_variants import drawn_params

from t5like.data.pipeline import spec
from t5like.metrics.flops import forward_flops
from t5like.model.transformer import Transformer
from t5like.optim.label_loss import squared_error
from t5like.optim.step import pretrain_loss
from t5like.types import Batch


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_packed_texts_have_the_outputs_and_the_loss_of_single_ones(pooling):
    config = small(
        model={"architecture": "encoder", "num_layers": 1, "pooling": pooling},
        data={"objective": "classification", "labels": ("a", "b", "c"), "inputs_length": 12, "batch_size": 1},
    )
    params, texts, labels = drawn_params(config, spec(config)), ([40, 5, 6, 7, 1], [40, 9, 1]), (2, 0)
    model, of_rows = Transformer(config), jax.jit(lambda batch: Transformer(config).apply({"params": params}, batch))
    packed, single = np.zeros((4, 1, 12), np.int32), np.zeros((4, 2, 12), np.int32)  # ids, segments, positions, targets
    weights, alone, start = np.zeros((1, 12), np.float32), np.zeros((2, 12), np.float32), 0
    for index, (text, label) in enumerate(zip(texts, labels, strict=True)):
        stop = start + len(text)
        packed[:3, 0, start:stop] = text, [index + 1] * len(text), range(len(text))
        single[:3, index, : len(text)] = text, [1] * len(text), range(len(text))
        packed[3, 0, start] = single[3, index, 0] = label
        weights[0, start] = alone[index, 0] = 1
        start = stop
    make = lambda rows, weights: Batch(None, rows[3], weights, rows[0], rows[1], encoder_positions_BS=rows[2])
    together, apart = make(packed, weights), make(single, alone)
    found = np.asarray(of_rows(together))[0, [0, len(texts[0])]]
    assert found.shape == (2, 3) and np.allclose(found, np.asarray(of_rows(apart))[:, 0], atol=1e-5)
    if pooling == "mean":
        hidden_BSD = jax.jit(lambda batch: model.apply({"params": params}, batch, method="hidden").x_BLD)(apart)
        mean_D = np.asarray(hidden_BSD)[0, : len(texts[0])].mean(0)
        head = jax.tree.map(np.asarray, params["label_head"])
        wanted = np.tanh(mean_D @ head["pooler"]["kernel"]) @ head["classes"]["kernel"] + head["classes"]["bias"]
        assert np.allclose(found[0], wanted, atol=1e-5)
    loss = jax.jit(lambda batch: pretrain_loss(config, params, batch, None))
    both = [loss(batch).metrics["loss"] for batch in (together, apart)]
    log_p = found - np.log(np.exp(found).sum(-1, keepdims=True))
    assert float(both[0].weight) == 2 and float(both[0].total) == pytest.approx(float(both[1].total), rel=1e-5)
    assert float(both[0].total) == pytest.approx(-(log_p[0, 2] + log_p[1, 0]), rel=1e-5)


def test_the_squared_error_counts_its_targets():
    predicted, targets = np.array([[1.0, 5.0, 2.0]], np.float32), np.array([[0.5, 0.0, 4.0]], np.float32)
    loss = squared_error(
        predicted, targets, np.array([[1.0, 0.0, 1.0]], np.float32), component_B1=np.array([[1]]), num_components=2
    )
    assert float(loss.objective) == 0.25 + 4 and float(loss.metrics["loss"].weight) == 2
    assert np.asarray(loss.metrics["by_component"].total).tolist() == [0, 4.25]


def test_a_head_for_labels_replaces_those_for_tokens_and_pairs():
    model = {"architecture": "encoder", "head": "mlm", "token_types": 2, "biases": True}
    config = small(model=model, data={"objective": "token_classification", "labels": ("a", "b"), "inputs_length": 10})
    params = jax.eval_shape(lambda: Transformer(config).init(jax.random.key(0), spec(config)))["params"]
    assert set(params) == {"embedding", "token_types", "encoder", "label_head"} and set(params["label_head"]) == {
        "classes"
    }
    assert forward_flops(config).vocabulary == 2 * 10 * 32 * 2
    config = small(model=model, data={"objective": "regression", "inputs_length": 10})
    assert forward_flops(config).vocabulary == 2 * 10 * 32 * (1 + 32)
