"""The manifest of a token store (`manifest.json`): the records of its shards, their sums, and the checks on reading.

A shard's record is ``{"number", "fingerprint", "splits": {split: COUNTS}, "files": {name: {"bytes", "sha256"}}}``. The
manifest lists all records under the key ``pieces``, with their sums and a checksum of the manifest itself. Stores of
earlier versions have no checksum, only the first two counts, and no document hashes; the rules for counts and file
sizes still hold for them.

Called by `shards`, `preparation` and `token_store`.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

SPLITS = ("train", "heldout")
COUNTS = ("documents", "tokens", "bytes", "unknown", "byte_fallback")  # of a split; see `data.statistics`
HASH_BYTES = 8  # of a document's hash
ITEM_BYTES = {"ends": 8, "targets": 16}  # of a document's end, and of the range of one target


class Inconsistent(ValueError):
    """A manifest or a record contradicts itself; the message says where."""


def token_dtype(vocab_size: int) -> str:
    """The smallest integer type on disk that holds every id."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


def add_checksum(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with its checksum."""
    return {**manifest, "sha256": _sha256(manifest)}


def sum_counts(records: Sequence[dict[str, Any]], split: str) -> dict[str, int]:
    """The counts of a split, summed over all shards; a count that any shard lacks is left out."""
    parts = [record["splits"][split] for record in records]
    return {name: sum(part[name] for part in parts) for name in COUNTS if all(name in part for part in parts)}


def check_manifest(manifest: Any) -> dict[str, Any]:
    """Return the manifest if it is consistent.

    Raises:
        Inconsistent: the checksum differs, or a field is missing, has a wrong type, or contradicts another field.
    """
    if not isinstance(manifest, dict):
        raise Inconsistent("it is not a JSON object")
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    if manifest.get("sha256", _sha256(rest)) != _sha256(rest):
        raise Inconsistent("its checksum does not match")
    vocab_size, records, splits = (manifest.get(key) for key in ("vocab_size", "pieces", "splits"))
    if type(vocab_size) is not int or vocab_size < 1 or manifest.get("dtype") != token_dtype(vocab_size):
        raise Inconsistent("vocab_size and dtype do not fit together")
    if not all(isinstance(manifest.get(key), str) for key in ("fingerprint", "tokenizer")):
        raise Inconsistent("fingerprint and tokenizer must be strings")
    if not isinstance(records, list):
        raise Inconsistent("pieces must be a list")
    targets = "empty" in manifest  # of supervised examples
    for number, record in enumerate(records):
        check_record(record, number, vocab_size, targets=targets)
    if splits != {split: sum_counts(records, split) for split in SPLITS}:
        raise Inconsistent("splits are not the sums of the shards")
    return manifest


def check_record(record: Any, number: int, vocab_size: int, *, targets: bool) -> None:
    """Refuse an inconsistent record of a shard.

    Args:
        number: the shard's number.
        vocab_size: of the tokenizer; decides the size of a token on disk.
        targets: whether the store holds supervised examples, whose shards have files of target ranges.

    Raises:
        Inconsistent: see `check_manifest`.
    """
    shard = f"shard {number}"
    if not isinstance(record, dict) or record.get("number") != number or type(record["number"]) is not int:
        raise Inconsistent(f"{shard} is missing or has another number")
    splits, files = record.get("splits"), record.get("files")
    contents = ("tokens", "ends", "targets") if targets else ("tokens", "ends")
    hashes = f"{number:05d}.hashes"
    names = {f"{number:05d}.{split}.{content}" for split in SPLITS for content in contents}
    if not isinstance(files, dict) or set(files) - {hashes} != names:
        raise Inconsistent(f"{shard} does not name its files")
    if not isinstance(splits, dict) or not isinstance(record.get("fingerprint"), str):
        raise Inconsistent(f"{shard} has no splits or no fingerprint")
    if targets and type(record.get("empty")) is not int:
        raise Inconsistent(f"{shard} does not count its empty examples")
    token_bytes = 2 if token_dtype(vocab_size) == "<u2" else 4
    sizes = {}
    for split in SPLITS:
        counts = splits.get(split)
        if not isinstance(counts, dict) or any(type(count) is not int or count < 0 for count in counts.values()):
            raise Inconsistent(f"{shard} has impossible counts")
        documents, tokens = counts.get("documents", -1), counts.get("tokens", -1)
        if not 0 <= documents <= tokens <= documents * 2**62:
            raise Inconsistent(f"{shard} has impossible counts")
        sizes[f"{number:05d}.{split}.tokens"] = tokens * token_bytes
        sizes[f"{number:05d}.{split}.ends"] = documents * ITEM_BYTES["ends"]
    sizes[hashes] = sum(splits[split]["documents"] for split in SPLITS) * HASH_BYTES
    for name, file in files.items():
        size = file.get("bytes") if isinstance(file, dict) else None
        if type(size) is not int or size != sizes.get(name, size) or (name.endswith(".targets") and size % 16):
            raise Inconsistent(f"{shard} has counts that do not fit the sizes of its files")
        if not isinstance(file.get("sha256"), str) or not re.fullmatch("[0-9a-f]{64}", file["sha256"]):
            raise Inconsistent(f"{shard} has a file without a sha256")


def _sha256(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
