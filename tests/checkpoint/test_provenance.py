"""Provenance records and expected results: fingerprints, machine, versions, and the line about a run's result."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import jax
import pytest
from conftest import small

from t5like.checkpoint import provenance
from t5like.config import loader
from t5like.data.store import preparation
from t5like.errors import CheckpointError
from t5like.metrics import writers
from t5like.sharding import auto
from t5like.sharding import mesh as meshes
from t5like.train import expected_loss as known_results
from t5like.train.expected_loss import EXPECTED, Expected, summary, verdict

ROOT = Path(__file__).parents[2]
PRINTS = {"config": "c0ffee000000", "tokenizer": "70000000", "stores": {"python_stdlib": "da7a0000"}}
TOY = {"config": "c0ffee000000", "tokenizer": "70000000", "stores": ("da7a0000",)}
KNOWN = (Expected(name="toy", num_steps=9, low=3.55, high=4.0, **TOY),)


@pytest.fixture(scope="module")
def prepared(flags):
    """The tiny run's config and its data, which `trained` has made."""
    pairs = [flag.removeprefix("--config.").partition("=")[::2] for flag in flags[1:]]
    config = loader.load("configs/tiny.py", pairs)
    return config, preparation.prepare(config, progress=False)


def described(config, prepared, requested=None):
    mesh = meshes.make_mesh(config)
    return provenance.describe(
        requested or config, auto.resolve_auto(config, mesh), mesh, prepared.tokenizer, prepared.stores
    )


# ---- Fingerprints ----


@pytest.mark.parametrize(
    "section, field, value, moves",
    [
        ("optimizer", "learning_rate", 0.5, True),
        ("data", "batch_size", 16, True),
        ("model", "dropout_rate", 0.1, True),
        ("train", "num_steps", 99, False),
        ("train", "microbatches", 2, False),
        ("mesh", "fsdp", 2, False),
        ("data", "cache_directory", "/elsewhere", False),
        ("evaluate", "metrics", ("f1",), False),
    ],
)
def test_the_config_fingerprint_depends_only_on_fields_that_change_updates(section, field, value, moves):
    config = small()
    changed = dataclasses.replace(getattr(config, section), **{field: value})
    other = dataclasses.replace(config, **{section: changed})
    same = provenance.config_fingerprint(other) == provenance.config_fingerprint(config)
    assert same != moves


def test_another_seed_has_another_fingerprint():
    assert provenance.config_fingerprint(small(seed=1)) != provenance.config_fingerprint(small())


def test_data_fingerprints_depend_on_content_only(prepared, trained, tmp_path):
    config, data = prepared
    prints = provenance.fingerprints(config, data.tokenizer, data.stores)
    assert prints["tokenizer"] == hashlib.sha256((trained / "tokenizer.model").read_bytes()).hexdigest()[:12]
    [store] = data.stores
    files = provenance.shard_checksums(store)
    for name, digest in files.items():
        assert hashlib.sha256((store.directory / "pieces" / name).read_bytes()).hexdigest() == digest
    assert {name.split(".")[1] for name in files} == {"train", "heldout"}
    assert list(prints["stores"]) == list(config.data.source)
    lines = (Path(config.data.source[0].removeprefix("text:"))).read_text().splitlines(keepends=True)
    (tmp_path / "a.txt").write_text("".join(lines[:-1]) + "another line.\n")
    source = (f"text:{tmp_path}/a.txt",)
    tokenizer = dataclasses.replace(config.tokenizer, path=str(data.tokenizer_path))
    changed = dataclasses.replace(config.data, source=source, cache_directory=str(tmp_path / "prepared"))
    again = preparation.prepare(dataclasses.replace(config, data=changed, tokenizer=tokenizer), progress=False)
    other = provenance.fingerprints(dataclasses.replace(config, data=changed), data.tokenizer, again.stores)
    assert other["tokenizer"] == prints["tokenizer"]
    assert [*other["stores"].values()] != [*prints["stores"].values()]


def test_the_commit_equals_that_of_git():
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert provenance.commit() == (git.stdout.strip() or None)  # None: not a clone


@pytest.mark.parametrize("packed", [False, True])
def test_the_commit_is_read_from_any_clone_and_none_without_one(packed, monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "package")
    assert provenance.commit() is None
    (tmp_path / ".git/refs/heads").mkdir(parents=True)
    (tmp_path / ".git/HEAD").write_text("ref: refs/heads/trunk\n")
    assert provenance.commit() is None  # a clone without commits
    if packed:
        (tmp_path / ".git/packed-refs").write_text("# pack-refs\nabc123 refs/heads/trunk\ndef456 refs/heads/other\n")
    else:
        (tmp_path / ".git/refs/heads/trunk").write_text("abc123\n")
    assert provenance.commit() == "abc123"


def test_the_code_fingerprint_includes_uncommitted_changes(monkeypatch, tmp_path):
    copy = shutil.copytree(provenance.PACKAGE, tmp_path / "package", ignore=shutil.ignore_patterns("__pycache__"))
    here = provenance.code_fingerprint()
    monkeypatch.setattr(provenance, "PACKAGE", copy)
    assert provenance.code_fingerprint() == here
    with (copy / "data" / "objectives" / "masking.py").open("a") as file:
        file.write("# changed\n")
    assert provenance.code_fingerprint() != here


# ---- The record ----


def test_a_record_contains_machine_versions_and_xla_settings(prepared):
    config, data = prepared
    record = json.loads(json.dumps(described(config, data)))
    assert set(record["versions"]) == {*provenance.PACKAGES, "python", "t5like", "commit"}
    assert record["versions"]["jax"] == jax.__version__
    assert record["settings"]["XLA_FLAGS"].startswith("--xla_") and record["settings"]["dtype"] == "float32"
    assert record["devices"] == {"kind": "cpu", "platform": "cpu", "count": 8}
    assert record["processor"]["model"] and record["processor"]["cores"] >= 1
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and " avx2 " in cpuinfo.read_text():
        assert "avx2" in record["processor"]["instructions"]
    shown = "\n".join(provenance.lines(record))
    for part in (*record["fingerprints"]["stores"].values(), record["fingerprints"]["heldout"], jax.__version__):
        assert part in shown


@pytest.mark.parametrize(
    "names, shown",
    [
        (["avx2", "sse4_1"], "AVX2"),
        (["avx2", "avx512f", "amx_tile"], "AMX"),
        (["avx2", "avx512f"], "AVX-512"),
        ([], ""),
    ],
)
def test_the_widest_instruction_set_is_chosen(names, shown):
    assert provenance.widest(names) == shown


def test_each_start_appends_a_line_even_after_a_truncated_one(tmp_path):
    path = tmp_path / provenance.FILE
    provenance.append(tmp_path, 0, {"fingerprints": 1})
    path.write_text(path.read_text() + '{"step": 3, "ti')
    provenance.append(tmp_path, 5, {"fingerprints": 2})
    first, _, last = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in (first, last)] == [0, 5] and json.loads(last)["fingerprints"] == 2
    with pytest.raises(CheckpointError, match=r"absent/provenance.jsonl can't be written: No such file.*use another"):
        provenance.append(tmp_path / "absent", 0, {})


# ---- The result ----


@pytest.mark.parametrize(
    "changes, loss, steps, words",
    [
        ({}, 3.6, 9, "expected   3.55 to 4.00: this run's 3.600 is within the range"),
        ({}, 4.1, 9, "WARNING    4.100 is outside the expected range 3.55 to 4.00 of toy"),
        ({}, 3.5, 9, "WARNING    3.500 is outside"),
        ({}, 4.1, 8, ""),
        ({"config": "beef"}, 4.1, 9, ""),
        ({"tokenizer": "beef"}, 4.1, 9, "expected   no range is stored for this tokenizer and text, only for toy"),
        ({"stores": {"python_stdlib": "beef"}}, 4.1, 9, "expected   no range is stored"),
    ],
)
def test_a_result_is_compared_with_known_results_of_the_same_run(changes, loss, steps, words):
    line = verdict(PRINTS | changes, steps, loss, KNOWN)
    assert line.startswith(words) and bool(line) == bool(words)


@pytest.mark.parametrize("low, high, words", [(0.0, 20.0, "is within the range"), (0.0, 0.1, "WARNING ")])
def test_the_last_lines_of_a_run_contain_whether_its_result_is_expected(
    low, high, words, trained, prepared, monkeypatch
):
    config, data = prepared
    prints = provenance.fingerprints(config, data.tokenizer, data.stores)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=2))
    fields = {"config": prints["config"], "tokenizer": prints["tokenizer"], "stores": tuple(prints["stores"].values())}
    known = Expected(name="toy", num_steps=2, low=low, high=high, **fields)
    monkeypatch.setattr(known_results, "EXPECTED", (known,))
    last = [record["eval/loss"] for record in writers.read(trained) if "eval/loss" in record][-1]
    first, second = summary(trained, config, prints).splitlines()
    assert f"{last:.3f} after 2 steps" in first and words in second and f"{last:.3f}" in second


def test_a_result_is_stored_for_make_train():
    config = loader.load(ROOT / "configs/tiny.py")
    stored = [each for each in EXPECTED if each.num_steps == config.train.num_steps]
    [tiny] = [each for each in stored if each.config == provenance.config_fingerprint(config)]
    assert tiny.low < tiny.high
    text = (ROOT / "benchmarks/RESULTS.md").read_text("utf-8")
    [section] = [part for part in text.split("\n## ") if part.startswith("What `make train` ends at\n")]
    assert f"| {tiny.config} | {tiny.tokenizer} | {tiny.stores[0]} |" in section
    assert f"{tiny.low:.2f} to {tiny.high:.2f}" in section
