"""Beam search on logits, as Hugging Face transformers 5 with `early_stopping=False`.

The score of a text is its summed log-probability over length ** length_penalty; EOS counts. A prompt is done when its
best open beam, scored at its current length, can't beat the worst of `num_beams` finished texts. Called by `decoding`.

In addition to the legend of `types`: E ids that end a text, M candidates.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from t5like.inference.sampling import (
    IMPOSSIBLE,
    DecodeOutput,
    DecodeStep,
    TracedOptions,
    is_stop,
    is_token,
    largest,
    penalize,
    text_numbers,
)


class Beams(NamedTuple):
    """The state of a beam search between two steps.

    Attributes:
        step: number of tokens of each open beam.
        open: the G beams that continue; scores are summed log-probabilities after the repetition penalty.
        ancestors_BGL: the beam index, at each step, of the cache entry of an open beam's token; -1: no token yet.
        seen_BGV: tokens of the prompt and of the open beam; None without repetition penalty.
        finished: the G best finished texts; scores are divided by length ** length_penalty.
        is_finished_BG: whether each entry of `finished` is a text; the others are empty.
        not_done_B: whether a prompt's open beams may still beat its finished texts.
        exhausted: whether every candidate of the last step has ended.
    """

    step: jax.Array | int
    open: DecodeOutput
    ancestors_BGL: jax.Array
    seen_BGV: jax.Array | None
    finished: DecodeOutput
    is_finished_BG: jax.Array
    not_done_B: jax.Array
    exhausted: jax.Array | bool


def beam_search(
    decode_step: DecodeStep,
    logits_B1V: jax.Array,
    cache: Any,
    *,
    stop_ids_E: jax.Array,
    seen_BV: jax.Array | None,
    traced: TracedOptions,
    max_new_tokens: int,
    num_beams: int,
) -> DecodeOutput:
    """The `num_beams` best finished texts of each prompt, best first; arguments as in `sample`."""
    rows = logits_B1V.shape[0]
    extend = partial(_extend_beams, stop_ids_E=stop_ids_E, traced=traced, max_new_tokens=max_new_tokens)

    def unfinished(carry):
        state, _ = carry
        return state.not_done_B.any() & ~state.exhausted

    def advance(carry):
        state, cache = carry
        last_BG = jax.lax.dynamic_index_in_dim(state.open.ids_BGL, state.step - 1, axis=2, keepdims=False)
        logits_BGV, cache = decode_step(last_BG, state.step - 1, state.ancestors_BGL, cache)
        return extend(state, logits_BGV), cache

    def empty(texts: int, score: float) -> DecodeOutput:
        shape = (rows, texts, max_new_tokens)
        return DecodeOutput(jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.full(shape[:2], score))

    # The first step has one parent beam; transformers has `num_beams` equal ones, all but one impossible.
    state = Beams(
        0,
        empty(1, 0.0),
        jnp.full((rows, 1, max_new_tokens), -1, jnp.int32),
        None if seen_BV is None else seen_BV[:, None],
        empty(num_beams, IMPOSSIBLE),
        jnp.zeros((rows, num_beams), bool),
        jnp.ones((rows,), bool),
        False,
    )
    return jax.lax.while_loop(unfinished, advance, (extend(state, logits_B1V), cache))[0].finished


def _extend_beams(
    state: Beams, logits_BGV: jax.Array, *, stop_ids_E: jax.Array, traced: TracedOptions, max_new_tokens: int
) -> Beams:
    """One step: select the best candidates. Some of them end, others are the next open beams."""
    step, scores_BG = state.step, state.open.scores_BG
    (rows, num_beams), vocabulary = state.finished.scores_BG.shape, logits_BGV.shape[-1]
    candidates = max(2, 1 + stop_ids_E.shape[0]) * num_beams  # enough to continue if all the best ones end
    log_p_BGV = jax.nn.log_softmax(logits_BGV)
    scores_BGV = log_p_BGV
    if state.seen_BGV is not None:
        scores_BGV = penalize(scores_BGV, state.seen_BGV, traced.repetition_penalty)
    scores_BGV = scores_BGV + scores_BG[..., None]
    # The best candidates of all beams are among the best candidates of each beam.
    each_BGM, token_BGM = largest(scores_BGV, min(candidates, vocabulary))
    score_BM, index_BM = jax.lax.top_k(each_BGM.reshape(rows, -1), candidates)
    parent_BM = index_BM // each_BGM.shape[-1]
    token_BM = jnp.take_along_axis(token_BGM.reshape(rows, -1), index_BM, axis=1).astype(jnp.int32)
    log_p_BM = jnp.take_along_axis(log_p_BGV.reshape(rows, -1), parent_BM * vocabulary + token_BM, axis=1)
    put = lambda old_BGL, new_BM: jax.lax.dynamic_update_index_in_dim(_pick(old_BGL, parent_BM), new_BM, step, axis=2)
    candidate = DecodeOutput(put(state.open.ids_BGL, token_BM), put(state.open.log_p_BGL, log_p_BM), score_BM)
    ends_BM = is_stop(token_BM, stop_ids_E) | (step + 1 >= max_new_tokens)

    # ---- Candidates that end: only the first `num_beams` count; the others exist to continue ----
    length = jnp.float32(step + 1) ** traced.length_penalty
    may_end_BM = ends_BM & (jnp.arange(candidates) < num_beams)[None]
    ended_BM = score_BM / length
    ended_BM = ended_BM + jnp.where(state.not_done_B[:, None], 0.0, IMPOSSIBLE)
    ended_BM = ended_BM + jnp.where(may_end_BM, 0.0, IMPOSSIBLE)
    pool = _concatenate(state.finished, candidate._replace(scores_BG=ended_BM))
    best_BG = jax.lax.top_k(pool.scores_BG, num_beams)[1]
    finished = jax.tree.map(lambda x: _pick(x, best_BG), pool)
    is_finished_BG = _pick(jnp.concatenate([state.is_finished_BG, may_end_BM], axis=1), best_BG)

    # ---- Candidates that continue ----
    open_BM = score_BM + jnp.where(ends_BM, IMPOSSIBLE, 0.0)
    next_BG = jax.lax.top_k(open_BM, num_beams)[1]
    open_beams = jax.tree.map(lambda x: _pick(x, next_BG), candidate._replace(scores_BG=open_BM))
    parent_BG = _pick(parent_BM, next_BG)
    own_BG = text_numbers(rows, num_beams)
    ancestors_BGL = jax.lax.dynamic_update_index_in_dim(_pick(state.ancestors_BGL, parent_BG), own_BG, step, axis=2)
    seen_BGV = state.seen_BGV
    if seen_BGV is not None:
        seen_BGV = _pick(seen_BGV, parent_BG) | is_token(_pick(token_BM, next_BG), vocabulary)
    worst_BG = jnp.where(is_finished_BG, finished.scores_BG.min(1, keepdims=True), IMPOSSIBLE)
    not_done_B = state.not_done_B & (open_beams.scores_BG[:, :1] / length > worst_BG).any(1)
    exhausted = ends_BM.all()
    return Beams(step + 1, open_beams, ancestors_BGL, seen_BGV, finished, is_finished_BG, not_done_B, exhausted)


def _pick(x: jax.Array, index_BG: jax.Array) -> jax.Array:
    """x[b, index_BG[b, g], ...]."""
    return jnp.take_along_axis(x, index_BG.reshape(*index_BG.shape, *[1] * (x.ndim - 2)), axis=1)


def _concatenate(a: DecodeOutput, b: DecodeOutput) -> DecodeOutput:
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), a, b)
