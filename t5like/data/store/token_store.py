"""Tokens on disk, and windows of them by arithmetic: what `data.corpus` writes and `data.pipeline` reads.

A store is a directory: ``manifest.json``, written last, and ``pieces/``. Piece 7 holds a range of the source's
documents in these files, for each split (train, heldout): ``00007.train.tokens`` (little-endian uint16, or uint32 for
vocabularies above 65,536; every document ends in EOS) and ``00007.train.ends`` (uint64, the place after each document's
EOS). ``00007.hashes`` has a uint64 of each document's text, in both splits together; `data.statistics` counts
duplicates by them. ``00007.json`` says what is in these files and marks the piece as whole. The pieces of a split, in
order, are a `Stream`.

A store of supervised examples has a document for each; every part of it ends in EOS (inputs, targets, or the turns of
a conversation), and ``00007.train.targets`` (pairs of uint64) holds [start, stop) of each part that is learned.

A file is compared with its checksum when it is first read, once per process. Of a large store `data.verification` does
that with the training tokens, in the background.
"""

import contextlib
import hashlib
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
CHUNK = 2**22  # bytes that are read and hashed at a time


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_again(directory: Path) -> str:
    """What mends a damaged store."""
    return f"remove {directory}/manifest.json to prepare it again, which makes anew what is damaged"


class StoredFile(NamedTuple):
    """A file of a piece, and what it must hold.

    Attributes:
        kind: "tokens", "ends" or "targets".
        dtype: numpy's name for its numbers.
        below: all numbers are below this: the vocabulary, or, of places, one more than the piece's tokens.
    """

    path: Path
    kind: str
    dtype: str
    below: int
    sha256: str
    directory: Path  # of the store

    def verify(self) -> None:
        """Read the file and compare it with its checksum.

        Raises:
            DataError: it has other bytes than were written, or numbers that can't be; names it.
        """
        digest, largest, buffer = hashlib.sha256(), 0, bytearray(CHUNK)
        try:
            with open(self.path, "rb", buffering=0) as file:
                while size := file.readinto(buffer):
                    digest.update(memoryview(buffer)[:size])
                    numbers = np.frombuffer(buffer, self.dtype, size // np.dtype(self.dtype).itemsize)
                    largest = max(largest, int(numbers.max(initial=0)))
        except OSError as error:
            raise DataError(f"{self.path} can't be read: {error.strerror}; {read_again(self.directory)}") from None
        if digest.hexdigest() != self.sha256:
            raise DataError(f"{self.path} is damaged (sha256 differs); {read_again(self.directory)}")
        if largest >= self.below:
            what = f"ids beyond its vocabulary of {self.below}" if self.kind == "tokens" else "places outside its piece"
            raise DataError(f"{self.path} has {what}; remove {self.directory} to prepare it again")


def spread(starts_N: np.ndarray, lengths_N: np.ndarray) -> np.ndarray:
    """int64 [sum of the lengths]: the places of stretches behind each other; (7, 2), (1, 3) is 7 8 1 2 3."""
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
        """Open a store after a look at the size of each file; `verify` reads them.

        Raises:
            DataError: it is unfinished, of another version, or a file is missing or has another size.
        """
        directory = Path(directory)
        path = directory / "manifest.json"
        try:
            manifest = loads(path.read_bytes())
            if isinstance(manifest, dict) and (written := manifest.get("format")) != FORMAT:
                raise DataError(f"{directory} has the format {written!r}, not {FORMAT}; remove it to prepare it again")
            manifest = manifests.checked(manifest)
            for name, expected in _files(manifest):
                size = (directory / "pieces" / name).stat().st_size
                if size != expected["bytes"]:
                    raise DataError(
                        f"{directory}/pieces/{name} has {size} bytes instead of {expected['bytes']}; "
                        f"{read_again(directory)}"
                    )
        except OSError as error:
            raise DataError(f"{error.filename} can't be read: {error.strerror}; {read_again(directory)}") from None
        except ValueError as error:
            reason = error if isinstance(error, manifests.Inconsistent) else "it is no JSON"
            raise DataError(f"{path} is damaged: {reason}; {read_again(directory)}") from None
        return cls(directory, manifest)

    def verify(self) -> None:
        """Read everything and compare it with the checksums of the manifest.

        Raises:
            DataError: a file has other bytes than were written; names it.
        """
        for stream in self._streams.values():
            for file in stream.files():
                file.verify()

    def split(self, name: str) -> "Stream":
        """The stream of "train" or "heldout"."""
        return self._streams[name]


def _files(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for piece in manifest["pieces"]:
        yield from piece["files"].items()


class Stream:
    """The tokens of one split, as one endless row: after the last token comes the first again."""

    def __init__(self, directory: Path, manifest: dict[str, Any], split: str) -> None:
        self.num_tokens: int = manifest["splits"][split]["tokens"]
        self.num_documents: int = manifest["splits"][split]["documents"]
        self._directory, self._split = directory, split
        self._pieces = [piece for piece in manifest["pieces"] if piece["splits"][split]["tokens"]]
        pieces = self._pieces
        self._first = np.cumsum([0, *(piece["splits"][split]["tokens"] for piece in pieces)])  # of each shard; the end
        self._dtype, self._vocab_size = manifest["dtype"], manifest["vocab_size"]
        self._verified_elsewhere = False  # of tokens
        self._tokens: list[np.ndarray | None] = [None] * len(pieces)
        self._ends: list[np.ndarray | None] = [None] * len(pieces)
        self._counts_path = directory / f"token_counts.{split}.npy"

    @property
    def token_bytes(self) -> int:
        """The size of its tokens on disk."""
        return self.num_tokens * np.dtype(self._dtype).itemsize

    def files(self) -> Iterator[StoredFile]:
        """All its files."""
        for shard, piece in enumerate(self._pieces):
            for kind in ("tokens", "ends", "targets"):
                if f"{piece['number']:05d}.{self._split}.{kind}" in piece["files"]:
                    yield self._file(shard, kind)

    def verify(self) -> None:
        """Verify all tokens and ends now, so that they need not be when they are first read.

        Raises:
            DataError: a file is damaged; names it.
        """
        for shard in range(len(self._pieces)):
            self._shard_tokens(shard)
            self._shard_ends(shard)

    def leave_verifying(self) -> list[StoredFile]:
        """The files of tokens, which from now on are read without being verified: the caller does that."""
        self._verified_elsewhere = True
        return [file for file in self.files() if file.kind == "tokens"]

    def windows(self, starts_N: np.ndarray, length: int) -> np.ndarray:
        """int32 [N, length]: the tokens from each start on, which may be any number from 0 on."""
        out_NL = np.empty((len(starts_N), length), np.int32)
        for row, column, shard, place, count in self._spans(starts_N, length):
            out_NL[row, column : column + count] = self._shard_tokens(shard)[place : place + count]
        return out_NL

    def segments(self, starts_N: np.ndarray, length: int) -> np.ndarray:
        """int32 [N, length]: the number of each token's document inside its window, from 1.

        EOS belongs to the document that it ends:
            tokens    7 8 1 5 6 9 1 4
            segments  1 1 1 2 2 2 2 3
        """
        begins_NL = np.zeros((len(starts_N), length), np.int32)
        for row, column, shard, place, count in self._spans(starts_N, length):
            ends = self._shard_ends(shard)
            inside = ends[np.searchsorted(ends, place, "right") : np.searchsorted(ends, place + count, "left")]
            begins_NL[row, column + inside - place] = 1
            begins_NL[row, column] = 1  # the window's start or a shard's, and every shard starts a document
        return np.cumsum(begins_NL, axis=1, dtype=np.int32)

    def documents(self, places_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Begin and end, EOS not included, of the document at each place: int64 [N] each."""
        places_N = np.asarray(places_N, np.int64) % self.num_tokens
        shards_N = np.searchsorted(self._first, places_N, "right") - 1
        begin_N, end_N = np.zeros_like(places_N), np.zeros_like(places_N)
        for shard in np.unique(shards_N):
            mine, ends = shards_N == shard, self._shard_ends(shard)
            index = np.searchsorted(ends, places_N[mine] - self._first[shard], "right")
            end_N[mine] = self._first[shard] + ends[index] - 1
            begin_N[mine] = self._first[shard] + np.where(index > 0, ends[index - 1], 0)
        return begin_N, end_N

    def gather(self, starts_N: np.ndarray, lengths_N: np.ndarray) -> np.ndarray:
        """int32 [sum of the lengths]: stretches of tokens behind each other. A stretch lies inside one document.

        Fastest where starts ascend: then a shard's stretches stand together.
        """
        flat_T = np.empty(int(lengths_N.sum()), np.int32)
        shards_N = np.searchsorted(self._first, starts_N, "right") - 1
        ends_N = np.cumsum(lengths_N)
        changes = np.flatnonzero(np.diff(shards_N)) + 1
        for begin, end in zip([0, *changes], [*changes, len(starts_N)], strict=True):
            if begin < end:
                shard = int(shards_N[begin])
                places_T = spread(starts_N[begin:end] - self._first[shard], lengths_N[begin:end])
                flat_T[ends_N[begin] - lengths_N[begin] : ends_N[end - 1]] = self._shard_tokens(shard)[places_T]
        return flat_T

    def ends(self) -> np.ndarray:
        """int64 [documents]: the place after each document."""
        return np.concatenate(
            [first + self._shard_ends(s) for s, first in enumerate(self._first[:-1])] or [np.empty(0, np.int64)]
        )

    def targets(self) -> np.ndarray:
        """int64 [M, 2]: [start, stop) of every stretch that is learned, in order; of supervised examples only."""
        found = [first + self._map(s, "targets") for s, first in enumerate(self._first[:-1])]
        return np.concatenate(found or [np.empty(0, np.int64)]).reshape(-1, 2)

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """int64 [vocab_size]: how often each id occurs. Counted once, then kept in the store if it can be written."""
        try:
            counts = np.load(self._counts_path, allow_pickle=False)
            if counts.shape == (vocab_size,) and counts.dtype == np.int64 and counts.sum() == self.num_tokens:
                return counts
        except (OSError, ValueError, EOFError, MemoryError):
            pass  # not counted yet, or damaged
        counts = np.zeros(vocab_size, np.int64)
        for shard in range(len(self._pieces)):
            tokens = self._shard_tokens(shard)
            for start in range(0, len(tokens), 2**22):
                counts += np.bincount(tokens[start : start + 2**22], minlength=vocab_size)
        with contextlib.suppress(OSError), atomic_write(self._counts_path) as file:  # a store may be read-only
            np.save(file, counts)
        return counts

    def _spans(self, starts_N: np.ndarray, length: int) -> Iterator[tuple[int, int, int, int, int]]:
        """(row, column, shard, place in it, count) of the stretches that windows are made of."""
        starts_N = np.asarray(starts_N, np.int64) % self.num_tokens
        shards_N = np.searchsorted(self._first, starts_N, "right") - 1
        places_N = starts_N - self._first[shards_N]
        for row, (shard, place) in enumerate(zip(shards_N.tolist(), places_N.tolist(), strict=True)):
            column = 0
            while column < length:
                count = min(length - column, self._lengths[shard] - place)
                yield row, column, shard, place, count
                column, place = column + count, 0
                shard = (shard + 1) % len(self._pieces)

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

    def _file(self, shard: int, kind: str) -> StoredFile:
        piece, directory = self._pieces[shard], self._directory
        name = f"{piece['number']:05d}.{self._split}.{kind}"
        dtype = self._dtype if kind == "tokens" else "<i8"  # uint64 below 2**63; searchsorted wants one type
        below = self._vocab_size if kind == "tokens" else piece["splits"][self._split]["tokens"] + 1
        return StoredFile(directory / "pieces" / name, kind, dtype, below, piece["files"][name]["sha256"], directory)

    def _map(self, shard: int, kind: str) -> np.ndarray:
        """A file's numbers, verified."""
        file = self._file(shard, kind)
        if kind != "tokens" or not self._verified_elsewhere:
            file.verify()
        try:
            return np.asarray(np.memmap(file.path, file.dtype, "r"))  # asarray: a memmap is slow to slice
        except (OSError, ValueError) as error:  # it was there when the store was opened
            raise DataError(f"{file.path} can't be read: {error}; {read_again(self._directory)}") from None
