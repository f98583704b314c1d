"""What identifies the data of a run, and how a difference is shown."""

from t5like.data.store import fingerprints
from t5like.data.store.token_store import SPLITS, TokenStore


def test_a_store_is_described_by_its_size_and_the_checksums_of_its_files(trained, texts):
    stores = [TokenStore.open(path.parent) for path in (texts / "prepared").rglob("manifest.json")]
    store = next(store for store in stores if sum(store.split(name).num_documents for name in SPLITS) == 600)  # a.txt
    description = fingerprints.describe(["text:a.txt"], [store])
    tokens = sum(store.split(name).num_tokens for name in SPLITS)
    checksum = fingerprints.fingerprint(fingerprints.shard_checksums(store))
    assert description == {"text:a.txt": f"600 documents, {tokens:,} tokens, {checksum}"}
    store.manifest["pieces"][0]["files"]["00000.train.tokens"]["sha256"] = "0" * 64
    assert fingerprints.describe(["text:a.txt"], [store]) != description


def test_a_difference_names_the_source_and_both_sizes():
    old = {"text:a": "600 documents, 9,000 tokens, 1f2e", "text:b": "3 documents, 70 tokens, 77aa"}
    new = old | {"text:a": "601 documents, 9,020 tokens, 9c9c"}
    assert fingerprints.data_differences(old, old) == [] == fingerprints.data_differences({}, new)
    assert fingerprints.data_differences(old, new) == [
        "text:a: 600 documents, 9,000 tokens, 1f2e -> 601 documents, 9,020 tokens, 9c9c"
    ]
