"""Statistics of the documents of a split: lengths, characters, scripts, copies, and the longest and oddest documents.

`statistics` has the counts that are made while a store is prepared. These here are counted from the finished store, in
bounded time and memory: the lengths of at most `MOST_LENGTHS` documents, and the text of at most `MOST_TEXTS` of them,
both spread evenly over the split. Called by `inspect.data`.
"""

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from t5like.data.store.token_store import Stream
from t5like.data.tokenizers.tokenizer import Tokenizer

MOST_LENGTHS = 2_000_000  # documents
MOST_SHARDS = 64  # of a split with more documents
MOST_TEXTS = 1_000  # documents that are decoded
LONGEST_TEXT = 2_048  # tokens of a document that are decoded
EXTREMES = 10  # longest and oddest documents that are shown
SHORTEST_ODD = 20  # characters; the mean over fewer says little
EXCERPT = 80  # characters
PARTIAL = "\ufffd"  # what bytes decode to that are no character, or a part of one
REPLACEMENTS = f"{PARTIAL}\ufeff"  # and a byte order mark inside of a text

Document = dict[str, Any]


def describe(stream: Stream, tokenizer: Tokenizer, show: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
    """Statistics of a split as JSON values. Lengths are tokens without EOS; shares are from 0 to 1.

    Args:
        stream: one split.
        tokenizer: of the store.
        show: called with the number of documents that have been decoded.

    Returns:
        ``documents`` and ``tokens`` of the split, ``measured`` and ``decoded`` documents; ``lengths``: median, mean,
        longest and ``histogram``, a list of (shortest, longest, documents); ``characters_per_token``;
        ``control``: documents with control characters, and these; ``scripts``: share of the letters and how many of
        them are in bytes; ``copies``: how often the most frequent text occurs among the decoded ones; ``longest``,
        ``oddest``.
    """
    ranges_N2 = document_ranges(stream, MOST_LENGTHS)
    lengths_N = ranges_N2[:, 1] - ranges_N2[:, 0] - 1
    texts = _Texts(tokenizer)
    for number, (begin, end) in enumerate(_spread(ranges_N2, MOST_TEXTS), start=1):
        length = int(end - begin) - 1
        ids = stream.gather(np.array([begin]), np.array([min(length, LONGEST_TEXT)]))
        texts.add(int(begin), ids, cut=length > LONGEST_TEXT)
        show(number)
    longest = np.argsort(-lengths_N, kind="stable")[:EXTREMES]
    return {
        "documents": stream.num_documents,
        "tokens": stream.num_tokens,
        "measured": len(lengths_N),
        "decoded": texts.count,
        "lengths": {
            "median": float(np.median(lengths_N)) if len(lengths_N) else 0.0,
            "mean": float(lengths_N.mean()) if len(lengths_N) else 0.0,
            "longest": int(lengths_N.max(initial=0)),
            "histogram": histogram(lengths_N),
        },
        **texts.summary(),
        "longest": [
            {
                "offset": int(ranges_N2[index, 0]),
                "tokens": int(lengths_N[index]),
                "text": texts.excerpt(
                    stream.gather(ranges_N2[index, :1], np.minimum(lengths_N[index : index + 1], EXCERPT))
                ),
            }
            for index in longest
        ],
    }


def document_ranges(stream: Stream, most: int) -> np.ndarray:
    """int64 [N, 2]: begin and end, EOS included, of documents; all of them, or `most` that are spread over the shards.

    Raises:
        DataError: a file of document ends is damaged.
    """
    files = list(stream.files())
    ends = [file for file in files if file.content == "ends"]
    tokens = [file for file in files if file.content == "tokens"]
    targets = [file for file in files if file.content == "targets"]
    sizes = [file.path.stat().st_size // np.dtype(file.dtype).itemsize for file in tokens]
    first = np.cumsum([0, *sizes])
    chosen = range(len(ends))
    if stream.num_documents > most and len(ends) > MOST_SHARDS:
        chosen = np.linspace(0, len(ends) - 1, MOST_SHARDS).astype(int).tolist()
    share = min(1.0, most / max(sum(ends[shard].path.stat().st_size // 8 for shard in chosen), 1))
    ranges = [np.empty((0, 2), np.int64)]
    for shard in chosen:
        ends[shard].verify()
        end_N = np.fromfile(ends[shard].path, ends[shard].dtype)
        begin_N = np.concatenate([[0], end_N[:-1]])
        if stream.labelled:  # the text ends where the label begins
            end_N = np.fromfile(targets[shard].path, targets[shard].dtype).reshape(-1, 2)[:, 0]
        ranges.append(_spread(np.stack([begin_N, end_N], axis=1), math.ceil(share * len(end_N))) + first[shard])
    return np.concatenate(ranges)


def histogram(lengths_N: np.ndarray) -> list[tuple[int, int, int]]:
    """Counts of lengths from 0, from 1, from 2 to 3, from 4 to 7, ...: (shortest, longest, documents) of each bin."""
    if not len(lengths_N):
        return []
    edges = [0, *(2**power for power in range(int(lengths_N.max()).bit_length() + 1))]
    counts, _ = np.histogram(lengths_N, [*edges[:-1], max(edges[-1], 1)])
    bins = [
        (low, high - 1, int(count)) for low, high, count in zip(edges[:-1], edges[1:], counts.tolist(), strict=True)
    ]
    while len(bins) > 1 and not bins[0][2]:
        bins.pop(0)
    return bins


def _spread(rows: np.ndarray, most: int) -> np.ndarray:
    """At most `most` rows at even distances."""
    if len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]


class _Texts:
    """Sums over decoded documents."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self.count, self._tokens = tokenizer, 0, 0
        self._byte_of = {
            token: int(tokenizer.name(token)[3:5], 16) for token in np.flatnonzero(tokenizer.byte_fallback_V).tolist()
        }
        self._characters: Counter[str] = Counter()
        self._in_bytes: Counter[str] = Counter()
        self._with_control: Counter[str] = Counter()  # documents
        self._num_control = 0
        self._by_text: Counter[bytes] = Counter()
        self._documents: list[tuple[int, int, str, Counter[str]]] = []

    def add(self, offset: int, ids: np.ndarray, *, cut: bool) -> None:
        """Count a document, which begins at `offset` of the split; `cut`: it goes on, maybe inside of a character."""
        text = self._tokenizer.decode(ids.tolist())
        text = text.rstrip(PARTIAL) if cut else text
        counts = Counter(text)
        self.count += 1
        self._tokens += len(ids)
        self._characters += counts
        for run in self._byte_runs(ids):
            self._in_bytes.update(run)
        control = [char for char in counts if _is_control(char)]
        self._num_control += bool(control)
        self._with_control.update(control)
        self._by_text[ids.tobytes()] += 1
        self._documents.append((offset, len(ids), text[:EXCERPT], counts))

    def excerpt(self, ids: np.ndarray) -> str:
        """The beginning of a text."""
        return self._tokenizer.decode(ids.tolist()).rstrip(PARTIAL)[:EXCERPT]

    def _byte_runs(self, ids: np.ndarray) -> Iterator[str]:
        places = np.flatnonzero(self._tokenizer.byte_fallback_V[ids])
        for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1) if len(places) else ():
            yield bytes(self._byte_of[token] for token in ids[run].tolist()).decode(errors="ignore")

    def summary(self) -> dict[str, Any]:
        """The fields of `describe` that come from texts."""
        ids, copies = self._by_text.most_common(1)[0] if self._by_text else (b"", 0)
        return {
            "characters_per_token": self._characters.total() / max(self._tokens, 1),
            "control": {
                "documents": self._num_control,
                "characters": [(f"U+{ord(char):04X}", count) for char, count in self._with_control.most_common(5)],
            },
            "scripts": self._scripts(),
            "copies": {"count": copies, "text": self.excerpt(np.frombuffer(ids, np.int32))},
            "oddest": self._oddest(),
        }

    def _scripts(self) -> list[dict[str, Any]]:
        letters, in_bytes = Counter(), Counter()
        for characters, sums in ((self._characters, letters), (self._in_bytes, in_bytes)):
            for char, count in characters.items():
                if char.isalpha():
                    sums[script(char)] += count
        return [
            {"name": name, "share": count / letters.total(), "in_bytes": min(in_bytes[name] / count, 1.0)}
            for name, count in letters.most_common()
        ]

    def _oddest(self) -> list[Document]:
        """Documents with the most nats per character if each character has its frequency in all decoded documents."""
        total = self._characters.total()
        nats = {char: -math.log(count / total) for char, count in self._characters.items()}
        long = [each for each in self._documents if each[3].total() >= SHORTEST_ODD]
        scored = [
            (sum(count * nats[char] for char, count in counts.items()) / counts.total(), offset, tokens, text)
            for offset, tokens, text, counts in long or self._documents
            if counts.total()
        ]
        scored.sort(key=lambda each: (-each[0], each[1]))
        return [
            {"offset": offset, "tokens": tokens, "nats_per_character": score, "text": text}
            for score, offset, tokens, text in scored[:EXTREMES]
        ]


def _is_control(char: str) -> bool:
    return char in REPLACEMENTS or (unicodedata.category(char) == "Cc" and char not in "\t\n\r")


@lru_cache(maxsize=2**17)
def script(char: str) -> str:
    """The script of a letter: the first word of its Unicode name, such as Latin, Cyrillic, CJK, Hangul."""
    word = unicodedata.name(char, "unknown").partition(" ")[0]
    return word if word == "CJK" else word.capitalize()
