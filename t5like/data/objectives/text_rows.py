"""Rows of running text: read windows of a token store, and apply a denoiser to them.

`TextRows` are the rows of one `Denoiser`, as `supervised.packing.ExampleRows` are those of supervised examples.
`pipeline` mixes them. A decoder-only model trains on the rows of an encoder-decoder in one sequence
(`join_inputs_and_targets`).
"""

import copy
import dataclasses

import numpy as np

from t5like.config.schema import Config
from t5like.data.objectives.denoisers import denoisers
from t5like.data.objectives.masking import sentence_pairs
from t5like.data.objectives.windows import Denoiser, TextWindows
from t5like.data.store.token_store import Stream
from t5like.data.tokenizers.vocabulary import Vocabulary
from t5like.types import Batch


class TextRows:
    """The rows of one denoiser on one stream of text; implements `pipeline.RowSource`."""

    def __init__(self, config: Config, vocabulary: Vocabulary, stream: Stream, denoiser: Denoiser) -> None:
        self.config, self.vocabulary, self.stream, self.denoiser = config, vocabulary, stream, denoiser
        self._needs_segments = _needs_segments(config)
        # Windows may overlap (decoder-only rows share a token); the last one must then end inside the stream.
        window = denoiser.window
        self.count = max((stream.num_tokens - (window.length - window.stride)) // window.stride, 0)

    def batch(self, index_B: np.ndarray, offset_B: np.ndarray, keys_B: np.ndarray) -> Batch:
        """See `RowSource`. Each epoch starts at another offset of the circular stream, so window borders differ."""
        return make_rows(self.config, self.denoiser, self.vocabulary, self.text(index_B, offset_B, keys_B))

    def with_noise_density(self, density: float) -> "TextRows":
        """The same rows with another `data.noise_density`."""
        rows = copy.copy(self)
        rows.config = dataclasses.replace(
            self.config, data=dataclasses.replace(self.config.data, noise_density=density)
        )
        return rows

    def text(self, index_B: np.ndarray, offset_B: np.ndarray, keys_B: np.ndarray) -> TextWindows:
        """The windows of text from which `batch` makes the same rows."""
        num_tokens, window = self.stream.num_tokens, self.denoiser.window
        offset_B = (offset_B % np.uint64(num_tokens)).astype(np.int64)
        return self._read((index_B * window.stride + offset_B) % num_tokens, keys_B)

    def _read(self, start_B: np.ndarray, keys_B: np.ndarray) -> TextWindows:
        length = self.denoiser.window.length
        if self.denoiser.objective == "mlm_nsp":
            return sentence_pairs(self.stream, start_B, length, keys_B)
        tokens_BT, segments_BT = self.stream.windows(start_B, length), None
        if not self.config.data.cross_document_attention:
            segments_BT = self.stream.segments(start_B, length)
        elif self._needs_segments:
            segments_BT = np.ones_like(tokens_BT)
        return TextWindows(tokens_BT, segments_BT, keys_B)


def make_rows(config: Config, denoiser: Denoiser, vocabulary: Vocabulary, text: TextWindows) -> Batch:
    """Apply a denoiser to windows of text; the rows have the form that the config's architecture needs."""
    batch = denoiser.make_rows(config, denoiser, vocabulary, text)
    if config.model.architecture == "decoder" and batch.encoder_BS is not None:
        return join_inputs_and_targets(batch, denoiser.inputs, config.row_length)
    return batch


def join_inputs_and_targets(batch: Batch, inputs: int, length: int) -> Batch:
    """Concatenate inputs and decoder inputs of an encoder-decoder's rows, for a decoder-only model.

    Attention is bidirectional in the inputs; START separates them from the targets. With 3 inputs and length 8:

        encoder   A B C
        decoder   START X Y      targets X Y Z

        decoder   A B C START X Y 0 0
        targets   0 0 0   X   Y Z 0 0
        prefix    1 1 1   0   0 0 0 0
    """

    def join(left, right):
        row = np.concatenate([left, right], axis=1)
        return np.pad(row, ((0, 0), (0, length - row.shape[1])))

    zeros = np.zeros((len(batch.targets_BL), inputs), np.int32)
    segments_BL = None
    if batch.encoder_segments_BS is not None:
        segments_BL = join(batch.encoder_segments_BS[:, :inputs], batch.decoder_segments_BL)
    return Batch(
        join(batch.encoder_BS[:, :inputs], batch.decoder_BL),
        join(zeros, batch.targets_BL),
        join(zeros.astype(np.float32), batch.weights_BL),
        decoder_segments_BL=segments_BL,
        prefix_BL=join(zeros == 0, np.zeros(batch.targets_BL.shape, bool)),
    )


def blank_row(config: Config) -> Batch:
    """One blank row with all fields that any of the config's denoisers writes, in their shapes and dtypes.

    In a mixture, fields that a denoiser does not write keep these values: one segment, and no pair to classify.
    """
    size = config.tokenizer.vocab_size
    vocabulary = Vocabulary(1, np.arange(config.tokenizer.num_sentinels) + 3, np.ones(size, bool), np.ones(size, bool))
    batches = []
    for denoiser in denoisers(config):
        tokens_BT = np.ones((1, denoiser.window.length), np.int32)
        pair_BT = tokens_BT + (np.arange(denoiser.window.length) > 0)
        segments_BT = tokens_BT if _needs_segments(config) else None
        segments_BT = pair_BT if denoiser.objective == "mlm_nsp" else segments_BT
        text = TextWindows(tokens_BT, segments_BT, np.zeros(1, np.uint64), np.ones(1, np.int32))
        batches.append(make_rows(config, denoiser, vocabulary, text))
    fields = [next((x for x in values if x is not None), None) for values in zip(*batches, strict=True)]
    row = Batch(*(None if x is None else np.zeros_like(x) for x in fields))
    for name in ("encoder_segments_BS", "decoder_segments_BL"):
        if getattr(row, name) is not None:
            row = row._replace(**{name: np.ones_like(getattr(row, name))})
    return row if row.follows_B1 is None else row._replace(follows_B1=row.follows_B1 - 1)


def _needs_segments(config: Config) -> bool:
    """Whether rows have segments: documents are distinguished, or the rows of an encoder may be padded."""
    if not config.data.cross_document_attention:
        return True
    return config.model.has_encoder and any(each.inputs < config.data.inputs_length for each in denoisers(config))
