"""Runs of older formats open as they were; see golden/make_format_1.py."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from t5like.checkpoint import run_directory
from t5like.config import loader
from t5like.errors import ConfigError
from t5like.inference.generate import Generator
from t5like.model.transformer import Transformer
from t5like.types import Batch

FORMAT_1 = Path(__file__).parents[1] / "golden" / "format_1"


def test_a_run_of_format_1_says_what_it_said_when_it_was_written():
    assert json.loads((FORMAT_1 / "run" / "config.json").read_text())["format"] == 1
    loaded, said = run_directory.load(FORMAT_1 / "run"), np.load(FORMAT_1 / "said.npz")
    ids = said["ids"]
    batch = Batch(ids[:, ::-1], ids, np.ones(ids.shape, np.float32), ids)
    logits = jax.jit(Transformer(loaded.config).apply)({"params": loaded.params}, batch)
    np.testing.assert_allclose(logits, said["logits"], rtol=1e-5, atol=1e-6)
    generator = Generator(loaded.config, loaded.params, loaded.tokenizer)
    assert generator([str(said["prompt"])], max_new_tokens=8) == [str(said["answer"])]


def test_format_2_began_with_the_latest_checkpoint_where_it_said_step_0():
    config = loader.resolve({"init_from": {"checkpoint": "/run", "step": 0}})
    saved = json.loads(loader.to_json(config))
    assert loader.from_json(json.dumps(saved)).init_from.step == 0
    assert loader.from_json(json.dumps(saved | {"format": 2})).init_from.step == -1
    saved["init_from"]["step"] = 7
    assert loader.from_json(json.dumps(saved | {"format": 2})).init_from.step == 7


def test_each_older_format_has_an_upgrade_and_newer_ones_are_refused_by_number():
    assert sorted(loader.UPGRADES) == list(range(1, loader.FORMAT))
    saved = json.loads((FORMAT_1 / "run" / "config.json").read_text())
    assert loader.from_json(json.dumps(saved)).model.model_dim == 8
    for number, message in (
        (loader.FORMAT + 1, "is newer than"),
        (0, "is none of ours"),
        ("1", "is none of ours"),
    ):
        with pytest.raises(ConfigError, match=f"format={number!r} {message}"):
            loader.from_json(json.dumps(saved | {"format": number}))
