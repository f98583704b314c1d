"""Fingerprints of token stores, and how the data of a run differ from those that it was trained on.

A fingerprint is the first 12 hex digits of a sha256 of the checksums in a store's manifest, so no tokens are read.
Each checkpoint contains those of its run's stores. They, the config and the hash of the tokenizer, which a checkpoint
contains as well, decide all batches. Called by `provenance` and `train.initial_state`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from t5like.data.store.token_store import SPLITS, TokenStore


def fingerprint(value: Any) -> str:
    """Return 12 hex digits that identify a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def shard_checksums(store: TokenStore, splits: Sequence[str] = SPLITS) -> dict[str, str]:
    """Return the sha256 of each file of a token store, by name, from its manifest."""
    return {
        name: file["sha256"]
        for piece in store.manifest["pieces"]
        for name, file in piece["files"].items()
        if name.split(".")[1] in splits
    }


def describe(sources: Sequence[str], stores: Sequence[TokenStore]) -> dict[str, str]:
    """Return a text that identifies the training and held-out data of each source, as in `data_differences`."""

    def text(store: TokenStore) -> str:
        splits = [store.split(split) for split in SPLITS]
        documents, tokens = (sum(getattr(split, f"num_{unit}") for split in splits) for unit in ("documents", "tokens"))
        return f"{documents:,} documents, {tokens:,} tokens, {fingerprint(shard_checksums(store))}"

    return {source: text(store) for source, store in zip(sources, stores, strict=True)}


def data_differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Return the sources whose data differ: ``text:a.txt: 600 documents, 9,000 tokens, 1f2e... -> 601 documents, ...``.

    Sources that `old` does not have are not compared: earlier versions saved no fingerprints.
    """
    return [f"{source}: {was} -> {new.get(source, 'none')}" for source, was in old.items() if new.get(source) != was]
