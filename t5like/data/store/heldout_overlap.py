"""How much of the held-out text occurs in the training text: n-grams of tokens, as in Brown et al. 2020, appendix C.

Equal documents are always in the same split, because a hash of the text decides. Near copies are not: a page with
another date, a license, a quotation. Called by `inspect.data`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from t5like.data.store.document_statistics import EXCERPT, document_ranges
from t5like.data.store.token_store import Stream, concatenate_ranges
from t5like.data.tokenizers.tokenizer import Tokenizer

LENGTH = 13  # tokens of an n-gram
MOST_DOCUMENTS = 1_000  # held-out documents
LONGEST_DOCUMENT = 2_048  # tokens of a held-out document
MOST_TOKENS = 2**24  # training tokens that are searched, of all sources
CHUNK = 2**19  # training tokens that are searched at a time
COPIED = 0.5  # share of its n-grams from which on a document counts as copied
FILTER_BITS = 24


def measure(
    heldout: Stream, trained: Sequence[Stream], tokenizer: Tokenizer, show: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """Search the n-grams of held-out documents in the training text.

    Args:
        heldout: the held-out split of one source.
        trained: the training splits of all sources.
        tokenizer: of the run.
        show: called with the number of training tokens that have been searched.

    Returns:
        ``documents``: held-out documents with at least one n-gram; ``copied``: those of which at least half of the
        n-grams occur in the training text; ``ngrams`` and ``found``; ``searched`` and ``training_tokens``; ``example``:
        the beginning of a copied document, or "".
    """
    hash_N, document_N, starts = _heldout_ngrams(heldout)
    unique_U = np.unique(hash_N)
    found_U, searched = np.zeros(len(unique_U), bool), 0
    possible = np.zeros(2**FILTER_BITS, bool)
    possible[unique_U >> np.uint64(64 - FILTER_BITS)] = True
    total = sum(stream.num_tokens for stream in trained)
    for stream in trained if len(unique_U) else ():
        budget = int(MOST_TOKENS * stream.num_tokens / max(total, 1))
        for start in _starts(stream.num_tokens, budget):
            tokens_T = stream.windows(np.array([start]), min(CHUNK, stream.num_tokens))[0]
            hash_T = ngram_hashes(tokens_T)
            hash_T = hash_T[possible[hash_T >> np.uint64(64 - FILTER_BITS)]]
            place_T = np.minimum(np.searchsorted(unique_U, hash_T), len(unique_U) - 1)
            found_U[place_T[unique_U[place_T] == hash_T]] = True
            searched += len(tokens_T)
            show(searched)
    found_N = found_U[np.searchsorted(unique_U, hash_N)] if len(unique_U) else np.zeros(0, bool)
    ngrams_D = np.bincount(document_N, minlength=len(starts))
    found_D = np.bincount(document_N, found_N, minlength=len(starts))
    copied_D = (ngrams_D > 0) & (found_D >= COPIED * np.maximum(ngrams_D, 1))
    example = ""
    if copied_D.any():
        start = starts[int(np.argmax(np.where(copied_D, found_D, -1)))]
        example = tokenizer.decode(heldout.windows(np.array([start]), EXCERPT)[0].tolist())[:EXCERPT]
    return {
        "documents": int((ngrams_D > 0).sum()),
        "copied": int(copied_D.sum()),
        "ngrams": len(hash_N),
        "found": int(found_N.sum()),
        "searched": searched,
        "training_tokens": total,
        "example": example,
    }


def ngram_hashes(tokens_T: np.ndarray) -> np.ndarray:
    """uint64 [T - 12]: a polynomial hash of each n-gram."""
    count = max(len(tokens_T) - LENGTH + 1, 0)
    hashes = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for place in range(LENGTH):
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + tokens_T[place : place + count].astype(np.uint64)
            hashes ^= hashes >> np.uint64(29)
    return hashes


def _heldout_ngrams(heldout: Stream) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes of n-grams inside of documents, the document of each, and where the documents begin."""
    ranges_N2 = document_ranges(heldout, MOST_DOCUMENTS)
    lengths_N = np.minimum(ranges_N2[:, 1] - ranges_N2[:, 0] - 1, LONGEST_DOCUMENT)
    tokens_T = heldout.gather(ranges_N2[:, 0], lengths_N)
    document_T = np.repeat(np.arange(len(lengths_N)), lengths_N)
    counts_N = np.maximum(lengths_N - LENGTH + 1, 0)
    inside = concatenate_ranges(np.cumsum(lengths_N) - lengths_N, counts_N)
    return ngram_hashes(tokens_T)[inside], document_T[inside], ranges_N2[:, 0]


def _starts(num_tokens: int, budget: int) -> list[int]:
    """Where the searched parts of a stream begin, at even distances; they overlap if all of it is searched."""
    if num_tokens <= CHUNK:
        return [0]
    step = CHUNK - LENGTH + 1
    parts = -(-(num_tokens - CHUNK) // step) + 1 if budget >= num_tokens else max(budget // CHUNK, 1)
    return np.linspace(0, num_tokens - CHUNK, parts).astype(np.int64).tolist()
