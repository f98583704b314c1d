"""What objectives are made of: windows of text with a key for each row, and the ids that objectives write.

`pipeline` makes them; `objectives` and `masking` read them.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    pass


class TextWindows(NamedTuple):
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
