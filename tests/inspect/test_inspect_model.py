"""The table of parameters agrees with a real model on a real mesh, and parameters that no axis splits are named."""

import json

import jax
import numpy as np
from conftest import begun, random_batch, small

from t5like import tree
from t5like.inspect import model, model_text
from t5like.metrics import flops
from t5like.optim import train_state
from t5like.plan import topology
from t5like.sharding import logical_axes
from t5like.sharding import mesh as meshes


def report(config, machine=None):
    return model.inspect_model(config, machine and topology.parse(machine))


def by_name(report):
    return {row["name"]: row for row in report["parameters"]}


def names(report):
    return [warning["name"] for warning in report["warnings"]]


def test_the_table_agrees_with_a_real_state():
    config = small(
        model={"architecture": "decoder", "num_layers": 1},
        optimizer={"frozen": ("embedding",), "weight_decay": 0.1},
        mesh={"data": 2, "fsdp": 2, "tensor": 2},
    )
    shown = report(config, "cpu:8")
    mesh, batch = meshes.make_mesh(config), random_batch(config)
    abstract = train_state.abstract_state(config, batch, mesh)
    leaves, shapes = tree.flatten(begun(config, batch, abstract).params), tree.flatten(abstract.params)
    rows = by_name(shown)
    assert list(rows) == list(leaves) and shown["total"]["parameters"] == tree.num_parameters(leaves)
    for name, row in rows.items():
        leaf = leaves[name]
        assert tuple(row["shape"]) == leaf.shape and row["bytes"] == leaf.nbytes
        assert row["bytes_per_device"] == leaf.addressable_shards[0].data.nbytes
        assert shapes[name].sharding.spec == logical_axes.spec(row["axes"])
        values = np.asarray(leaf)
        assert abs(values.mean() - row["mean"]) < 5 * row["std"] / values.size**0.5 + 1e-9, name
        assert np.isclose(values.std(), row["std"], rtol=5 / (2 * values.size) ** 0.5), name
    assert rows["embedding"]["update"] == "frozen" and not rows["embedding"]["state"]
    assert (
        rows["head"]["weight_decay"] == 0.1
        and [each["bytes"] for each in rows["head"]["state"]] == [rows["head"]["bytes"]] * 2
    )
    assert rows["decoder/final_norm/scale"]["weight_decay"] == 0
    assert shown["total"]["trained"] == shown["total"]["parameters"] - rows["embedding"]["size"]
    parts = {part["part"]: part for part in shown["parts"]}
    assert sum(part["parameters"] for part in parts.values()) == shown["total"]["parameters"]
    assert parts["decoder mlp"]["parameters"] == 3 * 32 * 64
    per_token = sum(part["flops_per_token"] for part in parts.values())
    assert np.isclose(per_token * shown["flops"]["tokens_per_step"], flops.model_flops(config))
    assert names(shown) == []


def test_a_rule_that_leaves_a_big_parameter_replicated_is_named(monkeypatch):
    config = small(mesh={"data": 1, "fsdp": 4, "tensor": 2})
    monkeypatch.setitem(logical_axes.RULES, "vocab", None)
    monkeypatch.setitem(logical_axes.RULES, "embed", None)
    shown = report(config, "cpu:8")
    texts = [each["text"] for each in shown["warnings"] if each["name"] == "not_split"]
    [head] = [text for text in texts if text.startswith("head (")]
    assert (
        "is replicated on every device, although the mesh has fsdp=4 and tensor=2" in head and "(embed, vocab)" in head
    )
    [mlp] = [text for text in texts if text.startswith("encoder/layers/mlp/in/kernel")]
    assert "is not split over fsdp=4" in mlp
    assert not any("norm" in text for text in texts)


def test_optimizer_state_that_is_not_split_is_named(monkeypatch):
    shardings = train_state.placement.state_shardings

    def whole(state, axes, mesh):
        right = shardings(state, axes, mesh)
        alone = jax.tree.map(lambda leaf: leaf.update(spec=jax.sharding.PartitionSpec()), right.opt_state)
        return right._replace(opt_state=alone)

    monkeypatch.setattr(train_state.placement, "state_shardings", whole)
    shown = report(small(mesh={"data": 1, "fsdp": 8}), "cpu:8")
    assert any(each["text"].startswith("the state optimizer/") for each in shown["warnings"])


def test_optimizers_and_their_groups():
    config = small(model={"model_dim": 128, "mlp_dim": 128}, optimizer={"name": "adafactor"})
    rows = by_name(report(config))
    assert rows["head"]["update"] == "adafactor, factored" and rows["head"]["rate"] == "relative to its RMS"
    assert rows["encoder/final_norm/scale"]["update"] == "adafactor"
    rows = by_name(report(small(optimizer={"name": "muon"})))
    assert rows["encoder/layers/mlp/in/kernel"]["update"] == "muon" and rows["embedding"]["update"] == "adam"


def test_a_layer_that_begins_at_zero_is_named(monkeypatch):
    init = model.train_state.initial_values
    zero = lambda *arguments: init(*arguments) | {"encoder/layers/mlp/out/kernel": (0.0, 0.0)}
    monkeypatch.setattr(model.train_state, "initial_values", zero)
    assert names(report(small())) == ["starts_at_zero"]


def test_the_command_prints_a_table_a_page_and_json_and_refuses_wrong_flags(command, refused, trained, tmp_path):
    code, out, err = command("inspect", "model", f"--workdir={trained}", f"--html={tmp_path}/model.html")
    assert code == 0, err
    assert "encoder/layers/attention/query/kernel" in out and "decoder attention" in out and "warnings   none" in out
    assert "Parameters" in (tmp_path / "model.html").read_text("utf-8")
    flags = ("--topology=v5p:8x8x8", "--config.mesh.fsdp=64", "--config.mesh.data=8", "--config.data.batch_size=512")
    code, out, err = command("inspect", "model", "--config=t5_xxl", *flags, "--json")
    shown = json.loads(out)
    assert code == 0 and shown["devices"] == 512 and shown["total"]["parameters"] == 11_135_332_352, err
    assert shown["total"]["bytes_per_device"] < shown["total"]["bytes"] / 60
    assert "11,135,332,352 parameters" in model_text.text(shown)
    for wrong in (
        [],
        ["--config=tiny", "--topology=z9:3"],
        ["--config=tiny", "--topology=v5e:8x8", "--config.mesh.data=3"],
    ):
        assert refused("inspect", "model", *wrong)[0] == 2
    assert refused("inspect", "model", "--config=tiny", "--num_slices=2")[0] == 2
    assert refused("inspect", "model", "--workdir=/nowhere")[0] == 4
