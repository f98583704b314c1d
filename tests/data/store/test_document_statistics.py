"""Statistics of documents and of held-out overlap agree with plain counts, also for samples of many shards."""

import math
import unicodedata
from collections import Counter

import numpy as np
import pytest
from conftest import smallest_flags, write_text

from t5like.config import loader
from t5like.data.store import document_statistics, heldout_overlap, preparation


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A store with many shards, whose documents are lines; some of them are near copies."""
    folder = tmp_path_factory.mktemp("shards")
    write_text(folder / "a.txt", lines=500)
    lines = (folder / "a.txt").read_text().splitlines()
    (folder / "a.txt").write_text(
        "\n".join([*lines, *(f"{line} ba \x01" for line in lines[:100]), "ЖЩЮ ЖЩЮ ЖЩЮ ЖЩЮ ЖЩЮ"])
    )
    overrides = [tuple(flag.removeprefix("--config.").split("=", 1)) for flag in smallest_flags(folder)[1:]]
    config = loader.load("tiny", [*overrides, ("tokenizer.character_coverage", "0.99")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "SMALLEST_SHARD", 2**11)
        result = preparation.prepare(config, progress=False)
    assert len(result.stores[0].manifest["pieces"]) > 20
    return result


def documents(stream):
    """The token ids of each document, without EOS."""
    ends = stream.ends()
    tokens = stream.windows(np.array([0]), stream.num_tokens)[0]
    return [part[:-1] for part in np.split(tokens, ends[:-1])]


def test_ranges_are_those_of_all_documents_or_of_a_sample_from_all_shards(prepared, monkeypatch):
    stream = prepared.stores[0].split("train")
    ends = stream.ends()
    expected = np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)
    assert np.array_equal(document_statistics.document_ranges(stream, 10_000), expected)
    monkeypatch.setattr(document_statistics, "MOST_SHARDS", 8)
    few = document_statistics.document_ranges(stream, 40)
    assert 30 <= len(few) <= 48 and set(map(tuple, few.tolist())) <= set(map(tuple, expected.tolist()))
    assert few[0, 0] == 0 and few[-1, 1] == stream.num_tokens


def test_statistics_agree_with_plain_counts(prepared):
    stream, tokenizer = prepared.stores[0].split("train"), prepared.tokenizer
    texts = [tokenizer.decode(ids.tolist()) for ids in documents(stream)]
    lengths = [len(ids) for ids in documents(stream)]
    found = document_statistics.describe(stream, tokenizer)
    assert found["lengths"]["longest"] == max(lengths) == found["longest"][0]["tokens"]
    assert found["lengths"]["median"] == np.median(lengths)
    for low, high, count in found["lengths"]["histogram"]:
        assert count == sum(low <= length <= high for length in lengths)
    assert found["characters_per_token"] == pytest.approx(sum(map(len, texts)) / sum(lengths))
    assert found["control"]["documents"] == sum("\x01" in text for text in texts) > 50
    counts = Counter("".join(texts))
    nats = lambda text: sum(-math.log(counts[char] / counts.total()) for char in text) / len(text)
    oddest = max((text for text in texts if len(text) >= document_statistics.SHORTEST_ODD), key=nats)
    assert found["oddest"][0]["text"] == oddest[:80]
    assert found["oddest"][0]["nats_per_character"] == pytest.approx(nats(oddest))
    letters = Counter(unicodedata.name(char).split()[0].capitalize() for char in "".join(texts) if char.isalpha())
    assert {each["name"]: round(each["share"] * letters.total()) for each in found["scripts"]} == dict(letters)
    in_bytes = {each["name"]: each["in_bytes"] for each in found["scripts"]}
    assert in_bytes["Cyrillic"] == 1.0 and in_bytes["Latin"] < 0.01


def test_held_out_runs_of_tokens_are_found_in_the_training_text(prepared, monkeypatch):
    heldout, train = (prepared.stores[0].split(name) for name in ("heldout", "train"))
    runs = lambda ids: [tuple(ids[start : start + 13].tolist()) for start in range(len(ids) - 12)]
    known = set(runs(train.windows(np.array([0]), train.num_tokens)[0]))
    shares = [np.mean([run in known for run in runs(ids)]) for ids in documents(heldout) if len(ids) >= 13]
    monkeypatch.setattr(heldout_overlap, "CHUNK", 1000)
    found = heldout_overlap.measure(heldout, [train], prepared.tokenizer)
    assert found["documents"] == len(shares) and found["copied"] == sum(share >= 0.5 for share in shares) > 3
    assert 0 < found["copied"] < found["documents"] and found["searched"] >= train.num_tokens
    monkeypatch.setattr(heldout_overlap, "MOST_TOKENS", 3000)
    part = heldout_overlap.measure(heldout, [train], prepared.tokenizer)
    assert part["searched"] == 3000 and part["found"] < found["found"]
