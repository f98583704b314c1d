"""The token store: its content, interruptions, and windows compared with a plain concatenation."""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from t5like.config import loader
from t5like.config.schema import Config, TokenizerConfig
from t5like.data.store import preparation
from t5like.data.store.preparation import prepare
from t5like.data.store.token_store import TokenStore
from t5like.data.tokenizers.tokenizer import Tokenizer, train_tokenizer
from t5like.errors import CheckpointError, DataError

ROOT = Path(__file__).parents[3]
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]
WORDS += ["\u2581", "\t", "é", "中文", "😀", "<extra_id_0>", "</s>", ""]


@functools.cache
def lines(count, seed=0):
    rng = np.random.default_rng(seed)
    return [f"{i} " + " ".join(rng.choice(WORDS, rng.integers(1, 60))) for i in range(count)]


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


SHARD = 2**15  # bytes of text, an eighth of what shards have at least outside tests


@pytest.fixture(scope="module", autouse=True)
def small_shards():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "SMALLEST_SHARD", SHARD)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(lines(500), TokenizerConfig(vocab_size=360, num_sentinels=20), path)
    return path


@pytest.fixture
def own(tmp_path, model):
    """A config of the test's own: 750 lines of text, 150 KB, so 5 shards; with an existing tokenizer."""
    write(tmp_path / "a.jsonl", lines(750))
    return config_of(tmp_path / "a.jsonl", model, tmp_path / "prepared")


def config_of(text: Path, model: Path, cache: Path) -> Config:
    return loader.resolve(
        {
            "tokenizer": {"path": str(model), "vocab_size": 360, "num_sentinels": 20},
            "data": {
                "source": [f"jsonl:{text}"],
                "cache_directory": str(cache),
                "num_workers": 1,
                "heldout_fraction": 0.1,
            },
        }
    )


def changed(config, **data):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))


def ready(config) -> TokenStore:
    return prepare(config, progress=False).stores[0]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def documents(store: TokenStore, tokenizer: Tokenizer, split: str) -> list[str]:
    """All documents of a split, by decoding its tokens between the EOS."""
    stream = store.split(split)
    ids = stream.windows(np.zeros(1, np.int64), stream.num_tokens)[0]
    ends = np.flatnonzero(ids == tokenizer.eos_id)
    assert ends[-1] == len(ids) - 1 and len(ends) == stream.num_documents
    return [tokenizer.decode(part) for part in np.split(ids, ends + 1)[:-1]]


# ---- What is in it ----


def test_every_document_is_in_one_split_with_its_text(own):
    prepared = prepare(own, progress=False)
    store = prepared.stores[0]
    train, heldout = (documents(store, prepared.tokenizer, split) for split in ("train", "heldout"))
    texts = lines(750)
    assert set(train) | set(heldout) == set(texts) and len(train) + len(heldout) == 750
    positions = {text: position for position, text in enumerate(texts)}
    for documents_of_split in (train, heldout):
        order = [positions[text] for text in documents_of_split]
        assert order == sorted(order)
    assert 55 < len(heldout) < 95  # a tenth
    assert len(store.manifest["pieces"]) == 5 and store.manifest["dtype"] == "<u2"
    assert store.manifest["tokenizer"] == prepared.tokenizer.hash


def test_documents_stay_held_out_in_another_order_and_among_more_documents(own, tmp_path):
    first = prepare(own, progress=False)
    held = set(documents(first.stores[0], first.tokenizer, "heldout"))
    texts = lines(750)[::-1] + lines(250, seed=1)
    write(tmp_path / "b.jsonl", texts)
    second = prepare(changed(own, source=(f"jsonl:{tmp_path}/b.jsonl",)), progress=False)
    held_again = set(documents(second.stores[0], second.tokenizer, "heldout"))
    assert held_again & set(lines(750)) == held < held_again


def test_a_tokenizer_is_trained_only_on_training_documents_and_kept(own, tmp_path):
    config = dataclasses.replace(own, tokenizer=dataclasses.replace(own.tokenizer, path=""))
    prepared = prepare(config, progress=False)
    train = documents(prepared.stores[0], prepared.tokenizer, "train")
    train_tokenizer(train, config.tokenizer, tmp_path / "again.model")
    assert prepared.tokenizer_path.read_bytes() == (tmp_path / "again.model").read_bytes()
    assert prepared.tokenizer_path.read_bytes() == prepared.tokenizer.model_bytes
    before = prepared.tokenizer_path.stat().st_mtime_ns
    assert prepare(config, progress=False).tokenizer_path.stat().st_mtime_ns == before
    less = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, sample_characters=40_000))
    assert prepare(less, progress=False).tokenizer.hash != prepared.tokenizer.hash


def test_large_vocabularies_take_four_bytes_a_token(own):
    tokenizer = dataclasses.replace(own.tokenizer, vocab_size=70_340, num_sentinels=70_000)
    wide, narrow = ready(dataclasses.replace(own, tokenizer=tokenizer)), ready(own)
    assert wide.manifest["dtype"] == "<u4"
    starts = np.arange(0, 7_000, 139)
    np.testing.assert_array_equal(wide.split("train").windows(starts, 50), narrow.split("train").windows(starts, 50))


# ---- Interruptions ----


def test_workers_write_the_same_bytes_as_one_process(own, tmp_path):
    alone = ready(own)
    together = ready(changed(own, num_workers=2, cache_directory=str(tmp_path / "two")))
    assert contents(alone.directory) == contents(together.directory)


def test_a_second_prepare_changes_nothing(own):
    store = ready(own)
    before = {path: path.stat().st_mtime_ns for path in store.directory.rglob("*")}
    began = time.monotonic()
    again = ready(own)
    assert time.monotonic() - began < 1
    assert again.directory == store.directory
    assert {path: path.stat().st_mtime_ns for path in store.directory.rglob("*")} == before


def prepare_elsewhere(config, tmp_path, *, shards: int | None = None) -> subprocess.Popen:
    """`prepare` in a separate process, in a new process group with its workers; it pauses after that many shards."""
    (tmp_path / "config.json").write_text(loader.to_json(config))
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
        "import sys, pathlib; from t5like.config import loader; from t5like.data.store import preparation\n"
        f"preparation.SMALLEST_SHARD = {SHARD}; "
        "preparation.prepare(loader.from_json(pathlib.Path(sys.argv[1]).read_text()))"
    )
    if shards is not None:  # each finished one advances the progress bar
        code = (
            f"import time; from t5like.metrics import progress; count = iter(range({shards - 1}))\n"
            "progress.Progress.update = lambda *_, **__: next(count, None) is None and time.sleep(60)\n" + code
        )
    command = [sys.executable, "-c", code, str(tmp_path / "config.json")]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True)


def processes_of_group(group: int) -> list[str]:
    processes = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        if int(fields[2]) == group and fields[0] != "Z":
            processes.append(stat.parent.name)
    return processes


@pytest.fixture(scope="module")
def long_text(tmp_path_factory) -> Path:
    """17 shards, so that at a signal some are finished, some in progress and some not started."""
    write(path := tmp_path_factory.mktemp("long") / "a.jsonl", lines(2500))
    return path


@pytest.fixture(scope="module")
def whole(long_text, model) -> TokenStore:
    """The store of the long text, made by one process without interruption."""
    return ready(config_of(long_text, model, long_text.parent / "prepared"))


@pytest.fixture
def longer(long_text, model, tmp_path) -> Config:
    """A config of the test's own for the long text."""
    return config_of(long_text, model, tmp_path / "prepared")


def wait_for_shards(directory: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(directory.glob("stores/*/pieces/[0-9]*.json"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(("workers", "signal_number"), [(1, signal.SIGKILL), (2, signal.SIGKILL), (2, signal.SIGINT)])
def test_after_a_kill_prepare_continues_to_the_same_bytes(longer, whole, tmp_path, workers, signal_number):
    process = prepare_elsewhere(changed(longer, num_workers=workers), tmp_path, shards=5)
    directory = Path(longer.data.cache_directory)
    wait_for_shards(directory, 5)
    if signal_number == signal.SIGINT:
        os.killpg(process.pid, signal_number)  # as a terminal does
    else:
        process.kill()
    process.wait(timeout=60)
    deadline = time.monotonic() + 20
    while processes_of_group(process.pid):  # workers end by themselves
        assert time.monotonic() < deadline
        time.sleep(0.02)
    done = {path: path.stat().st_mtime_ns for path in directory.glob("stores/*/pieces/[0-9]*.json")}
    assert not list(directory.glob("stores/*/manifest.json")) and 5 <= len(done) < len(whole.manifest["pieces"])
    store = ready(longer)
    assert contents(store.directory) == contents(whole.directory)
    assert {path: path.stat().st_mtime_ns for path in done} == done  # nothing was written twice


def test_two_processes_at_once_make_one_good_store(longer, whole, tmp_path):
    processes = [prepare_elsewhere(longer, tmp_path) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    store = ready(longer)
    store.verify()
    assert contents(store.directory) == contents(whole.directory)


def test_a_shard_without_its_record_is_written_again(own):
    store = ready(own)
    shards = store.directory / "pieces"
    good = contents(store.directory)
    (store.directory / "manifest.json").unlink()
    (shards / "00001.json").unlink()
    (shards / "00001.train.tokens").write_bytes(b"half of it")  # as a kill between two renames might leave older bytes
    (shards / "00002.train.tokens").write_bytes(b"")  # shorter than its record says
    (shards / "00077.json").write_text("{}")  # of another plan
    with pytest.raises(DataError, match="manifest.json can't be read"):
        TokenStore.open(store.directory)
    assert contents(ready(own).directory) == good


def test_shards_of_older_data_are_written_again(own, tmp_path):
    (ready(own).directory / "manifest.json").unlink()
    write(tmp_path / "a.jsonl", lines(750, seed=5))
    fresh = ready(changed(own, cache_directory=str(tmp_path / "fresh")))
    assert contents(ready(own).directory) == contents(fresh.directory)


# ---- Damage and change ----


def test_a_flipped_bit_is_detected_on_reading_and_a_short_file_on_opening(own):
    store = ready(own)
    path = store.directory / "pieces" / "00003.train.tokens"
    raw = bytearray(path.read_bytes())
    store.verify()
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"00003.train.tokens is damaged .* remove .* to prepare it again"):
        ready(own).verify()
    path.write_bytes(raw[:-2])
    with pytest.raises(DataError, match="00003.train.tokens has [0-9]+ bytes instead of"):
        ready(own)
    (store.directory / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="manifest.json is damaged"):
        ready(own)


@pytest.mark.parametrize("trained", [False, True])
def test_a_changed_source_is_refused_with_both_fixes(own, tmp_path, trained):
    if trained:
        own = dataclasses.replace(own, tokenizer=dataclasses.replace(own.tokenizer, path=""))
    before = ready(own)
    path = tmp_path / "a.jsonl"
    raw = path.read_bytes()
    path.write_bytes(raw + b'{"text": "one more"}\n')
    since = "a tokenizer was trained on it" if trained else "[0-9]+ tokens were prepared from it"
    with pytest.raises(DataError, match=f"has changed since {since}; restore the old data, or remove") as refused:
        ready(own)
    path.write_bytes(raw)
    assert ready(own).directory == before.directory
    path.write_bytes(raw + b'{"text": "one more"}\n')
    shutil.rmtree(re.search("or remove (.*) to prepare", str(refused.value))[1])
    assert ready(own).split("train").num_documents + ready(own).split("heldout").num_documents == 751


def test_a_store_works_without_its_source(own, tmp_path):
    own = dataclasses.replace(own, tokenizer=dataclasses.replace(own.tokenizer, path=""))
    before = prepare(own, progress=False)
    (tmp_path / "a.jsonl").unlink()
    after = prepare(own, progress=False)
    directory = before.stores[0].directory
    assert after.stores[0].directory == directory and before.notes == ()
    assert len(after.notes) == 1 and "no file matches" in after.notes[0] and str(directory) in after.notes[0]
    with pytest.raises(DataError, match="no file matches"):
        prepare(changed(own, heldout_fraction=0.2), progress=False)


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_data_stop_prepare_with_one_line_and_no_store(own, tmp_path, workers):
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"text": "half a pair \\ud800"}\n')
    with pytest.raises(DataError, match="a.jsonl:751: not valid JSON .a string has half of a surrogate") as refused:
        ready(changed(own, num_workers=workers))
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.glob("prepared/stores/*/manifest.json"))


def test_a_directory_that_can_t_be_written_is_one_line(own, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="data.cache_directory=.*/file can't be used: Not a directory"):
        ready(changed(own, cache_directory=str(tmp_path / "file")))


def test_the_smallest_corpus_holds_one_document_out(own, tmp_path):
    (tmp_path / "two.txt").write_text("the first\nthe second\n")
    config = changed(own, source=(f"text:{tmp_path}/two.txt",), text_documents="line", heldout_fraction=1e-6)
    store = ready(config)
    assert [store.split(split).num_documents for split in ("train", "heldout")] == [1, 1]
    with pytest.raises(DataError, match="data.heldout_fraction=1 leaves none of the 2 documents .* to train on"):
        ready(changed(config, heldout_fraction=1 - 1e-16))
    with pytest.raises(DataError, match="has only one document .* data.text_documents=line"):
        ready(changed(config, text_documents="file"))


# ---- Windows ----


@pytest.fixture(scope="module")
def store(tmp_path_factory, model):
    """Shards of few documents, so that windows cross many; one shard has no held-out document."""
    directory = tmp_path_factory.mktemp("store")
    texts = ["x" * 25_000 + str(i) if i % 9 == 4 else f"text {i}" for i in range(90)]
    write(directory / "a.jsonl", texts)
    config = loader.resolve(
        {
            "tokenizer": {"path": str(model), "vocab_size": 360, "num_sentinels": 20},
            "data": {
                "source": [f"jsonl:{directory}/a.jsonl"],
                "cache_directory": str(directory / "prepared"),
                "heldout_fraction": 0.2,
            },
        }
    )
    prepared = prepare(config, progress=False)
    return prepared.stores[0], prepared.tokenizer


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_windows_and_segments_equal_a_plain_concatenation(store, split):
    store, tokenizer = store
    stream = store.split(split)
    shards = sorted((store.directory / "pieces").glob(f"*.{split}.tokens"))
    whole = np.concatenate([np.fromfile(path, "<u2") for path in shards]).astype(np.int64)
    assert len(whole) == stream.num_tokens and len([path for path in shards if path.stat().st_size]) > 3
    borders = np.cumsum([path.stat().st_size // 2 for path in shards])
    starts = np.concatenate(
        [
            np.random.default_rng(0).integers(0, len(whole), 50),
            *(borders - k for k in (0, 1, 2, 9)),
            [0, len(whole) - 1, 5 * len(whole) + 3],
        ]
    )
    for length, starts_N in ((1, starts), (7, starts), (700, starts), (2 * len(whole) + 5, starts[-3:])):
        windows, segments = stream.windows(starts_N, length), stream.segments(starts_N, length)
        assert windows.dtype == segments.dtype == np.int32
        for start, window, segment in zip(starts_N, windows, segments, strict=True):
            expected = whole[(start + np.arange(length)) % len(whole)]
            np.testing.assert_array_equal(window, expected)
            ended = np.concatenate([[0], np.cumsum(expected == tokenizer.eos_id)[:-1]])
            np.testing.assert_array_equal(segment, 1 + ended)
    counts = np.bincount(whole, minlength=360)
    for opened in (store, TokenStore.open(store.directory)):  # counted, and cached
        np.testing.assert_array_equal(opened.split(split).token_counts(360), counts)
