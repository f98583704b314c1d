"""What objectives are made of: windows of text with a key for each row, and the ids that objectives write.

`pipeline` makes them; `objectives` and `masking` read them.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from t5like.data.tokenizer import Tokenizer

START = 0  # what a decoder reads first: the padding id, as in T5


class Vocabulary(NamedTuple):
    """The ids an objective writes.

    Attributes:
        eos: ends inputs and targets, and stands between documents.
        sentinels: int32 [number]; [0] is <extra_id_0>. `masking` uses the first two as BERT's [MASK] and [CLS], UL2 the
            last three as mode tokens.
        ordinary_V: bool, True for ids of text: they may be masked, and drawn in place of others. Only masking needs it.
        begins_word_V: bool, True for pieces that begin a word. Only the masking of whole words needs it.
    """

    eos: int
    sentinels: np.ndarray
    ordinary_V: np.ndarray | None = None
    begins_word_V: np.ndarray | None = None

    @classmethod
    def of(cls, tokenizer: "Tokenizer") -> "Vocabulary":
        """The vocabulary of a tokenizer."""
        return cls(tokenizer.eos_id, tokenizer.sentinel_ids, tokenizer.ordinary_V, tokenizer.begins_word_V)


class Text(NamedTuple):
    """Windows of text to make rows of.

    Attributes:
        tokens_BT: int32 ids.
        segments_BT: int32 document number inside the window, from 1; None where borders don't matter. Of a sentence
            pair: 1 in the first, 2 in the second text, 0 behind them.
        keys_B: uint64, all of a row's randomness.
        follows_B: int32, of a sentence pair: 1 if the second text follows the first in its document, else 0.
    """

    tokens_BT: np.ndarray
    segments_BT: np.ndarray | None
    keys_B: np.ndarray
    follows_B: np.ndarray | None = None
