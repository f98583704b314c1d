"""Labelled examples of a token store for an encoder: rows of classification, regression and token classification.

Each example has a segment of its own, which begins with [CLS] (`masking`), and positions from 0. A target stands where
the head's output for it is read: the label of a text at its [CLS], also if the head reads the mean over the text
(`model.pooling`), and that of a word at its first token. Called by `pipeline`.
"""

import numpy as np

from t5like.config.schema import Config
from t5like.data.objectives.masking import CLS
from t5like.data.store.label_numbers import NUMBER_BYTES, decode_numbers
from t5like.data.store.token_store import TokenStore, concatenate_ranges
from t5like.data.supervised.examples import Examples
from t5like.data.supervised.packing import ExampleRows, blank_rows
from t5like.data.tokenizers.vocabulary import Vocabulary
from t5like.types import Batch


class LabelledExamples(Examples):
    """The examples of one split that fit in a row.

    Attributes:
        stream, lengths_NC, too_long, note: see `Examples`; a length counts [CLS].
        begin_N, cut_N: int64 offsets in the stream: where the text begins, and where it ends and the label begins.
        label_N: int32 index of the label, or float32 number; of token classification all 0.
    """

    of_units = ("begin_N", "cut_N", "label_N", "lengths_NC")

    def __init__(self, config: Config, source: str, store: TokenStore, split: str) -> None:
        """See `Examples`."""
        self.stream = store.split(split)
        ends = self.stream.ends()
        self.begin_N, self.cut_N = np.concatenate([[0], ends[:-1]]), self.stream.target_ranges()[:, 0]
        self.lengths_NC = (self.cut_N - self.begin_N + 1)[:, None]
        self.label_N = np.zeros(len(ends), np.int32)
        if config.data.label_objective == "classification":
            self.label_N = self.stream.gather(self.cut_N, np.ones_like(self.cut_N))
        elif config.data.label_objective == "regression":
            bytes_T = self.stream.gather(self.cut_N, np.full_like(self.cut_N, NUMBER_BYTES))
            self.label_N = decode_numbers(bytes_T.reshape(-1, NUMBER_BYTES))
        self._drop_too_long(config, source, "training" if split == "train" else "held-out")


class LabelledRows(ExampleRows):
    """The rows of one epoch of a source; see `ExampleRows`."""

    def __init__(self, config: Config, vocabulary: Vocabulary, examples: LabelledExamples) -> None:
        super().__init__(config, examples)
        self._cls, self._eos = int(vocabulary.sentinels[CLS]), vocabulary.eos

    def batch(self, index_B: np.ndarray, offset_B: np.ndarray | None = None, keys_B: np.ndarray | None = None) -> Batch:
        """Rows by index, each in [0, count), padded to `data.inputs_length`; padding has segment 0.

        Two examples with the texts A B and C, as single texts and as words (A is one word, B and C are parts of one):

            encoder              CLS A B SEP CLS C SEP 0         CLS A B C SEP 0
            segments             1   1 1 1   2   2 2   0         1   1 1 1 1   0
            positions            0   1 2 3   0   1 2   0         0   1 2 3 4   0
            targets (weight 1)   x   . . .   y   . .   .         .   x y . .   .

        In a pair of texts, A SEP B SEP, the token types of the second text and its SEP are 1.
        """
        unit_E, row_E, segment_E, offset_EC = self._placed(index_B)
        batch, examples = blank_rows(self.config, len(index_B)), self.examples
        length_E = examples.lengths_NC[unit_E, 0]
        first_E = row_E * self.config.data.inputs_length + offset_EC[:, 0]  # position in the flattened rows
        position_T = concatenate_ranges(first_E, length_E)
        batch.encoder_segments_BS.flat[position_T] = np.repeat(segment_E, length_E)
        batch.encoder_positions_BS.flat[position_T] = concatenate_ranges(np.zeros_like(length_E), length_E)
        batch.encoder_BS.flat[first_E] = self._cls
        text_T = concatenate_ranges(first_E + 1, length_E - 1)
        batch.encoder_BS.flat[text_T] = tokens_T = examples.stream.gather(examples.begin_N[unit_E], length_E - 1)
        if batch.token_types_BS is not None:
            ended_T = np.cumsum(tokens_T == self._eos) - (tokens_T == self._eos)  # texts that ended before a token
            start_E = np.cumsum(length_E - 1) - (length_E - 1)
            batch.token_types_BS.flat[text_T] = np.minimum(ended_T - np.repeat(ended_T[start_E], length_E - 1), 1)
        if self.config.data.label_objective == "token_classification":
            number_T = examples.stream.gather(examples.cut_N[unit_E], length_E - 2)  # none for CLS and SEP
            place_M = concatenate_ranges(first_E + 1, length_E - 2)[number_T > 0]
            batch.targets_BL.flat[place_M], batch.weights_BL.flat[place_M] = number_T[number_T > 0] - 1, 1
        else:
            batch.targets_BL.flat[first_E], batch.weights_BL.flat[first_E] = examples.label_N[unit_E], 1
        return batch


def open_examples(config: Config, source: str, store: TokenStore, split: str) -> Examples:
    """The examples of one split of a source; arguments and errors as in `Examples`."""
    return (LabelledExamples if config.data.label_objective else Examples)(config, source, store, split)


def example_rows(config: Config, vocabulary: Vocabulary, examples: Examples) -> ExampleRows:
    """The rows of some examples."""
    labelled = isinstance(examples, LabelledExamples)
    return LabelledRows(config, vocabulary, examples) if labelled else ExampleRows(config, examples)
