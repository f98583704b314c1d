"""Adapters in PEFT: what `t5like export --format=peft` writes changes a model of transformers as it changes the run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from test_hf_live import hf_model_of

from t5like.checkpoint import base_weights, run_directory
from t5like.checkpoint.metadata import first_history
from t5like.config.lora_schema import LoRAConfig
from t5like.config.schema import InitConfig
from t5like.data import pipeline
from t5like.interop.huggingface import logits_check, peft_adapter
from t5like.interop.huggingface.convert import import_run
from t5like.optim import train_state
from t5like.sharding import auto
from t5like.sharding import mesh as meshes
from t5like.types import TrainState


@pytest.fixture(scope="module")
def tokenizer(trained):
    return run_directory.load(trained).tokenizer


def write_lora_run(base, place, tokenizer, **fields):
    """A run directory with random adapters of the run `base`."""
    lora, init = LoRAConfig(rank=3, alpha=5.0, **fields), InitConfig(checkpoint=str(base))
    config = dataclasses.replace(run_directory.saved_config(base), lora=lora, init_from=init)
    mesh = meshes.make_mesh(config, jax.devices()[:1])
    resolved = auto.resolve_auto(config, mesh)
    shapes = train_state.abstract_state(resolved, pipeline.spec(resolved), mesh).params
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32), shapes)
    meta = run_directory.checkpoints_of(base, config).meta(0)
    run_directory.open_run_directory(config, tokenizer, place)
    checkpoints = run_directory.checkpoints_of(place, config)
    checkpoints.save(
        TrainState(jnp.ones((), jnp.int32), params, None),
        config=resolved,
        tokenizer=meta.tokenizer,
        tokenizer_hash=meta.tokenizer_hash,
        history=first_history(config)._replace(base=base_weights.record(meta)),
    )
    checkpoints.close()


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {}),
        ("t5_1_1", {"rank_stabilized": True}),
        ("bert", {"targets": (".*/(query|out)/kernel",)}),
    ],
)
def test_peft_computes_what_the_run_does(name, fields, tokenizer, tmp_path):
    model = hf_model_of(name, tmp_path / "hf", tokenizer)
    list(import_run(tmp_path / "hf", tmp_path / "base"))
    imported = run_directory.load(tmp_path / "base").tokenizer
    write_lora_run(tmp_path / "base", tmp_path / "run", imported, **fields)
    list(peft_adapter.export_run(tmp_path / "run", tmp_path / "adapter"))
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    loaded = run_directory.load(tmp_path / "run")
    inputs = logits_check.example(loaded.config)
    expected = logits_check.t5like_logits(loaded.config, loaded.params, inputs)["logits"]
    with torch.no_grad():
        tensors = {key: torch.from_numpy(value) for key, value in inputs.items()}
        output = adapted(**tensors)
        with adapted.disable_adapter():
            without = adapted(**tensors)
    logits = lambda output: (output.prediction_logits if name == "bert" else output.logits).numpy()
    real = inputs.get("decoder_attention_mask", inputs["attention_mask"]) > 0
    np.testing.assert_allclose(logits(output)[real], expected[real], atol=1e-4 * max(1, np.abs(expected).max()))
    assert np.abs(logits(output) - logits(without))[real].max() > 0.1
