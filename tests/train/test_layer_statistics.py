"""Statistics of layers: their values, their names in the metrics, and that a run with them is bitwise the same run."""

import json

import jax
import numpy as np
import pytest
from conftest import begun, random_batch, small

from t5like import tree
from t5like.checkpoint.run_directory import checkpoints_of, config_of
from t5like.model.layer_values import compute_intermediates
from t5like.optim import layer_statistics, step, train_state
from t5like.optim.optimizers import make_optimizer
from t5like.sharding import mesh as meshes
from t5like.sharding import placement


@pytest.fixture(scope="module")
def measured():
    """A config, a state on two devices, whose decoder has a dead layer, a batch with padding, and its statistics."""
    config = small(mesh={"tensor": 2}, model={"layers": "scan", "mlp": "relu"}, train={"stats_every": 5})
    mesh = meshes.make_mesh(config, jax.devices()[:2])
    batch = random_batch(config)
    real = lambda length, stop: np.where(np.arange(length)[None] < stop, 1, 0).repeat(8, 0).astype(np.int32)
    batch = batch._replace(encoder_segments_BS=real(32, 32), decoder_segments_BL=real(12, 9))
    abstract = train_state.abstract_state(config, batch, mesh)
    state = begun(config, batch, abstract)
    dead = lambda name, leaf: leaf.at[1].set(0.0) if name == "decoder/layers/mlp_norm/scale" else leaf
    state = state._replace(params=tree.map_named(dead, state.params))
    program = layer_statistics.compile_statistics(config, batch, abstract)
    with jax.set_mesh(mesh):
        values = layer_statistics.by_name(program(state, placement.to_global(batch, mesh, 8)))
    return config, state, batch, values


def test_gradients_and_updates_have_a_norm_for_each_layer(measured):
    config, state, batch, values = measured
    params = jax.device_get(state.params)
    grads, _ = jax.jit(step.make_gradient(config))(params, batch, 0)
    optimizer = make_optimizer(config, params, train_state.parameter_axes(config, batch))
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    grads, updates = (jax.tree.map(np.asarray, each) for each in (grads, updates))
    for layer, part in ((1, "kernel"), (0, "kernel")):
        name = f"encoder/layers/{layer}/attention/query/{part}"
        pick = lambda leaves, layer=layer, part=part: leaves["encoder"]["layers"]["attention"]["query"][part][layer]
        gradient, update, param = (np.linalg.norm(pick(each)) for each in (grads, updates, params))
        assert values[f"{name}/gradient_norm"] == pytest.approx(gradient, rel=1e-4)
        assert values[f"{name}/update_norm"] == pytest.approx(update, rel=1e-3)
        assert values[f"{name}/update_ratio"] == pytest.approx(update / param, rel=1e-3)
    assert values["embedding/gradient_norm"] == pytest.approx(np.linalg.norm(grads["embedding"]), rel=1e-4)


def test_a_dead_layer_has_gradients_and_units_of_zero(measured):
    *_, values = measured
    assert values["decoder/layers/1/mlp_hidden/dead"] == 1.0 == values["decoder/layers/1/mlp_hidden/zeros"]
    assert values["decoder/layers/1/mlp/in/kernel/gradient_norm"] == 0.0
    assert 0.2 < values["decoder/layers/0/mlp_hidden/zeros"] < 0.8 and values["decoder/layers/0/mlp_hidden/dead"] < 0.1
    assert values["decoder/layers/0/mlp/in/kernel/gradient_norm"] > 0


def test_activations_are_those_of_real_positions(measured):
    config, state, batch, values = measured
    compute = jax.jit(lambda params: compute_intermediates(config, params, batch, ["residual"]))
    real = np.asarray(compute(jax.device_get(state.params))["decoder/residual"])[1, :, :9]
    assert values["decoder/layers/1/residual/rms"] == pytest.approx(np.sqrt((real**2).mean()), rel=1e-4)
    assert values["decoder/layers/1/residual/max"] == pytest.approx(np.abs(real).max(), rel=1e-4)


def test_a_run_with_statistics_is_bitwise_the_same_run(command, decoder_flags, trained_decoder, tmp_path):
    settings = ["--config.train.num_steps=2", "--config.train.checkpoint_every=1", "--config.train.stats_every=2"]
    code, _, err = command("train", *decoder_flags, *settings, f"--workdir={tmp_path}/run")
    assert code == 0, err
    first, second = (checkpoints_of(path, config_of(path)).meta(2) for path in (trained_decoder, tmp_path / "run"))
    assert first.leaves == second.leaves  # with their digests
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = {record["step"] for record in records if any(name.startswith("stats/") for name in record)}
    assert steps == {2} and any("stats/decoder/layers/0/mlp/out/kernel/update_ratio" in record for record in records)
    without = [json.loads(line) for line in (trained_decoder / "metrics.jsonl").read_text().splitlines()]
    losses = lambda of: [record["train/loss"] for record in of if "train/loss" in record]
    assert losses(records) == losses(without)


def test_the_compiled_step_does_not_depend_on_statistics():
    texts = set()
    for every in (0, 1):
        config = small(model={"architecture": "decoder", "num_layers": 1}, train={"stats_every": every})
        batch = random_batch(config)
        abstract = train_state.abstract_state(config, batch, meshes.make_mesh(config, jax.devices()[:1]))
        texts.add(step.lower_train_step(config, batch, abstract).as_text())
    assert len(texts) == 1
