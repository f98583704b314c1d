"""How much text a source has, and how well the tokenizer fits it: counted while a store is made, told on one line.

Called by `pieces` and `corpus`, which keep the numbers in the store's manifest, and by `train` and `commands`, which
show them. A manifest of an earlier version lacks some; then only what is known is shown.

    in a split    documents, tokens (each text's EOS included); bytes (of its UTF-8), unknown and byte_fallback (tokens
                  of characters that have no piece: a model without bytes has one id for all of them)
    in a store    duplicates: documents whose whole text, or example, another one before it has too, byte for byte
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t5like.data.store.token_store import TokenStore
from t5like.data.tokenizers.tokenizer import Tokenizer


def count_tokens(tokenizer: Tokenizer, tokens: np.ndarray) -> dict[str, int]:
    """Of token ids [N] how many stand for characters that the vocabulary lacks."""
    unknown = 0 if tokenizer.unk_id is None else int(np.count_nonzero(tokens == tokenizer.unk_id))
    return {"unknown": unknown, "byte_fallback": int(np.count_nonzero(tokenizer.byte_fallback_V[tokens]))}


def num_duplicates(hashes: Iterable[Path]) -> int | None:
    """How many of the uint64 hashes in files occurred before; None if a file is missing. Takes 8 bytes a document."""
    try:
        all_N = np.concatenate([np.empty(0, np.uint64), *(np.fromfile(path, "<u8") for path in hashes)])
    except FileNotFoundError:  # made by an earlier version
        return None
    all_N.sort()
    return int(np.count_nonzero(all_N[1:] == all_N[:-1]))


def lines(names: Sequence[str], stores: Sequence[TokenStore], ends: Sequence[str]) -> list[str]:
    """A line for each source, in columns: training documents and tokens, what is known of them, what is held out.

    Args:
        names: `source_names`.
        ends: what each line ends with.
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
    several = lambda split, end: (
        f"{split['documents']:,} {noun}" + (f"s{end}" if split["documents"] != 1 else f"{end} ")
    )
    row = [name, several(train, ""), f"{train['tokens']:,} tokens", "", "", ""]
    if "bytes" in train:
        row[3] = f"{train['bytes'] / max(train['tokens'], 1):.2f} bytes/token"
    if "unknown" in train:
        lacking = train["unknown"] + train["byte_fallback"]
        row[4] = f"{100 * lacking / max(train['tokens'], 1):.2f} % unknown or in bytes"
    if "duplicates" in manifest:
        row[5] = f"duplicates {manifest['duplicates']:,}"
    return [*row, f"held out {several(heldout, ',')}", f"{heldout['tokens']:,} tokens"]
