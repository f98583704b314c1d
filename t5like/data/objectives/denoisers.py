"""From `data.objective` to `Denoiser`s: which denoisers a config has (UL2 alone has seven), and their exact lengths.

Called by `text_rows` and `pipeline`; `optim.step` needs `num_components`. Sources: the lengths of span corruption are
those of `t5.data.preprocessors` (Raffel et al. 2020, section 3.1.4); UL2 of Tay et al. 2022, arXiv:2205.05131, section
3.1.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from t5like.config.schema import Config
from t5like.data.objectives import denoising
from t5like.data.objectives.denoising import MODES
from t5like.data.objectives.masking import mask_tokens, masked_tokens, next_sentence
from t5like.data.objectives.windows import Denoiser, SpanLengths, Window
from t5like.errors import ConfigError

# Tay et al. 2022, table 1: mode, mean span length, share of the tokens that are masked. In mode S the last quarter of
# the text is the target (r = 0.25, one span at the end). All seven have the same rate (section 3.1.2).
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
    return tuple(each for objective in config.data.objective for each in _denoisers(config, objective))


def num_components(config: Config) -> int:
    """Number of sources times number of denoisers (1 for supervised examples): see `pipeline.components`."""
    return len(config.data.source) * max(len(denoisers(config)), 1)


def _denoisers(config: Config, objective: str) -> list[Denoiser]:
    data, decoder = config.data, config.model.architecture == "decoder"
    inputs, targets, row = data.inputs_length, data.targets_length, config.row_length

    def one(make_rows: Callable, window: Window, inputs: int = inputs, **fields) -> list[Denoiser]:
        return [Denoiser(objective, objective, 1.0, make_rows, window, inputs, **fields)]

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
            return one(denoising.span_corruption, Window(lengths.window, lengths.window), spans=lengths)
        case "prefix_lm" | "causal_lm" if decoder:
            # The last token of a window is only a target; it is the first input of the next row.
            prefix = objective == "prefix_lm"
            make_rows = denoising.decoder_prefix_lm if prefix else denoising.decoder_causal_lm
            return one(make_rows, Window(row + 1, row))
        case "prefix_lm":
            return one(denoising.prefix_lm, Window(row, row))
        case "causal_lm":
            return one(denoising.causal_lm, Window(targets, targets), inputs=1)
        case "ul2":
            return [_ul2_denoiser(config, *parameters) for parameters in UL2]
        case "mlm" | "mlm_nsp":
            _require_sentinels(config, 2, "for [MASK] and [CLS]")
            special = 2 if objective == "mlm" else 3  # CLS, SEP
            length, least = inputs - special, 3 * special - 2  # at least two tokens of text for each SEP
            if inputs < least:
                raise ConfigError(f"data.inputs_length={inputs} must be at least {least} for {objective}; use 128")
            window = Window(length, length)
            masked = masked_tokens(max((data.noise_density, *data.phase_noise_density)), length)
            if objective == "mlm":
                return one(lambda config, _, *text: mask_tokens(config, *text), window, masked=masked)
            # Pairs from short documents are padded.
            return one(lambda config, _, *text: next_sentence(config, *text), window, inputs=0, masked=masked)
    return []  # supervised


def _ul2_denoiser(config: Config, mode: str, mean: float, density: float) -> Denoiser:
    data = config.data
    name = f"{mode}{mean:g}_{100 * density:g}" if mean else mode
    if mean:
        lengths = span_lengths(data.inputs_length - 1, density, mean, data.targets_length, mode_tokens=1)
        _require_sentinels(config, lengths.spans + len(MODES), f"one for each span of UL2's {name}, and 3 mode tokens")
        make_rows, inputs = denoising.span_corruption, lengths.inputs + 1
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
        make_rows, inputs = denoising.suffix_denoising, window - target + 1
    window = Window(lengths.window, lengths.window)
    return Denoiser("ul2", name, 1 / len(UL2), make_rows, window, inputs, lengths, mode=MODES.index(mode))


def _require_sentinels(config: Config, least: int, purpose: str) -> None:
    num_sentinels = config.tokenizer.num_sentinels
    if num_sentinels < least:
        raise ConfigError(
            f"tokenizer.num_sentinels={num_sentinels} must be at least {least}, {purpose}; use {least}, or shorter rows"
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

    As T5's `random_spans_helper`: 512 inputs at density 15 % with spans of 3 tokens take 568 tokens of text and give
    114 targets. With `targets_length` it is the longest window whose inputs and targets both fit, and there may be
    fewer inputs. `mode_tokens` is the number of tokens before the inputs, for the message.

    Raises:
        ConfigError: there is no such window.
    """

    def lengths(window: int) -> SpanLengths:
        # np.round rounds halves to even, as T5 does; a window has at least one masked and one other token.
        noise = min(max(int(np.round(window * noise_density)), 1), window - 1)
        spans = min(max(int(np.round(noise / mean_span_length)), 1), noise, window - noise)
        return SpanLengths(window, noise, spans, noise + spans + 1)

    def longest_window(most_targets: float) -> SpanLengths | None:
        fits = lambda row: row.inputs <= inputs_length and row.targets <= most_targets
        window = 2
        while fits(lengths(window + 1)):
            window += 1
        row = lengths(window)
        return row if fits(row) and window >= mean_span_length else None

    longest = longest_window(targets_length or np.inf)
    what = f"span corruption at a density of {noise_density:g} and spans of {mean_span_length:g} tokens"
    if longest is None and (row := longest_window(np.inf)):
        raise ConfigError(f"data.targets_length={targets_length} is too short for {what}; use {row.targets}")
    if longest is None:
        given, least = inputs_length + mode_tokens, 4 * max(16, int(mean_span_length))
        raise ConfigError(f"data.inputs_length={given} is too short for {what}; use {least} or more")
    if targets_length is None and longest.inputs != inputs_length:
        raise ConfigError(f"data.inputs_length={inputs_length} is not possible with {what}; use {longest.inputs}")
    return longest
