"""The token store: token ids on disk, and windows of them by arithmetic. Written by `preparation`, read by `pipeline`.

A store is a directory with ``manifest.json``, which is written last, and the folder ``pieces/``, which holds the
shards. Shard 7 has a range of the source's documents in these files, for each split (train, heldout):

    00007.train.tokens     uint16, or uint32 for vocabularies above 65,536, little-endian; every document ends in EOS
    00007.train.ends       uint64: the offset after each document's EOS
    00007.train.targets    supervised examples only; pairs of uint64: [start, stop) of each target
    00007.hashes           uint64: a hash of each document's text, of both splits; `statistics` counts duplicates by it
    00007.json             the shard's record (see `manifest`); written last, it marks the shard as complete

A document of a supervised store is one example; each of its parts (inputs, targets, or the turns of a conversation)
ends in EOS. The shards of a split, in order, form a `Stream`.

The checksum of a file is verified on first read, once per process. `verification` does that in the background for the
training tokens of a large store.
"""

import contextlib
import hashlib
import tokenize
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from t5like.data.store import manifest as manifests
from t5like.data.store.manifest import SPLITS
from t5like.errors import DataError
from t5like.io.atomic import atomic_write
from t5like.io.strict_json import loads

FORMAT = 1  # of the store; part of its key
SHARDS_FOLDER = "pieces"
CHUNK = 2**22  # bytes that are read and hashed at a time


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def repair_advice(directory: Path) -> str:
    """The end of a message about a damaged store."""
    return f"remove {directory}/manifest.json to prepare it again, which rewrites the damaged shards"


class StoredFile(NamedTuple):
    """A file of a shard, with what is needed to verify it.

    Attributes:
        content: "tokens", "ends" or "targets".
        dtype: of its numbers, in numpy's notation.
        below: exclusive upper bound of its numbers: the vocabulary size, or one more than the shard's tokens.
        directory: the store.
    """

    path: Path
    content: str
    dtype: str
    below: int
    sha256: str
    directory: Path

    def verify(self) -> None:
        """Read the file and compare it with its checksum.

        Raises:
            DataError: the checksum differs, or a number is out of range; names the file.
        """
        digest, largest, buffer = hashlib.sha256(), 0, bytearray(CHUNK)
        try:
            with open(self.path, "rb", buffering=0) as file:
                while size := file.readinto(buffer):
                    digest.update(memoryview(buffer)[:size])
                    numbers = np.frombuffer(buffer, self.dtype, size // np.dtype(self.dtype).itemsize)
                    largest = max(largest, int(numbers.max(initial=0)))
        except OSError as error:
            raise DataError(f"{self.path} can't be read: {error.strerror}; {repair_advice(self.directory)}") from None
        if digest.hexdigest() != self.sha256:
            raise DataError(f"{self.path} is damaged (sha256 differs); {repair_advice(self.directory)}")
        if largest >= self.below:
            what = (
                f"ids beyond its vocabulary of {self.below}" if self.content == "tokens" else "offsets beyond its shard"
            )
            raise DataError(f"{self.path} has {what}; remove {self.directory} to prepare it again")


def concatenate_ranges(starts_N: np.ndarray, lengths_N: np.ndarray) -> np.ndarray:
    """int64 [sum of the lengths]: the indices of all ranges in order; starts 7 1 with lengths 2 3 give 7 8 1 2 3."""
    before_N = np.cumsum(lengths_N) - lengths_N
    return np.repeat(starts_N - before_N, lengths_N) + np.arange(int(lengths_N.sum()))


class TokenStore:
    """A finished store."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.manifest = manifest
        self._streams = {split: Stream(directory, manifest, split) for split in SPLITS}

    @classmethod
    def open(cls, directory: str | Path) -> "TokenStore":
        """Open a store; checks the manifest and the size of each file, but reads no tokens (see `verify`).

        Raises:
            DataError: the store is incomplete or has another format, or a file is missing or has another size.
        """
        directory = Path(directory)
        path = directory / "manifest.json"
        try:
            manifest = loads(path.read_bytes())
            if isinstance(manifest, dict) and (written := manifest.get("format")) != FORMAT:
                raise DataError(f"{directory} has the format {written!r}, not {FORMAT}; remove it to prepare it again")
            manifest = manifests.check_manifest(manifest)
            for name, expected in _files(manifest):
                size = (directory / SHARDS_FOLDER / name).stat().st_size
                if size != expected["bytes"]:
                    raise DataError(
                        f"{directory}/{SHARDS_FOLDER}/{name} has {size} bytes instead of {expected['bytes']}; "
                        f"{repair_advice(directory)}"
                    )
        except OSError as error:
            raise DataError(f"{error.filename} can't be read: {error.strerror}; {repair_advice(directory)}") from None
        except ValueError as error:
            reason = error if isinstance(error, manifests.Inconsistent) else "it is not JSON"
            raise DataError(f"{path} is damaged: {reason}; {repair_advice(directory)}") from None
        return cls(directory, manifest)

    def verify(self) -> None:
        """Verify all files of tokens, ends and targets.

        Raises:
            DataError: a file is damaged; names it.
        """
        for stream in self._streams.values():
            for file in stream.files():
                file.verify()

    def split(self, name: str) -> "Stream":
        """The stream of "train" or "heldout"."""
        return self._streams[name]


def _files(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for record in manifest["pieces"]:
        yield from record["files"].items()


class Stream:
    """The tokens of one split as a circular sequence: the first token follows the last.

    Offsets count tokens from the first of the split.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], split: str) -> None:
        self.num_tokens: int = manifest["splits"][split]["tokens"]
        self.num_documents: int = manifest["splits"][split]["documents"]
        self._directory, self._split = directory, split
        self._records = [record for record in manifest["pieces"] if record["splits"][split]["tokens"]]
        lengths = [record["splits"][split]["tokens"] for record in self._records]
        self._first = np.cumsum([0, *lengths])  # offset of each shard, and the number of tokens
        self._dtype, self._vocab_size = manifest["dtype"], manifest["vocab_size"]
        self._verification_deferred = False  # of the tokens
        self._tokens: list[np.ndarray | None] = [None] * len(lengths)
        self._ends: list[np.ndarray | None] = [None] * len(lengths)
        self.labelled: bool = "label_objective" in manifest  # its targets are labels (`label_numbers`), not token ids
        self._counts_path = directory / f"token_counts.{split}.npy"

    @property
    def token_bytes(self) -> int:
        """Size of the tokens on disk."""
        return self.num_tokens * np.dtype(self._dtype).itemsize

    def files(self) -> Iterator[StoredFile]:
        """All files of the split."""
        for shard, record in enumerate(self._records):
            for content in ("tokens", "ends", "targets"):
                if f"{record['number']:05d}.{self._split}.{content}" in record["files"]:
                    yield self._file(shard, content)

    def verify(self) -> None:
        """Verify all tokens and ends now instead of on first read.

        Raises:
            DataError: a file is damaged; names it.
        """
        for shard in range(len(self._records)):
            self._shard_tokens(shard)
            self._shard_ends(shard)

    def defer_verification(self) -> list[StoredFile]:
        """Read tokens without verification from now on; returns the files of tokens, which the caller verifies."""
        self._verification_deferred = True
        return [file for file in self.files() if file.content == "tokens"]

    def windows(self, starts_N: np.ndarray, length: int) -> np.ndarray:
        """int32 [N, length]: windows of tokens from each start offset, which may be any non-negative number."""
        out_NL = np.empty((len(starts_N), length), np.int32)
        for row, column, shard, offset, count in self._spans(starts_N, length):
            out_NL[row, column : column + count] = self._shard_tokens(shard)[offset : offset + count]
        return out_NL

    def segments(self, starts_N: np.ndarray, length: int) -> np.ndarray:
        """int32 [N, length]: for each token of a window, the number of its document inside the window, from 1.

        EOS belongs to the document that it ends:
            tokens    7 8 1 5 6 9 1 4
            segments  1 1 1 2 2 2 2 3
        """
        begins_NL = np.zeros((len(starts_N), length), np.int32)
        for row, column, shard, offset, count in self._spans(starts_N, length):
            ends = self._shard_ends(shard)
            inside = ends[np.searchsorted(ends, offset, "right") : np.searchsorted(ends, offset + count, "left")]
            begins_NL[row, column + inside - offset] = 1
            begins_NL[row, column] = 1  # the start of the window, or of a shard, which always starts a document
        return np.cumsum(begins_NL, axis=1, dtype=np.int32)

    def documents(self, offsets_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Begin and end, EOS excluded, of the document at each offset: int64 [N] each."""
        offsets_N = np.asarray(offsets_N, np.int64) % self.num_tokens
        shards_N = np.searchsorted(self._first, offsets_N, "right") - 1
        begin_N, end_N = np.zeros_like(offsets_N), np.zeros_like(offsets_N)
        for shard in np.unique(shards_N):
            in_shard_N, ends = shards_N == shard, self._shard_ends(shard)
            index = np.searchsorted(ends, offsets_N[in_shard_N] - self._first[shard], "right")
            end_N[in_shard_N] = self._first[shard] + ends[index] - 1
            begin_N[in_shard_N] = self._first[shard] + np.where(index > 0, ends[index - 1], 0)
        return begin_N, end_N

    def gather(self, starts_N: np.ndarray, lengths_N: np.ndarray) -> np.ndarray:
        """int32 [sum of the lengths]: the tokens of all ranges in order. A range lies inside one document.

        Fastest if starts ascend, because each shard is then accessed once.
        """
        flat_T = np.empty(int(lengths_N.sum()), np.int32)
        shards_N = np.searchsorted(self._first, starts_N, "right") - 1
        ends_N = np.cumsum(lengths_N)
        changes = np.flatnonzero(np.diff(shards_N)) + 1
        for begin, end in zip([0, *changes], [*changes, len(starts_N)], strict=True):
            if begin < end:
                shard = int(shards_N[begin])
                offsets_T = concatenate_ranges(starts_N[begin:end] - self._first[shard], lengths_N[begin:end])
                flat_T[ends_N[begin] - lengths_N[begin] : ends_N[end - 1]] = self._shard_tokens(shard)[offsets_T]
        return flat_T

    def ends(self) -> np.ndarray:
        """int64 [documents]: the offset after each document."""
        return np.concatenate(
            [first + self._shard_ends(s) for s, first in enumerate(self._first[:-1])] or [np.empty(0, np.int64)]
        )

    def target_ranges(self) -> np.ndarray:
        """int64 [M, 2]: offsets [start, stop) of every target, in order; only for supervised examples."""
        offsets = [first + self._map(s, "targets") for s, first in enumerate(self._first[:-1])]
        return np.concatenate(offsets or [np.empty(0, np.int64)]).reshape(-1, 2)

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """int64 [vocab_size]: how often each id occurs. Counted once, then cached in the store if it is writable."""
        try:
            counts = np.load(self._counts_path, allow_pickle=False)
            if counts.shape == (vocab_size,) and counts.dtype == np.int64 and counts.sum() == self.num_tokens:
                return counts
        except (OSError, ValueError, EOFError, MemoryError, tokenize.TokenError):  # the header is a Python expression
            pass  # not counted yet, or damaged
        counts = np.zeros(vocab_size, np.int64)
        for shard in range(len(self._records)):
            tokens = self._shard_tokens(shard)
            for start in range(0, len(tokens), 2**22):
                counts += np.bincount(tokens[start : start + 2**22], minlength=vocab_size)
        with contextlib.suppress(OSError), atomic_write(self._counts_path) as file:  # a store may be read-only
            np.save(file, counts)
        return counts

    def _spans(self, starts_N: np.ndarray, length: int) -> Iterator[tuple[int, int, int, int, int]]:
        """The parts of windows that lie in one shard: (row, column, shard, offset in the shard, number of tokens)."""
        starts_N = np.asarray(starts_N, np.int64) % self.num_tokens
        shards_N = np.searchsorted(self._first, starts_N, "right") - 1
        offsets_N = starts_N - self._first[shards_N]
        for row, (shard, offset) in enumerate(zip(shards_N.tolist(), offsets_N.tolist(), strict=True)):
            column = 0
            while column < length:
                count = min(length - column, self._lengths[shard] - offset)
                yield row, column, shard, offset, count
                column, offset = column + count, 0
                shard = (shard + 1) % len(self._records)

    @cached_property
    def _lengths(self) -> list[int]:
        return np.diff(self._first).tolist()

    def _shard_tokens(self, shard: int) -> np.ndarray:
        if self._tokens[shard] is None:
            self._tokens[shard] = self._map(shard, "tokens")
        return self._tokens[shard]

    def _shard_ends(self, shard: int) -> np.ndarray:
        if self._ends[shard] is None:
            self._ends[shard] = self._map(shard, "ends")
        return self._ends[shard]

    def _file(self, shard: int, content: str) -> StoredFile:
        record, directory = self._records[shard], self._directory
        name = f"{record['number']:05d}.{self._split}.{content}"
        dtype = self._dtype if content == "tokens" else "<i8"  # uint64 below 2**63; searchsorted needs equal types
        below = self._vocab_size if content == "tokens" else record["splits"][self._split]["tokens"] + 1
        path = directory / SHARDS_FOLDER / name
        return StoredFile(path, content, dtype, below, record["files"][name]["sha256"], directory)

    def _map(self, shard: int, content: str) -> np.ndarray:
        """Memory-map a file, verified."""
        file = self._file(shard, content)
        if content != "tokens" or not self._verification_deferred:
            file.verify()
        try:
            return np.asarray(np.memmap(file.path, file.dtype, "r"))  # asarray: a memmap is slow to slice
        except (OSError, ValueError) as error:  # removed after the store was opened
            raise DataError(f"{file.path} can't be read: {error}; {repair_advice(self._directory)}") from None
