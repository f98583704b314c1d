"""Model cards: the values of the run, and a config that repeats it."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import pytest
from conftest import small

from t5like.checkpoint import run_directory
from t5like.config import loader
from t5like.interop.huggingface import card
from t5like.metrics import writers


@pytest.fixture(scope="module")
def loaded(trained):
    return run_directory.load(trained)


@pytest.fixture(scope="module")
def text(trained, loaded, tmp_path_factory):
    directory = tmp_path_factory.mktemp("card")
    card.write(directory, trained, loaded, "t5")
    return (directory / "README.md").read_text()


def test_a_card_has_the_values_of_the_run(trained, loaded, text):
    last = {name: value for record in writers.read(trained) for name, value in record.items()}
    assert f"Measured at step {last['step']}" in text
    for name in ("eval/loss", "baseline/unigram", "baseline/uniform", "train/loss", "eval/bits_per_byte"):
        assert f"| {last[name]:.4g} |" in text, name
    size = sum(leaf.size for leaf in jax.tree.leaves(loaded.params))
    assert f"{size:,} parameters" in text and "1 encoder and 1 decoder layers" in text
    config = run_directory.saved_config(trained)
    stores = [json.loads(path.read_text()) for path in Path(config.data.cache_directory).glob("stores/*/manifest.json")]
    manifest = next(
        each for each in stores if (each["source"], each["tokenizer"]) == (config.data.source[0], loaded.tokenizer.hash)
    )
    assert f"`{config.data.source[0]}`, {manifest['splits']['train']['tokens']:,} tokens" in text
    assert "**Steps**: 2, each of 8 rows of 32 input and 12 target tokens; 704 tokens at most" in text
    assert "AutoModelForSeq2SeqLM" in text and "jax 0." in text and "*Fill in.*" in text


@pytest.mark.parametrize("positions, most", [({"positions": "learned", "max_length": 48}, 24), ({}, 64)])
def test_the_example_generates_at_most_as_many_tokens_as_there_are_positions(positions, most, loaded):
    config = small(model={"architecture": "decoder", **positions})
    assert card.new_tokens(config) == most and f"max_new_tokens={most})" in card._snippet(config, loaded)


def test_its_front_matter_has_the_fields_of_a_model_card(text):
    front = text.split("---\n")[1]
    fields = dict(line.split(": ", 1) for line in front.splitlines() if ": " in line)
    assert fields["library_name"] == "transformers" and fields["pipeline_tag"] == "text2text-generation"
    assert "fill in" in fields["license"] and "fill in" in fields["language"] and "- span-corruption" in front


def test_its_config_repeats_the_run(trained, text, tmp_path):
    code = re.search(r"```python\n(from t5like.*?)```", text, re.DOTALL)[1]
    (tmp_path / "config.py").write_text(code)
    again, config = loader.load(tmp_path / "config.py"), run_directory.saved_config(trained)
    here = dataclasses.replace(
        again.data, cache_directory=config.data.cache_directory, num_workers=config.data.num_workers
    )
    assert loader.difference(dataclasses.replace(again, data=here), config) == []


def test_an_imported_model_has_a_card_that_claims_no_training(trained, loaded, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").unlink()
    card.write(tmp_path, tmp_path / "run", loaded._replace(step=0), "t5")
    text = (tmp_path / "README.md").read_text()
    assert "did not train" in text and "Results" not in text and "AutoModelForSeq2SeqLM" in text
