"""What is learned from running text: windows of token ids -> a `Batch`, in numpy, a batch of rows at a time.

`denoisers` turns the config's objectives into a list of settled ways to make rows (UL2 alone is seven); each is a
function of the tokens and of one 64-bit key per row, which is all its randomness. `pipeline` mixes them by rates, reads
the windows and calls them. Objectives of encoders are in `masking`, supervised rows in `examples` and `packing`.

A decoder-only model learns from the rows of an encoder-decoder too: input and target stand in one sequence (`joined`).
Sources: span corruption, prefix and causal LM of T5 (Raffel et al. 2020, sections 3.1.4 and 3.2; the lengths and the
order of sentinels of `t5.data.preprocessors`), prefix LM on decoder-only models of Wang et al. 2022, section 2;
UL2 (Tay et al. 2022, arXiv:2205.05131, section 3.1).
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from t5like.config.schema import Config
from t5like.data.objectives.masking import mask_tokens, next_sentence
from t5like.data.objectives.windows import TextWindows
from t5like.data.randomness import random_bits, random_parts
from t5like.data.tokenizers.vocabulary import DECODER_START_ID, Vocabulary
from t5like.errors import ConfigError
from t5like.types import Batch


class SpanLengths(NamedTuple):
    """The arithmetic of span corruption for one row; exact for every row, not in expectation."""

    window: int  # tokens of text
    noise: int  # of them masked
    spans: int  # runs of masked tokens
    targets: int  # target tokens: masked tokens, a sentinel per span, EOS

    @property
    def inputs(self) -> int:
        """Input tokens: text that is not masked, a sentinel per span, EOS."""
        return self.window - self.noise + self.spans + 1


class Window(NamedTuple):
    """The text of one row: windows begin `stride` tokens apart and are `length` long."""

    length: int
    stride: int


class Denoiser(NamedTuple):
    """One settled way to make rows of running text.

    Attributes:
        objective: the name in `data.objective`.
        name: its own name in the metrics: the objective's, or one of UL2's seven.
        share: of the objective's rows, 0 to 1.
        make: (config, denoiser, vocabulary, text) -> the batch of an encoder-decoder (or encoder), before `joined`.
        window: the text that a row takes.
        inputs: input tokens of a row; fewer than `data.inputs_length` are padded, and the padding is masked.
        spans: the lengths of its spans, if it has spans.
        mode: number of its mode token among UL2's `MODES`; None: no mode token.
    """

    objective: str
    name: str
    share: float
    make: Callable[[Config, "Denoiser", Vocabulary, TextWindows], Batch]
    window: Window
    inputs: int
    spans: SpanLengths | None = None
    mode: int | None = None


# UL2's mode tokens. They are the last sentinels, counted from the end, so that every tokenizer has them: with T5's 100
# sentinels [R] is <extra_id_99>.
MODES = ("R", "S", "X")

# Tay et al. 2022, table 1: mode, mean span length, share of the tokens that are masked. S: the last quarter of the
# text is the target (r = 0.25, one span at the end). All seven are drawn alike (section 3.1.2).
UL2 = (
    ("R", 3.0, 0.15),
    ("R", 8.0, 0.15),
    ("S", 0.0, 0.25),
    ("X", 3.0, 0.5),
    ("X", 8.0, 0.5),
    ("X", 64.0, 0.15),
    ("X", 64.0, 0.5),
)


def denoisers(config: Config) -> tuple[Denoiser, ...]:
    """The denoisers of all of the config's objectives, in order.

    Raises:
        ConfigError: an objective does not fit `inputs_length` and `targets_length`, or runs out of sentinels.
    """
    found = []
    for objective in config.data.objective:
        found += _denoisers(config, objective)
    return tuple(found)


def num_components(config: Config) -> int:
    """Sources times denoisers, supervised rows counting as one: see `pipeline.components`."""
    return len(config.data.source) * max(len(denoisers(config)), 1)


def _denoisers(config: Config, objective: str) -> list[Denoiser]:
    data, decoder = config.data, config.model.architecture == "decoder"
    inputs, targets, row = data.inputs_length, data.targets_length, config.row_length

    def one(make, window: Window, inputs: int = inputs, **more) -> list[Denoiser]:
        return [Denoiser(objective, objective, 1.0, make, window, inputs, **more)]

    match objective:
        case "span_corruption":
            lengths = span_lengths(inputs, data.noise_density, data.mean_span_length)
            if lengths.targets > targets:
                raise ConfigError(
                    f"data.targets_length={targets} must be at least {lengths.targets} for span corruption of "
                    f"data.inputs_length={inputs} at noise_density {data.noise_density:g} and mean_span_length "
                    f"{data.mean_span_length:g}; use {lengths.targets}"
                )
            _require_sentinels(config, lengths.spans, "one for each masked span of a row")
            return one(span_corruption, Window(lengths.window, lengths.window), spans=lengths)
        case "prefix_lm" | "causal_lm" if decoder:
            # The last token is only predicted, then read by the next row.
            make = split_prefix if objective == "prefix_lm" else next_token
            return one(make, Window(row + 1, row))
        case "prefix_lm":
            return one(prefix_lm, Window(row, row))
        case "causal_lm":
            return one(causal_lm, Window(targets, targets), inputs=1)
        case "ul2":
            return [_ul2_denoiser(config, *kind) for kind in UL2]
        case "mlm" | "mlm_nsp":
            _require_sentinels(config, 2, "the mask and the mark at the beginning of a row")
            special = 2 if objective == "mlm" else 3  # CLS, SEP
            length = inputs - special
            if length < 2 * (special - 1):
                least = special + 2 * (special - 1)
                raise ConfigError(f"data.inputs_length={inputs} must be at least {least} for {objective}; use 128")
            window = Window(length, length)
            if objective == "mlm":
                return one(lambda config, _, *text: mask_tokens(config, *text), window)
            # Pairs from short documents are padded.
            return one(lambda config, _, *text: next_sentence(config, *text), window, inputs=0)
    return []  # supervised


def _ul2_denoiser(config: Config, mode: str, mean: float, density: float) -> Denoiser:
    data = config.data
    name = f"{mode}{mean:g}_{100 * density:g}" if mean else mode
    if mean:
        lengths = span_lengths(data.inputs_length - 1, density, mean, data.targets_length, mode_tokens=1)
        _require_sentinels(config, lengths.spans + len(MODES), f"one for each span of UL2's {name}, and 3 mode tokens")
        make, inputs = span_corruption, lengths.inputs + 1
    else:
        fits = [
            (window, target)
            for window in range(2, data.inputs_length + data.targets_length)
            if 1 <= (target := round(window * density)) <= data.targets_length
            and 1 <= window - target < data.inputs_length
        ]
        if not fits:
            raise ConfigError(f"data.inputs_length={data.inputs_length} is too short for UL2's {name}; use 64")
        window, target = fits[-1]
        lengths = SpanLengths(window, target, 1, target)
        make, inputs = suffix, window - target + 1
    window = Window(lengths.window, lengths.window)
    return Denoiser("ul2", name, 1 / len(UL2), make, window, inputs, lengths, MODES.index(mode))


def _require_sentinels(config: Config, least: int, what: str) -> None:
    have = config.tokenizer.num_sentinels
    if have < least:
        raise ConfigError(
            f"tokenizer.num_sentinels={have} must be at least {least}, {what}; use {least}, or shorter rows"
        )


@lru_cache
def span_lengths(
    inputs_length: int,
    noise_density: float,
    mean_span_length: float,
    targets_length: int | None = None,
    mode_tokens: int = 0,
) -> SpanLengths:
    """The longest window whose corrupted inputs, with sentinels and EOS, are exactly `inputs_length` tokens.

    T5's `random_spans_helper`: 512 inputs at 15 % and spans of 3 take 568 tokens of text and make 114 targets. With
    `targets_length` it is the longest window whose inputs and targets both fit, and inputs may be fewer; `mode_tokens`
    stand before them.

    Raises:
        ConfigError: there is no such window.
    """

    def lengths(window: int) -> SpanLengths:
        # np.round is Python's and T5's rounding, halves to even; a window has at least one token of each kind.
        noise = min(max(int(np.round(window * noise_density)), 1), window - 1)
        spans = min(max(int(np.round(noise / mean_span_length)), 1), noise, window - noise)
        return SpanLengths(window, noise, spans, noise + spans + 1)

    def fits(found: SpanLengths) -> bool:
        return found.inputs <= inputs_length and (targets_length is None or found.targets <= targets_length)

    window = 2
    while fits(lengths(window + 1)):
        window += 1
    found = lengths(window)
    what = f"span corruption at a density of {noise_density:g} and spans of {mean_span_length:g} tokens"
    if not fits(found) or found.window < mean_span_length:
        raise ConfigError(
            f"data.inputs_length={inputs_length + mode_tokens} is too short for {what}"
            + (f", or data.targets_length={targets_length} is" if targets_length else "")
            + f"; use {4 * max(16, int(mean_span_length))} or more"
        )
    if targets_length is None and found.inputs != inputs_length:
        raise ConfigError(f"data.inputs_length={inputs_length} can't be met by {what}; use {found.inputs}")
    return found


def rows(config: Config, denoiser: Denoiser, vocabulary: Vocabulary, text: TextWindows) -> Batch:
    """Finished rows of a denoiser, for the config's architecture."""
    batch = denoiser.make(config, denoiser, vocabulary, text)
    if config.model.architecture == "decoder" and batch.encoder_BS is not None:
        return joined(batch, denoiser.inputs, config.row_length)
    return batch


def noise_mask(keys_B: np.ndarray, lengths: SpanLengths) -> np.ndarray:
    """bool [B, T]: which tokens are masked; exactly `noise` of them in exactly `spans` runs, text first, noise last."""
    text = lengths.window - lengths.noise
    bits = random_bits(keys_B, lengths.window - 2)
    runs = np.stack(
        [random_parts(bits[:, : text - 1], lengths.spans), random_parts(bits[:, text - 1 :], lengths.spans)], axis=2
    )
    pattern = np.tile(np.array([False, True]), len(keys_B) * lengths.spans)
    return np.repeat(pattern, runs.reshape(-1)).reshape(len(keys_B), lengths.window)


def span_corruption(config: Config, denoiser: Denoiser, vocabulary: Vocabulary, text: TextWindows) -> Batch:
    """Replace spans by sentinels in the encoder's text; the decoder says what stood there.

    With <0>, <1> for the sentinels, </s> for EOS, and the masked tokens in brackets:

        tokens    A [B C] D E F [G]
        encoder   A <0> D E F <1> </s>
        targets   <0> B C <1> G </s>
        decoder   START <0> B C <1> G

    In UL2 the encoder's text begins with the mode token. Segments, if any, go with the tokens; a sentinel has the
    document of the first token that it stands for.
    """
    tokens_BT, segments_BT = text.tokens_BT, text.segments_BT
    noise_BT = noise_mask(text.keys_B, denoiser.spans)
    before_BT = np.pad(noise_BT, ((0, 0), (1, 0)))[:, :-1]
    first_noise_BT, first_text_BT = noise_BT & ~before_BT, ~noise_BT & before_BT
    first_text_BT[:, 0] = True  # every row begins with text

    def collect(keep_BT, first_BT, length):
        # Each row keeps the same number of tokens, so a boolean index makes a rectangle again.
        sentinel_BT = vocabulary.sentinels[np.maximum(np.cumsum(first_BT, axis=1) - 1, 0)]
        kept = np.where(first_BT, sentinel_BT, tokens_BT)[keep_BT].reshape(len(tokens_BT), -1)
        ids = _end(kept, vocabulary.eos, length)
        return ids, None if segments_BT is None else _end(segments_BT[keep_BT].reshape(kept.shape), -1, length)

    mode = 0 if denoiser.mode is None else 1
    encoder = collect(~noise_BT | first_noise_BT, first_noise_BT, config.data.inputs_length - mode)
    encoder_BS, encoder_segments_BS = _with_mode(denoiser, vocabulary, *encoder)
    # In the targets each run of text is one sentinel; it takes the document of the masked span behind it.
    targets_BL, segments_BL = collect(noise_BT | first_text_BT, first_text_BT, config.data.targets_length)
    if segments_BL is not None:
        sentinel_BL = np.isin(targets_BL, vocabulary.sentinels)
        segments_BL = np.where(sentinel_BL, np.roll(segments_BL, -1, axis=1), segments_BL)
    return _learned(targets_BL, segments_BL, denoiser.spans.targets, encoder_BS, encoder_segments_BS)


def suffix(config: Config, denoiser: Denoiser, vocabulary: Vocabulary, text: TextWindows) -> Batch:
    """UL2's S-denoiser: the encoder reads a mode token and the text, the decoder says its last quarter.

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
    encoder = _with_mode(denoiser, vocabulary, pad(text.tokens_BT[:, :cut], length), pad(segments[0], length))
    targets_BL = pad(text.tokens_BT[:, cut:], config.data.targets_length)
    return _learned(targets_BL, pad(segments[1], config.data.targets_length), denoiser.spans.targets, *encoder)


def prefix_lm(config: Config, denoiser: Denoiser, vocabulary: Vocabulary, text: TextWindows) -> Batch:
    """Continue a text (encoder-decoder): the encoder reads the first `inputs_length` tokens, the decoder says the rest.

    tokens    A B C D E F        (inputs_length 4)
    encoder   A B C D
    targets   E F
    decoder   START E
    """
    cut = config.data.inputs_length
    targets_BL = text.tokens_BT[:, cut:]
    segments = (None, None) if text.segments_BT is None else (text.segments_BT[:, :cut], text.segments_BT[:, cut:])
    return _learned(targets_BL, segments[1], targets_BL.shape[1], text.tokens_BT[:, :cut], segments[0])


def causal_lm(config: Config, denoiser: Denoiser, vocabulary: Vocabulary, text: TextWindows) -> Batch:
    """Say a text (encoder-decoder): the encoder reads an EOS alone, as for T5's language modelling.

    tokens    A B C
    encoder   </s>
    targets   A B C
    decoder   START A B

    With segments the EOS belongs to the first document: the others say theirs without an encoder.
    """
    encoder_BS = np.zeros((len(text.tokens_BT), config.data.inputs_length), np.int32)
    encoder_BS[:, 0] = vocabulary.eos
    segments_BS = None if text.segments_BT is None else (np.arange(encoder_BS.shape[1])[None] < 1) & (encoder_BS >= 0)
    segments_BS = None if segments_BS is None else segments_BS.astype(np.int32)
    return _learned(text.tokens_BT, text.segments_BT, text.tokens_BT.shape[1], encoder_BS, segments_BS)


def next_token(config: Config, denoiser: Denoiser, vocabulary: Vocabulary, text: TextWindows) -> Batch:
    """Causal LM on a decoder-only model: predict each token from those before it.

        tokens    A B C D E
        decoder   A B C D
        targets   B C D E

    With segments, the first token of a document is not predicted: nothing that may be seen says what it is.
    """
    tokens_BT, segments_BT = text.tokens_BT, text.segments_BT
    weights_BL = np.ones((len(tokens_BT), tokens_BT.shape[1] - 1), np.float32)
    if segments_BT is None:
        return Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], weights_BL)
    weights_BL *= segments_BT[:, :-1] == segments_BT[:, 1:]
    return Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], weights_BL, decoder_segments_BL=segments_BT[:, :-1])


def split_prefix(config: Config, denoiser: Denoiser, vocabulary: Vocabulary, text: TextWindows) -> Batch:
    """Prefix LM on a decoder-only model: the first tokens, up to a random place, see each other in both directions.

    tokens    A B C D E F        (prefix of 2)
    decoder   A B C D E
    targets   B C D E F
    weights   0 1 1 1 1
    prefix    1 1 0 0 0
    """
    batch = next_token(config, denoiser, vocabulary, text)
    length = batch.targets_BL.shape[1]
    prefix_B1 = 1 + random_bits(text.keys_B, 1) % np.uint64(length - 1)  # at least one token to read, and one to say
    place_1L = np.arange(length, dtype=np.uint64)[None]
    weights_BL = batch.weights_BL * (place_1L >= prefix_B1 - np.uint64(1))
    return batch._replace(weights_BL=weights_BL.astype(np.float32), prefix_BL=place_1L < prefix_B1)


def joined(batch: Batch, inputs: int, length: int) -> Batch:
    """Put an encoder-decoder's rows into one sequence for a decoder-only model: inputs, then what the decoder reads.

    The inputs see each other in both directions; START stands between them and the targets. Inputs of 3, length 8:

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


def _learned(targets_BL, segments_BL, count: int, encoder_BS, encoder_segments_BS) -> Batch:
    """The batch whose first `count` targets are learned."""
    weights_BL = np.zeros(targets_BL.shape, np.float32)
    weights_BL[:, :count] = 1
    decoder_BL = _shift_right(targets_BL, segments_BL)
    return Batch(decoder_BL, targets_BL, weights_BL, encoder_BS, encoder_segments_BS, segments_BL)


def _with_mode(denoiser: Denoiser, vocabulary: Vocabulary, ids_BS, segments_BS):
    """Put UL2's mode token, as part of the first document, before the encoder's text."""
    if denoiser.mode is None:
        return ids_BS, segments_BS
    mode_B1 = np.full((len(ids_BS), 1), vocabulary.sentinels[-1 - denoiser.mode], np.int32)
    segments_BS = None if segments_BS is None else np.concatenate([segments_BS[:, :1], segments_BS], axis=1)
    return np.concatenate([mode_B1, ids_BS], axis=1), segments_BS


def _end(ids: np.ndarray, eos: int, length: int) -> np.ndarray:
    """Put EOS behind each row and pad with 0 to `length`; eos -1 repeats the row's last value (segments)."""
    out = np.zeros((len(ids), length), np.int32)
    out[:, : ids.shape[1]] = ids
    out[:, ids.shape[1]] = ids[:, -1] if eos == -1 else eos
    return out


def _shift_right(targets_BL: np.ndarray, segments_BL: np.ndarray | None) -> np.ndarray:
    """What the decoder reads to say the targets: START, then all targets but the last; START again at each border."""
    decoder_BL = np.pad(targets_BL[:, :-1], ((0, 0), (1, 0)), constant_values=DECODER_START_ID)
    if segments_BL is not None:
        decoder_BL[:, 1:][segments_BL[:, 1:] != segments_BL[:, :-1]] = DECODER_START_ID
    return decoder_BL
