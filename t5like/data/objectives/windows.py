"""Types of the objectives for running text: windows of token ids, the lengths of a row, and the denoiser.

`denoisers` builds `Denoiser`s from the config; `text_rows` reads `TextWindows` and calls them.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from t5like.config.schema import Config
from t5like.data.tokenizers.vocabulary import Vocabulary
from t5like.types import Batch


class TextWindows(NamedTuple):
    """Windows of text, one per row of a batch.

    Attributes:
        tokens_BT: int32 token ids.
        segments_BT: int32 number of the document inside the window, from 1; None if documents are not distinguished.
            In a sentence pair: 1 in the first text, 2 in the second, 0 for padding.
        keys_B: uint64 key of all random numbers of a row.
        follows_B: int32, only for sentence pairs: 1 if the second text follows the first in its document, else 0.
    """

    tokens_BT: np.ndarray
    segments_BT: np.ndarray | None
    keys_B: np.ndarray
    follows_B: np.ndarray | None = None


class Window(NamedTuple):
    """The text of one row: windows begin `stride` tokens apart and are `length` tokens long."""

    length: int
    stride: int


class SpanLengths(NamedTuple):
    """The lengths of one row of span corruption; exact for every row, not in expectation."""

    window: int  # tokens of text
    noise: int  # masked tokens
    spans: int  # runs of masked tokens
    targets: int  # target tokens: masked tokens, one sentinel per span, EOS

    @property
    def inputs(self) -> int:
        """Input tokens: tokens that are not masked, one sentinel per span, EOS."""
        return self.window - self.noise + self.spans + 1


class Denoiser(NamedTuple):
    """One way to make rows from running text, with all its lengths.

    Attributes:
        objective: the name in `data.objective`.
        name: the name in the metrics: the objective's, or one of UL2's seven.
        share: of the objective's rows, 0 to 1.
        make_rows: (config, denoiser, vocabulary, text) -> the batch of an encoder-decoder, or of an encoder or a
            decoder-only model if the objective is specific to it.
        window: the text of a row.
        inputs: number of input tokens of a row; if fewer than `data.inputs_length`, the rest is masked padding.
        spans: the lengths of the row's spans, if the objective has spans.
        masked: the most tokens of a row that an objective without spans masks, which are its targets.
        mode: index of the mode token in UL2's `MODES`; None: no mode token.
    """

    objective: str
    name: str
    share: float
    make_rows: Callable[[Config, "Denoiser", Vocabulary, TextWindows], Batch]
    window: Window
    inputs: int
    spans: SpanLengths | None = None
    masked: int | None = None
    mode: int | None = None
