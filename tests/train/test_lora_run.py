"""A LoRA run: resumed bit for bit, with a base that is read again, and merged when it is exported."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from conftest import run_at

import t5like
from t5like.checkpoint import run_directory
from t5like.checkpoint.checkpoints import Checkpoints
from t5like.run import Run


@pytest.fixture(scope="module")
def base(trained_decoder, tmp_path_factory):
    """The run `trained_decoder`, in a directory that may be changed."""
    return shutil.copytree(trained_decoder, tmp_path_factory.mktemp("base") / "run")


@pytest.fixture(scope="module")
def lora_flags(decoder_flags, base):
    values = {"init_from.checkpoint": base, "lora.rank": 2, "train.num_steps": 2, "train.checkpoint_every": 1}
    return [*decoder_flags, *(f"--config.{name}={value}" for name, value in values.items())]


@pytest.fixture(scope="module")
def adapted(lora_flags, tmp_path_factory):
    """A finished LoRA run of 2 steps from `base`, with checkpoints at 1 and 2."""
    place = tmp_path_factory.mktemp("adapted")
    run_at(place, lora_flags)
    return place / "run"


def test_a_run_that_continues_has_the_same_adapters(adapted, lora_flags, tmp_path, command):
    run = shutil.copytree(adapted, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "2")
    assert command("train", *lora_flags, f"--workdir={run}")[0] == 0
    again, first = (Checkpoints(each / "checkpoints", keep=1).meta(2) for each in (run, adapted))
    assert again.leaves == first.leaves and again.history.base == first.history.base != {}
    parameters = [name for name in first.leaves if name.startswith("params/")]
    assert parameters and all("/lora/" in name for name in parameters)


def test_a_run_computes_what_its_merged_weights_do(adapted, trained_decoder):
    logits = lambda run: run.logits("ba <extra_id_0> de", "<extra_id_0> fi")
    run, merged = t5like.load(adapted), Run(adapted, run_directory.load(adapted, merged=True))
    assert not merged.config.lora.rank
    np.testing.assert_allclose(logits(run), logits(merged), atol=1e-5)
    assert np.abs(logits(run) - logits(t5like.load(trained_decoder))).max() > 1e-4


def test_a_base_that_is_gone_damaged_or_changed_is_refused(adapted, base, tmp_path, refused):
    used = base / "checkpoints" / "2"
    used.rename(tmp_path / "2")
    try:
        code, message = refused("generate", f"--workdir={adapted}", "--prompt=ba")
        assert code == 4 and "has no checkpoint of step 2, to which the adapters of this run belong" in message
        shutil.copytree(tmp_path / "2", used)
        for data in (used / "state").rglob("d/*"):
            data.write_bytes(b"")
        code, message = refused("generate", f"--workdir={adapted}", "--prompt=ba")
        assert code == 4 and message.startswith(f"init_from.checkpoint={base}, the base of this run's adapters: {used}")
        shutil.rmtree(used)
        shutil.copytree(base / "checkpoints" / "1", used)
        metadata = used / "meta" / "metadata"  # another checkpoint in its place
        values = json.loads(metadata.read_text())
        body = {**values["body"], "step": 2}
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        metadata.write_text(json.dumps({**values, "sha256": digest, "body": body}))
        code, message = refused("generate", f"--workdir={adapted}", "--prompt=ba")
        assert code == 4 and "the weights of step 2 are not those to which the adapters of this run belong" in message
    finally:
        shutil.rmtree(used, ignore_errors=True)
        (tmp_path / "2").rename(used)


def test_another_run_can_not_begin_with_adapters(adapted, flags, tmp_path, refused):
    code, message = refused("train", *flags, f"--config.init_from.checkpoint={adapted}", f"--workdir={tmp_path / 'x'}")
    assert code == 4 and "is a LoRA run, whose checkpoints contain adapters only; t5like export merges" in message
