"""How the next token is chosen: greedy, sampled, or by beam search. Pure JAX, and nothing about models or texts.

`Decoding` holds what a user may ask for. `sample` and `beam_search` are loops around `read`, a function that feeds
tokens to a model and gives the logits behind them; `generate` makes it. Both keep G texts a prompt side by side
(samples, or beams), and never copy the model's cache: a text that branches off keeps, for each token, the place
(`ancestors_BGL`) where that token's keys stand, and attention looks there.

Logits are processed in the order and with the meaning of Hugging Face transformers 5: repetition penalty (Keskar et
al. 2019, section 4.1), temperature, top-k (Fan et al. 2018), top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024).
Beam search is theirs with `early_stopping=False`: a text's score is its summed log-probability over
length ** length_penalty, EOS counted; a prompt is done when its best open beam, scored at today's length, can't beat
the worst of `num_beams` finished ones.

In addition to the legend of `types`: E tokens that end a text, M candidates.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from t5like.config.checks import ranges
from t5like.config.schema import NotNegative, Range
from t5like.errors import ConfigError, shown

IMPOSSIBLE = -1e9  # the score of a beam that is none yet; finite, as in transformers
LEAST_TEMPERATURE = 1e-6  # logits over a smaller one may be infinite
BLOCK = 128  # values of which `largest` first looks at the maximum only


@dataclasses.dataclass(frozen=True)
class DecodingOptions:
    """How texts are made; the fields are the flags of `t5like generate`.

    Attributes:
        max_new_tokens: at most so many tokens, EOS among them.
        temperature: 0 takes the likeliest token; else softmax(logits / temperature) is sampled.
        top_k: only the k likeliest tokens are sampled; 0: all.
        top_p: only the likeliest tokens that together reach this probability; 1: all.
        min_p: only tokens at least this fraction as likely as the likeliest; 0: all.
        repetition_penalty: divides positive and multiplies negative logits of tokens that were read or made; 1: none.
        num_beams: beams of a beam search; 1: none.
        length_penalty: exponent of the length by which a beam's log-probability is divided.
        num_returned: texts per prompt: the best beams, or so many samples.
        stop: texts that end an answer, which keeps what stands before them.
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
        """Refuse what can't be done.

        Raises:
            ConfigError: by the flag's name.
        """

        def need(good: bool, field: str, rule: str, use: object) -> None:
            if not good:
                value = getattr(self, field)
                text = f"{value:g}" if isinstance(value, float) else shown(value)
                raise ConfigError(f"--{field}={text} must be {rule}; use --{field}={use}")

        for field, (limits, default) in ranges(DecodingOptions).items():
            need(getattr(self, field) in limits, field, str(limits), default)
        least = LEAST_TEMPERATURE
        need(self.temperature == 0 or self.temperature >= least, "temperature", f"0 or at least {least:g}", 0)
        need(all(self.stop), "stop", "a text that is not empty", "'.'")
        if self.num_beams > 1:
            need(self.temperature == 0, "temperature", f"0 with --num_beams={self.num_beams}", 0)
            rule = f"at most --num_beams={self.num_beams}"
            need(self.num_returned <= self.num_beams, "num_returned", rule, self.num_beams)
        elif self.temperature == 0:
            rule = "1 where the likeliest token is taken (--temperature=0 and --num_beams=1)"
            need(self.num_returned == 1, "num_returned", rule, f"1 or --num_beams={self.num_returned}")
        if self.temperature == 0:
            for field, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
                rule = "left away where nothing is sampled (--temperature=0)"
                need(getattr(self, field) == off, field, rule, f"{off:g} or --temperature=0.8")

    @property
    def texts(self) -> int:
        """Texts that are made side by side for a prompt."""
        return self.num_beams if self.num_beams > 1 else self.num_returned

    @property
    def numbers(self) -> "SamplingParams":
        """What a compiled program takes as an argument; what is off is None, and costs nothing."""
        return SamplingParams(
            self.temperature or None,
            None if self.top_p == 1 else self.top_p,
            self.min_p or None,
            None if self.repetition_penalty == 1 else self.repetition_penalty,
            self.length_penalty,
        )


class SamplingParams(NamedTuple):
    """The settings that may change without compiling again; None: off."""

    temperature: Any = None
    top_p: Any = None
    min_p: Any = None
    repetition_penalty: Any = None
    length_penalty: Any = 1.0


class DecodeOutput(NamedTuple):
    """Generated texts.

    Attributes:
        ids_BGL: int32; 0 behind the token that ended a text.
        log_p_BGL: the model's log-probability of each, in nats, before any processing; 0 behind the end.
        scores_BG: what beams are ordered by (best first); of samples, the summed log-probability.
    """

    ids_BGL: jax.Array
    log_p_BGL: jax.Array
    scores_BG: jax.Array


# (tokens [B, G], step, ancestors [B, G, L], cache) -> logits [B, G, V] behind them, cache
DecodeStep = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def penalize(scores_V: jax.Array, seen_V: jax.Array, penalty: jax.Array | float) -> jax.Array:
    """Make tokens that were seen less likely; any leading dims."""
    return jnp.where(seen_V, jnp.where(scores_V < 0, scores_V * penalty, scores_V / penalty), scores_V)


def warp(scores_V: jax.Array, numbers: SamplingParams, top_k: int = 0) -> jax.Array:
    """Logits [..., V] for sampling: temperature, then -inf for what top-k, top-p and min-p leave out."""
    scores_V = scores_V / numbers.temperature
    if 0 < top_k < scores_V.shape[-1]:
        least = largest(scores_V, top_k)[0][..., -1:]
        scores_V = jnp.where(scores_V < least, -jnp.inf, scores_V)
    if numbers.top_p is not None:
        ordered_V = jnp.sort(scores_V, axis=-1, descending=True)
        p_V = jax.nn.softmax(ordered_V, axis=-1)
        kept_V = jnp.cumsum(p_V, axis=-1) - p_V < numbers.top_p  # what is likelier does not suffice yet
        least = jnp.where(kept_V, ordered_V, jnp.inf).min(-1, keepdims=True)
        scores_V = jnp.where(scores_V < least, -jnp.inf, scores_V)
    if numbers.min_p is not None:
        floor = scores_V.max(-1, keepdims=True) + jnp.log(numbers.min_p)
        scores_V = jnp.where(scores_V < floor, -jnp.inf, scores_V)
    return scores_V


def largest(x_V: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k`; on the CPU several times as fast for a vocabulary: few blocks can hold the largest values."""
    size = x_V.shape[-1]
    blocks = -(-size // BLOCK)
    if blocks < 4 * count:
        return jax.lax.top_k(x_V, count)
    lead = [(0, 0)] * (x_V.ndim - 1)
    blocks_VB = jnp.pad(x_V, [*lead, (0, blocks * BLOCK - size)], constant_values=-jnp.inf)
    blocks_VB = blocks_VB.reshape(*x_V.shape[:-1], blocks, BLOCK)
    best = jnp.sort(jax.lax.top_k(blocks_VB.max(-1), count)[1], axis=-1)  # in order: among equals the first one wins
    some = jnp.take_along_axis(blocks_VB, best[..., None], axis=-2)
    values, places = jax.lax.top_k(some.reshape(*some.shape[:-2], -1), count)
    return values, jnp.take_along_axis(best, places // BLOCK, axis=-1) * BLOCK + places % BLOCK


def log_p_of(logits_V: jax.Array, tokens: jax.Array) -> jax.Array:
    """The log-probability of one token per row of logits."""
    chosen = jnp.take_along_axis(logits_V, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits_V, axis=-1)


def sample(
    read: DecodeStep,
    logits_B1V: jax.Array,
    cache: Any,
    *,
    keys_B: jax.Array,
    stops_E: jax.Array,
    seen_BV: jax.Array | None,
    numbers: SamplingParams,
    max_new_tokens: int,
    texts: int,
    top_k: int,
) -> DecodeOutput:
    """Greedy texts (no temperature), or `texts` independent samples per prompt.

    Args:
        read: see `Read`.
        logits_B1V: behind the prompts; what must never be said is very negative.
        cache: for `read`.
        keys_B: a random key per prompt, so that its samples don't depend on the other rows.
        stops_E: ids that end a text.
        seen_BV: tokens of the prompts, where there is a repetition penalty.
        numbers: the settings.
        max_new_tokens: length of the result.
        texts: G.
        top_k: see `Decoding`.
    """
    rows = logits_B1V.shape[0]
    own_BG = jnp.broadcast_to(jnp.arange(texts, dtype=jnp.int32)[None], (rows, texts))

    def choose(logits_BGV, step, seen_BGV):
        scores_BGV = logits_BGV
        if seen_BGV is not None:
            scores_BGV = penalize(scores_BGV, seen_BGV, numbers.repetition_penalty)
        if numbers.temperature is None:
            return scores_BGV.argmax(-1).astype(jnp.int32)
        # The masked padding of the vocabulary must stay impossible at any temperature.
        scores_BGV = warp(jnp.where(scores_BGV <= IMPOSSIBLE, -jnp.inf, scores_BGV), numbers, top_k)
        draw = lambda key, index, scores_V: jax.random.categorical(
            jax.random.fold_in(jax.random.fold_in(key, index), step), scores_V
        )
        drawn_BG = jax.vmap(jax.vmap(draw, (None, 0, 0)))(keys_B, own_BG, scores_BGV)
        return drawn_BG.astype(jnp.int32)

    def extend(step, made, done_BG, seen_BGV, logits_BGV):
        """Choose the token of a step and note it."""
        next_BG = jnp.where(done_BG, 0, choose(logits_BGV, step, seen_BGV))
        log_p_BG = jnp.where(done_BG, 0.0, log_p_of(logits_BGV, next_BG))
        put = lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new, step, axis=2)
        made = DecodeOutput(put(made.ids_BGL, next_BG), put(made.log_p_BGL, log_p_BG), made.scores_BG + log_p_BG)
        if seen_BGV is not None:
            seen_BGV = seen_BGV | _is_token(next_BG, seen_BGV.shape[-1])
        return step + 1, made, done_BG | _ends(next_BG, stops_E), seen_BGV

    def unfinished(carry):
        step, _, done_BG, _, _ = carry
        return (step < max_new_tokens) & ~done_BG.all()

    def advance(carry):
        step, made, done_BG, seen_BGV, cache = carry
        last_BG = jax.lax.dynamic_index_in_dim(made.ids_BGL, step - 1, axis=2, keepdims=False)
        steps_11L = jnp.arange(max_new_tokens)[None, None]
        ancestors_BGL = jnp.where(steps_11L < step, own_BG[..., None], -1)
        logits_BGV, cache = read(last_BG, step - 1, ancestors_BGL, cache)
        return *extend(step, made, done_BG, seen_BGV, logits_BGV), cache

    shape = (rows, texts, max_new_tokens)
    nothing = DecodeOutput(jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(shape[:2]))
    logits_BGV = jnp.repeat(logits_B1V, texts, axis=1)
    seen_BGV = None if seen_BV is None else jnp.repeat(seen_BV[:, None], texts, axis=1)
    begun = extend(0, nothing, jnp.zeros(shape[:2], bool), seen_BGV, logits_BGV)
    return jax.lax.while_loop(unfinished, advance, (*begun, cache))[1]


class Beams(NamedTuple):
    """A beam search between two steps.

    Attributes:
        step: tokens that each open beam has.
        open: the G beams that go on; scores are summed log-probabilities, as processed.
        ancestors_BGL: which beam of each step holds the keys of an open beam's token; -1: none yet.
        seen_BGV: tokens that an open beam has read or made; None without repetition penalty.
        finished: the G best finished texts; scores are divided by the length.
        full_BG: whether each of those is one.
        hopeful_B: whether a prompt's open beams may still beat its finished ones.
        stuck: whether no candidate of the last step can go on.
    """

    step: jax.Array | int
    open: DecodeOutput
    ancestors_BGL: jax.Array
    seen_BGV: jax.Array | None
    finished: DecodeOutput
    full_BG: jax.Array
    hopeful_B: jax.Array
    stuck: jax.Array | bool


def beam_search(
    read: DecodeStep,
    logits_B1V: jax.Array,
    cache: Any,
    *,
    stops_E: jax.Array,
    seen_BV: jax.Array | None,
    numbers: SamplingParams,
    max_new_tokens: int,
    beams: int,
) -> DecodeOutput:
    """The `beams` best finished texts of each prompt, best first; arguments as of `sample`."""
    rows = logits_B1V.shape[0]
    candidates = max(2, 1 + stops_E.shape[0]) * beams  # enough to go on, should all the best ones end

    def extend(state: Beams, logits_BGV: jax.Array) -> Beams:
        """One step: the best candidates, of which some end and the others are the next open beams."""
        step, scores_BG = state.step, state.open.scores_BG
        log_p_BGV = jax.nn.log_softmax(logits_BGV)
        scores_BGV = log_p_BGV
        if state.seen_BGV is not None:
            scores_BGV = penalize(scores_BGV, state.seen_BGV, numbers.repetition_penalty)
        parents, vocabulary = logits_BGV.shape[1:]
        scores_BGV = scores_BGV + scores_BG[..., None]
        # The best of all are among the best of each beam.
        each_BGM, token_BGM = largest(scores_BGV, min(candidates, vocabulary))
        score_BM, place_BM = jax.lax.top_k(each_BGM.reshape(rows, -1), candidates)
        parent_BM = place_BM // each_BGM.shape[-1]
        token_BM = jnp.take_along_axis(token_BGM.reshape(rows, -1), place_BM, axis=1).astype(jnp.int32)
        log_p_BM = jnp.take_along_axis(log_p_BGV.reshape(rows, -1), parent_BM * vocabulary + token_BM, axis=1)
        put = lambda old_BGL, new_BM: jax.lax.dynamic_update_index_in_dim(
            _pick(old_BGL, parent_BM), new_BM, step, axis=2
        )
        candidate = DecodeOutput(put(state.open.ids_BGL, token_BM), put(state.open.log_p_BGL, log_p_BM), score_BM)
        ends_BM = _ends(token_BM, stops_E) | (step + 1 >= max_new_tokens)

        # ---- What ends: only the first `beams` candidates may; the others are there to go on ----
        length = jnp.float32(step + 1) ** numbers.length_penalty
        may_end_BM = ends_BM & (jnp.arange(candidates) < beams)[None]
        ended_BM = score_BM / length
        ended_BM = ended_BM + jnp.where(state.hopeful_B[:, None], 0.0, IMPOSSIBLE)
        ended_BM = ended_BM + jnp.where(may_end_BM, 0.0, IMPOSSIBLE)
        pool = _joined(state.finished, candidate._replace(scores_BG=ended_BM))
        best_BG = jax.lax.top_k(pool.scores_BG, beams)[1]
        finished = jax.tree.map(lambda x: _pick(x, best_BG), pool)
        full_BG = _pick(jnp.concatenate([state.full_BG, may_end_BM], axis=1), best_BG)

        # ---- What goes on ----
        open_BM = score_BM + jnp.where(ends_BM, IMPOSSIBLE, 0.0)
        next_BG = jax.lax.top_k(open_BM, beams)[1]
        going = jax.tree.map(lambda x: _pick(x, next_BG), candidate._replace(scores_BG=open_BM))
        parent_BG = _pick(parent_BM, next_BG)
        own_BG = jnp.broadcast_to(jnp.arange(beams, dtype=jnp.int32)[None], parent_BG.shape)
        ancestors_BGL = jax.lax.dynamic_update_index_in_dim(_pick(state.ancestors_BGL, parent_BG), own_BG, step, axis=2)
        seen_BGV = state.seen_BGV
        if seen_BGV is not None:
            seen_BGV = _pick(seen_BGV, parent_BG) | _is_token(_pick(token_BM, next_BG), vocabulary)
        worst_BG = jnp.where(full_BG, finished.scores_BG.min(1, keepdims=True), IMPOSSIBLE)
        hopeful_B = state.hopeful_B & (going.scores_BG[:, :1] / length > worst_BG).any(1)
        return Beams(step + 1, going, ancestors_BGL, seen_BGV, finished, full_BG, hopeful_B, ends_BM.all())

    def unfinished(carry):
        state, _ = carry
        return state.hopeful_B.any() & ~state.stuck

    def advance(carry):
        state, cache = carry
        last_BG = jax.lax.dynamic_index_in_dim(state.open.ids_BGL, state.step - 1, axis=2, keepdims=False)
        logits_BGV, cache = read(last_BG, state.step - 1, state.ancestors_BGL, cache)
        return extend(state, logits_BGV), cache

    def nothing(texts: int, score: float) -> DecodeOutput:
        shape = (rows, texts, max_new_tokens)
        return DecodeOutput(jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.full(shape[:2], score))

    # The first step has one parent; transformers has `beams` equal ones, all but one impossible.
    state = Beams(
        0,
        nothing(1, 0.0),
        jnp.full((rows, 1, max_new_tokens), -1, jnp.int32),
        None if seen_BV is None else seen_BV[:, None],
        nothing(beams, IMPOSSIBLE),
        jnp.zeros((rows, beams), bool),
        jnp.ones((rows,), bool),
        False,
    )
    return jax.lax.while_loop(unfinished, advance, (extend(state, logits_B1V), cache))[0].finished


def _pick(x: jax.Array, index_BG: jax.Array) -> jax.Array:
    """x[b, index_BG[b, g], ...]."""
    return jnp.take_along_axis(x, index_BG.reshape(*index_BG.shape, *[1] * (x.ndim - 2)), axis=1)


def _joined(a: DecodeOutput, b: DecodeOutput) -> DecodeOutput:
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), a, b)


def _ends(tokens: jax.Array, stops_E: jax.Array) -> jax.Array:
    return (tokens[..., None] == stops_E.reshape(*[1] * tokens.ndim, -1)).any(-1)


def _is_token(tokens: jax.Array, vocabulary: int) -> jax.Array:
    return tokens[..., None] == jnp.arange(vocabulary).reshape(*[1] * tokens.ndim, -1)
