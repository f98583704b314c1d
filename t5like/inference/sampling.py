"""How the next token is chosen: decoding options, logits processing, greedy decoding and sampling.

Pure JAX on logits, without models or texts. `DecodingOptions` holds the user's options. `sample` here and `beam_search`
are loops around a `DecodeStep`, a function that runs a model on the last tokens and returns the logits after them;
`inference.decoding` builds it. Both decode G texts per prompt in parallel (samples or beams), and never copy the
model's cache. Each text instead keeps, for each of its tokens, the index of the text whose cache entry holds that
token's keys (`ancestors_BGL`), and attention reads there.

Logits are processed in the order and with the meaning of Hugging Face transformers 5: repetition penalty (Keskar et
al. 2019, section 4.1), temperature, top-k (Fan et al. 2018), top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024).

In addition to the legend of `types`: E ids that end a text.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from t5like.config.checks import ranges
from t5like.config.field_types import NotNegative, Range
from t5like.errors import ConfigError, shown

IMPOSSIBLE = -1e9  # the score of a beam that does not exist yet; finite, as in transformers
MIN_TEMPERATURE = 1e-6  # logits divided by a smaller one may be infinite
BLOCK = 128  # vocabulary entries per block, of which `largest` first compares the maxima


@dataclasses.dataclass(frozen=True)
class DecodingOptions:
    """How texts are decoded. The fields are the flags of `t5like generate`.

    Attributes:
        max_new_tokens: upper limit of new tokens, EOS included.
        temperature: 0: greedy decoding; else sample from softmax(logits / temperature).
        top_k: sample only from the k most likely tokens; 0: all.
        top_p: sample only from the most likely tokens that together reach this probability; 1: all.
        min_p: sample only from tokens at least this fraction as likely as the most likely one; 0: all.
        repetition_penalty: divides positive and multiplies negative logits of tokens that occur in the prompt or in the
            text so far; 1: none.
        num_beams: number of beams of a beam search; 1: no beam search.
        length_penalty: exponent of the length by which a beam's log-probability is divided.
        num_returned: texts per prompt: the best beams, or this many samples.
        stop: texts that end the generated text; they are not part of it.
        seed: of the sampling.
    """

    max_new_tokens: Annotated[int, Range(1, 2**20)] = 64
    temperature: Annotated[float, Range(0, 1e6)] = 0.0
    top_k: NotNegative = 0
    top_p: Annotated[float, Range(1e-9, 1)] = 1.0
    min_p: Annotated[float, Range(0, 1)] = 0.0
    repetition_penalty: Annotated[float, Range(1e-3, 1e3)] = 1.0
    num_beams: Annotated[int, Range(1, 2**16)] = 1
    length_penalty: Annotated[float, Range(-5, 5)] = 1.0
    num_returned: Annotated[int, Range(1, 2**16)] = 1
    stop: tuple[str, ...] = ()
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0

    def __post_init__(self) -> None:
        """Refuse values out of range, and options that contradict each other.

        Raises:
            ConfigError: names the flag.
        """

        def need(good: bool, field: str, rule: str, use: object) -> None:
            if not good:
                value = getattr(self, field)
                text = f"{value:g}" if isinstance(value, float) else shown(value)
                raise ConfigError(f"--{field}={text} must be {rule}; use --{field}={use}")

        for field, (limits, default) in ranges(DecodingOptions).items():
            need(getattr(self, field) in limits, field, str(limits), default)
        least = MIN_TEMPERATURE
        need(self.temperature == 0 or self.temperature >= least, "temperature", f"0 or at least {least:g}", 0)
        need(all(self.stop), "stop", "a text that is not empty", "'.'")
        if self.num_beams > 1:
            need(self.temperature == 0, "temperature", f"0 with --num_beams={self.num_beams}", 0)
            rule = f"at most --num_beams={self.num_beams}"
            need(self.num_returned <= self.num_beams, "num_returned", rule, self.num_beams)
        elif self.temperature == 0:
            rule = "1 with greedy decoding (--temperature=0 and --num_beams=1)"
            need(self.num_returned == 1, "num_returned", rule, f"1 or --num_beams={self.num_returned}")
        if self.temperature == 0:
            for field, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
                rule = "omitted where nothing is sampled (--temperature=0)"
                need(getattr(self, field) == off, field, rule, f"{off:g} or --temperature=0.8")

    @property
    def num_texts(self) -> int:
        """Texts that are decoded in parallel per prompt."""
        return self.num_beams if self.num_beams > 1 else self.num_returned

    @property
    def traced(self) -> "TracedOptions":
        """The options that a compiled program has as arguments."""
        return TracedOptions(
            self.temperature or None,
            None if self.top_p == 1 else self.top_p,
            self.min_p or None,
            None if self.repetition_penalty == 1 else self.repetition_penalty,
            self.length_penalty,
        )


class TracedOptions(NamedTuple):
    """The part of `DecodingOptions` that may change without recompilation. None: off, at no cost."""

    temperature: Any = None
    top_p: Any = None
    min_p: Any = None
    repetition_penalty: Any = None
    length_penalty: Any = 1.0


class DecodeOutput(NamedTuple):
    """Decoded texts.

    Attributes:
        ids_BGL: int32; 0 after the id that ended a text.
        log_p_BGL: the model's log-probability of each id, in nats, before any processing; 0 after the end.
        scores_BG: beams are sorted by it, best first; of samples, the summed log-probability.
    """

    ids_BGL: jax.Array
    log_p_BGL: jax.Array
    scores_BG: jax.Array


# (tokens [B, G], step, ancestors [B, G, L], cache) -> logits [B, G, V] after the tokens, cache
DecodeStep = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def penalize(scores_V: jax.Array, seen_V: jax.Array, penalty: jax.Array | float) -> jax.Array:
    """Apply the repetition penalty to the tokens that occurred (`seen_V`); any leading dims."""
    return jnp.where(seen_V, jnp.where(scores_V < 0, scores_V * penalty, scores_V / penalty), scores_V)


def warp(scores_V: jax.Array, traced: TracedOptions, top_k: int = 0) -> jax.Array:
    """Logits [..., V] for sampling: divided by the temperature; -inf for tokens that top-k, top-p or min-p exclude."""
    scores_V = scores_V / traced.temperature
    if 0 < top_k < scores_V.shape[-1]:
        least = largest(scores_V, top_k)[0][..., -1:]
        scores_V = jnp.where(scores_V < least, -jnp.inf, scores_V)
    if traced.top_p is not None:
        ordered_V = jnp.sort(scores_V, axis=-1, descending=True)
        p_V = jax.nn.softmax(ordered_V, axis=-1)
        kept_V = jnp.cumsum(p_V, axis=-1) - p_V < traced.top_p  # the more likely tokens do not reach top_p yet
        least = jnp.where(kept_V, ordered_V, jnp.inf).min(-1, keepdims=True)
        scores_V = jnp.where(scores_V < least, -jnp.inf, scores_V)
    if traced.min_p is not None:
        floor = scores_V.max(-1, keepdims=True) + jnp.log(traced.min_p)
        scores_V = jnp.where(scores_V < floor, -jnp.inf, scores_V)
    return scores_V


def largest(x_V: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` in two passes: only blocks with the largest maxima are searched. Several times faster on CPU."""
    size = x_V.shape[-1]
    blocks = -(-size // BLOCK)
    if blocks < 4 * count:
        return jax.lax.top_k(x_V, count)
    lead = [(0, 0)] * (x_V.ndim - 1)
    blocks_VB = jnp.pad(x_V, [*lead, (0, blocks * BLOCK - size)], constant_values=-jnp.inf)
    blocks_VB = blocks_VB.reshape(*x_V.shape[:-1], blocks, BLOCK)
    best = jnp.sort(jax.lax.top_k(blocks_VB.max(-1), count)[1], axis=-1)  # sorted: the first of equal values wins
    candidates = jnp.take_along_axis(blocks_VB, best[..., None], axis=-2)
    values, indices = jax.lax.top_k(candidates.reshape(*candidates.shape[:-2], -1), count)
    return values, jnp.take_along_axis(best, indices // BLOCK, axis=-1) * BLOCK + indices % BLOCK


def log_p_of(logits_V: jax.Array, tokens: jax.Array) -> jax.Array:
    """The log-probability of one token per row of logits."""
    chosen = jnp.take_along_axis(logits_V, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits_V, axis=-1)


def sample(
    decode_step: DecodeStep,
    logits_B1V: jax.Array,
    cache: Any,
    *,
    keys_B: jax.Array,
    stop_ids_E: jax.Array,
    seen_BV: jax.Array | None,
    traced: TracedOptions,
    max_new_tokens: int,
    num_texts: int,
    top_k: int,
    sampled_log_p: bool = False,
) -> DecodeOutput:
    """Greedy texts (no temperature), or `num_texts` independent samples per prompt.

    Args:
        decode_step: see `DecodeStep`.
        logits_B1V: after the prompts; very negative for ids that must never be generated.
        cache: for `decode_step`.
        keys_B: a random key per prompt.
        stop_ids_E: ids that end a text.
        seen_BV: tokens of the prompts; None without repetition penalty.
        traced, top_k: see `DecodingOptions`.
        max_new_tokens: length of the result.
        num_texts: G.
        sampled_log_p: whether `DecodeOutput.log_p_BGL` is of the distribution at this temperature.
    """
    rows, scale = logits_B1V.shape[0], 1.0 if traced.temperature is None or not sampled_log_p else traced.temperature
    own_BG = text_numbers(rows, num_texts)

    def extend(step, output, done_BG, seen_BGV, logits_BGV):
        """Choose the token of a step and append it."""
        next_BG = jnp.where(done_BG, 0, _choose(logits_BGV, step, seen_BGV, keys_B, traced, top_k))
        log_p_BG = jnp.where(done_BG, 0.0, log_p_of(logits_BGV / scale, next_BG))
        put = lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new, step, axis=2)
        ids_BGL, log_p_BGL = put(output.ids_BGL, next_BG), put(output.log_p_BGL, log_p_BG)
        output = DecodeOutput(ids_BGL, log_p_BGL, output.scores_BG + log_p_BG)
        if seen_BGV is not None:
            seen_BGV = seen_BGV | is_token(next_BG, seen_BGV.shape[-1])
        return step + 1, output, done_BG | is_stop(next_BG, stop_ids_E), seen_BGV

    def unfinished(carry):
        step, _, done_BG, _, _ = carry
        return (step < max_new_tokens) & ~done_BG.all()

    def advance(carry):
        step, output, done_BG, seen_BGV, cache = carry
        last_BG = jax.lax.dynamic_index_in_dim(output.ids_BGL, step - 1, axis=2, keepdims=False)
        steps_11L = jnp.arange(max_new_tokens)[None, None]
        ancestors_BGL = jnp.where(steps_11L < step, own_BG[..., None], -1)
        logits_BGV, cache = decode_step(last_BG, step - 1, ancestors_BGL, cache)
        return *extend(step, output, done_BG, seen_BGV, logits_BGV), cache

    shape = (rows, num_texts, max_new_tokens)
    empty = DecodeOutput(jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(shape[:2]))
    logits_BGV = jnp.repeat(logits_B1V, num_texts, axis=1)
    seen_BGV = None if seen_BV is None else jnp.repeat(seen_BV[:, None], num_texts, axis=1)
    first = extend(0, empty, jnp.zeros(shape[:2], bool), seen_BGV, logits_BGV)
    return jax.lax.while_loop(unfinished, advance, (*first, cache))[1]


def _choose(
    logits_BGV: jax.Array,
    step: jax.Array | int,
    seen_BGV: jax.Array | None,
    keys_B: jax.Array,
    traced: TracedOptions,
    top_k: int,
) -> jax.Array:
    """The next token of each text: int32 [B, G]."""
    scores_BGV = logits_BGV
    if seen_BGV is not None:
        scores_BGV = penalize(scores_BGV, seen_BGV, traced.repetition_penalty)
    if traced.temperature is None:
        return scores_BGV.argmax(-1).astype(jnp.int32)
    # The masked padding of the vocabulary must have probability 0 at any temperature.
    scores_BGV = warp(jnp.where(scores_BGV <= IMPOSSIBLE, -jnp.inf, scores_BGV), traced, top_k)
    draw = lambda key, index, scores_V: jax.random.categorical(
        jax.random.fold_in(jax.random.fold_in(key, index), step), scores_V
    )
    sampled_BG = jax.vmap(jax.vmap(draw, (None, 0, 0)))(keys_B, text_numbers(*scores_BGV.shape[:2]), scores_BGV)
    return sampled_BG.astype(jnp.int32)


def text_numbers(rows: int, num_texts: int) -> jax.Array:
    """The number of each text among those of its prompt: int32 [B, G]."""
    return jnp.broadcast_to(jnp.arange(num_texts, dtype=jnp.int32)[None], (rows, num_texts))


def is_stop(tokens: jax.Array, stop_ids_E: jax.Array) -> jax.Array:
    """Whether each token ends its text."""
    return (tokens[..., None] == stop_ids_E.reshape(*[1] * tokens.ndim, -1)).any(-1)


def is_token(tokens: jax.Array, vocabulary: int) -> jax.Array:
    """One-hot bool [..., V] of tokens."""
    return tokens[..., None] == jnp.arange(vocabulary).reshape(*[1] * tokens.ndim, -1)
