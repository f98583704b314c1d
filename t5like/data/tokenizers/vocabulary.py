"""The token ids that objectives write into rows."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from t5like.data.tokenizers.tokenizer import Tokenizer


DECODER_START_ID = 0  # the first input of a decoder: the padding id, as in T5


class Vocabulary(NamedTuple):
    """The token ids that objectives need.

    Attributes:
        eos: ends inputs, targets and documents.
        sentinels: int32 [number]; [0] is <extra_id_0>. `masking` uses the first two as BERT's [MASK] and [CLS], UL2 the
            last three as mode tokens.
        ordinary_V: bool, True for ids of text, which may be masked and may replace others. Only masking needs it.
        begins_word_V: bool, True for pieces that begin a word. Only whole-word masking needs it.
    """

    eos: int
    sentinels: np.ndarray
    ordinary_V: np.ndarray | None = None
    begins_word_V: np.ndarray | None = None

    @classmethod
    def of(cls, tokenizer: "Tokenizer") -> "Vocabulary":
        """The vocabulary of a tokenizer."""
        return cls(tokenizer.eos_id, tokenizer.sentinel_ids, tokenizer.ordinary_V, tokenizer.begins_word_V)
