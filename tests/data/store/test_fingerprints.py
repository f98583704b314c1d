"""What identifies the data of a run, and how a difference is shown."""

from pathlib import Path

from t5like.data.store import fingerprints
from t5like.data.store.token_store import TokenStore


def test_a_store_is_described_by_its_size_and_the_checksums_of_its_files(trained, texts):
    [directory] = [path for path in Path(texts / "prepared" / "stores").iterdir() if path.name.startswith("a")]
    store = TokenStore.open(directory)
    description = fingerprints.describe(["text:a.txt"], [store])
    splits = [store.split(name) for name in ("train", "heldout")]
    documents, tokens = sum(split.num_documents for split in splits), sum(split.num_tokens for split in splits)
    checksum = fingerprints.fingerprint(fingerprints.shard_checksums(store))
    assert documents == 600 and description == {"text:a.txt": f"600 documents, {tokens:,} tokens, {checksum}"}
    store.manifest["pieces"][0]["files"]["00000.train.tokens"]["sha256"] = "0" * 64
    assert fingerprints.describe(["text:a.txt"], [store]) != description


def test_a_difference_names_the_source_and_both_sizes():
    old = {"text:a": "600 documents, 9,000 tokens, 1f2e", "text:b": "3 documents, 70 tokens, 77aa"}
    new = old | {"text:a": "601 documents, 9,020 tokens, 9c9c"}
    assert fingerprints.data_differences(old, old) == [] == fingerprints.data_differences({}, new)
    assert fingerprints.data_differences(old, new) == [
        "text:a: 600 documents, 9,000 tokens, 1f2e -> 601 documents, 9,020 tokens, 9c9c"
    ]
