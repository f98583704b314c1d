"""A step is run again as it was in the run, and the first layer that went bad is named."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import begun, random_batch, small

from t5like import tree
from t5like.inspect import replay
from t5like.optim import step, train_state
from t5like.sharding import auto
from t5like.sharding import mesh as meshes


def losses(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["train/loss"] for record in records if "train/loss" in record}


def test_a_step_is_run_again_with_the_loss_of_the_run(command, trained):
    for number, start in ((2, "checkpoint 1"), (1, "random parameters")):
        code, out, err = command("replay", f"--workdir={trained}", f"--step={number}")
        assert code == 0, err
        first, *_, last = out.splitlines()
        rows = f"rows {8 * (number - 1)} to {8 * number - 1}"
        assert first == f"replay     step {number}, from {start}, {rows}, on one cpu"
        assert f"step {number}: loss {losses(trained)[number]:.4f}, gradient norm " in out
        assert last == "first      none: loss, gradient and update are finite"
    assert "encoder/layer_0 " in out and "decoder/layer_0 " in out and "decoder/layer_1" not in out


@pytest.fixture(scope="module")
def prepared(trained):
    return replay.prepare(trained, 2, lambda _: None)


def first_wrong(prepared, **fields):
    state = prepared.state._replace(**fields)
    return replay.examine(prepared._replace(state=state))[-1]


@pytest.mark.parametrize("name", ["decoder/layers/mlp/in/kernel", "embedding"])
def test_a_parameter_that_is_not_finite_is_named_with_its_layer(prepared, name):
    damage = lambda leaf_name, leaf: leaf.at[0, 3].set(jnp.nan) if leaf_name == name else leaf
    found = first_wrong(prepared, params=tree.map_named(damage, prepared.state.params))
    layer = ", layer 0" if "layers" in name else ""
    assert found == f"first      before the step: params/{name}{layer} is nan"


def test_a_moment_that_is_not_finite_or_negative_is_named(prepared):
    def damaged(value):
        damage = lambda name, leaf: leaf.at[0, 3].set(value) if name.endswith("nu/head") else leaf
        return first_wrong(prepared, opt_state=tree.map_named(damage, prepared.state.opt_state))

    assert damaged(jnp.inf).startswith("first      before the step: opt_state/") and damaged(jnp.inf).endswith("is inf")
    assert damaged(-1.0) == "first      the update of head is nan, although the gradient and its moments are finite"


def test_an_overflow_in_an_activation_is_named_with_its_layer_and_operation():
    config = small(data={"batch_size": 2}, model={"architecture": "decoder", "kernels": "plain", "num_layers": 2})
    mesh = meshes.make_mesh(config, jax.devices()[:1])
    config, batch = auto.resolve_auto(config, mesh), random_batch(config)
    state = begun(config, batch, train_state.abstract_state(config, batch, mesh))
    damage = lambda name, leaf: leaf.at[1].set(1e38) if name == "decoder/layers/mlp/out/kernel" else leaf
    state = state._replace(params=tree.map_named(damage, state.params))
    gradient = step.make_gradient(config)
    with jax.set_mesh(mesh):
        grads, _ = jax.jit(gradient)(state.params, batch, state.step)
        found = replay.first_wrong(config, state, batch, batch, gradient, grads)
    assert found.startswith("decoder/layer_1/mlp/out: dot_general gives inf from finite inputs (")


def test_a_bad_step_of_a_run_is_run_again_with_its_own_rows(trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    (workdir / "bad_steps" / "2").mkdir(parents=True)
    record = {"step": 2, "checkpoint": 1, "first_row": 40, "batch_size": 8}
    (workdir / "bad_steps" / "2" / "step.json").write_text(json.dumps(record))
    lines = []
    bad, good = (replay.prepare(path, 2, lines.append) for path in (workdir, trained))
    assert "rows 40 to 47" in lines[0] and "rows 8 to 15" in lines[1]
    assert not np.array_equal(bad.batch.targets_BL, good.batch.targets_BL)


@pytest.mark.parametrize(
    "words", [("replay", "--workdir={}"), ("inspect", "data", "--workdir={}"), ("compare-steps", "{}")]
)
def test_a_step_that_the_run_does_not_make_is_refused(refused, trained, words):
    code, message = refused(*(word.format(trained) for word in words), "--step=3")
    assert code == 2 and message == "--step=3 must be at most 2: train.num_steps=2; use --step=2"


def test_a_step_without_a_state_before_it_is_refused(refused, trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    (workdir / "checkpoints" / "1").rename(workdir / "checkpoints" / "0")  # as if the run began with imported weights
    code, message = refused("replay", f"--workdir={workdir}", "--step=2")
    assert code == 4 and message.endswith("checkpoints holds no checkpoint before step 2; use --step=3 or a later one")
    shutil.rmtree(workdir / "checkpoints")
    values = json.loads((workdir / "config.json").read_text())
    values["init_from"]["checkpoint"] = str(trained)  # as if it began with those and was killed before its first save
    (workdir / "config.json").write_text(json.dumps(values))
    code, message = refused("replay", f"--workdir={workdir}", "--step=2")
    assert code == 4 and message.endswith("holds no checkpoint before step 2; train it until one is saved")
    code, message = refused("replay", f"--workdir={workdir}", "--step=0")
    assert code == 2 and message == "--step=0 must be at least 1: the first update is step 1; use --step=1"


def test_debug_nan_ends_a_run_at_the_first_value_that_is_not_finite(refused, flags, tmp_path, monkeypatch):
    new_state = train_state.new_state

    def overflowing(*arguments):
        state = new_state(*arguments)
        damage = lambda name, leaf: leaf * 0 + 1e38 if name == "decoder/layers/mlp/out/kernel" else leaf
        return state._replace(params=tree.map_named(damage, state.params))

    monkeypatch.setattr(train_state, "new_state", overflowing)
    decoder = [
        "--config.model.architecture=decoder",
        "--config.data.objective=causal_lm",
        "--config.model.kernels=plain",
        "--config.model.init=t5",
    ]
    code, message = refused("train", *flags, *decoder, f"--workdir={tmp_path}/run", "--debug_nan")
    assert code == 5
    assert message.startswith("step 1: decoder/layer_0/mlp/out: dot_general gives inf from finite inputs (")
    assert (tmp_path / "run/bad_steps/1/step.json").is_file()
