"""What is learned from a window of text: windows of token ids -> a `Batch`, in numpy, a batch of rows at a time.

An objective is a function of the tokens and of one 64-bit key per row; the key is all its randomness (`random_bits`),
so a row is the same wherever and whenever it is made. `pipeline` calls them and knows how long a window each needs
(`window`). Sources: span corruption and prefix LM of T5 (Raffel et al. 2020, section 3.1.4; the lengths and the
order of sentinels of `t5.data.preprocessors`), prefix LM on decoder-only models of Wang et al. 2022, section 2.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from t5like.config import Config
from t5like.errors import ConfigError
from t5like.types import Batch

START = 0  # what a decoder reads first: the padding id, as in T5


class Vocabulary(NamedTuple):
    """The ids an objective writes."""

    eos: int
    sentinels: np.ndarray  # [number]; [0] is <extra_id_0>


class SpanLengths(NamedTuple):
    """The arithmetic of span corruption for one row; exact for every row, not in expectation."""

    window: int  # tokens of text
    noise: int  # of them masked
    spans: int  # runs of masked tokens
    targets: int  # target tokens: masked tokens, a sentinel per span, EOS


class Window(NamedTuple):
    """The text of one row: windows begin `stride` tokens apart and are `length` long."""

    length: int
    stride: int


@lru_cache
def span_lengths(inputs_length: int, noise_density: float, mean_span_length: float) -> SpanLengths:
    """The longest window whose corrupted inputs, with sentinels and EOS, are exactly `inputs_length` tokens.

    T5's `random_spans_helper`: 512 inputs at 15 % and spans of 3 take 568 tokens of text and make 114 targets.
    """

    def lengths(window: int) -> tuple[int, int, int]:
        # np.round is Python's and T5's rounding, halves to even; a window has at least one token of each kind.
        noise = min(max(int(np.round(window * noise_density)), 1), window - 1)
        spans = min(max(int(np.round(noise / mean_span_length)), 1), noise, window - noise)
        return noise, spans, window - noise + spans + 1

    window = 2
    while lengths(window + 1)[2] <= inputs_length:
        window += 1
    noise, spans, used = lengths(window)
    if used != inputs_length:
        raise ConfigError(
            f"data.inputs_length={inputs_length} can't be met by span corruption at data.noise_density="
            f"{noise_density:g} and data.mean_span_length={mean_span_length:g}; use {used}"
        )
    return SpanLengths(window, noise, spans, noise + spans + 1)


def window(config: Config) -> Window:
    """The text that one row of the config's objective takes.

    Raises:
        ConfigError: the objective does not fit `inputs_length` and `targets_length`, or runs out of sentinels.
    """
    data = config.data
    if config.model.architecture == "decoder":
        return Window(
            config.row_length + 1, config.row_length
        )  # the last token is only predicted, then read by the next row
    if data.objective == "prefix_lm":
        return Window(config.row_length, config.row_length)
    lengths = span_lengths(data.inputs_length, data.noise_density, data.mean_span_length)
    if lengths.targets > data.targets_length:
        raise ConfigError(
            f"data.targets_length={data.targets_length} must be at least {lengths.targets} for span corruption of "
            f"data.inputs_length={data.inputs_length} at noise_density {data.noise_density:g} and mean_span_length "
            f"{data.mean_span_length:g}; use {lengths.targets}"
        )
    if lengths.spans > config.tokenizer.num_sentinels:
        raise ConfigError(
            f"tokenizer.num_sentinels={config.tokenizer.num_sentinels} must be at least {lengths.spans}, one for "
            f"each masked span of a row; use {lengths.spans}, or a shorter data.inputs_length"
        )
    return Window(lengths.window, lengths.window)


def num_components(config: Config) -> int:
    """How many components the data has: each source under each objective."""
    return len(config.data.source) * len(config.data.objective)


def random_bits(keys_B: np.ndarray, count: int) -> np.ndarray:
    """uint64 [B, count] of independent random bits, a pure function of each row's uint64 key.

    SplitMix64 (Steele et al. 2014) as a counter-based generator: the finaliser of key + i * golden ratio. A numpy
    generator per row would cost more than all the rest of the objective.
    """
    with np.errstate(over="ignore"):
        x = keys_B[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def random_parts(bits_BN: np.ndarray, parts: int) -> np.ndarray:
    """Cut N + 1 items into `parts` parts of at least one item: int64 lengths [B, parts], all cuts equally likely.

    The parts - 1 smallest of N random numbers say after which items to cut (T5's `_random_segmentation`).
    """
    rows, gaps = bits_BN.shape
    cuts = (
        np.sort(np.argpartition(bits_BN, max(parts - 2, 0), axis=1)[:, : parts - 1], axis=1)
        if parts > 1
        else np.empty((rows, 0), int)
    )
    borders = np.concatenate([np.full((rows, 1), -1), cuts, np.full((rows, 1), gaps)], axis=1)
    return np.diff(borders, axis=1)


def noise_mask(keys_B: np.ndarray, lengths: SpanLengths) -> np.ndarray:
    """bool [B, T]: which tokens are masked; exactly `noise` of them in exactly `spans` runs, text first, noise last."""
    text = lengths.window - lengths.noise
    bits = random_bits(keys_B, lengths.window - 2)
    runs = np.stack(
        [random_parts(bits[:, : text - 1], lengths.spans), random_parts(bits[:, text - 1 :], lengths.spans)], axis=2
    )
    pattern = np.tile(np.array([False, True]), len(keys_B) * lengths.spans)
    return np.repeat(pattern, runs.reshape(-1)).reshape(len(keys_B), lengths.window)


def span_corruption(
    config: Config, vocabulary: Vocabulary, tokens_BT: np.ndarray, segments_BT: np.ndarray | None, keys_B: np.ndarray
) -> Batch:
    """Replace spans by sentinels in the encoder's text; the decoder says what stood there (encoder-decoder).

    With <0>, <1> for the sentinels, </s> for EOS, and the masked tokens in brackets:

        tokens    A [B C] D E F [G]
        encoder   A <0> D E F <1> </s>
        targets   <0> B C <1> G </s>
        decoder   START <0> B C <1> G

    Segments, if any, go with the tokens; a sentinel has the document of the first token that it stands for.
    """
    data = config.data
    lengths = span_lengths(data.inputs_length, data.noise_density, data.mean_span_length)
    noise_BT = noise_mask(keys_B, lengths)
    before_BT = np.pad(noise_BT, ((0, 0), (1, 0)))[:, :-1]
    first_noise_BT, first_text_BT = noise_BT & ~before_BT, ~noise_BT & before_BT
    first_text_BT[:, 0] = True  # every row begins with text

    def collect(keep_BT, first_BT, length):
        # Each row keeps the same number of tokens, so a boolean index makes a rectangle again.
        sentinel_BT = vocabulary.sentinels[np.maximum(np.cumsum(first_BT, axis=1) - 1, 0)]
        kept = np.where(first_BT, sentinel_BT, tokens_BT)[keep_BT].reshape(len(tokens_BT), -1)
        ids = _end(kept, vocabulary.eos, length)
        return ids, None if segments_BT is None else _end(segments_BT[keep_BT].reshape(kept.shape), -1, length)

    encoder_BS, encoder_segments_BS = collect(~noise_BT | first_noise_BT, first_noise_BT, data.inputs_length)
    # In the targets each run of text is one sentinel; it takes the document of the masked span behind it.
    targets_BL, segments_BL = collect(noise_BT | first_text_BT, first_text_BT, data.targets_length)
    if segments_BL is not None:
        sentinel_BL = np.isin(targets_BL, vocabulary.sentinels)
        segments_BL = np.where(sentinel_BL, np.roll(segments_BL, -1, axis=1), segments_BL)
    weights_BL = np.zeros(targets_BL.shape, np.float32)
    weights_BL[:, : lengths.targets] = 1
    return Batch(
        _shift_right(targets_BL, segments_BL), targets_BL, weights_BL, encoder_BS, encoder_segments_BS, segments_BL
    )


def prefix_lm(
    config: Config, vocabulary: Vocabulary, tokens_BT: np.ndarray, segments_BT: np.ndarray | None, keys_B: np.ndarray
) -> Batch:
    """Continue a text. Encoder-decoder: the encoder reads the first `inputs_length` tokens, the decoder says the rest.

        tokens    A B C D E F        (inputs_length 4)
        encoder   A B C D
        targets   E F
        decoder   START E

    Decoder-only: one sequence whose first tokens, up to a random place, see each other in both directions:

        tokens    A B C D E F        (prefix of 2)
        decoder   A B C D E
        targets   B C D E F
        weights   0 1 1 1 1
        prefix    1 1 0 0 0
    """
    if config.model.architecture == "encoder_decoder":
        cut = config.data.inputs_length
        targets_BL = tokens_BT[:, cut:]
        segments = (None, None) if segments_BT is None else (segments_BT[:, :cut], segments_BT[:, cut:])
        weights_BL = np.ones(targets_BL.shape, np.float32)
        return Batch(_shift_right(targets_BL, segments[1]), targets_BL, weights_BL, tokens_BT[:, :cut], *segments)
    batch = causal_lm(config, vocabulary, tokens_BT, segments_BT, keys_B)
    length = batch.targets_BL.shape[1]
    prefix_B1 = 1 + random_bits(keys_B, 1) % np.uint64(length - 1)  # at least one token to read, and one to say
    place_1L = np.arange(length, dtype=np.uint64)[None]
    weights_BL = batch.weights_BL * (place_1L >= prefix_B1 - np.uint64(1))
    return batch._replace(weights_BL=weights_BL.astype(np.float32), prefix_BL=place_1L < prefix_B1)


def causal_lm(
    config: Config, vocabulary: Vocabulary, tokens_BT: np.ndarray, segments_BT: np.ndarray | None, keys_B: np.ndarray
) -> Batch:
    """Predict each token from those before it (decoder-only).

        tokens    A B C D E
        decoder   A B C D
        targets   B C D E

    With segments, the first token of a document is not predicted: nothing that may be seen says what it is.
    """
    weights_BL = np.ones((len(tokens_BT), tokens_BT.shape[1] - 1), np.float32)
    if segments_BT is None:
        return Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], weights_BL)
    weights_BL *= segments_BT[:, :-1] == segments_BT[:, 1:]
    return Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], weights_BL, decoder_segments_BL=segments_BT[:, :-1])


OBJECTIVES = {"span_corruption": span_corruption, "prefix_lm": prefix_lm, "causal_lm": causal_lm}


def _end(ids: np.ndarray, eos: int, length: int) -> np.ndarray:
    """Put EOS behind each row and pad with 0 to `length`; eos -1 repeats the row's last value (segments)."""
    out = np.zeros((len(ids), length), np.int32)
    out[:, : ids.shape[1]] = ids
    out[:, ids.shape[1]] = ids[:, -1] if eos == -1 else eos
    return out


def _shift_right(targets_BL: np.ndarray, segments_BL: np.ndarray | None) -> np.ndarray:
    """What the decoder reads to say the targets: START, then all targets but the last; START again at each border."""
    decoder_BL = np.pad(targets_BL[:, :-1], ((0, 0), (1, 0)), constant_values=START)
    if segments_BL is not None:
        decoder_BL[:, 1:][segments_BL[:, 1:] != segments_BL[:, :-1]] = START
    return decoder_BL
