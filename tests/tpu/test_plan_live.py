"""Plans with the real TPU compiler: minutes, no TPU. Not part of `make test`, because libtpu slows each start.

After `make golden ARGS=--probes`, which installs it: `PYTHONPATH=$PWD/.libtpu .venv/bin/python -m pytest tests/tpu`
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
    "optimizer.name": "adamw_rms",  # without matmuls
}


DECODER = TINY | {"model.architecture": "decoder", "data.objective": "causal_lm", "data.inputs_length": 0}


def planned(command, settings, topology="v5e:2x4", *arguments):
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    code, out, err = command("plan", "--config=configs/tiny.py", f"--topology={topology}", "--json", *arguments, *flags)
    assert code == 0, err
    return json.loads(out)


def test_a_small_model_is_planned_for_eight_chips(command):
    plan = planned(command, TINY)
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


def test_two_slices_send_each_other_a_gradient_of_every_parameter(command):
    plan = planned(command, DECODER, "v5e:2x4", "--num_slices=2")
    assert (plan["mesh"]["data"], plan["mesh"]["fsdp"]) == (2, 8)
    parameters = plan["model"]["parameters"] / 8
    assert parameters < plan["train"]["slices_bytes"] < 8 * parameters  # two bytes each, or four, some padded


def test_what_the_compiler_can_not_place_gets_settings_that_it_can(command):
    large = {"data.batch_size": 4096, "data.targets_length": 1024, "model.remat": "none"}
    plan = planned(command, DECODER | large)
    assert plan["train"]["fits"] is False and plan["train"]["memory"]["needed"] > plan["topology"]["memory"]
    last = [row for row in plan["nearest"] if "compiled" in row][-1]
    assert last["settings"] and last["compiled"]["fits"]
    assert last["compiled"]["memory"]["total"] < plan["topology"]["memory"]
