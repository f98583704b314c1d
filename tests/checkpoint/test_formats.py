"""Runs of older config formats load with the same parameters, and continue with the same losses.

The runs were written by the code of their time: see golden/make_format_1.py and golden/make_formats.py.
"""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from t5like.checkpoint import provenance, run_directory
from t5like.config import formats, loader
from t5like.config.schema import Config, flatten
from t5like.errors import ConfigError
from t5like.inference.generate import Generator
from t5like.model.transformer import Transformer
from t5like.tree import flatten as leaves_of
from t5like.types import Batch

GOLDEN = Path(__file__).parents[1] / "golden"
FORMAT_1 = GOLDEN / "format_1"
SHARED = {  # fields of the runs of format 2 and 3 that are not at their default, in names and values of today
    "tokenizer.vocab_size": 380,
    "tokenizer.num_sentinels": 10,
    "data.source": ("text:text.txt",),
    "data.text_documents": "line",
    "data.heldout_fraction": 0.1,
    "data.cache_directory": "prepared",
    "data.batch_size": 4,
    "data.inputs_length": 24,
    "data.targets_length": 10,
    "data.num_workers": 1,
    "data.cross_document_attention": False,
    "data.objective_rates": (1.0, 0.0, 1.0, 3.0),
    "data.phase_boundaries": (3,),
    "model.architecture": "decoder",
    "model.num_layers": 1,
    "model.model_dim": 8,
    "model.num_heads": 2,
    "model.head_dim": 4,
    "model.mlp_dim": 8,
    "model.vocab_multiple": 4,
    "model.tied_embeddings": True,
    "model.dtype": "float32",
    "model.layers": "unroll",
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "train.num_steps": 2,
    "train.log_every": 1,
    "train.eval_batches": 1,
    "train.max_skipped_updates": 5,
    "train.process_timeout_seconds": 700,
}
FIELDS = {
    2: {**SHARED, "data.objective": ("span_corruption", "prefix_lm"), "model.attention_window": 8},
    3: {
        **SHARED,
        "data.objective": ("causal_lm", "prefix_lm"),
        "model.positions": "rotary",
        "model.rotary.base": 500.0,
        "model.rotary.scaling": "yarn",
        "model.rotary.factor": 2.0,
        "model.rotary.original_length": 32,
        "model.rotary.beta_slow": 0.5,
        "model.rotary.beta_fast": 16.0,
        "model.rotary.attention_factor": 1.1,
    },
}


def logits(loaded: run_directory.Run, ids: np.ndarray) -> jax.Array:
    """Logits of a decoder that reads ids; an encoder reads them backwards."""
    encoder = ids if loaded.config.model.has_encoder else None
    batch = Batch(ids[:, ::-1], ids, np.ones(ids.shape, np.float32), encoder)
    return jax.jit(Transformer(loaded.config).apply)({"params": loaded.params}, batch)


def test_a_run_of_format_1_gives_the_logits_and_the_text_that_were_recorded_with_it():
    assert json.loads((FORMAT_1 / "run" / "config.json").read_text())["format"] == 1
    loaded, recorded = run_directory.load(FORMAT_1 / "run"), np.load(FORMAT_1 / "said.npz")
    np.testing.assert_allclose(logits(loaded, recorded["ids"]), recorded["logits"], rtol=1e-5, atol=1e-6)
    generator = Generator(loaded.config, loaded.params, loaded.tokenizer)
    assert generator([str(recorded["prompt"])], max_new_tokens=8) == [str(recorded["answer"])]


@pytest.mark.parametrize("number", [2, 3])
def test_a_run_of_an_older_format_has_its_config_in_the_names_of_today(number):
    path = GOLDEN / f"format_{number}" / "run" / "config.json"
    assert json.loads(path.read_text())["format"] == number
    default, values = flatten(Config()), flatten(loader.load(path))
    assert {name: value for name, value in values.items() if value != default[name]} == FIELDS[number]


@pytest.mark.parametrize("number, recorded", [(2, "d3c5fde132c6"), (3, "202ab69eb8e4")])
def test_a_config_of_an_older_format_keeps_its_fingerprint(number, recorded):
    config = loader.load(GOLDEN / f"format_{number}" / "run" / "config.json")
    assert provenance.config_fingerprint(config) == recorded


@pytest.mark.parametrize("number", [2, 3])
def test_a_run_of_an_older_format_has_its_parameters_and_logits(number):
    folder = GOLDEN / f"format_{number}"
    loaded, recorded = run_directory.load(folder / "run"), np.load(folder / "expected.npz")
    digests = {
        name: hashlib.sha256(np.asarray(value).tobytes()).hexdigest()
        for name, value in leaves_of(loaded.params).items()
    }
    assert digests == dict(zip(recorded["params"], recorded["sha256"], strict=True))
    np.testing.assert_allclose(logits(loaded, recorded["ids"]), recorded["logits"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("number", [2, 3])
def test_train_continues_a_run_of_an_older_format_with_the_same_losses(number, command, monkeypatch, tmp_path):
    shutil.copytree(GOLDEN / f"format_{number}", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    code, _, err = command("train", "--workdir=run", "--config.train.num_steps=4")
    assert code == 0, err
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    np.testing.assert_allclose(losses, np.load(tmp_path / "expected.npz")["losses"], rtol=1e-6)
    path = tmp_path / "run" / "config.json"
    assert json.loads(path.read_text())["format"] == formats.FORMAT and loader.load(path).train.num_steps == 4


# ---- Upgrades ----


def test_step_0_of_format_2_was_the_latest_checkpoint():
    saved = {"init_from": {"checkpoint": "/run", "step": 0}}
    assert loader.from_json(json.dumps({"format": 3, **saved})).init_from.step == 0
    assert loader.from_json(json.dumps({"format": 2, **saved})).init_from.step == -1
    saved["init_from"]["step"] = 7
    assert loader.from_json(json.dumps({"format": 2, **saved})).init_from.step == 7


def test_every_renamed_field_is_a_field_of_today_and_the_old_name_is_none():
    fields = flatten(Config()).keys()
    assert fields >= set(formats.RENAMED.values()) and not fields & formats.RENAMED.keys()


def test_every_renamed_field_of_format_3_keeps_its_value():
    value = {"concatenate": True, "segments": False}
    for old, new in formats.RENAMED.items():
        section, _, field = old.rpartition(".")
        for was, now in value.items() if old == "data.document_borders" else [("a value", "a value"), ([1], [1])]:
            upgraded = formats.upgrade({section: {field: was}}, 3)
            *sections, name = new.split(".")
            for section_of_today in sections:
                upgraded = upgraded[section_of_today]
            assert upgraded == {name: now}


def test_a_damaged_section_of_an_older_format_is_refused_as_one_of_today():
    for values in ({"data": 3}, {"model": None}, {"data": {"document_borders": []}}, {"init_from": "x"}):
        with pytest.raises(ConfigError, match="must be (a section|true or false)"):
            loader.from_json(json.dumps({"format": 3, **values}))


def test_each_older_format_has_an_upgrade_and_newer_ones_are_refused_by_number():
    assert sorted(formats.UPGRADES) == list(range(1, formats.FORMAT))
    saved = json.loads((FORMAT_1 / "run" / "config.json").read_text())
    assert loader.from_json(json.dumps(saved)).model.model_dim == 8
    for number, message in (
        (formats.FORMAT + 1, "is newer than"),
        (0, "is not a format of t5like"),
        ("1", "is not a format of t5like"),
    ):
        with pytest.raises(ConfigError, match=f"format={number!r} {message}"):
            loader.from_json(json.dumps(saved | {"format": number}))


def test_a_changed_config_is_a_frozen_dataclass_with_nested_sections():
    config = Config()
    rotary = dataclasses.replace(config.model.rotary, base=5.0)
    changed = dataclasses.replace(config, model=dataclasses.replace(config.model, rotary=rotary))
    assert loader.from_json(loader.to_json(changed)) == changed
    assert loader.difference(config, changed) == ["model.rotary.base: 10000.0 -> 5.0"]
