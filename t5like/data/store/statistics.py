"""Size of a source's text and fit of the tokenizer: counted while a store is prepared, printed as one line per source.

`shards` and `preparation` keep the numbers in the store's manifest; `train` and the command line print them. Manifests
of earlier versions lack some of the numbers; those are then not printed.

    per split    documents, tokens (EOS included), bytes (of UTF-8), unknown and byte_fallback (tokens for characters
                 that the vocabulary lacks; a tokenizer without byte fallback has one id for all of them)
    per store    duplicates: documents whose text, or example, is identical to that of an earlier document
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t5like.data.store.token_store import TokenStore
from t5like.data.tokenizers.tokenizer import Tokenizer


def count_tokens(tokenizer: Tokenizer, tokens: np.ndarray) -> dict[str, int]:
    """How many of the token ids [N] stand for characters that the vocabulary lacks."""
    unknown = 0 if tokenizer.unk_id is None else int(np.count_nonzero(tokens == tokenizer.unk_id))
    return {"unknown": unknown, "byte_fallback": int(np.count_nonzero(tokenizer.byte_fallback_V[tokens]))}


def num_duplicates(hash_files: Iterable[Path]) -> int | None:
    """Number of repeated uint64 hashes in files; None if a file is missing. Takes 8 bytes of memory per document."""
    try:
        all_N = np.concatenate([np.empty(0, np.uint64), *(np.fromfile(path, "<u8") for path in hash_files)])
    except FileNotFoundError:  # written by an earlier version
        return None
    all_N.sort()
    return int(np.count_nonzero(all_N[1:] == all_N[:-1]))


def lines(names: Sequence[str], stores: Sequence[TokenStore], ends: Sequence[str]) -> list[str]:
    """One line per source, in columns: training documents and tokens, their statistics, held-out documents and tokens.

    Args:
        names: `source_names`.
        ends: text to append to each line.
    """
    rows = [_row(name, store.manifest) for name, store in zip(names, stores, strict=True)]
    width = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    aligned = [
        [
            cell.ljust(size) if column == 0 else cell.rjust(size)
            for column, (cell, size) in enumerate(zip(row, width, strict=True))
        ]
        for row in rows
    ]
    return ["  ".join([*(cell for cell in row if cell), end]) for row, end in zip(aligned, ends, strict=True)]


def _row(name: str, manifest: dict[str, Any]) -> list[str]:
    train, heldout = manifest["splits"]["train"], manifest["splits"]["heldout"]
    noun = "example" if "empty" in manifest else "document"
    count = lambda split, end: f"{split['documents']:,} {noun}" + (f"s{end}" if split["documents"] != 1 else f"{end} ")
    row = [name, count(train, ""), f"{train['tokens']:,} tokens", "", "", ""]
    if "bytes" in train:
        row[3] = f"{train['bytes'] / max(train['tokens'], 1):.2f} bytes/token"
    if "unknown" in train:
        outside = train["unknown"] + train["byte_fallback"]
        row[4] = f"{100 * outside / max(train['tokens'], 1):.2f} % unknown or in bytes"
    if "duplicates" in manifest:
        row[5] = f"duplicates {manifest['duplicates']:,}"
    return [*row, f"held out {count(heldout, ',')}", f"{heldout['tokens']:,} tokens"]
