"""A few batches learned by heart, or the reason why not: each injected fault is named."""

import jax
import numpy as np
import pytest
from conftest import begun, random_batch, small

from t5like import tree
from t5like.inspect import leaks
from t5like.inspect.lowest_loss import lowest_loss
from t5like.inspect.step_tensors import Step
from t5like.model import masks
from t5like.optim import train_state
from t5like.sharding import mesh as meshes
from t5like.sharding import placement
from t5like.types import Batch


def test_the_floor_is_the_entropy_of_targets_with_the_same_context():
    # Three rows begin alike: two with target 5, one with 6. All other contexts are different.
    decoder = np.array([[0, 5, 8], [0, 5, 9], [0, 6, 8]], np.int32)
    targets = np.array([[5, 8, 1], [5, 9, 1], [6, 8, 1]], np.int32)
    batch = Batch(decoder, targets, np.ones((3, 3), np.float32))
    entropy = lambda *shares: -sum(share * np.log(share) for share in shares)
    expected = (3 * entropy(1 / 3, 2 / 3) + 2 * entropy(1 / 2, 1 / 2)) / 9  # after 0 5 come 8 and 9
    floor = lowest_loss([batch], label_smoothing=0.0, vocab_size=10)
    assert floor.nats == pytest.approx(expected) and floor.shared == pytest.approx(5 / 9)
    inputs = batch._replace(encoder_BS=np.array([[3, 1], [4, 1], [7, 1]], np.int32))
    assert lowest_loss([inputs], label_smoothing=0.0, vocab_size=10) == (0.0, 0.0)
    smoothed = lowest_loss([inputs], label_smoothing=0.1, vocab_size=10)
    assert smoothed.nats == pytest.approx(-np.log(0.9))


@pytest.fixture(scope="module")
def config_flags(flags):
    decoder = ["--config.model.architecture=decoder", "--config.data.objective=causal_lm"]
    return [*flags, *decoder, "--config.train.num_steps=200", "--overfit=1"]


def test_a_batch_is_learned_by_heart_without_a_run_directory(command, config_flags):
    code, out, err = command("train", *config_flags)
    assert code == 0, err
    assert "floor      0.000 nats per target: every context has one target; reached below 0.100" in out
    assert "checked    later targets: " in out
    assert out.splitlines()[-1].startswith("result     the loss is at its floor after ")


def test_a_learning_rate_a_hundred_times_too_high_and_a_dead_layer_are_named(command, config_flags, monkeypatch):
    new_state = train_state.new_state

    def with_dead_layer(*arguments):
        state = new_state(*arguments)
        dead = lambda name, leaf: leaf * 0 if name == "decoder/layers/mlp_norm/scale" else leaf
        return state._replace(params=tree.map_named(dead, state.params))

    monkeypatch.setattr(train_state, "new_state", with_dead_layer)
    code, out, _ = command("train", *config_flags, "--config.optimizer.learning_rate=1", "--config.train.num_steps=30")
    result, rate, dead, units = out.splitlines()[-4:]
    assert code == 0 and result.startswith("result     the loss is NOT at its floor: ")
    assert rate.startswith("rate       optimizer.learning_rate=1 is too high: the loss went from ")
    assert dead.startswith("dead       the gradient is exactly 0 at every step: decoder/layers/0/mlp/")
    assert units == "dead       decoder/layers/0: 100 % of the MLP's units are 0 at every position"


def test_an_encoder_whose_padding_is_attended_to_is_named(monkeypatch):
    config = small(model={"architecture": "encoder", "num_layers": 1, "kernels": "plain"})
    mesh = meshes.make_mesh(config, jax.devices()[:1])
    rows = random_batch(config)
    segments_BS = np.repeat([[1, 0]], 16, axis=1).repeat(len(rows.encoder_BS), 0).astype(np.int32)
    rows = rows._replace(encoder_segments_BS=segments_BS)
    state = begun(config, rows, train_state.abstract_state(config, rows, mesh))
    prepared = Step(config, mesh, state, placement.to_global(rows, mesh, 8))
    kept = "checked    padding of the encoder: 128 other ids change nothing that must not read them"
    assert leaks.check(prepared, rows) == [kept]
    right = masks.segment_mask
    monkeypatch.setattr(masks, "segment_mask", lambda queries, keys: right(queries, keys) | (keys == 0)[:, None, None])
    [line] = leaks.check(prepared, rows)
    assert line.startswith("LEAK       padding of the encoder is read: with 128 other ids, encoder/layers/0/attention_")
