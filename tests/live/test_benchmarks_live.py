"""The benchmarks next to PyTorch run to their end at toy sizes: each side in its process, as they measure.

Needs the extra `parity`; not part of `make test`: `python -m pytest tests/live/test_benchmarks_live.py`
"""

import dataclasses
import json

import jax
import pytest
from documents import ROOT

from t5like import tree
from t5like.config import loader
from t5like.data import pipeline
from t5like.optim import train_state
from t5like.sharding import mesh as meshes


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """Benchmarks import each other as scripts do; their processes get the machine as it is."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delenv("XLA_FLAGS")


def test_training_steps_are_compared(capfd):
    import peers

    peers.main(["--shapes=toy", "--peers=eager", "--rounds=2", "--warmup=1", "--pause=0"])
    out, err = capfd.readouterr()
    ours, theirs = (json.loads(line) for line in out.splitlines())
    assert ours["params"] == theirs["params"] and (ours["program"], theirs["program"]) == ("t5like", "torch eager")
    assert ours["t5like_time_ratio"] == 1 and theirs["t5like_time_ratio"] > 0 and theirs["torch"]
    assert 0 < theirs["counted_flops"] <= ours["flops_per_step"] and "| toy " in err


def test_both_libraries_have_as_many_parameters_in_every_measured_shape():
    import measurement
    import peers
    import torch
    import torch_peer

    for name in peers.MEASURED:
        shape = dataclasses.replace(peers.SHAPES[name], layers=1)
        path, *fields = peers.t5like_command(shape, peers.parse([]))[3:]
        config = loader.load(path.partition("=")[2], measurement.split(fields)[1])
        mesh = meshes.make_mesh(config, jax.devices()[:1])
        ours = train_state.abstract_state(config, pipeline.spec(config), mesh).params
        with torch.device("meta"):
            theirs = torch_peer.model_and_batch(shape)[0].parameters()
        assert tree.num_parameters(ours) == sum(each.numel() for each in theirs), name


def test_decoding_is_compared(capfd):
    import generate

    generate.main(["--shapes=toy_dec", "--rows=2", "--ways=beams", "--rounds=1", "--pause=0"])
    out, err = capfd.readouterr()
    ours, theirs = (json.loads(line) for line in out.splitlines())
    assert (ours["program"], theirs["program"]) == ("t5like", "transformers") and theirs["transformers"]
    assert ours["transformers' time / t5like's"] > 0 and theirs["tokens/s"] > 0 and "| toy_dec " in err


@pytest.mark.long
def test_what_recipes_learn_is_compared(flags, tmp_path, capfd):
    import learning

    run = ["--seeds=1", "--minutes=0.001", "--steps=2", "--eager", f"--picture={tmp_path}/learning.png"]
    learning.main([*flags, "--config.model.init=t5", "--config.model.attention_init=random", *run])
    out, err = capfd.readouterr()
    points = [json.loads(line) for line in out.splitlines()]
    assert [(point["recipe"], point["step"]) for point in points] == [
        (recipe, step) for recipe in learning.RECIPES for step in (0, 1, 2)
    ]
    first = [point["loss"] for point in points if point["step"] == 0]
    assert first == pytest.approx([first[0]] * 3, abs=1e-3)  # the same initial values and rows
    assert (tmp_path / "learning.png").exists() and "| huggingface " in err


@pytest.mark.long
def test_an_accelerators_parts_are_measured_with_pytorch(capfd, tmp_path):
    import accelerator

    assert accelerator.main([f"--out={tmp_path}", "--only=matmul,bert_base,decoding", "--minutes=60"]) == 0
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [row["program"] for row in rows] == ["t5like"] * 3 + ["torch"] * 3
    (_, ours, _), (_, theirs, decoded) = ([row["result"] for row in rows[first : first + 3]] for first in (0, 3))
    assert ours["params"] == theirs["params"] and theirs["tokens_per_second"] > 0 and theirs["attention"] == "sdpa"
    assert [case["rows"] for case in decoded["cases"]] == [1, 2]
