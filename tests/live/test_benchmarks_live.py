"""The benchmarks next to PyTorch run to their end at toy sizes: each side in its process, as they measure.

Needs the extra `parity`; not part of `make test`: `python -m pytest tests/live/test_benchmarks_live.py`
"""

import json

import pytest
from documents import ROOT


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """Benchmarks import each other as scripts do; their processes get the machine as it is."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delenv("XLA_FLAGS")


@pytest.mark.parametrize("shape", ["toy", "toy_dec"])
def test_training_steps_are_compared(shape, capfd):
    import peers

    peers.main([f"--shapes={shape}", "--peers=eager", "--rounds=2", "--warmup=1", "--pause=0"])
    out, err = capfd.readouterr()
    ours, theirs = (json.loads(line) for line in out.splitlines())
    assert ours["params"] == theirs["params"] and (ours["program"], theirs["program"]) == ("t5like", "torch eager")
    assert ours["t5like_time_ratio"] == 1 and theirs["t5like_time_ratio"] > 0 and theirs["torch"]
    assert 0 < theirs["counted_flops"] <= ours["flops_per_step"] and f"| {shape} " in err


@pytest.mark.parametrize("shape, way", [("toy", "greedy"), ("toy_dec", "beams")])
def test_decoding_is_compared(shape, way, capfd):
    import generate

    generate.main([f"--shapes={shape}", "--rows=2", f"--ways={way}", "--rounds=1", "--pause=0"])
    out, err = capfd.readouterr()
    ours, theirs = (json.loads(line) for line in out.splitlines())
    assert (ours["program"], theirs["program"]) == ("t5like", "transformers") and theirs["transformers"]
    assert ours["transformers' time / t5like's"] > 0 and theirs["tokens/s"] > 0 and f"| {shape} " in err
