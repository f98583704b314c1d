"""Objectives for running text: windows of token ids to rows of inputs and targets, in numpy, a whole batch at once.

Each objective is a function of the tokens and of one 64-bit key per row, the only source of randomness. `denoisers`
chooses the objectives and their lengths, and `text_rows` calls them. Objectives of encoders are in `masking`.

Sources: span corruption, prefix and causal LM of T5 (Raffel et al. 2020, sections 3.1.4 and 3.2; the order of sentinels
of `t5.data.preprocessors`); prefix LM on decoder-only models of Wang et al. 2022, section 2; UL2 (Tay et al. 2022,
arXiv:2205.05131, section 3.1).
"""

import numpy as np

from t5like.config.schema import Config
from t5like.data.objectives.windows import Denoiser, SpanLengths, TextWindows
from t5like.data.randomness import random_bits, random_parts
from t5like.data.tokenizers.vocabulary import DECODER_START_ID, Vocabulary
from t5like.types import Batch

# UL2's mode tokens are the last sentinels, so that every tokenizer has them: with T5's 100 sentinels, [R] is
# <extra_id_99>, [S] is <extra_id_98>.
MODES = ("R", "S", "X")


def noise_mask(keys_B: np.ndarray, lengths: SpanLengths) -> np.ndarray:
    """bool [B, T]: masked tokens, exactly `noise` in exactly `spans` runs; a row begins with text, ends with noise."""
    text = lengths.window - lengths.noise
    bits = random_bits(keys_B, lengths.window - 2)
    runs = np.stack(
        [random_parts(bits[:, : text - 1], lengths.spans), random_parts(bits[:, text - 1 :], lengths.spans)], axis=2
    )
    pattern = np.tile(np.array([False, True]), len(keys_B) * lengths.spans)
    return np.repeat(pattern, runs.reshape(-1)).reshape(len(keys_B), lengths.window)


def span_corruption(config: Config, denoiser: Denoiser, vocabulary: Vocabulary, text: TextWindows) -> Batch:
    """Span corruption: spans are replaced by sentinels in the inputs, and are the targets.

    With <0>, <1> for the sentinels, </s> for EOS, and the masked tokens in brackets:

        tokens    A [B C] D E F [G]
        encoder   A <0> D E F <1> </s>
        targets   <0> B C <1> G </s>
        decoder   START <0> B C <1> G

    In UL2 the inputs begin with the mode token. Tokens keep their segments, if any; a sentinel has the segment of the
    first token that it replaces.
    """
    tokens_BT, segments_BT = text.tokens_BT, text.segments_BT
    noise_BT = noise_mask(text.keys_B, denoiser.spans)
    previous_BT = np.pad(noise_BT, ((0, 0), (1, 0)))[:, :-1]
    first_noise_BT, first_text_BT = noise_BT & ~previous_BT, ~noise_BT & previous_BT
    first_text_BT[:, 0] = True  # every row begins with text

    def collect(keep_BT, first_BT, length):
        # Each row keeps the same number of tokens, so the result of the boolean index is rectangular.
        sentinel_BT = vocabulary.sentinels[np.maximum(np.cumsum(first_BT, axis=1) - 1, 0)]
        kept = np.where(first_BT, sentinel_BT, tokens_BT)[keep_BT].reshape(len(tokens_BT), -1)
        ids = _append_eos(kept, vocabulary.eos, length)
        return ids, None if segments_BT is None else _append_eos(segments_BT[keep_BT].reshape(kept.shape), -1, length)

    mode = 0 if denoiser.mode is None else 1
    encoder = collect(~noise_BT | first_noise_BT, first_noise_BT, config.data.inputs_length - mode)
    encoder_BS, encoder_segments_BS = _prepend_mode(denoiser, vocabulary, *encoder)
    # In the targets, one sentinel stands for each run of text; it has the segment of the masked span that follows.
    targets_BL, segments_BL = collect(noise_BT | first_text_BT, first_text_BT, config.data.targets_length)
    if segments_BL is not None:
        sentinel_BL = np.isin(targets_BL, vocabulary.sentinels)
        segments_BL = np.where(sentinel_BL, np.roll(segments_BL, -1, axis=1), segments_BL)
    return _make_batch(targets_BL, segments_BL, denoiser.spans.targets, encoder_BS, encoder_segments_BS)


def suffix_denoising(config: Config, denoiser: Denoiser, vocabulary: Vocabulary, text: TextWindows) -> Batch:
    """UL2's S-denoiser: a mode token and the text are the inputs, the last quarter of the text is the target.

    tokens    A B C D E F G H
    encoder   [S] A B C D E F
    targets   G H
    decoder   START G
    """
    cut = denoiser.spans.window - denoiser.spans.noise

    def pad(ids_BT, length):
        return None if ids_BT is None else np.pad(ids_BT, ((0, 0), (0, length - ids_BT.shape[1])))

    segments = (None, None) if text.segments_BT is None else (text.segments_BT[:, :cut], text.segments_BT[:, cut:])
    length = config.data.inputs_length - 1
    encoder = _prepend_mode(denoiser, vocabulary, pad(text.tokens_BT[:, :cut], length), pad(segments[0], length))
    targets_BL = pad(text.tokens_BT[:, cut:], config.data.targets_length)
    return _make_batch(targets_BL, pad(segments[1], config.data.targets_length), denoiser.spans.targets, *encoder)


def prefix_lm(config: Config, denoiser: Denoiser, vocabulary: Vocabulary, text: TextWindows) -> Batch:
    """Prefix LM (encoder-decoder): the first `inputs_length` tokens are the inputs, the rest are the targets.

    tokens    A B C D E F        (inputs_length 4)
    encoder   A B C D
    targets   E F
    decoder   START E
    """
    cut = config.data.inputs_length
    targets_BL = text.tokens_BT[:, cut:]
    segments = (None, None) if text.segments_BT is None else (text.segments_BT[:, :cut], text.segments_BT[:, cut:])
    return _make_batch(targets_BL, segments[1], targets_BL.shape[1], text.tokens_BT[:, :cut], segments[0])


def causal_lm(config: Config, denoiser: Denoiser, vocabulary: Vocabulary, text: TextWindows) -> Batch:
    """Causal LM (encoder-decoder): the only input is EOS, as in T5's language modelling.

    tokens    A B C
    encoder   </s>
    targets   A B C
    decoder   START A B

    With segments, the EOS belongs to the first document; the other documents have no inputs.
    """
    encoder_BS = np.zeros((len(text.tokens_BT), config.data.inputs_length), np.int32)
    encoder_BS[:, 0] = vocabulary.eos
    segments_BS = None if text.segments_BT is None else (np.arange(encoder_BS.shape[1])[None] < 1) & (encoder_BS >= 0)
    segments_BS = None if segments_BS is None else segments_BS.astype(np.int32)
    return _make_batch(text.tokens_BT, text.segments_BT, text.tokens_BT.shape[1], encoder_BS, segments_BS)


def decoder_causal_lm(config: Config, denoiser: Denoiser, vocabulary: Vocabulary, text: TextWindows) -> Batch:
    """Causal LM (decoder-only): predict each token from the previous ones.

        tokens    A B C D E
        decoder   A B C D
        targets   B C D E

    With segments, the first token of a document is not predicted, because no token before it is visible.
    """
    tokens_BT, segments_BT = text.tokens_BT, text.segments_BT
    weights_BL = np.ones((len(tokens_BT), tokens_BT.shape[1] - 1), np.float32)
    if segments_BT is None:
        return Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], weights_BL)
    weights_BL *= segments_BT[:, :-1] == segments_BT[:, 1:]
    return Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], weights_BL, decoder_segments_BL=segments_BT[:, :-1])


def decoder_prefix_lm(config: Config, denoiser: Denoiser, vocabulary: Vocabulary, text: TextWindows) -> Batch:
    """Prefix LM (decoder-only): attention is bidirectional in a prefix of random length; the rest are the targets.

    tokens    A B C D E F        (prefix of 2)
    decoder   A B C D E
    targets   B C D E F
    weights   0 1 1 1 1
    prefix    1 1 0 0 0
    """
    batch = decoder_causal_lm(config, denoiser, vocabulary, text)
    length = batch.targets_BL.shape[1]
    prefix_B1 = 1 + random_bits(text.keys_B, 1) % np.uint64(
        length - 1
    )  # at least one token in the prefix and one target
    position_1L = np.arange(length, dtype=np.uint64)[None]
    weights_BL = batch.weights_BL * (position_1L >= prefix_B1 - np.uint64(1))
    return batch._replace(weights_BL=weights_BL.astype(np.float32), prefix_BL=position_1L < prefix_B1)


def _make_batch(targets_BL, segments_BL, count: int, encoder_BS, encoder_segments_BS) -> Batch:
    """The batch of an encoder-decoder with weight 1 for the first `count` targets of each row."""
    weights_BL = np.zeros(targets_BL.shape, np.float32)
    weights_BL[:, :count] = 1
    decoder_BL = _shift_right(targets_BL, segments_BL)
    return Batch(decoder_BL, targets_BL, weights_BL, encoder_BS, encoder_segments_BS, segments_BL)


def _prepend_mode(denoiser: Denoiser, vocabulary: Vocabulary, ids_BS, segments_BS):
    """Put UL2's mode token before the inputs, as part of the first document."""
    if denoiser.mode is None:
        return ids_BS, segments_BS
    mode_B1 = np.full((len(ids_BS), 1), vocabulary.sentinels[-1 - denoiser.mode], np.int32)
    segments_BS = None if segments_BS is None else np.concatenate([segments_BS[:, :1], segments_BS], axis=1)
    return np.concatenate([mode_B1, ids_BS], axis=1), segments_BS


def _append_eos(ids: np.ndarray, eos: int, length: int) -> np.ndarray:
    """Append EOS to each row and pad with 0 to `length`; eos -1 repeats the row's last value (for segments)."""
    out = np.zeros((len(ids), length), np.int32)
    out[:, : ids.shape[1]] = ids
    out[:, ids.shape[1]] = ids[:, -1] if eos == -1 else eos
    return out


def _shift_right(targets_BL: np.ndarray, segments_BL: np.ndarray | None) -> np.ndarray:
    """The decoder's inputs: START, then the targets except the last; START again at each border of segments."""
    decoder_BL = np.pad(targets_BL[:, :-1], ((0, 0), (1, 0)), constant_values=DECODER_START_ID)
    if segments_BL is not None:
        decoder_BL[:, 1:][segments_BL[:, 1:] != segments_BL[:, :-1]] = DECODER_START_ID
    return decoder_BL
