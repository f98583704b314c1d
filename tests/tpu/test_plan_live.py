"""A plan with the real TPU compiler: two minutes, no TPU. Not part of `make test`, because libtpu slows each start.

In an environment of its own: pip install -e ".[dev]" libtpu && python -m pytest tests/tpu
"""

import json

import pytest

TINY = {
    "data.batch_size": 16,
    "model.num_layers": 3,
    "model.layers": "scan",
    "model.model_dim": 256,
    "model.mlp_dim": 512,
    "model.remat": "full",
    "mesh.data": 1,
    "mesh.fsdp": 8,
}


def test_a_small_model_is_planned_for_eight_chips(command):
    flags = [f"--config.{name}={value}" for name, value in TINY.items()]
    code, out, err = command("plan", "--config=configs/tiny.py", "--topology=v5e:2x4", "--json", *flags)
    assert code == 0, err
    plan = json.loads(out)
    train, evaluation = plan["train"], plan["eval"]
    assert train["fits"] and evaluation["fits"]
    # Two stacks forward and backward, three trips each; remat runs the layers' products once more, but for the head.
    assert [loop["trips"] for loop in train["loops"]].count(3) >= 4
    assert 1.1 < train["flops"] / plan["model_flops"] < 4 / 3
    assert evaluation["flops"] == pytest.approx(plan["model_flops"] / 3, rel=0.01)
    assert {row["kind"] for row in train["collectives"]} >= {"all-gather", "all-reduce"}
    assert any(row["in_loop"] for row in train["collectives"])
    assert 0 < train["time"]["seconds"] < 0.1 and 0 < train["time"]["mfu"] < 1
    assert train["memory"]["arguments"] >= plan["held"]["total"]
